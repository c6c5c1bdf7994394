"""How many parameters there are, and how many one token uses.

    active = total - experts * (E - K) / E        choices without weights (identity experts) count in E

There is no one convention for "active", so there are three, and all are reported:

    all                  every parameter that a text token's pass may read, both embeddings included
    no_input_embedding   without the input embedding, of which a token reads one row; the head counts. A table that is
                         tied to the head is the head, so it counts
    no_embeddings        without the input embedding and the head

Parameters that no text token passes (a vision tower) count in the total only.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeopt.inspection.roles import Roles
from moeopt.inspection.structure import MoEBlock
from moeopt.inspection.tree import Tree

CONVENTIONS = {
    "all": "all parameters on a text token's way",
    "no_input_embedding": "without the input embedding, with the head",
    "no_embeddings": "without the input embedding and the head",
}
PARTS = {
    "experts": "experts",
    "shared": "shared experts",
    "router": "routers",
    "ffn": "dense feed-forward",
    "other": "attention, norms, rest",
    "head": "output head",
    "tied": "embedding = head",
    "embedding": "input embedding",
    "elsewhere": "not for text tokens",
}


@dataclass(frozen=True)
class Counts:
    """Parameters by part (the keys of ``PARTS``), in all and those that one token uses; None: K is not known."""

    total: dict[str, int]
    active: dict[str, int] | None

    @property
    def all(self) -> int:
        return sum(self.total.values())

    def by_convention(self) -> dict[str, int | None]:
        """The three counts of active parameters."""
        if self.active is None:
            return dict.fromkeys(CONVENTIONS)
        used = sum(self.active.values())
        without = used - self.active.get("embedding", 0)
        inner = without - self.active.get("head", 0) - self.active.get("tied", 0)
        return {"all": used, "no_input_embedding": without, "no_embeddings": inner}


def count(tree: Tree, blocks: list[MoEBlock], roles: Roles, top_k: dict[str, int | None]) -> Counts:
    """``top_k`` gives K for the path of each block."""
    total: dict[str, int] = {}
    for name, tensor in tree.tensors.items():
        role = roles.of[name]
        total[role] = total.get(role, 0) + tensor.numel()
    total = {part: total[part] for part in PARTS if part in total}
    if any(top_k[b.path] is None for b in blocks):
        return Counts(total, None)
    active = {part: n for part, n in total.items() if part != "elsewhere"}
    for block in blocks:
        size = sum(tree.tensors[n].numel() for n in block.bank.names)
        chosen = top_k[block.path] or 0
        active["experts"] -= size * (block.bank.choices - chosen) // block.bank.choices
    return Counts(total, active)
