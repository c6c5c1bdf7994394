"""A block's new forward: its :class:`BlockGraph`, run against the user's own module.

The graph is compiled to Python by ``fx`` and called with the block as ``self``, so ``self.gate(x)`` is
the user's router with its hooks, and weights are read where they live. Before each call a guard asks
whether this call is like the ones that were verified (structure, ranks, dtypes, fixed sizes, training
flag, autocast). If not, or if the module was changed since, the original forward runs and a
``StaleModelWarning`` says why: slower, never wrong.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from sys import getrefcount
from types import MethodType
from typing import Any, cast

import torch
from torch import fx, nn

from moeopt.capture.tree import tree_map
from moeopt.compat import compiler_callback, constant_when_compiled
from moeopt.errors import Declined, StaleModelWarning
from moeopt.ops import override
from moeopt.ops.experts import experts
from moeopt.rewrite.block_graph import BlockGraph, Slot, compiled
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.call_guard import OPAQUE, TENSOR, CallGuard, bind, by_position
from moeopt.rewrite.kept_effects import replayed_results
from moeopt.rewrite.live_bank import watched_bank, with_gradients
from moeopt.rewrite.live_codes import LiveCodes, dequantized
from moeopt.rewrite.module_copies import REFERENCES, keep_in_copies, shallow_copy_of
from moeopt.rewrite.original_calls import LOOK, OriginalCalls
from moeopt.rewrite.prepared_attribute import PreparedAttribute
from moeopt.rewrite.refused_call import KeptResults, Stale
from moeopt.rewrite.replaced_floats import check_dtypes
from moeopt.rewrite.scratch import UNSET
from moeopt.rewrite.source import Source
from moeopt.rewrite.usual_call import usual_call
from moeopt.value_types import PyObject

__all__ = ["OPAQUE", "TENSOR", "CallGuard", "BlockProgram", "RewrittenForward", "bind", "install", "uninstall"]

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_traced_by_jit = torch._C._get_tracing_state
_REFERENCES = REFERENCES + 1  # what tells of changes refers to the forward


def _change_of(forward: RewrittenForward) -> Callable[[], str]:
    """What tells what of the block's own code is not as it was verified; all of it is looked at once something was not.

    A constant to torch.compile. It takes no argument, since torch before 2.13 takes an object for no constant.
    """

    @constant_when_compiled
    def change() -> str:
        reason = forward.watch.everything() if forward._stale else forward.watch.shared()
        if forward.source is not None and not reason:
            forward.source.look()
        return reason

    return change


class RewrittenForward:
    """Callable that stands in for ``module.forward``; see the module's docstring.

    Attributes:
        source: the model that was optimised, where ``module`` is in a twin of it. Copies and pickles have none.
        silent: whether a refused call is no news: it is moeopt's own trial.
        original_calls: which calls are left to the block's own code, since that is the quicker there.
    """

    source: Source | None = None
    original_calls: OriginalCalls | None = None
    silent = divided = _changed = False
    _unlooked = 0

    def __init__(self, module: nn.Module, program: BlockProgram, original: Callable[..., Any] | None = None) -> None:
        self.module, self.program, self.original = module, program, original
        self.calls, self.fallbacks, self.last_refusal, self._stale = 0, 0, "", False
        self.__signature__ = program.signature
        self._prepare()

    def _prepare(self) -> None:
        program, block = self.program, self.program.block
        self.watch = watch = program.watch(self.module)
        self.change = _change_of(self)
        self.constants, self._run_recorded = block.constants, program.recorder_for(self.module)
        self._plain = isinstance(block.output, Slot) and not block.mutations and not block.attributes
        self._run = compiled(block.graph)
        self._names = by_position(program.signature)
        self._know_usual()
        if watch.gone:
            raise Stale(watch.gone)
        self.banks = [self._bank(b, refs, spec) for b, (refs, spec) in enumerate(block.weights)]

    def _know_usual(self) -> None:
        """Make anew what knows the usual call; it knows none of a block that writes to its arguments."""
        guard = self.program.guard
        self._usual = None if self.program.block.mutations else usual_call(guard, self.program.signature)
        self._usual_of = guard.changes

    def _bank(self, index: int, refs: PyObject, spec: PyObject) -> tuple[PyObject, PyObject]:
        """The live weights of the op number ``index``, or their codes, and its function."""
        block = self.program.block
        if index in block.formats:
            return LiveCodes(self.module, index, refs, spec, block.formats[index], block.codes.get(index)), spec
        return watched_bank(self.module, refs, spec, self.watch, index, block.coded.get(index))

    def experts(self, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The op on the live weights number ``index``: what a ``moeopt::experts`` node of the graph calls."""
        bank, spec = with_gradients(*self.banks[index])
        if not torch.compiler.is_compiling():
            known, chosen = self.program.block.per_token[index], weights.shape[-1]
            if ids.shape[-1] != chosen:  # ids that name every expert come of the program: as many as were verified
                known = ids.shape[-1]
            if known not in (None, chosen):
                raise Stale(f"its router chose {chosen} experts for a token, and {known} when it was verified")
        return experts(x, ids, weights, bank, spec, self.program.guard.skip_idle)

    def set_graph(self, graph: fx.Graph) -> None:
        """Run a copy of ``graph``, which computes what the program's own computes, from now on."""
        self.program.block.set_graph(graph)
        self._prepare()

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        left, refusal, tensors, results = False, "", cast("Sequence[torch.Tensor] | None", None), Stale.results
        if not torch.compiler.is_compiling():
            other = shallow_copy_of(self.module) if getrefcount(self) != _REFERENCES else None
            if other is not None:
                return self._of(other)(*args, **kwargs)
            if (own := self.original_calls) is not None:
                x = args[0] if args else kwargs.get(own.name)
                kinds = own.sizes, own.sizes, own.recorded, own.trained
                sizes = kinds[2 * torch.is_grad_enabled() + self.module.training]
                left = (  # here and in no function: of 80 microseconds a call of one takes 1.3
                    type(x) is torch.Tensor and x.numel() in sizes and x.is_cpu and not _dispatch_modes()
                    and not _function_modes() and _traced_by_jit() is None and override.current() is None
                )  # fmt: skip
                if left and self._unlooked > 0:
                    self._unlooked -= 1
                    if self.source is not None:
                        self.source.look()  # the own code follows what changes in its module, and not what does there
                    if self.original is None:
                        return type(self.module).forward(self.module, *args, **kwargs)
                    return self.original(*args, **kwargs)
            if self._usual is not None and not kwargs and compiler_callback() is None:
                tensors = self._usual(self.module, args)
        if tensors is None:
            refusal, tensors = self._asked(args, kwargs)
        if not refusal:
            try:
                refusal = self.change()
                if not refusal:
                    if self._changed:  # it is as it was again: the next change is told again
                        self._changed, self.last_refusal = False, ""
                    if left:
                        self._unlooked = LOOK - 1
                        return self.own()(*args, **kwargs)
                    return self._run_recorded(self._forward, tensors)
                self._changed = True
            except Stale as stale:
                refusal, results = str(stale), stale.results
                self._stale |= type(stale) is Stale  # an id out of range is none of the module's
        return self._fall_back(refusal, args, kwargs, results)

    def _asked(self, args: tuple[PyObject, ...], kwargs: dict[str, PyObject]) -> tuple[str, Sequence[torch.Tensor]]:
        """Why a call that is not known as the usual one is refused; and its tensors."""
        guard, bound = self.program.guard, bind(self.program.signature, args, kwargs, self._names)
        refusal = guard.refuses(self.module, bound) or self.program.forbidden(self.module, bound)
        if self._usual_of != guard.changes and not torch.compiler.is_compiling():
            self._know_usual()
        return refusal, bound.tensors()

    @property
    def __code__(self) -> PyObject:
        """The original forward's code: torch.export reads argument names off it."""
        return type(self.module).forward.__code__

    def _forward(self, tensors: Sequence[torch.Tensor]) -> PyObject:
        if self.program.guard.no_grad and torch.is_grad_enabled():
            with torch.no_grad():
                leaves = self._run(self.module, self, *tensors)
        else:
            leaves = self._run(self.module, self, *tensors)
        self.calls += 1
        block = self.program.block
        if self._plain:
            return leaves[block.output.index]

        def fill(slot: Slot) -> PyObject:
            return leaves[slot.index]

        for target, value in tree_map(Slot, fill, block.mutations):
            with torch.no_grad():
                target.copy_(value)
        for (path, name), value in block.attributes.items():
            home = self.module.get_submodule(path)
            if value is not UNSET:
                setattr(home, name, tree_map(Slot, fill, value))
            elif name in home.__dict__:
                delattr(home, name)
        return tree_map(Slot, fill, block.output)

    def own(self) -> Callable[..., Any]:
        """The block's own forward."""
        return self.original if self.original is not None else MethodType(type(self.module).forward, self.module)

    def _fall_back(self, refusal: str, args: PyObject, kwargs: PyObject, results: KeptResults) -> PyObject:
        if self.last_refusal != refusal:
            self.last_refusal = refusal
            if not self.silent:
                warnings.warn(
                    f"{type(self.module).__name__} runs its original code: {refusal}. "
                    "Run moeopt.optimize again on the changed model to get the fast path back.",
                    StaleModelWarning,
                    stacklevel=3,
                )
        self.fallbacks += 1
        coded = [bank for bank, _ in self.banks] if self.program.block.formats else []
        with dequantized(self.module, coded), replayed_results(results):
            try:
                return self.own()(*args, **kwargs)
            except RuntimeError as err:  # torch's, of two dtypes that meet
                check_dtypes(self.module, (args, kwargs), err)
                raise

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenForward:
        module = copy.deepcopy(self.module, memo)
        if id(self) in memo:  # copied with its module, or of an fx.GraphModule's shallow copy, which keeps it too
            return cast(RewrittenForward, memo[id(self)])
        new = memo[id(self)] = self._of(module)
        new.original = copy.deepcopy(self.original, memo)
        return new

    def _of(self, module: nn.Module) -> RewrittenForward:
        """The same for a copy of the module, which runs it from now on."""
        new = RewrittenForward.__new__(RewrittenForward)
        new.__dict__.update(self.__getstate__(), module=module)
        module.__dict__.update({key: new for key in ("forward",) if module.__dict__.get(key) is self})
        return new

    def __getstate__(self) -> dict[str, Any]:
        keep = ("module", "program", "original", "original_calls", "__signature__")
        return {k: getattr(self, k) for k in keep} | {"calls": 0, "fallbacks": 0, "last_refusal": "", "_stale": False}


for _name in (
    "watch", "change", "banks", "constants", "_plain", "_run", "_names", "_usual", "_usual_of", "_run_recorded",
):  # fmt: skip
    setattr(RewrittenForward, _name, PreparedAttribute(_name))


def run(block: BlockGraph, module: nn.Module, *args: PyObject, **kwargs: PyObject) -> PyObject:
    """One call of ``block`` on the weights of ``module``; of ``module``'s own code while the block has no graph."""
    if block.captured is not None:
        return type(module).forward(module, *args, **kwargs)
    return RewrittenForward(module, BlockProgram(block, inspect.signature(module.forward)))(*args, **kwargs)


def install(module: nn.Module, program: BlockProgram) -> RewrittenForward:
    """Make ``module`` run ``program``; its class, Parameters, hooks and ``state_dict`` stay as they are.

    Raises:
        Declined: the module's forward was already replaced by something that is not known here.
    """
    own = module.__dict__.get("forward")
    if own is None:
        module.__dict__["forward"] = forward = RewrittenForward(module, program)
        keep_in_copies(module, forward)
        return forward
    if "_old_forward" in module.__dict__ and "_hf_hook" in module.__dict__:  # accelerate wraps forward
        inner = module.__dict__["_old_forward"]
        forward = RewrittenForward(module, program, inner if getattr(inner, "__self__", None) is not module else None)
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
                keep_in_copies(module, None)
            else:
                module.__dict__[key] = held.original or type(module).forward.__get__(module)
