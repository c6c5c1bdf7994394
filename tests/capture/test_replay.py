"""Parts of a tape run again: with other values, wider, or with labels instead of values."""

import torch

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import CONFLICT, UNTRACKED, ancestors, between, descendants, replay, row_labels
from tests.capture.tiny import rand, recorded


def named(tape, name):
    return next(n for n in tape.nodes if op_name(n) == name)


def test_who_depends_on_whom():
    tape = recorded(lambda _, x: (x.exp().sum() + x.sin().sum(), x.cos()), rand(3))
    x, exp, sin, add = tape.args[0], named(tape, "exp"), named(tape, "sin"), named(tape, "add")
    assert ancestors([exp]) == {x, exp}
    (of_exp,), (of_sin,) = exp.users, sin.users
    assert descendants(tape, [exp]) == [of_exp, add] and descendants(tape, [exp], of_exp.meta["index"]) == [of_exp]
    assert named(tape, "cos") not in between(tape, [x], add) and between(tape, [sin], add) == [of_sin, add]


def test_a_given_value_replaces_and_the_rest_stays():
    tape = recorded(lambda _, x: (x * 2) + x.exp(), rand(3))
    double = named(tape, "mul")
    env = replay(tape, descendants(tape, [double]), {double: torch.zeros(3)})
    assert torch.equal(env[tape.output], tape.value(named(tape, "exp")))


def test_in_float64_casts_to_narrow_floats_are_ignored():
    def fn(m, x):
        return (x.to(torch.bfloat16).float().softmax(-1, dtype=torch.float32) * m.w).to(torch.float16)

    w = rand(4, seed=1)
    tape = recorded(fn, rand(3, 4), w=w)
    x = rand(3, 4, seed=2).double()
    env = replay(tape, [n for n in tape.nodes if n.op == "call_function"], {tape.args[0]: x}, torch.float64)
    assert env[tape.output].dtype == torch.float64
    assert torch.equal(env[tape.output], x.softmax(-1) * w.double())


# -- row labels: R rows, H features -----------------------------------------------------------------


def labelled(fn, rows=6, width=4):
    """Labels of ``fn``'s outputs when row r of its input is labelled r."""
    tape = recorded(fn, rand(rows, width))
    label = torch.arange(rows)[:, None].expand(rows, width).contiguous()
    found = row_labels(tape, [n for n in tape.nodes if n.op == "call_function"], {tape.args[0]: label})
    return found.get(tape.output)


def test_moved_rows_keep_their_labels():
    ids = torch.tensor([4, 0, 4])
    assert labelled(lambda _, x: x[ids])[:, 0].tolist() == [4, 0, 4]
    assert labelled(lambda _, x: x.t().contiguous())[0].tolist() == list(range(6))
    assert labelled(lambda _, x: torch.cat([x[2:], x[:2]]).chunk(2, -1)[1])[:, 1].tolist() == [2, 3, 4, 5, 0, 1]
    assert labelled(lambda _, x: x.gather(0, torch.tensor([[5, 1, 0, 2]]))).tolist() == [[5, 1, 0, 2]]
    assert labelled(lambda _, x: x.half().float().view(2, 3, 4)[1])[:, 3].tolist() == [3, 4, 5]


def test_fills_are_untracked():
    def padded(_, x):
        y = torch.zeros(8, 4)
        y[torch.tensor([1, 3])] = x[:2]
        return y

    assert labelled(padded)[:, 0].tolist() == [UNTRACKED, 0, UNTRACKED, 1, *[UNTRACKED] * 4]
    assert labelled(lambda _, x: torch.nn.functional.pad(x, (0, 0, 1, 0)))[:, 0].tolist() == [UNTRACKED, *range(6)]


def test_element_wise_calls_keep_labels_that_agree():
    assert labelled(lambda _, x: x.relu() * x.sigmoid() + 1)[:, 0].tolist() == list(range(6))
    assert labelled(lambda _, x: x * torch.ones(4))[:, 2].tolist() == list(range(6))
    mixed = labelled(lambda _, x: x + x.flip(0))
    assert mixed.eq(CONFLICT).all()
    assert labelled(lambda _, x: x + x[torch.tensor([0, 1, 2, 3, 5, 4])])[:, 0].tolist() == [
        0,
        1,
        2,
        3,
        CONFLICT,
        CONFLICT,
    ]


def test_norms_are_row_wise_and_sums_lose_the_labels():
    assert labelled(lambda _, x: x.softmax(-1))[:, 0].tolist() == list(range(6))
    assert labelled(lambda _, x: x.sum(0, keepdim=True)) is None and labelled(lambda _, x: x @ x.t()) is None
