"""Every change that moeopt makes to the process: patches of torch, onnxscript, transformers, gc, warnings and loggers.

A patch is counted and locked. The first caller inside puts the change in force, the last one out takes it back,
in whatever order threads come and go. Where a change must be seen by the caller's own thread only, the patch asks a
thread-local mark, so that a thread that serves an engine meanwhile sees the library as it is.

    patch                    what is changed, and for whom
    fewer_collections        the collector's threshold, all threads
    module_calls             nn.Module.__call__, one thread at a time
    size_questions           SymNode.bool_, the caller's thread
    idle_moves               nn.Module.to, the caller's thread
    no_export_dump           the print of torch.export, all threads
    rules_by_their_last_op   onnxscript's pattern matcher, all threads (the same matches, sooner)
    one_registry             torch's table of ONNX translations, all threads (the same table, made once)
    no_idle_decomposition    torch's pass before ONNX, all threads (left out where every op has a translation)
    sdpa_of                  transformers' attention function "sdpa", the caller's thread
    no_fake_tensor_errors    the logger of fake tensors, all threads
    quiet                    standard output and warnings, the caller's thread; loggers, all threads

Two more are built on :class:`Patch` beside the reasons for them: ``lower``'s exact rules of onnxscript, and the
translations that transformers' exporter is given.

Here a reader sees which private names of torch, onnxscript and transformers moeopt leans on.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from moeopt.value_types import FxArg, PyObject

Undo = Callable[[], None]


class Patch:
    """A change to the process that is in force while at least one caller is inside.

    Args:
        install: puts the change in force and returns what takes it back.
    """

    def __init__(self, install: Callable[[], Undo]) -> None:
        self._install, self._lock = install, threading.RLock()
        self._inside, self._undo = 0, _nothing

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._undo = self._install()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo()


class Mine(threading.local):
    """A stack of values of the current thread: what a patched function does for the threads that asked for it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []

    @contextlib.contextmanager
    def holding(self, value: PyObject) -> Iterator[None]:
        self.stack.append(value)
        try:
            yield
        finally:
            self.stack.pop()

    @property
    def top(self) -> PyObject:
        return self.stack[-1] if self.stack else None


def _nothing() -> None:
    pass


class InForce:
    """Whether a replacement is in force: one that another library still calls on to does nothing any more."""

    yes = True


def replace(owner: PyObject, name: str, make: Callable[[Any, InForce], Any]) -> Undo:
    """Put ``make(present attribute, whether it is in force)`` in the place of an attribute of a class or module.

    What another library put there meanwhile stays, and calls on to ours.
    """
    held, in_force = vars(owner)[name], InForce()
    ours = make(held, in_force)
    setattr(owner, name, ours)

    def undo() -> None:
        in_force.yes = False
        if vars(owner).get(name) is ours:
            setattr(owner, name, held)

    return undo


# gc -----------------------------------------------------------------------------------------------------------------

_OBJECTS = 20_000


def _raise_threshold() -> Undo:
    before = gc.get_threshold()
    if not 0 < before[0] < _OBJECTS:  # off, or rarer already
        return _nothing
    raised = (_OBJECTS, *before[1:])
    gc.set_threshold(*raised)

    def undo() -> None:
        if gc.get_threshold() == raised:  # else the user has chosen another one meanwhile
            gc.set_threshold(*before)

    return undo


fewer_collections = Patch(_raise_threshold)
"""Collect garbage after 20 000 new objects instead of 700.

fx nodes point at one another, so dead tapes are left to Python's collector; at its default it runs thousands of
times and walks the whole model in most full passes: 15 % of the time of optimising 24 layers of 64 experts. A tape's
tensors are not part of those cycles and are freed at once either way.
"""


# torch --------------------------------------------------------------------------------------------------------------

_routes = Mine()
one_trace = threading.RLock()
"""Held by whoever traces or exports: torch.export puts ``nn.Module.__call__`` back as it found it, and a trace the
random state, so that two at once would undo each other's."""


def _route_calls() -> Undo:
    from torch import nn

    def make(call: PyObject, in_force: InForce) -> PyObject:
        def routed_call(module: PyObject, *args: PyObject, **kwargs: PyObject) -> PyObject:
            route = _routes.top if in_force.yes else None
            return call(module, *args, **kwargs) if route is None else route(call, module, args, kwargs)

        return routed_call

    return replace(nn.Module, "__call__", make)


_routed = Patch(_route_calls)


