"""Forms: each replaces the grouped-expert op by nodes that TensorRT's parser takes; the order here breaks ties."""

from moeopt.backends.tensorrt.lowerings.dense import Dense
from moeopt.backends.tensorrt.lowerings.gather import Gather
from moeopt.backends.tensorrt.lowerings.loop import Loop
from moeopt.backends.tensorrt.lowerings.loop_function import LoopFunction
from moeopt.backends.tensorrt.lowerings.sort import Sort
from moeopt.backends.tensorrt.lowerings.trt_moe import TrtMoE
from moeopt.errors import UsageError
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.lowerings.dense_function import DenseFunction

FORMS: tuple[Lowering, ...] = (TrtMoE(), Dense(), Sort(), Gather(), Loop())
FUNCTION_FORMS: tuple[Lowering, ...] = (DenseFunction(), LoopFunction())
"""Those of experts that are a function of a row: written out for up to 16 experts, in a loop for more."""
PORTABLE: tuple[Lowering, ...] = (*FORMS[1:], *FUNCTION_FORMS)
"""The forms of standard operators, which ONNX Runtime runs too."""


def by_name(name: str) -> Lowering:
    """The form called ``name``; a ``UsageError`` that lists the names if there is none."""
    for form in (*FORMS, *FUNCTION_FORMS):
        if form.name == name:
            return form
    raise UsageError(f"no TensorRT form is called {name!r}; the forms are {', '.join(form.name for form in FORMS)}")
