"""One zoo case: a naive MoE model, inputs for it, and what an honest compiler should say about it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Call = tuple[tuple, dict]


@dataclass(frozen=True)
class ZooCase:
    """A model as a user wrote it.

    Args:
        name: unique; the name of the function that builds it.
        build: makes the model, seeded, in eval mode (unless the case is about training mode).
        fresh: ``fresh(i)`` gives the i-th call (args, kwargs), seeded; sizes differ with i.
        expect: "rewritten", "declined", or "either" (never wrong is all that is asked).
        moe: number of ``kind == "moe"`` entries a report should have; None where a reader would argue.
        experts: routed experts of each block; a tuple where blocks differ.
        reason: regex that a decline's reason should match.
        check_state: buffers that forward changes, compared after every call.
    """

    name: str
    build: Callable[[], nn.Module]
    fresh: Callable[[int], Call]
    expect: str
    moe: int | None
    experts: int | tuple[int, ...]
    reason: str
    check_state: tuple[str, ...]

    def inputs(self) -> Call:
        """The example call, the one given to ``optimize``."""
        return self.fresh(0)


CASES: dict[str, ZooCase] = {}


def case(
    fresh: Callable[[int], Call],
    experts: int | tuple[int, ...],
    *,
    expect: str = "rewritten",
    moe: int | None = 1,
    reason: str = "",
    check_state: tuple[str, ...] = (),
    training: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Registers the decorated builder; it is run under a seed made from its name."""

    def register(builder: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = builder.__name__
        assert name not in CASES, f"two zoo cases are called {name}"

        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                return builder().train(training)

        CASES[name] = ZooCase(name, build, fresh, expect, moe, experts, reason, check_state)
        return builder

    return register


def _generator(i: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + i)


def _calls(shapes: list[tuple[int, ...]], make: Callable[[tuple[int, ...], torch.Generator], Call]):
    return lambda i: make(shapes[i % len(shapes)], _generator(i))


def seq(hidden: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Callable[[int], Call]:
    """Calls with one (batch, length, hidden) tensor."""
    shapes = [(2, 6), (1, 1), (3, 4), (1, 17), (4, 2)]
    return _calls(shapes, lambda s, g: (((torch.randn(*s, hidden, generator=g) * scale).to(dtype),), {}))


def flat(hidden: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Call]:
    """Calls with one (tokens, hidden) tensor."""
    return _calls(
        [(11,), (1,), (5,), (32,), (2,)], lambda s, g: ((torch.randn(*s, hidden, generator=g).to(dtype),), {})
    )


def image(channels: int) -> Callable[[int], Call]:
    """Calls with one (batch, channels, height, width) tensor."""
    shapes = [(2, 4, 4), (1, 2, 3), (3, 5, 2), (1, 6, 6)]
    return _calls(shapes, lambda s, g: ((torch.randn(s[0], channels, *s[1:], generator=g),), {}))


def token_ids(vocab: int) -> Callable[[int], Call]:
    """Calls with one (batch, length) tensor of token ids."""
    return _calls([(2, 7), (1, 1), (3, 3), (1, 15)], lambda s, g: ((torch.randint(vocab, s, generator=g),), {}))


def made_by(make: Callable[[tuple[int, int], torch.Generator], Call]) -> Callable[[int], Call]:
    """Calls that ``make((batch, length), generator)`` returns."""
    return _calls([(2, 6), (1, 1), (3, 4), (1, 17), (4, 2)], make)
