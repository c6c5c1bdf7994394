"""A vector that is added to what a Gemm gives, as the third input of the Gemm: a node and a pass over the rows fewer.

    Add(Gemm(x, W), b)  ==  Gemm(x, W, b)        b (O,) or (1, O)

ONNX Runtime joins MatMul and Add so, and not Gemm and Add. Only the order of the sum changes.
"""

from __future__ import annotations

from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue


def join_biases(model: OnnxModel) -> None:
    """Join them wherever the Add alone reads what the Gemm gives."""
    for node in list(model.graph):
        if (node.domain, node.op_type) == ("", "Add"):
            for product, bias in (node.inputs, node.inputs[::-1]):
                if _is_bare_product(product) and _is_row_vector(bias, product):
                    _join(model, node, product.producer(), bias)
                    break


def _is_bare_product(value: OnnxValue) -> bool:
    gemm = value.producer()
    bare = gemm is not None and (gemm.domain, gemm.op_type) == ("", "Gemm") and gemm.inputs[2:] in ((), (None,))
    return bare and len(value.uses()) == 1 and not value.is_graph_output()


def _is_row_vector(value: OnnxValue, product: OnnxValue) -> bool:
    """Whether a weight or an input is one number for each column of ``product``."""
    if value.producer() is not None or value.shape is None or product.shape is None:
        return False
    width = product.shape[-1]
    return isinstance(width, int) and list(value.shape) in ([width], [1, width])


def _join(model: OnnxModel, add: OnnxNode, gemm: OnnxNode, bias: OnnxValue) -> None:
    import onnx_ir as ir

    x, weight = gemm.inputs[:2]
    attributes = [a for a in gemm.attributes.values() if a.name != "beta"]
    joined = ir.Node(
        "", "Gemm", [x, weight, bias], attributes, name=gemm.name, metadata_props=dict(gemm.metadata_props)
    )
    (new,), (old,) = joined.outputs, add.outputs
    new.name, new.type, new.shape = old.name, old.type, old.shape
    model.graph.insert_after(add, joined)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove([add, gemm], safe=True)
