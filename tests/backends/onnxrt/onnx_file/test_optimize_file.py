"""A file's blocks are replaced in its own graph: the numbers stay, and so does every message outside of the blocks."""

import weakref

import onnx
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.errors import UsageError
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.tensors import tensor_of
from tests.onnx_in.bodies import LOOP, model
from tests.onnx_in.toys import E, H, V, export, ids, run, toy_lm

FORMS = [("bmm", "dynamo"), ("loop", "torchscript"), pytest.param("loop", "dynamo", marks=pytest.mark.nightly)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export(toy_lm(), tmp_path_factory.mktemp("onnx") / "home.onnx")


@pytest.fixture(scope="module")
def optimized(path):
    return moeopt.optimize(path)


@pytest.mark.parametrize(("form", "exporter"), FORMS)
def test_the_experts_of_each_exporter_are_found_by_what_they_compute(form, exporter, tmp_path):
    path = export(toy_lm(form, layers=1), tmp_path / "home.onnx", exporter)
    found = moeopt.optimize(path, verify="fast")
    (block,) = found.report.blocks
    assert (block.kind, block.status, block.experts, block.top_k) == ("moe", "rewritten", E, 2)
    assert block.name == "layers.0.mlp" and "home.onnx" in block.source
    assert found.certificate.passed
    more = ids(3, 11, seed=1)
    assert torch.allclose(found(more), run(path, input_ids=more)[0], rtol=1e-5, atol=1e-5)


def test_the_certificate_compares_both_files_and_the_experts_that_they_choose(optimized):
    end = optimized.certificate.end_to_end
    assert optimized.certificate.passed and end.passed
    assert 0 < end.distance < end.budget < 1e-4
    assert (end.ids, end.ids_differ) == (2 * 10 * 2, 0)
    assert [block.name for block in optimized.certificate.blocks] == ["layers.0.mlp", "layers.1.mlp"]


def test_it_is_called_with_names_or_in_order_in_any_size(optimized, path):
    more = ids(1, 7, seed=2)
    want = run(path, input_ids=more)[0]
    for got in (optimized(more), optimized(input_ids=more)):
        assert got.shape == (1, 7, V) and torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_every_message_outside_of_the_blocks_is_as_it_was(optimized, path, tmp_path):
    old, new = (onnx.load(p, load_external_data=False) for p in (path, optimized.save(tmp_path / "out") / "model.onnx"))
    before = {n.SerializeToString() for n in old.graph.node}
    after = {n.SerializeToString() for n in new.graph.node}
    gone = [n for n in old.graph.node if n.SerializeToString() not in after]
    assert len(before) == len(old.graph.node) and {"TopK", "ScatterElements"} <= {n.op_type for n in gone}
    assert all("mlp" in str(n.metadata_props) for n in gone if n.op_type != "Split")
    assert [v.SerializeToString() for v in new.graph.input] == [v.SerializeToString() for v in old.graph.input]
    assert [v.SerializeToString() for v in new.graph.output] == [v.SerializeToString() for v in old.graph.output]
    kept = {p.key: p.value for p in new.metadata_props}
    assert all(kept[p.key] == p.value for p in old.metadata_props)
    full = [read_onnx(p) for p in (path, tmp_path / "out" / "model.onnx")]
    weights = [{n: tensor_of(v.const_value, n) for n, v in f.model.graph.initializers.items()} for f in full]
    dropped = set(weights[0]) - set(weights[1])
    assert dropped and all("mlp" in name or name.startswith("val_") for name in dropped)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in set(weights[0]) & set(weights[1]))


def test_a_bundle_of_it_verifies_and_loads(optimized, path, tmp_path):
    bundle = optimized.save(tmp_path / "out")
    assert moeopt.verify(bundle).passed
    more = ids(2, 9, seed=3)
    assert torch.equal(moeopt.load(bundle)(input_ids=more), optimized(more))
    assert moeopt.verify(bundle, original=path).passed and moeopt.verify(optimized, original=path).passed
    other = export(toy_lm("loop", layers=1), tmp_path / "other.onnx", "torchscript")
    assert moeopt.verify(bundle, original=other).passed is False


def test_a_model_given_as_a_value_needs_no_file(path):
    proto = onnx.load(path)
    before = proto.SerializeToString()
    found = moeopt.optimize(proto, {"input_ids": ids()}, verify="off")
    assert len(found.report.rewritten) == 2 and found.certificate.passed is None
    assert proto.SerializeToString() == before


def test_weights_that_are_inputs_too_are_told(path, tmp_path):
    model = onnx.load(path)
    for held in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(held.name, held.data_type, list(held.dims)))
    found = moeopt.optimize(model, verify="fast")
    assert not found.report.blocks and torch.equal(found(ids()), run(path, input_ids=ids())[0])
    (note,) = [n for n in found.report.notes if n.startswith("weights that are inputs of the graph too (")]
    assert note in found.certificate.notes and "export with keep_initializers_as_inputs=False" in note
    bundle = found.save(tmp_path / "bundle")
    assert torch.equal(moeopt.load(bundle)(ids()), found(ids())) and moeopt.verify(bundle, original=path).passed


