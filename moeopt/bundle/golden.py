"""Golden runs: inputs and results that travel with a bundle, and their check where it is deployed.

The results are those of the engine that was saved, or of the model that a torch bundle's graph was made of. Another
machine, another session and another form of a graph add in another order. The budget for that is stated by whoever
saved the bundle, from the rounding that was measured then; 8 eps of the result's dtype, the slack of every comparison
in moeopt, where nobody did.

That budget is of a token: a row of as many numbers as a product of the model has results. A recurrent state has no
such rows. In that of Mamba each is one number of a channel times a vector, and in that of a convolution the last
numbers of one channel: where that number cancels, the whole row is rounding. So a state counts as one row.

A token whose choice of experts is nearly a tie goes elsewhere on another machine, and says nothing of it. Which rows
those are, whoever saved the bundle has measured; they are not compared, and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.bundle.aligned import aligned
from moeopt.bundle.caches import result_leaves
from moeopt.bundle.values import decode, encode
from moeopt.errors import BundleError, LimitError, MoeoptError
from moeopt.untrusted import checked, parse_json, shown
from moeopt.value_types import PyObject
from moeopt.verification.distance import as_rows, token_distance

FILE = "golden.safetensors"
SLACK = 8.0


@dataclass(frozen=True)
class Golden:
    """One run: the leaves of ``(args, kwargs)`` and of the result, each in order.

    ``edges``: by the number of a result, its rows that rounding alone moves further than is allowed.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    edges: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GoldenCheck:
    """How the golden runs came back.

    ``passed`` is None when the bundle holds none. ``required`` is the worst relative L2 distance of a token seen,
    ``budget`` what was allowed there, ``reason`` the first failure in words, "" when there is none. ``edges`` counts
    the rows that were not compared.
    """

    passed: bool | None
    runs: int
    required: float
    budget: float
    reason: str = ""
    edges: int = 0


def golden_run(args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: PyObject) -> Golden:
    """A run as it is stored: tensors are copied to the CPU, so that later writes cannot change them."""
    return Golden(
        tuple(_keep(v) for v in pytree.tree_leaves((tuple(args), dict(kwargs)))),
        tuple(_keep(v) for v in result_leaves(outputs)),
    )


