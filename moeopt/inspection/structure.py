"""Where the experts of a model are, told from its parameters: no names, and nothing is run.

    experts   E tensors along a leading axis, E children alike, or E slices of one flat matrix, that make a
              feed-forward network each (see shapes.py)
    router    a matrix with one side E, in the same module or up to three modules above; without one there is no MoE.
              One side of up to 2 E: the further choices have no weights (identity experts), if it is seen to choose
    shared    a feed-forward network of its own in the same layer: every token passes it

Shapes: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from moeopt.inspection.shapes import FFN, ffn_of
from moeopt.inspection.tree import Tree, parent, within

REACH = 3
"""Modules above the experts in which their router is looked for."""


@dataclass(frozen=True)
class ExpertGroup:
    """E experts side by side. ``stacked`` ones are whole tensors with E along the first axis.

    ``idle`` further choices of the router have no weights: they hand the token on, or do nothing.
    """

    owner: str
    experts: int
    ffn: FFN
    names: frozenset[str]
    stacked: bool
    idle: int = 0

    @property
    def choices(self) -> int:
        return self.experts + self.idle


@dataclass(frozen=True)
class MoEBlock:
    """One MoE: ``path`` is the innermost module that holds both router and experts."""

    path: str
    bank: ExpertGroup
    router_path: str
    router: frozenset[str]
    width: int
    """What one row of the router's input holds; H unless the router has layers of its own."""


def find_blocks(tree: Tree) -> tuple[list[MoEBlock], list[ExpertGroup]]:
    """Every MoE block, in the order of the parameters; and banks of networks that have no router near them."""
    banks = [*_stacked(tree), *_listed(tree)]
    blocks, lone = [], []
    for bank in [*banks, *_flat(tree, {n for b in banks for n in b.names})]:
        block = _with_router(tree, bank)
        if block is None:
            lone.append(bank)
        else:
            blocks.append(block)
    order = {name: i for i, name in enumerate(tree.tensors)}
    return sorted(blocks, key=lambda b: min(order[n] for n in b.bank.names)), lone


def stacks(tree: Tree) -> list[str]:
    """Parameters that may be stacked matrices: 3-D, and no kernel of a convolution."""
    return [
        n
        for n, t in tree.tensors.items()
        if t.dim() == 3 and min(t.shape) > 1 and not isinstance(tree.modules[parent(n)], _ConvNd)
    ]


def _stacked(tree: Tree) -> Iterator[ExpertGroup]:
    """3-D parameters with one leading size, in one module or in sister modules."""
    loose = stacks(tree)
    for level in (1, 2):
        groups: dict[tuple[str, int], list[str]] = {}
        for name in loose:
            owner = parent(name) if level == 1 else parent(parent(name))
            groups.setdefault((owner, tree.shape(name)[0]), []).append(name)
        taken: set[str] = set()
        for (owner, experts), names in groups.items():
            ffn = ffn_of(tree.shape(n)[1:] for n in names)
            if experts > 1 and ffn is not None:
                taken.update(names)
                yield ExpertGroup(owner, experts, ffn, frozenset(names), True)
        loose = [n for n in loose if n not in taken]


def _listed(tree: Tree) -> Iterator[ExpertGroup]:
    """Children alike: each is a feed-forward network, or one matrix of it, its other matrices in lists beside."""
    inside: list[str] = []
    for path in tree.modules:
        if inside and within(path, inside[-1]):
            continue
        for family, idle in _alike_families(tree, path):
            ffn = ffn_of(tree.matrices(family[0]))
            if ffn is not None:
                inside.append(path)
                yield ExpertGroup(path, len(family), ffn, _names(tree, family), False, idle)
                break
        yield from _assembled(tree, path)


def _assembled(tree: Tree, path: str) -> Iterator[ExpertGroup]:
    """Lists of single matrices that hang side by side in one module: ``w1[e]``, ``w2[e]``, ``w3[e]``."""
    parts: dict[int, list[list[str]]] = {}
    for child in tree.children(path):
        if child not in tree.modules:
            continue
        for family, _ in _alike_families(tree, child):
            if len(tree.matrices(family[0])) == 1:
                parts.setdefault(len(family), []).append(family)
    for experts, families in parts.items():
        ffn = ffn_of(tree.matrices(f[0])[0] for f in families)
        if ffn is not None:
            yield ExpertGroup(path, experts, ffn, _names(tree, [n for f in families for n in f]), False)


