"""Attack ops: each in processes of its own, with wrong sizes, strides, dtypes and extremes; which of them end it?

``python -m tests.hostile.attack_ops TRIALS [OP...]`` prints one JSON line for each op: what ended its process, or "".
Tensors lie against pages that may not be touched, so that a read or write beyond one is a signal and no accident.
The parent forks one child for each op, which calls the op through the same door as a bundle's graph.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import random
import resource
import signal
import sys
import time
import warnings
from typing import Any

import torch
import torch._dynamo  # imported by the first call on meta tensors: a second here, or a second in each child

from moeopt.bundle.memory import check_call
from moeopt.bundle.op_allowlist import guarded, op_named

PAGE = mmap.PAGESIZE
BUDGET = 1 << 26
MEMORY = 3 << 30
"""Bytes that a child may have beyond what the parent has: more is a failure too."""
SECONDS = 20

FLOATS = (torch.float32, torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16, torch.bool, torch.complex64)
EXTREMES = (0, 1, -1, 2, 3, 5, 7, 100, -100, 4096, 1 << 20, 1 << 31, -(1 << 31), 1 << 40, (1 << 63) - 1, -(1 << 63))
TYPED: dict[str, Any] = {
    "ScalarType": FLOATS + OTHERS,
    "Layout": (torch.strided,),
    "MemoryFormat": (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d),
}
_STATS = {"input": [2, 3, 4], **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), [3])}
_HEADS = {"query": [2, 2, 3, 4], "key": [2, 2, 3, 4], "value": [2, 2, 3, 4], "attn_mask": [2, 2, 3, 3]}
_PLANE = {"self": [1, 2, 4, 4], "input": [1, 2, 4, 4], "grid": [1, 3, 3, 2]}
FITTING: dict[str, dict[str, list[int]]] = {
    "conv1d": {"input": [2, 4, 5], "weight": [4, 4, 2], "bias": [4]},
    "conv2d": {"input": [2, 4, 5, 5], "weight": [4, 4, 2, 2], "bias": [4]},
    "conv3d": {"input": [1, 2, 4, 4, 4], "weight": [2, 2, 2, 2, 2], "bias": [2]},
    "convolution": {"input": [2, 4, 5, 5], "weight": [4, 4, 2, 2], "bias": [4]},
    "_convolution": {"input": [2, 4, 5, 5], "weight": [4, 4, 2, 2], "bias": [4]},
    "conv_transpose1d": {"input": [2, 4, 5], "weight": [4, 4, 2], "bias": [4]},
    "conv_transpose2d": {"input": [2, 4, 5, 5], "weight": [4, 4, 2, 2], "bias": [4]},
    "conv_transpose3d": {"input": [1, 2, 4, 4, 4], "weight": [2, 2, 2, 2, 2], "bias": [2]},
    **dict.fromkeys(("batch_norm", "native_batch_norm", "instance_norm"), _STATS),
    **dict.fromkeys(("_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"), _STATS),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_attention_math"), _HEADS),
    **dict.fromkeys(("_scaled_dot_product_flash_attention_for_cpu",), _HEADS),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "im2col", "pixel_shuffle", "upsample_nearest2d"), _PLANE),
    **dict.fromkeys(("reflection_pad2d", "replication_pad2d", "max_pool2d", "avg_pool2d", "constant_pad_nd"), _PLANE),
    "grid_sampler_3d": {"input": [1, 2, 4, 4, 4], "grid": [1, 3, 3, 3, 3]},
    **dict.fromkeys(("reflection_pad3d", "replication_pad3d"), {"self": [1, 2, 4, 4, 4]}),
    "group_norm": {"input": [2, 4, 3], "weight": [4], "bias": [4]},
    "native_group_norm": {"input": [2, 4, 3], "weight": [4], "bias": [4]},
    "layer_norm": {"input": [2, 3], "weight": [3], "bias": [3]},
    "native_layer_norm": {"input": [2, 3], "weight": [3], "bias": [3]},
    "embedding": {"weight": [4, 3], "indices": [2, 3]},
    "_grouped_mm": {"self": [6, 16], "mat2": [2, 16, 16], "offs": [2]},
    "_int_mm": {"self": [32, 16], "mat2": [16, 16]},
    "_weight_norm": {"v": [3, 4], "g": [3, 1]},
    "lstm_cell": {"input": [2, 3], "hx": [2, 4], "w_ih": [16, 3], "w_hh": [16, 4], "b_ih": [16], "b_hh": [16]},
    "gru_cell": {"input": [2, 3], "hx": [2, 4], "w_ih": [12, 3], "w_hh": [12, 4], "b_ih": [12], "b_hh": [12]},
    "gru": {"input": [2, 3, 4], "hx": [1, 3, 4], "params": [12, 4]},
    "rnn_tanh": {"input": [2, 3, 4], "hx": [1, 3, 4], "params": [4, 4]},
    "rnn_relu": {"input": [2, 3, 4], "hx": [1, 3, 4], "params": [4, 4]},
    "lstm": {"input": [2, 3, 4], "hx": [1, 3, 4], "params": [16, 4]},
}
"""Shapes with which an op runs, for those that random shapes seldom fit."""
INTEGERS = ("ind", "target", "ids", "length", "off", "repeats", "sections", "mask")
"""Words in the names of arguments that hold integers."""
SIZES = (2, 2, 2, 3, 3, 4, 1, 0, 5, 8)
WORDS = {
    "rounding_mode": "trunc trunc floor",
    "mode": "constant reflect replicate circular bilinear nearest",
    "reduce": "sum prod mean amax amin max min add multiply",
    "equation": "ij,jk->ik ij,jk bij,bjk->bik ii->i i,j->ij ...i->... ab,cd->abcd i->",
    "approximate": "none tanh",
    "indexing": "ij xy",
    "padding": "same valid",
    "interpolation": "linear lower higher midpoint nearest",
    "side": "left right",
}


class Guarded:
    """Memory between two pages that may not be touched."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._held: list[Any] = []

    def tensor(self, source: torch.Tensor, at_end: bool) -> torch.Tensor:
        """A contiguous copy of ``source`` that ends, or begins, at a forbidden page."""
        size = source.numel() * source.element_size()
        if not size or size > BUDGET:
            return source
        pages = (size + PAGE - 1) // PAGE
        area = mmap.mmap(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for page in (0, pages + 1):
            assert self._libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, 0) == 0
        self._held.append(area)
        offset = PAGE + (pages * PAGE - size if at_end else 0)
        flat = torch.frombuffer(area, dtype=source.dtype, count=source.numel(), offset=offset)
        return flat.copy_(source.reshape(-1)).view(source.shape)

    def forget(self) -> None:
        self._held = self._held[-64:]


