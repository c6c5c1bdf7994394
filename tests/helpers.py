"""Shared by the tests: seeded calls, strict comparison of whole outputs, and a spy on the experts kernels."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

import moeopt.ops.fixed_experts  # noqa: F401  (puts it, and the modules of the ops, into sys.modules)

# Relative L2 per output, in eps of its dtype. A rewrite adds the same products in another order: each GEMM and
# each sum over experts may move by a few roundings, and a model stacks up to ten of them. In 16 bits one rounding
# of the output already hides that, so there the budget is a handful.
BUDGET = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}


def run(model: Any, call: tuple[tuple, dict], seed: int = 0) -> Any:
    """One call on copies of the inputs, without gradients, under a fixed seed."""
    return run_in_place(model, copy.deepcopy(call), seed)


def run_in_place(model: Any, call: tuple[tuple, dict], seed: int = 0) -> Any:
    """The same on the inputs themselves, which the model may write to."""
    args, kwargs = call
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return model(*args, **kwargs)


def plain(out: Any) -> Any:
    """A dataclass as a dict of its fields; anything else as it is."""
    return vars(out) if not isinstance(out, dict) and hasattr(out, "__dataclass_fields__") else out


def tensors(out: Any) -> list[torch.Tensor]:
    """All tensors of an output, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(plain(out)) if isinstance(leaf, torch.Tensor)]


def assert_same(got: Any, want: Any, *, exact: bool = False) -> None:
    """Same types, structure, shapes, dtypes and plain values; float tensors within ``BUDGET``, or bitwise."""
    assert type(got) is type(want), f"{type(got)} is not {type(want)}"
    got, want = plain(got), plain(want)
    got_leaves, got_tree = pytree.tree_flatten(got)
    want_leaves, want_tree = pytree.tree_flatten(want)
    assert got_tree == want_tree, f"{got_tree} is not {want_tree}"
    for i, (a, b) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        if isinstance(b, torch.Tensor):
            assert_same_tensor(a, b, f"output {i}", exact)
        else:
            assert type(a) is type(b) and a == b, f"output {i} is {a!r}, not {b!r}"


def assert_same_tensor(a: torch.Tensor, b: torch.Tensor, name: str, exact: bool) -> None:
    assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), (
        f"{name}: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
    )
    if exact or not b.is_floating_point():
        assert torch.equal(a, b), f"{name} differs in {(a != b).sum().item()} of {b.numel()} values"
        return
    a64, b64 = a.double(), b.double()
    far, size = (a64 - b64).norm().item(), b64.norm().item()
    budget = BUDGET[b.dtype] * torch.finfo(b.dtype).eps * size
    assert far <= budget, f"{name}: {far:.3g} apart, {budget:.3g} allowed (norm {size:.3g}, {b.dtype})"


@contextmanager
def count_expert_calls() -> Iterator[list[Any]]:
    """Yields a list that gets the spec of each run of an experts kernel or a row function, eager or through the op."""
    seen: list[Any] = []
    callers = [sys.modules[f"moeopt.ops.{name}"] for name in ("experts", "experts_op", "fixed_experts")]
    functions = sys.modules["moeopt.ops.row_function"]
    kernel, one_by_one = callers[0].run_kernel, functions.expert_by_expert

    def spy(x, ids, weights, bank, spec, *hidden):
        seen.append(spec)
        return kernel(x, ids, weights, bank, spec, *hidden)

    def spy_function(x, ids, weights, bank, spec, **more):
        seen.append(spec)
        return one_by_one(x, ids, weights, bank, spec, **more)

    functions.expert_by_expert = spy_function
    for caller in callers:
        caller.run_kernel = spy
    try:
        yield seen
    finally:
        functions.expert_by_expert = one_by_one
        for caller in callers:
            caller.run_kernel = kernel


def counted_decompositions(monkeypatch: Any) -> list[Any]:
    """A list that gets each exported program that is traced once more, to be decomposed."""
    calls: list[Any] = []
    theirs = torch.export.ExportedProgram.run_decompositions

    def counted(self, *args, **options):
        calls.append(self)
        return theirs(self, *args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    return calls
