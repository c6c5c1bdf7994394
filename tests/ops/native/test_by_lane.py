"""Many rows of an expert multiplied lane by lane: the bits of dot products, for every kind of W and of call."""

import ctypes
import dataclasses
import threading

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.native import build, by_lane, library
from moeopt.ops.native.by_lane import BY_LANE, HAVE_LANES, by_lane_differs, by_lane_pays
from moeopt.ops.native.call import call, prepared_call
from moeopt.ops.native.hidden import Hidden
from moeopt.ops.native.library import NoLibrary, checked
from tests.ops.native.blocks import Sizes, random_block
from tests.ops.native.conftest import Kernel, here


@pytest.fixture(params=[isa for isa in ("avx512", "avx512_bf16") if isa in build.ISAS])
def lanes(request, whole_library):
    if request.param not in here(whole_library):
        pytest.skip(f"this CPU has no {request.param}")
    return Kernel(whole_library, request.param).library


def both(library, args, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return [call(library.run, *args, isa) for isa in (library.bit, library.bit | BY_LANE)]
    finally:
        torch.set_num_threads(before)


def same(one, other):
    return torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0))


# k of one chunk and of several, whole vectors and not, odd numbers of pairs; rows below, at and above a turn's
SIZES = [
    Sizes(T=13, K=1, E=1, H=256, I=290, D=33),
    Sizes(T=25, K=1, E=1, H=258, I=256, D=40),
    Sizes(T=29, K=1, E=1, H=256, I=256, D=33),
    Sizes(T=60, K=2, E=3, H=300, I=271, D=70),
    Sizes(T=150, K=1, E=1, H=257, I=1100, D=16),
    Sizes(T=300, K=1, E=1, H=2081, I=290, D=65),
    Sizes(T=61, K=2, E=3, H=40, I=263, D=31),  # the first product is too short for it, the second is not
    Sizes(T=61, K=2, E=3, H=259, I=40, D=31),
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.T}x{s.H}x{s.I}")
@pytest.mark.parametrize("dtypes", (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"),
                                    ("float32", "bfloat16"), ("bfloat16", "float32")), ids="-".join)  # fmt: skip
def test_the_bits_of_dot_products(lanes, sizes, dtypes):
    x, w = (getattr(torch, name) for name in dtypes)
    for seed, rows in enumerate(("gate|up", "separate", "interleaved", "interleaved_up", "plain", "up|gate")):
        spec = ExpertsSpec(rows=rows, weight_on=("output", "input")[seed % 2], up_offset=1.0, gate_max=0.7)
        args = random_block(spec, sizes, x, w, seed=5 * seed, strange_ids=sizes.T > 25, stacked=seed % 2 == 0)
        one, other = both(lanes, args, threads=1 + seed % 3)
        assert same(one, other), (spec, sizes)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_is_no_number_stays_with_its_token(lanes, dtype, bad):
    args = random_block(ExpertsSpec(), Sizes(T=40, K=1, E=1, H=300, I=271, D=33), dtype)
    clean = both(lanes, args)[1]
    args[0][7, 299] = bad
    y = both(lanes, args)[1]
    others = [t for t in range(40) if t != 7]
    assert torch.equal(y[others], clean[others]) and not y[7].isfinite().any()


def test_a_token_s_bits_are_those_that_it_has_alone(lanes):
    for dtype in (torch.float32, torch.bfloat16):
        x, ids, weights, bank, spec = random_block(ExpertsSpec(), Sizes(T=50, K=2, E=2, H=320, I=288, D=48), dtype)
        whole = both(lanes, (x, ids, weights, bank, spec))[1]
        for t in (0, 23, 49):
            row = slice(t, t + 1)
            assert torch.equal(both(lanes, (x[row], ids[row], weights[row], bank, spec))[1], whole[row])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_a_backward_pass_reads_is_kept(lanes, dtype):
    args = random_block(ExpertsSpec(), Sizes(T=60, K=1, E=2, H=300, I=271, D=33), dtype)
    kept = []
    for isa in (lanes.bit, lanes.bit | BY_LANE):
        hidden = Hidden()
        with torch.no_grad():
            prepared_call(lanes.run, *args, isa, hidden=hidden)
        kept.append(hidden.rows)
    assert torch.equal(*kept)


def test_the_check_at_load_compares_both(lanes):
    assert by_lane_differs(lanes.run, lanes.bit) == ""

    def damaged(address):
        return lanes.run(address) if not _isa_of(address) & BY_LANE else _one_bit_off(lanes.run, address)

    wrong = dataclasses.replace(lanes, run=damaged)
    assert by_lane_differs(damaged, lanes.bit) == "29 rows of float32 have other bits lane by lane"
    with pytest.raises(NoLibrary, match="computes something else than the reference here .29 rows of float32 have"):
        checked(wrong)


def _words(address):
    return (ctypes.c_int64 * 34).from_address(address.value)


def _isa_of(address):
    return _words(address)[31]


def _one_bit_off(run, address):
    status = run(address)
    ctypes.c_uint32.from_address(_words(address)[19]).value ^= 1
    return status


def test_another_thread_gets_the_kernel_while_it_is_measured(lanes, monkeypatch):
    """One that measures something else waits for nobody with the lock of measurements in its hands."""
    seen = []

    def ask():
        seen.append(library._lock.acquire(blocking=False))
        if seen[0]:
            library._lock.release()

    def pays(run, isa, name):
        asks = threading.Thread(target=ask)
        asks.start()
        asks.join()
        return True

    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setattr(library, "load", lambda: lanes)
    monkeypatch.setattr(library, "by_lane_pays", pays)
    monkeypatch.setattr(library, "_lock", threading.RLock())
    assert lanes.by_lane is None and library.library().by_lane and library._found.by_lane and seen == [True]


def test_it_is_taken_where_it_was_the_faster(lanes, monkeypatch):
    asked, answers = [], ["by lane", "dot products"]

    def fastest(question, ways, default, advantage):
        asked.append((question, sorted(ways()), default))
        return answers[len(asked) - 1]

    monkeypatch.setattr(by_lane, "fastest", fastest)
    for taken in (True, False):
        assert by_lane_pays(lanes.run, lanes.bit, lanes.isa) is taken
        assert dataclasses.replace(lanes, by_lane=taken).bit == lanes.bit | (BY_LANE if taken else 0)
    assert asked[0] == (f"many rows of an expert, {lanes.isa}", ["by lane", "dot products"], "dot products")
    assert lanes.isa in HAVE_LANES
