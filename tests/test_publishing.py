"""What a release is made of: metadata, a README that holds outside the repository, archives, and what GitHub reads."""

import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
builds = pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling builds it: pip install '.[dev]'")


def yaml_of(name):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / name).read_text())


@builds
def test_the_readme_outside_the_repository_has_no_link_into_it():
    run = [sys.executable, "-m", "hatchling", "metadata", "readme"]
    readme = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    own = (ROOT / "README.md").read_text()
    for before, after in zip(re.findall(r"\]\(([^)]+)\)", own), links, strict=True):
        assert after.endswith(before)
        assert before.startswith("https://") or (ROOT / before.split("#")[0]).exists(), f"README.md: no {before}"


@builds
def test_the_source_archive_holds_what_its_pages_tell_to_run(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {"benchmarks/onnx_models.py", "examples/demo.py", "tests/test_publishing.py", ".ci/run", "CITATION.cff"}
    assert wanted <= names
    assert not [n for n in names if n.endswith((".whl", ".so", ".pyc")) or n.startswith((".venv", "build/"))]


def test_the_pythons_of_the_index_are_those_that_are_promised():
    project = (ROOT / "pyproject.toml").read_text()
    told = re.findall(r"Python :: (3\.\d+)", project)
    run = {row["python"].rpartition(".")[0] for row in json.loads((ROOT / "tests/matrix/results.json").read_text())}
    assert told[0] == re.search(r'requires-python = ">=(3\.\d+)"', project)[1] and run <= set(told)
    assert [int(version[2:]) for version in told] == list(range(int(told[0][2:]), int(told[-1][2:]) + 1))
    pages = (ROOT / "docs" / "start.md").read_text()
    assert all(version in run or f"Python {version} " in pages for version in told), "run, or said what is known of it"


def test_nothing_built_or_downloaded_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    assert not [n for n in listed.stdout.split("\n") if n.endswith((".whl", ".so", ".pyc", ".tar.gz"))]


def test_the_metadata_says_who_where_and_for_whom():
    toml = pytest.importorskip("tomllib", reason="it is part of Python from 3.11 on")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Homepage", "Documentation", "Changelog", "Issues", "Security"} <= set(project["urls"])
    assert project["authors"] and project["maintainers"]
    kinds = {line.split(" :: ")[0] for line in project["classifiers"]}
    assert {"Development Status", "Intended Audience", "Operating System", "Programming Language", "Topic"} <= kinds
    assert yaml_of("CITATION.cff")["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_one_repository_is_named_everywhere_and_security_says_what_that_name_is_worth():
    """Whoever publishes the project replaces its address; a file that is forgotten would send reports elsewhere."""
    files = ("pyproject.toml", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml", "SECURITY.md")
    found = {f: set(re.findall(r"github(?:usercontent)?\.com/([\w-]+/[\w-]+)", (ROOT / f).read_text())) for f in files}
    (name,) = set().union(*found.values())
    assert all(found.values()), found
    assert f"The address in the package's metadata, `github.com/{name}`" in (ROOT / "SECURITY.md").read_text()


@pytest.mark.parametrize("name", ["ci", "docs", "release"])
def test_workflows_pin_their_actions_and_may_do_no_more_than_they_must(name):
    workflow = yaml_of(f".github/workflows/{name}.yml")
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@v\d+\.\d+\.\d+", step["uses"]), f"{step['uses']}: pin a full version"


def test_the_workflow_runs_targets_that_there_are():
    jobs = yaml_of(".github/workflows/ci.yml")["jobs"]
    scripts = [line for job in jobs.values() for step in job["steps"] for line in step.get("run", "").splitlines()]
    assert ".ci/run" in scripts and (ROOT / ".ci" / "run").exists()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for script in scripts:
        if script != ".ci/run" and not script.startswith("sudo apt-get "):
            assert script.split()[:1] == ["make"] and script.split()[1] in targets, script


def test_the_tests_of_a_lesser_cpu_are_there():
    """One path that is not ends the whole run without a test."""
    dry = ["make", "--dry-run", "test-isa-played", "READY=", "PY=python"]
    said = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = re.findall(r"tests/[\w/.]+", said)
    assert len(paths) > 20 and [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("ref", "version"), [("v1.2.3", "1.2"), ("v0.1.0", "0.1"), ("main", "main")])
def test_each_release_keeps_its_documentation(ref, version):
    """The workflow's own words name the version; the Makefile's own rule makes of them what is run."""
    workflow = yaml_of(".github/workflows/docs.yml")
    assert {"branches", "tags"} == set(workflow[True]["push"])
    (script,) = [step["run"] for step in workflow["jobs"]["deploy"]["steps"] if "docs-version" in step.get("run", "")]
    said = subprocess.run(
        ["bash", "-c", script.replace("make ", "make --dry-run READY= PY=python ")],
        cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": ref}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines = [line.split(" mike ")[1] for line in said.splitlines() if " mike " in line]
    deploy, *default = lines
    if version == "main":
        assert deploy.split() == ["-q", "deploy", "--push", "--update-aliases", "main"] and not default
    else:
        assert deploy.split() == ["-q", "deploy", "--push", "--update-aliases", version, "latest"]
        assert default == ["-q set-default --push latest"]
    config = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  version: \{ provider: mike \}", config, re.MULTILINE)


def test_documentation_without_a_version_is_not_deployed():
    said = subprocess.run(["make", "docs-version", "READY=", "PY=false"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 2 and "say which: make docs-version VERSION=0.1" in said.stdout


def test_issue_forms_ask_for_the_facts_and_the_dump():
    for name in ("wrong-number", "declined", "crash-or-slow"):
        body = yaml_of(f".github/ISSUE_TEMPLATE/{name}.yml")["body"]
        fields = {part["id"]: part for part in body if "id" in part}
        assert fields["info"]["validations"]["required"] and "moeopt info" in fields["info"]["attributes"]["label"]
        assert name == "crash-or-slow" or "dump=" in fields["dump"]["attributes"]["description"]


def test_the_hook_names_a_command_that_there_is():
    (hook,) = yaml_of(".pre-commit-hooks.yaml")
    words = hook["entry"].split()
    from typer.main import get_command

    from moeopt.cli.commands import app

    options = [name for p in get_command(app).commands[words[1]].params for name in p.opts]
    assert words[0] == "moeopt" and {*words[2:], "--against"} <= set(options)
