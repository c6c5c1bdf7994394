"""Commands as a user types them, with what they print, for the scripts beside this file."""

import os
import subprocess
import sys


def moeopt(*words: str, code: int = 0) -> str:
    """Run ``moeopt`` with ``words``, and stop unless it ends with ``code``; prints and returns what it prints."""
    print(f"\n$ moeopt {' '.join(words)}", flush=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "moeopt", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout, done.stderr, sep="", end="", flush=True)
    if done.returncode != code:
        raise SystemExit(f"moeopt {words[0]} ended with {done.returncode}; {code} was expected")
    return done.stdout + done.stderr
