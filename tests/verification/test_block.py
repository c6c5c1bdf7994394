"""verify_block passes equal twins in every dtype and catches every damage, with a reason that says so."""

import copy

import pytest
import torch
from torch import nn

from moeopt.capture.call_roles import ArgRole, CallSpec
from moeopt.verification.block import verify_block
from moeopt.verification.cases import adversarial_cases
from moeopt.verification.judge import typical
from moeopt.verification.results import Case
from tests.verification.tiny import DAMAGES, E, H, K, TinyMoE, Twin, seeded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases_for(dtype, level="strict"):
    call_spec = CallSpec((seeded(2, 5, H, dtype=dtype),), {}, (ArgRole("tokens", 2),))
    return adversarial_cases(call_spec, E, level=level)


def check(damage="", dtype=torch.float32, level="strict"):
    moe = TinyMoE().to(dtype)
    return verify_block("moe", moe, Twin(moe, damage), cases_for(dtype), level)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("twin", ["", "reordered sum"])
def test_equal_twin_passes(twin, dtype):
    result = check(twin, dtype)
    assert result.passed, result.reason
    assert [case.status for case in result.cases] == ["passed"] * 9
    assert result.flips == 0 and result.required <= 4
    assert result.ids_compared == K * sum(case.args[0].numel() // H for case in cases_for(dtype))
    assert result.experts_seen == E
    assert 0 < result.distance_original < 8 * torch.finfo(dtype).eps
    assert result.distance_exact < 1e-12  # two float64 runs of one function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_caught(damage, dtype):
    result = check(damage, dtype)
    assert result.passed is False
    assert result.reason.startswith("case '")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("swap gate and up", "would be needed, 4 is allowed"),
        ("worst experts", "routing differs: token"),
        ("nan leak", "NaN or Inf leaked"),
    ],
)
def test_reasons(damage, reason):
    assert reason in check(damage).reason


def test_damage_that_bfloat16_rounding_hides_is_seen_in_float64():
    result = check("forget bias", torch.bfloat16)
    assert "run in float64" in result.reason and "rounding hides it" in result.reason


def test_fast_stops_at_the_first_failure_and_off_runs_nothing():
    assert len(check("off by one", level="fast").cases) == 1
    off = check(level="off")
    assert off.passed is None and not off.cases and "verify='off'" in off.reason


def test_the_original_is_left_as_it_was():
    moe = TinyMoE()
    before, cases = copy.deepcopy(moe.state_dict()), cases_for(torch.float32)
    inputs, rng = [case.args[0].clone() for case in cases], torch.get_rng_state()
    verify_block("moe", moe, Twin(moe), cases)
    assert all(torch.equal(before[name], value) for name, value in moe.state_dict().items())
    assert all(torch.equal(a, case.args[0]) or a.isnan().any() for a, case in zip(inputs, cases, strict=True))
    assert torch.equal(rng, torch.get_rng_state())


class Fixed(nn.Module):
    def forward(self, x):
        return x.view(-1, 4, 3) * 2


def test_a_case_the_original_refuses_is_skipped_with_its_reason():
    result = verify_block("fixed", Fixed(), Fixed(), [Case("ok", (seeded(8, 3),)), Case("odd", (seeded(5, 3),))])
    assert result.passed and result.cases[1].status == "skipped"
    assert "the original raises RuntimeError: shape" in result.cases[1].reason


def test_nothing_judged_is_not_passed():
    result = verify_block("fixed", Fixed(), Fixed(), [Case("odd", (seeded(5, 3),))])
    assert result.passed is False and "no case could be judged: the original raises" in result.reason
    assert verify_block("fixed", Fixed(), Fixed(), []).reason == "no case was given"


def outcome(original, rewritten, *args):
    return verify_block("f", original, rewritten, [Case("a", args)]).reason


