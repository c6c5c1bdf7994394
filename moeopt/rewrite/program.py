"""A block's new forward: the generalised plan as an fx graph, run against the user's own module.

The graph is compiled to Python by ``fx`` and called with the block as ``self``, so ``self.gate(x)`` is
the user's router with its hooks, and weights are read where they live. Before each call a guard asks
whether this call is like the ones that were verified (structure, ranks, dtypes, fixed sizes, training
flag, autocast). If not, or if the module was changed since, the original forward runs and a
``StaleModelWarning`` says why: slower, never wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from moeopt.errors import Declined, StaleModelWarning
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.ir.tree import tree_map
from moeopt.ops.experts import experts
from moeopt.rewrite.bank import ExpertRef, LiveBank, Stale, expert_paths
from moeopt.rewrite.generalize import DeviceOf, Ratio, Size
from moeopt.rewrite.guard import OPAQUE, TENSOR, Bound, Guard, bind, overlap
from moeopt.rewrite.plan import Plan, Ref, Step
from moeopt.rewrite.reads import Reads
from moeopt.rewrite.source import Source
from moeopt.rewrite.watch import Fact, Watch, take_facts

__all__ = ["OPAQUE", "TENSOR", "Guard", "Program", "RewrittenForward", "bind", "install", "uninstall"]

aten = torch.ops.aten

_KINDS = (Ref, Size, Ratio, DeviceOf)


@dataclass
class Program:
    """What was verified: the plan, the experts of each op, the call's signature and its guard.

    ``routers`` has the router of each op where it was recognised, for runtimes that want to know its weights' signs.
    ``frozen`` has, by path in the block, the values of tensors that decided what the plan is and that it does not read;
    ``reads`` what the block's code read outside its modules; ``per_token`` how many experts a token has in each op,
    None where that differs: the code between the ops may have turned that number into constants.
    """

    plan: Plan
    banks: list[tuple[list[ExpertRef], ExpertsSpec]]
    signature: inspect.Signature
    guard: Guard
    routers: list[RouterSpec | None]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: list[Fact] | None = None
    reads: Reads | None = None
    per_token: list[int | None] = field(default_factory=list)

    def watch(self, module: nn.Module) -> Watch:
        """What was verified of ``module``'s own code, bound to it; the first module to ask is the verified one."""
        plan = self.plan
        if self.facts is None:
            self.facts = take_facts(module, plan.kept_modules, plan.attributes, self.guard.training is not None)
        return Watch(
            module,
            self.facts,
            {(b, e): expert_paths([ref]) for b, (refs, _) in enumerate(self.banks) for e, ref in enumerate(refs)},
            self.frozen,
            self.reads,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Ops by name, and the signature without annotations: neither can be pickled as it is."""
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in self.signature.parameters.values()]
        steps = [dataclasses.replace(s, target=_OpName.of(s.target)) for s in self.plan.steps]
        return self.__dict__ | {
            "signature": inspect.Signature(plain),
            "plan": dataclasses.replace(self.plan, steps=steps),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for step in self.plan.steps:
            if isinstance(step.target, _OpName):
                step.target = step.target.op()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def graph(self) -> fx.Graph:
        """The plan as an fx graph: placeholders are the tensor inputs, ``self`` is the block."""
        return _build(self)


@dataclass(frozen=True)
class _OpName:
    """An OpOverload by name."""

    name: str
    overload: str

    @staticmethod
    def of(target: Any) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            return target
        return _OpName(target._schema.name, target._overloadname)

    def op(self) -> Any:
        space, _, name = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, space), name), self.overload)


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
        if isinstance(a, Ratio):
            total = size(Size(a.dims))
            return graph.call_function(operator.truediv if a.inverse else operator.mul, (a.factor, total))
        return size(a) if isinstance(a, Size) else device()

    def device() -> Any:
        return graph.call_function(getattr, (inputs[0], "device"))

    def words(tree: Any) -> Any:
        return tree_map(_KINDS, word, tree)

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

    tree_map(_KINDS, place, outputs)
    graph.output(tuple(leaves))
    return graph


def _read_constant(engine: RewrittenForward, index: int, like: torch.Tensor) -> torch.Tensor:
    constant = engine.constants[index]
    return constant if constant.device == like.device else constant.to(like.device)


def _run_experts(
    engine: RewrittenForward, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    bank, spec = engine.banks[index]
    known = engine.program.per_token[index] if engine.program.per_token else None
    if known is not None and ids.shape[-1] != known and not torch.compiler.is_compiling():
        raise Stale(f"its router chose {ids.shape[-1]} experts for a token, and {known} when it was verified")
    return experts(x, ids, weights, bank, spec, engine.program.guard.skip_idle)


@torch.compiler.assume_constant_result
def _changed(engine: RewrittenForward) -> str:
    """What of the block's own code is not as it was verified; all of it is looked at once something was not."""
    reason = engine.watch.everything() if engine._stale else engine.watch.shared()
    if engine.source is not None and not reason:
        engine.source.look()
    return reason


def _check(watch: Watch, bank: int, expert: int) -> None:
    reason = watch.expert((bank, expert))
    if reason:
        raise Stale(reason)


class RewrittenForward:
    """Callable that stands in for ``module.forward``; see the module's docstring.

    Attributes:
        source: the model that was optimised, where ``module`` is in a twin of it. Copies and pickles have none.
    """

    source: Source | None = None
    _changed = False

    def __init__(self, module: nn.Module, program: Program, original: Callable[..., Any] | None = None) -> None:
        self.module, self.program, self.original = module, program, original
        self.calls, self.fallbacks, self.last_refusal, self._stale = 0, 0, "", False
        self.__signature__ = program.signature
        self._prepare()

    def _prepare(self) -> None:
        program = self.program
        self.watch = watch = program.watch(self.module)
        if watch.gone:
            raise Stale(watch.gone)
        self.banks = [
            (LiveBank(self.module, refs, (s.w_in_layout, s.w_out_layout), functools.partial(_check, watch, b)), s)
            for b, (refs, s) in enumerate(program.banks)
        ]
        self.constants = [s.target for s in program.plan.steps if s.kind == "constant"]
        counter = iter(range(10**9))
        plan = program.plan
        self._output, self._mutations, self._values = tree_map(
            _KINDS, lambda _: _Slot(next(counter)), (plan.output, plan.mutations, list(plan.attributes.values()))
        )
        self._plain = isinstance(self._output, _Slot) and not plan.mutations and not plan.attributes
        code = _build(program).python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<moeopt rewritten forward>", "exec"), scope)
        self._run = scope["forward"]

    def let_gradients_through(self) -> list[Step]:
        """Make every detach of the program an alias; the steps as they were, [] where it has none.

        A trace without gradients holds detaches that nobody wrote: in-place ops and factories leave them.
        """
        before = self.program.plan.steps
        if not any(s.target is aten.detach.default for s in before):
            return []
        self.set_steps(
            [
                dataclasses.replace(s, target=aten.alias.default) if s.target is aten.detach.default else s
                for s in before
            ]
        )
        return before

    def set_steps(self, steps: list[Step]) -> None:
        """Run ``steps``, which compute what the program's own compute, from now on."""
        self.program.plan.steps = steps
        self._prepare()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = bind(self.program.signature, args, kwargs)
        refusal = self.program.guard.refuses(self.module, bound) or self._effects(bound)
        if not refusal:
            try:
                refusal = _changed(self)
                if not refusal:
                    if self._changed:  # it is as it was again: the next change is told again
                        self._changed, self.last_refusal = False, ""
                    return self._forward(bound)
                self._changed = True
            except Stale as stale:
                self._stale, refusal = True, str(stale)
        return self._fall_back(refusal, args, kwargs)

    def _effects(self, bound: Bound) -> str:
        """Why gradients or writes to its arguments forbid the rewritten code on this call; "" when they do not."""
        program = self.program
        if program.guard.gradients and torch.is_grad_enabled():
            if any(t.requires_grad for t in (*bound.tensors(), *self.module.parameters())):
                return program.guard.gradients
        if not program.plan.mutations:
            return ""
        tensors = bound.tensors()
        if overlap(tensors):
            return "it writes to its arguments, and two of them share memory"
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "it writes to tensors in place, which the rewritten code does not differentiate"
        return ""

    @property
    def __code__(self) -> Any:
        """The original forward's code: torch.export reads argument names off it."""
        return type(self.module).forward.__code__

    def _forward(self, bound: Bound) -> Any:
        if self.program.guard.no_grad and torch.is_grad_enabled():
            with torch.no_grad():
                leaves = self._run(self.module, self, *bound.tensors())
        else:
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
            return module.forward  # type: ignore[no-any-return,return-value]
        new = RewrittenForward.__new__(RewrittenForward)
        memo[id(self)] = new
        new.module, new.program, new.original = module, self.program, copy.deepcopy(self.original, memo)
        new.calls, new.fallbacks, new.last_refusal, new._stale = 0, 0, "", False
        new.__signature__ = self.__signature__
        return new

    def __getattr__(self, name: str) -> Any:
        # A copy is made before its module has its children: it prepares itself at first use.
        if name in ("watch", "banks", "constants", "_output", "_mutations", "_values", "_plain", "_run"):
            if "program" in self.__dict__:
                self._prepare()
                return self.__dict__[name]
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        keep = ("module", "program", "original", "__signature__")
        return {k: self.__dict__[k] for k in keep} | {"calls": 0, "fallbacks": 0, "last_refusal": "", "_stale": False}


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


def rewritten_forward(module: nn.Module) -> RewrittenForward | None:
    """What :func:`install` put on ``module`` itself, if it did."""
    held = (module.__dict__.get(key) for key in ("forward", "_old_forward"))
    return next((h for h in held if isinstance(h, RewrittenForward)), None)


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`."""
    for key in ("forward", "_old_forward"):
        held = module.__dict__.get(key)
        if isinstance(held, RewrittenForward):
            if key == "forward":
                del module.__dict__[key]
            else:
                module.__dict__[key] = held.original or type(module).forward.__get__(module)


def watch_source(model: nn.Module, twin: nn.Module, values: bool) -> None:
    """Let the rewritten blocks of ``twin`` tell what changes in ``model``, of which it is a copy.

    Args:
        values: whether the twin has tensors of its own, so that writes to the model's do not show in it.
    """
    forwards = {p: f for p, m in twin.named_modules() if (f := rewritten_forward(m)) is not None}
    blocks = {path: f.program.reads for path, f in forwards.items() if f.program.reads is not None}
    if forwards:
        source = Source(model, twin, blocks, values, max(f.watch.cost for f in forwards.values()))
        for forward in forwards.values():
            forward.source = source
