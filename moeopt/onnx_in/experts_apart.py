"""Products by the matrices of all experts taken apart, which is the form that a reader of modules knows experts by.

    Relu(MatMul(x, W (E, in, out)) + b (E, 1, out))
        ->  Concat(Relu(MatMul(x, W[0]) + b[0]), ..., Relu(MatMul(x, W[E - 1]) + b[E - 1]))

What follows element by element (a bias of each expert, an activation) is done for each expert too, then the parts are
joined; where ids looked the matrices up, these pick among the parts. This is a form to be read: ONNX Runtime is asked
about the file's own nodes, and matrices stay where they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from moeopt.onnx_in.operators.pointwise import CONTRIB_POINTWISE, POINTWISE
from moeopt.onnx_in.products_apart import ExpertParts, LookedUp, ProductsApart
from moeopt.onnx_in.program import NodeStep
from moeopt.onnx_in.step_writer import StepWriter


class ExpertsApart:
    """Takes products apart.

    Args:
        constants: those of the steps, by name; new ones are added.
        shapes: of the values that the steps make and read, on one call.
        wanted: of a product's result, how many experts its product is of.
    """

    def __init__(
        self, steps: Sequence[NodeStep], constants: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]],
        wanted: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._given, self._shapes, self._wanted = steps, shapes, wanted
        self._out = StepWriter(steps, constants, shapes)
        self._parts: dict[str, ExpertParts] = {}
        self._tables: dict[str, LookedUp] = {}
        self._expanded: dict[str, str] = {}
        self._with_one: dict[str, str] = {}  # a value with one more axis at its end, and the value
        self._joined: set[str] = set()
        self._products = ProductsApart(self._out, self._parts, self._tables, self._expanded)

    def steps(self, outputs: Collection[str]) -> list[NodeStep]:
        """The steps with the products taken apart that can be."""
        for step in self._given:
            self._note(step)
            made = step.outputs[0]
            parts = self._products.run(step, self._wanted[made]) if made in self._wanted else self._each(step)
            if parts is not None and parts.names:
                self._parts[made] = parts
            elif parts is None and not self._products.summed(step):
                for name in step.inputs:
                    self._join(name)
                self._out.steps.append(step)
        for name in outputs:
            self._join(name)
        return self._out.steps

    def _note(self, step: NodeStep) -> None:
        """Remember lookups in constants, and what is expanded."""
        if step.domain:
            return
        constant = bool(step.inputs) and step.inputs[0] in self._out.constants
        if step.op_type == "Gather" and constant and not step.attributes.get("axis"):
            self._tables[step.outputs[0]] = LookedUp(step.inputs[0], step.inputs[1])
        elif step.op_type == "GatherND" and constant and step.inputs[1] in self._with_one:
            if not step.attributes.get("batch_dims"):
                self._tables[step.outputs[0]] = LookedUp(step.inputs[0], self._with_one[step.inputs[1]])
        elif step.op_type == "Unsqueeze" and self._shapes.get(step.outputs[0]) == (*self._shape(step.inputs[0]), 1):
            self._with_one[step.outputs[0]] = step.inputs[0]
        elif step.op_type == "Transpose" and step.inputs[0] in self._tables:
            table, rank = self._tables[step.inputs[0]], len(self._shapes[step.inputs[0]])
            if list(step.attributes.get("perm") or ()) == [*range(rank - 2), rank - 1, rank - 2]:
                self._tables[step.outputs[0]] = replace(table, turned=not table.turned)
        elif step.op_type == "Expand":
            self._expanded[step.outputs[0]] = step.inputs[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name, (-1,))

    def _each(self, step: NodeStep) -> ExpertParts | None:
        """What a step gives of each part, where it works element by element or gives other axes."""
        given = next((name for name in step.inputs if name in self._parts), "")
        if not given or len(step.outputs) > 1:
            return None
        parts, rank = self._parts[given], len(self._shapes[given])
        if step.op_type in ("Unsqueeze", "Squeeze", "Reshape") and not step.domain:
            return self._viewed(step, parts)
        known = CONTRIB_POINTWISE if step.domain else POINTWISE
        if step.op_type not in known or len(self._shapes[step.outputs[0]]) != rank:
            return None
        names = []
        for e in range(len(parts.names)):
            inputs = [self._own(name, parts, e, rank) for name in step.inputs]
            if None in inputs:
                return None
            names.append(self._out.like(step, [n or "" for n in inputs]))
        return replace(parts, names=tuple(names))

    def _viewed(self, step: NodeStep, parts: ExpertParts) -> ExpertParts | None:
        """The parts of a value that a step gives other axes."""
        shape, made = self._shapes[step.inputs[0]], self._shapes[step.outputs[0]]
        if step.op_type == "Reshape":
            cut = (*shape[:-1], len(parts.names), parts.width)
            return replace(parts, axis=len(shape) - 1, width=0) if parts.width and made == cut else None
        held = self._out.constants.get(step.inputs[1]) if len(step.inputs) > 1 else None
        if held is None or parts.width:
            return None
        rank = len(made if step.op_type == "Unsqueeze" else shape)
        axes, axis = sorted(int(a) % rank for a in held.reshape(-1).tolist()), parts.axis
        if step.op_type == "Squeeze":
            if axis in axes and not parts.added:
                return None
            moved, place = axis - sum(a < axis for a in axes), axis
        else:
            moved = place = [a for a in range(rank + 1) if a not in axes][axis]
        if parts.ids and moved != axis:
            return None
        number = self._out.number(axes if parts.added else [a - (a > place) for a in axes])
        names = tuple(self._out.like(step, (name, number)) for name in parts.names)
        return replace(parts, names=names, axis=moved)

    def _own(self, name: str, parts: ExpertParts, e: int, rank: int) -> str | None:
        """What of an input belongs to expert ``e``; None where that cannot be told."""
        same_rank = len(self._shapes.get(name, ())) == rank
        if name in self._parts:
            other = self._parts[name]
            return other.names[e] if same_rank and replace(other, names=()) == replace(parts, names=()) else None
        if name in self._tables:
            table = self._tables[name]
            return self._out.matrix(table.stack, e, table.turned) if table.ids == parts.ids and same_rank else None
        held = self._out.constants.get(name)
        if not name or held is None:
            return None if name else ""
        if parts.added or held.dim() < rank - parts.axis:
            return name
        axis = parts.axis - rank + held.dim()
        if held.shape[axis] == 1:
            return name if parts.width else self._out.place(name, axis, 0)
        if parts.ids or held.shape[axis] != max(parts.width, 1) * len(parts.names):
            return None
        return self._out.cut(name, axis, len(parts.names), e) if parts.width else self._out.place(name, axis, e)

    def _join(self, name: str) -> None:
        """Make the value itself of its parts, once."""
        parts, out = self._parts.get(name), self._out
        if parts is None or name in self._joined:
            return
        self._joined.add(name)
        names = parts.names if parts.width else [out.with_axes(one, [parts.axis]) for one in parts.names]
        if not parts.ids:
            out.write("Concat", names, name, axis=parts.axis)
            return
        every = out.new("Concat", *names, axis=parts.axis)
        rank, behind = len(self._shapes[parts.ids]), len(self._shapes[name]) - parts.axis - (not parts.added)
        one = [out.number([1])] if parts.added else []
        ends = [out.number([n]) for n in (parts.axis + 1, parts.axis + 1 + behind)]
        shape = out.new(
            "Concat", out.new("Shape", parts.ids), *one, out.new("Slice", out.new("Shape", every), *ends), axis=0
        )
        where = out.with_axes(parts.ids, range(rank, rank + len(one) + behind))
        picked = every, out.new("Expand", where, shape)
        if parts.added:
            flat = out.new("GatherElements", *picked, axis=parts.axis)
            out.write("Squeeze", (flat, out.number([parts.axis])), name)
        else:
            out.write("GatherElements", picked, name, axis=parts.axis)
