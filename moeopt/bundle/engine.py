"""What every engine that lies in a directory has in common: its certificate, its copies and how it is pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.bundle.manifest import Manifest
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from typing_extensions import Self


_OF_MODULES = {
    **dict.fromkeys(("to", "cuda", "cpu"), "moeopt.load(directory, device=...) says where an engine runs"),
    **dict.fromkeys(("half", "bfloat16", "float", "double"), "moeopt.optimize(model, inputs, dtype=...) makes another"),
    **dict.fromkeys(("train", "requires_grad_"), "an engine only infers: train the model, and optimise it again"),
    "eval": "an engine is in that mode always: leave it out",
    **dict.fromkeys(
        ("parameters", "named_parameters", "modules", "named_modules", "children", "state_dict", "load_state_dict"),
        "an engine has no modules: ask the model that it was made of",
    ),
    "generate": "it was made of a model without a generate() of its own, or without its cache; the report says so",
}
"""What people ask of a model and no engine has, and the way out."""


def no_attribute(name: str) -> AttributeError:
    """The error of an engine that has no attribute ``name``."""
    hint = _OF_MODULES.get(name)
    return AttributeError(f"the engine has no attribute {name!r}" + (f": {hint}" if hint else ""))


class Engine:
    """What runs the graph of a bundle, instead of the model's own code."""

    def __getattr__(self, name: str) -> PyObject:
        raise no_attribute(name)


class BundledEngine(Engine):
    """An engine has no state, so a copy is the engine itself.

    Pickled, it is the path of its bundle, opened and checked again where it is unpickled; an engine that was not
    loaded from a bundle has none, and says so.

    Attributes:
        directory: where its files lie.
        signature: how it is called.
        manifest: of the bundle that it was loaded from, or None.
        notes: what was replaced when it was loaded, in sentences.
    """

    def __init__(
        self, directory: Path, signature: Mapping[str, Any], keep: TemporaryFolder | None, manifest: Manifest | None
    ) -> None:
        self.directory, self.signature, self._keep, self.manifest = Path(directory), signature, keep, manifest
        self.notes: list[str] = []

    def _reopening(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What loads the bundle again, and its arguments after the directory."""
        raise NotImplementedError

    @property
    def certificate(self) -> PyObject:
        """The certificate that was saved, as JSON types; None for an engine that was not loaded from a bundle."""
        return None if self.manifest is None else self.manifest.read_json("certificate.json")

    @property
    def where(self) -> Path:
        """The bundle, or the temporary folder."""
        return self.directory if self.manifest is None else self.manifest.directory

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.manifest is None:
            raise UsageError(
                "this engine lies in a temporary folder and cannot be pickled: save it with .save(directory), and "
                "pickle what moeopt.load(directory) returns, or the directory's name"
            )
        reopen, args = self._reopening()
        return reopen, (str(self.manifest.directory.resolve()), *args)
