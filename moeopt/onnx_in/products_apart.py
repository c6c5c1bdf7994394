"""One product by the matrices of all experts, as a product for each of them.

MatMul(x, W (E, in, out))            ->  MatMul(x, W[0]), ..., MatMul(x, W[E - 1])
MatMul(x, W (in, E * out))           ->  the same, each with its own columns
Einsum("th,eho,te->to", x, W, t)     ->  Einsum("th,ho->to", x, W[0]) * t[:, 0] + ...
MatMul(x, Gather(W, ids))            ->  as the first; ids pick from the results
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moeopt.onnx_in.program import NodeStep
from moeopt.onnx_in.step_writer import StepWriter

_MATRICES = ("MatMul", "FusedMatMul", "Gemm")
_TURNS = ("transA", "transBatchA", "transBatchB")


@dataclass(frozen=True)
class ExpertParts:
    """A value as one part for each expert.

    Attributes:
        axis: where the parts lie side by side in the value. They have no such axis themselves, but where they are wide.
        width: how long each is there; 0 where it has no such axis.
        ids: what picks from the parts, for each token; "" where all of them are the value.
        added: whether the value has no such axis either, as each token has rows of its own.
    """

    names: tuple[str, ...]
    axis: int
    width: int = 0
    ids: str = ""
    added: bool = False


@dataclass(frozen=True)
class LookedUp:
    """What ids pick of a constant's first axis. ``turned``: its last two axes are swapped."""

    stack: str
    ids: str
    turned: bool = False


