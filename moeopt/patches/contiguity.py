"""A patch of transformers' exporters: what they ask of tensors while a model is traced."""

from __future__ import annotations

from moeopt.patches.patch import InForce, Patch, Undo, nothing, replace
from moeopt.value_types import PyObject


def _ask_untraced() -> Undo:
    try:
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
        from transformers.exporters import utils

        fits = "is_contiguous_or_false" in vars(utils)
    except ImportError:  # private names of another version: slower, with the same result
        fits = False
    if not fits:
        return nothing

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def is_contiguous_or_false(tensor: PyObject) -> PyObject:
            if not in_force.yes:
                return theirs(tensor)
            with disable_proxy_modes_tracing():
                return theirs(tensor)

        return is_contiguous_or_false

    return replace(utils, "is_contiguous_or_false", make)


untraced_contiguity = Patch(_ask_untraced)
"""transformers asks of each tensor that is reshaped whether it is contiguous, once for each of torch's modes. Sizes are
free, so the answer is a dozen products and comparisons of sizes, each of which torch traced as a node that nothing
reads. Here they are worked out only. (Tiny language models: a fifth of the time of their export.)
"""
