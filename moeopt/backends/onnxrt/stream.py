"""The CUDA stream of a session: ordered with its caller's stream by events, so that the host need not wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SessionStream:
    """A stream of the session's own on one device, handed to ONNX Runtime as its ``user_compute_stream``.

    torch's default stream would do without events, but its address is 0, which ONNX Runtime reads as "none given".

    Attributes:
        device: with its index.
        options: what a provider is given, by name.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.options = {"device_id": str(device.index), "user_compute_stream": str(self.stream.cuda_stream)}

    @contextlib.contextmanager
    def entered(self) -> Iterator[torch.cuda.Stream]:
        """As :meth:`ordered`, with torch's own work inside on the session's stream too; gives the caller's stream."""
        caller = torch.cuda.current_stream(self.device)
        with self.ordered(), torch.cuda.stream(self.stream):
            yield caller

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """What the caller's stream has queued comes before the runs inside; what it queues next comes after them.

        Where ONNX Runtime copies an input to the CPU, it does so on the legacy default stream, which waits for no
        side stream of torch: a caller on one of those is waited for first. A run itself ends with the one wait that
        ONNX Runtime does.
        """
        caller = torch.cuda.current_stream(self.device)
        if caller == torch.cuda.default_stream(self.device):
            self.stream.wait_stream(caller)
        else:
            caller.synchronize()
        try:
            yield
        finally:
            caller.wait_stream(self.stream)
