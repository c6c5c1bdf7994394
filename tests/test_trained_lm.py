"""Language models with trained weights: perplexity, next tokens and greedy text, before and after."""

import pytest
import torch

import moeopt
from moeopt.pipeline import dense as drive_dense
from tests.helpers import count_expert_calls
from tests.trained_lm import KINDS, decode, encode, load, perplexity, text

pytest.importorskip("transformers", reason="the trained models are transformers' classes")
PROMPT = "Return the "


def optimised(kind, **options):
    model = load(kind)
    how = {"dense": "split", "experts": 4} if kind == "dense" else {}
    return model, moeopt.optimize(model, {"input_ids": text(4)}, verify="fast", **how, **options)


def greedy(model):
    return model.generate(encode(PROMPT)[None], max_new_tokens=24, do_sample=False)


def check_figures(certificate):
    figures = certificate.end_to_end.language
    assert certificate.passed is True and figures["top-1 agreement"] == 1 and figures["greedy tokens equal"] == 1
    # rounding moves a logit by 1e-6 of its size at most (the certificate's budget), and KL is quadratic in that
    assert figures["KL divergence, max"] < 1e-9 and abs(figures["perplexity ratio"] - 1) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_fixtures_are_trained(kind):
    model = load(kind)
    assert perplexity(model) < 6  # a uniform guess is 128; random weights give more than that
    assert decode(greedy(model)[0]).startswith(PROMPT)


def test_the_routing_is_real():
    """Every expert of both layers is chosen on unseen text, some of them far more often than others."""
    chosen, model = [], load("moe")
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda block, args: chosen.append(block.gate(args[0].flatten(0, 1))))
    with torch.no_grad():
        model(text())
    for logits, _, ids in chosen:
        counts = ids.flatten().bincount(minlength=8)
        # by chance each expert gets 384 of the 3072 choices, give or take 19
        assert ids.shape == (text().numel(), 2) and counts.min() > 0 and counts.max() > 3 * counts.min()
        assert logits.max(-1).values.mean() > 0.3  # probabilities: 1/8 where a router does not choose


@pytest.mark.parametrize("kind", KINDS)
def test_torch(kind):
    model, opt = optimised(kind)
    assert [b.status for b in opt.report.blocks] == ["rewritten"] * 2, str(opt.report)
    check_figures(opt.certificate)
    with count_expert_calls() as calls:
        assert abs(perplexity(opt) / perplexity(model) - 1) < 1e-6
    assert len(calls) == 2
    assert torch.equal(greedy(opt), greedy(model))


def test_torch_with_fused_ffns(monkeypatch):
    monkeypatch.setattr(drive_dense, "pays", lambda timings: True)  # whatever the clock says
    model = load("dense")
    opt = moeopt.optimize(model, {"input_ids": text(4)}, verify="fast", dense="fuse", tokens=(1,))
    assert [(b.status, b.experts) for b in opt.report.blocks] == [("rewritten", 1)] * 2
    check_figures(opt.certificate)
    assert abs(perplexity(opt) / perplexity(model) - 1) < 1e-6 and torch.equal(greedy(opt), greedy(model))


def test_onnx_runtime_with_experts():
    pytest.importorskip("onnxruntime")
    model, opt = optimised("moe", backend="onnxruntime")
    assert [(b.status, b.top_k) for b in opt.report.blocks] == [("rewritten", 2)] * 2
    assert all(b.router == "softmax, top-2 of 8, renormalised" for b in opt.report.blocks)
    check_figures(opt.certificate)
    assert torch.equal(greedy(opt), greedy(model))
