"""Patches of onnxscript and torch.onnx that make an export of many layers quicker, with the same result."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

from moeopt.patches.decomposition import quicker_decomposition
from moeopt.patches.patch import InForce, Mine, Patch, Undo, nothing, replace
from moeopt.value_types import FxArg, PyObject


def _match_last_op_first() -> Undo:
    try:
        import onnx_ir as ir
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:  # private names of another version: slower, with the same result
        return nothing

    def make(slow: PyObject, in_force: InForce) -> PyObject:
        def match(self: PyObject, model: PyObject, graph: PyObject, node: FxArg, **options: PyObject) -> PyObject:
            if in_force.yes and options.get("tracer") is None:
                last, *more = self.pattern.output_nodes
                if not (last.op.matches(node.op_type) and last.domain.matches(node.domain)):
                    return MatchResult().fail(f"no {last.op}")
                if more and looks and not first_fits(self, graph, last, node):
                    return MatchResult().fail(f"no {last.op} as in the rule")
            return slow(self, model, graph, node, **options)

        return match

    def first_fits(matcher: PyObject, graph: PyObject, last: PyObject, node: FxArg) -> bool:
        """What the matcher asks first of each pair of nodes; from the state in which it asks."""
        matcher._tracer, matcher._graph = None, graph.graph if isinstance(graph, ir.Function) else graph
        try:
            matcher._init_match(0)
            return bool(matcher._match_node(last, node))
        except AttributeError:  # another version's state is more: it is asked itself
            return True

    looks = {"_init_match", "_match_node", "_multi_match"} <= vars(SimplePatternMatcher).keys()
    return replace(SimplePatternMatcher, "match", make)


rules_by_their_last_op = Patch(_match_last_op_first)
"""onnxscript's rewrite rules, tried only at nodes that they can end in.

