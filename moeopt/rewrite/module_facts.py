"""What was verified of each module whose Python a rewrite leaves out, as plain values.

``moeopt.rewrite.module_guard`` compares it with what the modules are at a call.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

from torch import Tensor, fx, nn

from moeopt.rewrite.bytecode import fingerprint
from moeopt.value_types import PyObject

_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"_ddp_params_and_buffers_to_ignore"}
_PLAIN = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType, type)


def hook_count(module: nn.Module) -> int:
    """How many forward and backward hooks are registered on ``module`` itself."""
    d = module.__dict__
    return (
        len(d["_forward_hooks"]) + len(d["_forward_pre_hooks"]) + len(d["_backward_hooks"])
        + len(d["_backward_pre_hooks"])
    )  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """What was verified of one module. It holds no module, so it can be copied and pickled.

    ``children`` are watched, ``live`` ones called as modules; ``absent`` names those of the Parameters and buffers
    ``tensors`` that are None; ``written`` are attributes that the forward itself sets; ``modes`` are the training flags
    of ``live`` ones, which the module's own code may ask for, where they matter.
    """

    path: str
    cls: type
    forward: str
    names: tuple[str, ...]
    values: tuple[Any, ...]
    children: tuple[str, ...]
    live: tuple[str, ...]
    absent: tuple[str, ...]
    tensors: tuple[str, ...]
    written: tuple[str, ...]
    hooks: int
    patched: bool
    modes: tuple[tuple[str, bool], ...] = ()

    def has_class(self, cls: type[nn.Module]) -> bool:
        """Whether ``cls`` is the verified class, with the verified forward.

        PyTorch makes a class for each fx.GraphModule, and another for each copy of one: their forwards decide.
        """
        made_here = issubclass(cls, fx.GraphModule) and cls.__qualname__ == self.cls.__qualname__
        alike = cls is self.cls or (made_here and cls.__bases__ == self.cls.__bases__)
        return alike and fingerprint(cls.forward) == self.forward

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        if issubclass(self.cls, fx.GraphModule):
            raise pickle.PicklingError(
                f"{self.path or 'the block'} is an fx.GraphModule, whose class exists in this process only, so its "
                "rewritten form cannot be pickled: save a bundle with optimized.save(folder) and read it with "
                "moeopt.load, or pickle the original and optimise it again"
            )
        return super().__reduce_ex__(protocol)


def take_facts(root: nn.Module, live: Iterable[str], written: Iterable[tuple[str, str]], mode: bool) -> list[Fact]:
    """The facts of every module of ``root`` but the subtrees at the paths ``live``.

    Args:
        live: paths of submodules that are still called as modules.
        written: (path, attribute) pairs that the forward itself sets.
        mode: whether the training flags matter.
    """
    kept, own = tuple(live), set(written)
    facts = []
    for path, module in root.named_modules():
        if _inside(path, kept):
            continue
        held = {n: v for n, v in module.__dict__.items() if n not in _BOOKKEEPING or (mode and n == "training")}
        plain = {n: _frozen(v) for n, v in held.items() if _is_plain(v) and n != "forward" and (path, n) not in own}
        prefix = f"{path}." if path else ""
        facts.append(
            Fact(
                path,
                type(module),
                fingerprint(type(module).forward),
                tuple(plain),
                tuple(plain.values()),
                tuple(n for n, c in module._modules.items() if c is not None and not _inside(prefix + n, kept)),
                tuple(n for n, c in module._modules.items() if c is None or _inside(prefix + n, kept)),
                tuple(n for n, t in tensors_of(module).items() if t is None and (path, n) not in own),
                tuple(tensors_of(module)),
                tuple(n for p, n in own if p == path),
                hook_count(module),
                bool(path) and "forward" in module.__dict__,
                _modes(module, prefix, kept, mode),
            )
        )
    return facts


def _modes(module: nn.Module, prefix: str, live: tuple[str, ...], mode: bool) -> tuple[tuple[str, bool], ...]:
    """The training flags of the children that are called as modules, where they matter."""
    children = module._modules.items() if mode else ()
    return tuple((name, c.training) for name, c in children if c is not None and _inside(prefix + name, live))


def tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The Parameters and buffers of ``module`` itself, None where one is absent."""
    return {**module._parameters, **module._buffers}


def _inside(path: str, kept: tuple[str, ...]) -> bool:
    return any(path == k or path.startswith(f"{k}.") for k in kept)


def _is_plain(value: PyObject) -> bool:
    return isinstance(value, _PLAIN) or (type(value) in (list, tuple) and all(isinstance(v, _PLAIN) for v in value))


def _frozen(value: PyObject) -> PyObject:
    return list(value) if type(value) is list else value
