"""Three text files for each block: what it did, what was recognised, what runs now."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from tests.recognise.tiny import GLU, H, MoE, seeded


class Noisy(MoE):
    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.rand(())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = MoE(), Noisy()

    def forward(self, x):
        return self.second(self.first(x))


def texts(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*.txt"))}


def test_a_rewritten_and_a_declined_block(tmp_path):
    model, x = seeded(Model), torch.randn(6, H)
    for left in ("01-second/program.txt", "02-gone/reading.txt", "02-gone/1-x.before.graph", "03-mine/notes.md"):
        (tmp_path / "dump" / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dump" / left).write_text("of an earlier run")
    report = moeopt.optimize(model, x, dump=tmp_path / "dump").report
    assert not (tmp_path / "dump" / "02-gone").exists() and (tmp_path / "dump" / "03-mine" / "notes.md").is_file()
    assert [b.status for b in report.blocks] == ["rewritten", "declined"]
    files = texts(tmp_path / "dump")
    assert sorted(files) == [
        "00-first/program.txt", "00-first/reading.txt", "00-first/witness.txt", "01-second/reading.txt",
        "01-second/witness.txt",
    ]  # fmt: skip
    rewritten, declined = report.blocks
    assert f"function  {rewritten.spec}" in files["00-first/reading.txt"]
    assert files["01-second/reading.txt"] == f"declined: {declined.reason}\n"
    witness = files["00-first/witness.txt"]
    assert "# in router" in witness and "topk(" in witness and "tiny.py:" in witness and f"float32[6, {H}]" in witness
    program = files["00-first/program.txt"].splitlines()
    assert sum(" = experts " in line for line in program) == 1 and len(program) < len(witness.splitlines()) / 2
    assert program[-1].startswith("return %")


def test_the_same_model_gives_the_same_files(tmp_path):
    x = torch.randn(6, H)
    for name in "ab":
        moeopt.optimize(seeded(MoE), x, dump=str(tmp_path / name))
    assert texts(tmp_path / "a") == texts(tmp_path / "b") != {}


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"dump='.*file/dump': the folder cannot be made or cleared: Not a directory"):
        moeopt.optimize(seeded(MoE), torch.randn(6, H), dump=tmp_path / "file" / "dump")


def test_a_split_dense_ffn_has_its_files_too(tmp_path):
    moeopt.optimize(seeded(GLU), torch.randn(6, H), dense="split", experts=2, verify="off", dump=tmp_path)
    names = [p.name for p in sorted(tmp_path.rglob("*.*"))]
    assert names == [
        "1-split_dense_ffn.after.graph", "1-split_dense_ffn.before.graph", "program.txt", "reading.txt", "witness.txt",
    ]  # fmt: skip
    assert " = experts 0(" in (tmp_path / "00-GLU" / "program.txt").read_text()
