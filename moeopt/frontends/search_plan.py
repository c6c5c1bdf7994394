"""``QuantPlan.search``: which format each block gets, so that a limit of loss or of bytes is met.

1. each block alone in each format, the others float, on the data       -> what it costs, in KL or distance
2. all blocks in the format of fewest bytes; then, one after the other, the step to a wider format that saves
   most cost for a byte                                                 -> a line of plans, from small to exact
3. bytes: the last plan of the line that fits. A loss: the first that keeps the limit, found by halving, each plan
   on the way measured as a whole: costs add up only roughly
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.find.batches import batches
from moeopt.find.example_inputs import in_order, made_up, without_cache
from moeopt.options import Options, QuantPlan
from moeopt.options.loss_limits import FIGURES, as_limit, missed
from moeopt.options.quant_plan import CHECKPOINT, FLOAT, check_format
from moeopt.options.quant_plan import FORMATS as NAMES
from moeopt.passes.quantize_experts import BankRows, QuantizeExperts, why_not
from moeopt.pipeline.accept import as_model, without_rewrites
from moeopt.pipeline.run import run
from moeopt.quantization.calibration import calibration_of, gathered
from moeopt.quantization.loss_meter import ALL, Bank, LossMeter
from moeopt.quantization.measure_loss import changed_share, check_limit
from moeopt.recognise.routing_types import RoutingForm
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.value_types import PyObject

Choice = dict[str, str]
"""By module path, the name of a block's format."""


def search(
    model: PyObject, data: PyObject, budget: Mapping[str, float], formats: Sequence[str], method: str,
    fields: Mapping[str, Any],
) -> QuantPlan:  # fmt: skip
    """See :meth:`moeopt.QuantPlan.search`."""
    key, most = _budget(budget)
    for name in formats:
        check_format(name, "formats", [one for one in NAMES if one != CHECKPOINT])
    asked = QuantPlan(default=formats[0] if formats else FLOAT, method=method)
    # a plan is only proposed here: what optimize makes of it is verified
    asked_options = Options.from_fields(None, {"verify": "off", **fields, "quantize": asked})
    options = dataclasses.replace(asked_options, quantize=None, inplace=False, calibration=None)
    source = without_rewrites(as_model(model), False)
    given = [made_up(source, options.seed)] if data is None else batches(data, "measure")
    calls = [in_order(source, without_cache(source, one)) for one in given]
    check_limit(source, calls, None if key == "bytes" else {key: most})
    rounding = method, calibration_of(source, asked_options)
    bench = _Bench(source, calls, options, tuple(dict.fromkeys(formats)), rounding)
    line = bench.line()
    chosen = bench.within(line, most) if key == "bytes" else bench.keeping(line, key, most)
    blocks = {glob.escape(bench.name(path)): name for path, name in chosen.items()}
    costs = {bench.name(path): costs for path, costs in bench.costs.items()}
    return QuantPlan(blocks, FLOAT, costs, method=method)


def _budget(budget: PyObject) -> tuple[str, float]:
    if not isinstance(budget, Mapping) or len(budget) != 1:
        raise UsageError(
            f"budget={budget!r}: it must be one limit, like {{'kl_mean': 0.01}} or {{'bytes': 2e9}}; the figures are "
            f"{', '.join(FIGURES)}"
        )
    ((key, most),) = budget.items()
    if key != "bytes":
        limit = as_limit(budget, "budget")
        assert limit is not None
        return key, limit[key]
    if isinstance(most, bool) or not isinstance(most, (int, float)) or not most > 0:
        raise UsageError(f"budget['bytes']={most!r}: it must be a number of bytes above 0")
    return key, float(most)


