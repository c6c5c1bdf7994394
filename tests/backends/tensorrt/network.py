"""The ``IMoELayer`` of a network held to the grouped-expert op that it stands for, weight by weight.

An engine with this layer can be built on sm_100, sm_103 and sm_110 only, and its network anywhere. So where the engine
is not run, this is known of it: the parser took the graph, inferred these shapes and dtypes, and holds these weights,
with which the layer's definition

    o = down(act(x @ gate + b_gate) * (x @ up + b_up)) + b_down

gives each expert's output. Shape legend: E experts, S rows, K chosen per row, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.tensorrt.lowerings.trt_moe import together
from moeopt.errors import EngineBuildError
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.ops.activations import activate
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.reference import one_expert

ROWS = 4
"""Rows that each expert is computed on."""


@dataclass(frozen=True)
class MoELayer:
    """What a parsed network says of one layer.

    Attributes:
        name: of the ONNX node.
        shapes, dtypes: of its inputs in order and then of its output; free sizes -1.
        names: of the constants behind inputs 3 and on: gate, up, down, and three biases or none.
        attributes: activation, quantisation, and the limit, alpha and beta of its swiglu.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    names: tuple[str, ...]
    attributes: dict[str, Any]


def moe_layers(trt: Any, path: Path) -> list[MoELayer]:
    """The layers of the network that ``trt``'s parser makes of an ONNX file; raises ``EngineBuildError``.

    Args:
        trt: the package ``tensorrt_rtx`` or ``tensorrt``.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(parser.get_error(n).desc() for n in range(parser.num_errors))
        raise EngineBuildError(f"{trt.__name__} does not take the graph: {said[:400]}")
    layers = [network.get_layer(n) for n in range(network.num_layers)]
    constants = {layer.get_output(0).name: layer.name for layer in layers if layer.type == trt.LayerType.CONSTANT}
    return [_read(trt, layer, constants) for layer in layers if layer.type == trt.LayerType.MOE]


def check_networks(trt: Any, path: Path, sites: Sequence[ExpertsNode]) -> list[str]:
    """What differs between the layers and the ops of ``sites``, one layer each; [] when nothing does.

    The weights are those of the file: the parser copies them, and gives back none that are bfloat16.
    """
    import onnx_ir as ir

    layers = moe_layers(trt, path)
    values = ir.load(str(path)).graph.initializers
    problems = []
    for site in sites:
        mine = [layer for layer in layers if layer.name.startswith(f"{site.name}/")]
        if len(mine) != 1:
            problems.append(f"{site.name}: the network has {len(mine)} MoE layers for it")
            continue
        found = _shape_problems(mine[0], site) + _attribute_problems(mine[0], site)
        problems += [f"{site.name}: {why}" for why in found or _value_problems(mine[0], site, values)]
    return problems


def _read(trt: Any, layer: Any, constants: dict[str, str]) -> MoELayer:
    layer.__class__ = trt.IMoELayer
    ends = [layer.get_input(n) for n in range(layer.num_inputs)]
    given = [end for end in ends if end is not None]
    output = layer.get_output(0)
    return MoELayer(
        layer.name,
        tuple(tuple(end.shape) for end in (*given, output)),
        tuple(end.dtype.name for end in (*given, output)),
        tuple(constants.get(end.name, "") for end in given[3:]),
        {
            "activation": layer.activation_type.name,
            "quantisation": layer.quantization_to_type.name,
            "swiglu": (layer.swiglu_param_limit, layer.swiglu_param_alpha, layer.swiglu_param_beta),
        },
    )


_DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}


def _shape_problems(layer: MoELayer, site: ExpertsNode) -> list[str]:
    size, kind = banks.sizes_of(site), _DTYPES[types_of(site).compute]
    E, H, I, K = size.E, size.H, size.I, site.top_k if together(site) else 1
    want: list[tuple[int, ...]] = [(1, -1, H), (1, -1, K), (1, -1, K), (E, H, I), (E, H, I), (E, I, H)]
    if banks.has_b_in(site.bank) or banks.has_b_out(site.bank):
        want += [(E, I), (E, I), (E, H)]
    want.append((1, -1, H))
    dtypes = [kind, "INT32", *[kind] * (len(want) - 2)]
    found = []
    if list(layer.shapes) != want:
        found.append(f"the layer's shapes are {list(layer.shapes)}, not {want}")
    if list(layer.dtypes) != dtypes:
        found.append(f"the layer's dtypes are {list(layer.dtypes)}, not {dtypes}")
    return found


def _attribute_problems(layer: MoELayer, site: ExpertsNode) -> list[str]:
    spec = site.spec
    want = {
        "activation": {"silu": "SILU", "identity": "NONE"}.get(spec.activation, spec.activation),
        "quantisation": "FLOAT",  # TensorRT's word for none
        "swiglu": (float("inf"), 1.0, 0.0),
    }
    return [f"the layer's {key} is {layer.attributes[key]}, not {value}" for key, value in want.items()
            if layer.attributes[key] != value]  # fmt: skip


def _value_problems(layer: MoELayer, site: ExpertsNode, values: Any) -> list[str]:
    """Each expert by the layer's definition in float64, against the op's own: a few roundings of float64 apart."""
    missing = [name for name in layer.names if name not in values]
    if missing:
        return [f"the layer's weights are no constants of the graph (input {3 + layer.names.index(missing[0])})"]
    held = [torch.from_numpy(values[name].const_value.numpy().astype("float64")) for name in layer.names]
    bank, spec = _Rounded(site.bank, types_of(site).compute), replace(site.spec, out_norm_eps=None, act_dtype=None)
    x = torch.randn(ROWS, held[0].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for e in range(site.bank.num_experts):
        got = _definition(x, [w[e] for w in held], layer.attributes["activation"])
        want = one_expert(x, bank, e, spec)  # a norm comes after the layer
        if (got - want).norm() > 1e-9 * want.norm():  # sums of at most thousands of terms, in another order
            return [f"the layer's expert {e} is not the op's"]
    return []


class _Rounded:
    """A bank whose tensors were rounded to the compute dtype, as the layer's weights are."""

    def __init__(self, bank: ExpertWeights, dtype: torch.dtype) -> None:
        self._bank, self._dtype = bank, dtype
        self.num_experts = bank.num_experts

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        return tuple([w.detach().to(self._dtype) for w in self._bank.w_in(e)])

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        return tuple([None if b is None else b.detach().to(self._dtype) for b in self._bank.b_in(e)])

    def w_out(self, e: int) -> Tensor:
        return self._bank.w_out(e).detach().to(self._dtype)

    def b_out(self, e: int) -> Tensor | None:
        found = self._bank.b_out(e)
        return None if found is None else found.detach().to(self._dtype)

    def norm(self, e: int) -> None:
        return None

    def stacked(self) -> None:
        return None


def _definition(x: Tensor, held: list[Tensor], activation: str) -> Tensor:
    gate, up, down, *biases = held
    b_gate, b_up, b_down = biases or (0.0, 0.0, 0.0)
    g = x @ gate + b_gate
    g = activate(g, "silu", None) if activation == "SILU" else g
    return (g * (x @ up + b_up)) @ down + b_down
