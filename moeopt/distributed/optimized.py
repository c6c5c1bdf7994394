"""What ``moeopt.distribute`` returns: an ``Optimized`` whose experts lie on several ranks."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from moeopt.backends.base import Made
from moeopt.capture.tree import ArgsKwargs
from moeopt.distributed.channel import NO_COPY, BytesSent, Channel
from moeopt.errors import NotSaveableError, RankLostError, UsageError
from moeopt.optimized import Optimized
from moeopt.value_types import PyObject


class DistributedOptimized(Optimized):
    """Call it on every rank. Its ``state_dict`` is the user's; ``torch.distributed.checkpoint`` saves and loads it.

    Attributes:
        traffic: what this rank has sent since the model was distributed and verified: ``rows`` and ``described`` (ids,
            weights, counts) in bytes, ``exchanges`` in collectives.
    """

    _OWN = Optimized._OWN | {"_channel", "_held"}
    _why_not_verified = (
        "a distributed model is verified when it is made: its certificate says what was shown across the ranks; verify "
        "the optimised model with moeopt.verify before moeopt.distribute"
    )

    def __init__(self, made: Made, call: ArgsKwargs, channel: Channel, held: list[str]) -> None:
        super().__init__(made, call)
        self._channel, self._held = channel, held

    @property
    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """By name in ``model``, the Parameters of experts of which this rank has a part, or that it has alone: what
        other wrappers are to leave alone, as in ``fully_shard(fast.model,
        ignored_params=set(fast.expert_parameters.values()))``."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in self._held if name in named}

    @property
    def traffic(self) -> BytesSent:
        return self._channel.traffic

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        try:
            return super().__call__(*args, **kwargs)
        except RankLostError:
            raise
        except BaseException as err:
            self._channel.lifeline.say(f"raised {type(err).__name__}: {str(err):.300}")
            raise

    def __copy__(self) -> Optimized:
        raise UsageError(NO_COPY)

    def __deepcopy__(self, memo: PyObject) -> Optimized:
        raise UsageError(NO_COPY)

    def __getstate__(self) -> PyObject:
        raise UsageError(NO_COPY)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Refused: a bundle is a graph for one process."""
        raise NotSaveableError(
            f"{directory}: a distributed model has no bundle, for each rank holds a part of its experts: save the "
            "optimised model before moeopt.distribute, and this one's weights with torch.distributed.checkpoint.save("
            "model.state_dict(), ...)"
        )
