"""A call is compared with the verified ones by structure, mode and sizes; a refusal is a sentence."""

import dataclasses
import enum
import inspect
import types

import pytest
import torch
from torch import nn

from moeopt.rewrite.call_guard import OPAQUE, TENSOR, CallGuard, bind, overlap, spell
from tests.capture.tiny import rand


class Mode(enum.Enum):
    FAST = 1


@dataclasses.dataclass
class Given:
    x: object
    flag: bool = True


def forward(x, y=None, *, mode="a"):
    raise NotImplementedError


SIGNATURE = inspect.signature(forward)


def guard(template, shapes=((None, 3),), dtypes=(torch.float32,), **fields):
    return CallGuard(template, list(shapes), list(dtypes), fields.pop("training", None), False, **fields)


def call(*args, **kwargs):
    return bind(SIGNATURE, args, kwargs)


def test_arguments_come_in_the_order_of_the_signature():
    x = rand(2, 3)
    bound = bind(SIGNATURE, (), {"mode": "b", "x": x})
    assert bound.names == ("x", "y", "mode") and bound.values[1:] == (None, "b") and bound.tensors() == [x]


def test_equal_spellings_mean_equal_arguments():
    x = rand(2)
    assert spell((x, {"a": 1})) == spell((x, {"a": 1})) != spell([x, {"a": 1}])
    assert (
        spell({"a": 1}) != spell({"b": 1})
        and spell(Mode.FAST) == spell(Mode.FAST)
        and spell(slice(1, 2)) != spell(slice(1, 3))
    )
    assert spell(Given(x)) == spell(Given(x)) != spell(Given(x, False))
    assert spell(types.SimpleNamespace(a=1)) == spell(types.SimpleNamespace(a=1)) != spell(types.SimpleNamespace(a=2))
    thing = object()
    assert spell(thing) is thing and spell(3.5) == 3.5


TEMPLATE = [TENSOR, None, "a"]


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        (call(rand(5, 3)), ""),
        (call(x=rand(1, 3), mode="a"), ""),
        (call(rand(5, 3), [1]), "it was called with another structure of arguments than the verified one"),
        (call(3.0), "it was called with a non-tensor where a tensor was verified"),
        (call(rand(5, 3).double()), "it was called with torch.float64 where torch.float32 was verified"),
        (call(rand(5, 3, 1)), "it was called with a 3-dimensional tensor, verified with 2"),
        (call(rand(5, 4)), "it was called with size 4 where only 3 was verified"),
        (call(rand(5, 3), mode="b"), "it was called with 'b' where 'a' was verified"),
        (call(rand(5, 3), 0), "it was called with 0 where None was verified"),
        (call(rand(5, 3), rand(1)), "it was called with tensor(["),
    ],
)
def test_arguments_unlike_the_verified_ones(bound, reason):
    got = guard(TEMPLATE).refuses(nn.Module(), bound)
    assert got.startswith(reason) and bool(got) == bool(reason)


def test_what_cannot_be_compared_is_refused():
    bound = call(rand(5, 3), object())
    assert (
        guard([TENSOR, OPAQUE, "a"]).refuses(nn.Module(), bound)
        == "an argument is a object, whose contents are not compared"
    )


def test_the_mode_of_the_call():
    module, bound = nn.Module(), call(rand(5, 3))
    g = guard(TEMPLATE)
    with torch.autocast("cpu"):
        assert g.refuses(module, bound) == "autocast is on, which changes the dtypes that were verified"
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert g.refuses(module, bound) == "a global forward hook is registered, which would no longer fire for each expert"
    handle.remove()
    seen = []
    torch.func.vmap(lambda x: seen.append(g.refuses(module, bound)) or x)(rand(2, 3))
    torch.jit.trace(lambda x: seen.append(g.refuses(module, bound)) or x * 1, rand(2), check_trace=False)
    assert seen == [
        "it is called under a torch.func transform or forward-mode differentiation", "it is being traced by torch.jit",
    ]  # fmt: skip
    assert g.refuses(module, bound) == ""
    for trained, word in ((False, "training"), (True, "evaluation")):
        module.training = not trained
        text = f"the block is in {word} mode, in which it computes something else"
        assert guard(TEMPLATE, training=trained).refuses(module, bound) == text


