"""ONNX Runtime bundles that are cut off, mixed up, edited or hostile are refused, with the file and the reason."""

import shutil

import pytest

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.errors import BundleError, EngineNotExecutableError, NotEquivalentError, UsageError
from tests.backends.onnxrt.toys import edit, edit_graph, optimized, reseal

pytestmark = pytest.mark.one_isa  # files that are refused

FILES = [
    "model.onnx",
    "model.onnx.data",
    "signature.json",
    "certificate.json",
    "probes.safetensors",
    "golden.safetensors",
]


def refused(bundle, *texts, by=BundleError):
    with pytest.raises(by) as err:
        moeopt.load(bundle)
    for text in texts:
        assert text in str(err.value), str(err.value)


def outside(proto):
    """The first weight that lies in the data file, and its entries by key."""
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    return tensor, {e.key: e for e in tensor.external_data}


def test_the_untouched_one_is_good(onnx_bundle):
    assert moeopt.verify(onnx_bundle).passed


@pytest.mark.parametrize("name", FILES)
def test_truncated(onnx_bundle, name):
    blob = (onnx_bundle / name).read_bytes()
    (onnx_bundle / name).write_bytes(blob[:-3])
    refused(onnx_bundle, name, f"it has {len(blob) - 3} bytes, and the manifest says {len(blob)}")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(onnx_bundle, name):
    blob = bytearray((onnx_bundle / name).read_bytes())
    blob[len(blob) // 2] ^= 1
    (onnx_bundle / name).write_bytes(blob)
    refused(onnx_bundle, name, "its sha256 is not the one in the manifest")


@pytest.mark.parametrize("name", FILES)
def test_missing(onnx_bundle, name):
    (onnx_bundle / name).unlink()
    refused(onnx_bundle, name, "the file is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_symlink(onnx_bundle, tmp_path, name):
    shutil.move(onnx_bundle / name, tmp_path / name)
    (onnx_bundle / name).symlink_to(tmp_path / name)
    refused(onnx_bundle, name, "the file is a symlink")


@pytest.mark.parametrize("name", ["model.onnx", "signature.json", "probes.safetensors", "golden.safetensors"])
def test_unlisted(onnx_bundle, name):
    moeopt.load(onnx_bundle)  # a graph that this process tested already is held to the same
    edit(onnx_bundle / "moeopt.json", lambda data: data["files"].pop(name))
    refused(onnx_bundle, f"the bundle has no {name}")


def test_weights_that_are_not_listed(onnx_bundle):
    edit(onnx_bundle / "moeopt.json", lambda data: data["files"].pop("model.onnx.data"))
    refused(onnx_bundle, "model.onnx: the weight", "and model.onnx.data has 0")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return optimized(seed=9).save(tmp_path_factory.mktemp("other") / "b")


def test_swapped_data_of_equal_size(onnx_bundle, other):
    assert (other / "model.onnx.data").stat().st_size == (onnx_bundle / "model.onnx.data").stat().st_size
    shutil.copy(other / "model.onnx.data", onnx_bundle)
    refused(onnx_bundle, "model.onnx.data", "it was damaged or swapped")


def test_swapped_data_with_the_hash_made_to_fit(onnx_bundle, other):
    shutil.copy(other / "model.onnx.data", onnx_bundle)
    refused(reseal(onnx_bundle), "block layers.0 computes something else on cpu", by=EngineNotExecutableError)


def test_another_router(onnx_bundle):
    """What no probe asks about, the golden runs tell."""

    def change(proto):
        gate = next(t for t in proto.graph.initializer if t.name == "layers.0.gate.weight")
        gate.raw_data = gate.raw_data[::-1]

    texts = "on cpu the engine does not give what it was verified to give: golden run 0", "Save the bundle again"
    refused(edit_graph(onnx_bundle, change), *texts, by=NotEquivalentError)
    certificate = moeopt.verify(onnx_bundle)
    assert certificate.passed is False and "golden run 0" in certificate.end_to_end.reason


def test_from_the_future(onnx_bundle):
    edit(onnx_bundle / "moeopt.json", lambda data: data.update(schema=7))
    refused(onnx_bundle, "the bundle has schema 7", "upgrade moeopt")


@pytest.mark.parametrize(
    "where", ["../secret.bin", "/etc/passwd", "model.onnx", "sub/model.onnx.data", "./model.onnx.data"]
)
def test_weights_elsewhere(onnx_bundle, where):
    def change(proto):
        outside(proto)[1]["location"].value = where

    refused(edit_graph(onnx_bundle, change), "model.onnx: the weight", repr(where), "lie in model.onnx.data only")


def test_weights_elsewhere_in_a_branch(onnx_bundle):
    """A constant inside control flow is looked at too."""

    def change(proto):
        import onnx

        tensor = onnx.TensorProto(name="deep", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="../secret.bin")
        inner = onnx.helper.make_node("Constant", [], ["deep"], value=tensor)
        branch = onnx.helper.make_graph([inner], "branch", [], [])
        proto.graph.node.append(onnx.helper.make_node("If", ["x"], ["never"], then_branch=branch, else_branch=branch))

    refused(edit_graph(onnx_bundle, change), "'../secret.bin'", "lie in model.onnx.data only")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("offset", "99999999999", "and model.onnx.data has"),
        ("offset", "-8", "does not say where it begins and ends"),
        ("offset", "1" * 40, "does not say where it begins and ends"),
        ("length", "1", "has 1 bytes, and its shape says"),
        ("length", str(1 << 60), "and model.onnx.data has"),
    ],
)
def test_weights_out_of_the_file(onnx_bundle, key, value, reason):
    def change(proto):
        tensor, entries = outside(proto)
        (entries.get(key) or tensor.external_data.add(key=key)).value = value

    refused(edit_graph(onnx_bundle, change), "model.onnx: the weight", reason)


