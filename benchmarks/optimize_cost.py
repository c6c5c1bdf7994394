"""What ``moeopt.optimize`` itself costs: seconds by layers and by experts, and the peak memory of the process; and what
``moeopt.inspect`` costs on published shapes.

    python benchmarks/optimize_cost.py                 every table
    python benchmarks/optimize_cost.py layers          one table: layers, save, experts, memory or inspect
    python benchmarks/optimize_cost.py --check         exit code 1 when a limit below is missed

Each point is a fresh process. Seconds are CPU time of one torch thread, which leaves out the turns of a
machine's other tenants; memory is what the operating system saw (``ru_maxrss``), in units of one layer's weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYERS, SAVED, EXPERTS = (6, 12, 24), (6, 24, 60), (16, 64, 256, 512)
WITH_CACHE = "engine with its cache, Qwen3-MoE (transformers)"
LIMITS = {
    "a model of 24 layers and 64 experts, strict": 60.0,  # seconds
    "a block of 512 experts, strict": 20.0,  # seconds
    "saving, for each further layer": 0.15,  # seconds
    "building an engine, for each further layer": 0.6,  # seconds
    "building an engine with a cache, for each further layer": 0.8,  # seconds
    "the rewrite's memory beside the model": 1.0,  # layers
    "strict verification's memory beside the model": 5.0,  # layers in float32
    "a published shape inspected": 20.0,  # seconds, with the imports and the probe of this CPU
    "a published shape inspected, its memory": 4.0,  # GB
}


@functools.cache
def classes() -> dict[str, Any]:
    """The home-made classes, each made once; torch is imported only by a process that builds a model."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Expert(nn.Module):
        def __init__(self, H: int, I: int) -> None:
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((H, I), (H, I), (I, H)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    class Loop(nn.Module):
        """Separate experts and a loop over those that were hit, as transformers 4.57 writes it."""

        def __init__(self, E: int, K: int, H: int, I: int) -> None:
            super().__init__()
            self.router = nn.Linear(H, E, bias=False)
            self.experts = nn.ModuleList(Expert(H, I) for _ in range(E))
            self.K = K

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            E, H = self.router.weight.shape
            rows = x.reshape(-1, H)
            weights, ids = self.router(rows).softmax(-1, dtype=torch.float).topk(self.K)
            weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
            y, mask = torch.zeros_like(rows), F.one_hot(ids, E).permute(2, 1, 0)
            for e in (mask.sum((-1, -2)) > 0).nonzero():
                slot, token = torch.where(mask[e].squeeze(0))
                y.index_add_(0, token, self.experts[e](rows[token]) * weights[token, slot, None])
            return y.view_as(x)

    class Stacked(nn.Module):
        """Stacked experts, every one on every token, as a batched matmul."""

        def __init__(self, E: int, K: int, H: int, I: int) -> None:
            super().__init__()
            self.router = nn.Linear(H, E, bias=False)
            self.w_in = nn.Parameter(torch.randn(E, H, 2 * I) * H**-0.5)
            self.w_out = nn.Parameter(torch.randn(E, I, H) * I**-0.5)
            self.K = K

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            E, H = self.router.weight.shape
            rows = x.reshape(-1, H)
            weights, ids = self.router(rows).topk(self.K)
            dense = torch.zeros(len(rows), E, dtype=x.dtype).scatter(1, ids, weights.softmax(-1))
            gate, up = (rows.expand(E, -1, -1) @ self.w_in).chunk(2, -1)
            return (F.silu(gate) * up @ self.w_out * dense.t()[..., None]).sum(0).view_as(x)

    class Layer(nn.Module):
        """An attention before a block, each with a norm and a residual."""

        def __init__(self, mlp: nn.Module, H: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2))
            self.attention, self.mlp = nn.MultiheadAttention(H, 4, batch_first=True), mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norms[0](x)
            x = x + self.attention(h, h, h, need_weights=False)[0]
            return x + self.mlp(self.norms[1](x))

    return {"loop": Loop, "stacked": Stacked, "layer": Layer}


def stack_of(blocks: list[Any], H: int) -> Any:
    """A tower of layers."""
    from torch import nn

    return nn.Sequential(*(classes()["layer"](block, H) for block in blocks))


