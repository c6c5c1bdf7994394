"""Ways to bring rows to their experts and back that training frameworks and hobby repositories use."""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq

D, HID, N = 16, 24, 4


def ffn():
    return nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D))


class Modules(nn.Module):
    """Top-2 of a list; ``run`` is what differs below."""

    def __init__(self, make=ffn):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(make() for _ in range(N))

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        return self.run(rows, weights, ids).view_as(x)


class Stacked(nn.Module):
    """The same over stacks of matrices."""

    def __init__(self, n=N):
        super().__init__()
        self.gate = nn.Linear(D, n)
        self.up, self.down = nn.Parameter(torch.randn(N, D, HID) * 0.3), nn.Parameter(torch.randn(N, HID, D) * 0.3)

    forward = Modules.forward


class MaskedSelect(Modules):
    """Rows are selected by a mask as a flat vector, and scattered back by the same mask."""

    def run(self, rows, weights, ids):
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mask, weight = (ids == number).any(-1), (weights * (ids == number)).sum(-1)
            out = expert(torch.masked_select(rows, mask[:, None]).view(-1, D)) * weight[mask, None]
            total.masked_scatter_(mask[:, None], total[mask] + out)
        return total


@case(seq(D), experts=N)
def dispatch_masked_select_and_scatter():
    return MaskedSelect()


class PaddedSequences(Stacked):
    """Each expert's rows are a sequence, padded to the longest for one batched product."""

    def run(self, rows, weights, ids):
        places = [torch.where(ids == number) for number in range(N)]
        padded = nn.utils.rnn.pad_sequence([rows[token] for token, _ in places], batch_first=True)
        out = torch.bmm(F.silu(torch.bmm(padded, self.up)), self.down)
        total = torch.zeros_like(rows)
        for number, (token, slot) in enumerate(places):
            total.index_add_(0, token, out[number, : len(token)] * weights[token, slot, None])
        return total


@case(seq(D), experts=N)
def dispatch_padded_sequences():
    return PaddedSequences()


