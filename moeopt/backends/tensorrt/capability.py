"""What each TensorRT product and compute capability takes and refuses: facts about versions, each with its source.

The planner asks before it chooses a form, and :func:`~.graph_check.check_graph` holds a whole graph to the table
before it is built. What no row speaks of counts as taken: then the builder has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moeopt.backends.tensorrt.product import REGULAR, RTX
from moeopt.backends.tensorrt.target import GPU_BUILDS, RTX_BUILDS, Target

V = "1.7.1.116"
"""The version of TensorRT for RTX that "built" and "refused" speak of."""
_GUIDE = "source: docs.nvidia.com/deeplearning/tensorrt, inference-library/transformers-moe"
_PARSER = "source: the parser's own list of operators, " + V


@dataclass(frozen=True)
class TrtCapability:
    """One thing on one or more targets.

    Args:
        product: "tensorrt_rtx" or "tensorrt".
        version: of the product that the evidence was taken on.
        sm: compute capabilities.
        subject: "dtype", "product of" (a dtype in matmuls), "quantisation", "form" or "op".
        name: "BFLOAT16", "fp8", "loop", "NonZero".
        takes: whether it works.
        source: how this is known: "built on ...", "refused: ..." in the runtime's words, "source: ..." (read, not run).
        why: what a user is told when it does not.
        instead: the way out on the same target.
    """

    product: str
    version: str
    sm: tuple[int, ...]
    subject: str
    name: str
    takes: bool
    source: str
    why: str = ""
    instead: str = ""


def _rows(
    sm: tuple[int, ...], subject: str, names: str, takes: bool, source: str, why: str = "", instead: str = ""
) -> Iterator[TrtCapability]:
    """A row for each product and name."""
    for product, known in ((RTX, RTX_BUILDS), (REGULAR, GPU_BUILDS)):
        mine = tuple(n for n in sm if n in known)
        for name in names.split() if mine else ():
            read = product == REGULAR and not source.startswith("source")
            # TensorRT needs a GPU to build, so nothing of it was built here; its parser is of the same code
            told = f"source: as TensorRT for RTX {V}; not built" if read else source
            yield TrtCapability(product, V if product == RTX else "11", mine, subject, name, takes, told, why, instead)


_ALL = RTX_BUILDS + GPU_BUILDS
_BEFORE_AMPERE = tuple(n for n in _ALL if n < 80)
_BEFORE_ADA = tuple(n for n in _ALL if n < 89)
_BEFORE_BLACKWELL = tuple(n for n in _ALL if n < 100)
MOST_OF_TOPK = 3840
MOE_TARGETS = (100, 103, 110)
_NO_MOE = tuple(n for n in _ALL if n not in MOE_TARGETS)


def _from(first: int) -> tuple[int, ...]:
    return tuple(n for n in _ALL if n >= first)


_NO_IMPORTER = """
    AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger
    MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
    OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat
    StringNormalizer StringSplit TfIdfVectorizer Unique
