"""Expert parallelism on ``torch.distributed``: the experts of a rewritten model on several ranks, proved across them.

lifeline, channel       who is there; collectives that end, and say who was lost
homes, dispatch         which rank runs which expert; three ways to reach them
parts, shards, state    what of each Parameter a rank keeps, and the state_dict of it
agreement, proof        what the ranks agree on at the start, and what is shown before the model is returned
run                     ``distribute``
"""

from __future__ import annotations

from moeopt.distributed.run import distribute

__all__ = ["distribute"]
