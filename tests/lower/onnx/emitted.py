"""A function as the graph that an engine would hold for it, in a session of ONNX Runtime's CPU."""

import functools

import onnx_ir as ir
import torch
from torch import nn

from moeopt.backends.onnxrt.session import Session
from moeopt.lower.export import export_program
from moeopt.lower.onnx.accurate import accurate_graph
from moeopt.lower.onnx.export import own_outputs, to_onnx
from moeopt.lower.onnx.narrow_numbers import cast_narrow
from moeopt.lower.onnx.upcast import upcast_graph
from moeopt.lower.signature import functional


class Fn(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def graph_of(f, x, accurate=True):
    """The ``onnx_ir`` model of ``f(x)``, as an engine's graph before it is written."""
    model = to_onnx(functional(export_program(Fn(f), (x,), {})))
    upcast_graph(model)
    if accurate:
        accurate_graph(model)
    cast_narrow(model)
    own_outputs(model.graph)
    return model


def session_of(f, x, accurate=True):
    return Session(ir.to_proto(graph_of(f, x, accurate)).SerializeToString())


def together(functions):
    """One function of all: exporting once costs less than exporting each."""

    def f(x):
        return tuple(function(x) for function in functions)

    return f


@functools.cache
def magnitudes(dtype):
    """Numbers of every power of two of ``dtype`` and both signs, and a line over the range where activations bend."""
    ends = {torch.float16: (-24, 15), torch.bfloat16: (-133, 127), torch.float32: (-149, 127)}
    least, most = ends.get(dtype, (-1074, 1023))
    powers = torch.exp2(torch.arange(least, most + 1, dtype=torch.float64))[:, None]
    powers = (powers * torch.tensor([1.0, 1.37, 1.83])).reshape(-1)
    line = torch.linspace(-110, 110, 8001, dtype=torch.float64)
    x = torch.cat([powers, -powers, line, torch.zeros(1, dtype=torch.float64)]).to(dtype)
    return x[x.isfinite()].unique()
