"""A function without arguments that tells where code runs, or in which mode: another answer is told."""

import contextlib
import decimal
import gc
import logging
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, build, close, optimized, seeded

X = seeded(2, 8, 16)


@contextlib.contextmanager
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def seed():
    before = torch.initial_seed()
    torch.manual_seed(before + 1)
    yield
    torch.manual_seed(before)


@contextlib.contextmanager
def anomalies():
    with torch.autograd.set_detect_anomaly(True):
        yield


@contextlib.contextmanager
def group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def flag(holder, name):
    @contextlib.contextmanager
    def changed():
        before = getattr(holder, name)
        setattr(holder, name, not before)
        yield
        setattr(holder, name, before)

    return changed


LOGGER = logging.getLogger(__name__)
BACKENDS, CUDA, MHA = torch.backends, torch.backends.cuda, torch.backends.mha


@contextlib.contextmanager
def autocast_in_half():
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    yield
    torch.set_autocast_dtype("cpu", before)


@contextlib.contextmanager
def autocast_on_mps():
    torch.set_autocast_enabled("mps", True)
    yield
    torch.set_autocast_enabled("mps", False)


@contextlib.contextmanager
def level(logger):
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(before)


@contextlib.contextmanager
def elsewhere():
    before = os.getcwd()
    os.chdir(os.path.dirname(before))
    yield
    os.chdir(before)


@contextlib.contextmanager
def no_collector():
    gc.disable()
    yield
    gc.enable()


@contextlib.contextmanager
def with_another_argument():
    sys.argv.append("--all")
    yield
    sys.argv.pop()


@contextlib.contextmanager
def precision_of_mkldnn():
    before = BACKENDS.mkldnn.matmul.fp32_precision
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    yield
    BACKENDS.mkldnn.matmul.fp32_precision = before


@contextlib.contextmanager
def no_fastpath():
    MHA.set_fastpath_enabled(False)
    yield
    MHA.set_fastpath_enabled(True)


ASKED = {
    "torch.get_autocast_dtype('cpu')": (
        lambda: torch.get_autocast_dtype("cpu") is torch.float16, autocast_in_half,
    ),
    "torch.is_autocast_enabled('mps')": (lambda: torch.is_autocast_enabled("mps"), autocast_on_mps),
    "LOGGER.level": (lambda: LOGGER.isEnabledFor(logging.DEBUG), lambda: level(LOGGER)),
    "the logger root.level": (lambda: logging.getLogger().isEnabledFor(logging.DEBUG), lambda: level(logging.root)),
    "the logger a.b.level": (
        lambda: logging.getLogger("a.b").getEffectiveLevel() == 10, lambda: level(logging.getLogger("a.b")),
    ),
    "decimal.getcontext()": (
        lambda: decimal.getcontext().prec == 5, lambda: decimal.localcontext(decimal.Context(prec=5)),
    ),
    "numpy.geterr()": (lambda: np.geterr()["divide"] == "ignore", lambda: np.errstate(divide="ignore")),
    "gc.isenabled()": (lambda: not gc.isenabled(), no_collector),
    "os.getcwd()": (lambda: len(os.getcwd()) % 7, elsewhere),
    "sys.argv": (lambda: "--all" in sys.argv, with_another_argument),
    "torch.backends.opt_einsum.enabled": (
        lambda: not torch.backends.opt_einsum.enabled, flag(torch.backends.opt_einsum, "enabled"),
    ),
    "torch.backends.cuda.matmul.allow_fp16_accumulation": (
        lambda: CUDA.matmul.allow_fp16_accumulation, flag(CUDA.matmul, "allow_fp16_accumulation"),
    ),
    "torch.backends.mkldnn.matmul.fp32_precision": (
        lambda: BACKENDS.mkldnn.matmul.fp32_precision == "bf16", precision_of_mkldnn,
    ),
    "torch.backends.mha.get_fastpath_enabled()": (lambda: not MHA.get_fastpath_enabled(), no_fastpath),
    "torch.backends.cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic, flag(torch.backends.cudnn, "deterministic"),
    ),
    "torch.backends.cuda.matmul.allow_tf32": (
        lambda: torch.backends.cuda.matmul.allow_tf32, flag(torch.backends.cuda.matmul, "allow_tf32"),
    ),
    "torch.backends.mkldnn.enabled": (
        lambda: not torch.backends.mkldnn.enabled, lambda: torch.backends.mkldnn.flags(enabled=False),
    ),
    "torch.get_num_threads()": (lambda: torch.get_num_threads(), threads),
    "torch.initial_seed()": (lambda: torch.initial_seed() % 7, seed),
    "torch.is_anomaly_enabled()": (lambda: torch.is_anomaly_enabled(), anomalies),
    "torch.distributed.is_initialized()": (lambda: torch.distributed.is_initialized(), group),
}  # fmt: skip
IN_A_THREAD = {
    "threading.current_thread()": lambda: threading.current_thread() is not threading.main_thread(),
    "threading.get_ident()": lambda: threading.get_ident() != threading.main_thread().ident,
}


