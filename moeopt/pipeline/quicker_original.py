"""At which numbers of tokens is a rewritten block slower than its own code on this machine? There its own code runs.

A small block that is a few calls of PyTorch on stacked weights has nothing to group at one token, and what Python takes
around the op is not won back; on hundreds of tokens that every expert takes, the library's one long product may be the
quicker. The same block gains where it has other sizes. So each kind of block is timed beside its own code at a few
numbers of tokens (``ops.measured``: milliseconds, once, remembered), and the calls near those at which its own code is
the quicker are left to it: they were the yardstick of the verification, so they need none. Ties, and machines that may
not be timed, run the rewritten code.

A model that runs without ``torch.no_grad()`` records every call, which costs both ways something else, so that is asked
by itself. And a backward pass may follow or not, which no call can know: one in training mode is timed with it, one in
evaluation mode without. A block on a GPU is timed by the GPU's own events.
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

NEAR = {1: range(1, 2), 8: range(2, 17), 64: range(17, 129), 512: range(129, 513)}
"""The numbers of tokens that are timed, and those for which each stands. Longer prompts run the rewritten code: an own
code may hold the outputs of all experts for each token."""
LARGEST = 1 << 24
"""Weights of a block from which its calls are made of products and not of what is around them: it is not timed."""
WORK = 1 << 29
"""Multiply-adds of all experts on all tokens above which a number of tokens is not timed: some milliseconds a call."""
ON_GPU = 1 << 8
"""How many times as large both may be on a GPU: about what one reads and multiplies more than a core in that time."""
TURN = 1e-3
"""Seconds that a turn of one way takes at least, of up to ``CALLS`` calls."""
CALLS = 16
GAIN = 1.03
"""By how much the own code must be the quicker, with what it takes to see that a call is left to it."""
PLAIN, RECORDED, TRAINED = "", " recorded,", " trained,"
MODES = {PLAIN: " under torch.no_grad()", RECORDED: " outside of torch.no_grad()", TRAINED: " in training"}
"""The modes in which a call is timed, as a question and as a note name them."""


def choose_original_calls(model: nn.Module, outcome: PipelineResult) -> list[str]:
    """Leave calls of the rewritten blocks of ``model`` to their own code where that is the quicker; a note of each."""
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
    ranges = [NEAR[tokens] for tokens in slower]
    parts = [f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges]
    return f"{', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]} token{'s' * (slower != (1,))}"


def _happens(forward: RewrittenForward, mode: str) -> bool:
    """Whether there are such calls, that cost something else than those without gradients.

    Those that the original answers are none. Of a frozen block no call is recorded, but for its tokens' gradient. A
    block with hooks on gradients, of its Parameters or modules, is not timed in training: each backward pass runs them.
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
    """The numbers of tokens at which the own code of the block is the quicker, in a mode of ``MODES``."""
    block, module = forward.program.block, forward.module
    held = [*module.parameters(), *module.buffers()]
    numbers, device = sum(t.numel() for t in held), _device(held)
    if block.formats or block.mutations or device is None:
        return []
    more = ON_GPU if device.type == "cuda" else 1
    if numbers > LARGEST * more:
        return []
    found, kind, silent = list[int](), "", forward.silent
    forward.silent = True  # a number of tokens that is refused is no news
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
    """The CPU or the one GPU that all tensors are on; None of others, whose time no clock here tells."""
    devices = {t.device for t in held}
    return devices.pop() if len(devices) == 1 and all(d.type in ("cpu", "cuda") for d in devices) else None


def _kind(forward: RewrittenForward) -> str:
    """What decides the time of both ways: code and configuration of the modules, the graph, the weights' shapes."""
    module, block = forward.module, forward.program.block
    parts = [fingerprint(type(m).forward) for m in module.modules()]
    parts += [f"{p.dtype} {tuple(p.shape)} {p.stride()}" for p in module.parameters()]
    parts += [str(spec) for _, spec in block.weights]
    parts += [said for m in module.modules() for said in _values(m)]
    parts += [block.graph.python_code("self").src, str(module.training)]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return f"{type(module).__qualname__} {digest}, rewritten or its own code,"


def _values(module: nn.Module) -> list[str]:
    """The plain values of a module and of its configuration: one forward may run several implementations by them."""
    config = vars(module).get("config")
    held = [vars(module), vars(config) if hasattr(config, "__dict__") else {}]
    plain = str, int, float, bool, type(None)
    return [f"{name}={value!r}" for one in held for name, value in sorted(one.items()) if isinstance(value, plain)]


def _ways(forward: RewrittenForward, left: OriginalCalls, call: ArgsKwargs, mode: str) -> dict[str, Way]:
    """Both on the same call, several times where one is short.

    Raises:
        Declined: the rewritten code refuses the call, so its own code runs anyway; or no such call is left to it.
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
    for _ in range(2):  # the first builds or measures what the second only calls
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
    """A call and its backward pass, to the tokens and to the Parameters that want a gradient; none is stored."""
    args, kwargs = tree_map(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), call)
    results = [t for t in leaves_of(Tensor, forward(*args, **kwargs)) if t.requires_grad]
    wanted = [t for t in (*leaves_of(Tensor, (args, kwargs)), *forward.module.parameters()) if t.requires_grad]
    torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)
