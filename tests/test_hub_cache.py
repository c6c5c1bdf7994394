"""A name as on the hub: what no model can be called, what the cache holds in part, and whose download it is."""

import json
import shutil
import sys

import pytest
from transformers import AutoModelForCausalLM

import moeopt
from moeopt.causal_lm.companions import _copied
from moeopt.errors import CheckpointError
from moeopt.hub_cache import cached_file, cached_folder, name_of
from moeopt.published.directory_of import directory_of
from moeopt.published.headers import absent_files, interrupted
from tests.test_cli import run
from tests.test_hugging_face import cached, make

IMPOSSIBLE = ["a..b/c", "a--b/c", "caf\u00e9/model", "owner/" + "x" * 120, "a/b.git", "a/b."]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.modules["huggingface_hub.file_download"].constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_name_that_no_model_can_have_is_in_no_cache(hub, name, tmp_path, capsys):
    assert cached_folder(name) is None and cached_file(name, "config.json") is None
    assert not _copied(name, "tokenizer.json", tmp_path)
    model = make()
    model.config._name_or_path = name
    assert directory_of(model) is None
    code, _, err = run(capsys, "optimize", name)
    assert code == 2 and f"{name} is no file, and no model on the Hugging Face hub can have this name" in err


def test_a_name_whose_weights_are_not_in_the_cache_is_no_random_model(hub, capsys):
    folder = cached(hub, "someone/tiny-moe")
    assert name_of(folder) == "someone/tiny-moe" and name_of(hub / "a" / "b") == ""
    (folder / "model.safetensors").unlink()
    code, out, err = run(capsys, "optimize", "someone/tiny-moe", "--out", hub / "b")
    assert code == 1 and not out and not (hub / "b").exists()
    assert "has its config.json and no weights: `hf download someone/tiny-moe` brings them" in err
    with pytest.raises(CheckpointError, match="file: `hf download someone/tiny-moe` brings the weights"):
        moeopt.optimize("someone/tiny-moe")
    code, out, _ = run(capsys, "inspect", "someone/tiny-moe")
    assert code == 0 and "4 experts" in out  # a config is enough to count


@pytest.mark.parametrize("command", ["optimize", "explain", "profile"])
def test_random_weights_are_told(tmp_path, capsys, command):
    make().config.save_pretrained(tmp_path / "model")
    told = f"random weights, seed 7: {tmp_path / 'model'} holds config.json and no weights"
    verify = ["--verify", "fast"] if command == "optimize" else []
    code, out, err = run(capsys, command, tmp_path / "model", "--seed", "7", "--json", *verify)
    body = json.loads(out)
    assert code == 0 and told in err
    assert told in "".join(body.get("report", body)["notes"])
    if command == "optimize":
        assert told in "".join(body["certificate"]["notes"])


def test_weights_of_their_own_are_not_called_random(tmp_path, capsys):
    make().save_pretrained(tmp_path / "model")
    code, out, err = run(capsys, "explain", tmp_path / "model")
    assert code == 0 and "random weights" not in out + err


def test_a_neighbours_download_is_not_this_models(tmp_path):
    mine, other = tmp_path / "x" / "mine", tmp_path / "blobs"
    mine.mkdir(parents=True)
    other.mkdir()
    (other / "abc.incomplete").touch()
    assert interrupted(mine) == ""
    folder = cached(tmp_path, "someone/tiny-moe")
    (folder.parent.parent / "blobs").mkdir()
    (folder.parent.parent / "blobs" / "abc.incomplete").touch()
    assert "a download was interrupted" in interrupted(folder)


def test_what_an_index_names_and_is_not_there(tmp_path):
    make().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and absent_files(tmp_path) == []
    shards[0].unlink()
    assert absent_files(tmp_path) == [shards[0].name]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert absent_files(tmp_path) == []  # it is damaged, which is said where it is read
    with pytest.raises(CheckpointError, match="names files outside the directory"):
        moeopt.optimize(tmp_path)
    shutil.copyfile(shards[1], tmp_path / "model.safetensors")
    assert absent_files(tmp_path) == []


def test_a_name_in_the_cache_is_loaded_as_it_was(hub):
    cached(hub, "someone/tiny-moe")
    model = AutoModelForCausalLM.from_pretrained("someone/tiny-moe", local_files_only=True)
    assert directory_of(model) == cached_folder("someone/tiny-moe")
