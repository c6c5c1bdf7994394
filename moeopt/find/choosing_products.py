"""Products whose results choose: routers, of mixtures that nothing else recognised too, early exits, token pickers.

    scores = x W^T            the product of a module
    ids    = topk(scores)     or argmax, sort, a cast to integers, multinomial: a choice
    mask   = scores > t       a choice where whole rows follow it, as an activation function's comparison is none

A choice counts if the run goes on with it. Between the product and the choice stands no other product with a weight.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, is_pointwise, moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.recognise.gemm_site import is_computed_weight, is_weight
from moeopt.value_types import FxArg

_IDS = {"argmax", "argmin", "argsort", "multinomial", "bucketize", "searchsorted"}
_VALUES_AND_IDS = {"topk", "sort", "max", "min", "kthvalue", "mode"}
_COMPARES = {"gt", "ge", "lt", "le", "eq", "ne", "sign", "sgn", "round", "floor", "ceil", "trunc", "heaviside"}
_ROW_WISE = {"_softmax", "softmax", "_log_softmax", "_safe_softmax", "cumsum", "native_layer_norm", "rms_norm"}
_SHARES = {"sum", "mean", "amax", "amin", "linalg_vector_norm", "norm", "logsumexp"}
_COPIES = {"_to_copy", "clone", "detach", "alias", "getitem", "lift_fresh", "view", "_unsafe_view", "reshape"}
_GROUPED = {"experts", "quantized_experts"}
Reason = dict[str, str]


def choosing_products(tape: Tape, paths: Collection[str]) -> Reason:
    """Which of the modules at ``paths`` computed scores that a choice was made by: path -> the choice, in words.

    Args:
        tape: of the whole model, with or without values.
        paths: of modules that compute one product each.
    """
    return _Flow(tape, set(paths)).run()


class _Flow:
    """One pass over a tape: which products each node holds scores of, and which choices.

    Attributes:
        near: by node, the products whose results it was computed of, element by element or row by row.
        far: the same with sums and means between.
        ids, masks: by node, the choices that it depends on: product -> words.
    """

    def __init__(self, tape: Tape, paths: set[str]) -> None:
        self.tape = tape
        self.found: Reason = {}
        self.near: dict[fx.Node, frozenset[str]] = {}
        self.far: dict[fx.Node, frozenset[str]] = {}
        self.ids: dict[fx.Node, Reason] = {}
        self.masks: dict[fx.Node, Reason] = {}
        self.results: dict[fx.Node, set[str]] = {}
        self._weights: dict[fx.Node, bool] = {}
        for call in tape.calls:
            for node in leaves_of(fx.Node, call.output) if call.path in paths else ():
                self.results.setdefault(node, set()).add(call.path)

    def run(self) -> Reason:
        for node in self.tape.nodes:
            if is_computed_weight(node, self._weights):
                self._weights[node] = True
            self._use(node)
            if not self._ends(node):
                self._carry(node)
                self._choose(node)
            if own := self.results.get(node):
                self.near[node] = self.near.get(node, frozenset()) | own
                self.far[node] = self.far.get(node, frozenset()) | own
        for read in self.tape.reads:
            self._note(self.ids.get(read.node), self.masks.get(read.node))
            self._note({path: _words(read.node, "a Python value") for path in self.far.get(read.node, ())})
        return self.found

    def _use(self, node: fx.Node) -> None:
        """Take down the choices that ``node`` goes by."""
        for a in node.all_input_nodes:
            if op_name(node) not in _COPIES:
                self._note(self.ids.get(a))
            if a in self.masks and not self._ends(node) and _picks(node, a):
                self._note(self.masks[a])

    def _ends(self, node: fx.Node) -> bool:
        """Whether results before ``node`` are no scores of what comes after: it is a product with a weight."""
        weights = (a for a in node.all_input_nodes if is_weight(a, self._weights))
        return op_name(node) in _GROUPED or (is_matmul(node) and next(weights, None) is not None)

    def _carry(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        plain = is_pointwise(node) or moves_rows(node) or is_matmul(node) or op_name(node) in _ROW_WISE
        if plain or op_name(node) in _SHARES or op_name(node) in _VALUES_AND_IDS:
            _join(self.far, node, inputs)
        if plain or op_name(node) in _VALUES_AND_IDS:
            _join(self.near, node, inputs)
            told = {path: words for a in inputs for path, words in self.masks.get(a, {}).items()}
            if told:
                self.masks[node] = told

    def _choose(self, node: fx.Node) -> None:
        """What ``node`` chooses by: a second result of top-k and its like, ids, integers made of scores, a mask."""
        name, inputs = op_name(node), node.all_input_nodes
        first = inputs[0] if inputs else None
        if first is None:
            return
        second = name == "getitem" and op_name(first) in _VALUES_AND_IDS and node.args[1] == 1
        integers = name == "_to_copy" and _is_float(first) and node.meta.get("dtype") in _INTEGERS
        if second or integers or name in _IDS:
            chooser = first if second else node
            what = "a cast to integers" if integers else op_name(chooser)
            self.ids[node] = {p: _words(chooser, what) for p in self.far.get(first, ())}
        elif name in _COMPARES:
            made = {p: _words(node, name) for a in inputs for p in self.near.get(a, ())}
            self.masks[node] = self.masks.get(node, {}) | made
        elif name in _COPIES and first in self.ids:
            self.ids[node] = self.ids[first]
        if second or integers or name in _IDS or name in _COMPARES:
            self.near.pop(node, None)
            self.far.pop(node, None)

    def _note(self, *choices: Reason | None) -> None:
        for told in choices:
            for path, words in (told or {}).items():
                self.found.setdefault(path, words)


_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


def _picks(node: fx.Node, mask: fx.Node) -> bool:
    """Whether ``mask`` decides on more than its own elements in ``node``: it is an index, grows, or is summed up."""
    name = op_name(node)
    if name in ("nonzero", "masked_select", "gather", "scatter", "_local_scalar_dense", *_GROUPED):
        return True
    if name in ("index", "index_put"):
        places: FxArg = node.args[1]
        return mask in leaves_of(fx.Node, [places])
    grows = is_pointwise(node) or name in ("expand", "repeat")
    return is_matmul(node) or (grows and _count(node) > _count(mask) > 0)


def _count(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    return 0 if shape is None else int(torch.Size(shape).numel())


def _is_float(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _join(held: dict[fx.Node, frozenset[str]], node: fx.Node, inputs: Collection[fx.Node]) -> None:
    found = frozenset().union(*(held[a] for a in inputs if a in held))
    if found:
        held[node] = found


def _words(node: fx.Node, what: str) -> str:
    where = node.meta.get("source")
    return f"{what} at {where}" if where else what
