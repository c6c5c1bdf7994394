"""What is kept of a forward when one of its tensors is computed otherwise."""

import pytest
import torch
from torch import nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import descendants
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.rewrite.kept_steps import StepRef
from moeopt.rewrite.plan_kept_steps import NodeRewrite, kept_steps, tensor_leaf
from tests.capture.tiny import rand

H = 4
aten = torch.ops.aten


class Block(nn.Module):
    """``inner`` stands for the experts: its matmul is replaced."""

    def __init__(self):
        super().__init__()
        self.gate, self.inner, self.norm = nn.Linear(H, H), nn.Linear(H, H, bias=False), nn.LayerNorm(H)
        self.register_buffer("load", torch.zeros(H))

    def forward(self, x):
        return self.norm(self.inner(x) + self.gate(x).sigmoid())


def planned(block, *args):
    """The plan with ``inner``'s product replaced by a call of ``aten.neg``."""
    tape = record(block, args or (rand(3, H),))
    call = next(c for c in tape.calls if c.path == "inner")
    node = next(n for n in tape.nodes[call.first : call.last] if op_name(n) in ("mm", "linear"))
    source = node.args[0]
    inside = {node, *descendants(tape, [node])}
    change = NodeRewrite(node, [source], inside, lambda plan, ref: plan.call(aten.neg.default, ref(source)))
    return kept_steps(tape, [change])


def kinds(plan):
    return [(s.kind, s.target if isinstance(s.target, str) else str(s.target).split(".")[1]) for s in plan.steps]


def test_submodules_are_called_whole_and_the_rest_stays_as_calls():
    plan = planned(Block())
    assert ("module", "gate") in kinds(plan) and ("module", "norm") in kinds(plan) and ("call", "neg") in kinds(plan)
    assert not any("inner" in str(s.target) for s in plan.steps)
    assert plan.kept_modules == ["gate", "norm"] and isinstance(plan.output, StepRef)
    assert [s.kind for s in plan.steps].count("input") == 1


class Branching(Block):
    def forward(self, x):
        unused = self.gate(x)  # noqa: F841
        return {"y": self.inner(x), "x": x, "n": 3}


def test_what_no_output_needs_is_gone():
    plan = planned(Branching())
    assert [k for k, _ in kinds(plan)] == ["input", "call"]
    assert plan.output == {"y": StepRef(1), "x": StepRef(0), "n": 3}


class Pair(nn.Module):
    def forward(self, x):
        return {"a": x * 2, "b": [x * 3, None]}


class Containers(Block):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        got = self.pair(x)
        return self.inner(x) + got["b"][0]


def test_tensors_of_a_modules_output_are_picked_out():
    plan = planned(Containers())
    picks = [s for s in plan.steps if s.target is tensor_leaf]
    assert [s.args[1] for s in picks] == [0, 1]
    tree = {"a": torch.zeros(1), "b": [torch.ones(1), None]}
    assert tensor_leaf(tree, 1).item() == 1 and tensor_leaf((torch.zeros(1), torch.ones(1)), 1).item() == 1


class Views(Block):
    def forward(self, x):
        return self.inner(x).view(-1)


def test_views_become_reshapes_for_inputs_may_be_strided():
    assert ("call", "reshape") in kinds(planned(Views())) and ("call", "view") not in kinds(planned(Views()))


class Counting(Block):
    def forward(self, x):
        self.load += x.sum(0)
        self.last = self.gate(x)
        return self.inner(x)


def test_writes_to_buffers_and_stored_tensors_are_kept():
    plan = planned(Counting())
    ((source, final),) = plan.mutations
    assert plan.steps[source.step].target == "load" and plan.steps[final.step].kind == "call"
    assert set(plan.attributes) == {("", "last")} and plan.steps[plan.attributes["", "last"].step].target == "gate"


