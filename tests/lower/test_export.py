"""Tracing a model: keywords beyond its signature, and errors that only tracing brings out."""

import pytest
import torch
from torch import nn

from moeopt.errors import NotSaveableError
from moeopt.lower.export import export_program


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=None, **more):
        y = self.linear(x)
        if more.get("double"):
            y = y * 2
        if "bias" in more:
            y = y + more["bias"]
        return y if scale is None else y * scale


@pytest.mark.parametrize("named", [{}, {"double": True}, {"bias": 3}, {"scale": 2, "double": True, "bias": 5}], ids=str)
@pytest.mark.parametrize("as_keyword", [False, True])
def test_keywords_of_a_call_that_the_signature_does_not_name(named, as_keyword):
    model = Keywords().eval()
    named = {k: torch.randn(3, 5, 4) if k in ("bias", "scale") else v for k, v in named.items()}
    x = torch.randn(3, 5, 4)
    args, kwargs = ((), {"x": x} | named) if as_keyword else ((x,), named)
    program = export_program(model, args, kwargs)
    assert "forward" not in model.__dict__
    larger = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    twice = torch.cat([x, x])
    args, kwargs = ((), {"x": twice} | larger) if as_keyword else ((twice,), larger)
    torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))


class LooksAtTracing(nn.Module):
    def forward(self, x, mask=None):
        return x * mask[:, None] if torch.compiler.is_compiling() else x


def test_an_error_of_the_models_own_code_is_told_with_its_line():
    with pytest.raises(NotSaveableError) as caught:
        export_program(LooksAtTracing(), (torch.randn(3, 4),), {})
    text = str(caught.value)
    assert "while torch.export traced it, its own code raised TypeError: 'NoneType' object is not subscriptable" in text
    assert "test_export.py" in text and "mask[:, None]" in text
    assert "give the arguments that this line reads" in text and "backend='torch'" in text


class AsksForAValue(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_failed_trace_prints_no_graph(capfd):
    with pytest.raises(NotSaveableError, match="data-dependent"):
        export_program(AsksForAValue(), (torch.randn(3, 4),), {})
    printed = capfd.readouterr()
    assert "def forward" not in printed.err and "def forward" not in printed.out
