"""A bare ``Any`` says nothing: parameters, results, fields and variables are named by what stands there."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "moeopt"
NAMES = ROOT / "value_types.py"
"""The only file that may say ``Any`` without a word of what stands there."""


def bare(source: str):
    """``line: name`` of each field or variable, and ``line: function(parameter)``, that is a bare ``Any``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and _is_bare(node.annotation):
            yield f"{node.lineno}: {ast.unparse(node.target)}"
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        args = node.args
        given = (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg)
        annotations = {a.arg: a.annotation for a in given if a is not None and a.annotation is not None}
        for name, annotation in {**annotations, "return": node.returns}.items():
            if annotation is not None and _is_bare(annotation):
                yield f"{node.lineno}: {node.name}({name})"


def _is_bare(annotation):
    return ast.unparse(annotation).strip("'\"") in ("Any", "typing.Any")


def test_the_check_sees_each_place():
    source = "def f(a: Any, *b: 'Any', c: int = 0, **d: typing.Any) -> Any: ...\nasync def g(e: list[Any]) -> None: ..."
    assert [found.split(": ")[1] for found in bare(source)] == ["f(a)", "f(b)", "f(d)", "f(return)"]
    held = "TOP: Any = 1\nclass A:\n    field: 'Any'\n    fine: list[Any]\n    def f(self): self.x: typing.Any = 1"
    assert sorted(found.split(": ")[1] for found in bare(held)) == ["TOP", "field", "self.x"]


def test_nothing_is_a_bare_any():
    found = [f"{path}:{place}" for path in ROOT.rglob("*.py") if path != NAMES for place in bare(path.read_text())]
    assert not found, "name the type in moeopt/value_types.py or take one from there: " + ", ".join(sorted(found))


def test_every_name_is_used():
    names = [n.target.id for n in ast.parse(NAMES.read_text()).body if isinstance(n, ast.AnnAssign)]
    sources = " ".join(path.read_text() for path in ROOT.rglob("*.py") if path != NAMES)
    assert names and not [name for name in names if name not in sources]
