"""The usual call is known by one expression: it lets through what the guard lets through, and nothing else."""

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.rewrite.call_guard import OPAQUE, TENSOR, CallGuard, bind, by_position
from moeopt.rewrite.usual_call import usual_call
from tests.capture.tiny import rand


def forward(x, ids, flag=None):
    raise NotImplementedError


SIGNATURE = inspect.signature(forward)
X, IDS = rand(4, 3), torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0]])


def guard(**fields):
    known = {
        "template": [TENSOR, TENSOR, None], "shapes": [(None, 3), (None, 2)], "dtypes": [torch.float32, torch.int64],
        "training": None, "autocast": False,
    }  # fmt: skip
    return CallGuard(**known | fields)


GUARDS = {
    "plain": guard(),
    "in evaluation": guard(training=False),
    "in training": guard(training=True),
    "ids kept": guard(kept=(None, (0, 2))),
    "ids kept to fewer": guard(kept=(None, (0, 1))),
    "tied": guard(tied=(((0, 0), ((1, 0),)),)),
    "tied to a product": guard(tied=(((0, 0), ((1, 0), (1, 1))),)),
    "no empty calls": guard(fewest=1),
    "few tokens": guard(fewest=1, most=4),
    "fewer tokens": guard(most=3),
    "sizes all fixed": guard(shapes=[(4, 3), (4, 2)], fewest=1, most=9),
    "sizes all fixed, two tokens": guard(shapes=[(4, 3), (4, 2)], fewest=2),
    "a flag": guard(template=[TENSOR, TENSOR, True]),
    "a number": guard(template=[TENSOR, TENSOR, 1]),
    "a word": guard(template=[TENSOR, TENSOR, "fast"]),
    "no number": guard(template=[TENSOR, TENSOR, float("nan")]),
}

CALLS = [
    (x, ids, flag)
    for x, ids, flag in itertools.product(
        (X, X[:2], X[:0], X[0], X.double(), X[:, :2], nn.Parameter(X), rand(8, 3), 2.0, None),
        (IDS, IDS[:2], IDS[:0], IDS.int(), IDS + 1, IDS - 1, IDS.repeat(12, 1), None),
        (None, True, False, 1, 1.0, "fast", X, [None], float("nan")),
    )
]


@pytest.mark.parametrize("name", GUARDS)
def test_it_lets_through_no_call_that_the_guard_refuses(name):
    known, module, through = GUARDS[name], nn.Linear(1, 1).eval(), 0
    usual = usual_call(known, SIGNATURE)
    for args in CALLS:
        tensors = usual(module, args)
        refusal = known.refuses(module, bind(SIGNATURE, args, {}, by_position(SIGNATURE)))
        if tensors is None:
            assert refusal or any(type(a) is nn.Parameter for a in args), args
        else:
            assert not refusal and tensors[0] is args[0] and tensors[1] is args[1] and len(tensors) == 2
            through += 1
    never = name in ("in training", "sizes all fixed, two tokens", "no number")
    assert (through == 0) == never


@pytest.mark.parametrize("args", ((), (X,), (X, IDS), (X, IDS, None, None)), ids=len)
def test_another_number_of_arguments_is_bound(args):
    assert usual_call(guard(), SIGNATURE)(nn.Identity(), args) is None


class Counting(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Logging(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Hooked:
    def __enter__(self):
        self.handle = nn.modules.module.register_module_forward_hook(lambda *args: None)

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.parametrize(
    "state", (Counting, Logging, Hooked, forward_ad.dual_level, lambda: torch.autocast("cpu")),
    ids=("function mode", "dispatch mode", "hook", "forward mode", "autocast"),
)  # fmt: skip
def test_in_an_unusual_state_of_pytorch_it_knows_no_call(state):
    usual, call = usual_call(guard(), SIGNATURE), (X, IDS, None)
    assert usual(nn.Identity(), call) is not None
    with state():
        assert usual(nn.Identity(), call) is None
    assert usual(nn.Identity(), call) is not None


def test_transforms_and_traces_are_unusual():
    usual, seen = usual_call(guard(), SIGNATURE), []

    def look(x):
        seen.append(usual(nn.Identity(), (X, IDS, None)))
        return x * 2

    torch.func.vmap(look)(X)
    torch.jit.trace(look, X, check_trace=False)
    assert seen == [None, None]


def test_gradients_that_differ_are_unusual_where_they_are_on():
    usual = usual_call(guard(gradients="its own code detaches"), SIGNATURE)
    with torch.enable_grad():
        assert usual(nn.Identity(), (X, IDS, None)) is None
    with torch.no_grad():
        assert usual(nn.Identity(), (X, IDS, None)) is not None


def test_of_a_guard_that_was_changed_since_it_knows_no_call():
    known = guard()
    usual = usual_call(known, SIGNATURE)
    assert usual(nn.Identity(), (X, IDS, None)) is not None
    known.most = 10
    assert usual(nn.Identity(), (X, IDS, None)) is None
    assert usual_call(known, SIGNATURE)(nn.Identity(), (X, IDS, None)) is not None


def only_keywords(x, *, ids):
    raise NotImplementedError


def several(x, *more):
    raise NotImplementedError


def test_there_is_none_for_containers_keywords_and_what_cannot_be_compared():
    assert usual_call(guard(template=[TENSOR, "tuple", 1, TENSOR]), SIGNATURE) is None
    assert usual_call(guard(template=[TENSOR, TENSOR, OPAQUE]), SIGNATURE) is None
    for other in (only_keywords, several):
        assert usual_call(guard(template=[TENSOR, TENSOR]), inspect.signature(other)) is None
