"""Random wide programs in one process, with progress; failures are written with what builds them again.

    python -m tests.property.run --backend onnxruntime --count 300 --seed 0 --out failures.txt

Each line of progress: number, seconds, outcome. The exit code is 1 where any program failed.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.property.check_wide import check_wide
from tests.property.spec import Program
from tests.property.wide import config_programs, engine_programs, wide_programs

PROFILES: dict[str, Callable[[], st.SearchStrategy[Program]]] = {
    "torch": wide_programs,
    "onnxruntime": engine_programs,
    "config": config_programs,
}
SAVED_EACH = 5
"""One in so many engines is saved, loaded, and run in plain ONNX Runtime."""


def drawn(strategy: st.SearchStrategy[Program], count: int, number: int) -> list[Program]:
    """``count`` programs, the same ones each time, none made from another; a longer list begins with the shorter."""
    return [drawn_one(strategy, 100_000 * number + i) for i in range(count)]


def drawn_one(strategy: st.SearchStrategy[Program], number: int) -> Program:
    last: list[Program] = []

    # hypothesis draws the simplest program first, then a random one, then some like those
    @seed(number)
    @settings(
        max_examples=2,
        derandomize=False,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(p: Program) -> None:
        last.append(p)

    each()
    return last[-1]


def outcome(p: Program, backend: str, *, saved: bool, verify: str) -> tuple[str, str]:
    """(one word, the complaint or "") of one program; any exception is a failure."""
    try:
        return check_wide(p, backend, saved=saved, verify=verify), ""
    except AssertionError as wrong:
        return "WRONG", str(wrong)
    except Exception:
        return "CRASH", f"{p!r}\n{traceback.format_exc(limit=-4)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--profile", choices=tuple(PROFILES), help="which strategy; the backend's own by default")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many")
    parser.add_argument("--verify", choices=("fast", "strict"), default="fast")
    parser.add_argument("--out", type=Path, help="a file that gets the failures")
    args = parser.parse_args(argv)
    counts: collections.Counter[str] = collections.Counter()
    programs = drawn(PROFILES[args.profile or args.backend](), args.count, args.seed)
    for number, p in enumerate(programs[args.skip :], start=args.skip):
        start = time.perf_counter()
        word, complaint = outcome(p, args.backend, saved=number % SAVED_EACH == 0, verify=args.verify)
        counts[word.split(":")[0]] += 1
        print(f"{number} {time.perf_counter() - start:.1f}s {word} {p!r}", flush=True)
        if complaint:
            print(complaint, file=sys.stderr, flush=True)
            if args.out:
                with args.out.open("a") as out:
                    out.write(f"seed {args.seed}, program {number}, {args.backend}, {word}\n{complaint}\n\n")
    print(", ".join(f"{n} {word}" for word, n in counts.items()))
    return int(bool(counts["WRONG"] or counts["CRASH"]))


if __name__ == "__main__":
    sys.exit(main())
