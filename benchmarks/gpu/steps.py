"""The steps of ``gpu_day.py``: what this machine is, what its libraries do, what is right, and how long it takes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.blocks import SHAPES, TINY, Block, block, floor, own_loop
from benchmarks.gpu.timing import in_a_graph, kernels, microseconds, told, tried, waits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODULES = ("numpy", "triton", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "vllm")


def machine(device: str) -> None:
    """Versions, the GPU, its measured bandwidth and FLOPs, and what moeopt says of it."""
    versions = {}
    for name in MODULES:
        try:
            versions[name] = importlib.import_module(name).__version__
        except Exception as err:  # noqa: BLE001  absent or broken is a result
            versions[name] = type(err).__name__
    gpu = (
        {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        if device == "cuda"
        else {}
    )
    told("machine", "versions", python=sys.version.split()[0], torch=torch.__version__, **versions, **gpu)
    told("machine", "bandwidth", bytes_per_s=_bandwidth(device))
    for dtype in DTYPES:
        told("machine", f"matmul {dtype}", flops_per_s=_flops(device, dtype))
    info = subprocess.run([sys.executable, "-m", "moeopt", "info"], capture_output=True, text=True, timeout=50)
    told("machine", "moeopt info", ok=info.returncode == 0, text=(info.stdout + info.stderr)[-2000:])


def _bandwidth(device: str) -> float:
    a, b = (
        torch.zeros((1 << 30) if device == "cuda" else (1 << 20), dtype=torch.int32, device=device) for _ in range(2)
    )
    return 2 * a.nbytes / microseconds(device, lambda: b.copy_(a)) * 1e6


def _flops(device: str, dtype: torch.dtype) -> float:
    n = 8192 if device == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / microseconds(device, lambda: a @ b, 7) * 1e6


def facts(device: str) -> None:
    """Which paths wait for the host and which can be captured in a CUDA graph."""
    g = torch.Generator(device=device).manual_seed(0)  # its own: see in_a_graph
    for dtype in DTYPES:
        a, w = (torch.randn(shape, generator=g, device=device).to(dtype) for shape in ((64, 128), (8, 256, 128)))
        offs = torch.arange(8, 65, 8, dtype=torch.int32, device=device)
        _fact(device, f"grouped_mm {dtype}", lambda a=a, w=w, o=offs: F.grouped_mm(a, w.transpose(-2, -1), offs=o))
        for T in (2, 64):
            b = block(8, 2, 128, 256, T, dtype, device)
            for name, call in _ways(b).items():
                _fact(device, f"{name}, {T} tokens, {dtype}", call)


def _fact(device: str, name: str, call: Callable[[], Any]) -> None:
    tried("facts", name, lambda: {
        "waits": waits(device, call), "graph us": in_a_graph(device, call), "kernels": kernels(device, call),
        "us": microseconds(device, call),
    })  # fmt: skip


def _ways(b: Block) -> dict[str, Callable[[], torch.Tensor]]:
    """The experts op on the two kinds of weights, by each of its paths that can take them."""
    from moeopt.ir.specs import ExpertsSpec
    from moeopt.ops import experts
    from moeopt.ops.kernels.cuda import experts_grouped, experts_loop

    joined, separate = ExpertsSpec(), ExpertsSpec(rows="separate", combine="expert")

    def quiet(call: Callable[..., torch.Tensor], *args: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return call(b.x, b.ids, b.weights, *args)

        return run

    return {
        "moeopt stacked": quiet(experts, b.stacked, joined),
        "moeopt separate": quiet(experts, b.separate, separate),
        "grouped_mm path": quiet(experts_grouped, b.stacked, joined),
        "loop path": quiet(experts_loop, b.separate, separate),
    }


def right(device: str) -> None:
    """Certificates of blocks and of small models of five families; compile, save, verify, gradients."""
    import moeopt
    from tests.gpu.blocks import mixture, tokens

    if device == "cuda":
        from moeopt.ops.triton.library import why_not

        told(
            "right",
            "the Triton kernels",
            ok=not why_not(torch.device("cuda:0")),
            reason=why_not(torch.device("cuda:0")),
        )

    def one(dtype: torch.dtype) -> dict[str, Any]:
        model, x = mixture(dtype).to(device), tokens(24, dtype).to(device)
        opt = moeopt.optimize(model, x)
        again = moeopt.verify(opt.save(tempfile.mkdtemp() + "/bundle"))
        with torch.no_grad():
            compiled = torch.compile(opt.model, dynamic=True, mode="reduce-overhead")(x) if device == "cuda" else opt(x)
            far = ((compiled - model(x)).double().norm() / model(x).double().norm()).item()
        return {
            "ok": bool(opt.certificate.passed and again.passed),
            "compiled is off by": far,
            "report": str(opt.report),
        }

    def gradient() -> dict[str, Any]:
        model, x = mixture(torch.float32).to(device), tokens(24, torch.float32).to(device)
        opt = moeopt.optimize(model, x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        opt.model(a).sum().backward()
        model(b).sum().backward()
        return {"off by": ((a.grad - b.grad).norm() / b.grad.norm()).item()}

    for dtype in DTYPES:
        tried("right", f"a home-made block, {dtype}", lambda dtype=dtype: one(dtype))
    tried("right", "gradient", gradient)
    for name, more in FAMILIES[: 1 if device == "cpu" else None]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            tried("right", f"{name} {dtype}", lambda n=name, m=more, d=dtype: _family(n, m, d, device))


SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3MoeConfig", dict(moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, head_dim=16)),
    ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16)),
    ("OlmoeConfig", dict(num_experts=8, num_experts_per_tok=2)),
    ("DeepseekV3Config", dict(
        moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, v_head_dim=16,
        qk_nope_head_dim=16, first_k_dense_replace=1,
    )),
]  # fmt: skip


def _family(name: str, more: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    import transformers

    import moeopt

    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(device, dtype)
    ids = torch.arange(1, 25, device=device).reshape(2, 12)
    opt = moeopt.optimize(model, {"input_ids": ids}, verify="fast")
    prompt = ids[:1, :6]
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    same = torch.equal(opt.generate(prompt, **how), model.generate(prompt, **how))
    return {"ok": bool(opt.certificate.passed), "tokens equal": same, "blocks": [b.status for b in opt.report.blocks]}


def layer(device: str) -> None:
    """One layer's experts in bfloat16: the model's own loop, each path of moeopt, vLLM's where it is installed."""
    rate, peak = _bandwidth(device), _flops(device, torch.bfloat16)
    for name, shape in (SHAPES if device == "cuda" else TINY).items():
        for T in (1, 4, 16, 64, 512, 4096) if device == "cuda" else (1, 40):
            b = block(*shape, T, torch.bfloat16, device)
            row: dict[str, Any] = {"T": T, **floor(b, rate, peak)}
            times = 5 if T >= 512 else 11
            want = own_loop(b).double()
            row["the model's own loop"] = microseconds(device, lambda b=b: own_loop(b), times)
            for way, call in {**_ways(b), **_vllm(b)}.items():
                try:
                    off = ((call().double() - want).norm() / want.norm()).item()
                    row[way] = {
                        "us": microseconds(device, call, times),
                        "graph us": in_a_graph(device, call),
                        "off by": off,
                    }
                except Exception as err:  # noqa: BLE001  a path that fails is a result
                    row[way] = f"{type(err).__name__}: {err}"[:120]
            told("layer", name, **row)


