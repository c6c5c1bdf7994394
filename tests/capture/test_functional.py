"""In-place calls and views become functional ones: replayed, they give the values that eager gave."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from moeopt.capture.functional import may_write, mutated_args, unsaid_writes
from moeopt.capture.tape import record
from moeopt.errors import CaptureError
from tests.capture.tiny import Run, again, assert_equal, rand, recorded


def check(fn, *shapes, transposed=False, integers=False):
    """``fn``'s tape, replayed on the recorded inputs and on others, agrees with eager, inputs included."""

    def draw(start):
        drawn = [rand(*s, seed=i + start) for i, s in enumerate(shapes)]
        return [(t * 4).round() for t in drawn] if integers else drawn

    make = draw(0)
    first = [t.t().contiguous().t() if transposed and t.dim() == 2 else t for t in make]
    tape = record(Run(fn), tuple(first))
    for seed in (0, 50):
        inputs = draw(seed)
        mine = [t.clone() for t in inputs]
        with torch.no_grad():
            want = fn(None, *mine)
        assert_equal(again(tape, *inputs), (want, mine))
    with torch.no_grad():
        mine = [t.clone() for t in first]
        assert_equal([tape.value(n) for n in _nodes(tape.output)], _tensors(fn(None, *mine)))


def _nodes(tree):
    return [tree] if not isinstance(tree, (list, tuple)) else [n for t in tree for n in _nodes(t)]


def _tensors(tree):
    return [tree] if isinstance(tree, torch.Tensor) else [n for t in tree for n in _tensors(t)]


def _filled(view):
    def fn(_, x):
        x = x.clone()
        v = view(x)
        v.mul_(2).add_(1)
        return x, v

    return fn


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1],
        lambda x: x[:, -1],
        lambda x: x[1:3],
        lambda x: x[:, ::2],
        lambda x: x[-2:, 1:],
        lambda x: x.t(),
        lambda x: x.transpose(-1, -2)[2],
        lambda x: x.view(-1)[3:9],
        lambda x: x.reshape(2, 2, 6).permute(2, 0, 1)[1:4, 1],
        lambda x: x.unsqueeze(1)[:, 0, 2:],
        lambda x: x.unsqueeze(-1).squeeze(-1),
        lambda x: x.unsqueeze(0).squeeze(),
        lambda x: x.detach()[0],
        lambda x: x.data[0],
        lambda x: x.unbind(0)[2],
        lambda x: x.unbind(-1)[2],
        lambda x: x.split(2)[1],
        lambda x: x.split(4, dim=1)[1],
        lambda x: x.split([1, 3])[1],
        lambda x: torch.unsafe_split(x, 2)[1],
        lambda x: torch.unsafe_split_with_sizes(x, [1, 3])[1],
        lambda x: x.split([1, 3, 2], -1)[2],
        lambda x: x.chunk(3, dim=-1)[1],
        lambda x: x.narrow(1, 2, 3),
        lambda x: x.movedim(1, 0)[4],
        lambda x: x.diagonal(),
        lambda x: x[1:].diagonal(1),
        lambda x: x.t()[1:].diagonal(),
        lambda x: x.view_as(torch.empty(6, 4))[3],
    ],
)
def test_a_write_through_a_view_reaches_its_base(view):
    check(_filled(view), (4, 6))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t()[1:, 1:],
        lambda x: x[:, 2:4],
        lambda x: x.transpose(0, 1).unsqueeze(0)[0, 3],
        lambda x: x[1:].diagonal(),
    ],
)
def test_what_was_recorded_on_a_transposed_input_holds_for_a_plain_one(view):
    check(_filled(view), (4, 6), transposed=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, v: x.add_(1),
        lambda x, v: x.add_(v, alpha=2),
        lambda x, v: x.mul_(v[0]),
        lambda x, v: x.copy_(v[1]),
        lambda x, v: x.copy_(v.double()),
        lambda x, v: x.zero_(),
        lambda x, v: x.fill_(3),
        lambda x, v: x.fill_(v[0, 0]),
        lambda x, v: x.masked_fill_(v > 0, 2.5),
        lambda x, v: x.masked_scatter_(v > 0, v.clone()),
        lambda x, v: x.index_add_(0, torch.tensor([2, 0, 2]), v[:3]),
        lambda x, v: x.index_copy_(0, torch.tensor([2, 0]), v[:2]),
        lambda x, v: x.index_fill_(1, torch.tensor([2, 0]), 4.0),
        lambda x, v: x.index_put_((torch.tensor([1, 1]),), v[:2], accumulate=True),
        lambda x, v: x.scatter_(1, torch.tensor([[0, 2], [1, 3]]), v),
        lambda x, v: x.scatter_add_(1, torch.tensor([[0, 2], [1, 3]]), v),
        lambda x, v: x.scatter_(1, torch.tensor([[0], [1], [2], [3]]), 5.0),
        lambda x, v: x.clamp_(-0.5, 0.5),
        lambda x, v: x.relu_(),
        lambda x, v: x.sigmoid_(),
        lambda x, v: x.div_(v.abs() + 1),
        lambda x, v: x.addcmul_(v, v, value=0.5),
        lambda x, v: x.lerp_(v, 0.25),
        lambda x, v: x.floor_(),
        lambda x, v: nn.functional.silu(x, inplace=True),
        lambda x, v: torch.mul(v, 2, out=x),
        lambda x, v: torch.add(v, v, out=x),
        lambda x, v: torch.mm(v, v.t(), out=x),
        lambda x, v: torch.sigmoid(v, out=x),
        lambda x, v: x.__setitem__(x > 0, 0.0),
        lambda x, v: x.__setitem__(slice(1, 3), v[0]),
        lambda x, v: x.__setitem__((slice(None), 2), v[:, 0]),
        lambda x, v: x.__setitem__(torch.tensor([3, 0]), v[:2]),
        lambda x, v: x.__setitem__(0, torch.tensor(9.0)),
    ],
)
def test_an_in_place_call_has_a_twin(write):
    def fn(_, x, v):
        seen = x[1]
        write(x, v)
        return x, seen, x.sum()

    check(fn, (4, 4), (4, 4))


