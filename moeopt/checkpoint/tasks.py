"""What a model of a directory is for, in transformers' words, and the class of transformers that loads it."""

from __future__ import annotations

import difflib
from pathlib import Path

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


def check_task(task: str | None, named: str) -> None:
    """``UsageError`` for a task that is none; ``named`` is how it was given, like "--task chat"."""
    if task is not None and task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{named} is none: {meant}it may be {', '.join(TASKS)}")


def auto_class(path: Path, task: str | None) -> str:
    """The class of transformers that loads the model: for ``task``, else for the architecture that its config names."""
    if task is not None:
        return TASKS[task]
    from moeopt.inspection.config_file import config_fields

    config = config_fields(path / "config.json")
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
