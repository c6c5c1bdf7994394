"""Which modules a callable reaches, and what is put back after a run."""

import functools

import torch
from torch import nn

from moeopt.verification.state import RestoreState, clone_inputs_and_objects, modules_of


class Holder:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)


def test_modules_of_any_callable():
    lin = nn.Linear(2, 2)
    closure = lambda x: lin(x)  # noqa: E731
    for fn in (lin, lin.forward, closure, Holder(lin), functools.partial(closure, 1), functools.partial(lin)):
        assert modules_of(fn) == [lin], fn
    assert modules_of(torch.relu) == []


def test_a_parameter_written_or_replaced_comes_back():
    lin = nn.Linear(2, 2)
    value, kept = lin.weight.detach().clone(), lin.weight
    with torch.no_grad(), RestoreState(lin) as guard:
        guard.before_write(lin.weight[0])
        lin.weight[0] = 7
        lin.bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
        lin.extra = 1
        assert list(guard.after()) == ["weight"] and guard.written == ["weight"]
    assert lin.weight is kept and torch.equal(kept, value)
    assert lin.bias.dtype == torch.float32 and not hasattr(lin, "extra")


def test_a_parameter_whose_data_was_cast_comes_back():
    lin = nn.Linear(2, 2)
    address = lin.weight.data_ptr()
    with RestoreState(lin):
        lin.double()
    assert lin.weight.dtype == torch.float32 and lin.weight.data_ptr() == address


def test_the_random_stream_comes_back():
    before = torch.get_rng_state()
    with RestoreState(torch.relu):
        torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_are_cloned_and_modules_are_not():
    x, lin = torch.ones(2, requires_grad=True), nn.Linear(1, 1)
    copy = clone_inputs_and_objects({"x": (x, lin, "s", None)})
    assert copy["x"][0] is not x and not copy["x"][0].requires_grad and copy["x"][1] is lin


def test_what_a_run_registers_on_a_bare_module_goes_away():
    act = torch.nn.ReLU()
    with RestoreState(act):
        act.register_buffer("seen", torch.ones(2))
        act.register_parameter("scale", torch.nn.Parameter(torch.ones(2)))
        act.add_module("inner", torch.nn.Identity())
    assert not (act._buffers or act._parameters or act._modules)


def test_what_a_run_puts_into_containers_comes_out_again():
    lin = nn.Linear(2, 2)
    lin.seen, lin.counts, lin.names = [1], {"calls": 0}, {"a"}
    held = lin.seen, lin.counts, lin.names
    with RestoreState(lin):
        lin.seen.append(2)
        lin.counts["calls"] += 1
        lin.names.discard("a")
        lin.seen = []
    assert (lin.seen, lin.counts, lin.names) == ([1], {"calls": 0}, {"a"})
    assert all(now is before for now, before in zip((lin.seen, lin.counts, lin.names), held, strict=True))


def test_what_is_written_and_what_is_changed():
    module = nn.Module()
    module.register_buffer("whole", torch.arange(6.0))
    module.part, module.other = module.whole[:2], module.whole[4:]
    module.register_buffer("same", torch.tensor([1.0, torch.nan]))
    with RestoreState(module) as state:
        for tensor in (module.whole, module.same):
            state.before_write(tensor)
        module.whole[1], module.same[0] = 7.0, 1.0
        assert {"whole", "part", "other", "same"} <= set(state.after())
        assert state.changed() == {"whole", "part"}
    assert module.whole.tolist() == [0, 1, 2, 3, 4, 5]
