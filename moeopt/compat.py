"""What differs between versions of the libraries that moeopt leans on, and which versions the suite has run on.

Private names that moeopt changes for a while are in ``patches``; here is what it reads, where versions differ.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from moeopt.errors import UntestedVersionWarning
from moeopt.value_types import PyObject

TESTED = {"torch": ((2, 11), (2, 15))}
"""The oldest and the newest (major, minor) of each library on which ``make test-matrix`` ran the suite's core."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


OBJECTS_ARE_CONSTANTS = _numbers(torch.__version__) >= (2, 13)
"""Whether torch.compile takes an object as the argument of a function that is marked as giving a constant."""


F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """``function``, marked as ``torch.compiler.assume_constant_result`` marks it, whose answer torch.compile keeps.

    Torch's own name imports torch._dynamo: seconds and 100 MB for everybody who does not compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


compiler_callback: Callable[[], object] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: "not known"
)
"""What torch.compile does with each function that begins now: None where it is at rest. Between two compiled parts it
is not, and takes the functions that run there for code to compile."""


def tell_untested_torch(version: str = torch.__version__) -> None:
    """An ``UntestedVersionWarning``, once in a process, where torch is older or newer than what the suite ran on."""
    if (text := untested("torch", version)) and text not in _told:
        _told.add(text)
        warnings.warn(text, UntestedVersionWarning, stacklevel=3)


_told: set[str] = set()


@functools.cache
def untested(library: str, version: str) -> str:
    """A sentence on a version that the suite has not run on; "" for one that it has."""
    oldest, newest = TESTED[library]
    found = _numbers(version)
    if oldest <= found <= newest:
        return ""
    what = "newer" if found > newest else "older"
    return (
        f"{library} {version} is {what} than what moeopt was tested on ({_dotted(oldest)} to {_dotted(newest)}): "
        "blocks are verified all the same, and what is not equivalent is refused; if something fails, try a tested one"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def known_fields(config: type, **fields: PyObject) -> dict[str, Any]:
    """Those of ``fields`` that a library's dataclass of options has in the version that is installed.

    transformers' ``OnnxConfig`` has had ``ort_fusions`` since 5.23; without it the graph has the same nodes unfused.
    """
    names = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set(fields)
    return {name: value for name, value in fields.items() if name in names}


def begin_cache_layer(layer: PyObject, keys: torch.Tensor, values: torch.Tensor) -> None:
    """A layer of transformers' ``DynamicCache`` made ready for such keys and values; in 4.57 it asks for keys only."""
    begin = layer.lazy_initialization
    begin(*(keys, values)[: len(inspect.signature(begin).parameters)])
