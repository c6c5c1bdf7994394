"""Functions of a stranger's file: none may call itself, nor be more nodes than a graph has when written out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from moeopt.errors import UsageError
from moeopt.onnx_in.order import bodies
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxModel, OnnxNode

DEEPEST = 64
"""Functions within functions; onnx's inliner stops at 100."""
MOST_INLINED = 1 << 18
"""Nodes of all functions, each as often as it is called: a minute and a half of reading."""
MOST_OF_FEW, GROWTH = 1 << 14, 512
"""Of a file that holds few nodes itself: the first, or the second for each node. Sixty layers of a hundred experts are
the calls of two functions."""


OPERATORS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains of operators: ONNX Runtime takes its own of that name, where others take the function."""


def inlined(where: str, proto: OnnxModel) -> OnnxModel:
    """The model, or a copy in which its functions are written out."""
    if not proto.functions:
        return proto
    import onnx.checker
    import onnx.inliner

    try:
        made: OnnxModel = onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as err:
        raise UsageError(
            f"{where}: onnx cannot write out its functions ({shown_line(str(err)[:300])}): it was damaged, or export "
            "the model without functions"
        ) from None
    return made


def check_functions(where: str, proto: OnnxModel) -> None:
    """``UsageError`` for functions that call themselves, that are more nodes than a graph has when written out, or that
    have a name which another one or an operator has."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    _check_names(where, proto)
    sizes: dict[tuple[str, str], int] = {}
    nodes = {key: Counter((n.domain, n.op_type) for n in _every(f.node)) for key, f in functions.items()}
    calls = {key: Counter({c: count for c, count in nodes[key].items() if c in functions}) for key in functions}
    depths: dict[tuple[str, str], int] = {}
    for first in functions:
        path = {first: iter(calls[first])}  # from the first call to the innermost, with the calls still to be seen
        while path:
            key = next(reversed(path))
            below = next((c for c in path[key] if c not in sizes), None)
            if below is not None:
                if below in path:
                    raise UsageError(
                        f"{where}: the function {shown_line(below[1])!r} calls itself: it was damaged, or made to hang "
                        "who reads it"
                    )
                path[below] = iter(calls[below])
                continue
            own = nodes[key].total() - calls[key].total()
            sizes[key] = own + sum(sizes[c] * count for c, count in calls[key].items())
            depths[key] = 1 + max((depths[c] for c in calls[key]), default=0)
            del path[key]
    deepest = max(depths.values(), default=0)
    if deepest > DEEPEST:
        raise UsageError(
            f"{where}: its functions call each other {deepest} deep, and moeopt reads {DEEPEST}: export the model "
            "without functions of functions"
        )
    graph = Counter((n.domain, n.op_type) for n in _every(proto.graph.node))
    total = sum(sizes.get(key, 0) * count for key, count in graph.items())
    held = graph.total() + sum(one.total() for one in nodes.values())
    most = max(MOST_OF_FEW, GROWTH * held)
    if total > min(MOST_INLINED, most):
        of_few = f" of a file that holds {held}" if total <= MOST_INLINED else ""
        raise UsageError(
            f"{where}: its functions are {_shown_count(total)} nodes when they are written out, and moeopt reads "
            f"{most if of_few else MOST_INLINED}{of_few}: export the model without functions of functions"
        )


def _check_names(where: str, proto: OnnxModel) -> None:
    times = Counter((f.domain, f.name) for f in proto.functions)
    for function in proto.functions:
        named = f"the function {shown_line(function.name)!r} of the domain {shown_line(function.domain)!r}"
        if function.domain in OPERATORS:
            raise UsageError(
                f"{where}: {named} stands among operators, and ONNX Runtime takes an operator of that name instead: "
                "give the function a domain of its own, or export the model without functions"
            )
        if times[function.domain, function.name] > 1:
            raise UsageError(f"{where}: there are two of {named}: it was damaged or edited")


def _every(nodes: Iterable[OnnxNode]) -> Iterator[OnnxNode]:
    """The nodes, and those of the bodies in them."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from _every(body.node)


def _shown_count(count: int) -> str:
    """A number that a file decides on, short."""
    return str(count) if count < 1 << 40 else "over 2^40"