@contextlib.contextmanager
def module_calls(route: Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """While open, each ``nn.Module`` call of this thread is ``route(original call, module, args, kwargs)``."""
    with one_trace, _routed(), _routes.holding(route):
        yield


_notes = Mine()


def _note_questions() -> Undo:
    from torch.fx.experimental.sym_node import SymNode

    def make(original: PyObject, in_force: InForce) -> PyObject:
        def bool_(self: PyObject) -> bool:
            answer: bool = original(self)
            if in_force.yes and _notes.top is not None:
                _notes.top(self, answer, sys._getframe(1))
            return answer

        return bool_

    return replace(SymNode, "bool_", make)


_noted = Patch(_note_questions)


@contextlib.contextmanager
def size_questions(note: Callable[[Any, bool, types.FrameType], None]) -> Iterator[None]:
    """While open, ``note(sym_node, answer, asking frame)`` hears of each symbolic size that this thread asks about."""
    with _noted(), _notes.holding(note):
        yield


_idle = Mine()


def _keep_idle_moves() -> Undo:
    import torch
    from torch import nn

    def make(original: PyObject, in_force: InForce) -> PyObject:
        def to(self: PyObject, *args: PyObject, **kwargs: PyObject) -> PyObject:
            if _idle.top is None or not in_force.yes:
                return original(self, *args, **kwargs)
            device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
            held = [*self.parameters(), *self.buffers()]
            same = all(
                device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in held
            )
            return self if same and form is None else original(self, *args, **kwargs)

        return to

    return replace(nn.Module, "to", make)


_kept = Patch(_keep_idle_moves)


@contextlib.contextmanager
def idle_moves() -> Iterator[None]:
    """While open, ``module.to(dtype)`` does nothing where the module has that dtype: export cannot trace it."""
    with _kept(), _idle.holding(True):
        yield


def _drop_dumps() -> Undo:
    from torch.export import _trace

    _trace.__dict__["print"] = lambda *args, **kwargs: None
    return lambda: _trace.__dict__.pop("print", None)


no_export_dump = Patch(_drop_dumps)
"""Where export fails, torch prints the whole graph so far; the error says in a sentence what stood in the way."""


# onnxscript and torch.onnx ------------------------------------------------------------------------------------------


def _match_last_op_first() -> Undo:
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:  # private names of another version: slower, with the same result
        return _nothing

    def make(slow: PyObject, in_force: InForce) -> PyObject:
        def match(self: PyObject, model: PyObject, graph: PyObject, node: FxArg, **options: PyObject) -> PyObject:
            last = self.pattern.output_nodes[0]
            named = last.op.matches(node.op_type) and last.domain.matches(node.domain)
            if in_force.yes and options.get("tracer") is None and not named:
                return MatchResult().fail(f"no {last.op}")
            return slow(self, model, graph, node, **options)

        return match

    return replace(SimplePatternMatcher, "match", make)


rules_by_their_last_op = Patch(_match_last_op_first)
"""onnxscript's rewrite rules, tried only at nodes that they can end in.

For a rule with two outputs, ``SimplePatternMatcher.match`` lists all nodes of the graph before it looks at the
one it was given: at every node, for every such rule, so a graph of twice the layers takes four times as long. The
look at the given node comes first here; what is matched stays the same, since that look is also the matcher's own
first. (onnxscript 0.7.2: 48 layers of 128 experts export in 3 minutes instead of more than 10.)
"""

_tables: dict[Any, Any] = {}


def _copy_one_table() -> Undo:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        fits = "from_torchlib" in vars(ONNXRegistry) and isinstance(ONNXRegistry().functions, dict)
    except (ImportError, AttributeError):  # private names of another version: slower, with the same result
        fits = False
    if not fits:
        return _nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def from_torchlib(cls: PyObject, *args: PyObject, **kwargs: PyObject) -> PyObject:
            import torch

            if not in_force.yes:
                return theirs.__func__(cls, *args, **kwargs)
            known = len(torch._C._dispatch_get_all_op_names())
            key = (cls, args, tuple(sorted(kwargs.items())), known)
            if key not in _tables:
                _tables[key] = theirs.__func__(cls, *args, **kwargs)
            table = copy.copy(_tables[key])
            table.functions = {target: list(found) for target, found in table.functions.items()}
            return table

        return classmethod(from_torchlib)

    return replace(ONNXRegistry, "from_torchlib", make)


one_registry = Patch(_copy_one_table)
"""torch's table of ONNX translations, made once in a process instead of for every export.

Making it reads the signatures of some thousand functions, which takes about a second; each export gets a copy, because
an export adds its own translations to it. Ops that were registered meanwhile make it anew: only known ones are in it.
"""


def _decompose_where_needed() -> Undo:
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes

        fits = {"get_onnx_implemented_overloads", "create_onnx_friendly_decomposition_table"} <= vars(_decomp).keys()
        fits = fits and "decompose_with_registry" in vars(_fx_passes)
    except ImportError:  # private names of another version: slower, with the same result
        fits = False
    if not fits:
        return _nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def decompose_with_registry(program: PyObject, registry: PyObject) -> PyObject:
            if not in_force.yes or not _translated(program.graph, registry, _decomp):
                return theirs(program, registry)
            import torch

            graph = copy.deepcopy(program.graph)  # torch writes into what it takes for its own
            for node, own in zip(program.graph.nodes, graph.nodes, strict=True):
                own.name = node.name  # the signature knows inputs and outputs by name, "input" among them
            program = copy.copy(program)
            program._graph_module = torch.fx.GraphModule(program.graph_module, graph)
            return program

        return decompose_with_registry

    return replace(_fx_passes, "decompose_with_registry", make)


def _translated(graph: PyObject, registry: PyObject, decomp: PyObject) -> bool:
    """Whether each op of a graph has a translation, writes to none of its arguments and is in no decomposition."""
    import torch

    known = set(decomp.get_onnx_implemented_overloads(registry))
    table = decomp.create_onnx_friendly_decomposition_table(known)
    ops = {n.target for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OperatorBase)}
    if any(n.op not in ("placeholder", "call_function", "output") for n in graph.nodes):
        return False
    dropped = (
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
    )  # by torch's next pass
    return all(
        isinstance(op, torch._ops.OpOverload)
        and op not in table
        and not op._schema.is_mutable
        and (op in known or op.namespace == "onnx_symbolic" or op in dropped)
        for op in ops
    )


