"""The clocks of a CPU and of a GPU, both stand-ins: what is read, and in which order with the flush and the call."""

from types import SimpleNamespace

import pytest
import torch

from moeopt.ops import stopwatch
from moeopt.ops.stopwatch import CPU_FLUSH, Stopwatch
from moeopt.pipeline.autotune import in_turn

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A log of what a stand-in of a GPU with 50 MB of L2 is asked; its clock gives 3 ms between two events."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            log.append(f"event on {stream}")

        def synchronize(self):
            log.append("wait for the event")

        def elapsed_time(self, end):
            return 3.0

    def zeros(count, device):
        log.append(f"{4 * count} bytes on {device}")
        return SimpleNamespace(add_=lambda one: log.append("flush"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50_000_000))
    monkeypatch.setattr(stopwatch, "_zeros", zeros)
    return log


def test_a_gpu_is_timed_by_its_events_behind_a_flush_of_its_own_memory(gpu):
    assert Stopwatch(CUDA, 1 << 40).seconds(lambda: gpu.append("call")) == 0.003
    assert gpu == [
        "100000000 bytes on cuda:0", "flush", "event on the stream of cuda:0", "call", "event on the stream of cuda:0",
        "wait for the event",
    ]  # fmt: skip


def test_no_more_is_flushed_than_the_rest_of_the_model_reads(gpu):
    Stopwatch(CUDA, 4000)
    assert gpu == ["4000 bytes on cuda:0"]


@pytest.mark.parametrize(("threads", "name"), [(1, "thread_time"), (2, "perf_counter")])
def test_a_cpu_is_timed_by_a_clock_of_the_host(monkeypatch, threads, name):
    now = [0.0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(stopwatch.time, name, lambda: now[0])
    watch = Stopwatch(torch.device("cpu"), 1 << 40)
    assert watch._scratch.numel() * 4 == CPU_FLUSH and watch._scratch.device.type == "cpu"
    assert watch.seconds(lambda: now.__setitem__(0, 2.5)) == 2.5


def test_a_call_by_keywords_is_timed_on_the_device_of_its_tensors(gpu):
    x = torch.Tensor._make_subclass(torch.Tensor, torch.empty(2, 3, device="meta"))

    class OnGpu(torch.Tensor):
        device = CUDA

    in_turn(lambda x: None, lambda x: None, ((), {"x": x.as_subclass(OnGpu)}), 2, 4000)
    assert gpu[0] == "4000 bytes on cuda:0" and "wait for the event" in gpu
