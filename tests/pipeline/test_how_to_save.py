"""Where a declined block keeps the whole model from being exported, the report says what can be saved; and it can."""

import re

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError
from tests.toy_moe import Block, X, build, close


class Branching(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if float(y.detach().mean()) > 0 else y


@torch.no_grad()
def test_the_rest_can_be_saved_as_the_note_says(tmp_path):
    model = nn.Sequential(build(Branching), build()).eval()
    fast = moeopt.optimize(model, X, verify="fast")
    assert [b.status for b in fast.report.blocks if b.kind == "moe"] == ["declined", "rewritten"]
    (note,) = [n for n in fast.report.notes if "torch.save" in n]
    assert note.startswith("0: left with Python that depends on the values of tensors")
    with pytest.raises(NotSaveableError, match=r"a rewritten block alone, .*, or the whole model with its code"):
        fast.save(tmp_path / "whole")
    torch.save(fast.model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    close(again(X), model(X))
    assert again[1].forward.calls == 1  # the rewritten code ran
    name = re.search(r"moeopt\.optimize\(model\.get_submodule\('([\w.]+)'\)", note)[1]
    part, x = model.get_submodule(name), model[0](X)
    moeopt.optimize(part, x, verify="fast").save(tmp_path / "part")
    close(moeopt.load(tmp_path / "part")(x), part(x))


def test_no_such_note_where_every_block_is_rewritten():
    assert not any("torch.save" in note for note in moeopt.explain(build(), X, verify="fast").notes)
