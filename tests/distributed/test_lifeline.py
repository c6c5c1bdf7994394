"""Who is still there, told by a store alone: no process is started."""

import json
import threading

import pytest
import torch.distributed as dist

from moeopt.distributed.lifeline import Lifeline


@pytest.fixture
def store():
    return dist.PrefixStore("test", dist.HashStore())


def others_tell(store, beat: dict[int, int], done: threading.Event):
    """Ranks that live, each with as many collectives begun."""
    number = 0
    while not done.wait(0.01):
        number += 1
        for rank, calls in beat.items():
            store.set(f"lives/{rank}", f"{number} {calls}")


@pytest.mark.parametrize(
    ("beat", "said", "rank", "words"),
    [
        ({1: 5, 2: 5}, {2: [5, "raised ValueError: no"]}, 2, "raised ValueError: no"),
        ({1: 5, 2: 3}, {}, 2, "lives, and did not take part in time"),
        ({1: 5}, {}, 2, "did not come to moeopt.distribute in time"),
    ],
)
def test_the_lost_rank_is_found(store, beat, said, rank, words):
    mine = Lifeline(store, [0, 1, 2], 0, timeout=6.0)
    mine.calls = 5
    for r, what in said.items():
        store.set(f"said/{r}", json.dumps(what))
    done = threading.Event()
    thread = threading.Thread(target=others_tell, args=(store, beat, done))
    thread.start()
    try:
        found, reason = mine.lost()
        assert found == rank and words in reason
        assert mine.agree(1, "something else") == (rank, reason)  # the first verdict holds for all
    finally:
        done.set()
        thread.join()
        mine.close()


def test_a_rank_that_fell_silent_exited_or_stopped(store):
    store.set("lives/1", "7 5")
    mine = Lifeline(store, [0, 1], 0, timeout=6.0)
    assert mine.lost() == (1, "exited or stopped: nothing is heard of it")
    mine.close()


def test_a_store_that_is_gone_took_its_rank_with_it(store, monkeypatch):
    mine = Lifeline(store, [0, 1], 1, timeout=6.0)

    def broken():
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(mine, "_look", broken)
    rank, reason = mine.lost()
    assert rank == 0 and "and with it the store of the job" in reason
    mine.close()


def test_what_a_rank_says_is_told_with_how_far_it_came(store):
    mine = Lifeline(store, [0, 1], 0, timeout=6.0)
    mine.calls = 9
    mine.say("raised KeyError: 'x'")
    assert json.loads(store.get("said/0")) == [9, "raised KeyError: 'x'"]
    mine.close()
