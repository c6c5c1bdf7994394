"""Contents of containers and attributes of objects come back, however deep and of whatever kind."""

import types
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from moeopt.capture.held_state import HeldState, put_back


class Notes:
    def __init__(self):
        self.steps, self.rows = 0, [1]


def write_notes(held):
    held.steps += 1
    held.rows.append(2)
    held.extra = 3


CASES = {
    "list in a dict": ({"a": [1]}, lambda held: held["a"].append(2)),
    "dict in a namespace": (types.SimpleNamespace(n={"x": 1}), lambda held: held.n.update(x=2, y=3)),
    "an object of the user's": (Notes(), write_notes),
    "a list in a tuple": (([1], [2]), lambda held: held[1].clear()),
    "deque": (deque([1, 2], maxlen=2), lambda held: held.append(3)),
    "Counter": (Counter("ab"), lambda held: held.update("a")),
    "ordered": (OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    "defaultdict": (defaultdict(list), lambda held: held["new"].append(1)),
    "set in a list": ([{1}], lambda held: held[0].add(2)),
    "bytearray": (bytearray(b"ab"), lambda held: held.append(1)),
    "array in a dict": ({"a": np.zeros(2)}, lambda held: held["a"].__setitem__(0, 1)),
}


def spelled(held):
    return repr(vars(held) if isinstance(held, Notes) else held)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_into_it_comes_out_again(name):
    module = nn.Linear(2, 2)
    module.held, write = CASES[name]
    held, before = module.held, spelled(module.held)
    state = HeldState([("", module)])
    write(module.held)
    assert spelled(module.held) != before, "the case writes nothing"
    module.held = None
    state.restore()
    assert module.held is held and spelled(held) == before


def test_hooks_come_back_with_their_handle():
    module = nn.Linear(2, 2)
    module.handle = module.register_forward_pre_hook(lambda m, args: None)
    state = HeldState([("", module)])
    module.handle.remove()
    module.register_forward_hook(lambda m, args, y: None)
    state.restore()
    assert len(module._forward_pre_hooks) == 1 and not module._forward_hooks


def test_objects_that_lead_to_themselves_are_followed_once():
    module = nn.Linear(2, 2)
    module.held = Notes()
    module.held.back, module.held.owner = module.held, module
    state = HeldState([("", module)])
    module.held.steps = 5
    state.restore()
    assert module.held.steps == 0 and module.held.back is module.held


def test_tensors_are_named_by_the_place_that_leads_to_them():
    module = nn.Linear(2, 2)
    module.load, module.held = torch.zeros(2), {"a": [torch.ones(3)]}
    tensors = HeldState([("moe", module)]).tensors
    assert {name: t.shape for name, t in tensors.items()} == {"moe.load": (2,), "moe.held[0][0]": (3,)}


def test_an_object_is_never_without_its_names_while_it_is_put_back():
    class Watched(dict):
        def clear(self):
            raise AssertionError("other threads may read it")

    container = Watched(a=1, b=2)
    put_back(container, {"a": 1, "b": 3})
    assert container == {"a": 1, "b": 3}
