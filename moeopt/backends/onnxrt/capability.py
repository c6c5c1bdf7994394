"""What each provider's MoE operators honour, ignore without a word, and refuse: facts about versions, with evidence.

``refuses`` of the kernel lowerings reads this table, and :func:`check_graph` holds every emitted graph to it.

A row says what holds on every version that the package accepts. From 1.31.1 to 1.32.0 the CPU provider changed in this,
found by running both:

- MoE and QMoE have the attribute ``swiglu_limit_after_activation``. 1.31.1 refuses a graph that names it, and 1.32.0
  refuses any value but 0 when it loads the graph.
- QMoE computes on bfloat16 tokens too, and takes scales of float8e4m3fn and float8e8m0. MoE is as it was.
- A reduction of no rows along axis -1 gives one column, as along axis 1. 1.31.1 leaves the axis as wide as it was.
- What the rows call wrong, ignored, refused or dropped still is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeopt.backends.onnxrt.int8_activations import node_problems
from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue

DOMAIN = "com.microsoft"
_NON_NEGATIVE = ("Softmax", "Sigmoid", "Relu", "Abs", "Exp", "Softplus", "Sqrt")
_NO_BFLOAT16_ON_CPU = ("MatMul", "Gemm", "Mul", "Add", "Sub", "Div", "ReduceSum", "Where", "Sigmoid", "Tanh")


@dataclass(frozen=True)
class OrtCapability:
    """One operator on one provider.

    Args:
        provider: "cpu", "cuda", "tensorrt", "nv_tensorrt_rtx".
        op: "MoE" or "QMoE", of domain com.microsoft.
        evidence: how this is known: "run on 1.31.1 and 1.32.0", or "source" (read, not run).
        dtypes: of the tokens that the kernel computes in; () when the provider has no such operator.
        activations: values of ``activation_type`` that are right.
        wrong: values of ``activation_type`` that run and give something else, with what they give.
        fusions: values of ``swiglu_fusion`` that work with swiglu.
        separate_up: whether fc3 (a separate up weight) works.
        ignored: attributes that do nothing, each with the one value at which doing nothing is right.
        required: attributes that must be given, with the value that means what moeopt emits.
        router_weights: whether QMoE reads input 14, and if it does whether it drops negative ones.
        least, aligned: the least H and I, and the bits that a row of H or of I must fill in whole steps.
    """

    provider: str
    op: str
    evidence: str
    dtypes: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("gelu", "silu", "swiglu", "identity")
    wrong: Mapping[str, str] = field(default_factory=dict)
    fusions: tuple[int, ...] = (1,)
    separate_up: bool = False
    ignored: Mapping[str, int] = field(default_factory=dict)
    required: Mapping[str, int] = field(default_factory=dict)
    router_weights: str = "none"
    min_size: int = 1
    aligned: int = 0

    def refuses_width(self, width: int, dtype: str) -> str:
        """Why rows of ``width`` elements do not fit, or ""."""
        step = max(1, self.aligned // _BITS.get(dtype, 32))
        if width >= self.min_size and width % step == 0:
            return ""
        takes = f"{self.min_size} or more, in steps of {step}"
        return f"{width} is not a width that {self.provider}'s {self.op} takes: {takes}"


_BITS = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16}


CAPABILITIES = (
    OrtCapability(
        "cpu",
        "MoE",
        "run on 1.31.1 and 1.32.0",
        dtypes=("FLOAT", "FLOAT16"),
        wrong={"relu": "relu of NaN is 0 in this kernel, so a broken token looks sound"},
        ignored={"use_sparse_mixer": 0},
    ),
    OrtCapability(
        "cpu",
        "QMoE",
        "run on 1.31.1 and 1.32.0",
        dtypes=("FLOAT", "FLOAT16"),
        wrong={"relu": "relu of NaN is 0 in this kernel, so a broken token looks sound"},
        ignored={"use_sparse_mixer": 0, "normalize_routing_weights": 1},
        router_weights="drops negative ones",
    ),
    OrtCapability(
        "cuda",
        "MoE",
        # a build without microsoft/onnxruntime#32659 reads bfloat16 logits as float32: a bundle's self-test tells
        "source; kernels for the three dtypes are in the library of 1.31.1",
        dtypes=("FLOAT", "FLOAT16", "BFLOAT16"),
        activations=("relu", "gelu", "silu", "swiglu", "identity"),
        separate_up=True,
        min_size=16,
        aligned=128,
    ),
    OrtCapability(
        "cuda",
        "QMoE",
        "source",
        dtypes=("FLOAT16", "BFLOAT16"),
        activations=("relu", "gelu", "silu", "swiglu", "identity"),
        required={"weights_prepacked": 0},
        router_weights="ignored",
    ),
    OrtCapability("tensorrt", "MoE", "source: the parser refuses it"),
    OrtCapability("tensorrt", "QMoE", "source: the parser refuses it"),
    OrtCapability("nv_tensorrt_rtx", "MoE", "source: the parser refuses it"),
    OrtCapability(
        "nv_tensorrt_rtx",
        "QMoE",
        "source",
        dtypes=("FLOAT16", "BFLOAT16"),
        activations=("swiglu",),
        required={"weights_prepacked": 0, "block_size": 128, "expert_weight_bits": 4},
        router_weights="ignored",
    ),
)


def capability(provider: str, op: str) -> OrtCapability | None:
    """The row for ``op`` on ``provider``; None when nothing is known, which counts as "cannot"."""
    return next((row for row in CAPABILITIES if (row.provider, row.op) == (provider, op)), None)


def check_graph(model: OnnxModel, provider: str) -> list[str]:
    """What ``provider`` would ignore, refuse or compute otherwise in an ``onnx_ir`` model; [] when nothing.

    Every ``com.microsoft::MoE`` and ``QMoE`` node is held to :data:`CAPABILITIES`, subgraphs included; on CPU,
    bfloat16 arithmetic is reported too. Each line names the node and the fact.
    """
    problems = []
    for node in model.graph.all_nodes():
        found: list[str] = []
        if node.domain == DOMAIN and node.op_type in ("MoE", "QMoE"):
            found = _moe_problems(node, provider)
        elif provider == "cpu" and node.domain == DOMAIN:
            found = node_problems(node)
        elif provider == "cpu" and node.domain == "" and node.op_type in _NO_BFLOAT16_ON_CPU:
            if any(_dtype(value) == "BFLOAT16" for value in node.inputs):
                found = [f"the CPU provider has no bfloat16 {node.op_type} (NOT_IMPLEMENTED)"]
        problems += [f"{node.name or node.op_type}: {problem}" for problem in found]
    return problems


def _moe_problems(node: OnnxNode, provider: str) -> list[str]:
    row = capability(provider, node.op_type)
    if row is None or not row.dtypes:
        return [f"{provider} has no com.microsoft::{node.op_type}" + (f" ({row.evidence})" if row else "")]
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    given_weights = node.op_type == "QMoE" and _has_input(node, 14) and row.router_weights != "ignored"
    problems = _attribute_problems(row, values, given_weights) + _activation_problems(row, values)
    dtype = _dtype(node.inputs[0])
    if dtype is not None and dtype not in row.dtypes:
        problems.append(f"no kernel for {dtype}; there are {', '.join(row.dtypes)}")
    third = 6 if node.op_type == "MoE" else 8
    if _has_input(node, third) and not row.separate_up:
        problems.append("a separate up weight (fc3) is NOT_IMPLEMENTED; interleave gate and up in fc1")
    if node.op_type == "MoE":
        problems += _layout_problems(node, values, row) + _dtype_problems(node)
    else:
        problems += _router_weight_problems(node, row) + (node_problems(node) if provider == "cpu" else [])
    return problems


_KNOWN = frozenset(
    "k activation_type activation_alpha activation_beta swiglu_fusion swiglu_limit use_sparse_mixer"
    " normalize_routing_weights".split()
)
_KNOWN_OF_QMOE = frozenset({"expert_weight_bits", "block_size", "weights_prepacked"})


def _attribute_problems(row: OrtCapability, values: Mapping[str, Any], given_weights: bool) -> list[str]:
    """With router weights given, ``normalize_routing_weights`` is honoured: it divides them by their sum."""
    default = {"use_sparse_mixer": 0, "normalize_routing_weights": 0}
    unknown = sorted(values.keys() - (_KNOWN if row.op == "MoE" else _KNOWN | _KNOWN_OF_QMOE))
    problems = [f"{name} is an attribute that the table of {row.provider}'s {row.op} lacks" for name in unknown]
    for name, neutral in row.ignored.items():
        if name == "normalize_routing_weights" and given_weights:
            continue
        if values.get(name, default[name]) != neutral:
            problems.append(f"{name}={values.get(name, default[name])} is silently ignored ({row.evidence})")
    for name, value in row.required.items():
        if values.get(name) != value:
            problems.append(f"{name} must be {value}, not {values.get(name, 'left out')} ({row.evidence})")
    return problems


def _activation_problems(row: OrtCapability, values: Mapping[str, Any]) -> list[str]:
    name = values.get("activation_type", "relu")
    name = name.decode() if isinstance(name, bytes) else name
    problems = []
    if name in row.wrong:
        problems.append(f"activation_type {name}: {row.wrong[name]} ({row.evidence})")
    elif name not in row.activations:
        problems.append(f"activation_type {name} is refused; there are {', '.join(row.activations)}")
    if name == "swiglu":
        if values.get("swiglu_fusion", 0) not in row.fusions:
            problems.append(f"swiglu_fusion={values.get('swiglu_fusion', 0)} is refused: only interleaved (1) works")
        problems += [f"{key} must be given with swiglu" for key in _SWIGLU_NEEDS if key not in values]
    else:
        for key in ("activation_alpha", "activation_beta", "swiglu_limit", "swiglu_fusion"):
            if key in values:
                problems.append(f"{key} is silently ignored with activation_type {name}")
    return problems


_SWIGLU_NEEDS = ("activation_alpha", "activation_beta")


def _dtype_problems(node: OnnxNode) -> list[str]:
    """Tokens, logits, weights and biases are of one type T."""
    found = {name for value in node.inputs if (name := _dtype(value)) is not None}
    return [f"its inputs are {' and '.join(sorted(found))}, and MoE takes one dtype"] if len(found) > 1 else []


def _layout_problems(node: OnnxNode, values: Mapping[str, Any], row: OrtCapability) -> list[str]:
    """fc1 must be (E, O, H) and fc2 (E, H, I), with O = 2I for swiglu: other shapes can be read as a legacy layout."""
    fc1, fc2 = _shape(node.inputs[2]), _shape(node.inputs[4])
    if fc1 is None or fc2 is None:
        return ["the shapes of fc1 and fc2 are not known, so their layout cannot be checked"]
    activation = values.get("activation_type", "relu")
    factor = 2 if activation in ("swiglu", b"swiglu") else 1
    if len(fc1) != 3 or len(fc2) != 3:
        return [f"fc1 {fc1} and fc2 {fc2} must have rank 3"]
    problems = []
    (E, O, H), (E2, H2, I) = fc1, fc2
    if E != E2 or H != H2 or factor * I != O:
        problems.append(f"fc1 {fc1} and fc2 {fc2} are not (E, {factor}I, H) and (E, H, I)")
    if values.get("k", 1) > E:
        problems.append(f"k={values.get('k', 1)} exceeds the {E} experts")
    dtype = _dtype(node.inputs[2]) or "FLOAT"
    problems += [why for width in (H, I) if (why := row.refuses_width(width, dtype))]
    return problems


def _router_weight_problems(node: OnnxNode, row: OrtCapability) -> list[str]:
    if not _has_input(node, 14):
        return []
    if row.router_weights == "ignored":
        return [f"router_weights (input 14) is silently ignored ({row.evidence})"]
    value = node.inputs[14]
    producer = value.producer()
    if value.const_value is not None:
        positive = bool((value.const_value.numpy() >= 0).all())
    else:
        positive = producer is not None and producer.op_type in _NON_NEGATIVE
    return [] if positive else [f"negative router_weights are silently dropped ({row.evidence}); prove them >= 0"]


def _has_input(node: OnnxNode, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _dtype(value: OnnxValue) -> str | None:
    return None if value is None or value.dtype is None else value.dtype.name


def _shape(value: OnnxValue) -> tuple[int, ...] | None:
    if value is None or value.shape is None or not all(isinstance(n, int) for n in value.shape):
        return None
    return tuple(value.shape)
