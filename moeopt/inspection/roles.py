"""What each parameter is for: experts, router, shared experts, dense FFN, embedding, head, the rest.

A layer is an element of the outermost list that holds a block or a feed-forward network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from moeopt.inspection.shapes import FFN, ffn_of
from moeopt.inspection.structure import MoEBlock
from moeopt.inspection.tree import Tree, parent, within
from moeopt.value_types import PyObject


@dataclass
class Roles:
    """Attributes:
    of: parameter name -> role: ``experts``, ``shared``, ``router``, ``ffn``, ``head``, ``embedding``, ``tied`` (an
        embedding that is the head too), ``other`` (attention, norms and the rest) or ``elsewhere`` (parts that no text
        token passes, such as a vision tower).
    layers: paths of the layers.
    shared: block path -> the feed-forward networks that every token of its layer passes.
    """

    of: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    shared: dict[str, list[FFN]] = field(default_factory=dict)


def assign(tree: Tree, blocks: list[MoEBlock]) -> Roles:
    """The role of every parameter."""
    roles = Roles()
    text = _text_paths(tree)
    layers: dict[str, list[MoEBlock]] = {}
    for block in blocks:
        home = tree.numbered_ancestor(block.path) or block.path
        layers.setdefault(home, []).append(block)
        roles.of.update(dict.fromkeys(block.bank.names, "experts"))
        roles.of.update(dict.fromkeys(block.router, "router"))
    for home, members in layers.items():
        for path, ffn in _networks(tree, home, members):
            roles.shared.setdefault(members[0].path, []).append(ffn)
            roles.of.update({n: "shared" for n in tree.below[path] if n not in roles.of})
    dense = list(_dense_layers(tree, layers))
    for names in dense:
        roles.of.update({n: "ffn" for n in names if n not in roles.of})
    _ends(tree, roles)
    for name in tree.tensors:
        if text and not any(within(name, t) for t in text) and roles.of.get(name) not in ("head", "tied", "embedding"):
            roles.of[name] = "elsewhere"
        roles.of.setdefault(name, "other")
    marks = [*layers, *(parent(n) for names in dense for n in names if roles.of[n] == "ffn")]
    roles.layers = list(dict.fromkeys(tree.numbered_ancestor(m, outermost=True) or m for m in marks))
    return roles


def _networks(tree: Tree, home: str, blocks: list[MoEBlock]) -> Iterator[tuple[str, FFN]]:
    """Feed-forward networks in a layer, beside its experts; only modules that hold experts are looked into."""
    for child in tree.children(home):
        if child not in tree.modules or any(within(child, b.bank.owner) and not b.bank.stacked for b in blocks):
            continue
        names = set(tree.below.get(child, []))
        if any(names & (b.bank.names | b.router) for b in blocks):
            if not any(names <= (b.bank.names | b.router) for b in blocks):
                yield from _networks(tree, child, blocks)
            continue
        if isinstance(tree.modules[child], (nn.ModuleList, nn.ModuleDict)):
            found = [(c, ffn) for c in tree.children(child) if (ffn := ffn_of(tree.matrices(c)))]
            yield from found
        elif ffn := ffn_of(tree.matrices(child)):
            yield child, ffn.facing(blocks[0].bank.ffn.hidden)


def _dense_layers(tree: Tree, moe: dict[str, list[MoEBlock]]) -> Iterator[list[str]]:
    """Parameter names of the dense feed-forward networks: whole modules, or two transposed linears of one layer."""
    done: list[str] = []
    above = {p for m in moe for p in _prefixes(m)}
    for path, module in tree.modules.items():
        if any(within(path, d) for d in done[-1:]) or path in above or any(p in moe for p in _prefixes(path)):
            continue
        if not path or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        matrices = tree.matrices(path)
        ffn = ffn_of(matrices)
        if ffn is not None and ffn.hidden != ffn.inner and _all_linear(tree, path):
            done.append(path)
            yield tree.below[path]
        elif path.rpartition(".")[2].isdigit() and len(matrices) > 3 and not _has_network(tree, path):
            pair = _transposed_pair(tree, path)
            if pair:
                done.append(path)
                yield pair


def _prefixes(path: str) -> Iterator[str]:
    """The path and every module above it."""
    yield path
    while path:
        path = parent(path)
        yield path


def _all_linear(tree: Tree, path: str) -> bool:
    """No embedding: two tables of one shape are no network."""
    return not any(isinstance(m, nn.Embedding) for p, m in tree.modules.items() if within(p, path))


def _has_network(tree: Tree, path: str) -> bool:
    return any(ffn_of(tree.matrices(p)) for p in tree.modules if p != path and within(p, path))


def _transposed_pair(tree: Tree, path: str) -> list[str]:
    """(I, H) and (H, I) with I > H among the linears of a layer that has no module for them."""
    wide = {tree.shape(n): n for n in tree.below[path] if tree.tensors[n].dim() == 2}
    for (rows, columns), name in wide.items():
        if rows > columns and (columns, rows) in wide:
            homes = (parent(name), parent(wide[columns, rows]))
            return [n for h in homes for n in tree.below[h]]
    return []


def _ends(tree: Tree, roles: Roles) -> None:
    """Embeddings, and the head: the linear of one row per word of an embedding."""
    tables = [p + ".weight" for p, m in tree.modules.items() if isinstance(m, nn.Embedding)]
    words = {m.num_embeddings for m in tree.modules.values() if isinstance(m, nn.Embedding)}
    get = getattr(tree.root, "get_output_embeddings", None)
    named = get() if callable(get) else None
    for path, module in tree.modules.items():
        linear = isinstance(module, nn.Linear) and module.out_features in words and "." not in parent(path)
        if module is named or (named is None and linear):
            for name in (path + ".weight", path + ".bias"):
                if name in tree.aliases:
                    roles.of[tree.aliases[name]] = "tied"
                elif name in tables:
                    roles.of[name] = "tied"
                elif name in tree.tensors:
                    roles.of.setdefault(name, "head")
    for name in tables:
        name = tree.aliases.get(name, name)
        if name in tree.tensors and roles.of.get(name) == "head":
            roles.of[name] = "tied"
        roles.of.setdefault(name, "embedding")


def _text_paths(tree: Tree) -> list[str]:
    """Modules of the text part of a model with several parts (vision, audio); none where there is one part."""
    config: PyObject = getattr(tree.root, "config", None)
    get = getattr(config, "get_text_config", None)
    text = get() if callable(get) else config
    if text is config or text is None:
        return []
    return [p for p, m in tree.modules.items() if p and getattr(m, "config", None) is text]
