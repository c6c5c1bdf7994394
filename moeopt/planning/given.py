"""What a user gives as an object of ours, its plain values, or a JSON file of these."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moeopt.errors import UsageError
from moeopt.value_types import PyObject


def plain_values(given: PyObject, name: str, wanted: str) -> PyObject:
    """The values that a path's JSON file holds, or that an object's ``to_dict`` gives; other values as they are.

    Args:
        name: the argument's name, and ``wanted`` the end of a message that says what it takes.

    Raises:
        UsageError: the path is no file, or its file no JSON.
    """
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        if not path.is_file():
            raise UsageError(f"{name}={str(given)!r} is no file{wanted}")
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            raise UsageError(f"{path} cannot be read as JSON ({err}){wanted}") from err
    return given.to_dict() if hasattr(given, "to_dict") else given
