"""All weights of a bank are known to lie as they lay by one comparison; whatever changes is followed, or told."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts, experts_reference
from moeopt.ops.every_ids import every_ids
from moeopt.ops.native import again
from moeopt.ops.native.library import library
from moeopt.rewrite import live_weights, module_guard, same_layout
from moeopt.rewrite.bank_layout import BankLayout
from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.live_weights import LiveExpertWeights, Place
from moeopt.rewrite.refused_call import Stale
from tests.rewrite.test_bank_layout import deleted_and_new, new_parameter, swapped_data
from tests.rewrite.test_known_entries import negated, transposed, written
from tests.rewrite.test_live_weights import E, H, listed

SPEC = ExpertsSpec(rows="plain", activation="relu")
CALLS = {"some": torch.tensor([[1, 2]]), "every": every_ids(2, E)}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=("generated", "compared"))
def many(request, monkeypatch):
    """A bank of few weights, and one of so many that they are compared in a few calls."""
    if request.param == "compared":
        monkeypatch.setattr(same_layout, "MOST", 3)


@pytest.fixture
def bank(many):
    torch.manual_seed(0)
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    bank.root = root
    return bank


def run(bank, ids):
    x, weights = torch.randn(len(ids), H), torch.rand(ids.shape)
    return experts(x, ids, weights, bank, SPEC), experts_reference(x, ids, weights, bank, SPEC)


def right(bank, ids):
    return torch.allclose(*run(bank, ids), atol=1e-5)


def native():
    if library() is None:
        pytest.skip("no native kernel here")


@pytest.mark.parametrize("ids", CALLS.values(), ids=CALLS)
def test_the_second_call_reads_no_weight_and_prepares_nothing(bank, ids, monkeypatch):
    native()
    x, weights = torch.randn(len(ids), H), torch.rand(ids.shape)
    want = experts(x, ids, weights, bank, SPEC)
    for owner, name in ((Place, "read"), (again, "prepared_call"), (LiveExpertWeights, "lies_alone")):
        monkeypatch.setattr(owner, name, lambda *args: pytest.fail("looked up one by one"))
    assert torch.equal(experts(x, ids, weights, bank, SPEC), want)


def loaded(root):
    root.load_state_dict({name: torch.randn_like(t) for name, t in root.state_dict().items()})


def assigned(root):
    root.load_state_dict({name: torch.randn_like(t) for name, t in root.state_dict().items()}, assign=True)


def there_and_back(root):
    root.double().float()


def as_buffer(root):
    """A plain tensor in the place of the Parameter, as an adapter that is merged may leave it."""
    weight = root.experts[1][0].weight
    del root.experts[1][0].weight
    root.experts[1][0].weight = torch.ones_like(weight)


def resized(root):
    """Other memory under the same object, by no assignment at all."""
    weight, held = root.experts[1][2].weight, torch.randn(64)
    weight.set_(held.untyped_storage(), 7, weight.shape, weight.stride())


CHANGES = (swapped_data, new_parameter, deleted_and_new, transposed, written, loaded, assigned, there_and_back, resized)


@pytest.mark.parametrize("ids", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_followed(bank, ids, change):
    assert right(bank, ids) and right(bank, ids)
    before = [t.clone() for t in bank.root.state_dict().values()]
    change(bank.root)
    changed = any(not torch.equal(a, b) for a, b in zip(before, bank.root.state_dict().values(), strict=True))
    assert changed or change in (swapped_data, there_and_back)
    for _ in range(3):
        assert right(bank, ids)


def test_a_sign_that_is_only_a_mark_is_seen(bank):
    ids = CALLS["every"]
    assert right(bank, ids)
    negated(bank.root)
    assert right(bank, ids)


def of_other_shape(root):
    """The same memory and as many numbers, read otherwise."""
    weight = root.experts[1][0].weight
    weight.data = weight.data.reshape(weight.shape[::-1])


def of_other_dtype(root):
    """The same memory and as many numbers of the same size."""
    weight = root.experts[1][2].weight.requires_grad_(False)
    weight.data = weight.data.view(torch.int32)


def pruned(root):
    """Without an address: PyTorch multiplies by it, and refuses to say where it lies."""
    weight = root.experts[1][0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is in beta
        root.experts[1][0].weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)


STALE = [
    (lambda r: r.experts[1][0].register_forward_hook(lambda *a: None), "a forward hook was registered"),
    (lambda r: r.experts[1][2].register_forward_pre_hook(lambda *a: None), "a forward hook was registered"),
    (lambda r: r.experts.__setitem__(1, nn.Sequential(*r.experts[1])), "the module that holds .* was replaced"),
    (lambda r: r.experts[1].__setitem__(0, nn.Linear(4, 5)), "the module that holds .* was replaced"),
    (lambda r: r.experts[1][0].half(), "changed from torch.float32"),
    (lambda r: delattr(r.experts[1][2], "weight"), "is no longer a plain Parameter"),
    (lambda r: r.experts[1][2].to("meta"), "is on the meta device"),
    (as_buffer, "is no longer a plain Parameter"),
    (of_other_shape, r"changed from torch.float32 \(5, 4\) to torch.float32 \(4, 5\)"),
    (of_other_dtype, "changed from torch.float32 .* to torch.int32"),
    (pruned, "experts.1.0.weight is torch.sparse_csr now, whose numbers do not lie at one address"),
]


@pytest.mark.parametrize(("change", "reason"), STALE)
def test_what_is_stale_is_told_where_its_expert_runs_and_only_there(bank, change, reason):
    for ids in CALLS.values():
        assert right(bank, ids)
    change(bank.root)
    for ids in CALLS.values():
        for _ in range(2):
            with pytest.raises(Stale, match=reason):
                experts(torch.ones(len(ids), H), ids, torch.ones(ids.shape), bank, SPEC)
    assert right(bank, torch.tensor([[2, 0]]))


def test_a_bank_with_a_stale_expert_is_looked_at_anew_once_in_a_while_and_known_again(bank, monkeypatch):
    others, looks, honest = torch.tensor([[2, 0]]), [], same_layout.SameLayout._know
    monkeypatch.setattr(same_layout.SameLayout, "_know", lambda lay: (looks.append(1), honest(lay))[1])
    handle = bank.root.experts[1][0].register_forward_hook(lambda *a: None)
    for _ in range(same_layout.PATIENCE + 1):
        assert right(bank, others) and bank._lay._known is None
    assert len(looks) == 1
    handle.remove()
    assert right(bank, others) and len(looks) == 2
    for _ in range(5):
        assert right(bank, others)
    assert len(looks) == 2 and bank._lay._known is not None


def test_each_expert_is_checked_at_each_call_where_nothing_stands_for_that(many):
    root, refs = listed()
    asked = []
    bank = LiveExpertWeights(root, refs, ("oi", "oi"), check=asked.append)
    for _ in range(2):
        asked.clear()
        assert right(bank, CALLS["every"])
        assert set(asked) == {0, 1, 2}


def test_no_weight_is_kept_alive(bank):
    assert right(bank, CALLS["every"])
    gone = weakref.ref(bank.root.experts[0][0].weight)
    bank.root.experts[0][0].weight = nn.Parameter(torch.ones(5, 4))
    gc.collect()
    assert gone() is None and right(bank, CALLS["every"])


def test_what_has_no_memory_of_its_own_is_not_known(many):
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"), place=type("Elsewhere", (Place,), {}))
    assert bank.remembered(E) is None and right(bank, CALLS["every"])
    refs[0] = type(refs[0])(refs[0].w_in, refs[0].b_in, refs[0].w_out, refs[0].b_out, neurons=(1, 0, 2, 3, 4))
    picked = LiveExpertWeights(root, refs, ("oi", "oi"))
    assert picked.remembered(E) is None and right(picked, CALLS["every"])


class Holder(nn.Module):
    """A model of which a functional call may replace the weights."""

    def __init__(self, bank):
        super().__init__()
        self.experts, self.bank = bank.root.experts, bank

    def forward(self, x):
        return experts(x, CALLS["every"], torch.ones(2, E), self.bank, SPEC)


def test_weights_that_a_functional_transform_wraps_are_read_by_the_reference(bank):
    assert right(bank, CALLS["every"])
    holder, x = Holder(bank), torch.randn(2, H)
    weight = bank.root.experts[1][2].weight.detach()

    def result(w):
        return torch.func.functional_call(holder, {"experts.1.2.weight": w}, (x,))

    y, slope = torch.func.jvp(result, (weight,), (torch.ones_like(weight),))
    want = experts_reference(x, CALLS["every"], torch.ones(2, E), bank, SPEC)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(slope, result(weight + 1) - want, rtol=1e-4, atol=1e-4)


def test_of_many_weights_few_experts_are_looked_at_alone(monkeypatch):
    monkeypatch.setattr(live_weights, "FEW", 3)
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    monkeypatch.setattr(BankLayout, "arm", lambda *args: pytest.fail("all were looked at"))
    assert bank.remembered(E - 1) is None and right(bank, CALLS["some"])
    monkeypatch.undo()
    assert bank.remembered(E) is not None


def test_an_expert_that_is_not_what_was_verified_is_never_known():
    def changed(expert):
        if expert == 2:
            raise Stale("another expert")

    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"), changed, arm=lambda guard: None)
    assert bank.remembered(E) is None
    with pytest.raises(Stale, match="another expert"):
        experts(torch.ones(2, H), CALLS["every"], torch.ones(2, E), bank, SPEC)


class Expert(nn.Sequential):
    """Reads a configuration of its own."""

    def __init__(self):
        super().__init__(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
        self.settings = {"scale": 1.0}

    def forward(self, x):
        return super().forward(x * self.settings["scale"])


class Every(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return (torch.stack([e(x) for e in self.experts], 1) * weights.unsqueeze(-1)).sum(1)


@pytest.fixture
def pair():
    """A block and its rewritten twin, each with weights of its own, which has done a few calls."""
    torch.manual_seed(0)
    block = Every().eval()
    fast = moeopt.optimize(copy.deepcopy(block), torch.randn(24, 16), verify="off").model
    assert rewritten_forward(fast) is not None
    for T in (1, 5, 1, 5):
        assert agree(block, fast, T)
    return block, fast


def agree(block, fast, T=1):
    x = torch.randn(T, 16)
    return torch.allclose(fast(x), block(x), atol=1e-5)


def test_a_block_asks_for_all_its_experts_at_once(pair, monkeypatch):
    native()
    monkeypatch.setattr(module_guard.Watch, "expert", lambda *args: pytest.fail("asked of one expert"))
    monkeypatch.setattr(Place, "read", lambda *args: pytest.fail("one weight was read"))
    assert agree(*pair, T=1) and agree(*pair, T=5)


FOLLOWED = (
    lambda m: m.experts[2][0].weight.mul_(2),
    lambda m: setattr(m.experts[2][2].weight, "data", m.experts[2][2].weight * 3),
    lambda m: setattr(m.experts[1][0], "weight", nn.Parameter(torch.full((8, 16), 0.25))),
    lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}),
    lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}, assign=True),
)
TOLD = (
    (lambda m: m.experts.__setitem__(1, copy.deepcopy(m.experts[1])), "was replaced"),
    (lambda m: m.experts[1].__setitem__(1, nn.ReLU()), "was replaced"),
    (lambda m: setattr(m.experts[3][1], "approximate", "tanh"), "approximate of experts.3.1 is 'tanh'"),
    (lambda m: m.experts[0][0].register_forward_hook(lambda mod, args, y: y * 2), "hook"),
    (lambda m: setattr(m.experts[2], "forward", lambda x: 0 * x), "forward was replaced on experts.2"),
    (lambda m: m.experts[2][0].register_parameter("bias", None), "changed|no longer"),
    (lambda m: m.experts[1].settings.update(scale=2.0), "scale"),
    (lambda m: setattr(m.experts[1], "settings", {"scale": 2.0}), "scale"),
    (
        lambda m: setattr(m.experts[1][0], "_parameters", dict(m.experts[2][0]._parameters)),
        "_parameters of experts.1.0",
    ),
    (lambda m: m.experts[1][0].__dict__.update(weight=torch.ones(8, 16)), "weight of experts.1.0 is an attribute"),
)


@pytest.mark.parametrize("change", FOLLOWED)
def test_a_block_follows_its_weights(pair, change):
    for model in pair:
        change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(agree(*pair, T=T) for T in (1, 5, 1, 5))


@pytest.mark.parametrize(("change", "told"), TOLD)
def test_a_block_tells_what_it_cannot_follow(pair, change, told):
    for model in pair:
        change(model)
    with pytest.warns(StaleModelWarning, match=told):
        assert agree(*pair, T=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert agree(*pair, T=5) and agree(*pair, T=1)


def test_a_block_that_was_moved_to_another_dtype_says_so(pair):
    for model in pair:
        model.double()
    x = torch.randn(3, 16, dtype=torch.float64)
    with pytest.warns(StaleModelWarning):
        assert torch.equal(pair[1](x), pair[0](x))


def test_what_is_there_while_an_exporter_is_at_work_is_not_known(pair):
    watch = rewritten_forward(pair[1]).watch
    watch.paused = True
    for model in pair:
        model.experts[3][1].approximate = "tanh"
    assert pair[1](torch.randn(1, 16)).shape == (1, 16)
    watch.paused = False
    with pytest.warns(StaleModelWarning, match="approximate of experts.3.1 is 'tanh'"):
        assert agree(*pair)
