"""What a token gets depends on no other token, no thread and no memory beside its own."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts_reference
from tests.ops.native.blocks import Sizes, random_block

ROOT = Path(__file__).parents[3]
TASKS = Path("/proc/self/task")
LAYOUTS = [("oi", "oi"), ("io", "io"), ("io", "oi")]


def block(dtype, layouts, T=90, **fields):
    spec = ExpertsSpec(w_in_layout=layouts[0], w_out_layout=layouts[1], **fields)
    # seed 15: weights, rows and columns as they come, so that all tiles of contiguous memory are met
    return random_block(spec, Sizes(T=T, K=2, E=3, H=160, I=300, D=72), dtype, seed=15)


def ended_well(calls):
    """Whether ``calls`` came to its end in a child of fork, within a minute."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            calls()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return done == (child, 0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_a_token_s_bits_depend_on_no_neighbour(kernel, layouts, dtype):
    x, ids, weights, bank, spec = block(dtype, layouts)
    whole = kernel(x, ids, weights, bank, spec)
    for chosen in ([0], [7, 3], list(range(5)), list(range(13, 20)), list(range(80))):
        assert torch.equal(kernel(x[chosen], ids[chosen], weights[chosen], bank, spec), whole[chosen]), chosen
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel(x[order], ids[order], weights[order], bank, spec), whole[order])


