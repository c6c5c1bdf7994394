"""Patches of torch that make the same decomposed program sooner."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from moeopt.patches.patch import InForce, Patch, Undo, nothing, replace
from moeopt.patches.tracing import general_ways
from moeopt.value_types import PyObject


def _tabulate_once() -> Undo:
    try:
        from torch.export import exported_program

        fits = "_populate_param_buffer_metadata_to_new_gm" in vars(exported_program)
    except ImportError:
        fits = False
    if not fits:  # private names of another version: slower, with the same result
        return nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def populate(metadata: PyObject, graph_module: PyObject, signature: PyObject) -> PyObject:
            if in_force.yes:
                tables = ("inputs_to_parameters", "inputs_to_buffers")
                signature = types.SimpleNamespace(**{name: getattr(signature, name) for name in tables})
            return theirs(metadata, graph_module, signature)

        return populate

    return replace(exported_program, "_populate_param_buffer_metadata_to_new_gm", make)


tables_of_weights = Patch(_tabulate_once)
"""torch makes the table of a program's weights anew for each of its inputs: twice the weights take four times as long.
Here the table is made once.
"""


def _list_composites_once() -> Undo:
    try:
        from torch._export import utils

        fits = "_materialize_cpp_cia_ops" in vars(utils)
    except ImportError:
        fits = False
    if not fits:
        return nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        done: list[bool] = []

        def materialize() -> None:
            if not (in_force.yes and done):
                theirs()
                done.append(True)

        return materialize

    return replace(utils, "_materialize_cpp_cia_ops", make)


composites_listed_once = Patch(_list_composites_once)
"""torch looks up each of its thousand composite ops by name before it lists those of a namespace: for each of some 25
namespaces, twice where a program is decomposed. Here it does so for the first; they are there for the others. (A small
program: a third of the time of decomposing it.)
"""


def _enter_kernels_plainly() -> Undo:
    try:
        import torch
        from torch._ops import OperatorBase

        fits = "py_impl" in vars(OperatorBase)
        fits &= {"py_kernels", "_dispatch_cache"} <= vars(torch.ops.aten.linear.default).keys()
    except ImportError:
        fits = False
    if not fits:
        return nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def py_impl(op: PyObject, key: PyObject) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            if not in_force.yes or type(key) is not torch._C.DispatchKey or key == torch._C.DispatchKey.Python:
                return theirs(op, key)  # type: ignore[no-any-return]

            def enter(kernel: Callable[..., Any]) -> Callable[..., Any]:
                if key in op.py_kernels:
                    return theirs(op, key)(kernel)  # type: ignore[no-any-return]
                op.py_kernels[key] = kernel
                op._dispatch_cache.clear()
                return kernel

            return enter

        return py_impl

    return replace(OperatorBase, "py_impl", make)


kernels_entered_plainly = Patch(_enter_kernels_plainly)
"""To decompose a program torch gives each of its composite ops twenty kernels, and for each evaluates the annotations
of a function that it makes anew. Here the kernels are entered, and nothing else. (A small program: a third of the time
of decomposing it.)
"""


@contextlib.contextmanager
def quicker_decomposition() -> Iterator[None]:
    """While open, torch decomposes a program into the same ops sooner, and by its general ways."""
    with tables_of_weights(), composites_listed_once(), kernels_entered_plainly(), general_ways():
        yield
