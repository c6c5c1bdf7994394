"""Ways to run a block's experts from codes of 8 or 4 bits in blocks of 32: what ``native_experts --dtype int8`` runs.

All but ggml, fbgemm and KTransformers read the very codes of moeopt's bank; ggml rounds the weights that these stand
for again, in blocks of 32 of its own, and the other two with a scale for each row. What becomes of the activations is a
class of its own: a kernel that rounds them to 8 bits computes something else, about as far from the quantised model as
that is from the float one.
Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate, N out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.block_peers import logits_of, openvino_program
from benchmarks.ggml_peer import GgmlExperts
from benchmarks.ktransformers_peer import KTransformersExperts
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.onnxrt.session import Session
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import INT4_BLOCK32, INT8_BLOCK32, INT8_CHANNEL, WeightFormat
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops import experts
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCK = 32
FORMATS = {"int8": INT8_BLOCK32, "int4": INT4_BLOCK32}
_OWN = "moeopt, rows of 8 bits"
_OPERATOR = "ORT native, rows of 8 bits"
_ROUNDED = (_OWN, _OPERATOR, "ggml", "ggml repacked", "ORT MatMulNBits level 4", "ORT QMoE level 4")
ACTIVATIONS = {
    **dict.fromkeys(_ROUNDED, "int8, blocks of 32"),
    "fbgemm": "int8, one scale a call",
    "KTransformers": "int8, one scale a row",
}
"""Of the peers that round them; those of the others are float32."""


def coded(module: Any, format: WeightFormat) -> QuantizedExpertWeights:
    """The experts' codes in ``format``."""
    matrices = [
        QuantizedMatrices.of([quantize(w, format) for w in stack.detach()])
        for stack in (module.gate_up_proj, module.down_proj)
    ]
    return QuantizedExpertWeights(matrices[:1], matrices[1])


def dequantised(module: Any, bank: QuantizedExpertWeights) -> None:
    """Put the floats that the codes stand for into the module, expert by expert."""
    for e in range(bank.num_experts):
        module.gate_up_proj.data[e] = bank.w_in(e)[0]
        module.down_proj.data[e] = bank.w_out(e)


def peers(module: Any, K: int, dtype: str, only: list[str] | None) -> dict[str, Call]:
    """Every peer of ``dtype`` ("int8" or "int4") that is installed, on codes of ``module``.

    The module's weights become what the codes stand for.
    """
    bank = coded(module, FORMATS[dtype])
    dequantised(module, bank)
    site = ExpertsNode("block", bank, ExpertsSpec(), torch.float32, K, torch.float32)
    codes = "unrolled-codes" if dtype == "int4" else "unrolled-bytes"
    native = Native(by_name("unrolled-codes" if dtype == "int4" else "unrolled-floats"))
    makers: dict[str, Callable[[], Call]] = {
        "moeopt": lambda: _op(bank),
        _OWN: lambda: _op(bank.reading("int8")),
        "moeopt, a scale a row": lambda: _op(coded(module, INT8_CHANNEL)),
        "ORT native": lambda: _session(session_of(site, native)),
        _OPERATOR: lambda: _session(session_of(site, native, rounds=True)),
        "ORT MatMulNBits": lambda: _session(session_of(site, by_name(codes))),
        "OpenVINO": lambda: _openvino(module, bank, dtype),
        "ggml": lambda: GgmlExperts(module.gate_up_proj.data, module.down_proj.data, K, _ggml(dtype)),
        "ggml repacked": lambda: GgmlExperts(module.gate_up_proj.data, module.down_proj.data, K, "Q4_0", repacked=True),
        "ORT MatMulNBits level 4": lambda: _session(session_of(site, by_name(codes), rounds=True)),
        "ORT QMoE level 4": lambda: _qmoe(bank, K, 8 if dtype == "int8" else 4),
        "fbgemm": lambda: _fbgemm(module),
        "KTransformers": lambda: KTransformersExperts(module.gate_up_proj.data, module.down_proj.data, K, dtype),
    }
    for name, of in {
        "moeopt, a scale a row": "int8",
        "fbgemm": "int8",
        "ggml repacked": "int4",
        _OPERATOR: "int4",
    }.items():
        if dtype != of:
            del makers[name]
    found = {}
    for name, make in makers.items():
        if only is None or name in only or name == "moeopt":
            try:
                found[name] = make()
            except (ImportError, RuntimeError) as err:
                print(f"{name}: left out, {str(err).strip().splitlines()[0]}", flush=True)
    return found


def _ggml(dtype: str) -> str:
    return {"int8": "Q8_0", "int4": "Q4_0"}[dtype]


class _Held(QuantizedExpertWeights):
    """Keeps what a kernel worked out of its weights, as the banks of models do while these lie as they lay."""

    def remembered(self, rows: int) -> tuple[dict[Any, Any], None]:
        return self.__dict__.setdefault("known", {}), None


