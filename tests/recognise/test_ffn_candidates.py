"""Which products belong together as an expert, and which chains as experts of one block."""

import torch
import torch.nn.functional as F
from torch import nn

from moeopt.capture.tape import record
from moeopt.recognise.ffn_candidates import find_candidates
from moeopt.recognise.ffn_groups import group_candidates
from moeopt.recognise.gemm_sites import find_sites
from tests.capture.tiny import rand, recorded
from tests.recognise.tiny import GLU, H, I, MoE, ffn, seeded, tape_of


def candidates(tape, **options):
    return find_candidates(tape, find_sites(tape), **options)


def paths(candidate):
    return [s.matrices[0].path for s in (*candidate.ins, *candidate.outs)]


def test_a_dense_ffn_is_a_chain():
    (candidate,) = candidates(record(seeded(ffn), (rand(5, H),)))
    assert paths(candidate) == ["0.weight", "2.weight"] and candidate.nonlinear and not candidate.merged
    assert [n.target._schema.name for n in candidate.mid] == ["aten::relu"] and len(candidate.roles()) == 1


def test_gate_and_up_are_two_in_sites():
    (candidate,) = candidates(record(seeded(GLU), (rand(5, H),)))
    assert paths(candidate) == ["gate.weight", "up.weight", "down.weight"] and len(candidate.roles()) == 2


def test_two_linears_alone_are_a_chain_without_a_function():
    both = nn.Sequential(nn.Linear(H, I), nn.Linear(I, H))
    (candidate,) = candidates(record(both, (rand(5, H),)))
    assert not candidate.nonlinear and candidate.mid == []


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(H, 3 * H), nn.Linear(H, H)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o((q @ k.t()).softmax(-1) @ v)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(H, I), nn.LayerNorm(I), nn.Linear(I, H)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class RowScaled(Normed):
    def forward(self, x):
        h = self.a(x)
        return self.b(h / h.norm(dim=-1, keepdim=True))


class Residual(Normed):
    def forward(self, x):
        return self.b(self.a(x) + torch.cat([x, x], -1)[:, :I])


def test_attention_norms_and_residuals_are_no_chains():
    for model in (Attention(), Normed(), RowScaled(), Residual()):
        assert candidates(record(model, (rand(6, H),))) == [], type(model).__name__


def test_a_weight_of_one_value_per_row_may_stand_between():
    def fn(m, x):
        h = F.relu(x @ m.a)
        return (h * x.sum(-1, keepdim=True).sigmoid()) @ m.b

    (candidate,) = candidates(recorded(fn, rand(6, H), a=rand(H, I), b=rand(I, H)))
    assert paths(candidate) == ["a", "b"]


def test_sizes_must_fit_unless_loose():
    def fn(m, x):
        return F.relu(x @ m.a)[:, :I] @ m.b

    tape = recorded(fn, rand(6, H), a=rand(H, 3 * I), b=rand(I, H))
    assert candidates(tape) == [] and len(candidates(tape, loose=True)) == 1


def test_experts_of_one_block_are_a_group():
    tape = tape_of(MoE)
    groups = group_candidates(tape, candidates(tape))
    assert len(groups[0]) == 4
    assert [paths(c)[0] for c in groups[0]] == [f"experts.{e}.0.weight" for e in range(4)]
    assert len({c.signature for c in groups[0]}) == 1


def test_different_functions_have_different_signatures():
    acts = iter([nn.ReLU, nn.GELU, nn.ReLU, nn.GELU])
    found = candidates(tape_of(lambda: MoE(lambda: ffn(next(acts)))))
    assert len(found) == 4 and len({c.signature for c in found}) == 2


def test_layers_are_groups_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MoE(), MoE()

        def forward(self, x):
            return self.b(x + self.a(x))

    tape = tape_of(Two, tokens=48)
    groups = group_candidates(tape, candidates(tape))
    assert sorted(len(g) for g in groups) == [4, 4]
    assert all(len({paths(c)[0].split(".")[0] for c in g}) == 1 for g in groups)


def test_all_experts_at_once_are_one_merged_chain():
    def fn(m, x):
        return torch.bmm(F.gelu(torch.bmm(x.expand(4, 6, H), m.a)), m.b).sum(0)

    tape = recorded(fn, rand(6, H), a=rand(4, H, I), b=rand(4, I, H))
    found = candidates(tape)
    assert len(found) == 1 and found[0].merged and group_candidates(tape, found) == [found]


def test_one_activation_for_the_rows_of_all_experts_is_one_wide_chain():
    class Wide(MoE):
        def mix(self, x, w, ids):
            full = torch.zeros(len(x), 4).scatter(1, ids, w)
            hs = torch.cat([e[0](x) for e in self.experts])
            outs = [e[2](h) for e, h in zip(self.experts, F.relu(hs).chunk(4), strict=True)]
            return sum(full[:, i, None] * o for i, o in enumerate(outs))

    (candidate,) = candidates(tape_of(Wide))
    assert candidate.merged and len(candidate.ins) == len(candidate.outs) == 4 and candidate.signature[0] == "wide"


def test_experts_of_different_sizes_are_grouped_to_be_declined():
    sizes = iter([8, 12, 16, 20])
    tape = tape_of(lambda: MoE(lambda: ffn(inner=next(sizes))))
    groups = group_candidates(tape, candidates(tape))
    assert max(len(g) for g in groups) == 4
