"""What was mistyped is told before torch, which takes seconds, is imported."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, io, json, sys
from moeopt.cli import main
told = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words.split())
        except SystemExit as stopped:
            code = stopped.code
    slow = [name for name in ("torch", "moeopt.api", "numpy", "transformers") if name in sys.modules]
    told.append([code, out.getvalue(), err.getvalue(), slow])
print(json.dumps(told))
"""

MISTYPED = [
    ("verify nowhere", 1, "nowhere is no directory: it is not a bundle"),
    ("verify nowhere --original nowhere.py:build", 1, "nowhere is no directory: it is not a bundle"),
    ("verify . --against nowhere.json", 2, "nowhere.json: there is no such certificate"),
    ("verify nowhere --seconds -1", 2, "LoadLimits.seconds is -1.0"),
    ("info nowhere", 1, "nowhere is no directory: it is not a bundle"),
    ("info .", 1, "has no moeopt.json: it is not a bundle"),
    ("optimize nowhere", 2, "nowhere is neither a file nor module:factory"),
    ("optimize nowhere.py:build", 2, "nowhere.py:build: there is no file nowhere.py"),
    (
        "optimize nowhere.inside:build",
        2,
        "importing nowhere.inside failed: ModuleNotFoundError: no module 'nowhere' in /",
    ),
    (
        "optimize mine:build --backend onnxruntim",
        2,
        "backend 'onnxruntim' is not available; did you mean 'onnxruntime'",
    ),
    ("explain nowhere", 2, "nowhere is neither a file nor module:factory"),
    ("explain .", 2, ". is a directory without config.json"),
    ("inspect nowhere", 2, "nowhere does not exist: give a Hugging Face directory, a config.json"),
    ("inspect nowhere.py:build", 2, "there is no file nowhere.py"),
    ("profile nowhere", 2, "nowhere is neither a file nor module:factory"),
    ("profile mine:build --data nowhere.py:batches", 2, "--data nowhere.py:batches: there is no file nowhere.py"),
    ("profile mine:build --data batches", 2, "--data batches: give module:function"),
    ("nonsense", 2, "No such command"),
    *((f"{name} --nonsense", 2, "No such option") for name in "optimize explain inspect profile passes verify".split()),
    *((f"{name} --nonsense", 2, "No such option") for name in ("info", "build-kernels")),
]


HELP = ["--help", "--version", "verify --help"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command said, one after the other in one new process, and which slow modules it had by then."""
    folder = tmp_path_factory.mktemp("mistyped")
    (folder / "mine.py").write_text("raise AssertionError('the code was imported before the words were checked')")
    commands = [words for words, _, _ in MISTYPED] + HELP
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True, cwd=folder, check=True
    )
    return dict(zip(commands, json.loads(ran.stdout), strict=True))


@pytest.mark.parametrize(("words", "code", "said"), MISTYPED, ids=[words for words, _, _ in MISTYPED])
def test_a_mistyped_word_is_told_without_torch(told, words, code, said):
    got, out, err, slow = told[words]
    assert (got, out, slow) == (code, "", []), err
    assert said in " ".join(err.split()) and "Traceback" not in err


@pytest.mark.parametrize("words", HELP)
def test_help_and_version_need_no_torch(told, words):
    got, out, err, slow = told[words]
    assert (got, err, slow) == (0, "", []) and "moeopt" in out


def test_a_module_is_found_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text("def build():\n    return 'no model'\n")
    program = "import sys; from moeopt.cli import main; main(sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program, "explain", "mine:build"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 2 and "mine:build returned str, not a model" in ran.stderr


def test_an_interrupt_is_a_word_and_the_code_of_shells(tmp_path):
    (tmp_path / "mine.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    program = "import sys; from moeopt.cli import main; main(sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-c", program, "explain", "mine:build"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (130, "moeopt: interrupted\n")
