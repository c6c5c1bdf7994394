"""The kernels that torch gives its composite ops while it decomposes a program are the same, and so is the program."""

import contextlib

import pytest
import torch
from torch._ops import DispatchKey, OperatorBase
from torch.export import Dim, exported_program

from moeopt.lower.functional import without_writes
from moeopt.patches import kernels_entered_plainly

OP = torch.ops.aten.linear.default


def key_that_is_free():
    return next(k for k in exported_program._AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE if k not in OP.py_kernels)


@contextlib.contextmanager
def put_back():
    held = OP.py_kernels.copy()
    try:
        yield
    finally:
        OP.py_kernels.clear()
        OP.py_kernels.update(held)
        OP._dispatch_cache.clear()


def test_a_kernel_is_entered_and_what_was_chosen_before_is_forgotten():
    def kernel(*args):
        return None

    theirs = OperatorBase.py_impl
    with put_back(), kernels_entered_plainly():
        OP._dispatch_cache[DispatchKey.CPU] = DispatchKey.CPU
        assert OP.py_impl(key_that_is_free())(kernel) is kernel
        assert kernel in OP.py_kernels.values() and not OP._dispatch_cache
    assert OperatorBase.py_impl is theirs


def test_what_torch_refuses_is_refused_in_its_words():
    with put_back(), kernels_entered_plainly():
        key = key_that_is_free()
        OP.py_impl(key)(print)
        with pytest.raises(RuntimeError, match="Trying to override a python impl for .* on operator aten::linear"):
            OP.py_impl(key)(print)
        with pytest.raises(AssertionError, match="Please register a mode for the DispatchKey.Python key instead"):
            OP.py_impl(DispatchKey.Python)(print)
        with pytest.raises(AssertionError, match="expected DispatchKey, got <class 'str'>"):
            OP.py_impl("CPU")(print)


class Model(torch.nn.Module):
    def forward(self, x):
        rows = torch.nn.functional.linear(x.reshape(-1, 4), torch.ones(3, 4))
        return torch.where(rows > 0, rows, 0).softmax(-1).relu_().chunk(2)


def test_a_program_gets_the_kernels_and_the_ops_that_it_gets_without(monkeypatch):
    def program():
        return torch.export.export(Model(), (torch.ones(2, 5, 4),), dynamic_shapes=({1: Dim.AUTO},), strict=False)

    theirs, tables = exported_program._override_composite_implicit_decomp, []

    @contextlib.contextmanager
    def watched(ops):
        with theirs(ops):
            tables.append({op: set(op.py_kernels) for op in ops})
            yield

    monkeypatch.setattr(exported_program, "_override_composite_implicit_decomp", watched)
    before = {op: dict(op.py_kernels) for op in (OP, torch.ops.aten.reshape.default)}
    want = program().run_decompositions({})
    plain, entered = OperatorBase.py_impl, []
    monkeypatch.setattr(OperatorBase, "py_impl", lambda op, key: entered.append(key) or plain(op, key))
    got = without_writes(program())
    assert not entered, "what the patch is for"
    assert tables[0] == tables[1] and len(tables[0]) > 100
    assert str(got.graph) == str(want.graph)
    assert before == {op: dict(op.py_kernels) for op in before}
