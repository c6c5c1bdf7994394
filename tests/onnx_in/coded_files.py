"""Files whose experts are codes: a softmax router and a sum over all experts, their weights in every form of codes."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

E, H, I, BLOCK = 4, 32, 48, 16


def stored(name, array, kind=None):
    """A weight; ``kind``: an element type that NumPy has not."""
    if kind is None:
        return numpy_helper.from_array(np.ascontiguousarray(array), name)
    return helper.make_tensor(name, kind, array.shape, array.astype(np.float32).flatten().tolist())


def scales_of(w, most, axis=None, block=0, zero=False):
    """(scales, zero points or None) of a weight: one for all, for each index of ``axis``, or for blocks along it."""
    if block:
        shape = [*w.shape[:axis], w.shape[axis] // block, block, *w.shape[axis + 1 :]]
        part, over = w.reshape(shape), (axis + 1,)
    else:
        part, over = w, tuple(d for d in range(w.ndim) if d != axis)
    low, high = part.min(over), part.max(over)
    scale = ((high - low) / most if zero else np.abs(part).max(over) * 2 / most).astype(np.float32)
    return scale, np.rint(-low / scale) if zero else None


def spread(values, w, axis, block):
    if block:
        return np.repeat(values, block, axis)
    return values if axis is None else values.reshape([-1 if d == axis else 1 for d in range(w.ndim)])


class Dequantised:
    """Weights behind ``DequantizeLinear``."""

    def __init__(self, kind, axis=None, block=0, zero=False, told=False):
        self.kind, self.axis, self.block, self.zero, self.told = kind, axis, block, zero, told

    def __call__(self, name, w):
        low, most = {
            "int8": (-127, 254), "uint8": (0, 255), "int4": (-7, 14), "uint4": (0, 15), "e4m3": (-448, 896)
        }[self.kind]  # fmt: skip
        scale, zero = scales_of(w, most, self.axis, self.block, self.zero)
        codes = w / spread(scale, w, self.axis, self.block)
        codes = np.clip(
            np.rint(codes) + (0 if zero is None else spread(zero, w, self.axis, self.block)), low, low + most
        )
        held = {"int8": (np.int8, None), "uint8": (np.uint8, None), "int4": (np.int8, TensorProto.INT4)}
        held |= {"uint4": (np.uint8, TensorProto.UINT4), "e4m3": (ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN)}
        dtype, kind = held[self.kind]
        weights = [stored(f"{name}.codes", codes.astype(dtype), kind), stored(f"{name}.scale", scale)]
        if self.told:
            zero = np.zeros(scale.shape)
        if zero is not None:
            weights.append(stored(f"{name}.zero", zero.astype(dtype), kind))
        at = {} if self.axis is None else {"axis": self.axis}
        at |= {"block_size": self.block} if self.block else {}
        node = helper.make_node("DequantizeLinear", [t.name for t in weights], [name], name=f"{name}.dq", **at)
        return [node], weights


class RoundedInTheFile:
    """Floats that the file itself rounds: ``QuantizeLinear``, then ``DequantizeLinear``, both on constants."""

    def __call__(self, name, w):
        scale, _ = scales_of(w, 254, 1)
        weights = [
            stored(f"{name}.w", w),
            stored(f"{name}.scale", scale),
            stored(f"{name}.zero", np.zeros(w.shape[1], np.int8)),
        ]
        rest = [t.name for t in weights[1:]]
        return [
            helper.make_node("QuantizeLinear", [weights[0].name, *rest], [f"{name}.codes"], name=f"{name}.q", axis=1),
            helper.make_node("DequantizeLinear", [f"{name}.codes", *rest], [name], name=f"{name}.dq", axis=1),
        ], weights


class Packed:
    """A product with codes: ``MatMulNBits``."""

    def __init__(self, bits, block=BLOCK, zero=False, **attributes):
        self.bits, self.block, self.zero, self.attributes = bits, block, zero, attributes

    def product(self, rows, name, w, made):
        K, N = w.shape
        most = (1 << self.bits) - 1
        blocks = -(-K // self.block)
        padded = np.pad(w.T, ((0, 0), (0, blocks * self.block - K))).reshape(N, blocks, self.block)
        low, high = np.minimum(padded.min(2), 0), np.maximum(padded.max(2), 0)
        scale = ((high - low) / most if self.zero else 2 * np.abs(padded).max(2) / most).astype(np.float32) + 1e-6
        zero = np.rint(-low / scale) if self.zero else np.full(scale.shape, (most + 1) // 2)
        codes = np.clip(np.rint(padded / scale[..., None]) + zero[..., None], 0, most).astype(np.uint8)
        weights = [stored(f"{name}.codes", self.bytes(codes)), stored(f"{name}.scale", scale)]
        if self.zero:
            even = np.pad(zero, ((0, 0), (0, blocks % 2 if self.bits == 4 else 0))).astype(np.uint8)
            weights.append(stored(f"{name}.zero", self.bytes(even)))
        node = helper.make_node(
            "MatMulNBits", [rows, *(t.name for t in weights)], [made], name=f"{made}.nbits", domain="com.microsoft",
            K=K, N=N, bits=self.bits, block_size=self.block, **self.attributes,
        )  # fmt: skip
        return node, weights

    def bytes(self, codes):
        return codes if self.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def coded_file(form, width=I, experts=E, seed=0, router=False):
    """An ``onnx.ModelProto``: x + the weighted sum of ``experts`` gated functions of x, a router choosing two.

    ``router``: whether its weight is in codes too.
    """
    draw = np.random.default_rng(seed)
    nodes, weights = [], []

    def add(op, reads, name, **attributes):
        nodes.append(helper.make_node(op, reads, [name], name=name, **attributes))
        return name

    def product(rows, name, shape):
        w = (draw.normal(size=shape) * shape[0] ** -0.5).astype(np.float32)
        if isinstance(form, Packed):
            node, held = form.product(rows, f"{name}.w", w, name)
            nodes.append(node)
        else:
            made, held = form(f"{name}.w", w)
            nodes.extend(made)
            add("MatMul", [rows, f"{name}.w"], name)
        weights.extend(held)
        return name

    if not router:
        weights.append(stored("gate.w", draw.normal(size=(H, experts)).astype(np.float32)))
    weights += [stored("two", np.array([2])), stored("ones", np.array([1]))]
    logits = product("x", "gate", (H, experts)) if router else add("MatMul", ["x", "gate.w"], "logits")
    probs = add("Softmax", [logits], "probs", axis=-1)
    nodes.append(helper.make_node("TopK", [probs, "two"], ["best", "ids"], name="topk"))
    add("Div", ["best", add("ReduceSum", ["best", "ones"], "total", keepdims=1)], "shares")
    add("Mul", [probs, stored_zero(weights)], "none")
    table = add("ScatterElements", ["none", "ids", "shares"], "table", axis=1)
    y = ""
    for e in range(experts):
        at = f"experts.{e}"
        gate, up = product("x", f"{at}.gate", (H, width)), product("x", f"{at}.up", (H, width))
        mid = add("Mul", [add("Mul", [gate, add("Sigmoid", [gate], f"{at}.sig")], f"{at}.act"), up], f"{at}.mid")
        down = product(mid, f"{at}.down", (width, H))
        weights.append(stored(f"{at}.column", np.array([e])))
        share = add("Gather", [table, f"{at}.column"], f"{at}.share", axis=1)
        part = add("Mul", [down, share], f"{at}.part")
        y = add("Add", [y, part], f"{at}.sum") if y else part
    y = add("Add", ["x", y], "y")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", H]) for n in ("x", y)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def stored_zero(weights):
    weights.append(stored("zero", np.zeros((), np.float32)))
    return "zero"


def runs(proto, x):
    """What ONNX Runtime gives for a model, its rows kept as floats."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]


def outputs_of(proto, names):
    """A copy that gives the values called ``names``."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return made


FORMS = {
    "int8": Dequantised("int8"),
    "int8, a scale a column": Dequantised("int8", axis=1, told=True),
    "uint8, zero points": Dequantised("uint8", axis=1, zero=True),
    "int8, blocks": Dequantised("int8", axis=0, block=BLOCK),
    "int4, blocks": Dequantised("int4", axis=0, block=BLOCK),
    "uint4, blocks with zero points": Dequantised("uint4", axis=0, block=BLOCK, zero=True),
    "e4m3": Dequantised("e4m3", axis=1),
    "rounded in the file": RoundedInTheFile(),
    "4 bits": Packed(4),
    "4 bits, zero points": Packed(4, 32, zero=True),
    "8 bits": Packed(8),
    "8 bits, zero points": Packed(8, zero=True),
}