class Maker:
    """Arguments for an op's schema: sizes that mostly fit each other, and some that do not."""

    def __init__(self, seed: int) -> None:
        self.random, self.guarded = random.Random(seed), Guarded()

    def call(self, schema: Any) -> tuple[list[Any], dict[str, Any]]:
        pick = self.random
        self.rank = pick.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5))
        self.size = pick.choice((2, 3, 4))
        self.square, self.kind = (
            pick.random() < 0.6,
            pick.choice(FLOATS) if pick.random() < 0.7 else pick.choice(OTHERS),
        )
        self.shape = [self.size if self.square else pick.choice(SIZES) for _ in range(self.rank)]
        names = [a.name for a in schema.arguments]
        fitting = FITTING.get(schema.name.split("::")[1], {})
        self.fitting = fitting if pick.random() < 0.8 else {}
        if self.fitting and pick.random() < 0.9:
            self.kind = torch.float32
        if self.fitting:
            self.rank, self.size = max(map(len, fitting.values())), 2
        wild = pick.random()
        self.wild = set(names) if wild < 0.15 else {pick.choice(names), pick.choice(names)} if wild < 0.7 else set()
        args, kwargs = [], {}
        for argument in schema.arguments:
            if argument.has_default_value() and pick.random() < 0.4:
                if not argument.kwarg_only:
                    if any(not a.kwarg_only for a in schema.arguments[len(args) + 1 :]):
                        args.append(argument.default_value)
                continue
            value = self.value(str(argument.real_type), argument.name)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            elif len(args) == names.index(argument.name):
                args.append(value)
            else:
                kwargs[argument.name] = value
        return args, kwargs

    def value(self, kind: str, name: str) -> Any:
        pick = self.random
        if kind.startswith("Optional["):
            return None if pick.random() < 0.4 else self.value(kind[9:-1], name)
        if kind.startswith("List["):
            spatial = max(self.rank - 2, 1)
            count = pick.choice(
                (self.rank, spatial, spatial, 1, 2, 3) if name not in self.wild else (0, 1, 2, 3, 4, 6, 8)
            )
            one = self.value(kind[5:-1], name)
            if kind[5:-1] in ("int", "SymInt") and name not in self.wild and pick.random() < 0.8:
                return [one] * count
            return [one] * bool(count) + [self.value(kind[5:-1], name) for _ in range(count - 1)]
        if kind == "Tensor":
            return self.tensor(name)
        if kind in TYPED:
            return pick.choice(TYPED[kind])
        if kind == "SymInt":
            kind = "int"
        if kind == "int" and name in self.wild:
            return pick.choice(EXTREMES)
        if kind == "int":
            tame = {"stride": (1, 2), "dilation": (1, 2), "groups": (1,), "padding": (0, 1), "kernel_size": (1, 2)}
            return pick.choice(tame.get(name, (0, 1, self.size, -1) if "dim" in name else (1, 2, self.size, 0)))
        if kind == "number":
            return pick.choice((self.value("int", name), self.value("float", name), True))
        return {
            "float": lambda: pick.choice((0.0, 0.5, 1.0, 2.0, -1.0, 1e-5, 1e30, math.inf, -math.inf, math.nan)),
            "bool": lambda: pick.random() < 0.5,
            "str": lambda: pick.choice(WORDS.get(name, " ".join(WORDS.values())).split()),
            "Device": lambda: torch.device("cpu"),
            "Generator": lambda: None,
        }[kind]()

    def tensor(self, name: str) -> torch.Tensor:
        pick = self.random
        shape = list(self.shape)
        what = pick.random() if name in self.wild else 0.3 + 0.7 * pick.random()
        if name in ("bias", "running_mean", "running_var", "weight") and self.rank < 3:
            what = 0.3
        if name in self.fitting and name not in self.wild:
            shape, what = list(self.fitting[name]), 1.0
        if what < 0.15 and shape:
            shape[pick.randrange(len(shape))] = pick.choice((*SIZES, 17, 300))
        elif what < 0.25:
            shape = [pick.choice(SIZES) for _ in range(pick.choice((0, 1, 1, 2, 3, 4)))]
        elif what < 0.28:
            shape = [1 << pick.choice((10, 14, 18))]
        elif what < 0.45 or (name in ("bias", "running_mean", "running_var") and what < 0.9):
            shape = shape[-1:]
        elif what < 0.52:
            shape = shape[1:] if pick.random() < 0.5 else shape[:-1]
        indices = any(word in name for word in INTEGERS)
        kind = pick.choice((torch.int64, torch.int32)) if indices and pick.random() < 0.85 else self.kind
        if "mask" in name or (indices and pick.random() < 0.1):
            kind = torch.bool
        if pick.random() < 0.07:
            kind = pick.choice(FLOATS + OTHERS)
        source = self.filled(shape, kind)
        layout = pick.random()
        if layout < 0.6:
            return self.guarded.tensor(source, pick.random() < 0.7)
        if layout < 0.75 and source.dim() > 1:
            return self.guarded.tensor(source, True).transpose(0, -1)
        if layout < 0.9 and source.dim():
            at = pick.randrange(source.dim())
            thin = self.guarded.tensor(source.narrow(at, 0, min(1, source.shape[at])).contiguous(), True)
            return thin.expand(source.shape) if source.shape[at] else thin
        if source.dim():
            return self.guarded.tensor(source, True)[..., ::2]
        return source

    def filled(self, shape: list[int], kind: torch.dtype) -> torch.Tensor:
        pick = self.random
        if kind == torch.bool:
            return torch.rand(shape) < 0.5
        if kind.is_floating_point or kind.is_complex:
            out = torch.randn(shape).to(kind)
            if pick.random() < 0.25 and out.numel():
                out.reshape(-1)[pick.randrange(out.numel())] = pick.choice((math.nan, math.inf, -math.inf, 1e30, -1e30))
            return out
        out = torch.randint(0, max(self.size, 1), shape).to(kind)
        if pick.random() < 0.5 and out.numel():
            low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
            out.reshape(-1)[pick.randrange(out.numel())] = pick.choice((low, high, max(low, -1), self.size, 100))
        if pick.random() < 0.3:
            out.fill_(pick.choice((torch.iinfo(kind).min, torch.iinfo(kind).max, -1 if kind.is_signed else 255, 0)))
        return out


