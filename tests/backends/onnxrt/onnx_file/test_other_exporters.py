"""Files that other libraries' exporters made of whole models: transformers' own, and optimum-onnx."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import moeopt
from tests.families.build import FAMILIES

ROOT = Path(__file__).parents[4]
OPTIMUM = ROOT / "build" / "optimum"
OFTEN = ("gpt_oss",)  # its biases are added after the products of all experts were joined
NIGHTLY = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "phimoe", "glm4_moe", "dots1")
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))

EXPORTED = """
import random, sys
import numpy, torch
from optimum.exporters.onnx import main_export
from tests.families.build import FAMILIES
from tests.backends.onnxrt.onnx_file.test_other_exporters import IDS

model, folder = FAMILIES[sys.argv[1]].build(), sys.argv[2]
model.save_pretrained(folder + "/model")
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(0)  # optimum draws the example: an expert that no token of it chooses is not in the file, which is broken then
main_export(folder + "/model", folder + "/onnx", task="text-generation", do_validation=False)
with torch.no_grad():
    numpy.save(folder + "/logits.npy", model(input_ids=IDS).logits.numpy())
"""
"""Each model is built by the transformers that exports it: the newest one's folders are none that it reads."""


def checked(path, want, blocks):
    """The file's blocks are rewritten, and on other sizes and tokens its logits are ``want``."""
    found = moeopt.optimize(path, verify="fast")
    assert [b.status for b in found.report.blocks if b.kind == "moe"] == ["rewritten"] * blocks, found.report
    assert found.certificate.passed
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(7).expand(3, 7)}
    takes = {value.name for value in onnx.load(path, load_external_data=False).graph.input}
    got = found(**{name: value for name, value in given.items() if name in takes})
    logits = got["logits"] if isinstance(got, dict) else got[0] if isinstance(got, (tuple, list)) else got
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.nightly) for n in NIGHTLY)])
def test_a_file_of_transformers_exporter(name, tmp_path):
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx")
    family = FAMILIES[name]
    model = family.build()
    model.config.use_cache = False
    inputs = family.inputs() | {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    exporters.OnnxExporter().export(model, inputs, exporters.OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    checked(tmp_path / "model.onnx", want, family.moe_blocks)


@pytest.mark.nightly
def test_the_files_that_transformers_exporter_makes_to_generate_with(tmp_path):
    """A prompt's and a step's, whose caches have dimensions that are called by their numbers."""
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx")
    family = FAMILIES["qwen3_moe"]
    inputs = family.inputs() | {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    config = exporters.OnnxConfig(dynamic=True)
    exported = exporters.OnnxExporter().export_for_generation(family.build(), inputs, config, multi_token_decode=True)
    exported.save_pretrained(tmp_path)
    for name in ("prefill.onnx", "decode.onnx"):
        found = moeopt.optimize(tmp_path / name, verify="fast")
        assert [b.status for b in found.report.blocks] == ["rewritten"] * family.moe_blocks, found.report
        assert found.certificate.passed


@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("gpt_oss", "deepseek_v3"))]
)
def test_a_file_of_optimum_with_the_transformers_that_it_takes(name, tmp_path):
    if not (OPTIMUM / "optimum").is_dir():
        pytest.skip("optimum-onnx is not there: make build/optimum/.ready")
    words = [sys.executable, "-c", EXPORTED, name, str(tmp_path)]
    path = os.environ | {"PYTHONPATH": os.pathsep.join((str(OPTIMUM), str(ROOT)))}
    done = subprocess.run(words, env=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    want = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    checked(tmp_path / "onnx" / "model.onnx", want, FAMILIES[name].moe_blocks)