class Constant(Block):
    def forward(self, x):
        return self.inner(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_tensors_from_outside_are_constants():
    assert "constant" in [k for k, _ in kinds(planned(Constant()))]


# -- refusals ----------------------------------------------------------------------------------------


class Leaks(Block):
    def forward(self, x):
        h = self.inner(x)
        return h + 1, h * 2


def test_an_output_from_inside_is_declined():
    tape = record(Leaks(), (rand(3, H),))
    add, mul = (next(n for n in tape.nodes if op_name(n) == name) for name in ("add", "mul"))
    product = mul.args[0]
    change = NodeRewrite(
        add, [tape.args[0]], {product, add, mul}, lambda plan, ref: plan.call(aten.neg.default, ref(tape.args[0]))
    )
    with pytest.raises(Declined, match=r"a result of single experts \(mul\) is used outside the experts' sum; return it "  # noqa: E501
                       "from the experts only if you need it") as caught:  # fmt: skip
        kept_steps(tape, [change])
    assert "test_plan_kept_steps.py:" in caught.value.where


class PythonCounter(Block):
    seen = 0

    def forward(self, x):
        self.seen += 1
        return self.inner(x)


class PythonCounterInside(Block):
    def forward(self, x):
        self.history = [x.sum(), 3]
        return self.inner(x)


@pytest.mark.parametrize(("make", "name"), [(PythonCounter, "seen"), (PythonCounterInside, "history")])
def test_a_python_attribute_that_changes_is_declined(make, name):
    with pytest.raises(
        Declined, match=f"its forward changes the Python attribute {name}, which a graph cannot repeat; store"
    ):
        planned(make())


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(H))

    def forward(self, x):
        self.seen.add_(x.sum(0))
        return x * 2


class SkippedWrite(Block):
    """A submodule whose result nobody needs writes to a buffer."""

    def __init__(self):
        super().__init__()
        self.stats = Statistics()

    def forward(self, x):
        self.stats(x)
        return self.inner(x)


def test_a_write_in_a_call_that_would_be_skipped_is_declined():
    with pytest.raises(
        Declined, match="its forward writes to stats.seen in stats, which the rewrite would skip; write it"
    ):
        planned(SkippedWrite())


class Noting(Statistics):
    def forward(self, x):
        self.last, self.kind = x * 2, x.dtype
        return x * 3


class NotedAside(SkippedWrite):
    """A submodule whose result nobody needs stores something."""

    def __init__(self):
        super().__init__()
        self.stats = Noting()


def test_what_a_skipped_call_stores_is_stored_all_the_same():
    plan = planned(NotedAside())
    assert set(plan.attributes) == {("stats", "last"), ("stats", "kind")} and plan.kept_modules == []
    step = plan.steps[plan.attributes["stats", "last"].step]
    assert step.target is aten.mul.Tensor and step.args[1] == 2
    assert plan.attributes["stats", "kind"] is torch.float32


class NotedOnTheWay(NotedAside):
    def forward(self, x):
        return self.inner(x) + self.stats(x)


def test_what_a_kept_call_stores_is_left_to_it():
    plan = planned(NotedOnTheWay())
    assert plan.attributes == {} and plan.kept_modules == ["stats"]


class NotedExperts(Block):
    def forward(self, x):
        self.inner.last = self.inner(x)
        return self.inner.last.sum(0)


def test_what_the_experts_store_is_declined():
    with pytest.raises(
        Declined,
        match="its forward stores inner.last, a result of single experts, which the rewritten code does not compute",
    ):
        tape = record(NotedExperts(), (rand(3, H),))
        node = next(n for n in tape.nodes if op_name(n) in ("mm", "linear"))
        total = next(n for n in tape.nodes if op_name(n) == "sum")
        change = NodeRewrite(total, [tape.args[0]], {node, total}, lambda plan, ref: ref(tape.args[0]))
        kept_steps(tape, [change])


class Handed(Block):
    """Leaves something for a later layer in a dict that both hold."""

    def __init__(self):
        super().__init__()
        self.bag = {}

    def forward(self, x):
        self.bag["gate"] = self.gate(x)
        return self.inner(x)


class Fresh(Handed):
    def forward(self, x):
        self.bag = {"gate": self.gate(x)}
        return self.inner(x)


def test_a_container_that_is_written_into_is_declined_and_a_new_one_is_stored():
    with pytest.raises(
        Declined,
        match="its forward changes the contents of the Python attribute bag in place, which other modules may hold as "
        "well; assign a new container, or return the value instead",
    ):
        planned(Handed())
    assert set(planned(Fresh()).attributes) == {("", "bag")}


class Cast(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            gate = self.gate(x)
        with torch.autocast("cpu", enabled=False):
            return self.norm(self.inner(x) + gate.float().sigmoid())


def test_a_submodule_called_under_autocast_is_kept_as_its_calls():
    plan = planned(Cast())
    assert plan.kept_modules == ["norm"]
    assert sum(kind == ("call", "_to_copy") for kind in kinds(plan)) >= 3  # the input, the weight, and back
