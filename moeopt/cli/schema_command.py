"""``moeopt schema``: the JSON Schema (2020-12) of what moeopt writes, made from the types that write and read it."""

from __future__ import annotations

import json
import typing
from typing import Annotated, Any

import msgspec
import typer

from moeopt.errors import UsageError
from moeopt.obstacles import Rank, Stage
from moeopt.value_types import JsonValue

KINDS = ("report", "certificate", "manifest")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
NOT_FINITE = {"enum": ["inf", "-inf", "nan"]}
"""How infinities and NaN are written: strict JSON has no number for them."""


def schema_command(
    kind: Annotated[str, typer.Argument(help="report, certificate or manifest (a bundle's moeopt.json)")],
) -> None:
    """Print the JSON Schema of a report, a certificate or a bundle's manifest."""
    print(json.dumps(json_schema(kind), indent=2))


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of ``kind``: ``report``, ``certificate`` or ``manifest``.

    Keys that a schema does not name may be there: a newer moeopt says more in the same schema version.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no schema of {kind!r}: it is one of {', '.join(KINDS)}")
    cls, added = _subject(kind)
    (body,), parts = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
    top = parts.pop(body["$ref"].rsplit("/", 1)[1])
    top["properties"] = added | top["properties"]
    top["required"] = list(added) if kind == "manifest" else list(top["properties"])  # reports name every field
    if kind == "report":  # an obstacle's rank and stage are written as words
        for name, words in (("rank", Rank), ("stage", Stage)):
            del parts[words.__name__]
            parts["Obstacle"]["properties"][name] = {"enum": [word.name.lower() for word in words]}
    for part in (top, *parts.values()):
        part.pop("description", None)  # docstrings speak to readers of the Python class
        for field in part.get("properties", {}).values():
            if field.get("default") in ([], (), {}):  # msgspec 0.22 writes it for some fields, 0.23 for all
                del field["default"]
    schema = {"$schema": DIALECT, "title": f"moeopt {kind}", **{k: v for k, v in top.items() if k != "title"}}
    return {**_with_not_finite(schema), "$defs": _with_not_finite(dict(sorted(parts.items())))}


def _subject(kind: str) -> tuple[type, dict[str, Any]]:
    """The class that is written, and the keys that its writer adds."""
    from moeopt.bundle import manifest
    from moeopt.bundle.schemas import ManifestFile

    if kind == "manifest":
        file = {
            "type": "object",
            "properties": {"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "bytes": {"type": "integer"}},
            "required": ["sha256", "bytes"],
        }
        return ManifestFile, {
            "format": {"const": manifest.FORMAT},
            "schema": {"const": manifest.SCHEMA},
            "backend": {"type": "string"},
            "files": {"type": "object", "additionalProperties": file},
        }
    from moeopt.passes.base import PassRecord
    from moeopt.report import SCHEMA, Report
    from moeopt.verification import certificate

    if kind == "report":
        types = typing.get_type_hints(Report, localns={"PassRecord": PassRecord})
        fields = [(name, types[name]) for name in types if name != "certificate"]  # which has a JSON of its own
        return msgspec.defstruct("Report", fields), {"schema": {"const": SCHEMA}}
    passed = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
    return certificate.Certificate, {
        "schema": {"const": certificate.SCHEMA},
        "passed": passed,
        "equivalent": passed,
    }


def _with_not_finite(value: JsonValue) -> JsonValue:
    """``value``, with "inf" and "nan" allowed wherever it has a number."""
    if isinstance(value, dict):
        if value.get("type") == "number":
            kept = {k: v for k, v in value.items() if k == "default"}
            return {"anyOf": [{k: v for k, v in value.items() if k != "default"}, NOT_FINITE], **kept}
        if "anyOf" in value:  # msgspec 0.20 writes "or null" first, later versions write it last
            value = {**value, "anyOf": sorted(value["anyOf"], key=lambda one: one == {"type": "null"})}
        return {k: _with_not_finite(v) for k, v in value.items()}
    return [_with_not_finite(v) for v in value] if isinstance(value, list) else value
