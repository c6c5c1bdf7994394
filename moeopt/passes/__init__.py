"""The passes: rewrites of a block's graph, one a file; ``PIPELINE`` is their order, as a value.

from moeopt import passes
graph_module, records = passes.run(module, example_inputs)
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if __name__ != "moeopt.passes":
    raise ImportError(
        f"the folder `passes` at the root is a symlink for readers, not a package: import moeopt.passes, not {__name__}"
    )

from moeopt.passes.base import Level, Pass, PassRecord
from moeopt.passes.pipeline import PIPELINE
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from torch import fx

__all__ = ["PIPELINE", "Level", "Pass", "PassRecord", "run"]


def run(
    module: PyObject, example_inputs: PyObject = None, passes: Sequence[Pass] = PIPELINE, **fields: PyObject
) -> "tuple[fx.GraphModule, tuple[PassRecord, ...]]":
    """Run ``passes`` over every block of a model, verify, and return the model as one ``fx.GraphModule``.

    Args:
        module: an ``fx.GraphModule``, an ``ExportedProgram`` or any ``nn.Module``. It keeps working, unchanged, and
            shares its weights with the result.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        passes: what runs, in this order; give ``(*PIPELINE, MyPass())`` to add one.
        fields: of :class:`moeopt.Options`: ``verify``, ``skip_passes``, ``print_passes``, ``dump``, ...

    Returns:
        A GraphModule, also where no pass fired, and a record for each pass on each block. Where ``torch.export``
        refuses the model, the GraphModule is one call of the rewritten model, and a warning says why.

    Raises:
        UsageError: a model, inputs or passes of the wrong kind.
        CaptureError: the model does not run on the inputs.
    """
    whole_model = importlib.import_module("moeopt.frontends.fx_modules")  # by name: it drives what stands above passes
    result: tuple[fx.GraphModule, tuple[PassRecord, ...]] = whole_model.run(module, example_inputs, passes, **fields)
    return result