class Sorted(Stacked):
    def run(self, rows, weights, ids):
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=N)
        parts = torch.tensor_split(rows[order // 2], counts.cumsum(0)[:-1].cpu())
        out = torch.cat([F.silu(part @ up) @ down for part, up, down in zip(parts, self.up, self.down, strict=True)])
        return self.put(rows, order // 2, out * weights.flatten()[order, None])


class SplitAndPut(Sorted):
    def put(self, rows, token, out):
        return torch.zeros_like(rows).index_put_((token,), out, accumulate=True)


class SplitAndReduce(Sorted):
    def put(self, rows, token, out):
        return torch.zeros_like(rows).scatter_reduce(0, token[:, None].expand_as(out), out, "sum")


@case(seq(D), experts=N)
def dispatch_tensor_split_and_index_put():
    return SplitAndPut()


@case(seq(D), experts=N)
def dispatch_tensor_split_and_scatter_reduce():
    return SplitAndReduce()


class SparseCombine(Stacked):
    """A sparse matrix adds the experts' rows up."""

    def run(self, rows, weights, ids):
        table, total = torch.zeros(len(rows), N).scatter(1, ids, weights), 0
        for number in range(N):
            token = table[:, number].nonzero().squeeze(1)
            at = torch.stack([token, torch.arange(len(token))])
            combine = torch.sparse_coo_tensor(at, table[token, number], (len(rows), len(token)))
            total = total + torch.sparse.mm(combine, F.silu(rows[token] @ self.up[number]) @ self.down[number])
        return total


@case(seq(D), experts=N, expect="declined", reason=r"makes a sparse tensor \(sparse_coo\).*index_add")
def dispatch_by_sparse_matrices():
    return SparseCombine()


class NestedRows(Sorted):
    """Each expert's rows are a part of a nested tensor, for two products of all experts."""

    def run(self, rows, weights, ids):
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=N).tolist()
        nested = torch.nested.nested_tensor(list(rows[order // 2].split(counts)))
        hidden = F.relu(torch.bmm(nested, torch.nested.nested_tensor(list(self.up))))
        out = torch.cat(torch.bmm(hidden, torch.nested.nested_tensor(list(self.down))).unbind())
        return torch.zeros_like(rows).index_add(0, order // 2, out * weights.flatten()[order, None])


@case(seq(D), experts=N, expect="declined", reason=r"makes a nested tensor.*rows\.split")
def dispatch_by_nested_tensors():
    return NestedRows()


class PythonLists(nn.Module):
    """Pairs of token and slot in a Python list for each expert, whose name is the key of a dict."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleDict({f"expert_{i}": ffn() for i in range(N)})

    forward = Modules.forward

    def run(self, rows, weights, ids):
        groups = defaultdict(list)
        for token, chosen in enumerate(ids.tolist()):
            for slot, number in enumerate(chosen):
                groups[f"expert_{number}"].append((token, slot))
        total = torch.zeros_like(rows)
        for name, pairs in groups.items():
            token, slot = (torch.tensor(part) for part in zip(*pairs, strict=True))
            total.index_add_(0, token, self.experts[name](rows[token]) * weights[token, slot, None])
        return total


@case(seq(D), experts=N)
def dispatch_python_lists_by_name():
    return PythonLists()


class Skeleton(nn.Module):
    """One module without weights is called with each expert's slice of the stacks."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, N)
        stacks, _ = torch.func.stack_module_state([ffn() for _ in range(N)])
        self.names = list(stacks)
        self.stacks = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.detach()) for k, v in stacks.items()})
        object.__setattr__(self, "skeleton", ffn().to("meta"))

    forward = Modules.forward

    def run(self, rows, weights, ids):
        total = torch.zeros_like(rows)
        for number in range(N):
            token, slot = torch.where(ids == number)
            state = {name: self.stacks[name.replace(".", "_")][number] for name in self.names}
            out = torch.func.functional_call(self.skeleton, state, (rows[token],))
            total.index_add_(0, token, out * weights[token, slot, None])
        return total


@case(seq(D), experts=N)
def dispatch_functional_call_of_a_skeleton():
    return Skeleton()


class PaddedExperts(Stacked):
    """Three experts, padded to four so that every rank has as many; the router gives the last one -inf."""

    def __init__(self):
        super().__init__(N - 1)

    def forward(self, x):
        rows = x.reshape(-1, D)
        scores = F.pad(self.gate(rows), (0, 1), value=float("-inf"))
        weights, ids = scores.softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number in range(N):
            token, slot = torch.where(ids == number)
            out = F.silu(rows[token] @ self.up[number]) @ self.down[number]
            total.index_add_(0, token, out * weights[token, slot, None])
        return total.view_as(x)


@case(seq(D), experts=N)
def dispatch_padded_number_of_experts():
    return PaddedExperts()


class Answer(nn.Module):
    """An expert that takes its rows by keyword and returns more than its output."""

    def __init__(self):
        super().__init__()
        self.net = ffn()

    def forward(self, *, hidden):
        return {"hidden": self.net(hidden), "rows": len(hidden)}


class Answers(Modules):
    def run(self, rows, weights, ids):
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            total.index_add_(0, token, expert(hidden=rows[token])["hidden"] * weights[token, slot, None])
        return total


@case(seq(D), experts=N)
def dispatch_experts_that_answer_with_dicts():
    return Answers(Answer)


class Tree(nn.Module):
    """A balanced tree of sigmoid-free decisions; the leaf that a row arrives at is its expert."""

    def __init__(self, depth=3):
        super().__init__()
        self.depth, leaves = depth, 1 << depth
        self.nodes = nn.Linear(D, leaves - 1)
        self.up, self.down = nn.Parameter(torch.randn(leaves, D, 12)), nn.Parameter(torch.randn(leaves, 12, D))

    def forward(self, x):
        scores = self.nodes(x)
        place = torch.zeros(len(x), dtype=torch.long)
        for _ in range(self.depth):
            place = 2 * place + 1 + (scores.gather(1, place[:, None]).squeeze(1) > 0).long()
        leaf = place - (1 << self.depth) + 1
        return torch.bmm(F.gelu(torch.bmm(x[:, None], self.up[leaf])), self.down[leaf]).squeeze(1)


@case(flat(D), experts=8)
def dispatch_leaves_of_a_tree():
    return Tree()


class ChoiceByExperts(nn.Module):
    """Expert choice as a chain of einsums over one-hot places, half as many tokens for each expert as there are."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(D, N))
        self.up, self.down = nn.Parameter(torch.randn(N, D, HID) * 0.3), nn.Parameter(torch.randn(N, HID, D) * 0.3)

    def forward(self, x):
        tokens = x.shape[1]
        weights, places = (x @ self.gate).softmax(-1).transpose(1, 2).topk(max(1, tokens // 2))
        one_hot = F.one_hot(places, tokens).to(x.dtype)
        rows = torch.einsum("bekt,btd->bekd", one_hot, x)
        out = torch.einsum("bekf,efd->bekd", F.relu(torch.einsum("bekd,edf->bekf", rows, self.up)), self.down)
        return torch.einsum("bekt,bek,bekd->btd", one_hot, weights, out)


@case(seq(D), experts=N, expect="declined", reason=r"keeps the best .* of its tokens .topk., a number that is rounded")
def dispatch_choice_by_experts_einsum():
    return ChoiceByExperts()
