"""What passes transform: one block as an ``fx.Graph``, with everything that graph needs to run.

    placeholders   ``block`` (the ``RewrittenForward`` that runs the graph), then the tensor inputs in signature order
    get_attr       a Parameter or buffer of the user's module, read live
    call_module    a submodule of the user's module that is kept whole: routers, norms, shared experts
    call_function  an ATen call, a size of an input (``aten.sym_size``) and Python arithmetic on sizes,
                   a helper of moeopt, or ``moeopt::experts``: the weights number ``index`` on (x, ids, weights)
    output         one flat tuple of leaves; ``output``, ``mutations`` and ``attributes`` say where each leaf goes

The graph is what runs: ``program.RewrittenForward`` compiles it and calls it with the user's module as ``self``.
``check.check_block`` is the law of this representation as code, and ``text.block_lines`` prints it.

Before the first pass has made a graph, a block is its own Python code; ``captured`` then holds what that code did in
three calls, and ``graph`` is the first of those calls, which holds for the sizes of that call only.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.ir.bank_format import BankFormat
from moeopt.ir.coded_function import CodedFunction
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.ir.weight_format import WeightFormat
from moeopt.ir.weight_refs import ExpertRef
from moeopt.rewrite.bindings import code_of
from moeopt.rewrite.call_guard import CallGuard
from moeopt.rewrite.graph_words import graph_from_words, graph_to_words
from moeopt.rewrite.kept_steps import KeptSteps
from moeopt.value_types import FxArg, PyObject


class ExpertWeightRefs(NamedTuple):
    """The weights of one ``moeopt::experts`` node: where each expert's lie in the module, and what they compute."""

    experts: list[ExpertRef]
    spec: ExpertsSpec


@dataclass(frozen=True)
class Slot:
    """The leaf number ``index`` of the graph's output."""

    index: int


@dataclass
class Captured:
    """What a block's own code did in three calls of different sizes, until a pass makes a graph of it.

    Args:
        kind: what was recognised, so which pass it is for: ``experts``, ``split`` or ``fuse``.
        tape: the first call.
        plans: what stays of each call once the experts are one op.
        shapes: of the tensor inputs of each call.
        weights: of each op.
        frozen: by path, the values of tensors that decided what the plans are and that the plans do not read.
        per_token: how many experts a token has in each op, None where that differs.
        finish: gives the guard and the router of each op; costly, so called once a graph was made.
    """

    kind: str
    tape: Tape
    plans: list[KeptSteps]
    shapes: list[list[tuple[int, ...]]]
    weights: list[ExpertWeightRefs]
    frozen: dict[str, torch.Tensor]
    per_token: list[int | None]
    finish: Callable[[], tuple[CallGuard, list[RouterSpec | None]]]


@dataclass(frozen=True, eq=False)
class GivenCodes:
    """Codes, scales and zero points of a bank, by the names of :meth:`QuantizedExpertWeights.tensors`.

    ``exact``: whether they stand for the floats that the module holds, to the bit. ``few``: of experts that were to be
    rounded by the rows that reach them, how many were reached by too few.
    """

    tensors: dict[str, torch.Tensor]
    exact: bool
    few: int = 0


