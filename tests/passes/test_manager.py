"""The manager runs passes in order, keeps what stands, and reverts by name what does not."""

import contextlib

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import Declined, UsageError
from moeopt.ops.override import override_experts_impl
from moeopt.ops.reference import experts_reference
from moeopt.options import Options
from moeopt.passes.base import Level, PassRecord
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.manager import PassManager
from moeopt.passes.pipeline import PIPELINE
from moeopt.pipeline.block import rewrite_block
from moeopt.report import Report
from moeopt.rewrite.block_graph import node_name
from tests.capture.tiny import rand
from tests.recognise.tiny import H, HandsOn, MoE, seeded, through

aten = torch.ops.aten
X = rand(6, H)


class Scaled(MoE):
    def forward(self, x):
        return super().forward(x) * 2.0


def scales(block):
    return [n for n in block.graph.nodes if n.target is aten.mul.Tensor and isinstance(n.args[1], float)]


class Times:
    """Multiplies the constant factor of every ``mul`` after the experts by ``by``: wrong unless that is 1."""

    level = Level.ROUNDING

    def __init__(self, by, name="times"):
        self.by, self.name = by, name

    def apply(self, block):
        for node in scales(block):
            node.args = (node.args[0], node.args[1] * self.by)
        return len(scales(block))


class Refuses(Times):
    def apply(self, block):
        raise Declined("its scale is odd", "model.py:7")


class Breaks(Times):
    def apply(self, block):
        super().apply(block)
        raise KeyError("no such node")


class Exact(Times):
    level = Level.EXACT


class Aliases(Times):
    """Returns an input in place of the result."""

    def apply(self, block):
        block.graph.output_node().args = ((block.inputs[0],),)
        return 1


class Invents(Times):
    """Calls a submodule that the user's module has not."""

    def apply(self, block):
        out = block.graph.output_node()
        with block.graph.inserting_before(out):
            out.args = ((block.graph.call_module("no.such", (out.args[0][0],)),),)
        return 1


class Disorders(Times):
    def apply(self, block):
        nodes = list(block.graph.nodes)
        next(n for n in nodes if n.target is aten.mul.Tensor).append(
            next(n for n in nodes if node_name(n) == "experts")
        )
        return 1


class Writes(Times):
    def apply(self, block):
        for node in block.graph.nodes:
            if node.target is aten.mul.Tensor:
                node.target = aten.mul_.Tensor
        return 1


def rewritten(*passes, make=Scaled, options=None, **fields):
    module = seeded(make)
    manager = PassManager(passes, **fields)
    rewrite = rewrite_block("block", module, ((X,), {}), options or Options(), manager=manager)
    return rewrite, {r.name: r for r in rewrite.passes.records}


def scale(rewrite):
    (mul,) = scales(rewrite.program.block)
    return mul.args[1]


def test_a_pass_that_fires_stays_and_is_recorded():
    rewrite, records = rewritten(GroupExperts(), Times(1.0))
    grouped, times = records["group_experts"], records["times"]
    assert (grouped.fired, times.fired, grouped.verified, times.verified) == (1, 1, True, True)
    assert grouped.before["index_add"] == 4 and grouped.after["experts"] == 1 and "index_add" not in grouped.after
    assert times.before == times.after == grouped.after and times.block == "block" and grouped.seconds > 0
    assert rewrite.check.passed is True and scale(rewrite) == 2.0


def test_the_pass_that_is_wrong_is_reverted_by_name_and_the_others_stay():
    rewrite, records = rewritten(GroupExperts(), Times(1.0, "before"), Times(1.01, "wrong"), Times(1.0, "after"))
    assert {n: r.fired for n, r in records.items()} == {"group_experts": 1, "before": 1, "wrong": 0, "after": 1}
    assert records["wrong"].reason.startswith("reverted: the block is not equivalent with it: case ")
    assert records["after"].verified and not records["wrong"].verified
    assert rewrite.check.passed is True and scale(rewrite) == 2.0


def test_a_wrong_first_pass_declines_the_block():
    class Wrong(GroupExperts):
        def apply(self, block):
            fired = super().apply(block)
            return fired and Times(1.01).apply(block)

    with pytest.raises(Declined, match="it was rewritten, verified and reverted: case "):
        rewritten(Wrong(), Times(1.0))


class GivenCopies(MoE):
    """A kept module, which may hand on what it is given, is given a product of one: a copy."""

    def __init__(self):
        super().__init__(same=HandsOn())

    def forward(self, x):
        return super().forward(x), self.same(x * 1.0)


class DropsFactorsOfOne:
    name, level = "drops", Level.EXACT

    def apply(self, block):
        found = [n for n in block.graph.nodes if n.target is aten.mul.Tensor and n.args[1] == 1.0]
        for node in found:
            node.replace_all_uses_with(node.args[0])
            block.graph.erase_node(node)
        return len(found)


