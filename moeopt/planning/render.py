"""A plan as lines of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeopt.inspection.render import amount, billions

if TYPE_CHECKING:
    from moeopt.planning.result import ClusterPlan

WIDTH = 100


def lines(plan: ClusterPlan) -> Iterator[str]:
    """The whole table."""
    nodes = plan.devices // plan.node
    where = f"{plan.devices} x {plan.device} ({nodes} node{'s' * (nodes != 1)} of {plan.node})"
    yield f"{plan.name} on {where}, {plan.dtype}"
    yield (
        f"  {plan.moe_layers} layers of {plan.experts} experts, top-{plan.top_k}, {plan.hidden} x {plan.inner}; "
        f"experts {billions(plan.expert_params)}, rest {billions(plan.rest_params)}"
    )
    for section in (_memory, _traffic, _decode, _placements, _notes):
        found = list(section(plan))
        yield from ["", *found] if found else []


def _memory(plan: ClusterPlan) -> Iterator[str]:
    m = plan.memory
    yield f"memory of a device: {amount(m.device, 'B')}, of which 90 % count"
    even = f"1/{plan.devices} of all"
    share = f"{-(-plan.experts // plan.devices)} of {plan.experts}" if plan.experts % plan.devices else even
    yield f"  experts, {share:16s}{amount(m.experts, 'B'):>9}"
    for name, rest, fits in (("whole", m.rest, m.fits), ("split in a node", m.rest_split, m.fits_split)):
        sum_ = amount(m.experts + rest, "B")
        yield f"  rest, {name:19s}{amount(rest, 'B'):>9}   together {sum_:>9}  {'fits' if fits else 'does not fit'}"
    if m.cache_per_token is not None and m.fits_split:
        cache = amount(m.cache_per_token, "B")
        yield f"  cache {cache} a token in 16 bits: {m.cache_tokens:,} tokens fit beside the split rest"


def _traffic(plan: ClusterPlan) -> Iterator[str]:
    t = plan.traffic
    yield f"sent for a token in a layer, out ({t.out} B a number) and back ({t.back} B)"
    yield f"  a row an expert          {t.copies_rows:5.2f} rows  {amount(t.rows, 'B'):>9}"
    whole = amount(t.model, "B")
    yield f"  a row a device, the least{t.copies_ranks:5.2f} rows  {amount(t.ranks, 'B'):>9}   whole model {whole}"
    if plan.devices > plan.node:
        yield f"  of these across nodes    {t.copies_nodes:5.2f} rows  {amount(t.nodes, 'B'):>9}   with one row a node"
    yield f"  tensor parallel instead              {amount(t.all_reduce, 'B'):>9}"


def _decode(plan: ClusterPlan) -> Iterator[str]:
    yield "experts of one decoding step, at least, ms    tensor parallel           expert parallel"
    for step in plan.decode:
        yield (
            f"  {step.batch:6d} tokens   {_ms(step.tensor_experts)} + {_ms(step.tensor_sent)} sent   "
            f"{_ms(step.expert_experts)} + {_ms(step.expert_sent)} sent{'   faster' if step.expert_wins else ''}"
        )


def _placements(plan: ClusterPlan) -> Iterator[str]:
    for placed in plan.placements:
        yield f"{placed.layer}: load of the busiest device over the mean"
        for way, worth in placed.imbalance.items():
            yield f"  {way:30s} {worth:5.2f}{'   chosen' if way == placed.chosen else ''}"


def _notes(plan: ClusterPlan) -> Iterator[str]:
    for note in plan.notes:
        yield from textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:7.2f}"
