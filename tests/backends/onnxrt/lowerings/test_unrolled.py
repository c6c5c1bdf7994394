"""The unrolled lowering computes the reference's numbers for every spec; see one_site.py for the budget's unit."""

import pytest
import torch

from tests.backends.onnxrt.lowerings.one_site import (
    eps_off,
    exact,
    make_site,
    model_of,
    renamed,
    run,
    session_of,
    tokens,
)

BUDGET = 16  # eps of the row's largest entry: sums of 12 + 6 + 2 terms round about 4 times over; 3.5 measured

SPECS = [
    {},
    dict(rows="up|gate", activation="gelu"),
    dict(rows="interleaved", w_in_layout="io", w_out_layout="io", activation="gelu_tanh"),
    dict(rows="interleaved_up", activation="swish", alpha=1.702, gate_max=1.0, up_min=-1.0, up_max=1.0, up_offset=1.0),
    dict(rows="separate", w_in_layout="io", activation="relu", D=20),
    dict(rows="plain", activation="relu2", out_norm_eps=1e-5),
    dict(rows="plain", activation="identity", w_in_layout="io", bias=False, weight_on="input"),
    dict(weight_on="input", activation="softcap", alpha=2.0, act_min=-0.5, act_max=0.5),
    dict(out_of_range="identity", combine="expert", activation="mish"),
    dict(out_of_range="identity", weight_on="input", activation="elu", alpha=0.7),
    dict(activation="leaky_relu", alpha=0.1, K=1),
    dict(activation="softplus", K=4),
    dict(activation="tanh", E=1, K=3),
    dict(activation="sigmoid", E=9, K=1),
]


@pytest.mark.parametrize("kw", SPECS, ids=renamed)
def test_agrees_with_the_reference(kw):
    site = make_site(**kw)
    session = session_of(model_of(site, "unrolled"))
    for T in (0, 1, 7, 64):
        args = tokens(site, T, beyond=0.2, negative=0.2)
        assert eps_off(run(session, *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    site = make_site(dtype=dtype)
    args = tokens(site, 33, beyond=0.2, negative=0.2)
    assert eps_off(run(session_of(model_of(site, "unrolled")), *args), exact(site, *args)) <= BUDGET


def test_counts_its_nodes():
    for E in (4, 32):
        nodes = list(model_of(make_site(E=E, bias=False), "unrolled").graph)
        assert sum(n.op_type == "MatMul" for n in nodes) == 2 * E and len(nodes) <= 2 * E + 40
        assert "layers.0.mlp/expert.3/gate_up" in [n.name for n in nodes]
