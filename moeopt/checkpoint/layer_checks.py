"""Each layer of a model beside the same layer of the optimised model, on what really arrives there.

The original runs once, from the embedding through its layers. Where a layer with rewritten blocks is called, the
optimised one is called with the same inputs, and the two are judged as whole models are (``verification.model``): by
what one rounding error in each rewritten block moves the layer's own result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.listed import listed
from moeopt.value_types import PyObject
from moeopt.verification.model import EndToEnd, end_to_end, run_plain


def check_layers(
    original: nn.Module,
    optimized: nn.Module,
    call: ArgsKwargs,
    layers: Sequence[str],
    blocks: Sequence[str],
    known: Mapping[str, EndToEnd],
    note: Callable[[str, EndToEnd], None],
    after: Callable[[], None],
) -> dict[str, EndToEnd]:
    """The verdict on each of ``layers`` that holds one of ``blocks``, by path.

    Args:
        known: verdicts that were reached before; those layers are not compared again.
        note: told each verdict as it is reached.
        after: called when a layer is done.
    """
    verdicts: dict[str, EndToEnd] = {}
    inside = {path: [b for b in blocks if b == path or b.startswith(path + ".")] for path in layers}
    handles = []

    def hook_for(path: str, rewritten: nn.Module) -> Callable[..., None]:
        running = False

        def before(module: nn.Module, args: PyObject, kwargs: PyObject) -> None:
            nonlocal running
            if path in verdicts or running:
                return
            running = True  # the comparison calls this module again
            found = known.get(path)
            if found is None:
                names = [name.removeprefix(path).removeprefix(".") for name in inside[path]]
                found = end_to_end(module, rewritten, args, kwargs, noise_blocks=names, greedy_steps=0)
                note(path, found)
            verdicts[path] = found
            running = False

        return before

    original = shared_copy(original)  # whose own hooks may be changed: the model's are watched
    try:
        for path in layers:
            if inside[path]:
                layer = original.get_submodule(path)
                hook = hook_for(path, optimized.get_submodule(path))
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(layer.register_forward_hook(lambda *_: after()))
        with torch.no_grad():
            run_plain(original, *call)
    finally:
        for handle in handles:
            handle.remove()
    return verdicts


def in_words(verdicts: Mapping[str, EndToEnd]) -> str:
    """One sentence on all layers."""
    judged = {path: verdict for path, verdict in verdicts.items() if verdict.tokens}
    silent = [path for path in verdicts if path not in judged]
    lines = []
    if judged:
        worst = max(judged.items(), key=lambda item: _share(item[1]))
        lines.append(
            f"{len(judged)} layers with rewritten blocks were compared one by one on the activations that reach them; "
            f"the nearest to its budget is {worst[0]}: distance at most {worst[1].distance:.2e} "
            f"(budget {worst[1].budget:.2e})"
        )
    if silent:
        lines.append(
            f"no activation that reaches {listed(silent)} gives a finite number in the original, so nothing was "
            "compared there: the block was, on inputs of moeopt's own"
        )
    return "; ".join(lines)


def failure(verdicts: Mapping[str, EndToEnd]) -> str:
    """The first layer that is not equivalent, with the reason; "" where there is none."""
    return next((f"layer {path}: {v.reason}" for path, v in verdicts.items() if v.passed is not True), "")


def _share(verdict: EndToEnd) -> float:
    return verdict.distance / verdict.budget if verdict.budget else 0.0
