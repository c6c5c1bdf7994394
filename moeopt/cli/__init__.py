"""The ``moeopt`` command: optimize, explain, inspect, profile, plan, passes, verify, info, build-kernels.

Exit code 0: good. 1: not equivalent, damaged, or not to be had. 2: used wrongly. An expected failure is one message on
stderr and no traceback; a traceback is a bug in moeopt.
"""

from __future__ import annotations

import sys

from moeopt.errors import MoeoptError, UsageError
from moeopt.untrusted import shown

INTERRUPTED = 130
"""The exit code of a command that SIGINT has ended, as shells have it."""


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with its code."""
    try:
        from moeopt.cli.commands import app

        app(args=argv, prog_name="moeopt")
    except MoeoptError as err:
        print(f"moeopt: {shown(err)}", file=sys.stderr)
        sys.exit(2 if isinstance(err, UsageError) else 1)
    except OSError as err:  # a full disk, a folder that nobody may write to: the machine's, and no bug
        where = f": {err.filename}" if err.filename else ""
        print(f"moeopt: {shown(err.strerror or err)}{shown(where)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(INTERRUPTED)
    except SystemExit as done:  # typer turns an interrupt into this exit, and says nothing
        if done.code == INTERRUPTED:
            _say_interrupted()
        raise


def _say_interrupted() -> None:
    print("moeopt: interrupted", file=sys.stderr)
