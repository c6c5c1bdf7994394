"""One block from a call to a verified program, and each way that can end."""

import pytest
import torch
from torch import nn

from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.options import Options
from moeopt.pipeline import size_limits
from moeopt.pipeline.block import rewrite_block
from moeopt.pipeline.coverage import Mixture
from moeopt.rewrite.install import install
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, ffn, seeded
from tests.toy_moe import Block, build

OFF, FAST = Options(verify="off"), Options(verify="fast")


def rewritten(make, *args, options=OFF, **kwargs):
    return rewrite_block("block", seeded(make), (args or (rand(6, H),), kwargs), options)


def test_a_block_is_rewritten_and_verified_without_being_changed():
    module = seeded(MoE)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    rewrite = rewrite_block("block", module, ((rand(6, H),), {}), FAST)
    assert rewrite.check.passed is True and len(rewrite.found) == 1 and rewrite.seconds > 0
    assert "forward" not in module.__dict__ and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert rewrite.program.guard.training is None and rewrite.program.guard.shapes == [(None, H)]


def test_running_statistics_are_as_they_were_in_training_mode_too():
    class Normed(MoE):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(H)

        def forward(self, x):
            return super().forward(self.norm(x))

    module = seeded(Normed).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert rewrite_block("block", module, ((rand(6, H),), {}), Options()).check.passed is True
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_unverified_is_said_so():
    assert rewritten(MoE).check.passed is None


def test_a_router_that_never_likes_some_experts_is_steered_to_all():
    class Lopsided(MoE):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.router.bias.copy_(torch.tensor([60.0, 50.0, 0.0, 0.0]))

    assert len(rewritten(Lopsided).found[0].experts) == 4


class Dropout(MoE):
    def __init__(self):
        super().__init__(lambda: nn.Sequential(*ffn(), nn.Dropout(0.5)))


class OtherInTraining(MoE):
    def route(self, x):
        w, ids = super().route(x)
        return (w * 2, ids) if self.training else (w, ids)


def test_the_mode_is_part_of_the_program_only_where_it_matters():
    assert rewritten(OtherInTraining).program.guard.training is False
    assert rewritten(Dropout).program.guard.training is False


class TwoArguments(MoE):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Counter(MoE):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Changing(MoE):
    """With more tokens there is one step more outside the experts."""

    def forward(self, x):
        y = super().forward(x)
        return y.relu() if len(x) > 15 else y


class Item(MoE):
    def forward(self, x):
        return super().forward(x) * int(x.abs().sum().item())


class Broken(MoE):
    def forward(self, x):
        if len(x) != 6:
            raise ValueError("six tokens only")
        return super().forward(x)


class Noise(MoE):
    def route(self, x):
        w, ids = super().route(x)
        return w + torch.rand_like(w), ids


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            Counter,
            "its forward changes the Python attribute calls, which a graph cannot repeat; store a tensor or return the",
        ),
        (Changing, "what its forward computes outside the experts changes with the data or with the number of tokens "),
        (Item, "its forward turns a value computed from the input into a Python number (sum"),
        (
            Broken,
            "Broken raised ValueError: six tokens only, on inputs that moeopt made like the example's (other sizes ",
        ),
        (Noise, "its forward is random at inference (rand_like at "),
        (lambda: ffn(), ""),
    ],
)
def test_each_end_has_its_reason(make, text):
    with pytest.raises(Declined) as caught:
        rewritten(make)
    assert caught.value.reason.startswith(text), caught.value.reason


def test_training_with_dropout_says_what_to_call():
    module = seeded(Dropout).train()
    with pytest.raises(
        Declined, match=r"its forward is random in training mode .*: call model.eval\(\) before optimising"
    ):
        rewrite_block("block", module, ((rand(6, H),), {}), OFF)


def test_a_call_without_tokens():
    with pytest.raises(Declined, match="it is called without a tensor of tokens, so it cannot be probed"):
        rewrite_block("block", seeded(MoE), ((3,), {}), OFF)


def test_keywords_in_another_order_than_the_signature():
    class Two(MoE):
        def forward(self, x, scale):
            return super().forward(x) * scale

    with pytest.raises(
        Declined, match="its tensor arguments are passed in another order than its signature names them"
    ):
        rewrite_block("block", seeded(Two), ((), {"scale": rand(6, 1), "x": rand(6, H)}), OFF)
    assert rewrite_block("block", seeded(Two), ((), {"x": rand(6, H), "scale": rand(6, 1)}), OFF).found


def test_a_wrong_reading_is_verified_and_reverted():
    """A hint names another activation: the rewrite is built, found wrong, and declined."""
    hint = Mixture(assume=ExpertsSpec(rows="plain", activation="tanh"))
    with pytest.raises(Declined) as caught:
        rewrite_block("block", seeded(MoE), ((rand(6, H),), {}), FAST, reader=hint)
    assert caught.value.reason.startswith("it was rewritten, verified and reverted: ")


def test_a_failure_of_our_own_is_a_decline_that_asks_for_a_report(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("inside")

    monkeypatch.setattr("moeopt.pipeline.coverage.recognize", fail)
    with pytest.raises(Declined) as caught:
        rewritten(MoE)
    assert caught.value.reason.startswith(
        "moeopt itself failed on it (RuntimeError: inside in fail); the block is left as it"
    )


class ManyTokens(MoE):
    def forward(self, x):
        return super().forward(x / max(1.0, len(x) / 200))


class Capacity(MoE):
    """No expert takes more than its share of the tokens, which is at least 64."""

    def route(self, x):
        w, ids = super().route(x)
        hot = nn.functional.one_hot(ids, 4)
        place = ((hot.view(-1, 4).cumsum(0) - 1).view_as(hot) * hot).sum(-1)
        return w * (place < max(64, len(x) // 4)), ids


@pytest.mark.parametrize("make", [ManyTokens, Capacity])
def test_a_threshold_above_the_small_cases_is_met(make):
    with pytest.raises(Declined, match="it was rewritten, verified and reverted: case 'many tokens': "):
        rewrite_block("moe", seeded(make), ((rand(24, H, seed=7),), {}), Options())


def test_a_large_block_is_not_asked_for_many_tokens(monkeypatch):
    monkeypatch.setattr(size_limits, "MOST_FLOPS", 1e5)
    names = [c.name for c in rewrite_block("moe", seeded(MoE), ((rand(24, H, seed=7),), {}), Options()).check.cases]
    assert "every expert" in names and "many tokens" not in names


class HalfExperts(Block):
    """Experts in float16 behind rows of float32."""

    def __init__(self):
        super().__init__()
        self.experts.half()

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token].half()).float() * w[token, slot, None])
        return y


def test_experts_of_a_narrower_range_than_the_rows_are_given_rows_that_they_hold():
    module = build(HalfExperts)
    rewrite = rewrite_block("block", module, ((rand(2, 6, 16),), {}), Options())
    assert rewrite.check.passed and {c.status for c in rewrite.check.cases if c.name == "extreme magnitudes"} == {
        "passed"
    }
    forward = install(module, rewrite.program)
    with torch.no_grad():
        for scale in (1.0, 1e3):  # where the model overflows, the rewritten code does
            x = scale * rand(3, 9, 16)
            assert torch.equal(forward(x).isfinite(), build(HalfExperts)(x).isfinite())
