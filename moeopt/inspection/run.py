"""``inspect``: what is in a model, will it fit, what bounds it. No weight is read and nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeopt.capture.dead_proxies import set_aside
from moeopt.errors import UsageError
from moeopt.find.packed_weights import packed_weights
from moeopt.inspection.counting import count
from moeopt.inspection.devices import find_device
from moeopt.inspection.load import load
from moeopt.inspection.memory import BITS, fits
from moeopt.inspection.probe import Selection, selection
from moeopt.inspection.quantized import format_named, quantized_sizes
from moeopt.inspection.result import BlockKind, Inspection
from moeopt.inspection.roles import Roles, assign
from moeopt.inspection.roofline import ForwardPass, bound, expected_hit, parts_of
from moeopt.inspection.structure import ExpertGroup, MoEBlock, find_blocks, stacks
from moeopt.inspection.tree import Tree
from moeopt.value_types import PyObject


def inspect(
    model_or_config_or_dir: PyObject,
    *,
    batch: int = 1,
    prompt: int = 512,
    bits: int = 16,
    device: str | None = None,
    top_k: int | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Inspection:
    """Experts, parameters, memory and work of a model, before anything is done to it.

    Args:
        model_or_config_or_dir: an ``nn.Module``; or a Hugging Face config, a path of a config.json, a directory with
            one (weights are not read, only the headers of safetensors files), or a dict of its fields.
        batch: sequences that run together; a decoding step has one token of each.
        prompt: tokens of each sequence at prefill.
        bits: width of a weight for FLOPs and bytes: 32, 16, 8 or 4.
        device: a GPU by name, such as "H100-SXM"; None or "cpu" measures this machine, in about a second.
        top_k: experts per token, where the model does not show it.
        trust_remote_code: run the Python code that a directory brings, where its model needs that.
        quantize: a format of experts, such as "int8", "int4", "fp8" or "mxfp4": the bytes, and the bound of a decoding
            step, that the model would have with its experts so; nothing is quantised.

    Returns:
        :class:`Inspection`; ``print`` it, or take ``to_dict()``. A model without experts is no error.

    Raises:
        UsageError: no model can be made of what was given, or an argument is wrong; the message says the way out.
        CheckpointError: a safetensors header is damaged.
    """
    _check_numbers(bits, batch=batch, prompt=prompt, top_k=top_k)
    format = None if quantize is None else format_named(quantize)
    loaded = load(model_or_config_or_dir, trust_remote_code)
    tree = Tree(loaded.model)
    if not tree.tensors:
        why = packed_weights(loaded.model)
        raise UsageError(f"{loaded.name} has no parameters, so there is nothing to inspect{why and f': {why}'}")
    with set_aside(loaded.model):
        chosen, notes = _chosen_blocks(tree, top_k)
    notes += _unseen(loaded.experts, {b.path for b in chosen})
    blocks, roles = list(chosen), assign(tree, list(chosen))
    ks = {b.path: s.top_k for b, s in chosen.items()}
    counts = count(tree, blocks, roles, ks)
    on = find_device(device)
    parts = parts_of(tree, blocks, roles, ks)
    kinds = _kinds(chosen, roles)
    main = max(kinds, key=lambda k: k.blocks, default=None)

    def run(tokens: int) -> ForwardPass:
        hit = expected_hit(main.experts, main.top_k, tokens) if main and main.top_k else None
        return ForwardPass(tokens, [bound(p, tokens, bits / 8, on) for p in parts], hit)

    decode = run(batch)
    coded = None if format is None else quantized_sizes(tree, blocks, format, bits, counts.all, parts, decode, on)
    return Inspection(
        loaded.name, loaded.source, len(roles.layers), _layers(tree, blocks), kinds, counts, on, fits(counts.all, on),
        bits, batch, run(batch * prompt), decode, loaded.stored, loaded.notes + notes, coded,
    )  # fmt: skip


def _chosen_blocks(tree: Tree, top_k: int | None) -> tuple[dict[MoEBlock, Selection], list[str]]:
    """Every block and how it chooses; banks without a router too where ``top_k`` says how many a token uses."""
    found, lone = find_blocks(tree)
    chosen, notes = _choose(tree, found, top_k)
    lone = [b for b in lone if b.stacked]
    if top_k is None and lone:
        notes.append(_unrouted(lone[0]))
    notes += _loose_stacks(tree, [*(b.bank for b in chosen), *lone])
    chosen |= {_without_router(b): Selection(top_k, "not recognised", False) for b in lone if top_k is not None}
    return chosen, notes


def _check_numbers(bits: int, **counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name}={value!r} must be a whole number from 1 on")
    if bits not in BITS:
        raise UsageError(f"bits={bits!r} must be one of {', '.join(map(str, BITS))}")


def _choose(tree: Tree, blocks: list[MoEBlock], top_k: int | None) -> tuple[dict[MoEBlock, Selection], list[str]]:
    """How each block chooses, blocks alike asked once; lists of networks that nothing chooses from are no experts."""
    chosen: dict[MoEBlock, Selection] = {}
    asked: dict[Any, Selection | None] = {}
    notes = []
    for block in blocks:
        if top_k is not None and top_k > block.bank.choices:
            raise UsageError(
                f"top_k={top_k} is more than the {block.bank.experts} experts of {block.path or 'the model'}"
            )
        like = _likeness(tree, block)
        if like not in asked:
            asked[like] = selection(tree, block, top_k)
        found = asked[like]
        if found is None and (not block.bank.stacked or block.bank.idle):
            notes.append(_unrouted(block.bank))
            continue
        chosen[block] = found or Selection(None, "not recognised", False)
        if chosen[block].top_k is None:
            notes.append(
                f"how many experts a token uses at {block.path or 'the top'} was not seen, so active parameters are "
                "not counted and experts are left out of the work: give top_k"
            )
    return chosen, _few(notes)


def _unrouted(bank: ExpertGroup) -> str:
    return (
        f"{bank.owner or 'the model'} holds {bank.experts} networks alike, and nothing was seen to choose among them: "
        "counted as used by every token; if they are experts, give top_k"
    )


def _loose_stacks(tree: Tree, banks: list[ExpertGroup]) -> list[str]:
    """Stacked matrices that belong to nothing that was recognised may be experts of a form that is not known here."""
    known = {n for b in banks for n in b.names}
    loose = [n for n in stacks(tree) if n not in known]
    if not loose:
        return []
    size = sum(tree.tensors[n].numel() for n in loose)
    return [
        f"{size:,} parameters in stacked matrices such as {loose[0]} belong to no experts that were recognised; "
        "counted as used by every token"
    ]


def _without_router(bank: ExpertGroup) -> MoEBlock:
    return MoEBlock(bank.owner, bank, bank.owner, frozenset(), bank.ffn.hidden)


def _likeness(tree: Tree, block: MoEBlock) -> PyObject:
    """Equal for blocks of one class with the same sizes and integer settings."""
    modules = [tree.modules[p] for p in (block.path, block.router_path)]
    settings = [
        (name, value)
        for module in modules
        for name, value in sorted(vars(module).items())
        if isinstance(value, int) and not name.startswith("_") and name not in ("layer_idx", "layer_id", "layer_number")
    ]
    bank = block.bank
    return (*map(type, modules), bank.experts, bank.ffn, block.width, tuple(settings))


def _kinds(chosen: dict[MoEBlock, Selection], roles: Roles) -> list[BlockKind]:
    groups: dict[tuple[Any, ...], int] = {}
    for block, how in chosen.items():
        ffn = block.bank.ffn
        shared = sum(_in_experts(s.inner, ffn.inner) for s in roles.shared.get(block.path, ()))
        key = (block.bank.experts, how.top_k, shared, ffn.hidden, ffn.inner, ffn.gated, how.router)
        groups[key] = groups.get(key, 0) + 1
    return [BlockKind(blocks, *key) for key, blocks in groups.items()]


def _layers(tree: Tree, blocks: list[MoEBlock]) -> int:
    """Layers that hold a block."""
    return len({tree.numbered_ancestor(b.path, outermost=True) or b.path for b in blocks})


def _in_experts(width: int, expert: int) -> int:
    """DeepSeek and Qwen count a shared network as so many experts of its width; one of another width counts as one."""
    return width // expert if width % expert == 0 else 1


def _few(notes: list[str], limit: int = 3) -> list[str]:
    more = len(notes) - limit
    return notes if more < 1 else [*notes[:limit], f"and {more} more of this kind"]


def _unseen(chains: Mapping[str, int], seen: set[str]) -> list[str]:
    """A note on the regions of an ONNX graph that the tree of parameters does not show as experts."""
    rest = [(path, n) for path, n in chains.items() if path not in seen]
    if not rest:
        return []
    return [
        f"{len(rest)} of the graph's blocks may be experts ({rest[0][0]}: {rest[0][1]} chains of products) whose "
        "weights the file holds one by one, without a place of their own: they are counted as dense; moeopt.explain "
        "says what they are"
    ]
