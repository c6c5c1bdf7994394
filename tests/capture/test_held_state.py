"""Contents of containers and attributes of objects come back, however deep and of whatever kind."""

import dataclasses
import types
from collections import Counter, OrderedDict, UserDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from moeopt.capture.held_contents import put_back
from moeopt.capture.held_state import HeldState


class Notes:
    def __init__(self):
        self.steps, self.rows = 0, [1]


@dataclasses.dataclass(slots=True)
class Slotted:
    steps: int = 0
    rows: list = dataclasses.field(default_factory=lambda: [1])
    late: object = dataclasses.field(init=False, default=None)


class Stubborn:
    """Of a subclass, what the user wrote is not what puts its items back."""

    def clear(self):
        raise RuntimeError("not to be emptied")

    update = extend = __len__ = __iter__ = values = items = clear


class OwnList(Stubborn, list):
    __repr__ = list.__repr__


class OwnDict(Stubborn, dict):
    __repr__ = dict.__repr__


class OwnOrder(OrderedDict):
    def __setitem__(self, name, value):
        if name == "refused":
            raise RuntimeError(name)
        super().__setitem__(name, value)


class Loud(deque):
    def __init__(self, first, second):
        super().__init__([first, second])


def write_slots(held):
    held.steps, held.late = 1, []
    held.rows.append(2)


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
    "slots": (Slotted(), write_slots),
    "a list of the user's class": (OwnList([1]), lambda held: held.append(2)),
    "a dict of the user's class": (OwnDict(a=[1]), lambda held: held["a"].append(2)),
    "a dict of the user's class, other names": (OwnDict(a=1), lambda held: held.pop("a")),
    "ordered, of the user's class": (OwnOrder(a=1, b=2), lambda held: held.move_to_end("a")),
    "a deque with arguments of its own": (Loud(1, 2), lambda held: held.rotate()),
    "a default of the user's": (type("Mine", (defaultdict,), {})(list), lambda held: held["new"].append(1)),
    "UserDict": (UserDict(a=1), lambda held: held.update(b=2)),
    "attributes of a list": (OwnList([Notes()]), lambda held: write_notes(list.__getitem__(held, 0))),
    "set in a list": ([{1}], lambda held: held[0].add(2)),
    "bytearray": (bytearray(b"ab"), lambda held: held.append(1)),
    "array in a dict": ({"a": np.zeros(2)}, lambda held: held["a"].__setitem__(0, 1)),
}


def spelled(held):
    return repr(
        [vars(x) if isinstance(x, Notes) else x for x in (list.__iter__(held) if isinstance(held, list) else [held])]
    )


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


class Proxy:
    """It says that it is of the class of what it stands for, as those of wrapt and of mocks do."""

    def __init__(self, target):
        self.target = target

    @property
    def __class__(self):
        return type(object.__getattribute__(self, "__dict__")["target"])


def test_a_proxy_is_followed_to_the_container_that_it_stands_for():
    module = nn.Linear(2, 2)
    module.held = Proxy({"rows": 1})
    state = HeldState([("", module)])
    module.held.target["rows"] = 2
    state.restore()
    assert module.held.target == {"rows": 1}


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


@pytest.mark.parametrize("near_first", [False, True])
def test_a_longer_way_to_a_thing_hides_nothing_behind_it(near_first):
    module, notes = nn.Linear(2, 2), Notes()
    far = [[[[[notes]]]]]  # so many steps that what the notes hold is not followed
    for name in ("near", "far") if near_first else ("far", "near"):
        setattr(module, name, notes if name == "near" else far)
    state = HeldState([("", module)])
    write_notes(notes)
    state.restore()
    assert vars(notes) == {"steps": 0, "rows": [1]}


def test_a_slot_that_was_empty_is_empty_again():
    class Lazy:
        __slots__ = ("__hidden",)

        def fill(self):
            self.__hidden = 1

    module = nn.Linear(2, 2)
    module.lazy = Lazy()
    state = HeldState([("", module)])
    module.lazy.fill()
    state.restore()
    assert not hasattr(module.lazy, "_Lazy__hidden")


def test_what_is_kept_of_large_containers_is_bounded_in_all(monkeypatch):
    monkeypatch.setattr("moeopt.capture.held_state._ALL_ITEMS", 100)
    monkeypatch.setattr("moeopt.capture.held_state._ALL_BYTES", 1000)
    module = nn.Linear(2, 2)
    module.own = list(range(500))
    module.lists = [list(range(30)) for _ in range(50)]
    arrays = nn.Linear(2, 2)
    arrays.held = [np.zeros(50), np.zeros(50), np.zeros(100)]
    state, other = HeldState([("", module)]), HeldState([("", arrays)])
    module.own.append(0)
    module.lists[0].append(0)
    arrays.held[0][:] = 1
    state.restore()
    other.restore()
    assert len(module.own) == 500  # an attribute of a module always
    assert len(module.lists[0]) == 30 and not arrays.held[0].any()  # the nearest first
    assert (
        sum(len(copy) for _, copy in state.contents.values() if type(copy) is list and type(copy[0]) is int)
        == 500 + 3 * 30
    )
    assert sum(values.nbytes for _, values in other._arrays) == 800
