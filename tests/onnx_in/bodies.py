"""Blocks of experts in the bodies of a graph: as scripted loops, scans over stacked weights, and branches."""

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

H, I, E = 8, 12, 4
_HEAD = '<ir_version: 9, opset_import: ["" : 17]>\n'
_ROUTER = """
    logits = MatMul(x, gate)
    probs = Softmax <axis = -1> (logits)
    weights, ids = TopK <axis = -1> (probs, two)
    zero = Mul(x, none)
"""
_EXPERT = """
        a = MatMul(x, u)
        b = Relu(a)
        c = MatMul(b, d)
        hit = Equal(ids, e)
        m = Cast <to = 1> (hit)
        t = Mul(m, weights)
        w = ReduceSum (t, last)
        part = Mul(c, w)
"""
LOOP = f"""{_ROUTER}
    y = Loop (trips, yes, zero) <body = body (int64 e, bool go, float[t, 8] y_in)
        => (bool again, float[t, 8] y_out) {{
        u = Gather(up, e)
        d = Gather(down, e)
        {_EXPERT}
        y_out = Add(y_in, part)
        again = Identity(go)
    }}>
"""
GATHERED = f"""{_ROUTER}
    end, parts = Loop (trips, yes, zero) <body = body (int64 e, bool go, float[t, 8] kept)
        => (bool again, float[t, 8] keep, float[t, 8] part) {{
        u = Gather(up, e)
        d = Gather(down, e)
        {_EXPERT}
        keep = Identity(kept)
        again = Identity(go)
    }}>
    y = ReduceSum <keepdims = 0> (parts, first)
"""
SCAN = f"""{_ROUTER}
    y = Scan <num_scan_inputs = 3, body = body (float[t, 8] y_in, float[8, 12] u, float[12, 8] d, int64 e)
        => (float[t, 8] y_out) {{
        {_EXPERT}
        y_out = Add(y_in, part)
    }}> (zero, up, down, numbers)
"""
_ONE_PRODUCT = (
    _EXPERT.replace("a = MatMul(x, u)", "").replace("b = Relu(a)", "").replace("MatMul(b, d)", "MatMul(x, u)")
)
BRANCH = f"""
    y = If (yes) <then_branch = all () => (float[t, 8] y_then) {{
        {LOOP.replace("y = Loop", "y_then = Loop")}
    }}, else_branch = none () => (float[t, 8] y_else) {{
        y_else = Identity(x)
    }}>
"""


def of_one_product(text: str) -> str:
    """A form with one product for each expert, by a square matrix of ``up``."""
    for old, new in (
        (_EXPERT, _ONE_PRODUCT),
        ("d = Gather(down, e)", ""),
        (", float[12, 8] d", ""),
        ("up, down, numbers", "up, numbers"),
        ("num_scan_inputs = 3", "num_scan_inputs = 2"),
        ("float[8, 12] u", "float[8, 8] u"),
    ):
        text = text.replace(old, new)
    return text


def model(text: str, takes: str = "float[t, 8] x", **held: object) -> onnx.ModelProto:
    """A model of the nodes in ``text``; ``held``: further constants, or others than the usual."""
    draw = np.random.default_rng(0)
    values = {
        "gate": draw.normal(size=(H, E)), "up": draw.normal(size=(E, H, I)), "down": draw.normal(size=(E, I, H)),
        "none": np.zeros(1), "two": np.array([2]), "last": np.array([-1]), "first": np.array([0]),
        "trips": np.array(E), "yes": np.array(True), "numbers": np.arange(E),
    } | held  # fmt: skip
    made = onnx.parser.parse_model(f"{_HEAD}g ({takes}) => (float[t, 8] y) {{\n{text}}}\n")
    names = {v.name for v in made.graph.input}
    for name, value in values.items():
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        if name not in names:
            made.graph.initializer.append(numpy_helper.from_array(array, name))
    for number, node in enumerate(made.graph.node):
        node.name = f"{node.op_type.lower()}_{number}"
    return made
