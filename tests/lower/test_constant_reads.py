"""Python that asks what no input changes is traced; Python that asks what a call writes, or the data, is refused."""

import copy

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError
from moeopt.lower.export import export_program


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("table", torch.linspace(0.5, 2.0, 32).unsqueeze(1).expand(32, 6).contiguous())
        self.register_buffer("count", torch.zeros(()))


class FilledTable(Base):
    def forward(self, x):
        if self.table[0, 0] == 0:
            x = x * 100
        return self.linear(x * self.table[: x.shape[0]])


class LargestOfAWeight(Base):
    def forward(self, x):
        low, high = torch.aminmax(self.linear.weight.detach().abs())
        return self.linear(x) * (2.0 if float(high - low) < 1 else 3.0)


class NamesOfExperts(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for place, number in enumerate(self.order.tolist()):
            x = x + torch.tanh(self.experts[number](x)) * place
        return x


class ConstantOfNumbers(Base):
    def forward(self, x):
        steps = torch.arange(4).float() / 3
        return self.linear(x) * steps.sum().item() if torch.equal(steps, steps.abs()) else x


class AttendsToATable(Base):
    def forward(self, x):
        """The op is marked as random, and draws nothing without dropout."""
        seen = torch.nn.functional.scaled_dot_product_attention(*[self.table[None, None, :4]] * 3)
        return self.linear(x) * (2 if seen.sum() > 0 else 1)


@pytest.mark.parametrize("make", [FilledTable, LargestOfAWeight, NamesOfExperts, ConstantOfNumbers, AttendsToATable])
def test_a_question_about_constants_is_answered_with_their_values(make):
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(5, 6)
    program = export_program(model, (x,), {})
    assert "forward" not in model.__dict__
    for rows in (5, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(program.module()(x), model(x))


class CountsItsCalls(Base):
    def forward(self, x):
        if self.count > 0:
            x = x * 100
        self.count += 1
        return self.linear(x)


class FillsItself(Base):
    def forward(self, x):
        if self.count == 0:
            self.count = torch.ones(())
            return self.linear(x)
        return self.linear(x) * 100


class WritesThroughAView(Base):
    def forward(self, x):
        state = torch.zeros(3)
        state[1].add_(x.sum())
        return self.linear(x) * (100 if state[1] > 0 else 1)


class WritesThroughData(Base):
    def forward(self, x):
        state = torch.ones(3)
        state.data.mul_(x.mean())
        return self.linear(x) * (100 if state.sum() > 0 else 1)


class WritesInAFunction(Base):
    def forward(self, x):
        state = torch.full((3,), -1.0)
        torch.neg(x[0, :3].detach().contiguous(), out=state)
        return self.linear(x) * (100 if state.sum() > 0 else 1)


class AsksTheData(Base):
    def forward(self, x):
        return self.linear(x) * (100 if (x.sum() + self.table.sum()) > 0 else 1)


class AsksRandomNumbers(Base):
    def forward(self, x):
        return self.linear(x) * (100 if torch.rand(()) > 0.5 else 1)


class AsksNoiseOnATable(Base):
    def forward(self, x):
        return self.linear(x) * (100 if self.noisy().sum() > 80 else 1)

    def noisy(self):
        return torch.nn.functional.dropout(self.table, 0.5, training=True)


class AsksDrawsOfATable(AsksNoiseOnATable):
    def noisy(self):
        return torch.bernoulli(self.table / 4)


class AsksNoiseLikeATable(AsksNoiseOnATable):
    def noisy(self):
        return self.table + torch.randn_like(self.table)


@pytest.mark.parametrize("make", [AsksNoiseOnATable, AsksDrawsOfATable, AsksNoiseLikeATable])
def test_random_numbers_on_constants_are_no_constants(make):
    with pytest.raises(NotSaveableError, match="branches on random numbers.*switch the noise off"):
        export_program(make().eval(), (torch.randn(5, 6),), {})


@pytest.mark.parametrize("make", [CountsItsCalls, FillsItself])
def test_what_a_call_writes_cannot_be_asked(make):
    with pytest.raises(NotSaveableError, match="branches on count, which its forward also writes.*fill it before"):
        export_program(make().eval(), (torch.randn(5, 6),), {})


@pytest.mark.parametrize(
    "make", [WritesThroughAView, WritesThroughData, WritesInAFunction, AsksTheData, AsksRandomNumbers]
)
def test_what_the_input_changes_is_not_answered(make):
    with pytest.raises(NotSaveableError, match="depends on the values of tensors"):
        export_program(make().eval(), (torch.randn(5, 6),), {})


def test_a_live_graph_keeps_no_branch_on_weights_that_may_change():
    model = FilledTable().eval()
    x = torch.randn(5, 6)
    with pytest.warns(UserWarning, match="as one call"):
        graph, _ = moeopt.passes.run(model, (x,))
    zeros = copy.deepcopy(model.state_dict())
    zeros["table"].zero_()
    graph.load_state_dict({f"model.{name}": value for name, value in zeros.items()})
    model.load_state_dict(zeros)
    torch.testing.assert_close(graph(x), model(x))
