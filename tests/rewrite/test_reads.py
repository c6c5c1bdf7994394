"""State that a block's Python reads: a change of it is followed, or told and answered with the original's numbers."""

import copy
import cProfile
import functools
import math
import pickle
import pstats
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from tests.rewrite import readers
from tests.rewrite.readers import Data, Norm, Reader, Softer
from tests.toy_moe import Block, build, close, optimized, seeded

X = torch.randn(2, 6, readers.H, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def both():
    """(model, optimised): whatever a test changes in them, it takes back."""
    sys.modules["reader_settings"] = readers.settings
    torch.manual_seed(0)
    model = Reader().eval()
    yield model, moeopt.optimize(model, X, verify="fast")
    del sys.modules["reader_settings"]


def attribute(path, value):
    def change(m, patch):
        *owners, name = path.split(".")
        patch.setattr(functools.reduce(getattr, owners, m), name, value() if isinstance(value, type) else value)

    return change


def item(path, key, value):
    return lambda m, patch: patch.setitem(functools.reduce(getattr, path.split("."), m), key, value)


def element(path, index, value):
    def change(m, patch):
        target = functools.reduce(lambda o, n: o[n] if isinstance(o, dict) else getattr(o, n), path.split("."), m)
        before, target[index] = target[index], value
        patch.callback(lambda: target.__setitem__(index, before))

    return change


def in_place(path, call, undo):
    def change(m, patch):
        target = functools.reduce(getattr, path.split("."), m)
        call(target)
        patch.callback(lambda: undo(target))

    return change


def elsewhere(owner, name, value):
    """A change outside the model: it is one for all copies."""
    return lambda m, patch: patch.once(owner, name, value)


def in_context(value):
    def change(m, patch):
        token = readers.CONTEXT.set(value)
        patch.callback(lambda: readers.CONTEXT.reset(token))

    return change


def defined_again(function):
    """What running its cell of a notebook a second time makes."""
    again = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    again.__kwdefaults__ = function.__kwdefaults__
    return again


def flat(w):
    return w * 0 + 1


INSIDE = {
    "namespace": attribute("cfg.top_k", 1),
    "namespace, more": attribute("cfg.top_k", 3),
    "chain": attribute("cfg.moe.scale", 3.0),
    "object in a chain replaced": attribute("cfg.moe", types.SimpleNamespace(scale=0.5, dtype=torch.float32)),
    "configuration replaced": attribute(
        "cfg", types.SimpleNamespace(top_k=1, moe=types.SimpleNamespace(scale=1.0, dtype=torch.float32))
    ),
    "dtype": attribute("cfg.moe.dtype", torch.int32),
    "attribute that was absent": attribute("cfg.flipped", True),
    "dataclass": attribute("data.scale", 4.0),
    "dataclass replaced": attribute("data", Data(scale=0.1)),
    "list in a dataclass": element("data.parts", 0, 5.0),
    "slots": attribute("slots.scale", 3.0),
    "slot that was empty": attribute("slots.spare", True),
    "below a property": attribute("derived.base", 5.0),
    "below __getattr__": lambda m, patch: patch.setitem(m.derived._fields, "dynamic", 0.1),
    "instance hides its class": attribute("derived.shift", 3.0),
    "instance hides the module's class": attribute("gain", 3.0),
    "callable object": attribute("policy.strength", 0.1),
    "class of an object": attribute("policy.__class__", lambda: Softer),
    "enum in a nested dict": lambda m, patch: patch.setitem(m.nested["moe"], "norm", Norm.NONE),
    "key that was absent": item("nested", "extra", 3.0),
    "list in a nested dict": element("nested.moe.scales", 1, 3.0),
    "ordered dict": item("ordered", "b", 7.0),
    "ordered dict grows": item("ordered", "c", 7.0),
    "deque": in_place("queue", lambda q: q.append(2.0), lambda q: q.pop()),
    "set": in_place("chosen", lambda s: s.discard("a"), lambda s: s.add("a")),
    "partial replaced": attribute("act", functools.partial(torch.mul, other=3.0)),
    "keywords of a partial": lambda m, patch: patch.setitem(m.act.keywords, "other", 4.0),
    "key of a table": attribute("kind", "sharp"),
    "name of an attribute": lambda m, patch: (
        element("names", 0, "size")(m, patch),
        patch.setattr(m.data, "size", 2.0),
    ),
    "object in a tuple": lambda m, patch: patch.setattr(m.pair[1], "scale", 3.0),
    "NumPy number": attribute("number", np.float32(3.0)),
    "method on the instance": attribute("weigh", lambda: flat),
    "static method on the instance": attribute("fixed", lambda: flat),
}
OUTSIDE = {
    "class attribute": elsewhere(Reader, "gain", 3.0),
    "base's attribute": elsewhere(readers.Base, "inherited", 3.0),
    "class hides its base": elsewhere(Reader, "inherited", 3.0),
    "class attribute of a configuration": elsewhere(readers.Derived, "shift", 3.0),
    "constant in a class": elsewhere(readers.Constants, "GAIN", 3.0),
    "property": elsewhere(readers.Derived, "scale", property(lambda self: 9.0)),
    "method of the class": elsewhere(Reader, "weigh", lambda self, w: w),
    "base's method": elsewhere(readers.Base, "tail", lambda self, y: y * 3),
    "static method": elsewhere(Reader, "fixed", staticmethod(lambda w: w * 3)),
    "class method": elsewhere(Reader, "kinded", classmethod(lambda cls, w: w * 3)),
    "method of an object": elsewhere(readers.Policy, "__call__", lambda self, w: w),
    "forward of the class": elsewhere(Reader, "forward", lambda self, x: x),
    "tuple of the class": elsewhere(Reader, "kinds", ("plain", "sharp", "third")),
    "global number": elsewhere(readers, "FACTOR", 3.0),
    "global object": elsewhere(readers.SHARED, "scale", 3.0),
    "global object replaced": elsewhere(readers, "SHARED", types.SimpleNamespace(scale=3.0, step=0)),
    "function table": elsewhere(readers.TABLE, "plain", flat),
    "global function": elsewhere(readers, "scaled", lambda w: w),
    "code of a function": elsewhere(
        readers.scaled, "__code__", (lambda w, by=1.5, *, more=0.75, parts=0: w * 9).__code__
    ),
    "below a decorator": elsewhere(readers.wrapped.__wrapped__, "__code__", (lambda w: w * 9).__code__),
    "decorated function": elsewhere(readers, "wrapped", readers.decorated(lambda w: w * 3)),
    "default": elsewhere(readers.scaled, "__defaults__", (9.0,)),
    "keyword default": elsewhere(readers.scaled.__kwdefaults__, "more", 9.0),
    "mutable default": elsewhere(readers.scaled.__kwdefaults__["parts"], 0, 9.0),
    "closure": lambda m, patch: (readers.gained.change(9.0), patch.callback(lambda: readers.gained.change(1.25))),
    "table in a closure": elsewhere(readers.gained.table, "gain", 9.0),
    "other module": elsewhere(readers.settings, "SCALE", 9.0),
    "import in the forward": elsewhere(readers.settings.inner, "scale", 9.0),
    "global tensor replaced": elsewhere(readers, "WEIGHTS", torch.tensor([1.5, 9.0])),
    "global tensor": elsewhere(readers.WEIGHTS.data, 1, 9.0),
    "global array": elsewhere(readers.ARRAY, 1, 9.0),
    "builtin hidden by a global": elsewhere(readers, "sum", lambda values: 9.0),
    "environment": lambda m, patch: patch.setenv("READER_SCALE", "9"),
    "context variable": in_context(9.0),
    "value of this thread": elsewhere(readers.THREAD, "scale", 9.0),
    "value of this thread, of a class": elsewhere(readers.REQUEST, "scale", 9.0),
    "default dtype": lambda m, patch: (
        torch.set_default_dtype(torch.float64),
        patch.callback(lambda: torch.set_default_dtype(torch.float32)),
    ),
}


class Patch(pytest.MonkeyPatch):
    """A monkeypatch for one change on several models."""

    def __init__(self):
        super().__init__()
        self.after, self.done = [], False

    def callback(self, undo):
        self.after.append(undo)

    def setattr(self, target, name, value, **kwargs):
        if isinstance(value, types.LambdaType) and value.__name__ == "<lambda>" and not value.__code__.co_argcount:
            value = value()
        super().setattr(target, name, value, raising=False)

    def once(self, owner, name, value):
        if self.done:
            return
        if isinstance(name, str) and not isinstance(owner, dict):
            super().setattr(owner, name, value, raising=False)
        elif isinstance(owner, dict):
            self.setitem(owner, name, value)
        else:
            before = owner[name].clone() if isinstance(owner, torch.Tensor) else owner[name]
            owner[name] = value
            self.callback(lambda: owner.__setitem__(name, before))

    def undo(self):
        super().undo()
        while self.after:
            self.after.pop()()


@pytest.fixture
def patch():
    one = Patch()
    yield one
    one.undo()


def warned(block):
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        result = block()
    return result, [str(w.message) for w in told if w.category is StaleModelWarning]


@pytest.mark.parametrize("where", ["twin", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", [*INSIDE, *OUTSIDE])
def test_a_change_is_told_and_the_original_answers(both, patch, name, where):
    change = INSIDE.get(name) or OUTSIDE[name]
    model, opt = both
    twin = {
        "twin": lambda: opt.model,
        "deepcopy": lambda: copy.deepcopy(opt.model),
        "pickle": lambda: pickle.loads(pickle.dumps(opt.model)),
    }[where]()
    ref = copy.deepcopy(model)
    before, told = warned(lambda: twin(X))
    assert not told and not twin.forward.fallbacks or where == "twin"
    fallbacks = twin.forward.fallbacks
    change(ref, patch)
    patch.done = True
    if name not in OUTSIDE:
        change(twin, patch)
    want, _ = warned(lambda: ref(X))
    got, told = warned(lambda: twin(X))
    assert not torch.allclose(want, before, rtol=1e-3), "the change must matter"
    assert torch.equal(got, want) and twin.forward.fallbacks == fallbacks + 1
    assert len(told) == 1 and "runs its original code: " in told[0], told
    patch.undo()
    again, told = warned(lambda: twin(X))
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-6)
    assert not told and twin.forward.fallbacks == fallbacks + 1, "with the old values the rewritten code runs again"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_pickle_is_loaded_into_changed_surroundings(both, patch, name):
    """A pickle may meet another version of the class, its globals or the environment."""
    model, opt = both
    stored = pickle.dumps(opt.model)
    ref = copy.deepcopy(model)
    OUTSIDE[name](ref, patch)
    want, _ = warned(lambda: ref(X))
    twin = pickle.loads(stored)
    got, told = warned(lambda: twin(X))
    assert torch.equal(got, want) and twin.forward.fallbacks == 1
    assert len(told) == 1 and "runs its original code: " in told[0], told


@pytest.mark.parametrize(
    "change",
    [
        attribute("cfg.top_k", int("2")),
        attribute("cfg.moe.scale", float("1.5")),
        attribute("cfg.moe", types.SimpleNamespace(scale=1.5, dtype=torch.float32)),
        attribute("data", Data()),
        attribute("act", functools.partial(torch.mul, other=1.25)),
        elsewhere(readers, "FACTOR", float("1.125")),
        elsewhere(readers.TABLE, "new", flat),
        elsewhere(readers, "UNREAD", 5),
        elsewhere(readers.SHARED, "step", 100),
        elsewhere(readers, "scaled", defined_again(readers.scaled)),
        lambda m, patch: patch.setenv("READER_OTHER", "9"),
    ],
    ids=["int", "float", "object", "dataclass", "partial", "global", "table grows", "unread global",
         "what the forward counts", "function defined again", "environment"],
)  # fmt: skip
def test_equal_values_and_unread_ones_are_no_change(both, patch, change):
    _, opt = both
    before, _ = warned(lambda: opt(X))
    fallbacks = opt.model.forward.fallbacks
    change(opt.model, patch)
    again, told = warned(lambda: opt(X))
    assert not told and opt.model.forward.fallbacks == fallbacks and torch.equal(before, again)


def test_a_mode_that_the_code_asks_for(both):
    model, opt = both
    with torch.inference_mode():
        want, _ = warned(lambda: model(X))
        got, told = warned(lambda: opt(X))
    assert torch.equal(got, want)
    assert "torch.is_inference_mode_enabled(), which its code reads, is True and was False" in told[0]


def test_each_thread_and_each_context_has_its_own_values(both):
    """What another thread sets is nobody's business here, and the same values there are no change."""
    model, opt = both
    before, _ = warned(lambda: opt(X))

    def elsewhere():
        readers.THREAD.scale = 1.5
        same = opt(X)
        readers.THREAD.scale = readers.REQUEST.scale = 9.0
        readers.CONTEXT.set(9.0)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return same, opt(X), model(X)

    with ThreadPoolExecutor(1) as pool:
        same, got, want = pool.submit(elsewhere).result()
    assert torch.equal(same, before) and torch.equal(got, want) and not torch.allclose(got, before)
    after, told = warned(lambda: opt(X))
    assert torch.equal(after, before) and not told


def test_the_message_names_the_field_and_both_values(both, patch):
    _, opt = both
    patch.setattr(opt.model.cfg, "top_k", 1)
    _, told = warned(lambda: opt(X))
    assert told == [
        "Reader runs its original code: cfg.top_k, which its code reads, is 1 and was 2. "
        "Run moeopt.optimize again on the changed model to get the fast path back."
    ]


def test_a_configuration_of_transformers_under_another_name():
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        attribute_map = {"top_k": "num_experts_per_tok"}  # noqa: RUF012

    class Mapped(Block):
        def __init__(self):
            super().__init__()
            self.config = Config(num_experts_per_tok=2)

        def route(self, x):
            w, ids = torch.topk(self.gate(x).softmax(-1), self.config.top_k, -1)
            return ids, w

    model = build(Mapped)
    opt = optimized(model)
    opt.model.config.use_cache = False  # nobody reads this here
    x = seeded(2, 8, 16)
    _, told = warned(lambda: opt(x))
    assert not told
    for name in ("num_experts_per_tok", "top_k"):
        for m, value in ((model, 1 if name == "top_k" else 3), (opt.model, 1 if name == "top_k" else 3)):
            setattr(m.config, name, value)
        want, _ = warned(lambda: model(x))
        got, told = warned(lambda: opt(x))
        assert torch.equal(got, want) and "config.num_experts_per_tok, which its code reads, is" in told[0]


def test_a_router_that_chooses_another_number_of_experts():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.top_k = nn.Linear(16, 4), 2

        def forward(self, x):
            w, ids = self.linear(x).softmax(-1).topk(self.top_k, -1)
            return ids, w

    class Mean(Block):
        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, x):
            rows = x.reshape(-1, 16)
            ids, w = self.router(rows)
            return self.loop(rows, ids, w).view(x.shape) / ids.shape[1]

    model = build(Mean)
    opt = optimized(model)
    x = seeded(2, 8, 16)
    model.router.top_k = opt.model.router.top_k = 3
    want, _ = warned(lambda: model(x))
    got, told = warned(lambda: opt(x))
    assert torch.equal(got, want)
    assert "its router chose 3 experts for a token, and 2 when it was verified" in told[0]


def test_a_router_that_no_longer_chooses_every_expert():
    """Ids may be read from a mask, whose size is fixed: then the weights alone tell a change."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.config = nn.Linear(16, 2), types.SimpleNamespace(top_k=2)

        def forward(self, x):
            w, ids = self.linear(x).softmax(-1).topk(self.config.top_k, -1)
            return ids, w

    class ByPosition(Block):
        def __init__(self):
            super().__init__(experts=2)
            self.router = Router()

        def forward(self, x):
            rows = x.reshape(-1, 16)
            ids, w = self.router(rows)
            mask = nn.functional.one_hot(ids, 2).permute(2, 1, 0)
            y = torch.zeros_like(rows)
            for e, expert in enumerate(self.experts):
                slot, token = torch.where(mask[e])
                y.index_add_(0, token, expert(rows[token]) * w[token, slot, None])
            return y.view(x.shape)

    model = build(ByPosition)
    opt = optimized(model)
    x = seeded(2, 8, 16)
    model.router.config.top_k = opt.model.router.config.top_k = 1
    want, _ = warned(lambda: model(x))
    got, told = warned(lambda: opt(x))
    assert torch.equal(got, want)
    assert "its router chose 1 experts for a token, and 2 when it was verified" in told[0]


def test_a_block_that_reads_too_much_is_declined():
    class Hoard(Block):
        def __init__(self):
            super().__init__()
            self.tables = [[float(i + j) for j in range(500)] for i in range(10)]

        def loop(self, x, ids, w):
            return super().loop(x, ids, w * self.tables[1][2])

    report = moeopt.optimize(build(Hoard), seeded(2, 8, 16), verify="fast").report
    (block,) = [b for b in report.blocks if b.kind == "moe"]
    assert block.status == "declined" and "its code reads more than 4096 values outside its modules" in block.reason


def test_it_compiles_with_its_configuration():
    class Scaled(Block):
        def __init__(self):
            super().__init__()
            self.cfg = types.SimpleNamespace(moe={"scale": 1.5})

        def loop(self, x, ids, w):
            return super().loop(x, ids, w * self.cfg.moe["scale"])

    torch._dynamo.reset()
    model = build(Scaled)
    opt = optimized(model)
    compiled = torch.compile(opt.model, backend="eager", fullgraph=True)
    x = seeded(2, 8, 16)
    with torch.no_grad():
        close(compiled(x), model(x))
        program = torch.export.export(opt.model, (x,))
        close(program.module()(x), model(x))


@pytest.mark.parametrize("kind", ["function", "cProfile"])
def test_a_profiler_goes_on(kind):
    seen = []
    profiler = cProfile.Profile()
    if kind == "function":
        sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code.co_name))
    else:
        profiler.enable()
    try:
        optimized(build(), verify="off")
        flat(torch.ones(1))
    finally:
        sys.setprofile(None)
        profiler.disable()
    names = seen if kind == "function" else [code[2] for code in pstats.Stats(profiler).stats]
    assert "flat" in names


# -- limits.md: not seen ------------------------------------------------------------------------------


class Far(Block):
    """Reads what is not followed."""

    def __init__(self):
        super().__init__()
        self.cfg = types.SimpleNamespace(long=[1.5] * 2000)
        self.array = np.ones(1000)
        self.large = {f"key {i}": float(i) for i in range(100)}
        self.chosen = 7

    def loop(self, x, ids, w):
        w = (
            w
            * math.sqrt(2.0)
            * library(self.cfg.long[1500])
            * float(self.array[500])
            * self.large[f"key {self.chosen}"]
        )
        return super().loop(x, ids, w * torch.sigmoid(torch.tensor(1.0)))


LIBRARY = {}
exec(compile("def library(v):\n    return v", "/lib/site-packages/library.py", "exec"), LIBRARY)
library = LIBRARY["library"]
UNSEEN = {
    "Python's own function": lambda m: setattr(math, "sqrt", lambda v: 9.0),
    "code of an installed package's function": lambda m: setattr(library, "__code__", (lambda v: 9.0).__code__),
    "element of a list of more than 1024": lambda m: m.cfg.long.__setitem__(1500, 3.0),
    "write into a large array": lambda m: m.array.__setitem__(500, 3.0),
    "computed key of a large dict": lambda m: m.large.__setitem__("key 7", 3.0),
    "PyTorch's own function": lambda m: setattr(torch, "sigmoid", torch.tanh),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_limits_say_is_not_seen(name, monkeypatch):
    model = build(Far)
    opt = optimized(model)
    x = seeded(2, 8, 16)
    before, _ = warned(lambda: opt(x))
    for owner, taken in ((torch, "sigmoid"), (math, "sqrt")):
        monkeypatch.setattr(owner, taken, getattr(owner, taken))
    code = library.__code__

    def changed():
        UNSEEN[name](model), UNSEEN[name](opt.model)
        return warned(lambda: (model(x), opt(x)))

    (want, got), told = changed()
    library.__code__ = code
    assert not torch.allclose(want, before) and torch.equal(got, before) and not told
