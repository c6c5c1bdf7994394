"""Numbers of tokens at which a rewritten block is slower here than its original code: there the original runs.

A small block that makes a few PyTorch calls on stacked weights has nothing to group at one token, and the Python around
the op costs more than the op saves. At hundreds of tokens for every expert, one long product of the library may be
quicker. At other sizes the same block gains. So each kind of block is timed beside its original code at a few numbers
of tokens (``ops.measured``: milliseconds, once, remembered), and calls near those at which the original is quicker are
left to it. They need no verification: the original was its yardstick. Where both are equally quick, and on machines
that may not be timed, the rewritten code runs.

Outside of ``torch.no_grad()`` autograd records every call, at a different cost for the two, so such calls are timed by
themselves. No call can know whether a backward pass follows: a block in training mode is timed with one, a block in
evaluation mode without. A block on a GPU is timed by the GPU's events.
"""

from __future__ import annotations

import functools
import hashlib
import time

import torch
from torch import Tensor, nn

from moeopt.capture.tree import ArgsKwargs, leaves_of, tree_map
from moeopt.errors import Declined
from moeopt.listed import listed
from moeopt.ops.measured import TimedCall, Way, fastest
from moeopt.options import measuring
from moeopt.patches import quiet
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.dense_forms import buffers_kept, sized_calls
from moeopt.rewrite.bytecode import fingerprint
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.original_calls import OriginalCalls, original_calls_of
from moeopt.verification.gradients import hooks_of
from moeopt.verification.state import RestoreState, in_mode

NEAR = {1: range(1, 2), 8: range(2, 17), 64: range(17, 129), 256: range(129, 321), 512: range(321, 513)}
"""The numbers of tokens that are timed, and those for which each stands. Longer prompts run the rewritten code, because
an original may hold the outputs of all experts for each token in memory."""
LARGEST = 1 << 24
"""Weights of a block from which matrix products dominate the time of a call, so that the block is not timed."""
WORK = 1 << 29
"""Multiply-adds of all experts on all tokens above which a number of tokens is not timed: some milliseconds a call."""
ON_GPU = 1 << 8
"""The factor of both limits on a GPU: about how much more a GPU reads and multiplies than a core in the same time."""
TURN = 1e-3
"""Seconds for which one of the two runs in turn, at least, or ``CALLS`` calls."""
CALLS = 16
GAIN = 1.03
"""By how much the original must be quicker, including the check whether a call is left to it."""
PLAIN, RECORDED, TRAINED = "", " recorded,", " trained,"
MODES = {PLAIN: " under torch.no_grad()", RECORDED: " outside of torch.no_grad()", TRAINED: " in training"}
"""The modes in which a call is timed, as a question and as a note name them."""


def choose_original_calls(model: nn.Module, outcome: PipelineResult) -> list[str]:
    """Leave calls of rewritten blocks to the original code where that is quicker; returns notes for the report."""
    if not measuring():
        return []
    mixtures = {block.name for block in outcome.blocks if block.kind == "moe" and block.status == "rewritten"}
    left: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path in outcome.rewrites:
        name, forward = path or type(model).__name__, rewritten_forward(model.get_submodule(path))
        if name not in mixtures or forward is None or not (own := original_calls_of(forward.program)):
            continue
        call = outcome.calls[path]
        slower = {mode: tuple(_slower(forward, call, own, mode)) for mode in MODES if _happens(forward, mode)}
        slower.setdefault(RECORDED, slower[PLAIN])
        slower.setdefault(TRAINED, ())
        if any(slower.values()):
            forward.original_calls = own.at(*([count for n in slower[mode] for count in NEAR[n]] for mode in MODES))
        modes = {mode: slower[mode] for mode in MODES} if len(set(slower.values())) > 1 else {"": slower[PLAIN]}
        for mode, tokens in modes.items():
            if tokens:
                left.setdefault((MODES[mode] if len(modes) > 1 else "", tokens), []).append(name)
    return [
        f"calls of {_in_words(tokens)}{mode} are left to the own code of {listed(names)}: timed on this machine it is "
        "the quicker there, and computes the same; a bundle saved of this model and ranks that it is divided over run "
        "the rewritten code at any size, and with MOEOPT_MEASURE=off so does the model itself"
        for (mode, tokens), names in left.items()
    ]


def _in_words(slower: tuple[int, ...]) -> str:
    ranges = list[range]()
    for near in (NEAR[tokens] for tokens in slower):
        if ranges and ranges[-1].stop == near.start:
            near = range(ranges.pop().start, near.stop)
        ranges.append(near)
    parts = [f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges]
    return f"{', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]} token{'s' * (slower != (1,))}"


def _happens(forward: RewrittenForward, mode: str) -> bool:
    """Whether the rewritten code runs calls of ``mode``, at another cost than without gradients.

    A frozen block records no call, except for the gradient of its tokens. A block with hooks on gradients, on its
    Parameters or modules, is not timed in training, because each backward pass would run the hooks.
    """
    guard, parameters = forward.program.guard, list(forward.module.parameters())
    if mode == PLAIN:
        return True
    if guard.gradients or guard.no_grad:
        return False
    if mode == TRAINED:
        tables = [p._backward_hooks for p in parameters] + [t for m in forward.module.modules() for t in hooks_of(m)]
        return guard.training is not False and not any(tables)
    return any(p.requires_grad for p in parameters)


