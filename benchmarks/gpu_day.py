"""Everything that only a GPU can tell, in steps that stop by themselves; needs no package registry and no install.

    python benchmarks/gpu_day.py all [--device cpu] [--out DIR]     all steps, in under 14 minutes
    python benchmarks/gpu_day.py first | second                      the two halves, each in under 7 minutes
    python benchmarks/gpu_day.py facts                               one step
    python benchmarks/gpu_day.py table [--out DIR]                   the results of DIR/gpu-day.json as Markdown

Each step runs in a process of its own with a time limit, and the results so far are written after each:
``DIR/gpu-day.json``, {"results": [{"step", "name", "ok", ...}]}. ``--device cpu`` runs the same steps
with tiny sizes on a machine without a GPU, so that the script cannot rot; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"machine": 60, "facts": 90, "right": 200, "layer": 240, "model": 105, "runtime": 65}
"""Seconds for each step; ``first`` is the first three, ``second`` the rest: ``CALL`` at most for each half."""
CALL = 420
HALVES = {"all": list(LIMITS), "first": list(LIMITS)[:3], "second": list(LIMITS)[3:]}
MARK = "RESULT "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*HALVES, *LIMITS, "table"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if chosen.step == "table":
        from benchmarks.gpu.table import rendered

        print(rendered(json.loads((chosen.out / "gpu-day.json").read_text())["results"]), end="")
        return 0
    if chosen.step in LIMITS:
        from benchmarks.gpu import steps

        getattr(steps, chosen.step)(chosen.device)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    for step in HALVES[chosen.step]:
        started = time.time()
        code = _run(step, chosen.device, results)
        results.append(
            {"step": step, "name": "the step", "ok": code == 0, "rc": code, "s": round(time.time() - started)}
        )
        (chosen.out / "gpu-day.json").write_text(json.dumps({"results": results}, indent=1))
        print(f"{step}: {'done' if code == 0 else code}, {time.time() - started:.0f} s", flush=True)
    failed = [r for r in results if not r.get("ok", True)]
    for result in failed:
        print(json.dumps(result)[:800])
    return 1 if failed else 0


def _run(step: str, device: str, results: list[dict[str, object]]) -> int | str:
    """Run one step; its results are added as they were printed, also those before a failure or the time limit."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu_day.py"), step, "--device", device]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if device == "cpu":  # threads of tiny ops wait for one another, for seconds where other programs run too
        env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    code: int | str
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS[step], env=env)
        text, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as err:
        # bytes, also of a process whose output is text; the limit may fall within a character
        text, errors = ((out or b"").decode(errors="replace") for out in (err.stdout, err.stderr))
        code = f"stopped after {LIMITS[step]} s"
    found = [json.loads(line[len(MARK) :]) for line in text.splitlines() if line.startswith(MARK)]
    results += found
    if code != 0:
        last = f"after its result {found[-1]['name']!r}" if found else "before its first result"
        told = f"the step ended {last} ({code}); alone: {shlex.join(command[1:])}. {errors[-1200:].strip()}"
        results.append({"step": step, "name": "errors", "ok": False, "error": told})
    return code


if __name__ == "__main__":
    sys.exit(main())
