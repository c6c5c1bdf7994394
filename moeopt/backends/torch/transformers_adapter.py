"""``experts_implementation="moeopt"``: the op as one more implementation of transformers' experts interface.

    from moeopt.backends.torch import transformers_adapter

    transformers_adapter.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moeopt")

The interface (transformers 5) says where the weights lie; what happens between the two GEMMs is a
Python method, ``_apply_gate``. It is recognised by value: run on probe rows, it must equal one candidate
``ExpertsSpec`` bit for bit. Whatever is not recognised runs the library's own ``grouped_mm``, and a
warning says why. The sum follows ``grouped_mm``: slot order, in float32 where the model is 16-bit.

Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate, P probe rows, O = 2I or I.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from moeopt.compat import OBJECTS_ARE_CONSTANTS, constant_when_compiled
from moeopt.errors import UsageError
from moeopt.ir.activations import ACTIVATION_TABLE
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.experts import decode, experts, flatten
from moeopt.value_types import PyObject

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STACKED = ExpertsSpec()

Conversion = tuple[str | None, str]
"""The recognised function in ``ExpertsSpec.encode``'s words (torch.compile holds no object), or None and the reason."""

_plans: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Conversion]] = weakref.WeakKeyDictionary()
_recent: dict[ExpertsSpec, None] = {}


def register(name: str = "moeopt") -> None:
    """Make ``experts_implementation=name`` known to transformers, for models made before or after.

    Raises:
        UsageError: transformers is missing, or older than its experts interface (5.0).
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as err:
        raise UsageError(
            f"transformers has no experts interface here ({err}); it came with transformers 5: "
            "pip install 'transformers>=5', or optimise the model with moeopt.optimize, which needs no interface"
        ) from err
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The interface's forward: x (T, H), ids (T, K) and weights (T, K) to (T, H)."""
    text: str | None
    if torch.compiler.is_dynamo_compiling() and not OBJECTS_ARE_CONSTANTS:
        text, reason = None, "torch.compile takes its form for a constant since torch 2.13"
    else:
        text, reason = plan(self)
    if text is not None and torch.is_autocast_enabled(hidden_states.device.type):
        text, reason = None, "autocast is on, and decides dtypes that the op's spec must name"
    if text is None:
        _warn_once(type(self).__name__, reason)
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        theirs: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return theirs
    if torch.compiler.is_compiling():
        lists = flatten(_bank(self), _STACKED)
        traced: Tensor = torch.ops.moeopt.experts(hidden_states, top_k_index, top_k_weights, *lists, text)
        return traced
    return experts(hidden_states, top_k_index, top_k_weights, _bank(self), decode(text))


@constant_when_compiled
def plan(module: nn.Module) -> Conversion:
    """What this experts module computes, recognised once for each state of its plain attributes."""
    key = _state(module)
    known = _plans.get(module)
    if known is None or known[0] != key:
        with _disable_current_modes(), torch.no_grad():
            known = key, _recognise(module)
        _plans[module] = known
    return known[1]


def _bank(module: PyObject) -> StackedExpertWeights:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    b_in = getattr(module, name + "_bias") if module.has_bias else None
    b_out = module.down_proj_bias if module.has_bias else None
    return StackedExpertWeights([getattr(module, name)], module.down_proj, [b_in], b_out)


def _state(module: PyObject) -> tuple[Any, ...]:
    """All that may change what the module computes, weights' values aside."""
    act = getattr(module, "act_fn", None)
    weights = [module._parameters.get(name) for name in ("gate_up_proj", "up_proj", "down_proj")]
    return (
        *((n, v) for n, v in vars(module).items() if isinstance(v, (bool, int, float, str))),
        *((n, v) for n, v in getattr(act, "__dict__", {}).items() if isinstance(v, (bool, int, float, str))),
        id(act),
        id(getattr(module._apply_gate, "__func__", module._apply_gate)),
        *((w.dtype, w.shape) for w in weights if w is not None),
    )


