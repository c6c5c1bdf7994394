"""Ways to run one block's experts on a CPU: what ``onnx_blocks.py`` compares, each made in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.blocks import BLOCKS, transformers_experts
from benchmarks.processes import Facts

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Answer = Callable[[int, int], tuple[float, Tensor]]


def inputs(block: str, T: int, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T, H), ids (T, K) and weights (T, K), the same in every process."""
    E, K, H, _ = BLOCKS[block]
    generator = torch.Generator().manual_seed(1000 * T + turn)
    weights, ids = torch.rand(T, E, generator=generator).topk(K)
    return torch.randn(T, H, generator=generator), ids, weights


def peer(facts: Facts, name: str, block: str) -> Answer:
    """``(T, turn) -> (seconds, output)`` of one call with cold caches."""
    torch.manual_seed(0)
    E, K, H, I = BLOCKS[block]
    module = transformers_experts(E, K, H, I, torch.float32)
    began = time.perf_counter()
    call = PEERS[name](module) if name in PEERS else _lowering(name, module, K)
    facts["load"] = time.perf_counter() - began
    if name not in ("transformers", "eager", "torch.compile"):
        del module
    flush = np.ones(200 << 20, dtype=np.uint8)  # not a tensor: torch's threads would wait busily beside the call

    def answer(T: int, turn: int) -> tuple[float, Tensor]:
        feeds = inputs(block, T, turn)
        np.add(flush, 1, out=flush)
        began = time.perf_counter()
        output = call(*feeds)
        took = time.perf_counter() - began
        return getattr(call, "seconds", took), output

    return answer


def _default(module: Any) -> Call:
    module.config._experts_implementation = "grouped_mm"
    return module


def _eager(module: Any) -> Call:
    module.config._experts_implementation = "eager"
    return module


def _compiled(module: Any) -> Call:
    module.config._experts_implementation = "grouped_mm"
    return torch.compile(module, dynamic=True)


def _lowering(name: str, module: Any, K: int) -> Call:
    from moeopt.backends.onnxrt.lowerings import by_name
    from moeopt.backends.onnxrt.lowerings.native import Native
    from moeopt.backends.onnxrt.plan import session_of
    from moeopt.ir.specs import ExpertsSpec
    from moeopt.lower.onnx.experts_node import ExpertsNode
    from moeopt.ops import StackedExpertWeights

    bank = StackedExpertWeights([module.gate_up_proj.detach()], module.down_proj.detach())
    site = ExpertsNode("block", bank, ExpertsSpec(), torch.float32, K, torch.float32)
    lowering = Native(by_name("unrolled")) if name == Native.name else by_name(name)
    if refusal := lowering.refuses(site, "cpu"):
        raise ValueError(refusal)
    session = session_of(site, lowering)
    return lambda x, ids, weights: session.run({"x": x, "ids": ids, "weights": weights})[0]


def logits_of(ids: Tensor, weights: Tensor, E: int) -> Tensor:
    """Logits (T, E) whose softmax over the chosen experts is in the ratio of ``weights``."""
    return torch.full((len(ids), E), -1e9).scatter(1, ids, weights.log())


