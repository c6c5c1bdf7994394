"""Every error that moeopt raises on purpose, so that a caller can tell them from bugs."""

from __future__ import annotations

from collections.abc import Iterable

from moeopt.obstacles import Obstacle, Rank, Stage


class MoeoptError(Exception):
    """Base class: an expected failure whose message says what, where and the way out."""


class UsageError(MoeoptError, ValueError):
    """moeopt was called wrongly; nothing was changed."""


class Declined(MoeoptError):
    """A block cannot be rewritten.

    ``reason`` is a sentence for the model's owner: what stands in the way, and the way round it.
    ``where`` is the user's source line or a module path, when one is known. ``rank`` and ``stage`` say how much the
    reason weighs beside others (see ``moeopt.obstacles``), ``others`` what else was met on the way.
    """

    rank = Rank.FOUND
    stage = Stage.REWRITE

    def __init__(
        self, reason: str, where: str | None = None, rank: Rank | None = None, others: Iterable[Obstacle] = ()
    ) -> None:
        self.reason = reason
        self.where = where
        self.others = tuple(others)
        if rank is not None:
            self.rank = rank
        super().__init__(f"{reason} (at {where})" if where else reason)

    @property
    def obstacle(self) -> Obstacle:
        """The same as a value; whoever knows the module fills in its path."""
        return Obstacle(self.reason, self.where or "", "", self.rank, self.stage)


class CaptureError(Declined):
    """A module could not be run or recorded by the trace."""

    rank = Rank.PROBE
    stage = Stage.RUN


class NotEquivalentError(MoeoptError):
    """Verification found a difference that rounding does not explain."""


class BundleError(MoeoptError):
    """An engine bundle is damaged, partial, hostile or from another version."""


class LimitError(BundleError):
    """A bundle asks for more time or memory than its ``LoadLimits`` give it."""


class CheckpointError(MoeoptError):
    """A file of a model's checkpoint is damaged; the message names it."""


class NotSaveableError(BundleError):
    """A model cannot be written as a bundle; the message names the op in the way."""


class EngineNotExecutableError(MoeoptError):
    """The engine was built, but this machine cannot run it."""


class EngineBuildError(MoeoptError):
    """A runtime's builder refused the graph, crashed, hung or took too much memory; nothing of the engine is left.

    ``block`` is the module path of the block that it stopped at, "" where that is not known; ``log`` the builder's
    own words.
    """

    def __init__(self, message: str, block: str = "", log: str = "") -> None:
        self.block, self.log = block, log
        super().__init__(message)


class RankLostError(MoeoptError):
    """Another process of a distributed model exited, stopped, raised or disagreed; nothing was computed.

    ``rank`` is that process's rank in the whole job, ``block`` the module path of the block at which this process stood
    ("" outside of all), ``phase`` what this process did there, ``reason`` what is known of the other one.
    """

    def __init__(self, rank: int, block: str, phase: str, reason: str) -> None:
        self.rank, self.block, self.phase, self.reason = rank, block, phase, reason
        super().__init__(
            f"rank {rank} {reason}; this process was at {block or 'the whole model'}, {phase}. The model computes no "
            "longer on any rank: end every process and start all of them again"
        )

    def __reduce__(self) -> tuple[type[RankLostError], tuple[int, str, str, str]]:
        return RankLostError, (self.rank, self.block, self.phase, self.reason)


class StaleModelWarning(UserWarning):
    """A rewritten block met a change it was not verified for, and ran the original code."""


class UntestedVersionWarning(UserWarning):
    """A library is of a version that moeopt was not tested on; told once in a process."""


class EngineFallbackWarning(UserWarning):
    """A loaded engine computed something else than it was verified to on this machine, and was lowered otherwise."""


class NativeKernelWarning(UserWarning):
    """The kernel in C++ could not be built or is not right on this machine; the slower kernels of torch run."""