For a rule with two outputs, ``SimplePatternMatcher.match`` lists all nodes of the graph before it looks at the
one it was given: at every node, for every such rule, so a graph of twice the layers takes four times as long. The
look at the given node, and at what its inputs come of, comes first here; what is matched stays the same, since that
look is also the matcher's own first, of every pair of nodes that it tries. (onnxscript 0.7.2: 48 layers of 128 experts
export in 3 minutes instead of more than 10.)
"""

_tables: dict[Any, Any] = {}


def _copy_one_table() -> Undo:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        fits = "from_torchlib" in vars(ONNXRegistry) and isinstance(ONNXRegistry().functions, dict)
    except (ImportError, AttributeError):  # private names of another version: slower, with the same result
        fits = False
    if not fits:
        return nothing

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
        from torch._export.utils import _is_preservable_cia_op
        from torch.onnx._internal.exporter import _decomp, _fx_passes

        fits = {"get_onnx_implemented_overloads", "create_onnx_friendly_decomposition_table"} <= vars(_decomp).keys()
        fits = fits and "decompose_with_registry" in vars(_fx_passes)
    except ImportError:  # private names of another version: slower, with the same result
        fits = False
    if not fits:
        return nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def decompose_with_registry(program: PyObject, registry: PyObject) -> PyObject:
            if not in_force.yes:
                return theirs(program, registry)
            if not _translated(program.graph, registry, _decomp, _is_preservable_cia_op):
                program = theirs(program, registry)
                _drop_asserted_sizes(program.graph)
                return program
            import torch

            graph = copy.deepcopy(program.graph)  # torch writes into what it takes for its own
            for node, own in zip(program.graph.nodes, graph.nodes, strict=True):
                own.name = node.name  # the signature knows inputs and outputs by name, "input" among them
                if own.target is torch.ops.aten.reshape.default:
                    own.target = torch.ops.aten.view.default  # whose sizes of 0 are meant; ONNX has no strides
            program = copy.copy(program)
            _drop_asserted_sizes(graph)
            program._graph_module = torch.fx.GraphModule(program.graph_module, graph)
            return program

        return decompose_with_registry

    return replace(_fx_passes, "decompose_with_registry", make)


def _drop_asserted_sizes(graph: PyObject) -> None:
    """Leave out what is asserted of sizes that the data decide (how many rows a mask picks).

    torch.onnx drops the assertions and keeps the comparisons that they read, with bounds beyond 64 bits, which it then
    cannot write down.
    """
    import torch

    asserted = (torch.ops.aten._assert_scalar.default, operator.le, operator.ge, operator.lt, operator.gt)
    for node in reversed(list(graph.nodes)):
        if node.target in asserted and not node.users:
            graph.erase_node(node)


def _translated(graph: PyObject, registry: PyObject, decomp: PyObject, kept_whole: Callable[[PyObject], bool]) -> bool:
    """Whether each op of a graph has a translation, writes to none of its arguments and is in no decomposition.

    ``kept_whole``: whether a composite op stays one where it is in no decomposition; torch takes others apart.
    """
    import torch

    known = set(decomp.get_onnx_implemented_overloads(registry))
    table = decomp.create_onnx_friendly_decomposition_table(known)
    ops = {n.target for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OperatorBase)}
    if any(n.op not in ("placeholder", "call_function", "output") for n in graph.nodes):
        return False
    reshape = torch.ops.aten.reshape.default
    if any(n.target is reshape and "val" not in n.meta for n in graph.nodes):
        return False  # torch's next pass would run it, and a view takes not every order in memory
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    dropped = (
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
    )  # by torch's next pass
    return all(
        isinstance(op, torch._ops.OpOverload)
        and op not in table
        and not op._schema.is_mutable
        and (op in known or op.namespace in ("onnx_symbolic", "moeopt") or op in dropped)
        and (op is reshape or not op.has_kernel_for_dispatch_key(composite) or kept_whole(op))
        for op in ops
    )


no_idle_decomposition = Patch(_decompose_where_needed)
"""torch.onnx traces each program once more to decompose ops that ONNX has no form for. A program that was made
functional before, whose ops all have one, comes out as it went in (but for ``reshape``, which becomes ``view``): the
trace is left out, a third to a half of the time of an export. One op without a translation, or a composite one that
torch would take apart, and it is done.
"""


def _promote_from_known_values() -> Undo:
    try:
        from torch.onnx._internal.fx.passes import type_promotion

        theirs = type_promotion._TypePromotionInterpreter
        fits = {"run_node", "_maybe_promote_node"} <= vars(theirs).keys() and hasattr(theirs, "_set_current_node")
    except (ImportError, AttributeError):  # private names of another version: slower, with the same result
        return nothing
    if not fits:
        return nothing

    def make(slow: PyObject, in_force: InForce) -> PyObject:
        def run_node(self: PyObject, node: FxArg) -> PyObject:
            if not in_force.yes or node.op != "call_function" or "val" not in node.meta:
                return slow(self, node)
            with self._set_current_node(node):
                if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
                    self._maybe_promote_node(node, rule)
            return node.meta["val"]

        return run_node

    return replace(theirs, "run_node", make)


promotion_from_known_values = Patch(_promote_from_known_values)
"""torch.onnx runs each program once more on fake tensors, only to see the dtypes that its nodes' values have: each
node says so in its ``meta``. A node that gets casts is run by the pass itself, and its ``meta`` set anew.
"""


@contextlib.contextmanager
def quicker_export() -> Iterator[None]:
    """While open, torch.onnx and onnxscript make the same graph sooner."""
    with (
        rules_by_their_last_op(),
        one_registry(),
        no_idle_decomposition(),
        quicker_decomposition(),
        promotion_from_known_values(),
    ):
        yield


_finish = Mine()


def _finish_decomposed() -> Undo:
    try:
        from torch.onnx._internal.exporter import _core
    except ImportError:
        return nothing
    if "_prepare_exported_program_for_export" not in vars(_core):
        return nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def prepare(program: PyObject, **options: PyObject) -> PyObject:
            prepared = theirs(program, **options)
            if in_force.yes and _finish.top is not None:
                _finish.top(prepared)
            return prepared

        return prepare

    return replace(_core, "_prepare_exported_program_for_export", make)


_finished = Patch(_finish_decomposed)


@contextlib.contextmanager
def after_decomposition(finish: Callable[[Any], None]) -> Iterator[None]:
    """While open, ``finish`` may change a program of this thread that torch.onnx has decomposed and not translated yet.

    A version of torch with other private names does not call ``finish``.
    """
    with _finished(), _finish.holding(finish):
        yield
