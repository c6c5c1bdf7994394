"""Views after which each number lies where it lay are told from those that move one; and what drops them."""

import itertools

import pytest
import torch
from torch import fx, nn

from moeopt.passes.drop_copies import DropCopies
from moeopt.rewrite.install import run
from moeopt.rewrite.view_chains import farthest_source, unchanged_source
from tests.capture.tiny import rand
from tests.passes.test_drop_copies import Views
from tests.recognise.tiny import H, MoE, seeded, through

aten = torch.ops.aten
STEPS = [
    (aten.unsqueeze.default, 0), (aten.unsqueeze.default, -1), (aten.unsqueeze.default, 1), (aten.squeeze.dim, 1),
    (aten.transpose.int, 0, 1), (aten.transpose.int, -1, -2), (aten.movedim.int, -1, 0), (aten.movedim.int, 0, 1),
    (aten.movedim.intlist, [0, 1], [1, 0]), (aten.reshape.default, [3, 4]), (aten.reshape.default, [4, 3]),
    (aten.reshape.default, [3, 1, 4]), (aten.reshape.default, [12]), (aten.permute.default, [1, 0]),
    (aten.permute.default, [0, 2, 1]), (aten.permute.default, [2, 0, 1]), (aten.permute.default, [1, 0, 2]),
    (aten.t.default,),
]  # fmt: skip


def chain(steps):
    """The graph of ``steps`` on a (3, 4) tensor, its last node and that node's value; None where a step is no call."""
    graph = fx.Graph()
    value, node = torch.arange(12).reshape(3, 4), graph.placeholder("x")
    node.meta["shape"] = (3, 4)
    for target, *args in steps:
        try:
            value = target(value, *args)
        except (RuntimeError, IndexError):
            return None
        node = graph.call_function(target, (node, *args))
        node.meta["shape"] = tuple(value.shape)
    return node, value


def test_a_chain_is_found_only_where_it_changes_nothing():
    found, values = 0, torch.arange(12).reshape(3, 4)
    for length in (1, 2, 3):
        for steps in itertools.product(STEPS, repeat=length):
            if (made := chain(steps)) is None:
                continue
            node, value = made
            source = unchanged_source(node)
            if source is not None and source.op == "placeholder":
                found += 1
                assert torch.equal(value, values), steps
    assert found > 50


BASES = {
    "in order": torch.arange(12).reshape(3, 4), "turned": torch.arange(12).reshape(4, 3).t(),
    "every second": torch.arange(24).reshape(3, 8)[:, ::2], "one row": torch.arange(4).expand(3, 4),
}  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_a_reshape_reads_past_views_to_the_same_numbers_in_the_same_memory(base):
    passed = 0
    for length, every in (1, 1), (2, 1), (3, 17):
        chains = itertools.product([*STEPS, (aten.permute.default, [3, 2, 0, 1])], repeat=length)
        for steps in itertools.islice(chains, 0, None, every):
            for last in ([12], [3, 4], [1, -1, 4], [4, 3]):
                if (made := chain([*steps, (aten.reshape.default, last)])) is None:
                    continue
                node, source, values = made[0], farthest_source(made[0]), {}
                if source is node.args[0]:
                    continue
                for one in node.graph.nodes:
                    ins = [values.get(a, a) if isinstance(a, fx.Node) else a for a in one.args]
                    values[one] = BASES[base] if one.op == "placeholder" else one.target(*ins)
                passed += 1
                want, got = values[node], aten.reshape.default(values[source], last)
                assert torch.equal(want, got) and want.stride() == got.stride(), (steps, last)
                kept = want.untyped_storage().data_ptr() == BASES[base].untyped_storage().data_ptr()
                assert kept == (got.untyped_storage().data_ptr() == BASES[base].untyped_storage().data_ptr())
    assert passed > 100


class Einsum(MoE):
    """The views that an einsum over the chosen experts leaves behind its sum, which is the block's result."""

    def forward(self, x):
        y = super().forward(x)
        return y.reshape(-1, 1, H).movedim(-1, 1).reshape(-1, H, 1, 1).permute(0, 1, 3, 2).reshape(x.shape)


class Turned(MoE):
    def forward(self, x):
        return super().forward(x).reshape(-1, 2, H // 2).permute(0, 2, 1).reshape(x.shape)


class HeldTwice(MoE):
    """The block returns a view of its other result, and a caller may write to either."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.unsqueeze(0).squeeze(0)


@pytest.mark.parametrize("make", [Einsum, Views], ids=lambda m: m.__name__)
def test_views_of_the_sum_go_to_the_same_bits(make):
    without, _ = through(make)
    rewrite, records = through(make, DropCopies())
    record = records["drop_copies"]
    assert record.fired >= 3 and record.verified and not {"reshape", "permute", "movedim"} & record.after.keys()
    for x in (rand(6, H), rand(1, H), rand(19, H, seed=2)):
        module = seeded(make)
        assert torch.equal(run(rewrite.program.block, module, x), run(without.program.block, module, x))


@pytest.mark.parametrize("make", [Turned, HeldTwice], ids=lambda m: m.__name__)
def test_a_view_that_moves_numbers_or_that_somebody_could_see_stays(make):
    rewrite, records = through(make, DropCopies())
    assert records["drop_copies"].fired == 0 and rewrite.check.passed is True


def test_a_view_of_a_kept_module_s_result_stays():
    """Only the experts' sum is known to be fresh and contiguous."""

    class Behind(MoE):
        def __init__(self):
            super().__init__(norm=nn.LayerNorm(H))

        def forward(self, x):
            y = self.norm(super().forward(x))
            return y.unsqueeze(0).movedim(0, 1).squeeze(1)

    _, records = through(Behind, DropCopies())
    assert records["drop_copies"].fired == 0
