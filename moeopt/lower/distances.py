"""``torch.cdist`` in a trace: directly, at every size.

By itself PyTorch takes a product of matrices for Euclidean distances where either side has more than 25 rows. A trace
would hold for the sizes on one side of that number only, and the product has the larger error of the two.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from moeopt.value_types import FxTarget, PyObject

_CDIST = torch.ops.aten.cdist.default
_DIRECT = {torch.cdist: "donot_use_mm_for_euclid_dist", _CDIST: 2}
_LEFT_OPEN = {torch.cdist: "use_mm_for_euclid_dist_if_necessary", _CDIST: None}


class DirectDistances(TorchFunctionMode):
    """While open, ``cdist`` asks for no size where the model leaves the form to PyTorch."""

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        kwargs = dict(kwargs or {})
        if func is torch.cdist or func is _CDIST:
            given = dict(zip(("x1", "x2", "p", "compute_mode"), args, strict=False)) | kwargs
            if given.get("compute_mode", _LEFT_OPEN[func]) == _LEFT_OPEN[func]:
                given["compute_mode"] = _DIRECT[func]
            return func(given["x1"], given["x2"], given.get("p", 2.0), given["compute_mode"])
        return func(*args, **kwargs)
