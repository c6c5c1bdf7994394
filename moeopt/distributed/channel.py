"""The collectives of one distributed model: they end within its timeout, name who was lost, and count what they send.

Every exchange begins with a meeting: each process tells each other how many rows it will send and where in the model it
stands. What does not match is an error before a row is sent. Shape legend: P ranks, N rows.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moeopt.distributed.lifeline import Lifeline
from moeopt.errors import RankLostError, UsageError
from moeopt.value_types import PyObject

FACTS = ("the number of its call", "the block", "the step", "the dtypes", "the width of a token", "experts per token",
         "whether gradients are recorded")  # fmt: skip
"""What every process must have in common when it meets the others, in this order."""

NO_COPY = (
    "a distributed model can be neither copied nor pickled, for it holds a part of the experts and a process group: "
    "copy the optimised model before moeopt.distribute; torch.distributed.checkpoint saves and loads its state_dict"
)

_models: Counter[tuple[int, ...]] = Counter()
"""How many models each set of ranks has shared; on all of them alike."""


@dataclass
class BytesSent:
    """Bytes that one process sent to others: rows of tokens and results, and what describes them (ids, weights,
    counts). ``exchanges`` counts collectives."""

    rows: int = 0
    described: int = 0
    exchanges: int = 0


class Channel:
    """The process group of one distributed model, with a timeout of its own.

    Args:
        ranks: of the job, those that share the model, in the order of its own ranks.
        backend: of the group: ``gloo``, ``nccl``, ...
        device: where what ranks tell each other lies.
        timeout: seconds after which a process that does not answer is lost.

    Attributes:
        rank, size: of this process in the group.
        block: the module path at which this process stands, for errors.
        traffic: what was sent from here.

    Raises:
        RankLostError: a process does not come to form the group.
    """

    def __init__(self, ranks: Sequence[int], backend: str, timeout: float, device: str = "cpu") -> None:
        self.ranks, self.size, self.timeout, self.device = list(ranks), len(ranks), timeout, device
        self.rank = self.ranks.index(dist.get_rank())
        self.block, self.phase, self.traffic = "", "", BytesSent()
        self.error: tuple[int, str, str, str] | None = None
        self._call = 0
        c10d: PyObject = dist.distributed_c10d
        name = "-".join(map(str, self.ranks))
        store = c10d.PrefixStore(f"moeopt/{name}/{_models[tuple(self.ranks)]}", c10d._get_default_store())
        _models[tuple(self.ranks)] += 1
        self.lifeline = Lifeline(store, self.ranks, dist.get_rank(), timeout)
        limit = datetime.timedelta(seconds=self.lifeline.collectives)
        with self.step("forming a process group"):
            self.group = _own_group(backend, store, self.ranks, self.rank, limit)
            self.group.barrier().wait()

    def __deepcopy__(self, memo: PyObject) -> Channel:
        raise UsageError(NO_COPY)

    def __reduce_ex__(self, protocol: PyObject) -> PyObject:
        raise UsageError(NO_COPY)

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[None]:
        """What is done inside ends in the timeout, or in a :class:`RankLostError`; then so does every later step."""
        if self.error is not None:
            raise RankLostError(*self.error)
        self.phase = phase
        self.lifeline.calls += 1
        self.traffic.exchanges += 1
        try:
            yield
        except RuntimeError as err:  # of gloo, NCCL, the store
            raise self.lose(*self.lifeline.lost()) from err

    def look(self, phase: str) -> None:
        """``RankLostError`` where another process is lost while this one works alone."""
        self._alone(phase, self.lifeline.heard)

    def wait_for_all(self, phase: str) -> None:
        """Until every process has come here, however long one of them works before."""
        self._alone(phase, lambda: self.lifeline.come(phase))

    def _alone(self, phase: str, ask: Callable[[], tuple[int, str] | None]) -> None:
        if self.error is not None:
            raise RankLostError(*self.error)
        self.phase = phase
        if (lost := ask()) is not None:
            raise self.lose(*lost)

    def lose(self, rank: int, reason: str) -> RankLostError:
        """The error for a lost process; the group is given up."""
        self.error = (rank, self.block, self.phase, reason)
        with contextlib.suppress(RuntimeError, AttributeError):
            self.group.abort()  # so that the others need not wait for their timeout
        return RankLostError(rank, *self.error[1:])

    def meet(
        self, phase: str, counts_P: Tensor, facts: Sequence[int], digest: Tensor | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Tell each rank how many rows it will get, and hear the same; all must stand at the same place.

        Args:
            counts_P: rows for each rank, int64.
            facts: of this meeting, in the order of ``FACTS`` after the first.
            digest: a number of this rank alone; None for 0.

        Returns:
            (rows to each rank, rows from each rank, digests of the ranks).
        """
        self._call += 1
        own = torch.tensor([0, self._call, *facts], device=counts_P.device)
        if digest is not None:
            own[0] = digest
        told_PF = torch.cat([counts_P.unsqueeze(1), own.expand(self.size, -1)], 1).contiguous()
        heard_PF = torch.empty_like(told_PF)
        with self.step(f"meeting the others before {phase}"):
            self.group.alltoall_base(heard_PF, told_PF, [], []).wait()
            self.traffic.described += told_PF.nbytes // self.size * (self.size - 1)
            heard = heard_PF.tolist()
        self.compare([tuple(line[2:]) for line in heard], FACTS)
        return counts_P.tolist(), [line[0] for line in heard], [line[1] for line in heard]

    def compare(self, told: Sequence[Sequence[PyObject]], names: Sequence[str]) -> None:
        """Raise unless all ranks told the same; the odd one of them is the one that is lost."""
        lines = [tuple(line) for line in told]
        if len(set(lines)) == 1:
            return
        most = max(Counter(lines).values())
        usual = next(line for line in lines if lines.count(line) == most)
        odd = next(i for i, line in enumerate(lines) if line != usual)
        which = [n for n, (a, b) in enumerate(zip(usual, lines[odd], strict=True)) if a != b]
        differs = "; ".join(
            f"{names[n]} is {lines[odd][n]!s:.100} there and {usual[n]!s:.100} elsewhere" for n in which[:3]
        )
        raise self.lose(self.ranks[odd], f"disagrees: {differs}")

    def send(self, phase: str, x: Tensor, to: list[int], of: list[int], described: bool = False) -> Tensor:
        """Rows of ``x``, the first ``to[0]`` of them to rank 0 and so on; gives the rows of each rank, rank 0's first.

        Args:
            described: whether the rows are ids or weights, for :attr:`traffic`.
        """
        y = x.new_empty(sum(of), *x.shape[1:])
        row = x[:1].numel() * x.element_size() if len(x) else 0
        with self.step(phase):
            # a dtype that gloo does not know, float8 say, is sent as bytes
            self.group.alltoall_base(_as_bytes(y), _as_bytes(x.contiguous()), of, to).wait()
        sent = (sum(to) - to[self.rank]) * row
        if described:
            self.traffic.described += sent
        else:
            self.traffic.rows += sent
        return y

    def add(self, phase: str, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks, in the order that the backend takes."""
        y = x.clone(memory_format=torch.contiguous_format)
        with self.step(phase):
            self.group.allreduce(y).wait()
        self.traffic.rows += 2 * (self.size - 1) * y.nbytes // self.size  # of a ring
        return y

    def everyones(self, phase: str, x: Tensor) -> Tensor:
        """(P, ...): the tensor that each rank gives, all of one shape and dtype."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self.step(phase):
            self.group.allgather(parts, x.contiguous()).wait()
        self.traffic.described += x.nbytes * (self.size - 1)
        return torch.stack(parts)

    def hear(self, phase: str, value: PyObject) -> list[PyObject]:
        """The value that each rank gives, of JSON's types."""
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        sizes = self.everyones(phase, torch.tensor([len(text)], device=self.device)).view(-1).tolist()
        padded = text.new_zeros(max(sizes))
        padded[: len(text)] = text
        heard = self.everyones(phase, padded)
        return [json.loads(bytes(line[:size].tolist())) for line, size in zip(heard, sizes, strict=True)]


def _own_group(kind: str, store: PyObject, ranks: list[int], rank: int, timeout: datetime.timedelta) -> PyObject:
    """A group whose collectives take ``timeout`` at most.

    gloo's is made directly: ``new_group`` of a part of the job gives it a name that counts the groups of each process,
    and processes that have made different numbers of groups would wait for each other under different names.
    """
    if kind == "gloo":
        return dist.ProcessGroupGloo(store, rank, len(ranks), timeout)
    return dist.new_group(ranks, timeout=timeout, backend=kind, use_local_synchronization=True)


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x
