"""However a matrix reached its matmul, its Parameter and the place in it are found."""

import pytest
import torch

from moeopt.ir.weight_refs import MatrixRef
from moeopt.recognise.weight_source import element_source, matrix_ref, vector_ref
from tests.capture.tiny import rand, recorded

E, K, M = 5, 3, 4


@pytest.mark.parametrize(
    "move",
    [
        lambda w: w,
        lambda w: w.t() if w.dim() == 2 else w.transpose(1, 2),
        lambda w: w.transpose(-1, -2).contiguous(),
        lambda w: w.permute(2, 0, 1),
        lambda w: w.reshape(-1, M),
        lambda w: w.view(E * K, M).view(E, K, M),
        lambda w: w[2],
        lambda w: w[-1],
        lambda w: w.select(2, -2),
        lambda w: w[1:4, :, 1:],
        lambda w: w[:, ::2],
        lambda w: w[-3:-1],
        lambda w: w.unsqueeze(1).squeeze(1),
        lambda w: w[3:4].expand(6, K, M),
        lambda w: w[torch.tensor([4, 0, 0])],
        lambda w: w[torch.tensor([[4, 0], [1, -1]])],
        lambda w: w[:, torch.tensor([2, 0])],
        lambda w: w.index_select(1, torch.tensor([2, 0])),
        lambda w: w.unbind(0)[3],
        lambda w: w.unbind(-1)[-1],
        lambda w: w.split(2)[1],
        lambda w: w.split([1, 3], dim=-1)[1],
        lambda w: w.chunk(2, dim=2)[1],
        lambda w: torch.cat([w[3:], w[:1]]),
        lambda w: torch.cat([w[:0], w], dim=0),
        lambda w: torch.cat([w, w[:, :, :2]], dim=-1),
        lambda w: torch.stack([w[1], w[0]], dim=1),
        lambda w: torch.stack(w.unbind(0)[::-1]),
        lambda w: w.double().to(torch.bfloat16),
        lambda w: w.detach().clone().data,
        lambda w: w.as_strided((K, 2), (M, 1), 2 * K * M + 1),
    ],
)
def test_every_element_is_traced_to_where_it_was(move):
    w = torch.arange(E * K * M, dtype=torch.float32).view(E, K, M)
    tape = recorded(lambda m, x: move(m.w) + x, rand(1), w=w)
    node = tape.output.args[0]
    value = tape.value(node)
    for index in torch.cartesian_prod(*(torch.arange(s) for s in value.shape)).view(-1, value.dim()).tolist():
        leaf, place = element_source(tape, node, tuple(index))
        assert leaf.target == "w" and w[place] == value[tuple(index)].float(), (index, place)


def test_a_computed_element_is_its_own_source():
    tape = recorded(lambda m, x: (m.w * 2).t() + x, rand(1), w=rand(K, M))
    leaf, place = element_source(tape, tape.output.args[0], (1, 2))
    assert leaf.target is torch.ops.aten.mul.Tensor and place == (2, 1)


def region(w, ref):
    offset, dk, dm = ref.offset_and_strides(w.stride())
    return w.as_strided((ref.k, ref.m), (dk, dm), w.storage_offset() + offset)


@pytest.mark.parametrize(
    ("move", "prefix", "swap"),
    [
        (lambda w: w[2], (), False),
        (lambda w: w[2].t(), (), True),
        (lambda w: w.transpose(1, 2)[3], (), False),
        (lambda w: torch.stack([w[4], w[1]]), (1,), False),
        (lambda w: w[torch.tensor([3, 1])], (0,), True),
        (lambda w: w[1, :, 2:], (), False),
        (lambda w: w[0, ::2], (), False),
        (lambda w: w[:, 1], (), False),
        (lambda w: w.view(E * K, M)[2:7], (), False),
        (lambda w: w[1:2, :1].view(1, -1)[:, :1], (), False),
    ],
)
def test_a_matrix_is_a_region_of_its_parameter(move, prefix, swap):
    w = rand(E, K, M)
    tape = recorded(lambda m, x: move(m.w) + x, rand(1), w=w)
    node = tape.output.args[0]
    want = tape.value(node)[prefix]
    want = want.t() if swap else want
    ref = matrix_ref(tape, node, prefix, *want.shape, swap)
    if ref is None:  # rows of two experts seen as one matrix may be no region; then nothing is claimed
        assert want.shape == (5, M)
        return
    assert ref.path == "w" and torch.equal(region(w, ref), want)


def test_what_is_no_region_is_none():
    def ref(fn, **parts):
        tape = recorded(fn, rand(1), **parts)
        node = tape.output.args[0]
        return matrix_ref(tape, node, (), *tape.value(node).shape, False)

    w = rand(4, 4)
    assert ref(lambda m, x: m.w * 2 + x, w=w) is None  # computed
    assert ref(lambda m, x: torch.stack([m.w[0], m.v[0]]) + x, w=w, v=rand(4, 4, seed=1)) is None  # of two Parameters
    assert ref(lambda m, x: m.w[torch.tensor([0, 1, 3])] + x, w=w) is None  # steps of different lengths
    assert ref(lambda m, x: rand(4, 4).t() + x, w=w) is None  # a constant


def test_a_region_that_agrees_at_its_corners_alone_is_not_claimed():
    """Rows 0, 1, 3, 2, 4 look regular at the first two and the last."""
    w = rand(5, 4)
    tape = recorded(lambda m, x: m.w[torch.tensor([0, 1, 3, 2, 4])] + x, rand(1), w=w)
    node = tape.output.args[0]
    ref = matrix_ref(tape, node, (), 5, 4, False)
    assert ref is None or torch.equal(region(w, ref), tape.value(node))


def test_a_bias_is_a_stretch_of_its_parameter():
    b = rand(E, M)
    tape = recorded(lambda m, x: torch.stack([m.b[3], m.b[1]]) + x, rand(1), b=b)
    ref = vector_ref(tape, tape.output.args[0], (1,), M)
    assert (ref.path, ref.origin, ref.dm, ref.m) == ("b", (1, 0), (0, 1), M)
    tape = recorded(lambda m, x: m.b.t()[2] + x, rand(1), b=b)
    ref = vector_ref(tape, tape.output.args[0], (), E)
    assert (ref.origin, ref.dm) == ((0, 2), (1, 0))
    tape = recorded(lambda m, x: m.b[0].exp() + x, rand(1), b=b)
    assert vector_ref(tape, tape.output.args[0], (), M) is None


def test_a_reference_gives_storage_strides():
    ref = MatrixRef("w", (2, 0, 1), (0, 1, 0), (0, 0, 2), 3, 2)
    assert ref.offset_and_strides((12, 4, 1)) == (25, 4, 2)
