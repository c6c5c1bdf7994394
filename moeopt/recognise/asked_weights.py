"""Does the dispatch ask the routing weights which rows an expert gets, beside the ids or in their place?

    rows = torch.where(table[:, e] != 0)[0]     a row whose weight is zero is left out: 0 * inf is never computed
    rows = torch.where(ids == e)[0]             a row of any weight is computed

The two differ where a weight underflows, in float16 the score of an unlikely expert, and its expert overflows.

    rows = torch.where((ids == e) & (w >= 0.02))[0]     a threshold that no token of the example may lie below

    dispatch = one_hot(ids, E) * (w >= 0.02)[..., None]     the same in products with codes

Such a dispatch has no reading by ids and weights alone: what no probe reaches would be left out.

    hit = torch.zeros(E).scatter_add(0, ids.flatten(), w.flatten()).nonzero()     which experts run at all

Weights of both signs may add up to zero, those of a saturated tanh on ordinary rows, and an expert that has tokens
does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.ids_of_masks import ids_not_zero, ids_positive
from moeopt.recognise.routing_types import Routing

LeaveOut = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""ids (T, K), weights (T, K), E -> ids, with E for those of which the dispatch takes no row."""
_ROWS = ("nonzero", "masked_select")
_COMPARES = ("gt", "ge", "lt", "le", "eq", "ne")
_SUMS = ("sum", "mean", "cumsum", "scatter_add", "scatter_reduce", "index_add", "index_put")
_ANDS = ("any", "logical_and", "bitwise_and", "__and__")
_ORS = ("logical_or", "bitwise_or", "__or__")
_NOTS = ("logical_not", "bitwise_not", "logical_xor", "bitwise_xor")
_AS_FACTOR = ("mul", "where", "masked_fill", "_to_copy")
"""How a mask leaves rows out that it does not pick: as zeros in a product, as of one-hot codes with a capacity."""
_OTHER = "other"
_DEPTH = 8


def left_out(routing: Routing, dispatch: Collection[fx.Node], tape: Tape) -> LeaveOut | None:
    """What leaves out the rows that the dispatch leaves out by the values of the weights; None where it does not ask.

    Args:
        routing: a reading; looked at is what moves its weights alone, to a table of all experts for instance, so that
            each asks the weight itself.
        dispatch: the nodes that experts' rows and their sum are made of. Masks of others pick no expert's rows, as
            those that count; nor do those that are a part of the reading itself.

    Raises:
        Declined: it asks them something else than whether they are zero, or are above zero.
    """
    weights = routing.weights.nodes
    asks = _Asks(weights, set(dispatch) - set(routing.ids.nodes if routing.ids is not None else ()), tape)
    for node in weights:
        asks.of_weights(node, _DEPTH)
    if (other := asks.found.get(_OTHER)) is not None:
        raise Declined(
            f"which rows its experts see depends on a comparison of the routing weights ({op_name(other)}) beside the "
            "expert ids, which the op does not make: set the weights of the rows that are left out to 0 in the tensor "
            "of all tokens' weights (torch.where), and dispatch by the ids",
            other.meta.get("source"),
        )
    if asks.sum is not None and _of_both_signs(routing.weights.run(tape)):
        raise Declined(
            f"which experts run depends on whether a sum of routing weights is zero ({op_name(asks.sum)}), and weights "
            "of both signs can add up to zero where there are tokens; ask the expert ids, or the sum of weights.abs()",
            asks.sum.meta.get("source"),
        )
    return {frozenset(["ne"]): ids_not_zero, frozenset(["gt"]): ids_positive}.get(frozenset(asks.found))


def _of_both_signs(weights: torch.Tensor) -> bool:
    return bool((weights < 0).any()) and bool((weights > 0).any())