def library_model(layers: int, E: int, K: int, H: int, I: int) -> Any:
    """Qwen3-MoE from transformers, in the experts implementation that it defaults to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=128, hidden_size=H, intermediate_size=I, moe_intermediate_size=I, head_dim=8,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, num_experts=E,
        num_experts_per_tok=K, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def build(point: dict[str, Any]) -> tuple[Any, Any]:
    """The model of a point, seeded, and its inputs."""
    import torch

    torch.manual_seed(0)
    E, K, H, I, layers = (point[name] for name in "E K H I layers".split())
    if point["style"] == "library":
        ids = {"input_ids": torch.randint(0, 128, (2, 12))}
        return library_model(layers, E, K, H, I), ids if point["cache"] else {**ids, "use_cache": False}
    block = classes()[point["style"]]
    x = torch.randn(2, 12, H)
    if layers == 1:
        return block(E, K, H, I), x
    return stack_of([block(E, K, H, I) for _ in range(layers)], H), x


def import_all() -> None:
    """Optimise a tiny block, so that the modules which that imports count as the process and not as the model."""
    import torch

    import moeopt

    block = stack_of([classes()["loop"](E=4, K=2, H=16, I=16)], 16).eval()
    moeopt.optimize(block, torch.randn(2, 4, 16), verify="fast", progress=False)


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Optimise one model in this process."""
    import torch

    import moeopt

    torch.set_num_threads(1)
    model, inputs = build(point)
    model.eval()
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    import_all()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    opt = moeopt.optimize(model, inputs, verify=point["verify"], backend=point["backend"], progress=False)
    seconds = time.process_time() - started
    started = time.process_time()
    if point["save"]:
        with tempfile.TemporaryDirectory() as folder:
            opt.save(Path(folder) / "bundle")
    saved = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = [b for b in opt.report.blocks if b.kind == "moe"]
    return {
        "seconds": seconds,
        "saved": saved,
        "extra_bytes": (peak - before) * 1024,
        "layer_bytes": point["E"] * 3 * point["H"] * point["I"] * 4,
        "rewritten": sum(b.status == "rewritten" for b in blocks),
        "passed": opt.certificate.passed,
        "reasons": sorted({b.reason for b in blocks if b.reason}),
    }


