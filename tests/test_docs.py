"""The documents do not lie: their links lead somewhere, their code runs, their commands and fields exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_design_note_is_listed():
    folder = ROOT / "docs" / "design-notes"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {p.name for p in folder.glob("*.md")} - {"README.md"}


def test_readme_code_runs(tmp_path, monkeypatch):
    from examples.quickstart import TwoOfEight

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEOPT_VERIFY", "fast")
    torch.manual_seed(0)
    exec(code, {"model": TwoOfEight(16, 32, 4).eval(), "x": torch.randn(2, 5, 16)})
    assert (tmp_path / "bundle" / "moeopt.json").is_file()


def test_readme_commands_exist():
    import typer

    from moeopt.cli.commands import app

    group = typer.main.get_command(app)
    used = re.findall(r"^moeopt (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert used and set(used) <= set(group.commands)


def test_every_environment_variable_in_the_docs_is_read():
    read = set(re.findall(r"MOEOPT_\w+", (ROOT / "moeopt" / "options.py").read_text()))
    for page in PAGES:
        assert set(re.findall(r"MOEOPT_\w+", page.read_text())) - {"MOEOPT_"} <= read, page.name
