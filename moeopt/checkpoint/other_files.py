"""Files that hold weights or an engine and no model that can be read, and how their owner gets one."""

from __future__ import annotations

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
    ".pt2": "an exported program: give torch.export.load({name!r}) to moeopt.optimize",
    ".plan": "an engine of TensorRT, built already: give the model that it was made of",
    ".engine": "an engine of TensorRT, built already: give the model that it was made of",
    ".h5": "a model of Keras: export it to an .onnx file",
    ".keras": "a model of Keras: export it to an .onnx file",
    ".tflite": "a model of TensorFlow Lite: export the original to an .onnx file",
    ".msgpack": "weights of Flax: load them in PyTorch, from_pretrained(folder, from_flax=True)",
    ".json": "a JSON file of another name than config.json: give the directory of the model",
}
_MADE = "; in Python, give that model to moeopt.optimize, on the command line a file.py:factory that returns it"


def file_hint(path: Path) -> str:
    """What the file at ``path`` is by its name, and the way out; "" for others, and where there is none."""
    hint = _HINTS.get(path.suffix.lower(), "")
    if not hint or not path.is_file():
        return ""
    text = hint.format(name=path.name, parent=path.parent)
    return text + (_MADE if hint is _STATE else "")
