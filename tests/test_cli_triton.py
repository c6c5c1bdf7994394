"""`moeopt triton`: the layout and the configuration of Triton Inference Server, read by its own protobuf."""

import sys

import pytest
import torch

from tests import children

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import moeopt
from moeopt.cli.triton_command import write_triton_model
from tests.toy_moe import Block, H


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    engine = moeopt.optimize(Block().eval(), torch.randn(6, H), backend="onnxruntime", verify="off")
    return engine.save(tmp_path_factory.mktemp("bundle") / "moe")


def test_the_command_writes_what_the_server_reads(bundle, tmp_path):
    run = [sys.executable, "-m", "moeopt", "triton", bundle, tmp_path / "repository"]
    done = children.run(run)
    assert done.returncode == 0, done.stderr
    model = tmp_path / "repository" / "moe"
    assert done.stdout == f"saved: {model}\n"
    assert sorted(p.name for p in (model / "1").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (model / "config.pbtxt").read_text() == (
        'name: "moe"\nbackend: "onnxruntime"\nmax_batch_size: 0\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: [ -1, {H} ] }}\n'
        f'output {{ name: "output" data_type: TYPE_FP32 dims: [ -1, {H} ] }}\n'
        "instance_group { kind: KIND_CPU count: 1 }\n"
    )


def test_what_it_wrote_runs_in_plain_onnx_runtime(bundle, tmp_path):
    import onnxruntime

    model = write_triton_model(bundle, tmp_path, "other")
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(9, H)
    got = torch.tensor(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(
        got, moeopt.load(bundle)(x), rtol=1e-5, atol=1e-5
    )  # the engine may run moeopt's operator


def test_the_server_s_own_protobuf_reads_it(bundle, tmp_path):
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    config = (write_triton_model(bundle, tmp_path) / "config.pbtxt").read_text()
    read = text_format.Parse(config, messages.ModelConfig())
    assert read.backend == "onnxruntime" and list(read.input[0].dims) == [-1, H]


def test_mistakes_are_told(bundle, tmp_path):
    torch_bundle = moeopt.optimize(Block().eval(), torch.randn(6, H), verify="off").save(tmp_path / "torch")
    with pytest.raises(
        moeopt.UsageError, match="is a bundle for torch, .* optimise the model with backend='onnxruntime'"
    ):
        write_triton_model(torch_bundle, tmp_path / "r")
    with pytest.raises(moeopt.UsageError, match=r"'../up' is no name for a model .* give another with --name"):
        write_triton_model(bundle, tmp_path / "r", "../up")
    write_triton_model(bundle, tmp_path / "r")
    with pytest.raises(moeopt.UsageError, match="moe is there already: remove it, or give another name"):
        write_triton_model(bundle, tmp_path / "r")
    with pytest.raises(moeopt.UsageError, match="torch is a bundle: give the server's model repository, a folder of"):
        write_triton_model(bundle, torch_bundle)
    (tmp_path / "file").touch()
    with pytest.raises(moeopt.UsageError, match="file is a file: give the server's model repository, a folder of"):
        write_triton_model(bundle, tmp_path / "file")
    with pytest.raises(moeopt.UsageError, match="cannot be written: Not a directory; give a repository that you may"):
        write_triton_model(bundle, tmp_path / "file" / "r")
    with pytest.raises(moeopt.BundleError):
        write_triton_model(tmp_path, tmp_path / "r", "none")
    with pytest.raises(moeopt.UsageError, match="is no name for a model .up to 200 letters, digits"):
        write_triton_model(bundle, tmp_path / "r", "a" * 201)


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["^C", "full"])
def test_what_was_stopped_half_way_is_not_there(bundle, tmp_path, monkeypatch, ending):
    def stopped(source, to):
        assert not (tmp_path / "moe").exists()
        raise ending

    monkeypatch.setattr("shutil.copyfile", stopped)
    with pytest.raises(type(ending)) as told:
        write_triton_model(bundle, tmp_path)
    assert "free some space, and call again" in str(told.value) or isinstance(ending, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_cleared_and_an_empty_folder_filled(bundle, tmp_path):
    (tmp_path / ".moe.abcdefgh" / "1").mkdir(parents=True)
    (tmp_path / "moe").mkdir()
    assert (write_triton_model(bundle, tmp_path) / "config.pbtxt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
