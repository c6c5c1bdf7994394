"""An optimised model goes on living: what is changed afterwards shows, or the original code runs and says why."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import IDS, Block, Expert, H, X, build, close, far, mixtral, optimized, qwen3_moe, seeded


def step(m):
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
    for i, p in enumerate(m.parameters()):
        p.grad = seeded(*p.shape, seed=i)
    optimizer.step()


def load(m, assign=False):
    m.load_state_dict({k: seeded(*v.shape, seed=i) for i, (k, v) in enumerate(m.state_dict().items())}, assign=assign)


def lora_merge(m):
    m.experts[2].w1.weight.data.add_(seeded(H, 4) @ seeded(4, H, seed=6))


def new_parameter(m):
    m.experts[1].w1.weight = nn.Parameter(seeded(H, H))


def new_storage(m):
    m.experts[1].w1.weight.data = seeded(H, H).t()


def tie(m):
    m.experts[1].w1 = m.experts[1].w1  # the same module: nothing changes
    m.experts[1].w1.weight = m.experts[0].w1.weight


def new_gate(m):
    torch.manual_seed(3)
    m.gate = nn.Linear(H, 4)


def gate_hook(m):
    m.gate.register_forward_hook(lambda module, args, out: -out)


def block_hook(m):
    m.register_forward_hook(lambda module, args, out: out * 10)


@pytest.mark.parametrize(
    "change",
    [step, load, lambda m: load(m, assign=True), lora_merge, new_parameter, new_storage, tie, new_gate, gate_hook,
     block_hook, lambda m: m.train(), lambda m: m.requires_grad_(False)],
    ids=["optimizer", "load", "load_assign", "lora_merge", "new_parameter", "new_storage", "tie", "new_gate",
         "gate_hook", "block_hook", "train", "frozen"],
)  # fmt: skip
def test_a_change_shows(change):
    ref, opt = build(), optimized(build())
    before = opt(X)
    change(ref), change(opt.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)
        close(opt(X), ref(X))
    assert opt.model.forward.calls >= 2 and not opt.model.forward.fallbacks
    assert far(opt(X), before) or change.__name__ == "<lambda>"


class Lora(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.a = linear, nn.Parameter(seeded(H, H))

    def forward(self, x):
        return self.linear(x) + x @ self.a


class Twice(nn.Module):
    def forward(self, w):
        return w * 2


def set_(path, value):
    def change(m):
        owner, _, name = path.rpartition(".")
        torch.manual_seed(9)
        setattr(m.get_submodule(owner), name, value() if callable(value) else value)

    return change


def ten_times(module, args, out):
    return out * 10


STALE = {
    "expert replaced": (lambda m: m.experts.__setitem__(2, set_seed(Expert)), "experts was replaced|experts.2"),
    "experts swapped": (lambda m: setattr(m, "experts", nn.ModuleList(reversed(m.experts))), "replaced"),
    "expert added": (lambda m: m.experts.insert(0, set_seed(Expert)), "replaced"),
    "lora": (lambda m: setattr(m.experts[2], "w1", Lora(m.experts[2].w1)), "experts.2"),
    "hook on a Linear": (
        lambda m: m.experts[1].w1.register_forward_hook(ten_times),
        "hook was registered on experts.1.w1",
    ),
    "hook on an expert": (lambda m: m.experts[1].register_forward_hook(ten_times), "hook was registered on experts.1"),
    "pre-hook": (lambda m: m.experts[1].register_forward_pre_hook(lambda e, a: (a[0] * 3,)), "hook was registered"),
    "hook on an activation": (lambda m: m.experts[1].act.register_forward_hook(ten_times), "experts.1.act"),
    "parametrize": (lambda m: parametrize.register_parametrization(m.experts[1].w1, "weight", Twice()), "experts.1.w1"),
    "weight_norm": (lambda m: weight_norm(m.experts[1].w2), "experts.1.w2"),
    "prune": (lambda m: prune.l1_unstructured(m.experts[0].w1, "weight", 0.5), "experts.0.w1"),
    "bias added": (set_("experts.1.w1.bias", lambda: nn.Parameter(seeded(H))), "experts.1.w1 has a bias, and had none"),
    "activation": (set_("experts.1.act", nn.ReLU), "experts.1"),
    "activation's class": (set_("experts.1.act.__class__", lambda: nn.ReLU), "class of experts.1.act"),
    "patched Linear": (lambda m: setattr(m.experts[1].w1, "forward", lambda x: x * 0), "replaced on experts.1.w1"),
    "patched expert": (lambda m: setattr(m.experts[1], "forward", lambda x: x * 0), "replaced on experts.1"),
    "top_k": (set_("top_k", 1), "top_k of the block is 1 and was 2"),
    "renormalise": (set_("renormalise", False), "renormalise of the block is False and was True"),
    "bfloat16": (lambda m: m.to(torch.bfloat16), "torch.bfloat16 where torch.float32 was verified"),
    "half": (lambda m: m.half(), "torch.float16 where torch.float32 was verified"),
    "double": (lambda m: m.double(), "torch.float64 where torch.float32 was verified"),
}


def set_seed(cls):
    torch.manual_seed(9)
    return cls()


@pytest.mark.parametrize("name", STALE)
def test_a_change_of_code_falls_back(name):
    change, text = STALE[name]
    ref, opt = build(), optimized(build())
    before = opt(X)
    change(ref), change(opt.model)
    x = X.to(next(ref.parameters()).dtype)
    with pytest.warns(StaleModelWarning, match=text) as caught:
        got = opt(x)
        opt(x)
    stale = [w for w in caught if w.category is StaleModelWarning]
    assert len(stale) == 1, "one reason, one warning"
    assert "runs its original code" in str(stale[0].message) and "moeopt.optimize again" in str(stale[0].message)
    assert torch.equal(got, ref(x)) and opt.model.forward.fallbacks == 2
    if x.dtype is torch.float32 and name != "weight_norm":  # that one computes the same weight
        assert far(got, before)


def test_a_global_hook_falls_back():
    ref, opt = build(), optimized(build())
    only_silu = torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, out: out * 2 if isinstance(m, nn.SiLU) else None
    )
    try:
        with pytest.warns(StaleModelWarning, match="global forward hook"):
            assert torch.equal(opt(X), ref(X))
    finally:
        only_silu.remove()


def test_a_patched_class_falls_back(monkeypatch):
    ref, opt = build(), optimized(build())
    monkeypatch.setattr(Expert, "forward", lambda self, x: x)
    with pytest.warns(StaleModelWarning, match="class of experts.0"):
        assert torch.equal(opt(X), ref(X))


def test_a_stale_model_can_be_optimised_again():
    opt = optimized(build())
    opt.model.experts[1] = set_seed(Expert)
    with pytest.warns(StaleModelWarning):
        want = opt(X)
    again = optimized(opt.model)
    close(again(X), want)
    assert not again.model.forward.fallbacks


def test_dropout_model_falls_back_in_training_and_returns_in_eval():
    ref, opt = build(dropout=0.5), optimized(build(dropout=0.5))
    opt.model.train(), ref.train()
    with pytest.warns(StaleModelWarning, match="training mode, in which it computes something else"):
        torch.manual_seed(1)
        got = opt(X)
    torch.manual_seed(1)
    assert torch.equal(got, ref(X))
    opt.model.eval(), ref.eval()
    calls = opt.model.forward.calls
    close(opt(X), ref(X))
    assert opt.model.forward.calls == calls + 1


def test_one_expert_in_training_mode_falls_back():
    ref, opt = build(dropout=0.5), optimized(build(dropout=0.5))
    for m in (ref, opt.model):
        m.experts[0].train()
    with pytest.warns(StaleModelWarning, match="experts.0"):
        torch.manual_seed(1)
        got = opt(X)
    torch.manual_seed(1)
    assert torch.equal(got, ref(X))


def test_jitter_in_training_only():
    class Jitter(Block):
        def forward(self, x):
            if self.training:
                x = x * torch.empty_like(x).uniform_(0.9, 1.1)
            return super().forward(x)

    ref, opt = build(Jitter), optimized(build(Jitter))
    close(opt(X), ref(X))
    ref.train(), opt.model.train()
    with pytest.warns(StaleModelWarning, match="training mode"):
        torch.manual_seed(1)
        got = opt(X)
    torch.manual_seed(1)
    assert torch.equal(got, ref(X))


# -- copies, pickles, sharing -------------------------------------------------------------------


def test_a_deepcopy_is_independent():
    model = build()
    opt = optimized(model)
    twin = copy.deepcopy(opt)
    assert twin.model.forward.module is twin.model
    with torch.no_grad():
        twin.model.experts[0].w1.weight.add_(1)
    close(opt(X), model(X))
    ref = build()
    ref.load_state_dict(twin.model.state_dict())
    close(twin(X), ref(X))
    assert twin.model.forward.calls and not twin.model.forward.fallbacks and far(twin(X), opt(X))


def test_a_change_between_copy_and_first_call_is_seen():
    opt, ref = optimized(build()), build()
    twin = copy.deepcopy(opt.model)
    twin.experts[0].act = ref.experts[0].act = nn.ReLU()
    with pytest.warns(StaleModelWarning, match="experts.0"):
        assert torch.equal(twin(X), ref(X))


@pytest.mark.parametrize("what", ["Optimized", "model", "torch.save"])
def test_pickle(what):
    model = build()
    opt = optimized(model, verify="fast")
    if what == "torch.save":
        file = io.BytesIO()
        torch.save(opt.model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = pickle.loads(pickle.dumps(opt if what == "Optimized" else opt.model))
    close(twin(X), model(X))
    inner = twin.model if what == "Optimized" else twin
    assert inner.forward.calls == 1 and not inner.forward.fallbacks
    if what == "Optimized":
        assert str(twin.report) == str(opt.report) and twin.certificate.passed is True


def test_state_dict_keys_and_loading():
    model, other = build(), build()
    load(other)
    opt = optimized(model)
    assert list(opt.state_dict()) == list(model.state_dict())
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file))
    close(opt(X), other(X))


def test_weights_are_shared_not_copied():
    model = build()
    opt = optimized(model)
    assert all(a is b for a, b in zip(model.parameters(), opt.model.parameters(), strict=True))
    assert "forward" not in model.__dict__ and type(opt.model) is type(model)
    held = {t.data_ptr() for t in opt.model.forward.__dict__.values() if isinstance(t, torch.Tensor)}
    assert not held


def test_inplace():
    model, ref = build(), build()
    opt = optimized(model, inplace=True)
    assert opt.model is model
    close(model(X), ref(X))
    assert model.forward.calls and not model.forward.fallbacks


def test_share_memory_and_functional_call():
    model = build()
    opt = optimized(model)
    opt.model.share_memory()
    close(opt(X), model(X))
    doubled = {k: v * 2 for k, v in model.named_parameters()}
    close(torch.func.functional_call(opt.model, doubled, (X,)), torch.func.functional_call(model, doubled, (X,)))


# -- gradients ----------------------------------------------------------------------------------


def gradients(fn, model, x=X):
    model.zero_grad()
    x = x.clone().requires_grad_()
    fn(x).square().sum().backward()
    return [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]


def same_gradients(fn, opt, model, x=X):
    for got, want in zip(gradients(fn, opt, x), gradients(model, model, x), strict=True):
        # up to 32 products and two norms are summed in another order
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()) + 1e-12)


def test_gradients_are_the_originals():
    model = build()
    opt = optimized(model)
    same_gradients(opt, opt.model, model)
    assert opt.model.forward.calls and not opt.model.forward.fallbacks


def test_gradients_through_checkpoint():
    model = build()
    opt = optimized(model)
    same_gradients(lambda x: checkpoint(opt.model, x, use_reentrant=False), opt.model, model)


def no_grad_router(self, x):
    rows = x.reshape(-1, H)
    with torch.no_grad():
        ids, w = self.route(rows)
    return self.loop(rows, ids, w).view(x.shape)


def detached_router(self, x):
    rows = x.reshape(-1, H)
    ids, w = self.route(rows.detach())
    return self.loop(rows, ids, w.detach()).view(x.shape)


def no_grad_experts(self, x):
    rows = x.reshape(-1, H)
    ids, w = self.route(rows)
    with torch.no_grad():
        y = self.loop(rows, ids, w)
    return y.view(x.shape) + x


@pytest.mark.parametrize("forward", [no_grad_router, detached_router, no_grad_experts], ids=lambda f: f.__name__)
def test_a_stopped_gradient_stays_stopped(forward):
    cls = type("Stopped", (Block,), {"forward": forward})
    model = build(cls)
    opt = moeopt.optimize(model, X, verify="fast")
    with torch.no_grad():
        close(opt(X), model(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleModelWarning)
        same_gradients(opt, opt.model, model)


def test_writes_to_an_input_keep_their_gradient():
    class Scales(Block):
        def forward(self, x):
            x.mul_(2.0)
            return super().forward(x)

    model = build(Scales)
    opt = optimized(model)
    a, b = X.clone(), X.clone()
    with torch.no_grad():
        close(opt(a), model(b))
    assert torch.equal(a, b)

    def around(block):
        def fn(x):
            h = x * 1.0
            return block(h) + h

        return fn

    with pytest.warns(StaleModelWarning, match="writes to tensors in place"):
        got = gradients(around(opt), opt.model)
    for g, w in zip(got, gradients(around(model), model), strict=True):
        torch.testing.assert_close(g, w)


def test_functional_gradients():
    model = build()
    opt = optimized(model)
    weights = dict(model.named_parameters())

    def grads(m):
        return torch.func.grad(lambda p: torch.func.functional_call(m, p, (X,)).square().sum())(weights)

    with pytest.warns(StaleModelWarning, match=r"torch\.func"):
        got = grads(opt.model)
    for name, want in grads(model).items():
        torch.testing.assert_close(got[name], want)


def test_second_gradients_are_refused():
    opt, x = optimized(build()), X.clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"no second derivative \(create_graph=True\); take it of the original model"
    ):
        torch.autograd.grad(opt(x).square().sum(), x, create_graph=True)


def test_inference_mode():
    model = build()
    opt = optimized(model)
    with torch.inference_mode():
        close(opt(X.clone()), model(X))


# -- other calls than the verified one ------------------------------------------------------------


def test_calls_like_the_verified_one():
    model = build()
    opt = optimized(model)
    strided = seeded(H, 8, 2).permute(2, 1, 0)
    for x in (X[:0], X[:, :0], X[:1], X.transpose(0, 1), strided, X[:, ::2], X[:1].expand(3, 8, H), seeded(7, 31, H)):
        close(opt(x), model(x))
    close(opt(x=X), model(x=X))
    assert not opt.model.forward.fallbacks


def test_other_dtypes_and_ranks_fall_back():
    model = build()
    opt = optimized(model)
    with pytest.warns(StaleModelWarning, match="called with a 2-dimensional tensor, verified with 3"):
        close(opt(X[0]), model(X[0]))
    stale = pytest.warns(StaleModelWarning, match="called with torch.float64 where torch.float32 was verified")
    with stale, pytest.raises(RuntimeError):
        opt(X.double())
    with pytest.raises(TypeError):
        opt(X, X)
    with pytest.warns(StaleModelWarning, match="called with size 3 where only 16 was verified"):
        assert torch.equal(opt(X[..., :3]), model(X[..., :3]))


class CastRouter(Block):
    """Its router runs in bfloat16, whatever the model's dtype is."""

    def route(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.gate(x)
        w, ids = logits.float().softmax(-1).topk(2)
        return ids, w


@pytest.mark.parametrize("verify", ["fast", "strict"])
def test_autocast_inside_the_forward_is_part_of_what_is_computed(verify):
    model = build(CastRouter)
    opt = optimized(build(CastRouter), verify=verify)
    x = seeded(2, 40, 16)
    with torch.no_grad():
        close(opt(x), model(x))


class CastAround(nn.Module):
    """Its first block is called under autocast: alone, it would compute in another dtype."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(H), Block(), Block()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(self.norm(x))
        return self.second(x + y.float())


def test_a_block_that_the_model_calls_under_autocast_is_declined():
    model, x = build(CastAround), seeded(2, 20, H)
    opt = moeopt.optimize(build(CastAround), X, verify="fast")
    first, second = (b for b in opt.report.blocks if b.kind == "moe")
    assert (first.status, second.status) == ("declined", "rewritten")
    assert first.reason.startswith("the model calls it under autocast, which decides dtypes at each call")
    assert "convert the model with .to(dtype) instead, or begin autocast in the block's own forward" in first.reason
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", StaleModelWarning)
        close(opt(x), model(x))


def test_autocast_around_optimize_is_the_users_own():
    with torch.autocast("cpu", torch.bfloat16):
        opt = moeopt.optimize(build(CastAround), X, verify="fast")
    reasons = {b.reason for b in opt.report.blocks if b.kind == "moe"}
    assert any(r.startswith("moeopt.optimize is called inside a torch.autocast of your own, and") for r in reasons)
    assert not any("the model calls it under autocast" in r for r in reasons)


def test_autocast_falls_back():
    model = build()
    opt = optimized(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(X)
        with pytest.warns(StaleModelWarning, match="autocast is on"):
            assert torch.equal(opt(X), want)


class TakesDict(Block):
    def forward(self, batch):
        return super().forward(batch["a"] + 2 * batch["b"])


class TakesKeywords(Block):
    def forward(self, **batch):
        return super().forward(batch["a"] + 2 * batch["b"])


class TakesLists(Block):
    def forward(self, a, b):
        return super().forward(sum(a) + 3 * sum(b))


class Setting:
    def __init__(self, scale):
        self.scale = scale


class TakesObject(Block):
    def forward(self, x, setting):
        return super().forward(x * setting.scale)


Y = seeded(2, 8, H, seed=8)


@pytest.mark.parametrize(
    ("cls", "inputs", "args", "kwargs", "text"),
    [
        (TakesDict, ({"a": X, "b": Y},), ({"b": Y, "a": X},), {}, "called with 'b' where 'a' was verified"),
        (TakesDict, ({"a": X, "b": Y, "c": X},), ({"c": X, "a": Y, "b": Y},), {}, "'c' where 'a'"),
        (TakesKeywords, {"a": X, "b": Y}, (), {"b": Y, "a": X}, "called with 'b' where 'a' was verified"),
        (TakesLists, ([X, Y], [X]), ([X], [X, Y]), {}, "called with 1 where 2 was verified"),
        (TakesObject, (X, Setting(2)), (X, Setting(5)), {}, "called with 5 where 2 was verified"),
    ],
    ids=["dict order", "dict keys", "keyword order", "nesting", "object"],
)
def test_other_structures_fall_back(cls, inputs, args, kwargs, text):
    model = build(cls)
    opt = optimized(model, inputs)
    with pytest.warns(StaleModelWarning, match=text):
        assert torch.equal(opt(*args, **kwargs), model(*args, **kwargs))


def test_inputs_that_share_memory_and_are_written():
    class Residual(Block):
        def forward(self, x, residual):
            x.mul_(2.0)
            return super().forward(x) + residual

    model = build(Residual)
    opt = optimized(model, (X, Y))
    a, b = X.clone(), X.clone()
    with torch.no_grad(), pytest.warns(StaleModelWarning, match="two of them share memory"):
        assert torch.equal(opt(a, a), model(b, b))


def test_a_module_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    model = build(Net)
    opt = optimized(model)
    close(opt(X), model(X))
    assert opt.model.block.forward.calls >= 2 and len(opt.report.rewritten) == 2


def test_threads_call_one_model():
    model = build()
    opt = optimized(model)
    errors = []

    def work(i):
        try:
            x = seeded(i + 1, 5, H, seed=i)
            for _ in range(10):
                close(opt(x), model(x))
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors


def test_another_thread_may_call_models_while_one_is_optimised():
    other, stop, errors = build(), [], []

    def serve():
        try:
            while not stop:
                other(X)
        except BaseException as err:
            errors.append(err)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        reports = [moeopt.optimize(build(), X, verify="off").report for _ in range(3)]
    finally:
        stop.append(1)
        thread.join()
    assert not errors and [len(r.blocks) for r in reports] == [1, 1, 1]
    assert all(r.rewritten for r in reports)


# -- compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    torch._dynamo.reset()
    model = build()
    opt = optimized(model)
    compiled = torch.compile(opt.model, backend=backend, fullgraph=True)
    with torch.no_grad():
        close(compiled(X), model(X))
        x = seeded(3, 5, H)
        close(compiled(x), model(x))
        model.experts[0].w1.weight.mul_(3)
        close(compiled(X), model(X))


class TwoInARow(nn.Module):
    """Two mixtures in one forward; the second routes what the first computed."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(H, 4, bias=False) for _ in range(2))
        self.first, self.second = (nn.ModuleList(Expert() for _ in range(4)) for _ in range(2))

    def forward(self, x):
        rows = x.reshape(-1, H)
        for gate, experts in zip(self.gates, (self.first, self.second), strict=True):
            w, ids = gate(rows).softmax(-1).topk(2)
            y = torch.zeros_like(rows)
            for e, expert in enumerate(experts):
                token, slot = torch.where(ids == e)
                y.index_add_(0, token, expert(rows[token]) * w[token, slot, None])
            rows = rows + y
        return rows.view(x.shape)


def test_two_mixtures_in_a_row_are_both_rewritten():
    model = build(TwoInARow)
    opt = optimized(model, verify="strict")
    assert [b.source for b in opt.report.blocks] == sorted(b.source for b in opt.report.blocks)
    assert len(opt.report.blocks) == 2 and opt.certificate.passed
    close(opt(Y), model(Y), eps=64)  # two blocks


def test_torch_export_at_other_sizes():
    model = build()
    opt = optimized(model)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(opt.model, (X,), dynamic_shapes=(sizes,))
    assert [str(n.target) for n in program.graph.nodes].count("moeopt.experts.default") == 1
    for shape in ((2, 8, H), (3, 5, H)):
        x = seeded(*shape)
        close(program.module()(x), model(x))


# -- accelerate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "experts.0"])
def test_accelerate_hooks_before(place):
    hooks = pytest.importorskip("accelerate.hooks")
    model, ref = build(), build()
    hooks.add_hook_to_module(model.get_submodule(place), hooks.AlignDevicesHook("cpu", io_same_device=True))
    opt = moeopt.optimize(model, X, verify="fast")
    close(opt(X), ref(X))
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    if place:
        assert block.status == "declined" and "forward was replaced on the instance experts.0" in block.reason
    else:
        assert block.status == "rewritten" and opt.model._old_forward.calls


@pytest.mark.parametrize("place", ["", "experts.1"])
def test_accelerate_hooks_after(place):
    hooks = pytest.importorskip("accelerate.hooks")
    ref, opt = build(), optimized(build())
    rewritten = opt.model.forward
    calls = rewritten.calls
    target = opt.model.get_submodule(place)
    hook = hooks.AlignDevicesHook("cpu", io_same_device=True, offload=bool(place), place_submodules=True)
    hooks.add_hook_to_module(target, hook)
    if place:
        with pytest.warns(StaleModelWarning, match="experts.1"):
            close(opt(X), ref(X))
    else:
        close(opt(X), ref(X))
        assert rewritten.calls == calls + 1
        hooks.remove_hook_from_module(target)
        close(opt(X), ref(X))
        assert rewritten.calls == calls + 2


def test_accelerate_cpu_offload_after():
    accelerate = pytest.importorskip("accelerate")
    ref, opt = build(), optimized(build())
    accelerate.cpu_offload(opt.model, execution_device="cpu")
    with pytest.warns(StaleModelWarning, match="experts.0"):
        close(opt(X), ref(X))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offload_before(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ref = build(), build()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    opt = moeopt.optimize(model, X)
    (block,) = opt.report.blocks
    assert (block.kind, block.status, block.experts) == ("moe", "declined", 4)
    assert (
        "its weights are offloaded by accelerate (gate.weight has no values until its module is called)" in block.reason
    )
    assert block.reason.endswith("load the model without offloading, optimise, then dispatch")
    with torch.no_grad():
        assert torch.equal(opt(X), ref(X)) and torch.equal(model(X), ref(X))


def test_accelerate_dispatch_before():
    accelerate = pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(H, H), Block()

        def forward(self, x):
            return self.b(self.a(x))

    model, ref = build(Net), build(Net)
    accelerate.dispatch_model(model, {"a": "cpu", "b": "cpu"}, force_hooks=True, main_device="cpu")
    opt = moeopt.optimize(model, X, verify="fast")
    close(opt(X), ref(X))
    assert all(b.status == "rewritten" or "was replaced on the instance" in b.reason for b in opt.report.blocks)


# -- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [mixtral, qwen3_moe], ids=["mixtral", "qwen3_moe"])
def test_router_logits_and_aux_loss(family):
    pytest.importorskip("transformers")
    model = family()
    opt = optimized(model, {"input_ids": IDS})
    with torch.no_grad():
        want = model(input_ids=IDS, output_router_logits=True, labels=IDS)
        got = opt(input_ids=IDS, output_router_logits=True, labels=IDS)
    assert len(got.router_logits) == len(want.router_logits) == 2
    assert torch.equal(got.router_logits[0], want.router_logits[0])
    # the second router reads what the first block computed in another order
    close(got.router_logits[1], want.router_logits[1])
    torch.testing.assert_close(got.aux_loss, want.aux_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", [mixtral, qwen3_moe], ids=["mixtral", "qwen3_moe"])
def test_generate_with_cache(family):
    pytest.importorskip("transformers")
    model = family()
    opt = optimized(model, {"input_ids": IDS})
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS), "use_cache": True}
    assert torch.equal(opt.generate(IDS, **kwargs), model.generate(IDS, **kwargs))
    with torch.no_grad():
        assert opt(input_ids=IDS, attention_mask=None).logits.shape == (2, 10, 64)
