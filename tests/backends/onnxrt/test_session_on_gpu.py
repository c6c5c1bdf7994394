"""What a session on a GPU asks of ONNX Runtime and of torch, in which order: recorded by stand-ins, on a CPU.

The stand-in of ``InferenceSession`` computes x * 2 from the addresses that are bound, so a wrong buffer is a wrong
number. Tensors "on the GPU" are a subclass that says cuda:1 and keeps its values in memory of the CPU.
"""

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch

from moeopt.backends.onnxrt import session as sessions
from moeopt.backends.onnxrt.cuda_graph import CUDA_GRAPH, GRAPHS
from moeopt.errors import EngineNotExecutableError, UsageError

DEVICE = torch.device("cuda", 1)
TORCH = {1: torch.float32, 7: torch.int64}
log = []


class OnDevice(torch.Tensor):
    """A tensor of cuda:1 whose values are in ``real``; copies to another device are logged."""

    @staticmethod
    def __new__(cls, real):
        made = torch.Tensor._make_wrapper_subclass(cls, real.shape, dtype=real.dtype, device=DEVICE)
        made.real_values = real.contiguous()
        return made

    def data_ptr(self):
        return self.real_values.data_ptr()

    def copy_(self, other):
        self.real_values.copy_(plain(other))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            log.append("a copy between devices")
        plain = [a.real_values if isinstance(a, OnDevice) else a for a in args]
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "device"}
        return OnDevice(func(*plain, **kwargs))


class Stream:
    def __init__(self, name):
        self.name, self.cuda_stream = name, 4096

    def wait_stream(self, other):
        log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        log.append(f"the host waits for {self.name}")


def at(address, shape, kind):
    if not torch.Size(shape).numel():
        return torch.empty(shape, dtype=TORCH[kind])
    flat = (ctypes.c_char * (torch.Size(shape).numel() * TORCH[kind].itemsize)).from_address(address)
    return torch.frombuffer(flat, dtype=TORCH[kind]).view(shape)


class Binding:
    def __init__(self):
        self.inputs, self.given, self.made = {}, {}, []

    def bind_input(self, name, device, index, kind, shape, address):
        log.append(f"bind {name} on {device}:{index}")
        self.inputs[name] = (address, shape, kind)

    def bind_output(self, name, device, index, kind=None, shape=None, address=None):
        if address is None:
            self.given.pop(name, None)
        else:
            self.given[name] = (address, shape, kind)

    def get_outputs(self):
        return [SimpleNamespace(_ortvalue=SimpleNamespace(to_dlpack=lambda t=t: t.__dlpack__())) for t in self.made]

    def clear_binding_outputs(self):
        self.made = []

    def synchronize_outputs(self):
        log.append("the host waits for the outputs")


class FakeInferenceSession:
    """y = 2 x, for "gpu_graph_id" 1 and more into the output buffer that its first such run had."""

    refuses = None

    def __init__(self, source, options, providers):
        if self.refuses:
            raise RuntimeError(self.refuses)
        ((self.provider, self.options),) = providers
        self.graphs = {}

    def get_providers(self):
        return [self.provider]

    def get_provider_graph_assignment_info(self):
        return []

    def get_inputs(self):
        return [SimpleNamespace(name="x"), SimpleNamespace(name="ids")]

    def get_outputs(self):
        return [SimpleNamespace(name="y", type="tensor(float)")]

    def io_binding(self):
        log.append("a new binding")
        return Binding()

    def run_with_iobinding(self, binding, options=None):
        number = getattr(options, "entries", {}).get("gpu_graph_id")
        log.append("run" if number is None else f"run, graph {number}")
        if number in (None, "-1"):
            binding.made = [at(*binding.inputs["x"]) * 2]
        else:
            source, target = self.graphs.setdefault(number, (binding.inputs["x"], binding.given["y"]))
            at(*target).copy_(at(*source) * 2)


class Options:
    def __init__(self):
        self.entries = {}

    def add_session_config_entry(self, name, value):
        self.entries[name] = value

    add_run_config_entry = add_session_config_entry

    def get_session_config_entry(self, name):
        return self.entries[name]


