"""Qwen3-MoE from transformers, optimised: report, certificate, the same tokens, and what it saves. `make demo` runs it.

The architecture is the library's own and the block has a published shape cut to fit a laptop (hidden 1024,
32 experts, top 4, expert width 512, 4 layers); the weights are random, so its sentences say nothing, but each
multiplication is there. The model is saved and loaded again first, as a user would meet it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

import moeopt

PREFILL, NEW_TOKENS, ROUNDS = 256, 24, 9


def checkpoint(folder: str) -> None:
    """Save a random Qwen3-MoE whose router has opinions, as a trained one has."""
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=4,
        num_experts=32, num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
        norm_topk_prob=True, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(4)
    model.save_pretrained(folder)


def load(folder: str, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    """The saved model with one of the library's own ways to run experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=implementation)
    return model.eval()


def clock() -> float:
    """Wall time; with one thread its CPU time, which leaves out the turns of a machine's other tenants."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so a busy moment of the machine hits all of them."""
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = clock()
            call()
            spent[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def prefill(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """All tokens at once."""
    return lambda: model(input_ids=ids, use_cache=False)


def decode(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """One more token after 32 that are in the cache (and those of the calls before)."""
    cache = model(input_ids=ids[:, :32], use_cache=True).past_key_values
    return lambda: model(input_ids=ids[:, 32:33], past_key_values=cache, use_cache=True)


def generate(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Greedy tokens."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def demonstrate(folder: str, dtype: torch.dtype) -> bool:
    """Optimise the saved model in one dtype; print what was done and what it saves; True where all is equivalent."""
    models = {name: load(folder, name, dtype) for name in ("eager", "grouped_mm")}
    model = models["grouped_mm"]  # what the library chooses by itself
    count = sum(p.numel() for p in model.parameters()) / 1e6
    short = str(dtype).removeprefix("torch.")
    print(f"== {type(model).__name__}, {count:.0f} M parameters, {short}, {torch.get_num_threads()} thread(s)\n")

    ids = torch.randint(8192, (1, PREFILL), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    fast = moeopt.optimize(model, {"input_ids": ids[:, :32]})
    print(fast.report, fast.certificate, sep="\n\n", end="\n\n")
    print(f"optimised and verified in {time.perf_counter() - start:.1f} s")

    same = torch.equal(generate(model, ids[:, :32]), generate(fast.model, ids[:, :32]))
    print(f"generate(), greedy, {NEW_TOKENS} tokens after 32: {'the same tokens' if same else 'OTHER TOKENS'}\n")

    models["moeopt"] = fast.model
    print(f"{'milliseconds, median':22}" + "".join(f"{name:>21}" for name in models))
    for title, make in ((f"prefill, {PREFILL} tokens", prefill), ("decode, 1 token", decode)):
        spent = medians({name: make(one, ids) for name, one in models.items()})
        cells = (f"{1e3 * s:>13.1f} ({s / spent['moeopt']:4.2f}x)" for s in spent.values())
        print(f"{title:22}{''.join(cells)}")
    print("(in brackets: how many times as long as moeopt)\n", flush=True)
    # in 16 bits another order of the same sums may turn a near tie between two tokens; float32 leaves no excuse
    return bool(fast.certificate.passed) and (same or dtype != torch.float32)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is timed by CPU time, more by wall time")
    torch.set_num_threads(parser.parse_args().threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(folder)
        results = [demonstrate(folder, dtype) for dtype in (torch.float32, torch.bfloat16)]
    if not all(results):
        raise SystemExit("the optimised model is NOT equivalent")


if __name__ == "__main__":
    main()