def attack(name: str, trials: int, seed: int, door: Any) -> int:
    """Call an op ``trials`` times through ``door(name)``; how many calls came back with a result."""
    schema, call = door(name)
    maker, good = Maker(seed), 0
    for _ in range(trials):
        args, kwargs = maker.call(schema)
        try:
            _read(call(args, kwargs))
        except Exception:  # an op that refuses what it was given is what is hoped for
            pass
        else:
            good += 1
        maker.guarded.forget()
    return good


def _read(result: Any) -> None:
    """Read what an op returned: a view beyond its storage is found out by its reader only."""
    for value in result if isinstance(result, (list, tuple)) else [result]:
        if isinstance(value, torch.Tensor) and value.numel():
            value.clone() if value.numel() < 1 << 16 else value[(-1,) * value.dim()].clone()


def in_a_child(name: str, trials: int, seed: int, door: Any) -> dict[str, Any]:
    """Attack an op in a child of its own; ``ended`` says what ended it, "" if nothing did."""
    read, write = os.pipe()
    start, child = time.monotonic(), os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(write, str(attack(name, trials, seed, door)).encode())
        except BaseException as err:
            os.write(write, f"failed {type(err).__name__}: {err}".encode()[:999])
        os._exit(0)
    os.close(write)
    said = os.read(read, 999).decode()
    os.close(read)
    status = os.waitpid(child, 0)[1]
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "" if said.isdigit() else said
    good = int(said) if said.isdigit() else 0
    return {"op": name, "ended": ended, "good": good, "seconds": round(time.monotonic() - start, 2)}


def bundle_door(name: str) -> Any:
    """The schema of an op, and the call of it as a graph of a bundle makes it."""
    op, function = op_named(name), guarded(name)

    def call(args: list[Any], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            if (check := getattr(function, "check", None)) is not None:
                check(*args, **kwargs)
            check_call(op, args, kwargs, BUDGET)
            return function(*args, **kwargs)

    return op._schema, call


def raw_door(name: str) -> Any:
    """The schema of an op, and the op as it is."""
    space, base, overload = name.split(".")
    op = getattr(getattr(getattr(torch.ops, space), base), overload)

    def call(args: list[Any], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return op(*args, **kwargs)

    return op._schema, call


def main() -> None:
    warnings.filterwarnings("ignore")
    door = raw_door if "--raw" in sys.argv else bundle_door
    words = [w for w in sys.argv[1:] if w != "--raw"]
    trials, names = int(words[0]), words[1:] or json.load(sys.stdin)
    for n, name in enumerate(names):
        print(json.dumps(in_a_child(name, trials, n, door)), flush=True)


if __name__ == "__main__":
    main()
