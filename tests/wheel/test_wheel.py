"""As a user would: the wheel in a clean environment, and the example workflow's own steps in a project of its own.

`make test-wheel` runs it; it needs hatchling and no network. The clean environment reuses the packages that are
installed here (torch alone is a gigabyte), all but moeopt: a .pth file names a folder of links to them. pip is one of
them, sees the others, and finds the workflow's requirements satisfied; moeopt itself can only come from the wheel.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from moeopt.ops.native import build
from moeopt.ops.native.compile import compiler_named, prebuilt_name

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ci"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (made,) = folder.glob("moeopt-*.whl")
    keep_the_kernel_of(made)
    return made


def keep_the_kernel_of(made):
    """The kernel of a wheel is that of `make test`, from the same sources: two minutes of a CPU, once in a CI run."""
    with zipfile.ZipFile(made) as wheel:
        for name in wheel.namelist():
            if name.endswith(f"/{prebuilt_name(build.all_isas())}"):
                kept = build._folder() / build.library_name(build.find_compiler(), build.all_isas())
                kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                aside = kept.with_suffix(f".{os.getpid()}")
                aside.write_bytes(wheel.read(name))
                os.replace(aside, kept)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """What a shell has after `. venv/bin/activate`."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    others = folder / "others"
    others.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "moeopt" not in entry.name and entry.suffix != ".pth":
            (others / entry.name).symlink_to(entry)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "MOEOPT", "VIRTUAL_ENV"))}
    return kept | {"PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def project(wheel, environment, tmp_path_factory):
    """The example project with the wheel where its workflow looks for it, after the workflow has run."""
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("project") / "project")
    (folder / "wheels").mkdir()
    shutil.copy(wheel, folder / "wheels")
    return folder


def shell(script, project, environment, **variables):
    """Run a script as GitHub does, which stops at the first command that fails."""
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=project, env=environment | variables, capture_output=True, text=True,
    )  # fmt: skip


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"moeopt", "moeopt-0.1.0.dist-info"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "moeopt").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    libraries = {n for n in names if n.startswith("moeopt/ops/native/prebuilt/")}
    assert {n for n in names if n.startswith("moeopt/")} - libraries == sources
    assert len(libraries) == (compiler_named(None) is not None)
    assert all(f"/{prebuilt_name(['generic']).removesuffix('.so')}" in n for n in libraries)
    entry = zipfile.ZipFile(wheel).read("moeopt-0.1.0.dist-info/entry_points.txt").decode()
    assert "[pytest11]\nmoeopt.pytest_plugin = moeopt.pytest_plugin" in entry


def test_the_kernel_of_the_wheel_is_kept_for_the_suite(wheel):
    if not compiler_named(None):
        pytest.skip("no C++ compiler is here")
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("moeopt/ops/native/prebuilt/"))
    assert build.build(build.all_isas()).read_bytes() == zipfile.ZipFile(wheel).read(name)


def built(folder, **variables):
    """The files of a wheel that is built with these variables."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True, env=os.environ | variables)
    (made,) = folder.glob("moeopt-*.whl")
    return made.name, zipfile.ZipFile(made).namelist()


@pytest.mark.parametrize("variables", [{"MOEOPT_NATIVE": "off"}, {"MOEOPT_CXX": "false"}, {"MOEOPT_CXX": "absent"}])
def test_no_compiler_and_a_failing_one_give_a_wheel_without_the_kernel(tmp_path, variables):
    name, names = built(tmp_path, **variables)
    assert name.endswith("-py3-none-any.whl")
    assert not any("prebuilt" in n for n in names) and "moeopt/ops/native/src/experts.cpp" in names


def test_the_workflow_runs_as_it_is_written(project, environment):
    import yaml

    workflow = yaml.safe_load((project / "equivalence.yml").read_text())
    (job,) = workflow["jobs"].values()
    actions = [step["uses"].split("@") for step in job["steps"] if "uses" in step]
    assert all(version.startswith("v") and version.count(".") == 2 for _, version in actions), "pin each action"
    steps = [step for step in job["steps"] if "run" in step]
    assert len(steps) == 3
    for step in steps:
        done = shell(step["run"], project, environment, **workflow["env"])
        assert done.returncode == 0, f"{step['name']}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "4 passed, 1 skipped" in done.stdout, done.stdout
    assert "moeopt.tolerance_required" in (project / "build" / "report.xml").read_text()
    where = shell("cd / && python -c 'import moeopt; print(moeopt.__file__)'", project, environment).stdout
    assert "/venv/lib/" in where, "moeopt came from the wheel"


def test_the_hook_runs_as_it_is_written(project, environment):
    import yaml

    (repository,) = yaml.safe_load((project / "pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    done = shell(hook["entry"], project, environment)
    assert done.returncode == 0 and "nothing is worse" in done.stdout, done.stdout + done.stderr


def test_the_kernel_of_the_wheel_runs_without_a_compiler(project, environment):
    if not compiler_named(None):
        pytest.skip("no C++ compiler is here")
    run = "cd / && python -c 'from moeopt.ops.native.library import describe; print(describe())'"
    done = shell(run, project, environment, MOEOPT_CXX="no-compiler", MOEOPT_CACHE=str(project / "cache"))
    assert "/site-packages/moeopt/ops/native/prebuilt/" in done.stdout, done.stdout + done.stderr
