"""From what the user has (a model, a config, a file, a directory) to a model without weights.

A config becomes a model on the meta device: every parameter has its shape and no memory.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt.capture.divided_models import flattened_parameter
from moeopt.capture.unreadable_models import refuse_scripted
from moeopt.errors import UsageError
from moeopt.hub_cache import on_this_disk
from moeopt.inspection.config_file import checked_fields, config_fields
from moeopt.onnx_in.read import is_onnx, read_onnx
from moeopt.onnx_in.unroll import unrolled
from moeopt.onnx_in.whole_file import interpreted
from moeopt.other_files import directory_hint, file_hint
from moeopt.published.headers import Stored, absent_files, stored_weights
from moeopt.rewrite.install import rewritten_forward
from moeopt.value_types import PyObject

AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM",
        "AutoModelForImageClassification", "AutoModel")  # fmt: skip
FORMS = "give a model, a Hugging Face config, a config.json, a directory with one, a dict, or an .onnx file"
_CORE = re.compile(r"hidden_size|num_hidden_layers|vocab_size|num_attention_heads|\w*experts\w*")


@dataclass
class Loaded:
    """``stored`` is what the checkpoint's headers say, where there is a checkpoint; ``experts`` is how many experts the
    chains of products in an ONNX graph are, by block."""

    model: nn.Module
    name: str
    source: str
    stored: Stored | None = None
    notes: list[str] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)


def load(target: PyObject, trust_remote_code: bool = False) -> Loaded:
    """The model to inspect.

    Raises:
        UsageError: no model can be made of ``target``; the message says why and what to give.
        CheckpointError: a safetensors header is damaged.
    """
    if isinstance(target, nn.Module):
        refuse_scripted(target)
        _refuse_parts(target)
        return Loaded(target, type(target).__name__, "model")
    if isinstance(target, torch.export.ExportedProgram):
        return Loaded(target.module(), "ExportedProgram", "model")
    if is_onnx(target):
        made = interpreted(unrolled(read_onnx(target)))
        name = str(target) if isinstance(target, (str, os.PathLike)) else "ONNX model"
        return Loaded(made, name, "model", experts=made.chains_of_regions)
    if isinstance(target, (str, os.PathLike)):
        return _from_path(on_this_disk(Path(target)), trust_remote_code)
    if isinstance(target, Mapping):
        return _from_dict(checked_fields(dict(target), "the dict"), "the dict", None, trust_remote_code)
    if hasattr(target, "to_dict") and hasattr(target, "model_type"):
        return _built(target, f"{target.model_type} config", "config", [])
    raise UsageError(f"a {type(target).__name__} cannot be read: {FORMS}")


def _refuse_parts(model: nn.Module) -> None:
    """``UsageError`` where this process has a part of the model, and what is not here has left no shape."""
    if name := flattened_parameter(model):
        raise UsageError(
            f"{name} of {type(model).__name__} lies in a vector of FSDP, without a shape of its own, so nothing here "
            "can be counted: give the model as it is before FullyShardedDataParallel, or its config"
        )
    forwards = ((path, rewritten_forward(module)) for path, module in model.named_modules())
    if found := next((path or "the list of experts" for path, f in forwards if f is not None and f.divided), ""):
        raise UsageError(
            f"{found} of {type(model).__name__} has a part of its experts here, the others on other ranks: give the "
            "model that was optimised, as it is before moeopt.distribute, or its config"
        )


def _from_path(path: Path, trust: bool) -> Loaded:
    if path.is_file() and path.suffix == ".json":
        return _from_dict(config_fields(path), str(path), path.parent, trust)
    if path.is_dir():
        if (path / "moeopt.json").is_file():  # its golden runs are no weights, and its config is the original's
            raise UsageError(
                f"{path} is a bundle: `moeopt info {path}` says what it holds; inspect the model that it was made of"
            )
        config = path / "config.json"
        stored = stored_weights(path)
        if config.is_file():
            loaded = _from_dict(config_fields(config), str(config), path, trust)
            loaded.stored = stored
            if absent := absent_files(path):
                loaded.notes.append(
                    f"{absent[0]} is missing, and the directory's index names it ({len(absent)} such files): what is "
                    "said of its files is not of all, and only inspecting works until they are there"
                )
            loaded.source = "config" if stored is None else "checkpoint"
            return loaded
        if hint := directory_hint(path):
            raise UsageError(f"{path} is {hint}")
        raise UsageError(f"{path} has neither config.json nor weights: {FORMS}")
    if path.exists():
        raise UsageError(f"{path} is {file_hint(path) or f'no config: {FORMS}'}")
    raise UsageError(f"{path} does not exist: {FORMS}")


def _from_dict(fields: dict[str, Any], where: str, directory: Path | None, trust: bool) -> Loaded:
    transformers = _transformers(where)
    name = str((fields.get("architectures") or [fields.get("model_type") or "?"])[0])
    kind, notes = fields.get("model_type"), []
    known = transformers.CONFIG_MAPPING
    if kind in known:
        config_class = known[kind]
    else:
        config_class = _by_architecture(transformers, fields)
        if config_class is None:
            return Loaded(_remote(transformers, fields, where, directory, trust), name, "config")
        notes.append(f"model_type {kind!r} is not transformers' own; built as {name}, which its config names")
        fields = {k: v for k, v in fields.items() if k != "model_type"}
    _refuse_missing(config_class, fields, where)
    try:
        config = config_class.from_dict({k: v for k, v in fields.items() if k != "quantization_config"})
    except Exception as err:
        raise UsageError(f"{where}: transformers refuses this config ({type(err).__name__}: {_short(err)})") from err
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "some way")
        notes.append(f"the checkpoint is quantised ({method}); counted as the model that it stands for")
    return _built(config, name, "config", notes, where)


def _built(config: PyObject, name: str, source: str, notes: list[str], where: str = "") -> Loaded:
    transformers = _transformers(where or "a config")
    chosen = _auto_class(transformers, config)
    if chosen is None:
        raise UsageError(
            f"{where or name}: transformers {transformers.__version__} has no model for {type(config).__name__}"
        )
    try:
        with torch.device("meta"):
            model = chosen.from_config(config)
    except Exception as err:
        raise UsageError(
            f"{where or name}: transformers cannot build this model ({type(err).__name__}: {_short(err)}); "
            "check the sizes in the config"
        ) from err
    return Loaded(model, name, source, None, notes)


def _auto_class(transformers: PyObject, config: PyObject) -> PyObject:
    """The Auto class whose model the config's ``architectures`` names, else the first that knows the config.

    A config of several parts (vision, text) is a model of several parts where there is one.
    """
    parts = config.get_text_config() is not config
    autos = [getattr(transformers, n) for n in AUTO if hasattr(transformers, n)]
    autos = [a for a in autos if type(config) in a._model_mapping]
    wanted = set(getattr(config, "architectures", None) or ())
    for auto in autos:
        made = auto._model_mapping[type(config)]
        if wanted & {c.__name__ for c in (made if isinstance(made, tuple) else (made,))}:
            return auto
    if parts:
        autos.sort(key=lambda a: a.__name__ != "AutoModelForImageTextToText")
    return autos[0] if autos else None


def _by_architecture(transformers: PyObject, fields: dict[str, Any]) -> PyObject:
    """The config class of a model of transformers that ``architectures`` names: such models share another's code."""
    for name in fields.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return getattr(found, "config_class", None)
    return None


