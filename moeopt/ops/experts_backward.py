"""The gradient of the op, written out: each expert's rows are multiplied once for each gradient that is wanted.

For the rows of one expert, g what reaches y, r what the expert reads, a = act(h) and h = W_in r + b_in:

    b = W_out^T g            dw = <b, a> + <b_out, g>      dW_out = g (w a)^T
    dh = act'(h) (w b)       dr = W_in^T dh                dW_in = dh r^T             dx = dr, summed over its experts

and where w is on the input, r = w x: b and a are not weighted, dx = w dr and dw = <dr, x>. So W_out is not multiplied
with a again: its product with g serves for dw too, but where w has a wider dtype than a: there g is weighed, as
autograd does, and dw is of the outputs as they were rounded. h is kept by the forward pass where the kernel in C++
runs; else the first products are made again.

Shape legend: T tokens, K chosen per token, E experts, H hidden, D width of y, I intermediate, R pairs (token, slot) of
experts that exist, sorted by expert, M rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import split_rows
from moeopt.ops.bank_gradients import BankPart, BankParts
from moeopt.ops.gate_gradient import Pair, gated
from moeopt.ops.native.call import transformed
from moeopt.ops.reference import dtypes
from moeopt.ops.sorted_pairs import sorted_pairs
from moeopt.ops.unfit import Unfit

_PLAIN = {Tensor, nn.Parameter, type(None)}
_EXACT = {torch.float32, torch.float64}
"""Dtypes in which a product of a matrix and a vector is summed up in no less than them."""

GROUP = 1 << 15
"""Numbers of each kind, rows of experts times I, that are alive at once; the rows of one expert are not cut."""


def experts_gradients(
    grad_TD: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, parts: BankParts, spec: ExpertsSpec,
    wants: tuple[bool, bool], kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and of the routing weights, where they are wanted; those of the bank grow in ``parts``.

    Args:
        grad_TD: that of the result of ``experts_reference``.
        wants: whether x, and the routing weights, want theirs.
        kept: what the forward pass kept of h: see ``native.hidden.Hidden``.

    Raises:
        Unfit: the definition is to be differentiated; no gradient was added to ``parts``.
    """
    if transformed():
        raise Unfit("a functional transform (torch.func) is at work")
    call = grad_TD, x_TH, ids_TK, weights_TK, parts, spec, wants
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _Backward(*call).run(kept)
    return _Backward(*call).run(kept)