def test_form_must_be_equal():
    x = seeded(3, 4)
    assert "returns tuple(float32(3, 4), float32(3, 4)), the original returns float32(3, 4)" in outcome(
        lambda x: x * 2, lambda x: (x * 2, x), x
    )
    assert "returns bfloat16(3, 4) where" in outcome(lambda x: x * 2, lambda x: (x * 2).bfloat16(), x)
    assert "integers must be equal" in outcome(lambda x: (x, (x > 0).long()), lambda x: (x, (x >= 9).long()), x)
    assert "is 'b' instead of 'a'" in outcome(lambda x: (x, "a"), lambda x: (x, "b"), x)
    assert "the rewritten block raises ValueError: no" in outcome(lambda x: x, raises, x)


def raises(x):
    raise ValueError("no")


def test_argument_writes_must_be_equal():
    x = seeded(3, 4)
    assert outcome(lambda x: x.mul_(2), lambda x: x * 2, x) == (
        "case 'a': the original writes argument 0 in place, the rewritten block does not"
    )
    assert outcome(lambda x: x.mul_(2), lambda x: x.mul_(2), x) == ""


class Counter(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))

    def forward(self, x):
        if self.step:
            self.count += self.step
        return x * 2


def test_buffer_updates_must_be_equal():
    x = seeded(3, 4)
    assert "updates its own 'count'" in outcome(Counter(1), Counter(0), x)
    assert "leaves 'count' with another value" in outcome(Counter(1), Counter(2), x)
    assert outcome(Counter(1), Counter(1), x) == ""


def test_an_unfit_judge_is_not_believed():
    def branches(x):  # computes something else in float64
        y = x * 2
        return y if y.dtype == torch.float32 else -y

    assert "does not compute what the original does" in outcome(branches, branches, seeded(3, 4))


def test_dense_nan_that_the_rewrite_heals_is_noted():
    def dense(x):  # 0 * inf
        return torch.stack([x, x.exp()]).mul(torch.tensor([1.0, 0.0])[:, None, None]).sum(0)

    x = seeded(3, 4)
    x[1] = 1000
    result = verify_block("f", dense, lambda x: x * 1, [Case("a", (x,))])
    assert result.passed, result.reason
    assert result.cases[0].notes == ["1 tokens are NaN in the original and finite in the rewritten block"]
    assert result.cases[0].tokens == 2


def test_an_infinity_may_not_become_just_any_number():
    def overflow(x):
        return (x * 60000) * 2 / 4

    x = torch.ones(2, 3, dtype=torch.float16)
    x[0] = 0.1
    good = verify_block("f", overflow, lambda x: x * 30000, [Case("a", (x,))])
    assert good.passed and "infinite in the original" in good.cases[0].notes[0]
    wrong = lambda x: torch.where(x == 1, 7, overflow(x))  # noqa: E731
    assert "finite but wrong in the rewritten block" in outcome(overflow, wrong, x)


