"""The usual call, known by one generated expression: plain tensors by their position, in PyTorch's usual state.

    usual = usual_call(guard, signature)
    usual(module, (x, ids, weights))        the tensors of the call, or None

What it lets through is let through by :meth:`CallGuard.refuses` too, whose questions it asks in the same words; a call
that it does not know is bound, spelled out and asked there, which also tells why it is refused. A small block takes a
few dozen microseconds, and the long way takes nine of them. Of a guard that was changed since it knows no call.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from moeopt.rewrite.call_guard import OPAQUE, TENSOR, CallGuard, by_position, outside
from moeopt.rewrite.guard_expression import compiled_once

Usual = Callable[[torch.nn.Module, tuple[Any, ...]], "tuple[torch.Tensor, ...] | None"]

_MODE = """
    not (autocast("cpu") or autocast("cuda") or hooks._global_forward_hooks or hooks._global_forward_pre_hooks
         or functions() or modes() or tracing() is not None or transform() is not None or forward._current_level >= 0)
"""


def usual_call(guard: CallGuard, signature: inspect.Signature) -> Usual | None:
    """What knows the usual call of a block; None where a verified call was more than tensors and plain values."""
    names = by_position(signature)
    if not names or len(guard.template) != len(names) or any(known is OPAQUE for known in guard.template):
        return None  # as many leaves as parameters: no argument is a container
    held: dict[str, Any] = {
        "Tensor": torch.Tensor, "autocast": torch.is_autocast_enabled, "hooks": nn_module, "forward": forward_ad,
        "functions": torch._C._len_torch_function_stack, "modes": torch._C._len_torch_dispatch_stack,
        "tracing": torch._C._get_tracing_state, "transform": torch._C._functorch.peek_interpreter_stack,
        "grad": torch.is_grad_enabled, "outside": outside, "guard": guard,
    }  # fmt: skip
    arguments = [f"a{i}" for i in range(len(names))]
    terms, tensors = [f"guard.changes == {guard.changes}", " ".join(_MODE.split())], list[str]()
    if guard.training is not None:
        terms.append(f"module.training is {guard.training}")
    if guard.gradients:
        terms.append("not grad()")
    for name, known in zip(arguments, guard.template, strict=True):
        if known is TENSOR:
            terms += _of_tensor(guard, len(tensors), name, held)
            tensors.append(name)
        elif known is None:
            terms.append(f"{name} is None")
        else:
            held[f"t{name}"], held[f"v{name}"] = type(known), known
            terms.append(f"type({name}) is t{name} and {name} == v{name}")
    terms += _of_sizes(guard)
    source = (
        f"def usual(module, args, {', '.join(held)}):\n"
        f"    if len(args) != {len(names)}:\n        return None\n"
        f"    {''.join(f'{name}, ' for name in arguments)}= args\n"
        f"    return ({''.join(f'{name}, ' for name in tensors)}) if {' and '.join(terms)} else None\n"
    )
    return types.FunctionType(compiled_once(source, "usual"), {}, "usual", tuple(held.values()))


def _of_tensor(guard: CallGuard, index: int, name: str, held: dict[str, Any]) -> list[str]:
    """That an argument is like the verified tensor ``index``; ``s0``, ``s1`` ... are the sizes."""
    shape, size = guard.shapes[index], f"s{index}"
    held[f"d{index}"] = guard.dtypes[index]
    terms = [f"type({name}) is Tensor", f"{name}.dtype is d{index}", f"len({size} := {name}.shape) == {len(shape)}"]
    terms += [f"{size}[{dim}] == {fixed}" for dim, fixed in enumerate(shape) if fixed is not None]
    if guard.kept and guard.kept[index] is not None:
        held[f"k{index}"] = guard.kept[index]
        terms.append(f"not outside({name}, k{index})")
    return terms


def _of_sizes(guard: CallGuard) -> list[str]:
    """That there are neither too few nor too many tokens, as many as were verified, and that the sizes fit together."""
    terms = []
    if guard.fewest or guard.most is not None:
        free = [
            [f"s{i}[{d}]" for d, fixed in enumerate(shape) if fixed is None] for i, shape in enumerate(guard.shapes)
        ]
        counts = [" * ".join(sizes) for sizes in free if sizes]
        if not counts and guard.fewest > 1:
            return ["False"]
        terms += [f"{count} >= {guard.fewest}" for count in counts]
        terms += [f"{count} <= {guard.most}" for count in counts if guard.most is not None]
    if guard.sizes is not None:
        terms.append(f"guard.sizes.holds(({''.join(f's{i}, ' for i in range(len(guard.shapes)))}))")
    for (tensor, dim), others in guard.tied:
        product = " * ".join([f"s{i}[{d}]" for i, d in others]) or "1"
        terms.append(f"s{tensor}[{dim}] == {product}")
    return terms
