"""A block's new forward: the generalised plan as an fx graph, run against the user's own module.

The graph is compiled to Python by ``fx`` and called with the block as ``self``, so ``self.gate(x)`` is
the user's router with its hooks, and weights are read where they live. Before each call a guard asks
whether this call is like the ones that were verified (structure, ranks, dtypes, fixed sizes, training
flag, autocast). If not, or if the module was changed since, the original forward runs and a
``StaleModelWarning`` says why: slower, never wrong.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moeopt.errors import Declined, StaleModelWarning
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.tree import tree_leaves, tree_map
from moeopt.ops.experts import experts
from moeopt.rewrite.bank import ExpertRef, LiveBank, Stale
from moeopt.rewrite.generalize import DeviceOf, Size
from moeopt.rewrite.plan import Plan, Ref

aten = torch.ops.aten


@dataclass(frozen=True)
class Bound:
    """A block's inputs in the order of its signature: parameter names and their trees of leaves."""

    names: tuple[str, ...]
    values: tuple[Any, ...]

    def tensors(self) -> list[torch.Tensor]:
        """The tensor leaves, in order."""
        return [leaf for leaf in tree_leaves(list(self.values)) if isinstance(leaf, torch.Tensor)]


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Positional, keyword and defaulted arguments in one canonical order."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return Bound(tuple(bound.arguments), tuple(bound.arguments.values()))


@dataclass
class Guard:
    """What a call must look like for the program to hold."""

    template: list[Any]
    shapes: list[tuple[int | None, ...]]
    dtypes: list[torch.dtype]
    training: bool | None
    autocast: bool

    def refuses(self, module: nn.Module, bound: Bound) -> str:
        """Why this call is unlike the verified ones; "" when it is like them."""
        if self.training is not None and module.training != self.training:
            mode = "training" if module.training else "evaluation"
            return f"the block is in {mode} mode, in which it computes something else"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on, which changes the dtypes that were verified"
        index = 0
        leaves = list(tree_leaves(list(bound.values)))
        if len(leaves) != len(self.template):
            return "it was called with another structure of arguments than the verified one"
        for leaf, known in zip(leaves, self.template, strict=True):
            if known is TENSOR:
                if not isinstance(leaf, torch.Tensor):
                    return "it was called with a non-tensor where a tensor was verified"
                shape = self.shapes[index]
                if leaf.dtype is not self.dtypes[index]:
                    return f"it was called with {leaf.dtype} where {self.dtypes[index]} was verified"
                if len(leaf.shape) != len(shape):
                    return f"it was called with a {len(leaf.shape)}-dimensional tensor, verified with {len(shape)}"
                for size, fixed in zip(leaf.shape, shape, strict=True):
                    if fixed is not None and size != fixed:
                        return f"it was called with size {size} where only {fixed} was verified"
                index += 1
            elif known is not OPAQUE and (isinstance(leaf, torch.Tensor) or leaf != known):
                return f"it was called with {leaf!r} where {known!r} was verified"
        return ""


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: Any) -> _Mark:
        return self


TENSOR, OPAQUE = _Mark("TENSOR"), _Mark("OPAQUE")


@dataclass
class Program:
    """What was verified: the plan, the experts of each op, the call's signature and its guard."""

    plan: Plan
    banks: list[tuple[list[ExpertRef], ExpertsSpec]]
    signature: inspect.Signature
    guard: Guard

    def graph(self) -> fx.Graph:
        """The plan as an fx graph: placeholders are the tensor inputs, ``self`` is the block."""
        return _build(self)


def _build(program: Program) -> fx.Graph:
    graph = fx.Graph()
    refs: list[fx.Node] = []
    inputs: list[fx.Node] = []
    sizes: dict[Size, Any] = {}

    def size(expr: Size) -> Any:
        if expr not in sizes:
            total: Any = None
            for index, dim in expr.dims:
                part = graph.call_function(aten.sym_size.int, (inputs[index], dim))
                total = part if total is None else graph.call_function(operator.mul, (total, part))
            for op, by, idle in (
                (operator.mul, expr.factor, 1),
                (operator.floordiv, expr.divisor, 1),
                (operator.add, expr.offset, 0),
            ):
                total = total if by == idle else graph.call_function(op, (total, by))
            sizes[expr] = total
        return sizes[expr]

    def word(a: Any) -> Any:
        if isinstance(a, Ref):
            return refs[a.step]
        return size(a) if isinstance(a, Size) else device()

    def device() -> Any:
        return graph.call_function(getattr, (inputs[0], "device"))

    def words(tree: Any) -> Any:
        return tree_map((Ref, Size, DeviceOf), word, tree)

    engine = graph.placeholder("engine")
    constants = 0
    for step in program.plan.steps:
        if step.kind == "input":
            refs.append(graph.placeholder(f"input_{len(inputs)}"))
            inputs.append(refs[-1])
        elif step.kind == "attr":
            refs.append(graph.get_attr(step.target))
        elif step.kind == "constant":
            refs.append(graph.call_function(_read_constant, (engine, constants, inputs[0])))
            constants += 1
        elif step.kind == "module":
            refs.append(graph.call_module(step.target, words(step.args), words(step.kwargs)))
        elif step.kind == "experts":
            refs.append(graph.call_function(_run_experts, (engine, step.target, *words(step.args))))
        else:
            refs.append(graph.call_function(step.target, words(step.args), words(step.kwargs)))
    outputs = (program.plan.output, program.plan.mutations, list(program.plan.attributes.values()))
    leaves: list[fx.Node] = []

    def place(a: Any) -> int:
        leaves.append(word(a))
        return len(leaves) - 1

    tree_map((Ref, Size, DeviceOf), place, outputs)
    graph.output(tuple(leaves))
    return graph


