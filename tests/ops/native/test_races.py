"""Several callers at once, on the kernel's own threads and on OpenMP's, on a build that tells of data races."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeopt.ops.native import build, compile

PROGRAM = Path(__file__).with_name("race.cpp")
SANITIZE = ("-O1", "-g1", "-fsanitize=thread")
TEAMS = {"openmp": "GOMP_parallel", "own threads": "no_team"}
CALLS = 30
TOLD = 66
"""How a program ends in which the sanitizer has seen a race."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_isa,  # one build: how threads share the work is the same for each instruction set
    pytest.mark.skipif(sys.platform != "linux", reason="the team is looked up as on Linux"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """``program(team, calls)`` runs the program: (exit code, what it said)."""
    compiler, aside = build.find_compiler(), tmp_path_factory.mktemp("races")
    if compiler is None:
        pytest.skip(build.how_to_get_one())
    try:
        library = compile.compile_library(compiler, ["generic"], aside, (*compile.FLAGS, *SANITIZE))
    except compile.Refused as err:
        pytest.skip(f"{compiler} has no thread sanitizer: {err}")

    def run(team, calls):
        out = aside / team
        words = [compiler, *SANITIZE, "-std=c++17", "-rdynamic", f"-DTEAM={team}", f"-I{compile.SOURCES}", PROGRAM]
        subprocess.run([*words, library, "-o", out, *compile.LIBRARIES], check=True)
        env = {**os.environ, "LD_LIBRARY_PATH": str(aside), "TSAN_OPTIONS": f"exitcode={TOLD}"}
        done = subprocess.run([out, str(calls)], env=env, capture_output=True, text=True, timeout=600)
        if "unexpected memory mapping" in done.stderr:  # of an older sanitizer, on a newer kernel of the system
            pytest.skip(f"the thread sanitizer of {compiler} does not start here: {done.stderr[:200]}")
        return done.returncode, done.stdout + done.stderr[:4000]

    return run


@pytest.mark.parametrize("team", TEAMS)
def test_no_data_race_and_the_bits_of_one_thread(program, team):
    code, said = program(TEAMS[team], CALLS)
    assert code == 0 and said == "same bits\n", said


def test_the_sanitizer_tells_of_a_race(program):
    code, said = program("no_team", 0)
    assert code == TOLD and "data race" in said, said
