"""The experts of a model on two and four ranks: the same numbers, whatever the tokens, the placement and the form."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moeopt
from moeopt.distributed.channel import Channel
from moeopt.distributed.dispatch import Dispatch
from moeopt.distributed.forward import RankExperts
from moeopt.distributed.homes import ExpertHomes
from moeopt.distributed.placements import placements_of
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, experts
from tests.distributed.models import Layers, Stacked, optimised, tokens
from tests.distributed.ranks import run_ranks
from tests.helpers import BUDGET
from tests.zoo import CASES

TIMEOUT = 60.0
FORMS = {
    "rows": {"exact": True}, "ranks": {"exact": False}, "rows of all": {"tokens": "replicated"},
    "reduce": {"tokens": "replicated", "exact": False},
}  # fmt: skip
MODELS = {
    "separate": lambda: optimised(Layers),
    "five stacked": lambda: optimised(Stacked),
    "along another axis": lambda: optimised(Stacked, axis=1),
    "bfloat16": lambda: optimised(Stacked, dtype=torch.bfloat16),
    "any function of a row": lambda: of_zoo("row_layer_scale"),
    "stacks of any function": lambda: of_zoo("row_stacked_bank_with_norm"),
    "more ids than experts": lambda: of_zoo("router_zero_experts"),
    "codes": lambda: optimised(Layers, quantize="int8"),
    "codes of stacks": lambda: optimised(Stacked, quantize="fp8", bias=True),
    "two ops in a block": lambda: of_zoo("whole_two_in_one_forward"),
}
SPECS = {
    "expert order": ExpertsSpec(combine="expert"),
    "weight on input": ExpertsSpec(weight_on="input", rows="separate"),
    "identity": ExpertsSpec(out_of_range="identity"),
    "identity, expert order": ExpertsSpec(out_of_range="identity", combine="expert", accum_dtype="float32"),
    "16-bit sum": ExpertsSpec(accum_dtype="bfloat16", out_dtype="float32"),
    "float64 sum": ExpertsSpec(accum_dtype="float64", compute_dtype="float32"),
}
"""Functions and sums of the op itself, on random experts; ids among them name no expert."""
PLACEMENTS = {"one rank has all but one": [[1], [0], [0], [0]], "copies": [[0, 1], [1], [0], [1, 0]]}


def of_zoo(name):
    case = CASES[name]
    args, kwargs = case.inputs()
    return moeopt.optimize(case.build(), kwargs or args, verify="off")


def differs(got, want, exact=False):
    """How far ``got`` is beyond the budget, in words; "" where it is not."""
    if exact or not got.numel():
        return "" if torch.equal(got, want) else f"{(got != want).sum()} of {got.numel()} values differ"
    far = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    budget = BUDGET[got.dtype] * torch.finfo(got.dtype).eps
    return "" if far <= budget else f"{far:.2g} apart, {budget:.2g} allowed"


def rank_tokens(x, rank, size, how):
    """Rank r's part of ``x`` (dimension 0): evenly, uneven, or all of it on the last rank."""
    count = len(x)
    ends = {
        "evenly": [count * r // size for r in range(size + 1)],
        "uneven": [count * r * r // size**2 for r in range(size + 1)],
        "all on the last": [0] * size + [count],
    }[how]
    return slice(ends[rank], ends[rank + 1])


def numbers(rank, size):
    """{(model, form, how tokens are split or which placement): "" or what differs}."""
    mesh, found = DeviceMesh("cpu", list(range(size))), {}
    with torch.no_grad():
        for name, build in MODELS.items():
            opt = build()
            (x,) = opt._call[0]
            want = opt(x)
            for form, arguments in FORMS.items():
                dist.barrier()
                d = moeopt.distribute(opt, mesh, timeout=TIMEOUT, **arguments)
                exact = arguments.get("exact", True)
                if "tokens" in arguments:
                    found[name, form, "all"] = differs(d(x), want, exact)
                    continue
                for how in ("evenly", "uneven", "all on the last") if x.dim() == 2 else ():
                    mine = rank_tokens(x, rank, size, how)
                    # a router's product on fewer rows may round otherwise, so these bits are asked of the op only
                    found[name, form, how] = differs(d(x[mine]), want[mine])
        opt, x = optimised(Layers), tokens(12)
        want = opt(x)
        for way, placement in PLACEMENTS.items():
            for form, arguments in FORMS.items():
                dist.barrier()
                d = moeopt.distribute(opt, mesh, timeout=TIMEOUT, placement=placement, **arguments)
                mine = slice(None) if "tokens" in arguments else rank_tokens(x, rank, size, "uneven")
                found[way, form, "placed"] = differs(d(x[mine]), want[mine])
        found |= {(name, form, "op"): wrong for (name, form), wrong in ops(rank, size).items()}
    return found


def ops(rank, size):
    """{(spec, form): ""  or what differs}: each dispatch beside the op in one process, where both are exact in bits."""
    channel, E, found = Channel(list(range(size)), "gloo", TIMEOUT), 5, {}
    g = torch.Generator().manual_seed(3)
    for name, spec in SPECS.items():
        for dtype in (torch.float32, torch.bfloat16):
            gates = [[torch.randn(24 if spec.rows == "separate" else 48, 16, generator=g).to(dtype) for _ in range(E)]
                     for _ in range(2 if spec.rows == "separate" else 1)]  # fmt: skip
            downs = [torch.randn(16, 24, generator=g).to(dtype) * 0.2 for _ in range(E)]
            x, w = torch.randn(9, 16, generator=g).to(dtype), torch.rand(9, 3, generator=g).to(dtype)
            ids = torch.randint(-1, E + 2, (9, 3), generator=g)
            want = experts(x, ids, w, ListExpertWeights(gates, downs), spec)
            homes = ExpertHomes([[0], [0], [1], [1], [0]], size)
            own = homes.experts_of(rank)
            local = ListExpertWeights([[part[e] for e in own] for part in gates], [downs[e] for e in own])
            for form, arguments in FORMS.items():
                alike, exact = "tokens" in arguments, arguments.get("exact", True)
                how = "rows" if exact else "reduce" if alike else "ranks"
                dispatch = Dispatch(channel, homes, "op", 0, how, alike, 16, False)
                mine = slice(None) if alike else rank_tokens(x, rank, size, "uneven")
                got = RankExperts(dispatch, local, own).run(x[mine], ids[mine], w[mine], spec, False)
                assert got.dtype == want.dtype
                coarse = spec.accum_dtype == "bfloat16" and not exact  # partial sums are not rounded to 16 bits
                wrong = differs(*(t.bfloat16() if coarse else t for t in (got, want[mine])), exact)
                found[name, form] = found.get((name, form), "") or (wrong and f"{dtype}: {wrong}")
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(numbers, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, *PLACEMENTS, *SPECS])
def test_the_numbers_are_those_of_one_process(found, name, form):
    for rank, seen in enumerate(found):
        cases = {how: wrong for (n, f, how), wrong in seen.items() if (n, f) == (name, form)}
        assert not any(cases.values()), f"rank {rank}: {cases}"
    assert cases or form in ("rows", "ranks")


def everything_else(rank, size):
    """What is kept, told, refused and counted on each rank, as plain values."""
    mesh, seen = DeviceMesh("cpu", list(range(size))), {}
    torch.manual_seed(0)
    opt = moeopt.optimize(Layers(experts=6).eval(), tokens(20), verify="fast")
    before = {n: t.shape for n, t in opt.model.named_parameters()}
    dist.barrier()
    d = moeopt.distribute(opt, mesh, timeout=TIMEOUT, placement={"layers.1": [[3], [2], [1], [0], [3], [2]]})
    seen["parameters"] = sorted(n for n, _ in d.model.named_parameters())
    seen["given"] = {n: t.shape for n, t in opt.model.named_parameters()} == before
    seen["report"], seen["certificate"] = str(d.report), json.loads(d.certificate.to_json())
    with torch.no_grad():
        x = tokens(40)[rank * 10 : rank * 10 + 10]
        seen["same"] = differs(d(x), opt(tokens(40))[rank * 10 : rank * 10 + 10])
    seen["traffic"] = dataclasses.asdict(d.traffic)
    one = optimised(Stacked, top_k=1)
    with torch.no_grad():
        for form, arguments in FORMS.items():
            if not arguments.get("exact", True):
                dist.barrier()
                d = moeopt.distribute(one, mesh, timeout=TIMEOUT, **arguments)
                same = torch.equal(d(tokens(6)), one(tokens(6)))
                seen["one expert a token", form] = same, " ".join(str(d.report).split())
    return seen


@pytest.fixture(scope="module")
def four():
    return run_ranks(everything_else, 4)


def test_each_rank_keeps_its_own_experts_only(four):
    held = [sorted({n.split(".")[3] for n in seen["parameters"] if n.startswith("layers.0.experts")}) for seen in four]
    assert held == [["0", "1"], ["2", "3"], ["4"], ["5"]]  # six neighbours on four ranks
    held = [sorted({n.split(".")[3] for n in seen["parameters"] if n.startswith("layers.1.experts")}) for seen in four]
    assert held == [["3"], ["2"], ["1", "5"], ["0", "4"]]
    assert all(seen["given"] and not seen["same"] for seen in four)
    assert all("layers.0.gate.weight" in seen["parameters"] for seen in four)


def test_report_and_certificate_say_what_was_proved(four):
    for seen in four:
        assert "experts on 4 ranks (2, 2, 1, 1), reached by rows; here: moeopt::experts" in " ".join(
            seen["report"].split()
        )
        assert "placement says nothing of layers.0" in " ".join(seen["report"].split())
        proved, ids = seen["certificate"]["notes"][-2:]
        assert proved.startswith(
            "across 4 ranks (rows): program, placement, versions and weights agree; dispatch is exact"
        )
        assert "8 calls of 2 ops are within the budget of the float64 oracle" in proved
        assert "320 expert choices of the example compared" in ids  # 2 blocks, 20 tokens, 2 each: 3 ranks, and in parts
        (block, other) = seen["certificate"]["blocks"]
        assert block["passed"] and seen["certificate"]["passed"]
        cases = {case["name"]: case for case in block["cases"]}
        assert {"4 ranks: as routed", "4 ranks: every expert", "4 ranks: all to the last expert"} <= set(cases)
        assert cases["4 ranks: as routed"]["ids_compared"] > 0
        assert cases["4 ranks: every expert"]["distance_rewritten"] > 0
        assert four[0]["certificate"]["notes"] == seen["certificate"]["notes"]


def test_what_is_sent_is_counted(four):
    """Rows out and back in float32, of 16 numbers; ids, weights and counts apart."""
    for seen in four:
        traffic = seen["traffic"]
        assert traffic["exchanges"] == 2 * 5  # a meeting, ids, tokens, weights, results; in each of two blocks
        assert traffic["rows"] % (16 * 4) == 0 and 0 < traffic["rows"] <= 2 * 2 * 10 * 2 * 4 * 4 * 16 * 4
        assert traffic["described"] > 0


@pytest.mark.parametrize("form", ["ranks", "reduce"])
def test_of_one_expert_a_token_the_exact_form_sends_no_more(four, form):
    for seen in four:
        same, report = seen["one expert a token", form]
        assert same and ", reached by rows; here:" in report


def test_without_torch_distributed_it_says_how_to_start():
    with pytest.raises(moeopt.UsageError, match="start the script with torchrun and call .*init_process_group"):
        moeopt.distribute(optimised(), None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": "all"}, "tokens='all' must be 'split' or 'replicated'"),
        ({"exact": 1}, "exact=1 must be True or False"),
        ({"timeout": 0}, "timeout=0 must be a number of seconds, 1 or more"),
        ({"placement": [[0]]}, "placement of Block has 1 lists, and the block 4 experts"),
        ({"placement": [[0], [1], [0], [0]]}, "puts expert 1 on ranks [1]: give it one or more different ranks"),
        ({"placement": {"b": [[0]] * 4}}, "placement names 'b', which is no block with experts on several ranks"),
        ({"placement": 3}, "placement is a int; give None"),
        ({"placement": "nowhere.json"}, "placement='nowhere.json' is no file"),
        ({"placement": [1, 2, 3, 4]}, "a placement lists for each expert the ranks that hold it, like [[0],"),
        ({"placement": [["x"]] * 4}, "like [[0], [0], [1], [0, 1]]; got [['x'], ['x'], ['x'], ['x']]"),
        ({"placement": [[0.5]] * 4}, "like [[0], [0], [1], [0, 1]]; got [[0.5], [0.5], [0.5], [0.5]]"),
        ({"placement": {"Block": [[False]] * 4}}, "like [[0], [0], [1], [0, 1]]; got [[False], [False]"),
        (
            {"placement": {"devices": 4, "placements": []}},
            "placement is a plan for 4 devices, and the mesh has 1 ranks: plan with devices=1",
        ),
        ({"placement": {"devices": 1, "placements": []}}, "a plan without a measured load, which places no expert"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(alone, arguments, words):
    with pytest.raises(moeopt.UsageError) as err:
        moeopt.distribute(optimised(), alone, **arguments)
    assert words in str(err.value)


def test_wrong_subjects_are_refused(alone):
    opt = optimised()
    for subject, mesh, words in (
        (opt.model, alone, "takes what moeopt.optimize returned, not a Block: optimise it first"),
        (opt, 3, "mesh is a int; give a torch.distributed DeviceMesh of one dimension"),
        (
            opt,
            DeviceMesh("cpu", [[0]], mesh_dim_names=("dp", "ep")),
            "mesh has 2 dimensions; give the one .* mesh\\['ep'\\]",
        ),
        (moeopt.distribute(opt, alone), alone, "this model is distributed already"),
        (_dense(), alone, "there is nothing to distribute"),
    ):
        with pytest.raises(moeopt.UsageError, match=words):
            moeopt.distribute(subject, mesh)


def _hooked(opt):
    opt.model.experts[0].register_forward_hook(lambda module, args, result: result * 2)


def _fewer(opt):
    opt.model.top_k = 1


@pytest.mark.parametrize(("change", "why"), [(_hooked, "a hook was registered on experts.0"), (_fewer, "top_k of the")])
def test_a_model_that_was_changed_after_it_was_optimised_is_refused(alone, change, why):
    opt = optimised()
    change(opt)
    with pytest.raises(moeopt.UsageError) as err:
        moeopt.distribute(opt, alone)
    told = str(err.value)
    assert told.startswith(f"Block is no longer what was verified ({why}")
    assert told.endswith(", and the ranks would hold the old code: optimise the model again")


@pytest.mark.filterwarnings("ignore::moeopt.errors.StaleModelWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda opt: opt.model.bfloat16(), ("(Block: experts.0.w1.weight is torch.bfloat16 and was torch.float32)",
                                            "x is float32 and the weights are bfloat16", "dtype=, device= of moeopt")),
        (lambda opt: opt.model.experts.double(), ("(Block: experts.0.w1.weight is torch.float64", "example inputs")),
        (lambda opt: opt.model.to("meta"), ("gate.weight of Block is on the meta device", "load the whole model")),
    ],
)  # fmt: skip
def test_a_model_that_was_cast_or_moved_after_it_was_optimised_is_refused(alone, change, words):
    opt = optimised()
    change(opt)
    with pytest.raises(moeopt.UsageError) as err:
        moeopt.distribute(opt, alone)
    assert all(word in str(err.value) for word in words), str(err.value)


