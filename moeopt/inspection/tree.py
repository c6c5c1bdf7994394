"""A model as a table of named parameters under a tree of modules: what structure is read from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def within(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


@dataclass
class Tree:
    """Every parameter once, and who holds it.

    Attributes:
        modules: path -> module.
        tensors: path -> parameter; a tied one stands under its first name.
        aliases: further name of a tied parameter -> its first name.
        below: module path -> names of the parameters in its subtree.
    """

    root: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    below: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = dict(self.root.named_modules())
        first: dict[int, str] = {}
        for name, tensor in self.root.named_parameters(remove_duplicate=False):
            if first.setdefault(id(tensor), name) != name:
                self.aliases[name] = first[id(tensor)]
                continue
            self.tensors[name] = tensor
            path = parent(name)
            while True:
                self.below.setdefault(path, []).append(name)
                if not path:
                    break
                path = parent(path)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def matrices(self, path: str) -> list[tuple[int, ...]]:
        """Shapes of the 2-D parameters in the subtree of a module, or of the one parameter of that name."""
        names = [path] if path in self.tensors else self.below.get(path, [])
        return [self.shape(n) for n in names if self.tensors[n].dim() == 2]

    def children(self, path: str) -> list[str]:
        """Paths of the modules and parameters that a module holds itself."""
        prefix = path + "." if path else ""
        module = self.modules[path]
        names = [*module._modules, *(n for n, p in module._parameters.items() if p is not None)]
        return [prefix + n for n in names if prefix + n in self.modules or prefix + n in self.tensors]

    def families(self, path: str) -> Iterator[list[str]]:
        """Children of one list or dict, and attributes that are named alike but for a number (``fc1``, ``fc2``)."""
        everyone = self.children(path)
        groups: dict[str, list[str]] = {}
        for child in everyone:
            name = child.rpartition(".")[2]
            if re.search(r"\d", name):
                groups.setdefault(re.sub(r"\d+", "#", name), []).append(child)
        lists = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
        yield from groups.values()
        if isinstance(self.modules[path], lists) and everyone not in groups.values():
            yield everyone

    def numbered_ancestor(self, path: str, outermost: bool = False) -> str | None:
        """The element of a list (its name is a number) that holds ``path``: the innermost, or the outermost."""
        parts = path.split(".")
        found = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
        return (found[0] if outermost else found[-1]) if found else None
