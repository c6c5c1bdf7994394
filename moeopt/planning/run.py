"""``plan``: a model's experts on a cluster, on paper. No weight is read and no device is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeopt.errors import UsageError
from moeopt.inspection import inspect
from moeopt.inspection.devices import Device, find_device
from moeopt.inspection.load import load as load_model
from moeopt.inspection.result import Inspection
from moeopt.planning.cache import numbers_of_a_token
from moeopt.planning.counting import busiest, experts_hit, most_held, owners_reached, remote_owners
from moeopt.planning.formats import Format, find_format
from moeopt.planning.given import plain_values
from moeopt.planning.links import START, START_ACROSS, Links, links_of
from moeopt.planning.placement import Placement, balanced, busiest_rank, contiguous, together, with_copies
from moeopt.planning.result import ClusterPlan, DecodeStep, LayerPlacement, RankMemory, Traffic
from moeopt.value_types import PyObject

BATCHES = (8, 64, 512, 4096, 32768)
"""Tokens of a decoding step over all devices for which tensor and expert parallelism are compared."""
USABLE = 0.9
"""Part of a device's memory that weights and cache may take."""


def plan(
    model_or_config_or_dir: PyObject,
    *,
    devices: int,
    node: int = 8,
    device: str = "H100-SXM",
    dtype: str = "bfloat16",
    load: PyObject = None,
    trust_remote_code: bool = False,
) -> ClusterPlan:
    """Where the experts go, what fits, what is sent, and from which batch on expert parallelism pays.

    Args:
        model_or_config_or_dir: what :func:`moeopt.inspect` takes; no weight is read.
        devices: how many devices there are.
        node: devices of one node, which are linked more quickly than nodes are.
        device: a GPU by name, such as "H100-SXM" or "h100".
        dtype: of the weights: "float32", "bfloat16", "float16", "fp8" (blocks of 128 x 128) or "int4" (experts only,
            blocks of 32).
        load: what :func:`moeopt.profile` measured (its result, its JSON as a dict, or the path of a file with it);
            without it every expert counts as equally loaded.

    Returns:
        :class:`ClusterPlan`; ``print`` it, or take ``to_json()``.

    Raises:
        UsageError: an argument is wrong, the model has no experts, or the load is of another model.
    """
    for name, value in (("devices", devices), ("node", node)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r} must be a whole number from 1 on")
    node = min(node, devices)
    if devices % node:
        raise UsageError(f"devices={devices} is no multiple of node={node}: give the devices of whole nodes")
    form, gpu = find_format(dtype), _device(device)
    layers = _layers(load)
    loaded = load_model(model_or_config_or_dir, trust_remote_code)
    found = inspect(loaded.model, bits=16, device=gpu.name)
    kind = found.main
    if kind is None or kind.top_k is None:
        missing = "has no experts" if kind is None else "does not show how many experts a token uses"
        raise UsageError(f"{loaded.name} {missing}, so there is nothing to place")
    experts = found.counts.total["experts"]
    rest = found.counts.all - experts
    links = links_of(gpu.name)
    notes = list(_notes(found, loaded.notes, links, gpu, devices, node))
    return ClusterPlan(
        loaded.name, devices, node, gpu.name, form.name, kind.experts, kind.top_k, kind.hidden, kind.inner,
        found.moe_layers, experts, rest,
        _memory(experts * most_held(kind.experts, devices), rest, form, gpu, node, numbers_of_a_token(loaded.model)),
        _traffic(kind.experts, kind.top_k, kind.hidden, found.moe_layers, form, devices, node),
        [_step(found, form, gpu, links, devices, node, batch) for batch in BATCHES],
        [_placed(layer, kind.experts, devices, node) for layer in layers],
        notes,
    )  # fmt: skip


def _device(name: str) -> Device:
    if name.lower() in ("cpu", "this"):
        raise UsageError("plan is for several GPUs: name one, such as device='H100-SXM'")
    short = {"h100": "H100-SXM", "h200": "H200-SXM", "a100": "A100-80GB"}
    return find_device(short.get(name.lower(), name))


def _memory(experts: float, rest: int, form: Format, gpu: Device, node: int, numbers: int | None) -> RankMemory:
    """Of the device that holds most: ``experts`` numbers of experts, and ``rest`` others, whole or split in a node."""
    own, whole = experts * form.experts, rest * form.rest
    split = whole / node
    cache = None if numbers is None else 2 * numbers
    room = USABLE * gpu.memory - own - split
    tokens = None if cache is None else max(0, int(room / cache))
    return RankMemory(
        own, whole, split, gpu.memory, cache, tokens, own + whole <= USABLE * gpu.memory, room >= 0
    )  # fmt: skip


