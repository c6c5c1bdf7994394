"""What a forward asks of the world outside of its process is told, or compared where it is a variable."""

import datetime
import json
import logging
import os
import pathlib
import random
import time
import uuid
import warnings
from os import environ, getenv

import pytest
import torch

from moeopt.errors import StaleModelWarning
from moeopt.options import EVERY_VARIABLE
from moeopt.rewrite.executed_code import observing
from tests.toy_moe import Block, build, close, optimized, seeded

X = seeded(2, 8, 16)
HERE = pathlib.Path(__file__)
ASKED = {
    "time.time": time.time,
    "time.monotonic_ns": lambda: time.monotonic_ns(),
    "time.localtime": lambda: time.localtime().tm_hour,
    "datetime.now": lambda: datetime.datetime.now(),
    "date.today": lambda: datetime.date.today(),
    "Random.random": lambda: random.random(),
    "Random.getrandbits": lambda: random.randint(0, 5),
    "os.urandom": lambda: uuid.uuid4(),
    "Generator.get_state": lambda: torch.get_rng_state(),
    "open": lambda: open(HERE).close(),
    "os.stat": lambda: os.path.exists(HERE),
    "os.listdir": lambda: os.listdir(HERE.parent),
    "os.scandir": lambda: list(os.scandir(HERE.parent)),
}


def asked(function):
    with observing([]) as observed:
        function()
    return observed.ran()


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_is_named_with_its_line(name):
    function = ASKED[name]
    (place, *_) = asked(lambda: function()).outside
    assert place.startswith(f"{name} ({HERE.name}:"), place


def of_the_user_s_own_helper():
    return pathlib.Path(HERE).read_text()


def test_a_file_is_named_by_the_user_s_line():
    line = of_the_user_s_own_helper.__code__.co_firstlineno + 1
    assert f"({HERE.name}:{line})" in asked(of_the_user_s_own_helper).outside[0]


def logs():
    logging.getLogger("nobody").warning("a record has the time of its own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("a warning looks for its line", stacklevel=1)
    return json.loads("{}"), os.path.join("a", "b"), pathlib.Path("a") / "b", random.Random(0), datetime.timedelta(1)


def test_what_loggers_and_warnings_ask_for_themselves_is_not_told(caplog):
    assert asked(logs).outside == ()


LOOKED_UP = {
    "one": (lambda: os.environ.get("READER_" + "scale".upper()), {"READER_SCALE"}),
    "by getenv": (lambda: os.getenv(f"READER_{'scale'.upper()}", "1"), {"READER_SCALE"}),
    "by names of their own": (lambda: (environ.get("READER_A"), getenv("READER_B")), {"READER_A", "READER_B"}),
    "whether it is there": (lambda: "READER_SCALE" in os.environ, {"READER_SCALE"}),
    "by bytes": (lambda: os.environb.get(b"READER_SCALE"), {"READER_SCALE"}),
    "all": (lambda: dict(os.environ), {EVERY_VARIABLE}),
    "all in a loop": (lambda: [v for k, v in os.environ.items() if k.startswith("READER_")], {EVERY_VARIABLE}),
}


@pytest.mark.parametrize("way", LOOKED_UP)
def test_each_variable_that_is_looked_up_is_seen(way):
    function, names = LOOKED_UP[way]
    assert names <= asked(function).variables


class Asks(Block):
    """Scales by a variable whose name is computed, by those that begin so, and by whether a file is there."""

    prefix = "READER"

    def forward(self, x):
        scale = float(os.getenv(f"{self.prefix}_SCALE", "1"))
        scale += sum(float(value) for key, value in environ.items() if key.startswith(f"{self.prefix}_OTHER"))
        return super().forward(x) * (scale + os.path.exists(HERE))


def test_variables_of_computed_names_are_watched_and_files_are_told(monkeypatch):
    model = build(Asks)
    fast = optimized(model)
    (note,) = (note for note in fast.report.notes if "asks" in note)
    line = Asks.forward.__code__.co_firstlineno + 3
    assert note == (
        f"the code of Asks asks os.stat ({HERE.name}:{line}), and nobody watches that: what the answers decided when "
        "it was verified stays decided; optimise again where that changes"
    )
    for name in ("READER_SCALE", "READER_OTHER_1"):
        with monkeypatch.context() as patch, pytest.warns(StaleModelWarning, match=f"the variable {name}, which"):
            patch.setenv(name, "3")
            close(fast(X), model(X))
    before = fast.model.forward.fallbacks
    close(fast(X), model(X))
    assert fast.model.forward.fallbacks == before == 2


def doubles():
    return os.getenv("READER_DOUBLES") == "1"


NOT_IN_RECORDED_CALLS = {
    "of one row": lambda x: len(x) == 1 and os.getenv("READER_DOUBLES") == "1",
    "with gradients": lambda x: torch.is_grad_enabled() and os.environ.get("READER_DOUBLES") == "1",
    "in a function": lambda x: torch.is_grad_enabled() and doubles(),
    "as bytes": lambda x: os.environb.get(b"READER_" + b"DOUBLES") == b"1",
}


class DoublesSome(Block):
    when = None

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if DoublesSome.when(x) else y


@pytest.mark.parametrize("when", NOT_IN_RECORDED_CALLS)
def test_a_variable_is_watched_where_no_recorded_call_asked_for_it(when, monkeypatch):
    """A branch of one row, or of calls with gradients: its lookups are named in the code, and were not seen."""
    monkeypatch.setattr(DoublesSome, "when", staticmethod(NOT_IN_RECORDED_CALLS[when]))
    model, x = build(DoublesSome), X[:1, :1]
    fast = optimized(model)
    close(fast(x), model(x))
    monkeypatch.setenv("READER_DOUBLES", "1")
    with pytest.warns(StaleModelWarning, match="the variable READER_DOUBLES, which its code reads"):
        close(fast(x), model(x))


def test_a_block_that_asks_nothing_has_no_note():
    assert not [note for note in optimized(build()).report.notes if "asks" in note]


class OtherwiseCompiled(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if torch.compiler.is_compiling() else y


def test_a_block_that_asks_whether_it_is_compiled_computes_what_was_verified_and_that_is_told():
    model = build(OtherwiseCompiled)
    fast = optimized(model)
    (note,) = (note for note in fast.report.notes if "asks" in note)
    assert note == (
        "the code of OtherwiseCompiled asks is_compiling: compiled and exported, the rewritten code computes what was "
        "verified, which is what it computes when it is neither"
    )
    with torch.no_grad():
        close(torch.compile(fast.model, backend="eager")(X), model(X))
        close(torch.export.export(fast.model, (X,)).module()(X), model(X))
