"""One thread, and nothing measured: the machines that run the suite are small, and sums are then in one order."""

import functools
import gc
import logging
import os
import shutil
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MOEOPT_MEASURE", "off")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# A trace makes objects by the hundred thousand: looked through at each 700 of them, a twelfth of the time goes there.
gc.set_threshold(20_000, 25, 25)
# pytest listens to each logger that hands nothing on; once one listens, torch works out what to say of each size.
_of_traces = logging.getLogger("torch.__trace")
_of_traces.propagate = True
_of_traces.handlers.clear()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its own functions ask for it then


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items):
    """All but each n-th case of a test that is marked ``sample(n)`` are nightly ones; what one_isa says of the rest.

    A test with several parameters has a case for each combination of their values. Each value is in one case at least,
    every day (each n-th case has the same value of a parameter with n of them), and on a lesser CPU: in the first that
    has it, beside the first values of the other parameters.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        if (mark := cases[0].get_closest_marker("sample")) is not None:
            sampled(cases, mark.args[0])
        seen: set[tuple[int, str]] = set()
        for item in cases:
            if item.get_closest_marker("nightly") is None:
                if values_of(item) <= seen:
                    item.add_marker(pytest.mark.one_isa)
                seen |= values_of(item)


def sampled(cases, each):
    """Marks as nightly what is neither each ``each``-th case nor the first with a value that none of those has."""
    left = [item for item in cases[::each] if item.get_closest_marker("nightly") is None]
    kept = set().union(*map(values_of, left))
    for number, item in enumerate(cases):
        if number % each:
            if len(values_of(item)) < 2 or values_of(item) <= kept:
                item.add_marker(pytest.mark.nightly)
            elif item.get_closest_marker("nightly") is None:
                kept |= values_of(item)


def values_of(item):
    """The number of each parameter of a test, and its value's name: one for each ``parametrize`` and each fixture with
    parameters; absent in another version of pytest."""
    return set(enumerate(getattr(getattr(item, "callspec", None), "_idlist", [item.nodeid])))


_modules = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What was imported stays as long as the process: the collector walks through it once, not with every full pass.

    It is half a million objects, and the passes over it are a twelfth of the suite's time.
    """
    global _modules
    if len(sys.modules) > _modules + 200:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


def pytest_sessionfinish():
    gc.unfreeze()  # libraries look for leaks when the process ends


@pytest.fixture(scope="session", autouse=True)
def this_machine_is_measured_once():
    """``inspect`` takes a second to measure this machine where no device is named, and the suite asks often."""
    from moeopt.inspection import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "this_machine", functools.cache(devices.this_machine))
        yield


@pytest.fixture
def fast_by_default(monkeypatch):
    """``verify="fast"`` for tests that name no other level, and show something else than what verification finds."""
    monkeypatch.setenv("MOEOPT_VERIFY", "fast")


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory):
    """The bundle of a small block, for tests that only read it."""
    from tests.toy_moe import build, optimized

    return optimized(build(), verify="fast").save(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="session")
def onnx_optimized():
    pytest.importorskip("onnxruntime")
    from tests.backends.onnxrt.toys import optimized

    return optimized()


@pytest.fixture(scope="session")
def onnx_pristine(onnx_optimized, tmp_path_factory):
    """A bundle that no test may write to."""
    return onnx_optimized.save(tmp_path_factory.mktemp("pristine") / "b")


@pytest.fixture
def onnx_bundle(onnx_pristine, tmp_path):
    """A copy of it."""
    return shutil.copytree(onnx_pristine, tmp_path / "b")
