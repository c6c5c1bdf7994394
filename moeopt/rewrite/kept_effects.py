"""Results of the submodules that a rewrite keeps, replayed where a call is refused after these submodules ran.

    router   counts its calls; a hook writes its logits down     runs
    experts  one of them was changed since the verification      the call is refused: the block's own code runs, and its
                                                                 call of the router is answered with the recorded result

Whether an expert changed, which ids there are and how many a token has is known only after the router ran. So the
result of each kept submodule is recorded if a second run of the submodule may have an effect: the submodule is known to
write state, has hooks, or has a forward on the instance, which a library sets to see the results.
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
from moeopt.rewrite.refused_call import KeptResults, Stale
from moeopt.value_types import PyObject

RecordedRun = Callable[[Callable[[Sequence[Tensor]], Any], Sequence[Tensor]], Any]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNRECORDABLE = ("_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")


def written_in(tapes: Sequence[Tape]) -> frozenset[str]:
    """The paths of the modules that the recorded calls changed: in place, by an attribute, or in a container."""
    written = [n for t in tapes for n in (*t.mutations, *_statistics(t)) if n.op == "get_attr"]
    places = {place for t in tapes for place in (*t.attributes, *t.in_place)}
    return frozenset({path for path, _ in places} | {str(n.target).rpartition(".")[0] for n in written})


def _statistics(tape: Tape) -> Iterator[fx.Node]:
    """The running statistics of batch norms, whose op may write them without declaring the mutation."""
    for node in tape.nodes:
        if "batch_norm" in op_name(node):
            yield from (n for n in node.args[3:5] if isinstance(n, fx.Node))


def run_unrecorded(run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> PyObject:
    """``run(tensors)``, for a block that keeps no submodule."""
    return run(tensors)


def recorder_for(root: nn.Module, kept: Iterable[str], written: Iterable[str]) -> RecordedRun:
    """A function that runs a call of ``root``, and records results of kept submodules where that is needed.

    Args:
        kept: paths of the submodules that are called as modules.
        written: paths of modules that a call writes to.
    """
    kept = tuple(kept)
    writes = any(path == k or path.startswith(f"{k}.") for path in written for k in kept)
    return ResultRecorder(root, kept, writes) if kept else run_unrecorded


class ResultRecorder:
    """Runs a call and records the results of the kept submodules; a refusal (``Stale``) carries them."""

    def __init__(self, root: nn.Module, kept: tuple[str, ...], writes: bool) -> None:
        self._root, self._kept, self._writes = root, kept, writes
        self._idle: Callable[[], bool] = lambda: False

    def __call__(self, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> PyObject:
        """``run(tensors)``; in code that ``torch.compile`` traces nothing is recorded."""
        if torch.compiler.is_compiling() or (not self._writes and (holds(self._idle) or self._compile_idle_check())):
            return run(tensors)
        results: KeptResults = []
        try:
            with _recording(self._modules(), results):
                return run(tensors)
        except Stale as stale:
            stale.results = results
            raise

    def _modules(self) -> list[nn.Module]:
        """The kept submodules as they are now, without those that were removed or that take no hook of ours.

        These are compiled modules, and modules with backward hooks, which PyTorch attaches to a result after all
        forward hooks saw it.
        """
        modules = [_submodule_at(self._root, path) for path in self._kept]
        present = dict.fromkeys(module for module in modules if module is not None)
        return [
            m
            for m in present
            if not any(m.__dict__.get(name) for name in _UNRECORDABLE) and "_orig_mod" not in m._modules
        ]

    def _compile_idle_check(self) -> bool:
        """Whether no hook and no replaced forward sees the kept submodules run; compiles that check for later calls."""
        probe = GuardExpression(classes=False)
        for path in self._kept:
            module = self._root
            for name in path.split("."):
                if (child := module._modules.get(name)) is None:
                    return False
                probe.item(module._modules, name, child)
                module = child
            for submodule in module.modules():
                forward = submodule.__dict__.get("forward")
                if any(submodule.__dict__[kind] for kind in _HOOKS) or (
                    forward is not None and not _is_rewritten(forward)
                ):
                    return False
                if forward is None:
                    probe.lacks(submodule.__dict__, "forward")
                else:
                    probe.item(submodule.__dict__, "forward", forward)
                for table in ("_modules", *_HOOKS):
                    probe.entries(submodule.__dict__[table])
        self._idle = probe.compiled()
        return True


def _submodule_at(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


def _is_rewritten(forward: PyObject) -> bool:
    """Whether ``forward`` is that of a rewritten block inside the submodule."""
    return type(forward).__module__.startswith("moeopt.")


@contextlib.contextmanager
def _recording(modules: Sequence[nn.Module], results: KeptResults) -> Iterator[None]:
    """Append each call of ``modules`` in this thread to ``results``, with its result after all hooks of the user."""
    thread, key = threading.get_ident(), object()
    started: list[tuple[Any, ...]] = []

    def start(module: nn.Module, args: PyObject) -> None:
        if threading.get_ident() == thread:
            started.append(args)

    def record(module: nn.Module, args: PyObject, out: PyObject) -> None:
        if threading.get_ident() == thread:
            results.append((module, started.pop(), out))

    tables: list[tuple[Any, Any]] = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for before, after in tables:  # not by register_forward_hook: it would tell everyone that a hook was registered
        before[key], after[key] = start, record
        before.move_to_end(key, last=False)
    try:
        yield
    finally:
        for pair in tables:
            for table in pair:
                table.pop(key, None)


def replayed_results(results: KeptResults) -> AbstractContextManager[None]:
    """Answer calls in this thread with recorded results: of the same module, in order, for equal tensor arguments.

    A call with other arguments runs the module.
    """
    if not results:
        return contextlib.nullcontext()
    remaining: dict[int, deque[Any]] = defaultdict(deque)
    for module, recorded_args, out in results:
        remaining[id(module)].append((recorded_args, out))

    def route(call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
        queue = remaining.get(id(module))
        return queue.popleft()[1] if queue and _equal_tensors(queue[0][0], args) else call(module, *args, **kwargs)

    return module_calls(route)


def _equal_tensors(recorded_args: Sequence[Any], args: Sequence[Any]) -> bool:
    """Whether the tensors among the arguments are equal."""
    return len(recorded_args) == len(args) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(recorded_args, args, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )
