"""One block's float32 weights stored (in, out) or (out, in): what each order costs moeopt's kernel and ONNX Runtime.

    OMP_NUM_THREADS=1 python -m benchmarks.orientations --save

Plain ONNX Runtime multiplies by (in, out) with ``MatMul`` and by (out, in) with ``Gemm(transB=1)``; both pack a copy
when the session loads. The kernel reads either where it lies. All take turns on the same rows in one process, caches
written over before each call; the clock is the CPU time of the process. Cells are medians in milliseconds; ``ratio`` is
the median, over the turns, of (in, out) divided by (out, in): above 1, (out, in) is faster. ``same bits`` says whether
the two graphs of ONNX Runtime agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.blocks import BLOCKS, RESULTS
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts
from moeopt.ops.measured import cpu_model

FLUSH, TURNS = 64 << 20, 9


def products(w_in: torch.Tensor, w_out: torch.Tensor, op: str) -> Any:
    """A session with every expert's two products by ``op``, on rows that are sorted by expert."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    E = len(w_in)
    turned = {"transB": 1} if op == "Gemm" else {}
    nodes, weights = [], []
    for name, stack in (("x", w_in), ("h", w_out)):
        nodes.append(helper.make_node("Split", [name, "counts"], [f"{name}{e}" for e in range(E)], axis=0))
        for e in range(E):
            weights.append(numpy_helper.from_array(stack[e].numpy(), f"{name}.weight{e}"))
            nodes.append(helper.make_node(op, [f"{name}{e}", weights[-1].name], [f"{name}.y{e}"], **turned))
        nodes.append(helper.make_node("Concat", [f"{name}.y{e}" for e in range(E)], [f"{name}.y"], axis=0))
    ins = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None]) for name in ("x", "h")]
    ins.append(helper.make_tensor_value_info("counts", TensorProto.INT64, [E]))
    outs = [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None) for name in ("x", "h")]
    graph = helper.make_graph(nodes, "products", ins, outs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(block: str, tokens: list[int]) -> dict[str, Any]:
    E, K, H, I = BLOCKS[block]
    rng = torch.Generator().manual_seed(0)
    io = [torch.rand(E, H, 2 * I, generator=rng) / H, torch.rand(E, I, H, generator=rng) / I]
    oi = [w.transpose(1, 2).contiguous() for w in io]
    banks = {"io": StackedExpertWeights([io[0]], io[1]), "oi": StackedExpertWeights([oi[0]], oi[1])}
    specs = {name: ExpertsSpec(w_in_layout=name, w_out_layout=name) for name in banks}
    sessions = {"MatMul": products(*io, "MatMul"), "Gemm": products(*oi, "Gemm")}
    flush, rows = torch.ones(FLUSH, dtype=torch.uint8), {}
    for T in tokens:
        times: dict[str, list[float]] = {name: [] for name in (*banks, *sessions)}
        same = True
        for turn in range(TURNS + 1):
            weights, ids = torch.rand(T, E, generator=rng).topk(K)
            x = torch.randn(T, H, generator=rng)
            counts = torch.bincount(ids.flatten(), minlength=E)
            feeds = {"x": x.repeat_interleave(K, 0), "h": torch.randn(T * K, I, generator=rng), "counts": counts}
            found: dict[str, Any] = {}
            for name in list(times)[turn % 4 :] + list(times)[: turn % 4]:
                flush.add_(1)
                began = time.process_time()
                if name in banks:
                    experts(x, ids, weights, banks[name], specs[name])
                else:
                    found[name] = sessions[name].run(None, {n: t.numpy() for n, t in feeds.items()})
                if turn:  # the first turn warms up
                    times[name].append(time.process_time() - began)
            same = same and all((a == b).all() for a, b in zip(found["MatMul"], found["Gemm"], strict=True))

        def ratio(one: str, two: str, times: dict[str, list[float]] = times) -> float:
            return round(statistics.median(a / b for a, b in zip(times[one], times[two], strict=True)), 3)

        cells = {name: round(1e3 * statistics.median(took), 2) for name, took in times.items()}
        rows[str(T)] = {
            "ms": {"moeopt (in, out)": cells["io"], "moeopt (out, in)": cells["oi"],
                   "ORT MatMul (in, out)": cells["MatMul"], "ORT Gemm (out, in)": cells["Gemm"]},
            "ratio": {"moeopt": ratio("io", "oi"), "ORT": ratio("MatMul", "Gemm")},
            "same bits": bool(same),
        }  # fmt: skip
        print(f"T={T}: {rows[str(T)]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", choices=BLOCKS, default="mixtral-small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/orientations-BLOCK-1t.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    import onnxruntime

    rows = measure(asked.block, asked.tokens)
    if asked.save:
        about = {"command": " ".join(["python -m benchmarks.orientations", *sys.argv[1:]]), "cpu": cpu_model(),
                 "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
                 "onnxruntime": onnxruntime.__version__, "clock": "CPU time of the process, one thread"}  # fmt: skip
        path = RESULTS / f"orientations-{asked.block}-1t.json"
        path.write_text(json.dumps({**about, "tokens": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
