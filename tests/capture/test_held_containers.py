"""What a run leaves in containers and hook tables goes back, with the attributes that tell of it."""

from collections import Counter, defaultdict

import pytest
import torch
from torch import nn

from moeopt.capture.held_state import CONTAINERS
from moeopt.capture.isolated_run import run_quietly
from moeopt.capture.tape import record
from moeopt.verification.model import run_plain


class Recorder(nn.Module):
    """Installs its hooks at the first call, as transformers' models do, and sets a flag for it."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, x):
        seen = []
        if not getattr(self, "_hooked", False):
            self.lin.register_forward_hook(lambda module, args, y: self.seen.append(y))
            self.lin.register_forward_pre_hook(lambda module, args: None)
            self._hooked = True
        self.seen = seen
        return self.lin(x), len(seen)


def run_verified(module, args):
    return run_plain(module, args, {})


RUNS = pytest.mark.parametrize("run", [run_quietly, record, run_verified], ids=lambda f: f.__name__)


@RUNS
def test_hooks_go_with_the_flag_that_tells_of_them(run):
    model = Recorder()
    for _ in range(3):
        run(model, (torch.ones(1, 2),))
        assert not model.lin._forward_hooks and not model.lin._forward_pre_hooks and not hasattr(model, "_hooked")
    assert [model(torch.ones(1, 2))[1] for _ in range(2)] == [1, 1]


@RUNS
@pytest.mark.parametrize("kind", CONTAINERS, ids=lambda t: t.__name__)
def test_what_is_put_into_a_container_is_taken_out(kind, run):
    class Keeps(nn.Module):
        def forward(self, x):
            for held in (self.empty, self.full):
                if isinstance(held, (dict, Counter)):
                    held["new"], held["a"] = 1, 5
                elif isinstance(held, set):
                    held.add("new")
                else:
                    held.append(7)
            return x + 1

    def made(items):
        return kind(int, items) if kind is defaultdict else kind(items)

    model, items = Keeps(), [3, 4] if kind is bytearray else [("a", 2), ("b", 1)]
    model.empty, model.full = made([]), made(items)
    before = list(made(items).items() if issubclass(kind, dict) else made(items))
    empty, full = model.empty, model.full
    run(model, (torch.ones(1),))
    assert model.empty is empty and not empty and model.full is full
    assert list(full.items() if isinstance(full, dict) else full) == before


class Writes(nn.Module):
    """Buffers that are parts of one memory, or see one number many times."""

    def __init__(self):
        super().__init__()
        a, b = torch.zeros(2, 1).unbind()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.register_buffer("one", torch.zeros(1, 1))
        self.wide, self.windows = self.one.expand(6, 4), torch.zeros(6).unfold(0, 3, 1)

    def forward(self, x):
        self.b.add_(1)
        self.one.add_(1)
        self.windows[0].add_(1)
        return x + self.b + self.wide


@RUNS
def test_memory_that_several_tensors_share_is_put_back_whole(run):
    model = Writes()
    run(model, (torch.zeros(6, 4),))
    assert [t.abs().sum() for t in (model.a, model.b, model.one, model.wide, model.windows)] == [0] * 5