def save_golden(runs: Sequence[Golden], path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for i, run in enumerate(runs):
        for side, leaves in (("in", run.inputs), ("out", run.outputs)):
            tensors |= {f"{i}.{side}.{j}": v for j, v in enumerate(leaves) if isinstance(v, torch.Tensor)}
        tensors |= {f"{i}.edge.{j}": rows for j, rows in run.edges.items()}
    plain = [
        [[None if isinstance(v, torch.Tensor) else encode(v) for v in s] for s in (r.inputs, r.outputs)] for r in runs
    ]
    save_file(tensors, path, metadata={"runs": json.dumps(plain)})


def load_golden(path: Path, device: torch.device) -> list[Golden]:
    """The runs in a file; ``BundleError`` names it when it holds something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            said = (file.metadata() or {})["runs"]
            table = parse_json(said, f"{path}: the table of runs")
            plain = checked(table, list[tuple[list[Any], list[Any]]], str(path))
            names = set(file.keys())

            def leaf(name: str, value: PyObject) -> PyObject:
                return aligned(file.get_tensor(name)) if name in names else decode(value, _no_node, _device_named)

            def run(i: int, sides: Sequence[Sequence[Any]]) -> Golden:
                ins, outs = (
                    tuple(leaf(f"{i}.{s}.{j}", v) for j, v in enumerate(vs))
                    for s, vs in zip(("in", "out"), sides, strict=True)
                )
                found = {j: file.get_tensor(name) for j in range(len(outs)) if (name := f"{i}.edge.{j}") in names}
                return Golden(ins, outs, {j: _rows_of(outs[j], rows, path) for j, rows in found.items()})

            return [run(i, sides) for i, sides in enumerate(plain)]
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as err:
        raise BundleError(f"{path}: it holds no golden runs ({shown(err, 80)})") from None


def _rows_of(output: PyObject, rows: torch.Tensor, path: Path) -> torch.Tensor:
    """``rows`` of a result; ``BundleError`` where they are no such numbers, or all that there are."""
    count = len(as_rows(output)) if isinstance(output, torch.Tensor) and output.numel() else 0
    known = rows.dtype == torch.int64 and rows.dim() == 1 and 0 < len(rows) < count
    if not known or not bool(((rows >= 0) & (rows < count)).all()):
        raise BundleError(f"{path}: rows that are not to be compared must be some of a result's {count}")
    return rows


def read_stated(manifest_golden: PyObject, found: int, where: str) -> float | None:
    """The distance that a manifest allows its golden runs; ``BundleError`` where it speaks of others, or of any."""
    stated = manifest_golden if isinstance(manifest_golden, dict) else {}
    if stated.get("runs") != found or type(stated.get("runs")) is not int:
        raise BundleError(f"{where}: the manifest says {stated.get('runs')!r:.40} golden runs, and there are {found}")
    distance = stated.get("distance")
    if distance is not None and not (type(distance) in (int, float) and 0 <= distance < 1):
        raise BundleError(f"{where}: golden runs may be {distance!r:.40} away, which allows anything")
    return None if distance is None else float(distance)


def check_golden(
    run_flat: Callable[[Sequence[Any]], Any],
    runs: Sequence[Golden],
    distance: float | None,
    states: Container[int] = (),
) -> GoldenCheck:
    """Run each golden input again and compare; ``distance`` is the stated budget, None for 8 eps.

    ``run_flat`` takes the leaves of a run's inputs and returns the engine's result; ``states`` are the numbers of the
    results that are recurrent states.
    """
    worst, allowed = 0.0, distance if distance is not None else 0.0
    for i, run in enumerate(runs):
        try:
            outputs = result_leaves(run_flat(run.inputs))
        except LimitError:
            raise
        except (MoeoptError, RuntimeError) as err:
            return GoldenCheck(False, len(runs), math.inf, allowed, f"golden run {i} stopped: {err}")
        if len(outputs) != len(run.outputs):
            reason = f"golden run {i} returned {len(outputs)} values, not {len(run.outputs)}"
            return GoldenCheck(False, len(runs), math.inf, allowed, reason)
        for j, (got, want) in enumerate(zip(outputs, run.outputs, strict=True)):
            budget = distance if distance is not None else SLACK * _eps(want)
            far, reason = compare(got, want, j in states, run.edges.get(j))
            if not reason and far > budget:
                reason = f"it is {far:.2e} away where {budget:.2e} is allowed"
            if far > worst or allowed == 0.0:
                worst, allowed = max(far, worst), budget
            if reason:
                return GoldenCheck(False, len(runs), far, budget, f"golden run {i}, result {j}: {reason}")
    left_out = sum(len(rows) for run in runs for rows in run.edges.values())
    return GoldenCheck(True if runs else None, len(runs), worst, allowed, edges=left_out)


def compare(got: PyObject, want: PyObject, state: bool = False, edges: torch.Tensor | None = None) -> tuple[float, str]:
    """``(distance, reason)``: the worst token's relative L2 distance; reason when the two cannot be compared.

    A ``state`` has its sequences on its first axis, and all of a sequence counts as one token. Rows ``edges`` are left
    out.
    """
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        return (
            (0.0, "")
            if got == want or (got != got and want != want)
            else (math.inf, f"{got!r:.40} is not {want!r:.40}")
        )
    if got.shape != want.shape or got.dtype != want.dtype:
        one, two = f"{got.dtype} {tuple(got.shape)}", f"{want.dtype} {tuple(want.shape)}"
        return math.inf, f"it is {one}, and was {two}"
    if edges is not None and not state:
        got, want = (_without(t, edges) for t in (got, want))
    if not want.is_floating_point() and not want.is_complex():
        same = bool(torch.equal(got, want))
        return (0.0, "") if same else (math.inf, f"{int((got != want).sum())} of {want.numel()} values differ")
    finite = torch.isfinite(want)
    same_special = torch.equal(torch.isfinite(got), finite) and torch.equal(
        torch.nan_to_num(got[~finite]), torch.nan_to_num(want[~finite])
    )
    if not same_special:
        return math.inf, "NaN or Inf appeared or went away"
    wide = torch.complex128 if want.is_complex() else torch.float64
    here, there = (torch.where(finite, t, torch.zeros_like(t)) for t in (got, want))
    if state and want.dim() > 2:
        here, there = here.flatten(1), there.flatten(1)
    far = token_distance(here, there.to(wide))
    return (float(far.max()) if far.numel() else 0.0), ""


def with_edges(
    run: Golden, again: Sequence[Sequence[Any]], distance: float | None, states: Container[int] = ()
) -> Golden | None:
    """``run`` with ``edges``: the rows that one of ``again`` has further away than ``distance``.

    Args:
        again: results of the same call, each rounded otherwise.
        distance, states: as :func:`check_golden` takes them.

    Returns:
        None where a whole result is on the edge: the run would say nothing of a machine.
    """
    edges: dict[int, torch.Tensor] = {}
    for j, want in enumerate(run.outputs):
        budget = distance if distance is not None else SLACK * _eps(want)
        for outputs in again:
            moved = moved_rows(outputs[j], want, j in states)
            if moved is None or bool((moved > budget).all()) or (j in states and bool((moved > budget).any())):
                return None
            edges[j] = edges.get(j, torch.zeros(len(moved), dtype=torch.bool)) | (moved > budget)
    if any(bool(rows.all()) and len(rows) for rows in edges.values()):
        return None
    return replace(run, edges={j: rows.nonzero().flatten() for j, rows in edges.items() if bool(rows.any())})


def moved_rows(got: PyObject, want: PyObject, state: bool = False) -> torch.Tensor | None:
    """How far each row of a result is from what it was, (rows,) float64; None where it cannot be compared."""
    got = got.cpu() if isinstance(got, torch.Tensor) else got
    tensors = isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)
    if not tensors or got.shape != want.shape or got.dtype != want.dtype or state or not want.numel():
        far, reason = compare(got, want, state)
        return None if reason else torch.tensor([far], dtype=torch.float64)
    here, there = as_rows(got), as_rows(want)
    if not want.is_floating_point() and not want.is_complex():
        return torch.where((here == there).all(1), 0.0, math.inf).double()
    far_T = token_distance(got, there.reshape(want.shape))
    both = ((here == there) | (here.isnan() & there.isnan())).all(1)  # rows that are not finite in both
    return far_T.where(far_T.isfinite(), torch.where(both, 0.0, math.inf).double())


def _without(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    flat = t.reshape(1, -1) if t.dim() < 2 else t.reshape(-1, t.shape[-1])
    kept = torch.ones(len(flat), dtype=torch.bool, device=t.device)
    kept[rows.to(t.device)] = False
    return flat[kept]


def _eps(value: PyObject) -> float:
    inexact = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return torch.finfo(value.dtype).eps if inexact else 0.0


def _keep(value: PyObject) -> PyObject:
    return value.detach().cpu().contiguous().clone() if isinstance(value, torch.Tensor) else value


def _no_node(name: str) -> PyObject:
    raise BundleError(f"a golden value refers to {name!r:.60}")


def _device_named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, ValueError):
        raise BundleError(f"a golden value is the device {name!r:.60}, which torch does not know") from None
