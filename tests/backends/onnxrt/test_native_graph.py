"""The second graph of an engine, with moeopt's own operator: verified like the first, over its weights, or not run."""

import json
import shutil
import warnings

import onnx
import onnx_ir as ir
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt import bundle as bundles
from moeopt.backends.onnxrt import custom_op, native_choice, plan, select
from moeopt.backends.onnxrt.budget import cost_of
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.native_choice import BothForms
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.cli.about import bundle_facts
from moeopt.errors import BundleError, EngineFallbackWarning
from moeopt.lower.onnx.plan import LoweringChoice
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of, tokens
from tests.backends.onnxrt.native import choose_native, needs_operator
from tests.backends.onnxrt.toys import call, edit, net, optimized, reseal

NATIVE = "model.native.onnx"
ATOL = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def made():
    needs_operator()
    with pytest.MonkeyPatch.context() as patch:
        choose_native(patch)
        return optimized()


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    return made.save(tmp_path_factory.mktemp("native") / "b")


@pytest.fixture
def bundle(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "_PASSED", set())
    return shutil.copytree(saved, tmp_path / "b")


def right(engine):
    inputs = call(3, 7)
    with torch.no_grad():
        want = net()(**inputs)
    torch.testing.assert_close(engine(**inputs)["x"], want["x"], rtol=0, atol=ATOL)


def graph(bundle, name=NATIVE):
    return onnx.load(bundle / name, load_external_data=False)


def edit_native(bundle, change):
    proto = graph(bundle)
    change(proto, [n for n in proto.graph.node if n.domain == "moeopt"])
    (bundle / NATIVE).write_bytes(proto.SerializeToString())
    return reseal(bundle)


def test_the_engine_runs_it_and_report_and_certificate_say_so(made):
    assert made.model.graph == NATIVE
    right(made)
    assert all(b.lowering.startswith("onnxruntime native, measured no slower than") for b in made.report.blocks)
    said = [n for n in made.report.notes if "run in moeopt's native kernel" in n]
    assert len(said) == 1 and "2 blocks" in said[0] and said[0] in made.certificate.notes
    assert made.certificate.passed and "with moeopt's native experts (" in made.certificate.device


def test_weights_are_stored_once_and_the_plain_graph_stays_plain(saved):
    plain, native = graph(saved, "model.onnx"), graph(saved)
    assert not any(n.domain == "moeopt" for n in plain.graph.node)
    assert sum(n.domain == "moeopt" for n in native.graph.node) == 2
    assert {o.domain for o in plain.opset_import} <= {"", "com.microsoft"}
    there = {t.name: t for t in plain.graph.initializer}
    for tensor in native.graph.initializer:
        assert tensor == there[tensor.name]
    assert not (saved / f"{NATIVE}.data").exists()
    assert [i.name for i in native.graph.input] == [i.name for i in plain.graph.input]
    assert [o.name for o in native.graph.output] == [o.name for o in plain.graph.output]


def test_a_bundle_runs_it_where_the_operator_is(bundle):
    engine = moeopt.load(bundle)
    assert engine.graph == NATIVE and "where it is absent, model.onnx runs" in engine.notes[-1]
    right(engine)
    facts = bundle_facts(bundle)
    assert "run in moeopt's native kernel" in facts["runs"]
    assert facts["lowerings"] and all(line.endswith("), in model.onnx") for line in facts["lowerings"])
    certificate = moeopt.verify(bundle)
    assert certificate.passed and "with moeopt's native experts" in certificate.device


def test_a_bundle_runs_the_plain_graph_where_it_is_not(bundle, monkeypatch):
    monkeypatch.setattr(bundles, "why_not", lambda: "no C++ compiler was found; install one")
    engine = moeopt.load(bundle)
    assert engine.graph == "model.onnx"
    assert engine.notes[-1] == f"model.onnx runs, not {NATIVE}: no C++ compiler was found; install one"
    right(engine)
    certificate = moeopt.verify(bundle)
    assert certificate.passed and certificate.device == "onnxruntime cpu" and engine.notes[-1] in certificate.notes
    monkeypatch.setattr("moeopt.backends.onnxrt.backend.why_not", lambda: "no C++ compiler was found; install one")
    assert bundle_facts(bundle)["runs"].startswith("model.onnx, not model.native.onnx: no C++ compiler")


