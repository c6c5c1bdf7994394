"""What moeopt does for two models, in a few minutes on a laptop: `make demo` runs it.

1. A home-made block whose Python loop over experts ``torch.onnx.export`` cannot export.
2. Qwen3-MoE from transformers, cut to 4 layers of 32 experts (random weights: its sentences say nothing, but each
   multiplication is there), called with what a tokenizer gives.

Each is optimised for PyTorch and as an ONNX Runtime engine, compared with the original, saved, and timed against it.
Every number of the table at the end was measured by the run that prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging as log
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from quickstart import TwoOfEight
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

import moeopt

ROUNDS, NEW_TOKENS, WON = 11, 24, 1.05
BEGAN = time.perf_counter()

WHY = {
    "one token": "one token's time is that of reading its experts' weights, the same bytes in each form",
    "few tokens": "few tokens' time is that of reading their experts' weights, the same bytes in each form",
    "prompt": "a prompt's time is in matrix products, and PyTorch's are as quick on this machine",
}


@dataclass
class Row:
    """What one form of a model showed beside the original."""

    model: str
    form: str
    speed: dict[str, float]
    mebibytes: float
    error: float
    same: str


def say(line: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {line}", flush=True)


def qwen() -> torch.nn.Module:
    """A random Qwen3-MoE whose router has opinions, as a trained one has; `AutoModelForCausalLM.from_pretrained`
    gives yours."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, moe_intermediate_size=384, num_hidden_layers=4,
        num_experts=32, num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        norm_topk_prob=True, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp.gate.weight.mul_(4)
    return model


def clock() -> float:
    """Wall time; with one thread its CPU time, which leaves out the turns of a machine's other tenants."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ratio(original: Callable[[], object], other: Callable[[], object]) -> float:
    """How many times as fast ``other`` is: the median over rounds in which the two take turns."""
    found = []
    for turn in range(ROUNDS + 2):  # the first two warm up
        spent = []
        for call in (original, other):
            start = clock()
            call()
            spent.append(clock() - start)
        if turn > 1:
            found.append(spent[0] / spent[1])
    return statistics.median(found)


def what_torch_exports(model: torch.nn.Module, x: torch.Tensor) -> str:
    """What PyTorch's own exporter says of the model."""
    heard = io.StringIO()  # it prints the whole graph where it stops
    log.disable(log.CRITICAL)
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    except Exception as err:
        first = err.__cause__ or err
        return f"fails ({type(first).__name__}: {str(first).strip().splitlines()[0].split(' (unhinted')[0]})"
    finally:
        log.disable(log.NOTSET)
    return "exports it"


def extra(model: torch.nn.Module, fast: Any, bundle: Path) -> float:
    """MiB that the form holds beside the original model: weights of its own, or an engine's files."""
    if not isinstance(fast.model, torch.nn.Module):
        return sum(f.stat().st_size for f in bundle.iterdir() if ".onnx" in f.name) / 2**20
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    added = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fast.model.state_dict().values()}
    return sum(size for place, size in added.items() if place not in own) / 2**20


def forms(name: str, model: torch.nn.Module, inputs: Any, calls: Callable[[Any], dict[str, Callable[[], object]]],
          same: Callable[[Any], str], folder: Path) -> list[Row]:  # fmt: skip
    """Optimise for both backends, save, load what was saved, and measure it beside the original."""
    rows = []
    for backend, form in (("torch", "PyTorch"), ("onnxruntime", "ONNX engine")):
        say(f"{name}: optimising for {backend}")
        fast = moeopt.optimize(model, inputs, backend=backend, verify="fast", progress=lambda line: say(f"  {line}"))
        print(f"\n{fast.report}\n", flush=True)
        bundle = folder / f"{name.split()[0]}-{backend}"
        say(f"{name}: saving, and checking the saved {form} again")
        fast.save(bundle)
        if not (fast.certificate.passed and moeopt.verify(bundle).passed):
            raise SystemExit(f"{name} on {backend} is NOT equivalent:\n{fast.certificate}")
        say(f"{name}: timing it beside the original")
        before = calls(model)
        speed = {what: ratio(before[what], call) for what, call in calls(fast).items()}
        errors = [block.error for block in fast.report.rewritten if block.error is not None]
        rows.append(Row(name, form, speed, extra(model, fast, bundle), max(errors), same(fast)))
    return rows


