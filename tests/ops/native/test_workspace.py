"""The memory that a call of the kernel works in is taken over by the next one, and nothing of what it holds is."""

import gc
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from tests.ops.native.blocks import Sizes, random_block

PAGE = resource.getpagesize()


def block(tokens, dtype=torch.float32, experts=16, width=64):
    x, ids, weights, bank, spec = random_block(
        ExpertsSpec(), Sizes(tokens, 4, experts, width, 2 * width, width), dtype, biases=False
    )
    return x.contiguous(), ids, weights, bank, spec


def pages_of(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux counts them")
def test_no_new_pages_for_what_a_call_works_in(kernel):
    """They took more than half of the time of 512 tokens of small experts."""
    args = block(512)
    rows = args[1].numel()
    works_in = rows * (64 + 128 + 64) * 4 // PAGE
    results = []
    for _ in range(3):
        results.append(kernel(*args))
    gc.collect()
    calls = 10
    pages = pages_of(lambda: [results.append(kernel(*args)) for _ in range(calls)])
    own = calls * (results[0].numel() * 4 // PAGE + 2)  # of the results, which are kept here
    assert works_in > 400 and pages - own < calls * works_in / 10, (pages, own, works_in)


def test_what_a_call_left_behind_is_not_read(kernel):
    wanted = [kernel(*block(tokens, dtype)) for tokens in (5, 64, 200) for dtype in (torch.float32, torch.bfloat16)]
    for tokens in (512, 90, 17):
        x, *rest = block(tokens)
        assert kernel(torch.full_like(x, torch.nan), *rest).isnan().all()
    got = [kernel(*block(tokens, dtype)) for tokens in (5, 64, 200) for dtype in (torch.float32, torch.bfloat16)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_callers_at_the_same_time_work_apart(kernel):
    blocks = [block(tokens) for tokens in (300, 40, 300, 511)]
    wanted = [kernel(*one) for one in blocks]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            got = list(callers.map(lambda one: kernel(*one), blocks))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
