"""The documents do not lie: their links lead somewhere, their code runs, their commands and fields exist."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.doc_snippets import KINDS, fences, run_page, run_python

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    words = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)  # in code a call may look like a link
    for link in re.findall(r"\]\(([^)#]+)", words):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_design_note_is_listed():
    folder = ROOT / "docs" / "design-notes"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {p.name for p in folder.glob("*.md")} - {"README.md"}


def test_every_folder_of_the_package_is_told():
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "how-it-works.md").read_text().partition("## The folders")[2]))
    folders = {path.parent.name for path in (ROOT / "moeopt").glob("*/__init__.py")}
    assert folders <= told, sorted(folders - told)
    assert {word for word in told if word.islower()} - {"optimize", "load", "verify"} == folders, "of a folder that was"


def test_the_first_page_has_the_figures_of_the_readme():
    rows = re.findall(
        r"^(?:home-made|Qwen3).*?x +([\d.]+)x.* (\d+ of \d+|\S+ off)$", (ROOT / "README.md").read_text(), re.M
    )
    text = " ".join((ROOT / "docs" / "index.md").read_text().split())
    told = re.search(
        r"is ([\d.]+) times as fast for 16 tokens in PyTorch, ([\d.]+) times as an ONNX engine; .* "
        r"([\d.]+) and ([\d.]+) times, with (\d+ of \d+) greedy",
        text,
    )
    assert told is not None and len(rows) == 4
    assert list(told.groups()) == [*(few for few, _ in rows), rows[2][1]] and rows[2][1] == rows[3][1]


def test_readme_code_runs(tmp_path, monkeypatch):
    from examples.quickstart import TwoOfEight

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEOPT_VERIFY", "fast")
    transformers = pytest.importorskip("transformers", reason="the first lines load a Hugging Face model")
    from tests.test_hugging_face import make, tokenizer

    make().save_pretrained(tmp_path / "path" / "to" / "model")
    tokenizer().save_pretrained(tmp_path / "path" / "to" / "model")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    mine = types.ModuleType("my_models")
    mine.build = lambda: (TwoOfEight(16, 32, 4).eval(), torch.randn(2, 5, 16))
    monkeypatch.setitem(sys.modules, "my_models", mine)
    names = {}
    for language, _, text in fences(ROOT / "README.md"):
        if language == "python":
            run_python(text, names, "README.md")
    assert (tmp_path / "bundle" / "moeopt.json").is_file()


@pytest.mark.parametrize("page", SITE, ids=lambda p: p.name)
def test_every_snippet_of_a_page_runs(page, tmp_path, monkeypatch):
    blocks = fences(page)
    assert {language for language, _, _ in blocks} <= KINDS
    if not {"python", "console"} & {language for language, _, _ in blocks}:
        return
    if "onnxruntime" in page.read_text() and page.name == "backends.md":
        pytest.importorskip("onnxruntime", reason="the page makes an ONNX Runtime engine")
    if page.name == "streaming.md":
        pytest.importorskip("transformers", reason="the page streams a Hugging Face directory")
    model = next(text for _, title, text in fences(ROOT / "docs" / "start.md") if title == "my_model.py")
    (tmp_path / "my_model.py").write_text(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if page.name == "ci.md":
        if torch.cuda.is_available():
            pytest.skip("the page shows what is printed without a GPU")
        import moeopt

        sys.modules.pop("my_model", None)
        from my_model import build

        made, x = build()
        moeopt.optimize(made, x, verify="fast").save("bundle")
    try:
        assert run_page(page, tmp_path) > 0
    finally:
        for name in ("my_model", "test_model", "test_bundle", "drop_unit_scale", "test_drop_unit_scale"):
            sys.modules.pop(name, None)


def test_the_readme_fits_a_screen_and_a_half():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 130
    assert not [line for line in lines if len(line) > 140]


def test_readme_commands_exist():
    import typer

    from moeopt.cli.commands import app

    group = typer.main.get_command(app)
    used = re.findall(r"^moeopt (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert used and set(used) <= set(group.commands)


def test_every_environment_variable_in_the_docs_is_read():
    code = "".join(file.read_text() for file in (ROOT / "moeopt" / "options").glob("*.py"))
    read = set(re.findall(r"MOEOPT_\w+", code))
    for page in PAGES:
        assert set(re.findall(r"MOEOPT_\w+", page.read_text())) - {"MOEOPT_"} <= read, page.name
    table = set(re.findall(r"^\| `(MOEOPT_\w+)` \|", (ROOT / "docs" / "debugging.md").read_text(), re.M))
    assert table == read - {"MOEOPT_"}


def test_the_example_project_has_the_model_of_the_documentation():
    model = next(text for _, title, text in fences(ROOT / "docs" / "start.md") if title == "my_model.py")
    assert (ROOT / "examples" / "ci" / "my_model.py").read_text() == model


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert re.search(rf"[ :]{page.relative_to(ROOT / 'docs')}$", nav, re.M), page
