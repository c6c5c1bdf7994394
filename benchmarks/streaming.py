"""What streaming a checkpoint takes beside loading it: anonymous memory, seconds, bytes on disk; and what running the
bundle with a part of its experts in memory gives.

    python benchmarks/streaming.py --gigabytes 3 --folder /var/tmp/streaming            stream and load, both measured
    python benchmarks/streaming.py --gigabytes 12 --folder /var/tmp/streaming --only streamed
    python benchmarks/streaming.py --gigabytes 3 --folder ... --resident 0.5            then decode with half resident
    python benchmarks/streaming.py --gigabytes 2 --folder ... --hidden 2048 --backend onnxruntime     real layer widths

The checkpoint is synthetic: Qwen3-MoE in bfloat16 with 128 experts of ``--hidden`` x 768, as many layers as fill the
size, a tensor for each expert, a file for each layer. ``--hidden 2048`` gives the layers of Qwen3-30B-A3B. Each
measurement is a fresh process; memory is RssAnon, sampled each 10 ms: what a process has for itself, pages of files not
counted; bytes are those that left and reached the disk. The result is written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
I, E, K, VOCABULARY = 768, 128, 8, 32000


def layer_bytes(H: int) -> int:
    """Bytes of one layer's experts."""
    return 3 * E * H * I * 2


