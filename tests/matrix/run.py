"""The core of the suite on other versions of torch and transformers; `make test-matrix` runs it.

Each corner is an environment of its own under build/matrix, made by pip where it is not there yet, when its turn comes;
what each gave is written to tests/matrix/results.json, from which the table of docs/start.md is made (`--table` prints
it). A corner whose Python is not on this machine is left out, with a sentence.

torch's wheels of the registry are CUDA builds of some gigabytes with what they bring: `--index-url` names another index
with the CPU builds, `--only` takes the corners whose name holds a word, and `--clear` removes each environment after
its run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
CORE = [
    "tests/test_api.py", "tests/test_hugging_face.py", "tests/backends/torch/test_transformers_adapter.py",
    "tests/rewrite/test_frozen_values.py", "tests/ops/test_experts.py", "tests/causal_lm/test_constant_reads.py",
]  # fmt: skip
CORNERS = {
    "oldest-torch": ("torch==2.11.*", "transformers==5.23.*"),
    "oldest-transformers": ("torch==2.13.*", "transformers==4.57.*"),
    "transformers-5.15": ("torch==2.13.*", "transformers==5.15.*"),
    "transformers-5.17": ("torch==2.13.*", "transformers==5.17.*"),
    "transformers-5.21": ("torch==2.13.*", "transformers==5.21.*"),
    "torch-2.12": ("torch==2.12.*", "transformers==5.23.*"),
    "torch-2.14": ("torch==2.14.*", "transformers==5.19.*"),
    "newest-torch": ("torch==2.15.*", "transformers==5.23.*"),
    "main": ("torch==2.13.*", "transformers==5.23.*"),
    "newest-transformers": ("torch==2.13.*", "transformers"),
    "oldest-onnxruntime": ("torch==2.13.*", "transformers==5.23.*", "onnxruntime==1.31.*"),
    "python-3.12": ("torch==2.13.*", "transformers==5.23.*"),
    "newest-python": ("torch==2.13.*", "transformers==5.23.*"),
}
"""By name: torch, and what else its environment gets."""
PYTHONS = {"python-3.12": "3.12", "newest-python": "3.13"}
"""The corners of another Python than this one. ONNX Runtime has none of its tested versions for 3.10."""
VERSIONS = (
    "import json, platform, sys; from importlib.metadata import version as v; "
    "print(json.dumps({'python': platform.python_version(), **{n: v(n) for n in "
    "('torch', 'transformers', 'onnxruntime')}}))"
)


def interpreter(version: str) -> str | None:
    """A Python of this version that runs, on the path or among pyenv's; None where there is none."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{version}.*/bin/python")
    for python in (shutil.which(f"python{version}"), *sorted(of_pyenv)):  # pyenv's own shims may answer "not found"
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return str(python)
    return None


def environment(name: str, index: str | None) -> Path | None:
    """The corner's interpreter; its environment is made where there is none. None without a Python of its version."""
    home = ROOT / "build" / "matrix" / name
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        made_by = interpreter(PYTHONS[name]) if name in PYTHONS else sys.executable
        if made_by is None:
            print(f"{name}: left out, there is no Python {PYTHONS[name]} on this machine", flush=True)
            return None
        print(f"{name}: its environment is made", flush=True)
        torch, *others = CORNERS[name]
        subprocess.run([made_by, "-m", "venv", home], check=True)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, torch, *(["--index-url", index] if index else [])], check=True)
        subprocess.run([*pip, *others, "-e", f"{ROOT}[test,onnxruntime,report]"], check=True)
        (home / ".ready").touch()
    return python


def run(python: str | Path, tests: list[str], timeout: int) -> dict[str, object]:
    """Versions of an interpreter's environment, and how many tests passed, failed and were skipped in it."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **one}
    said = subprocess.run([python, "-c", VERSIONS], env=env, capture_output=True, text=True, check=True)
    words = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not nightly", *tests]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    last = done.stdout.strip().splitlines()[-1]
    print(last, *[line for line in done.stdout.splitlines() if line.startswith("FAILED")], sep="\n  ", flush=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + (done.returncode not in (0, 1))
    return json.loads(said.stdout) | {
        "passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)
    }  # fmt: skip


def table(runs: list[dict[str, object]]) -> str:
    """The runs as the rows of docs/start.md."""
    lines = ["| torch | transformers | onnxruntime | Python | core of the suite |", "|---|---|---|---|---|"]
    for r in runs:
        counts = f"{r['passed']} passed, {r['failed']} failed, {r['skipped']} skipped"
        lines.append(f"| {r['torch']} | {r['transformers']} | {r['onnxruntime']} | {r['python']} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the corners whose name holds this word")
    parser.add_argument("--index-url", help="an index with torch's CPU builds")
    parser.add_argument("--python", help="run in this interpreter's environment instead, as it is")
    parser.add_argument("--clear", action="store_true", help="remove each environment after its run")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for a corner")
    parser.add_argument("--table", action="store_true", help="print the table of what was run, and stop")
    chosen = parser.parse_args()
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if chosen.table:
        print(table(runs))
        return
    for name in [""] if chosen.python else [name for name in CORNERS if chosen.only in name]:
        python = chosen.python or environment(name, chosen.index_url)
        if python is None:
            continue
        made = run(python, CORE, chosen.timeout)
        if chosen.clear and name:
            shutil.rmtree(ROOT / "build" / "matrix" / name)
        key = ("torch", "transformers", "onnxruntime", "python")
        runs = [r for r in runs if any(r[k] != made[k] for k in key)] + [made]
        runs.sort(key=lambda r: [tuple(int(n) for n in re.findall(r"\d+", str(r[k]))[:3]) for k in key])
        RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))
    if any(r["failed"] for r in runs):
        raise SystemExit("a corner failed")


if __name__ == "__main__":
    main()
