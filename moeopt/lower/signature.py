"""How a traced model is called, as JSON: its arguments, its result, and the sizes that must agree."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from moeopt.bundle import symbols as sizes
from moeopt.bundle.graph import input_entry, tree_of
from moeopt.bundle.intervals import simplified
from moeopt.bundle.settled_sizes import at_least_one, settled
from moeopt.bundle.shape_guards import encode_conditions, only_asked
from moeopt.bundle.tree import field_names
from moeopt.bundle.values import encode
from moeopt.errors import NotSaveableError
from moeopt.lower.functional import without_writes
from moeopt.lower.idle_draws import drop_idle_draws
from moeopt.lower.specialization_guards import specialization_guards
from moeopt.lower.written_state import refuse_read_state
from moeopt.value_types import PyObject


def describe_call(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """What :class:`moeopt.bundle.binding.Binding` reads, and ``outputs``: one entry per leaf of the result.

    An output is ``{"tensor": n}``, the n-th output of the graph, or ``{"constant": value}``. ``conditions`` are what
    the trace took for granted about sizes. The least size is 1: ONNX Runtime reduces empty tensors to wrong shapes.

    Raises:
        NotSaveableError: a structure that cannot be rebuilt, or a program that writes to its arguments or buffers.
    """
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    inputs = [input_entry(node) for node, spec in pairs if spec.kind == InputKind.USER_INPUT]
    symbols = {d for i in inputs for d in i.get("shape", []) if isinstance(d, str)}
    ranges = sizes.encode_ranges(program.range_constraints, symbols)
    return {
        "parameters": list(program.module_call_graph[0].signature.forward_arg_names or []),
        "in_tree": tree_of(program.call_spec.in_spec, "the inputs hold"),
        "out_tree": tree_of(program.call_spec.out_spec, "the result holds"),
        "inputs": inputs,
        "sizes": dict.fromkeys(sorted(symbols), [1, None])
        | {s: [max(1, low or 0), high] for s, (low, high) in ranges.items()},
        "conditions": [c for c in size_conditions(program) if not at_least_one(c)],
        "outputs": _outputs(program),
    }


def size_conditions(program: torch.export.ExportedProgram) -> list[Any]:
    """The conditions on sizes of the trace, less those that only torch's own code asked for, each as simple as it is.

    A size that is computed from others (ids for each token of rows of tokens) is one more condition.
    """
    leaves = numbered(program)
    guards = [text for text in program._guards_code if ".stride()" not in text]  # a graph's tensors have no strides
    conditions = encode_conditions(guards, leaves)
    names = _symbols(program)

    def encoded(text: str) -> list[Any]:
        for symbol, source in names.items():
            text = re.sub(rf"\b{symbol}\b", source, text)
        return encode_conditions([text], leaves)

    if conditions:
        asked = [
            condition for expr in specialization_guards(program) for condition in encoded(PythonPrinter().doprint(expr))
        ]
        conditions = only_asked(conditions, asked)
    shapes = dict(_shapes(program))
    conditions = [*conditions, *_computed(shapes, names, encoded)]

    def example(leaf: int) -> list[int]:
        return [_hint(size) for size in shapes[leaf]]

    return simplified(settled(simplified(conditions, example)), example)


def _computed(shapes: dict[int, Any], names: dict[str, str], encoded: Callable[[str], list[Any]]) -> list[Any]:
    """For each size that is an expression of others': that they are equal."""
    found: list[Any] = []
    for leaf, shape in shapes.items():
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and sizes.encode_dim(size) is None:
                expr = size.node.expr
                if {str(symbol) for symbol in expr.free_symbols} <= set(names):
                    (equal,) = encoded(f"{PythonPrinter().doprint(expr)} == 0") or [None]
                    if equal is not None:
                        found.append(["==", ["size", leaf, dim], equal[1]])
    return found


