"""A block whose forward reads Python state in every way that home-made and remote code does."""

import collections
import contextvars
import dataclasses
import enum
import functools
import os
import threading
import types

import numpy as np
import torch
from torch import nn

H = 8

settings = types.ModuleType("reader_settings")
settings.SCALE = 1.5
settings.inner = types.SimpleNamespace(scale=1.25)

FACTOR = 1.125
TABLE = {"plain": lambda w: w, "sharp": lambda w: w.square()}
WEIGHTS = torch.tensor([1.5, 0.5])
SHARED = types.SimpleNamespace(scale=0.75, step=0)
ARRAY = np.array([1.0, 2.0])
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.25)
THREAD = threading.local()
THREAD.scale = 1.5


class Request(threading.local):
    """Each thread begins with the same number."""

    def __init__(self):
        self.scale = 0.75


REQUEST = Request()


class Norm(enum.Enum):
    SUM = 1
    NONE = 2


@dataclasses.dataclass
class Data:
    scale: float = 1.25
    parts: list = dataclasses.field(default_factory=lambda: [1.0, 0.5])


class Slots:
    __slots__ = ("scale", "spare")

    def __init__(self):
        self.scale = 0.5


class Derived:
    """Properties, a class attribute that instances may shadow, and attributes from ``__getattr__``."""

    shift = 0.25

    def __init__(self):
        self.base, self._fields = 2.0, {"dynamic": 1.5}

    @property
    def scale(self):
        return self.base / 2

    def __getattr__(self, name):
        try:
            return self.__dict__["_fields"][name]
        except KeyError:
            raise AttributeError(name) from None


class Policy:
    strength = 1.5

    def __call__(self, w):
        return w * self.strength


class Softer(Policy):
    def __call__(self, w):
        return w * 0.5


class Constants:
    GAIN = 0.875


def maker(gain):
    table = {"gain": gain}

    def gained(w):
        return w * table["gain"] * gain

    def change(value):
        nonlocal gain
        gain = value

    gained.change, gained.table = change, table
    return gained


gained = maker(1.25)


def scaled(w, by=1.5, *, more=0.75, parts=[1.0]):  # noqa: B006
    return w * by * more * parts[0] * FACTOR


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


@decorated
def wrapped(w):
    return w * SHARED.scale


class Base(nn.Module):
    inherited = 1.5

    def tail(self, y):
        return y * self.inherited


class Reader(Base):
    """Every value below is part of what the block computes."""

    gain = 1.25
    kinds = ("plain", "sharp")

    def __init__(self, parent=None):
        super().__init__()
        self.router = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, H)) for _ in range(4))
        self.cfg = types.SimpleNamespace(
            top_k=2, moe=types.SimpleNamespace(scale=1.5, dtype=torch.float32), use_cache=True
        )
        self.data, self.slots, self.derived, self.policy = Data(), Slots(), Derived(), Policy()
        self.nested = {"moe": {"norm": Norm.SUM, "scales": [1.0, 0.5]}, "name": "moe"}
        self.ordered = collections.OrderedDict(a=1.0, b=2.0)
        self.queue = collections.deque([1.0, 0.5])
        self.chosen = {"a", "b"}
        self.act = functools.partial(torch.mul, other=1.25)
        self.kind = "plain"
        self.names = ["scale"]
        self.pair = (1.0, Data())
        self.number = np.float32(1.5)
        self.parent = parent

    def route(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.cfg.top_k, -1)
        if self.nested["moe"]["norm"] is Norm.SUM:
            w = w / w.sum(-1, keepdim=True)
        return self.weigh(TABLE[self.kind](w)), ids

    @staticmethod
    def fixed(w):
        return w * Constants.GAIN

    @classmethod
    def kinded(cls, w):
        return w * len(cls.kinds)

    def weigh(self, w):
        w = w * self.cfg.moe.scale * self.data.scale * self.data.parts[0] * self.slots.scale
        w = w * self.derived.scale * self.derived.dynamic + self.derived.shift
        w = self.kinded(self.fixed(wrapped(scaled(gained(self.policy(w))))))
        w = w * self.nested.get("extra", 1.0) * self.nested["moe"]["scales"][1] * sum(self.ordered.values())
        w = w * self.queue[0] * len(self.queue) * (2.0 if "a" in self.chosen else 1.0)
        w = self.act(w) * getattr(self.data, self.names[0]) * self.pair[1].scale * float(self.number)
        w = w * WEIGHTS.to(self.cfg.moe.dtype).sum() * settings.SCALE * float(ARRAY[1]) * self.gain
        w = w * CONTEXT.get() * THREAD.scale * REQUEST.scale
        w = w * (2.0 if torch.is_inference_mode_enabled() else 1.0) * torch.get_default_dtype().itemsize
        from reader_settings import inner

        if getattr(self.slots, "spare", None):
            w = w * 2
        if hasattr(self.cfg, "flipped"):
            w = -w
        if self.parent is not None:
            w = w * self.parent().scale
        SHARED.step += 1  # the forward's own
        return w * inner.scale * float(os.environ.get("READER_SCALE", "1"))

    def forward(self, x):
        rows = x.reshape(-1, H)
        w, ids = self.route(rows)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                y.index_add_(0, token, expert(rows[token]) * w[token, slot, None])
        return self.tail(y).view_as(x)
