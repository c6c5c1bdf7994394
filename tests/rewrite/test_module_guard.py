"""A change in code that a rewrite leaves out is seen, where it happened and by whom it is run."""

import pickle

import pytest
import torch
from torch import nn

from moeopt.rewrite.module_facts import hook_count, take_facts
from moeopt.rewrite.module_guard import Watch
from tests.recognise.tiny import MoE, ffn, seeded

EXPERTS = {e: {f"experts.{e}.0.weight", f"experts.{e}.2.weight"} for e in range(4)}


def watched(live=("router",), written=(), mode=False):
    module = seeded(MoE)
    module.top_k, module.act, module.sizes, module.experts[1].scale = 2, torch.relu, [1, 2], 1.5
    facts = take_facts(module, live, written, mode)
    return module, facts, Watch(module, facts, EXPERTS)


def test_nothing_changed():
    module, facts, watch = watched()
    module.router.note = 1  # live: it is called as it is
    with torch.no_grad():
        module.experts[0][0].weight.zero_()  # weights are read live
    assert watch.shared() == watch.everything() == "" and not any(watch.expert(e) for e in range(4))
    assert pickle.loads(pickle.dumps(facts)) == facts and "router" not in {f.path for f in facts}


@pytest.mark.parametrize(
    ("change", "expert", "text"),
    [
        (lambda m: setattr(m, "top_k", 3), None, "top_k of the block is 3 and was 2"),
        (lambda m: setattr(m, "act", torch.tanh), None, "act of the block is "),
        (lambda m: m.sizes.append(3), None, "sizes of the block is [1, 2, 3] and was [1, 2]"),
        (lambda m: delattr(m, "act"), None, "'act' was removed from the block"),
        (lambda m: setattr(m.experts[1], "scale", 2.0), 1, "scale of experts.1 is 2.0 and was 1.5"),
        (lambda m: m.experts.__setitem__(3, ffn()), None, "a module in experts was replaced"),
        (lambda m: m.experts[2].__setitem__(1, nn.GELU()), 2, "a module in experts.2 was replaced"),
        (lambda m: setattr(m.experts[2][0], "forward", len), 2, "forward was replaced on experts.2.0"),
        (
            lambda m: m.experts[0].register_forward_hook(len),
            0,
            "a hook was registered on experts.0, which is no longer",
        ),
        (lambda m: m.experts[0][2].register_full_backward_pre_hook(len), 0, "a hook was registered on experts.0.2"),
        (
            lambda m: setattr(m.experts[1][1], "__class__", nn.GELU),
            1,
            "the class of experts.1.1, or its forward, is not the",
        ),
        (
            lambda m: setattr(m.experts[2][0], "_parameters", dict(m.experts[1][0]._parameters)),
            2,
            "_parameters of experts.2.0 was replaced",
        ),
        (
            lambda m: setattr(m.experts[0], "_modules", dict(m.experts[1]._modules)),
            0,
            "_modules of experts.0 was replaced",
        ),
        (
            lambda m: setattr(m.experts, "_modules", {str(n): ffn() for n in range(4)}),
            None,
            "_modules of experts was replaced",
        ),
        (lambda m: m.__dict__.update(seeded(MoE).__dict__), None, "_modules of the block was replaced"),
        (
            lambda m: m.experts[3][2].__dict__.update(weight=torch.zeros(1)),
            3,
            "weight of experts.3.2 is an attribute of the instance, and was a Parameter or buffer alone",
        ),
    ],
)
def test_a_change_is_told_by_those_who_run_it(change, expert, text):
    module, _, watch = watched()
    change(module)
    assert text in watch.everything()
    assert (watch.shared() != "") == (expert is None)
    assert [e for e in range(4) if watch.expert(e)] == ([] if expert is None else [expert])


def test_a_forward_that_a_class_got_later():
    class Act(nn.ReLU):
        pass

    module = seeded(lambda: MoE(lambda: ffn(Act)))
    watch = Watch(module, take_facts(module, ("router",), (), False), EXPERTS)
    Act.forward = lambda self, x: x
    assert "the class of experts.0.1, or its forward, is not the one that was verified" in watch.everything()


