"""Tracing a model: keywords beyond its signature, and errors that only tracing brings out."""

import functools
import math
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError
from moeopt.lower.export import export_program
from tests.toy_moe import Block, H, build


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


class Holder(nn.Module):
    """A root and its child read one configuration."""

    def __init__(self):
        super().__init__()
        self.config, self.seen, self.pair = {"scale": 2.0}, [], ([1], 2)
        self.child = nn.Linear(4, 4)
        self.child.config = self.config

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.child(x) * self.child.config["scale"] + self.pair[1]


def test_what_the_model_holds_stays_the_same_objects():
    model = Holder().eval()
    before = (model.config, model.seen, model.pair)
    export_program(model, (torch.randn(3, 4),), {})
    assert all(now is then for now, then in zip((model.config, model.seen, model.pair), before, strict=True))
    assert model.child.config is model.config and model.config == {"scale": 2.0} and model.seen == []


class ReadsItsConfig(Block):
    """The gate and the root hold one dict."""

    def __init__(self):
        super().__init__()
        self.config = self.gate.config = {"top_k": 2}

    def route(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.gate.config["top_k"])
        return ids, weights


def test_a_saved_model_is_not_taken_for_a_changed_one(tmp_path):
    model, x = build(ReadsItsConfig), torch.randn(12, H)
    fast = moeopt.optimize(model, x, verify="fast")
    fast.save(tmp_path / "bundle")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", moeopt.errors.StaleModelWarning)
        before = fast(x)
        torch.testing.assert_close(before, model(x))
    fast.model.config["top_k"] = 1  # the router sees it
    with pytest.warns(moeopt.errors.StaleModelWarning), torch.no_grad():
        assert not torch.allclose(fast(x), before)


class Named(nn.Module):
    """A Parameter, a buffer or a module of a name that torch's own graphs have."""

    def __init__(self, name, kind):
        super().__init__()
        self.name, made = name, nn.Linear(3, 3)
        if kind == "module":
            self.add_module(name, made)
        elif kind == "buffer":
            self.register_buffer(name, made.weight.data)
        else:
            self.register_parameter(name, made.weight)

    def forward(self, x):
        held = getattr(self, self.name)
        return held(x) if isinstance(held, nn.Module) else x @ held


class Holds(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("name", "kind"), [("code", "Parameter"), ("graph", "buffer"), ("meta", "Parameter"), ("recompile", "module")]
)
def test_a_name_that_a_graph_of_torch_has_is_told_at_the_root_and_carried_below(name, kind):
    said = rf"Named cannot be saved: its {kind} {name} has the name of an attribute of torch.fx.GraphModule, which .*"
    with pytest.raises(NotSaveableError, match=said + "give it another name, hold it in a child module"):
        export_program(Named(name, kind), (torch.ones(2, 3),), {})
    program = export_program(Holds(Named(name, kind)), (torch.ones(2, 3),), {})
    assert program.run_decompositions({}).module()(torch.ones(2, 3)).shape == (2, 3)


@functools.lru_cache
def one_over_root(count):
    return 1 / math.sqrt(count)


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = {}

    def forward(self, x):
        return x * self.tables.setdefault(x.shape[0], torch.ones(()))


class Cached(nn.Module):
    def forward(self, x):
        return x * one_over_root(x.shape[0])


@pytest.mark.parametrize("model", [Tables(), Cached()], ids=["dict", "lru_cache"])
def test_what_is_looked_up_by_a_size_is_told_with_its_line(model):
    said = (
        r"its code looks something up by a size \(.*test_export.py:\d+\), in a dict, a set or a cache such as functools"
    )
    with pytest.raises(NotSaveableError, match=said):
        export_program(model, (torch.ones(2, 3),), {})


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + torch.rand(x.shape, generator=self.generator)


def test_a_draw_with_a_generator_is_told_with_its_line():
    said = (
        r"torch has no form with free sizes of an op that its code calls \(.*test_export.py:\d+\) \(a random draw with"
    )
    with pytest.raises(NotSaveableError, match=said):
        export_program(Draws(), (torch.ones(2, 3),), {})
