"""Bundles that are cut off, mixed up, edited or hostile are refused, with the file and the reason."""

import hashlib
import json
import shutil

import pytest
import torch

from moeopt.backends.torch.bundle import load_torch_bundle, verify_torch_bundle
from moeopt.bundle.manifest import read_manifest
from moeopt.bundle.op_allowlist import function_named, name_of
from moeopt.errors import BundleError
from tests.backends.torch.toys import H, rows, save

pytestmark = pytest.mark.one_isa  # files that are refused


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pristine") / "b")


@pytest.fixture
def bundle(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "b")


def edit(path, change):
    """Change a JSON file in place; ``change`` gets the data."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def reseal(bundle):
    """Make the manifest agree with the files again, as an attacker would."""

    def change(data):
        for name in data["files"]:
            blob = (bundle / name).read_bytes()
            data["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}

    edit(bundle / "moeopt.json", change)


def refused(bundle, *texts):
    with pytest.raises(BundleError) as err:
        verify_torch_bundle(bundle)
    for text in texts:
        assert text in str(err.value), str(err.value)


FILES = ["graph.json", "weights.safetensors", "certificate.json", "golden.safetensors"]


def test_the_untouched_one_is_good(bundle):
    assert verify_torch_bundle(bundle).passed


@pytest.mark.parametrize("name", FILES)
def test_truncated(bundle, name):
    blob = (bundle / name).read_bytes()
    (bundle / name).write_bytes(blob[:-3])
    refused(bundle, name, f"it has {len(blob) - 3} bytes, and the manifest says {len(blob)}: copy the bundle again")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(bundle, name):
    blob = bytearray((bundle / name).read_bytes())
    blob[len(blob) // 2] ^= 1
    (bundle / name).write_bytes(blob)
    refused(bundle, name, "its sha256 is not the one in the manifest: it was damaged or swapped")


@pytest.mark.parametrize("name", FILES)
def test_missing(bundle, name):
    (bundle / name).unlink()
    refused(bundle, name, "the file is missing: copy the bundle again")


def test_swapped_between_bundles(bundle, tmp_path):
    torch.manual_seed(9)
    other = save(tmp_path / "other")
    shutil.copy(other / "weights.safetensors", bundle)
    refused(bundle, "weights.safetensors", "it was damaged or swapped")


def test_a_symlink_in_place_of_a_file(bundle, tmp_path):
    shutil.move(bundle / "graph.json", tmp_path / "graph.json")
    (bundle / "graph.json").symlink_to(tmp_path / "graph.json")
    refused(bundle, "graph.json", "the file is a symlink")


def test_partial_directory(bundle):
    (bundle / "moeopt.json").unlink()
    refused(bundle, "has no moeopt.json: it is not a bundle, or writing it was cut off")


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is no directory")


def test_cut_off_manifest(bundle):
    text = (bundle / "moeopt.json").read_text()
    (bundle / "moeopt.json").write_text(text[: len(text) // 2])
    refused(bundle, "moeopt.json: it is not JSON", "it was damaged or cut off")


def test_deeply_nested_manifest(bundle):
    (bundle / "moeopt.json").write_text("[" * 100_000)
    refused(bundle, "moeopt.json: it is not JSON")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("schema", 2, "has schema 2 (moeopt"),
        ("schema", 2, "and this moeopt reads up to 1: upgrade moeopt"),
        ("schema", "one", "the schema is 'one', not a version number"),
        ("format", "zip", "this is not a moeopt manifest"),
        ("backend", "pickle", "the backend is 'pickle', not one of torch, onnxruntime, tensorrt"),
        ("files", [], "it lists no files"),
        ("files", {"graph.json": 3}, "the entry of graph.json is '3', not a size and a sha256"),
        ("files", {}, "the bundle has no graph.json: it is not complete"),
        ("device", None, "it lacks a device"),
        ("golden", {"runs": 7}, "the manifest says 7 golden runs, and there are 1"),
    ],
)
def test_manifest_that_says_something_else(bundle, key, value, text):
    edit(bundle / "moeopt.json", lambda data: data.update({key: value}))
    refused(bundle, text)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "moeopt.json", "x\0y"])
def test_file_names_that_leave_the_directory(bundle, name):
    edit(bundle / "moeopt.json", lambda data: data["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(bundle, "files lie in the bundle itself, under plain names")


def first(data, op):
    return next(n for n in data["nodes"] if n["op"] == op)


def view(data, key="0.weight"):
    return data["views"][key]


HOSTILE = {
    "a Python function": (
        lambda d: d["nodes"][0].update(op="os.system"),
        "the op 'os.system' is not one that a bundle",
    ),
    "a builtin": (lambda d: d["nodes"][0].update(op="builtins.eval.default"), "is not one that a bundle may call"),
    "a file-reading op": (lambda d: d["nodes"][0].update(op="aten.from_file.default"), "its family is not one"),
    "a file-writing op": (
        lambda d: d["nodes"][0].update(op="aten.save.default"),
        "may call: it is not a dispatcher op",
    ),
    "a mutating op": (lambda d: d["nodes"][0].update(op="aten.add_.Tensor"), "it changes its arguments"),
    "an attribute of the op": (lambda d: d["nodes"][0].update(op="aten.linear.__class__"), "does not exist in torch"),
    "an op of another library": (
        lambda d: d["nodes"][0].update(op="quantized.add.default"),
        "is not one that a bundle",
    ),
    "another op of moeopt": (lambda d: d["nodes"][0].update(op="moeopt.nothing.default"), "does not exist"),
    "an op that is no string": (lambda d: d["nodes"][0].update(op=["aten"]), "which is not a string"),
    "an unknown literal": (lambda d: d["nodes"][0].update(args=[{"pickle": "gASV"}]), "is not a literal that moeopt"),
    "an unknown dtype": (lambda d: d["nodes"][0].update(args=[{"dtype": "Tensor"}]), "is not a literal that moeopt"),
    "an endless integer": (lambda d: d["nodes"][0].update(args=[1 << 70]), "does not fit 64 bits"),
    "an absurd size": (lambda d: d["nodes"][0].update(args=[[1 << 30, 1 << 30]]), "ask for 1.2e+18 elements"),
    "a value from nowhere": (lambda d: d["nodes"][0].update(args=[{"node": "ghost"}]), "'ghost' is read before it is"),
    "a name used twice": (lambda d: d["nodes"][1].update(out=d["nodes"][0]["out"]), "is computed twice"),
    "a device of its own": (
        lambda d: d["nodes"][0].update(kwargs={"device": {"device": "cuda:1"}}),
        "an op runs on 'cuda:1'",
    ),
    "a missing part": (lambda d: d.pop("outputs"), "lacks or mistypes a part (KeyError: 'outputs')"),
    "nodes that are no list": (lambda d: d.update(nodes=7), "lacks or mistypes a part (TypeError"),
    "a graph from the future": (lambda d: d.update(schema=2), "the graph has schema 2, and this moeopt reads 1"),
    "a class to import": (
        lambda d: d.update(out_tree={"type": "class", "name": "os:system", "items": ["*"]}),
        "is not a structure that moeopt writes",
    ),
    "code in a field's name": (
        lambda d: d.update(out_tree={"type": "namedtuple", "name": "x=1", "keys": ["y"], "items": ["*"]}),
        "is not a structure that moeopt writes",
    ),
    "too many results": (lambda d: d.update(out_tree={"type": "tuple", "items": ["*", "*"]}), "does not fit the graph"),
    "a view past its block": (lambda d: view(d).update(shape=[1000, 1000]), "of a block that has 128"),
    "a view before its block": (lambda d: view(d).update(offset=-4), "is not a list of whole numbers"),
    "a fractional stride": (lambda d: view(d).update(stride=[0.5, 1]), "is not a list of whole numbers"),
    "a weight of another dtype": (
        lambda d: view(d).update(dtype="float64"),
        "should be torch.float64, and its block is",
    ),
    "a block that is not there": (lambda d: view(d).update(block="ghost"), "has no block 'ghost'"),
    "a weight not described": (lambda d: d["views"].pop("0.weight"), "'0.weight' is not described"),
    "a range that is none": (lambda d: d.update(sizes={"s0": "big"}), "the range of the size 's0' is 'big'"),
    "no views": (lambda d: d.pop("views"), "it lacks a device, or the table of its weights"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graph_behind_right_hashes(bundle, name):
    change, text = HOSTILE[name]
    edit(bundle / "graph.json", change)
    reseal(bundle)
    refused(bundle, "graph.json", text)


def test_graph_that_is_no_object(bundle):
    (bundle / "graph.json").write_text("[]")
    reseal(bundle)
    refused(bundle, "graph.json", "it lacks a device, or the table of its weights")


@pytest.mark.parametrize("name", ["weights.safetensors", "golden.safetensors"])
@pytest.mark.parametrize("blob", [b"", b"\xff" * 16, (1 << 60).to_bytes(8, "little") + b"{}", b"\x80\x04."])
def test_tensor_files_that_hold_something_else(bundle, name, blob):
    (bundle / name).write_bytes(blob)
    reseal(bundle)
    refused(bundle, name)


def test_golden_runs_that_are_not_there(bundle):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, bundle / "golden.safetensors")
    reseal(bundle)
    refused(bundle, "golden.safetensors", "it holds no golden runs")


def test_a_weight_that_changed_behind_right_hashes_fails_the_golden_run(bundle):
    from safetensors.torch import load_file, save_file

    tensors = load_file(bundle / "weights.safetensors")
    tensors["0.weight"][0, 0] += 0.01
    save_file(tensors, bundle / "weights.safetensors")
    reseal(bundle)
    check = verify_torch_bundle(bundle)
    assert check.passed is False and "golden run 0, result 0" in check.reason


def test_an_op_that_stops_fails_the_golden_run(bundle):
    edit(bundle / "graph.json", lambda d: first(d, "aten.silu.default").update(args=[3]))
    reseal(bundle)
    check = verify_torch_bundle(bundle)
    assert check.passed is False and "golden run 0 stopped" in check.reason


def test_files_the_manifest_does_not_list_are_never_read(bundle):
    (bundle / "notes.txt").write_text("mine")
    assert load_torch_bundle(bundle)(rows()).shape == (5, H)
    with pytest.raises(BundleError, match="the bundle has no notes.txt"):
        read_manifest(bundle).path("notes.txt")


@pytest.mark.parametrize("target", [eval, torch.load, torch.ops.aten.add_.Tensor, torch.ops.aten.from_file.default])
def test_what_may_not_be_called_may_not_be_written(target):
    with pytest.raises(BundleError):
        name_of(target)


def test_names_are_their_own_inverse():
    for target in (torch.ops.aten.linear.default, torch.ops.aten.to.dtype, torch.sym_max):
        assert function_named(name_of(target)) is target