def apart(w):
    """``w`` with both strides beyond one."""
    around = w.new_zeros(2 * w.shape[0], 2 * w.shape[1])
    around[::2, ::2] = w
    return around[::2, ::2]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("where", (0, 1), ids=("w_in", "w_out"))
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_a_token_s_bits_depend_on_no_other_expert_s_strides(kernel, layouts, where, dtype):
    """The weights of one expert lie in no order. Rows (of tokens, of hidden numbers) below 1e-38 show which product the
    others have: pairs of bfloat16 take them for zero."""
    act, tokens, first = (("identity", 1e-38, 1), ("relu2", 1, 6e-20))[where]
    spec = ExpertsSpec(rows="plain", activation=act, w_in_layout=layouts[0], w_out_layout=layouts[1])
    x, ids, weights, bank, _ = random_block(spec, Sizes(T=9, E=3), dtype, seed=15, biases=False)
    lists = [bank.w_in(e)[0] * first for e in range(3)], [bank.w_out(e) * 1e30 for e in range(3)]
    lists[where][1] = apart(lists[where][1])
    mixed = ListExpertWeights([lists[0]], lists[1])
    ids[:], ids[0, 1], x = torch.tensor([0, 1]), 2, x * tokens
    whole = kernel(x, ids, weights, mixed, spec)
    assert torch.equal(kernel(x[:1], ids[:1], weights[:1], mixed, spec), whole[:1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_short_rows_depend_on_no_neighbour(kernel, layouts, dtype):
    """Rows of few numbers are turned before they are multiplied."""
    spec = ExpertsSpec(w_in_layout=layouts[0], w_out_layout=layouts[1])
    x, ids, weights, bank, _ = random_block(spec, Sizes(T=90, K=2, E=3, H=64, I=50, D=37), dtype, seed=15)
    whole = kernel(x, ids, weights, bank, spec)
    for chosen in ([0], [7, 3], list(range(5)), list(range(13, 30)), list(range(80))):
        assert torch.equal(kernel(x[chosen], ids[chosen], weights[chosen], bank, spec), whole[chosen]), chosen


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_many_columns_and_rows_of_weights_in_out(kernel, dtype):
    """(in, out) weights are read a group of rows and a task's columns at a time, and how many depends on the tokens."""
    spec = ExpertsSpec(w_in_layout="io", w_out_layout="io")
    x, ids, weights, bank, _ = random_block(spec, Sizes(T=40, K=1, E=1, H=150, I=1300, D=1100), dtype, seed=15)
    whole = kernel(x, ids, weights, bank, spec)
    want = experts_reference(x, ids, weights, bank, spec).double()
    assert ((whole.double() - want).abs().max() / (16 * torch.finfo(dtype).eps * (want.abs().max() + 1))) <= 1
    for count in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 33):
        assert torch.equal(kernel(x[:count], ids[:count], weights[:count], bank, spec), whole[:count]), count
    assert torch.equal(kernel(x, ids, weights, bank, spec, threads=8), whole)


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bits_depend_on_no_thread(best, dtype, layouts):
    args = block(dtype, layouts)
    want = best(*args)
    for threads in range(1, 9):
        for _ in range(3):
            assert torch.equal(best(*args, threads=threads), want), threads


def test_two_threads_call_at_once(best):
    cases = [block(torch.float32, layouts) for layouts in LAYOUTS]
    want = [best(*args) for args in cases]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    wrong = []

    def work(me):
        for turn in range(20):
            i = (me + turn) % len(cases)
            with torch.no_grad():
                if not torch.equal(best(*cases[i], threads=3), want[i]):
                    wrong.append((me, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout=120)
    finally:
        torch.set_num_threads(before)
    assert not wrong and not any(t.is_alive() for t in threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own(best):
    args = block(torch.float32, LAYOUTS[0])
    want = best(*args, threads=4)  # the parent's threads exist, and a child has none of them

    def calls():
        assert all(torch.equal(best(*args, threads=4), want) for _ in range(3))

    assert ended_well(calls)
    assert torch.equal(best(*args, threads=4), want)


LOADED_IN_A_CHILD = """
import os, signal, sys, torch
torch.set_num_threads(3)
x = torch.rand(1 << 20)
# OpenMP's threads exist now, and a child has none of them
x = x.sin() + torch.rand(600, 600).mm(torch.rand(600, 600)).sum()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(60)  # ends a child that waits for ever
torch.set_num_threads(1)
from pathlib import Path
from moeopt.ops.native import build, library
from tests.ops.native.conftest import Kernel
from tests.ops.native.test_isolation import LAYOUTS, block
best = Kernel(Path(sys.argv[1]), build.isas_here()[-1])
args = block(torch.float32, LAYOUTS[0])
assert torch.equal(best(*args, threads=3), best(*args))
os._exit(7)
"""


@pytest.mark.skipif(not TASKS.is_dir(), reason="this system has no /proc")
def test_a_child_of_what_used_openmp_before_the_kernel_was_loaded(whole_library):
    words = [sys.executable, "-c", LOADED_IN_A_CHILD, str(whole_library)]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 7, out.stderr[-2000:]


def state_of(stat):
    """R where a thread runs or waits for a core, S where it sleeps."""
    return stat.read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not TASKS.is_dir(), reason="this system has no /proc")
def test_no_thread_runs_between_calls(best):
    def states():
        return [state_of(t) for t in TASKS.glob("*/stat")]

    best(*block(torch.float32, LAYOUTS[0]), threads=4)
    deadline = time.monotonic() + 60  # a machine at work may take its time to put them to sleep
    while states().count("R") > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert states().count("R") <= 1, "only the thread that asks is awake"


@pytest.mark.skipif(not TASKS.is_dir(), reason="this system has no /proc")
def test_a_call_waits_for_no_thread_that_has_no_core(best):
    """Each thread of the kernel stands still in a signal's handler, as one does whose core another program has."""

    def calls_while_they_stand_still():
        before = {task.name for task in TASKS.iterdir()}
        assert torch.equal(best(*args, threads=3), want)
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGUSR1, ctypes.cast(libc.pause, ctypes.c_void_p))
        held = {task.name for task in TASKS.iterdir()} - before
        assert len(held) == 2, held
        while any(state_of(TASKS / thread / "stat") != "S" for thread in held):  # not while one has the pool's lock
            time.sleep(0.01)
        for thread in held:
            assert libc.tgkill(os.getpid(), int(thread), signal.SIGUSR1) == 0
        time.sleep(0.1)
        assert all(torch.equal(best(*args, threads=3), want) for _ in range(20))

    args = block(torch.float32, LAYOUTS[0])
    want = best(*args)
    assert ended_well(calls_while_they_stand_still)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_is_not_finite_stays_in_its_token(kernel, layouts, bad, dtype):
    x, ids, weights, bank, spec = block(dtype, layouts, T=20)
    clean = kernel(x, ids, weights, bank, spec)
    dirty_x, dirty_w = x.clone(), weights.clone()
    dirty_x[3], dirty_w[11, 0] = bad, bad
    dirty = kernel(dirty_x, ids, dirty_w, bank, spec)
    others = [t for t in range(20) if t not in (3, 11)]
    assert torch.equal(dirty[others], clean[others])
    assert not dirty[3].isfinite().all() and not dirty[11].isfinite().any()


@pytest.mark.parametrize("rule", ("nothing", "identity"))
def test_a_weight_of_no_expert_is_not_read(kernel, rule):
    x, ids, weights, bank, spec = random_block(ExpertsSpec(out_of_range=rule), Sizes(T=4))
    ids[0], weights[0] = torch.tensor([0, -1]), torch.tensor([1.0, torch.nan])
    assert kernel(x, ids, weights, bank, spec).isfinite().all()


def test_an_expert_that_no_token_names_is_not_read(kernel):
    x, ids, weights, bank, spec = random_block(ExpertsSpec(), Sizes(T=6, E=4))
    ids[:] = ids % 2
    want = kernel(x, ids, weights, bank, spec)
    for w in (*bank.w_in_s, bank.w_out_s):
        w[2:] = torch.nan
    assert torch.equal(kernel(x, ids, weights, bank, spec), want)


def test_inputs_are_left_as_they_are_and_the_result_is_new(kernel):
    args = random_block(ExpertsSpec(rows="plain", activation="identity"), Sizes(T=5))
    x, ids, weights, bank, _ = args
    held = [t.clone() for t in (x, ids, weights, *bank.w_in_s, bank.w_out_s)]
    y = kernel(*args)
    for before, now in zip(held, (x, ids, weights, *bank.w_in_s, bank.w_out_s), strict=True):
        assert torch.equal(before, now) and y.untyped_storage().data_ptr() != now.untyped_storage().data_ptr()


def test_many_tokens_for_one_expert_and_hidden_rows_in_batches(best):
    """More rows than a segment holds, and more hidden numbers than are alive at once."""
    g = torch.Generator().manual_seed(0)
    bank = StackedExpertWeights([torch.randn(2, 2 * 8400, 8, generator=g)], torch.randn(2, 8, 8400, generator=g) / 90)
    x, weights = torch.randn(1500, 8, generator=g), torch.rand(1500, 2, generator=g)
    ids = torch.tensor([[0, 1]]).repeat(1500, 1)
    args = x, ids, weights, bank, ExpertsSpec(activation="relu")
    want = experts_reference(*args)
    assert ((best(*args, threads=2) - want).abs().max() / want.abs().max()) < 64 * 1.2e-7