def test_options_of_the_user_s_own_serve_two_loads(bundle):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for _ in range(2):
        engine = bundles.load_onnx_bundle(bundle, session_options=options)
        assert engine.graph == NATIVE
        right(engine)


def test_a_block_that_answers_wrongly_falls_back_with_a_warning(bundle):
    def change(proto, nodes):
        for node in nodes:
            next(a for a in node.attribute if a.name == "activation").s = b"relu"

    edit_native(bundle, change)
    with pytest.warns(
        EngineFallbackWarning, match="model.onnx runs, not model.native.onnx: a block fails its self-test"
    ):
        engine = moeopt.load(bundle)
    assert engine.graph == "model.onnx"
    right(engine)


def test_a_graph_that_differs_outside_its_blocks_falls_back_with_a_warning(bundle):
    def change(proto, nodes):
        node = next(n for n in proto.graph.node if n.op_type == "Softmax")
        node.op_type = "Sigmoid"
        del node.attribute[:]

    edit_native(bundle, change)
    with pytest.warns(EngineFallbackWarning, match="does not give what it was verified to give"):
        engine = moeopt.load(bundle)
    assert engine.graph == "model.onnx"
    right(engine)


def test_a_session_that_the_operator_refuses_falls_back_with_a_warning(bundle):
    def change(proto, nodes):
        next(a for a in nodes[0].attribute if a.name == "experts").i = 3

    edit_native(bundle, change)
    with pytest.warns(EngineFallbackWarning, match="another rank or number of experts"):
        assert moeopt.load(bundle).graph == "model.onnx"


def other_domain(proto, nodes):
    nodes[0].domain = "evil"


def other_operator(proto, nodes):
    nodes[0].op_type = "Anything"


def other_attribute(proto, nodes):
    nodes[0].attribute.append(onnx.helper.make_attribute("path", "/etc/passwd"))


def attribute_of_another_type(proto, nodes):
    next(a for a in nodes[0].attribute if a.name == "experts").type = onnx.AttributeProto.FLOAT


def computed_weight(proto, nodes):
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", [nodes[0].input[3]], ["made"]))
    nodes[0].input[3] = "made"


def few_inputs(proto, nodes):
    del nodes[0].input[4:]


