"""The building stands: a module imports only from floors below its own, and `import moeopt` is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moeopt"
FLOORS = [
    {"obstacles"},
    {"errors", "value_types", "file_lock", "full_disk", "listed", "sizes"},
    {
        "options",
        "limits",
        "untrusted",
        "patches",
        "compat",
        "cache_names",
        "html",
        "hub_cache",
        "codes_in_files",
        "other_files",
    },  # html draws plain values
    {"ir", "progress", "onnx_in"},
    {"ops"},
    {"published"},  # checkpoints: what their files hold, and quantised ones read into what ops take
    {"capture"},
    {"recognise"},
    {"find", "rewrite"},
    {"passes"},
    {"verification", "report"},
    {"control_flow"},  # what a model's Python code decides by, beside its trace
    {"pipeline", "inspection"},  # one model driven through the rooms above; a model counted
    {"quantization"},  # the pipeline's experts in codes, and what that loses
    {"bundle", "planning"},
    {"lower"},
    {"causal_lm"},
    {"backends"},
    {"optimized"},
    {"checkpoint"},  # a directory is a model to optimise, and becomes a bundle
    {"calls"},
    {"api"},
    {"distributed"},
    {"frontends"},
    {"profiling"},
    {"testing"},
    {"cli", "pytest_plugin"},  # what people call
    {"__main__"},
]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "transformers", "matplotlib"}
LAZY = {"rich", "typer", "safetensors", "click"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def upward_imports(source: str, here: str):
    for line, name in imported_names(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "moeopt" or len(parts) < 2 or parts[1] not in FLOOR:
            continue
        there = parts[1]
        if there != here and FLOOR[there] >= FLOOR[here]:
            yield f"line {line}: {here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    if room(path) == "__init__":
        return
    assert room(path) in FLOOR, f"{path.relative_to(ROOT)} stands on no floor: add it to FLOORS"
    assert not list(upward_imports(path.read_text(), room(path)))


@pytest.mark.parametrize(
    ("source", "here"),
    [
        ("from moeopt.backends import torch", "passes"),
        ("import moeopt.api", "ir"),
        ("from moeopt import bundle", "ops"),
        ("def f():\n    from moeopt.pipeline import SIMPLIFY", "verification"),
    ],
)
def test_an_upward_import_would_be_caught(source, here):
    assert len(list(upward_imports(source, here))) == 1


def file_imports() -> dict[str, set[str]]:
    """For each module of moeopt, those that it imports anywhere but for type checkers."""
    modules = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        whole = {n for _, n in imported_names(tree)}
        found[name] = {n if n in modules else n.rpartition(".")[0] for n in whole} & set(modules) - {name}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A way from some module back to itself; [] when there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def test_no_two_files_import_each_other():
    edges = {name: others - {"moeopt"} for name, others in file_imports().items()}
    assert len(edges) > 200
    assert not circle(edges), " -> ".join(circle(edges))


def test_a_circle_of_files_would_be_caught():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == ["a", "b", "c", "a"]


def test_the_floors_of_the_contributors_page_are_these():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT.parent / "CONTRIBUTING.md").read_text(), re.M)
    assert [set(re.findall(r"\w+", row)) for row in rows] == FLOORS


def loaded(statement: str, names: set[str]) -> str:
    code = f"{statement}\nimport sys; print(sorted({names!r} & set(sys.modules)))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout.strip()


@pytest.mark.parametrize("statement", ["import moeopt", "import moeopt.report, moeopt.bundle.manifest, moeopt.options"])
def test_import_is_light(statement):
    assert loaded(statement, OPTIONAL | LAZY) == "[]"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["optimize", "--help"], ["optimize", "nowhere"], ["no"]])
def test_the_command_answers_without_torch(words):
    run = f"import contextlib, moeopt.cli\nwith contextlib.suppress(SystemExit): moeopt.cli.main({words!r})\nprint()"
    assert loaded(run, {"torch"}).splitlines()[-1] == "[]"


def test_importing_every_module_loads_no_optional_package():
    modules = [
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts)
        for p in FILES
        if p.stem not in ("__main__", "__init__", "pytest_plugin")
    ]
    assert loaded("import " + ", ".join(modules), OPTIONAL) == "[]"


def test_the_environment_is_read_in_options_only():
    for path in FILES:
        if "environ" in path.read_text() or "getenv" in path.read_text():
            assert room(path) == "options", f"{path.relative_to(ROOT)} reads the environment: do it in options"
