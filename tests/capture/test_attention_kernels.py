"""Attention is written down as PyTorch is asked for it: its kernel for CPUs ends the process on no tokens."""

import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.capture.tape import record
from moeopt.rewrite.install import rewritten_forward
from tests.zoo.dispatches import D, MaskedSelect

aten = torch.ops.aten


class Attending(nn.Module):
    """Attention and a mixture in one forward; two heads, keys and values for one of them where ``shared``."""

    def __init__(self, shared=False):
        super().__init__()
        self.moe, self.q, self.kv = MaskedSelect(), nn.Linear(D, D), nn.Linear(D, D if shared else 2 * D)
        self.shared = shared

    def forward(self, x, mask=None):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 2, D // 2).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 1 if self.shared else 2, D // 2).permute(2, 0, 3, 1, 4)
        causal = mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=self.shared)
        rows = (x + mixed.transpose(1, 2).reshape(x.shape)).reshape(-1, D)
        return MaskedSelect.forward(self.moe, rows).view(x.shape)


def calls_of(graph):
    return {node.target for node in graph.nodes if "attention" in str(node.target)}


def test_a_block_with_attention_takes_calls_without_tokens():
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 6, D)
    opt = moeopt.optimize(model, x, verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    assert calls_of(rewritten_forward(opt.model).program.graph()) == {aten.scaled_dot_product_attention.default}
    for sizes in ((2, 6), (1, 1), (2, 0), (0, 6)):
        x = torch.randn(*sizes, D)
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)
    assert rewritten_forward(opt.model).fallbacks == 0


def test_each_argument_of_attention_is_written_down():
    torch.manual_seed(0)
    x = torch.randn(2, 6, D)
    for shared in (False, True):
        for mask in ((), (torch.rand(6, 6) > 0.3,), (torch.randn(2, 1, 6, 6),)):
            model = Attending(shared).eval()
            tape = record(model, (x, *mask))
            asked = next(n for n in tape.nodes if n.target is aten.scaled_dot_product_attention.default)
            read = [tape.value(a) if isinstance(a, torch.fx.Node) else a for a in asked.args]
            options = {k: tape.value(v) if isinstance(v, torch.fx.Node) else v for k, v in asked.kwargs.items()}
            torch.testing.assert_close(asked.target(*read, **options), tape.value(asked), rtol=0, atol=0)
