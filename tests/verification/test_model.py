"""End to end: rounding passes, damage does not, and a language model gets its own words."""

import copy
import math
from collections import deque
from decimal import Decimal
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from moeopt.verification.language import find_ids, find_logits, greedy_agreement, language_metrics
from moeopt.verification.model import OriginalRuns, compare_outputs, end_to_end
from tests.verification.tiny import TinyMoE, Twin, seeded

V, H = 20, 16
IDS = torch.arange(14).view(2, 7) % V


class TinyLM(nn.Module):
    """(B, S) ids -> {"logits": (B, S, V)}; one MoE layer, greedy ``generate``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.moe, self.head = nn.Embedding(V, H), TinyMoE(), nn.Linear(H, V)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return {"logits": self.head(x + self.moe(x)), "steps": 1}

    def generate(self, ids, max_new_tokens, do_sample):
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids)["logits"][:, -1:].argmax(-1)], -1)
        return ids


def pair(damage="", dtype=torch.float32):
    model = TinyLM().to(dtype)
    other = copy.deepcopy(model)
    other.moe = Twin(other.moe, damage)
    return model, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_equal_model_passes(dtype):
    result = end_to_end(*pair("reordered sum", dtype), (), {"input_ids": IDS}, noise_blocks=["moe"])
    assert result.passed, result.reason
    assert result.tokens == 14 and 0 < result.distance <= result.budget and result.distance_rms <= result.budget_rms
    assert result.language["top-1 agreement"] > 0.9
    assert set(result.language) == {
        "KL divergence, mean",
        "KL divergence, 99.9th percentile",
        "KL divergence, max",
        "top-1 agreement",
        "perplexity ratio",
        "greedy tokens equal",
    }


@pytest.mark.parametrize("damage", ["swap two experts", "swap gate and up", "off by one", "drop renormalise"])
def test_a_damaged_model_fails(damage):
    result = end_to_end(*pair(damage), (IDS,), noise_blocks=["moe"])
    assert result.passed is False and "the original's rounding explains" in result.reason
    assert result.language["KL divergence, max"] > 1e-6


def test_the_budget_follows_the_noise():
    quiet = end_to_end(*pair(), (IDS,))
    noisy = end_to_end(*pair(), (IDS,), noise_blocks=["moe"])
    assert quiet.budget == 8 * torch.finfo(torch.float32).eps < noisy.budget < 1e-5
    assert noisy.budget == end_to_end(*pair(), (IDS,), noise_blocks=["moe"]).budget


def test_hooks_are_gone():
    model, other = pair()
    end_to_end(model, other, (IDS,), noise_blocks=["moe"])
    assert not model.moe._forward_hooks


def test_what_raises_or_returns_another_form():
    model, _ = pair()

    def broken(input_ids):
        raise RuntimeError("engine lost")

    assert "the optimised model raises RuntimeError: engine lost" in end_to_end(model, broken, (IDS,)).reason
    assert "another structure" in end_to_end(model, lambda i: model(i)["logits"], (IDS,)).reason
    assert "is 2 instead of 1" in end_to_end(model, lambda i: {**model(i), "steps": 2}, (IDS,)).reason


def test_leaves():
    x = seeded(3, 4)
    assert "differs in 1 elements" in compare_outputs(torch.tensor([1, 2]), torch.tensor([1, 3]), []).reason
    assert "instead of torch.float32 (3, 4)" in compare_outputs(x, x.half(), []).reason
    bad = x.clone()
    bad[1, 2] = math.nan
    assert "not finite at token 1" in compare_outputs(x, bad, []).reason
    assert compare_outputs(bad, x, []).passed and compare_outputs(0.5, 0.5, []).passed
    assert not compare_outputs(0.5, 0.6, []).passed
    assert not compare_outputs(0.5, torch.tensor(0.5), []).passed


@pytest.mark.parametrize("form", [torch.Tensor.numpy, lambda x: torch.complex(x, -x), lambda x: x.numpy()[::-1]])
def test_numbers_of_another_form_are_compared_as_numbers(form):
    x = seeded(3, 4)
    near, far = x * (1 + 2**-22), x + torch.tensor([[0.0], [1e-3], [0.0]])
    found = compare_outputs([form(x)], [form(near)], [])
    assert found.passed and found.tokens == 3 and found.distance > 0
    assert "at its worst token" in compare_outputs([form(x)], [form(far)], []).reason
    assert not compare_outputs(np.array(["a", "b"]), np.array(["a", "c"]), []).passed


def test_what_cannot_be_compared_is_told():
    (note,) = compare_outputs([seeded(2), iter([1])], [seeded(2), iter([2])], []).notes
    assert "can be read only once (list_iterator)" in note and "return a list or a tuple to have them compared" in note
    (note,) = compare_outputs((None, "text"), (None, "text"), []).notes
    assert note == "the model returns no numbers, so its blocks were compared, and nothing end to end"
    assert compare_outputs((), (), []).notes == [note]
    assert compare_outputs((None, 3), (None, 3), []).notes == []


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


class Listed(list):
    pass


class Named(dict):
    pass


CONTAINERS = {
    "values": lambda t: {"a": t}.values(), "items": lambda t: {"a": t}.items(), "slots": Slotted,
    "list": lambda t: Listed([t]), "dict": lambda t: Named(a=t), "proxy": lambda t: MappingProxyType({"a": t}),
    "deque": lambda t: deque([t]), "slice": lambda t: slice(t, None), "decimal": lambda t: Decimal(float(t.sum())),
    "bytes": lambda t: bytearray(t.numpy().tobytes()), "objects": lambda t: np.array([t, None], dtype=object),
    "sparse": lambda t: t.diag().to_sparse(), "rows": lambda t: t.diag().to_sparse_csr(),
}  # fmt: skip
CLOSED = {"set": lambda t: {t}, "function": lambda t: lambda: t, "Linear": lambda t: torch.nn.Linear(2, 2)}


@pytest.mark.parametrize("form", CONTAINERS)
def test_what_an_object_holds_is_compared(form):
    hold = CONTAINERS[form]
    one, other = seeded(3, seed=1), seeded(3, seed=2)
    assert compare_outputs([hold(one), 3], [hold(one.clone()), 3], []).passed
    assert not compare_outputs([hold(one), 3], [hold(other), 3], []).passed


@pytest.mark.parametrize("form", CLOSED)
def test_an_object_that_cannot_be_opened_is_told(form):
    hold = CLOSED[form]
    found = compare_outputs([seeded(3), hold(seeded(2, seed=1))], [seeded(3), hold(seeded(2, seed=2))], [])
    assert found.passed and found.notes == [
        f"the result holds objects ({form}) of which only the types were compared: return tensors and numbers, in "
        "lists, tuples or dicts, to have them compared"
    ]


def test_generate_that_fails_is_noted():
    model, other = pair()
    other.generate = lambda *a, **k: 1 / 0
    assert "generate was not compared: ZeroDivisionError" in end_to_end(model, other, (IDS,)).notes[0]


def test_language_metrics_by_hand():
    old = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    new = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    metrics = language_metrics(old, new, torch.tensor([[0, 1]]))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert metrics["KL divergence, mean"] == pytest.approx(first / 2, abs=1e-7)
    assert metrics["KL divergence, max"] == pytest.approx(first, abs=1e-7)
    assert metrics["top-1 agreement"] == 0.5
    assert metrics["perplexity ratio"] == pytest.approx(0.5 / 0.75)


def test_masked_logits_have_a_divergence():
    old = torch.tensor([[[0.0, -math.inf]]])
    assert language_metrics(old, old, torch.tensor([[0]]))["KL divergence, max"] == 0


def test_finding_ids_and_logits():
    logits = seeded(2, 7, V)
    assert find_ids((seeded(2, 3),), {"mask": IDS.bool(), "input_ids": IDS}) is IDS
    assert find_ids((seeded(2, 3),), {}) is None
    assert find_logits((seeded(2, 7), logits), IDS) is logits
    assert find_logits({"logits": logits}, IDS) is logits
    assert find_logits(seeded(2, 7, 3), IDS) is None  # fewer columns than the largest id


def test_greedy_agreement_stops_at_the_first_difference():
    class Says:
        def __init__(self, *tokens):
            self.tokens = torch.tensor([tokens])

        def generate(self, ids, max_new_tokens, do_sample):
            return torch.cat([ids, self.tokens], -1)

    assert greedy_agreement(Says(1, 2, 3, 4), Says(1, 2, 9, 4), IDS[:1], 4) == 0.5


def test_blocks_inside_vmap_are_not_shaken():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return torch.func.vmap(self.inner)(x)

    model = Mapped()
    result = end_to_end(model, copy.deepcopy(model), (torch.ones(3, 4),), noise_blocks=["inner"])
    assert result.passed and result.tokens == 3


class Value(nn.Module):
    """(B, 256) -> (B, 1): one output, whose sum cancels on the rows of ``nearly_orthogonal``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(256, 1, bias=False)

    def forward(self, x):
        return self.head(x)

    def nearly_orthogonal(self):
        x, w = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).double(), self.head.weight.double()
        return (x - (x @ w.t()) * w / w.square().sum() + 1e-3 * w).float()


