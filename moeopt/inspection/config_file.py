"""A config.json as a table of fields, of which those are checked that decide how a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeopt.errors import UsageError
from moeopt.published.headers import unreadable

_KINDS: dict[str, type] = {"model_type": str, "quantization_config": dict, "auto_map": dict}


def config_fields(path: Path) -> dict[str, Any]:
    """What a config.json says.

    Raises:
        UsageError: it is no JSON, or one of its fields is of another kind than it has to be.
        CheckpointError: this process may not read it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as err:
        raise unreadable(path, err) from err
    except (ValueError, OSError, RecursionError) as err:
        raise UsageError(f"{path} cannot be read as JSON ({err}): fetch the file again") from err
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__}, not a table of fields; a config.json is one")
    return checked_fields(found, str(path))


def checked_fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """``fields`` with ``architectures`` as a list: a name that stands alone is taken for a list of one.

    Raises:
        UsageError: a field is of another kind than it has to be; ``where`` names the file.
    """
    for key, kind in _KINDS.items():
        if not isinstance(fields.get(key), (kind, type(None))):
            raise UsageError(f"{where}: {key} is {fields[key]!r:.80}, and has to be a {kind.__name__}: fetch it again")
    named = fields.get("architectures") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UsageError(
            f"{where}: architectures is {named!r:.80}, and has to be a list of names of transformers' classes, like "
            "['Qwen3MoeForCausalLM']: fetch it again, or mend the entry"
        )
    return {**fields, "architectures": named} if named else fields
