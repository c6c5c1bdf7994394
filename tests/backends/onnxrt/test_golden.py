"""Golden runs of an engine: what another right session may differ by, and what no right session does."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.backends.onnxrt import bundle as bundles
from moeopt.backends.onnxrt.golden import golden_runs
from moeopt.backends.onnxrt.shaken import shaken
from moeopt.bundle.golden import check_golden, compare, golden_run
from moeopt.errors import NotEquivalentError
from tests.backends.onnxrt.toys import reseal

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")


def test_a_state_is_one_token_and_a_result_is_its_rows():
    """Each row of a state is one number of a channel times a vector: where that number cancels, the row is rounding."""
    channel = torch.tensor([[1.0], [1e-5], [2.0]])
    state = (channel * torch.tensor([1.0, 2.0, 3.0, 4.0]))[None]
    other = ((channel + torch.tensor([[0.0], [1e-9], [0.0]])) * torch.tensor([1.0, 2.0, 3.0, 4.0]))[None]
    assert compare(other, state)[0] == pytest.approx(1e-4, rel=0.1)
    assert compare(other, state, state=True)[0] < 1e-8
    run = golden_run((), {}, (state,))
    assert check_golden(lambda _: (other,), [run], 1e-6).reason.startswith(
        "golden run 0, result 0: it is 1.00e-04 away"
    )
    assert check_golden(lambda _: (other,), [run], 1e-6, states={0}).passed
    assert not check_golden(lambda _: (state * 1.001,), [run], 1e-6, states={0}).passed


def test_each_sequence_of_a_state_is_judged_alone():
    state = torch.ones(2, 3, 4) * torch.tensor([1e3, 1.0])[:, None, None]
    other = state * torch.tensor([1.0, 1.001])[:, None, None]
    assert compare(other, state, state=True)[0] == pytest.approx(1e-3, rel=0.01)
    assert compare(state[0] * 1.001, state[0], state=True)[0] == pytest.approx(1e-3, rel=0.01)


@pytest.fixture(scope="module")
def jamba(tmp_path_factory):
    """The bundle of a model with recurrent states and keys and values."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.families.build import FAMILIES

    family = FAMILIES["jamba"]
    if not family.available:
        pytest.skip("this transformers has no such model")
    made = moeopt.optimize(family.build(), family.inputs(), backend="onnxruntime", verify="fast")
    assert made.certificate.passed
    return made.save(tmp_path_factory.mktemp("jamba") / "b")


def _load(directory, **how):
    bundles._PASSED.clear()  # else a graph that came back in this process is not run again
    return moeopt.load(directory, **how)


def test_the_states_of_a_language_model_are_known(jamba):
    engine = _load(jamba)
    names = engine.signature["out_tree"]["keys"]
    assert {names[n] for n in engine.states} == {n for n in names if "conv_states" in n or "recurrent_states" in n}
    assert len(engine.states) == 2 and len(names) == 5


def test_sessions_that_pack_weights_and_sessions_that_do_not_give_the_same(jamba):
    for mapped in (False, True):
        assert _load(jamba, mapped=mapped)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_row_of_a_state_that_cancels_does_not_refuse_a_bundle(jamba, tmp_path):
    """The least row of a state is some of its own digits off, which is rounding beside the state's other rows."""
    right = shutil.copytree(jamba, tmp_path / "b")
    tensors = load_file(right / "golden.safetensors")
    plain = safe_open(right / "golden.safetensors", "pt").metadata()
    state = tensors["0.out.1"]
    rows = state.reshape(-1, state.shape[-1])
    rows[rows.norm(dim=-1).argmin()] *= 1 + 2e-4
    save_file(tensors, right / "golden.safetensors", plain)
    assert _load(reseal(right)).states
    state *= 1.001
    save_file(tensors, right / "golden.safetensors", plain)
    with pytest.raises(NotEquivalentError, match="golden run 0, result 1: it is 9.9"):
        _load(reseal(right))


DAMAGED = ["mamba.in_proj.weight", "mamba.A_log", "mamba.conv1d.weight", "mamba.out_proj.weight", "router.weight"]


@pytest.mark.parametrize("which", DAMAGED)
def test_a_weight_that_is_a_thousandth_off_is_refused(jamba, tmp_path, which):
    bad = shutil.copytree(jamba, tmp_path / "b")
    graph = onnx.load(bad / "model.onnx", load_external_data=False).graph
    (weight,) = [w for w in graph.initializer if w.name.endswith(which)]
    place = {entry.key: entry.value for entry in weight.external_data}
    data = bad / place["location"]
    numbers = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.float32)
    begin, count = int(place["offset"]) // 4, int(place["length"]) // 4
    numbers[begin : begin + count] *= 1.001
    data.write_bytes(numbers.numpy().tobytes())
    with pytest.raises(NotEquivalentError, match="the engine does not give what it was verified to give: golden run"):
        _load(reseal(bad))


def _runs(engine, distance):
    ids = torch.tensor([[5, 6, 7], [9, 3, 4]])
    calls = [((), engine.causal_lm.feeds(input_ids=some)) for some in (ids, ids[:1, :1])]
    return golden_runs(engine, calls, distance)


def test_a_run_of_token_ids_has_a_margin_or_is_left_out(jamba):
    """Nothing of such a call can be nudged, so its products are rounded otherwise instead."""
    engine = _load(jamba)
    assert len(_runs(engine, 1e-4)) == 2  # some eps of rounding do not move a result so far
    assert len(_runs(engine, 1e-9)) == 1  # they move each further than that, and then the first stays
    own = engine.session
    inputs = _runs(engine, 1e-4)[0].inputs
    quiet = engine.run_flat(inputs)
    with shaken(engine) as inside:
        assert inside and engine.session is not own
        noisy = [engine.run_flat(inputs) for _ in range(2)]
    assert engine.session is own
    moved = [compare(run["logits"], quiet["logits"])[0] for run in noisy]
    assert moved[0] != moved[1] and all(1e-8 < far < 1e-4 for far in moved)


def test_where_no_noise_can_be_added_inputs_are_nudged(jamba, monkeypatch):
    monkeypatch.setattr("moeopt.backends.onnxrt.shaken.PRODUCTS", frozenset())
    engine = _load(jamba)
    with shaken(engine) as inside:
        assert not inside and engine.session is not None
    assert len(_runs(engine, 1e-9)) == 2  # token ids stay as they are


def test_noise_is_of_the_dtype_that_a_product_reads():
    from moeopt.backends.onnxrt.shaken import _shake

    def graph_of(kind):
        ends = [onnx.helper.make_tensor_value_info(name, kind, ["T", 2]) for name in ("x", "y")]
        weight = onnx.helper.make_tensor("w", kind, [2, 2], [1, 0, 0, 1])
        node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])

    for kind, dtype in ((1, torch.float32), (10, torch.float16), (16, torch.bfloat16)):
        proto = graph_of(kind)
        assert _shake(proto) == 1
        assert [node.op_type for node in proto.graph.node] == ["MatMul", "RandomNormalLike", "CastLike", "Mul"]
        said = {a.name: onnx.helper.get_attribute_value(a) for a in proto.graph.node[1].attribute}
        assert said["scale"] == torch.finfo(dtype).eps and said["mean"] == 1.0
        assert proto.graph.node[-1].output[0] == "y"
        onnx.checker.check_model(proto)
