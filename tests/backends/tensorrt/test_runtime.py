"""The runner without a GPU: a stand-in for the package checks addresses, shapes, profiles and every refusal."""

from types import SimpleNamespace

import pytest
import torch

from moeopt.backends.tensorrt import runtime
from moeopt.backends.tensorrt.product import Product
from moeopt.backends.tensorrt.runtime import EngineRunner, Machine, Needs, lacking, this_machine
from moeopt.errors import EngineNotExecutableError, UsageError

NEEDS = Needs("tensorrt_rtx", "1.7.1.116", 89, 13)
HERE = Machine(sm=89, version="1.7.1.116", cuda=13)


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (Machine(None, "1.7.1.116"), "it needs a GPU of compute capability 8.9, and this machine has none"),
        (Machine(120, "1.7.1.116", 13), "built for sm_89, and this machine's GPU is sm_120: optimise the model again"),
        (
            Machine(89, None, 13),
            "TensorRT for RTX 1.7.1.116, which is not installed: pip install tensorrt-rtx-cu13==",
        ),
        (
            Machine(89, "1.8.0", 13),
            "built by TensorRT for RTX 1.7.1.116, and 1.8.0 is installed, which does not read",
        ),
        (Machine(89, "1.7.1.116", 12), "a driver for CUDA 13, and this one is for CUDA 12: update the GPU's driver"),
    ],
)
def test_what_a_machine_lacks(here, words):
    assert words in lacking(NEEDS, here)


def test_a_machine_that_has_it():
    assert lacking(NEEDS, HERE) == "" and lacking(NEEDS, Machine(89, "1.7.1.116", 14)) == ""
    assert lacking(Needs("tensorrt", "11.1", 90), Machine(90, "11.1", None)) == ""
    assert "pip install tensorrt==11.1" in lacking(Needs("tensorrt", "11.1", 90), Machine(90, "11.0"))


def test_this_machine(monkeypatch):
    monkeypatch.setattr("moeopt.backends.tensorrt.product.product", lambda name: SimpleNamespace(version="5"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_machine("tensorrt_rtx") == Machine(None, "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    assert this_machine("tensorrt_rtx") == Machine(86, "5", 13)


class Context:
    """Doubles x into y; it knows tensors by their addresses alone, as TensorRT does."""

    def __init__(self, fails=()):
        self.shapes, self.addresses, self.log, self.fails = {}, {}, [], fails

    def set_optimization_profile_async(self, number, stream):
        self.log.append(("profile", number, stream))
        return "profile" not in self.fails

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return "shape" not in self.fails

    def set_tensor_address(self, name, address):
        assert address, "TensorRT refuses a null address"
        self.addresses[name] = address
        return True

    def infer_shapes(self):
        return ["n"] if "infer" in self.fails else []

    def get_tensor_shape(self, name):
        return (-1, 2) if "data" in self.fails else self.shapes["x"]

    def execute_async_v3(self, stream):
        self.log.append(("run", stream))
        count = self.shapes["x"][0] * self.shapes["x"][1]
        array = __import__("ctypes").c_float * count
        x, y = (array.from_address(self.addresses[name]) for name in "xy")
        for n in range(count):
            y[n] = 2 * x[n]
        return "run" not in self.fails


class Engine:
    num_io_tensors = 2

    def __init__(self, context, dtype="FLOAT"):
        self.context, self.dtype = context, dtype

    def create_execution_context(self):
        return self.context

    def get_tensor_name(self, number):
        return "xy"[number]

    def get_tensor_mode(self, name):
        return "in" if name == "x" else "out"

    def get_tensor_location(self, name):
        return "device"

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.dtype)


def package(engine, complaint="the plan is of another version"):
    """A module with the part of TensorRT's API that a runner uses."""

    class ILogger:
        pass

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            assert plan == b"plan"
            self.logger.log(SimpleNamespace(name="INFO"), "hello")
            if engine is None or engine.context is None:
                self.logger.log(SimpleNamespace(name="ERROR"), complaint)
            return engine

    names = dict(TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), TensorLocation=SimpleNamespace(HOST="host"))
    return Product("tensorrt_rtx", "1.7", SimpleNamespace(ILogger=ILogger, Runtime=Runtime, **names))


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """``runner(fails...)``: a runner of the doubling engine on the CPU, its profiles 1 to 4 and 5 to 8 rows."""
    monkeypatch.setattr(runtime, "stream_of", lambda device: 77)
    (tmp_path / "engine.plan").write_bytes(b"plan")
    profiles = [{"x": ((low, 2), (low, 2), (high, 2))} for low, high in ((0, 4), (5, 8))]

    def make(*fails, engine=None, profiles=profiles):
        product = package(engine or Engine(Context(fails)))
        return EngineRunner(tmp_path / "engine.plan", product, "tensorrt_rtx sm_89", profiles, torch.device("cpu"))

    make.path = tmp_path / "engine.plan"
    return make


def test_tensors_go_in_and_out_by_address(runner):
    found = runner()
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(found.run({"x": x, "other": x})[0], 2 * x)
    assert torch.equal(found.run({"x": x.t().contiguous().t()})[0], 2 * x), "strides do not matter"
    assert (found.inputs, found.outputs, found.provider) == (["x"], ["y"], "tensorrt_rtx sm_89")
    assert found._context.log == [("run", 77), ("run", 77)]


def test_the_profile_follows_the_sizes(runner):
    found = runner()
    for rows in (7, 8, 2, 0):
        assert found.run({"x": torch.ones(rows, 2)})[0].shape == (rows, 2)
    assert [entry for entry in found._context.log if entry[0] == "profile"] == [("profile", 1, 77), ("profile", 0, 77)]
    with pytest.raises(UsageError, match="x has size 9 at axis 0, and the engine was built for 0 to 4: optimise the"):
        found.run({"x": torch.ones(9, 2)})
    assert runner(profiles=[]).run({"x": torch.ones(9, 2)})[0].shape == (9, 2)


def test_another_dtype(runner):
    with pytest.raises(UsageError, match="x is torch.float16, and the engine takes torch.float32"):
        runner().run({"x": torch.ones(2, 2).half()})


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("profile", "tensorrt_rtx 1.7 refuses profile 1: it gives no reason"),
        ("shape", r"tensorrt_rtx 1.7 refuses the shape \(5, 2\) of x"),
        ("infer", "tensorrt_rtx 1.7 does not know the sizes of n"),
        ("data", r"the sizes \(-1, 2\) of y depend on values: run the engine's ONNX form"),
        ("run", "tensorrt_rtx 1.7 refuses running it"),
    ],
)
def test_what_the_runtime_refuses(runner, fails, words):
    with pytest.raises(EngineNotExecutableError, match=words):
        runner(fails).run({"x": torch.ones(5, 2)})


def test_a_plan_that_does_not_load(runner):
    for engine in (SimpleNamespace(context=None, create_execution_context=lambda: None),):
        with pytest.raises(EngineNotExecutableError, match="engine.plan: tensorrt_rtx 1.7 does not load it: the plan"):
            runner(engine=engine)
    with pytest.raises(EngineNotExecutableError, match="does not load it: the plan is of another version"):
        EngineRunner(runner.path, package(None), "p", device=torch.device("cpu"))


def test_a_dtype_that_pytorch_lacks(runner):
    with pytest.raises(EngineNotExecutableError, match="an engine with an end of the dtype FP4 has no tensors in"):
        runner(engine=Engine(Context(), "FP4"))
