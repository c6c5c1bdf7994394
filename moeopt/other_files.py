"""Files that hold weights or an engine and no model that can be read, and how their owner gets one.

Nothing of a file is run: of a zip archive the names are read, and of a pickle in it the names of the classes.
"""

from __future__ import annotations

import contextlib
import os
import pickletools
import re
import zipfile
from pathlib import Path

from moeopt.listed import listed

_STATE = "weights without code: make the model, model.load_state_dict(torch.load({name!r}))"
_HINTS = {
    ".safetensors": "the weights of a model: give its directory, {parent}, with config.json in it",
    ".gguf": "a GGUF file: transformers reads many into PyTorch, AutoModelForCausalLM.from_pretrained(folder, "
    "gguf_file={name!r}); save_pretrained of that model writes a directory to give",
    ".bin": _STATE,
    ".pt": _STATE,
    ".pth": _STATE,
    ".ckpt": _STATE,
    ".pt2": "an exported program: torch.export.load({name!r}) gives it back",
    ".plan": "an engine of TensorRT, built already: give the model that it was made of",
    ".engine": "an engine of TensorRT, built already: give the model that it was made of",
    ".h5": "a model of Keras: export it to an .onnx file",
    ".keras": "a model of Keras: export it to an .onnx file",
    ".tflite": "a model of TensorFlow Lite: export the original to an .onnx file",
    ".msgpack": "weights of Flax, which transformers 4 reads: with pip install 'transformers<5' flax, "
    "AutoModelForCausalLM.from_pretrained(folder, from_flax=True).save_pretrained(new) writes a directory to give",
    ".json": "a JSON file of another name than config.json: give the directory of the model",
}
_SCRIPT = (
    "a TorchScript archive, in which the Python modules are no more: give the nn.Module that it was made of, with its "
    "weights, model.load_state_dict(torch.jit.load({name!r}).state_dict())"
)
_PICKLED = (
    "a pickle of {kind} objects: torch.load({name!r}, weights_only=False) gives them back where their code can be "
    "imported, and runs code that the file names, so only do so with a file that you trust"
)
_COMPILED = "a package of AOTInductor, compiled already: give the model that it was made of"
_MADE = "; in Python, give that model to moeopt.optimize, on the command line a file.py:factory that returns it"
_PLAIN = {"collections", "builtins", "__builtin__", "numpy", "_codecs", "copyreg", "copy_reg", "torch"}
"""Packages whose values a file of weights may hold beside tensors."""
_MOST = 1 << 26


_FOLDERS = {
    "moeopt.json": "a bundle, optimised already: moeopt.load({path!r}) runs it; give the model that it was made of",
    "adapter_config.json": "an adapter, which changes another model: merge the two, "
    "PeftModel.from_pretrained(base, {path!r}).merge_and_unload().save_pretrained(new), and give new",
    "model_index.json": "a pipeline of diffusers, of several models: load the one with the experts, and give it in "
    "Python",
    "params.json": "a model in its maker's own form: convert it to that of transformers, or fetch it in that form",
}
_OF_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.\w+")
"""Files that trainers leave beside a model's weights."""


def home_hint(path: Path) -> str:
    """What to give for a path from a home directory on, led in by "; "; "" for others: shells expand it, few else."""
    if not path.parts or not path.parts[0].startswith("~") or Path(path.parts[0]).exists():
        return ""
    return f"; nothing expands ~ here: give {os.path.expanduser(path)}"


def directory_hint(path: Path) -> str:
    """What a directory without config.json is by the files in it, and the way out; "" for others."""
    if not path.is_dir():
        return ""
    for name, hint in _FOLDERS.items():
        if (path / name).is_file():
            return hint.format(path=str(path))
    models = [config.parent for config in sorted([*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")])]
    if models:
        return f"a directory with the model's directory in it: give {listed(models)}"
    if file := next(iter(sorted(path.glob("*.onnx"))), None):
        return f"a directory with an ONNX model in it: give the file, {file}"
    other = other_weights(path)
    if any(path.glob("*.safetensors")) or (other is not None and _HINTS[other.suffix.lower()] is _STATE):
        return "a directory that has weights and no config.json, which says how they are used: add the model's own"
    return "" if other is None else f"a directory without config.json, and {other.name} in it is {file_hint(other)}"


def other_weights(path: Path) -> Path | None:
    """The first file of a directory that holds weights, and not in a form that a model's directory is read in."""
    forms = set(_HINTS) - {".json", ".safetensors", ".plan", ".engine"}
    files = (file for file in sorted(path.iterdir()) if file.suffix.lower() in forms and file.is_file())
    return next((file for file in files if not _OF_TRAINING.fullmatch(file.name)), None)


def file_hint(path: Path) -> str:
    """What the file at ``path`` is by its name and its contents, and the way out; "" for others, and where none is."""
    hint = _HINTS.get(path.suffix.lower(), "")
    if not hint or not path.is_file():
        return ""
    kind = ""
    if hint is _STATE or path.suffix.lower() == ".pt2":
        hint, kind = _by_contents(path, hint)
    text = hint.format(name=path.name, parent=path.parent, kind=kind)
    return text + (_MADE if hint in (_STATE, _SCRIPT, _PICKLED, _HINTS[".pt2"]) else "")


def _by_contents(path: Path, hint: str) -> tuple[str, str]:
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # no zip, or a broken one: told by its name
        names = archive.namelist()
        if any("/aotinductor/" in name for name in names):
            return _COMPILED, ""
        if any("/code/__torch__" in name or name.endswith("/constants.pkl") for name in names):
            return _SCRIPT, ""
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is not None and archive.getinfo(pickled).file_size <= _MOST:
            kind = _class_in(archive.read(pickled))
            return (_PICKLED, kind) if kind else (hint, "")
    return hint, ""


def _class_in(pickled: bytes) -> str:
    """The first class that a pickle names and that is no plain value's; "" where there is none."""
    for op, value, _ in pickletools.genops(pickled):
        if op.name == "GLOBAL":
            module, _, name = str(value).partition(" ")
            if module.partition(".")[0] not in _PLAIN or module.startswith("torch.nn.modules"):
                return f"{module}.{name}"
    return ""