def _traffic(E: int, K: int, H: int, layers: int, form: Format, devices: int, node: int) -> Traffic:
    out, back = (1, 2) if form.name == "fp8" else (4, 4) if form.name == "float32" else (2, 2)
    rows = K * (devices - 1) / devices
    ranks = remote_owners(E, K, devices)
    nodes = remote_owners(E, K, devices // node)
    row = H * (out + back)
    all_reduce = 2 * 2 * H * (devices - 1) / devices
    return Traffic(
        out, back, rows, rows * row, ranks, ranks * row, nodes, nodes * row, all_reduce, ranks * row * layers
    )


def _step(
    found: Inspection, form: Format, gpu: Device, links: Links, devices: int, node: int, batch: int
) -> DecodeStep:
    """Weights read once, products at the device's peak, rows over the links; both ways of splitting the experts."""
    kind = found.main
    assert kind is not None and kind.top_k is not None
    E, K, H, layers, nodes = kind.experts, kind.top_k, kind.hidden, found.moe_layers, devices // node
    one = found.counts.total["experts"] / layers / E
    hit, flops = experts_hit(E, K, batch), gpu.flops * form.compute
    tensor = max(hit * one * form.experts / devices / gpu.bandwidth, 2 * batch * K * one / devices / flops)
    reduced = 2 * batch * H * 2 * (node - 1) / node / links.node
    if nodes > 1:
        reduced += 2 * batch * H * 2 / node * (nodes - 1) / nodes / links.network
    holding = min(devices, E)  # the others have no expert to run
    own = min(E * most_held(E, devices), busiest(hit / holding, hit / E))
    expert = max(own * one * form.experts / gpu.bandwidth, 2 * busiest(batch * K / holding) * one / flops)
    traffic = _traffic(E, K, H, layers, form, devices, node)
    sent = batch / devices * (traffic.ranks / links.node + traffic.nodes / links.network)
    start = START if nodes == 1 else START_ACROSS
    return DecodeStep(batch, layers * tensor, layers * (reduced + start), layers * expert, layers * (sent + 2 * START))


def _layers(load: PyObject) -> list[Mapping[str, Any]]:
    """The layers of a profile, as the plain values of its JSON."""
    if load is None:
        return []
    fields = plain_values(load, "load", ": give what `moeopt profile --json` printed")
    if not isinstance(fields, Mapping) or not isinstance(fields.get("layers"), list):
        raise UsageError(f"load is a {type(fields).__name__} without layers: give what moeopt.profile returned")
    return list(fields["layers"])


def _placed(layer: Mapping[str, Any], E: int, devices: int, node: int) -> LayerPlacement:
    load = layer["fired"]
    if len(load) != E:
        raise UsageError(
            f"the load's layer {layer['name']} has {len(load)} experts and the model {E}: profile this model"
        )
    ways: dict[str, Placement] = {"contiguous": contiguous(E, devices), "balanced": balanced(load, devices)}
    if devices > 1:
        ways[f"balanced, {devices} copies"] = with_copies(load, devices, devices)
    pairs = pairs_of(layer)
    if pairs is not None and devices > node:
        ways["by co-activation"] = together(load, pairs, devices, node)
        ways[f"by co-activation, {devices} copies"] = together(load, pairs, devices, node, devices)
    worth = {name: busiest_rank(way, load, devices) for name, way in ways.items()}
    least = min(worth.values())
    chosen = next(name for name in ways if worth[name] <= 1.01 * least)
    return LayerPlacement(str(layer["name"]), {name: round(v, 4) for name, v in worth.items()}, chosen, ways[chosen])


def pairs_of(layer: Mapping[str, Any]) -> np.ndarray | None:
    """(E, E) tokens that chose both, from a layer of a profile; None where an older one holds none."""
    if layer.get("together") is not None:
        return np.asarray(layer["together"], dtype=float)
    if layer.get("together_above_diagonal") is None:
        return None
    E = len(layer["fired"])
    pairs: np.ndarray = np.zeros((E, E))
    for e, line in enumerate(layer["together_above_diagonal"]):
        pairs[e, e + 1 :] = [float(count) for count in line.split()]
    pairs += pairs.T.copy()
    return pairs


def _notes(found: Inspection, more: list[str], links: Links, gpu: Device, devices: int, node: int) -> PyObject:
    yield from more
    yield from found.notes
    if len(found.kinds) > 1:
        yield "the model has several kinds of blocks; traffic and steps are those of the most frequent one"
    if not links.known and devices > 1:
        yield f"no link between devices of a node is known for {gpu.name}; planned as if it were the network"
    kind = found.main
    if kind is not None and kind.experts < devices:
        yield f"{kind.experts} experts on {devices} devices: some hold none unless experts are copied"
    if kind is not None and kind.top_k is not None and devices > 1:
        reached = owners_reached(kind.experts, kind.top_k, devices)
        yield f"a token reaches {reached:.2f} of {devices} devices in each layer, its own among them"
    yield "bounds: peaks of makers' sheets, uniform routing, nothing overlapped, attention and cache reads left out"