def test_a_sum_that_cancels_is_judged_by_the_rounding_of_its_terms():
    model = Value()
    x, w = model.nearly_orthogonal(), model.head.weight[0].detach()

    def in_another_order(x):
        total = torch.zeros(len(x))
        for n in reversed(range(256)):
            total = total + x[:, n] * w[n]
        return total[:, None]

    result = end_to_end(model, in_another_order, (x,), noise_blocks=["head"])
    eps = torch.finfo(torch.float32).eps
    assert result.passed, result.reason
    assert result.distance > 30 * eps  # beyond what the rounding of the result alone explains
    assert any("the sum of a product cancels" in note for note in result.notes)
    damaged = end_to_end(model, lambda x: in_another_order(x) * 1.01, (x,), noise_blocks=["head"])
    assert not damaged.passed and "moves by" in damaged.reason and not damaged.notes


def test_runs_that_are_known_are_not_made_again_and_allow_no_more_afterwards():
    model = Value()
    x = model.nearly_orthogonal()
    runs, calls = OriginalRuns.of(model, (x,), {}, ["head"], 0), []
    noisy = runs.noisy
    model.register_forward_pre_hook(lambda *given: calls.append(given))
    assert end_to_end(model, lambda x: runs.want.clone(), (x,), noise_blocks=["head"], known=runs).passed and not calls
    far = end_to_end(model, lambda x: runs.want * (1 + 3e-5), (x,), noise_blocks=["head"], known=runs)
    assert calls and runs.noisy is noisy  # the terms of the product were shaken, for that comparison alone
    assert far.passed == end_to_end(model, lambda x: runs.want * (1 + 3e-5), (x,), noise_blocks=["head"]).passed


def test_a_sum_that_does_not_cancel_gets_no_more_than_before():
    model = Value()
    x = torch.ones(8, 256) * model.head.weight.sign()
    eps = torch.finfo(torch.float32).eps
    result = end_to_end(model, lambda x: model(x) * (1 + 60 * eps), (x,), noise_blocks=["head"])
    assert not result.passed and "moves by" in result.reason


class HalfGate(nn.Module):
    """(T, 16) -> (T, 16): weighted by a gate that is rounded to bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.out = nn.Linear(16, 1), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(x) * self.gate(x).sigmoid().to(torch.bfloat16)


def test_a_cast_to_a_narrower_dtype_is_judged_by_its_own_rounding():
    model, x = HalfGate(), torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    result = end_to_end(model, lambda x: model.out(x) * model.gate(x).sigmoid(), (x,), noise_blocks=["gate", "out"])
    assert result.passed, result.reason
    assert 1e-4 < result.distance < torch.finfo(torch.bfloat16).eps
    assert any("a cast rounds to a narrower dtype" in note for note in result.notes)
    damaged = end_to_end(model, lambda x: model(x) * 1.1, (x,), noise_blocks=["gate", "out"])
    assert not damaged.passed and "moves by" in damaged.reason