def home_made(folder: Path) -> tuple[list[Row], str]:
    model, x = TwoOfEight(hidden=512, intermediate=1024, experts=32).eval(), torch.randn(1, 32, 512)
    say("home-made loop: asking torch.onnx.export")
    exported = what_torch_exports(model, x)
    sizes = {"one token": torch.randn(1, 1, 512), "few tokens": torch.randn(1, 16, 512),
             "prompt": torch.randn(1, 128, 512)}  # fmt: skip

    def calls(one: Any) -> dict[str, Callable[[], object]]:
        return {what: (lambda rows=rows: one(rows)) for what, rows in sizes.items()}

    def same(fast: Any) -> str:
        far = max(float((fast(rows) - model(rows)).norm() / model(rows).norm()) for rows in sizes.values())
        return f"{far:.0e} off"

    return forms("home-made loop", model, x, calls, same, folder), exported


def language_model(folder: Path) -> list[Row]:
    model = qwen()
    ids = torch.randint(1, 4096, (1, 128), generator=torch.Generator().manual_seed(1))
    inputs = {
        "input_ids": ids[:, :32],
        "attention_mask": torch.ones(1, 32, dtype=torch.int64),
    }  # as tokenizer(...) gives

    def calls(one: Any) -> dict[str, Callable[[], object]]:
        def decode(rows: int) -> Callable[[], object]:
            start = ids[:, :64].expand(rows, -1)
            cache = one(input_ids=start, use_cache=True).past_key_values
            return lambda: one(input_ids=start[:, :1], past_key_values=cache, use_cache=True)

        return {"one token": decode(1), "few tokens": decode(16),
                "prompt": lambda: one(input_ids=ids, use_cache=False)}  # fmt: skip

    def tokens(one: Any) -> torch.Tensor:
        return one.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    def same(fast: Any) -> str:
        equal = int((tokens(model) == tokens(fast))[:, 32:].sum())
        return f"{equal} of {NEW_TOKENS}"

    return forms("Qwen3-MoE", model, inputs, calls, same, folder)


def table(rows: list[Row], exported: str) -> str:
    """The table, and below it what was not won, with the reason."""
    sizes = list(rows[0].speed)
    head = f"{'times as fast as the original':32}" + "".join(f"{s:>12}" for s in sizes)
    lines = [head + f"{'extra MiB':>12}{'error':>10}{'same':>13}"]
    for row in rows:
        speeds = "".join(f"{row.speed[s]:>11.2f}x" for s in sizes)
        lines.append(f"{row.model + ', ' + row.form:32}{speeds}{row.mebibytes:>12.0f}{row.error:>10.0e}{row.same:>13}")
    lines += [
        "",
        "one token, few tokens (16), prompt (128): the home-made block's rows; Qwen3-MoE decodes 1 or 16 rows, or",
        "reads a prompt. extra MiB: what the form holds beside the original's weights. error: worst token's distance",
        "from a float64 oracle. same: greedy tokens that are equal, or how far the outputs are from the original's.",
        f"Medians of {ROUNDS} paired calls, float32, {torch.get_num_threads()} thread(s).",
        f"torch.onnx.export of the home-made loop: {exported}.",
    ]  # fmt: skip
    lost = [(row, size) for row in rows for size in sizes if row.speed[size] < WON]
    for size in dict.fromkeys(size for _, size in lost):
        where = ", ".join(f"{r.model} on {r.form} ({r.speed[size]:.2f}x)" for r, s in lost if s == size)
        lines.append(f"Not won: {size}, {where}: {WHY[size]}.")
    return "\n".join(
        lines if lost else [*lines, "Not won: nothing in this run; a dense model gains nothing, and is left alone."]
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is timed by CPU time, more by wall time")
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        rows, exported = home_made(Path(name))
        rows += language_model(Path(name))
    say("done\n")
    print(table(rows, exported))


if __name__ == "__main__":
    main()
