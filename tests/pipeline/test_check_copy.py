"""A model whose copy computes something else is refused, whatever was found in it; the original is as it was."""

import pytest
import torch
from torch import nn

import moeopt
from tests.toy_moe import X, build


class Step:
    """What the layers of one call share."""

    scale = 1.0


class Shared(Step):
    def __deepcopy__(self, memo):
        return self


def model(step, inner):
    """Layers that read ``step`` by an attribute; the model's forward changes it by its closure."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.step = inner(), step

        def forward(self, x):
            return self.inner(x) * self.step.scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for number, layer in enumerate(self.layers):
                step.scale = 2.0 + number
                x = layer(x)
            step.scale = 1.0
            return x

    return Model().eval()


@pytest.mark.parametrize("inner", [build, lambda: nn.Linear(X.shape[-1], X.shape[-1])], ids=["experts", "dense"])
def test_state_that_is_reached_in_two_ways(inner):
    torch.manual_seed(0)
    refused = model(Step(), inner)
    want = refused(X)
    words = (
        "a copy of Model, with nothing rewritten, computes something else than Model: .*reach that object by one way"
    )
    for ask in (moeopt.optimize, moeopt.explain):
        with pytest.raises(moeopt.UsageError, match=words):
            ask(refused, X, verify="fast")
    assert torch.equal(refused(X), want)


def test_an_object_that_copies_share_is_one_object():
    torch.manual_seed(0)
    source = model(Shared(), build)
    made = moeopt.optimize(source, X, verify="fast")
    assert len(made.report.rewritten) == 2
    torch.testing.assert_close(made(X), source(X), rtol=1e-4, atol=1e-5)


def test_a_model_of_random_results_is_not_judged():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) + torch.randn(x.shape, generator=RANDOM)

    made = moeopt.optimize(Noisy(), torch.randn(2, 4), verify="fast")
    assert not made.report.rewritten and made.certificate.passed


RANDOM = torch.Generator().manual_seed(0)
