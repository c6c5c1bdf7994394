"""A token whose sum cancels is judged by its conditioning, which is measured; damage to it is still seen."""

import pytest
import torch

from moeopt.verification.block import verify_block
from moeopt.verification.oracle import record_selections, run_oracle
from moeopt.verification.rerounding import rerounded_distances
from moeopt.verification.results import Case
from tests.verification.tiny import E, H, TinyMoE, Twin, seeded

LUCKY = 3
SMALL = {torch.float32: 1024, torch.float16: 512, torch.bfloat16: 256}
"""How many times what is left is smaller than what cancels; still more than eps of the other tokens."""
DTYPES = tuple(SMALL)


class Cancels(torch.nn.Module):
    """y = (x A + x B) + x C, where x B is exactly -x A for the lucky token, and x C is small."""

    def __init__(self, dtype, order="as written", scale=1.0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a = torch.randn(H, H, generator=g).to(dtype) / 4
        self.b = -self.a
        self.b[0] += torch.randn(H, generator=g).to(dtype) / 8  # only rows that hold a feature 0 see it
        self.c = torch.randn(H, H, generator=g).to(dtype) / SMALL[dtype]
        self.order, self.scale = order, scale

    def forward(self, x):
        a, b, c = x @ self.a, x @ self.b, x @ self.c
        if self.scale != 1:
            c = torch.where(torch.arange(len(x))[:, None] == LUCKY, c * self.scale, c)
        return (a + b) + c if self.order == "as written" else (a + c) + b


def call(dtype):
    x = seeded(16, H, dtype=dtype)
    x[:, 0] += 4
    x[LUCKY, 0] = 0
    return [Case("a", (x,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lucky_token_may_lose_its_luck(dtype):
    original, other = Cancels(dtype), Cancels(dtype, "another order")
    result = verify_block("f", original, other, call(dtype))
    assert result.passed, result.reason
    assert result.cases[0].rerounded == 1 and "1 tokens of the output cancel" in result.cases[0].notes[0]
    assert result.required <= 4
    assert verify_block("f", other, original, call(dtype)).passed
    assert verify_block("f", original, original, call(dtype)).cases[0].rerounded == 0  # not measured where not needed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_damage_to_a_lucky_token_is_seen(dtype):
    result = verify_block("f", Cancels(dtype), Cancels(dtype, "another order", scale=1.05), call(dtype))
    assert result.passed is False
    assert ("would be needed, 4 is allowed" if dtype is torch.float32 else "run in float64") in result.reason


def test_lower_precision_on_a_lucky_token_is_seen():
    original = Cancels(torch.float32)

    def low(x):
        a, b, c = (x.half() @ w.half() for w in (original.a, original.b, original.c))
        return torch.where(torch.arange(len(x))[:, None] == LUCKY, ((a + c) + b).float(), original(x))

    assert "would be needed" in verify_block("f", original, low, call(torch.float32)).reason


def test_luck_needs_the_float64_run():
    def opaque(x):  # looks at its dtype, and stops
        if (x * 1).dtype == torch.float64:
            raise ValueError("no doubles")
        return Cancels(torch.float32, "another order")(x)

    reason = verify_block("f", Cancels(torch.float32), opaque, call(torch.float32)).reason
    assert "would be needed, 4 is allowed" in reason and "it was not run in float64" in reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_loosened_where_tokens_are_well_conditioned(dtype):
    moe, x = TinyMoE().to(dtype), seeded(64, H, dtype=dtype)
    y, chosen = record_selections(moe, (x,), {})
    eps = torch.finfo(dtype).eps
    (measured,) = rerounded_distances(moe, (x,), {}, chosen, [run_oracle(moe, (x,), {}, chosen)], [eps])
    assert 0.5 * eps < measured.median() < 3 * eps
    assert measured.max() < 8 * eps  # below the allowance: never used


def test_a_router_in_float32_is_not_rounded_in_bfloat16():
    w = seeded(H, E, seed=1)

    def router(x):
        return (x.float() @ w).softmax(-1)

    x = 64 * seeded(8, H, dtype=torch.bfloat16)
    (measured,) = rerounded_distances(
        router, (x,), {}, record_selections(router, (x,), {})[1], [run_oracle(router, (x,), {}, chosen_none())], [2**-7]
    )
    assert measured.max() < 2**-7 / 8


def chosen_none():
    return record_selections(lambda x: x, (torch.ones(1),), {})[1]


def test_the_original_is_run_without_a_trace():
    moe, x = TinyMoE(), seeded(8, H)
    before, rng = moe.up_EIH.clone(), torch.get_rng_state()
    y, chosen = record_selections(moe, (x,), {})
    first, second = (
        rerounded_distances(moe, (x,), {}, chosen, [run_oracle(moe, (x,), {}, chosen)], [2**-23])[0] for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(moe.up_EIH, before) and torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, seeded(8, H)) and verify_block("moe", moe, Twin(moe), [Case("a", (x,))]).passed
