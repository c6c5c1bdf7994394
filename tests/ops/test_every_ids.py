"""Ids that name every expert on each row are made once, and known however they are stored."""

import pytest
import torch

from moeopt.ops import every_ids as module
from moeopt.ops.every_ids import FEW, MOST, every_ids, is_kept, names_every
from moeopt.recognise.ids_of_masks import table_to_ids


@pytest.fixture(autouse=True)
def none_is_kept(monkeypatch):
    """What other tests hold as kept stays so."""
    monkeypatch.setattr(module, "_kept", {})


@pytest.mark.parametrize("T", (0, 1, 5, FEW))
def test_they_are_made_once(T):
    ids = every_ids(T, 3)
    assert ids.dtype is torch.int64 and ids.tolist() == [[0, 1, 2]] * T
    assert every_ids(T, 3) is ids and is_kept(ids) and not is_kept(ids.clone()) and not is_kept(ids[:, :2])


def test_they_may_be_kept_for_a_backward_whatever_is_on_when_they_are_made():
    module._kept.clear()
    with torch.inference_mode():
        ids = every_ids(2, 7)
    assert not ids.is_inference()
    module._kept.clear()
    with torch.device("meta"):
        assert every_ids(2, 7).is_cpu


def test_those_of_a_functional_transform_end_with_it():
    module._kept.clear()
    torch.func.grad(lambda x: (x * every_ids(2, 7)).sum())(torch.ones(2, 7))
    ids = every_ids(2, 7)
    assert not torch._C._functorch.is_gradtrackingtensor(ids) and ids.data_ptr() and is_kept(ids)


def test_not_too_many_sizes_are_kept():
    for T in range(3 * MOST):
        every_ids(T, 2)
        assert len(module._kept) <= MOST


@pytest.mark.parametrize("T", (1, 4, FEW))
@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
def test_they_are_known_however_they_are_stored(T, dtype):
    every = torch.arange(3, dtype=dtype)
    for ids in (every_ids(T, 3), every.expand(T, 3), every.repeat(T, 1), every.repeat(T, 2)[:, :3]):
        assert names_every(ids, 3) and not names_every(ids, 4) and not names_every(ids[:, :2], 3)
        assert not names_every(ids[:0], 3) and not names_every(ids.flip(1), 3)
    last = every.repeat(T, 1)
    last[-1, -1] = 3  # a weight of zero names no expert
    assert not names_every(last, 3)


@pytest.mark.parametrize("T", (1, 3, FEW))
def test_a_table_without_a_zero_makes_no_ids_anew(T, monkeypatch):
    table = torch.rand(T, 3) + 0.1
    ids = table_to_ids(table)
    monkeypatch.setattr(torch, "arange", lambda *args, **more: pytest.fail("made anew"))
    monkeypatch.setattr(torch, "where", lambda *args, **more: pytest.fail("made anew"))
    assert table_to_ids(table * 2) is ids is every_ids(T, 3)
    table[-1, -1] = float("nan")  # it is no zero, and must reach the result
    assert table_to_ids(table) is ids


@pytest.mark.parametrize("T", (1, 3, FEW))
@pytest.mark.parametrize("zero", (0.0, -0.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_a_zero_in_any_row_names_no_expert(T, zero, dtype):
    table = torch.full((T, 3), torch.finfo(dtype).tiny, dtype=dtype)
    table[-1, 1], table[-1, 2] = zero, float("nan")
    ids = table_to_ids(table)
    assert ids.tolist() == [[0, 1, 2]] * (T - 1) + [[0, 3, 2]] and ids.is_contiguous()
    assert every_ids(T, 3).tolist() == [[0, 1, 2]] * T, "what is kept was not written to"