def test_what_a_kept_module_is_given_may_be_what_it_gives():
    _, records = through(GivenCopies, DropsFactorsOfOne())
    text = "reverted: it broke the law of the graph: leaf 1 shares memory with input_0, and did not before the pass"
    assert records["drops"].fired == 0 and records["drops"].reason == text


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Refuses(1.0), "its scale is odd (at model.py:7)"),
        (Breaks(3.0), "reverted: it failed itself (KeyError: 'no such node')"),
        (
            Aliases(1.0),
            "reverted: it broke the law of the graph: leaf 0 shares memory with input_0, and did",
        ),
        (Invents(1.0), "reverted: it broke the law of the graph: no_such (call_module): the module has no Module at "),
        (Disorders(1.0), "reverted: it broke the law of the graph: the graph is not in order: "),
        (Writes(1.0), "aten.mul_.Tensor writes to its arguments, which a block graph does not"),
        (Exact(1.0 + 2**-20), "it says that it is exact, and tensor 1 of its results has other bits on a call with"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Times) else "",
)
def test_a_pass_that_does_not_stand_leaves_the_block_as_it_was(bad, reason):
    rewrite, records = rewritten(GroupExperts(), bad)
    assert records["times"].fired == 0 and reason in records["times"].reason, records["times"].reason
    assert scale(rewrite) == 2.0 and rewrite.check.passed is True


def test_an_exact_pass_that_is_exact_stays():
    assert rewritten(GroupExperts(), Exact(1.0))[1]["times"].fired == 1


def test_unverified_is_said_so():
    records = rewritten(GroupExperts(), options=Options(verify="off"))[1]
    assert records["group_experts"].fired == 1 and records["group_experts"].verified is False


# -- which passes run ------------------------------------------------------------------------------


class Off(Times):
    off = "it waits for a kernel"


class Engines(Times):
    engines_only = "PyTorch runs the user's own"


class Lossy(Times):
    level = Level.LOSSY


@pytest.mark.parametrize(
    ("one", "fields", "reason"),
    [
        (Times(1.0), {"skip": ["times"]}, "skipped: skip_passes names it"),
        (Times(1.0), {"only": ["group_experts"]}, "skipped: only_passes names group_experts"),
        (Off(1.0), {}, "off: it waits for a kernel"),
        (Off(1.0), {"only": ["group_experts", "times"]}, ""),
        (Engines(1.0), {}, "for engines only: PyTorch runs the user's own"),
        (Engines(1.0), {"engine": True}, ""),
        (Lossy(1.0), {}, "off: it changes the function"),
        (Times(1.0), {"fuel": 1}, "MOEOPT_FUEL=1: no more passes are applied"),
        (Times(1.0), {"fuel": 2}, ""),
    ],
)
def test_what_runs(one, fields, reason):
    record = rewritten(GroupExperts(), one, **fields)[1]["times"]
    assert (record.reason, record.fired) == (reason, 0 if reason else 1)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = MoE(), MoE()

    def forward(self, x):
        return self.second(self.first(x))


def test_skipping_the_grouping_declines_the_blocks_with_the_reason():
    report = moeopt.optimize(seeded(MoE), X, skip_passes="group_experts").report
    (block,) = report.blocks
    assert block.status == "declined" and block.reason == (
        "skipped: skip_passes names it; without group_experts no other pass applies"
    )
    (record,) = report.passes
    assert (record.name, record.fired, record.reason) == ("group_experts", 0, block.reason)


def test_fuel_counts_applications_over_all_blocks():
    reports = [moeopt.optimize(seeded(Two), X, fuel=fuel, verify="off").report for fuel in (0, 1, 2)]
    assert [len(r.rewritten) for r in reports] == [0, 1, 2]
    assert [sum(p.fired > 0 for p in r.passes) for r in reports] == [0, 1, 2]
    assert reports[1].blocks[1].reason == "MOEOPT_FUEL=1: no more blocks are rewritten"


@pytest.mark.parametrize("option", ["skip_passes", "only_passes", "print_passes"])
def test_an_unknown_name_is_refused_before_anything_runs(option):
    with pytest.raises(UsageError) as caught:
        moeopt.optimize(nn.Linear(2, 2), object(), **{option: ("grup_experts",)})
    names = ", ".join(p.name for p in PIPELINE)
    variable = "" if option == "only_passes" else f" (or MOEOPT_{option.upper()})"
    assert str(caught.value) == (
        f"{option}{variable} names 'grup_experts', which is no pass: did you mean 'group_experts'? "
        f"the passes are {names}"
    )


def test_the_environment_skips_and_prints(monkeypatch, capsys):
    monkeypatch.setenv("MOEOPT_SKIP_PASSES", "group_experts, split_dense_ffn")
    monkeypatch.setenv("MOEOPT_PRINT_PASSES", "1")
    report = moeopt.optimize(seeded(MoE), X).report
    assert report.blocks[0].status == "declined"
    assert "moeopt: group_experts (rounding) on MoE: left it" in capsys.readouterr().err


