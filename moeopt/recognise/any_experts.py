"""A block's experts, as whichever of the two ops carries them: grouped matrices first, any function of a row else.

Last, where nothing names the experts of a token, grouped matrices again, with the routing read off the sum itself.
"""

from __future__ import annotations

import contextlib

from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.obstacles import Rank
from moeopt.recognise.expert_function import OtherFunction
from moeopt.recognise.experts import recognize as recognize_matrices
from moeopt.recognise.experts_hit import ExpertsNotHit
from moeopt.recognise.joined_biases import split_joined_biases
from moeopt.recognise.limits import UnreachedLimit
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_by_sum import SumOfCodes
from moeopt.recognise.routing_types import NoIds
from moeopt.recognise.row_function import recognize_functions
from moeopt.recognise.token_rows import NoTokens
from moeopt.recognise.unnamed import Unnamed


def recognize(
    tape: Tape, known: list[Recognition] | None = None, *, idle: bool = False, assume: ExpertsSpec | None = None
) -> list[Recognition]:
    """As :func:`moeopt.recognise.experts.recognize`; experts that fit no ``ExpertsSpec`` as a ``RowFunction``.

    Raises:
        Declined: neither reads them. The reason is that of the first, whose questions are the narrower ones; but where
            the second found functions and names a cause while the first does not, or knew the tokens of its functions
            while the first knew none, that of the second; and where the first knows no such function
            while the second took the experts as they are and asked for their routing.
    """
    split_joined_biases(tape)
    if any(isinstance(k.spec, RowFunction) for k in known or []):
        return recognize_functions(tape, known, idle=idle)
    levels = any(isinstance(k.routing.weights, SumOfCodes) for k in known or [])
    try:
        return recognize_matrices(tape, known, idle=idle, assume=assume, levels=levels)
    except ExpertsNotHit:
        raise
    except Declined as err:
        if assume is not None:
            raise
        reason = err.with_traceback(None)
    try:
        found = recognize_functions(tape, known, idle=idle)
    except ExpertsNotHit:
        if reason.rank == Rank.FORBIDS:  # whatever another probe call reaches
            raise reason from None
        raise
    except Declined as err:
        if isinstance(reason, NoIds) and not levels:
            with contextlib.suppress(Declined):
                return recognize_matrices(tape, known, idle=idle, levels=True)
        progress: int = err.progress  # type: ignore[attr-defined]
        further = err.rank == reason.rank and progress >= 2 and isinstance(reason, NoTokens)
        further = further or (progress >= 3 and isinstance(reason, OtherFunction))
        if (err.rank > reason.rank and progress >= 0) or further:
            err.others = reason.others
            raise
        raise _with_a_name(reason, err.refused) from None  # type: ignore[attr-defined]
    for recognition in found:
        recognition.unmatched_reason = recognition.unmatched_reason or reason.reason
        recognition.kept_from_grouped = reason.reason if isinstance(reason, UnreachedLimit) else ""
    return found


def _with_a_name(reason: Declined, refused: Declined | None) -> Declined:
    """``reason``; or where it names nothing, the call of an expert that was refused as a function of a row."""
    if not isinstance(reason, Unnamed) or refused is None:
        return reason
    refused.rank, refused.others = reason.rank, reason.others
    return refused
