"""A random MoE program as plain data: what it computes, and in which written form.

Printed by a failing test, and enough to build the program again: ``build(Program(...))``.
Every default is the simplest choice, so a program prints only what is special about it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


class Short:
    """Prints only the fields that differ from their defaults."""

    def __repr__(self) -> str:
        shown = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if value != default:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis prints a failing example; without it, every field."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Router(Short):
    """Where ids and weights come from; ``kind`` is a key of ``routers.KINDS``."""

    kind: str = "softmax_topk"
    score: str = ""  # of kind "score_topk": a key of scores.SCORES
    gain: float = 1.0  # the logits are multiplied by this number
    softcap: float = 0.0  # and capped by a tanh to this size
    linear: bool = False  # the logits are the output of an nn.Linear, not of F.linear on the router's own weight
    copied: bool = False  # half of the router's rows are copies of the other half: exact ties everywhere
    renormalize: str = ""  # "", sum, sum+1e-20, sum+1e-9, sum+1e-6, max1e-12
    scale: float = 1.0
    per_expert_scale: bool = False
    bias: bool = False
    float32: bool = False  # logits are computed in float32
    keep_float32: bool = False  # and the weights stay so
    groups: int = 1  # group limit: experts are picked within the best half of the groups
    group_score: str = "max"  # max, top2
    group_fill: str = "-inf"  # -inf, zero


@dataclass(frozen=True, repr=False)
class Expert(Short):
    """The function of one expert; ``activation`` is a key of ``experts.ACTIVATIONS``."""

    gated: bool = False
    activation: str = "relu"
    clamp: str = ""  # "", both (GPT-OSS), gate, after
    up_offset: float = 0.0
    bias_in: bool = False
    bias_out: bool = False


@dataclass(frozen=True, repr=False)
class Layout(Short):
    """How the weights lie; ``kind`` is a key of ``layouts.KINDS``."""

    kind: str = "list"  # list, dict, parameter_list, stacked, flat
    rows: str = "gate|up"  # gate|up, up|gate, interleaved, interleaved_up, separate; of gated experts
    w_in: str = "oi"  # oi: (out, in);  io: (in, out)
    w_out: str = "oi"
    matmul: str = "linear"  # linear, at, einsum


@dataclass(frozen=True, repr=False)
class Around(Short):
    """What stands around the experts."""

    shared: str = ""  # "", added, gated, twin (of the routed experts' shape)
    out_scale: float = 1.0
    residual: bool = False
    norm: str = ""  # "", rms, layer, or a key of surroundings.NORMS
    softcap: float = 0.0  # the output is capped by a tanh to this size
    near_one: float = 0.0  # adds 1e5 * (gain - gain * near_one); gain is a feature that the example has at zero
    mask: str = ""  # an optional argument of forward: "", absent (in the example), given
    aux: str = ""  # "", tuple, dict
    rank: int = 2
    flatten: bool = True  # a 3-D input is flattened before the router
    layers: int = 1


@dataclass(frozen=True, repr=False)
class Program(Short):
    """One program. ``outside`` names what puts it outside the two ops; "" means inside."""

    form: str = "all_where"
    experts: int = 4
    top_k: int = 1
    hidden: int = 8
    inner: int = 12
    router: Router = field(default_factory=Router)
    expert: Expert = field(default_factory=Expert)
    layout: Layout = field(default_factory=Layout)
    around: Around = field(default_factory=Around)
    weight_on: str = "output"
    dtype: str = "float32"
    seed: int = 0
    outside: str = ""
    config: str = ""  # a key of configs.KINDS: an object that is read at each call
    example: str = "contiguous"  # a key of unlike.MEMORY: how the example input lies in memory

    @property
    def inside(self) -> bool:
        return not self.outside
