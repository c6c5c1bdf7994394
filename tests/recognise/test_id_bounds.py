import pytest
import torch
from torch import nn

from moeopt.capture.tape import record
from moeopt.recognise.id_bounds import bounds


class Ids(nn.Module):
    def __init__(self, ids):
        super().__init__()
        self.ids = ids
        self.register_buffer("table", torch.arange(5))

    def forward(self, scores, given):
        return self.ids(self, scores, given)


KNOWN = {
    "topk": (lambda m, s, g: s.topk(2).indices, (0, 6)),
    "topk of a dim": (lambda m, s, g: s.topk(2, dim=0).indices, (0, 3)),
    "argmax": (lambda m, s, g: s.argmax(-1), (0, 6)),
    "argmax of all": (lambda m, s, g: s.argmax().reshape(1), (0, 27)),
    "sorted, sliced and cast": (lambda m, s, g: s.argsort(-1)[:, :2].to(torch.int32).flatten(), (0, 6)),
    "max": (lambda m, s, g: s.max(1).indices, (0, 6)),
    "sorted ids": (lambda m, s, g: s.topk(2).indices.sort(-1).values, (0, 6)),
    "hash": (lambda m, s, g: (g * 31 + 7) % 5, (0, 4)),
    "clamp": (lambda m, s, g: g.clamp(0, 3), (0, 3)),
    "dropped to 7": (lambda m, s, g: s.argmax(-1).masked_fill(g > 0, 7), (0, 7)),
    "dropped to -1": (lambda m, s, g: torch.where(g > 0, s.argmax(-1), -1), (-1, 6)),
    "given": (lambda m, s, g: g.reshape(2, 2), None),
    "given values, sorted": (lambda m, s, g: g.sort().values, None),
    "clamp at one end": (lambda m, s, g: g.clamp(min=0), None),
    "a buffer": (lambda m, s, g: m.table[g], None),
    "arithmetic": (lambda m, s, g: s.argmax(-1) + g, None),
    "floats as ids": (lambda m, s, g: s[:, 0].long(), None),
    "one of two": (lambda m, s, g: torch.where(s[:, 0] > 0, s.argmax(-1), g), None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_bounds_follow_from_the_ops_that_made_the_ids(name):
    ids, want = KNOWN[name]
    scores = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    tape = record(Ids(ids), (scores, torch.tensor([0, 1, 2, 3])))
    assert bounds(tape.output) == want
