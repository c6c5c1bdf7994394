"""A directory gives the model that transformers loads, bit for bit, with its weights on disk."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.checkpoint import preflight as preflights
from moeopt.checkpoint.journal import folder_of
from moeopt.checkpoint.stream import streamed
from moeopt.cli import main
from moeopt.errors import CheckpointError, NotSaveableError, UsageError
from moeopt.find.example_inputs import made_up
from moeopt.options import Options

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 writes other checkpoints of these models", allow_module_level=True)

from tests.checkpoint.families import FAMILIES, write, write_remote  # noqa: E402

OFF = Options(verify="off")


def loaded(path, **fields):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **fields}).eval()


def assert_same_model(got, want):
    assert type(got) is type(want) and not got.training
    ours, theirs = got.state_dict(), want.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    for (name, a), (_, b) in zip(got.named_buffers(), want.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert got.generation_config.to_dict() == want.generation_config.to_dict()
    assert got.config.name_or_path == want.config.name_or_path
    assert [p.requires_grad for p in got.parameters()] == [p.requires_grad for p in want.parameters()]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_is_the_model_that_transformers_loads(tmp_path, family):
    write(family, tmp_path / "model", shards=3)
    with streamed(tmp_path / "model", OFF, out=tmp_path / "b") as source:
        assert_same_model(source.model, loaded(tmp_path / "model"))
        assert all(source.journal.file.mapped.holds(p) for p in source.model.parameters())
        assert len(source.layers) == 2
    with streamed(tmp_path / "model", OFF) as source:
        assert_same_model(source.model, loaded(tmp_path / "model"))


def test_tied_weights_are_one_tensor(tmp_path):
    write("qwen3", tmp_path / "model", tie_word_embeddings=True)
    with streamed(tmp_path / "model", OFF, out=tmp_path / "b") as source:
        assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
        assert_same_model(source.model, loaded(tmp_path / "model"))
        written = sum(p.numel() * p.element_size() for p in source.model.parameters())
        assert source.journal.file.end - source.journal.file.begin < written + 64 * 40


def test_a_cast_is_made_weight_by_weight(tmp_path):
    write("qwen3", tmp_path / "model", shards=2)
    with streamed(tmp_path / "model", Options(verify="off", dtype="bfloat16"), out=tmp_path / "b") as source:
        assert_same_model(source.model, loaded(tmp_path / "model", dtype=torch.bfloat16))
        assert all(source.journal.file.mapped.holds(p) for p in source.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_another_dtype_than_the_config_says(tmp_path, dtype):
    write("mixtral", tmp_path / "model", dtype=dtype)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    with streamed(tmp_path / "model", OFF, out=tmp_path / "b") as source:
        assert_same_model(source.model, loaded(tmp_path / "model"))
        assert next(source.model.parameters()).dtype == torch.float32


def test_optimised_and_saved_it_is_what_the_loaded_model_becomes(tmp_path):
    write("qwen3", tmp_path / "model", shards=3)
    lines = []
    fast = moeopt.optimize(tmp_path / "model", out=tmp_path / "b", verify="fast", progress=lines.append)
    model = loaded(tmp_path / "model")
    inputs = made_up(model, 0)[1]
    plain = moeopt.optimize(model, inputs, verify="fast")
    plain.save(tmp_path / "plain")
    assert [(b.name, b.status, b.kind) for b in fast.report.blocks] == [
        (b.name, b.status, b.kind) for b in plain.report.blocks
    ]
    assert len(fast.report.rewritten) == 2 and fast.certificate.passed
    with torch.no_grad():
        want = plain(**inputs).logits
        assert torch.equal(fast(**inputs).logits, want)
        assert torch.equal(moeopt.load(tmp_path / "b")(**inputs).logits, want)
        assert torch.equal(moeopt.load(tmp_path / "plain")(**inputs).logits, want)
    assert moeopt.verify(tmp_path / "b").passed
    graphs = [json.loads((tmp_path / b / "graph.json").read_text()) for b in ("b", "plain")]
    assert graphs[0]["nodes"] == graphs[1]["nodes"] and graphs[0]["views"] == graphs[1]["views"]
    weights = [load_file(tmp_path / b / "weights.safetensors") for b in ("b", "plain")]
    for name in {view["block"] for view in graphs[1]["views"].values()}:
        assert torch.equal(weights[0][name], weights[1][name])
    assert not folder_of(tmp_path / "b").exists() and {p.name for p in tmp_path.iterdir()} == {"model", "b", "plain"}
    said = " ".join(moeopt.load(tmp_path / "b").certificate["notes"])
    assert "streamed: each block and each layer verified; end to end composed from layers: distance at most" in said
    assert "2 layers with rewritten blocks were compared one by one on the activations that reach them" in said
    assert any("weights in 2 layers of at most" in line and "memory needed" in line for line in lines)
    assert [line for line in lines if line.startswith("layer ")] == [
        f"layer {n + 1} of 2: model.layers.{n}" for n in range(2)
    ]


def test_a_layer_that_is_not_equivalent_fails_the_certificate(tmp_path, monkeypatch):
    from moeopt.checkpoint import layer_checks, stream

    write("mixtral", tmp_path / "model")
    real = layer_checks.end_to_end

    def wrong(original, optimized, args, kwargs, **fields):
        def shifted(*args, **kwargs):
            return optimized(*args, **kwargs) + 1

        shifted.__self__ = optimized
        return real(original, shifted, args, kwargs, **fields)

    monkeypatch.setattr(layer_checks, "end_to_end", wrong)
    made = moeopt.optimize(tmp_path / "model", verify="fast")
    assert made.certificate.passed is False
    assert made.certificate.end_to_end.reason.startswith("layer model.layers.0: output 0 moves by")
    assert stream.STREAMED in " ".join(made.certificate.notes)


def test_code_of_its_own_runs_only_where_that_is_allowed(tmp_path):
    write_remote(tmp_path / "model")
    with pytest.raises(UsageError, match=r"transformers cannot load it: add --trust-remote-code \(trust_remote_code="):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")
    made = moeopt.optimize(tmp_path / "model", out=tmp_path / "b", trust_remote_code=True, verify="fast")
    assert [b.name for b in made.report.rewritten] == ["blocks.0", "blocks.1"] and made.certificate.passed
    assert "2 layers with rewritten blocks were compared one by one" in " ".join(made.certificate.notes)
    assert moeopt.verify(tmp_path / "b").passed


def test_weights_that_are_missing_are_no_random_numbers(tmp_path):
    write("qwen3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds no values for model.layers.1.mlp.experts.down_proj, .*gate_up"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_one_expert_that_is_missing(tmp_path):
    write("qwen3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.experts.2.up" not in n}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not become a Qwen3MoeForCausalLM .* fetch both again"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")


def test_tensors_of_nothing_are_told(tmp_path):
    write("qwen3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    report = moeopt.optimize(tmp_path / "model", verify="off").report
    assert "model.extra.weight of the checkpoint belong to nothing in the model" in report.notes


def test_a_config_of_other_sizes(tmp_path):
    write("qwen3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 24}))
    with pytest.raises(CheckpointError, match=r"do not become a Qwen3MoeForCausalLM .* fetch both again"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")


def test_a_quantised_directory_is_refused(tmp_path):
    write("qwen3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(
        UsageError, match=r"config.json says that .* is quantised \(gptq\), and no tensor of its files has codes in"
    ):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")


def test_too_little_memory_is_said_before_anything_is_read(tmp_path, monkeypatch):
    write("qwen3", tmp_path / "model")
    monkeypatch.setattr(preflights, "free_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"needs about 0.20 GB of memory, and 1.0 kB are free .*: end other programs"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_without_a_bundle_what_is_put_together_must_fit(tmp_path, monkeypatch):
    write("qwen3", tmp_path / "model", hidden_size=256, num_hidden_layers=6)
    monkeypatch.setattr(preflights, "LIBRARIES", 0)
    monkeypatch.setattr(preflights, "free_memory", lambda: 1_000_000)
    with pytest.raises(UsageError, match=r"give out= \(--out\) with a directory that has 2.00 MB free: then 0.60 MB"):
        moeopt.optimize(tmp_path / "model")


def test_too_little_disk_is_said_before_anything_is_read(tmp_path, monkeypatch):
    write("qwen3", tmp_path / "model")
    monkeypatch.setattr(preflights, "_free_disk", lambda out: 1000)
    with pytest.raises(UsageError, match=r"needs about 1.1. MB, and 1.0 kB are free there: free some space"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(model="nowhere"), "nowhere is no directory: give a model, or the directory of a Hugging Face checkpoint"),
        (
            dict(model="some/Model-8x7B"),
            r"if some/Model-8x7B is a name of the Hugging Face hub, huggingface_hub.snapshot_download\('some/Mod",
        ),
        (dict(model="."), "is a directory without config.json: give a model, or the directory"),
        (dict(model=torch.nn.Linear(2, 2), task="text-generation"), "model is a Linear: leave them out"),
        (dict(model=torch.nn.Linear(2, 2), trust_remote_code=True), "model is a Linear: leave them out"),
    ],
)
def test_what_is_no_directory(fields, words):
    with pytest.raises(UsageError, match=words):
        moeopt.optimize(**fields)


def test_a_task_that_is_none(tmp_path):
    write("dense", tmp_path / "model")
    for call in (moeopt.optimize, moeopt.explain):
        with pytest.raises(UsageError, match="^task='text-clasification' is none: did you mean text-classification"):
            call(tmp_path / "model", task="text-clasification")


def test_a_damaged_generation_config_is_found_before_a_weight_is_read(tmp_path, monkeypatch):
    from moeopt.checkpoint.directory import CheckpointDirectory

    write("dense", tmp_path / "model")
    monkeypatch.setattr(CheckpointDirectory, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    for text in ('{"temperature":', "[]"):
        (tmp_path / "model" / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="generation_config.json is damaged .*: fetch it again, or remove it"):
            moeopt.optimize(tmp_path / "model", out=tmp_path / "b")


@pytest.mark.parametrize("out", [None, "b"])
def test_a_file_that_is_written_to_while_the_model_is_read(tmp_path, out, monkeypatch):
    from moeopt.checkpoint import kept_weights

    write("dense", tmp_path / "model")
    file, real = tmp_path / "model" / "model.safetensors", kept_weights.load_mapped

    def then_written(*args):
        made = real(*args)
        tensors = load_file(file)
        save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "new", metadata={"format": "pt"})
        (tmp_path / "new").replace(file)
        return made

    monkeypatch.setattr(kept_weights, "load_mapped", then_written)
    with pytest.raises(CheckpointError, match=r"model.safetensors was written to while the model was .*start again"):
        moeopt.optimize(tmp_path / "model", out=out and tmp_path / out, verify="off")
    assert not (tmp_path / "b").exists()


def test_out_of_a_model_saves_it(tmp_path):
    from tests.toy_moe import X, build

    moeopt.optimize(build(), X, out=tmp_path / "b", verify="fast")
    assert moeopt.verify(tmp_path / "b").passed


def test_a_device_that_it_is_on_already_copies_no_weight(tmp_path):
    write("mixtral", tmp_path / "model")
    with streamed(tmp_path / "model", OFF, out=tmp_path / "b") as source:
        made = moeopt.optimize(source.model, device="cpu", dtype="float32", verify="off")
        assert len(made.report.rewritten) == 2
        assert all(source.journal.file.mapped.holds(p) for p in made.model.parameters())


def test_the_models_own_directory_is_no_place(tmp_path):
    write("qwen3", tmp_path / "model")
    with pytest.raises(UsageError, match="is the model's own directory: give a new one"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "model")


@pytest.mark.parametrize("letters", [245, 300])
def test_a_name_that_is_too_long_for_the_bundle_or_for_the_folder_beside_it(tmp_path, letters):
    write("qwen3", tmp_path / "model")
    with pytest.raises(UsageError, match="' cannot be written: File name too long; give another directory"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / ("n" * letters))
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_explain_reads_one_layer_of_each_kind(tmp_path, monkeypatch):
    from moeopt.checkpoint.directory import CheckpointDirectory

    write("deepseek", tmp_path / "model", num_hidden_layers=4)
    read = set()
    real = CheckpointDirectory.tensor
    monkeypatch.setattr(CheckpointDirectory, "tensor", lambda self, n: read.add(self[n].name) or real(self, n))
    report = moeopt.explain(tmp_path / "model", verify="fast")
    assert {name.split(".")[2] for name in read if name.startswith("model.layers.")} == {"0", "1"}
    moes = [b for b in report.blocks if b.kind == "moe"]
    assert [b.name for b in moes] == [f"model.layers.{n}.mlp.experts" for n in (1, 2, 3)]
    assert {b.status for b in moes} == {"rewritten"}
    assert any(
        "2 of 4 layers were read, one of each kind (model.layers.0, model.layers.1): what is said of the other 2" in n
        for n in report.notes
    )


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def test_the_command_streams_a_directory(tmp_path, capsys):
    write("mixtral", tmp_path / "model", shards=2)
    code, out, err = run(capsys, "optimize", tmp_path / "model", "--out", tmp_path / "b", "--verify", "fast")
    assert code == 0 and "streamed: each block and each layer verified" in out and f"saved: {tmp_path / 'b'}" in out
    assert "layer 2 of 2: model.layers.1" in err and "memory needed" in err
    assert run(capsys, "verify", tmp_path / "b")[0] == 0
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    for file in sorted((tmp_path / "model").glob("*.safetensors"))[1:]:
        file.unlink()
    code, _, err = run(capsys, "optimize", tmp_path / "model", "--out", tmp_path / "c")
    assert code == 1 and "lacks model-0000" in err and "Traceback" not in err and not (tmp_path / "c").exists()


def test_what_cannot_be_saved_names_the_block_that_was_declined(tmp_path):
    """Its own code is in the graph, with an op of transformers that a bundle does not call."""
    write("mixtral", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if ".experts.1." in name)[0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    words = (
        r"cannot be saved .*; model.layers.0.mlp.experts is left to its own code: \w+ has 1 NaN of its 12,288 entries"
    )
    with pytest.raises(NotSaveableError, match=words):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b", verify="off")


def test_a_failed_save_says_that_the_work_is_kept(tmp_path, caplog, monkeypatch):
    from moeopt.backends.torch import bundle

    write("mixtral", tmp_path / "model")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "save_weights", full)
    with caplog.at_level(logging.WARNING, "moeopt"), pytest.raises(OSError, match="No space left"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b", verify="off")
    assert f"{folder_of(tmp_path / 'b')} keeps what is done: the same call goes on from there" in caplog.text
