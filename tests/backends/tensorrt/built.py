"""One site as an ONNX file, built by the real builder for a target; nothing of it is run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from moeopt.backends.tensorrt.build import BuiltPlan, Job, build_plan
from moeopt.backends.tensorrt.target import parse_target
from moeopt.lower.onnx.assemble import one_op


def build_site(site, form, target="sm_89", tokens=(1, 8, 64)) -> BuiltPlan:
    """``form`` of ``site`` as an engine; ``EngineBuildError`` where the builder refuses it."""
    model = one_op(site, form)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"
        ir.save(model, path)
        profile = {end.name: [(T, end.shape[1]) for T in tokens] for end in model.graph.inputs}
        job = Job(path, Path(name) / "engine.plan", parse_target(target), [profile], [site.name], seconds=120)
        return build_plan(job)