def test_a_matmul_into_a_slice():
    def fn(_, a, b):
        y = torch.zeros(6, 5)
        torch.mm(a, b, out=y[1:5])
        return y

    check(fn, (4, 3), (3, 5))


def test_an_in_place_call_keeps_the_dtype_it_wrote_to():
    def fn(_, x):
        y = torch.zeros(4, dtype=torch.bfloat16)
        y.add_(x[0, :4])
        n = torch.zeros(4, dtype=torch.int64)
        n.copy_(x[1, :4] * 3)
        z = torch.zeros(3, 4, dtype=torch.float64)
        z[1] = x[2, :4]
        return y, n, z

    check(fn, (3, 4))


def test_a_read_before_a_write_keeps_the_old_value():
    def fn(_, x):
        old = x * 1
        doubled = x[0] + 0
        x[0] += 5
        return old, doubled, x[0] * 1

    check(fn, (2, 3))


# -- random programs ---------------------------------------------------------------------------------


def _dim(t, n):
    return n % t.dim()


VIEWS = {
    "select": lambda t, n: t.select(_dim(t, n), n % t.shape[_dim(t, n)]) if t.dim() > 1 else t,
    "slice": lambda t, n: t.narrow(_dim(t, n), n % t.shape[_dim(t, n)], 1 + (t.shape[_dim(t, n)] - 1 - n % t.shape[_dim(t, n)]) // 2),  # noqa: E501
    "step": lambda t, n: t[:: 1 + n % 3],
    "transpose": lambda t, n: t.transpose(0, -1),
    "permute": lambda t, n: t.permute(*[(i + n) % t.dim() for i in range(t.dim())]),
    "unsqueeze": lambda t, n: t.unsqueeze(n % (t.dim() + 1)) if t.dim() < 4 else t,
    "squeeze": lambda t, n: t.squeeze(_dim(t, n)) if t.dim() > 1 else t,
    "flat": lambda t, n: t.view(-1) if t.is_contiguous() else t,
    "reshape": lambda t, n: t.reshape(-1),
    "unbind": lambda t, n: t.unbind(0)[n % t.shape[0]] if t.dim() > 1 else t,
    "split": lambda t, n: t.split(1 + n % 2, _dim(t, n))[-1],
    "expand": lambda t, n: t.unsqueeze(0).expand(2, *t.shape) if t.dim() < 4 else t,
    "diagonal": lambda t, n: t.diagonal(n % 2) if t.dim() > 1 and t.diagonal(n % 2).numel() else t,
    "detach": lambda t, n: t.detach(),
    "clone": lambda t, n: t.clone(),
}  # fmt: skip
WRITES = {
    "add": lambda t, n, other: t.add_(n),
    "scale": lambda t, n, other: t.mul_(0.5),
    "fill": lambda t, n, other: t.fill_(float(n)),
    "first": lambda t, n, other: t.__setitem__(0, float(n)),
    "mask": lambda t, n, other: t.__setitem__(t > 0, -1.0),
    "index_add": lambda t, n, other: t.index_add_(0, torch.tensor([n % t.shape[0]]), t[:1].clone()),
    "relu": lambda t, n, other: t.relu_(),
    "put": lambda t, n, other: t.__setitem__(torch.tensor([n % t.shape[0]]), 2.0),
    "plus": lambda t, n, other: t.add_(other.sum()),
    "copy": lambda t, n, other: t.copy_(other.reshape(-1)[0].clone()),
    "out": lambda t, n, other: torch.neg(t.clone(), out=t),
}
STEP = st.tuples(st.sampled_from([*VIEWS, *WRITES]), st.integers(0, 7), st.integers(0, 7))


def program(steps):
    def fn(_, x):
        pool = [x]
        for name, which, n in steps:
            t = pool[which % len(pool)]
            if name in VIEWS:
                pool.append(VIEWS[name](t, n))
            elif not any(s == 0 and size > 1 for s, size in zip(t.stride(), t.shape, strict=True)):
                WRITES[name](t, n, pool[n % len(pool)])
        return pool[1:] + [t.sum() for t in pool]

    return fn


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(steps=st.lists(STEP, min_size=2, max_size=9))
@example(steps=[("expand", 0, 0), ("add", 0, 3), ("select", 1, 1)])
def test_random_views_and_writes_replay_as_eager(steps):
    check(program(steps), (3, 4), integers=True)  # integers: sums are exact in any order


# -- refusals ----------------------------------------------------------------------------------------


INPLACE_VIEWS = {
    "transpose_": lambda y: y.transpose_(0, 1),
    "swapaxes_": lambda y: y.swapaxes_(0, 1),
    "t_": lambda y: y.t_(),
    "unsqueeze_": lambda y: y.unsqueeze_(0),
    "resize_": lambda y: y.resize_(2, 3),
}


@pytest.mark.parametrize("name", INPLACE_VIEWS)
def test_a_change_of_shape_in_place_is_followed_or_refused(name):
    def fn(_, x):
        y = x.clone()
        INPLACE_VIEWS[name](y)
        return y.add_(1) * 2

    try:
        check(fn, (4, 6))
    except CaptureError as err:
        assert "changes a tensor's shape in place; use its out-of-place form" in str(err)


def _turned(y):
    y.transpose_(0, 1)
    return y


@pytest.mark.parametrize(
    "fn",
    [
        lambda _, x: _turned(x.clone()).add_(1) * 2,
        lambda _, x: _turned(x * 2)[1:].mul_(3) + 1,
        lambda _, x: _turned(_turned(x.clone().add_(1))).mul_(2),
        lambda _, x: (lambda y: (y * 3) @ _turned(y))(x + 1),
    ],
)
def test_a_tensor_of_its_own_may_be_transposed_in_place(fn):
    check(fn, (4, 6))


@pytest.mark.parametrize(
    "fn",
    [
        lambda _, x: x.clone().t_().add_(1) * 2,
        lambda _, x: x.clone().unsqueeze_(1)[:, 0].mul_(3) + 1,
        lambda _, x: (x + 1).sum(0, keepdim=True).squeeze_() * 2,
        lambda _, x: (x + 1).sum(0, keepdim=True).squeeze_(0) * 2,
        lambda _, x: torch.ops.aten.squeeze_.dims((x + 1).sum((0, 1), keepdim=True), [0, 1]) * 2,
        lambda _, x: torch.nn.functional.linear(x[0], x),  # without a bias, on a vector: ends in squeeze_
    ],
)
def test_a_tensor_of_its_own_may_lose_or_get_a_dimension_in_place(fn):
    check(fn, (4, 6))


def test_a_tensor_that_others_view_may_not_be_transposed_in_place():
    def fn(_, x):
        y = x.clone()
        row = y[1]
        y.transpose_(0, 1)
        return y + row.add_(1).sum()

    with pytest.raises(CaptureError, match="changes a tensor's shape in place; use its out-of-place form"):
        recorded(fn, rand(4, 6))


@pytest.mark.parametrize(
    "view",
    [lambda x: x.unfold(1, 2, 2)[:, 1], lambda x: x.as_strided((3, 2), (6, 2), 1), lambda x: x.view(torch.int32)],
    ids=["unfold", "as_strided", "view as integers"],
)
def test_a_write_through_a_view_that_depends_on_the_layout_is_refused(view):
    text = "a write through aten.* cannot be followed to the tensor it views; write to that tensor itself"
    with pytest.raises(CaptureError, match=text):
        recorded(_filled(view), rand(4, 6))


def test_an_in_place_op_without_a_functional_form_is_refused():
    with torch.library._scoped_library("moeopt_test_in_place", "DEF") as library:
        library.define("grow_(Tensor(a!) x) -> Tensor(a!)")
        library.impl("grow_", lambda x: x.mul_(2), "CompositeExplicitAutograd")
        text = "changes a tensor in a way that the trace cannot follow; use an out-of-place form"
        with pytest.raises(CaptureError, match=text):
            recorded(lambda _, x: torch.ops.moeopt_test_in_place.grow_(x.clone()), rand(4))


def test_an_out_argument_without_a_functional_form_is_refused():
    with torch.library._scoped_library("moeopt_test_functional", "DEF") as library:
        library.define("twice.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
        library.impl("twice.out", lambda x, *, out: out.copy_(x * 2), "CompositeExplicitAutograd")
        twice = torch.ops.moeopt_test_functional.twice.out
        with pytest.raises(CaptureError, match="has no functional form that the trace can record; avoid out= there"):
            recorded(lambda _, x: twice(x, out=torch.empty_like(x)), rand(4))


def test_a_triton_kernel_may_write_to_any_tensor_that_it_is_given():
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    a, b = torch.zeros(2), torch.ones(3)
    given = {"kernel_idx": 0, "grid": [(1,)], "kwargs": {"x": a, "out": b, "n": 2}}
    assert [id(t) for t in mutated_args(triton_kernel_wrapper_mutation, (), given)] == [id(a), id(b)]
    assert mutated_args(flex_attention, (a, b), {}) == []


def test_ops_that_write_are_told_from_all_others():
    """Others are not asked what they write: by their schemas, or against them."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    aten, x, row = torch.ops.aten, torch.ones(2, 3), torch.ones(3)
    writing = {
        aten.add_.Tensor: ((x, 1), [x]),
        aten._foreach_add_.Scalar: (([x, row], 1), [x, row]),
        aten.native_batch_norm.default: ((x, None, None, row, x, True, 0.1, 1e-5), [row, x]),
        triton_kernel_wrapper_mutation: ((x, 1), [x]),
        aten.mm.out: ((x, x), []),  # to an argument by name, which this call has not
    }
    for func, (args, written) in writing.items():
        told = [*mutated_args(func, args, {}), *unsaid_writes(func, args)]
        assert may_write(func) and [id(t) for t in told] == [id(t) for t in written]
    assert not any(map(may_write, (aten.add.Tensor, aten.view.default, aten.native_layer_norm.default)))
