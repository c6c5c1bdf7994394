import threading

import pytest
import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.export import Dim

from moeopt.causal_lm import lm
from moeopt.errors import Declined
from moeopt.patches import no_results_kept

KEPT = []
"""Of each call that was traced, whether results are kept."""


class Twice(nn.Module):
    """The same layer twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        KEPT.append(detect_fake_mode(x).cache_enabled)
        for _ in range(2):
            x = torch.softmax(self.layer(x).reshape(x.shape[0], -1, 2).transpose(0, 1), -1).transpose(0, 1).flatten(1)
        return torch.cat([x, x[: x.shape[0] // 2]])


def traced(model):
    KEPT.clear()
    free = ({0: Dim.AUTO},)
    return torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=free).run_decompositions({})


def test_a_trace_is_the_same_without():
    model = Twice().eval()
    want = traced(model)
    assert KEPT and all(KEPT)
    with no_results_kept():
        got = traced(model)
    assert KEPT and not any(KEPT)
    assert got.graph_module.code == want.graph_module.code
    assert str(got.graph) == str(want.graph) and str(got.range_constraints) == str(want.range_constraints)
    for mine, theirs in zip(got.graph.nodes, want.graph.nodes, strict=True):
        assert str(mine.meta.get("val")) == str(theirs.meta.get("val"))


def test_another_thread_keeps_its_results():
    model = Twice().eval()
    with no_results_kept():
        thread = threading.Thread(target=traced, args=(model,))
        thread.start()
        thread.join()
    assert KEPT and all(KEPT)


def test_language_models_are_traced_so(monkeypatch):
    pytest.importorskip("transformers.exporters")
    from tests.families.build import FAMILIES

    def trace(*given):
        raise ValueError(f"kept: {torch._subclasses.FakeTensorMode().cache_enabled}")

    monkeypatch.setattr(lm, "answered", trace)
    with pytest.raises(Declined, match="ValueError: kept: False"):
        lm.export_causal_lm(FAMILIES["mixtral"].build(), (), FAMILIES["mixtral"].inputs(), lambda line: None)
    assert torch._subclasses.FakeTensorMode().cache_enabled
