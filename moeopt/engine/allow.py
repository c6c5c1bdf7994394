"""Which functions a bundle's graph may name: pure ATen ops, moeopt's own two, and integer arithmetic.

A graph is data that came from elsewhere, so the question is not what it is likely to say but what it could say.
An op is allowed when it is registered with the dispatcher, changes none of its arguments, takes only plain values,
and belongs to no family that touches files, storages or unchecked packed formats.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from moeopt.errors import BundleError

OWN_OPS = ("moeopt.experts.default", "moeopt.route.default")

SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "operator.getitem": operator.getitem,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.truediv": operator.truediv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "operator.eq": operator.eq,
    "operator.ne": operator.ne,
    "operator.lt": operator.lt,
    "operator.le": operator.le,
    "operator.gt": operator.gt,
    "operator.ge": operator.ge,
    "operator.and_": operator.and_,
    "operator.or_": operator.or_,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
    "torch.sym_sum": torch.sym_sum,
}
"""``operator.pow`` and the shifts are absent: one small graph could ask for an integer of any length."""

_NAMES = {function: name for name, function in SCALAR_FUNCTIONS.items()}
_ARGUMENTS = re.compile(
    r"(Optional\[|List\[)*(Tensor|int|bool|float|number|str|Device|Generator)\]*",
)
_UNSAFE = re.compile(
    r"from_file|fbgemm|quantize|^q_|mkldnn|miopen|cudnn|mps|sparse|nested|backward|resize|^set$|pin_memory"
    r"|^(int_repr|data|chain_matmul|(un)?flatten_dense_tensors|requires_grad|quantized_.*)$"
)
_PRIVATE = frozenset(
    """__and__ __or__ __xor__ __lshift__ __rshift__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async
    _assert_scalar _assert_tensor_metadata _conj _conj_copy _conj_physical _convolution _euclidean_dist _cdist_forward
    _fft_c2c _fft_c2r _fft_r2c _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range
    _functional_sym_constrain_range_for_size _fused_rms_norm _grouped_mm _int_mm _is_all_true _is_any_true
    _local_scalar_dense _log_softmax _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
    _neg_view _prelu_kernel _reshape_alias _reshape_copy _safe_softmax _scaled_dot_product_attention_math
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_mm _shape_as_tensor _softmax _to_copy _trilinear _unique2
    _unsafe_index _unsafe_index_put _unsafe_view _weight_norm""".split()
)


def name_of(target: Any) -> str:
    """The name under which a graph may call ``target``; ``BundleError`` says why when it may not."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        _check(name, target)
        return name
    if target in _NAMES:
        return _NAMES[target]
    raise BundleError(f"{_describe(target)} is not an ATen op, a moeopt op or integer arithmetic")


def function_named(name: Any) -> Callable[..., Any]:
    """The inverse of :func:`name_of`; ``BundleError`` for a name that a graph may not call."""
    if not isinstance(name, str):
        raise BundleError(f"an op is named {name!r}, which is not a string")
    if name in SCALAR_FUNCTIONS:
        return SCALAR_FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "moeopt"):
        raise BundleError(f"the op {name!r} is not one that a bundle may call")
    try:
        target = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        target = None
    if not isinstance(target, torch._ops.OpOverload) or str(target) != name:
        raise BundleError(f"the op {name!r} does not exist in torch {torch.__version__}: written by another version?")
    _check(name, target)
    return target


def _check(name: str, target: torch._ops.OpOverload) -> None:
    if target.namespace == "moeopt" and name in OWN_OPS:
        return
    why = ""
    base = name.split(".")[1]
    if target.namespace != "aten":
        why = f"its namespace is {target.namespace}"
    elif target._schema.is_mutable:
        why = "it changes its arguments"
    elif not torch._C._dispatch_has_kernel(target.name()):
        why = "it is not a dispatcher op"
    elif _UNSAFE.search(base) or (base.startswith("_") and base not in _PRIVATE):
        why = "its family is not one that can be run on untrusted data"
    elif any(not _ARGUMENTS.fullmatch(str(a.type)) for a in target._schema.arguments):
        why = "it takes more than tensors, numbers and words"
    if why:
        raise BundleError(f"the op {name!r} is not one that a bundle may call: {why}")


def _describe(target: Any) -> str:
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"the higher-order op {target.name()!r}"
    module = getattr(target, "__module__", "")
    return f"{module + '.' if module else ''}{getattr(target, '__name__', repr(target))}"
