"""The op as every consumer meets it: eager, autograd, torch.compile, torch.export, fx, fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts, experts_reference, flatten, unflatten
from tests.ops.cases import H, make

OP = torch.ops.moeopt.experts.default
SPECS = [
    ExpertsSpec(),
    ExpertsSpec(rows="separate", w_out_layout="io", combine="expert", out_of_range="identity", activation="gelu"),
    ExpertsSpec(rows="plain", w_in_layout="io", weight_on="input", out_norm_eps=1e-3, activation="tanh"),
    ExpertsSpec(rows="interleaved", gate_max=0.5, up_offset=1.0, activation="swish", alpha=1.702),
]


def op_args(case):
    return (case.x, case.ids, case.weights, *flatten(case.bank, case.spec), case.spec.encode())


def tensors(case):
    return [case.x, case.weights, *(t for part in flatten(case.bank, case.spec) for t in part)]


@pytest.mark.parametrize(("spec", "stacked"), list(zip(SPECS, (True, False, True, False), strict=True)), ids=str)
def test_opcheck(spec, stacked):
    case = make(spec, T=4, E=3, K=2, stacked=stacked, strange_ids=True, dtype=torch.float32)
    for tensor in tensors(case):
        if tensor.is_leaf:
            tensor.requires_grad_()
    torch.library.opcheck(OP, op_args(case))


@pytest.mark.parametrize(("spec", "stacked"), list(zip(SPECS, (False, True, False, True), strict=True)), ids=str)
def test_gradcheck(spec, stacked):
    case = make(spec, T=3, E=2, K=2, stacked=stacked, strange_ids=True)
    parts = [len(part) for part in flatten(case.bank, spec)]

    def run(x, weights, *flat):
        rest = iter(flat)
        return OP(x, case.ids, weights, *([next(rest) for _ in range(n)] for n in parts), spec.encode())

    leaves = [t.detach().clone().requires_grad_() for t in tensors(case)]
    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_reach_the_bank_through_the_python_entry():
    case = make(ExpertsSpec(), dtype=torch.float32)
    for t in tensors(case):
        t.requires_grad_()
    grads = []
    for function in (experts, experts_reference):
        grads.append(torch.autograd.grad(function(*case.args).square().sum(), tensors(case)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32, sums in another order


def test_only_the_wanted_gradients_are_made():
    case = make(ExpertsSpec(), dtype=torch.float32)
    case.x.requires_grad_()
    experts(*case.args).sum().backward()
    assert case.x.grad is not None and all(t.grad is None for t in tensors(case)[1:])


def test_no_tokens_and_no_hits_have_zero_gradients():
    for ids in (torch.zeros(0, 2, dtype=torch.int64), torch.full((3, 2), -1)):
        case = make(ExpertsSpec(), T=len(ids))
        for t in tensors(case):
            t.requires_grad_()
        y = experts(case.x, ids, case.weights, case.bank, case.spec)
        grads = torch.autograd.grad(y.sum(), tensors(case))
        assert not any(g.any() for g in grads)


class Block(torch.nn.Module):
    def __init__(self, spec, stacked=True):
        super().__init__()
        case = make(spec, E=3, stacked=stacked, dtype=torch.float32)
        self.spec = spec
        flat = flatten(case.bank, spec)
        self.sizes = [len(part) for part in flat]
        self.weights = torch.nn.ParameterList([t for part in flat for t in part])

    def forward(self, x, ids, weights):
        rest = iter(list(self.weights))
        bank = unflatten([[next(rest) for _ in range(n)] for n in self.sizes], self.spec)
        return experts(x * 2, ids, weights, bank, self.spec) + 1


@pytest.mark.parametrize("stacked", (True, False))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_torch_compile_fullgraph(backend, stacked):
    torch._dynamo.reset()
    block = Block(SPECS[1], stacked)
    case = make(SPECS[1], T=5, E=3, K=2, dtype=torch.float32, strange_ids=True)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x = case.x.clone().requires_grad_()
    got, want = compiled(x, case.ids, case.weights), block(x, case.ids, case.weights)
    torch.testing.assert_close(got, want, rtol=0, atol=0)  # the same kernel
    got_grads = torch.autograd.grad(got.sum(), [x, *block.parameters()])
    want_grads = torch.autograd.grad(want.sum(), [x, *block.parameters()])
    # eagerly h is what the kernel kept; compiled, it is multiplied again by torch, which adds in another order
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=16 * torch.finfo(w.dtype).eps * w.abs().max().item())


@pytest.mark.one_isa
@pytest.mark.parametrize("strict", (True, False))
def test_torch_export_is_one_node_with_a_dynamic_token_count(strict):
    block = Block(SPECS[0]).eval()
    args = [make(SPECS[0], T=T, E=3, K=2, dtype=torch.float32, seed=T).args[:3] for T in (5, 11, 1)]
    tokens = torch.export.Dim("tokens", min=1)
    program = torch.export.export(block, args[0], dynamic_shapes=[{0: tokens}] * 3, strict=strict)
    assert [n.target for n in program.graph.nodes].count(OP) == 1
    program = program.run_decompositions()
    assert [n.target for n in program.graph.nodes].count(OP) == 1
    for case in args:
        torch.testing.assert_close(program.module()(*case), block(*case), rtol=0, atol=0)


def test_fx_symbolic_trace_is_one_node():
    case = make(ExpertsSpec(), dtype=torch.float32)

    class Traced(torch.nn.Module):
        def forward(self, x, ids, weights):
            return experts(x, ids, weights, case.bank, case.spec)

    traced = torch.fx.symbolic_trace(Traced())
    assert torch.ops.moeopt.experts in [n.target for n in traced.graph.nodes]
    torch.testing.assert_close(traced(*case.args[:3]), experts(*case.args), rtol=0, atol=0)


def test_a_dispatch_mode_sees_one_op():
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    case = make(ExpertsSpec(), dtype=torch.float32)
    with Note():
        experts(*case.args)
    assert OP in seen and not any("mm" in str(f) for f in seen[: seen.index(OP) + 1])


def test_fake_and_meta_tensors():
    spec = ExpertsSpec(out_dtype="float16")
    with FakeTensorMode():
        bank = StackedExpertWeights([torch.empty(3, 10, H)], torch.empty(3, 9, 5))
        y = experts(torch.empty(4, H), torch.empty(4, 2, dtype=torch.int64), torch.empty(4, 2), bank, spec)
        assert y.shape == (4, 9) and y.dtype == torch.float16
    meta = torch.device("meta")
    bank = StackedExpertWeights([torch.empty(3, 10, H, device=meta)], torch.empty(3, 9, 5, device=meta))
    ids = torch.empty(4, 2, dtype=torch.int64, device=meta)
    assert experts(torch.empty(4, H, device=meta), ids, torch.empty(4, 2, device=meta), bank, spec).is_meta


def test_autocast_does_not_reach_inside():
    case = make(ExpertsSpec(), dtype=torch.float32)
    want = experts(*case.args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(experts(*case.args), want)
        assert torch.equal(OP(*op_args(case)), want)


def test_autocast_does_not_reach_into_the_gradient():
    case = make(ExpertsSpec(), dtype=torch.float32)
    case.x.requires_grad_()
    (want,) = torch.autograd.grad(experts(*case.args).sum(), [case.x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(experts(*case.args).sum(), [case.x])
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad))
def test_modes_without_gradients(mode):
    case = make(ExpertsSpec(), dtype=torch.float32)
    for t in tensors(case):
        t.requires_grad_()
    with mode():
        assert torch.equal(experts(*case.args), OP(*op_args(case)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("stacked", (True, False))
def test_unflatten_undoes_flatten(spec, stacked):
    case = make(spec, E=3, stacked=stacked)
    bank = unflatten(flatten(case.bank, spec), spec)
    assert isinstance(bank, StackedExpertWeights if stacked else ListExpertWeights)
    assert torch.equal(experts_reference(case.x, case.ids, case.weights, bank, spec), experts_reference(*case.args))


@pytest.mark.parametrize("stacked", (True, False))
def test_a_bias_that_only_some_have_survives(stacked):
    case = make(ExpertsSpec(rows="separate"), E=3, stacked=True, dtype=torch.float32)
    whole = case.bank
    bank = StackedExpertWeights(whole.w_in_s, whole.w_out_s, [None, whole.b_in_s[1]])
    if not stacked:
        ups = [None, *whole.b_in_s[1].unbind()[1:]]
        bank = ListExpertWeights([list(w) for w in whole.w_in_s], list(whole.w_out_s), [None, ups])
    case.bank = bank
    torch.testing.assert_close(OP(*op_args(case)), experts_reference(*case.args), rtol=1e-5, atol=1e-5)
    case.x.requires_grad_()
    experts(*case.args).sum().backward()
    assert case.x.grad.isfinite().all()


def test_the_result_aliases_nothing():
    case = make(ExpertsSpec(rows="plain", activation="identity"), dtype=torch.float32)
    case.ids[:] = 99
    for rule in ("nothing", "identity"):
        case.spec = ExpertsSpec(rows="plain", activation="identity", out_of_range=rule)
        y = experts(*case.args)
        assert all(y.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors(case))
