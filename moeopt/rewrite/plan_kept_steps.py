"""What stays of one recorded call once a block's experts are one op: a list of steps, read back from the outputs.

``kept_steps`` walks a tape from the block's outputs towards its inputs and stops at each
replaced tensor. The nodes on the way are kept: ATen calls, and whole calls of submodules wherever nothing
inside them was replaced (routers, shared experts and norms keep their own Python, hooks and dtype
rules). Nodes off the way (dispatch, the expert loop) are gone. The plans of several calls become one graph for
every size in ``generalize`` and ``build``; a plan itself never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of, tree_leaves, tree_map
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.rewrite.kept_steps import KeptStep, KeptSteps, StepRef
from moeopt.rewrite.scratch import UNSET, storable
from moeopt.value_types import PyObject

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)
"""What becomes a reshape: another call's inputs may have strides that a view refuses."""


@dataclass
class NodeRewrite:
    """``node`` will be computed by ``apply(plan, ref_of)`` from ``needs`` instead."""

    node: fx.Node
    needs: list[fx.Node]
    interior: set[fx.Node]
    apply: Callable[[KeptSteps, Callable[[fx.Node], StepRef]], StepRef]


def kept_steps(tape: Tape, replacements: list[NodeRewrite], scratch: Collection[tuple[str, str]] = ()) -> KeptSteps:
    """The kept part of ``tape``, with each replacement in place of its node.

    Args:
        scratch: (module path, attribute) of stored values that no later call reads.

    Raises:
        Declined: an output needs something from inside the experts, or the forward did something
            else than compute its outputs that a graph cannot repeat.
    """
    return _Planner(tape, replacements, scratch).run()


