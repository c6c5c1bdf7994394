"""The lowered blocks of a saved graph as JSON, and the way back from a lowering's weights to the experts'.

A lowering may stack, transpose, interleave and pad the experts' weights as it likes. To read them back, it is run
once more on a bank whose elements are numbers that say where they are, eight bits at a time (every float type
holds 0 to 255 exactly): what it writes for each of its weights then tells which element lies where. The result is
believed only if the lowering, run on the bank that was read back, writes the very weights that were saved.

Shape legend: E experts, K chosen per token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moeopt.bundle.values import DTYPES
from moeopt.errors import BundleError, Declined, UsageError
from moeopt.ir.element_bytes import element_bytes
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.lowerings.codes import is_quantized
from moeopt.ops.expert_weights import ListExpertWeights
from moeopt.value_types import PyObject

DIGITS = 5
"""Eight bits each: 2**40 elements of one block."""
ENDS = ("x", "ids", "weights", "y")


def describe(site: ExpertsNode, lowering: str, why: str) -> dict[str, Any] | None:
    """A site as JSON; None where its experts differ in size (then it cannot be written again)."""
    if isinstance(site.spec, RowFunction):
        sizes: dict[str, Any] = {"w_in": [], "w_out": [], "b_in": [], "b_out": False, "norm": False}
        return _common(site, lowering, why) | {"bank_dtype": _name(site.spec.body.dtype)} | sizes
    bank, every = site.bank, range(site.bank.num_experts)
    shown = range(1) if is_quantized(site) else every  # quantised ones are of one size, and are not made for that
    shapes = [[list(w.shape) for w in (*bank.w_in(e), bank.w_out(e))] for e in shown]
    if any(s != shapes[0] for s in shapes):
        return None
    return _common(site, lowering, why) | {
        "bank_dtype": _name(bank.dtype if is_quantized(site) else bank.w_out(0).dtype),
        "w_in": shapes[0][:-1],
        "w_out": shapes[0][-1],
        "b_in": [_which([bank.b_in(e)[i] for e in every]) for i in range(len(shapes[0]) - 1)],
        "b_out": _which([bank.b_out(e) for e in every]),
        "norm": _which([bank.norm(e) for e in every]),
    }


def _common(site: ExpertsNode, lowering: str, why: str) -> dict[str, Any]:
    return {
        "name": site.name,
        "lowering": lowering,
        "why": why,
        "spec": site.spec.encode(),
        "router": None if site.router is None else dataclasses.asdict(site.router),
        "experts": site.bank.num_experts,
        "top_k": site.top_k,
        "dtype": _name(site.dtype),
        "weights_dtype": _name(site.weights_dtype),
    }


def function_of(record: Mapping[str, Any]) -> RowFunction | None:
    """The function of a block whose experts have no matrices of their own in the record; None of any other block.

    ``BundleError`` for one that is none.
    """
    if record["w_out"]:
        return None
    try:
        return RowFunction.decode(record["spec"])
    except UsageError as err:
        raise BundleError(f"block {record.get('name')!r:.60}: {err}") from None


def blank_site(record: Mapping[str, Any], fill: Callable[[int, tuple[int, ...]], Tensor] | None = None) -> ExpertsNode:
    """The site that :func:`describe` described; its tensor n is ``fill(n, shape)``, zeros if None.

    ``BundleError`` for a record that no bundle holds.
    """
    try:
        dtype, E = DTYPES[record["bank_dtype"]], _size(record["experts"])
        tensors = 0

        def tensor(*shape: int) -> Tensor:
            nonlocal tensors
            tensors += 1
            return torch.zeros(shape, dtype=dtype) if fill is None else fill(tensors - 1, shape).to(dtype)

        def biases(which: PyObject, width: int) -> list[Tensor | None]:
            return [tensor(width) if (which if isinstance(which, bool) else which[e]) else None for e in range(E)]

        spec = ExpertsSpec.decode(record["spec"])
        w_in = [[tensor(*map(_size, shape)) for _ in range(E)] for shape in record["w_in"]]
        w_out = [tensor(*map(_size, record["w_out"])) for _ in range(E)]
        rows = 0 if spec.w_in_layout == "oi" else 1
        b_in = [biases(b, s[rows]) for b, s in zip(record["b_in"], record["w_in"], strict=True)]
        width = record["w_out"][0 if spec.w_out_layout == "oi" else 1]
        bank = ListExpertWeights(w_in, w_out, b_in, biases(record["b_out"], width), biases(record["norm"], width))
        router = None if record["router"] is None else RouterSpec(**record["router"])
        kinds = DTYPES[record["dtype"]], DTYPES[record["weights_dtype"]]
        return ExpertsNode(str(record["name"]), bank, spec, kinds[0], _size(record["top_k"]), kinds[1], router)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as err:
        raise BundleError(f"a block's record lacks or mistypes a part ({type(err).__name__}: {err})") from None


def read_back(record: Mapping[str, Any], lowering: Lowering, saved: Callable[[str], Tensor | None]) -> ExpertsNode:
    """The site with the weights that ``lowering`` wrote for it; ``saved`` gives an initializer by its name.

    ``Declined`` where they cannot be told: the lowering rounds or mixes them, or writes something else by now.
    """
    sizes: list[tuple[int, tuple[int, ...]]] = []
    total = 0

    def note(n: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal total
        sizes.append((total, shape))
        total += torch.Size(shape).numel()
        return torch.zeros(shape)

    blank_site(record, note)
    flat = torch.zeros(total, dtype=DTYPES[record["bank_dtype"]])
    found = torch.zeros(total, dtype=torch.bool)
    places = [_written(_digit_site(record, sizes, digit), lowering) for digit in range(DIGITS)]
    for name in places[0]:
        value = saved(name)
        if value is None:
            raise Declined(f"the graph has no weight {name}")
        address = torch.zeros(value.numel(), dtype=torch.int64)
        for digit, written in enumerate(places):
            part = written[name]().reshape(-1).double()
            if part.shape != address.shape or bool(((part != part.round()) | (part < 0) | (part > 255)).any()):
                raise Declined(f"{lowering.name} does not keep the experts' weights as they are in {name}")
            address += part.to(torch.int64) << (8 * digit)
        real = (address > 0) & (address <= total)
        flat[address[real] - 1] = value.reshape(-1)[real].to(flat.dtype)
        found[address[real] - 1] = True
    if not bool(found.all()):
        raise Declined(f"{lowering.name} does not hold every weight of the experts")
    site = blank_site(record, lambda n, shape: flat[sizes[n][0] : sizes[n][0] + torch.Size(shape).numel()].view(shape))
    for name, tensor in _written(site, lowering).items():
        value = saved(name)
        if value is None or value.dtype != (again := tensor()).dtype or not _same_bits(again, value):
            raise Declined(f"{lowering.name} would not write {name} as it is")
    return site


def emit(site: ExpertsNode, lowering: Lowering) -> Builder:
    """The nodes and weights that ``lowering`` writes for ``site``, on values that stand for its inputs."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import from_torch_dtype

    ends = (("x", site.dtype), ("ids", torch.int64), ("weights", site.weights_dtype))
    builder = Builder(site.name)
    lowering.emit(builder, site, *[ir.Value(name=n, type=ir.TensorType(from_torch_dtype(d))) for n, d in ends])
    return builder


