"""Expert ids that name none of a block's experts: never another result than the block's own code, and no silent one."""

import warnings

import pytest
import torch

import moeopt
from moeopt.errors import StaleModelWarning
from moeopt.pipeline import id_probe
from moeopt.rewrite.id_range import IdRange, ids_within
from moeopt.rewrite.install import rewritten_forward
from tests.pipeline.given_ids import (
    BLOCKS,
    OUTSIDE,
    E,
    Hashed,
    LoopOverAll,
    LoopOverUnique,
    OneMore,
    call,
    made,
    outcome,
)
from tests.zoo import CASES


def guards(optimized):
    forward = next(f for m in optimized.modules() if (f := rewritten_forward(m)))
    return [n.args[1:] for n in forward.program.graph().nodes if n.target is ids_within]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_rewritten_block_does_what_its_own_code_does(block):
    model = made(block)
    optimized = moeopt.optimize(model, call())
    assert optimized.report.blocks[0].status == "rewritten"
    for outside in (None, *OUTSIDE):
        want = outcome(model, *call(outside, 13))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleModelWarning)
            got = outcome(optimized, *call(outside, 13))
        assert (want is None) == (got is None), outside
        if want is not None:
            torch.testing.assert_close(got, want)


def test_rows_that_nobody_writes_do_not_decide_which_ids_are_taken(monkeypatch):
    """``torch.empty_like`` may give the memory of the rewritten block's result, which was freed: what nobody writes was
    equal then, and ranks disagreed about the program."""
    last, record, rewritten = [], id_probe.record, id_probe._Probe.rewritten

    def remembered(self, v):
        last[:] = rewritten(self, v) or []
        return list(last)

    def on_that_memory(module, *call, steer):
        def first(func, args, out):
            if "empty" in str(func) and last and out.shape == last[0].shape:
                out.copy_(last[0])
            return steer(func, args, out)

        return record(module, *call, steer=first)

    monkeypatch.setattr(id_probe, "record", on_that_memory)
    monkeypatch.setattr(id_probe._Probe, "rewritten", remembered)
    case = CASES["language_of_each_sequence"]
    optimized = moeopt.optimize(case.build(), case.inputs()[0], verify="off")
    assert [guard[1:3] for guard in guards(optimized)] == [(0, case.experts - 1)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_bundle_gives_the_same_or_stops(block, tmp_path):
    model = made(block)
    moeopt.optimize(model, call()).save(tmp_path / "bundle")
    engine = moeopt.load(tmp_path / "bundle")
    for outside in (None, *OUTSIDE):
        want, got = outcome(model, *call(outside)), outcome(engine, *call(outside))
        assert (want is None) == (got is None), outside
        if want is not None:
            torch.testing.assert_close(got, want)


def test_what_a_bundle_says_of_an_id_outside(tmp_path):
    moeopt.optimize(made(LoopOverUnique), call()).save(tmp_path / "bundle")
    with pytest.raises(moeopt.errors.BundleError, match="outside the range of expert ids that was verified"):
        moeopt.load(tmp_path / "bundle")(*call(E))


@pytest.mark.parametrize(
    ("block", "guard"),
    [(LoopOverUnique, [(E, -E, E - 1, True)]), (LoopOverAll, []), (OneMore, [(E, 0, E, False)])],
)
def test_only_ids_that_need_it_are_held_back(block, guard):
    assert guards(moeopt.optimize(made(block), call())) == guard


def test_the_warning_names_the_id_and_the_range_and_the_block_stays_rewritten():
    optimized = moeopt.optimize(made(OneMore), call())
    with pytest.warns(StaleModelWarning, match=f"with the expert id {E + 3}, and ids from 0 to {E} were verified"):
        assert outcome(optimized, *call(E + 3)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(*call())


def test_ids_written_into_a_table_of_the_block():
    model = made(Hashed)
    x, _, weights = call()
    tokens = torch.randint(32, (10,), generator=torch.Generator().manual_seed(1))
    optimized = moeopt.optimize(model, (x, tokens, weights))
    for value in (-1, E):
        for one in (model, optimized):
            next(b for name, b in one.named_buffers() if name.endswith("table"))[int(tokens[2]), 0] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleModelWarning)
            want, got = outcome(model, x, tokens, weights), outcome(optimized, x, tokens, weights)
        assert (want is None) == (got is None) == (value == E)
        if want is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_of_a_narrow_dtype_wrap_as_well(dtype):
    model = made(LoopOverUnique)
    optimized = moeopt.optimize(model, (call()[0], call()[1].to(dtype), call()[2]))
    x, ids, weights = call(-2)
    torch.testing.assert_close(optimized(x, ids.to(dtype), weights), model(x, ids.to(dtype), weights))


def test_an_exported_graph_stops_at_an_id_outside():
    class Within(torch.nn.Module):
        def forward(self, ids):
            return ids_within(ids, E, -E, E - 1, True)

    graph = torch.export.export(Within(), (torch.zeros(3, 2, dtype=torch.long),)).module()
    assert graph(torch.tensor([[-1, 0]] * 3)).tolist() == [[E - 1, 0]] * 3
    for outside in (-E - 1, E):
        with pytest.raises((IndexError, RuntimeError)):
            graph(torch.tensor([[outside, 0]] * 3))


def test_a_range_without_ends_is_free():
    assert IdRange().free and not IdRange(0).free and not IdRange(None, 3).free


class Around(torch.nn.Module):
    """A block that is called with ids, in a model that makes them from scores, or passes them on."""

    def __init__(self, passes_on):
        super().__init__()
        self.router, self.experts, self.passes_on = torch.nn.Linear(8, E), LoopOverUnique(), passes_on

    def forward(self, x, ids, weights):
        if not self.passes_on:
            weights, ids = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, ids, weights)


@pytest.mark.parametrize("passes_on", [False, True])
def test_ids_that_the_model_around_a_block_bounds_are_not_held_back(passes_on):
    model = made(lambda: Around(passes_on))
    optimized = moeopt.optimize(model, call())
    assert guards(optimized) == ([(E, -E, E - 1, True)] if passes_on else [])
    torch.testing.assert_close(optimized(*call(-1)), model(*call(-1)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_an_id_that_wraps_may_be_beyond_the_numbers_of_its_dtype(dtype):
    ids = torch.tensor([[-1, -120], [3, 127]], dtype=dtype)
    assert ids_within(ids, 200, -200, 199, True).tolist() == [[199, 80], [3, 127]]
