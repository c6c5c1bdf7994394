"""Files whose experts are named by an input beside the rows, give one number each, or have slots: rewritten."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import moeopt
from tests.zoo import CASES

H, I, E = 16, 24, 4


class Towers(nn.Module):
    """A tower of each domain scores the rows of it; rows of no domain get 0. (T, H), (T,) -> (T, 1)."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, 1)) for _ in range(E))

    def forward(self, x, domain):
        y = torch.zeros_like(x[:, :1])
        for number, tower in enumerate(self.towers):
            y = self.add(y, tower(x), (domain == number)[:, None])
        return y.sigmoid()

    def add(self, y, score, own):
        return y + own.float() * score


class TowersTaken(Towers):
    def add(self, y, score, own):
        return torch.where(own, score, y)


def exported(model, inputs, path, exporter):
    names = [f"in{n}" for n in range(len(inputs))]
    if exporter == "dynamo":
        free = tuple({d: torch.export.Dim.DYNAMIC for d in range(max(1, x.dim() - 1))} for x in inputs)
        torch.onnx.export(
            model, inputs, path, dynamo=True, dynamic_shapes=free, input_names=names, verbose=False, external_data=False
        )
    else:
        free = {n: {d: f"{n}_{d}" for d in range(max(1, x.dim() - 1))} for n, x in zip(names, inputs, strict=True)}
        torch.onnx.export(model, inputs, path, dynamo=False, input_names=names, dynamic_axes=free, opset_version=17)
    return str(path)


def check(path, example, others):
    """The one block of the file is rewritten, and other inputs give what ONNX Runtime makes of the file."""
    fast = moeopt.optimize(path, {f"in{n}": x for n, x in enumerate(example)}, verify="fast")
    (block,) = fast.report.blocks
    assert (block.status, block.experts) == ("rewritten", E), block.reason
    session = onnxruntime.InferenceSession(path)
    for inputs in others:
        feeds = {f"in{n}": x for n, x in enumerate(inputs)}
        (want,) = session.run(None, {name: x.numpy() for name, x in feeds.items()})
        np.testing.assert_allclose(fast(**feeds).numpy(), want, rtol=1e-4, atol=1e-5)


def of_domains(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator), torch.randint(E + 1, (count,), generator=generator)


@pytest.mark.parametrize(
    ("cls", "exporter"),
    [
        (Towers, "torchscript"),
        (TowersTaken, "dynamo"),
        pytest.param(Towers, "dynamo", marks=pytest.mark.nightly),
        pytest.param(TowersTaken, "torchscript", marks=pytest.mark.nightly),
    ],
)
def test_masks_of_an_input_beside_the_rows_are_read_with_it(cls, exporter, tmp_path):
    torch.manual_seed(0)
    path = exported(cls().eval(), of_domains(16, 0), tmp_path / "towers.onnx", exporter)
    check(path, of_domains(16, 0), [of_domains(3, 1), of_domains(1, 2), of_domains(40, 3)])


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        ("scores_without_an_axis", "dynamo"),
        ("capacity_mesh_with_few_slots", "torchscript"),
        ("chosen_by_the_norm_and_computed_again", "dynamo"),  # three products: chains of two pairs with one region
        pytest.param("scores_without_an_axis", "torchscript", marks=pytest.mark.nightly),
        pytest.param("capacity_mesh_with_few_slots", "dynamo", marks=pytest.mark.nightly),
    ],
)
def test_a_form_of_the_zoo(name, exporter, tmp_path):
    case = CASES[name]
    path = exported(case.build(), case.inputs()[0], tmp_path / "form.onnx", exporter)
    check(path, case.inputs()[0], [case.fresh(i)[0] for i in range(1, 4)])
