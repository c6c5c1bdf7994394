"""Whether a tensor is contiguous is worked out, and not traced: the graph is the same without what nothing reads."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, make_fx

from moeopt.causal_lm import exporter
from moeopt.patches import untraced_contiguity

utils = pytest.importorskip("transformers.exporters.utils")


def traced():
    """Two reshapes as transformers' exporters have them traced, of rows that lie in order and that do not."""
    reshape = utils._patch_reshape(torch.Tensor.reshape)

    def rows(x):
        return reshape(x, -1, 4), reshape(x.transpose(0, 1), x.shape[0] * x.shape[1], 4)

    graph = make_fx(rows, tracing_mode="symbolic", pre_dispatch=True)(torch.ones(3, 5, 4)).graph
    return sorted(str(node.target) for node in graph.nodes)


def test_the_graph_is_the_same_and_nothing_was_traced_that_is_not_in_it(monkeypatch):
    theirs, made = PythonKeyTracer.create_node, []
    monkeypatch.setattr(PythonKeyTracer, "create_node", lambda *given, **more: made.append(1) or theirs(*given, **more))
    want, with_questions = traced(), len(made)
    made.clear()
    with untraced_contiguity():
        assert traced() == want
    assert want.count("aten.clone.default") == 1
    assert with_questions > len(want) + 10, "what the patch is for"
    assert len(made) <= len(want) + 2


def test_a_tensor_outside_of_a_trace_is_answered_and_the_patch_is_taken_back():
    theirs = utils.is_contiguous_or_false
    with untraced_contiguity():
        assert utils.is_contiguous_or_false is not theirs
        assert utils.is_contiguous_or_false(torch.ones(3, 4))
        assert not utils.is_contiguous_or_false(torch.ones(3, 4).T)
    assert utils.is_contiguous_or_false is theirs


def test_language_models_are_traced_with_it():
    theirs = utils.is_contiguous_or_false
    with exporter._tracing(None):
        assert utils.is_contiguous_or_false is not theirs
    assert utils.is_contiguous_or_false is theirs
