"""What reaches the experts of a model on calibration data: the rows that a plan's method weighs by.

The float model is rewritten once without verification, since only its experts' inputs are asked for, and runs on each
call of ``calibration=``. So every expert is rounded by what the *original* model sends to it, in whatever order blocks
are quantised, and a plan that was searched rounds as its parts did. Held are the rows of every bank, (T, H) of the
model's own dtype for each call and bank, until all blocks are quantised.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.find.batches import batches
from moeopt.find.example_inputs import in_order, without_cache
from moeopt.ops.override import override_experts_impl
from moeopt.options import Options
from moeopt.passes.quantize_experts import BankRows
from moeopt.pipeline.accept import moved
from moeopt.pipeline.run import run
from moeopt.rewrite.expert_rows import ExpertRows
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.value_types import PyObject
from moeopt.verification.model import run_plain

OPTIMISTIC = (
    "calibration= holds a call that the loss is measured on, so certificate.loss is smaller than on other data: give "
    "data= that the method did not see"
)


class Calibrated(NamedTuple):
    """The calls of ``calibration=``, and what reaches each bank of experts on them; both empty where there are none."""

    calls: list[ArgsKwargs]
    rows: BankRows

    def notes(self, data: Sequence[ArgsKwargs]) -> list[str]:
        """A sentence where some call is one that the loss is measured on, ``data``."""
        return [OPTIMISTIC] if any(_same(a, b) for a in self.calls for b in data) else []


def calibrate(source: nn.Module, call: ArgsKwargs, options: Options) -> Calibrated:
    """What the method of ``options.quantize`` weighs by; raises as :func:`calibration_of` and
    :func:`calibration_rows`."""
    calls = calibration_of(source, options)
    return Calibrated(calls, calibration_rows(source, call, calls, options))


def calibration_of(model: nn.Module, options: Options) -> list[ArgsKwargs]:
    """The calls of ``calibration=``, as the model was moved and cast; none where none are given.

    Raises:
        UsageError: it is no data.
    """
    if options.calibration is None:
        return []
    given = batches(options.calibration, "calibrate with", "calibration")
    return [moved(in_order(model, without_cache(model, one)), options) for one in given]


def calibration_rows(source: nn.Module, call: ArgsKwargs, calls: Sequence[ArgsKwargs], options: Options) -> BankRows:
    """What reaches each bank of experts of ``source`` on ``calls``; ``call`` is an example to rewrite it by.

    Raises:
        UsageError: the model does not run on the calls, sends its experts NaN or infinity, or calls a block as it was
            not verified for.
    """
    if not calls:
        return {}
    quiet = dataclasses.replace(
        options, quantize=None, verify="off", limit=None, data=None, calibration=None, inplace=False, dump=None,
        print_passes=False, fuel=None,
    )  # fmt: skip
    twin = shared_copy(source)
    run(twin, call, quiet)
    blocks = {path: f for path, m in twin.named_modules() if (f := rewritten_forward(m)) is not None}
    return gathered(twin, blocks, calls, options)


def gathered(
    twin: nn.Module, blocks: Mapping[str, RewrittenForward], calls: Sequence[ArgsKwargs], options: Options
) -> BankRows:
    """The same of a model that is rewritten already and runs on its floats: ``blocks`` by module path."""
    found: defaultdict[tuple[str, int], ExpertRows] = defaultdict(ExpertRows)
    for forward in blocks.values():
        forward.silent = True  # of a call that it refuses the user is told below
    for number, (args, kwargs) in enumerate(calls):
        options.say(f"gathering what reaches the experts, call {number + 1} of {len(calls)} of calibration=")
        with _noted(blocks, type(twin).__name__, number, found):
            try:
                run_plain(twin, args, kwargs)
            except UsageError:
                raise
            except Exception as err:
                raise UsageError(
                    f"the model does not run on call {number} of calibration= ({type(err).__name__}: {str(err)[:200]})"
                ) from err
        refused = next(((path, f) for path, f in blocks.items() if f.last_refusal), None)
        if refused is not None:
            raise UsageError(
                f"call {number} of calibration= reaches {refused[0] or type(twin).__name__} as the example inputs do "
                f"not ({refused[1].last_refusal}), so what its experts get is not seen: give calls like the example's"
            )
    return dict(found)


@contextlib.contextmanager
def _noted(
    blocks: Mapping[str, RewrittenForward], root: str, call: int, into: defaultdict[tuple[str, int], ExpertRows]
) -> Iterator[None]:
    places = {
        id(bank): (path or root, number) for path, f in blocks.items() for number, (bank, _) in enumerate(f.banks)
    }

    def note(x: Tensor, ids: Tensor, weights: Tensor, bank: PyObject, spec: PyObject) -> None:
        if (place := places.get(id(bank))) is None:
            return
        if not bool(torch.isfinite(x).all() and torch.isfinite(weights).all()):
            raise UsageError(
                f"call {call} of calibration= sends NaN or infinity to the experts of {place[0]}: leave it out, or "
                "give method='search' without calibration="
            )
        into[place].add(x, ids, weights)

    with override_experts_impl(note):
        yield


def _same(a: ArgsKwargs, b: ArgsKwargs) -> bool:
    ours, theirs = ([x for x in tree_leaves(one) if isinstance(x, Tensor)] for one in (a, b))
    return (
        bool(ours)
        and len(ours) == len(theirs)
        and all(
            x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(ours, theirs, strict=True)
        )
    )
