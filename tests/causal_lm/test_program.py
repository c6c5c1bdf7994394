"""The two programs of a mixer, checked against each other."""

import copy

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

from moeopt.causal_lm.program import MixerProgram, check_steps, sized, weights_of
from moeopt.errors import Declined
from tests.causal_lm.hybrids import mixer_of


@pytest.mark.parametrize(("name", "goes_on"), [("jamba", False), ("qwen3_next", True)])
def test_says_whether_many_tokens_go_on_from_a_state(name, goes_on):
    mixer = mixer_of(name)
    before = {key: tensor.clone() for key, tensor in mixer.module.state_dict().items()}
    assert check_steps(mixer) is goes_on
    assert all(torch.equal(tensor, before[key]) for key, tensor in mixer.module.state_dict().items())


def changed(mixer, how):
    """The mixer with ``how(result)`` for a single token."""
    mixer = copy.copy(mixer)
    mixer.module = copy.deepcopy(mixer.module)
    kind = type(mixer.module)

    def forward(self, hidden_states, *args, **kwargs):
        result = kind.forward(self, hidden_states, *args, **kwargs)
        return how(self, result) if hidden_states.shape[1] == 1 else result

    mixer.module.__class__ = type(f"Changed{kind.__name__}", (kind,), {"forward": forward})
    return mixer


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("jamba", 1.001),
        ("qwen3_next", -1.0),
        pytest.param("jamba", -1.0, marks=pytest.mark.nightly),
        pytest.param("qwen3_next", 1.001, marks=pytest.mark.nightly),
    ],
)
def test_declines_where_one_token_is_computed_in_another_way(name, by):
    harmed = changed(mixer_of(name), lambda module, result: result * by)
    text = (
        r"^model\.layers\.0\.\w+ computes something else for one token than for several \(apart by \d\.\de[+-]\d+ of "
        r"the largest value\), and how much it computes for several depends on their number, so that one graph cannot"
    )
    with pytest.raises(Declined, match=text):
        check_steps(harmed)


def test_declines_where_only_the_state_differs():
    mixer = mixer_of("qwen3_next")
    kind = type(mixer.module)

    def forward(self, hidden_states, *args, **kwargs):
        result = kind.forward(self, hidden_states, *args, **kwargs)
        (cache,) = [given for given in (*args, *kwargs.values()) if hasattr(given, "layers")]
        if hidden_states.shape[1] == 1:
            cache.layers[0].recurrent_states[0].mul_(1.001)
        return result

    harmed = changed(mixer, lambda module, result: result)
    harmed.module.__class__ = type("Forgets", (kind,), {"forward": forward})
    with pytest.raises(Declined, match="computes something else for one token"):
        check_steps(harmed)


@torch.no_grad()
def test_a_program_reads_the_weights_and_states_that_it_is_given():
    mixer = mixer_of("qwen3_next")
    weights, (tokens, states) = [t for _, t in weights_of(mixer)], mixer.sample()
    program = MixerProgram(mixer)
    want = program(weights, tokens, states)
    assert [tuple(t.shape) for t in want[1:]] == [tuple(t.shape) for t in states]
    for number, held in enumerate(states):
        other = [held * 2 if n == number else state for n, state in enumerate(states)]
        assert not torch.equal(program(weights, tokens, other)[0], want[0])
    doubled = program([w * 2 for w in weights], tokens, states)[0]
    assert not torch.equal(doubled, want[0])
    assert all(map(torch.equal, program(weights, tokens, states), want))  # nothing of a call stays


def test_tokens_are_repeated_or_cut():
    x = torch.arange(6.0).reshape(2, 3, 1)
    assert torch.equal(sized([x], 2)[0], x[:, :2])
    assert torch.equal(sized([x], 7)[0], x[:, [0, 1, 2, 0, 1, 2, 0]])
