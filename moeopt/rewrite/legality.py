"""What stands in the way of rewriting a block although it computes the right thing, said before trying."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import CODES, PLACES, RowFunction
from moeopt.ir.weight_refs import expert_paths, tensor_at
from moeopt.obstacles import Rank
from moeopt.recognise.named_obstacles import computed_weight
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.kept_steps import KeptSteps
from moeopt.rewrite.plain_tensors import package_named, unread
from moeopt.value_types import PyObject

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_FROZEN = 1 << 20
"""Elements of a tensor that is copied and compared because the rewritten code holds what it decided."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_module(module: nn.Module) -> None:
    """Parameters that cannot be probed at all.

    Raises:
        Declined: meta tensors, DTensors or other tensor subclasses, PyTorch's quantised tensors, sparse Parameters, a
            scripted module.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise Declined(
            "it is a TorchScript module, whose code cannot be traced; pass the Python module", rank=Rank.FORBIDS
        )
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if what := unread(tensor):
            raise Declined(f"{path} is {what}", rank=Rank.FORBIDS)


def non_finite_reason(module: nn.Module, infinite_too: bool = True) -> str:
    """Why a block with a Parameter that is not finite everywhere cannot be judged, and the way out; "" without one.

    Asked where a block was declined, since such a Parameter may be no obstacle.

    Args:
        infinite_too: whether infinity counts, or NaN alone, beside which an infinite bias may be meant: it shuts an
            expert off.
    """
    for path, weight in module.named_parameters():
        if not weight.is_floating_point() or weight.is_meta:
            continue
        values = weight.detach()
        if bool(values.sum(dtype=torch.float32 if values.element_size() < 4 else None).isfinite()):
            continue
        if values.element_size() == 1:  # of 8-bit floats PyTorch does not tell infinity
            values = values.float()
        nan, infinite = int(values.isnan().sum()), int(values.isinf().sum()) if infinite_too else 0
        if nan or infinite:
            kinds = " and ".join(f"{n:,} {word}" for n, word in ((nan, "NaN"), (infinite, "infinite")) if n)
            return (
                f"{path} has {kinds} of its {values.numel():,} entries, so that what the experts compute cannot be "
                "compared; load the weights again (a damaged checkpoint, an overflow in float16 training), or set such "
                "entries with torch.nan_to_num_, and optimise again"
            )
    return ""


def absent_reason(model: nn.Module) -> str:
    """Why a model without all of its values is left alone, and the way out; "" when every Parameter has its values."""
    absent = next((n for n, p in model.named_parameters() if p.is_meta), "")
    if not absent:
        return ""
    if any(_offloads(m.__dict__.get("_hf_hook")) for m in model.modules()):
        return (
            f"its weights are offloaded by accelerate ({absent} has no values until its module is called), so there "
            "is nothing to check against; load the model without offloading, optimise, then dispatch"
        )
    return f"{absent} is on the meta device and has no values to check against; load the weights first"


def _offloads(hook: PyObject) -> bool:
    return bool(getattr(hook, "offload", False)) or any(_offloads(h) for h in getattr(hook, "hooks", ()))


def check_experts(module: nn.Module, tape: Tape, recognitions: list[Recognition]) -> None:
    """Hooks, parametrizations and patches on modules whose calls the rewrite leaves out.

    Raises:
        Declined: such a module has one, so that leaving out its call would change what happens.
    """
    for recognition in recognitions:
        for path in sorted(expert_paths(recognition.experts)):
            tensor = tensor_at(module, path)
            if tensor.dtype not in (_FLOATS + CODES + PLACES if isinstance(recognition.spec, RowFunction) else _FLOATS):
                raise Declined(f"{path} is {tensor.dtype}; only float32, float64, bfloat16 and float16 are carried")
        end = recognition.combine.node.meta["index"]
        inner = {n.meta["call"] for n in recognition.interior if n.meta["index"] < end}
        skipped = {index for call in inner for index in tape.stack(call)}
        for index in sorted(skipped):
            call = tape.calls[index]
            holds_sum = any(call.first <= r.combine.node.meta["index"] < call.last or index == 0 for r in recognitions)
            if not holds_sum:
                check_skipped(call.path, call.module)
    for path, child in module.named_modules():
        if parametrize.is_parametrized(child) and any(
            p.startswith(f"{path}.parametrizations") for r in recognitions for p in expert_paths(r.experts)
        ):
            raise Declined(f"{path} is parametrised; remove it with torch.nn.utils.parametrize.remove_parametrizations")


def check_skipped(path: str, module: nn.Module) -> None:
    """Hooks and patches of a module whose code the rewrite leaves out.

    Raises:
        Declined: it has one.
    """
    if module._forward_pre_hooks and (reason := computed_weight(path, module)):
        raise Declined(reason)
    for kind in _HOOKS:
        if getattr(module, kind, None):
            raise Declined(hook_reason(path))
    if "_orig_mod" in module._modules:  # without the import of torch._dynamo, which takes seconds
        raise Declined(f"{path} is compiled by torch.compile, one expert alone; optimise first and compile the result")
    if "forward" in module.__dict__:
        forward = module.__dict__["forward"]
        code = getattr(getattr(forward, "__func__", forward), "__globals__", {})  # of a wrapper too, unlike its module
        package = package_named(code.get("__name__"))
        raise Declined(
            f"forward was replaced on the instance {path}; undo the patch and optimise again"
            + (
                f" (it is one of {package}: if that is a quantiser, load the model with plain weights, and give "
                "quantize='int8' or 'int4' to moeopt.optimize)"
                if package not in ("", package_named(type(module).__module__))
                else ""
            )
        )


def hook_reason(path: str) -> str:
    """The reason for a hook on the module at ``path``, whose calls a rewrite would leave out."""
    return (
        f"{path} has a forward or backward hook, which would no longer fire for each expert; "
        "remove the hook or leave this block as it is"
    )


def neutral_reason(module: nn.Module, tape: Tape, recognitions: list[Recognition], plan: KeptSteps) -> str:
    """A Parameter that the block's result is computed from and the rewritten code does not read; "" if there is none.

    What it does cannot be seen at its present values (a scale of ones, an adapter of zeros), and the rewritten code
    would miss it when they change. A part of a file that becomes one again has no other values.
    """
    if getattr(module, "never_changes", False):
        return ""
    held = _held(module, recognitions, plan)
    for path in _attributes(ancestors(tape.results())):
        tensor = tensor_at(module, path)
        if tensor.is_floating_point() and id(tensor) not in held:
            return (
                f"{path} is part of what it computes and changes nothing at its present values "
                f"({_values(tensor)}), so the op would miss it when they change; give it the values that it will have, "
                "or remove it"
            )
    return ""


def unreached_reason(
    module: nn.Module, tape: Tape, recognitions: list[Recognition], plan: KeptSteps, named: list[int]
) -> str:
    """A Parameter that only calls on no rows read, since the integers of the call name no such expert; "" without one.

    Args:
        named: the integers among the arguments that go with the tokens, sorted.
    """
    held = _held(module, recognitions, plan)
    for path in _attributes(ancestors(tape.results())) if named else ():
        if id(tensor_at(module, path)) not in held and _read_by_no_rows(tape, path):
            values = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
            return (
                f"no probe token reached the expert weights {path}, so what they compute could not be checked: the "
                f"integers among its arguments are {values} in the example; pass example inputs that reach every expert"
            )
    return ""


def _read_by_no_rows(tape: Tape, path: str) -> bool:
    """Whether each call that brings the Parameter together with data had no rows."""
    data, met = set(), []
    own = {n for n in tape.nodes if n.op == "get_attr" and str(n.target) == path}
    for node in tape.nodes:
        if node.op == "placeholder" or any(a in data for a in node.all_input_nodes):
            data.add(node)
            if any(a in own for a in node.all_input_nodes):
                met.append(0 in (node.meta.get("shape") or ()))
        elif any(a in own for a in node.all_input_nodes):
            own.add(node)
    return bool(met) and all(met)


def frozen_values(
    module: nn.Module, tape: Tape, recognitions: list[Recognition], plan: KeptSteps
) -> dict[str, torch.Tensor]:
    """Tensors of the block that the rewritten code does not read and that decided what it is, as they are now.

    They are integers or flags that the result is computed from (a mask over neurons, a placement of experts), and
    whatever Python turned into numbers outside the kept modules (a scale read with ``.item()``, a flag of an ``if``).

    Returns:
        Paths in the block, each with a copy of the tensor.

    Raises:
        Declined: such a tensor is too large to be compared at each call, or the forward writes to it.
    """
    held = _held(module, recognitions, plan)
    paths = {p: None for p in _attributes(ancestors(tape.results())) if _decides(tensor_at(module, p), held)}
    kept = set(plan.kept_modules)
    for read in tape.reads:
        if any(tape.calls[index].path in kept for index in tape.stack(read.call)[1:]):
            continue
        before = ancestors([read.node])
        varies = any(n.op == "placeholder" for n in before)
        paths |= {p: None for p in _attributes(before) if not varies or _decides(tensor_at(module, p), held)}
    written = {id(tensor_at(module, p)) for p in _attributes(tape.mutations)}
    for path in paths:
        tensor = tensor_at(module, path)
        if id(tensor) in written:
            raise Declined(f"{path} decides what it computes, and its forward writes to it; pass it as an argument")
        if tensor.numel() > MOST_FROZEN:
            raise Declined(
                f"{path} decides what it computes without being read by the op, and has {tensor.numel()} elements, too "
                "many to watch for changes; multiply it into the weights, or leave it out"
            )
    return {path: tensor_at(module, path).detach().clone() for path in paths}


def _decides(tensor: torch.Tensor, held: set[int]) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and id(tensor) not in held


def _attributes(nodes: Iterable[torch.fx.Node]) -> list[str]:
    """Paths of the Parameters, buffers and tensor attributes among ``nodes``, sorted."""
    return sorted({str(n.target) for n in nodes if n.op == "get_attr" and "constant" not in n.meta})


def _held(module: nn.Module, recognitions: list[Recognition], plan: KeptSteps) -> set[int]:
    """Ids of the tensors that the rewritten code reads where they live."""
    read = {str(step.target) for step in plan.steps if step.kind == "attr"}
    for recognition in recognitions:
        read |= expert_paths(recognition.experts)
    held = {id(tensor_at(module, path)) for path in read}
    for kept in plan.kept_modules:
        owner = module.get_submodule(kept)
        held |= {id(t) for t in (*owner.parameters(), *owner.buffers())}
    return held


def _values(tensor: torch.Tensor) -> str:
    first = tensor.reshape(-1)[:1]
    alike = bool(first.numel()) and bool((tensor == first).all())
    return f"all {first.item():g}" if alike else f"{tensor.numel()} numbers"
