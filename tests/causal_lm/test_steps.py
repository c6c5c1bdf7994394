"""Which mixers may share a graph: those that differ in their weights only."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

from moeopt.causal_lm.program import operations
from moeopt.causal_lm.steps import SIZES, MixerKind
from tests.causal_lm.hybrids import TWICE, found, mixer_of


def kind_of(mixer):
    """A kind without its graphs, which cost seconds and which ``holds`` does not read."""
    kind = object.__new__(MixerKind)
    kind.mixer = mixer
    return kind


def twin(mixer):
    mixer = copy.copy(mixer)
    mixer.module = copy.deepcopy(mixer.module)
    return mixer


def test_two_layers_with_other_weights_share():
    one, two = found(TWICE.build())
    assert not torch.equal(one.module.in_proj.weight, two.module.in_proj.weight)
    assert one.module.layer_idx != two.module.layer_idx
    assert kind_of(one).holds(two) and kind_of(two).holds(one)


def test_an_attribute_that_is_a_number_keeps_them_apart():
    mixer = mixer_of("qwen3_next")
    other = twin(mixer)
    assert kind_of(mixer).holds(other)
    other.module.norm.variance_epsilon = 0.1
    assert not kind_of(mixer).holds(other)


def test_what_no_setting_tells_but_the_numbers_keeps_them_apart():
    mixer = mixer_of("jamba")
    other = twin(mixer)
    inner = other.module.out_proj
    inner.forward = lambda x: F.linear(x, inner.weight, inner.bias)
    assert kind_of(mixer).holds(other)
    inner.forward = lambda x: F.linear(x, inner.weight, inner.bias) * 1.001
    assert not kind_of(mixer).holds(other)


def test_another_class_or_another_size_keeps_them_apart():
    jamba, qwen = mixer_of("jamba"), mixer_of("qwen3_next")
    assert not kind_of(jamba).holds(qwen)
    wider = twin(qwen)
    wider.module = wider.module.double()
    assert not kind_of(qwen).holds(wider)


@pytest.mark.parametrize(("name", "fixed"), [("jamba", False), ("qwen3_next", False), ("nemotron_h", True)])
def test_programs_that_unroll_a_loop_are_told_by_their_operations(name, fixed):
    mixer = mixer_of(name)
    assert (operations(mixer, SIZES[0]) == operations(mixer, SIZES[1])) is fixed
