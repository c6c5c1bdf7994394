"""The scripts of docs/run-it-in.md, each run where its runtime is installed, on one engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doc_snippets import fences

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "run-it-in.md"
SCRIPTS = {title: text for language, title, text in fences(PAGE) if language == "python"}
JAVASCRIPT = {title: text for language, title, text in fences(PAGE) if language == "js"}
OPTIMUM = ROOT / "build" / "optimum"
PACKAGES = ROOT / "build" / "npm" / "node_modules"
RUNTIMES = {
    "run_onnxruntime.py": "onnxruntime", "run_genai.py": "onnxruntime_genai", "run_openvino.py": "openvino",
    "run_aotinductor.py": "torch",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("transformers.exporters")
    folder = tmp_path_factory.mktemp("page")
    (folder / "make_engine.py").write_text(SCRIPTS["make_engine.py"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        import make_engine  # noqa: F401  # once: the scripts import it

        yield folder
        sys.modules.pop("make_engine")


def test_the_page_has_these_scripts():
    assert set(SCRIPTS) == {"make_engine.py", "run_optimum.py", *RUNTIMES}


def test_optimum_generates_the_same_tokens_with_the_transformers_that_it_takes(folder):
    if not (OPTIMUM / "optimum").is_dir():
        pytest.skip("optimum-onnx is not there: make build/optimum/.ready")
    from make_engine import tokens

    (folder / "run_optimum.py").write_text(SCRIPTS["run_optimum.py"])
    path = os.environ | {"PYTHONPATH": str(OPTIMUM)}
    words = [sys.executable, "run_optimum.py"]
    done = subprocess.run(words, cwd=folder, env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == tokens


@pytest.mark.parametrize("script", RUNTIMES)
def test_a_script_of_the_page_runs(folder, script):
    pytest.importorskip(RUNTIMES[script])
    exec(compile(SCRIPTS[script], script, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_the_page_s_javascript_gives_the_same_tokens(folder, package):
    if not shutil.which("node") or not (PACKAGES / package).is_dir():
        pytest.skip(f"Node.js or {package} is not there: make build/npm/.ready")
    from make_engine import tokens

    began, rest = JAVASCRIPT["run_node.mjs"].split("\nconst int64", 1)
    began = {"onnxruntime-node": began, "onnxruntime-web": JAVASCRIPT["run_web.mjs"]}[package]
    (folder / "run.mjs").write_text(f"{began}\nconst int64{rest}")
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(PACKAGES)
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens


def test_the_page_s_command_runs(folder, capsys):
    from moeopt.cli import main

    (command,) = [text.split() for language, _, text in fences(PAGE) if language == "sh"]
    with pytest.raises(SystemExit) as stop:
        main(command[1:])
    assert not stop.value.code and (folder / "repository" / "moe" / "config.pbtxt").is_file()
