"""One word means one thing: no class name stands for two things, and the glossary names what exists."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "moeopt").rglob("*.py"))

SAME_THING = {
    "Dense": "TensorRT's dense lowering is a subclass of ONNX's: the same form with another dispatch",
    "Logger": "TensorRT's loggers, made where the package is imported: one keeps complaints, one prints progress",
    "Records": "an alias: what a manifest says of each experts node",
}
"""Names that are defined in more than one file, with why they may."""


def definitions(source: str) -> set[str]:
    """The classes of a module, inner ones included, and its type aliases."""
    tree = ast.parse(source)
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and re.fullmatch(r"_?[A-Z]+[a-z]\w*", target.id):
            found.add(target.id)
    return found


def defined() -> dict[str, list[str]]:
    places = defaultdict(list)
    for path in FILES:
        for name in definitions(path.read_text()):
            places[name].append(str(path.relative_to(ROOT)))
    return places


def test_a_class_name_means_one_thing():
    twice = {name: places for name, places in defined().items() if len(places) > 1}
    new = {name: places for name, places in twice.items() if name not in SAME_THING}
    assert not new, f"name the later one for what it is: {new}"
    assert set(SAME_THING) == set(twice), "an excuse that nothing needs any more"


def test_two_classes_of_one_name_are_seen():
    source = "class Plan:\n    class Inner: ...\n\nPlace = tuple[str, int]\nLIMIT = 3\nmade = 4\n"
    assert definitions(source) == {"Plan", "Inner", "Place"}


def glossary() -> list[tuple[str, str]]:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    return [row for row in rows if row[0] != "term" and not row[0].startswith("---")]


def test_every_code_name_of_the_glossary_exists():
    names = set(defined())
    for path in FILES:
        names.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names |= {node.name, *(a.arg for a in node.args.args)}
    quoted = {word for row in glossary() for cell in row for word in re.findall(r"`(\w+)`", cell)}
    assert len(quoted) > 30 and not quoted - names, quoted - names


def references(source: str) -> set[str]:
    """What docstrings point at: :role:`x.y`, and ``moeopt.x.y`` in the package."""
    roles = re.findall(r":(?:class|func|meth|mod|data):`~?\.?([\w.]+)`", source)
    paths = re.findall(r"``(moeopt\.[\w.]+)``", source)
    return {name for name in (*roles, *paths) if not name.startswith(("torch", "moeopt.json", "moeopt.cuda_graph"))}


def test_what_docstrings_refer_to_exists():
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    for text in texts.values():
        names |= {*re.findall(r"\b(?:def|class) (\w+)", text), *re.findall(r"^(?: {4})?(\w+)(?:: .*)? = ", text, re.M)}
    assert len(names) > 3000
    assert not [(p, name) for p, text in texts.items() for name in references(text) if name.split(".")[-1] not in names]


def test_a_lost_reference_would_be_seen():
    source = '"""See :class:`~.gone.Probe` and ``moeopt.ir.lost``."""\n'
    assert references(source) == {"gone.Probe", "moeopt.ir.lost"}


def test_a_term_is_explained_once():
    terms = [term.split(" (")[0] for term, _ in glossary()]
    assert len(set(terms)) == len(terms)


def test_the_glossary_is_found():
    assert "(glossary.md)" in (ROOT / "docs" / "index.md").read_text()
    assert "(docs/glossary.md)" in (ROOT / "CONTRIBUTING.md").read_text()
