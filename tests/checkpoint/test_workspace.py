"""A folder that several processes share: one works, the others wait for it, and then read at the same time."""

import errno
import os
from pathlib import Path

import pytest
import torch

from moeopt.bundle.weights_file import WeightsFile
from moeopt.checkpoint.journal import JOURNAL, WEIGHTS, Journal, Workspace, folder_of
from moeopt.errors import CheckpointError, UsageError
from moeopt.file_lock import CAN_LOCK

pytestmark = pytest.mark.skipif(not CAN_LOCK, reason="nothing is locked here")

KEY = {"checkpoint": "a"}


def opened(folder, wait=lambda: pytest.fail("nobody works there"), key=KEY):
    return Journal(Workspace(folder, wait), key, 1 << 16, 4096)


def worked(folder, key=KEY):
    journal = opened(folder, key=key)
    assert journal.writes and not journal.begun
    journal.keep("a.weight", torch.arange(6.0).view(2, 3), ["stored.a"])
    return journal


def test_others_wait_for_the_one_that_works_and_then_read_at_once(tmp_path):
    worker, waits = worked(tmp_path / "w"), []

    def wait():
        waits.append(1)
        if len(waits) == 3:
            worker.finish()
            worker.close(done=False)

    first = opened(tmp_path / "w", wait)
    second = opened(tmp_path / "w")
    assert len(waits) == 3
    for reader in (first, second):
        value, sources = reader.weights["a.weight"]
        assert not reader.writes and torch.equal(value, torch.arange(6.0).view(2, 3)) and sources == ["stored.a"]
        assert reader.keep("b.weight", torch.ones(2), []) is None  # nothing is written by a reader
    before = (tmp_path / "w" / JOURNAL).read_bytes()
    for reader in (first, second):
        reader.finish()
        reader.close(done=True)
    assert (tmp_path / "w" / JOURNAL).read_bytes() == before and (tmp_path / "w" / WEIGHTS).is_file()


def test_work_that_was_broken_off_is_gone_on_with_by_the_next(tmp_path):
    worked(tmp_path / "w").close(done=False)
    journal = opened(tmp_path / "w")
    assert journal.writes and set(journal.weights) == {"a.weight"}
    journal.keep("b.weight", torch.ones(2), ["stored.b"])
    journal.finish()
    journal.close(done=False)
    reader = opened(tmp_path / "w")
    assert not reader.writes and set(reader.weights) == {"a.weight", "b.weight"}
    reader.close(done=False)


def test_other_work_begins_anew_once_nobody_reads(tmp_path):
    journal = worked(tmp_path / "w")
    journal.finish()
    journal.close(done=False)
    reader, waits = opened(tmp_path / "w"), []

    def wait():
        waits.append(1)
        reader.close(done=False)

    other = opened(tmp_path / "w", wait, {"checkpoint": "b"})
    assert other.writes and not other.begun and waits == [1]
    assert torch.equal(reader.weights["a.weight"][0], torch.arange(6.0).view(2, 3))  # mapped from the old file
    other.close(done=True)
    assert not (tmp_path / "w").exists()


def test_a_file_that_was_damaged_after_it_was_done(tmp_path):
    journal = worked(tmp_path / "w")
    offset = journal.file.mapped.offset_of(journal.weights["a.weight"][0])
    journal.finish()
    journal.close(done=False)
    with (tmp_path / "w" / WEIGHTS).open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match=r"was damaged since it was written: delete it, and start again"):
        opened(tmp_path / "w")


def test_a_file_that_somebody_removed_is_written_anew(tmp_path):
    journal = worked(tmp_path / "w")
    journal.finish()
    journal.close(done=False)
    (tmp_path / "w" / WEIGHTS).unlink()
    worked(tmp_path / "w").close(done=True)


def test_what_somebody_else_keeps_in_the_folder_stays(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("years of work")
    worked(tmp_path / "w").close(done=True)
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["thesis.tex"]
    opened(tmp_path / "w").close(done=False)  # nothing was begun
    assert (tmp_path / "w" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", [WEIGHTS, JOURNAL, "codes-0"])
@pytest.mark.parametrize("shared", [True, False])
def test_somebody_elses_file_of_the_same_name_stays(tmp_path, name, shared):
    """Also in the folder beside a bundle, whose name is moeopt's own."""
    out = Workspace(tmp_path / "w", lambda: None) if shared else tmp_path / "w"
    folder = folder_of(out)
    folder.mkdir()
    (folder / name).write_bytes(b"years of training")
    with pytest.raises(UsageError, match=rf"holds '{name}', and no {JOURNAL} says that moeopt wrote it: it stays"):
        Journal(out, KEY, 1 << 16, 4096)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: b"years of training"}
    (folder / name).unlink()  # the lock was let go
    Journal(out, KEY, 1 << 16, 4096).close(done=True)


@pytest.mark.parametrize("owner, name", [(WeightsFile, "__init__"), (Path, "unlink")])
def test_a_run_that_is_stopped_while_it_begins_leaves_nothing_that_seems_to_be_somebody_elses(
    tmp_path, monkeypatch, owner, name
):
    def stop(*given, **fields):
        raise KeyboardInterrupt

    for key in (KEY, {"checkpoint": "b"}):  # in a new folder, and in one of other work
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stop)
            opened(tmp_path / "w", key=key)
        worked(tmp_path / "w", key).close(done=False)


def test_a_weights_file_that_a_bundle_has_too_is_not_written_to(tmp_path):
    """A run that was killed when its bundle was whole: the next one leaves the bundle as it is until it has another."""
    folder = folder_of(tmp_path / "b")
    journal = Journal(tmp_path / "b", KEY, 1 << 16, 4096)
    journal.keep("a.weight", torch.arange(6.0).view(2, 3), ["stored.a"])
    journal.file.finish({"a.weight": journal.weights["a.weight"][0]})
    (tmp_path / "b").mkdir()
    os.link(folder / WEIGHTS, tmp_path / "b" / WEIGHTS)
    journal.close(done=False)
    before = (tmp_path / "b" / WEIGHTS).read_bytes()
    again = Journal(tmp_path / "b", KEY, 1 << 16, 4096)
    assert not again.begun and (tmp_path / "b" / WEIGHTS).read_bytes() == before
    again.close(done=True)
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == before


def test_where_there_is_no_room_to_begin_nothing_is_left(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda *given: (_ for _ in ()).throw(OSError(errno.EFBIG, "File too large")))
        with pytest.raises(OSError, match=r"too large: raise the limit on the size of files \(ulimit -f\), or take"):
            opened(tmp_path / "w")
    assert not (tmp_path / "w").exists()
    worked(tmp_path / "w").close(done=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file here refuses as a full disk does")
def test_a_line_that_the_disk_does_not_take_is_told_and_the_folder_let_go(tmp_path):
    journal = worked(tmp_path / "w")
    journal._journal.close()
    journal._journal = open("/dev/full", "w")  # noqa: SIM115  the journal closes it
    with pytest.raises(OSError, match=r"free some space, and call again: '.*journal.jsonl'"):
        journal.keep("b.weight", torch.ones(2), ["stored.b"])
    journal.close(done=False)
    assert set(opened(tmp_path / "w").weights) == {"a.weight"}
