"""Ways to run one language model on a CPU, each in a process of its own: what ``onnx_models.py`` compares.

All build the same model from the same seed.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from benchmarks.processes import Facts

MODELS = {
    "qwen3-like": dict(layers=6, experts=32, top_k=4, hidden=512, inner=384, vocab=32000),
    "mixtral-like": dict(layers=6, experts=8, top_k=2, hidden=512, inner=1792, vocab=32000),
    "tiny": dict(layers=2, experts=4, top_k=2, hidden=64, inner=32, vocab=1000),
    "export-cost": dict(layers=12, experts=32, top_k=4, hidden=512, inner=384, vocab=32000),
    "small-but-many": dict(layers=48, experts=128, top_k=8, hidden=64, inner=32, vocab=1000),
}

Step = Callable[..., object]


def make(name: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    m = MODELS[name]
    common = dict(
        hidden_size=m["hidden"], num_hidden_layers=m["layers"], num_experts_per_tok=m["top_k"], vocab_size=m["vocab"],
        num_attention_heads=8, num_key_value_heads=4, head_dim=m["hidden"] // 8, max_position_embeddings=4096,
    )  # fmt: skip
    if name == "mixtral-like":
        config = MixtralConfig(**common, intermediate_size=m["inner"], num_local_experts=m["experts"])
    else:
        config = Qwen3MoeConfig(
            **common, intermediate_size=4 * m["hidden"], moe_intermediate_size=m["inner"], num_experts=m["experts"],
            decoder_sparse_step=1,
        )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def transformers(model: torch.nn.Module, facts: Facts) -> Step:
    return model


def eager(model: torch.nn.Module, facts: Facts) -> Step:
    model.set_experts_implementation("eager")
    return model


def compiled(model: torch.nn.Module, facts: Facts) -> Step:
    return torch.compile(model, dynamic=True)


def moeopt(model: torch.nn.Module, facts: Facts) -> Step:
    """The engine, exported and then loaded from its bundle, as a server would."""
    import moeopt

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before, began = peak_bytes(), time.perf_counter()
    opt = moeopt.optimize(model, {"input_ids": example(model)}, backend="onnxruntime", verify="off")
    facts["export and load, s"] = time.perf_counter() - began
    facts["peak beside the model, in weights"] = (peak_bytes() - before) / weights
    print(f"lowering: {opt.report.blocks[0].lowering}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        opt.save(folder + "/engine")
        del opt
        began = time.perf_counter()
        engine = moeopt.load(folder + "/engine")
        facts["load a saved bundle, s"] = time.perf_counter() - began
    return engine


def exporter(model: torch.nn.Module, facts: Facts) -> Step:
    """transformers' own ONNX exporter with its fusions: one graph for prompts and single tokens, as moeopt's."""
    import onnxruntime
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    began = time.perf_counter()
    exported = OnnxExporter().export_for_generation(
        model, _generation_sample(), OnnxConfig(dynamic=True, ort_fusions="cpu"), multi_token_decode=True
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    exported.to(session_options=options)
    model_config, heads = model.config, model.config.num_key_value_heads
    facts["export and load, s"] = time.perf_counter() - began
    runner, takes = exported.runners["decode"], set(exported.runners["decode"].metadata.kwargs)

    def step(**kwargs: object) -> object:
        cache = kwargs["past_key_values"]
        for layer in cache.layers:
            if not layer.is_initialized:  # its graph wants keys and values of no tokens, not their absence
                nothing = torch.empty(len(kwargs["input_ids"]), heads, 0, model_config.head_dim)
                layer.lazy_initialization(nothing, nothing)
                layer.keys, layer.values = nothing, nothing
        return runner(**{name: value for name, value in kwargs.items() if name in takes})

    return step


def openvino(model: torch.nn.Module, facts: Facts) -> Step:
    """transformers' OpenVINO exporter; its cache stays inside, emptied before each prompt."""
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter
    from transformers.exporters.utils import openvino_feed

    began = time.perf_counter()
    exported = OpenVINOExporter().export_for_generation(
        model, _generation_sample(), OpenVINOConfig(dynamic=True), multi_token_decode=True
    )
    # its default on CPUs with AMX is bfloat16; everyone else here computes in float32
    precise = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    exported.to("cpu", config=precise)
    facts["export and load, s"] = time.perf_counter() - began
    compiled, request = exported.runners["decode"].compiled_model, exported.runners["decode"].request

    def step(**kwargs: object) -> object:
        cache = kwargs.pop("past_key_values")
        if kwargs["attention_mask"].shape == kwargs["input_ids"].shape:
            request.reset_state()
        # not through the runner: it looks for the cache among the outputs, and it is inside (transformers 5.23)
        found = request.infer(openvino_feed(compiled, kwargs), share_inputs=True, share_outputs=True)
        return SimpleNamespace(logits=torch.from_numpy(found[compiled.outputs[0]]), past_key_values=cache)

    return step


PEERS = {
    "transformers": transformers,
    "moeopt": moeopt,
    "exporter": exporter,
    "openvino": openvino,
    "eager": eager,
    "torch.compile": compiled,
}


def example(model: torch.nn.Module) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


def _generation_sample() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}


def clock() -> float:
    """Wall time; with one thread its CPU time, which leaves out the turns of a machine's other tenants."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peer(facts: Facts, name: str, model_name: str) -> Callable[..., tuple[float, torch.Tensor]]:
    """``(batch, new, past, turn) -> (seconds, last logits)``: a prompt of ``new`` tokens, or a step on a cache."""
    from transformers import DynamicCache

    model = make(model_name)
    call = PEERS[name](model, facts)
    config, vocab = model.config, model.config.vocab_size
    if name not in ("transformers", "eager", "torch.compile"):
        del model  # engines hold their own weights
    caches: dict[tuple[int, int, int], object] = {}

    def answer(batch: int, new: int, past: int, turn: int) -> tuple[float, torch.Tensor]:
        key = (batch, new, past)
        if past and key not in caches:
            caches.clear()
            prompt = torch.randint(0, vocab, (batch, past), generator=torch.Generator().manual_seed(10**6))
            caches[key] = _call(call, prompt, DynamicCache(config=config), 0).past_key_values
        cache = caches[key] if past else DynamicCache(config=config)
        ids = torch.randint(0, vocab, (batch, new), generator=torch.Generator().manual_seed(turn))
        began = clock()
        result = _call(call, ids, cache, past + turn if past else 0)
        took = clock() - began
        if past:
            caches[key] = result.past_key_values
        return took, result.logits[:, -1].double()

    return answer


def _call(call: Step, ids: torch.Tensor, cache: object, past: int) -> object:
    """As ``generate`` calls it: logits of the last token only."""
    batch, new = ids.shape
    return call(
        input_ids=ids,
        attention_mask=torch.ones(batch, past + new, dtype=torch.int64),
        position_ids=torch.arange(past, past + new).expand(batch, new),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
