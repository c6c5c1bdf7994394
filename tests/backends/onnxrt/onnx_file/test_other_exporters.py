"""Files that other libraries' exporters made of whole models: transformers' own, and optimum-onnx."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeopt
from tests.families.build import FAMILIES

OPTIMUM = Path(__file__).parents[4] / "build" / "optimum"
OFTEN = ("gpt_oss",)  # its biases are added after the products of all experts were joined
NIGHTLY = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "phimoe", "glm4_moe", "dots1")
EXPORTED = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation", do_validation=False)
"""


def checked(path, model, blocks):
    """The file's blocks are rewritten, and on other sizes and tokens its logits are the model's."""
    found = moeopt.optimize(path, verify="fast")
    assert [b.status for b in found.report.blocks if b.kind == "moe"] == ["rewritten"] * blocks, found.report
    assert found.certificate.passed
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    names = {i.name for i in found.model.inputs} if hasattr(found.model, "inputs") else set()
    more = {"position_ids": torch.arange(7).expand(3, 7)} if "position_ids" in names else {}
    got = found(input_ids=ids, attention_mask=mask, **more)
    logits = got["logits"] if isinstance(got, dict) else got[0] if isinstance(got, (tuple, list)) else got
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.nightly) for n in NIGHTLY)])
def test_a_file_of_transformers_exporter(name, tmp_path):
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx")
    family = FAMILIES[name]
    model = family.build()
    model.config.use_cache = False
    inputs = family.inputs() | {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    exporters.OnnxExporter().export(model, inputs, exporters.OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    checked(tmp_path / "model.onnx", model, family.moe_blocks)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("gpt_oss", "deepseek_v3"))]
)
def test_a_file_of_optimum_with_the_transformers_that_it_takes(name, tmp_path):
    if not (OPTIMUM / "optimum").is_dir():
        pytest.skip("optimum-onnx is not there: make build/optimum/.ready")
    family = FAMILIES[name]
    model = family.build()
    model.save_pretrained(tmp_path / "model")
    words = [sys.executable, "-c", EXPORTED, str(tmp_path / "model"), str(tmp_path / "onnx")]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(OPTIMUM)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    checked(tmp_path / "onnx" / "model.onnx", model, family.moe_blocks)
