"""What can be saved of a model whose Python depends on the values of tensors, in words that can be followed.

Such code keeps the whole model from being one graph, on every backend. Two things stay possible: the optimised PyTorch
model with its code, and a bundle of each module that has none of that code.
"""

from __future__ import annotations

from moeopt.listed import listed
from moeopt.pipeline.block_reports import PipelineResult


def still_saveable(rewritten: str = "") -> str:
    """The sentence; ``rewritten`` is the path of a rewritten block of the model, where one is known."""
    example = f"the rewritten block {rewritten}" if rewritten else "a block that moeopt.explain calls rewritten"
    name = repr(rewritten) if rewritten else "name"
    return (
        "What can be saved: the whole model with its code, torch.save(moeopt.optimize(model, inputs).model, file), "
        "which torch.load(file, weights_only=False) reads; and on each backend a module without that code, such as "
        f"{example}, as a bundle of its own: moeopt.optimize(model.get_submodule({name}), its inputs, "
        "backend=...).save(folder)"
    )


def how_to_save(outcome: PipelineResult) -> list[str]:
    """A note where Python of a declined block may keep the whole model from being exported: what can be saved."""
    if not outcome.steered:
        return []
    names = list(dict.fromkeys(outcome.steered))
    return [
        f"{listed(names)}: left with Python that depends on the values of tensors, so .save() and engines may refuse "
        f"the whole model. {still_saveable(next(filter(None, outcome.rewrites), ''))}"
    ]
