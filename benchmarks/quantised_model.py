"""A whole model's decode with quantised experts, attention and lm_head, beside its float32 engine of ONNX Runtime.

One token after a prompt of 128, one thread, in CPU time of the calling thread: the forms take turns, and the medians of
the paired ratios are told. The model is the Qwen3-MoE of ``examples/demo.py``, 4 layers of 32 experts, random weights:
time, bytes and the engines' heap do not depend on their values, losses do.

Where a step goes: ``python_ms`` is outside of ONNX Runtime's run. Of the nodes, by its own profiler (wall time, medians
by node, a few microseconds for each node among them): ``products_ms`` are products of rows with weights,
``idle_ms`` products of experts that no token hits, ``others_ms`` the rest.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/quantised_model.py \\
        --out benchmarks/results/quantised-model-1t.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

import moeopt
from moeopt import QuantPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import qwen  # noqa: E402  # of the folder just named

FORMS: dict[str, QuantPlan | None] = {
    "float32": None,
    "int8 experts": QuantPlan(default="int8"),
    "int4 experts": QuantPlan(default="int4"),
    "int4 all": QuantPlan(default="int4", products="int4"),
    "int4 all, int8 activations": QuantPlan(default="int4", products="int4", activations="int8"),
    "int8 all, int8 activations": QuantPlan(default="int8", products="int8", activations="int8"),
}
PROMPT, ROUNDS = 128, 21
BEFORE = 4
"""Steps of a form before the one that is timed: in a decode the step before was the same engine's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verify", default="fast", help="with off the losses stay unknown")
    parser.add_argument("--bundles", type=Path, help="where engines are kept, and found again")
    parser.add_argument("--only", help="make the bundle of this form, and time nothing")
    chosen = parser.parse_args()
    folder = chosen.bundles or Path(tempfile.mkdtemp())
    ids = torch.randint(1, 4096, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    steps, sizes, lost, nodes = {}, {}, {}, {}
    inside: dict[str, list[float]] = {}
    for name in FORMS if chosen.only is None else [chosen.only]:
        bundle = folder / name.replace(" ", "-").replace(",", "")
        if not bundle.exists():
            make(name, ids, bundle, chosen.verify)
        if chosen.only is None:
            nodes[name] = nodes_of(bundle, ids)
            engine = moeopt.load(bundle)
            steps[name], inside[name] = step_of(engine, ids), timed(engine.session.session)
            sizes[name] = sum(p.stat().st_size for p in bundle.glob("model.onnx*"))
            loss = json.loads((bundle / "certificate.json").read_text())["loss"]
            lost[name] = {k: v for k, v in loss.items() if isinstance(v, float)}
    if chosen.only is not None:
        return
    times: dict[str, list[float]] = {name: [] for name in steps}
    outside: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 3):  # the first three warm up
        for name, step in steps.items():
            for _ in range(BEFORE):
                step()
            start = time.thread_time()
            step()
            if turn > 2:
                times[name].append(time.thread_time() - start)
                outside[name].append(times[name][-1] - inside[name][-1])
    found = {
        name: {
            "ms": 1e3 * statistics.median(spent),
            "times_as_fast": statistics.median(f / s for f, s in zip(times["float32"], spent, strict=True)),
            "python_ms": 1e3 * statistics.median(outside[name]),
            **nodes[name],
            "file_bytes": sizes[name],
            "loss": lost[name],
        }
        for name, spent in times.items()
    }
    for name, row in found.items():
        parts = ", ".join(f"{part.removesuffix('_ms')} {row[part]:.2f}" for part in row if part.endswith("_ms"))
        print(f"{name:<30} {row['ms']:6.2f} ms {row['times_as_fast']:5.2f}x {row['file_bytes'] / 1e6:6.1f} MB  {parts}")
    about = {
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__, "prompt": PROMPT,
        "threads": torch.get_num_threads(), "rounds": ROUNDS, "verify": chosen.verify,
    }  # fmt: skip
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"about": about, "forms": found}, indent=1) + "\n")


def make(name: str, ids: torch.Tensor, bundle: Path, verify: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        model = qwen()
    inputs = {"input_ids": ids[:, :16]}
    moeopt.optimize(model, inputs, backend="onnxruntime", quantize=FORMS[name], verify=verify).save(bundle)


def step_of(engine: Any, ids: torch.Tensor) -> Any:
    """A call that decodes one token after the prompt; each has the same cache."""
    with torch.no_grad():
        cache = engine(input_ids=ids, use_cache=True).past_key_values
        keys = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def step() -> None:
        for layer, (k, v) in zip(cache.layers, keys, strict=True):
            layer.keys, layer.values = k, v
        with torch.no_grad():
            engine(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    return step


def timed(session: onnxruntime.InferenceSession) -> list[float]:
    """The CPU time of each run of ``session`` from here on."""
    run, spent = session.run_with_iobinding, []

    def timed_run(*args: Any) -> Any:
        start = time.thread_time()
        result = run(*args)
        spent.append(time.thread_time() - start)
        return result

    session.run_with_iobinding = timed_run
    return spent


def nodes_of(bundle: Path, ids: torch.Tensor) -> dict[str, float]:
    """How many nodes a step runs, and what they take by ONNX Runtime's profiler."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = (
        torch.get_num_threads(),
        3,
        True,
    )
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/step"
        engine = moeopt.load(bundle, session_options=options)
        step = step_of(engine, ids)
        for _ in range(ROUNDS + 3):
            step()
        events = json.loads(Path(engine.session.session.end_profiling()).read_text())
    first = [e["ts"] for e in events if e["name"] == "model_run"][-ROUNDS]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= first:
            kernels.setdefault(event["name"], []).append(event)
    found = {"nodes": float(len(kernels)), "products_ms": 0.0, "idle_ms": 0.0, "others_ms": 0.0}
    for name, runs in kernels.items():
        product = "MatMul" in runs[0]["args"]["op_name"] and ("product" in name or "expert" in name or "linear" in name)
        shapes = [size for read in runs[0]["args"]["input_type_shape"] for shape in read.values() for size in shape]
        part = "others_ms" if not product else "idle_ms" if 0 in shapes else "products_ms"
        found[part] += 1e-3 * statistics.median(e["dur"] for e in runs)
    return found


if __name__ == "__main__":
    main()
