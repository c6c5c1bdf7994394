"""The help of each command can be read whole on a terminal of 80 columns, and a shell can complete the commands."""

import os
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from moeopt.cli.commands import app

COMMANDS = sorted(typer.main.get_command(app).commands)
NARROW = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_the_help_is_cut(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, [command, "--help"], env=NARROW)
    assert done.exit_code == 0 and "…" not in done.output, done.output
    for option in typer.main.get_command(app).commands[command].params:
        assert option.param_type_name == "argument" or option.opts[0] in done.output, option.name


def test_a_shell_completes_the_commands():
    words = {"_MOEOPT_COMPLETE": "complete_bash", "COMP_WORDS": "moeopt in", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "moeopt"], env=os.environ | words, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["inspect", "info"], done.stderr
