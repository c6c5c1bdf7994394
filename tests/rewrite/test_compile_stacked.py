"""``torch.compile(fullgraph=True)`` of rewritten blocks whose weights are stacks, and their gradients."""

import pytest
import torch

import moeopt
from tests.zoo import CASES

NAMES = ["gated_grouped_products", "gated_grouped_products_of_flat_banks", "gathered_bmm"]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_stacks_compiles_whole(name):
    case = CASES[name]
    model = case.build()
    args, _ = case.inputs()
    fast = moeopt.optimize(model, args, verify="fast").model
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), model(*args))


@pytest.mark.parametrize("name", NAMES[:2])
def test_gradients_reach_every_expert_of_a_stack(name):
    case = CASES[name]
    model = case.build()
    args, _ = case.inputs()
    fast = moeopt.optimize(model, args, verify="fast").model
    for one in (model, fast):
        one(*args).square().sum().backward()
    for (path, want), got in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=lambda text, path=path: f"{path}: {text}")
