"""A trace: run a module once on real tensors and keep every ATen call as an fx graph.

``record(module, args, kwargs)`` runs the module as it is, loops and ``.tolist()`` included, under
``torch.no_grad()``, and returns a :class:`Tape`: ATen calls as fx nodes in functional (SSA) form, the
concrete value of every node, the module calls that the nodes belong to, and the user's source lines.
In-place calls are recorded as their functional twins; a later read of any alias sees the new value.
The module is left exactly as it was: buffers, attributes, hooks, RNG and the training flag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeopt.capture.failed_call import call_hint, in_short
from moeopt.capture.module_state import ModuleState
from moeopt.capture.random_ops import leave_out_idle_noise
from moeopt.capture.recorded import Call, Read, Tape
from moeopt.capture.recorder import Recorder, Steer
from moeopt.capture.source_line import raising_line
from moeopt.capture.tree import tree_map
from moeopt.capture.watch_calls import WatchCalls
from moeopt.errors import CaptureError
from moeopt.patches import module_calls
from moeopt.value_types import PyObject

__all__ = ["Call", "Read", "Steer", "Tape", "clone_inputs", "record"]


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], way_out: str) -> None:
    try:
        module(*args, **kwargs)
    except CaptureError:
        raise
    except Exception as err:
        if "fullgraph=True" in str(err):  # torch.compile leaves code alone while its calls are written down
            raise CaptureError(
                f"{type(module).__name__} runs a function of its own under torch.compile(fullgraph=True), as "
                "flex_attention does, and such code cannot be watched; take attn_implementation='sdpa', or leave "
                "fullgraph out, while the model is optimised",
                raising_line(err.__traceback__),
            ) from err
        hint = call_hint(module, args, kwargs) if way_out is _GIVEN else ""
        name = type(module).__name__
        if way_out is _MADE and getattr(module, "of_a_file", False):
            name, way_out = "its graph", _MADE_FOR_A_FILE
        elif way_out is _MADE and str(err).startswith("Guard failed:"):  # by which torch.export fixes a size
            way_out = _MADE_FOR_A_PROGRAM
        raise CaptureError(f"{name} raised {in_short(err)}{way_out}{hint}", raising_line(err.__traceback__)) from err


_GIVEN = "; check that it runs on these inputs in eager mode"
_MADE = (
    ", on inputs that moeopt made like the example's (other sizes and values, integers that the example has), without "
    "which nothing can be checked; let its forward take them"
)
_MADE_FOR_A_FILE = (
    ", on inputs that moeopt made like the example's, without which nothing can be checked: the graph holds sizes or "
    "values of the call that it was exported with, or takes inputs that belong together; export it with free sizes, or "
    "optimise the PyTorch model"
)
_MADE_FOR_A_PROGRAM = (
    ", on inputs that moeopt made like the example's, without which nothing can be checked: the program was exported "
    "for one size; export it with dynamic_shapes for the sizes that vary, or optimise the model that it was exported of"
)


def record(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    keep_values: bool = True,
    steer: Steer | None = None,
    lenient: bool = False,
    made: bool = False,
) -> Tape:
    """Run ``module(*args, **kwargs)`` once and return its :class:`Tape`.

    Args:
        module: any module; run in the mode it is in. Its state is restored afterwards.
        args, kwargs: inputs; tensors in them are cloned first, so the caller's are never written to.
        keep_values: keep every node's value (a block), or only the graph (a whole model).
        lenient: go on after a call that the tape cannot carry; its result then comes from nowhere in particular. For
            a whole model, of which the tape only tells where to look.
        made: whether the inputs are not the caller's own, which an error says then.
        steer: may answer another output than the one an op computed; see ``moeopt.capture.force_routing``.

    Raises:
        CaptureError: the module raised, or did something that the trace cannot carry.
    """
    state = ModuleState(module)
    recorder = Recorder(module, state, keep_values, steer, lenient)
    args, kwargs = clone_inputs((tuple(args), dict(kwargs or {})))
    rng = torch.get_rng_state()
    try:
        with torch.no_grad():
            counter = iter(range(10**9))
            node_args, node_kwargs = tree_map(
                torch.Tensor, lambda t: recorder.add_input(t, f"input_{next(counter)}"), (args, kwargs)
            )
            with module_calls(recorder.through_call), WatchCalls(recorder), recorder:
                _run(module, args, kwargs, _MADE if made else _GIVEN)
                attributes = {
                    key: tree_map(torch.Tensor, recorder.node_of, value)
                    for key, value in state.changed_attributes().items()
                }
            in_place = state.changed_in_place()
            root = recorder.calls[0]
        leave_out_idle_noise(recorder.nodes)
    finally:
        state.restore()
        torch.set_rng_state(rng)
    return Tape(
        root=module,
        calls=recorder.calls,
        args=node_args,
        kwargs=node_kwargs,
        output=root.output,
        mutations=recorder.mutations,
        attributes=attributes,
        in_place=in_place,
        reads=recorder.reads,
        nodes=recorder.nodes,
        _values=recorder.values,
    )


def clone_inputs(tree: PyObject) -> PyObject:
    """The same structure with every tensor cloned (shared memory stays shared is not promised)."""
    return tree_map(torch.Tensor, lambda t: t.detach().clone(), tree)
