"""One call of the kernel: tensors become the pointers, sizes and strides of its C interface, where they lie.

Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate, D out.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights, how_they_lie
from moeopt.ops.native.hidden import Hidden
from moeopt.ops.native.matrices import ABSENT, FLOATS, NO_MATRIX, KernelWeight, matrix, plain, vector
from moeopt.ops.quantized_bank import QuantizedExpertWeights, rounds_rows
from moeopt.ops.reference import dtypes
from moeopt.ops.unfit import Unfit

ABI = 6
INTEGERS = {torch.int32: 3, torch.int64: 4}
_ROWS = ("gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain")
NATIVE_ACTIVATIONS = (
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "swish", "softcap", "identity", "leaky_relu",
    "elu", "mish", "softplus",
)  # fmt: skip
"""The activations of the kernel, in the order of ``moeopt_activation`` in its header."""
_LIMITS = ("gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max")
ADDRESSES = (7, 11, 15, 19)
"""Which words of a ``moeopt_call`` are the addresses of x, ids, weights and y."""

NativeRun = Callable[[ctypes.c_void_p], int]
"""Takes the address of a ``moeopt_call``, and gives its status."""
CallWords = tuple["array[int]", "array[int] | None", tuple[int, ...], int]
"""Of ``moeopt_expert``: the entries, which expert has which, the steps between stacked ones, and D."""


class _Spec(ctypes.Structure):
    _fields_ = [
        ("whole", ctypes.c_int64 * 12),
        ("alpha", ctypes.c_double), ("limits", ctypes.c_double * 6),
        ("up_offset", ctypes.c_double), ("norm_eps", ctypes.c_double),
    ]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def encode_spec(spec: ExpertsSpec, x: torch.dtype, weights: torch.dtype, rounds: bool = False) -> _Spec:
    """``moeopt_spec`` for inputs of these dtypes; :class:`Unfit` where no kernel has them together.

    Args:
        rounds: whether both products read rows of 8 bits.
    """
    compute = getattr(torch, spec.compute_dtype) if spec.compute_dtype else x
    out = getattr(torch, spec.out_dtype) if spec.out_dtype else x
    act = getattr(torch, spec.act_dtype) if spec.act_dtype else compute
    accum = getattr(torch, spec.accum_dtype) if spec.accum_dtype else out
    all_five = x, compute, act, accum, out
    names = "x", "compute", "activation", "accumulator", "output", "routing weights"
    for name, dtype in zip(names, (*all_five, weights), strict=True):
        if dtype not in FLOATS:
            raise Unfit(f"the {name} dtype is {str(dtype).removeprefix('torch.')}; the kernel has 16, 32 and 64 bits")
    if torch.float64 in (x, weights, *all_five) and {x, *all_five} != {torch.float64}:
        raise Unfit("float64 stands beside another dtype; the kernel has it by itself, but for the routing weights")
    if spec.activation not in NATIVE_ACTIVATIONS:
        raise Unfit(f"the kernel has no activation {spec.activation}; it has {', '.join(NATIVE_ACTIVATIONS)}")
    limits = [getattr(spec, name) for name in _LIMITS]
    bits = sum(1 << i for i, limit in enumerate(limits) if limit is not None)
    # torch converts a limit to the dtype that it clamps in
    as_act = functools.partial(torch.tensor, dtype=act, device="cpu")
    rounded = [0.0 if limit is None else as_act(limit).item() for limit in limits]
    whole = (
        _ROWS.index(spec.rows), NATIVE_ACTIVATIONS.index(spec.activation), bits, spec.weight_on == "input",
        spec.out_of_range == "identity", spec.combine == "expert", spec.out_norm_eps is not None,
        FLOATS[compute], FLOATS[act], FLOATS[accum], FLOATS[torch.promote_types(compute, weights)], rounds,
    )  # fmt: skip
    return _Spec((ctypes.c_int64 * 12)(*map(int, whole)), spec.alpha or 0.0, (ctypes.c_double * 6)(*rounded),
                 spec.up_offset, spec.out_norm_eps or 0.0)  # fmt: skip


def transformed() -> bool:
    """Whether a functional transform or forward-mode differentiation is at work, which must see torch's own ops."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class Prepared(NamedTuple):
    """A ``moeopt_call``, what its words point to but for x, ids, weights and y, and whether it has every expert."""

    words: array[int]
    held: tuple[_Spec, array[int], object]
    whole: bool


