"""A bundle gives back what the model gives, bit for bit, from files that hold no code and no byte twice."""

import collections
import copy
import dataclasses
import json
import sys

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from moeopt.backends.torch.bundle import load_torch_bundle, save_torch_bundle, verify_torch_bundle
from moeopt.bundle import golden
from moeopt.bundle.aligned import ALIGNMENT
from moeopt.bundle.fingerprint import fingerprint
from moeopt.errors import BundleError, NotSaveableError, UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.experts import experts
from moeopt.verification.trees import flatten
from tests import children
from tests.backends.torch.toys import DYNAMIC, REPORT, Certificate, E, H, I, K, Stacked, Toy, build, export, rows, save


def bundle_toy(directory, model):
    x, mask = rows(), torch.zeros(5, H, dtype=torch.bool)
    program = export(model, (x,), {"scale": 3.0, "mask": mask}, ({0: DYNAMIC}, {0: DYNAMIC}, None))
    return save_torch_bundle(program, directory, report=REPORT, certificate=Certificate())


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A model and its bundle, which no test writes to."""
    model = build()
    return model, bundle_toy(tmp_path_factory.mktemp("toy") / "b", model)


def same(got, want):
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, two in zip(got, want, strict=True):
            same(one, two)
    else:
        assert got == want


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_same_structure_and_same_bits_at_row_counts_export_never_saw(toy, count):
    model, directory = toy
    x, mask = rows(count, seed=count), torch.zeros(count, H, dtype=torch.bool)
    mask[0, 3] = True
    with torch.no_grad():
        same(load_torch_bundle(directory)(x, mask=mask, scale=3.0), model(x, mask=mask, scale=3.0))


def test_what_is_read_lies_where_pytorch_would_have_put_it(toy, tmp_path):
    """Whatever this CPU's matmuls make of an address: on some, the last bits of one row's result."""
    directory = save(tmp_path / "golden", toy[0], golden_inputs=[((rows(n),), {}) for n in (1, 3)], golden_outputs=[
        toy[0](rows(n)) for n in (1, 3)
    ])  # fmt: skip
    read = [*load_torch_bundle(directory)._runner.weights.values()]
    for run in golden.load_golden(directory / golden.FILE, torch.device("cpu")):
        read += [v for v in (*run.inputs, *run.outputs) if isinstance(v, torch.Tensor)]
    assert len(read) > 10 and all(torch.empty(n).data_ptr() % ALIGNMENT == 0 for n in range(1, 40))
    assert [tuple(t.shape) for t in read if t.data_ptr() % ALIGNMENT] == []


def test_a_transposed_argument(tmp_path):
    class Flat(nn.Module):
        def forward(self, x):
            return x.reshape(-1, x.shape[-1]) * 2

    engine = load_torch_bundle(
        save_torch_bundle(export(Flat(), (torch.randn(2, 3, 4),), {}, ({0: DYNAMIC},)), tmp_path / "b", report=REPORT,
                          certificate=Certificate())
    )  # fmt: skip
    x = torch.randn(3, 2, 4).transpose(0, 1)
    assert torch.equal(engine(x), Flat()(x))


def test_keywords_and_positions_may_be_exchanged_and_constants_left_out(toy):
    model, directory = toy
    engine, x, mask = load_torch_bundle(directory), rows(), torch.zeros(5, H, dtype=torch.bool)
    want = engine(x, mask=mask, scale=3.0)
    same(engine(x=x, mask=mask, scale=3.0), want)
    same(engine(x, scale=3.0, mask=mask), want)
    same(engine(x, mask=mask), want)


def test_a_buffer_that_the_model_writes_is_written(tmp_path):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n += 1
            return x + self.n

    engine = load_torch_bundle(save(tmp_path / "b", Counter().eval(), golden_inputs=(), golden_outputs=()))
    x = rows()
    assert torch.equal(engine(x), x + 1) and torch.equal(engine(x), x + 2)
    assert torch.equal(load_torch_bundle(tmp_path / "b")(x), x + 1)


def test_files_and_manifest(tmp_path):
    model = nn.Linear(H, H).eval()
    directory = save(tmp_path / "b", model, source=fingerprint(model))
    names = {p.name for p in directory.iterdir()}
    assert names == {"moeopt.json", "graph.json", "weights.safetensors", "certificate.json", "golden.safetensors"}
    manifest = json.loads((directory / "moeopt.json").read_text())
    assert manifest["backend"] == "torch" and manifest["schema"] == 1 and manifest["device"] == "cpu"
    assert manifest["source"] == fingerprint(model) and manifest["versions"]["torch"] == torch.__version__
    assert manifest["blocks"][0]["lowering"] == "moeopt::experts"
    assert list(manifest["dynamic"].values()) == [[0, None]]
    assert set(manifest["files"]) == names - {"moeopt.json"}
    assert load_torch_bundle(directory).certificate == {"passed": True}
    assert not list(tmp_path.glob(".*"))


def test_no_pickle_anywhere(toy):
    for path in toy[1].iterdir():
        blob = path.read_bytes()
        assert not blob.startswith((b"PK", b"\x80")) and b"torch._utils" not in blob, path.name


def test_tied_weights_are_stored_once_and_unused_ones_not_at_all(toy):
    from safetensors import safe_open

    with safe_open(toy[1] / "weights.safetensors", "pt") as file:
        names = set(file.keys())
    assert sum("weight" in n for n in names) == 2
    assert (toy[1] / "weights.safetensors").stat().st_size < 4 * (2 * H * I + 100) + 2000


def test_views_of_a_stack_are_stored_once(tmp_path):
    model = build(Stacked)
    directory = save(tmp_path / "b", model)
    size = (directory / "weights.safetensors").stat().st_size
    assert size < 4 * E * H * H + 1000, size
    with torch.no_grad():
        assert torch.equal(load_torch_bundle(directory)(rows(3)), model(rows(3)))


class OwnOp(nn.Module):
    """moeopt::experts as the optimiser leaves it: E separate weights, routing by softmax and top-k."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.w_in = nn.ParameterList([nn.Parameter(torch.randn(2 * I, H) / 3) for _ in range(E)])
        self.w_out = nn.ParameterList([nn.Parameter(torch.randn(H, I) / 4) for _ in range(E)])

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K)
        spec = ExpertsSpec().encode()
        return torch.ops.moeopt.experts(x, ids, weights, list(self.w_in), list(self.w_out), [], [], [], spec)