def _op(bank: QuantizedExpertWeights) -> Call:
    held, spec = _Held(bank.w_in_q, bank.w_out_q, format=bank.format), ExpertsSpec()
    return lambda x, ids, weights: experts(x, ids, weights, held, spec)


def _session(session: Session) -> Call:
    return lambda x, ids, weights: session.run({"x": x, "ids": ids, "weights": weights})[0]


def _qmoe(bank: QuantizedExpertWeights, K: int, bits: int) -> Call:
    """``com.microsoft::QMoE`` on ready logits, which no model has."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants, E = [], bank.num_experts
    (w_in,), w_out = bank.w_in_q, bank.w_out_q
    for number, matrices, mixed in ((2, w_in, True), (5, w_out, False)):
        for place, part in ((number, "codes"), (number + 1, "scales")):
            stack = torch.stack([getattr(matrices[e], part) for e in range(E)])
            if part == "codes" and bits == 8:
                stack = (stack.short() + 128).to(torch.uint8)
            if mixed:  # gates and ups in turns
                stack = torch.stack(stack.chunk(2, dim=1), dim=2).flatten(1, 2)
            array = (stack.float() if part == "scales" else stack).contiguous().numpy()
            constants.append(numpy_helper.from_array(array, f"input{place}"))
    names = ["x", "logits", "input2", "input3", "", "input5", "input6"]
    node = helper.make_node(
        "QMoE", names, ["y"], domain="com.microsoft", k=K, activation_type="swiglu", swiglu_fusion=1,
        activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=1, expert_weight_bits=bits,
        block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip
    widths = {"x": w_out.matrix.shape[0], "logits": E, "y": w_out.matrix.shape[0]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", wide]) for name, wide in widths.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "qmoe", ends[:2], ends[2:], constants)
    session = Session(onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets, ir_version=10)))

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return session.run({"x": x, "logits": logits_of(ids, weights, E)})[0] * weights.sum(-1, keepdim=True)

    return call


def _openvino(module: Any, bank: QuantizedExpertWeights, dtype: str) -> Call:
    """OpenVINO's ``GatherMatmul`` on compressed weights: of 2026.4 it keeps float rows, whatever a plugin is told."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    model, run = openvino_program(module)
    kind = openvino.Type.i8 if dtype == "int8" else openvino.Type.i4
    codes_in, codes_out, scales_in, scales_out = (
        torch.stack([getattr(matrices[e], part) for e in range(bank.num_experts)])
        for part in ("codes", "scales")
        for matrices in (bank.w_in_q[0], bank.w_out_q)
    )
    gate_and_up = zip(codes_in.chunk(2, dim=1), scales_in.chunk(2, dim=1), strict=True)
    multiplied = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    kept = []  # constants are read where numpy has them, until the model is compiled
    for node, (codes, scales) in zip(multiplied, [*gate_and_up, (codes_out, scales_out)], strict=True):
        if dtype == "int4":
            codes = codes ^ 0x88  # zero is 8 in ours, and 0 in a signed code
        count, N, blocks = scales.shape
        kept.append(np.ascontiguousarray(codes.numpy()))
        held = ops.constant(openvino.Tensor(kept[-1], [count, N, blocks, BLOCK], kind))
        floats = ops.multiply(ops.convert(held, "f16"), ops.constant(scales.half()[..., None].numpy()))
        shape = ops.constant(np.array([count, N, blocks * BLOCK]))
        whole = ops.convert(ops.reshape(floats, shape, False), "f32")
        product = ops.matmul(node.input_value(0), whole, False, True)
        openvino.utils.replace_node(node, product)
    call = run(model)
    kept.clear()
    return call


def _fbgemm(module: Any) -> Call:
    """torch's dynamic int8 linears, a scale for each row of W and one for all rows of x, expert by expert."""
    packed = []
    for gate_up, down in zip(module.gate_up_proj.data, module.down_proj.data, strict=True):
        pair = []
        for w in (gate_up, down):
            scales = (w.abs().amax(1) / 127).double()
            q = torch.quantize_per_channel(w, scales, torch.zeros(len(w), dtype=torch.int64), 0, torch.qint8)
            pair.append(torch.ops.quantized.linear_prepack(q, None))
        packed.append(pair)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            rows, slots = (ids == e).nonzero(as_tuple=True)
            gate, up = torch.ops.quantized.linear_dynamic(x[rows], packed[e][0], False).chunk(2, dim=-1)
            out = torch.ops.quantized.linear_dynamic(F.silu(gate) * up, packed[e][1], False)
            y.index_add_(0, rows, out * weights[rows, slots, None])
        return y

    return call