class _Asks:
    """What a dispatch asks the weights: ``found`` holds a comparison for each of "ne" and "gt" zero, and other;
    ``sum`` asks a sum of them whether it is zero."""

    def __init__(self, weights: Collection[fx.Node], dispatch: Collection[fx.Node], tape: Tape) -> None:
        self.weights, self.dispatch, self.tape = set(weights), dispatch, tape
        self.found: dict[str, fx.Node] = {}
        self.sum: fx.Node | None = None

    def of_weights(self, node: fx.Node, depth: int) -> None:
        """Enter the comparisons of what moves ``node`` by which rows are picked; ``nonzero`` asks ``!= 0``."""
        for user in node.users:
            if user not in self.dispatch:
                continue
            name = op_name(user)
            dtype = user.meta.get("dtype")
            if name == "nonzero":
                self.found.setdefault("ne", user)
            elif name in _COMPARES:
                zero = user.args[0] is node and user.args[1] == 0
                if not (zero and name == "eq"):
                    self._mask(user, name if zero and name in ("ne", "gt") else _OTHER, user, depth)
            elif name == "_to_copy" and dtype is torch.bool:
                self._mask(user, "ne", user, depth)
            elif depth and self._moves(user, node, dtype):
                self.of_weights(user, depth - 1)
            elif depth and name in _SUMS:
                self._of_sum(user, depth - 1)

    def _of_sum(self, node: fx.Node, depth: int) -> None:
        for user in node.users:
            name = op_name(user)
            zero = name in _COMPARES and user.args[1] == 0
            if user in self.dispatch and (name == "nonzero" or (zero and self._picks(user, depth))):
                self.sum = self.sum or user
                if name == "gt" and self._of_slots(node):
                    self._mask(user, "gt", user, depth)
            elif depth and user in self.dispatch and moves_rows(user):
                self._of_sum(user, depth - 1)

    def _moves(self, user: fx.Node, weights: fx.Node, dtype: torch.dtype | None) -> bool:
        """Whether ``user`` holds ``weights``, in other places or beside zeros."""
        if moves_rows(user):
            return dtype is None or dtype.is_floating_point
        return op_name(user) == "mul" and self._by_one_hot(user, weights)

    def _by_one_hot(self, product: fx.Node, weights: fx.Node) -> bool:
        """Whether the weights are multiplied with zeros and ones: each is moved to the column of its expert."""
        others = [a for a in product.all_input_nodes if a is not weights]
        value = self.tape.value(others[0]) if len(others) == 1 else None
        return isinstance(value, torch.Tensor) and value.dim() > 1 and bool(((value == 0) | (value == 1)).all())

    def _of_slots(self, total: fx.Node) -> bool:
        """Whether a sum is that of a token's weights at one expert: over its slots, not over the tokens."""
        source = total
        while moves_rows(source):
            source = source.all_input_nodes[0]
        summed = source.all_input_nodes[0]
        return op_name(source) == "sum" and op_name(summed) == "mul" and source.args[1] not in ([0], [])

    def _picks(self, mask: fx.Node, depth: int) -> bool:
        """Whether rows, or experts, are picked by ``mask``."""
        users = [u for u in mask.users if u in self.dispatch]
        return any(
            op_name(u) in _ROWS
            or (op_name(u) == "index" and mask in (u.args[1] or ()))  # type: ignore[operator]
            or (depth > 0 and (moves_rows(u) or op_name(u) in (*_ANDS, *_ORS, *_NOTS)) and self._picks(u, depth - 1))
            for u in users
        )

    def _mask(self, mask: fx.Node, word: str, by: fx.Node, depth: int) -> None:
        """Enter ``word`` where rows are picked where ``mask`` is set; other where they are picked elsewhere too."""
        for user in mask.users:
            if user not in self.dispatch:
                continue
            name = op_name(user)
            if name in _ROWS or (name == "index" and mask in (user.args[1] or ())):  # type: ignore[operator]
                self.found.setdefault(word, by)
            elif word == _OTHER and name in _AS_FACTOR:
                self.found.setdefault(_OTHER, by)
            elif depth and (moves_rows(user) or name in _ANDS):
                self._mask(user, word, by, depth - 1)
            elif depth and name in (*_ORS, *_NOTS):
                every = name in _ORS and all(self.weights & ancestors([a]) for a in user.all_input_nodes)
                self._mask(user, word if every else _OTHER, by, depth - 1)
