"""The command: exit codes, one message per failure, JSON that parses; the api is a stand-in that records calls."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from moeopt import __version__
from moeopt.cli import main
from moeopt.errors import BundleError, NativeKernelWarning, NotEquivalentError, UsageError
from moeopt.report import BlockReport, Report
from tests import children
from tests.backends.torch.toys import H, save

REPORT = Report((BlockReport("0", "moe", "rewritten", experts=4, lowering="moeopt::experts"),), model="Toy")

FACTORY = """
import torch
from torch import nn

def model():
    return nn.Linear(8, 8).eval()

def with_inputs():
    return nn.Linear(8, 8).eval(), torch.zeros(2, 8)

def number():
    return 7

def broken():
    raise KeyError("no weights")
"""


class Certificate:
    passed: bool | None = True

    def to_json(self):
        return json.dumps({"passed": self.passed})

    def __str__(self):
        return f"certificate: {self.passed}"


class Optimized:
    report = REPORT

    def __init__(self, certificate):
        self.certificate = certificate

    def save(self, directory):
        save(directory)


@pytest.fixture
def api(monkeypatch):
    """A stand-in for moeopt.api; ``calls`` are (function, args, fields)."""
    fake = types.SimpleNamespace(calls=[], certificate=Certificate(), error=None)

    def record(name, result):
        def call(*args, **fields):
            fake.calls.append((name, args, fields))
            if fake.error is not None:
                raise fake.error
            return result()

        return call

    fake.optimize = record("optimize", lambda: Optimized(fake.certificate))
    fake.explain = record("explain", lambda: REPORT)
    fake.verify = record("verify", lambda: fake.certificate)
    monkeypatch.setitem(sys.modules, "moeopt.api", fake)
    return fake


@pytest.fixture(autouse=True)
def imports_stay_in_the_test(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    yield
    sys.modules.pop("user_models", None)


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "user_models.py"
    path.write_text(FACTORY)
    return path


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def test_the_version_is_printed():
    out = subprocess.run([sys.executable, "-m", "moeopt", "--version"], capture_output=True, text=True)
    assert (out.stdout, out.returncode) == (f"moeopt {__version__}\n", 0)


def test_optimize_prints_report_and_certificate(capsys, api, factory):
    code, out, _ = run(capsys, "optimize", f"{factory}:with_inputs", "--verify", "fast", "--dtype", "bfloat16")
    assert code == 0 and "1 block found: 1 rewritten" in out and "certificate: True" in out
    ((name, (model, inputs), fields),) = api.calls
    assert name == "optimize" and isinstance(model, nn.Linear) and inputs.shape == (2, H)
    assert (fields["backend"], fields["verify"], fields["dtype"]) == ("torch", "fast", "bfloat16")
    assert "device" not in fields


def test_progress_goes_to_stderr_unless_quiet(capsys, api, factory):
    run(capsys, "optimize", f"{factory}:model")
    run(capsys, "optimize", f"{factory}:model", "--quiet")
    first, second = (fields["progress"] for _, _, fields in api.calls)
    first("capture: layer 0")
    assert capsys.readouterr().err == "capture: layer 0\n" and second is None


def test_optimize_saves_and_speaks_json(capsys, api, factory, tmp_path):
    code, out, _ = run(capsys, "optimize", f"{factory}:model", "--out", tmp_path / "b", "--json")
    data = json.loads(out)
    assert code == 0 and data["certificate"] == {"passed": True} and data["saved"] == str(tmp_path / "b")
    assert Report.from_dict(data["report"]) == REPORT and (tmp_path / "b" / "moeopt.json").is_file()


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_verdict_is_the_exit_code(capsys, api, factory, tmp_path, passed, code):
    api.certificate.passed = passed
    for argv in (["optimize", f"{factory}:model"], ["verify", tmp_path]):
        got, out, err = run(capsys, *argv)
        assert got == code and f"certificate: {passed}" in out
        assert ("moeopt: not equivalent" in err) == (passed is False)


def test_explain(capsys, api, factory):
    code, out, err = run(capsys, "explain", f"{factory}:model")
    assert code == 0 and "1 block found" in out and "explain:" in err
    code, out, _ = run(capsys, "explain", f"{factory}:model", "--json")
    assert code == 0 and json.loads(out) == REPORT.to_dict()


def test_verify_with_the_original(capsys, api, factory, tmp_path):
    code, out, _ = run(
        capsys, "verify", tmp_path, "--original", f"{factory}:with_inputs", "--provider", "CPU", "--json"
    )
    assert code == 0 and json.loads(out) == {"passed": True}
    ((_, (directory,), fields),) = api.calls
    assert directory == tmp_path and fields["provider"] == "CPU" and fields["inputs"].shape == (2, H)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("backend='gpu'"), 2), (BundleError("graph.json: damaged"), 1), (NotEquivalentError("block 0"), 1)],
)
def test_an_expected_failure_is_one_line_and_no_traceback(capsys, api, factory, error, code):
    api.error = error
    got, out, err = run(capsys, "explain", f"{factory}:model", "--quiet")
    assert (got, out, err) == (code, "", f"moeopt: {error}\n")


def test_a_bug_keeps_its_traceback(api, factory):
    api.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["explain", f"{factory}:model"])


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("nowhere", "nowhere is neither a file nor module:factory: give module:factory"),
        ("{dir}", "is a directory without config.json: give module:factory"),
        ("no_such_module:f", "importing no_such_module failed: ModuleNotFoundError"),
        ("{dir}/missing.py:f", "there is no file"),
        ("{file}:absent", "has no function 'absent'"),
        ("{file}:number", "returned int, not a model"),
        ("{file}", ".py is a file of code without the name of a factory in it, as in "),
        ("{file}:broken", "the factory raised KeyError: 'no weights'"),
        ("{file}:broken", "user_models.py:15)"),
    ],
)
def test_wrong_targets(capsys, api, factory, target, text):
    target = target.format(dir=factory.parent, file=factory)
    code, out, err = run(capsys, "explain", target)
    assert code == 2 and out == "" and text in err and "Traceback" not in err


def test_a_bundle_is_not_optimised_again(capsys, api, tmp_path):
    code, _, err = run(capsys, "optimize", save(tmp_path / "b"))
    assert code == 2 and "is a bundle, optimised already: `moeopt verify" in err


@pytest.mark.parametrize("argv", [["optimise"], ["optimize"], ["info", "--nope"]])
def test_click_refuses_with_2(capsys, argv):
    assert run(capsys, *argv)[0] == 2


def test_module_target_from_the_working_directory(capsys, api, factory, monkeypatch):
    monkeypatch.chdir(factory.parent)
    assert run(capsys, "explain", "user_models:model")[0] == 0


def test_a_file_in_a_folder_finds_the_packages_of_the_project_and_what_lies_beside_it_first(
    capsys, api, factory, monkeypatch, tmp_path
):
    """As ``python -m moeopt`` does; the installed command has its own folder at the head of the path instead."""
    project = tmp_path / "project"
    for folder, said in ((project, "project"), (project / "models", "beside")):
        folder.mkdir()
        (folder / "which_of_two.py").write_text(f"SAID = {said!r}")
    (project / "only_in_the_project.py").write_text("")
    lines = ["import only_in_the_project, which_of_two", "assert which_of_two.SAID == 'beside'", FACTORY]
    (project / "models" / "user_models.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(Path.cwd()))])
    monkeypatch.chdir(project)
    code, _, told = run(capsys, "explain", "models/user_models.py:model")
    assert code == 0, told


CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}


def test_hugging_face_config_and_directory(capsys, api, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert run(capsys, "explain", tmp_path / "config.json")[0] == 0
    (_, (model, inputs), _) = api.calls[-1]
    assert type(model).__name__ == "MixtralForCausalLM" and not model.training
    assert inputs["input_ids"].shape == (2, 16) and int(inputs["input_ids"].max()) < 64
    model.save_pretrained(tmp_path / "saved")
    assert run(capsys, "explain", tmp_path / "saved", "--seed", 5)[0] == 0
    (_, (again, _), _) = api.calls[-1]
    assert isinstance(again, transformers.PreTrainedModel)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_remote_code_needs_the_flag(capsys, api, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "conf.Mine", "AutoModelForCausalLM": "conf.M"}})
    )
    (tmp_path / "conf.py").write_text("raise SystemExit('remote code ran')")
    code, _, err = run(capsys, "explain", tmp_path)
    assert code == 2 and "transformers cannot load it: add --trust-remote-code" in err and "remote code ran" not in err


def test_info_of_the_machine(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and ["torch", torch.__version__] in [line.split() for line in out.splitlines()]
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0 and json.loads(out)["torch"] == torch.__version__


def test_info_says_which_native_kernel_runs_or_what_to_install(capsys, monkeypatch):
    from moeopt.ops.native import library
    from moeopt.ops.native.build import BuildError

    def no_compiler(isa):
        raise BuildError("no C++ compiler was found; install one (apt install g++)")

    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setattr(library, "built_library", no_compiler)
    with pytest.warns(NativeKernelWarning, match="no C"):
        _, out, _ = run(capsys, "info")
    assert "no C++ compiler was found; install one (apt install g++)" in out
    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setenv("MOEOPT_NATIVE", "off")
    assert "off (MOEOPT_NATIVE)" in run(capsys, "info")[1]


def test_build_kernels_without_a_compiler_is_one_message(capsys, monkeypatch, tmp_path):
    from moeopt.ops.native import build

    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path))
    monkeypatch.setenv("MOEOPT_CXX", "no-such-compiler")
    build.find_compiler.cache_clear()
    try:
        code, out, err = run(capsys, "build-kernels")
    finally:
        build.find_compiler.cache_clear()
    assert code == 1 and out == ""
    assert "MOEOPT_CXX or CXX names 'no-such-compiler', which is not on the path: correct or unset it" in err


def test_build_kernels_builds_and_checks(capsys):
    from moeopt.ops.native import build

    if build.find_compiler() is None:
        pytest.skip(build.how_to_get_one())
    code, out, _ = run(capsys, "build-kernels", "--json")
    said = json.loads(out)
    assert code == 0 and Path(said["library"]).is_file()
    assert all(said["instruction_sets"][isa] == "checked against the reference" for isa in build.isas_here())


def test_info_of_a_bundle(capsys, tmp_path):
    code, out, _ = run(capsys, "info", save(tmp_path / "b"))
    assert code == 0 and "mlp: rewritten, moeopt::experts" in out and "from 0" in out


def test_info_of_a_damaged_bundle(capsys, tmp_path):
    (save(tmp_path / "b") / "graph.json").write_text("{}")
    code, out, err = run(capsys, "info", tmp_path / "b")
    assert code == 1 and out == "" and "graph.json: it has 2 bytes" in err


def test_python_dash_m():
    out = children.run([sys.executable, "-m", "moeopt", "info", "--json"], check=True)
    assert json.loads(out.stdout)["torch"] == torch.__version__


def test_end_to_end_with_the_real_api(capsys, tmp_path):
    quickstart = str(Path(__file__).parents[1] / "examples" / "quickstart.py")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import runpy, torch\n"
        f"made = runpy.run_path({quickstart!r})\n"
        "def model():\n    return made['TwoOfEight'](16, 32, 4), torch.randn(2, 5, 16)\n"
    )
    code, out, err = run(capsys, "optimize", f"{mine}:model", "--verify", "fast", "--out", tmp_path / "b", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert [b["status"] for b in data["report"]["blocks"]] == ["rewritten"] and data["certificate"]["passed"] is True
    code, out, err = run(capsys, "verify", tmp_path / "b")
    assert code == 0 and "PASSED" in out, out + err
    code, out, _ = run(capsys, "info", tmp_path / "b")
    assert code == 0 and "rewritten" in out
    weights = tmp_path / "b" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = run(capsys, "verify", tmp_path / "b", "--quiet")
    assert code == 1 and out == "" and err.startswith("moeopt: ") and "weights.safetensors" in err