def call(
    run: NativeRun, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec, isa: int
) -> Tensor:
    """``experts_reference``, by the kernel ``run``; arguments are checked already (``ops.reference.check``).

    Raises:
        Unfit: what the kernel does not take; nothing was computed.
    """
    return prepared_call(run, x, ids, weights, bank, spec, isa)[0]


def prepared_call(
    run: NativeRun, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec, isa: int,
    known: dict[Any, Any] | None = None, hidden: Hidden | None = None,
) -> tuple[Tensor, Prepared]:  # fmt: skip
    """As :func:`call`; and the words of the call.

    Args:
        known: what was worked out before of the weights of this bank, which lie as they lay then and are kept alive.
        hidden: where what a backward pass reads is to be kept.
    """
    if transformed():
        raise Unfit("a functional transform (torch.func) or forward-mode differentiation is at work")
    encoded = encode_spec(spec, x.dtype, weights.dtype, rounds_rows(bank))
    if ids.dtype not in INTEGERS:
        ids = ids.to(torch.int64)
    for t in (x, ids, weights):
        plain(t)
    (T, K), E, H = ids.shape, bank.num_experts, x.shape[1]
    held: list[KernelWeight] = []
    entries, index, steps, D = _experts(bank, ids, spec, held, known)
    y = x.new_empty(T, D, dtype=dtypes(x, spec)[2])
    words = array("q", (
        ABI, ctypes.addressof(encoded), T, K, E, H, D,
        x.data_ptr(), FLOATS[x.dtype], *x.stride(),
        ids.data_ptr(), INTEGERS[ids.dtype], *ids.stride(),
        weights.data_ptr(), FLOATS[weights.dtype], *weights.stride(),
        y.data_ptr(), FLOATS[y.dtype],
        entries.buffer_info()[0], index.buffer_info()[0] if index else 0, *steps,
        torch.get_num_threads(), isa, 0, 0,
    ))  # fmt: skip
    rows = None if hidden is None else hidden.place(words, x, spec, entries)
    status = run(ctypes.c_void_p(words.buffer_info()[0]))
    if status == 2:
        raise MemoryError(f"experts: no memory for {T * K} rows of {H} and {D} numbers")
    if status:
        raise Unfit("the weights' shapes do not fit one another")
    if hidden is not None:
        hidden.rows = rows
    return y, Prepared(words, (encoded, entries, index), index is None or -1 not in index)


def _experts(
    bank: ExpertWeights, ids: Tensor, spec: ExpertsSpec, held: list[KernelWeight], known: dict[Any, Any] | None
) -> CallWords:
    """The entries of ``moeopt_expert``, which expert has which, the steps between stacked ones, and D."""
    stacked = bank.stacked()
    if stacked is not None:
        whole = [*stacked.w_in_s, stacked.w_out_s, *stacked.b_in_s, stacked.b_out_s, stacked.norm_s]
        present = [t for t in whole if t is not None]
        held += present
        last = stacked.known
        now = how_they_lie(present)
        if last is not None and last[0] is spec and last[1] == now:
            return cast(CallWords, last[2])
        found = _stack(whole, spec)
        stacked.known = spec, now, found
        return found
    if known is not None:
        words = known.get(spec, ())  # looked up once: another thread may clear what is known
        if words == ():
            words = known[spec] = _of_all(bank, spec)
        if words is not None:
            return cast(CallWords, words)
    return _listed(
        bank, sorted(set(ids.flatten().tolist())) if ids.numel() <= 4096 else ids.unique().tolist(), spec, held
    )


