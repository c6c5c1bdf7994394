"""A dense FFN as E experts that are all active: the same function, its neurons in E groups.

    y = W_out f(W_in x + b_in) + b_out
      = sum over e of  W_out[:, e] f(W_in[e] x + b_in[e])   + b_out           e = E groups of neurons
     ==  experts(x, ids = [0..E-1] for every token, weights = 1)

f acts on each neuron alone (a gated one on its gate and its up), so groups do not meet before the sum.
A group of neighbours is a region of the user's own Parameters, read where it lies: rows of W_in, columns
of W_out. Any other group names its neurons, which are picked at each call. Packed ``gate|up`` rows become
two regions, since a group's gates and ups are apart. b_out belongs to group 0, so it is added once. Where
E does not divide I, the first groups have one neuron more than the last.

Shapes     T tokens, H hidden, I intermediate: W_in (I, H), W_out (H, I) -> E times (I/E, H), (H, I/E)
Saves      nothing by itself; the groups can be placed apart
Numerics   ROUNDING: E partial sums instead of one, added in float32
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef
from moeopt.passes.base import Level
from moeopt.passes.group_experts import group
from moeopt.recognise.combine import Combine
from moeopt.recognise.dense_ffn import DenseFFN
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_types import Extraction, Routing, RoutingForm
from moeopt.recognise.token_rows import Tokens
from moeopt.rewrite.block_graph import BlockGraph


class SplitDenseFFN:
    """See the module's docstring."""

    name = "split_dense_ffn"
    level = Level.ROUNDING
    kind = "split"

    def apply(self, block: BlockGraph) -> int:
        """How many dense FFNs became groups; 0 where the block was read as something else."""
        return group(block) if block.captured is not None and block.captured.kind == self.kind else 0


Groups = Sequence[Sequence[int]]
"""The neurons of each group; together each neuron once."""


def every_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """ids (T, E): every token goes to each of the groups; ``axis`` is the feature axis of ``x``."""
    return torch.arange(groups, device=x.device).expand(_tokens(x.shape, axis), groups)


def weight_one(x: Tensor, axis: int, groups: int) -> Tensor:
    """weights (T, E), all 1, in the dtype of ``x``; rows of stride 0, so that a kernel can tell."""
    return x.new_ones(1, groups).expand(_tokens(x.shape, axis), groups)


def _tokens(shape: Sequence[int], axis: int) -> int:
    count = 1
    for d, size in enumerate(shape):
        if d != axis:
            count = count * size
    return count


def neighbours(inner: int, groups: int) -> list[range]:
    """``inner`` neurons in order, in ``groups`` groups whose sizes differ by one at most, larger ones first.

    Raises:
        Declined: there are fewer neurons than groups.
    """
    if groups > inner:
        raise Declined(f"it has {inner} neurons, too few for {groups} groups; give experts={inner} or less")
    size, more = divmod(inner, groups)
    starts = [e * size + min(e, more) for e in range(groups + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def split(ffn: DenseFFN, groups: Groups) -> Recognition:
    """``ffn`` as one expert for each of ``groups``."""
    experts, spec = split_weights(ffn, groups)
    return for_every_token(ffn, experts, spec)


def for_every_token(ffn: DenseFFN, experts: list[ExpertRef], spec: ExpertsSpec) -> Recognition:
    """``ffn`` as the sum of ``experts``, each of them run on every token with weight 1."""
    count, tokens = len(experts), _tokens(ffn.x.meta["shape"], ffn.axis_in)
    everyone = Routing(
        count,
        Extraction(ffn.x, [(every_group, (ffn.axis_in, count))]),
        Extraction(ffn.x, [(weight_one, (ffn.axis_in, count))]),
        list(range(count)),
        RoutingForm.EVERY_GROUP,
    )
    return Recognition(
        Tokens(ffn.x, ffn.axis_in, tokens, {}, {}),
        everyone,
        Combine(ffn.out, ffn.axis_out, torch.ones(tokens, count), None),
        None,
        experts,
        spec,
        ffn.interior,
        ffn.source,
        {},
    )


def split_weights(ffn: DenseFFN, groups: Groups) -> tuple[list[ExpertRef], ExpertsSpec]:
    """The weights of each group and the spec that reads them."""
    whole, spec, inner = ffn.weights, ffn.spec, ffn.inner
    w_in, b_in = whole.w_in, whole.b_in
    if spec.rows not in ("plain", "separate"):
        # (gate, up): where the first of each is, and how far the next
        first, step = {
            "gate|up": ((0, inner), 1), "up|gate": ((inner, 0), 1),
            "interleaved": ((0, 1), 2), "interleaved_up": ((1, 0), 2),
        }[spec.rows]  # fmt: skip
        w_in = tuple(outputs(w_in[0], start, inner, step) for start in first)
        b_in = tuple(elements(b_in[0], start, inner, step) for start in first)
        spec = dataclasses.replace(spec, rows="separate")
    experts = []
    for e, neurons in enumerate(groups):
        start, count = neurons[0], len(neurons)
        b_out = whole.b_out if e == 0 else None
        if list(neurons) == list(range(start, start + count)):
            ref = ExpertRef(
                tuple(outputs(w, start, count) for w in w_in),
                tuple(elements(b, start, count) for b in b_in),
                inputs(whole.w_out, start, count),
                b_out,
            )
        else:
            ref = ExpertRef(w_in, b_in, whole.w_out, b_out, tuple(neurons))
        experts.append(ref)
    return experts, spec


def outputs(ref: MatrixRef, start: int, count: int, step: int = 1) -> MatrixRef:
    """The region of ``ref`` that computes outputs start, start + step, ...: ``count`` of them."""
    return dataclasses.replace(ref, origin=_moved(ref.origin, ref.dm, start), dm=_times(ref.dm, step), m=count)


def inputs(ref: MatrixRef, start: int, count: int) -> MatrixRef:
    """The region of ``ref`` that reads inputs start..start+count."""
    return dataclasses.replace(ref, origin=_moved(ref.origin, ref.dk, start), k=count)


def elements(ref: VectorRef | None, start: int, count: int, step: int = 1) -> VectorRef | None:
    """Elements start, start + step, ... of a bias, if there is one: ``count`` of them."""
    if ref is None:
        return None
    return dataclasses.replace(ref, origin=_moved(ref.origin, ref.dm, start), dm=_times(ref.dm, step), m=count)


def _moved(origin: tuple[int, ...], step: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple(o + by * s for o, s in zip(origin, step, strict=True))


def _times(step: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple(s * by for s in step)
