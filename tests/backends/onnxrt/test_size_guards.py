"""A graph refuses calls of sizes that its trace does not hold for, with plain ONNX Runtime, at a node that says so."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.backends.onnxrt.size_guards import HOLDS, guard_sizes
from moeopt.bundle.holds import notes_on_sizes, sentences
from moeopt.bundle.shape_guards import holds
from moeopt.bundle.tree import LEAF
from moeopt.cli.about import bundle_facts
from moeopt.errors import UsageError

pytestmark = pytest.mark.one_isa  # sizes that a graph takes

A, B = ["size", 0, 0], ["size", 1, 0]


def signature(conditions=(), sizes=None, names=("s0", "s1")):
    inputs = [
        {"name": f"in_{n}", "dtype": "float32", "device": "cpu", "shape": [dim, "w"]} for n, dim in enumerate(names)
    ]
    return {
        "parameters": ["x", "y"],
        "in_tree": {
            "type": "tuple",
            "items": [{"type": "tuple", "items": [LEAF, LEAF]}, {"type": "dict", "keys": [], "items": []}],
        },
        "inputs": inputs,
        "sizes": sizes or {},
        "conditions": list(conditions),
    }


def session(stated, doubles=True):
    """The graph of ``x.sum() + y.sum()``, guarded, with every optimisation that ONNX Runtime has."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    ends = [ir.Value(name=f"in_{n}", type=kind, shape=ir.Shape([f"d{n}", "w"])) for n in range(2)]
    sums = [ir.node("ReduceSum", [end], {"keepdims": 0}) for end in ends]
    total = ir.node("Add", [sums[0].outputs[0], sums[1].outputs[0]])
    total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = "total", kind, ir.Shape([])
    graph = ir.Graph(ends, [total.outputs[0]], nodes=[*sums, total], opset_imports={"": 20}, name="sums")
    model = ir.Model(graph, ir_version=10)
    guard_sizes(model, stated, doubles)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    found = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return lambda a, b, w=3, v=3: found.run(None, {"in_0": np.ones((a, w), "f"), "in_1": np.ones((b, v), "f")})[0]


FORMS = [
    ["and", [">=", ["*", A, B], 6], ["<=", ["*", A, B], 20]],
    ["or", ["==", A, 3], ["not", ["<", B, 4]]],
    ["!=", ["%", ["-", A, 5], 3], 1],
    ["==", ["//", ["-", A, B], 2], -1],
    ["<=", ["//", ["-", 4.5, A], 2], ["%", B, 1.5]],
    [">", ["floor", ["/", ["*", 1.5, ["float", A]], 4]], ["ceil", ["-", ["sqrt", B], 1.5]]],
    ["==", ["max", 2, A, ["round", ["/", B, 2]]], ["min", 7, ["trunc", ["+", A, 0.5]]]],
    [">=", ["abs", ["-", A, B]], ["neg", ["-", 2, A]]],
    ["==", ["+", ["+", ["*", 3, A], B], 1], ["max", ["abs", ["neg", ["+", ["*", 3, A], 5]]], 2]],
]


@pytest.mark.parametrize("condition", FORMS, ids=lambda c: str(c)[:40])
def test_the_graph_decides_as_python_does(condition):
    run = session(signature([condition]))
    refused = taken = 0
    for a in range(1, 9):
        for b in range(1, 9):
            if holds([condition], [(a, 3), (b, 3)].__getitem__):
                assert run(a, b) == 3 * (a + b)
                taken += 1
            else:
                with pytest.raises(Exception, match="this engine holds only where "):
                    run(a, b)
                refused += 1
    assert taken and refused, "a condition that is always or never met says nothing"


def test_sizes_of_one_name_are_equal_and_in_their_range():
    run = session(signature(sizes={"s0": [2, 6], "w": [1, None]}, names=("s0", "s0")))
    assert run(2, 2) == 12
    for call, named in [
        ((2, 3), r"x.shape\[0\] == y.shape\[0\]"),
        ((2, 2, 3, 1), r"x.shape\[1\] == y.shape\[1\]"),
        ((7, 7), r"x.shape\[0\] <= 6"),
        ((1, 1), r"x.shape\[0\] >= 2"),
    ]:
        with pytest.raises(Exception, match=f"Name:'this engine holds only where {named}'"):
            run(*call)


