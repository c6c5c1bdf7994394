"""Experts of a file with something between their products that looks at a whole row, or has one number of its own."""

import numpy as np
import onnx
import pytest
import torch

import moeopt
from tests.onnx_in.bodies import model
from tests.onnx_in.test_other_shapes import _HEAD, E
from tests.onnx_in.toys import run

BETWEEN = {
    "layer norm": ("LayerNormalization(a{e}, scale{e}, shift{e})", ("scale", "shift")),
    "batch norm": ("BatchNormalization(a{e}, scale{e}, shift{e}, shift{e}, scale{e})", ("scale", "shift")),
    "one slope": ("PRelu(a{e}, slope{e})", ("slope",)),
    "a number": ("PRelu(a{e}, slope{e})", ("slope",)),
}
SIZES = {"one slope": 1, "a number": ()}


def block(kind):
    form, held = BETWEEN[kind]
    draw = np.random.default_rng(0)
    text, constants = _HEAD, {f"n{e}": np.array([e]) for e in range(E)}
    for e in range(E):
        text += f"    a{e} = MatMul(x, up{e})\n    b{e} = {form.format(e=e)}\n"
        text += f"    d{e} = MatMul(b{e}, down{e})\n    w{e} = Gather <axis = 1> (table, n{e})\n"
        text += f"    p{e} = Mul(d{e}, w{e})\n"
        text += f"    s{e} = Add({f's{e - 1}' if e > 1 else 'p0'}, p{e})\n" if e else ""
        constants |= {f"up{e}": draw.normal(size=(8, 12)), f"down{e}": draw.normal(size=(12, 8))}
        constants |= {f"{name}{e}": draw.uniform(0.2, 2, size=SIZES.get(kind, 12)) for name in held}
    return model(f"{text}    y = Identity(s{E - 1})\n", **constants)


@pytest.mark.parametrize("kind", ["layer norm", "one slope", pytest.param("batch norm", marks=pytest.mark.nightly)])
def test_they_are_rewritten_and_the_module_of_the_file_has_an_entry(kind, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(block(kind), path)
    found = moeopt.optimize(path, verify="off")
    assert [(b.status, b.experts, b.reason) for b in found.report.blocks] == [("rewritten", E, "")]
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found(x), run(path, x=x)[0], rtol=1e-5, atol=1e-5)
    told = moeopt.explain(moeopt.from_onnx(path), x)
    assert [(b.kind, b.experts) for b in told.blocks] == [("moe", E)]
    assert all(b.status == "rewritten" or "would not pay here" in b.reason for b in told.blocks)


def test_numbers_of_each_expert_are_not_those_of_the_first():
    """A slope without dimensions is a number of the graph, which the call makes a tensor of."""
    found = moeopt.optimize(block("a number"), verify="off")
    (entry,) = found.report.blocks
    assert entry.status == "declined"
    assert "its experts do not all compute the same function (plain leaky_relu(" in entry.reason
