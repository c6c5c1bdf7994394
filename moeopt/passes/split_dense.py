"""A dense FFN as E experts that are all active: the same function, its neurons in E groups.

    y = W_out f(W_in x + b_in) + b_out
      = sum over e of  W_out[:, e] f(W_in[e] x + b_in[e])   + b_out           e = E runs of neurons
     ==  experts(x, ids = [0..E-1] for every token, weights = 1)

f acts on each neuron alone (a gated one on its gate and its up), so groups do not meet before the sum.
Each group is a region of the user's own Parameters, read where it lies: rows of W_in, columns of W_out.
Packed ``gate|up`` rows become two regions, since a group's gates and ups are apart. b_out belongs to
group 0, so it is added once.

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
from moeopt.ir.provenance import MatrixRef, VectorRef
from moeopt.ir.specs import ExpertsSpec
from moeopt.passes.combine import Combine
from moeopt.passes.frontier import Frontier, Recipe
from moeopt.passes.recognize_dense import DenseFFN
from moeopt.passes.recognize_experts import Recognition
from moeopt.passes.rows import Tokens
from moeopt.rewrite.bank import ExpertRef


def every_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """ids (T, E): every token goes to each of the groups; ``axis`` is the feature axis of ``x``."""
    return torch.arange(groups, device=x.device).expand(_tokens(x.shape, axis), groups)


def weight_one(x: Tensor, axis: int, groups: int) -> Tensor:
    """weights (T, E), all 1, in the dtype of ``x``."""
    return x.new_ones(_tokens(x.shape, axis), groups)


def _tokens(shape: Sequence[int], axis: int) -> int:
    count = 1
    for d, size in enumerate(shape):
        if d != axis:
            count = count * size
    return count


def split(ffn: DenseFFN, groups: int) -> Recognition:
    """``ffn`` as ``groups`` experts of equal size.

    Raises:
        Declined: its neurons do not come apart into so many equal groups; the text names the nearest numbers that do.
    """
    experts, spec = split_weights(ffn, groups)
    tokens = _tokens(ffn.x.meta["shape"], ffn.axis_in)
    everyone = Frontier(
        groups,
        Recipe(ffn.x, [(every_group, (ffn.axis_in, groups))]),
        Recipe(ffn.x, [(weight_one, (ffn.axis_in, groups))]),
        list(range(groups)),
        "every group",
    )
    return Recognition(
        Tokens(ffn.x, ffn.axis_in, tokens, {}, {}),
        everyone,
        Combine(ffn.out, ffn.axis_out, torch.ones(tokens, groups), None),
        None,
        experts,
        spec,
        ffn.interior,
        ffn.source,
        {},
    )


def split_weights(ffn: DenseFFN, groups: int) -> tuple[list[ExpertRef], ExpertsSpec]:
    """The regions of each group and the spec that reads them."""
    whole, spec, size = ffn.weights, ffn.spec, ffn.inner // groups
    if size * groups != ffn.inner:
        near = " or ".join(f"experts={n}" for n in _divisors_near(ffn.inner, groups))
        raise Declined(
            f"its {ffn.inner} neurons do not come apart into {groups} equal groups, and padding them would need a "
            f"second copy of the weights; give {near}"
        )
    w_in, b_in = whole.w_in, whole.b_in
    per_neuron = 2 if spec.rows in ("interleaved", "interleaved_up") else 1
    if spec.rows in ("gate|up", "up|gate"):
        halves = (0, ffn.inner) if spec.rows == "gate|up" else (ffn.inner, 0)
        w_in = tuple(outputs(w_in[0], start, ffn.inner) for start in halves)
        b_in = tuple(elements(b_in[0], start, ffn.inner) for start in halves)
        spec = dataclasses.replace(spec, rows="separate")
    experts = []
    for e in range(groups):
        start, count = e * size * per_neuron, size * per_neuron
        experts.append(
            ExpertRef(
                tuple(outputs(w, start, count) for w in w_in),
                tuple(elements(b, start, count) for b in b_in),
                inputs(whole.w_out, e * size, size),
                whole.b_out if e == 0 else None,
            )
        )
    return experts, spec


def outputs(ref: MatrixRef, start: int, count: int) -> MatrixRef:
    """The region of ``ref`` that computes outputs start..start+count."""
    return dataclasses.replace(ref, origin=_moved(ref.origin, ref.dm, start), m=count)


def inputs(ref: MatrixRef, start: int, count: int) -> MatrixRef:
    """The region of ``ref`` that reads inputs start..start+count."""
    return dataclasses.replace(ref, origin=_moved(ref.origin, ref.dk, start), k=count)


def elements(ref: VectorRef | None, start: int, count: int) -> VectorRef | None:
    """Elements start..start+count of a bias, if there is one."""
    return None if ref is None else dataclasses.replace(ref, origin=_moved(ref.origin, ref.dm, start), m=count)


def _moved(origin: tuple[int, ...], step: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple(o + by * s for o, s in zip(origin, step, strict=True))


def _divisors_near(size: int, wanted: int) -> list[int]:
    """The nearest divisors of ``size`` below and above ``wanted``, 1 not counted."""
    fits = [n for n in range(2, size + 1) if size % n == 0]
    return [*[n for n in fits if n < wanted][-1:], *[n for n in fits if n > wanted][:1]]