def test_a_variable_that_skips_a_pass_holds_for_runs_without_that_pass(monkeypatch):
    monkeypatch.setenv("MOEOPT_SKIP_PASSES", "drop_copies")
    report = moeopt.optimize(seeded(MoE), X, passes=(GroupExperts(),), verify="off").report
    assert [r.name for r in report.passes if r.fired] == ["group_experts"]


class Lowerings:
    """A runtime whose first ``bad`` lowerings are wrong; it counts those that were given up."""

    def __init__(self, bad):
        self.bad, self.given_up = bad, 0

    def run_through_backend(self, routers):
        if self.given_up >= self.bad:
            return contextlib.nullcontext()
        return override_experts_impl(lambda x, ids, w, bank, spec: experts_reference(x, ids, w * 1.5, bank, spec))

    def demote(self, reason):
        self.given_up += 1
        return self.given_up < 5


@pytest.mark.parametrize("bad", [0, 1])
def test_a_wrong_pass_costs_no_lowering_and_a_wrong_lowering_no_pass(bad):
    runtime, module = Lowerings(bad), seeded(Scaled)
    manager = PassManager((GroupExperts(), Times(1.0, "right"), Times(1.01, "wrong")), engine=True)
    rewrite = rewrite_block("block", module, ((X,), {}), Options(verify="fast"), runtime, manager=manager)
    assert {r.name: r.fired for r in rewrite.passes.records} == {"group_experts": 1, "right": 1, "wrong": 0}
    assert runtime.given_up == bad and rewrite.check.passed is True


def test_a_wrong_lowering_alone_is_given_up_and_every_pass_stays():
    runtime, module = Lowerings(1), seeded(Scaled)
    manager = PassManager((GroupExperts(), Times(1.0)), engine=True)
    rewrite = rewrite_block("block", module, ((X,), {}), Options(verify="fast"), runtime, manager=manager)
    assert [r.fired for r in rewrite.passes.records] == [1, 1] and runtime.given_up == 1
    assert all(r.verified for r in rewrite.passes.records)


# -- the record ------------------------------------------------------------------------------------


def test_the_report_holds_the_records_and_prints_them_when_asked(capsys):
    quiet = moeopt.optimize(seeded(MoE), X).report
    assert [r.name for r in quiet.passes] == [p.name for p in PIPELINE] and "\npasses\n" not in str(quiet)
    assert capsys.readouterr().err == ""
    told = moeopt.optimize(seeded(MoE), X, print_passes=True).report
    assert "\npasses\n  group_experts (rounding) on MoE: fired 1, " in str(told)
    assert "moeopt: group_experts (rounding) on MoE: fired 1, " in capsys.readouterr().err


def test_only_the_passes_named_are_printed(capsys, monkeypatch):
    report = moeopt.optimize(seeded(MoE), X, print_passes="drop_copies", verify="fast").report
    assert [r.name for r in report.passes] == [p.name for p in PIPELINE]
    monkeypatch.setenv("MOEOPT_PRINT_PASSES", "fold_expert_scale, drop_copies")
    moeopt.optimize(seeded(MoE), X, verify="fast")
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["drop_copies", "drop_copies", "fold_expert_scale"]
    assert str(report).count("(exact) on MoE") == 1 and "group_experts (rounding)" not in str(report)
    assert Report.from_json(report.to_json()) == report
    with pytest.raises(UsageError, match=r"^print_passes=2: it must be True or False, or the name of a pass, or sev"):
        moeopt.Options(print_passes=2)


def test_records_are_json_both_ways():
    report = moeopt.optimize(seeded(MoE), X).report
    again = Report.from_json(report.to_json())
    assert again == report and again.passes[0].level is Level.ROUNDING
    before = Report.from_dict({k: v for k, v in report.to_dict().items() if k not in ("passes", "print_passes")})
    assert before.passes == ()
    with pytest.raises(UsageError, match="not a report: 'nearly' is not a valid Level"):
        Report.from_dict({**report.to_dict(), "passes": [{**report.passes[0].to_dict(), "level": "nearly"}]})


def test_a_record_in_words():
    record = PassRecord("drop", "exact", "mlp", 2, "", 0.25, {"clone": 2, "mul": 1}, {"mul": 1}, True)
    assert str(record) == "drop (exact) on mlp: fired 2, 3 -> 1 nodes, 250 ms"
    assert str(record.reverted("it was wrong")) == "drop (exact) on mlp: left it, 250 ms: reverted: it was wrong"


def test_the_dump_has_the_graph_before_and_after_each_pass_that_fired(tmp_path):
    moeopt.optimize(seeded(MoE), X, dump=tmp_path)
    files = {p.name: p.read_text() for p in tmp_path.rglob("*.graph")}
    assert sorted(files) == ["1-group_experts.after.graph", "1-group_experts.before.graph"]
    assert "index_add(" in files["1-group_experts.before.graph"]
    assert " = experts 0(" in files["1-group_experts.after.graph"]