def _vllm(b: Block) -> dict[str, Callable[[], torch.Tensor]]:
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except Exception:  # noqa: BLE001  not installed, or not for this torch
        return {}
    weights, ids = b.weights.float(), b.ids.to(torch.int32)
    return {"vLLM fused_experts": lambda: fused_experts(b.x, b.stacked.w_in_s[0], b.stacked.w_out_s, weights, ids)}


def model(device: str) -> None:
    """A Qwen3-MoE-like language model in bfloat16: transformers' three ways and moeopt; prompt, one token, memory."""
    import transformers

    import moeopt

    config = dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True,
    )  # fmt: skip
    if device == "cpu":
        config.update(hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_experts=8, vocab_size=256)
        config.update(num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3MoeConfig(**config), dtype=torch.bfloat16
        ).eval()
    ids = torch.randint(0, config["vocab_size"], (1, 512 if device == "cuda" else 32), device=device)

    def times(run: Callable[..., Any]) -> dict[str, float]:
        with torch.no_grad():
            return {
                "prompt us": microseconds(device, lambda: run(input_ids=ids, use_cache=False), 7),
                "one token us": microseconds(device, lambda: run(input_ids=ids[:, :1], use_cache=False)),
                "16 tokens us": microseconds(
                    device, lambda: run(input_ids=ids[:, :16].reshape(-1, 1), use_cache=False)
                ),
            }

    def theirs(way: str) -> dict[str, Any]:
        made.set_experts_implementation(way)
        return times(made)

    for way in ("eager", "batched_mm", "grouped_mm"):
        tried("model", f"transformers {way}", lambda way=way: theirs(way))

    def ours() -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.time()
        opt = moeopt.optimize(made, {"input_ids": ids[:, :64], "use_cache": False}, verify="fast")
        seconds = time.time() - started
        return {
            "optimise s": round(seconds, 1), "passed": opt.certificate.passed, **times(opt),
            "weights bytes": sum(p.nbytes for p in made.parameters()),
            "peak bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }  # fmt: skip

    tried("model", "moeopt", ours)


def runtime(device: str) -> None:
    """ONNX Runtime's CUDA provider, by the suite's own tests, where onnxruntime-gpu is installed."""
    if device == "cpu":
        told("runtime", "onnxruntime-gpu", skipped="no GPU")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "tests/ops/test_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    told("runtime", "tests/gpu", ok=done.returncode == 0, text=done.stdout[-2000:])
