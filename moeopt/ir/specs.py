"""What an expert block computes, in words that fit one line of a schema.

Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate.

``ExpertsSpec`` is the whole meaning of ``moeopt::experts``. For token row ``x_H`` and expert ``e``:

    r   = x_H * w            if weight_on == "input" else x_H          (cast to compute_dtype)
    h   = W_in[e] r + b_in[e]                                          (2I when gated, else I)
    g,u = the two halves of h, in the order ``rows``                    (plain: g = h)
    g   = clamp(g, gate_min, gate_max);  u = clamp(u, up_min, up_max)   (in act_dtype)
    a   = clamp(act(g), act_min, act_max) * (u + up_offset)             (plain: act(g))
    o   = W_out[e] a + b_out[e];   o = norm(o) when out_norm
    y_H = sum over the K experts of  o * w                              (weight_on == "output")

The sum runs in ``accum_dtype`` and ``combine`` order, and ends in ``out_dtype``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from moeopt.errors import BundleError, UsageError
from moeopt.ir.activations import ACTIVATION_TABLE
from moeopt.untrusted import parse_json

ACTIVATIONS = tuple(ACTIVATION_TABLE)
"""The names of ``moeopt.ir.activations.ACTIVATION_TABLE``, where each is defined."""

Rows = Literal["gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"]
Layout = Literal["oi", "io"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "rows": ("gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"),
    "w_in_layout": ("oi", "io"),
    "w_out_layout": ("oi", "io"),
    "weight_on": ("output", "input"),
    "out_of_range": ("nothing", "identity"),
    "combine": ("expert", "slot"),
}
DTYPE_NAMES = (None, "float32", "float64", "bfloat16", "float16")
"""What a spec may name; None means the dtype of something else."""


@dataclass(frozen=True)
class ExpertsSpec:
    """The function of one grouped-expert block; see the module's docstring for the equations.

    Args:
        rows: where gate and up lie in W_in's output rows. ``interleaved`` is g0,u0,g1,u1;
            ``interleaved_up`` is u0,g0,u1,g1; ``separate`` means two tensors, gate then up;
            ``plain`` means not gated.
        w_in_layout: ``oi`` is (out, in), as ``F.linear`` takes it; ``io`` is (in, out).
        w_out_layout: the same for W_out, independently.
        activation: one of ``ACTIVATIONS``; ``alpha`` is its parameter where it has one.
        gate_min, gate_max, up_min, up_max: clamps before the activation; None means no clamp.
        act_min, act_max: clamps after the activation.
        up_offset: added to up before the product (GPT-OSS: 1).
        compute_dtype: dtype of both GEMMs; None means the dtype of x.
        act_dtype: dtype in which activation and gate product run; None means compute_dtype.
        out_norm_eps: epsilon of a per-row RMSNorm after W_out; None means no norm.
        weight_on: whether routing weights multiply the expert's ``output`` or its ``input``.
        out_of_range: an id >= E adds ``nothing``, or ``identity`` (x times its weight).
        combine: order in which a token's K contributions are added.
        accum_dtype: dtype of that sum; None means out_dtype.
        out_dtype: dtype of the result; None means the dtype of x.
    """

    rows: Rows = "gate|up"
    w_in_layout: Layout = "oi"
    w_out_layout: Layout = "oi"
    activation: str = "silu"
    alpha: float | None = None
    gate_min: float | None = None
    gate_max: float | None = None
    up_min: float | None = None
    up_max: float | None = None
    act_min: float | None = None
    act_max: float | None = None
    up_offset: float = 0.0
    compute_dtype: str | None = None
    act_dtype: str | None = None
    out_norm_eps: float | None = None
    weight_on: Literal["output", "input"] = "output"
    out_of_range: Literal["nothing", "identity"] = "nothing"
    combine: Literal["expert", "slot"] = "slot"
    accum_dtype: str | None = None
    out_dtype: str | None = None

    text = ""
    """:meth:`encode`'s, of each instance; not annotated, so no field: torch.compile reads a plain attribute only."""

    def __post_init__(self) -> None:
        for field, choices in (*_CHOICES.items(), ("activation", tuple(ACTIVATION_TABLE))):
            value = getattr(self, field)
            if value not in choices:
                raise UsageError(f"ExpertsSpec.{field} is {value!r}; it must be one of {', '.join(choices)}")
        for field in ("compute_dtype", "act_dtype", "accum_dtype", "out_dtype"):
            value = getattr(self, field)
            if value not in DTYPE_NAMES:
                raise UsageError(f"ExpertsSpec.{field} is {value!r}; it must be None or one of {DTYPE_NAMES[1:]}")
        if ACTIVATION_TABLE[self.activation].alpha is not None and self.alpha is None:
            raise UsageError(f"ExpertsSpec.activation {self.activation!r} needs alpha")
        object.__setattr__(self, "text", self.encode())

    @property
    def gated(self) -> bool:
        """True for GLU experts (gate and up), False for plain ones."""
        return self.rows != "plain"

    def encode(self) -> str:
        """A compact JSON string that holds only what differs from the defaults."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return json.dumps(changed, sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> ExpertsSpec:
        """The inverse of :meth:`encode`; an unknown field is a ``UsageError``."""
        try:
            fields = parse_json(text, "the spec")
        except BundleError as err:
            raise UsageError(f"not an ExpertsSpec: {text!r:.200} ({err})") from err
        if not isinstance(fields, dict):
            raise UsageError(f"not an ExpertsSpec: {text!r:.200} (it is no JSON object)")
        types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(types))
        if unknown:
            raise UsageError(f"ExpertsSpec has no field {unknown[0]!r:.60}: written by a newer moeopt?")
        for name, value in fields.items():
            number = types[name].startswith("float")
            fits = type(value) in (int, float) if number else isinstance(value, str)
            if not fits and not (value is None and types[name].endswith("None")):
                raise UsageError(f"ExpertsSpec.{name} is {value!r:.60}; it must be a {'number' if number else 'word'}")
        return cls(**fields)

    def __str__(self) -> str:
        act = self.activation if self.alpha is None else f"{self.activation}({self.alpha:g})"
        words = [f"{act} GLU, rows {self.rows}" if self.gated else f"plain {act}"]
        words.append(f"W_in {self.w_in_layout}, W_out {self.w_out_layout}")
        for name in ("gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max", "out_norm_eps"):
            if getattr(self, name) is not None:
                words.append(f"{name} {getattr(self, name):g}")
        if self.up_offset:
            words.append(f"up+{self.up_offset:g}")
        if self.weight_on == "input":
            words.append("weight on input")
        if self.out_of_range == "identity":
            words.append("identity beyond E")
        for name in ("compute_dtype", "act_dtype", "accum_dtype"):
            if getattr(self, name):
                words.append(f"{name.removesuffix('_dtype')} in {getattr(self, name)}")
        return "; ".join(words)


@dataclass(frozen=True)
class RouterSpec:
    """The small family of routers that some runtimes can take as logits.

    ``score``: ``softmax_topk`` (softmax over E, then top-k) or ``topk_softmax`` (top-k of the
    logits, then softmax over the K). ``renormalize``: the K weights are divided by their sum.
    ``dtype``: the dtype of the softmax; None means the dtype of the logits.
    """

    score: Literal["softmax_topk", "topk_softmax"]
    top_k: int
    num_experts: int
    renormalize: bool = False
    dtype: str | None = None

    def __str__(self) -> str:
        words = {"softmax_topk": "softmax, top-{k}", "topk_softmax": "top-{k}, softmax"}[self.score]
        text = words.format(k=self.top_k) + f" of {self.num_experts}"
        return text + (", renormalised" if self.renormalize else "")
