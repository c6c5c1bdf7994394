"""What connects the devices: rates in one direction, in bytes/s a device, and the start of a collective, in seconds.

The table holds makers' peaks; real collectives reach less. A device that is not in the table has the network's rate
inside a node too.
"""

from __future__ import annotations

from dataclasses import dataclass

NETWORK = 50e9
"""One 400 Gb/s network card a device, as in an eight-GPU server with eight of them."""
START, START_ACROSS = 10e-6, 30e-6
"""Seconds before the first byte of a collective inside a node, and across nodes: figures of thumb, not measured."""

_NODE = {
    # half of the sheet's NVLink or Infinity Fabric figure, which counts both directions
    "H100-SXM": 450e9,
    "H200-SXM": 450e9,
    "B200": 900e9,
    "A100-40GB": 300e9,
    "A100-80GB": 300e9,
    "MI300X": 448e9,
}


@dataclass(frozen=True)
class Links:
    """Bytes/s in one direction that one device sends inside its node, and to other nodes."""

    node: float
    network: float
    known: bool


def links_of(device: str) -> Links:
    """The rates of a device of ``moeopt.inspection.devices.GPUS``."""
    return Links(_NODE.get(device, NETWORK), NETWORK, device in _NODE)