def write_checkpoint(folder: Path, layers: int, H: int = 1024) -> None:
    """A checkpoint of ``layers`` layers of hidden size ``H``; what is there already is kept."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=H, intermediate_size=I, moe_intermediate_size=I, num_hidden_layers=layers,
        num_experts=E, num_experts_per_tok=K, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Any:
        return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).bfloat16()

    where: dict[str, str] = {}
    one = torch.ones(H, dtype=torch.bfloat16)
    for number in range(layers + 1):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        if number == layers:
            tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, H), "lm_head.weight": matrix(VOCABULARY, H)}
            tensors["model.norm.weight"] = one
        else:
            at = f"model.layers.{number}."
            tensors = {f"{at}{name}_layernorm.weight": one.clone() for name in ("input", "post_attention")}
            for name, rows, columns in (("q", 1024, H), ("k", 256, H), ("v", 256, H), ("o", H, 1024)):
                tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, columns)
            tensors |= {f"{at}self_attn.{n}_norm.weight": torch.ones(64, dtype=torch.bfloat16) for n in ("q", "k")}
            tensors[f"{at}mlp.gate.weight"] = matrix(E, H)
            for e in range(E):
                for name, rows, columns in (("gate", I, H), ("up", I, H), ("down", H, I)):
                    tensors[f"{at}mlp.experts.{e}.{name}_proj.weight"] = matrix(rows, columns)
        where |= dict.fromkeys(tensors, file)
        if not (folder / file).is_file():
            save_file(tensors, folder / "part", metadata={"format": "pt"})
            os.replace(folder / "part", folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


class Watch:
    """The most anonymous memory of this process, in all and by the step that was last said."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}
        self.started, self.step, self.done = time.perf_counter(), "start", False
        self.before, self.io = anonymous(), disk_bytes()
        threading.Thread(target=self._look, daemon=True).start()

    def say(self, line: str) -> None:
        words = line.split()
        self.step = " ".join(words[:1] if words[0] in ("layer", "block", "streaming") else words[:4])
        print(f"{time.perf_counter() - self.started:8.1f} s  {line}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        while not self.done:
            seen = self.steps.setdefault(self.step, {"anonymous_gb": 0.0, "until_s": 0.0})
            seen["anonymous_gb"] = max(seen["anonymous_gb"], anonymous() / 1e9)
            seen["until_s"] = time.perf_counter() - self.started
            time.sleep(0.01)

    def result(self) -> dict[str, Any]:
        self.done = True
        read, written = (now - then for now, then in zip(disk_bytes(), self.io, strict=True))
        return {
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time(),
            "disk_read_gb": read / 1e9,
            "disk_written_gb": written / 1e9,
            "anonymous_before_gb": self.before / 1e9,
            "anonymous_peak_gb": max(step["anonymous_gb"] for step in self.steps.values()),
            "steps": self.steps,
        }


def anonymous() -> int:
    """Bytes of this process's own memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process made the disk read and write so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def streamed(source: Path, out: Path, backend: str, verify: str) -> dict[str, Any]:
    import moeopt

    watch = Watch()
    made = moeopt.optimize(source, out=out, backend=backend, verify=verify, progress=watch.say)
    return _judged(watch.result(), made, out)


def loaded(source: Path, out: Path, backend: str, verify: str) -> dict[str, Any]:
    import transformers

    import moeopt
    from moeopt.find.example_inputs import made_up

    watch = Watch()
    watch.say("loading everything")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    inputs = made_up(model, 0)[1]
    made = moeopt.optimize(model, inputs, backend=backend, verify=verify, progress=watch.say)
    watch.say("saving")
    made.save(out)
    return _judged(watch.result(), made, out)


def _judged(figures: dict[str, Any], made: Any, out: Path) -> dict[str, Any]:
    return {
        **figures,
        "rewritten": len(made.report.rewritten),
        "passed": made.certificate.passed,
        "bundle_gb": sum(file.stat().st_size for file in out.iterdir()) / 1e9,
    }


def decoded(out: Path, share: float, tokens: int) -> dict[str, Any]:
    """Single tokens through a bundle of which ``share`` of the experts' bytes may be in memory."""
    import torch

    import moeopt

    total = sum(view.numel() * view.element_size() for view in _experts(moeopt.load(out)))
    watch = Watch()
    engine = moeopt.load(out, resident=int(total * share))
    draw = torch.Generator().manual_seed(1)
    started = time.perf_counter()
    for _ in range(tokens):
        engine(input_ids=torch.randint(0, VOCABULARY, (1, 1), generator=draw), use_cache=False)
    seconds = time.perf_counter() - started
    found, really = engine.residency, engine._resident.measured()
    return {
        **watch.result(), "experts_gb": total / 1e9, "share": share, "tokens": tokens, "seconds_decoding": seconds,
        "hit_rate": found.hit_rate, "mb_read_a_token": found.bytes_read_per_token / 1e6,
        "seconds_lost": found.seconds_lost, "resident_gb_by_mincore": really / 1e9, "enforced": found.enforced,
    }  # fmt: skip


def _experts(engine: Any) -> list[Any]:
    return [matrix for layer in engine._runner.expert_layers() for expert in layer for matrix in expert]


def in_fresh_process(*words: str) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        return {"failed": done.returncode}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    import torch
    import transformers

    import moeopt

    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu, "cores": os.cpu_count(), "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "load_average": os.getloadavg(), "kernel": platform.release(),
        "versions": {"moeopt": moeopt.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "transformers": transformers.__version__},
    }  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--gigabytes", type=float, default=3.0)
    words.add_argument("--folder", type=Path, required=True, help="where checkpoint and bundles go")
    words.add_argument("--backend", default="torch")
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--verify", default="fast")
    words.add_argument("--only", choices=["streamed", "loaded"])
    words.add_argument("--resident", type=float, help="share of the experts that may be in memory, when decoding")
    words.add_argument("--tokens", type=int, default=32)
    words.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = words.parse_args()
    told = [word.replace(str(given.folder), "FOLDER") for word in sys.argv[1:]]
    layer = layer_bytes(given.hidden)
    layers = max(round(given.gigabytes * 1e9 / layer), 1)
    source, bundle = given.folder / f"qwen3-like-{layers}x{given.hidden}", given.folder / f"bundle-{given.backend}"
    if given.run is not None:
        what, out = given.run
        if what == "decoded":
            print(json.dumps(decoded(Path(out), given.resident, given.tokens)))
        else:
            print(
                json.dumps(
                    {"streamed": streamed, "loaded": loaded}[what](source, Path(out), given.backend, given.verify)
                )
            )
        return
    print(f"writing {layers} layers of {layer / 1e9:.2f} GB", file=sys.stderr)
    write_checkpoint(source, layers, given.hidden)
    options = [f"--gigabytes={given.gigabytes}", f"--folder={given.folder}", f"--backend={given.backend}",
               f"--verify={given.verify}", f"--tokens={given.tokens}", f"--hidden={given.hidden}"]  # fmt: skip
    found: dict[str, Any] = {
        "what": "streaming", "command": " ".join(["python", "benchmarks/streaming.py", *told]), **machine(),
        "layers": layers, "layer_gb": layer / 1e9, "hidden": given.hidden,
        "checkpoint_gb": sum(file.stat().st_size for file in source.iterdir()) / 1e9,
    }  # fmt: skip
    for what in ("streamed", "loaded"):
        if given.only in (None, what):
            shutil.rmtree(bundle, ignore_errors=True)
            found[what] = in_fresh_process("--run", what, str(bundle), *options)
    if given.resident is not None:
        found["decoded"] = in_fresh_process("--run", "decoded", str(bundle), f"--resident={given.resident}", *options)
    if {"streamed", "loaded"} <= found.keys() and not {"failed"} & (found["streamed"].keys() | found["loaded"].keys()):
        for figure in ("anonymous_peak_gb", "seconds", "cpu_seconds"):
            found[f"{figure}_ratio"] = found["streamed"][figure] / found["loaded"][figure]
    wide = "" if given.hidden == 1024 else f"-hidden-{given.hidden}"
    target = RESULTS / f"streaming-{given.backend}-{round(found['checkpoint_gb'])}gb{wide}.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k not in ("streamed", "loaded")}, indent=1))
    print(f"written: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
