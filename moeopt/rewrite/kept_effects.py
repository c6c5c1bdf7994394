"""What the submodules that a rewrite keeps gave, given again where a call is refused after they ran.

    router   counts its calls; a hook writes its logits down     runs
    experts  one of them was changed since the verification      the call is refused: the block's own code runs, and its
                                                                 call of the router gives what that gave already

What of an expert has changed, which ids there are and how many a token has is only known once the router ran. So what
each kept submodule gives is noted where it may have an effect: it is known to write, it has hooks, or its forward is
one of the instance, which a library puts there to see its results.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.patches import module_calls
from moeopt.rewrite.guard_expression import GuardExpression, holds
from moeopt.rewrite.stale import Gave, Stale
from moeopt.value_types import PyObject

RunNoting = Callable[[Callable[[Sequence[Tensor]], Any], Sequence[Tensor]], Any]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNSEEN = ("_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")


def written_in(tapes: Sequence[Tape]) -> frozenset[str]:
    """The paths of the modules to which the calls wrote: in place, by an attribute, or into a container of theirs."""
    written = [n for t in tapes for n in (*t.mutations, *_statistics(t)) if n.op == "get_attr"]
    places = {place for t in tapes for place in (*t.attributes, *t.in_place)}
    return frozenset({path for path, _ in places} | {str(n.target).rpartition(".")[0] for n in written})


def _statistics(tape: Tape) -> Iterator[fx.Node]:
    """The running statistics of batch norms, which their op may write without saying so."""
    for node in tape.nodes:
        if "batch_norm" in op_name(node):
            yield from (n for n in node.args[3:5] if isinstance(n, fx.Node))


def just_run(run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> PyObject:
    """What :class:`Noting` does for a block that keeps no submodule."""
    return run(tensors)


def noting(root: nn.Module, kept: Iterable[str], written: Iterable[str]) -> RunNoting:
    """What runs a call of ``root``.

    Args:
        kept: paths of the submodules that are called as modules.
        written: paths of modules that a call writes to.
    """
    kept = tuple(kept)
    writes = any(path == k or path.startswith(f"{k}.") for path in written for k in kept)
    return Noting(root, kept, writes) if kept else just_run


class Noting:
    """Runs a call, and notes what the kept submodules give; a refusal takes it along."""

    def __init__(self, root: nn.Module, kept: tuple[str, ...], writes: bool) -> None:
        self._root, self._kept, self._writes = root, kept, writes
        self._idle: Callable[[], bool] = lambda: False

    def __call__(self, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> PyObject:
        """``run(tensors)``; code that is being compiled takes no second way."""
        if torch.compiler.is_compiling() or (not self._writes and (holds(self._idle) or self._found_idle())):
            return run(tensors)
        gave: Gave = []
        try:
            with _watched(self._modules(), gave):
                return run(tensors)
        except Stale as stale:
            stale.gave = gave
            raise

    def _modules(self) -> list[nn.Module]:
        """The kept submodules as they are now; without those that are gone, and those to which a hook may not come:
        compiled ones, and ones with backward hooks, which PyTorch ties to a result after all forward hooks saw it."""
        found = [_at(self._root, path) for path in self._kept]
        there = dict.fromkeys(module for module in found if module is not None)
        return [m for m in there if not any(m.__dict__.get(name) for name in _UNSEEN) and "_orig_mod" not in m._modules]

    def _found_idle(self) -> bool:
        """Whether nobody sees the kept submodules run; what is asked at the next call is made anew."""
        probe = GuardExpression(classes=False)
        for path in self._kept:
            module = self._root
            for name in path.split("."):
                if (child := module._modules.get(name)) is None:
                    return False
                probe.item(module._modules, name, child)
                module = child
            for each in module.modules():
                own = each.__dict__.get("forward")
                if any(each.__dict__[kind] for kind in _HOOKS) or (own is not None and not _ours(own)):
                    return False
                if own is None:
                    probe.lacks(each.__dict__, "forward")
                else:
                    probe.item(each.__dict__, "forward", own)
                for table in ("_modules", *_HOOKS):
                    probe.entries(each.__dict__[table])
        self._idle = probe.compiled()
        return True


def _at(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


def _ours(forward: PyObject) -> bool:
    """Whether it is that of a rewritten block inside of the submodule."""
    return type(forward).__module__.startswith("moeopt.")


@contextlib.contextmanager
def _watched(modules: Sequence[nn.Module], gave: Gave) -> Iterator[None]:
    """While open, ``gave`` gets what each call of ``modules`` in this thread gives, after all hooks of the user's."""
    here, key = threading.get_ident(), object()
    began: list[tuple[Any, ...]] = []

    def begins(module: nn.Module, args: PyObject) -> None:
        if threading.get_ident() == here:
            began.append(args)

    def note(module: nn.Module, args: PyObject, out: PyObject) -> None:
        if threading.get_ident() == here:
            gave.append((module, began.pop(), out))

    tables: list[tuple[Any, Any]] = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for before, after in tables:  # not by register_forward_hook: it would tell everyone that a hook was registered
        before[key], after[key] = begins, note
        before.move_to_end(key, last=False)
    try:
        yield
    finally:
        for pair in tables:
            for table in pair:
                table.pop(key, None)


def given_again(gave: Gave) -> AbstractContextManager[None]:
    """While open, calls in this thread of modules that ``gave`` something for the same give that, as often as they did.

    Another order of calls than that of the block's own code would show there.
    """
    if not gave:
        return contextlib.nullcontext()
    left: dict[int, deque[Any]] = defaultdict(deque)
    for module, given, out in gave:
        left[id(module)].append((given, out))

    def route(call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
        known = left.get(id(module))
        return known.popleft()[1] if known and _alike(known[0][0], args) else call(module, *args, **kwargs)

    return module_calls(route)


def _alike(given: Sequence[Any], args: Sequence[Any]) -> bool:
    """The same arguments, as far as they are tensors."""
    return len(given) == len(args) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(given, args, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )
