"""A block graph with all that it takes to stand in for a module's forward, apart from the module."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moeopt.ir.specs import RouterSpec
from moeopt.ir.weight_refs import expert_paths
from moeopt.rewrite.block_graph import BlockGraph
from moeopt.rewrite.call_guard import BoundArguments, CallGuard, overlap
from moeopt.rewrite.kept_effects import RecordedRun, recorder_for
from moeopt.rewrite.live_weights import tensor_subclass
from moeopt.rewrite.module_facts import Fact, take_facts
from moeopt.rewrite.module_guard import Watch
from moeopt.rewrite.reads import Reads


@dataclass
class BlockProgram:
    """A block graph as it is installed: with the signature of the forward that it stands for.

    ``facts`` is what was verified of the module's own code, taken from the first module that asks; ``weights`` of its
    experts' Parameters the shapes, the dtypes, and whose code runs them; ``reads`` what the block's code read outside
    its modules; ``written`` the paths of the modules to which it writes.
    """

    block: BlockGraph
    signature: inspect.Signature
    facts: list[Fact] | None = None
    reads: Reads | None = None
    weights: dict[str, tuple[torch.Size, torch.dtype, str]] | None = None
    written: frozenset[str] = frozenset()

    @property
    def guard(self) -> CallGuard:
        """Which calls the graph holds for."""
        guard = self.block.guard
        assert guard is not None
        return guard

    @property
    def routers(self) -> list[RouterSpec | None]:
        """The router of each op where it was recognised, for runtimes that want to know its weights' signs."""
        return self.block.routers

    @property
    def frozen(self) -> dict[str, torch.Tensor]:
        """By path in the block, the values of tensors that decided what the graph is and that it does not read."""
        return self.block.frozen

    def forbidden(self, module: nn.Module, bound: BoundArguments) -> str:
        """Why gradients or writes to its arguments forbid the rewritten code on this call; "" when they do not."""
        if self.guard.gradients and torch.is_grad_enabled():
            if any(t.requires_grad for t in (*bound.tensors(), *module.parameters())):
                return self.guard.gradients
        if not self.block.mutations:
            return ""
        tensors = bound.tensors()
        if overlap(tensors):
            return "it writes to its arguments, and two of them share memory"
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "it writes to tensors in place, which the rewritten code does not differentiate"
        return ""

    def recorder_for(self, module: nn.Module) -> RecordedRun:
        """What runs a call and notes what the kept submodules of ``module`` give, for a call that is refused."""
        return recorder_for(module, self.block.kept_modules, self.written)

    def watch(self, module: nn.Module) -> Watch:
        """What was verified of ``module``'s own code, bound to it; the first module to ask is the verified one."""
        block = self.block
        if self.facts is None:
            self.facts = take_facts(module, block.kept_modules, block.attributes, self.guard.training is not None)
        watch = Watch(
            module,
            self.facts,
            {(b, e): expert_paths([ref]) for b, (refs, _) in enumerate(block.weights) for e, ref in enumerate(refs)},
            block.frozen,
            self.reads,
        )
        watch.misfit = self.misfit(module)
        return watch

    def misfit(self, module: nn.Module) -> str:
        """Which weight of ``module`` is not like the verified one, in a sentence; "" where all are.

        A module that was changed before anything was prepared for it can be asked nowhere else.
        """
        paths = sorted({path for refs, _ in self.block.weights for path in expert_paths(refs)})
        tensors = dict(module.named_buffers(remove_duplicate=False))
        tensors.update(module.named_parameters(remove_duplicate=False))
        held = {path: tensors[path] for path in paths if path in tensors}
        now = {path: (tensor.shape, tensor.dtype, tensor_subclass(tensor)) for path, tensor in held.items()}
        if self.weights is None:
            self.weights = now
        for path, (shape, dtype, code) in now.items():
            before, dtype_before, code_before = self.weights.get(path, (shape, dtype, code))
            if shape != before:
                return f"{path} is {tuple(shape)} and was {tuple(before)}"
            if dtype is not dtype_before:
                return f"{path} is {dtype} and was {dtype_before}"
            if code != code_before:
                return f"{path} runs code of {code or 'no tensor class'} and ran that of {code_before or 'none'}"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        """The signature without annotations, which cannot be pickled."""
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in self.signature.parameters.values()]
        return self.__dict__ | {"signature": inspect.Signature(plain)}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockProgram:
        return self

    def graph(self) -> fx.Graph:
        """What runs: placeholders are the tensor inputs, ``self`` is the user's module."""
        return self.block.graph