def test_a_runtime_without_doubles_checks_whole_numbers_only():
    run = session(signature([["<", A, 4], ["<", ["/", B, 2], 2]]), doubles=False)
    assert run(3, 9) == 36
    with pytest.raises(Exception, match="holds only where x"):
        run(4, 1)


class Frozen(nn.Module):
    """Places for the tokens of each expert, their number an int of the trace."""

    def __init__(self):
        super().__init__()
        self.router, self.up = nn.Linear(8, 4, bias=False), nn.Parameter(torch.randn(4, 8, 8) * 0.3)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        room = max(2, int(flat.shape[0] * 0.5))
        weights, pick = self.router(flat).softmax(-1).max(-1)
        chosen = F.one_hot(pick, 4)
        rank = chosen.cumsum(0) * chosen - 1
        table = F.one_hot(rank.clamp(min=0), room) * ((rank >= 0) & (rank < room))[..., None]
        rows = torch.einsum("tec,td->ecd", table.to(flat.dtype), flat)
        return torch.einsum("tec,ecd->td", table * weights[:, None, None], torch.bmm(rows, self.up)).view_as(x)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    torch.manual_seed(0)
    model = Frozen().eval()
    engine = moeopt.optimize(model, torch.randn(2, 5, 8), backend="onnxruntime")
    path = engine.save(tmp_path_factory.mktemp("frozen") / "bundle")
    return model, engine, path


SAID = "x.shape[0] * x.shape[1] is 10 to 11"


def test_report_certificate_and_bundle_say_which_sizes_an_engine_holds_for(frozen):
    _, engine, path = frozen
    for notes in (engine.report.notes, engine.certificate.notes):
        assert any(f"the engine holds for calls where {SAID}, as in the example call" in note for note in notes)
    assert moeopt.load(path).manifest.data["holds"] == [SAID]
    assert ir.load(path / "model.onnx").metadata_props[HOLDS] == SAID
    assert bundle_facts(path)["holds where"] == [SAID]
    left_out = f"not compared in the sizes (5, 11, 8) and (1, 1, 8): the engine holds only where {SAID}"
    assert left_out in engine.certificate.end_to_end.notes


def test_plain_onnx_runtime_refuses_what_the_engine_does_not_hold_for(frozen):
    model, engine, path = frozen
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    plain = onnxruntime.InferenceSession(path / "model.onnx", options)
    x = torch.randn(1, 11, 8)
    torch.testing.assert_close(torch.from_numpy(plain.run(None, {"x": x.numpy()})[0]), model(x), atol=1e-5, rtol=1e-5)
    for shape in ((2, 6, 8), (1, 1, 8), (9, 31, 8)):
        with pytest.raises(Exception, match=r"Name:'this engine holds only where x.shape\[0\] \* x.shape\[1\] is 10"):
            plain.run(None, {"x": torch.randn(shape).numpy()})
        with pytest.raises(UsageError, match="this engine holds for calls where x.shape"):
            engine(torch.randn(shape))


def test_the_torch_bundle_says_so_too(tmp_path):
    torch.manual_seed(0)
    path = moeopt.optimize(Frozen().eval(), torch.randn(2, 5, 8)).save(tmp_path / "bundle")
    engine = moeopt.load(path)
    assert engine.manifest.data["holds"] == [SAID]
    assert any(SAID in note for note in engine.certificate["notes"])
    with pytest.raises(UsageError, match="this engine holds for calls where x.shape"):
        engine(torch.randn(2, 6, 8))


def test_what_every_call_must_meet_is_no_news():
    stated = signature([["==", A, ["*", B, B]], [">", B, 1]])
    assert sentences(stated) == ["x.shape[0] == (y.shape[0] * y.shape[0])", "y.shape[0] > 1"]
    (note,) = notes_on_sizes(stated)
    assert "holds for calls where y.shape[0] > 1, as" in note
    assert notes_on_sizes(signature([["==", A, ["*", B, B]]])) == []


def test_a_fixed_size_is_said_by_the_inputs_already():
    stated = signature([["==", A, 4]], names=(4, "s1"))
    assert sentences(stated) == []
    assert sentences(signature([["==", A, B]], names=("s0", "s0"))) == []