class _Planner:
    def __init__(self, tape: Tape, replacements: list[NodeRewrite], scratch: Collection[tuple[str, str]]) -> None:
        self.tape, self.scratch = tape, scratch
        self.replaced = {r.node: r for r in replacements}
        self.inside = [c.index == 0 or self._contains(c) for c in tape.calls]
        self.units: dict[Any, list[fx.Node]] = {}
        self.opened: set[int] = set()
        self.missed: set[tuple[str, str]] = set()
        self._after = {node: self._dependants(node) for node in self.replaced}

    def _contains(self, call: Call) -> bool:
        return any(call.first <= n.meta["index"] < call.last for n in self.replaced)

    def _dependants(self, replaced: fx.Node) -> set[fx.Node]:
        """Nodes that depend on a replaced node: allowed although they depend on its experts."""
        after = {replaced}
        for node in self.tape.nodes[replaced.meta["index"] :]:
            if any(a in after for a in node.all_input_nodes):
                after.add(node)
        return after

    # -- which nodes are needed --------------------------------------------------------------------

    def unit(self, node: fx.Node) -> fx.Node | Call:
        """The node itself, or the outermost kept submodule call that produced it."""
        if node in self.replaced or node.op != "call_function":
            return node
        for index in self.tape.stack(node.meta["call"])[1:]:
            call = self.tape.calls[index]
            if not self.inside[index] and index not in self.opened:
                if self._callable(call) and node in _nodes(call.output):
                    return call
                self.opened.add(index)
        return node

    def _callable(self, call: Call) -> bool:
        """A call can be repeated as a module call when its arguments can be written down, it writes
        to nothing that others see, and no ``with`` of the code around it decides its dtypes or its ops."""
        if call.path.startswith("<") or call.last < 0 or call.autocast or call.mode:
            return False
        for leaf in tree_leaves((call.args, call.kwargs)):
            if not isinstance(leaf, (fx.Node, int, float, str, bool, type(None), torch.dtype, torch.device)):
                return False
        writes = [self.tape.write_origin(n) for n in self.tape.nodes[call.first : call.last]]
        return not any(w is not None and w.meta["index"] < call.first and w.op != "get_attr" for w in writes)

    def needs(self, unit: fx.Node | Call) -> list[fx.Node]:
        if isinstance(unit, Call):
            return _nodes((unit.args, unit.kwargs))
        if unit in self.replaced:
            return self.replaced[unit].needs
        return list(unit.all_input_nodes)

    def run(self) -> KeptSteps:
        tape = self.tape
        while True:
            known = len(self.opened), len(self.missed)
            units = self._collect()
            self._note_missed(units)
            if (len(self.opened), len(self.missed)) == known:
                break
        order = sorted(units, key=self._position)
        attributes = self._attributes()
        plan = KeptSteps([], None, [], {}, sorted({u.path for u in order if isinstance(u, Call)}))
        refs: dict[fx.Node, StepRef] = {}
        for unit in order:
            self._emit(plan, unit, refs)
        plan.output = _tree(tape.output, refs)
        plan.mutations = [(refs[a], refs[b]) for a, b in self._mutations(order)]
        plan.attributes = {k: _tree(v, refs) for k, v in attributes.items()}
        return plan

    def _position(self, unit: fx.Node | Call) -> tuple[int, int]:
        if isinstance(unit, Call):
            return unit.first, 0
        if unit.op in ("placeholder", "get_attr"):
            return -1, unit.meta["index"]
        return unit.meta["index"], 1

    def _collect(self) -> list[fx.Node | Call]:
        """Every unit that the outputs need; restarts are needed where a call had to be opened."""
        roots = _nodes(self.tape.output) + [n for n in self.tape.nodes if n.op == "placeholder"]
        seen: dict[Any, None] = {}
        stack = list(roots)
        for source, final in self.tape.mutations.items():
            stack += [source, final] if not self._done_by_call(final) else []
        for name, value in self.tape.attributes.items():
            if not self._call_sets(name):
                stack += _nodes(value)
                if any(self._of_single_experts(n) for n in _nodes(value)):
                    raise Declined(
                        f"its forward stores {_dotted(name)}, a result of single experts, which the rewritten code "
                        "does not compute; do not store it, or return it from the block"
                    )
        while stack:
            node = stack.pop()
            unit = self.unit(node)
            key = unit.index if isinstance(unit, Call) else unit
            if key in seen:
                continue
            seen[key] = None
            self.units[key] = []
            if isinstance(unit, fx.Node):
                self._check(unit)
            stack.extend(self.needs(unit))
        return [self.tape.calls[k] if isinstance(k, int) else k for k in seen]

    def _check(self, node: fx.Node) -> None:
        if self._of_single_experts(node):
            raise Declined(
                f"a result of single experts ({op_name(node)}) is used outside the experts' sum; "
                "return it from the experts only if you need it",
                node.meta.get("source"),
            )

    # -- effects ---------------------------------------------------------------------------------

    def _done_by_call(self, final: fx.Node) -> bool:
        return isinstance(self.unit_or_call(final), Call)

    def unit_or_call(self, node: fx.Node) -> fx.Node | Call:
        """As :meth:`unit`, for a node that a call wrote rather than returned."""
        for index in self.tape.stack(node.meta.get("call", 0))[1:]:
            call = self.tape.calls[index]
            if not self.inside[index] and index not in self.opened and self._callable(call):
                return call
        return node

    def _mutations(self, order: list[fx.Node | Call]) -> list[tuple[fx.Node, fx.Node]]:
        kept = {u.index for u in order if isinstance(u, Call)}
        out = []
        for source, final in self.tape.mutations.items():
            by = self.unit_or_call(final)
            if isinstance(by, Call):
                if by.index not in kept:
                    raise Declined(
                        f"its forward writes to {source.target or source} in {by.path}, which the rewrite would skip; "
                        "write it from the block's own forward",
                        final.meta.get("source"),
                    )
                continue
            out.append((source, final))
        return out

    def _call_sets(self, key: tuple[str, str]) -> bool:
        """Whether a call that can be kept whole sets the attribute; not, once none of those calls was needed."""
        return key not in self.missed and any(
            not self.inside[c.index] and c.index not in self.opened for c in self._calls_around(key[0])
        )

    def _calls_around(self, path: str) -> list[Call]:
        return [c for c in self.tape.calls if c.path and (path == c.path or path.startswith(c.path + "."))]

    def _note_missed(self, units: list[fx.Node | Call]) -> None:
        """Attributes that calls set which nothing else needs: they are computed for themselves."""
        kept = {u.index for u in units if isinstance(u, Call)}
        for key in self.tape.attributes:
            if self._call_sets(key) and not any(c.index in kept for c in self._calls_around(key[0])):
                self.missed.add(key)

    def _attributes(self) -> dict[tuple[str, str], Any]:
        out = {}
        for (path, name), value in self.tape.attributes.items():
            if self._call_sets((path, name)):
                continue
            if (path, name) in self.scratch:
                out[path, name] = UNSET
                continue
            where = _dotted((path, name))
            if (path, name) in self.tape.in_place:
                raise Declined(
                    f"its forward changes the contents of the Python attribute {where} in place, which other modules "
                    "may hold as well; assign a new container, or return the value instead"
                )
            if not storable(value):
                raise Declined(
                    f"its forward changes the Python attribute {where}, which a graph cannot repeat; "
                    "store a tensor or return the value instead",
                    rank=Rank.FORBIDS,
                )
            out[path, name] = value
        return out

    def _of_single_experts(self, node: fx.Node) -> bool:
        return any(node in r.interior and node not in self._after[r.node] for r in self.replaced.values())

    # -- writing down ----------------------------------------------------------------------------

    def _emit(self, plan: KeptSteps, unit: fx.Node | Call, refs: dict[fx.Node, StepRef]) -> None:
        if isinstance(unit, Call):
            ref = plan.add(KeptStep("module", unit.path, _tree(unit.args, refs), _tree(unit.kwargs, refs)))
            self._unpack(plan, ref, unit.output, refs)
            return
        self._emit_node(plan, unit, refs)
        plan.note(refs[unit], unit.meta.get("shape"), unit.meta.get("dtype"))

    def _emit_node(self, plan: KeptSteps, unit: fx.Node, refs: dict[fx.Node, StepRef]) -> None:
        if unit in self.replaced:
            refs[unit] = self.replaced[unit].apply(plan, refs.__getitem__)
        elif unit.op == "placeholder":
            refs[unit] = plan.add(KeptStep("input", unit.name))
        elif unit.op == "get_attr":
            constant = unit.meta.get("constant")
            kind = "attr" if constant is None else "constant"
            refs[unit] = plan.add(KeptStep(kind, unit.target if constant is None else constant))
        else:
            source = unit.meta.get("source", "")
            target = (
                aten.reshape.default if unit.target in VIEWS else unit.target
            )  # another call's inputs may have strides that a view refuses
            step = KeptStep("call", target, _tree(unit.args, refs), _tree(dict(unit.kwargs), refs), source)
            refs[unit] = plan.add(step)

    def _unpack(self, plan: KeptSteps, ref: StepRef, output: PyObject, refs: dict[fx.Node, StepRef]) -> None:
        if isinstance(output, fx.Node):
            refs.setdefault(output, plan.note(ref, output.meta.get("shape"), output.meta.get("dtype")))
            return
        leaves = _nodes(output)
        for i, leaf in enumerate(leaves):
            if leaf not in refs:
                picked = plan.call(tensor_leaf, ref, i)
                refs[leaf] = plan.note(picked, leaf.meta.get("shape"), leaf.meta.get("dtype"))


def tensor_leaf(tree: PyObject, index: int) -> torch.Tensor:
    """The ``index``-th tensor of a module's output, whatever containers hold it."""
    if isinstance(tree, (tuple, list)) and all(isinstance(t, torch.Tensor) for t in tree):
        first: torch.Tensor = tree[index]
        return first
    found: torch.Tensor = leaves_of(torch.Tensor, tree)[index]
    return found


def _dotted(key: tuple[str, str]) -> str:
    return ".".join(filter(None, key))


def _nodes(tree: PyObject) -> list[fx.Node]:
    return leaves_of(fx.Node, tree)


def _tree(tree: PyObject, refs: dict[fx.Node, StepRef]) -> PyObject:
    return tree_map(fx.Node, refs.__getitem__, tree)
