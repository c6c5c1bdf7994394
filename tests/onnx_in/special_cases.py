"""Calls of every operator that the interpreter runs, with infinities, NaN, signed zeros, denormals and empty tensors.

``CASES``: by operator, its calls. ``by`` says of a call why ONNX Runtime's result is wrong; ONNX's own reference
implementation decides on it.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from onnx import helper, numpy_helper

INF, NAN = np.inf, np.nan
VALUES = np.float32(
    [INF, -INF, NAN, -0.0, 0.0, 1e-40, -1e-40, 1.5, -2.5, 3e38, -3e38, 0.5, -0.5, 2.5, 88.9, -104, 1, -1, 20.5, -30]
)
X = np.stack([np.roll(VALUES, k) for k in range(24)])
FINITE = np.where(np.isfinite(X) & (np.abs(X) < 1e19), X, 1.0).astype("float32")
NO_NAN = np.where(np.isnan(X), 0, X)
NONE = np.zeros((0, 4), "float32")
NARROW = np.zeros((4, 0), "float32")
WHOLE, SMALL = (
    np.array([[0, 3, -7], [5, -(1 << 62), 2], [1 << 62, -1, 7]]),
    np.array([[2, -2, 3], [5, 3, -2], [7, 1, -7]]),
)
FLAGS = X > 0
WIDE, HALF = X.astype("float64"), X.astype("float16")
LOWEST, ALL_NAN = np.full((3, 5), -INF, "float32"), np.full((3, 5), NAN, "float32")


@dataclass
class Case:
    op: str
    inputs: list
    constants: list = field(default_factory=list)
    attributes: dict = field(default_factory=dict)
    outputs: int = 1
    domain: str = ""
    opset: int = 21
    by: str = ""

    def model(self):
        """A model of this one node."""
        held = [(f"c{i}", c) for i, c in enumerate(self.constants)]
        reads = [f"x{i}" for i in range(len(self.inputs))] + ["" if c is None else name for name, c in held]
        made = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, reads, made, name=f"the_{self.op}", domain=self.domain, **self.attributes)
        ends = [
            helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
            for i, x in enumerate(self.inputs)
        ]
        weights = [numpy_helper.from_array(c, name) for name, c in held if c is not None]
        graph = helper.make_graph([node], "one", ends, [helper.make_empty_tensor_value_info(n) for n in made], weights)
        opsets = [helper.make_opsetid("", self.opset)] + [helper.make_opsetid(self.domain, 1)] * bool(self.domain)
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


CASES: defaultdict[str, list[Case]] = defaultdict(list)


def add(op, *inputs, by="", outputs=1, domain="", opset=21, held=(), **attributes):
    constants = [None if c is None else np.asarray(c) for c in held]
    given = [np.asarray(x) for x in inputs]
    CASES[f"{domain}.{op}" if domain else op].append(Case(op, given, constants, attributes, outputs, domain, opset, by))


def pairs(dtype):
    return [np.ascontiguousarray(side) for side in np.meshgrid(VALUES.astype(dtype), VALUES.astype(dtype))]


for op in (
    "Neg Abs Sqrt Exp Log Erf Sigmoid Tanh Relu Reciprocal Floor Ceil Round Sign Sin Cos Tan IsNaN IsInf Identity Elu "
    "Softplus Softsign Mish HardSwish Gelu HardSigmoid Selu LeakyRelu"
).split():
    only_floats = op in "Erf Tan Softplus Softsign Mish HardSwish Gelu HardSigmoid Elu Selu LeakyRelu".split()
    for x in (X, NONE, HALF) if only_floats else (X, NONE, HALF, WIDE):
        add(op, x)
add("Gelu", X, approximate="tanh")
add("Swish", X, opset=24)
add("Swish", X, opset=24, alpha=0.5, by="its sigmoid is 0.0000003 off at -15")
add("IsInf", X, detect_negative=0)
add("IsInf", X, detect_positive=0)
for alpha in (0.0, 1.5):
    add("LeakyRelu", X, alpha=alpha)
    add("Elu", X, alpha=alpha)
for alpha in (1.0, 2.0):
    add("Celu", X, alpha=alpha)
add("HardSigmoid", X, alpha=0.5, beta=0.1)
add("Selu", X, alpha=2.0, gamma=0.5)
for op in "Add Sub Mul Div Pow Min Max Equal Greater GreaterOrEqual Less LessOrEqual PRelu".split():
    for dtype in ("float32", "float16", *(["float64"] if op != "PRelu" else [])):
        add(op, *pairs(dtype))
    for number in (NAN, 0.0, -0.0, INF, -INF, 2.0, 0.5, -1.0, 3.0) if op != "PRelu" else ():
        add(op, X, held=[np.float32(number)])
    add(op, NONE, NONE)
    if op not in ("Pow", "PRelu"):
        add(op, WHOLE, SMALL)
for op in ("Min", "Max", "Sum"):
    add(op, X)
    add(op, X, X[::-1].copy(), X[:, ::-1].copy())
add("Pow", X, np.array(2))
add("Pow", X, np.array(-1))
add("Pow", np.abs(SMALL), np.array([2, 3, 1]))
add("Mod", WHOLE, SMALL)
add("Mod", WHOLE, SMALL, fmod=1)
MODEST = [np.where((np.abs(v) < 1e-9) | (np.isfinite(v) & (np.abs(v) > 1e9)), 0, v) for v in pairs("float32")]
add("Mod", *MODEST, fmod=1)  # torch makes a quotient, which must be finite
for low, high in (
    (None, 1.0),
    (0.0, None),
    (-1.0, 1.0),
    (1.0, -1.0),
    (NAN, 1.0),
    (0.0, NAN),
    (-INF, INF),
    (None, None),
):
    for x in (X, HALF, WIDE, NONE):
        add("Clip", x, held=[None if v is None else np.asarray(v, x.dtype) for v in (low, high)])
    if None not in (low, high):
        add("Clip", X, np.float32(low), np.float32(high))
add("Clip", WHOLE, held=[np.int64(-3), np.int64(4)])
add("Clip", WHOLE, held=[None, np.int64(4)])
for op in ("GlobalAveragePool", "GlobalMaxPool"):
    for x in (FINITE, HALF if op == "GlobalAveragePool" else FINITE.astype("float16")):
        add(op, x[:, :16].reshape(6, 4, 4, 4))
    add(op, FINITE[:, :16].reshape(6, 4, 16))
for (
    op
) in "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSumExp ReduceL2 ReduceL1 ReduceSumSquare".split():
    first = "whether it sees a NaN depends on where in the row that stands" if op in ("ReduceMax", "ReduceMin") else ""
    for x, by in ((X, first), (HALF, first), (WIDE, first), (NO_NAN, ""), (FINITE, "")):
        add(op, x, held=[[-1]], by=by)
        add(op, x, held=[[-1]], keepdims=0, by=by)
    add(op, X, held=[[0]], by=first)
    add(op, X, by=first or ("it takes the maximum for the sum where there is a NaN" if op == "ReduceLogSumExp" else ""))
    add(op, X, held=[np.array([], "int64")], noop_with_empty_axes=1)
    add(op, NARROW, held=[[1]], by="the mean of nothing is no number" if op == "ReduceMean" else "")
    for x in (NONE, LOWEST, -LOWEST, SMALL):
        add(op, x, held=[[1]])
for op in ("ArgMax", "ArgMin"):
    for axis in (0, 1):
        for x in (X, WIDE):
            add(op, x, axis=axis, by="whether it sees a NaN depends on where in the row that stands")
        for x in (NO_NAN, WHOLE, np.zeros((3, 5), "float32"), ALL_NAN, LOWEST):
            add(op, x, axis=axis)
    add(op, NO_NAN, axis=1, keepdims=0)
for x in (X, NO_NAN, WHOLE, np.zeros((3, 5), "float32"), WIDE, HALF, ALL_NAN, LOWEST):
    for k in (1, 2, x.shape[1]):
        add("TopK", x, held=[[k]], outputs=2)
        add("TopK", x, held=[[k]], outputs=2, largest=0)
for op in ("Softmax", "LogSoftmax"):
    for axis in (-1, 0):
        for x in (X, NO_NAN, LOWEST, np.minimum(NO_NAN, 3), HALF, NONE, NARROW):
            add(op, x, axis=axis)
        add(op, WIDE, axis=axis, by="its logarithm of a NaN is an infinity" if op == "LogSoftmax" else "")
for x in (X, NO_NAN, WHOLE, NONE):
    for attributes in ({}, {"exclusive": 1}, {"reverse": 1}):
        add("CumSum", x, held=[np.int64(1)], **attributes)
for x in (
    FINITE,
    np.zeros((3, 20), "float32"),
    FINITE * np.float32(1e-30),
    np.where(np.abs(NO_NAN) == INF, NAN, FINITE),
    NONE,
):
    weight = np.linspace(0.5, 1.5, x.shape[-1]).astype("float32")
    add("LayerNormalization", x, held=[weight, weight])
    add("LayerNormalization", x, held=[weight])
    add("SimplifiedLayerNormalization", x, held=[weight])
    add("RMSNormalization", x, held=[weight], opset=23)
    add("LayerNormalization", x.astype("float16"), held=[weight.astype("float16")])
scale, mean = np.linspace(0.5, 1.5, 20).astype("float32"), np.linspace(-1, 1, 20).astype("float32")
for x in (FINITE.reshape(2, 12, 20), np.zeros((2, 12, 20), "float32"), FINITE.reshape(2, 12, 20) * np.float32(1e-30)):
    x = x.transpose(0, 2, 1).copy()
    add("BatchNormalization", x, held=[scale, mean, mean, scale])
    add("InstanceNormalization", x, held=[scale, mean])
    add("GroupNormalization", x, held=[scale, mean], num_groups=4, opset=21)
add("BatchNormalization", NO_NAN, held=[scale, mean, mean, scale])
DRAWN = np.random.default_rng(0).standard_normal((20, 6)).astype("float32")
HOLED = np.where(DRAWN > 1, np.float32(INF), np.where(DRAWN < -1, np.float32(NAN), DRAWN))
for w in (np.zeros((20, 6), "float32"), np.ones((20, 6), "float32"), DRAWN, HOLED):
    add("MatMul", X, held=[w])
    add("Einsum", X, held=[w], equation="ij,jk->ik")
    add("FusedMatMul", X, held=[w], domain="com.microsoft", alpha=0.5)
    add("Gemm", X, held=[w])
    add("Gemm", X, held=[w], alpha=0.5)
    add("Gemm", X, held=[w], alpha=0.0)
    add("Gemm", X, held=[w, np.full(6, NAN, "float32")])
    add("Gemm", X, held=[w, np.full(6, INF, "float32")], beta=0.0)
    for name in ("Relu", "Tanh", "Sigmoid"):
        add("FusedGemm", FINITE, held=[w.T.copy()], domain="com.microsoft", activation=name, transB=1)
    leaky = {"activation": "LeakyRelu", "activation_alpha": 0.25}
    add("FusedGemm", X, held=[w, np.full(6, 2, "float32")], domain="com.microsoft", beta=0.5, **leaky)
    add("Conv", FINITE.reshape(1, 24, 20, 1).transpose(0, 2, 1, 3), held=[w.T.reshape(6, 20, 1, 1)])
for op in ("MatMul", "Gemm"):
    add(op, np.zeros((3, 0), "float32"), held=[np.zeros((0, 4), "float32")])
    add(op, NONE, held=[np.ones((4, 2), "float32")])
add("Gemm", np.zeros((3, 0), "float32"), held=[np.zeros((0, 4), "float32"), np.ones(4, "float32")])
for op in ("Gelu", "QuickGelu", "FastGelu"):
    add(op, X, domain="com.microsoft")
for op in ("BiasGelu", "FastGelu"):
    add(op, X, held=[np.linspace(0.5, 1.5, 20).astype("float32")], domain="com.microsoft")
add("QuickGelu", X, domain="com.microsoft", alpha=-1.0)
for to in (1, 10, 11, 6, 7, 9, 2, 3):  # float32, float16, float64, int32, int64, bool, uint8, int8
    for x in (X, WHOLE, HALF, WIDE):
        add("Cast", x, to=to)
add("CastLike", X, WHOLE)
add("CastLike", X, HALF)
add("Where", FLAGS, X, X[:, ::-1].copy())
add("Where", FLAGS, X, held=[np.float32(NAN)])
add("Where", FLAGS, held=[np.float32(-INF), np.float32(0)])
for op in ("And", "Or", "Xor"):
    add(op, FLAGS, FLAGS[::-1].copy())
for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
    add(op, WHOLE, SMALL)
add("Not", FLAGS)
add("BitwiseNot", WHOLE)

BASE = np.float32([[0, NAN, -0.0], [INF, 1, 2], [-1, -INF, 7]])
UPDATES = np.float32([[1, NAN, 3], [INF, 5, 6]])
add("Gather", X, np.array([[0, -1], [2, -20]]), axis=1)
add("Gather", X, np.zeros(0, "int64"))
add("Gather", X, held=[-1], axis=1)
add("GatherElements", X, np.array([[0, -1]] * 24), axis=1)
add("GatherND", X, np.array([[0, -1], [-24, 3]]))
add("GatherND", X, np.array([[0], [-1]]))
add("GatherND", X, np.zeros((0, 2), "int64"))
add("GatherND", X.reshape(24, 4, 5), np.array([[3], [-1]] * 12), batch_dims=1)
for how in ("none", "add", "mul", "max", "min"):
    by = np.where(np.isnan(UPDATES), 4, UPDATES) if how in ("max", "min") else UPDATES  # a NaN is neither
    onto = np.where(np.isnan(BASE), 4, BASE) if how in ("max", "min") else BASE
    add("ScatterElements", onto, np.array([[0, 1, 2], [2, -3, 1]]), by, axis=1, reduction=how)
    if how != "none":
        add("ScatterElements", onto, np.array([[0, 2, -1], [0, 0, -3]]), by, axis=0, reduction=how)
for how in ("none", "add"):
    add("ScatterND", BASE, np.array([[0], [-1]]), UPDATES, reduction=how)
    add("ScatterND", BASE, np.zeros((0, 1), "int64"), np.zeros((0, 3), "float32"), reduction=how)
    add("ScatterND", BASE, np.array([[0, 1], [2, -1]]), np.float32([NAN, 2]), reduction=how)
add("ScatterND", BASE, np.array([[0], [0]]), UPDATES, reduction="add")
for x in (X, np.zeros((0, 3), "float32"), FLAGS, np.float32(5), np.float32(0), WHOLE):
    add("NonZero", x)
for axis in (-1, 0, 1):
    add("OneHot", np.array([0, 3, -1, 7, -4, -5]), held=[np.int64(4), np.float32([0, 1])], axis=axis)
add("OneHot", np.float32([0, 1, 3]), held=[np.int64(4), [-1, 5]])
add("OneHot", np.array([[0, 2]]), held=[np.int64(4), np.float32([NAN, INF])])
add("Trilu", X)
for k in (-2, 0, 1, 30):
    for upper in (0, 1):
        add("Trilu", X, held=[np.int64(k)], upper=upper)
add("Pad", X, held=[[0, 1, 2, 0]])
add("Pad", X, held=[[0, 1, 2, 0], np.float32(NAN)])
add("Pad", X, held=[[0, -1, 2, 0]])
add("Pad", WHOLE, held=[[1, 0, 0, 0], np.int64(7)])
add("Tile", X, held=[[2, 1]])
add("Tile", X, held=[[0, 1]])
for x, shape in (
    (X[:1], [5, 20]),
    (X, [2, 1, 1]),
    (X[:, :1], [20]),
    (NONE, [2, 0, 4]),
    (X, [1]),
    (X[:, :1], [3, 1, 4]),
):
    add("Expand", x, held=[shape])
add("Concat", X, X, axis=-1)
add("Concat", X, np.zeros((0, 20), "float32"), axis=0)
add("Split", X, held=[[5, 0, 15]], outputs=3, axis=1)
add("Split", X, outputs=3, axis=1, num_outputs=3)
add("Split", X, outputs=7, axis=0, num_outputs=7)
for start, end, axis, step in (
    (0, 1 << 62, 1, 2), (-1, -(1 << 62), 1, -1), (-3, -1, 0, 1), (5, 2, 0, 1), (100, 200, 0, 1), (-100, 3, 0, 1),
    (19, -100, 1, -1), (-100, 100, -1, 7), (4, 1, 1, -1), (-2, 3, 1, -3), (9, -100, 0, -2), (100, 2, 0, -5),
):  # fmt: skip
    add("Slice", X, held=[[start], [end], [axis], [step]])
add("Slice", X, held=[[0, 1], [-1, -2], [1, 0], [1, 3]])
add("Slice", X, held=[[1], [3]])
for x, shape in ((X, [0, -1]), (NONE, [0, 2, 2]), (NONE, [-1, 4]), (X, [-1])):
    add("Reshape", x, held=[shape])
add("Reshape", NONE, held=[[0, 4]], allowzero=1)
add("Flatten", X, axis=0)
add("Flatten", NONE)
add("Squeeze", X[None])
add("Squeeze", X[None], held=[[0]])
for axes in ([0, -1], [-1, 0]):
    add("Unsqueeze", X, held=[axes])
add("Transpose", X)
for attributes in ({}, {"start": -1}, {"end": -1}, {"start": 1, "end": -5}, {"start": -9}):
    add("Shape", X, **attributes)
add("Size", NONE)
add("ConstantOfShape", np.array([2, 0]))
add("ConstantOfShape", np.array([2, 3]), value=numpy_helper.from_array(np.float32([NAN])))
add("ConstantOfShape", np.zeros(0, "int64"))
for bounds in ((0, 5, 1), (5, 0, -2), (3, 3, 1), (0, -5, 1)):
    for kind in (np.int64, np.float32):
        add("Range", *(kind(n) for n in bounds))
add("Range", np.float32(0), np.float32(1), np.float32(0.1))
for shape in ((3, 5), (5, 3)):
    add("EyeLike", np.zeros(shape, "float32"))
add("Dropout", X, outputs=2)
add("Dropout", X, held=[np.float32(0.5)])
