"""Products on codes outside of the experts: ``moeopt::LinearCodes`` nodes become nodes that the runtime has.

    codes      com.microsoft::MatMulNBits(x, codes, scales)     4 bits on a CPU; 8 bits where memory or
                                                                int8 activations were asked for
    floats     MatMul(x, dequantised in the graph)              else: the file holds codes, a session floats

The reasons are those of the experts' lowerings (``lowerings/quantized``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from moeopt.backends.onnxrt.lowerings.quantized import (
    ROUNDED_BLOCK,
    WIDEST,
    UnrolledBytes,
    UnrolledCodes,
    UnrolledFloats,
    product_on_codes,
)
from moeopt.ir.weight_format import WeightFormat
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.lowerings.codes import dequantized
from moeopt.lower.onnx.plan import BlockPlan
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.rewrite.product_codes import DOMAIN, OP
from moeopt.value_types import OnnxModel, OnnxValue

_ON_CODES = {4: UnrolledCodes.name, 8: UnrolledBytes.name}


@dataclass(frozen=True)
class ProductNode:
    """One product of a graph: what names its weights, and its weight."""

    name: str
    weight: QuantizedWeight


def take_products(model: OnnxModel) -> list[ProductNode]:
    """The products of an ``onnx_ir.Model``, whose nodes keep a number in the place of codes and scales.

    So what widens or folds the graph's constants does not touch them.
    """
    import onnx_ir as ir

    found: list[ProductNode] = []
    for node in [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == (DOMAIN, OP)]:
        format, K = WeightFormat.decode(node.attributes["format"].as_string()), node.attributes["inputs"].as_int()
        codes, scales = (_tensor(value) for value in node.inputs[1:])
        name = str(node.inputs[1].name).rpartition(".")[0]
        found.append(ProductNode(name, QuantizedWeight(codes, scales, None, format, (codes.shape[0], K))))
        held = node.inputs[1:]
        node.resize_inputs(1)
        node.attributes["number"] = ir.AttrInt64("number", len(found) - 1)
        for value in held:
            if not value.uses() and value.name in model.graph.initializers:
                del model.graph.initializers[value.name]
    return found


def lower_products(model: OnnxModel, products: list[ProductNode], plan: BlockPlan) -> dict[str, str]:
    """Replace the nodes of ``products`` in place; returns the lowering of experts that each is like, by its name."""
    import onnx_ir as ir

    done: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for node in [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == (DOMAIN, OP)]:
        one = products[node.attributes["number"].as_int()]
        x, old = node.inputs[0], node.outputs[0]
        on_codes = x.dtype == ir.DataType.FLOAT and reads_codes(one.weight.format, plan)
        builder = Builder(one.name + (f"#{uses[one.name]}" if uses[one.name] else ""))
        uses[one.name] += 1
        widest = ROUNDED_BLOCK if plan.rounds else WIDEST
        if on_codes:
            y = product_on_codes(builder, one.weight, None, "product", x, widest)
        else:
            y = _floats(builder, one, x)
        y.type, y.shape = old.type, old.shape
        home = node.graph
        home.insert_before(node, builder.nodes)
        for value in builder.initializers:
            model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
        home.remove(node, safe=True)
        model.graph.opset_imports.update(builder.domains)
        done[one.name] = UnrolledFloats.name if not on_codes else _ON_CODES[one.weight.format.bits]
    model.graph.opset_imports.pop(DOMAIN, None)
    return done


def reads_codes(format: WeightFormat, plan: BlockPlan) -> bool:
    """Whether an engine of ``plan`` computes a product on codes of this format."""
    if plan.provider != "cpu" or plan.portable:
        return False
    if not UnrolledCodes().refuses_format(format):
        return True
    return (plan.mapped or plan.rounds) and not UnrolledBytes().refuses_format(format)


def _floats(graph: Builder, one: ProductNode, x: OnnxValue) -> OnnxValue:
    import onnx_ir as ir

    w_NK = dequantized(graph, one.weight, "weight")
    w_KN = graph.op("Transpose", [w_NK], perm=[1, 0])
    if x.dtype != ir.DataType.FLOAT:
        w_KN = graph.op("Cast", [w_KN], to=int(x.dtype))
    return graph.op("MatMul", [x, w_KN], name="product")


def _tensor(value: OnnxValue) -> torch.Tensor:
    held = value.const_value
    raw = getattr(held, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    return _of_bytes(held)


def _of_bytes(held: OnnxValue) -> torch.Tensor:
    from onnx_ir.tensor_adapters import to_torch_dtype

    flat = torch.frombuffer(bytearray(held.tobytes()), dtype=to_torch_dtype(held.dtype))
    return flat.view([int(n) for n in held.shape])
