"""Lines of docs/limits.md on blocks that are left as they are, with a reason."""

import concurrent.futures
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import moeopt
from tests.limits import declines, limit, moe_blocks, zoo_declines
from tests.toy_moe import Block, Expert, H, X, build, seeded

ZOO = {
    "Single matrices or vectors that a gate mixes": {
        "vectors_of_a_gate": "its experts are vectors, the rows of vectors",
        "gated_matrices_behind_a_shared_one": "its experts are one matrix each, and every row passes all of them",
        "gated_matrices_of_a_stack": "to run a few experts for each row, choose them",
    },
    "Groups of neurons under a mask": {"neurons_by_their_place": "groups of the 32 hidden neurons of one FFN"},
    "Soft MoE": {"declined_soft_moe": "slots that mix tokens"},
    "Expert choice": {"declined_expert_choice": "that is expert choice routing"},
    "Experts that run several times in one forward": {
        "declined_loop_over_the_batch": "its experts run several times in one forward",
        "branch_chunked_tokens": "its experts run several times in one forward",
    },
    "Random numbers at inference": {
        "declined_noise_in_eval": "its forward is random at inference (randn at",
        "declined_gumbel": "its forward is random at inference (exponential_ at",
        "declined_random_second_expert": "its forward is random at inference (rand_like at",
    },
    "Weights other than plain float tensors as they are stored": {
        "strange_weight_norm": "experts.0.0 is parametrised",
        "branch_weights_computed_in_forward": "its experts' weights are computed at each call",
    },
    "Experts whose rows depend on one another": {
        "declined_attention_experts": "or mix their tokens by it",
        "strange_batch_statistics": "mean works across rows",
    },
    "Functions of a row that PyTorch would run no quicker": {
        "act_sine": "two matmuls with sin, a function of a row that no grouped kernel has",
        "hand_norm_per_expert": "which would not pay here",
        "row_dense_mixture_of_three_layers": "three matmuls (three layers)",
    },
    "Experts of single neurons": {
        "strange_product_keys": "its experts are single neurons",
    },
    "Experts of one block that differ": {
        "declined_different_activations": "its experts do not all compute the same function",
    },
    "Experts that no probe reaches": {
        "strange_half_of_the_experts_unreachable": "no probe token reached the expert weights experts.2.0.weight"
    },
    "A Parameter or float buffer that changes nothing at its present values": {
        "marks_scale_of_ones": "scale is part of what it computes and changes nothing at its present values (all 1)"
    },
    "Routed convolutions": {"whole_image_routed_convolutions": "it computes convolutions of 3x3"},
    "Capacities that round a function of the token count": {
        "capacity_nano_moe_drops": "changes with the input and is no simple function of the input's shape"
    },
    "Values that leave PyTorch": {
        "declined_python_branch_in_router": "turns a value computed from the input into a Python number (mean)",
        "all_labml_switch": "a tensor that its forward makes outside PyTorch (from a list, NumPy or .data) changes",
    },
    "Python state that changes with each call": {
        "declined_python_counter": "its forward changes the Python attribute calls",
        "declined_remembers_the_last_call": "its forward reads what an earlier call stored (last)",
    },
    "Meta tensors": {"declined_meta_parameters": "gate.weight is on the meta device and has no values"},
}
for words, cases in ZOO.items():
    for name, reason in cases.items():
        limit(words)(lambda _, name=name, reason=reason: zoo_declines(name, reason))


POOL = concurrent.futures.ThreadPoolExecutor(1)


class Pooled(Block):
    """A branch on a size that no thread but the pool's takes."""

    def forward(self, x):
        return POOL.submit(lambda x, y: y * 1.5 if len(x) == 101 else y, x, super().forward(x)).result()


class Threaded(Block):
    def forward(self, x):
        told = []
        thread = threading.Thread(target=lambda: told.append(len(x) == 101))
        thread.start()
        thread.join()
        return super().forward(x) * (1.5 if told[0] else 1.0)


