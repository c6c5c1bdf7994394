"""A rank that exits, stops, raises or disagrees: every other rank is told which, where and why, and nothing hangs.

Nothing here is timed but that it ends: ``ranks.DEADLINE`` kills what hangs.
"""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moeopt
import moeopt.distributed
from moeopt.distributed.channel import Channel
from tests.distributed.models import Layers, optimised, tokens
from tests.distributed.ranks import Lost, collected, run_ranks, started
from tests.toy_moe import H

TIMEOUT = 30.0
"""Of the group: what living ranks do in it is tiny, but this machine may have much else to do."""


def told(call):
    """The fields of the ``RankLostError`` that ``call`` raises."""
    with pytest.raises(moeopt.RankLostError) as err:
        call()
    lost = err.value
    return lost.rank, lost.block, lost.phase, lost.reason, str(lost)


def gone(rank: int, size: int) -> tuple:
    """Ranks 0 and 1 share a model, 2 and 3 another: rank 1 exits, and rank 2, the first of its mesh, is stopped."""
    opt = optimised(Layers)
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    dist.barrier()
    d = moeopt.distribute(opt, pairs[rank // 2], timeout=TIMEOUT)
    with torch.no_grad():
        d(tokens(3))
        if rank == 1:
            os._exit(0)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        losses, lose = [], Channel.lose
        Channel.lose = lambda self, *lost: losses.append(lost) or lose(self, *lost)
        first = told(lambda: d(tokens(3)))
        again = told(lambda: d(tokens(3)))
    return first, again, len(losses)


def test_a_rank_that_exits_or_stops_is_named_on_every_other_rank():
    with started(gone, 4) as (ranks, folder):
        alone, ended, stopped, other = collected(ranks, folder, but=(2,))
        assert ranks[2].is_alive()  # stopped: the harness ends it
    assert isinstance(ended, Lost) and ended.exitcode == 0 and isinstance(stopped, Lost)
    for (rank, block, phase, reason, text), again, losses in (alone, other):
        assert reason == "exited or stopped: nothing is heard of it"
        assert block == "layers.0" and "meeting the others before sending tokens to their experts" in phase
        assert f"rank {rank} exited" in text and "end every process and start all of them again" in text
        assert again[0] == rank and losses == 1  # told of the first: nothing waits for the others a second time
    assert alone[0][0] == 1 and other[0][0] == 2


def faults(rank: int, size: int) -> dict:
    """Faults after which both processes live on: each on a model distributed anew, which starts clean."""
    opt = optimised(Layers)
    mesh = DeviceMesh("cpu", list(range(size)))
    seen = {}

    def model(**arguments):
        dist.barrier()  # one rank may have optimised much earlier
        return moeopt.distribute(opt, mesh, timeout=TIMEOUT, **arguments)

    with torch.no_grad():
        d = model()
        if rank == 1:
            with pytest.raises(moeopt.UsageError) as unlike:
                d(torch.randn(3, H + 1))
            seen["unlike"] = str(unlike.value)
        else:
            seen["raises"] = told(lambda: d(tokens(3)))
        d = model()
        seen["another block"] = told(lambda: d.model.layers[rank](tokens(3)))
        d = model()
        with torch.set_grad_enabled(rank == 1):
            seen["gradients"] = told(lambda: d(tokens(3)))
        seen["clean"] = torch.equal(model()(tokens(4)), opt(tokens(4)))

        d = model(tokens="replicated")
        seen["other tokens"] = told(lambda: d(tokens(3, seed=rank)))
        d = model(tokens="replicated")
        seen["other number"] = told(lambda: d(tokens(3 + rank)))
        seen["other arguments"] = told(lambda: model(exact=rank == 0))
        seen["other placement"] = told(lambda: model(placement=[[rank], [0], [1], [1]]))
        dist.barrier()
        opt.model.layers[0].top_k = 2 - rank
        if rank == 1:
            with pytest.raises(moeopt.UsageError):
                moeopt.distribute(opt, mesh, timeout=TIMEOUT)
        else:
            seen["changed here alone"] = told(lambda: moeopt.distribute(opt, mesh, timeout=TIMEOUT))
        opt.model.layers[0].top_k = 2
        seen["clean after a refusal"] = torch.equal(model()(tokens(4)), opt(tokens(4)))
        with torch.no_grad():
            if rank == 1:
                opt.model.layers[1].experts[2].w1.weight[0, 0] += 1
        seen["other weights"] = told(model)
        dist.barrier()
        if rank == 0:
            seen["does not come"] = told(lambda: moeopt.distribute(opt, mesh, timeout=4.0))
    return seen


@pytest.fixture(scope="module")
def seen():
    return run_ranks(faults, 2)


def test_a_rank_that_raises_is_named_with_its_error(seen):
    rank, block, _, reason, _ = seen[0]["raises"]
    assert (
        rank == 1 and block == "layers.0" and reason.startswith("raised UsageError: layers.0 cannot run its original")
    )
    for words in (
        "its experts lie on several ranks",
        "called with size 17",
        "optimise and distribute the changed model",
    ):
        assert words in seen[1]["unlike"]


def test_what_one_rank_refuses_is_told_to_the_others(seen):
    rank, *_, reason, _ = seen[0]["changed here alone"]
    assert rank == 1 and reason.startswith("raised UsageError: layers.0 is no longer what was verified (top_k of the")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("another block", "disagrees: the block is 1 there and 0 elsewhere"),
        ("gradients", "disagrees: whether gradients are recorded is 5 there and 0 elsewhere"),
        ("other tokens", "disagrees: its tokens is others there and alike elsewhere"),
        ("other number", "disagrees: the number of its tokens is 4.0 there and 3.0 elsewhere"),
        ("other arguments", "disagrees: exact= is false there and true elsewhere"),
        ("other placement", "disagrees: placement of layers.0 is [[1], [0], [1], [1]] there and [[0], [0], [1], [1]]"),
        ("other weights", "disagrees: the weights layers.1.experts.2.w1.weight is "),
    ],
)
def test_ranks_that_disagree_are_told_about_what(seen, fault, words):
    for each in seen:
        rank, _, _, reason, _ = each[fault]
        assert rank == 1 and words in reason


def test_a_rank_that_does_not_come_is_named(seen):
    rank, block, phase, reason, _ = seen[0]["does not come"]
    assert rank == 1 and not block and phase == "forming a process group"
    assert reason == "did not come to moeopt.distribute in time"


def test_the_next_model_starts_clean(seen):
    assert all(each[when] for each in seen for when in ("clean", "clean after a refusal"))