def _alike_families(tree: Tree, path: str) -> Iterator[tuple[list[str], int]]:
    """Children with matrices of the same shapes, and how many of their siblings have no parameters at all."""
    for family in tree.families(path):
        full = [c for c in family if c in tree.tensors or tree.below.get(c)]
        shapes = [sorted(tree.matrices(c)) for c in full]
        if len(full) > 1 and shapes[0] and all(s == shapes[0] for s in shapes):
            yield full, len(family) - len(full)


def _flat(tree: Tree, taken: set[str]) -> Iterator[ExpertGroup]:
    """Bare (E * I, H) matrices of one shape; E is the router's, so each matrix with H columns near by is tried."""
    for path, module in tree.modules.items():
        own = [n for n in tree.children(path) if n in tree.tensors and tree.tensors[n].dim() == 2 and n not in taken]
        if len(own) < 2 or isinstance(module, (nn.Linear, nn.ParameterList)):
            continue
        rows, hidden = max((tree.shape(n) for n in own), key=math.prod)
        names = [n for n in own if tree.shape(n) == (rows, hidden)]
        if len(names) not in (2, 3):
            continue
        for above in _above(path):
            near = [tree.shape(n) for n in tree.below.get(above, []) if n not in names and tree.tensors[n].dim() == 2]
            found = [a if b == hidden else b for a, b in near if hidden in (a, b)]
            fits = [e for e in found if 1 < e < rows and rows % e == 0]
            if fits:
                yield ExpertGroup(
                    path, min(fits), FFN(hidden, rows // min(fits), len(names) == 3), frozenset(names), True
                )
                break


def _names(tree: Tree, children: list[str]) -> frozenset[str]:
    return frozenset(n for c in children for n in ([c] if c in tree.tensors else tree.below.get(c, [])))


def _above(path: str) -> Iterator[str]:
    """A module and up to ``REACH`` above it, not beyond an element of a list."""
    for _ in range(REACH + 1):
        yield path
        if not path or path.rpartition(".")[2].isdigit():
            return
        path = parent(path)


def _with_router(tree: Tree, bank: ExpertGroup) -> MoEBlock | None:
    beside = {
        n
        for home in {parent(n) for n in bank.names if bank.stacked}
        for n in tree.children(home)
        if n in tree.tensors and n not in bank.names and len(tree.shape(n)) > 1 and tree.shape(n)[0] == bank.experts
    }  # biases (E, .), or the router itself where it is a bare parameter
    for maybe_bias, wider in ((False, False), (True, False), (False, True)):
        for above in _above(bank.owner):
            found = [
                n
                for n in tree.below.get(above, [])
                if n not in bank.names
                and (n in beside) == maybe_bias
                and tree.tensors[n].dim() == 2
                and any(bank.choices < s <= 2 * bank.choices if wider else s == bank.choices for s in tree.shape(n))
                and not isinstance(tree.modules[parent(n)], nn.Embedding)
            ]
            if found:
                best = min(found, key=lambda n: (_other(tree, n, bank) not in bank.ffn.sizes, tree.tensors[n].numel()))
                if wider and not bank.ffn.sizes & set(tree.shape(best)):
                    continue
                return _block(tree, bank, above, best, beside - {best}, wider)
    return None


def _other(tree: Tree, name: str, bank: ExpertGroup) -> int:
    a, b = tree.shape(name)
    return b if a == bank.choices else a


def _block(tree: Tree, bank: ExpertGroup, path: str, matrix: str, biases: set[str], wider: bool) -> MoEBlock:
    """The router is the largest module that holds its matrix and no expert."""
    top = matrix
    while parent(top) != path and not any(within(n, parent(top)) for n in bank.names):
        top = parent(top)
    names = frozenset(tree.below[top] if top in tree.modules else [matrix])
    width, idle = _other(tree, matrix, bank), bank.idle
    if wider:  # the router has choices without weights
        width = next(s for s in tree.shape(matrix)[::-1] if s in bank.ffn.sizes)
        idle = sum(tree.shape(matrix)) - width - bank.experts
    ffn = bank.ffn.facing(width)
    whole = ExpertGroup(bank.owner, bank.experts, ffn, bank.names | biases, bank.stacked, idle)
    return MoEBlock(path, whole, top if top in tree.modules else path, names, width)
