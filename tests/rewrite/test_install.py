"""A rewritten forward runs the verified calls, and the original code for all others, saying why."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn

from moeopt.errors import Declined, StaleModelWarning
from moeopt.options import Options
from moeopt.pipeline.block import rewrite_block
from moeopt.rewrite.install import RewrittenForward, bind, install, uninstall
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, ffn, seeded

OFF = Options(verify="off")


class Block(MoE):
    """A block with options in its signature and an auxiliary output that it stores."""

    def forward(self, x, mask=None, *, scale: float = 1.0):
        w, ids = self.route(x)
        self.last_ids = ids * 1
        if mask is not None:
            w = w * mask[:, None]
        return {"y": self.mix(x, w, ids) * scale, "w": w}


@pytest.fixture(scope="module")
def program():
    return rewrite_block("block", seeded(Block), ((rand(6, H),), {}), OFF).program


@pytest.fixture
def block(program):
    module = seeded(Block)
    install(module, program)
    return module


def same(a, b):
    return all((a[k] - b[k]).norm() <= 32 * torch.finfo(torch.float32).eps * b[k].norm() for k in b)


def test_the_program_runs_and_stores_what_the_forward_stores(block):
    original, x = seeded(Block), rand(9, H, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(block(x), original(x))
    assert torch.equal(block.last_ids, original.last_ids)
    assert block.forward.calls == 1 and block.forward.fallbacks == 0
    assert type(block) is Block and set(block.state_dict()) == set(original.state_dict())


def test_the_graph_can_be_read(block, program):
    targets = [str(n.target) for n in program.graph().nodes]
    assert "router" in targets and not any("experts.0" in t for t in targets)
    assert sum("_run_experts" in t for t in targets) == 1


MASK = torch.linspace(0, 1, 6)


@pytest.mark.parametrize(
    ("prepare", "call", "reason"),
    [
        (None, lambda b: b(rand(6, H), MASK), "it was called with tensor(["),
        (None, lambda b: b(rand(6, H), scale=2.0), "it was called with 2.0 where 1.0 was verified"),
        (lambda b: b.double(), lambda b: b(rand(6, H).double()), "it was called with torch.float64 where torch.float32 was"),  # noqa: E501
        (lambda b: setattr(b.experts[1][0], "weight", nn.Parameter(torch.ones(2, 2))), None,
         "experts.1.0.weight changed from torch.float32 (12, 8) to torch.float32 (2, 2)"),
        (lambda b: b.experts.__setitem__(2, ffn()), lambda b: b(rand(6, H)),
         "a module in experts was replaced"),
        (lambda b: b.experts[0][0].register_forward_hook(lambda *a: None), lambda b: b(rand(6, H)),
         "a hook was registered on experts.0.0, which is no longer called for each expert"),
    ],
    ids=["mask given", "scale", "dtype", "shape of a weight", "expert replaced", "hook"],
)  # fmt: skip
def test_other_calls_run_the_original_code(block, prepare, call, reason):
    original = seeded(Block)
    if prepare:
        prepare(block)
        prepare(original)
    if call is None:
        with pytest.warns(StaleModelWarning), pytest.raises(RuntimeError):
            block(rand(6, H))
    else:
        if prepare is not None:
            original.load_state_dict(block.state_dict())
        with pytest.warns(StaleModelWarning) as caught:
            got = call(block)
        want = call(original)
        assert all(torch.equal(got[k], want[k]) for k in want)
        text = str(caught[0].message)
        assert (
            text.startswith("Block runs its original code: ")
            and "Run moeopt.optimize again on the changed model" in text
        )
        assert caught[0].filename == __file__ or "torch" in caught[0].filename
    assert block.forward.fallbacks == 1 and block.forward.calls == 0
    assert reason in block.forward.last_refusal


def test_a_refusal_is_told_once_and_the_fast_path_comes_back(block):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block(rand(6, H), scale=2.0)
        block(rand(6, H), scale=2.0)
        block(rand(6, H))
    assert len(caught) == 1 and block.forward.fallbacks == 2 and block.forward.calls == 1


def refusal(program, module, *args, **kwargs):
    return program.guard.refuses(module, bind(program.signature, args, kwargs))


def test_the_guard_in_words(program):
    block = seeded(Block)
    assert refusal(program, block, rand(3, H)) == "" == refusal(program, block, x=rand(1, H), scale=1.0)
    assert refusal(program, block, rand(3, H + 1)) == f"it was called with size {H + 1} where only {H} was verified"
    assert refusal(program, block, rand(2, 3, H)) == "it was called with a 3-dimensional tensor, verified with 2"
    assert refusal(program, block, [1.0]) in (
        "it was called with a non-tensor where a tensor was verified",
        "it was called with another structure of arguments than the verified one",
    )
    assert refusal(program, block, 1.0) == "it was called with a non-tensor where a tensor was verified"
    two = "it was called with another structure of arguments than the verified one"
    assert refusal(program, block, rand(3, H), [1, 2]) == two
    with torch.autocast("cpu"):
        assert refusal(program, block, rand(3, H)) == "autocast is on, which changes the dtypes that were verified"
    strict = copy.copy(program.guard)
    strict.training = False
    bound = bind(program.signature, (rand(3, H),), {})
    assert strict.refuses(block.train(), bound) == "the block is in training mode, in which it computes something else"
    strict.training = True
    assert strict.refuses(block.eval(), bound) == "the block is in evaluation mode, in which it computes something else"


def test_gradients_reach_the_users_parameters(block):
    original = seeded(Block)
    for module in (block, original):
        module(rand(9, H, seed=3))["y"].square().sum().backward()
    for (name, a), b in zip(block.named_parameters(), original.parameters(), strict=True):
        # a gradient sums over all tokens in another order
        assert (a.grad - b.grad).norm() <= 64 * torch.finfo(torch.float32).eps * b.grad.norm(), name


def test_copies_run_their_own_weights(block):
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    original = seeded(Block)
    x = rand(9, H, seed=3)
    assert same(block(x), original(x)) and block.forward.calls == 1
    original.load_state_dict(twin.state_dict())
    assert same(twin(x), original(x)) and twin.forward.module is twin and twin.forward.calls == 1
    inner = copy.deepcopy(nn.Sequential(block))[0]
    assert inner.forward.module is inner and isinstance(inner.forward, RewrittenForward)


def test_a_pickled_block_comes_back_working(block):
    back = pickle.loads(pickle.dumps(block))
    assert same(back(rand(5, H)), seeded(Block)(rand(5, H))) and back.forward.calls == 1


def test_uninstall_gives_the_original_back(block):
    uninstall(block)
    assert "forward" not in block.__dict__ and torch.equal(block(rand(5, H))["y"], seeded(Block)(rand(5, H))["y"])
    uninstall(block)  # twice does nothing


def test_a_forward_that_was_patched_already_is_left_alone(program):
    block = seeded(Block)
    block.forward = types.MethodType(lambda self, x: x, block)
    with pytest.raises(
        Declined, match="forward was replaced on this instance of Block; undo the patch, optimise, and patch"
    ):
        install(block, program)


def test_the_hook_of_accelerate_keeps_its_place(program):
    block = seeded(Block)
    block._old_forward, block._hf_hook = block.forward, object()
    block.forward = types.MethodType(lambda self, *a, **k: self._old_forward(*a, **k), block)
    install(block, program)
    assert same(block(rand(5, H)), seeded(Block)(rand(5, H))) and block._old_forward.calls == 1
    uninstall(block)
    assert not isinstance(block._old_forward, RewrittenForward)
    assert torch.equal(block(rand(5, H))["y"], seeded(Block)(rand(5, H))["y"])


def test_a_write_to_an_input_is_repeated():
    class Writes(MoE):
        def forward(self, x):
            x += super().forward(x)
            return x

    module = seeded(Writes)
    rewrite = rewrite_block("writes", module, ((rand(6, H),), {}), OFF)
    install(module, rewrite.program)
    x, y = rand(5, H, seed=2), rand(5, H, seed=2)
    with torch.no_grad():
        module(x)
        seeded(Writes)(y)
    assert module.forward.calls == 1
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # float32: a sum in another order


def test_sizes_are_read_at_run_time():
    class Folded(MoE):
        def forward(self, x):
            b, s, _ = x.shape
            y = super().forward(x.reshape(b * s, H)).view(b, s, H)
            return torch.cat([y, torch.full((b, 1, H), float(2))], 1) + torch.arange(s + 1)[:, None]

    module = seeded(Folded)
    rewrite = rewrite_block("folded", module, ((rand(2, 3, H),), {}), OFF)
    install(module, rewrite.program)
    for shape in ((1, 1, H), (4, 5, H), (3, 2, H)):
        torch.testing.assert_close(module(rand(*shape)), seeded(Folded)(rand(*shape)), rtol=1e-5, atol=1e-5)
    assert module.forward.calls == 3
