"""Lists of modules that ran in one forward: layers of one mixture, more experts of it, or mixtures of their own."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Sequence

from torch import fx, nn

from moeopt.capture.op_kinds import GATES, WEIGH, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Call
from moeopt.capture.tree import leaves_of
from moeopt.find.module_lists import alike_lists

CHOICES = ("topk", "argmax", "argmin", "sort", "argsort", "max", "min", "kthvalue", "multinomial")


def one_mixture(first: Sequence[Call], other: Sequence[Call], routed: bool, start: int) -> bool:
    """Whether the calls of two lists belong together: one reads single results of the other, or one choice picked the
    rows of both, or one gate weighs the results of both.

    Args:
        routed: whether each of them runs on rows that are picked for it, so that choices tell.
        start: index of the first node of the module that runs them. Where both lists have choices or gates of that
            module, those of blocks before it do not count: the rows of all that comes later depend on them.
    """
    if are_layers(first, other) or are_layers(other, first):
        return True
    if _reads(first, other[0]) or _reads(other, first[0]):
        return False
    results = {n for c in (*first, *other) for n in leaves_of(fx.Node, c.output)}
    of_first, of_other = (_choices(calls, results) if routed else set[fx.Node]() for calls in (first, other))
    if not of_first and not of_other:
        of_first, of_other = _gates(first), _gates(other)
    inside = [{n for n in nodes if n.meta["index"] >= start} for nodes in (of_first, of_other)]
    if all(inside):
        of_first, of_other = inside
    return not of_first.isdisjoint(of_other) or not (of_first and of_other)


def called_by_layers(call: Call, children: Sequence[Call]) -> list[Call]:
    """A call for each child of the lists of ``call``'s module that it does not call as a whole, but layers of: two or
    more of its ``children``, the calls that it makes itself."""
    called = {c.module for c in children}
    lists = {m for one in alike_lists(call.module, same_sizes=False) for m in one if m not in called}
    list_item = {part: m for m in lists for part in m.modules()}
    layers: dict[nn.Module, list[Call]] = {}
    for child in children:
        if child.module in list_item:
            layers.setdefault(list_item[child.module], []).append(child)
    return [
        dataclasses.replace(calls[0], module=m, last=calls[-1].last, output=calls[-1].output)
        for m, calls in layers.items()
        if len(calls) > 1
    ]


def are_layers(first: Sequence[Call], second: Sequence[Call]) -> bool:
    """Whether the first call of ``second`` reads results of ``first``: one, or several but not all of them."""
    read = _reads(first, second[0])
    return bool(read) and (len(read) < len(first) or len(first) == 1)


def _reads(calls: Sequence[Call], reader: Call) -> list[Call]:
    """The ``calls`` whose results the arguments of ``reader`` depend on, by paths without another such result."""
    results = {n: c for c in calls for n in leaves_of(fx.Node, c.output)}
    return list({results[n].index: results[n] for n in _dependencies(reader, results) if n in results}.values())


def _choices(calls: Sequence[Call], results: set[fx.Node]) -> set[fx.Node]:
    """The router's choices by which the rows of ``calls`` were picked."""
    found = set()
    for node in _dependencies(calls[0], results):
        source = node.args[0] if node.target is operator.getitem else node
        if isinstance(source, fx.Node) and op_name(source) in CHOICES and node not in results:
            found.add(source)
    return found


def _gates(calls: Sequence[Call]) -> set[fx.Node]:
    """The softmax and sigmoid nodes from which the factor of the first call's result is computed."""
    reached, stack = set[fx.Node](), leaves_of(fx.Node, calls[0].output)
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        for user in node.users:
            others = [a for a in user.all_input_nodes if a not in reached]
            if op_name(user) in WEIGH and others:
                return {n for n in ancestors(others) if op_name(n) in GATES}
            stack.append(user)
    return set()


def _dependencies(call: Call, results: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that the arguments of ``call`` depend on, by paths that stop at ``results``."""
    return ancestors(leaves_of(fx.Node, [call.args, call.kwargs]), results)
