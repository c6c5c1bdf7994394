"""A peer in a process of its own: one runtime's waiting threads do not slow another's calls, and its memory is its own.

The process builds the peer, tells facts about it, and then answers one question at a time over a pipe.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Facts = dict[str, float]
Make = Callable[..., Callable[..., Any]]
PAUSE = 0.15
"""Seconds to wait after each call: ONNX Runtime's threads keep a core busy for 65 ms (measured), torch's for 10."""


class Peer:
    """``make(facts, *args)``, run in a new process; it fills ``facts`` and returns the function that answers.

    Raises:
        RuntimeError: it could not be built; the message is the error's first line.
    """

    def __init__(self, threads: int, make: Make, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: Facts = self._received()

    def ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._received()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _received(self) -> Any:
        try:
            good, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("its process ended") from None
        if not good:
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, threads: int, make: Make, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(threads)
    facts: Facts = {}
    try:
        answer = make(facts, *args)
        pipe.send((True, facts))
        while True:
            try:
                question = pipe.recv()
            except EOFError:  # the parent closed its end, or is gone
                return
            with torch.inference_mode():
                found = answer(*question)
            pipe.send((True, found))
    except Exception as err:
        pipe.send((False, f"{type(err).__name__}: {(str(err).strip() or 'no message').splitlines()[0]}"))