def test_own_op_travels(tmp_path):
    model = build(OwnOp)
    directory = save(tmp_path / "b", model)
    graph = json.loads((directory / "graph.json").read_text())
    assert [n["op"] for n in graph["nodes"]].count("moeopt.experts.default") == 1
    with torch.no_grad():
        assert torch.equal(load_torch_bundle(directory)(rows(9)), model(rows(9)))
    assert callable(experts)


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    model = nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)).eval()
    directory = save(tmp_path / "b", model)
    code = (
        "from moeopt.backends.torch.bundle import verify_torch_bundle; "
        f"check = verify_torch_bundle({str(directory)!r}); "
        "print(check.passed, check.runs)"
    )
    out = children.run([sys.executable, "-c", code], check=True)
    assert out.stdout.split() == ["True", "1"]


Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    z: torch.Tensor
    values: torch.Tensor | None = None


torch.export.register_dataclass(Result)


def test_named_tuples_come_back_and_foreign_classes_become_fields(tmp_path):
    class Named(nn.Module):
        def forward(self, x):
            return Pair(x + 1, [Result(x, x * 2)])

    engine = load_torch_bundle(save(tmp_path / "b", Named(), golden_inputs=(), golden_outputs=()))
    out = engine(rows())
    assert type(out).__name__ == "Pair" and out._fields == ("first", "second")
    result = out.second[0]
    assert torch.equal(result.z, rows() * 2) and torch.equal(result["y"], rows()) and isinstance(result, dict)
    for same in (result, copy.deepcopy(result), pytree.tree_map(torch.neg, result)):
        assert list(same) == ["y", "z"] and same.values is None
    with pytest.raises(AttributeError, match="has no field 'q'; it has y, z, values"):
        _ = result.q


class InFields(nn.Module):
    def forward(self, x):
        return Result(x + 1, x * 2)


def test_golden_runs_compare_the_fields_of_a_class_that_is_not_imported(tmp_path):
    directory = save(tmp_path / "b", InFields())
    assert verify_torch_bundle(directory).passed
    assert flatten(load_torch_bundle(directory)(rows()))[1] == flatten(InFields()(rows()))[1]


def test_golden_runs_of_a_model_output_where_transformers_is_absent(tmp_path):
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="transformers is not installed")

    class Hf(nn.Module):
        def forward(self, x):
            return outputs.BaseModelOutput(last_hidden_state=x + 1)

    code = (
        "import sys; sys.modules['transformers'] = None; "
        "from moeopt.backends.torch.bundle import verify_torch_bundle; "
        f"print(verify_torch_bundle({str(save(tmp_path / 'b', Hf()))!r}))"
    )
    said = children.run([sys.executable, "-c", code], check=True).stdout
    assert said.startswith("GoldenCheck(passed=True, runs=1"), said


