"""What a bundle's ``model.onnx`` may hold, checked on its bytes before ONNX Runtime opens it.

weights     in the bundle's one data file, each between its ends, as long as its shape says
operators   ONNX's own, and the few of other domains that moeopt writes: EPContext, say, opens files by name; moeopt's
            own, with its attributes and constants, in the one graph that may hold it
functions   none; moeopt writes none
ends        named, typed and shaped as signature.json says
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moeopt.backends.onnxrt.check_quantized import OP as OF_CODES
from moeopt.backends.onnxrt.check_quantized import refuses_node
from moeopt.backends.onnxrt.session import NATIVE, data_of
from moeopt.bundle.values import DTYPES, MAX_NUMEL
from moeopt.errors import BundleError
from moeopt.lower.onnx.experts_node import DOMAIN, ON_CODES, OP
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

ANY = ("*",)
"""Stands for every operator of a domain."""
MAX_GRAPH = 1 << 31
"""Bytes: no protobuf message is longer."""
MICROSOFT = (
    *("MoE", "QMoE", OF_CODES),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding"),
    *("SkipLayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupNorm"),
    *("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "FusedMatMul", "BiasSplitGelu"),
)
"""Operators of com.microsoft that a lowering, or a fusion of transformers' exporter, writes."""
GIVEN = (
    *("MatMulNBits", "MatMulBnb4", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger16", "QGemm"),
    *("QuantizeLinear", "DequantizeLinear", "QAttention", "QEmbedLayerNormalization", "DynamicQuantizeLSTM"),
    *("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QLinearConcat", "QLinearLeakyRelu"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearWhere", "GatherBlockQuantized"),
    *("EmbedLayerNormalization", "FusedGemm", "FusedConv", "TransposeMatMul", "BiasAdd", "BiasSoftmax", "BiasDropout"),
    *(
        "GatherND",
        "Trilu",
        "Unique",
        "ExpandDims",
        "Range",
        "Inverse",
        "CDist",
        "GridSample",
        "CropAndResize",
        "Tokenizer",
    ),
    *("NGramRepeatBlock", "BifurcationDetector", "ComplexMul", "ComplexMulConj", "Rfft", "Irfft", "NhwcMaxPool"),
    *("PackedAttention", "PackedMultiHeadAttention", "RemovePadding", "RestorePadding", "RelativePositionBias"),
    *("GatedRelativePositionBias", "SparseAttention", "PagedAttention", "LongformerAttention", "DecoderAttention"),
    *("DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "CausalConvWithState", "LinearAttention"),
)
"""Operators of com.microsoft that files hold which moeopt is given; each computes its results of its inputs alone."""
_OWN = {"com.microsoft": (*MICROSOFT, *GIVEN), "ai.onnx.ml": ANY, "trt": ("TRT_MoE",)}
"""Operators by domain; TensorRT's parser takes the second, which no other runtime knows."""
_NATIVE = {**_OWN, DOMAIN: (OP, ON_CODES)}
"""Those of the graph whose experts moeopt's own kernel computes."""
_WORDS, _WHOLE, _NUMBERS = 3, 2, 1
"""How a protobuf attribute says that it is a string, an integer or a float."""
_ATTRIBUTES = {
    **dict.fromkeys(("rows", "activation", "w_in", "w_out"), _WORDS),
    **dict.fromkeys(("experts", "stacked", "b_in", "b_out", "norm"), _WHOLE),
    **dict.fromkeys(("codes", "block", "hidden", "inner", "rounds"), _WHOLE),
    **dict.fromkeys(("weight_on_input", "identity_beyond", "by_expert"), _WHOLE),
    **dict.fromkeys(("gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max"), _NUMBERS),
    **dict.fromkeys(("alpha", "up_offset", "norm_eps"), _NUMBERS),
}
"""Of moeopt's own operator, on floats or codes, with their types."""
_KEYS = {"location", "offset", "length"}


def check_graph(
    path: Path, signature: Mapping[str, Any], size: int, rounds: bool = False, *, of_file: bool = False
) -> OnnxValue:
    """The ``onnx.ModelProto`` of a file, without its weights; ``BundleError`` says what may not be in it.

    ``size``: bytes of the data file, 0 where the manifest lists none. ``rounds``: whether the manifest says that
    products of codes round their activations. ``of_file``: whether it was made of an ONNX file, whose own nodes it
    holds.
    """
    proto = parse(path)
    allowed = _NATIVE if path.name == NATIVE else _OWN
    sizes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    constants = {tensor.name for tensor in proto.graph.initializer} - {value.name for value in proto.graph.input}
    for opset in proto.opset_import:
        if opset.domain not in ("", "ai.onnx", *allowed):
            raise BundleError(f"{path}: it uses operators of {opset.domain!r}, which moeopt does not write")
    if proto.functions:
        found = proto.functions[0]
        raise BundleError(f"{path}: it holds the function {found.domain}.{found.name}, and moeopt writes none")
    if proto.training_info:
        raise BundleError(f"{path}: it holds training information, and moeopt writes none")
    for graph in graphs_of(proto.graph):
        if graph.sparse_initializer:
            raise BundleError(f"{path}: it holds sparse weights, and moeopt writes none")
        for node in graph.node:
            _check_node(path, node, allowed, constants)
            if node.op_type == ON_CODES and rounds is not any(a.name == "rounds" and a.i for a in node.attribute):
                reads = "floats, and the bundle says that activations become int8" if rounds else "rows rounded to int8"
                raise BundleError(f"{path}: node {node.name!r} reads {reads}")
            if node.op_type == OF_CODES and (reason := refuses_node(node, sizes, rounds, given=of_file)):
                raise BundleError(f"{path}: node {node.name!r} {reason}")
        for tensor in _tensors(graph):
            _check_tensor(path, tensor, size)
    _check_ends(path, proto.graph, _called(proto.graph) if of_file else list(proto.graph.input), signature)
    return proto


def parsed(model: bytes) -> OnnxValue:
    """The protobuf of a graph that this process wrote."""
    import onnx

    return onnx.load_from_string(model)


def parse(path: Path) -> OnnxValue:
    """The protobuf of a ``.onnx`` file; external weights are not read."""
    import onnx
    from google.protobuf.message import DecodeError

    size = path.stat().st_size
    if size > MAX_GRAPH:
        raise BundleError(f"{path}: it has {size} bytes, more than any ONNX graph's")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as err:
        raise BundleError(f"{path}: it is not an ONNX graph ({err}): it was damaged or cut off") from None
    if not proto.HasField("graph") or not proto.graph.node and not proto.graph.output:
        raise BundleError(f"{path}: it is not an ONNX graph: it was damaged or cut off")
    return proto


def graphs_of(graph: OnnxGraph) -> Iterator[Any]:
    """A graph and all that its control flow holds."""
    todo = [graph]
    while todo:
        here = todo.pop()
        yield here
        for node in here.node:
            for attribute in node.attribute:
                todo += [attribute.g] * attribute.HasField("g") + list(attribute.graphs)


def _tensors(graph: OnnxGraph) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] * attribute.HasField("t")
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise BundleError(f"node {node.name!r} holds a sparse tensor, and moeopt writes none")


def _check_node(path: Path, node: OnnxNode, allowed: Mapping[str, tuple[str, ...]], constants: set[str]) -> None:
    here = allowed.get(node.domain, ())
    if node.domain not in ("", "ai.onnx") and here is not ANY and node.op_type not in here:
        raise BundleError(
            f"{path}: node {node.name!r} is {node.domain or 'ai.onnx'}.{node.op_type}, which moeopt does not write"
        )
    if node.domain != DOMAIN:
        return
    for attribute in node.attribute:
        if _ATTRIBUTES.get(attribute.name) != attribute.type:
            raise BundleError(
                f"{path}: node {node.name!r} has the attribute {attribute.name!r}, which moeopt does not write"
            )
    computed = [name for name in node.input[3:] if name not in constants]
    if computed or len(node.input) < 5 or len(node.output) != 1:
        what = f"reads {computed[0]!r} for a weight" if computed else "has other inputs and outputs than it may"
        raise BundleError(f"{path}: node {node.name!r} {what}, which moeopt does not write")


def _check_tensor(path: Path, tensor: OnnxValue, size: int) -> None:
    import onnx

    count = math.prod(tensor.dims)
    if any(d < 0 for d in tensor.dims) or count > MAX_NUMEL:
        raise BundleError(f"{path}: the weight {tensor.name!r} has the shape {list(tensor.dims)}")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.external_data:
            raise BundleError(f"{path}: the weight {tensor.name!r} is in the graph and in a file at once")
        return
    entries = {e.key: e.value for e in tensor.external_data}
    where = entries.get("location")
    data = data_of(path.name)
    if where != data:
        raise BundleError(f"{path}: the weight {tensor.name!r} lies in {where!r}; weights lie in {data} only")
    offset, length = (_number(entries.get(key)) for key in ("offset", "length"))
    if set(entries) != _KEYS or len(tensor.external_data) != 3 or offset is None or length is None:
        raise BundleError(f"{path}: the weight {tensor.name!r} does not say where it begins and ends")
    if offset + length > size:
        raise BundleError(f"{path}: the weight {tensor.name!r} ends at byte {offset + length}, and {data} has {size}")
    import onnx_ir as ir

    try:
        want = -(-ir.DataType(tensor.data_type).bitwidth * count // 8)
    except (ValueError, TypeError):
        raise BundleError(f"{path}: the weight {tensor.name!r} has the dtype {tensor.data_type}") from None
    if length != want:
        raise BundleError(f"{path}: the weight {tensor.name!r} has {length} bytes, and its shape says {want}")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None


def _called(graph: OnnxGraph) -> list[Any]:
    """The inputs that a call gives: a file's weights may be inputs too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _check_ends(path: Path, graph: OnnxGraph, given: Sequence[Any], signature: Mapping[str, Any]) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    try:
        inputs = {e["onnx"]: e for e in signature["inputs"] if "onnx" in e}
        outputs = [e["onnx"] for e in signature["outputs"] if "tensor" in e]
        order = [e["tensor"] for e in signature["outputs"] if "tensor" in e]
    except (KeyError, TypeError, AttributeError) as err:
        raise BundleError(f"{path}: signature.json lacks or mistypes a part ({type(err).__name__}: {err})") from None
    takes = [v.name for v in given]
    gives = [v.name for v in graph.output]
    if sorted(takes) != sorted(inputs) or set(takes) & weights:
        raise BundleError(f"{path}: the graph takes {takes}, and signature.json says {list(inputs)}")
    if gives != outputs or order != list(range(len(outputs))):
        raise BundleError(f"{path}: the graph gives {gives}, and signature.json says {outputs}")
    for value in given:
        want, have = _stated(inputs[value.name]), _type(value)
        fits = have[0] == want[0] and len(have[1]) == len(want[1])
        fixed = [(a, b) for a, b in zip(have[1], want[1], strict=False) if isinstance(a, int) or isinstance(b, int)]
        if not fits or any(a != b for a, b in fixed):
            raise BundleError(
                f"{path}: the input {value.name} is {_format_type(have)}, and signature.json says {_format_type(want)}"
            )


Type = tuple[str, list[Any]]


def _stated(entry: Mapping[str, Any]) -> Type:
    if entry.get("dtype") not in DTYPES or not isinstance(entry.get("shape"), list):
        raise BundleError(f"signature.json: the input {str(entry.get('name'))[:60]!r} has no dtype and shape")
    return entry["dtype"], entry["shape"]


def _type(value: OnnxValue) -> Type:
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import to_torch_dtype

    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    try:
        dtype: torch.dtype | str = to_torch_dtype(ir.DataType(tensor.elem_type))
    except (ValueError, TypeError):
        dtype = "no tensor"
    return str(dtype).removeprefix("torch."), dims


def _format_type(kind: Type) -> str:
    return f"{kind[0]} ({', '.join('?' if d is None else str(d) for d in kind[1])})"
