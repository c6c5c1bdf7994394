"""Around the builder: who is to blame, which sizes a cache has, and what Turing is given."""

import dataclasses

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from moeopt.backends.tensorrt import build_engine as trt_build
from moeopt.backends.tensorrt.build import Job
from moeopt.backends.tensorrt.causal_profiles import causal_sizes
from moeopt.backends.tensorrt.engine_plan import EnginePlan
from moeopt.backends.tensorrt.target import parse_target
from moeopt.errors import Declined, EngineBuildError
from tests.backends.onnxrt.lowerings.one_site import make_site


def test_a_nameless_failure_is_traced_to_the_block_that_fails_alone(monkeypatch, tmp_path):
    sites = [dataclasses.replace(make_site(E=E, H=16, I=16), name=f"layers.{E}") for E in (2, 3, 3, 4)]
    plan = EnginePlan(parse_target("sm_89"), (1, 32))
    job = Job(tmp_path / "model.onnx", tmp_path / "engine.plan", plan.target, blocks=["layers.2"])
    tried = []

    def build_plan(part):
        tried.append((part.blocks, part.profiles[0]["x"]))
        assert part.model.is_file() and part.model != job.model
        if part.blocks == ("layers.4",):
            raise EngineBuildError("crashed (SIGSEGV)")

    monkeypatch.setattr(trt_build.builder, "build_plan", build_plan)
    found = trt_build.bisect_failing_block(EngineBuildError("it crashed", log="words"), sites, plan, job)
    assert str(found) == "block layers.4: it crashed; it fails alone too: crashed (SIGSEGV)"
    assert (found.block, found.log) == ("layers.4", "words")
    shapes = ((1, 16), (32, 16), (32, 16))
    assert tried == [((f"layers.{n}",), shapes) for n in (2, 3, 4)], "one of each kind"
    err = EngineBuildError("it crashed")
    assert trt_build.bisect_failing_block(err, sites[:3], plan, job) is err


def test_turing_multiplies_float32_in_sums_and_bfloat16_not_at_all():
    plan = EnginePlan(parse_target("sm_75"), None)
    plan.check(make_site(E=2, H=16, I=16))
    assert plan.choice(make_site(E=2, H=16, I=16)).lowering is not None and plan.refusals == []
    with pytest.raises(Declined, match="no TensorRT form carries its experts: sm_75 does not take bfloat16: Turing"):
        plan.check(make_site(E=2, H=16, I=16, dtype=torch.bfloat16))
    assert plan.refusals[0].startswith("sm_75 does not take bfloat16")


def test_the_sizes_of_a_cache():
    names = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
    caller = {
        "inputs": {name: {"input": name} for name in names},
        "cache": [{"keys": {"input": "k"}, "values": {"input": "v"}}],
    }
    ends = {
        **{"input_ids": ["b", "s"], "attention_mask": ["m", "t"], "position_ids": ["b", "s"], "logits_to_keep": ["n"]},
        **{"k": ["b", 2, "p", 8], "v": ["b", 2, "p", 8]},
    }
    prompt, decode = causal_sizes(ends, caller, (2, 8), (1, 100))
    rows = {"b": (1, 2, 8), "m": (1, 2, 8)}
    assert prompt == {**rows, "s": (1, 8, 100), "p": (0, 0, 100), "t": (1, 8, 200), "n": (1, 1, 100)}
    assert decode == {**rows, "s": (1, 1, 1), "p": (0, 8, 100), "t": (1, 9, 101), "n": (1, 1, 1)}
    assert causal_sizes(ends, caller, (2, 8))[0]["s"] == (1, 8, 32)
