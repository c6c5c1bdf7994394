"""The bytes of a tensor's elements, whatever its strides are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moeopt
from moeopt.ir.element_bytes import element_bytes

_ROW = torch.arange(6.0)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.0).expand(1),
        _ROW.view(2, 3)[1:, 2],  # one number, with the stride of a row
        _ROW.view(2, 3).t(),
        torch.empty(0, 3),
        torch.tensor(True).expand(1, 1),
        torch.view_as_complex(_ROW.view(3, 2)).conj(),
        torch.tensor(3, dtype=torch.bfloat16),
    ],
    ids=["expanded", "slice", "transposed", "empty", "bool", "conjugate", "scalar"],
)
def test_bytes_are_those_of_the_elements_in_order(tensor: torch.Tensor) -> None:
    got = element_bytes(tensor)
    assert (got.dtype, got.dim()) == (torch.uint8, 1)
    assert (
        got.numpy().tobytes()
        == bytes(tensor.resolve_conj().contiguous().untyped_storage())[
            tensor.contiguous().storage_offset() * tensor.itemsize :
        ][: tensor.numel() * tensor.itemsize]
    )


class OneNumber(nn.Module):
    """A threshold that is a slice of a table: one element, whose stride is a row's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.arange(10.0).view(1, 10)[:, 3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.least


def test_a_bundle_holds_one_number_of_any_stride(tmp_path: Path) -> None:
    model, x = OneNumber().eval(), torch.randn(3, 8)
    moeopt.optimize(model, x, verify="off").save(tmp_path / "bundle")
    assert torch.equal(moeopt.load(tmp_path / "bundle")(x), x + 3)


def test_nothing_else_reads_elements_as_bytes() -> None:
    places = Path(moeopt.__file__).parent.rglob("*.py")
    assert [p.name for p in places if ".contiguous().reshape(-1).view(torch.uint8)" in p.read_text()] == []
