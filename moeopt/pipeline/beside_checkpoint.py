"""A model from a quantised checkpoint: what its files hold, what is held here, and whether the two agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from moeopt.errors import CheckpointError
from moeopt.find.block_candidates import BlockCandidate
from moeopt.ir.weight_format import WeightFormat
from moeopt.published.beside_weights import rounded_at_each_call, turned_at_each_call
from moeopt.published.comparison import Comparison, KindOfMatrix, compare
from moeopt.published.directory_of import directory_of, stated_by, stated_of
from moeopt.published.loaded_matrix import kind_of
from moeopt.sizes import in_megabytes

_SHORT = {"uint4": "int4", "uint8": "int8", "int8": "int8", "e4m3": "fp8", "e2m1": "mxfp4", "nf4": "nf4", "fp4": "fp4"}


def beside_checkpoint(model: nn.Module, places: Iterable[BlockCandidate]) -> list[str]:
    """Notes on a model's quantised checkpoint; [] where it has none.

    A place whose weights are not those of the files gets that for its ``reason``; where they are of another part of the
    model, all places do, for then nothing of the model is what it should be.
    """
    found = list(places)
    try:
        comparison = compare(model)
    except CheckpointError as err:
        return [f"the weights could not be compared with those of the quantised checkpoint: {err}"]
    if comparison is None:
        return list(_without_files(model, found))
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for place in found:
        place.reason = place.reason or _wrong(comparison, [names[w] for w in place.weights if w in names])
    held = {kind_of(names[w]) for place in found for w in place.weights if w in names}
    notes = [why for kind, why in comparison.wrong.items() if kind not in held]  # the others are reasons of blocks
    return [*notes, *_of_experts(model, comparison, found), *_beside_the_weights(comparison)]


def _beside_the_weights(comparison: Comparison) -> Iterator[str]:
    """What the checkpoint's config asks for beside its weights, and no comparison of weights shows."""
    config = stated_by(comparison.directory)
    if rounded := rounded_at_each_call(config):
        yield (
            f"config.json has {rounded}: kernels that follow it round what quantised products read at each call; here "
            "these are floats, in the model that was given and in what was verified"
        )
    if turned := turned_at_each_call(config):
        yield (
            f"transform_config has {turned}: activations that the model turns at each call; whether the library that "
            "loaded it does so, the weights do not tell"
        )


def _wrong(comparison: Comparison, parameters: list[str]) -> str:
    """Why a block that holds ``parameters`` is not certified; "" where all is as in the files."""
    wrong = comparison.wrong
    own = [wrong[kind_of(p)] for p in parameters if kind_of(p) in wrong]
    if own or not wrong:
        return own[0] if own else ""
    return f"no block of this model is certified, for another part of it is wrong: {next(iter(wrong.values()))}"


def _of_experts(model: nn.Module, comparison: Comparison, places: list[BlockCandidate]) -> Iterator[str]:
    """How the experts are stored, how they are held, and how much more that is."""
    experts = _experts(model, places)
    kinds = {kind_of(name) for name in experts}
    stored = [k for k in comparison.kinds if k.loaded is not None and kind_of(k.loaded.parameter) in kinds]
    for formats, alike in _by_format(stored).items():
        dtype = next(k.loaded.values.dtype for k in alike if k.loaded is not None)
        there = sum(k.stored_bytes for k in alike)
        here = sum(k.count * k.shape[0] * k.shape[1] for k in alike) * dtype.itemsize
        yield (
            f"checkpoint {formats}, experts held as {_name(dtype)}, {here / there:.2g} times the file "
            f"({in_megabytes(there)} there, {in_megabytes(here)} here)"
        )
    if stored or not experts:
        return
    method = comparison.method or "the quantiser"
    if comparison.unread:
        name, why = next(iter(comparison.unread.items()))
        yield (
            f"the checkpoint ({method}) has {len(comparison.unread)} matrices in a form that is not read, like {name}: "
            f"{why}; the loaded weights were not compared with them"
        )
    elif not comparison.kinds or not any(k.loaded is None for k in comparison.kinds):
        yield _skipped(method, experts, model)
    else:
        kind = next(k for k in comparison.kinds if k.loaded is None)
        yield (
            f"{kind.label} ({kind.shape[0]} x {kind.shape[1]}, {kind.format}) of the checkpoint was not found in the "
            "loaded model, so the two were not compared"
        )


def _without_files(model: nn.Module, places: list[BlockCandidate]) -> Iterator[str]:
    """Of a quantiser that ran while the model was loaded, or a checkpoint whose files are not on this machine."""
    stated, experts = stated_of(model), _experts(model, places)
    if not stated or not experts:
        return
    method = str(stated.get("quant_method") or "quantised").rsplit(".", 1)[-1].lower()
    if directory_of(model) is not None:
        yield _skipped(method, experts, model)
        return
    dtypes = ", ".join(sorted({_name(t.dtype) for t in experts.values()}))
    yield (
        f"checkpoint {method}, experts held as {dtypes}: they were expanded, or the quantiser skipped them; its "
        "files are not on this machine, so neither can be told, and the weights were not compared with them"
    )


def _skipped(method: str, experts: dict[str, torch.Tensor], model: nn.Module) -> str:
    size = sum(t.numel() * t.element_size() for t in experts.values())
    whole = sum(t.numel() * t.element_size() for t in model.parameters())
    dtypes = ", ".join(sorted({_name(t.dtype) for t in experts.values()}))
    return (
        f"the quantiser skipped the experts (they were never quantised): checkpoint {method}, experts held as "
        f"{dtypes}, {in_megabytes(size)} of the model's {in_megabytes(whole)}; quantize='int8' or 'int4' quantises them"
    )


def _experts(model: nn.Module, places: list[BlockCandidate]) -> dict[str, torch.Tensor]:
    """The floating Parameters of the experts, by name."""
    weights = {w for p in places if p.kind == "moe" for w in p.weights}
    held = ((n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in weights)
    return {name: tensor for name, tensor in held if tensor.is_floating_point()}


def _by_format(kinds: list[KindOfMatrix]) -> dict[str, list[KindOfMatrix]]:
    found: dict[str, list[KindOfMatrix]] = {}
    for kind in kinds:
        found.setdefault(_short(kind.format), []).append(kind)
    return found


def _short(format: WeightFormat) -> str:
    return _SHORT.get(format.codes, format.codes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