def tensor_of(value: PyObject) -> Tensor:
    """An ``onnx_ir`` tensor as a torch tensor of the same dtype, copied."""
    from onnx_ir.tensor_adapters import to_torch_dtype

    array = value.numpy()
    dtype = to_torch_dtype(value.dtype)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view("int16").copy()).view(dtype)
    return torch.from_numpy(array.copy())


def _written(site: ExpertsNode, lowering: Lowering) -> dict[str, Callable[[], Tensor]]:
    """What the lowering writes, by name, each read when it is asked for; constants are left out."""
    import onnx_ir as ir

    values = [v for v in emit(site, lowering).initializers if isinstance(v.const_value, ir.LazyTensor)]
    return {value.name: functools.partial(tensor_of, value.const_value) for value in values}


def _digit_site(record: Mapping[str, Any], sizes: list[tuple[int, tuple[int, ...]]], digit: int) -> ExpertsNode:
    def fill(n: int, shape: tuple[int, ...]) -> Tensor:
        start = sizes[n][0] + 1  # 0 is what a lowering pads with
        address = torch.arange(start, start + torch.Size(shape).numel())
        return ((address >> (8 * digit)) & 255).view(shape)

    return blank_site(record, fill)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(element_bytes(a), element_bytes(b))


def _which(tensors: list[Tensor | None]) -> bool | list[bool]:
    there = [t is not None for t in tensors]
    return there[0] if len(set(there)) == 1 else there


def _size(value: PyObject) -> int:
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ValueError(f"{value!r} is no size")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
