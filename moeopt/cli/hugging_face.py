"""A Hugging Face model for the command: by directory, config.json, or the name of one in the local cache."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from moeopt.checkpoint.tasks import auto_class
from moeopt.errors import CheckpointError, UsageError
from moeopt.hub_cache import cached_folder, is_hub_name, may_be_a_name
from moeopt.other_files import file_hint, other_weights


def cached_directory(target: str) -> Path | None:
    """The folder in the local Hugging Face cache of a model named as on the hub; None where ``target`` is no such name.

    Raises:
        UsageError: it is a name as on the hub, and the cache has no such model.
    """
    if not is_hub_name(target):
        return None
    try:
        from huggingface_hub import constants

        found = cached_folder(target)
    except ImportError:
        raise UsageError(f"{target} needs transformers: pip install 'moeopt[transformers]'") from None
    if found is None:
        if not may_be_a_name(target):
            raise UsageError(f"{target} is no file, and no model on the Hugging Face hub can have this name: check it")
        folder = Path(target).parent
        if folder.is_dir():
            near = difflib.get_close_matches(Path(target).name, [path.name for path in folder.iterdir()], 1)
            meant = f"; did you mean {folder / near[0]}?" if near else ""
            raise UsageError(
                f"{target}: {folder} has no {Path(target).name}{meant or ': give a file or directory that is there'}, "
                "and no model of this name is in the local Hugging Face cache"
            )
        raise UsageError(
            f"{target} is neither a file nor a model in the local Hugging Face cache ({constants.HF_HUB_CACHE}); "
            f"moeopt downloads nothing: `hf download {target}` brings it, or give the model's directory"
        )
    return found


def weight_files(path: Path) -> list[Path]:
    """The files of a directory that hold weights; [] where it has a config alone, and the model gets random ones.

    Raises:
        CheckpointError: there are none, and an index, an interrupted download or weights in another form say that there
            should be.
    """
    found = [*path.glob("*.safetensors")] or [*path.glob("pytorch_model*.bin")]
    if found:
        return found
    from moeopt.published.headers import interrupted  # needs torch, for which a mistyped path shall not wait

    index = next(path.glob("*.index.json"), None)
    other = other_weights(path)
    way = interrupted(path) or (index and f"{index.name} names some; fetch them")
    way = way or (other and f"*.safetensors and pytorch_model*.bin are read, and {other.name} is {file_hint(other)}")
    if way:
        raise CheckpointError(f"{path} holds no weights, and random numbers are not meant here: {way}")
    return found


def weights_of_cached(name: str, folder: Path) -> list[Path]:
    """The weight files of a model that was named as on the hub.

    Raises:
        CheckpointError: its cache has none: who names a published model means its weights, not random ones.
    """
    found = weight_files(folder)
    if not found:
        raise CheckpointError(
            f"{name}: the local cache ({folder}) has its config.json and no weights: `hf download {name}` brings them; "
            f"for a trial with random weights give {folder}/config.json"
        )
    return found


def load(path: Path, weights: bool, task: str | None, trust_remote_code: bool, seed: int) -> tuple[Any, Any]:
    """The model of a directory for its task, and made-up inputs for a call; random weights where there are none."""
    try:
        import torch
        import transformers
    except ImportError:
        raise UsageError(f"{path} needs transformers: pip install 'moeopt[transformers]'") from None
    auto = getattr(transformers, auto_class(path, task))
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        torch.manual_seed(seed)
        if weights:
            _rehearse(path, task, trust_remote_code)
            model = auto.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True, dtype="auto")
        else:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except CheckpointError:
        raise
    except Exception as err:
        hint = "" if trust_remote_code or "trust_remote_code" not in str(err) else ": add --trust-remote-code"
        raise UsageError(f"{path}: transformers cannot load it{hint} ({type(err).__name__}: {str(err)[:300]})") from err
    from moeopt.find.example_inputs import made_up

    try:
        return model.eval(), made_up(model, seed)[1]
    except UsageError as err:
        raise UsageError(
            f"{path}: no inputs could be made up for it ({err}): write a factory that returns the model and its "
            "example inputs, and give file.py:factory"
        ) from None


def _rehearse(path: Path, task: str | None, trust_remote_code: bool) -> None:
    """``CheckpointError`` where the safetensors files of a directory do not become its model, or hold codes that would
    be taken for weights: transformers would cast them, and say nothing."""
    from moeopt.checkpoint.directory import CheckpointDirectory
    from moeopt.checkpoint.rehearsal import rehearse
    from moeopt.checkpoint.structure import structure_of
    from moeopt.published.directory_of import stated_by

    if any(path.glob("*.safetensors")) and not stated_by(path):  # a quantiser reads its codes itself
        rehearse(CheckpointDirectory(path), structure_of(path, task, trust_remote_code, None).model, None)
