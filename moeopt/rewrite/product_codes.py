"""A module that computes one product with a weight, with codes and scales in place of the weight's floats.

    y = x W^T (+ b)      W (N out, K in) means codes * scales

Whether a module is one is read off what it does (:func:`product_of`): its call is one product of its input and its one
matrix, on ATen's record and in numbers. While a model is traced for an engine the product is one node,
``moeopt::LinearCodes``, that reads the codes; else the weight is made float for the call.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.isolated_run import undone
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.options.quant_plan import NEAREST
from moeopt.rewrite.expert_rows import OneExpertsRows
from moeopt.rewrite.rounded_matrix import rounded_matrix
from moeopt.value_types import PyObject

DOMAIN, OP = "moeopt", "LinearCodes"
_PRODUCTS = {"addmm", "mm", "linear", "matmul", "bmm"}
_MOVES = {"t", "transpose", "permute", "view", "_unsafe_view", "reshape", "expand", "detach", "alias", "unsqueeze"}
_SCALES = (1.0, 1024.0, 2.0**-10)
"""Of the inputs that a product is asked with: a product's answers grow as they do."""
_ROUNDING = 64
"""Roundings, in eps of a row's length, between a module's product and the plain one."""


@dataclass(frozen=True)
class ModuleProduct:
    """A module's one matrix and its bias.

    Attributes:
        weight: the name of its Parameter.
        bias: that of the bias; "" where there is none.
        turned: whether the Parameter is (K in, N out).
    """

    weight: str
    bias: str
    turned: bool


def product_of(module: nn.Module) -> ModuleProduct | None:
    """How ``module`` computes one product and nothing else; None where it does not."""
    held = {name: p for name, p in module.named_parameters(recurse=False)}
    matrices = [name for name, p in held.items() if p.dim() == 2 and p.is_floating_point()]
    vectors = [name for name, p in held.items() if p.dim() == 1]
    if len(matrices) != 1 or len(held) != 1 + len(vectors) or len(vectors) > 1:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers(recurse=False)):
        return None
    w = held[matrices[0]]
    if not w.numel() or w.is_meta or type(w.data) is not Tensor:
        return None
    for turned in (False, True):
        found = ModuleProduct(matrices[0], vectors[0] if vectors else "", turned)
        if _computes(module, found, w.shape[0 if turned else 1]):
            return found
    return None


def _computes(module: nn.Module, found: ModuleProduct, K: int) -> bool:
    w, b = getattr(module, found.weight), getattr(module, found.bias) if found.bias else None
    if b is not None and b.shape[0] != w.shape[1 if found.turned else 0]:
        return False
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, K, generator=rng).to(w)
    with torch.no_grad():
        for scale in _SCALES:
            rows = x * scale
            want = F.linear(rows, w.t() if found.turned else w, b)
            with undone(module) as watched, _Ops() as ops, watched:
                try:
                    got = module(rows)
                except Exception:  # of the module's own: it does not take a row of K numbers
                    return False
            if not isinstance(got, Tensor) or got.shape != want.shape or not ops.are_of_a_product:
                return False
            if not _same(got, want, _ROUNDING * torch.finfo(w.dtype).eps):
                return False
    return True


def _same(got: Tensor, want: Tensor, eps: float) -> bool:
    """Whether rows are equal but for ``eps`` of their length, and no numbers in the same places."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    got, want = ((t * finite).nan_to_num().double() for t in (got, want))
    return bool(((got - want).norm(dim=-1) <= eps * want.norm(dim=-1)).all())


class _Ops(TorchDispatchMode):
    """The names of the ATen ops that run while it is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: PyObject, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def are_of_a_product(self) -> bool:
        """Whether they are one product, at most one sum, and what moves no number."""
        rest = [name for name in self.names if name not in _MOVES]
        products = [name for name in rest if name in _PRODUCTS]
        return len(products) == 1 and sorted(set(rest) - set(products)) in ([], ["add"]) and len(rest) <= 2


class CodesProduct(nn.Module):
    """The product of a module on codes.

    Args:
        module, product: whose product, and where it holds what.
        format: what the weight is rounded to.
        name: what messages call it.
        method, rows: how, and what the weight is multiplied with on calibration data (``rewrite/rounded_matrix``).

    Raises:
        UsageError: the weight holds NaN or infinity.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, module: nn.Module, product: ModuleProduct, format: WeightFormat, name: str, method: str = NEAREST,
        rows: OneExpertsRows | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        held = getattr(module, product.weight)
        w_NK = held.detach().t() if product.turned else held.detach()
        made = rounded_matrix(w_NK, format, f"the weight of {name}", method, rows)
        assert made.scales is not None and made.zeros is None, "formats of products are symmetric and have scales"
        self.register_buffer("codes", made.codes)
        self.register_buffer("scales", made.scales)
        self.register_parameter("bias", getattr(module, product.bias) if product.bias else None)
        self.format, self.size, self.dtype, self.turned = format, made.shape, held.dtype, product.turned
        self.training = module.training
        for name, value in vars(module).items():  # what the code around it asks of it, like in_features
            if not name.startswith("_") and name not in vars(self):
                self.__dict__[name] = value

    @property
    def held(self) -> QuantizedWeight:
        """The weight (N, K) as codes."""
        return QuantizedWeight(self.codes, self.scales, None, self.format, self.size)

    @property
    def weight(self) -> Tensor:
        """The floats that the codes mean, as the module had them: what asks for a dtype or a device reads this."""
        w_NK = self.held.dequantize(self.dtype)
        return w_NK.t() if self.turned else w_NK

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.linear(input, self.held.dequantize(self.dtype), self.bias)
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}",
            (input, self.codes, self.scales),
            {"format": self.format.encode(), "inputs": self.size[1]},
            dtype=input.dtype,
            shape=(*input.shape[:-1], self.size[0]),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def on_floats(module: nn.Module, product: ModuleProduct, codes: CodesProduct) -> nn.Module:
    """A copy of ``module`` whose own code computes with the floats that ``codes`` means."""
    other = copy.copy(module)
    floats = codes.weight.contiguous()
    other.__dict__["_parameters"] = {
        **module._parameters, product.weight: nn.Parameter(floats, requires_grad=False)
    }  # fmt: skip
    return other
