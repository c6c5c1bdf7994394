"""How many experts a token goes to, and by which score: the block runs on shapes, its selection is watched.

Nothing is computed and no weight is read: parameters are stand-ins without values. The run ends where the experts
begin, or where values are needed; by then the selection over E scores was seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.shared_copy import shared_copy
from moeopt.errors import Declined, UsageError
from moeopt.inspection.structure import MoEBlock
from moeopt.inspection.tree import Tree, parent, within
from moeopt.patches import no_fake_tensor_errors
from moeopt.value_types import FxTarget, PyObject
from moeopt.verification.state import in_mode

TOKENS = 4
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "linear", "grouped_mm_fallback")
_SCORES = {"_softmax": "softmax", "softmax": "softmax", "_log_softmax": "log-softmax", "sigmoid": "sigmoid",
           "softplus": "softplus"}  # fmt: skip
_TOP_K = re.compile(
    r"(num_|n_)?(experts_per_tok(en)?|selected_experts|activated_experts|experts_chosen|experts_top_?k)|"
    r"(moe_|router_|expert_)?top_?k(_experts)?|moe_k|k"
)


@dataclass(frozen=True)
class Selection:
    """``top_k`` is None where the number of experts per token is not fixed or was not seen."""

    top_k: int | None
    router: str
    seen: bool


class _Enough(Exception):
    pass


class _Watch(TorchDispatchMode):
    def __init__(self, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.experts, self.top_k = experts, 0
        self.before: list[str] = []
        self.then: list[str] = []
        self.groups = 0
        self.sorted = False
        self.maxima: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        name = func.overloadpacket.__name__
        if self.top_k and name in _PRODUCTS:
            raise _Enough  # the experts begin
        out = func(*args, **(kwargs or {}))
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is None or not first.dim():
            return out
        size, rows = first.shape[-1], first.numel() // max(first.shape[-1], 1)
        if size == self.experts and rows == TOKENS:
            self._over_experts(name, args, first)
        elif name == "topk" and not self.top_k and size > 1 and rows == TOKENS:
            self.groups = size
        elif self.top_k and size == self.top_k and name in _SCORES:
            self.then.append(_SCORES[name])
        elif self.top_k and size == self.top_k and name in ("div", "div_") and self._by_row(args):
            self.then.append("renormalised")
        return out

    def _over_experts(self, name: str, args: PyObject, scores: torch.Tensor) -> None:
        if name in _SCORES:
            (self.then if self.top_k else self.before).append(_SCORES[name])
        elif name == "topk":
            self.top_k = int(args[1])
        elif name in ("argmax", "max") and scores.is_floating_point():
            if not any(scores is m for m in self.maxima):  # each further maximum is over other (masked) scores
                self.maxima.append(scores)
                self.top_k = len(self.maxima)
        elif name in ("sort", "argsort") and scores.is_floating_point():
            self.sorted = True

    def _by_row(self, args: PyObject) -> bool:
        other = args[1] if len(args) > 1 else None
        return isinstance(other, torch.Tensor) and other.dim() > 0 and other.shape[-1] == 1

    def words(self, complete: bool) -> Selection | None:
        if self.top_k:
            score = "+".join(dict.fromkeys(self.before))
            parts = [*([score] if score else []), f"top-{self.top_k} of {self.experts}", *dict.fromkeys(self.then)]
            groups = [f"in {self.groups} groups"] if self.groups and score else []
            return Selection(self.top_k, ", ".join(parts + groups), True)
        if self.sorted:
            return Selection(None, f"sorts {self.experts} scores; how many it keeps was not seen", True)
        if self.before and complete:
            return Selection(self.experts, f"{self.before[0]} over all {self.experts}", True)
        return None


def selection(tree: Tree, block: MoEBlock, top_k: int | None = None) -> Selection | None:
    """How ``block`` chooses; None where nothing tells that it chooses at all."""
    seen = None
    for path in dict.fromkeys((block.path, *_inward(block))):
        seen = _run(tree.modules[path], block)
        if seen is not None:
            break
    if top_k is not None:
        return Selection(top_k, seen.router if seen else f"top-{top_k} of {block.bank.choices} (given)", True)
    if seen is not None and seen.top_k is not None:
        return seen
    found = _attribute(tree, block)
    if found is not None:
        name, value = found
        return Selection(value, f"top-{value} of {block.bank.choices} (read from {name})", False)
    return seen


def _inward(block: MoEBlock) -> list[str]:
    """The modules from the block down to its router."""
    paths, path = [], block.router_path
    while within(path, block.path) and path != block.path:
        paths.append(path)
        path = parent(path)
    return paths[::-1]


def _run(module: nn.Module, block: MoEBlock) -> Selection | None:
    try:
        twin = shared_copy(module)
        with in_mode(twin, False):  # it shares the weights, which a train() of the user's may write
            return _watched(twin, block)
    except (UsageError, Declined):
        return None


def _watched(twin: nn.Module, block: MoEBlock) -> Selection | None:
    for width in dict.fromkeys((block.bank.ffn.hidden, block.width, block.bank.ffn.inner)):
        for shape in ((1, TOKENS, width), (TOKENS, width)):
            watch, complete = _Watch(block.bank.choices), False
            try:
                with no_fake_tensor_errors(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                    state = {n: _stand_in(t) for n, t in (*twin.named_parameters(), *twin.named_buffers())}
                    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
                    x = torch.empty(shape, dtype=dtype, device="cpu")
                    with watch:
                        torch.func.functional_call(twin, state, (x,))
                complete = True
            except Exception:  # the block needs values, other inputs or another width: what was seen until then counts
                pass
            if (found := watch.words(complete)) is not None:
                return found
    return None


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _attribute(tree: Tree, block: MoEBlock) -> tuple[str, int] | None:
    """An integer from 1 to E that is called top_k or the like, on the modules at the router or in the config."""
    paths = [block.router_path, block.path, block.bank.owner, parent(block.path)]
    owners: list[tuple[str, Any]] = [(p, tree.modules[p]) for p in paths]
    owners += [(p and p + ".config", getattr(tree.modules[p], "config", None)) for p in (*paths, "")]
    for path, owner in owners:
        for name, value in vars(owner).items() if owner is not None and hasattr(owner, "__dict__") else ():
            right = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= block.bank.choices
            if right and _TOP_K.fullmatch(name.lower()):
                return (f"{path}.{name}" if path else name), value
    return None
