"""A block that computes something else on this machine than it was verified to gets another lowering, or stops."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx

import moeopt
from moeopt.backends.onnxrt import bundle as bundles
from moeopt.backends.onnxrt import selftest
from moeopt.backends.onnxrt.known_answer import block_of
from moeopt.backends.onnxrt.session import Session
from moeopt.errors import EngineFallbackWarning, EngineNotExecutableError, NotEquivalentError
from tests.backends.onnxrt.toys import E, H, call, edit, edit_graph, net

ATOL = 64 * torch.finfo(torch.float32).eps
"""Two blocks, outputs of about 1, sums of at most 12 terms; another lowering sums in another order."""


@pytest.fixture(autouse=True)
def nothing_tested_before(monkeypatch):
    monkeypatch.setattr(bundles, "_PASSED", set())


def right(engine, batch=3, tokens=7):
    inputs = call(batch, tokens)
    with torch.no_grad():
        want = net()(**inputs)
    got = engine(**inputs)
    for one, two in zip((got["x"], *got["states"]), (want["x"], *want["states"]), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=ATOL)


def count_from_the_end(bundle):
    """Each block numbers its experts from the last: as a runtime that reads ids otherwise would."""
    sites = json.loads((bundle / "moeopt.json").read_text())["sites"]

    def change(proto):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(E - 1), "last"))
        for site in sites:
            inside = [n for n in proto.graph.node if block_of(n) == site["name"]]
            for node in inside:
                for number, name in enumerate(node.input):
                    if name == site["ids"]:
                        node.input[number] = f"turned.{name}"
            turn = onnx.helper.make_node(
                "Sub", ["last", site["ids"]], [f"turned.{site['ids']}"], f"{site['name']}/turn"
            )
            turn.metadata_props.add(key="moeopt.block", value=site["name"])
            proto.graph.node.insert(list(proto.graph.node).index(inside[0]), turn)

    return edit_graph(bundle, change)


def test_a_wrong_block_falls_back(onnx_bundle):
    count_from_the_end(onnx_bundle)
    with pytest.warns(
        EngineFallbackWarning, match="layers.0, layers.1: lowering .* fails its self-test on cpu"
    ) as seen:
        engine = moeopt.load(onnx_bundle)
    assert len(seen) == 1 and "from the float64 result, and" in str(seen[0].message)
    right(engine)
    right(engine, 2, 2)
    assert engine.notes[0] == str(seen[0].message)
    assert engine.directory != onnx_bundle, "the bundle itself is left alone"
    with pytest.warns(EngineFallbackWarning):
        certificate = moeopt.verify(onnx_bundle)
    assert certificate.passed and engine.notes[0] in certificate.notes


def test_names_that_the_graph_has_already_are_left_to_it(onnx_bundle):
    """A damaged node reads no weights any more: they stay in the graph, under the names that the new nodes' have."""
    count_from_the_end(onnx_bundle)

    def change(proto):
        taken = {i.name for i in proto.graph.initializer}
        for name in ("layers.0/const", *(f"layers.0/const_{n}" for n in range(1, 9))):
            if name not in taken:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7]), name))

    edit_graph(onnx_bundle, change)
    with pytest.warns(EngineFallbackWarning):
        right(moeopt.load(onnx_bundle))


def test_a_block_that_does_not_run_falls_back(onnx_bundle, monkeypatch):
    """Only the cut-out with the saved lowering refuses to load, as a kernel that this machine lacks would."""
    original = selftest.session_of
    monkeypatch.setattr(selftest, "session_of", lambda *a: (_ for _ in ()).throw(RuntimeError("NOT_IMPLEMENTED: MoE")))
    with pytest.warns(EngineFallbackWarning, match=r"it does not run \(RuntimeError: NOT_IMPLEMENTED: MoE\)"):
        engine = moeopt.load(onnx_bundle)
    right(engine)
    monkeypatch.setattr(selftest, "session_of", original)


def test_each_lowering_can_take_over(onnx_bundle, monkeypatch):
    taken = []
    count_from_the_end(onnx_bundle)
    every = selftest.ranked
    for skip in range(3):
        monkeypatch.setattr(
            selftest, "ranked", lambda *a, skip=skip: [c for c in every(*a) if c.lowering][skip:] or pytest.skip("few")
        )
        with pytest.warns(EngineFallbackWarning):
            engine = moeopt.load(onnx_bundle)
        right(engine)
        taken.append(engine.notes[0].split("; ")[1].split(" runs")[0])
    assert len(set(taken)) >= 2, taken


def test_no_lowering_is_right(onnx_bundle, monkeypatch):
    monkeypatch.setattr(selftest, "known_answer_test", lambda *a: "it is wrong")
    with pytest.raises(EngineNotExecutableError) as err:
        moeopt.load(onnx_bundle)
    text = str(err.value)
    assert "block layers.0 computes something else on cpu" in text and "optimise the model again" in text
    assert "unrolled: it is wrong" in text and "dense: it is wrong" in text


def test_a_lowering_of_another_moeopt(onnx_bundle):
    edit(onnx_bundle / "moeopt.json", lambda data: [site.update(lowering="gone") for site in data["sites"]])
    right(moeopt.load(onnx_bundle))  # nobody needs it while the block is right
    bundles._PASSED.clear()
    count_from_the_end(onnx_bundle)
    with pytest.raises(EngineNotExecutableError, match="this moeopt has no lowering 'gone' to read its weights back"):
        moeopt.load(onnx_bundle)


def test_probes_stand_for_kinds(onnx_pristine):
    engine = moeopt.load(onnx_pristine)
    sites = engine.manifest.data["sites"]
    assert [s["name"] for s in sites] == ["layers.0", "layers.1"]
    assert [s["probe"] for s in sites] == [0, 0] and len(engine.manifest.data["probes"]) == 1


def test_what_passed_is_not_tested_again(onnx_pristine, monkeypatch):
    asked, replayed = [], []
    ask, check = selftest.known_answer_test, bundles.replay_golden
    monkeypatch.setattr(selftest, "known_answer_test", lambda *a: asked.append(1) or ask(*a))
    monkeypatch.setattr(bundles, "replay_golden", lambda *a: replayed.append(1) or check(*a))
    for _ in range(2):
        right(moeopt.load(onnx_pristine))
    assert (len(asked), len(replayed)) == (1, 1)


def test_wrong_outside_the_blocks_is_refused(onnx_pristine, monkeypatch):
    """The whole graph's session is wrong, each block alone is right: the golden runs tell."""
    run = Session.run

    def off(self, inputs):
        return [t * 1.001 if "x" in self.inputs and "mask" in self.inputs else t for t in run(self, inputs)]

    monkeypatch.setattr(Session, "run", off)
    with pytest.raises(NotEquivalentError, match="on cpu the engine does not give what it was verified to give"):
        moeopt.load(onnx_pristine)
    certificate = moeopt.verify(onnx_pristine)
    assert certificate.passed is False and certificate.end_to_end.distance > certificate.end_to_end.budget


def test_golden_runs_have_other_sizes_and_a_stated_budget(onnx_pristine):
    from moeopt.bundle.golden import load_golden

    stated = moeopt.load(onnx_pristine).manifest.data["golden"]
    runs = load_golden(onnx_pristine / "golden.safetensors", torch.device("cpu"))
    assert [tuple(r.inputs[0].shape) for r in runs] == [(2, 5, H), (5, 11, H), (1, 1, H)][: len(runs)] and len(
        runs
    ) >= 2
    assert stated["runs"] == len(runs) and 0 < stated["distance"] < 1e-4 and "end-to-end budget" in stated["why"]
