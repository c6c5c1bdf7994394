"""One entry of the table is the whole of an activation: spec, reference, kernels, ONNX nodes and recognition follow."""

import re
from pathlib import Path

import onnxruntime  # noqa: F401  one_site needs it; without it this file is collected as an error and not skipped
import pytest
import torch
import torch.nn.functional as F

import moeopt
from moeopt.errors import UsageError
from moeopt.ir import activations, stable_nodes
from moeopt.ir.activations import ACTIVATION_TABLE, Activation, activation_of
from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec
from moeopt.ops.activations import activate
from moeopt.ops.experts import experts
from moeopt.ops.native.call import NATIVE_ACTIVATIONS
from moeopt.ops.reference import experts_reference
from moeopt.ops.triton.constants import TRITON_ACTIVATIONS
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of, session_of, tokens
from tests.zoo.activations import GLUExperts

HARDSWISH = Activation("hardswish", F.hardswish, stable_nodes.hardswish, one_kernel=True)


@pytest.fixture
def hardswish(monkeypatch):
    monkeypatch.setitem(ACTIVATION_TABLE, "hardswish", HARDSWISH)


def test_the_names_are_those_of_the_table():
    assert tuple(ACTIVATION_TABLE) == ACTIVATIONS
    assert all(name == entry.name for name, entry in ACTIVATION_TABLE.items())


def test_without_its_entry_the_function_is_refused_by_name():
    with pytest.raises(UsageError, match=r"activation is 'hardswish'; it must be one of silu, gelu, .*softplus"):
        ExpertsSpec(activation="hardswish")
    with pytest.raises(UsageError, match=r"no activation is called 'hardswish'; the activations are silu, gelu"):
        activation_of("hardswish")
    with pytest.raises(UsageError, match="activation 'elu' needs alpha"):
        activate(torch.ones(2), "elu", None)


def test_one_entry_makes_the_reference_and_the_op(hardswish):
    site = make_site(activation="hardswish")
    x, ids, weights = tokens(site, 7)
    gate, up = (x @ site.bank.w_in(0)[0].T + site.bank.b_in(0)[0]).chunk(2, -1)
    want = (F.hardswish(gate) * up) @ site.bank.w_out(0).T + site.bank.b_out(0)
    first, ones = torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1)
    assert torch.allclose(experts_reference(x, first, ones, site.bank, site.spec), want, atol=1e-5)
    got = experts(x, ids, weights, site.bank, site.spec)
    assert torch.allclose(got, experts_reference(x, ids, weights, site.bank, site.spec), atol=1e-5)


@pytest.mark.parametrize("lowering", ["unrolled", "dense"])
def test_one_entry_makes_the_nodes(hardswish, lowering):
    site = make_site(activation="hardswish")
    args = tokens(site, 7)
    feeds = dict(zip(("x", "ids", "weights"), (a.numpy() for a in args), strict=True))
    got = torch.from_numpy(session_of(model_of(site, lowering)).run(None, feeds)[0])
    assert torch.allclose(got, experts_reference(*args, site.bank, site.spec), atol=1e-5)


def test_one_entry_is_recognised(hardswish):
    torch.manual_seed(0)
    model = GLUExperts(F.hardswish).eval()
    x = torch.randn(9, 24)
    want = model(x)
    optimized = moeopt.optimize(model, (x,))
    (block,) = optimized.report.blocks
    assert block.status == "rewritten" and "hardswish GLU" in block.spec, block.reason
    assert torch.allclose(optimized(x), want, atol=1e-5)


def test_the_native_kernel_has_the_names_of_its_header():
    header = Path(moeopt.__file__).parent / "ops/native/src/moeopt_experts.h"
    (names,) = re.findall(r"enum moeopt_activation \{(.*?)\}", header.read_text(), re.DOTALL)
    assert tuple(name.strip().lower() for name in names.split(",")) == NATIVE_ACTIVATIONS
    assert set(NATIVE_ACTIVATIONS) <= set(ACTIVATION_TABLE)


def test_the_triton_kernels_have_the_names_of_their_branches():
    source = (Path(moeopt.__file__).parent / "ops/triton/pointwise.py").read_text()
    assert tuple(re.findall(r'NAME == "(\w+)"', source)) == TRITON_ACTIVATIONS
    assert set(TRITON_ACTIVATIONS) <= set(ACTIVATION_TABLE)


def test_nothing_of_onnx_is_imported_by_the_table():
    assert "onnx_ir" not in vars(activations) and "onnx_ir" not in vars(stable_nodes)