def _slower(forward: RewrittenForward, call: ArgsKwargs, own: OriginalCalls, mode: str) -> list[int]:
    """The numbers of tokens at which the original code of the block is quicker, in a mode of ``MODES``."""
    block, module = forward.program.block, forward.module
    held = [*module.parameters(), *module.buffers()]
    numbers, device = sum(t.numel() for t in held), _device(held)
    if block.formats or block.mutations or device is None:
        return []
    more = ON_GPU if device.type == "cuda" else 1
    if numbers > LARGEST * more:
        return []
    found, kind, silent = list[int](), "", forward.silent
    forward.silent = True  # no warning for a number of tokens that is refused
    training = in_mode(module, mode == TRAINED or module.training)
    work = more * (WORK // 3 if mode == TRAINED else WORK)  # a backward pass multiplies twice as much
    try:
        with torch.inference_mode(False), RestoreState(module), buffers_kept(module), quiet(), training:
            for tokens in (n for n in NEAR if n * numbers <= work):
                try:
                    ((_, (args, kwargs)),) = sized_calls(call, (tokens,))
                    left = own.at((tokens,), (tokens,), (tokens,))
                    kind = kind or _kind(forward) + mode
                    question = f"{kind} on {tokens} tokens"
                    ways = functools.partial(_ways, forward, left, (args, kwargs), mode)
                    if fastest(question, ways, "rewritten", GAIN, device) == "own":
                        found.append(tokens)
                except Exception:  # a number of tokens that the block cannot take
                    continue
    finally:
        forward.silent = silent
    return found


def _device(held: list[Tensor]) -> torch.device | None:
    """The CPU or the one GPU that holds all tensors; None for other devices, which have no clock here."""
    devices = {t.device for t in held}
    return devices.pop() if len(devices) == 1 and all(d.type in ("cpu", "cuda") for d in devices) else None


def _kind(forward: RewrittenForward) -> str:
    """What decides the time of a call: the modules' code and configuration, the graph, the shapes of the weights."""
    module, block = forward.module, forward.program.block
    parts = [fingerprint(type(m).forward) for m in module.modules()]
    parts += [f"{p.dtype} {tuple(p.shape)} {p.stride()}" for p in module.parameters()]
    parts += [str(spec) for _, spec in block.weights]
    parts += [said for m in module.modules() for said in _values(m)]
    parts += [block.graph.python_code("self").src, str(module.training)]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return f"{type(module).__qualname__} {digest}, rewritten or its own code,"


def _values(module: nn.Module) -> list[str]:
    """The plain values of a module and of its configuration, by which a forward may choose an implementation."""
    config = vars(module).get("config")
    held = [vars(module), vars(config) if hasattr(config, "__dict__") else {}]
    plain = str, int, float, bool, type(None)
    return [f"{name}={value!r}" for one in held for name, value in sorted(one.items()) if isinstance(value, plain)]


def _ways(forward: RewrittenForward, left: OriginalCalls, call: ArgsKwargs, mode: str) -> dict[str, Way]:
    """The rewritten and the original code on the same call, repeated where one call is short.

    Raises:
        Declined: the rewritten code refuses the call, so that the original runs anyway; or the call is not left to it.
    """
    before = forward.fallbacks
    args, kwargs = call
    once_more = functools.partial(_step, forward, call) if mode == TRAINED else lambda: forward(*args, **kwargs)

    def calls(own: OriginalCalls | None, several: int) -> TimedCall:
        def run() -> None:
            forward.original_calls = own
            try:
                with torch.set_grad_enabled(mode != PLAIN):
                    for _ in range(several):
                        once_more()
            finally:
                forward.original_calls = None

        return run

    rewritten, own = calls(None, 1), calls(left, 1)
    for _ in range(2):  # the first call may build or measure a kernel
        started = time.perf_counter()
        rewritten()
        once = time.perf_counter() - started
    ran = forward.calls
    own()
    if forward.fallbacks != before or forward.calls != ran:
        raise Declined(forward.last_refusal or "the number of tokens is not that of its first argument")
    several = max(1, min(CALLS, round(TURN / max(once, 1e-6))))
    return {"rewritten": calls(None, several), "own": calls(left, several)}


def _step(forward: RewrittenForward, call: ArgsKwargs) -> None:
    """A call and its backward pass, to the tokens and the Parameters that require a gradient; no ``.grad`` is set."""
    args, kwargs = tree_map(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), call)
    results = [t for t in leaves_of(Tensor, forward(*args, **kwargs)) if t.requires_grad]
    wanted = [t for t in (*leaves_of(Tensor, (args, kwargs)), *forward.module.parameters()) if t.requires_grad]
    torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)
