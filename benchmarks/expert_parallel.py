"""One block's experts on P processes over gloo: bytes beside the least possible, CPU seconds beside a fair share.

    OMP_NUM_THREADS=1 python -m benchmarks.expert_parallel --out benchmarks/results/expert-parallel.json
    OMP_NUM_THREADS=1 python -m benchmarks.expert_parallel --hidden 1024 --inner 1024 --out ...    larger experts

A softmax router and stacked SiLU experts (Qwen3-MoE's kind), T tokens a rank. ``bytes`` are those of tokens and results
that left a rank, per token, both ways. ``least`` sends each token once to each other rank that holds one of its
experts, and one sum back. ``CPU ms`` is the process time of a call on the slowest rank; ``share`` that of one process
on all P T tokens, over P: what ideal scaling leaves each rank. ``collectives`` is the process time of the call's own
collectives, made again with nothing beside them: the transport's. Processes share this machine's cores, so wall time
shows nothing. Under ``reduce`` every rank has all P T tokens and its router chooses for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import moeopt
from moeopt.ops.measured import cpu_model

E, K = 64, 8
FORMS: dict[str, dict[str, Any]] = {
    "rows": {"exact": True},
    "ranks": {"exact": False},
    "reduce": {"exact": False, "tokens": "replicated"},
}


class Block(nn.Module):
    """E experts in two stacks; nothing in it names moeopt."""

    def __init__(self, H: int, I: int) -> None:  # noqa: E741
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.04)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.04)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(K)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            gate, up = (x[token] @ self.gate_up[e].t()).chunk(2, -1)
            y.index_add_(0, token, ((nn.functional.silu(gate) * up) @ self.down[e].t()) * weights[token, slot, None])
        return y


def cpu_ms(call: Any, x: Tensor, turns: int) -> float:
    for _ in range(2):
        call(x)
    found = []
    for _ in range(turns):
        if dist.is_initialized():
            dist.barrier()
        begun = time.process_time()
        call(x)
        found.append(1e3 * (time.process_time() - begun))
    return statistics.median(found)


class Recorded:
    """A process group that keeps the collectives of a call, so that they can be made again with nothing beside them."""

    def __init__(self, group: Any) -> None:
        self.group, self.calls = group, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, args))
            return getattr(self.group, name)(*args)

        return call

    def again(self, _: Tensor) -> None:
        for name, args in self.calls:
            getattr(self.group, name)(*args).wait()


def least_bytes(chosen_TK: Tensor, rank: int, P: int, H: int) -> int:
    """Bytes of a float32 row out and one back for each other rank that a token reaches, neighbours on one rank."""
    owner_TK = chosen_TK // (E // P)
    reached_TP = torch.stack([(owner_TK == r).any(1) for r in range(P)], 1)
    reached_TP[:, rank] = False
    return int(reached_TP.sum()) * 2 * H * 4


def measure(rank: int, P: int, port: int, T: int, turns: int, folder: str, H: int, I: int) -> None:  # noqa: E741
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=P)
    torch.manual_seed(0)
    block, every = Block(H, I).eval(), torch.randn(P * T, H)
    mine, rows = every[rank * T : rank * T + T], {}
    with torch.no_grad():
        opt = moeopt.optimize(block, every, verify="fast")
        whole, chosen = opt(every), block.gate(mine).topk(K).indices
        for form, arguments in FORMS.items():
            dist.barrier()
            d = moeopt.distribute(opt, DeviceMesh("cpu", list(range(P))), timeout=300, **arguments)
            x, want = (every, whole) if form == "reduce" else (mine, whole[rank * T : rank * T + T])
            ms = cpu_ms(d, x, turns)
            before = (d.traffic.rows, d.traffic.described)
            channel = d._channel
            channel.group = recorded = Recorded(channel.group)
            got = d(x).clone()  # what is sent again is added up in place
            channel.group = recorded.group
            rows[form] = {
                "cpu_ms": ms,
                "collectives_ms": cpu_ms(recorded.again, x, turns),
                "bytes": (d.traffic.rows - before[0]) / T,
                "described": (d.traffic.described - before[1]) / T,
                "least": least_bytes(chosen, rank, P, H) / T,
                "difference": float((got - want).abs().max()),
                "bitwise": torch.equal(got, want),
            }
        if rank == 0:
            dist.destroy_process_group()
            rows["share"] = {"cpu_ms": cpu_ms(opt, every, turns) / P}
        else:
            dist.destroy_process_group()
    (Path(folder) / f"{P}-{T}-{rank}.json").write_text(json.dumps(rows))


def results(P: int, T: int, turns: int, folder: Path, H: int, I: int) -> list[dict[str, Any]]:  # noqa: E741
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(measure, (P, store.port, T, turns, str(folder), H, I), nprocs=P)
    ranks = [json.loads((folder / f"{P}-{T}-{rank}.json").read_text()) for rank in range(P)]
    share = ranks[0]["share"]["cpu_ms"]
    return [
        {
            "ranks": P, "tokens": T, "form": form, "share_ms": round(share, 1),
            "cpu_ms": round(max(r[form]["cpu_ms"] for r in ranks), 1),
            "mean_cpu_ms": round(statistics.mean(r[form]["cpu_ms"] for r in ranks), 1),
            "collectives_ms": round(statistics.mean(r[form]["collectives_ms"] for r in ranks), 1),
            **{key: round(statistics.mean(r[form][key] for r in ranks), 1) for key in ("bytes", "described", "least")},
            "difference": max(r[form]["difference"] for r in ranks),
            "bitwise": all(r[form]["bitwise"] for r in ranks),
        }
        for form in FORMS
    ]  # fmt: skip


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for P in chosen.ranks:
            for row in results(P, chosen.tokens, chosen.turns, Path(folder), chosen.hidden, chosen.inner):
                rows.append(row)
                print(
                    f"{P} ranks {row['tokens']:4d} tokens  {row['form']:6s} {row['bytes']:8.0f} bytes (least "
                    f"{row['least']:.0f}, described {row['described']:.0f})  {row['cpu_ms']:7.1f} CPU ms (mean "
                    f"{row['mean_cpu_ms']:.1f}, share {row['share_ms']:.1f}, collectives alone "
                    f"{row['collectives_ms']:.1f})  difference {row['difference']:.1e}"
                    f"{'  bitwise' if row['bitwise'] else ''}",
                    flush=True,
                )
    if chosen.out:
        about = {
            "cpu": cpu_model(), "cores": os.cpu_count(), "platform": platform.platform(), "threads": 1,
            "load_average": os.getloadavg()[0],
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "moeopt": moeopt.__version__},
            "command": f"python -m benchmarks.expert_parallel {' '.join(sys.argv[1:])}",
            "block": {"experts": E, "top_k": K, "hidden": chosen.hidden, "intermediate": chosen.inner,
                      "dtype": "float32"},
        }  # fmt: skip
        chosen.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
