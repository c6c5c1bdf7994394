"""What a command works on: ``module:factory``, ``file.py:factory``, a Hugging Face directory, or a config.json."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeopt.bundle.manifest import is_bundle
from moeopt.cli.early import check_code
from moeopt.errors import UsageError

FORMS = (
    "give module:factory, file.py:factory, a Hugging Face model directory, or a config.json "
    "(a factory returns the model, or the model and its example inputs)"
)
TOKENS = 16
"""How many made-up token ids each of two sequences has: export takes a batch of one for a fixed size."""


def load_target(target: str, *, trust_remote_code: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """``(model, example_inputs)``, the model in eval mode; the inputs are None when the factory gives none.

    ``UsageError`` says what is wrong with the target, the file and line in the user's code included.
    """
    path = Path(target)
    if is_bundle(path):
        raise UsageError(f"{target} is a bundle, optimised already: `moeopt verify {target}` checks it")
    if path.name == "config.json" and path.is_file():
        return _hugging_face(path.parent, False, trust_remote_code, seed)
    if (path / "config.json").is_file():
        weights = any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
        return _hugging_face(path, weights, trust_remote_code, seed)
    where, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        what = "a directory without config.json" if path.is_dir() else "neither a file nor module:factory"
        if path.suffix == ".py" and path.is_file():
            what = f"a file of code without the name of a factory in it, as in {target}:build"
        raise UsageError(f"{target} is {what}: {FORMS}")
    check_code(where, target)
    import torch

    torch.manual_seed(seed)
    made = _call(_factory(where, name, target), target)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise UsageError(f"{target} returned {type(model).__name__}, not a model: {FORMS}")
    return (model.eval() if isinstance(model, torch.nn.Module) else model), inputs


def check_data(target: str) -> tuple[str, str]:
    """The file or module and the name that ``--data`` gives; ``UsageError`` where there is no such code."""
    where, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"--data {target}: give module:function or file.py:function")
    check_code(where, f"--data {target}")
    return where, name


def load_data(target: str) -> Any:
    """What the function of ``module:function`` or ``file.py:function`` returns: batches, or one call's inputs.

    ``UsageError`` says what is wrong with the target, the file and line in the user's code included.
    """
    where, name = check_data(target)
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


def _call(factory: Callable[[], Any], target: str) -> Any:
    try:
        return factory()
    except Exception as err:
        raise UsageError(f"{target}: the factory raised {_format_error(err)}") from err


def _format_error(err: Exception) -> str:
    frame = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__}: {err} ({frame.filename}:{frame.lineno})"


def _hugging_face(path: Path, weights: bool, trust_remote_code: bool, seed: int) -> tuple[Any, Any]:
    """The causal language model of a directory, with made-up token ids; random weights when there are none."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UsageError(f"{path} needs transformers: pip install 'moeopt[transformers]'") from None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        torch.manual_seed(seed)
        if weights:
            model = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True, dtype="auto"
            )
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as err:
        hint = "" if trust_remote_code or "trust_remote_code" not in str(err) else ": add --trust-remote-code"
        raise UsageError(f"{path}: transformers cannot load it{hint} ({type(err).__name__}: {str(err)[:300]})") from err
    vocabulary = getattr(config.get_text_config(), "vocab_size", 2)
    ids = torch.randint(0, vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    return model.eval(), {"input_ids": ids, "use_cache": False}
