"""The examples run as their docstrings say, each in a process of its own or as its user would call it."""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import types
import urllib.request
from pathlib import Path

import pytest
import torch

from tests import children

pytest.importorskip("onnxruntime", reason="the engine examples need onnxruntime")
ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = children.run([sys.executable, *command], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def imports_another(path):
    """Whether an example takes something of another one, which Python finds from the root of the checkout only."""
    tree = ast.parse(path.read_text())
    return any(isinstance(n, ast.ImportFrom) and (n.module or "").startswith("examples") for n in ast.walk(tree))


def test_a_command_that_runs_an_example_finds_the_other_examples():
    pages = [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("examples/**/*.py"),
    ]
    by_path = {
        (page, found)
        for page in pages
        for line in page.read_text().splitlines()
        for found in re.findall(r"(?:python|torchrun)\b[^`\n]*? (examples/[\w/]+\.py)", line)
    }
    assert by_path, "some are run by their path"
    wrong = [f"{page.relative_to(ROOT)}: {found}" for page, found in by_path if imports_another(ROOT / found)]
    assert not wrong, f"python -m examples.NAME finds what these import: {wrong}"


def test_an_engine_is_served(tmp_path):
    from examples.serve_engine import TwoOfEight, make, server

    make(tmp_path / "bundle")
    http = server(tmp_path / "bundle", port=0)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        x = torch.randn(3, 5, 64)
        url = f"http://127.0.0.1:{http.server_port}"
        with urllib.request.urlopen(urllib.request.Request(url, data=json.dumps(x.tolist()).encode())) as answer:
            got = torch.tensor(json.loads(answer.read()))
    finally:
        http.shutdown()
        http.server_close()
    torch.manual_seed(0)
    with torch.no_grad():
        want = TwoOfEight().eval()(x)
    # 1e-6: float32 sums of 256 terms in another order, on outputs of size 0.1 to 1
    assert (got - want).abs().max() < 1e-6


def test_a_transformers_script_gives_the_same_tokens(capsys):
    pytest.importorskip("transformers.exporters", reason="the engine with a cache needs transformers 5.23")
    from examples.transformers_engine import main

    main()
    assert "tokens: the same" in capsys.readouterr().out


def test_a_tiny_language_model_learns():
    pytest.importorskip("transformers")
    from examples.train_tiny_lm import docstrings, encode, loss_on, make, train

    text = encode("\n".join(docstrings(held_out=True)))
    before, after = (loss_on(model.eval(), text[:960]) for model in (make("moe"), train("moe", text, 8, say=False)))
    assert after < before - 0.5  # nats per character


def test_expert_load_is_counted_and_shown(tmp_path, capsys):
    from examples.expert_load import main

    main(str(tmp_path / "load.html"))
    told = capsys.readouterr().out
    assert "4 batches, 224 tokens; 1 block profiled, 0 not" in told and "is the busiest" in told
    assert "Expert load" in (tmp_path / "load.html").read_text()


def test_experts_run_on_two_processes():
    told = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "examples.expert_parallel")
    assert "rank 0 of 2: 132,864 weights" in told and "rank 1 of 2: 132,864 weights" in told  # half of the experts each
    assert told.count("bytes of tokens sent, at most ") == 2 and "dispatch is exact" in told


def test_the_equivalence_test_passes():
    assert "3 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/test_engine.py")


def test_a_graph_goes_through_the_passes_and_back(capsys):
    from examples.fx_passes import main

    main()
    told = capsys.readouterr().out
    assert "group_experts (rounding) on GraphModule: fired 1, " in told
    before, after = (next(line for line in told.splitlines() if line.startswith(w)) for w in ("before: ", "after: "))
    assert "moeopt.experts.default" in after and "moeopt.experts.default" not in before
    assert "aten.matmul.default" in before and "aten.matmul.default" not in after
    for line in [line for line in told.splitlines() if " tokens: at most " in line]:
        assert float(line.split()[4]) < 1e-5  # float32: sums in another order


def in_this_process(command, **options):
    """What ``subprocess.run`` gives of ``python -m moeopt ...``, without the seconds that importing torch takes."""
    from moeopt.cli import main

    assert command[:3] == [sys.executable, "-m", "moeopt"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command[3:])
        except SystemExit as done:
            code = done.code or 0
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize(("path", "said"), [
    ("hugging_face_directory", "21 tokens of model and of its engine: the same"),
    ("bundle_only", "one bit of the weights was turned, and the bundle was refused by name"),
])  # fmt: skip
def test_a_way_in_is_walked(path, said, capsys, monkeypatch):
    if path == "hugging_face_directory":
        pytest.importorskip("transformers.exporters", reason="the engine with a cache needs transformers 5.23")
    from examples.paths import walk

    monkeypatch.setattr(walk, "subprocess", types.SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(sys, "argv", [f"{path}.py"])
    runpy.run_module(f"examples.paths.{path}", run_name="__main__")
    told = capsys.readouterr().out
    assert told.count("$ moeopt ") >= 3 and said in told and "Traceback" not in told


def test_a_way_in_is_walked_by_commands():
    """As the others, each command in a process of its own, as the file says."""
    told = run("-m", "examples.paths.odd_block")
    assert "the whole model is an engine, the declined block in its own operators" in told and "Traceback" not in told
