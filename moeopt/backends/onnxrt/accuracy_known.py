"""Operators of an engine's graph that no measurement of a kernel is needed for, or that are measured in other ways.

A test asks that every operator which torch's exporter or moeopt writes is measured (:mod:`~.accuracy_kernels`), has
another form (:mod:`moeopt.lower.onnx.accurate`), or stands here; an engine whose graph holds any other says so.
"""

from __future__ import annotations

from moeopt.backends.onnxrt.accuracy import REPLACED
from moeopt.backends.onnxrt.accuracy_kernels import KERNELS
from moeopt.lower.onnx.accurate import FORMS
from moeopt.value_types import OnnxModel, OnnxNode

EXACT = frozenset(
    "And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Compress Concat Constant ConstantOfShape "
    "DepthToSpace Dropout Equal Expand EyeLike Flatten Gather GatherElements GatherND Greater GreaterOrEqual Identity "
    "IsInf IsNaN Less LessOrEqual NonZero Not OneHot Or Pad Range Reshape ReverseSequence ScatterND Shape Size Slice "
    "SpaceToDepth Split Squeeze Tile Transpose Trilu Unique Unsqueeze Where Xor".split()
)
"""They move, compare or name values; Dropout is the identity at inference."""
CONTROL = frozenset(
    "ConcatFromSequence If Loop Scan SequenceAt SequenceConstruct SequenceEmpty SequenceInsert SequenceLength "
    "SequenceMap SplitToSequence".split()
)
"""They run graphs, or keep lists of tensors."""
SUMS = frozenset("Conv ConvTranspose Einsum FusedMatMul Gemm MatMul MatMulInteger".split())
"""Sums of products: their error is that of float32 sums in the runtime's order, which budgets are made for."""
LAYERS = frozenset("AveragePool BatchNormalization Col2Im InstanceNormalization PRelu Resize ScatterElements".split())
"""Measured in whole layers (``tests/lower/onnx/test_layers.py``)."""
OWN = frozenset(
    "Attention DequantizeLinear Experts GatherBlockQuantized GroupQueryAttention MatMulNBits MoE MultiHeadAttention "
    "QMoE QuantizeLinear RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "TensorScatter".split()
)
"""Written by a lowering or for a cache, and compared by tests of their own."""
RANDOM = frozenset("Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split())
"""A graph that draws random numbers is refused before it is written."""
ALONE = frozenset(
    "BlackmanWindow DFT DeformConv Det GlobalAveragePool GridSample GroupNormalization HammingWindow HannWindow "
    "MaxRoiPool NegativeLogLikelihoodLoss NonMaxSuppression RMSNormalization RoiAlign STFT "
    "SoftmaxCrossEntropyLoss".split()
)
"""Not measured: an engine that holds one says that its numbers were compared on inputs of the verification alone."""

RECURRENT = frozenset(("GRU", "LSTM", "RNN"))
"""Measured in whole layers: right, but for a NaN, which they take for a number; an engine that holds one says so."""

_MEASURED = frozenset(kernel.op for kernel in KERNELS) | FORMS.keys() | REPLACED.keys()
KNOWN = _MEASURED | EXACT | CONTROL | SUMS | LAYERS | OWN | RANDOM | RECURRENT


def kernel_notes(model: OnnxModel) -> list[str]:
    """What the owner of an engine with this graph shall know of its kernels; [] where all of them were measured."""
    notes, operators = [], _operators(model)
    if names := sorted(operators - KNOWN):
        notes.append(
            f"the kernels of {', '.join(names)} were not measured over all magnitudes: what they give was compared "
            "with PyTorch on the inputs of the verification alone"
        )
    if any(_tells_places(node) for node in model.graph.all_nodes()):
        notes.append(
            "the places of maxima over windows (return_indices) are found as if a NaN were not there, where PyTorch "
            "takes the NaN"
        )
    if names := sorted(operators & RECURRENT):
        notes.append(
            f"ONNX Runtime's {', '.join(names)} takes NaN for a number: a sequence with a NaN gives finite results "
            "from there on, where PyTorch gives NaN"
        )
    return notes


def _tells_places(node: OnnxNode) -> bool:
    """Whether a MaxPool's second result is read."""
    if node.op_type != "MaxPool" or node.domain or len(node.outputs) < 2:
        return False
    return bool(node.outputs[1].uses()) or node.outputs[1].is_graph_output()


def _operators(model: OnnxModel) -> set[str]:
    """Of ONNX's own domain and of ONNX Runtime's; what another domain names alike is another operator."""
    return {node.op_type for node in model.graph.all_nodes() if node.domain in ("", "ai.onnx", "com.microsoft")}
