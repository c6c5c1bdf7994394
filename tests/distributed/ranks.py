"""Ranks on this machine: processes that share a store held by the test, and that are killed when they take too long.

Importing torch is the dear part of a rank, so one server has imported what ranks need, and each rank is its child.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.tensor", "moeopt.distributed", "tests.distributed.models"]
)  # the children of a server that could not import one of them import it themselves
DEADLINE = 300.0
"""Seconds after which ranks are killed: only a hang takes so long, also on a machine with much else to do."""


class Lost:
    """A rank that gave no result: ``exitcode`` says how it ended."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["MOEOPT_MEASURE"] = "off"  # the same kernel for any number of rows: bits are compared
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        result = function(rank, size, *args)
    except BaseException as err:
        result = AssertionError(f"rank {rank}: {type(err).__name__}: {err}\n{traceback.format_exc()}")
    aside = Path(folder) / f"{rank}.part"
    aside.write_bytes(pickle.dumps(result))
    aside.rename(Path(folder) / f"{rank}")
    dist.destroy_process_group()


@contextmanager
def started(function: Callable[..., Any], size: int, *args: Any):
    """(processes, folder of results) of ``function(rank, size, *args)`` on ``size`` ranks; none outlives the block."""
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _RANKS.Process(target=_rank, args=(function, rank, size, own.port, folder, args)) for rank in range(size)
        ]
        try:
            for one in ranks:
                one.start()
            yield ranks, Path(folder)
        finally:
            for one in ranks:
                if one.is_alive():
                    one.kill()
                one.join()


def collected(ranks: list[Any], folder: Path, but: tuple[int, ...] = (), deadline: float = DEADLINE) -> list[Any]:
    """What each rank gave, once all ``but`` some have ended; ``Lost`` for none. A hang fails the test."""
    end = time.monotonic() + deadline
    for rank, one in enumerate(ranks):
        if rank in but:
            continue
        one.join(max(0.0, end - time.monotonic()))
        assert not one.is_alive(), f"rank {rank} hangs"
    files = [folder / str(rank) for rank in range(len(ranks))]
    return [pickle.loads(f.read_bytes()) if f.exists() else Lost(r.exitcode) for f, r in zip(files, ranks, strict=True)]


def run_ranks(function: Callable[..., Any], size: int, *args: Any, deadline: float = DEADLINE) -> list[Any]:
    """What ``function(rank, size, *args)`` gives on each rank; an error of one is that of the test."""
    with started(function, size, *args) as (ranks, folder):
        results = collected(ranks, folder, deadline=deadline)
    wrong = [str(result) for result in results if isinstance(result, AssertionError)]
    assert not wrong, "\n".join(wrong)
    for rank, result in enumerate(results):
        assert not isinstance(result, Lost), f"rank {rank} ended with {result.exitcode}"
    return results
