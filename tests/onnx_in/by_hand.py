"""Files of one block of experts, written node by node as vendors write them, for who has no such exporter."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

H, I, E, K = 8, 12, 4, 2


class File:
    """Nodes and weights; ``node`` returns the name of its first result, or the names of several."""

    def __init__(self, opset=17):
        self.opset, self.nodes, self.weights, self._count = opset, [], [], 0
        self._draw = np.random.default_rng(0)

    def name(self, stem):
        self._count += 1
        return f"{stem}_{self._count}"

    def constant(self, value, name=""):
        name = name or self.name("constant")
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape, name=""):
        return self.constant(self._draw.normal(0, 0.5, shape).astype("float32"), name or self.name("weight"))

    def node(self, op, *reads, results=1, **attributes):
        made = [self.name(op.lower()) for _ in range(results)]
        self.nodes.append(helper.make_node(op, list(reads), made, name=self.name(op), **attributes))
        return made[0] if results == 1 else made

    def sum(self, value, axis, keep):
        return self.node("ReduceSum", value, self.constant([axis]), keepdims=keep)

    def router(self, k=None, experts=E, x="x"):
        """(weights, ids, logits) of a softmax over the chosen."""
        logits = self.node("MatMul", x, self.weight(H, experts, name=self.name("gate")))
        values, ids = self.node("TopK", logits, k or self.constant([K]), results=2, axis=-1)
        return self.node("Softmax", values, axis=-1), ids, logits

    def table(self, weights, ids, like):
        zeros = self.node("Mul", like, self.constant(np.float32(0)))
        return self.node("ScatterElements", zeros, ids, weights, axis=-1)

    def expert(self, x, name, inner=I):
        hidden = self.node("Relu", self.node("MatMul", x, self.weight(H, inner, name=f"{name}.up")))
        return self.node("MatMul", hidden, self.weight(inner, H, name=f"{name}.down"))

    def weighed(self, x, table, expert, experts=E):
        """The sum of ``expert(x, e)`` times column e of the table."""
        total = None
        for e in range(experts):
            part = self.node("Mul", expert(x, e), self.node("Gather", table, self.constant([e]), axis=1))
            total = part if total is None else self.node("Add", total, part)
        return total

    def dense(self, expert=None, **given):
        """The whole block on ``x``, its experts ``expert(x, e)``."""
        table = self.table(*self.router(**given))
        return self.weighed("x", table, expert or (lambda x, e: self.expert(x, f"experts.{e}")))

    def model(self, result, inputs=()):
        ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", H]), *inputs]
        results = [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "by_hand", ends, results, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
