"""Expert ids inside an engine beside those of the model it was made of."""

import pytest
import torch

import moeopt

pytest.importorskip("onnxruntime")

from moeopt.backends.onnxrt.build import build_onnx, onnx_plan
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.expert_ids import count_ids
from moeopt.options import Options
from tests.backends.onnxrt.toys import E, H, K, Mixture, net

T = 10


@pytest.fixture(scope="module")
def built():
    model = moeopt.optimize(net(), call()[0], verify="off").model
    built = build_onnx(model, *call(), onnx_plan(Options()), lambda line: None)
    return model, built, OnnxEngine(built.directory, built.signature)


def call(batch=2, length=5):
    g = torch.Generator().manual_seed(3)
    return (torch.randn(batch, length, H, generator=g), torch.ones(batch, length)), {}


def test_ids_of_every_block_are_compared(built):
    model, written, engine = built
    assert count_ids(model, engine, "model.onnx", written.sites, call()) == (2 * T * K, 0, "")
    assert count_ids(model, engine, "model.onnx", written.sites, call(7, 1)) == (2 * 7 * K, 0, "")
    assert sorted(p.name for p in written.directory.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_another_router_is_seen_where_it_first_chooses_otherwise(built):
    model, written, engine = built
    gate = model.layers[1].gate.weight
    saved = gate.detach().clone()
    try:
        gate.data = gate.data.flip(0)
        total, differ, first = count_ids(model, engine, "model.onnx", written.sites, call())
    finally:
        gate.data = saved
    assert total == 2 * T * K and 0 < differ <= T * K
    assert first.startswith("layers.1, token ") and "instead of" in first


def test_the_certificate_counts_them(onnx_optimized):
    end = onnx_optimized.certificate.end_to_end
    assert end.ids and end.ids_differ == 0
    assert f"expert ids chosen inside the engine: {end.ids} compared, 0 differ" in str(onnx_optimized.certificate)


def test_a_model_that_is_one_block():
    torch.manual_seed(0)
    engine = moeopt.optimize(Mixture().eval(), torch.randn(3, H), backend="onnxruntime", verify="fast")
    assert engine.certificate.end_to_end.ids == 3 * K and E > K
