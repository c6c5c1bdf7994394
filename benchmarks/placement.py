"""What placements of experts are worth: planned on one sample of tokens, judged on another. No device, NumPy only.

    python -m benchmarks.placement --out benchmarks/results/placement.json

256 experts, 8 chosen per token, nodes of 8 ranks. Tokens belong to one of 8 topics; a topic's popularity of the experts
is a Zipf law over a ranking, mixed of one that all topics share and one of its own; a token draws its experts without
replacement. ``busiest`` is the load of the busiest rank over the mean, ``step`` the same within steps of 4,096 tokens,
``nodes`` how many other nodes a token reaches. A token's row goes to the copies of an expert in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeopt.planning.placement import Placement, balanced, contiguous, together, with_copies

E, K, NODE, TOKENS, TOPICS, STEP = 256, 8, 8, 40_000, 8, 4096
LOADS = {"uniform": (0.0, 0.0), "zipf 0.6": (0.6, 0.5), "zipf 1": (1.0, 0.5), "zipf 1, by topic": (1.0, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    rows = []
    for row in results():
        rows.append(row)
        print(
            f"{row['load']:18s} {row['ranks']:3d} ranks  {row['placement']:28s} busiest {row['busiest']:.2f}  "
            f"step {row['step']:.2f}  nodes {row['nodes']:.2f}",
            flush=True,
        )
    if chosen.out:
        chosen.out.write_text(json.dumps({"command": "python -m benchmarks.placement", "rows": rows}, indent=1))


def results() -> Iterator[dict[str, Any]]:
    for name, (zipf, own) in LOADS.items():
        popularity = _popularity(zipf, own)
        planned, judged = _tokens(popularity, 11), _tokens(popularity, 12)
        load = np.bincount(planned.ravel(), minlength=E).tolist()
        member = np.zeros((TOKENS, E), np.float32)
        member[np.arange(TOKENS)[:, None], planned] = 1
        pairs = member.T @ member
        for P in (8, 16, 32, 64):
            ways: dict[str, Placement] = {
                "contiguous": contiguous(E, P),
                "balanced": balanced(load, P),
                "balanced, 64 copies": with_copies(load, P, 64),
                "by co-activation": together(load, pairs, P, NODE),
                "by co-activation, 64 copies": together(load, pairs, P, NODE, 64),
            }
            for way, placement in ways.items():
                yield {"load": name, "ranks": P, "placement": way, **_judge(judged, placement, P)}


def _popularity(zipf: float, own: float) -> np.ndarray:
    r = np.random.default_rng(1)
    law = 1 / np.arange(1, E + 1) ** zipf
    law /= law.sum()
    shared = law[r.permutation(E)]
    return np.stack([(1 - own) * shared + own * law[r.permutation(E)] for _ in range(TOPICS)])


def _tokens(popularity: np.ndarray, seed: int) -> np.ndarray:
    r = np.random.default_rng(seed)
    scores = np.log(popularity[r.integers(0, TOPICS, TOKENS)]) + r.gumbel(size=(TOKENS, E))
    return np.argpartition(-scores, K, axis=1)[:, :K]


def _judge(ids: np.ndarray, placement: Placement, P: int) -> dict[str, float]:
    copies = np.array([len(ranks) for ranks in placement])
    table = np.full((E, copies.max()), -1)
    for e, ranks in enumerate(placement):
        table[e, : len(ranks)] = ranks
    turn = np.arange(TOKENS)[:, None] % copies[ids]
    rank = table[ids, turn]
    loads = np.bincount(rank.ravel(), minlength=P)
    steps = [np.bincount(part.ravel(), minlength=P) for part in np.array_split(rank, TOKENS // STEP)]
    reached = np.zeros((TOKENS, max(P // NODE, 1)), bool)
    reached[np.arange(TOKENS)[:, None], rank // NODE] = True
    reached[np.arange(TOKENS), np.arange(TOKENS) % P // NODE] = False
    return {
        "busiest": float(loads.max() / loads.mean()),
        "step": float(np.mean([s.max() / s.mean() for s in steps])),
        "nodes": float(reached.sum(1).mean()),
    }


if __name__ == "__main__":
    main()
