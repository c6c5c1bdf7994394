"""Where Python that depends on data keeps a model from being exported, it is said what can be saved; and it can.

The sentence is followed as it stands: its code is taken from the text and run.
"""

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


class Numpy(Block):
    def forward(self, x):
        return super().forward(x) * float(self.gate(x).detach().numpy().mean() > 0)


class Recursions(nn.Module):
    """One FFN for the rows that stay, until none does."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.routers = nn.ModuleList(nn.Linear(16, 1) for _ in range(2))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        active, out = torch.arange(len(rows)), rows.clone()
        for router in self.routers:
            if active.numel() == 0:
                break
            score = router(out[active])[:, 0].sigmoid()
            keep = score > 0.5
            active = active[keep]
            out = out.index_add(0, active, self.ff(out[active]) * score[keep][:, None])
        return out.view(x.shape)


class EarlyExit(nn.Module):
    """Dense layers, and a mean that ends them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
            if x.detach().mean() > 9:
                break
        return x


def code_of(text):
    """The two ways that a note or an error names, as code in ``model``, ``inputs``, ``file`` and ``folder``."""
    whole, alone = re.search(
        r"What can be saved: the whole model with its code, (torch\.save\(.*?, file\)), which torch\.load.*?: "
        r"(moeopt\.optimize\(model\.get_submodule\(.*?\), its inputs, backend=\.\.\.\)\.save\(folder\))",
        text,
    ).groups()
    return whole, alone.replace("its inputs", "x").replace("...", "backend")


@pytest.mark.parametrize("kind", [Branching, Numpy, Recursions, EarlyExit])
@torch.no_grad()
def test_the_rest_can_be_saved_as_note_and_error_say(tmp_path, kind):
    first = build(kind) if issubclass(kind, Block) else kind().eval()
    model = nn.Sequential(first, build()).eval()
    fast = moeopt.optimize(model, X, verify="off")
    (note,) = [n for n in fast.report.notes if "torch.save" in n]
    assert note.startswith("0: left with Python that depends on the values of tensors")
    with pytest.raises(NotSaveableError) as refused:
        fast.save(tmp_path / "whole")
    whole, alone = code_of(note)
    assert code_of(str(refused.value)) == (whole, alone.replace("'1'", "name"))  # the error knows no report
    given = {"moeopt": moeopt, "torch": torch, "model": model, "inputs": X, "file": tmp_path / "model.pt"}
    exec(whole, given)
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    close(again(X), model(X))
    assert again[1].forward.calls == 1  # the rewritten code ran
    x = model[0](X)
    exec(alone, given | {"x": x, "backend": "torch", "folder": tmp_path / "part"})
    close(moeopt.load(tmp_path / "part")(x), model[1](x))


@torch.no_grad()
def test_an_engine_that_is_refused_says_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(build(Numpy), build()).eval()
    with pytest.raises(NotSaveableError, match=r"The MoE block 0 was declined, .*\. Rewritten: 1$") as refused:
        moeopt.optimize(model, X, backend="onnxruntime", verify="off")
    _, alone = code_of(str(refused.value))
    x = model[0](X)
    given = {"moeopt": moeopt, "model": model, "name": "1", "x": x, "backend": "onnxruntime", "folder": tmp_path / "a"}
    exec(alone, given)
    close(moeopt.load(tmp_path / "a")(x), model[1](x))
    with pytest.raises(NotSaveableError, match=r"\. Rewritten: 1$"):  # no MoE block is declined
        moeopt.optimize(nn.Sequential(EarlyExit(), build()).eval(), X, backend="onnxruntime", verify="off")


def test_no_such_note_where_every_block_is_rewritten():
    assert not any("torch.save" in note for note in moeopt.explain(build(), X, verify="fast").notes)
