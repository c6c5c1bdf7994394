"""Programs through torch.onnx, by number: what the exporter or the runtime would get wrong, and what is refused."""

import collections
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Session
from moeopt.bundle.binding import Binding
from moeopt.bundle.tree import build
from moeopt.errors import NotSaveableError, UsageError
from moeopt.lower.export import export_program
from moeopt.lower.signature import describe_call, functional

try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

import onnx_ir as ir

from moeopt.lower.onnx.export import own_outputs, to_onnx


class Fn(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def program_of(model, *args):
    return functional(export_program(model, args, {}))


def session_of(model, *args):
    graph = to_onnx(program_of(model, *args))
    own_outputs(graph.graph)
    return Session(ir.to_proto(graph).SerializeToString())


def floats(rows=5, nan=False, ties=False):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    x = x.round() if ties else x
    if nan:
        x.view(-1)[::7] = math.nan
    return x


# torch.topk leaves open which of two equal values it takes: its values are compared, not its ids
SELECTIONS = {
    "topk": lambda x: torch.topk(x, 2)[0],
    "topk smallest": lambda x: torch.topk(x, 1, largest=False)[0],
    "sort": lambda x: torch.sort(x, dim=-1, stable=True),
    "sort descending": lambda x: torch.sort(x, dim=-1, descending=True, stable=True),
    "max": lambda x: x.max(-1),
    "min": lambda x: x.min(-1, keepdim=True),
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(0),
    "argmax of all": lambda x: x.argmax(),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin((0, 1)),
    "kthvalue": lambda x: x.kthvalue(3, -1)[0],
    "kthvalue kept": lambda x: x.kthvalue(1, 0, keepdim=True)[0],
    "median": lambda x: x.median(-1)[0],
    "median over rows, kept": lambda x: x.median(0, keepdim=True)[0],
    "median of all": lambda x: x.median(),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_agree_on_nan_and_on_ties(name):
    f = SELECTIONS[name]
    model = Fn(lambda x: f(x) if isinstance(f(x), torch.Tensor) else tuple(f(x)))
    session = session_of(model, floats())
    for x in (floats(9), floats(1), floats(9, nan=True), floats(9, ties=True)):
        want = model(x)
        for a, b in zip(session.run({"x": x}), [want] if isinstance(want, torch.Tensor) else want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9)), name


def test_integers_are_sorted_stably():
    model = Fn(lambda x: (x.reshape(-1).argsort(stable=True), x.reshape(-1).argsort(descending=True, stable=True)))
    ids = torch.randint(0, 4, (5, 3), generator=torch.Generator().manual_seed(0))
    session = session_of(model, ids)
    for call in (ids, ids[:1], ids.repeat(9, 1)):
        for a, b in zip(session.run({"x": call}), model(call), strict=True):
            assert torch.equal(a, b)


def test_a_transposed_mask_in_a_product_loads():
    """MatMul(Cast(Transpose(bool))) ends ONNX Runtime 1.31's process while it loads."""

    def f(x):
        return (x > 0).t().to(x.dtype) @ (x @ torch.ones(6, 4))

    session = session_of(Fn(f), floats())
    x = floats(9)
    torch.testing.assert_close(session.run({"x": x})[0], f(x), rtol=1e-5, atol=1e-6)


def bound(model, *args):
    binding = Binding(describe_call(program_of(model, *args)), torch.device)
    return lambda *call: binding.bind(call, {})


def test_a_branch_on_a_size_is_a_condition_of_the_engine():
    bind = bound(Fn(lambda x: x * 2 if x.shape[0] > 1 else x), floats())
    bind(floats(7))
    with pytest.raises(UsageError, match=r"holds for calls where x.shape\[0\] > 1, as in the call it was exported"):
        bind(floats(1))


def test_a_size_made_an_integer_is_a_condition_of_the_engine():
    def f(x):
        return x[:, None] * F.one_hot(x.argmax(-1), max(6, math.floor(x.shape[0] * 1.5)))[..., None]

    bind = bound(Fn(f), floats(5))
    bind(floats(5))
    with pytest.raises(UsageError, match="holds for calls where"):
        bind(floats(9))


def test_sizes_that_only_torch_told_from_one_are_free():
    bind = bound(Fn(lambda x: (x.reshape(-1, 6) + x).view(x.shape[0], 6).contiguous()), floats())
    bind(floats(1))
    bind(floats(513))


def test_a_call_of_no_tokens_is_refused():
    with pytest.raises(UsageError, match=r"size 0 in dimension 0; \w+ may be 1 to any size: .* answer such a call"):
        bound(Fn(lambda x: x.sum(-1)), floats())(floats(0))


def test_plain_values_in_a_result_stay_constants():
    model = Fn(lambda x: {"y": x + 1, "k": 2, "none": None})
    program = program_of(model, floats())
    assert [list(o) for o in describe_call(program)["outputs"]].count(["constant"]) == 2
    graph = to_onnx(program)
    assert len(graph.graph.outputs) == 1
    assert len(program.graph_signature.output_specs) == 3, "the program itself stays as it was"


class Counting(nn.Module):
    """Counts its calls in a buffer; ``reads`` says whether the result depends on the count."""

    def __init__(self, reads):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.reads = reads

    def forward(self, x):
        self.seen += x.shape[0]
        return x * self.seen if self.reads else x * 2


def test_a_counter_that_no_result_reads_is_left_out():
    model = Counting(False)
    assert torch.equal(session_of(copy.deepcopy(model), floats()).run({"x": floats(3)})[0], floats(3) * 2)


def test_a_counter_that_a_result_reads_is_refused():
    with pytest.raises(
        NotSaveableError, match="writes to its buffer 'f?.?seen' as it runs, and an engine keeps no state"
    ):
        describe_call(program_of(Counting(True), floats()))


def test_a_python_counter_is_refused_and_put_back():
    class Calls(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = Calls()
    with pytest.raises(NotSaveableError, match="self.calls of Calls changes at each call.*use backend='torch'"):
        export_program(model, (floats(),), {})
    assert model.calls == 0


def test_random_draws_are_refused_and_idle_dropout_is_not():
    with pytest.raises(NotSaveableError, match=r"draws random numbers \(aten.*test_export.py.*call eval\(\) first"):
        program_of(Fn(lambda x: x + torch.rand_like(x)), floats())
    program_of(Fn(lambda x: F.dropout(x, 0.5, training=False)), floats())


def test_an_op_without_onnx_form_names_its_line():
    with pytest.raises(NotSaveableError, match=r"no ONNX form: .*mode.*use backend='torch'"):
        to_onnx(program_of(Fn(lambda x: x.mode(-1)[0]), floats()))


def test_data_dependent_python_is_refused_with_its_line():
    with pytest.raises(NotSaveableError, match=r"torch.export stops at: .*ata-dependent.*test_export.py:\d+"):
        export_program(Fn(lambda x: x * 2 if x.sum() > 0 else x), (floats(),), {})


def test_a_submodule_behind_a_method_of_its_name_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer._ff_block = nn.Linear(8, 8)
    layer.eval()
    with pytest.raises(
        NotSaveableError,
        match=r"the submodule 1._ff_block \(Linear\) has the name of an attribute of the class "
        "TransformerEncoderLayer.*give it another name, or use backend='torch'",
    ):
        export_program(nn.Sequential(nn.Identity(), layer), (torch.randn(2, 3, 8),), {})


Pair = collections.namedtuple("Pair", ["y", "rest"])


def test_a_named_tuple_comes_back_as_its_class_and_elsewhere_by_name():
    tree = describe_call(program_of(Fn(lambda x: Pair(x + 1, [x])), floats()))["out_tree"]
    assert type(build(tree, iter([1, 2]))) is Pair
    one, two = (build(json.loads(json.dumps(tree).replace("Pair", "_Unmet")), iter([1, 2])) for _ in range(2))
    assert type(one) is type(two) is not Pair and type(one).__name__ == "_Unmet"
    assert (one.y, one.rest) == (1, [2]) and one._fields == Pair._fields
    collections.namedtuple("Pair", ["y"])  # other fields, another class
    again = collections.namedtuple("Pair", ["y", "rest"])
    describe_call(program_of(Fn(lambda x: again(x + 1, [x])), floats()))
    assert type(build(tree, iter([1, 2]))) not in (Pair, again)  # two were met: neither is guessed


class ProductKeys(nn.Module):
    """The best of all sums of two scores, by a top-k of each and a top-k of their sums; three experts of one row."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.keys = nn.Parameter(torch.randn(2, 6, 8))
        self.down, self.up = nn.Embedding(36, 16), nn.Embedding(36, 16)

    def forward(self, x):
        score = torch.einsum("tpd,pnd->tpn", self.query(x).view(-1, 2, 8), self.keys)
        (sa, sb), (ia, ib) = (t.unbind(1) for t in score.topk(3, -1))
        best, at = (sa[:, :, None] + sb[:, None]).flatten(1).topk(3, -1)
        ids = (ia[:, :, None] * 6 + ib[:, None]).flatten(1).gather(-1, at)
        h = F.gelu(torch.einsum("td,tkd->tk", x, self.down(ids))) * best.softmax(-1)
        return torch.einsum("tk,tkd->td", h, self.up(ids)), ids


def test_product_keys_choose_the_same_and_are_as_near_to_float64():
    """Where GELU saturates, 1 + erf(z) has lost its digits: such a token is far off in relative terms on each side.

    So both are judged by their distance to float64: ONNX Runtime's may be four times PyTorch's, token by token, and
    eight roundings of a token of the usual size more.
    """
    torch.manual_seed(0)
    model = ProductKeys().eval()
    x = torch.randn(513, 16)
    y, ids = session_of(model, x[:11]).run({"x": x})
    with torch.no_grad():
        y_torch, ids_torch = model(x)
        y64, ids64 = copy.deepcopy(model).double()(x.double())
    assert torch.equal(ids, ids_torch) and torch.equal(ids, ids64)
    far, far_torch = ((t - y64).norm(dim=-1) for t in (y, y_torch))
    usual = y64.norm(dim=-1).square().mean().sqrt()
    assert (far <= 4 * far_torch + 8 * torch.finfo(torch.float32).eps * usual).all()
    assert (far_torch / y64.norm(dim=-1)).max() > 1e-4  # PyTorch itself: some token's output is all but cancelled


def test_squeezing_what_is_not_one_does_nothing():
    def f(x):
        return x.squeeze(1) + x.squeeze(-1).squeeze((0, 1)), x[:, None].squeeze(1), x[None, :, None].squeeze()

    session = session_of(Fn(f), floats())
    for x in (floats(4), floats(9)):
        for a, b in zip(session.run({"x": x}), f(x), strict=True):
            assert torch.equal(a, b)


BELOW_ZERO = {
    "embedding": lambda table, ids: F.embedding(ids, table),
    "gather": lambda table, ids: table.gather(0, ids[:, None].expand(-1, 6)),
    "index_select": lambda table, ids: table.index_select(0, ids.reshape(-1)),
    "of a difference": lambda table, ids: table.gather(0, (ids.clamp(min=0) - (ids < 0).long())[:, None]),
    "scatter": lambda table, ids: table.scatter(0, ids[:, None], torch.ones(3, 1)),
    "scatter_add": lambda table, ids: table.scatter_add(0, ids[:, None], torch.ones(3, 1)),
    "index_add": lambda table, ids: table.index_add(0, ids, torch.ones(3, 6)),
}


class Indexed(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.table = f, nn.Parameter(torch.randn(5, 6))

    def forward(self, ids):
        return self.f(self.table, ids)


@pytest.mark.parametrize("name", BELOW_ZERO)
def test_an_index_below_zero_is_an_error_where_it_is_one_in_pytorch(name):
    model, ids = Indexed(BELOW_ZERO[name]), torch.tensor([0, 4, 2])
    session = session_of(model, ids)
    with torch.no_grad():
        assert torch.equal(session.run({"ids": ids})[0], model(ids))
    for wrong in (torch.tensor([0, -1, 2]), torch.tensor([0, -3, 2])):
        with pytest.raises((IndexError, RuntimeError)):
            model(wrong)
        with pytest.raises(UsageError, match="ONNX Runtime stops at the node"):
            session.run({"ids": wrong})


def test_indices_that_count_from_the_end_do_so():
    model, ids = Indexed(lambda table, ids: table[ids]), torch.tensor([0, -1, 2])
    with torch.no_grad():
        assert torch.equal(session_of(model, ids).run({"ids": ids})[0], model(ids))


def test_indices_of_a_choice_are_not_checked():
    def chosen(x):
        weights, ids = x.softmax(-1).topk(2)
        order = ids.flatten().argsort(stable=True)
        return x.gather(-1, ids) * weights, x.reshape(-1).index_select(0, order)

    program = program_of(Fn(chosen), floats())
    graph = to_onnx(program)
    assert not [node for node in graph.graph if node.op_type == "Less"]


class Temperature(nn.Module):
    """``t`` is a Parameter, and the name that the exporter gives to a transposed matrix."""

    def __init__(self):
        super().__init__()
        self.centers, self.t = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x @ F.normalize(self.centers, dim=-1).t() * self.t.exp()


def test_a_parameter_named_as_an_op():
    model, x = Temperature(), floats()
    with torch.no_grad():
        torch.testing.assert_close(session_of(model, x).run({"x": x})[0], model(x))


class Losses(nn.Module):
    """Cross entropies of shares and of ids, with weights, smoothing and rows that are ignored."""

    def forward(self, x, ids, deep, deep_ids):
        weight, shares, deep_shares = x[0].abs() + 1, (x * 2).flip(1).softmax(1), deep.flip(1).softmax(1)
        kept = torch.where(ids == 5, -100, ids)
        found = []
        for reduction in ("mean", "sum", "none"):
            for smoothing in (0.0, 0.1):
                given = {"reduction": reduction, "label_smoothing": smoothing}
                found += [F.cross_entropy(x, shares, **given), F.cross_entropy(x, shares, weight, **given)]
                found += [F.cross_entropy(x, kept, **given), F.cross_entropy(x, kept, weight, **given)]
                found += [F.cross_entropy(x, ids, weight, ignore_index=2, **given)]
                found += [F.cross_entropy(deep, deep_shares, weight, **given), F.cross_entropy(deep, deep_ids, **given)]
                found += [F.cross_entropy(deep, deep_ids, weight, ignore_index=1, **given)]
        return (*found, F.cross_entropy(x[0], shares[0], label_smoothing=0.2))


def test_cross_entropies_of_shares_and_of_smoothed_labels():
    model, (x, deep) = Losses(), (torch.randn(4, 6), torch.randn(3, 6, 5))
    call = (x, torch.tensor([1, 0, 5, 2]), deep, torch.arange(15).view(3, 5) % 6)
    session = session_of(model, *call)
    names = dict(zip(("x", "ids", "deep", "deep_ids"), call, strict=True))
    for got, want in zip(session.run(names), model(*call), strict=True):
        torch.testing.assert_close(got, want)


class Smoothed(nn.Module):
    """Without a loss of ids in the same graph, for which the exporter takes all ops apart and finds numbers."""

    def forward(self, x, shares):
        return F.cross_entropy(x, shares, x[0].abs(), label_smoothing=0.1)


def test_a_smoothed_loss_of_shares_alone():
    model, x, shares = Smoothed(), torch.randn(4, 6), torch.rand(4, 6).softmax(1)
    (got,) = session_of(model, x, shares).run({"x": x, "shares": shares})
    torch.testing.assert_close(got, model(x, shares))


class Parts(nn.Module):
    """A source that is larger than its indices, and indices of 32 bits beside others."""

    def forward(self, x, ids):
        at, few = ids[:, None], torch.zeros_like(x)
        short = ids.int()
        places = torch.arange(len(ids), dtype=torch.int32)
        put = x.index_put((places,), x[short]).index_put((places, short), x[:, 0])
        return few.scatter(1, at, x), few.scatter_add(1, at[:3], x), x[short], x[:, short], x[places, short], put


def test_parts_of_a_source_and_indices_of_32_bits():
    model, x, ids = Parts(), torch.randn(4, 6), torch.tensor([1, 0, 3, 2])
    for got, want in zip(session_of(model, x, ids).run({"x": x, "ids": ids}), model(x, ids), strict=True):
        assert torch.equal(got, want)
