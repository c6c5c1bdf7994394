"""The report says where a quantised model's weights are, each byte once, and what of them is mapped from files."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moeopt
from moeopt.pipeline import weights_in_memory
from tests.pipeline.test_beside_checkpoint import INT4, Model, fill, int4, written


def told(opt):
    (note,) = [n for n in opt.report.notes if n.startswith("weights in memory: ")]
    return note


def test_codes_and_the_rest(tmp_path):
    model = fill(Model(tmp_path), written(tmp_path, int4, INT4))
    opt = moeopt.optimize(model, torch.randn(5, 64), quantize="checkpoint", verify="off")
    codes = sum(b.nbytes for n, b in opt.model.named_buffers() if "moeopt_experts" in n)
    rest = sum(p.nbytes for p in opt.model.parameters())
    assert told(opt) == (
        f"weights in memory: experts as codes {codes / 1e6:.3g} MB, the rest {rest / 1e6:.3g} MB; "
        f"{(codes + rest) / 1e6:.3g} MB of the process's own"
    )
    plain = moeopt.optimize(model, torch.randn(5, 64), verify="off")
    assert not any("weights in memory" in n for n in plain.report.notes)


@pytest.mark.skipif(not weights_in_memory.MAPS.exists(), reason="the system does not tell what is mapped")
def test_what_is_mapped(tmp_path, monkeypatch):
    model = fill(Model(tmp_path), written(tmp_path, int4, INT4))
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, tmp_path / "floats.safetensors")
    with safe_open(tmp_path / "floats.safetensors", framework="pt") as held:
        for name, parameter in model.named_parameters():
            parameter.data = held.get_tensor(name)
    x, floats = torch.randn(5, 64), 2 * 4 * 3 * 64 * 192 * 4 / 1e6
    left = moeopt.optimize(model, x, quantize=moeopt.QuantPlan(), verify="off")
    assert f"experts as floats 0 MB and {floats:.3g} MB mapped from files" in told(left)
    assert told(left).endswith("0 MB of the process's own")
    monkeypatch.setattr(weights_in_memory, "MAPS", tmp_path / "nowhere")
    untold = moeopt.optimize(model, x, quantize=moeopt.QuantPlan(), verify="off")
    assert f"experts as floats {floats:.3g} MB, the rest" in told(untold) and "mapped" not in told(untold)