@pytest.fixture
def stream(monkeypatch):
    """The caller's stream, which a test may replace; ``torch.cuda`` and ONNX Runtime are stand-ins."""
    log.clear()
    held = SimpleNamespace(now=Stream("default"), default=None)
    held.default = held.now
    fake = SimpleNamespace(InferenceSession=FakeInferenceSession, SessionOptions=Options, RunOptions=Options)
    monkeypatch.setattr(sessions, "runtime", lambda: fake)
    monkeypatch.setattr(sessions, "available", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("its own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: held.now)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: held.default)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: threading.Lock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: log.append(f"kept for {s.name}"))
    return held


def feeds(T=2):
    return {"x": OnDevice(torch.arange(T * 4.0).view(T, 4) + 1), "ids": OnDevice(torch.arange(T))}


def plain(tensor):
    return tensor.real_values if isinstance(tensor, OnDevice) else tensor


def test_nothing_is_copied_and_the_host_waits_for_nothing_of_ours(stream):
    session = sessions.Session(b"", "cuda")
    assert session.device == DEVICE
    assert session.session.options == {"use_tf32": "0", "device_id": "1", "user_compute_stream": "4096"}
    given = feeds()
    (y,) = session.run(given)
    assert torch.equal(plain(y), plain(given["x"]) * 2)
    assert log == [
        "a new binding", "bind x on cuda:1", "bind ids on cuda:1",
        "its own waits for default", "run", "default waits for its own",
    ]  # fmt: skip


def test_the_same_buffers_stay_bound_and_outputs_never_alias(stream):
    session, given = sessions.Session(b"", "cuda"), feeds()
    (first,) = session.run(given)
    log.clear()
    plain(given["x"]).mul_(10)
    (second,) = session.run(given)
    assert log == ["its own waits for default", "run", "default waits for its own"]
    assert torch.equal(second, first * 10) and second.data_ptr() != first.data_ptr()
    log.clear()
    session.run(given | {"x": feeds()["x"]})
    assert log[0] == "bind x on cuda:1" and "bind ids on cuda:1" not in log


def test_another_shape_at_the_same_address_is_bound_anew(stream):
    session = sessions.Session(b"", "cuda")
    whole = torch.arange(8.0).view(2, 4)
    session.run({"x": OnDevice(whole), "ids": OnDevice(torch.arange(2))})
    (y,) = session.run({"x": OnDevice(whole.view(4, 2)), "ids": OnDevice(torch.arange(2))})
    assert y.shape == (4, 2)


def test_integers_on_the_cpu_stay_there(stream):
    session = sessions.Session(b"", "cuda")
    session.run(feeds() | {"ids": torch.arange(2)})
    assert "bind ids on cpu:0" in log and "a copy between devices" not in log


def test_a_caller_on_a_side_stream_is_waited_for_once(stream):
    session, stream.now = sessions.Session(b"", "cuda"), Stream("side")
    session.run(feeds())
    assert [line for line in log if "wait" in line] == ["the host waits for side", "side waits for its own"]


def test_each_thread_has_a_binding_of_its_own(stream):
    session = sessions.Session(b"", "cuda")
    session.run(feeds())
    other = threading.Thread(target=session.run, args=(feeds(),))
    other.start()
    other.join()
    assert log.count("a new binding") == 2


def with_graphs(value="1"):
    options = Options()
    options.add_session_config_entry(CUDA_GRAPH, value)
    return options


def test_a_graph_is_captured_from_the_second_run_on_and_fed_through_its_own_buffers(stream):
    session = sessions.Session(b"", "cuda", with_graphs())
    assert session.session.options["enable_cuda_graph"] == "1"
    kept = []
    for scale in (1, 2, 3):
        given = feeds()
        plain(given["x"]).mul_(scale)
        (y,) = session.run(given)
        kept.append((plain(y), plain(given["x"]).clone() * 2))
    assert all(torch.equal(got, want) for got, want in kept)  # nor was an earlier result written over
    assert [line for line in log if line.startswith("run")] == ["run, graph -1", "run, graph 1", "run, graph 1"]
    assert log.count("kept for default") == 2 and not any("the host waits" in line for line in log)


def test_each_set_of_shapes_has_a_graph_until_there_are_enough(stream):
    session = sessions.Session(b"", "cuda", with_graphs())
    for _ in range(2):
        for T in range(1, GRAPHS + 2):
            (y,) = session.run(feeds(T))
            assert torch.equal(plain(y), plain(feeds(T)["x"]) * 2)
    numbers = [line.removeprefix("run, graph ") for line in log if line.startswith("run")]
    assert numbers[GRAPHS + 1 :] == [*map(str, range(1, GRAPHS + 1)), "-1"]


def test_an_empty_tensor_is_not_captured(stream):
    session = sessions.Session(b"", "cuda", with_graphs())
    for _ in range(2):
        assert session.run(feeds(0))[0].shape == (0, 4)
    assert [line for line in log if line.startswith("run")] == ["run, graph -1"] * 2


def test_graphs_where_there_are_none(stream, monkeypatch):
    with pytest.raises(UsageError, match="ask for moeopt.cuda_graph, which is for the provider cuda; this is cpu"):
        sessions.Session(b"", "cpu", with_graphs())
    with pytest.raises(UsageError, match='moeopt.cuda_graph is "0" or "1", not \'yes\''):
        sessions.Session(b"", "cuda", with_graphs("yes"))
    monkeypatch.setattr(FakeInferenceSession, "refuses", "not all nodes are on CUDA")
    with pytest.raises(EngineNotExecutableError, match="with moeopt.cuda_graph: not all nodes are on CUDA. Leave it"):
        sessions.Session(b"", "cuda", with_graphs())


def test_a_run_that_fails_under_a_graph_says_how_to_do_without(stream, monkeypatch):
    session = sessions.Session(b"", "cuda", with_graphs())

    def fails(self, binding, options=None):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeInferenceSession, "run_with_iobinding", fails)
    with pytest.raises(UsageError, match="stream is capturing.*leave out moeopt.cuda_graph: not every graph can be"):
        session.run(feeds())