def in_fresh_process(kind: str, what: str) -> dict[str, Any]:
    """What this script prints last when it is given ``kind`` and ``what``, as JSON types."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, __file__, kind, what], capture_output=True, text=True, env=env)
    if out.returncode:
        raise SystemExit(f"{what} failed:\n{out.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def run(
    style: str,
    layers: int,
    E: int,
    *,
    K: int = 4,
    H: int = 32,
    I: int = 16,
    verify: str = "strict",
    backend: str = "torch",
    save: bool = False,
    cache: bool = False,
) -> dict[str, Any]:
    """``measure`` in a fresh process; the parent stays light, since a child's ``ru_maxrss`` starts at its parent's."""
    point = {
        "style": style, "layers": layers, "E": E, "K": K, "H": H, "I": I, "verify": verify, "backend": backend,
        "save": save, "cache": cache,
    }  # fmt: skip
    result = in_fresh_process("--point", json.dumps(point))
    if result["rewritten"] != layers:
        why = "; ".join(result["reasons"])
        print(f"  {style}, {layers} layers, {E} experts: {result['rewritten']} rewritten: {why}")
    return result


def table(rows: list[tuple[Any, ...]]) -> None:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("  " + "  ".join([f"{first:<{widths[0]}}", *cells]))
    print(flush=True)


def by_layers() -> dict[str, float]:
    print("Seconds by layers: 64 experts, top 4, hidden 32, strict verification")
    rows: list[tuple[Any, ...]] = [("layers", *LAYERS, "per layer, first to last")]
    worst = 0.0
    for style, name in (("library", "Qwen3-MoE (transformers)"), ("loop", "home-made loop")):
        spent = [run(style, n, 64)["seconds"] for n in LAYERS]
        worst = max(worst, spent[-1])
        rows.append((name, *(f"{s:.1f}" for s in spent), f"{spent[0] / LAYERS[0]:.2f} to {spent[-1] / LAYERS[-1]:.2f}"))
    table(rows)
    return {"a model of 24 layers and 64 experts, strict": worst}


def by_saving() -> dict[str, float]:
    print("Seconds to save by layers: 4 experts, top 2, hidden 32; an engine: with optimising and verifying it")
    rows: list[tuple[Any, ...]] = [("layers", *SAVED, "for each further layer")]
    slopes: dict[str, float] = {}
    for name, style, backend, what in (
        ("saved, home-made loop", "loop", "torch", "saving, for each further layer"),
        ("saved, Qwen3-MoE (transformers)", "library", "torch", "saving, for each further layer"),
        ("engine, home-made loop", "loop", "onnxruntime", "building an engine, for each further layer"),
        (WITH_CACHE, "library", "onnxruntime", "building an engine with a cache, for each further layer"),
    ):
        points = [
            run(style, n, 4, K=2, verify="fast", backend=backend, save=backend == "torch", cache=name == WITH_CACHE)
            for n in SAVED
        ]
        spent = [point["saved" if backend == "torch" else "seconds"] for point in points]
        slope = (spent[-1] - spent[0]) / (SAVED[-1] - SAVED[0])
        slopes[what] = max(slope, slopes.get(what, 0.0))
        rows.append((name, *(f"{s:.1f}" for s in spent), f"{slope:.3f}"))
    table(rows)
    return slopes


def by_experts() -> dict[str, float]:
    print("Seconds by experts: one block, top 4, hidden 32")
    rows: list[tuple[Any, ...]] = [("experts", *EXPERTS, "ms per expert, first to last")]
    worst = 0.0
    for style in ("loop", "stacked"):
        for verify in ("strict", "off"):
            spent = [run(style, 1, n, verify=verify)["seconds"] for n in EXPERTS]
            worst = max(worst, spent[-1])
            slope = f"{1e3 * spent[0] / EXPERTS[0]:.0f} to {1e3 * spent[-1] / EXPERTS[-1]:.0f}"
            rows.append((f"{style}, verify={verify}", *(f"{s:.1f}" for s in spent), slope))
    table(rows)
    return {"a block of 512 experts, strict": worst}


def by_memory() -> dict[str, float]:
    print(
        "Peak memory beside the model of 4 layers, in layers: 16 experts, top 4, hidden 512, intermediate 1024, float32"
    )
    rows: list[tuple[Any, ...]] = [("verify", "off", "fast", "strict", "one layer")]
    off = strict = 0.0
    for style in ("loop", "stacked"):
        results = [run(style, 4, 16, H=512, I=1024, verify=v) for v in ("off", "fast", "strict")]
        layers = [r["extra_bytes"] / r["layer_bytes"] for r in results]
        off, strict = max(off, layers[0]), max(strict, layers[2])
        rows.append((style, *(f"{n:.2f}" for n in layers), f"{results[0]['layer_bytes'] / 2**20:.0f} MiB"))
    table(rows)
    return {"the rewrite's memory beside the model": off, "strict verification's memory beside the model": strict}


def inspected(name: str) -> dict[str, float]:
    """``moeopt.inspect`` of a published shape, in this process."""
    import moeopt
    from tests.inspection.published import SHAPES

    str(moeopt.inspect(SHAPES[name].fields))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.process_time(), "gigabytes": peak / 1e9}


def by_shape() -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    from tests.inspection.published import SHAPES

    print("moeopt.inspect on published shapes: no weights, this CPU probed, a fresh process each")
    costs = {name: in_fresh_process("--shape", name) for name in SHAPES}
    rows = [(name, f"{cost['seconds']:.1f}", f"{cost['gigabytes']:.2f}") for name, cost in costs.items()]
    table([("shape", "seconds", "GB"), *rows])
    return {
        "a published shape inspected": max(c["seconds"] for c in costs.values()),
        "a published shape inspected, its memory": max(c["gigabytes"] for c in costs.values()),
    }


TABLES = {"layers": by_layers, "save": by_saving, "experts": by_experts, "memory": by_memory, "inspect": by_shape}


def main() -> int:
    parser = argparse.ArgumentParser(description="what moeopt.optimize itself costs")
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all when none is named")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a limit is missed")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point or args.shape:
        print(json.dumps(inspected(args.shape) if args.shape else measure(json.loads(args.point))))
        return 0
    measured: dict[str, float] = {}
    for name in args.tables or TABLES:
        measured |= TABLES[name]()
    for name, value in measured.items():
        verdict = "within" if value <= LIMITS[name] else "OVER"
        print(f"{name}: {value:.2f}, {verdict} the limit of {LIMITS[name]:g}")
    return int(args.check and any(value > LIMITS[name] for name, value in measured.items()))


if __name__ == "__main__":
    raise SystemExit(main())