no_idle_decomposition = Patch(_decompose_where_needed)
"""torch.onnx traces each program once more to decompose ops that ONNX has no form for. A program that was made
functional before, whose ops all have one, comes out as it went in (but for ``reshape``, which becomes ``view``): the
trace is left out, a third of the time of exporting a deep model. One op without a translation, and it is done.
"""


# transformers -------------------------------------------------------------------------------------------------------

_attention = Mine()


def _ask_for_attention() -> Undo:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as theirs
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not theirs:  # the user put another function there
        return _nothing

    def attend(*args: PyObject, **options: PyObject) -> PyObject:
        return theirs(*args, **options) if _attention.top is None else _attention.top(theirs, *args, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend

    def undo() -> None:
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is attend:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]

    return undo


_asked = Patch(_ask_for_attention)


@contextlib.contextmanager
def sdpa_of(attend: Callable[..., Any]) -> Iterator[None]:
    """While open, transformers' attention "sdpa" is ``attend(their function, ...)`` in this thread.

    A function that the user registered under that name stays.
    """
    with _asked(), _attention.holding(attend):
        yield


# output, warnings and loggers ---------------------------------------------------------------------------------------

_LOUD = (
    "torch.onnx",
    "torch.onnx._internal.exporter",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.proxy_tensor",
    "torch.export",
    "onnxscript",
    "onnx_ir",
    "transformers",
)
_hushed = Mine()


class _IfHushed:
    """Stands for a pattern of ``warnings.filters``: matches any text in threads that are inside ``quiet``."""

    def match(self, text: str) -> bool:
        return _hushed.top is not None


class _Output:
    """Standard output, without what threads inside ``quiet`` write."""

    def __init__(self, stream: PyObject) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _hushed.top is not None else self._stream.write(text)

    def __getattr__(self, name: str) -> PyObject:
        return getattr(self._stream, name)


def _set_levels(names: tuple[str, ...], level: int) -> Undo:
    held = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in held:
        logger.setLevel(level)

    def undo() -> None:
        for logger, before in held:
            if logger.level == level:  # else somebody has set another level meanwhile
                logger.setLevel(before)

    return undo


no_fake_tensor_errors = Patch(lambda: _set_levels(("torch._subclasses.fake_tensor",), logging.CRITICAL + 1))
"""A size that does not fit is expected where shapes are probed; PyTorch would log each as an error."""


def _hush() -> Undo:
    levels_back = _set_levels(_LOUD, logging.ERROR)
    stream, output = sys.stdout, _Output(sys.stdout)
    sys.stdout = output
    entry: Any = ("ignore", _IfHushed(), Warning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    _filters_changed()

    def undo() -> None:
        levels_back()
        if sys.stdout is output:
            sys.stdout = stream
        with contextlib.suppress(ValueError):  # gone with a ``catch_warnings`` that was left meanwhile
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
        _filters_changed()

    return undo


def _filters_changed() -> None:
    """Python keeps what was decided for each line until the filters are said to have changed."""
    warnings.filterwarnings("ignore", message="(?!)")  # matches nothing; the public way to say so
    warnings.filters.pop(0)  # type: ignore[attr-defined]


_quieted = Patch(_hush)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print progress, log what is not installed and warn about their own code; none of it is the user's."""
    with _quieted(), _hushed.holding(True):
        yield
