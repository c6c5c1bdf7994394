"""The model of a directory without its weights: modules and shapes, on the meta device, and where its layers are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moeopt.checkpoint.tasks import auto_class, check_task
from moeopt.errors import UsageError
from moeopt.value_types import PyObject


@dataclass(frozen=True)
class Structure:
    """A model on the meta device.

    Attributes:
        layers: the paths of its layers in order: the entries of the list of modules that holds most of its weights; ()
            where it has no such list.
        bytes: of all its parameters, each counted once.
        layer_bytes: of the largest layer.
        rest_bytes: of the largest Parameter outside the layers.
    """

    model: PyObject
    layers: tuple[str, ...]
    bytes: int
    layer_bytes: int
    rest_bytes: int


def structure_of(path: Path, task: str | None, trust_remote_code: bool, dtype: torch.dtype | None) -> Structure:
    """What the ``config.json`` of a directory describes.

    Raises:
        UsageError: transformers is missing or cannot build it; code of the directory's own was not allowed to run;
            a task that is none.
    """
    check_task(task, f"task={task!r}")
    try:
        import transformers
    except ImportError:
        raise UsageError(f"{path} needs transformers: pip install 'moeopt[transformers]'") from None
    auto = getattr(transformers, auto_class(path, task))
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        stored = dtype or getattr(config, "dtype", None)
        with torch.device("meta"):
            model = auto.from_config(
                config, trust_remote_code=trust_remote_code, **({} if stored is None else {"dtype": stored})
            )
    except Exception as err:
        hint = ""
        if not trust_remote_code and "trust_remote_code" in str(err):
            hint = ": add --trust-remote-code (trust_remote_code=True), if the Python code that it brings is to be run"
        raise UsageError(f"{path}: transformers cannot load it{hint} ({type(err).__name__}: {str(err)[:300]})") from err
    return measured(model)


def measured(model: nn.Module) -> Structure:
    """A model with the sizes of its parts."""
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    path, layers = max(lists, key=lambda item: _bytes(item[1]), default=("", nn.ModuleList()))
    inside = {id(p) for p in layers.parameters()}
    rest = [p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside]
    return Structure(
        model,
        tuple(f"{path}.{name}" if path else name for name, _ in layers.named_children()),
        _bytes(model),
        max((_bytes(layer) for layer in layers), default=0),
        max(rest, default=0),
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
