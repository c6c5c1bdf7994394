"""torch looks its composite ops up once in an export, and finds the same ones."""

import torch
from torch._export import utils
from torch.export import Dim

from moeopt.lower.functional import without_writes
from moeopt.patches import composites_listed_once

LOOKED = []


def counted(monkeypatch):
    theirs = utils._materialize_cpp_cia_ops
    LOOKED.clear()
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", lambda: (LOOKED.append(1), theirs()))


def test_the_same_ops_from_one_look(monkeypatch):
    want = utils._collect_all_valid_cia_ops()
    counted(monkeypatch)
    utils._collect_all_valid_cia_ops()
    assert len(LOOKED) > 1, "what the patch is for"
    LOOKED.clear()
    with composites_listed_once():
        assert utils._collect_all_valid_cia_ops() == want
        assert utils._collect_all_valid_cia_ops() == want
    assert len(LOOKED) == 1


def test_each_time_anew(monkeypatch):
    """Ops may be registered in between."""
    counted(monkeypatch)
    for _ in range(2):
        with composites_listed_once():
            utils._collect_all_valid_cia_ops()
    assert len(LOOKED) == 2


def test_a_program_is_decomposed_as_without(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x.reshape(-1, 4), torch.ones(3, 4)).softmax(-1).relu_()

    def program():
        return torch.export.export(Model(), (torch.ones(2, 5, 4),), dynamic_shapes=({1: Dim.AUTO},), strict=False)

    want = program().run_decompositions({})
    counted(monkeypatch)
    got = without_writes(program())
    assert len(LOOKED) == 1 and str(got.graph) == str(want.graph)