def test_a_mesh_of_another_device_than_the_models_is_refused(alone):
    words = r"gate.weight of Block is on 'cpu', and .* on 'cuda': give a mesh .*init_device_mesh\('cpu', ...\).*device="
    with pytest.raises(moeopt.UsageError, match=words):
        moeopt.distribute(optimised(), DeviceMesh("cuda", [0]))


def _dense():
    torch.manual_seed(0)
    return moeopt.optimize(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4), verify="off")


def test_a_profile_and_a_plan_place_the_experts(alone):
    """On one rank: that the forms are read; where experts go is decided by the same functions on any number."""
    opt = optimised()
    load = moeopt.profile(opt.model, [tokens(64)])
    for placement, mesh in ((load, alone), (load.to_dict(), alone), (None, alone.get_group())):
        with torch.no_grad():
            assert torch.equal(moeopt.distribute(opt, mesh, placement=placement)(tokens(5)), opt(tokens(5)))


def test_placements_of_several_ranks():
    hot = {"layers": [{"name": "b", "fired": [8, 1, 1, 1]}, {"name": "b", "fired": [1, 1, 1, 8]}]}
    ops = [("a", 4), ("b", 4), ("b", 4)]
    placed, notes = placements_of(hot, ops, 2)
    assert placed[0] == [[0], [0], [1], [1]] and placed[1][0] != placed[1][1] and placed[2][3] != placed[2][0]
    assert notes == ["placement says nothing of a: neighbouring experts lie on one rank there"]
    plan = {"devices": 2, "placements": [{"layer": "a", "ranks": [[0], [1], [1, 1], [0, 1]]}]}
    assert placements_of(plan, ops[:1], 2) == ([[[0], [1], [1], [0, 1]]], [])