class _Bench:
    """The rewritten model, its blocks in every format, and what each costs."""

    def __init__(
        self, source: nn.Module, calls: list[ArgsKwargs], options: Options, formats: tuple[str, ...],
        rounding: tuple[str, list[ArgsKwargs]],
    ) -> None:  # fmt: skip
        self.source, self.calls, self.options = source, calls, options
        self.twin = shared_copy(source)
        outcome = run(self.twin, calls[0], options)
        found = {p: f for p, m in self.twin.named_modules() if (f := rewritten_forward(m)) is not None}
        method, calibration = rounding
        rows = gathered(self.twin, found, calibration, options)
        self.banks = {path: made for path, f in found.items() if (made := _in_each_format(f, formats, method, rows))}
        if not self.banks:
            reasons = "; ".join(b.reason for b in outcome.blocks if b.status == "declined")
            raise UsageError(f"no block of the model can be quantised{f': {reasons}' if reasons else ''}")
        self.blocks = {path: found[path] for path in self.banks}
        self.routed = {
            path: [f.routing.form is not RoutingForm.EVERY_GROUP for f in outcome.rewrites[path].found]
            for path in self.banks
        }
        self.language = check_limit(source, calls, None)
        self.bytes = {path: _bytes(forms) for path, forms in self.banks.items()}
        self.costs = self._costs()

    def name(self, path: str) -> str:
        """A block's name in a plan."""
        return path or type(self.twin).__name__

    def _costs(self) -> dict[str, dict[str, float]]:
        """What each block alone loses in each format."""
        variants = {f"{path} {name}": {path: forms[name]} for path, forms in self.banks.items() for name in forms}
        meter = self._meter(variants)
        figures = {name: next(iter(one.figures().values())) for name, one in meter.figures.items()}  # the mean
        return {path: {name: figures[f"{path} {name}"] for name in forms} for path, forms in self.banks.items()}

    def _meter(self, variants: Mapping[str, Mapping[str, list[Bank]]]) -> LossMeter:
        meter = LossMeter(self.source, self.twin, self.blocks, self.routed, variants, self.language)
        for number, call in enumerate(self.calls):
            self.options.say(f"measuring {len(variants)} choices of formats, call {number + 1} of {len(self.calls)}")
            meter.run(call)
        return meter

    def line(self) -> list[Choice]:
        """Plans from the one of fewest bytes to all floats, each a step wider in one block than the one before."""
        now = {path: min(sizes, key=lambda name: (sizes[name], name)) for path, sizes in self.bytes.items()}
        plans = [dict(now)]
        while steps := [self._step(path, now[path], name) for path in now for name in self.bytes[path]]:
            gain, path, name = max(steps, key=lambda step: (step[0], step[1], step[2]))
            if gain <= 0:
                break
            now[path] = name
            plans.append(dict(now))
        return plans if all(name == FLOAT for name in now.values()) else [*plans, dict.fromkeys(now, FLOAT)]

    def _step(self, path: str, here: str, there: str) -> tuple[float, str, str]:
        """Cost saved for a byte by giving a block another format; 0 where that is no wider one."""
        more = self.bytes[path][there] - self.bytes[path][here]
        saved = self._cost(path, here) - self._cost(path, there)
        return (saved / more if more > 0 else 0.0), path, there

    def _cost(self, path: str, name: str) -> float:
        return 0.0 if name == FLOAT else self.costs[path][name]

    def within(self, line: Sequence[Choice], most: float) -> Choice:
        """The last plan of ``line`` of at most ``most`` bytes."""
        sizes = [sum(self.bytes[path][name] for path, name in plan.items()) for plan in line]
        fitting = [plan for plan, size in zip(line, sizes, strict=True) if size <= most]
        if not fitting:
            raise UsageError(
                f"budget['bytes']={most:.0f}: the experts take {min(sizes)} bytes in the smallest of these formats "
                f"({sizes[-1]} as floats): give that much, or a smaller format"
            )
        return fitting[-1]

    def keeping(self, line: Sequence[Choice], key: str, limit: float) -> Choice:
        """The first plan of ``line`` found to keep the limit of the figure ``key``; all floats lose nothing."""
        low, high = 0, len(line) - 1
        while low < high:
            middle = (low + high) // 2
            if missed(key, self._measured(line[middle], key), limit):
                low = middle + 1
            else:
                high = middle
        return line[high]

    def _measured(self, plan: Choice, key: str) -> float:
        codes = {path: self.banks[path][name] for path, name in plan.items() if name != FLOAT}
        meter = self._meter({ALL: codes})
        if key == "ids_changed":
            return changed_share(meter.ids, meter.base_ids)
        return meter.figures[ALL].figures().get(key, float("nan"))


def _in_each_format(
    forward: RewrittenForward, formats: Sequence[str], method: str, rows: BankRows
) -> dict[str, list[Bank]]:
    """The banks of a block by the name of the format that those which can be quantised have."""
    block = forward.program.block.copy()
    block.root = forward.module
    if all(why_not(block, held) for held in block.weights):
        return {}
    found = {}
    for name in formats:
        lossy = block.copy()
        QuantizeExperts(QuantPlan(default=name, method=method), rows=rows).apply(lossy)
        found[name] = [
            (LiveCodes(forward.module, n, refs, spec, lossy.formats[n], lossy.codes.get(n)), spec)
            if n in lossy.formats
            else held
            for n, (held, (refs, spec)) in enumerate(zip(forward.banks, block.weights, strict=True))
        ]
    return found


def _bytes(forms: Mapping[str, list[Bank]]) -> dict[str, int]:
    """Bytes of a block's experts in each format, and as floats."""
    codes = {name: [bank for bank, _ in banks if isinstance(bank, LiveCodes)] for name, banks in forms.items()}
    sizes = {name: sum(bank.nbytes for bank in banks) for name, banks in codes.items()}
    return sizes | {FLOAT: sum(bank.float_bytes for bank in next(iter(codes.values())))}
