"""What a command works on: ``module:factory``, ``file.py:factory``, a Hugging Face directory or cached model, or a
config.json."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeopt.bundle.manifest import is_bundle
from moeopt.checkpoint.tasks import check_task
from moeopt.cli.early import check_code
from moeopt.cli.hugging_face import cached_directory, load, weight_files, weights_of_cached
from moeopt.errors import UsageError
from moeopt.onnx_in.read import SUFFIXES
from moeopt.other_files import directory_hint, file_hint
from moeopt.value_types import PyObject

FORMS = (
    "give module:factory, file.py:factory, a Hugging Face model directory or the name of a cached model, a "
    "config.json, or an .onnx file (a factory returns the model, or the model and its example inputs)"
)


@dataclass(frozen=True)
class CommandTarget:
    """What the words name: a factory, or the directory of a Hugging Face model; nothing of it is loaded yet.

    Attributes:
        words: as the user wrote them.
        directory: of a Hugging Face model; None for a factory.
        weights: its weight files; () where the model gets random weights.
        onnx: the file of an ONNX model; None for any other.
    """

    words: str
    directory: Path | None = None
    weights: tuple[Path, ...] = ()
    onnx: Path | None = None

    def random_weights(self, seed: int) -> str:
        """A sentence that the model's weights are random ones; "" where they are its own."""
        if self.directory is None or self.weights:
            return ""
        return (
            f"random weights, seed {seed}: {self.directory} holds config.json and no weights, so what is said of "
            "values is said of another model than the published one"
        )

    @property
    def bytes(self) -> int:
        """The size of the weight files; 0 where there are none."""
        if self.onnx is not None:
            beside = [self.onnx, *self.onnx.parent.glob(f"{self.onnx.name}*data*")]
            return sum(file.stat().st_size for file in {f.resolve() for f in beside} if file.is_file())
        return sum(file.stat().st_size for file in self.weights)


def find_target(target: str, task: str | None = None) -> CommandTarget:
    """What ``target`` names; reads no weight and needs no torch.

    ``UsageError`` says what is wrong with the target or the task.
    """
    check_task(task, f"--task {task}")
    path = Path(target)
    if is_bundle(path):
        raise UsageError(f"{target} is a bundle, optimised already: `moeopt verify {target}` checks it")
    if path.name.endswith(SUFFIXES) and path.is_file():
        if task is not None:
            raise UsageError(
                f"--task says how a Hugging Face model is loaded, and {target} is an ONNX file: leave it out"
            )
        return CommandTarget(target, onnx=path)
    if path.name == "config.json" and path.is_file():
        return CommandTarget(target, path.parent)
    if (path / "config.json").is_file():
        return CommandTarget(target, path, tuple(weight_files(path)))
    cached = cached_directory(target)
    if cached is not None:
        return CommandTarget(target, cached, tuple(weights_of_cached(target, cached)))
    where, colon, name = target.rpartition(":")
    if colon and name.isidentifier():
        if task is not None:
            raise UsageError(f"--task says how a Hugging Face model is loaded, and {target} is a factory: leave it out")
        check_code(where, target)
        return CommandTarget(target)
    what = "neither a file nor module:factory"
    if path.is_dir():
        what = directory_hint(path) or "a directory without config.json"
    if path.is_file():
        what = file_hint(path) or "a file of none of the forms that moeopt reads"
    if path.suffix == ".py" and path.is_file():
        what = f"a file of code without the name of a factory in it, as in {target}:build"
    raise UsageError(f"{target} is {what}: {FORMS}")


def load_target(
    target: str | CommandTarget, *, trust_remote_code: bool = False, seed: int = 0, task: str | None = None
) -> tuple[Any, Any]:
    """``(model, example_inputs)``, the model in eval mode; the inputs are None when the factory gives none.

    Of an ONNX file, the model is its path.

    ``UsageError`` says what is wrong with the target, the file and line in the user's code included.
    """
    found = target if isinstance(target, CommandTarget) else find_target(target, task)
    if found.onnx is not None:
        return os.fspath(found.onnx), None
    if found.directory is not None:
        return load(found.directory, bool(found.weights), task, trust_remote_code, seed)
    target = found.words
    where, _, name = target.rpartition(":")
    import torch

    torch.manual_seed(seed)
    made = _call(_factory(where, name, target), target)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise UsageError(f"{target} returned {type(model).__name__}, not a model: {FORMS}")
    return (model.eval() if isinstance(model, torch.nn.Module) else model), inputs


def check_data(target: str, option: str = "--data") -> tuple[str, str]:
    """The file or module and the name that ``option`` gives; ``UsageError`` where there is no such code."""
    where, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"{option} {target}: give module:function or file.py:function")
    check_code(where, f"{option} {target}")
    return where, name


def load_data(target: str, option: str = "--data") -> PyObject:
    """What the function of ``module:function`` or ``file.py:function`` returns: batches, or one call's inputs.

    ``UsageError`` says what is wrong with the target, the file and line in the user's code included.
    """
    where, name = check_data(target, option)
    return _call(_factory(where, name, target), target)


def _factory(where: str, name: str, target: str) -> Callable[[], Any]:
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None or not Path(where).is_file():
                raise UsageError(f"{target}: there is no file {where}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # classes in it can be found again by name
            sys.path.insert(0, str(Path(where).resolve().parent))
            sys.path.append(os.getcwd())  # a project's own packages, as `python -m moeopt` finds them; it hides nothing
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(where)
    except UsageError:
        raise
    except Exception as err:
        raise UsageError(f"{target}: importing {where} failed: {_format_error(err)}") from err
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{target}: {where} has no function {name!r}")
    return factory


def _call(factory: Callable[[], Any], target: str) -> PyObject:
    try:
        return factory()
    except Exception as err:
        raise UsageError(f"{target}: the factory raised {_format_error(err)}") from err


def _format_error(err: Exception) -> str:
    frame = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__}: {err} ({frame.filename}:{frame.lineno})"
