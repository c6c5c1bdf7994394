"""What ``moeopt.optimize`` returns: the model, and what was done to it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from moeopt.backends import registry
from moeopt.backends.base import Made
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import NotSaveableError, UsageError
from moeopt.report import Report
from moeopt.value_types import PyObject


class Optimized:
    """A model and what was done to it. Call it as the model was called.

    Attributes:
        model: the optimised model. For backend "torch" it is of the user's own class, with the same
            ``state_dict`` keys, and shares its weights with the model that was given. For the others it is the
            engine, which holds its own weights.
        report: what was found, rewritten and declined, and why.
        certificate: how equal it is.

    Any other attribute is the model's own, read, set or deleted.
    """

    _OWN = frozenset(("model", "report", "certificate", "_call", "_source", "_built"))
    _why_not_verified = ""
    """Why ``moeopt.verify`` cannot check it again; "" where it can."""

    def __init__(self, made: Made, call: ArgsKwargs) -> None:
        self.model, self.report, self.certificate = made.model, made.report, made.certificate
        self._call, self._source, self._built = call, made.source, made.built

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> PyObject:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.model, name)

    def _is_own(self, name: str) -> bool:
        return name in self._OWN or hasattr(type(self), name)

    def __setattr__(self, name: str, value: PyObject) -> None:
        if self._is_own(name):
            object.__setattr__(self, name, value)
        else:  # on this object it would be shown to every reader, and change nothing of what runs
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            object.__delattr__(self, name)
        else:
            delattr(self.model, name)

    def __repr__(self) -> str:
        done, all_ = len(self.report.rewritten), len(self.report.blocks)
        return f"<moeopt.Optimized {type(self.model).__name__}: {done} of {all_} blocks rewritten>"

    @property
    def _made(self) -> Made:
        return Made(self.model, self.report, self.certificate, self._source, self._built)

    def __copy__(self) -> Optimized:
        return Optimized(self._made, self._call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        made = self._made
        if self._built is None:  # an engine has no state
            made.model = copy.deepcopy(self.model, memo)
        return Optimized(made, self._call)

    def __getstate__(self) -> dict[str, Any]:
        if self._built is not None:
            raise UsageError(
                "an optimised model with an engine cannot be pickled: save it with .save(directory), and pickle what "
                "moeopt.load(directory) returns, or the directory's name"
            )
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write an engine bundle that runs and re-verifies itself without this model's code.

        Args:
            directory: a new one, or a bundle's, which is replaced in one step; the logger ``moeopt`` says so.
            overwrite: let an unverified bundle take the place of a verified one.

        Raises:
            NotSaveableError: the model cannot be exported; the message names the op in the way, and a block whose own
                code is in the graph, for it was declined.
            UsageError: the directory cannot be written to or holds something else.
        """
        try:
            return registry.get(self.report.backend).save(self._made, self._call, directory, overwrite)
        except NotSaveableError as err:
            if left := _left_to_own_code(self.report):
                raise NotSaveableError(f"{err}; {left}") from err
            raise

    def _repr_html_(self) -> str:
        """Report and certificate as tables, for a notebook."""
        return f"<div>{self.report._repr_html_()}{self.certificate._repr_html_()}</div>"


def _left_to_own_code(report: Report) -> str:
    """The blocks with experts whose own code a graph of the model would hold, with the reason; "" for none."""
    left = [block for block in report.declined if block.kind == "moe"]
    if not left:
        return ""
    more = f" (as are {len(left) - 1} more)" if len(left) > 1 else ""
    return f"{left[0].name or 'the model'}{more} is left to its own code: {left[0].reason}"
