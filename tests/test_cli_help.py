"""The help of each command can be read whole on a terminal of 80 columns, and a shell can complete the commands."""

import os
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from moeopt.cli.commands import app
from moeopt.cli.examples import EXAMPLES
from moeopt.limits import DEFAULT

COMMANDS = sorted(typer.main.get_command(app).commands)
NARROW = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_the_help_is_cut(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, [command, "--help"], env=NARROW)
    assert done.exit_code == 0 and "…" not in done.output, done.output
    for option in typer.main.get_command(app).commands[command].params:
        assert option.param_type_name == "argument" or option.opts[0] in done.output, option.name


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_the_help_ends_with_examples_that_the_command_takes(command):
    help_text = " ".join(CliRunner().invoke(app, [command, "--help"], env=NARROW).output.split())
    for words in EXAMPLES[command]:
        assert f"moeopt {command} {words}" in help_text
        typer.main.get_command(app).commands[command].make_context(command, words.split())  # raises for an unknown word


@pytest.mark.parametrize("command, option, says", [
    ("optimize", "--verify", "strict (what runs without it), fast"),
    ("optimize", "--backend", "without it torch, and for an ONNX file onnxruntime"),
    ("verify", "--seconds", "without it, 10, and 1 for each 50 MB"),
    ("verify", "--bytes", "without it, 2 GiB, and 8 times"),
    ("verify", "--provider", "without it cpu"),
])  # fmt: skip
def test_the_help_says_what_runs_without_an_option(command, option, says):
    options = {name: o for o in typer.main.get_command(app).commands[command].params for name in o.opts}
    assert says in options[option].help


def test_the_limits_that_the_help_of_verify_states_are_the_ones_that_hold():
    assert DEFAULT.seconds_for(0) == 10 and DEFAULT.seconds_for(50_000_000) == 11
    assert DEFAULT.bytes_for(0) == 2 << 30 and DEFAULT.bytes_for(10) - DEFAULT.bytes_for(0) == 80


def test_a_shell_completes_the_commands():
    words = {"_MOEOPT_COMPLETE": "complete_bash", "COMP_WORDS": "moeopt in", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "moeopt"], env=os.environ | words, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["inspect", "info"], done.stderr
