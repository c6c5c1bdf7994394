"""The law of a block graph: each breach is named with its node. (What passes do wrong: tests/passes/test_manager.)"""

import dataclasses

import pytest
import torch

from moeopt.options import Options
from moeopt.pipeline.block import rewrite_block
from moeopt.rewrite.block_graph import CONSTANT, ExpertWeightRefs, Slot
from moeopt.rewrite.check import LawBroken, aliases, check_block
from tests.capture.tiny import rand
from tests.recognise.tiny import H, I, MoE, seeded

aten = torch.ops.aten


class Cut(MoE):
    """Its result is a view of a copy of the sum; the input comes back as it is."""

    def forward(self, x):
        return super().forward(x)[:, :4], x


@pytest.fixture
def block():
    module = seeded(Cut)
    made = rewrite_block("mlp", module, ((rand(6, H),), {}), Options(verify="off")).program.block
    made.root = module
    return made


def node(block, op, args, before=None):
    with block.graph.inserting_before(before or block.graph.output_node()):
        return block.graph.call_function(op, args)


BREACHES = {
    "a function of somebody else's": (
        lambda b: node(b, print, (b.inputs[0],)),
        r"print_1 \(print\): .* is neither an op, arithmetic on sizes nor a function of moeopt's own",
    ),
    "a write": (lambda b: node(b, aten.add_.Tensor, (b.inputs[0], 1)), r"aten.add_.Tensor writes to its arguments"),
    "no such constant": (
        lambda b: node(b, CONSTANT, (next(iter(b.graph.nodes)), 3, b.inputs[0])),
        r"there is no number 3 among the block's 0",
    ),
    "a method": (
        lambda b: b.graph.output_node().prepend(b.graph.create_node("call_method", "relu", (b.inputs[0],))),
        r"a call_method is no node of a block graph",
    ),
    "a leaf too many": (lambda b: setattr(b, "output", (b.output, Slot(7))), r"has 2 leaves, and one numbered 7"),
    "another guard": (lambda b: setattr(b, "guard", dataclasses.replace(b.guard, shapes=[])), r"takes 1 tensors, and its guard knows 0"),  # noqa: E501
    "a matrix too few": (lambda b: change(b, lambda r: {"w_in": ()}), r"experts 0: expert 0 has 0 first matrices, and rows plain take 1"),  # noqa: E501
    "a matrix too narrow": (
        lambda b: change(b, lambda r: {"w_in": (dataclasses.replace(r.w_in[0], m=I - 1),)}),
        rf"expert 0 has a first matrix of {I - 1} by {H}, not {I} by {H}",
    ),
    "a bias too long": (
        lambda b: change(b, lambda r: {"b_out": dataclasses.replace(r.b_out, m=H + 1)}),
        rf"expert 0 has a bias of {H + 1} after a matrix of {H} outputs",
    ),
    "a region outside": (
        lambda b: change(b, lambda r: {"w_out": dataclasses.replace(r.w_out, origin=(1, 0))}),
        rf"a region of experts.0.2.weight reaches from 1 to {H} along axis 0, which has {H}",
    ),
    "a weight that is not there": (
        lambda b: change(b, lambda r: {"w_out": dataclasses.replace(r.w_out, path="experts.0.9.weight")}),
        r"the module has no Tensor at experts.0.9.weight",
    ),
}  # fmt: skip


def change(block, how):
    refs, spec = block.weights[0]
    block.weights[0] = ExpertWeightRefs([dataclasses.replace(refs[0], **how(refs[0])), *refs[1:]], spec)


def test_a_good_block_breaks_no_law(block):
    check_block(block, block.copy())


@pytest.mark.one_isa  # what a graph looks like
@pytest.mark.parametrize(("breach", "text"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_named(block, breach, text):
    breach(block)
    with pytest.raises(LawBroken, match=text):
        check_block(block)


def test_an_alias_that_was_there_is_none_of_the_passes_doing(block):
    before = block.copy()
    assert aliases(block) == {("leaf 1", "input_0")}
    (view,) = [n for n in block.graph.nodes if n.target is aten.slice.Tensor and n in block.leaves]
    block.graph.output_node().args = ((node(block, aten.slice.Tensor, (block.inputs[0], 1, 0, 4)), block.leaves[1]),)
    with pytest.raises(LawBroken, match="leaf 0 shares memory with input_0, and did not before the pass"):
        check_block(block, before)
    block.graph.output_node().args = ((view, node(block, aten.view.default, (view, [-1]))),)
    with pytest.raises(LawBroken, match="leaf 1 shares memory with leaf 0, and did not before the pass"):
        check_block(block, before)
