"""What transformers calls a cache: ``cache`` since 5.24, ``past_key_values`` before and in code beside the library.

A model's ``forward`` has a parameter of that name, and what it returns a field; where a model's own code is older than
the library the two may differ. An engine is called by either name; its graph's inputs have the names of other runtimes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

OLD, NEW = "past_key_values", "cache"
NAMES = (NEW, OLD)


def parameter_named(parameters: Collection[str]) -> str:
    """Which of ``parameters`` takes the cache; "" where none does."""
    return next((name for name in NAMES if name in parameters), "")


def cache_parameter(model: PyObject) -> str:
    """Which parameter of the ``forward`` of ``model`` takes the cache; "" where none does."""
    return parameter_named(inspect.signature(type(model).forward).parameters)


def field_named(result: PyObject) -> str:
    """Which field of an output class of transformers has the cache; the old name for any other class."""
    fields = {field.name for field in dataclasses.fields(result)} if dataclasses.is_dataclass(result) else set()
    return parameter_named(fields) or OLD


def under_one_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with its cache, under whichever name it came, as ``past_key_values``.

    Raises:
        UsageError: two caches.
    """
    if given.get(NEW) is None:
        return {name: value for name, value in given.items() if name != NEW}
    if given.get(OLD) is not None:
        raise UsageError(f"{NEW} and {OLD} are two names of one argument; give it once")
    return {**{name: value for name, value in given.items() if name != NEW}, OLD: given[NEW]}