@limit("Forwards that work with other threads")
def other_threads(_):
    for cls, called in ((Pooled, "ThreadPoolExecutor.submit"), (Threaded, "Thread.start")):
        declines(lambda cls=cls: build(cls), f"its forward works with other threads ({called} (declined.py:")


class ClampedExpert(Expert):
    def forward(self, x):
        return super().forward(x.clamp(-1e6, 1e6))


class Clamped(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(ClampedExpert() for _ in range(4))


@limit("Clamps that no probe reaches")
def unreached(_):
    (block,) = moeopt.optimize(build(Clamped), X).report.blocks
    assert "its forward limits values with clamp (-1e+06, 1e+06) between the tokens and the sum" in block.reason


def changed(change):
    """A block whose experts ``change`` was applied to."""
    block = build()
    for expert in block.experts:
        change(expert)
    return block


class Subclass(torch.Tensor):
    pass


class Doubled(nn.Module):
    def forward(self, w):
        return w * 2


@limit("Weights other than plain float tensors as they are stored")
def odd_weights(_):
    def subclass(expert):
        expert.w1.weight = nn.Parameter(expert.w1.weight.detach().as_subclass(Subclass))

    declines(lambda: changed(subclass), "experts.0.w1.weight is a Subclass, which the op cannot read")
    declines(
        lambda: changed(lambda e: parametrize.register_parametrization(e.w1, "weight", Doubled())),
        "experts.0.w1 is parametrised; remove it with torch.nn.utils.parametrize.remove_parametrizations",
    )


@limit("Single experts with hooks, a replaced `forward` or `torch.compile`")
def touched_experts(_):
    declines(
        lambda: changed(lambda e: e.register_forward_hook(lambda *a: None)),
        "experts.0 has a forward or backward hook, which would no longer fire for each expert",
    )
    declines(lambda: changed(lambda e: setattr(e, "forward", e.forward)), "forward was replaced on the instance")

    def compiled():
        block = build()
        block.experts[1] = torch.compile(block.experts[1], backend="eager")
        return block

    declines(compiled, "experts.1 is compiled by torch.compile, one expert alone")


class AdaptedInside(Block):
    def __init__(self):
        super().__init__()
        self.adapter = nn.Parameter(torch.zeros(H))

    def loop(self, x, ids, w):
        return super().loop(x + self.adapter, ids, w)


@limit("A Parameter or float buffer that changes nothing at its present values")
def adapter_of_zeros(_):
    declines(AdaptedInside, "adapter is part of what it computes and changes nothing at its present values (all 0)")


class Placed(Block):
    """A table says which expert serves which choice."""

    def __init__(self, size=4, writes=False):
        super().__init__()
        del self.experts
        self.w1, self.w2 = nn.Parameter(seeded(4, H, H)), nn.Parameter(seeded(4, H, H, seed=6))
        self.register_buffer("place", torch.arange(size) % 4)
        self.writes = writes

    def forward(self, x):
        if self.writes:
            self.place += 0
        return super().forward(x)

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e in range(4):
            token, slot = torch.where(ids == e)
            h = (x[token] @ self.w1[self.place[e]]).relu() @ self.w2[self.place[e]]
            y.index_add_(0, token, h * w[token, slot, None])
        return y


class Counting(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (2.0 if self.calls.item() > 99 else 1.0)


@limit("A tensor that decides what is computed and is written or large")
def deciding_tensors(_):
    declines(Counting, "calls decides what it computes, and its forward writes to it")
    declines(lambda: Placed(2**20 + 4), "place decides what it computes without being read by the op, and has 1048580")
    assert [b.status for b in moe_blocks(build(Placed))] == ["rewritten"], "a small one is watched"


class RoutedConvolutions(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.gate = nn.Linear(H, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv1d(H, H, 1, groups=groups), nn.ReLU(), nn.Conv1d(H, H, 1)) for _ in range(4)
        )

    def forward(self, x):
        w, ids = self.gate(x.mean(1)).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            y.index_add_(0, row, expert(x[row].transpose(1, 2)).transpose(1, 2) * w[row, slot, None, None])
        return y


@limit("Routed convolutions")
def grouped_convolutions(_):
    declines(lambda: RoutedConvolutions(groups=2), "it computes convolutions of 1 in 2 groups", seeded(6, 5, H))


class Named(Block):
    def forward(self, x, which=1):
        return self.experts[which](x)


@limit("An expert named by a Python number")
def named_expert(_):
    declines(
        Named, "Python code chooses one of 4 modules that are alike for all tokens (as in experts[int(i)])", (X, 2)
    )


class FromNumpy(Block):
    def forward(self, x):
        return super().forward(x) + torch.from_numpy(x.detach().numpy().mean(-1, keepdims=True).copy())


class FromList(Block):
    def forward(self, x):
        return super().forward(x) + torch.tensor(x.mean(-1, keepdim=True).tolist())


class FromItem(Block):
    def forward(self, x):
        return super().forward(x) * x.abs().amax().item()


@limit("Values that leave PyTorch")
def left_pytorch(_):
    for make in (FromNumpy, FromList, FromItem):
        declines(make, "its forward turns a value computed from the input into a Python number")


class StoringExpert(Expert):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Storing(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(StoringExpert() for _ in range(4))


class Bag(Block):
    def __init__(self, bag, put):
        super().__init__()
        self.bag, self.put = bag, put

    def route(self, x):
        self.put(self.bag, self.gate(x))
        return super().route(x)


@limit("Results of single experts that are stored, and containers that the forward writes into")
def stored(_):
    declines(
        Storing, "beside their sum something else (another gate, another layer) reads the result of single experts"
    )
    for bag, put in (
        ({}, lambda bag, g: bag.update(gate=g)),
        ([], lambda bag, g: bag.append(g)),
        (set(), lambda bag, g: bag.add(len(g))),
    ):
        declines(lambda bag=bag, put=put: Bag(bag, put), "its forward changes the contents of the Python attribute bag")


class Unregistered(Block):
    def __init__(self):
        super().__init__()
        experts = list(self.experts)
        del self.experts
        self.__dict__["experts"] = experts


class PlainTensors(Block):
    def __init__(self):
        super().__init__()
        del self.experts
        self.w1, self.w2 = [seeded(H, H) for _ in range(4)], [seeded(H, H, seed=6) for _ in range(4)]
        self.experts = [lambda x, e=e: (x @ self.w1[e]).relu() @ self.w2[e] for e in range(4)]


@limit("Experts in plain Python lists")
def unregistered(_):
    declines(Unregistered, "its weights are in a plain Python list (self.experts of Unregistered)")
    declines(PlainTensors, "its weights are in a plain Python list (self.w")


@limit("Recurrent experts, convolutions that every token mixes, one grouped convolution as all experts")
def other_layers(_):
    zoo_declines("declined_recurrent_experts", "its experts are recurrent (LSTM at experts.0.rnn)")
    zoo_declines("declined_conv3_experts", "it computes convolutions of 3")
    zoo_declines("dense_grouped_conv", "groups; the op multiplies each token's row by a matrix")


@limit("TorchScript models")
def torchscript(_):
    with pytest.raises(moeopt.UsageError, match="model is a TorchScript module"):
        moeopt.optimize(torch.jit.trace(Expert(), X), X)


class Hoard(Block):
    def __init__(self):
        super().__init__()
        self.tables = [[float(i + j) for j in range(500)] for i in range(10)]

    def loop(self, x, ids, w):
        return super().loop(x, ids, w * self.tables[1][2])


@limit("Code that reads more than 4096 values outside its modules")
def hoard(_):
    declines(Hoard, "its code reads more than 4096 values outside its modules")


@limit("Dense FFNs")
def dense(_):
    ffn = nn.Sequential(nn.Linear(H, 32), nn.ReLU(), nn.Linear(32, H)).eval()
    (block,) = moeopt.explain(ffn, X).blocks
    assert (block.kind, block.status) == ("dense_ffn", "declined") and "dense='fuse' measures" in block.reason
    pytest.importorskip("onnxruntime")
    (block,) = moeopt.optimize(ffn, X, backend="onnxruntime", dense="fuse", verify="off").report.blocks
    assert block.status == "declined" and "engine" in block.reason