def _read_constant(engine: RewrittenForward, index: int, like: torch.Tensor) -> torch.Tensor:
    constant = engine.constants[index]
    return constant if constant.device == like.device else constant.to(like.device)


def _run_experts(
    engine: RewrittenForward, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    bank, spec = engine.banks[index]
    return experts(x, ids, weights, bank, spec)


class RewrittenForward:
    """Callable that stands in for ``module.forward``; see the module's docstring."""

    def __init__(self, module: nn.Module, program: Program, original: Callable[..., Any] | None = None) -> None:
        self.module, self.program, self.original = module, program, original
        self.calls, self.fallbacks, self.last_refusal = 0, 0, ""
        self.__signature__ = program.signature
        self._prepare()

    def _prepare(self) -> None:
        program = self.program
        self.banks = [
            (LiveBank(self.module, refs, (spec.w_in_layout, spec.w_out_layout)), spec)
            for refs, spec in program.banks
        ]
        self.constants = [s.target for s in program.plan.steps if s.kind == "constant"]
        counter = iter(range(10**9))
        kinds = (Ref, Size, DeviceOf)
        plan = program.plan
        self._output, self._mutations, self._values = tree_map(
            kinds, lambda _: _Slot(next(counter)), (plan.output, plan.mutations, list(plan.attributes.values()))
        )
        self._plain = isinstance(self._output, _Slot) and not plan.mutations and not plan.attributes
        code = _build(program).python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<moeopt rewritten forward>", "exec"), scope)
        self._run = scope["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = bind(self.program.signature, args, kwargs)
        refusal = self.program.guard.refuses(self.module, bound)
        if not refusal:
            try:
                return self._forward(bound)
            except Stale as stale:
                refusal = str(stale)
        return self._fall_back(refusal, args, kwargs)

    @property
    def __code__(self) -> Any:
        """The original forward's code: torch.export reads argument names off it."""
        return type(self.module).forward.__code__

    def _forward(self, bound: Bound) -> Any:
        leaves = self._run(self.module, self, *bound.tensors())
        self.calls += 1
        if self._plain:
            return leaves[0]

        def fill(slot: _Slot) -> Any:
            return leaves[slot.index]

        for target, value in tree_map(_Slot, fill, self._mutations):
            with torch.no_grad():
                target.copy_(value)
        for (path, name), value in zip(self.program.plan.attributes, self._values, strict=True):
            setattr(self.module.get_submodule(path), name, tree_map(_Slot, fill, value))
        return tree_map(_Slot, fill, self._output)

    def _fall_back(self, refusal: str, args: Any, kwargs: Any) -> Any:
        if self.last_refusal != refusal:
            self.last_refusal = refusal
            warnings.warn(
                f"{type(self.module).__name__} runs its original code: {refusal}. "
                "Run moeopt.optimize again on the changed model to get the fast path back.",
                StaleModelWarning,
                stacklevel=3,
            )
        self.fallbacks += 1
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenForward:
        module = memo.get(id(self.module))
        if module is None:
            module = copy.deepcopy(self.module, memo)
            return module.forward  # type: ignore[no-any-return]
        new = RewrittenForward.__new__(RewrittenForward)
        memo[id(self)] = new
        new.module, new.program, new.original = module, self.program, copy.deepcopy(self.original, memo)
        new.calls, new.fallbacks, new.last_refusal = 0, 0, ""
        new.__signature__ = self.__signature__
        return new

    def __getattr__(self, name: str) -> Any:
        # A copy is made before its module has its children: it prepares itself at first use.
        if name in ("banks", "constants", "_output", "_mutations", "_values", "_plain", "_run"):
            if "program" in self.__dict__:
                self._prepare()
                return self.__dict__[name]
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        keep = ("module", "program", "original", "__signature__")
        return {k: self.__dict__[k] for k in keep} | {"calls": 0, "fallbacks": 0, "last_refusal": ""}


@dataclass(frozen=True)
class _Slot:
    index: int


def install(module: nn.Module, program: Program) -> RewrittenForward:
    """Make ``module`` run ``program``; its class, Parameters, hooks and ``state_dict`` stay as they are.

    Raises:
        Declined: the module's forward was already replaced by something that is not known here.
    """
    own = module.__dict__.get("forward")
    if own is None:
        forward = RewrittenForward(module, program)
        module.__dict__["forward"] = forward
        return forward
    if "_old_forward" in module.__dict__ and "_hf_hook" in module.__dict__:  # accelerate wraps forward
        inner = module.__dict__["_old_forward"]
        original = inner if getattr(inner, "__self__", None) is not module else None
        forward = RewrittenForward(module, program, original)
        module.__dict__["_old_forward"] = forward
        return forward
    raise Declined(
        f"forward was replaced on this instance of {type(module).__name__}; undo the patch, optimise, and patch again"
    )


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`."""
    for key in ("forward", "_old_forward"):
        held = module.__dict__.get(key)
        if isinstance(held, RewrittenForward):
            if key == "forward":
                del module.__dict__[key]
            else:
                module.__dict__[key] = held.original or type(module).forward.__get__(module)