def test_typical_distance_is_not_set_by_one_cancelling_token():
    d = torch.full((16,), 1e-7, dtype=torch.float64)
    assert typical(d) == pytest.approx(1e-7)
    d[3] = 0.5
    assert typical(d) == pytest.approx(4e-7)
    assert typical(torch.zeros(4, dtype=torch.float64)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tie_is_counted_and_compared_with_the_choice_pinned(dtype):
    """Experts 1 and 3 have equal scores; the rewritten takes 3, the original takes 1."""
    moe = TinyMoE().to(dtype)
    with torch.no_grad():
        moe.router_EH[3] = moe.router_EH[1]

    class FirstOfEquals(TinyMoE):
        def route(self, x_TH):
            p_TE = torch.softmax(x_TH @ self.router_EH.t(), -1, dtype=torch.float32)
            w_TK, ids_TK = torch.topk(p_TE, 1, dim=-1)
            return ids_TK, w_TK.to(x_TH.dtype)

    first = FirstOfEquals().to(dtype)
    first.load_state_dict(moe.state_dict())
    x = seeded(1, 64, H, dtype=dtype)
    result = verify_block("f", first, _Top1(moe), [Case("a", (x,))])
    assert result.passed, result.reason
    assert result.ties > 0 and result.flips == 0


class _Top1(nn.Module):
    """The same top-1 function through gathered weights, but for how it breaks a tie with expert 3."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x_BSH):
        m, x_TH = self.moe, x_BSH.reshape(-1, H)
        p_TE = torch.softmax(x_TH @ m.router_EH.t(), -1, dtype=torch.float32)
        nudge = torch.zeros(E)
        nudge[3] = 1e-9  # below rounding: breaks the tie the other way
        w_T1, ids_T1 = torch.topk(p_TE.double() + nudge, 1, dim=-1)
        ids = ids_T1.flatten()
        h = x_TH.unsqueeze(1)
        a = nn.functional.silu(torch.bmm(h, m.gate_EIH[ids].mT)) * torch.bmm(h, m.up_EIH[ids].mT)
        o = torch.bmm(a, m.down_EHI[ids].mT).squeeze(1) + m.bias_EH[ids]
        return (o * p_TE.gather(1, ids_T1).to(o.dtype)).view_as(x_BSH)


def in_order(x, order):
    """Sums of 64 columns of ``x`` (T, 256), one column after the other."""
    y = x.new_zeros(len(x), 4)
    for column in order:
        y = y + x.view(len(x), 64, 4)[:, column]
    return y


@pytest.mark.parametrize("cancels", [False, True])
def test_float64_runs_differ_by_their_rounding_and_by_nothing_else(cancels):
    x = torch.randn(50, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if cancels:
        x[:, 128:] = -x[:, :128] * (1 + 1e-9)
    cases = [Case("sums", (x,), {})]
    forward, back = (lambda x: in_order(x, range(64))), (lambda x: in_order(x, range(63, -1, -1)))
    result = verify_block("sums", forward, back, cases)
    assert result.passed, result.reason
    assert result.distance_exact > 2 * torch.finfo(torch.float64).eps
    far = verify_block("sums", forward, lambda x: back(x) * (1 + (1e-5 if cancels else 1e-13)), cases)
    assert far.passed is False


class Quiet(nn.Module):
    def __init__(self, writes):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.writes = writes

    def forward(self, x):
        self.seen.add_(self.writes)
        return x * 2


class Silent(Quiet):
    def forward(self, x):
        return x * 2


def test_a_write_of_the_rewritten_alone_is_found_and_one_that_changes_nothing_is_none():
    case = Case("rows", (seeded(4, H),))
    result = verify_block("block", Silent(0), Quiet(1), [case])
    assert result.reason == "case 'rows': the rewritten block updates its own 'seen', the original does not"
    assert verify_block("block", Silent(0), Quiet(0), [case]).passed
    nan = Quiet(0)
    nan.seen.fill_(torch.nan)
    assert verify_block("block", Silent(0), nan, [case]).passed


def image(shape, wrong=0.0):
    """A function of images; ``wrong`` is added to one channel of the first pixel, which is far below the others."""

    def forward(x):
        y = x * 3
        y[:, :, 0, 0] *= 1e-3
        y[0, 0, 0, 0] += wrong
        return y

    return forward, Case("an image", (seeded(*shape),), {})


@pytest.mark.parametrize("features", (8, None))
def test_a_token_of_an_image_is_a_pixel(features):
    """Beside larger pixels of its row an error does not show, and beside its own other channels it does."""
    same, case = image((2, 8, 3, 5))
    broken, _ = image((2, 8, 3, 5), wrong=1e-7)
    assert verify_block("image", same, same, [case], features=features).passed
    result = verify_block("image", same, broken, [case], features=features)
    assert result.passed == (features is None), result.reason


def test_one_channel_of_a_pixel_alone_is_no_token():
    """Of an image of one pixel each number was a token: one that cancels failed a right block."""

    def summed(order):
        return lambda x: torch.stack([x[:, 0] + x[:, 1] - x[:, 1] if order else x[:, 0], *x[:, 1:].unbind(1)], 1)

    x = torch.ones(4, 8, 1, 1)
    x[:, 0], x[:, 1] = 0.1, 3.0
    case = Case("one pixel", (x,), {})
    assert verify_block("image", summed(False), summed(True), [case], features=8).passed
    assert not verify_block("image", summed(False), summed(True), [case]).passed