def _recognise(module: PyObject) -> Conversion:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    for weight_name in (name, "down_proj"):
        weight: PyObject = getattr(module, weight_name, None)
        if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 3 or weight.dtype not in _DTYPES:
            what = f"{type(weight).__name__}, dtype {getattr(weight, 'dtype', None)}"
            return None, f"its {weight_name} is not a plain stacked float tensor ({what})"
    if getattr(module, "has_post_expert_norm", False):  # since transformers 5.20
        return None, "it has a norm after each expert, a module of its own whose form is not recognised here"
    weight = getattr(module, name)
    layout = "io" if module.is_transposed else "oi"
    width = weight.shape[2 if module.is_transposed else 1]
    base = dict(
        w_in_layout=layout,
        w_out_layout=layout,
        compute_dtype=_DTYPES[weight.dtype],
        accum_dtype="float32" if weight.dtype.itemsize == 2 else None,
    )
    gate = module._apply_gate if module.has_gate else module.act_fn
    probe_PO = _probe(width, weight.dtype)
    try:
        want_PI = gate(probe_PO.clone())
    except Exception as err:  # any code may stand here; whatever it raises means: not recognised
        return None, f"its gate could not be run on probe rows: {type(err).__name__}: {err}"
    fits = [s for s in _recent if s.gated == module.has_gate]
    for found in itertools.chain(fits, _candidates(module)):
        got_PI = apply_gate(probe_PO, found)
        if got_PI.shape == want_PI.shape and torch.equal(got_PI, want_PI):
            _recent[found] = None
            fields = {f: getattr(found, f) for f in found.__dataclass_fields__}
            return ExpertsSpec(**{**fields, **base}).encode(), ""
    return None, f"its gate ({getattr(gate, '__qualname__', type(gate).__name__)}) equals no gate that the op knows"


def _probe(width: int, dtype: torch.dtype) -> Tensor:
    """Rows of every magnitude that the dtype holds comfortably, both signs, and zeros."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0, 1e4]).unsqueeze(1)
    rows = torch.randn(6, width, generator=generator) * scales
    return torch.cat([rows, rows.flip(1).roll(1, 0), torch.zeros(1, width)]).to(dtype)


def _candidates(module: PyObject) -> Iterator[ExpertsSpec]:
    """Gates seen in models, with the numbers that the module itself holds as limits and slopes."""
    act = getattr(module, "act_fn", None)
    held = itertools.chain(vars(module).values(), getattr(act, "__dict__", {}).values())
    numbers = sorted({abs(float(v)) for v in held if type(v) in (int, float) and 0 < abs(v) <= 100})
    activations: list[tuple[str, float | None]] = [(a, None) for a, e in ACTIVATION_TABLE.items() if e.alpha is None]
    for name, entry in ACTIVATION_TABLE.items():
        if entry.alpha is not None:
            activations += [(name, alpha) for alpha in dict.fromkeys([*numbers, 1.702, *entry.alpha])]
    if not module.has_gate:
        for act_dtype, (activation, alpha) in itertools.product((None, "float32"), activations):
            yield ExpertsSpec(rows="plain", activation=activation, alpha=alpha, act_dtype=act_dtype)
        return
    clamps: list[dict[str, float]] = [{}]
    for n in numbers:
        clamps.append(dict(gate_max=n, up_min=-n, up_max=n))
        clamps.append(dict(gate_min=-n, gate_max=n, up_min=-n, up_max=n))
        clamps.append(dict(act_max=n, up_min=-n, up_max=n))
    for clamp, rows, act_dtype, offset in itertools.product(
        clamps, ("gate|up", "interleaved", "up|gate", "interleaved_up"), (None, "float32"), (0.0, 1.0)
    ):
        for activation, alpha in activations:
            yield ExpertsSpec(
                rows=rows,  # type: ignore[arg-type]
                activation=activation,
                alpha=alpha,
                act_dtype=act_dtype,
                up_offset=offset,
                **clamp,  # type: ignore[arg-type]
            )


_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (name, reason) in _warned:
        return
    _warned.add((name, reason))
    warnings.warn(f"moeopt leaves {name} to transformers' grouped_mm: {reason}", stacklevel=3)