def test_two_locations(onnx_bundle):
    def change(proto):
        outside(proto)[0].external_data.add(key="location", value="../secret.bin")

    refused(edit_graph(onnx_bundle, change), "model.onnx: the weight")


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 40], [-1, 4]])
def test_absurd_shapes(onnx_bundle, dims):
    def change(proto):
        outside(proto)[0].dims[:] = dims

    refused(edit_graph(onnx_bundle, change), "has the shape", str(dims))


def test_a_foreign_domain(onnx_bundle):
    def change(proto):
        proto.opset_import.add(domain="ai.onnx.contrib", version=1)
        proto.graph.node[0].domain = "ai.onnx.contrib"

    refused(edit_graph(onnx_bundle, change), "operators of 'ai.onnx.contrib', which moeopt does not write")


def test_a_node_of_a_domain_that_is_not_imported(onnx_bundle):
    def change(proto):
        proto.graph.node[0].domain = "evil"

    refused(edit_graph(onnx_bundle, change), "is evil.", "which moeopt does not write")


def test_a_node_that_opens_files(onnx_bundle):
    def change(proto):
        proto.graph.node.add(op_type="EPContext", domain="com.microsoft", name="n")

    refused(edit_graph(onnx_bundle, change), "node 'n' is com.microsoft.EPContext, which moeopt does not write")


def test_a_function(onnx_bundle):
    def change(proto):
        proto.functions.add(name="Relu", domain="")

    refused(edit_graph(onnx_bundle, change), "it holds the function", "and moeopt writes none")


def test_ends_that_do_not_fit(onnx_bundle):
    def change(proto):
        proto.graph.input[0].type.tensor_type.elem_type = 11

    refused(edit_graph(onnx_bundle, change), "the input x is float64 (", "and signature.json says float32 (")


@pytest.mark.parametrize("end", ["input", "output"])
def test_ends_of_other_names(onnx_bundle, end):
    def change(proto):
        getattr(proto.graph, end)[0].name = "other"

    refused(edit_graph(onnx_bundle, change), "model.onnx: the graph", "'other'", "signature.json says")


def test_a_signature_that_describes_nothing(onnx_bundle):
    (onnx_bundle / "signature.json").write_text("[]")
    refused(reseal(onnx_bundle), "signature.json: it describes no call")
    (onnx_bundle / "signature.json").write_text('{"inputs": 3, "outputs": []}')
    refused(reseal(onnx_bundle), "signature.json lacks or mistypes a part")


@pytest.mark.parametrize("blob", [b"", b"not a graph", b"\x0a\xff\xff\xff\xff"], ids=["empty", "text", "cut off"])
def test_no_graph(onnx_bundle, blob):
    (onnx_bundle / "model.onnx").write_bytes(blob)
    refused(reseal(onnx_bundle), "model.onnx: it is not an ONNX graph", "it was damaged or cut off")


@pytest.mark.parametrize("distance", [5.0, -1.0, "inf"])
def test_a_golden_budget_that_allows_anything(onnx_bundle, distance):
    edit(onnx_bundle / "moeopt.json", lambda data: data["golden"].update(distance=distance))
    with pytest.raises(BundleError, match="which allows anything"):
        moeopt.verify(onnx_bundle)


def test_probes_that_allow_anything(onnx_bundle):
    edit(onnx_bundle / "moeopt.json", lambda data: data["probes"][0].update(budget=2.0))
    edit_graph(onnx_bundle, lambda proto: proto.metadata_props.add(key="a", value="new bytes: not tested before"))
    refused(onnx_bundle, "probes.safetensors: a probe's result is no float64, or its budget no distance")


def test_blocks_that_are_not_in_the_graph(onnx_bundle):
    edit(onnx_bundle / "moeopt.json", lambda data: data["sites"][0].update(name="elsewhere"))
    edit_graph(onnx_bundle, lambda proto: proto.metadata_props.add(key="b", value="new bytes"))
    refused(onnx_bundle, "block 'elsewhere' is not in the graph as the manifest says")


def test_an_absent_provider(onnx_bundle):
    for run in (lambda: moeopt.verify(onnx_bundle, provider="cuda"), lambda: moeopt.load(onnx_bundle, "cuda")):
        with pytest.raises(UsageError, match="provider 'cuda' is not on this machine; it has: cpu"):
            run()
    with pytest.raises(UsageError, match="provider 'quantum' is unknown; the providers are cpu"):
        moeopt.load(onnx_bundle, "quantum")
    edit(onnx_bundle / "moeopt.json", lambda data: data.update(provider="cuda"))
    refused(onnx_bundle, "it was saved there: name another, like device='cpu'", by=UsageError)
    assert moeopt.load(onnx_bundle, "cpu").provider == "cpu"