@dataclass
class BlockGraph:
    """One block between two passes; see the module's docstring.

    Args:
        name: the block's module path.
        weights: of each ``moeopt::experts`` node, by its index.
        routers: the router of each, where it was recognised.
        guard: which calls the graph holds for; None before there is a graph.
        constants: tensors that the block's code made outside PyTorch.
        output, mutations, attributes: trees of :class:`Slot`: what is returned, (input or buffer, its new value), and
            what is stored by (module path, attribute).
        frozen: see :class:`Captured`.
        per_token: how many experts a token has in each op, None where that differs: the code between the ops may have
            turned that number into constants.
        formats: by the number of a bank of weights, what it is quantised to; a bank that is not there keeps its floats.
        codes: by the number of a bank, codes that are not rounded from its floats but given, until they are stored.
        coded: by the number of a bank, how a function of a row that makes floats of codes is the op on these codes.
        captured: the block's own code; None once there is a graph.
        root: the user's module while passes run, for those that look at weights; None afterwards.
        made: the graph that passes change, empty while the block is its own code.
    """

    name: str
    weights: list[ExpertWeightRefs] = field(default_factory=list)
    routers: list[RouterSpec | None] = field(default_factory=list)
    guard: CallGuard | None = None
    constants: list[torch.Tensor] = field(default_factory=list)
    output: FxArg = None
    mutations: list[tuple[Slot, Slot]] = field(default_factory=list)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    per_token: list[int | None] = field(default_factory=list)
    formats: dict[int, WeightFormat | BankFormat] = field(default_factory=dict)
    codes: dict[int, GivenCodes] = field(default_factory=dict)
    coded: dict[int, CodedFunction] = field(default_factory=dict)
    captured: Captured | None = None
    root: nn.Module | None = None
    made: fx.Graph = field(default_factory=fx.Graph, repr=False)

    @property
    def graph(self) -> fx.Graph:
        """What runs; while the block is its own code, a new graph of the first recorded call, to look at."""
        return self.made if self.captured is None else first_call(self.captured.tape)

    @property
    def kept_modules(self) -> list[str]:
        """Paths of the submodules that are still called as modules."""
        return sorted({str(n.target) for n in self.graph.nodes if n.op == "call_module"})

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the tensor inputs."""
        return [n for n in self.graph.nodes if n.op == "placeholder"][1:]

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        """What the graph computes for the outside, in the order of the slots."""
        result: tuple[fx.Node, ...] = self.graph.output_node().args[0]  # type: ignore[assignment]
        return result

    def experts_nodes(self) -> list[fx.Node]:
        """The ``moeopt::experts`` nodes; the ``args`` of each are (block, index, x, ids, weights)."""
        return [n for n in self.graph.nodes if n.target is EXPERTS]

    def counts(self) -> dict[str, int]:
        """How many nodes there are of each op, inputs and outputs left out."""
        nodes = self.captured.tape.nodes if self.captured is not None else self.graph.nodes
        names = (node_name(n) for n in nodes if n.op in ("call_function", "call_module"))
        return dict(sorted(Counter(names).items()))

    def copy(self) -> BlockGraph:
        """The same block with a graph of its own, so that a pass may change either."""
        twin = dataclasses.replace(
            self, weights=list(self.weights), routers=list(self.routers), constants=list(self.constants),
            frozen=dict(self.frozen),
            per_token=list(self.per_token), formats=dict(self.formats), codes=dict(self.codes),
            coded=dict(self.coded),
        )  # fmt: skip
        if self.captured is None:
            twin.set_graph(self.made)
        return twin

    def set_graph(self, graph: fx.Graph) -> None:
        """Run a copy of ``graph``, which has the same inputs and leaves, from now on."""
        self.made = fx.Graph()
        self.made.output(self.made.graph_copy(graph, {}))

    def __getstate__(self) -> dict[str, Any]:
        """The graph as plain values: neither an ``fx.Graph`` nor an ``OpOverload`` can be pickled."""
        return self.__dict__ | {"made": graph_to_words(self.made), "captured": None, "root": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.made = graph_from_words(state["made"])


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """``graph`` as a Python function of (module, block, *inputs), which gives the leaves."""
    source, scope = code_of(graph)
    exec(compile(source, "<moeopt rewritten forward>", "exec"), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _read_constant(block: PyObject, index: int, like: torch.Tensor) -> torch.Tensor:
    constant: torch.Tensor = block.constants[index]
    return constant if constant.device == like.device else constant.to(like.device)


def _run_experts(
    block: PyObject, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    result: torch.Tensor = block.experts(index, x, ids, weights)
    return result


EXPERTS = _run_experts
"""The target of a ``moeopt::experts`` node: what ``block`` holds under ``index`` on (x, ids, weights)."""
CONSTANT = _read_constant
"""The target of a constant: ``block.constants[index]`` on the device of an input."""


def node_name(node: fx.Node) -> str:
    """``experts``, ``constant``, the name of an op, or ``module`` for a kept submodule's call."""
    if node.op == "call_module":
        return "module"
    if node.target is EXPERTS or node.target is CONSTANT:
        return "experts" if node.target is EXPERTS else "constant"
    return op_name(node)


def first_call(tape: Tape) -> fx.Graph:
    """The recorded call as a graph, to look at: it holds for the sizes of that call."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in tape.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in leaves_of(fx.Node, tape.output)))
    return graph