def test_model_output_comes_back_as_its_class(tmp_path):
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="transformers is not installed")

    class Hf(nn.Module):
        def forward(self, x):
            return outputs.BaseModelOutput(last_hidden_state=x + 1)

    out = load_torch_bundle(save(tmp_path / "b", Hf(), golden_inputs=(), golden_outputs=()))(rows())
    assert type(out) is outputs.BaseModelOutput and torch.equal(out.last_hidden_state, rows() + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_dtypes(tmp_path, dtype):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(H).to(dtype))

        def forward(self, x):
            return x.to(dtype) * self.w

    model = Scale().eval()
    directory = save(tmp_path / "b", model)
    with torch.no_grad():
        assert torch.equal(load_torch_bundle(directory)(rows(3)), model(rows(3)))
    assert verify_torch_bundle(directory).passed


def test_a_transposed_weight_keeps_its_strides(tmp_path):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(I, H).t())

        def forward(self, x):
            return x @ self.w

    model = Transposed().eval()
    engine = load_torch_bundle(save(tmp_path / "b", model))
    (weight,) = engine._runner.weights.values()
    assert weight.stride() == model.w.stride() == (1, H)


def test_numbers_computed_from_sizes(tmp_path):
    class Sizes(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] // 1, -1)[: (x.shape[0] + 1) // 2] * (x.shape[0] * 0.5)

    model = Sizes()
    engine = load_torch_bundle(save(tmp_path / "b", model))
    for count in (2, 3, 8):
        assert torch.equal(engine(rows(count)), model(rows(count)))


def test_what_computes_nothing_is_left_out(tmp_path):
    class Idle(nn.Module):
        def forward(self, x):
            y = torch.nn.functional.dropout(x[:, :] * 2, 0.5, self.training)
            return (y[1:].detach() + 1, y)

    model = Idle().eval()
    directory = save(tmp_path / "b", model, golden_inputs=(), golden_outputs=())
    ops = [n["op"] for n in json.loads((directory / "graph.json").read_text())["nodes"]]
    assert ops == ["aten.mul.Tensor", "aten.clone.default", "aten.slice.Tensor", "aten.add.Tensor"]
    same(load_torch_bundle(directory)(rows(4)), model(rows(4)))


class Restacked(nn.Module):
    """Experts re-pointed into one stack with a gap before it; the graph sees the stack through the first of them."""

    def __init__(self):
        super().__init__()
        store = torch.randn(3 + E * H * H)
        self.parts = nn.ParameterList([nn.Parameter(store[3 + e * H * H :][: H * H].view(H, H)) for e in range(E)])

    def forward(self, x):
        first = self.parts[0]
        stack = first.as_strided((E, H, H), (H * H, H, 1), first.storage_offset())
        return torch.einsum("th,ehk->tk", x, stack) + x @ self.parts[2].t()[:, 1:].unsqueeze(0)[0].repeat(1, 8)[:, :H]


def test_a_stack_seen_through_one_expert(tmp_path):
    model = build(Restacked)
    directory = save(tmp_path / "b", model)
    graph = json.loads((directory / "graph.json").read_text())
    assert not [n for n in graph["nodes"] if n["op"] == "aten.as_strided.default"]
    assert (directory / "weights.safetensors").stat().st_size < 4 * E * H * H + 1000
    with torch.no_grad():
        assert torch.equal(load_torch_bundle(directory)(rows(3)), model(rows(3)))


def test_a_copy_of_a_weight_stays_a_copy(tmp_path):
    class Copy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(H))

        def forward(self, x):
            return self.w.clone(), x + self.w

    engine = load_torch_bundle(save(tmp_path / "b", Copy().eval(), golden_inputs=(), golden_outputs=()))
    engine(rows())[0].zero_()
    assert torch.equal(engine(rows())[0], torch.ones(H))


def test_replacing_a_bundle(tmp_path):
    save(tmp_path / "b", nn.Linear(H, H, bias=False).eval())
    model = nn.Linear(H, H).eval()
    save(tmp_path / "b", model)
    assert torch.equal(load_torch_bundle(tmp_path / "b")(rows()), model(rows()))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_directory_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="mine exists and is not a moeopt bundle: it is left alone"):
        save(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file exists and is not a directory"):
        save(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.raises(UsageError, match=f"link is a symbolic link, .*: give what it leads to, {tmp_path / 'b'}$"):
        save(tmp_path / "link")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_what_fails_half_way_leaves_nothing(tmp_path):
    class Broken:
        def to_json(self):
            raise RuntimeError("disk full")

    program = export(nn.Linear(H, H).eval(), (rows(),))
    with pytest.raises(RuntimeError, match="disk full"):
        save_torch_bundle(program, tmp_path / "b", report=REPORT, certificate=Broken())
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


@torch.library.custom_op("moeopt_tests::secret", mutates_args=())
def secret(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@secret.register_fake
def _(x):
    return torch.empty_like(x)


class Secret(nn.Module):
    def forward(self, x):
        return torch.ops.moeopt_tests.secret(x)


class Striding(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(99, H))

    def forward(self, x):
        return x + self.w.as_strided((x.shape[0], H), (H, 1), 0)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Striding(), "aten.as_strided.default reads the storage of 'w' at sizes known at run time only"),
        (Branching(), "the op cond runs a sub-graph"),
        (Secret(), "the op moeopt_tests.secret.default (secret) cannot be saved"),
        (Secret(), "its namespace is moeopt_tests"),
        (Secret(), "test_bundle.py"),
    ],
)
def test_what_cannot_be_saved_names_the_op(tmp_path, model, text):
    with pytest.raises(NotSaveableError) as err:
        save(tmp_path / "b", model)
    assert text in str(err.value)
    assert not (tmp_path / "b").exists()