def test_a_bias_that_was_absent():
    module = seeded(lambda: MoE(lambda: ffn(bias=False)))
    watch = Watch(module, take_facts(module, ("router",), (), False), EXPERTS)
    module.experts[2][0].bias = nn.Parameter(torch.ones(12))
    assert watch.expert(2) == "experts.2.0 has a bias, and had none"


def test_a_bias_that_was_absent_in_another_table():
    module = seeded(MoE)
    module.norm = nn.LayerNorm(8, bias=False)
    watch = Watch(module, take_facts(module, ("router",), (), False), EXPERTS)
    module.norm._parameters = nn.LayerNorm(8)._parameters
    assert watch.shared() == "_parameters of norm was replaced"


def test_the_training_flag_counts_only_where_modes_differ():
    for mode in (False, True):
        module, _, watch = watched(mode=mode)
        module.train()
        assert bool(watch.everything()) == mode


def test_what_the_forward_itself_writes_may_change():
    module, _, watch = watched(written=[("", "top_k")])
    module.top_k = 7
    assert watch.everything() == ""


def test_a_module_that_is_gone():
    module, facts, _ = watched()
    del module.experts[1][1]
    assert "was removed" in Watch(module, facts, EXPERTS).shared()


def test_hooks_are_counted():
    module = ffn()
    assert hook_count(module) == 0
    module.register_forward_hook(len)
    module.register_forward_pre_hook(len)
    module.register_full_backward_hook(len)
    assert hook_count(module) == 3


class Adapter(nn.Module):
    """A home-made expert whose code looks at what it holds."""

    def __init__(self):
        super().__init__()
        self.body = ffn(bias=False)
        self.register_buffer("shift", None)

    def forward(self, x):
        y = self.body(x) if self.shift is None else self.body(x) + self.shift
        for extra in list(self.children())[1:]:
            y = y + extra(x)
        return y


IN_BODIES = {e: {f"experts.{e}.body.0.weight", f"experts.{e}.body.2.weight"} for e in range(4)}


def to_the_end(table, name):
    table[name] = table.pop(name)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.experts[1].body.append(nn.Tanh()), "the module 3 was added to experts.1.body"),
        (lambda m: setattr(m.experts[1], "lora", nn.Linear(8, 8)), "the module lora was added to experts.1"),
        (lambda m: m.experts.append(Adapter()), "the module 4 was added to experts"),
        (lambda m: setattr(m, "extra", nn.Linear(8, 8)), "the module extra was added to the block"),
        (lambda m: to_the_end(m.experts._modules, "0"), "the modules in experts are in another order"),
        (lambda m: to_the_end(m.experts[1].body._modules, "0"), "the modules in experts.1.body are in another order"),
        (lambda m: setattr(m.experts[1], "shift", torch.ones(8)), "experts.1 has a shift, and had none"),
        (lambda m: m.experts[1].register_buffer("own", torch.ones(8)), "buffer own was added to experts.1"),
        (lambda m: setattr(m, "gain", nn.Parameter(torch.ones(8))), "the Parameter or buffer gain was added to the"),
    ],
)
def test_what_is_added_or_moved_is_told(change, text):
    module = seeded(lambda: MoE(Adapter))
    watch = Watch(module, take_facts(module, ("router",), (), False), IN_BODIES)
    assert watch.everything() == ""
    change(module)
    expert = next((e for e in range(4) if watch.expert(e)), None)
    assert text in (watch.shared() if expert is None else watch.expert(expert))


def test_what_pytorchs_own_code_does_not_read_and_what_the_forward_adds_is_no_change():
    module = seeded(lambda: MoE(Adapter))
    watch = Watch(module, take_facts(module, ("router",), [("", "last"), ("experts.1", "shift")], False), IN_BODIES)
    module.register_buffer("last", torch.ones(3))
    module.experts[1].shift = torch.ones(8)
    module.experts[1].body[0].register_buffer("statistics", torch.ones(3))
    assert watch.everything() == "" and not any(watch.expert(e) for e in range(4))