class _Backward:
    """One backward pass; the attributes are those of its call, and what several steps read.

    Experts go through it a few at a time, as many as have ``GROUP`` numbers between their products: so what is between
    stays in cache, and in memory that was just given free.
    """

    def __init__(
        self, grad_TD: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, parts: BankParts, spec: ExpertsSpec,
        wants: tuple[bool, bool],
    ) -> None:  # fmt: skip
        self.x, self.ids, self.weights, self.parts, self.spec = x_TH, ids_TK, weights_TK, parts, spec
        self.wants_x, self.wants_w = wants
        self.compute, accum, _ = dtypes(x_TH, spec)
        self.on_input = spec.weight_on == "input"
        self.term = torch.promote_types(self.compute, weights_TK.dtype)
        self.wide = not self.on_input and self.term is not self.compute
        self.weighed = self.on_input or self.wide  # g is, or nothing of y's: then a and b are not
        self.grad = grad_TD.to(accum)
        self.by = sorted_pairs(ids_TK, parts.experts, spec)
        hit = self.by.hit
        self.width = _width(parts, hit)
        self.wants_in = any([part.wanted(e) for part in (*parts.w_in, *parts.b_in) for e in hit])
        self.wants_out = any([parts.w_out.wanted(e) for e in hit])
        self.wants_bias = any([parts.b_out.wanted(e) for e in hit])
        self.wants_r = self.wants_x or (self.wants_w and self.on_input)

    def run(self, kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        (T, K), by = self.ids.shape, self.by
        flat = self.weights.reshape(-1)
        self.dx = self.x.new_zeros(self.x.shape) if self.wants_x else None
        dw = flat.new_zeros(T * K) if self.wants_w else None
        if by.hit:
            self.g, self.r = self.grad.to(self.compute), self.x if self.on_input else self.x.to(self.compute)
            self.w_R1 = flat.index_select(0, by.order_R).unsqueeze(1)
            met = torch.promote_types(self.x.dtype, flat.dtype) if self.on_input else self.term
            self.dw_R = None if dw is None else flat.new_empty(len(by.order_R), dtype=met)
            first = 0
            for hit, counts in _groups(by.hit, by.counts, self.width):
                rows = slice(first, first := first + sum(counts))
                self._group(hit, counts, rows, kept)
            if dw is not None and self.dw_R is not None:
                dw.index_copy_(0, by.order_R, self.dw_R.to(dw.dtype))
        if len(by.beyond):
            self._of_tokens(self.dx, dw)
        return self.dx, None if dw is None else dw.view(T, K)

    def _group(self, hit: list[int], counts: list[int], rows: slice, kept: Tensor | None) -> None:
        """The rows of some experts."""
        w_M1, token_M = self.w_R1[rows], None if self.by.every else self.by.token_R[rows]
        if self.wide:
            wide_MD = self.grad.index_select(0, self.by.token_R[rows]).to(self.term)
            g: Sequence[Tensor] = _split((wide_MD * w_M1).to(self.compute), counts)
        else:
            g = _rows_of(self.g, token_M, counts)
        r: Sequence[Tensor] = ()
        if self.wants_in or kept is None:
            r = _rows_of(self.r, token_M, counts, w_M1 if self.on_input else None, self.compute)
        h = self._hidden(hit, counts, r, None if kept is None else kept[rows])
        a_MI, pull = gated(h, self.spec)
        b_MI = None
        if self.wants_r or self.wants_in or (self.wants_w and not self.wide):
            b_MI = a_MI.new_empty(a_MI.shape)
            for e, g_MD, b in zip(hit, g, _split(b_MI, counts), strict=True):
                torch.mm(g_MD, self._value(self.parts.w_out, e), out=b)
        if self.dw_R is not None and self.wide:
            torch.sum(wide_MD * self._outputs(hit, counts, a_MI), -1, out=self.dw_R[rows])
        elif self.dw_R is not None and not self.on_input:
            assert b_MI is not None
            self._weights(hit, counts, a_MI, b_MI, g, self.dw_R[rows])
        if self.wants_out and not self.weighed:
            a_MI.mul_(w_M1)
        self._add_out(hit, counts, g, a_MI, w_M1)
        if b_MI is None or not (self.wants_r or self.wants_in):
            return
        dh = pull(b_MI if self.weighed else b_MI.mul_(w_M1))
        if self.wants_in:
            self._add_in(hit, counts, dh, r)
        if self.wants_r:
            self._into(hit, counts, dh, rows)

    def _value(self, part: BankPart, e: int) -> Tensor:
        value = part.value(e)
        assert value is not None
        return value if value.dtype is self.compute else value.to(self.compute)

    def _hidden(self, hit: list[int], counts: list[int], r: Sequence[Tensor], kept: Tensor | None) -> Pair:
        """h as gates and ups: what was kept of it, or made again."""
        if kept is not None:
            return kept.chunk(2, dim=1) if self.spec.gated else (kept,)
        found = []
        for part, bias in zip(self.parts.w_in, self.parts.b_in, strict=True):
            h_MO = r[0].new_empty(sum(counts), self._value(part, hit[0]).shape[0])
            for e, r_MH, h in zip(hit, r, _split(h_MO, counts), strict=True):
                self._linear(r_MH, part, bias, e, h)
            found.append(h_MO)
        return split_rows(found[0], self.spec) if self.spec.gated and len(found) == 1 else tuple(found)

    def _weights(
        self, hit: list[int], counts: list[int], a_MI: Tensor, b_MI: Tensor, g: Sequence[Tensor], dw_M: Tensor
    ) -> None:
        """The gradient of the routing weights, where they are on the output."""
        torch.sum(b_MI * a_MI, -1, out=dw_M)
        biases = [self.parts.b_out.value(e) for e in hit]
        for b, g_MD, to in zip(biases, g, _split(dw_M, counts), strict=True):
            if b is not None:
                to += g_MD @ b.to(to.dtype)

    def _outputs(self, hit: list[int], counts: list[int], a_MI: Tensor) -> Tensor:
        """The experts' outputs again, which routing weights of a wider dtype multiply as they were rounded."""
        o_MD = a_MI.new_empty(len(a_MI), self.grad.shape[1])
        for e, a, o in zip(hit, _split(a_MI, counts), _split(o_MD, counts), strict=True):
            self._linear(a, self.parts.w_out, self.parts.b_out, e, o)
        return o_MD

    def _linear(self, rows: Tensor, part: BankPart, bias: BankPart, e: int, out: Tensor) -> None:
        """Expert e's product as the forward pass has it, with its bias, into ``out``."""
        b = bias.value(e)
        if b is None:
            torch.mm(rows, self._value(part, e).t(), out=out)
        else:
            torch.addmm(b.to(self.compute), rows, self._value(part, e).t(), out=out)

    def _add_out(self, hit: list[int], counts: list[int], g: Sequence[Tensor], a_MI: Tensor, w_M1: Tensor) -> None:
        """The gradients of the second matrix, and of its bias."""
        for e, g_MD, a in zip(hit, g, _split(a_MI, counts) if self.wants_out else (), strict=self.wants_out):
            if self.parts.w_out.wanted(e):
                self.parts.w_out.add(e, g_MD, a)
        for e, g_MD, w in zip(hit, g, _split(w_M1, counts) if self.wants_bias else (), strict=self.wants_bias):
            if not self.parts.b_out.wanted(e):
                continue
            if self.weighed:
                total_D = g_MD.sum(0)
            elif self.compute in _EXACT:
                total_D = torch.mv(g_MD.t(), w[:, 0].to(self.compute))
            else:
                total_D = (g_MD * w).to(self.compute).sum(0)
            self.parts.b_out.add_vector(e, total_D)

    def _add_in(self, hit: list[int], counts: list[int], dh: Pair, r: Sequence[Tensor]) -> None:
        """The gradients of the first matrices and their biases."""
        for part, bias, dh_MO in zip(self.parts.w_in, self.parts.b_in, dh, strict=True):
            for e, r_MH, to in zip(hit, r, _split(dh_MO, counts), strict=True):
                if part.wanted(e):
                    part.add(e, to, r_MH)
                if bias.wanted(e):
                    bias.add_vector(e, to.sum(0))

    def _into(self, hit: list[int], counts: list[int], dh: Pair, rows: slice) -> None:
        """The gradient of x; and of the routing weights, where they are on the input."""
        dr_MH = dh[0].new_empty(sum(counts), self.x.shape[1])
        for i, (part, dh_MO) in enumerate(zip(self.parts.w_in, dh, strict=True)):
            for e, dh_M, to in zip(hit, _split(dh_MO, counts), _split(dr_MH, counts), strict=True):
                if i:
                    to.addmm_(dh_M, self._value(part, e))
                else:
                    torch.mm(dh_M, self._value(part, e), out=to)
        token_M = self.by.token_R[rows]
        if self.on_input:
            if self.dw_R is not None:
                x_MH = self.x.index_select(0, token_M)
                torch.sum(dr_MH.to(self.dw_R.dtype) * x_MH, -1, out=self.dw_R[rows])
            dr_MH = dr_MH * self.w_R1[rows]
        if self.dx is None:
            return
        if self.by.every:
            for dr_TH in _split(dr_MH, counts):
                self.dx += dr_TH
        else:
            self.dx.index_add_(0, token_M, dr_MH.to(self.dx.dtype))

    def _of_tokens(self, dx: Tensor | None, dw: Tensor | None) -> None:
        """What ids beyond the experts add, if it is the token: x w."""
        beyond = self.by.beyond
        token = beyond.div(self.ids.shape[1], rounding_mode="floor")
        w_N1 = self.weights.reshape(-1).index_select(0, beyond).unsqueeze(1)
        g_NH = self.grad.index_select(0, token).to(torch.promote_types(self.x.dtype, w_N1.dtype))
        if dx is not None:
            dx.index_add_(0, token, (g_NH * w_N1).to(dx.dtype))
        if dw is not None:
            dw[beyond] = (g_NH * self.x.index_select(0, token)).sum(-1).to(dw.dtype)


def _groups(hit: list[int], counts: list[int], width: int) -> Iterator[tuple[list[int], list[int]]]:
    """The experts a few at a time, with the numbers of their rows."""
    most, rows, start = max(1, GROUP // max(1, width)), 0, 0
    for n, count in enumerate(counts):
        if rows and rows + count > most:
            yield hit[start:n], counts[start:n]
            rows, start = 0, n
        rows += count
    yield hit[start:], counts[start:]


def _rows_of(
    of_TX: Tensor, token_M: Tensor | None, counts: list[int], w_M1: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """What each row has of its token, weighted or not, for each expert; ``token_M`` None: each has all tokens."""
    if token_M is None:
        return [of_TX] * len(counts)
    rows_MX = of_TX.index_select(0, token_M)
    if w_M1 is not None:
        rows_MX = (rows_MX * w_M1).to(dtype)
    return _split(rows_MX, counts)


def _split(rows_MX: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return (rows_MX,) if len(counts) == 1 else torch.split_with_sizes(rows_MX, counts)


def _width(parts: BankParts, hit: Sequence[int]) -> int:
    """I of the experts that are hit.

    Raises:
        Unfit: they differ in it, so their rows cannot lie beside each other, or a tensor runs code of its class.
    """
    widths = set()
    for e in hit:
        out = parts.w_out.value(e)
        values = [part.value(e) for part in (*parts.w_in, *parts.b_in, parts.b_out)]
        if out is None or not _PLAIN.issuperset([type(out), *map(type, values)]):
            raise Unfit("a weight is of a class of its own")
        widths.add(out.shape[1])
    if len(widths) > 1:
        raise Unfit("the experts differ in width")
    return widths.pop() if widths else 0