class Asking(Block):
    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, x):
        return super().forward(x) * (1.0 + self.ask())


@pytest.mark.parametrize("name", ASKED)
def test_another_answer_is_told_and_the_original_answers(name):
    ask, change = ASKED[name]
    model = build(Asking, ask=ask)
    fast = optimized(model)
    before = fast(X)
    assert not fast.model.forward.fallbacks
    with change(), pytest.warns(StaleModelWarning, match=re.escape(f"{name}, which its code reads")):
        got, want = fast(X), model(X)
    close(got, want)
    assert not torch.equal(got, before)
    assert torch.equal(fast(X), before) and fast.model.forward.fallbacks == 1


@pytest.mark.parametrize("name", IN_A_THREAD)
def test_another_thread_is_told_where_the_code_asks_for_it(name):
    model = build(Asking, ask=IN_A_THREAD[name])
    fast = optimized(model)
    before = fast(X)
    with ThreadPoolExecutor(1) as pool, pytest.warns(StaleModelWarning, match=name.replace("()", r"\(\)")):
        got = pool.submit(fast, X).result()
    close(got, model(X) * 2)
    assert not torch.equal(got, before) and torch.equal(fast(X), before)


class WithLevel:
    """What has attributes of a logger's names, and is none."""

    level, disabled = 1, False


class Names(Asking):
    """It names ``level`` and ``disabled``, of itself and of a configuration, and logs."""

    level, config = 1, WithLevel()

    def __init__(self, **sizes):
        super().__init__(ask=None, **sizes)
        self.ask = self.own

    def own(self):
        config = self.config
        LOGGER.debug("level %s", self.level)
        return self.level > 3 or config.level > 3 or self.config.disabled


def test_attributes_of_a_logger_s_names_are_not_its_level():
    fast = optimized(build(Names))
    with level(LOGGER):
        fast(X)
    assert not fast.model.forward.fallbacks


class Holds(Names):
    """It has the logger by another name too, and asks for the level by that one."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.log = LOGGER

    def own(self):
        LOGGER.debug("is called")
        return asked(self)

    @property
    def logger(self):
        return self.log


class Computes(Holds):
    def __getattr__(self, name):
        return self.log if name == "computed" else super().__getattr__(name)


def by_itself(of):
    return of.log.level == logging.DEBUG


def by_a_local(of):
    log = of.log
    return log.level == logging.DEBUG


def by_an_argument(of):
    return level_of(of.log) == logging.DEBUG


def by_a_string(of):
    return getattr(of.log, "level") == logging.DEBUG  # noqa: B009


def by_a_closure(of):
    log = of.log
    return (lambda: log.level)() == logging.DEBUG


def by_one_of_two(of):
    return (of.log or ANOTHER).level == logging.DEBUG


def by_a_local_of_two(of):
    log = of.log if of.config is not None else ANOTHER
    return log.level == logging.DEBUG


def by_an_argument_with_a_default(of):
    return level_of_given(of.log) == logging.DEBUG


def by_a_property(of):
    return of.logger.level == logging.DEBUG


def by_getattr(of):
    return of.computed.level == logging.DEBUG


def level_of(log):
    return log.level


def level_of_given(log=None):
    log = log or ANOTHER
    return log.level


ANOTHER = logging.getLogger("of.nobody")
asked = by_itself


@pytest.mark.parametrize(
    "way",
    (by_itself, by_a_local, by_an_argument, by_a_string, by_a_closure, by_one_of_two, by_a_local_of_two,
     by_an_argument_with_a_default, by_a_property, by_getattr),
)  # fmt: skip
def test_a_level_is_watched_by_whatever_name_it_is_asked(monkeypatch, way):
    monkeypatch.setitem(globals(), "asked", way)
    model = build(Computes if way is by_getattr else Holds)
    fast = optimized(model)
    with level(LOGGER), pytest.warns(StaleModelWarning, match=r"\.level, which its code reads"):
        close(fast(X), model(X))


def test_what_the_code_does_not_ask_for_does_not_matter():
    fast = optimized(build())
    with threads(), seed(), ThreadPoolExecutor(1) as pool:
        pool.submit(fast, X).result()
    assert not fast.model.forward.fallbacks
