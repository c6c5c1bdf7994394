"""A limit on time ends what computes too long, and not what waits for a busy machine."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moeopt
from moeopt import limits
from moeopt.errors import LimitError
from moeopt.limits import STILL, LoadLimits, TimeLimit


@pytest.fixture
def clocks(monkeypatch):
    now = SimpleNamespace(clock=100.0, cpu=7.0)
    monkeypatch.setattr(
        limits, "time", SimpleNamespace(monotonic=lambda: now.clock, process_time=lambda: now.cpu)
    )  # fmt: skip
    return now


@pytest.mark.parametrize(
    ("clock", "cpu", "over"),
    [
        (9.9, 9.9, False),
        (10.0, 10.0, True),
        (150.0, 9.9, False),  # a machine with a load of 30 gave it a fifteenth of a core
        (150.0, 10.0, True),
        (9.9, 80.0, False),  # eight threads, or other work of this process: the clock decides
        (STILL * 10.0, 0.0, True),  # it waits for something that does not come
    ],
)
def test_when_time_is_over(clocks, clock, cpu, over):
    limit = TimeLimit(10.0)
    clocks.clock += clock
    clocks.cpu += cpu
    assert limit.over is over


def test_no_limit_is_never_over(clocks):
    limit = TimeLimit(float("inf"))
    clocks.clock = clocks.cpu = 1e12
    assert not limit.over


def test_whoever_watches_ends_what_is_over_and_leaves_what_is_done(clocks):
    ended: list[str] = []
    done = threading.Event()
    done.set()
    TimeLimit(10.0).watch(done, lambda: ended.append("too early"))
    limit = TimeLimit(10.0)
    clocks.clock, clocks.cpu = 1e3, 1e3
    limit.watch(done, lambda: ended.append("done already"))
    assert not ended
    limit.watch(threading.Event(), lambda: ended.append("over"))
    assert ended == ["over"]


class Long(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = torch.tanh(x @ x)
        return x


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_bundle_that_computes_longer_than_it_may(tmp_path, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) / 16
    path = moeopt.optimize(Long().eval(), x, backend=backend, verify="fast").save(tmp_path / "b")
    with pytest.raises(
        LimitError, match=r"longer than 1e-05 s: if you trust the bundle, give it .*LoadLimits\(seconds"
    ):
        moeopt.verify(path, limits=LoadLimits(seconds=1e-5))
    assert moeopt.verify(path, limits=LoadLimits(seconds=600)).passed


def test_a_process_that_waits_is_given_more_and_one_that_computes_is_ended(tmp_path):
    """The child that tries a graph counts as its parent does."""
    from moeopt.backends.onnxrt.trial import _CHILD

    code = _CHILD.read_text().replace('if __name__ == "__main__":\n    main()', "")
    waits = (
        code + "\nthreading.Thread(target=limit_time, args=(0.2,), daemon=True).start()\ntime.sleep(0.6)\nprint('good')"
    )
    works = code + "\nthreading.Thread(target=limit_time, args=(0.2,), daemon=True).start()\nwhile True: pass"
    ends = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        for text in (waits, works)
    ]
    assert [end.stdout.split() for end in ends] == [["good"], ["time"]], [end.stderr for end in ends]
