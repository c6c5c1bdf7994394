"""Files that hold weights or an engine and no model that can be read, and how their owner gets one.

Nothing of a file is run: of a zip archive the names are read, and of a pickle in it the names of the classes.
"""

from __future__ import annotations

import contextlib
import pickletools
import zipfile
from pathlib import Path

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
