"""A Hugging Face model for the command: by directory, config.json, or the name of one in the local cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}
"""What ``--task`` takes, transformers' own words for its pipelines, and the class that loads a model for each."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cached_directory(target: str) -> Path | None:
    """The folder in the local Hugging Face cache of a model named as on the hub; None where ``target`` is no such name.

    Raises:
        UsageError: it is a name as on the hub, and the cache has no such model.
    """
    if not _HUB_ID.fullmatch(target) or Path(target).exists() or Path(target).suffix in (".py", ".json", ".onnx"):
        return None
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        raise UsageError(f"{target} needs transformers: pip install 'moeopt[transformers]'") from None
    found = try_to_load_from_cache(target, "config.json")
    if not isinstance(found, str):
        raise UsageError(
            f"{target} is neither a file nor a model in the local Hugging Face cache ({constants.HF_HUB_CACHE}); "
            f"moeopt downloads nothing: `hf download {target}` brings it, or give the model's directory"
        )
    return Path(found).parent


def weight_files(path: Path) -> list[Path]:
    """The files of a directory that hold weights; [] where there are none, and the model gets random ones."""
    return [*path.glob("*.safetensors")] or [*path.glob("pytorch_model*.bin")]


def load(path: Path, weights: bool, task: str | None, trust_remote_code: bool, seed: int) -> tuple[Any, Any]:
    """The model of a directory for its task, and made-up inputs for a call; random weights where there are none."""
    try:
        import torch
        import transformers
    except ImportError:
        raise UsageError(f"{path} needs transformers: pip install 'moeopt[transformers]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        torch.manual_seed(seed)
        auto = getattr(transformers, auto_class(path, task))
        if weights:
            model = auto.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True, dtype="auto")
        else:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
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


def auto_class(path: Path, task: str | None) -> str:
    """The class of transformers that loads the model: for ``task``, else for the architecture that its config names."""
    if task is not None:
        return TASKS[task]
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    own = [name for name in config.get("auto_map") or {} if name.startswith("AutoModel")]
    if own:
        return "AutoModelForCausalLM" if "AutoModelForCausalLM" in own else own[0]
    from transformers.models.auto import modeling_auto

    for architecture in config.get("architectures") or ():
        for mapping, auto in _MAPPINGS.items():
            if architecture in _names(getattr(modeling_auto, mapping)):
                return auto
    return "AutoModelForCausalLM"


def _names(mapping: PyObject) -> set[str]:
    """The classes that a mapping of transformers names; one type of model may have several."""
    return {name for value in mapping.values() for name in (value if isinstance(value, tuple) else (value,))}


_MAPPINGS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AutoModelForQuestionAnswering",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForImageClassification",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "AutoModelForImageTextToText",
    "MODEL_MAPPING_NAMES": "AutoModel",
}
"""transformers' tables of architectures, and the class that loads what a table names."""