def _remote(
    transformers: PyObject, fields: dict[str, Any], where: str, directory: Path | None, trust: bool
) -> nn.Module:
    kind = fields.get("model_type")
    if kind is None and not fields.get("auto_map"):
        raise UsageError(f"{where} has no field model_type, so nothing tells which model it is for: add it")
    if not fields.get("auto_map"):
        near = difflib.get_close_matches(str(kind), list(transformers.CONFIG_MAPPING.keys()), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{where}: transformers {transformers.__version__} does not know model_type {kind!r}{hint}")
    if not trust or directory is None:
        raise UsageError(
            f"{where}: this model is defined by Python code of its own (auto_map), which moeopt did not run; "
            "if you trust the code, pass --trust-remote-code (trust_remote_code=True) with the directory"
        )
    options = {"trust_remote_code": True, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **options)
        auto = next((n for n in AUTO if n in fields["auto_map"]), "AutoModelForCausalLM")
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, auto).from_config(config, trust_remote_code=True)
    except Exception as err:
        raise UsageError(f"{where}: the model's own code failed ({type(err).__name__}: {_short(err)})") from err
    return model


def _refuse_missing(config_class: PyObject, fields: dict[str, Any], where: str) -> None:
    """``UsageError`` where a size is missing that the class would fill in with that of its default model."""
    nested = [(k, c) for k, c in getattr(config_class, "sub_configs", {}).items() if isinstance(fields.get(k), dict)]
    text = [(c, fields[k], f"{k}.") for k, c in nested if "text" in k]
    for cls, given, prefix in text or [(config_class, fields, "")]:
        if not hasattr(cls, "attribute_map"):  # an Auto class: the part's own model_type decides
            continue
        try:
            defaults = cls().to_dict()
        except Exception:  # a class with no defaults refuses a missing field by itself
            continue
        aliases: dict[str, set[str]] = {}
        for alias, name in cls.attribute_map.items():
            aliases.setdefault(name, set()).add(alias)
        absent = [
            n
            for n, v in defaults.items()
            if _CORE.fullmatch(n) and isinstance(v, int) and not isinstance(v, bool) and v > 0
            and n not in given and not aliases.get(n, set()) & set(given)
        ]  # fmt: skip
        if absent:
            names, values = (", ".join(prefix + n for n in absent), ", ".join(str(defaults[n]) for n in absent))
            raise UsageError(
                f"{where} lacks {names}; transformers would fill in the sizes of its default model ({values}), and the "
                "counts would be another model's: add them"
            )


def _transformers(where: str) -> PyObject:
    try:
        import transformers
    except ImportError:
        raise UsageError(f"{where} needs transformers: pip install 'moeopt[transformers]'") from None
    return transformers


def _short(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
