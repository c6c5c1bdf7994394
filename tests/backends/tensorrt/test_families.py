"""Tiny models of real families as TensorRT engines for four GPU generations, built here and replayed on the CPU.

The default run takes ``SAMPLE``; ``make test-nightly`` takes every family in every dtype, each plan built twice, and
language models with their cache.
"""

import os

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'moeopt[tensorrt]'")
pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import moeopt
from moeopt.backends.tensorrt.build import Job, build_plan
from moeopt.backends.tensorrt.layers import in_block
from moeopt.backends.tensorrt.target import parse_target
from tests.backends.onnxrt.test_families_onnx import Logits
from tests.families import FAMILIES

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "olmoe")
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
TARGETS = ("sm_75", "sm_86", "sm_89", "sm_120")
NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
SAMPLE = [("mixtral", "float16")]
CASES = [(name, dtype) for name in NAMES for dtype in DTYPES] if NIGHTLY else SAMPLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here: tests/gpu runs these engines"),
]


def skip_old(family):
    if not family.available:
        pytest.skip(f"{family.name} needs transformers {'.'.join(map(str, family.min_version))}")


def engine(model, inputs, target, dtype):
    done = moeopt.optimize(model, inputs, backend="tensorrt", target=target, dtype=dtype, verify="fast")
    assert done.certificate.passed is True and done.certificate.executed is False, str(done.certificate)
    return done


def check_plan(plan, dtype, blocks, ends):
    assert [e["name"] for e in plan.inputs] == [v["onnx"] for v in ends["inputs"] if "onnx" in v]
    assert [e["name"] for e in plan.outputs] == [v["onnx"] for v in ends["outputs"]]
    for end, said in zip(plan.inputs, (v for v in ends["inputs"] if "onnx" in v), strict=True):
        assert [isinstance(size, int) for size in said["shape"]] == [size >= 0 for size in end["shape"]]
    assert plan.outputs[0]["dtype"] == DTYPES[dtype] and plan.flags == ()
    assert len(plan.layers) > 20 and 0 < plan.activation_bytes < 50_000_000 and plan.weights_bytes > 10_000
    assert all(in_block(plan.layers, block) for block in blocks), "each block has layers of its own"


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_whole_model(name, dtype, tmp_path):
    family = FAMILIES[name]
    skip_old(family)
    inputs = family.inputs()
    targets = TARGETS if NIGHTLY else ("sm_120",)
    shared = {}
    for target in targets:
        if target == "sm_75" and dtype == "bfloat16":
            with pytest.raises(moeopt.UsageError, match="sm_75 does not take bfloat16: Turing has no bfloat16"):
                moeopt.optimize(Logits(family.build()), inputs, backend="tensorrt", target=target, dtype=dtype)
            continue
        form = "sums" if target == "sm_75" else "products"
        if form not in shared:  # the graph is the same for all the others
            done = shared[form] = engine(Logits(family.build()), inputs, target, dtype)
            moe = [b for b in done.report.blocks if b.kind == "moe"]
            assert len(moe) == family.moe_blocks and all(f"{target} " in b.lowering for b in moe)
        built = shared[form]._built
        blocks = sorted({site.split("#")[0] for site in built.graph.lowerings})
        job = Job(
            built.directory / "model.onnx", tmp_path / "e.plan", parse_target(target), built.plan.profiles, blocks
        )
        if not NIGHTLY:
            check_plan(built.plan, dtype, blocks, built.graph.signature)
            continue
        for number in range(2):
            plan = build_plan(job)
            check_plan(plan, dtype, blocks, built.graph.signature)
            assert target != built.target.name or plan.sha256 == built.plan.sha256, f"build {number} differs"


@pytest.mark.nightly  # two profiles take minutes
@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_with_its_cache(name, tmp_path):
    family = FAMILIES[name]
    skip_old(family)
    done = engine(family.build(), family.inputs(), "sm_89", "float16")
    assert len(done._built.plan.profiles) == 2, "a prompt's and a decode's"
    replay = moeopt.load(done.save(tmp_path / "b"), "cpu")
    ids = family.inputs()["input_ids"]
    made = replay.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (ids.shape[0], ids.shape[1] + 4)
    again = build_plan(
        Job(done._built.directory / "model.onnx", tmp_path / "e.plan", done._built.target, done._built.plan.profiles)
    )
    assert again.sha256 == done._built.plan.sha256
