"""The programs of each mixer in the place of its node in a traced graph.

A mixer has one program for a single token that follows others, and one for all else. The first is traced as it is. The
other is traced too where the number of its operations does not depend on the number of tokens (Mamba 2), and an ``If``
chooses. Where it unrolls a loop over tokens or chunks (Mamba 1, delta rules), a trace would fix their number; the graph
then runs the first in ``Scan`` loops, once it was checked that both are one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.causal_lm.mixers import OP, Mixer
from moeopt.causal_lm.program import MixerProgram, check_steps, operations, sized, traced, weights_of
from moeopt.lower.onnx.branch import one_or_many
from moeopt.lower.onnx.experts_node import DOMAIN
from moeopt.lower.onnx.export import to_onnx
from moeopt.lower.onnx.scan import scan_tokens
from moeopt.value_types import PyObject

SIZES = (517, 1031)
"""Numbers of tokens at which operations are counted: more than any chunk in use, and multiples of none."""


def replace_mixers(model: PyObject, mixers: Sequence[Mixer]) -> bool:
    """The programs of its mixer in the place of each ``moeopt::Recurrence`` node of an ``onnx_ir.Model``.

    Returns:
        whether several tokens after a state give what the model gives. Where not, the model's own program for many
        tokens starts anew, and an engine must refuse such a call.

    Raises:
        Declined: the two programs of a mixer differ, and one of them has no graph.
    """
    import onnx_ir as ir

    graph, goes_on = model.graph, True
    (mask,) = (value for value in graph.inputs if value.name.removeprefix("input.") == "attention_mask")
    kinds: list[MixerKind] = []
    for node in [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP)]:
        mixer = mixers[node.attributes["mixer"].as_int()]
        kind = next((kind for kind in kinds if kind.holds(mixer)), None)
        if kind is None:
            kinds.append(kind := MixerKind(mixer))
        weights = [_weight(graph, f"{mixer.name}.{name}", tensor) for name, tensor in weights_of(mixer)]
        one = _bound(kind.one, weights)
        if kind.many is None:
            goes_on &= check_steps(mixer)
            count = len(mixer.tokens)
            nodes, values = scan_tokens(one, mixer.name, node.inputs[:count], node.inputs[count:])
            rest = [one]
        else:
            rest = [one, _bound(kind.many, weights)]
            nodes, values = one_or_many(rest[0], rest[1], mixer.name, mask, node.inputs)
        for value in [v for part in rest for v in part.graph.initializers.values()]:
            value.graph.initializers.pop(value.name)
            graph.register_initializer(value)
        graph.insert_before(node, nodes)
        for old, new in zip(node.outputs, values, strict=True):
            new.type, new.shape = old.type, old.shape
            if old.is_graph_output():
                old.name, new.name = new.name, old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():  # a buffer that the programs do not read
            graph.initializers.pop(name)
    return goes_on


class MixerKind:
    """Mixers that differ in their weights only, and the graphs that they share.

    Attributes:
        one, many: ``onnx_ir`` models from weights, tokens and states to results and states; ``many`` is None where
            a trace would fix the number of tokens.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        self.one = to_onnx(traced(mixer, 1))
        self.many = None
        if operations(mixer, SIZES[0]) == operations(mixer, SIZES[1]):
            self.many = to_onnx(traced(mixer, SIZES[1]))

    def holds(self, mixer: Mixer) -> bool:
        """Whether the first one's code with the weights of ``mixer`` gives what ``mixer`` gives, bit for bit."""
        first = self.mixer
        if type(first.module) is not type(mixer.module) or first.form != mixer.form:
            return False
        about = [[(n, t.shape, t.dtype) for n, t in weights_of(m)] for m in (first, mixer)]
        if about[0] != about[1] or _settings(first.module) != _settings(mixer.module):
            return False
        weights, (tokens, states) = [t for _, t in weights_of(mixer)], mixer.sample()
        with torch.no_grad():
            for size in (1, tokens[0].shape[1]):
                call = (weights, sized(tokens, size), states)
                if not all(map(torch.equal, MixerProgram(first)(*call), MixerProgram(mixer)(*call))):
                    return False
        return True


def _settings(module: nn.Module) -> list[Any]:
    """The attributes of a module and its children that are neither tensors nor its place in the model."""
    simple = (bool, int, float, str, type(None))

    def plain(value: PyObject) -> bool:
        return isinstance(value, simple) or (isinstance(value, tuple | list) and all(map(plain, value)))

    return [
        (path, type(child), {k: v for k, v in vars(child).items() if plain(v) and k != "layer_idx"})
        for path, child in module.named_modules()
    ]


def _weight(graph: PyObject, name: str, tensor: Tensor) -> PyObject:
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    held = TorchTensor(tensor.detach(), name=name)
    value = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=held.shape, const_value=held)
    graph.register_initializer(value)
    return value


def _bound(model: PyObject, weights: Sequence[Any]) -> PyObject:
    """A copy of ``model`` whose first inputs are ``weights``."""
    import onnx_ir as ir

    model = model.clone()
    for value, weight in zip(list(model.graph.inputs), weights, strict=False):
        ir.convenience.replace_all_uses_with(value, weight)
        model.graph.inputs.remove(value)
    return model
