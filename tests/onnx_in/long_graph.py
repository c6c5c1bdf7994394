"""A graph of many layers with loops of dense experts, as large as one likes; its weights are one number each."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

E, H, I = 4, 2, 3


def layers(count, experts=E):
    """(nodes, weights) of ``count`` layers: a norm, a softmax router and a loop over all experts, with a residual."""
    nodes, weights, x = [], [], "x"
    one = numpy_helper.from_array(np.ones((1,), np.float32), "one")

    def add(op, reads, name, **attributes):
        nodes.append(helper.make_node(op, reads, [name], name=name, **attributes))
        return name

    def weight(name, *shape):
        weights.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        return name

    for n in range(count):
        at = f"layers.{n}"
        h = add("Mul", [x, "one"], f"{at}.norm")
        table = add("Softmax", [add("MatMul", [h, weight(f"{at}.gate.w", H, experts)], f"{at}.logits")], f"{at}.table")
        y = None
        for e in range(experts):
            up = add("MatMul", [h, weight(f"{at}.experts.{e}.up", H, I)], f"{at}.up{e}")
            down = add(
                "MatMul", [add("Relu", [up], f"{at}.act{e}"), weight(f"{at}.experts.{e}.down", I, H)], f"{at}.down{e}"
            )
            index = f"{at}.column{e}"
            weights.append(numpy_helper.from_array(np.array([e]), index))
            part = add("Mul", [down, add("Gather", [table, index], f"{at}.weight{e}", axis=1)], f"{at}.part{e}")
            y = part if y is None else add("Add", [y, part], f"{at}.sum{e}")
        x = add("Add", [x, y], f"{at}.out")
    return nodes, [one, *weights], x


def model(count, experts=E):
    """An ``onnx.ModelProto`` of :func:`layers`."""
    nodes, weights, last = layers(count, experts)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", H]) for n in ("x", last)]
    graph = helper.make_graph(nodes, "long", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