def test_an_output_without_a_type_is_told(path):
    model = onnx.load(path)
    score = next(node for node in model.graph.node if node.op_type == "TopK").output[0]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(score))
    with pytest.raises(UsageError, match=r"has no type, .* onnx\.shape_inference\.infer_shapes"):
        moeopt.optimize(model)


def test_a_file_without_experts_is_left_as_it_is(tmp_path):
    path = export(toy_lm("plain", layers=1), tmp_path / "plain.onnx")
    found = moeopt.optimize(path)
    assert found.report.blocks == () and found.certificate.passed
    assert "there is no block of experts in the file: it is left as it is" in found.report.notes
    assert torch.equal(found(ids()), run(path, input_ids=ids())[0])
    bundle = found.save(tmp_path / "out")
    old, new = (onnx.load(p, load_external_data=False) for p in (path, bundle / "model.onnx"))
    assert [n.SerializeToString() for n in old.graph.node] == [n.SerializeToString() for n in new.graph.node]
    assert moeopt.verify(bundle).passed


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"ids": ids()}, "takes input_ids; 'ids' is no input of it"),
        ((ids(), ids()), "takes 1 inputs (input_ids), and 2 were given"),
        (
            torch.zeros(2, 5),
            "the input 'input_ids' is torch.int64 with 2 dimensions, and was given as torch.float32 (2, 5)",
        ),
        (torch.full((1, 3), V + 7), "ONNX Runtime stops"),
    ],
)
def test_inputs_that_the_graph_does_not_take_are_told(path, inputs, said):
    with pytest.raises(UsageError, match=r"home\.onnx|ONNX Runtime stops") as caught:
        moeopt.optimize(path, inputs)
    assert said in str(caught.value)


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"inplace": True}])
def test_options_that_a_file_does_not_have_are_refused(path, fields):
    with pytest.raises(UsageError, match="keeps its dtype and is not written to: leave out dtype= and inplace="):
        moeopt.optimize(path, **fields)


@pytest.mark.parametrize("target", ["cuda", "nv_tensorrt_rtx"])
def test_another_target_than_the_cpu_is_refused_before_anything_is_read(target):
    with pytest.raises(UsageError, match=r"an ONNX file is optimised for the CPU .* leave out device= and target="):
        moeopt.optimize(model(LOOP), target=target)


def test_notes_speak_of_the_file_and_not_of_pytorch(optimized):
    notes = [*optimized.report.notes, *optimized.certificate.notes]
    assert any("may go to other experts on ONNX Runtime than in the file" in note for note in notes)
    assert not any("PyTorch" in note for note in notes)


def test_a_reason_that_speaks_of_code_says_what_the_owner_of_a_file_can_do():
    inside = LOOP.replace(
        "part = Mul(c, w)", "mean = ReduceMean <axes = [-1]> (b)\n v = Mul(w, mean)\n part = Mul(c, v)"
    )
    (block,) = moeopt.optimize(model(inside)).report.blocks
    assert block.status == "declined"
    assert "; who has only the file: export the model with another form of its experts" in block.reason


def test_a_file_is_not_quantised(path):
    with pytest.raises(UsageError, match="keep their format: leave out quantize=, or quantise the PyTorch model"):
        moeopt.optimize(path, quantize="int8")


def test_another_backend_than_onnx_runtime_is_refused(path):
    with pytest.raises(UsageError, match="an ONNX file is optimised for ONNX Runtime: leave out backend='torch'"):
        moeopt.optimize(path, backend="torch")


def test_a_rewrite_that_is_wrong_is_not_kept(path, monkeypatch):
    from moeopt.backends.onnxrt.onnx_file import write

    def damaged(file, graph, *rest):
        made = real(file, graph, *rest)
        for tensor in made.graph.initializer:
            if tensor.name == "layers.1.query.bias":
                tensor.raw_data = b"\x00\x00\x80?" * H
        return made

    real = write._stitched_proto
    monkeypatch.setattr(write, "_stitched_proto", damaged)
    engine = moeopt.optimize(path)
    reasons = [block.reason for block in engine.report.blocks if block.kind == "moe"]
    assert engine.report.rewritten == ()
    assert reasons and all(r.startswith("it was rewritten, compared and reverted: ") for r in reasons)
    assert all("the new graph is not equivalent and was not kept: output 0 moves" in r for r in reasons)


def test_one_engine_at_a_time_holds_the_weights(path, monkeypatch):
    """Each session of an engine has a copy of them: that of the regions is gone before the new file's is opened."""
    alive, others = weakref.WeakSet(), []
    plain = OnnxEngine.__init__

    def counted(self, *args, **kwargs):
        others.append(len(alive))
        plain(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(OnnxEngine, "__init__", counted)
    found = moeopt.optimize(path, verify="fast")
    assert found.report.rewritten and len(others) >= 2 and others[-1] == 0


@pytest.mark.parametrize("found", [True, False], ids=["rewritten", "left_alone"])
def test_mapped_keeps_the_weights_of_a_file_in_their_file(path, found):
    engine = moeopt.optimize(path, mapped=True, verify="fast", **({} if found else {"skip_passes": "group_experts"}))
    assert bool(engine.report.rewritten) == found
    options = engine.model.session.session.get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