def _of_all(bank: ExpertWeights, spec: ExpertsSpec) -> CallWords | None:
    try:
        return _listed(bank, range(bank.num_experts), spec, [])
    except Unfit:  # of one that no token may reach
        return None


def _listed(bank: ExpertWeights, experts: Iterable[int], spec: ExpertsSpec, held: list[KernelWeight]) -> CallWords:
    """The entries of those ``experts`` that the bank has."""
    E = bank.num_experts
    index, entries, D = array("q", [-1]) * E, array("q"), 0
    for e in experts:
        if not 0 <= e < E:
            continue
        entry, width = _entry_of(bank, e, spec, held)
        if D and width != D:
            raise Unfit("the experts' outputs differ in width")
        index[e], D = len(entries) // len(entry), width
        entries += entry
    if not D:
        raise Unfit("no expert is named")
    return entries, index, (0,) * 7, D


def _entry_of(bank: ExpertWeights, e: int, spec: ExpertsSpec, held: list[KernelWeight]) -> tuple[array[int], int]:
    """The entry of expert ``e``, and its D; worked out anew where its weights do not lie as they lay the last time."""
    lies_alone = getattr(bank, "lies_alone", None)
    now = None if lies_alone is None else lies_alone(e)
    entries: dict[int, tuple[ExpertsSpec, object, tuple[array[int], int]]] = getattr(bank, "entries", {})
    if now is not None:
        lie, tensors = now
        known = entries.get(e)
        if known is not None and known[0] is spec and known[1] == lie:
            held += tensors  # they live until the kernel has read them
            return known[2]
    ins: tuple[KernelWeight, ...]
    out: KernelWeight
    ins, out = bank.codes(e) if isinstance(bank, QuantizedExpertWeights) else (bank.w_in(e), bank.w_out(e))
    found = _entry([*ins, out, *bank.b_in(e), bank.b_out(e), bank.norm(e)], spec, held, rounds_rows(bank))
    if now is not None:
        entries[e] = spec, now[0], found
    return found


def _stack(whole: list[Tensor | None], spec: ExpertsSpec) -> CallWords:
    """What :func:`_experts` says of stacked weights, for any ids."""
    entry, D = _entry([t if t is None else t[0] for t in whole], spec, [])
    steps = [0 if t is None else t.stride(0) * t.itemsize for t in whole]
    if len(whole) == 5:  # one w_in
        steps.insert(1, 0)  # no second w_in
        steps.insert(4, 0)  # nor b_in
    return entry, None, tuple(steps), D


def _entry(
    parts: Sequence[KernelWeight | None], spec: ExpertsSpec, held: list[KernelWeight], rounds: bool = False
) -> tuple[array[int], int]:
    """One ``moeopt_expert`` as its words, and its D; ``parts``: w_in, w_out, b_in, b_out, norm; one or two ins."""
    pair = len(parts) == 7
    if pair != (spec.rows == "separate"):
        raise Unfit("the number of first matrices is not that of the spec")
    w_in, w_out = parts[: 1 + pair], parts[1 + pair]
    b_in, (b_out, norm) = parts[2 + pair : 3 + 2 * pair], parts[-2:]
    words, widths = list[int](), list[int]()
    for w, layout in (*((w, spec.w_in_layout) for w in w_in), (w_out, spec.w_out_layout)):
        entry = matrix(w, layout, rounds)
        widths.append(entry[2])
        words += entry
        if not pair and w is w_in[0]:
            words += NO_MATRIX
    for b, width in (*zip(b_in, widths, strict=False), (b_out, widths[-1]), (norm, widths[-1])):
        words += vector(b, width)
        if not pair and b is b_in[0] and len(words) == 3 * len(NO_MATRIX) + len(ABSENT):
            words += ABSENT
    held += [t for t in parts if t is not None]
    return array("q", words), widths[-1]
