"""A block graph can be copied, pickled, printed, counted and run."""

import pickle

import pytest
import torch

from moeopt.options import Options
from moeopt.pipeline.block import rewrite_block
from moeopt.rewrite.block_graph import Captured, first_call
from moeopt.rewrite.install import run
from moeopt.rewrite.text import text
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded, tape_of


class Block(MoE):
    """Returns a tree, stores a result, and makes a tensor outside PyTorch."""

    def forward(self, x):
        y = super().forward(x.reshape(-1, H)).view_as(x)
        self.last = y.sum()
        return {"y": y + torch.tensor([1.0] * H), "half": x.shape[0] * 2}


@pytest.fixture(scope="module")
def block():
    return rewrite_block("mlp", seeded(Block), ((rand(2, 3, H),), {}), Options(verify="off")).program.block


def test_it_runs_on_the_weights_of_any_such_module(block):
    module, x = seeded(Block), rand(4, 2, H, seed=3)
    got = run(block, module, x)
    want = module(x)
    torch.testing.assert_close(got["y"], want["y"], rtol=1e-5, atol=1e-6)  # float32: a sum in another order
    assert got["half"] == want["half"] == 8


def test_it_is_printed_with_shapes_and_source_lines(block):
    lines = text(block).splitlines()
    assert lines[0].startswith("# experts 0: 4 of plain relu; ") and lines[0].endswith(
        "router softmax, top-2 of 4, renormalised"
    )
    assert lines[1] == f"%input_0: float32[input_0.shape[0], input_0.shape[1], {H}] = input"
    assert any(
        line.startswith("%router: float32[input_0.shape[0]*input_0.shape[1], 4] = module router(") for line in lines
    )
    (op,) = [line for line in lines if " = experts 0(%" in line]
    assert op.startswith(f"%experts: float32[input_0.shape[0]*input_0.shape[1], {H}] = ") and "tiny.py:" in op
    assert any(" = constant 0(%input_0)" in line for line in lines)
    assert lines[-2].startswith("store %sum") and lines[-2].endswith(" as last")
    assert lines[-1].startswith("return {y: %add") and lines[-1].endswith("half: %mul}")


def test_a_copy_can_be_changed_alone(block):
    before, twin = text(block), block.copy()
    for node in twin.graph.nodes:
        if node.target is torch.ops.aten.reshape.default:
            node.target = torch.ops.aten.view.default
    assert text(block) == before != text(twin) and twin.counts() != block.counts()
    assert block.counts()["experts"] == 1 and block.kept_modules == ["router"] and len(block.inputs) == 1


def test_it_survives_pickle(block):
    again = pickle.loads(pickle.dumps(block))
    assert text(again) == text(block) and again.counts() == block.counts()
    module, x = seeded(Block), rand(4, 2, H, seed=3)
    assert torch.equal(run(again, module, x)["y"], run(block, module, x)["y"])


def test_before_the_first_pass_it_is_the_recorded_call(block):
    tape = tape_of(MoE)
    captured = Captured("experts", tape, [], [], [], {}, [], lambda: (None, []))
    own = type(block)("mlp", captured=captured)
    assert own.counts()["index_add"] == 4 and "index_add(" in text(own)
    assert [n.name for n in own.graph.nodes][:-1] == [n.name for n in tape.nodes]
    assert len(own.copy().graph.nodes) == len(first_call(tape).nodes)
    module, x = seeded(MoE), rand(5, H)
    assert torch.equal(run(own, module, x), module(x))
