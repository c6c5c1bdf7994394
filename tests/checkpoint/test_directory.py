"""Whatever is wrong with a directory's files is said before a weight is read: what, where and the way out."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.cli import main
from moeopt.errors import CheckpointError
from moeopt.inspection.config_file import config_fields
from moeopt.published.headers import read_header, read_index

NAME = "model-0000{}-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    parts = {
        1: {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)},
        2: {"c": torch.ones(2, dtype=torch.bfloat16)},
    }
    for number, tensors in parts.items():
        save_file(tensors, tmp_path / NAME.format(number))
    where = {name: NAME.format(number) for number, tensors in parts.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path


def test_tensors_are_listed_without_being_read_and_mapped_when_asked_for(sharded):
    found = CheckpointDirectory(sharded)
    assert list(found) == ["a", "b", "c"] and len(found.files) == 2 and found.bytes == 24 + 16 + 4
    assert (found["c"].dtype, found["c"].shape) == (torch.bfloat16, (2,))
    a = found.tensor("a")
    assert torch.equal(a, torch.arange(6.0).reshape(2, 3)) and found.holds(a) and not found.holds(torch.ones(2))
    found.release()
    assert torch.equal(a, torch.arange(6.0).reshape(2, 3))


def test_the_identity_follows_the_files(sharded):
    before = CheckpointDirectory(sharded).identity()
    assert CheckpointDirectory(sharded).identity() == before
    save_file({"c": torch.zeros(2, dtype=torch.bfloat16)}, sharded / NAME.format(2))
    assert CheckpointDirectory(sharded).identity() != before


def test_a_file_that_changes_after_its_header_was_read(sharded):
    found = CheckpointDirectory(sharded)
    found.check_unchanged()
    save_file({"c": torch.zeros(2, dtype=torch.bfloat16)}, sharded / NAME.format(2))
    assert torch.equal(found.tensor("b"), found.tensor("b"))
    for fails in (found.check_unchanged, lambda: found.tensor("c")):
        with pytest.raises(CheckpointError, match=r"model-00002.* was written to while .*wait until nothing writes"):
            fails()
    (sharded / NAME.format(2)).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.* was removed while the model was read"):
        found.check_unchanged()


def test_files_without_an_index_are_all_read(sharded):
    (sharded / INDEX).unlink()
    assert sorted(CheckpointDirectory(sharded)) == ["a", "b", "c"]
    save_file({"a": torch.ones(1)}, sharded / "again.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in again.safetensors and in model-00001.*keep one of the two"):
        CheckpointDirectory(sharded)


def test_a_file_beside_the_index_is_left_alone(sharded):
    save_file({"a": torch.ones(1), "z": torch.ones(1)}, sharded / "consolidated.safetensors")
    assert sorted(CheckpointDirectory(sharded)) == ["a", "b", "c"]


def test_a_missing_file(sharded):
    (sharded / NAME.format(2)).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {NAME.format(2)} of the 2 files .* fetch the file again"):
        CheckpointDirectory(sharded)


@pytest.mark.parametrize("place", [".", ".cache/huggingface/download", "../../blobs"])
def test_a_download_that_was_interrupted(sharded, place):
    folder = sharded / "snapshots" / "revision"
    folder.mkdir(parents=True)
    for name in (NAME.format(1), INDEX):
        (sharded / name).rename(folder / name)
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "f00.incomplete").write_bytes(b"half")
    words = rf"lacks {NAME.format(2)} of .* a download was interrupted \(.*f00.incomplete\); `hf download`, called"
    with pytest.raises(CheckpointError, match=words):
        CheckpointDirectory(folder)


def test_a_file_that_was_cut_off(sharded):
    file = sharded / NAME.format(1)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors is damaged: the data should end at byte"):
        CheckpointDirectory(sharded)


def test_a_header_that_was_overwritten(sharded):
    file = sharded / NAME.format(1)
    file.write_bytes(file.read_bytes()[:8] + b"\0" * (file.stat().st_size - 8))
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors is damaged: its header is not JSON"):
        CheckpointDirectory(sharded)


def test_an_index_of_another_version(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["d"] = NAME.format(2)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"says that 'd' is in .*00002.* of two versions; fetch both again"):
        CheckpointDirectory(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX} (is damaged|names files outside)"):
        CheckpointDirectory(sharded)


def test_an_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors file: give the directory of the weights"):
        CheckpointDirectory(tmp_path)


def test_a_directory_of_pickles(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds its weights as pickles .* save it once with save_pretrained\(\)"):
        CheckpointDirectory(tmp_path)


def header(path, entry, data=b"\0" * 8):
    text = json.dumps({"a": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_dtype_that_pytorch_lacks(tmp_path):
    header(tmp_path / "model.safetensors", {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]})
    with pytest.raises(CheckpointError, match=r"the tensor 'a' is of dtype F4, .* convert the checkpoint first"):
        CheckpointDirectory(tmp_path)


def test_a_shape_that_is_not_that_of_the_bytes(tmp_path):
    header(tmp_path / "model.safetensors", {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})
    with pytest.raises(CheckpointError, match=r"'a' has 8 bytes, and F32 \[3\] takes 12; fetch the file again"):
        CheckpointDirectory(tmp_path)


def test_numbers_at_odd_addresses_are_read_right(tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    text += b" " * (3 - len(text) % 4)  # its data begin at an odd byte
    values = torch.tensor([1.5, -2.5])
    data = values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert torch.equal(CheckpointDirectory(tmp_path).tensor("a"), values)


def test_a_pointer_of_git_lfs(sharded):
    (sharded / NAME.format(2)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"00002.safetensors is a pointer of Git LFS, .*`git lfs pull` in its"):
        CheckpointDirectory(sharded)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere", "link to itself"])
def test_what_is_no_file(sharded, kind):
    """Without an index every ``*.safetensors`` is read; a pipe would be waited for."""
    (sharded / INDEX).unlink()
    odd = sharded / "odd.safetensors"
    make = {"folder": odd.mkdir, "pipe": lambda: os.mkfifo(odd), "link to itself": lambda: odd.symlink_to(odd)}
    make.get(kind, lambda: odd.symlink_to(sharded / "nowhere"))()
    words = "is no file: put the checkpoint" if kind in ("folder", "pipe") else "cannot be read .*: fetch"
    with pytest.raises(CheckpointError, match=rf"odd.safetensors {words}"):
        CheckpointDirectory(sharded)


def test_tensors_that_share_bytes(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": entry, "b": {**entry, "shape": [1], "data_offsets": [4, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: the tensors 'a' and 'b' share bytes"):
        CheckpointDirectory(tmp_path)


@pytest.mark.parametrize("text", [b'{"a": {}, "a": {}}', b"[" * 100_000])
def test_a_header_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"its header is not JSON \(it has two entries 'a'|its .*recur"):
        CheckpointDirectory(tmp_path)


@pytest.mark.parametrize("left", [INDEX, "model.safetensors.incomplete"])
def test_the_command_takes_no_random_numbers_for_weights_that_did_not_come(tmp_path, capsys, left):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / left).write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["optimize", str(tmp_path), "--out", str(tmp_path / "b")])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "holds no weights, and random numbers are not meant here: " in said
    assert "index.json names some; fetch them" in said or "`hf download`, called again, goes on with it" in said


@pytest.mark.parametrize("read", [read_header, read_index, config_fields])
def test_a_file_that_is_another_users(tmp_path, monkeypatch, read):
    """To fetch it again would end in the same."""

    def refuse(*given, **fields):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"file cannot be read \(Permission denied\): give yourself the right to"):
        read(tmp_path / "file")
