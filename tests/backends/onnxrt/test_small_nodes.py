"""A decode step of an engine starts fewer nodes than the exported graph has, and gives the same bits."""

import sys
from pathlib import Path

import onnx
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt import build
from moeopt.backends.onnxrt.session import Session
from moeopt.lower.onnx import assemble
from tests import children

pytestmark = pytest.mark.one_isa  # nodes are counted

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]


def engine(folder, monkeypatch, simple):
    """The graph of a small Qwen3-MoE of two layers, with the small nodes that the export wrote or without."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=60, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    monkeypatch.setenv("MOEOPT_NATIVE", "off")
    with pytest.MonkeyPatch.context() as patch:
        if not simple:
            patch.setattr(build, "simplify", lambda model: {})
            patch.setattr(assemble, "always_named", lambda ids, experts: False)
        opt = moeopt.optimize(model, {"input_ids": torch.arange(12).reshape(2, 6)}, backend="onnxruntime", verify="off")
        return opt.save(folder) / "model.onnx"


def feeds_of(session, batch, new, past):
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    mask[-1, : min(2, past + new - 1)] = 0
    known = {
        "input_ids": torch.randint(0, 60, (batch, new), generator=g),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:],
        "logits_to_keep": torch.arange(new),
    }
    cache = {
        name: torch.randn(batch, 2, past, 8, generator=g)
        for name in session.inputs
        if name.startswith("past_key_values")
    }
    return cache | {name: known[name] for name in session.inputs if name not in cache}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Both graphs, made in a process of their own: what other tests leave in exporters must not differ between them."""
    folder = tmp_path_factory.mktemp("engines")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; import pytest; "
        f"from tests.backends.onnxrt.test_small_nodes import engine; "
        f"[engine(Path({str(folder)!r}) / name, pytest.MonkeyPatch(), simple) "
        "for name, simple in (('long', False), ('short', True))]"
    )
    children.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return [folder / name / "model.onnx" for name in ("long", "short")]


def test_the_engine_has_fewer_nodes_by_count(graphs):
    long, short = (list(onnx.load(path, load_external_data=False).graph.node) for path in graphs)
    assert len(long) - len(short) == 24, (len(long), len(short))

    def count(nodes, op):
        return sum(node.op_type == op for node in nodes)

    assert count(short, "MatMul") == count(long, "MatMul") and count(short, "Softmax") == count(long, "Softmax")
    for op in ("Reshape", "Concat", "Expand", "Unsqueeze", "Shape"):
        assert count(short, op) < count(long, op), op


def test_the_engine_gives_the_same_bits(graphs):
    sessions = [Session(path) for path in graphs]
    for batch, new, past in ((1, 1, 9), (2, 1, 3), (1, 6, 0), (3, 5, 4)):
        want, got = (session.run(feeds_of(session, batch, new, past)) for session in sessions)
        assert sessions[0].outputs == sessions[1].outputs
        for name, one, two in zip(sessions[0].outputs, want, got, strict=True):
            assert torch.equal(one, two), (name, batch, new, past)
