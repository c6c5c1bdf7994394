"""What an export does to the lists and dicts that a model's modules hold is undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def own_containers(model: nn.Module) -> Iterator[None]:
    """The lists, dicts, sets and tuples that modules hold stay these objects, with what was in them.

    torch.export leaves a copy in each place. Modules that share one (a configuration) would no longer see what is
    changed in it, and a rewritten block would take the copy for a change.
    """
    standard = vars(nn.Module())
    held = [
        (vars(module), name, value, value if isinstance(value, tuple) else value.copy())
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in standard and isinstance(value, (list, dict, set, tuple))
    ]
    try:
        yield
    finally:
        for attributes, name, value, content in held:
            if attributes.get(name) is value:
                continue
            if isinstance(value, list):
                value[:] = content
            elif not isinstance(value, tuple):
                value.clear()
                value.update(content)
            attributes[name] = value