"""

CAPABILITIES: tuple[TrtCapability, ...] = (
    *_rows(_ALL, "dtype", "FLOAT FLOAT16", True, f"built on {V}"),
    *_rows(_from(80), "dtype", "BFLOAT16", True, f"built on {V}"),
    *_rows(
        _BEFORE_AMPERE, "dtype", "BFLOAT16", False,
        f"refused by {V}: model contains HW-specific datatypes: b16",
        "Turing has no bfloat16", "dtype=torch.float16",
    ),
    *_rows(_from(80), "product of", "FLOAT FLOAT16 BFLOAT16", True, f"built on {V}"),
    *_rows(_BEFORE_AMPERE, "product of", "FLOAT16", True, f"built on {V}"),
    *_rows(
        _BEFORE_AMPERE, "product of", "FLOAT", False,
        f"refused by {V}: Cannot compile operation for Turing (SM75): FP32 GEMM is not supported",
        "TensorRT for RTX has no float32 matmuls for Turing", "dtype=torch.float16",
    ),
    *_rows(
        _ALL, "product of", "INT64 INT32", False, f"refused by {V}: Found unsupported input type of INT64",
        "the parser multiplies matrices of floats only", "a product in float32, exact up to 2**24",
    ),
    *_rows(
        _ALL, "dtype", "DOUBLE", False, f"seen on {V}: the network has FLOAT for it, with no warning",
        "the parser reads float64 as float32 and does not say so", "dtype=torch.float32",
    ),
    *_rows(
        _ALL, "dtype", "INT16 UINT16 UINT32 UINT64 UINT8 STRING COMPLEX64 COMPLEX128 FLOAT8E5M2", False,
        f"refused by {V}: Unsupported data type", "the parser has no such type", "another dtype in the model",
    ),
    *_rows(_from(89), "quantisation", "fp8", True, f"built on {V} for sm_89 and sm_120, static scales"),
    *_rows(
        _BEFORE_ADA, "quantisation", "fp8", False,
        f"refused by {V}: model contains HW-specific datatypes: fp8_e4m3", "fp8 products begin with Ada (sm_89)",
    ),
    *_rows(_from(100), "quantisation", "fp4", True, f"built on {V} for sm_120, blocks of 16 weights"),
    *_rows(
        _BEFORE_BLACKWELL, "quantisation", "fp4", False,
        f"refused by {V}: model contains HW-specific datatypes: fp4_e2m1", "fp4 products begin with Blackwell",
    ),
    *_rows(_ALL, "form", "dense loop gather sort", True, f"built on {V}"),
    *_rows(MOE_TARGETS, "form", "trt-moe", True, f"{_GUIDE}; parsed on {V}, not built"),
    *_rows(
        _NO_MOE, "form", "trt-moe", False, f"refused by {V}: Cannot decompose operation moe_fc1; {_GUIDE}",
        "IMoELayer is for sm_100, sm_103 and sm_110", "the forms dense, loop, gather and sort",
    ),
    *_rows(MOE_TARGETS, "op", "TRT_MoE", True, f"{_GUIDE}; parsed on {V}, not built"),
    *_rows(
        _NO_MOE, "op", "TRT_MoE", False, f"refused by {V}: Cannot decompose operation moe_fc1",
        "IMoELayer is for sm_100, sm_103 and sm_110", "the forms dense, loop, gather and sort",
    ),
    *_rows(
        _ALL, "op", "ScatterElements(add) ScatterND(add)", False,
        f"refused by {V}: Unsupported reduction type; ScatterND with reduction is not supported",
        "the parser scatters without a reduction only", "a sum over a dimension, as the forms do, not index_add",
    ),
    *_rows(
        _ALL, "op", "TopK(more)", False, f"refused by {V}: K exceeds the maximum value allowed (3840)",
        f"TopK gives at most {MOST_OF_TOPK} values", "a smaller k; a rank by counting, as the form sort does",
    ),
    *_rows(
        _ALL, "op", "com.microsoft", False,
        f"refused by {V}: Plugin not found; of names that ONNX has too, the parser ignores the domain",
        "its operators are ONNX Runtime's own", "a form of standard operators",
    ),
    *_rows(
        _ALL, "op", "NonZero", False, f"refused by {V}: NonZero plugin creator was not found in plugin registry",
        "it needs NVIDIA's plugin library", "a mask with torch.where(mask, value, 0)",
    ),
    *_rows(
        _ALL, "op", _NO_IMPORTER, False, _PARSER,
        "the parser has no importer for it", "other ops on that line of the model",
    ),
)  # fmt: skip


def capability(target: Target, subject: str, name: str) -> TrtCapability | None:
    """The row for a thing on a target; None when nothing is known of it."""
    for row in CAPABILITIES:
        if (row.product, row.subject, row.name) == (target.product, subject, name) and target.sm in row.sm:
            return row
    return None


def refuses(target: Target, subject: str, name: str) -> str:
    """Why ``target`` does not take it, with the nearest target that does and the way out here; "" when it takes it."""
    row = capability(target, subject, name)
    if row is None or row.takes:
        return ""
    near = nearest(target, subject, name)
    ways = [near and f"the nearest target that takes it is {near}", row.instead and f"here: {row.instead}"]
    told = "; ".join(way for way in ways if way)
    return f"{target} does not take {_spoken(subject, name)}: {row.why}" + (f"; {told}" if told else "")


def nearest(target: Target, subject: str, name: str) -> str:
    """The target whose number is nearest among those that take a thing, like "sm_80"; "" when none does."""
    able = [
        (abs(sm - target.sm), sm)
        for row in CAPABILITIES
        if row.takes and (row.subject, row.name) == (subject, name)
        for sm in row.sm
    ]
    return f"sm_{min(able)[1]}" if able else ""


def refuses_dtypes(target: Target, products: set[torch.dtype], others: set[torch.dtype]) -> str:
    """Why one of the dtypes of a block's matmuls, or of its other arithmetic, is refused, or ""."""
    for dtype in sorted(products | others, key=str):
        if why := refuses(target, "dtype", NAMES[dtype]):
            return why
    whys = [refuses(target, "product of", NAMES[dtype]) for dtype in sorted(products, key=str)]
    return next((why for why in whys if why), "")


NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
}


def _spoken(subject: str, name: str) -> str:
    spoken = {number: str(dtype).removeprefix("torch.") for dtype, number in NAMES.items()}.get(name, name)
    spoken = spoken.replace("(add)", " with a reduction").replace("(more)", f" of more than {MOST_OF_TOPK} values")
    return {"product of": f"matmuls in {spoken}", "quantisation": f"{name} quantisation"}.get(subject, spoken)
