"""Places of experts of different kinds: modules of one list that do not even hold the same layers.

    experts = [FFN, Identity, Linear, ...]       y[rows_e] += experts[e](x[rows_e])

Nothing of them can be grouped. The one that is a feed-forward network would be listed as if a mask picked its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx, nn

from moeopt.capture.op_kinds import CHOICES_AMONG, op_name, picks_rows
from moeopt.capture.tree import leaves_of
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.module_lists import gate_width
from moeopt.find.unread_blocks import UnreadBlocks, calls_of_blocks, weights_of
from moeopt.listed import listed

_KINDS = (
    "its experts are of different kinds ({}), and the op runs one function on all of them; give all the same layers, "
    "or route to each group of alike experts by a block of its own"
)


def mixed_kinds(unread: UnreadBlocks, places: list[BlockCandidate]) -> Iterator[BlockCandidate]:
    """Calls that send picked rows to each module of a list as long as a choice is wide, where these differ."""
    taken = calls_of_blocks(places)
    widths = {gate_width(n) for n in unread.tape.nodes if op_name(n) in CHOICES_AMONG}
    for call in unread.tape.calls:
        if call.index in taken:
            continue
        for home in call.module.children():
            if not isinstance(home, (nn.ModuleList, nn.ModuleDict)) or len(home) not in widths - {1}:
                continue
            own = set(home.children())
            ran = [c for c in unread.children(call) if c.module in own]
            picked = len(ran) > 1 and all(any(map(picks_rows, leaves_of(fx.Node, c.args))) for c in ran)
            weights = weights_of(ran) if picked else set()
            if weights and len({tuple(p.dim() for p in c.module.parameters()) for c in ran}) > 1:
                kinds = listed(dict.fromkeys(type(m).__name__ for m in home.children()))
                place = unread.place(call, ran[0].first, len(home), weights)
                yield dataclasses.replace(place, reason=_KINDS.format(kinds))
