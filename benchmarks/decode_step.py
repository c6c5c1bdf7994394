"""Where a decode step of an engine's time goes: nodes of a bundle's graphs by kind, and the CPU time of a whole step.

    python -m benchmarks.decode_step --build DIR --layers 2        builds and saves the engine of a Qwen3-MoE-like model
    python -m benchmarks.decode_step DIR [DIR...] --save NAME      profiles the graphs of bundles, in turns

One thread. Each step reads a cache of 128 tokens. A node's time is the lower quartile over the steps, in wall time as
ONNX Runtime's profiler says, so turns of a machine's other tenants drop out; a step's is the mean of the fastest
quarter, in CPU time of the process. Steps of all graphs take turns on the same inputs, and results of graphs of one
file name are compared bit for bit. "experts" are the blocks' MatMul nodes or moeopt's own operator, "products" the
other MatMul nodes, and all else is small nodes.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.blocks import RESULTS
from moeopt.ops.measured import cpu_model

PAST = 128
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits")


def build(directory: str, layers: int) -> None:
    """Save the engine, with a graph of moeopt's own operator beside the plain one, whatever is the faster here."""
    import moeopt
    from benchmarks import model_peers
    from moeopt.backends.onnxrt import native_choice

    vars(native_choice).update(measuring=lambda: True, fastest=lambda *args, **kwargs: "native")
    model_peers.MODELS["sample"] = model_peers.MODELS["qwen3-like"] | {"layers": layers}
    model = model_peers.make("sample")
    engine = moeopt.optimize(model, {"input_ids": model_peers.example(model)}, backend="onnxruntime", verify="off")
    engine.save(directory)


class Graph:
    """One graph of a bundle, and its session."""

    def __init__(self, path: Path, profiles: str) -> None:
        import onnx
        import onnxruntime as ort

        from moeopt.backends.onnxrt.custom_op import register

        self.name, self.kind = f"{path.parent.name}/{path.name}", path.name
        self.nodes = len(onnx.load(path, load_external_data=False).graph.node)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if "native" in path.name:
            register(options)
        self.plain = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        options.enable_profiling = True
        options.profile_file_prefix = f"{profiles}/{self.name.replace('/', '-')}"
        self.profiled = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.seconds: list[float] = []

    def feeds(self, batch: int) -> dict[str, Any]:
        """A step's inputs; the cache is random numbers of the size that a norm leaves."""
        made, rng = {}, np.random.default_rng(0)
        for given in self.plain.get_inputs():
            if "past" in given.name or "layers" in given.name:
                shape = (batch, given.shape[1], PAST, given.shape[3])
                made[given.name] = rng.standard_normal(shape, dtype=np.float32)
            else:
                made[given.name] = {
                    "input_ids": rng.integers(0, 1000, (batch, 1)),
                    "attention_mask": np.ones((batch, PAST + 1), np.int64),
                    "position_ids": np.full((batch, 1), PAST),
                    "logits_to_keep": np.zeros(1, np.int64),
                }[given.name.removeprefix("input.")]
        return made

    def step(self, feeds: dict[str, Any]) -> list[Any]:
        """One step, timed; its outputs."""
        began = time.process_time()
        found = list(self.plain.run(None, feeds))
        self.seconds.append(time.process_time() - began)
        return found

    def by_kind(self) -> dict[str, list[float]]:
        """Of each kind of node: how many run, and microseconds of all of them together."""
        events = json.loads(Path(self.profiled.end_profiling()).read_text())
        times: dict[str, list[float]] = collections.defaultdict(list)
        kinds = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["name"]].append(event["dur"])
                kinds[event["name"]] = _kind(event["args"]["op_name"], event["name"])
        found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
        for name, took in times.items():
            found[kinds[name]][0] += 1
            found[kinds[name]][1] += statistics.quantiles(took, n=4)[0]
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _kind(op: str, name: str) -> str:
    if op == "Experts" or (op in PRODUCTS and "/expert." in name):
        return "experts"
    return "products" if op in PRODUCTS else op


def compare(graphs: list[Graph], batch: int, steps: int) -> dict[str, Any]:
    """What the steps of each graph take."""
    feeds, outputs = graphs[0].feeds(batch), {}
    for turn in range(steps):
        for graph in graphs if turn % 2 else graphs[::-1]:
            outputs[graph.name] = graph.step(feeds)
            graph.profiled.run(None, feeds)
    first = {graph.kind: outputs[graph.name] for graph in graphs[::-1]}
    found = {}
    for graph in graphs:
        kinds = graph.by_kind()
        fast = sorted(graph.seconds[3:])[: max(1, steps // 4)]
        small = [row for kind, row in kinds.items() if kind not in ("experts", "products")]
        found[graph.name] = {
            "nodes of the file": graph.nodes,
            "step, CPU ms": 1e3 * statistics.mean(fast),
            "small nodes": sum(row[0] for row in small),
            "small nodes, us": sum(row[1] for row in small),
            "same bits as the first of its kind": all(map(np.array_equal, first[graph.kind], outputs[graph.name])),
            "kinds": kinds,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--build", metavar="DIR")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/decode-step-NAME.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.build:
        build(asked.build, asked.layers)
        asked.bundles = [Path(asked.build)]
    with tempfile.TemporaryDirectory() as profiles:
        graphs = [Graph(path, profiles) for bundle in asked.bundles for path in sorted(bundle.glob("model*.onnx"))]
        found = compare(graphs, asked.batch, asked.steps)
    for name, graph in found.items():
        print(", ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in
                        {"graph": name, **graph}.items() if key != "kinds"))  # fmt: skip
        print("   " + ", ".join(f"{kind} {count:.0f}: {us:.0f}" for kind, (count, us) in graph["kinds"].items()))
    if asked.save:
        meta = {
            "torch": torch.__version__,
            "onnxruntime": __import__("onnxruntime").__version__,
            "cpu": f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
            "command": " ".join(["python -m benchmarks.decode_step", *sys.argv[1:]]),
        }
        (RESULTS / f"decode-step-{asked.save}.json").write_text(json.dumps({"graphs": found, **meta}, indent=1) + "\n")


if __name__ == "__main__":
    main()
