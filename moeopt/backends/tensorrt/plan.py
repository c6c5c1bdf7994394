"""Which form each kind of block gets on a TensorRT target: the quickest whose planned activations fit a bound.

    sort: 20.8 MB of activations for 512 tokens, 1.9x the routed FLOPs, estimated 0.61 ms; next dense, 108.9 MB ...

Blocks are verified through ONNX Runtime on the CPU in float32: the form itself where it is one of standard operators,
else the next best that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from moeopt.backends.tensorrt.capability import refuses, refuses_dtypes
from moeopt.backends.tensorrt.cost import DEVICES, routed_flops, seconds, sizes_for
from moeopt.backends.tensorrt.lowerings import FORMS, FUNCTION_FORMS, PORTABLE
from moeopt.backends.tensorrt.target import Target
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Cost, Lowering
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.plan import BlockPlan, LoweringChoice, Runnable
from moeopt.lower.onnx.upcast import upcast_node
from moeopt.sizes import in_three_figures, in_words

TOKENS = (1, 4, 16, 128)
"""Token counts that count alike when the user names none: decode, small batches, a prompt."""
SHARE = 8
"""A block's activations may take one part in so many of the device's memory, unless the user gives a bound."""


class TensorRTPlan(BlockPlan):
    """The forms of one engine.

    Args:
        target: what the engine is built for.
        tokens: the token counts that the engine will see, for the time; None means ``TOKENS``.
        open_session: opens an ONNX Runtime session of one op on the CPU.
        most: the largest token count of the optimization profile, for the memory; None means the largest of ``tokens``.
        memory: bytes that one block's activations may take; None means an eighth of the target's device.
    """

    runtime = "TensorRT"

    def __init__(
        self,
        target: Target,
        tokens: tuple[int, ...] | None = None,
        *,
        open_session: Callable[[ExpertsNode, Lowering], Runnable],
        max_tokens: int | None = None,
        memory: int | None = None,
    ) -> None:
        super().__init__(target.name, tokens)
        self.target, self._open = target, open_session
        self.max_tokens = max_tokens or max(tokens or TOKENS)
        self.device = DEVICES[target.sm]
        self.memory = memory or int(self.device.memory / SHARE)
        of_device = f"an eighth of the {in_three_figures(self.device.memory)} of {self.device.name}"
        self.bound = f"{in_words(self.memory)} ({'as given' if memory else of_device})"

    def check(self, site: ExpertsNode) -> None:
        """``Declined`` where the target has not the dtypes that ``site`` computes in."""
        types = types_of(site)
        others = {types.x, types.act, types.weights, types.term, types.accum, types.out}
        if why := refuses_dtypes(self.target, {types.compute}, others):
            raise Declined(f"no TensorRT form carries its experts: {why}")

    def rank(self, site: ExpertsNode) -> list[LoweringChoice]:
        self.check(site)
        if isinstance(site.spec, RowFunction):
            refusals = [(form, form.refuses(site, self.target.name)) for form in FUNCTION_FORMS]
            words = "the form of any function of a row"
            return [LoweringChoice(f.name, None if why else f, why or words, 0.0) for f, why in refusals]
        fit, rest = [], []
        for form in FORMS:
            if why := refuses(self.target, "form", form.name) or form.refuses(site, self.target.name):
                rest.append(LoweringChoice(form.name, None, why))
            else:
                fit.append((self._choice(site, form), self._cost(site, form, self.max_tokens).memory))
        within = [choice for choice, memory in fit if memory <= self.memory]
        if fit and not within:  # one that is too large may still run, and none at all would not
            least = min(fit, key=lambda pair: pair[1])[0]
            within = [
                replace(least, reason=f"{least.reason}; more than the bound of {self.bound}, and the least there is")
            ]
        chosen = {choice.name for choice in within}
        over = [choice for choice, _ in fit if choice.name not in chosen]
        rest += [replace(c, lowering=None, reason=f"{c.reason}; more than the bound of {self.bound}") for c in over]
        return [*sorted(within, key=lambda c: c.seconds), *rest]

    def cpu_lowering(self, site: ExpertsNode) -> Lowering:
        """The form that ONNX Runtime runs in the place of :meth:`choice`, in float32; itself where it can."""
        best = self.lowering(site)
        if best in PORTABLE:
            return best
        portable = [c.lowering for c in self.rank(site) if c.lowering in PORTABLE]
        if portable and portable[0] is not None:
            return portable[0]
        raise Declined(f"no form of standard operators carries its experts, so {best.name} cannot be replayed")

    def open_session(self, site: ExpertsNode, lowering: Lowering) -> Runnable:
        wide = upcast_node(site)
        return _Widened(self._open(wide, lowering if lowering in PORTABLE else self.cpu_lowering(site)), wide)

    def _cost(self, site: ExpertsNode, form: Lowering, tokens: int) -> Cost:
        return form.cost(site, tokens, self.target.name)

    def _choice(self, site: ExpertsNode, form: Lowering) -> LoweringChoice:
        counts, dtype = self.tokens or TOKENS, types_of(site).compute
        time = sum(seconds(self._cost(site, form, T), self.device, dtype) for T in counts)
        largest = self._cost(site, form, self.max_tokens)
        routed = routed_flops(sizes_for(site, self.max_tokens))
        return LoweringChoice(
            form.name,
            form,
            f"{in_words(largest.memory)} of activations for {self.max_tokens} tokens, "
            f"{largest.flops / routed:.3g}x the routed FLOPs, estimated {1e3 * time:.3g} ms",
            time,
        )


class _Widened:
    """A session of the widened op, fed in the op's own dtypes."""

    def __init__(self, session: Runnable, wide: ExpertsNode) -> None:
        self._session, self._wide = session, wide

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        kinds = {"x": self._wide.dtype, "weights": self._wide.weights_dtype}
        return self._session.run({name: t.to(kinds.get(name, t.dtype)) for name, t in inputs.items()})
