"""Integers that follow the input's sizes become expressions; anything else that changes is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt.errors import Declined
from moeopt.rewrite.kept_steps import KeptStep, KeptSteps, StepRef
from moeopt.rewrite.symbolic_shapes import DeviceOf, InputSizes, Ratio, Size, generalize, tied_sizes

aten = torch.ops.aten
SHAPES = [[(3, 16, 8)], [(2, 7, 8)], [(5, 2, 8)]]
B, S = (0, 0), (0, 1)


def express(*values):
    return InputSizes(SHAPES).express(values)


def test_sizes_products_multiples_offsets_and_quotients():
    assert express(3, 2, 5) == Size((B,)) and express(16, 7, 2) == Size((S,))
    assert express(48, 14, 10) == Size((B, S)) and express(96, 28, 20) == Size((B, S), factor=2)
    assert express(24, 16, 40) == Size((B,), factor=8) and express(15, 6, 1) == Size((S,), offset=-1)
    assert InputSizes([[(6,)], [(4,)], [(12,)]]).express((3, 2, 6)) == Size(((0, 0),), divisor=2)
    assert express(7, 9, 1) is None


def test_a_size_that_never_changes_is_none_of_them():
    assert [dims for dims, _ in InputSizes(SHAPES)._products if len(dims) == 1] == [(B,), (S,)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(factor=st.integers(1, 6), dims=st.sampled_from([(B,), (S,), (B, S)]), other=st.tuples(*[st.integers(1, 40)] * 2))
def test_an_expression_holds_on_its_witnesses(factor, dims, other):
    def size(shape):
        total = factor
        for _, d in dims:
            total *= shape[0][d]
        return total

    found = express(*(size(s) for s in SHAPES))
    assert found is not None

    def evaluate(shape):
        total = 1
        for i, d in found.dims:
            total *= shape[i][d]
        return total * found.factor // found.divisor + found.offset

    assert [evaluate(s) for s in SHAPES] == [size(s) for s in SHAPES]
    assert evaluate([(*other, 8)]) == size([(*other, 8)])


def plan(*steps, output=None, mutations=(), attributes=None):
    return KeptSteps(
        [KeptStep("input", "x"), *steps],
        StepRef(1) if output is None else output,
        list(mutations),
        attributes or {},
        [],
    )


def merged(*args, **kwargs):
    """The one plan of three that differ in the arguments of one call."""
    plans = [plan(KeptStep("call", aten.add.Tensor, (StepRef(0), a), source="model.py:7")) for a in args]
    return generalize(plans, SHAPES, **kwargs).steps[1].args[1]


def test_what_changes_with_the_sizes():
    assert merged(48, 14, 10) == Size((B, S)) and merged(4, 4, 4) == 4
    assert merged([48, 8], [14, 8], [10, 8]) == [Size((B, S)), 8]
    assert merged((3, None), (2, None), (5, None)) == (Size((B,)), None)
    assert merged({"a": 3}, {"a": 2}, {"a": 5}) == {"a": Size((B,))}
    assert merged(*[torch.device("cpu")] * 3) == DeviceOf() and merged(*[torch.device("meta")] * 3) == torch.device(
        "meta"
    )
    assert merged(1.5, 1.5, 1.5) == 1.5 and merged(*[float("-inf")] * 3) == float("-inf")
    assert merged(*[slice(0, 2)] * 3) == slice(0, 2) and merged(*[True] * 3) is True


def test_floats_may_be_ratios_of_sizes():
    assert merged(1 / 3, 1 / 2, 1 / 5) == Ratio((B,), 1.0, True) and merged(1.5, 1.0, 2.5) == Ratio((B,), 0.5, False)
    assert merged(2 / 48, 2 / 14, 2 / 10) == Ratio((B, S), 2.0, True)


def test_a_nan_is_a_constant_like_any_other():
    value = merged(*[float("nan")] * 3)
    assert value != value


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((7, 9, 1), "the integer 7 or 9 or 1 in its forward changes with the input and is no simple function of the input's "  # noqa: E501
         "shape (was it read from a tensor with .item(), or rounded, as a capacity of n // 2?)"),
        ((0.5, 0.5, 0.25), "the value 0.5 in its forward changes with the input (read from a tensor, or made of a size, as by math.sqrt(n)?); keep it in a tensor"),  # noqa: E501
        (("mean", "sum", "sum"), "the value 'mean' in its forward changes with the input"),
        ((True, False, True), "the value True in its forward changes with the input"),
        ((torch.float32, torch.float16, torch.float32), "the value torch.float32 in its forward changes"),
        (([1], [1, 2], [1]), "the number of tensors in its forward changes with the input"),
        (({"a": 1}, {"b": 1}, {"a": 1}), "the keys of a dict in its forward change with the input"),
        ((StepRef(0), StepRef(1), StepRef(0)), "its forward wires its steps differently for different inputs"),
        ((1, None, 2), "its forward passes 1 for one input and 2 for another"),
        ((1, 2.5, 3.5), "its forward passes 1 for one input and 3.5 for another"),
        ((slice(0, 2), slice(0, 3), slice(0, 2)), "a slice in its forward changes with the input"),
    ],
)  # fmt: skip
def test_what_changes_otherwise_is_declined_with_its_line(args, text):
    with pytest.raises(Declined) as caught:
        merged(*args)
    assert caught.value.reason.startswith(text) and caught.value.where == "model.py:7"


def test_other_steps_are_declined_with_the_first_that_differs():
    a = plan(KeptStep("call", aten.relu.default, (StepRef(0),), source="model.py:1"))
    b = plan(
        KeptStep("call", aten.relu.default, (StepRef(0),)),
        KeptStep("call", aten.exp.default, (StepRef(1),), source="model.py:2"),
    )
    text = "what its forward computes outside the experts changes with the data or with the number of tokens "
    with pytest.raises(Declined) as caught:
        generalize([a, b], SHAPES[:2])
    assert caught.value.reason == text + "(nothing against aten.exp.default)" and caught.value.where == "model.py:2"
    c = plan(KeptStep("call", aten.silu.default, (StepRef(0),), source="model.py:3"))
    with pytest.raises(Declined) as caught:
        generalize([a, c], SHAPES[:2])
    assert "(aten.relu.default against aten.silu.default)" in caught.value.reason and caught.value.where == "model.py:1"


def test_a_constant_must_be_the_same_tensor():
    same = [plan(KeptStep("constant", torch.arange(3.0))) for _ in range(2)]
    assert torch.equal(generalize(same, SHAPES[:2]).steps[1].target, torch.arange(3.0))
    other = [plan(KeptStep("constant", torch.full((2,), v), source="model.py:9")) for v in (1.0, 2.0)]
    with pytest.raises(
        Declined, match="a tensor that its forward makes outside PyTorch .* changes with the input"
    ) as e:
        generalize(other, SHAPES[:2])
    assert e.value.where == "model.py:9"


def test_outputs_mutations_and_attributes_are_merged():
    plans = [
        plan(output={"y": StepRef(0), "n": n}, mutations=[(StepRef(0), StepRef(0))], attributes={("", "a"): StepRef(0)})
        for n in (3, 2, 5)
    ]
    whole = generalize(plans, SHAPES)
    assert whole.output == {"y": StepRef(0), "n": Size((B,))} and whole.mutations == [(StepRef(0), StepRef(0))]
    assert whole.attributes == {("", "a"): StepRef(0)}


def test_sizes_that_are_always_those_of_another_input_are_tied():
    one = [[(3, 16, 8), (3,), (48, 2), (5,)], [(2, 7, 8), (2,), (14, 2), (5,)], [(5, 2, 8), (5,), (10, 2), (5,)]]
    assert tied_sizes(one) == (((1, 0), (B,)), ((2, 0), (B, S)))
    assert tied_sizes(SHAPES) == ()


def viewed(*sizes):
    return [plan(KeptStep("call", aten.view.default, (StepRef(0), list(size)), {})) for size in sizes]


def test_a_view_leaves_open_the_one_size_that_nothing_says():
    step = generalize(viewed((7, 8), (3, 8), (4, 8)), SHAPES).steps[-1]
    assert step.args[1] == [-1, 8]
    assert generalize(viewed((3, 8), (2, 8), (5, 8)), SHAPES).steps[-1].args[1] == [Size((B,)), 8]


@pytest.mark.parametrize("sizes", [[(7, 3), (3, 9), (4, 4)], [(7, 0), (3, 0), (4, 0)], [(7, 8), (3, 8, 1), (4, 8)]])
def test_a_view_with_two_open_sizes_or_none_of_rows_is_refused(sizes):
    with pytest.raises(Declined, match="changes with the input"):
        generalize(viewed(*sizes), SHAPES)