def _kernel(module: Any) -> Call:
    """``com.microsoft::MoE`` on ready logits, which no model has: the floor of what that kernel can do."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    E, double, H = module.gate_up_proj.shape
    gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
    mixed = torch.stack([gate, up], dim=2).reshape(E, double, H).numpy()
    node = helper.make_node(
        "MoE", ["x", "logits", "fc1", "", "fc2"], ["y"], domain="com.microsoft", k=module.config.num_experts_per_tok,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1,
    )  # fmt: skip
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [node], "moe",
        [helper.make_tensor_value_info(name, floats, ["T", width]) for name, width in (("x", H), ("logits", E))],
        [helper.make_tensor_value_info("y", floats, ["T", H])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:  # weights may be past the 2 GB that a model's bytes hold
        for name, weight in (("fc1", mixed), ("fc2", module.down_proj.detach().numpy())):
            tensor = onnx.TensorProto(name=name, data_type=floats, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=name)
            weight.tofile(f"{folder}/{name}")
            model.graph.initializer.append(tensor)
        onnx.save(model, f"{folder}/moe.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/moe.onnx", options, providers=["CPUExecutionProvider"])

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = session.run(None, {"x": x.numpy(), "logits": logits_of(ids, weights, E).numpy()})[0]
        return torch.from_numpy(y) * weights.sum(-1, keepdim=True)

    return call


def _products(module: Any) -> Call:
    """Each hit expert's two products and nothing else, on packed weights: the floor of ``unrolled``."""
    import onnx_ir as ir
    import onnxruntime

    E, double, H = module.gate_up_proj.shape
    weights = {"up": module.gate_up_proj.detach().mT, "down": module.down_proj.detach().mT}
    inputs, outputs, nodes, constants = [], [], [], []
    for e in range(E):
        for name, weight in weights.items():
            constants.append(ir.val(f"{name}{e}.w", const_value=ir.tensor(weight[e].contiguous(), name=f"{name}{e}.w")))
            inputs.append(ir.val(f"{name}{e}", ir.DataType.FLOAT, [f"rows{e}", weight.shape[1]]))
            nodes.append(ir.node("MatMul", [inputs[-1], constants[-1]]))
            outputs.append(nodes[-1].outputs[0])
            outputs[-1].name, outputs[-1].dtype = f"{name}{e}.y", ir.DataType.FLOAT
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        ir.save(ir.Model(graph, ir_version=10), f"{folder}/products.onnx", external_data="weights")
        session = onnxruntime.InferenceSession(f"{folder}/products.onnx", options, providers=["CPUExecutionProvider"])

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()
        rows = {f"up{e}": np.zeros((n, H), np.float32) for e, n in enumerate(counts) if n}
        rows |= {f"down{e}": np.zeros((n, double // 2), np.float32) for e, n in enumerate(counts) if n}
        # ONNX Runtime wants every input, and runs only what the outputs that are asked for need
        rows |= {i.name: np.zeros((0, i.shape[1]), np.float32) for i in session.get_inputs() if i.name not in rows}
        began = time.perf_counter()
        session.run([f"{name}.y" for name, row in rows.items() if len(row)], rows)
        call.seconds = time.perf_counter() - began  # without the making of rows
        return x

    return call


def _openvino(module: Any) -> Call:
    model, run = openvino_program(module)
    return run(model)


def openvino_program(module: Any) -> tuple[Any, Callable[[Any], Call]]:
    """The form that OpenVINO's plugin turns into ``GatherMatmul``, as transformers' exporter writes it; its runner."""
    import openvino
    from transformers.exporters.exporter_openvino import _tiled_experts_forward

    class Tiled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = module

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return _tiled_experts_forward(self.experts, x, ids, weights)

    T = torch.export.Dim("T", min=1, max=4096)
    K, H = module.config.num_experts_per_tok, module.config.hidden_size
    example = torch.randn(6, H), torch.randint(0, K, (6, K)), torch.rand(6, K)
    program = torch.export.export(Tiled(), example, dynamic_shapes=({0: T}, {0: T}, {0: T}))
    config = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip

    def run(model: Any) -> Call:
        compiled = openvino.Core().compile_model(model, "CPU", config)
        request = compiled.create_infer_request()

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            found = request.infer([x.numpy(), ids.numpy(), weights.numpy()], share_inputs=True)
            return torch.from_numpy(found[compiled.outputs[0]])

        return call

    return openvino.convert_model(program), run


PEERS: dict[str, Callable[[Any], Call]] = {
    "transformers": _default,
    "eager": _eager,
    "torch.compile": _compiled,
    "MoE kernel alone": _kernel,
    "MatMuls alone": _products,
    "openvino": _openvino,
}