def _shapes(program: torch.export.ExportedProgram) -> Iterator[tuple[int, Any]]:
    """The number and the shape of each leaf of the arguments that is a tensor."""
    users = [s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for number in range(program.call_spec.in_spec.num_leaves):
        value = nodes[users[number]].meta.get("val")
        if isinstance(value, torch.Tensor):
            yield number, value.shape


def _hint(size: PyObject) -> int:
    """The size in the traced call."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _symbols(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Each symbol of the arguments' sizes, as the text that export's conditions write for it."""
    leaves: dict[int, str] = {}

    def walk(value: PyObject, text: str) -> None:
        if isinstance(value, int):
            leaves[value] = text
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{text}[{key!r}]")
        elif isinstance(value, (tuple, list)):
            for number, part in enumerate(value):
                walk(part, f"{text}[{number}]")

    walk(numbered(program), "L")
    found: dict[str, str] = {}
    for number, shape in _shapes(program):
        for dim, size in enumerate(shape):
            name = sizes.encode_dim(size)
            if isinstance(name, str) and number in leaves:
                found.setdefault(name, f"{leaves[number]}.size()[{dim}]")
    return found


def numbered(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """The arguments by name, each leaf its number; an object with no named fields (a cache) is the list of its leaves.

    Of ``*xs``, which export names ``xs_0``, ``xs_1``, the parts are found as ``xs`` too.
    """
    count = itertools.count()

    def walk(spec: pytree.TreeSpec) -> PyObject:
        if spec.is_leaf():
            return next(count)
        parts = [walk(child) for child in spec.children()]
        if spec.type in (dict, collections.OrderedDict):
            return dict(zip(spec.context, parts, strict=True))
        if spec.type is collections.defaultdict:  # its context is the factory and the keys
            return dict(zip(spec.context[1], parts, strict=True))
        if (names := field_names(spec)) is not None:
            return collections.namedtuple("Leaves", names, rename=True)(*parts)
        return tuple(parts) if spec.type is tuple else parts

    args, kwargs = walk(program.call_spec.in_spec)
    by_keyword: dict[str, Any] = kwargs
    names = program.module_call_graph[0].signature.forward_arg_names or []
    starred: dict[str, Any] = {}
    for name, part in zip(names, args, strict=False):
        if of_star := re.fullmatch(r"(\w+)_(\d+)", name):
            starred.setdefault(of_star[1], {})[int(of_star[2])] = part
    return starred | dict(zip(names, args, strict=False)) | by_keyword


def _outputs(program: torch.export.ExportedProgram) -> list[dict[str, Any]]:
    refuse_read_state(program)
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    found: list[dict[str, Any]] = []
    tensors = 0
    for value, spec in zip(node.args[0], program.graph_signature.output_specs, strict=True):
        if spec.kind != OutputKind.USER_OUTPUT:
            continue
        if isinstance(value, torch.fx.Node):
            found.append({"tensor": tensors})
            tensors += 1
            if not isinstance(value.meta.get("val"), torch.Tensor):
                raise NotSaveableError(f"the result holds {value.name}, a size of the inputs: return tensors only")
        else:
            found.append({"constant": encode(value)})
    return found


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with no op that writes to its arguments.

    Raises:
        NotSaveableError: it draws random numbers, which another runtime draws otherwise.
    """
    drop_idle_draws(program.graph)
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _idle(node):
            raise NotSaveableError(
                f"the model draws random numbers ({node.target}{_line_of(node)}), and an engine would draw others: "
                "call eval() first, or make the draws an argument"
            )
    return without_writes(program)


def _line_of(node: torch.fx.Node) -> str:
    """``, File "...", line n, in f`` of the model's code that a node comes from, or ""."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f", {lines[-1]}" if lines else ""


def _idle(node: torch.fx.Node) -> bool:
    """Whether a random op draws nothing: dropout outside training, attention without dropout."""
    named = {a.name: i for i, a in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]

    def value(name: str) -> PyObject:
        if name in node.kwargs:
            return node.kwargs[name]
        at = named.get(name)
        return None if at is None else node.args[at] if at < len(node.args) else 0

    if value("train") is False or value("training") is False:
        return True
    return any(name in named and value(name) == 0 for name in ("p", "dropout_p"))
