"""The plan of an ONNX Runtime engine: lowerings ranked by an estimate or a measurement, run in its sessions."""

from __future__ import annotations

import functools

from moeopt.backends.onnxrt.accuracy import version_notes
from moeopt.backends.onnxrt.custom_op import register
from moeopt.backends.onnxrt.lowerings import NOT_PORTABLE
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.native_choice import BothForms, native_choice
from moeopt.backends.onnxrt.rounded_nodes import let_round
from moeopt.backends.onnxrt.select import TOKENS, ranked
from moeopt.backends.onnxrt.session import Session, mapped_options, no_change
from moeopt.lower.onnx.assemble import one_op
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.plan import BlockPlan, LoweringChoice, Runnable, kind
from moeopt.lower.onnx.upcast import upcast_node


class OrtPlan(BlockPlan):
    """The lowerings of one ONNX Runtime engine.

    Args:
        provider: what the engine runs on.
        tokens: the token counts that it will see, for the cost model; None means a decode and a prefill.
        tune: measure the lowerings on this machine, on the first block of each kind, instead of estimating.
        portable: leave out lowerings with operators that only ONNX Runtime has.
        mapped: take forms of quantised experts whose codes stay as they lie in the file, quicker ones or not.
        rounds: products of codes round their activations to int8, so 8 bits are read as codes too.

    Attributes:
        native: whether moeopt's own operator may take the place of ONNX Runtime's nodes, on the CPU of this machine.
    """

    native = True

    def __init__(
        self,
        provider: str,
        tokens: tuple[int, ...] | None = None,
        tune: bool = False,
        portable: bool = False,
        mapped: bool = False,
        rounds: bool = False,
    ) -> None:
        super().__init__(provider, tokens)
        self.remarks += version_notes(provider)
        self.tune, self.portable, self.mapped, self.rounds = tune, portable, mapped, rounds

    def rank(self, site: ExpertsNode) -> list[LoweringChoice]:
        measured = functools.partial(session_of, provider=self.provider) if self.tune else None
        without = NOT_PORTABLE if self.portable else {}
        choices = ranked(site, self.provider, self.tokens, measured, without, self.mapped, self.rounds)
        if not self.native or self.portable or self.provider != "cpu":
            return choices
        opened = functools.partial(session_of, rounds=self.rounds)
        own = native_choice(site, choices[0], self.tokens or TOKENS, opened, self.rounds)
        return choices if own is None else [own, *choices]

    def written(self, site: ExpertsNode) -> LoweringChoice:
        return self.best(site, without=Native.name)

    def open_session(self, site: ExpertsNode, lowering: Lowering) -> Runnable:
        session = session_of(site, lowering, self.provider)
        if not isinstance(lowering, Native):
            return session
        plain = session_of(site, lowering.base, self.provider, most_packed=PACKED)
        return BothForms(site, session, plain, functools.partial(self.give_up, kind(site), lowering.name))

    def legalize(self, site: ExpertsNode) -> ExpertsNode:
        return upcast_node(site) if self.provider == "cpu" else site


HELD = 32 << 20
"""Bytes of weights up to which a session of one op gets a model with them inside."""
_MOST = 1 << 30
"""Above this a protobuf message does not hold them."""


PACKED = 128 << 20
"""Bytes of weights from which the plain form of a block, verified beside the native one, reads them where they lie."""


def session_of(
    site: ExpertsNode, lowering: Lowering, provider: str = "cpu", rounds: bool = False, most_packed: int | None = None
) -> Session:
    """A session of one op, its weights in the model's own bytes or, past ``HELD``, in a file that is gone at once.

    Inside of a model they would be there four times: in the message, in its bytes, in what ONNX Runtime reads of them
    and in what its kernels pack. Of a file only the last is memory, and moeopt's own operator packs nothing.

    Args:
        rounds: whether its products of codes round what they read.
        most_packed: the bytes of weights from which kernels pack no copies of them; None: they always may.
    """
    import tempfile

    import onnx_ir as ir

    model = one_op(site, lowering)
    if rounds:
        let_round(model)
    prepare = register if isinstance(lowering, Native) else no_change
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    how = mapped_options() if most_packed is not None and size >= most_packed else None
    if size >= HELD:
        try:
            with tempfile.TemporaryDirectory(prefix="moeopt-") as folder:
                ir.save(model, f"{folder}/model.onnx", external_data="model.onnx.data")
                return Session(f"{folder}/model.onnx", provider, how, prepare=prepare)
        except OSError:  # no room for the file
            if size >= _MOST:
                raise
    return Session(ir.to_proto(model).SerializeToString(), provider, how, prepare=prepare)