def test_the_number_of_tokens():
    most = guard([TENSOR, 1.0], shapes=[(None, None, 3)], fewest=1, most=10)
    for shape, text in (((2, 5, 3), ""), ((1, 10, 3), ""), ((11, 1, 3), "11 tokens"), ((0, 4, 3), "without a token")):
        got = most._arguments(bind(inspect.signature(lambda x, a: None), (rand(*shape), 1.0), {}))
        assert text in got and bool(text) == bool(got)
    assert "its code holds the number 10, which may limit what it does in one way" in most._tokens([rand(6, 2, 3)])
    several = guard([TENSOR] * 2, shapes=[(None,), (None, None, 3)], fewest=1, most=10)
    assert "12 tokens" in several._tokens([rand(2), rand(2, 6, 3)]), "the first has one number for each sequence"
    assert "without a token" in several._tokens([rand(2), rand(2, 0, 3)])
    fixed = guard([TENSOR], shapes=[(4, 3)], fewest=1, most=2)
    assert fixed._tokens([rand(4, 3)]) == ""


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


class Named(torch.Tensor):
    """It replaces no function."""


def test_a_tensor_whose_class_replaces_functions():
    def refusal(x):
        return guard(TEMPLATE).refuses(nn.Module(), call(x))

    assert refusal(rand(5, 3).as_subclass(Named)) == refusal(nn.Parameter(rand(5, 3))) == ""
    assert refusal(rand(5, 3).as_subclass(Overriding)) == (
        "it was called with a Overriding, which has PyTorch functions of its own"
    )


def test_marks_survive_copies():
    import copy
    import pickle

    assert (
        copy.deepcopy(TENSOR) is TENSOR
        and pickle.loads(pickle.dumps([OPAQUE]))[0] is OPAQUE
        and repr(TENSOR) == "TENSOR"
    )


def test_shared_memory_is_seen():
    x = rand(4)
    assert overlap([x, x[1:]]) and overlap([x, x]) and not overlap([x, x.clone()])


def test_sizes_that_were_one_size_stay_one_size():
    """With a batch of one beside four rows the original broadcasts, and the program reads one size for both."""
    pair = [TENSOR, TENSOR, "a"]
    held = guard(pair, ((None, None, 3), (None,)), (torch.float32,) * 2, tied=(((1, 0), ((0, 0),)),))
    assert held.refuses(nn.Module(), call(rand(4, 2, 3), rand(4))) == ""
    said = held.refuses(nn.Module(), call(rand(1, 2, 3), rand(4)))
    assert said == "two of its arguments have sizes 4 and 1 where one size was verified for both"
    flat = guard(pair, ((None, None, 3), (None,)), (torch.float32,) * 2, tied=(((1, 0), ((0, 0), (0, 1))),))
    assert flat.refuses(nn.Module(), call(rand(4, 2, 3), rand(8))) == ""
    said = flat.refuses(nn.Module(), call(rand(4, 2, 3), rand(1)))
    assert said == "one of its arguments has size 1 where a product of others, here 8, was verified"


def test_arguments_that_forward_does_not_take_are_told_beside_what_it_takes():
    for given, text in (
        (((), {"hidden": 1}), r"'x': forward takes \(x, y=None, \*, mode='a'\), and was given hidden$"),
        (((1, 2, 3), {}), r"too many positional arguments: forward takes \(x, .*\), and was given 3 by position$"),
        (((), {}), "and was given nothing$"),
    ):
        with pytest.raises(TypeError, match=text):
            bind(SIGNATURE, *given)
