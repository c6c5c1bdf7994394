"""A causal language model whose alike layers are traced once, through an exporter that takes a whole model.

The exporter traces and decomposes the model with its stamps in the graph; before it translates the graph to ONNX, each
stamp gives way to the nodes of its layer. The engine is compared with the model by its maker, who traces each layer
where they differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from moeopt.lower.carried_state import Carrier
from moeopt.lower.export import asks_values
from moeopt.lower.functional import traces_now
from moeopt.lower.layer_calls import NotStampable
from moeopt.lower.onnx.sites import Sites
from moeopt.lower.stamp_graph import write_out
from moeopt.lower.stamps import Stamps
from moeopt.patches import after_decomposition
from moeopt.value_types import PyObject


def stamped(
    model: nn.Module,
    sites: Sites,
    carrier: Carrier,
    export: Callable[[Stamps | None], PyObject],
    run: Callable[[], PyObject],
    say: Callable[[str], None],
) -> PyObject:
    """What ``export`` gives for the alike layers of ``model``: those that can be are stamped.

    Args:
        run: calls ``model`` with values, as ``export`` calls it.
        say: told which layers cannot be, and why.
    """
    traces = traces_now()
    left_alone: frozenset[type] = frozenset()
    while not traces.each_layer:
        stamps = Stamps(model, left_alone, sites.start, carrier)
        try:
            graph = export(stamps)
        except NotStampable as err:
            left_alone |= {err.kind}
            say(f"tracing each {err.kind.__name__}: {err}")
            continue
        except Exception as err:
            if not stamps.kinds or asks_values(err):
                raise
            break  # a model may refuse the number of a layer that is no int
        if odd := stamps.unlike(run):
            left_alone |= odd
            say(f"tracing each {', '.join(sorted(c.__name__ for c in odd))}: layers that look alike call other ops")
            continue
        traces.unproved |= bool(stamps.layers)
        return graph
    sites.start()
    return export(None)


@contextlib.contextmanager
def written_out(stamps: Stamps | None, sites: Sites) -> Iterator[None]:
    """While open, the nodes of stamped layers are in the graph that torch.onnx translates."""
    if stamps is None:
        yield
        return

    def finish(program: PyObject) -> None:
        write_out(program, stamps, sites.copied)
        sites.in_order(program.graph_module.graph)

    with after_decomposition(finish):
        yield