def other_file(proto, nodes):
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = f"{NATIVE}.data"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_domain, "is evil.Experts, which moeopt does not write"),
        (other_operator, "is moeopt.Anything, which moeopt does not write"),
        (other_attribute, "has the attribute 'path', which moeopt does not write"),
        (attribute_of_another_type, "has the attribute 'experts', which moeopt does not write"),
        (computed_weight, "reads 'made' for a weight, which moeopt does not write"),
        (few_inputs, "has other inputs and outputs than it may"),
        (other_file, "weights lie in model.onnx.data only"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_hostile_graph_is_refused_whether_it_would_run_or_not(bundle, change, words, there, monkeypatch):
    if not there:
        monkeypatch.setattr(bundles, "why_not", lambda: "not here")
    edit_native(bundle, change)
    with pytest.raises(BundleError, match=words):
        moeopt.load(bundle)


def test_the_operator_is_in_the_native_graph_only(bundle):
    (bundle / "model.onnx").write_bytes((bundle / NATIVE).read_bytes())
    with pytest.raises(BundleError, match="uses operators of 'moeopt', which moeopt does not write"):
        moeopt.load(reseal(bundle))


def test_a_manifest_that_names_a_graph_which_is_not_there(bundle):
    (bundle / NATIVE).unlink()
    edit(bundle / "moeopt.json", lambda data: data["files"].pop(NATIVE))
    with pytest.raises(BundleError, match="the bundle has no model.native.onnx"):
        moeopt.load(bundle)
    edit(bundle / "moeopt.json", lambda data: data.update(native={"blocks": 7}))
    with pytest.raises(BundleError, match="native"):
        moeopt.load(bundle)


@pytest.mark.parametrize("base", ["unrolled", "dense"])
def test_what_a_call_holds_and_multiplies_is_counted(base):
    site = make_site(H=12, I=6, D=10)
    proto = ir.to_proto(model_of(site, Native(by_name(base))))
    found = cost_of(proto, {"x": (1000, 12), "ids": (1000, 2), "weights": (1000, 2)})
    rows = 2000
    assert found.products >= rows * (2 * 6 * 12 + 6 * 10)
    assert 4 * rows * (12 + 2 * 6 + 6 + 10) <= found.bytes <= 8 * rows * (12 + 2 * 6 + 6 + 10)


def test_a_form_that_differs_is_given_up_and_the_other_answers():
    site = make_site()
    x, ids, weights = tokens(site, 5)
    feeds = {"x": x, "ids": ids, "weights": weights}
    want = moeopt.ops.reference.experts_reference(x, ids, weights, site.bank, site.spec)

    class Fixed:
        def __init__(self, y):
            self.y = y

        def run(self, inputs):
            return [self.y]

    off, holed = want * 1.001, want.clone()
    holed[0] = float("nan")
    for wrong, words in (
        (off, "from the float64 result"),
        (holed, "finite for other tokens"),
        (want[:2], "its result is"),
    ):
        reasons = []
        both = BothForms(site, Fixed(wrong), Fixed(want), reasons.append)
        assert torch.equal(both.run(feeds)[0], want) and torch.equal(both.run(feeds)[0], want)
        assert len(reasons) == 1 and words in reasons[0]
    both = BothForms(site, Fixed(want + 1e-7 * want), Fixed(want), pytest.fail)
    assert not torch.equal(both.run(feeds)[0], want)


def test_a_wrong_operator_is_given_up_while_blocks_are_verified(monkeypatch):
    needs_operator()
    choose_native(monkeypatch)
    monkeypatch.setattr(native_choice, "_difference", lambda *args: "it differs, says the test")
    done = optimized()
    assert done.model.graph == "model.onnx" and done.certificate.passed
    assert "lowering native was given up: it differs, says the test" in done.certificate.notes
    right(done)


def test_an_engine_that_is_not_equivalent_with_it_runs_without_it(monkeypatch):
    needs_operator()
    choose_native(monkeypatch)
    from moeopt.backends.onnxrt import native_graph

    write = native_graph.write_native

    def wrong(directory, *args):
        found = write(directory, *args)
        proto = onnx.load(directory / NATIVE, load_external_data=False)
        for node in proto.graph.node:
            if node.domain == "moeopt":
                next(a for a in node.attribute if a.name == "activation").s = b"relu"
        (directory / NATIVE).write_bytes(proto.SerializeToString())
        return found

    monkeypatch.setattr("moeopt.backends.onnxrt.build.write_native", wrong)
    done = optimized()
    assert done.model.graph == "model.onnx" and done.certificate.passed
    assert any(n.startswith("moeopt's native kernel was given up: the ONNX Runtime engine") for n in done.report.notes)
    assert all("native was given up" in b.lowering for b in done.report.blocks)
    right(done)


def test_nothing_is_chosen_without_a_measurement_or_a_library(monkeypatch):
    site = make_site()
    assert OrtPlan("cpu").choice(site).name != "native", "the suite measures nothing"
    needs_operator()
    asked, runs = [], []

    class Counted:
        def __init__(self, site, lowering):
            self.session, self.name = plan.session_of(site, lowering), lowering.name

        def run(self, feeds):
            (y,) = self.session.run(feeds)
            runs.append((self.name, len(y)))

    def fastest(question, ways, default, advantage):
        found = ways()
        asked.append((question, set(found), default))
        for way in found.values():
            for made in way:
                made()
        return next(name for name in found if name != default)

    monkeypatch.setattr(native_choice, "measuring", lambda: True)
    monkeypatch.setattr(native_choice, "fastest", fastest)
    choice = LoweringChoice("unrolled", by_name("unrolled"), "")
    assert native_choice.native_choice(site, choice, select.TOKENS, Counted) is None
    ((question, ways, default),) = asked
    assert ways == {"native", "unrolled"} and default == "native", "as fast as the other it is taken: it copies nothing"
    assert "onnxruntime" in question and "K 2" in question
    assert runs == [(name, T) for name in ("unrolled", "native") for T in select.TOKENS]
    monkeypatch.setattr(native_choice, "native_library", lambda: None)
    assert (
        native_choice.native_choice(site, LoweringChoice("unrolled", by_name("unrolled"), ""), (1,), pytest.fail)
        is None
    )


def test_a_bundle_of_another_machine_s_operator_is_tested_before_it_runs(bundle):
    """Nothing of it is believed: the questions are asked again, with this machine's library."""
    probes = json.loads((bundle / "moeopt.json").read_text())["probes"]
    assert probes
    edit(bundle / "moeopt.json", lambda data: [p.update(budget=1e-12) for p in data["probes"]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(moeopt.errors.EngineNotExecutableError):
            moeopt.load(bundle)
    assert not any("where it is absent" in str(w.message) for w in caught)
    custom_op.forget()


def test_a_graph_that_stops_in_a_run_falls_back_with_a_warning(bundle):
    def change(proto, nodes):
        nodes[0].input[3] = nodes[0].input[4]

    edit_native(bundle, change)
    with pytest.warns(EngineFallbackWarning, match="model.onnx runs, not model.native.onnx"):
        engine = moeopt.load(bundle)
    assert engine.graph == "model.onnx"
    right(engine)


@pytest.mark.one_isa
def test_a_large_plain_graph_is_compared_without_packed_copies(monkeypatch):
    from moeopt.backends.onnxrt import backend, open_engine

    opened = []

    class Seen(open_engine.OnnxEngine):
        def __init__(self, directory, signature, provider, session_options, *, graph, **more):
            entry = "session.disable_prepacking"
            packs = session_options is None or session_options.get_session_config_entry(entry) != "1"
            opened.append((graph, packs))
            super().__init__(directory, signature, provider, session_options, graph=graph, **more)

    monkeypatch.setattr(open_engine, "OnnxEngine", Seen)
    needs_operator()
    choose_native(monkeypatch)
    small = optimized()
    assert opened == [("model.onnx", True), (NATIVE, True)]
    assert not any("compared with its weights read where they lie" in n for n in small.report.notes)
    opened.clear()
    monkeypatch.setattr(backend, "MOST_PACKED", 1)
    large = optimized()
    assert opened == [("model.onnx", False), (NATIVE, True)] and large.certificate.passed
    (said,) = [n for n in large.report.notes if n.startswith("model.onnx was compared with its weights read where")]
    assert "as a session that packs copies of them would take as much memory again" in said


def test_large_weights_of_one_op_are_mapped_and_its_file_is_gone(monkeypatch, tmp_path):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    site, feeds = make_site(), None
    want = None
    for held in (1 << 30, 1):
        monkeypatch.setattr(plan, "HELD", held)
        session = plan.session_of(site, by_name("unrolled"))
        feeds = feeds or {
            "x": tokens(site, 7)[0],
            "ids": tokens(site, 7)[1],
            "weights": tokens(site, 7)[2],
        }
        (y,) = session.run(feeds)
        assert want is None or torch.equal(y, want)
        want = y
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_a_file_they_are_held(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    site = make_site()
    monkeypatch.setattr(plan, "HELD", 1)
    monkeypatch.setattr(ir, "save", full)
    plan.session_of(site, by_name("unrolled"))
    monkeypatch.setattr(plan, "_MOST", 1)
    with pytest.raises(OSError, match="No space left"):
        plan.session_of(site, by_name("unrolled"))