class ProductsApart:
    """Takes products apart.

    Args:
        out: where the steps go.
        parts: of values that were taken apart before; ``tables``: values that are looked up in constants.
        expanded: of a value that ``Expand`` gives, what this is given.
    """

    def __init__(
        self, out: StepWriter, parts: Mapping[str, ExpertParts], tables: Mapping[str, LookedUp],
        expanded: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._out, self._parts, self._tables, self._expanded = out, parts, tables, expanded

    def run(self, step: NodeStep, count: int) -> ExpertParts | None:
        """The results of a product of ``count`` experts; without parts where it added them up; None where it is of a
        form that is not taken apart."""
        if step.op_type == "Einsum":
            return self._einsum(step, count)
        if step.domain and step.attributes.get("transB") or any(step.attributes.get(name, 0) for name in _TURNS):
            return None
        if step.op_type not in _MATRICES:
            return None
        at = next((n for n in (1, 0) if step.inputs[n] in self._tables), -1)
        if at >= 0 and len(step.inputs) == 2:
            return self._looked_up(step, count, at, self._tables[step.inputs[at]])
        held = self._out.constants.get(step.inputs[1])
        if held is None:
            return None
        return self._side_by_side(step, count) if held.dim() == 2 else self._stacked(step, count, held)

    def _side_by_side(self, step: NodeStep, count: int) -> ExpertParts | None:
        """A product by matrices that lie side by side."""
        rows, weight, *rest = step.inputs
        axis = 0 if step.attributes.get("transB") else 1
        width = self._out.constants[weight].shape[axis] // count
        names = []
        for e in range(count):
            own = [self._out.cut(weight, axis, count, e), *(self._out.cut(b, -1, count, e) for b in rest if b)]
            if None in own:
                return None
            names.append(self._out.like(step, (rows, *(n for n in own if n is not None))))
        return ExpertParts(tuple(names), len(self._out.shapes[step.outputs[0]]) - 1, width)

    def _stacked(self, step: NodeStep, count: int, held: Tensor) -> ExpertParts | None:
        """A product by a stack of matrices."""
        out, rows, made = self._out, step.inputs[0], self._out.shapes[step.outputs[0]]
        shape, before = out.shapes[rows], self._parts.get(rows)
        if len(step.inputs) > 2 or held.shape[:-2] not in ((count,), (1, count)):
            return None
        axis = len(shape) - 3
        if before is not None and before.axis == axis and not before.width + before.added and not before.ids:
            given = list(before.names)
        elif before is not None or (axis >= 0 and shape[axis] not in (1, count)):
            return None
        elif axis >= 0 and shape[axis] == count:
            given = [out.pick(rows, axis, e) for e in range(count)]
        else:
            given = [rows if axis < 0 else out.new("Squeeze", rows, out.number([axis]))] * count
        names = [out.like(step, (r, out.matrix(step.inputs[1], e))) for e, r in enumerate(given)]
        missing = range(len(made) - 1 - max(len(shape) - 1, 2))
        return ExpertParts(tuple(out.with_axes(name, missing) for name in names), len(made) - 3)

    def _looked_up(self, step: NodeStep, count: int, at: int, table: LookedUp) -> ExpertParts | None:
        """A product by what ids pick from a stack."""
        out, rows, made = self._out, step.inputs[1 - at], self._out.shapes[step.outputs[0]]
        last = len(out.shapes[table.ids]) - 1
        source = self._expanded.get(rows, rows)
        if source != rows and out.shapes[source] == (*made[:last], 1, *out.shapes[rows][last + 1 :]):
            rows = source  # the same row for each of a token's experts
        shape = out.shapes[rows]
        if rows in self._parts or len(shape) != len(made) or shape[:last] != made[:last]:
            return None
        if shape[last] not in (1, made[last]):
            return None
        added = shape[last] == made[last]
        if not at and shape[-1] != 1:
            return None
        flat = [last] * (not added) + [len(shape) - 1] * (not at)  # a column times a matrix is a row times it turned
        own = out.new("Squeeze", rows, out.number(flat)) if flat else rows
        matrices = [out.matrix(table.stack, e, table.turned == bool(at)) for e in range(count)]
        names = [out.like(step, (own, matrix)) for matrix in matrices]
        if not at:
            names = [out.with_axes(name, [len(shape) - 2 + added]) for name in names]
        return ExpertParts(tuple(names), last + added, 0, table.ids, added)

    def _einsum(self, step: NodeStep, count: int) -> ExpertParts | None:
        """An ``Einsum`` of rows and a stack, or of rows and what ids pick of it; its weights, where it reads such, are
        multiplied with behind it."""
        out = self._out
        terms, _, result = step.attributes["equation"].replace(" ", "").partition("->")
        letters = terms.split(",")
        known = [n for n, name in enumerate(step.inputs) if name in out.constants or name in self._tables]
        if not result or not terms.replace(",", "").isalpha() or not 2 <= len(letters) <= 3 or not known:
            return None
        at = known[0]
        if step.inputs[at] in self._tables:
            return self._picked_einsum(step, letters, result, at, count)
        expert = letters[at][0]
        if out.constants[step.inputs[at]].shape[0] != count or (expert not in result and len(letters) < 3):
            return None
        others = [n for n in range(len(letters)) if n != at]
        rows = next((n for n in others if not set(letters[n]) <= {*result, expert}), others[0])
        kept, names = result.replace(expert, ""), []
        for e in range(count):
            own = self._row(step.inputs[rows], letters[rows].find(expert), e)
            if own is None:
                return None
            equation = f"{letters[rows].replace(expert, '')},{letters[at][1:]}->{kept}"
            part: str | None = out.like(step, (own, out.matrix(step.inputs[at], e)), equation=equation)
            for n in others:
                if n != rows and part is not None:
                    part = self._weighed(part, step.inputs[n], letters[n], expert, kept, e)
            if part is None:
                return None
            names.append(part)
        if expert not in result:
            out.sum(names, step.outputs[0])
            return ExpertParts((), 0)
        return ExpertParts(tuple(names), result.index(expert))

    def _row(self, rows: str, axis: int, e: int) -> str | None:
        """The rows of one expert; None where they cannot be told."""
        before = self._parts.get(rows)
        if before is None:
            return self._out.pick(rows, axis, e)
        own = before.axis == axis and not before.width and not before.ids
        return before.names[e] if own else None

    def _picked_einsum(
        self, step: NodeStep, letters: list[str], result: str, at: int, count: int
    ) -> ExpertParts | None:
        """An ``Einsum`` of rows and what ids pick of a stack."""
        table, rows = self._tables[step.inputs[at]], step.inputs[1 - at]
        picks = letters[at][: len(self._out.shapes[table.ids])]
        if len(letters) > 2 or not result.startswith(picks) or not set(picks[:-1]) <= set(letters[1 - at]):
            return None
        if rows in self._parts:
            return None
        added = picks[-1] in letters[1 - at]
        kept = result if added else result.replace(picks[-1], "")
        equation = f"{letters[1 - at]},{letters[at][len(picks) :]}->{kept}"
        matrices = [self._out.matrix(table.stack, e, table.turned) for e in range(count)]
        names = [self._out.like(step, (rows, matrix), equation=equation) for matrix in matrices]
        return ExpertParts(tuple(names), len(picks) - 1 + added, 0, table.ids, added)

    def summed(self, step: NodeStep) -> bool:
        """Whether a step adds parts up, weighed, and was written for each of them."""
        at = next((n for n, name in enumerate(step.inputs) if name in self._parts), -1)
        if step.domain or at < 0 or len(step.inputs) != 2:
            return False
        parts = self._parts[step.inputs[at]]
        if parts.ids or parts.width or step.inputs[1 - at] in self._parts:
            return False
        if step.op_type == "Einsum":
            return self._summed_by_einsum(step, parts, at)
        return step.op_type == "MatMul" and at == 1 and self._summed_by_product(step, parts)

    def _summed_by_einsum(self, step: NodeStep, parts: ExpertParts, at: int) -> bool:
        terms, _, result = step.attributes["equation"].replace(" ", "").partition("->")
        letters = terms.split(",")
        if not terms.replace(",", "").isalpha():
            return False
        expert = letters[at][parts.axis]
        kept = letters[at].replace(expert, "")
        if expert in result or sorted(kept) != sorted(result) or not set(letters[1 - at]) <= {*kept, expert}:
            return False
        names = list(parts.names)
        if kept != result:
            names = [self._out.new("Transpose", n, perm=[kept.index(c) for c in result]) for n in names]
        table = step.inputs[1 - at]
        each = [self._weighed(n, table, letters[1 - at], expert, result, e) for e, n in enumerate(names)]
        if None in each:
            return False
        self._out.sum([n for n in each if n is not None], step.outputs[0])
        return True

    def _summed_by_product(self, step: NodeStep, parts: ExpertParts) -> bool:
        """A product of a row of weights for each token, and the results of all experts."""
        table, value = step.inputs
        shape, rank = self._out.shapes[table], len(self._out.shapes[value])
        if parts.axis != rank - 2 or len(shape) != rank or shape[-2] != 1:
            return False
        each = [self._out.new("Mul", n, self._out.pick(table, rank - 1, e)) for e, n in enumerate(parts.names)]
        flat = self._out.sum(each)
        self._out.write("Unsqueeze", (flat, self._out.number([rank - 2])), step.outputs[0])
        return True

    def _weighed(self, part: str, table: str, letters: str, expert: str, result: str, e: int) -> str | None:
        """A part times its column of a table; None where the table's axes are no part of the result's, in order."""
        own = letters.replace(expert, "")
        if expert not in letters or [c for c in result if c in own] != list(own):
            return None
        column = self._out.pick(table, letters.index(expert), e)
        missing = [n for n, c in enumerate(result) if c not in own]
        return self._out.new("Mul", part, self._out.with_axes(column, missing))