def test_weights_that_are_not_plain_are_named(tmp_path):
    model = nn.Linear(H, H, device="meta").eval()
    program = export(model, (torch.empty(5, H, device="meta"),))
    with pytest.raises(NotSaveableError, match="the weight 'weight' is on the meta device"):
        save_torch_bundle(program, tmp_path / "b", report=REPORT, certificate=Certificate())


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "the bundle takes x, scale, mask; 'mask' is missing"),
        ((rows(),), {"mask": torch.zeros(5, H, dtype=torch.bool), "use_cache": True}, "'use_cache' is extra"),
        ((rows(),), {"mask": None}, "mask (the keywords['mask']) must be a tensor, not None"),
        ((rows().double(),), {"mask": torch.zeros(5, H, dtype=torch.bool)}, "x is torch.float64, and the bundle takes"),
        (
            (rows()[:, :7],),
            {"mask": torch.zeros(5, H, dtype=torch.bool)},
            "x has size 7 in dimension 1, and the bundle",
        ),
        ((rows()[0],), {"mask": torch.zeros(5, H, dtype=torch.bool)}, "x has 1 dimensions, and the bundle takes 2"),
        ((rows(4),), {"mask": torch.zeros(5, H, dtype=torch.bool)}, "and another input has"),
        (
            (rows(),),
            {"mask": torch.zeros(5, H, dtype=torch.bool), "scale": 1.0},
            "scale is 1.0, and the bundle was exported",
        ),
    ],
)
def test_calls_that_do_not_fit(toy, args, kwargs, text):
    with pytest.raises(UsageError) as err:
        load_torch_bundle(toy[1])(*args, **kwargs)
    assert text in str(err.value)


def test_a_device_that_is_not_there(tmp_path):
    directory = save(tmp_path / "b")
    with pytest.raises(
        UsageError, match="this machine has no device 'xpu:3': name another device, like device='cpu', or none"
    ):
        load_torch_bundle(directory, "xpu:3")


def test_golden_runs_are_checked(tmp_path):
    directory = save(tmp_path / "b")
    check = verify_torch_bundle(directory)
    assert check.passed is True and check.runs == 1 and check.required == 0.0
    assert check.budget == 8 * torch.finfo(torch.float32).eps


def test_a_wrong_golden_result_fails(tmp_path):
    x = rows()
    model = nn.Linear(H, H).eval()
    with torch.no_grad():
        directory = save(tmp_path / "b", model, golden_inputs=[((x,), {})], golden_outputs=[model(x) * 1.001])
        stated = save(
            tmp_path / "c", model, golden_inputs=[((x,), {})], golden_outputs=[model(x) * 1.001], golden_distance=2e-3
        )
    check = verify_torch_bundle(directory)
    assert check.passed is False and "golden run 0, result 0: it is 9.99e-04 away" in check.reason
    assert verify_torch_bundle(stated).passed


def test_without_golden_runs_nothing_is_claimed(tmp_path):
    assert verify_torch_bundle(save(tmp_path / "b", golden_inputs=(), golden_outputs=())).passed is None


def test_each_golden_input_needs_its_output(tmp_path):
    with pytest.raises(UsageError, match="1 golden inputs and 0 outputs: give one for each"):
        save(tmp_path / "b", golden_outputs=[])


def test_a_bundle_of_another_backend_is_not_run(tmp_path):
    directory = save(tmp_path / "b")
    path = directory / "moeopt.json"
    path.write_text(path.read_text().replace('"backend": "torch"', '"backend": "tensorrt"'))
    with pytest.raises(BundleError, match="it is a bundle for tensorrt, not torch"):
        load_torch_bundle(directory)


def test_fingerprint_sees_values_and_ignores_copies():
    import copy

    model = build(Toy)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model)
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.up.bias[3] += 1e-6
    assert fingerprint(other) != fingerprint(model)
