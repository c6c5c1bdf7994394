"""Every kernel that a router can reach, for flags, integers of all sizes and floats: an engine has it, and it is right.

ONNX Runtime's CPU lacks kernels for many pairs of op and dtype; all that a router does with masks, ids, counts and
places must load all the same.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.lower.onnx.emitted import session_of, together

T, E = 6, 5
BOTH = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.float16)


def mask(x):
    return x if x.dtype == torch.bool else x > 1


def ids(x):
    return torch.argsort(x.to(torch.int64), dim=-1, stable=True)


SELECTING = {
    "where": lambda x: torch.where(mask(x), x, x.flip(-1)),
    "where with a number": lambda x: torch.where(mask(x), x, torch.zeros((), dtype=x.dtype)),
    "masked_fill 0": lambda x: x.masked_fill(mask(x), 0),
    "masked_fill 1": lambda x: x.masked_fill(mask(x.flip(0)), 1),
    "assigned mask": lambda x: torch.index_put(x, (mask(x),), torch.zeros((), dtype=x.dtype)),
    "gather": lambda x: x.gather(1, ids(x)),
    "index": lambda x: x[torch.tensor([2, 0])],
    "picked by a mask": lambda x: x[mask(x)],
    "nonzero": torch.nonzero,
    "cat": lambda x: torch.cat([x, x.flip(0)]),
    "stack": lambda x: torch.stack([x, x.flip(0)]),
    "pad": lambda x: F.pad(x, (0, 1)),
    "pad with ones": lambda x: F.pad(x, (1, 1), value=1),
    "roll": lambda x: x.roll(1, 0),
    "tril": torch.tril,
    "triu": lambda x: x.triu(1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "expand": lambda x: x[:1].expand(T, -1).clone(),
}
ORDERING = {
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(0),
    "max over all": lambda x: x.max(),
    "max": lambda x: x.max(-1).values,
    "min": lambda x: x.min(-1).values,
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum": lambda x: torch.minimum(x, x.flip(0)),
    "sort": lambda x: torch.sort(x, dim=-1, stable=True).values,
    "argsort": lambda x: torch.argsort(x, dim=-1, descending=True, stable=True),
    "topk": lambda x: x.topk(2, -1).values,
    "smallest": lambda x: x.topk(2, -1, largest=False).values,
    "equal": lambda x: x == x.flip(0),
    "less": lambda x: x < x.flip(0),
    "at least one": lambda x: x >= 1,
    "any": lambda x: x.any(-1),
    "all": lambda x: x.all(0),
}
COUNTING = {
    "cumsum": lambda x: x.cumsum(0),
    "cumsum of its own dtype": lambda x: x.cumsum(-1, dtype=torch.int32 if x.dtype == torch.bool else x.dtype),
    "sum": lambda x: x.sum(-1),
    "count_nonzero": lambda x: x.count_nonzero(dim=-1),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, ids(x)[:, :2], x[:, :2]),
    "scatter ones": lambda x: torch.zeros_like(x).scatter(1, ids(x)[:, :2], 1),
    "index_put": lambda x: x.index_put((torch.tensor([0, 2]),), x[3:5]),
    "added": lambda x: x + x.flip(0),
    "multiplied": lambda x: x * x.flip(0),
    "not": torch.logical_not,
    "xor": lambda x: torch.logical_xor(x, x.flip(0)),
    "cast to float": lambda x: x.float(),
    "cast to int64": lambda x: x.long(),
    "cast to bool": lambda x: x.bool(),
}
OF_NUMBERS = {
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, ids(x)[:, :2] * 0, x[:, :2]),
    "scatter_reduce amax": lambda x: torch.zeros_like(x).scatter_reduce(1, ids(x)[:, :2] * 0, x[:, :2], "amax"),
    "index_add": lambda x: torch.zeros_like(x).index_add(0, torch.tensor([0, 0, 1, 2, 2, 3]), x),
    "accumulated": lambda x: x.index_put((torch.tensor([0, 0]),), x[:2], accumulate=True),
    "remainder": lambda x: x % 3,
    "floor division": lambda x: x // 2,
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(0),
    "subtracted": lambda x: x.flip(0) - x,
    "clamp": lambda x: x.clamp(0, 2),
    "clamp from below": lambda x: x.clamp(min=1),
    "absolute": torch.abs,
    "squared": torch.square,
    "power": lambda x: x**2,
    "bitwise or": lambda x: x.long() | 1,
    "one_hot": lambda x: F.one_hot(x.long().abs() % 4, 4),
    "relu": torch.relu,
    "isnan": torch.isnan,
    "sign": torch.sign,
}
OF_FLOATS = {
    "cdist": lambda x: torch.cdist(x.float(), x[:3].float()),
    "cdist of 1": lambda x: torch.cdist(x.float(), x[:3].float(), p=1),
    "cdist of 3": lambda x: torch.cdist(x.float(), x[:3].float(), p=3),
    "cdist of infinity": lambda x: torch.cdist(x.float(), x[:3].float(), p=float("inf")),
    "cdist of 0": lambda x: torch.cdist(x.float(), x[:3].float(), p=0),
    "cdist in a batch": lambda x: torch.cdist(x.float()[None], x.float().view(1, T, E)),
}


def numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, E, generator=generator) * 3
    if dtype == torch.bool:
        return x > 0
    return x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def functions(dtype):
    groups = [SELECTING, ORDERING, COUNTING]
    groups += [] if dtype == torch.bool else [OF_NUMBERS]
    groups += [OF_FLOATS] if dtype.is_floating_point else []
    unknown = {"topk", "smallest"} if dtype == torch.bool else set()  # to PyTorch itself
    return {name: f for group in groups for name, f in group.items() if name not in unknown}


@functools.cache
def answers(dtype):
    """What the engine's graph gives for each function, by name: all of them in one session."""
    of = functions(dtype)
    x = numbers(dtype)
    session = session_of(together(list(of.values())), x)
    return dict(zip(of, session.run({session.inputs[0]: x}), strict=True))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [*BOTH, *FLOATS], ids=str)
def test_the_provider_has_what_a_router_can_reach(dtype):
    x = numbers(dtype)
    for name, f in functions(dtype).items():
        got, want = answers(dtype)[name], f(x)
        assert got.dtype == want.dtype and got.shape == want.shape, name
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
