"""Python that computes with sizes is found in every way of writing it, and its sizes are verified or left to it."""

import ast
import collections
import functools
import linecache
import math
import operator
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import moeopt
from moeopt.control_flow import operand_values, size_uses, size_values
from moeopt.control_flow.operand_values import COLUMNS
from moeopt.control_flow.size_classes import SizeClasses, SizedCall
from moeopt.control_flow.size_values import SizeValues
from moeopt.errors import StaleModelWarning
from moeopt.pipeline import block as block_pipeline
from moeopt.rewrite.known_sizes import KnownSizes, SizeUses
from moeopt.verification.block import verify_block
from tests.toy_moe import Block, H, build, close, optimized, seeded
from tests.zoo import CASES

TABLE = {33: 1.5}
BIG = 1 << 40
ROWS = (14, 14, 33, 30, 52)


class Holder:
    def __init__(self, x):
        self.x, self.n = x, len(x)

    @property
    def size(self):
        return self.x.shape[0]

    @functools.cached_property
    def rows(self):
        return self.x.shape[0]

    def __getattr__(self, name):
        return self.x.shape[0]

    def __getitem__(self, dim):
        return self.x.shape[dim]

    def __len__(self):
        return self.x.shape[0]


Pair = collections.namedtuple("Pair", ["rows", "columns"])
SIZE = functools.partial(torch.Tensor.size)


def rows_of(x):
    return x.shape[0]


ROWS_OF = rows_of


def each_row(x):
    yield from x


def of_columns(x):
    for at, column in enumerate(x.unbind(1)):
        yield column[:, None] * at


def rows_in_turn(x):
    return iter(x)


class Rows:
    def __init__(self, x):
        self.rows = [*x]

    def __iter__(self):
        return iter(self.rows)


def below(n, limit):
    if n > limit:
        raise ValueError(n)


@functools.lru_cache(None)
def cached(n):
    return n == 33


def twice(n):
    return 2 * n


def matched(x):
    match x.shape[0]:
        case 33 | 40:
            return x * 2
    return x


def reduced(x):
    n = len(x)
    n %= 32
    return x * 2 if n == 31 else x


def in_chunks(x):
    return torch.cat([x[i : i + 64] for i in range(0, x.shape[0], 64)])


@torch.jit.script
def scripted(x):
    if x.size(0) == 33:
        return x * 2
    return x


class Tables:
    def get(self, n):
        return n


def named_alike(x):
    return x * TABLE.get(len(x), Tables().get(1.0))


def scripted_call(x):
    return scripted(x)


def in_turn(x):
    rows, at = [], 0
    for count in torch.bincount((x[:, 0] > 0).long(), minlength=2).tolist():
        rows.append(twice(x[at : at + count]))
        at += count
    return torch.cat(rows)


def listed(x):
    places = []
    for token, _ in enumerate(x):
        places.append((token, 0))
    return x[torch.tensor(places)[:, 0]]


def walked(x):
    n = (len(x) + 3) // 4 * 4
    return x.new_zeros(n, x.shape[1])


EXACT = "exact"
FOUND = {
    "len": (lambda x: x * 2 if 23 <= len(x) < 150 and len(x) % 4 == 1 else x, ((22.5, 149.5), (4,))),
    "equal": (lambda x: x * (1 + (x.shape[0] == 33)), ((32.5, 33.5), ())),
    "numel": (lambda x: x * 2 if x.numel() > 33 * H else x, ((33.5,), ())),
    "members": (lambda x: x * 2 if x.size(0) in {33, 40} else x, ((32.5, 33.5, 39.5, 40.5), ())),
    "in a range": (lambda x: x * 2 if len(x) in range(20, 40) else x, ((19.5, 20.5, 39.5, 40.5), ())),
    "match": (matched, ((32.5, 33.5, 39.5, 40.5), ())),
    "min": (lambda x: x[: min(x.shape[0], 64)], ((63.5,), ())),
    "chunks": (in_chunks, ((64.5, 128.5, 192.5), ())),
    "divmod": (lambda x: x * 2 if divmod(len(x), 7) == (4, 5) else x, EXACT),
    "remainder": (lambda x: x * 2 if operator.mod(len(x), 7) == 5 else x, EXACT),
    "rounded up": (walked, ((4.5, 8.5), (4,))),
    "a quotient": (lambda x: x * (1 + len(x) // 40), ((39.5, 79.5, 119.5), (40,))),
    "TorchScript": (scripted_call, EXACT),
    "another function of the name": (named_alike, EXACT),
    "parity": (lambda x: x * 2 if len(x) & 1 else x, ((), (2,))),
    "shift": (lambda x: x * (1 + (len(x) >> 5)), ((31.5, 63.5, 95.5), (32,))),
    "negative": (lambda x: x * 2 if -len(x) % 8 == 7 else x, ((), (8,))),
    "in place": (reduced, EXACT),
    "truth": (lambda x: x * 2 if not (len(x) - 33) else x, ((32.5, 33.5), ())),
    "a power of two": (lambda x: x * 2 if len(x) & (len(x) - 1) == 0 else x, EXACT),
    "xor": (lambda x: x * 2 if len(x) ^ 33 == 0 else x, EXACT),
    "bit_count": (lambda x: x * 2 if bin(len(x)).count("1") == 5 else x, EXACT),
    "log2": (lambda x: x * 2 if math.log2(len(x)) == 5 else x, EXACT),
    "sqrt": (lambda x: x * 2 if len(x) ** 0.5 == 6 else x, EXACT),
    "round": (lambda x: x * 2 if round(len(x) / 11) == 3 else x, EXACT),
    "made whole": (lambda x: x * (1 + int(len(x) * 0.01)), EXACT),
    "made whole of a quotient": (lambda x: x * (1 + int(len(x) * 1.25 / 8)), ((6.5, 12.5, 19.5), (32,))),
    "a number in a tensor": (lambda x: x * 2 if torch.tensor(len(x)) > 170 else x, ((170.5,), ())),
    "its remainder": (lambda x: x * 2 if torch.tensor(len(x)) % 7 == 3 else x, ((), (7,))),
    "its truth": (lambda x: x * 2 if bool(torch.tensor(len(x)) == 170) else x, ((169.5, 170.5), ())),
    "the number of its truth": (lambda x: x * 2 if (torch.tensor(len(x)) > 170).item() else x, ((170.5,), ())),
    "a capacity": (lambda x: x * 2 if torch.ceil(torch.tensor(len(x) / 8 * 1.1)) < 16 else x, EXACT),
    "rows behind others": (lambda x: x * 2 if len(x[200:]) % 7 == 3 else x, ((200.5,), ())),
    "a table": (lambda x: x * TABLE.get(len(x), 1.0), EXACT),
    "a key": (lambda x: x * 2 if x.shape[0] in TABLE and TABLE[x.shape[0]] else x, EXACT),
    "a choice": (lambda x: x * (1.0, 2.0)[len(x) == 33], ((32.5, 33.5), ())),
    "text": (lambda x: x * 2 if f"{len(x)}" == "33" else x, EXACT),
    "a format": (lambda x: x * 2 if "%d" % len(x) == "33" else x, EXACT),  # noqa: UP031
    "a shape": (lambda x: x * 2 if x.shape == (33, H) else x, EXACT),
    "a made shape": (lambda x: x * 2 if torch.Size([33, H]) == x.shape else x, EXACT),
    "a list": (lambda x: x * 2 if [x.shape[0]] == [33] else x, EXACT),
    "a dict": (lambda x: x * 2 if {"n": len(x)}["n"] == 33 else x, EXACT),
    "a function": (lambda x: x * 2 if twice(len(x)) == 66 else x, ((32.5, 33.5), ()) if COLUMNS else EXACT),
    "a memo": (lambda x: x * 2 if cached(len(x)) else x, EXACT),
    "an attribute": (lambda x: x * 2 if Holder(x).n == 33 else x, EXACT),
    "a property": (lambda x: x * 2 if Holder(x).size == 33 else x, ((32.5, 33.5), ()) if COLUMNS else EXACT),
    "a lambda": (lambda x: x * 2 if (lambda n: n % 40)(len(x)) == 33 else x, EXACT),
    "reduce": (lambda x: x * 2 if functools.reduce(operator.add, [len(x), 1]) == 34 else x, EXACT),
    "a comprehension": (lambda x: x * 2 if any(len(x) == n for n in (33, 35)) else x, EXACT),
    "rows counted": (lambda x: x * 2 if sum(1 for _ in x) == 33 else x, EXACT),
    "NumPy": (lambda x: x * float(np.where(np.int64(len(x)) == 33, 1.5, 1.0)), EXACT),
    "bytes": (lambda x: x * 2 if x.nbytes == 33 * H * 4 else x, ((32.5, 33.5), ())),
    "a view": (lambda x: x * 2 if x.view(-1, 2).shape[0] == 33 * H // 2 else x, ((32.5, 33.5), ())),
}
WINDOW = ((22.5, 149.5), (4,))
SPELT = {  # where a size is asked for: a window of sizes and a remainder are found in each, or no class is known
    "x.__len__()": WINDOW,
    "torch.Tensor.size(x, 0)": WINDOW,
    "torch.Tensor.__len__(x)": WINDOW,
    "type(x).size(x, 0)": WINDOW,
    "getattr(x, 'shape')[0]": WINDOW,
    "getattr(x, 'size')(0)": WINDOW,
    "SIZE(x, 0)": EXACT,
    "ROWS_OF(x)": EXACT,
    "torch.ops.aten.sym_size.int(x, 0)": EXACT,
    "x.untyped_storage().nbytes() // 32": ((1.5, 11.5, 74.5), (4, 32)),
    "len(x.untyped_storage()) // 32": ((1.5, 11.5, 74.5), (4, 32)),
    "x.T.contiguous().stride(0)": WINDOW,
    "torch.broadcast_shapes(x.shape, (1, H))[0]": WINDOW,
    "torch.sym_max(len(x), 1)": EXACT,
    "operator.length_hint(x)": EXACT,
    "operator.attrgetter('shape')(x)[0]": EXACT,
    "operator.methodcaller('size', 0)(x)": EXACT,
    "functools.partial(len, x)()": EXACT,
    "[*x.shape][0]": WINDOW,
    "x[:, 0].shape[0]": WINDOW,
    "len([*x])": WINDOW,
    "len(list(itertools.islice(iter(x), 999)))": EXACT,
    "memoryview(x.numpy()).shape[0]": EXACT,
    "torch.empty_like(x, device='meta').shape[0]": EXACT,
    "int(torch.arange(len(x))[-1]) + 1": WINDOW,
    "torch.ones_like(x[:, 0]).sum()": WINDOW,
    "Holder(x).rows": EXACT,
    "Holder(x).anything": EXACT,
    "Holder(x)[0]": EXACT,
    "len(Holder(x))": EXACT,
    "Pair(*x.shape).rows": EXACT,
    "math.prod(x.shape) // 8": EXACT,
    "dict(n=len(x)).get('n')": EXACT,
    "x.numpy().shape.__getitem__(0)": EXACT,
    "x.shape.numel() // 8": EXACT,
    "list(enumerate(x))[-1][0] + 1": EXACT,
    "len(dict(enumerate(x)))": EXACT,
    "len(list(zip(x, x)))": EXACT,
    "list(zip(itertools.count(1), *[x]))[-1][0]": EXACT,
    "sum(1 for _ in each_row(x))": EXACT,
    "len([row for row in each_row(x)])": EXACT,
    "len([*Rows(x)])": EXACT,
    "len(list(rows_in_turn(x)))": EXACT,
    "(x @ x.T).stride(0)": EXACT,
    "(x * 2).size(0)": WINDOW,
    "x[:200].size(0)": ((22.5, 149.5, 200.5), (4,)),
    "eval('len(x)')": EXACT,
    "locals()['x'].shape[0]": EXACT,
    "x.__getattribute__('shape')[0]": WINDOW,
    "iter(x).__length_hint__()": EXACT,
}
FAILING = {  # errors that code goes on behind
    "of a function": ("try:\n    below(len(x), 33)\nexcept ValueError:\n    x = x * 2", EXACT),
    "of its own": ("try:\n    if len(x) > 33: raise ValueError\nexcept ValueError:\n    x = x * 2", ((33.5,), ())),
    "asserted": ("try:\n    assert len(x) % 4\nexcept (OSError, AssertionError):\n    x = x * 2", ((), (4,))),
    "suppressed": ("with contextlib.suppress(ValueError):\n    below(len(x), 33)\n    x = x * 2", EXACT),
    "of a tensor": ("try:\n    x = x * x[33, 0]\nexcept IndexError:\n    pass", EXACT),
    "raised on": ("try:\n    x = x * x[3, 0]\nexcept IndexError as error:\n    raise ValueError from error", ((), ())),
    "of an import": ("try:\n    import nothing\n    x = nothing(x)\nexcept ImportError:\n    pass", ((), ())),
    "of no size": ("try:\n    x = x * 2\nexcept TypeError:\n    if len(x) > 33: raise", ((), ())),
    "not caught": ("below(len(x), 99)", ((), ())),
}
LOOKED_AT = {
    "a class pattern": ("match x:\n    case torch.Tensor(shape=(33, _)):\n        x = x * 2", EXACT),
    "a pattern of fields": ("match Pair(*x.shape):\n    case Pair(33, _):\n        x = x * 2", EXACT),
    "a guarded pattern": ("match x.shape:\n    case (n, _) if n > 33:\n        x = x * 2", EXACT),
    "a pattern of a dict": ("held = {'n': len(x)}\nmatch held:\n    case {'n': 33}:\n        x = x * 2", EXACT),
    "identity": ("if len(x) is BIG: x = x * 2", EXACT),
    "no number": ("if len(x) is None: x = x * 2", ((), ())),
    "shapes": ("if x.is_same_size(torch.empty(33, H)): x = x * 2", EXACT),
    "equal tensors": ("if torch.equal(torch.ones(len(x)), torch.ones(33)): x = x * 2", EXACT),
    "equal shapes": ("if torch.equal(torch.ones(len(x)), torch.ones_like(x[:, 0])): x = x * 2", ((), ())),
    "a pattern of a sequence": ("match list(x):\n    case [*_, row] if row is x: pass", EXACT),
    "parts of one size": ("if len(x.split(60)) == 2: x = x * 2", ((60.5, 120.5, 180.5), ())),
    "parts by name": ("if torch.split(tensor=x, split_size_or_sections=60)[1:]: x = x * 2", ((60.5, 120.5, 180.5), ())),
    "what is computed cut": ("if len([*x][40:]) == 5: x = x * 2", EXACT),
    "a list of rows": ("rows = [*x]\nwhile rows: rows.pop()", EXACT),
    "a list cut": ("rows = list(range(len(x)))\ndel rows[:40]\nif rows: x = x * 2", ((40.5,), ())),
}
LEFT = {
    "shapes": lambda x: torch.zeros(x.shape[0], 3).new_zeros(len(x), 2).view(-1).narrow(0, 0, x.shape[0]),
    "features": lambda x: x[:, : x.shape[-1] // 2] if x.shape[1] % 2 == 0 else x,
    "sums and products": lambda x: x.reshape(2 * len(x), -1) + torch.arange(x.shape[0] * 2)[:, None] * (len(x) + 1),
    "an error": lambda x: x if len(x) < BIG else print(f"{len(x)} rows"),
    "empty": lambda x: x if len(x) == 0 or x.numel() > 0 else x * 2,
    "tensors": lambda x: x * (torch.arange(len(x)) < len(x) * 1.25 / 4)[:, None],
    "whole numbers": lambda x: x.view(int(x.shape[0]), -1)[: len(x)],
    "a count": lambda x: x * 2 if (x[:, 0] > 0).sum() > 9 else x,
    "a part of a shape": lambda x: x.new_zeros(*x.shape[:-1], 3) + x.reshape(-1, *x.shape[1:]).sum(),
    "rows in turn": in_turn,
    "places in a list": listed,
    "its own rows": lambda x: x * 2 if x[x[:, 0] > 0].shape[0] % 5 == 1 else x,
    "tensors summed": lambda x: sum(twice(row) * at for at, row in enumerate(x.unbind(1))),
    "a sum of tensors": lambda x: sum(v.var() / (v.mean() ** 2 + 1) for v in (x, x * 2)) + x,
    "by name": lambda x: dict(zip(("a", "b"), [x, x * 2], strict=True))["b"],
    "parts of given sizes": lambda x: torch.cat(x.split([len(x) - 4, 4])) if "a b".split(" ") else x,
    "a default": lambda x, held=(1, 2): x * 2 if len(held) % 2 else x,
}
if COLUMNS:
    LEFT["a generator's tensors summed"] = lambda x: sum(of_columns(x)) + x[:, :1]


def classes(function):
    calls = []
    for seed, n in enumerate(ROWS):
        seen = SizeValues()
        seen.watching(function, seeded(n, H, seed=seed))
        calls.append(SizedCall((n,), seen))
    return SizeClasses(calls)


@pytest.mark.parametrize("name", FOUND)
def test_what_code_does_with_a_size_is_found(name):
    function, known = FOUND[name]
    (uses,) = classes(function).uses
    if known == EXACT:
        assert uses.exact, uses
    else:
        assert (uses.limits, uses.divisors, uses.exact) == (*known, False)


def written(name, lines):
    """A function of ``x`` of these lines, whose source can be had."""
    source = f"import contextlib, functools, itertools\ndef f(x):\n{textwrap.indent(lines, '    ')}\n    return x\n"
    file = f"<{name} of {__name__}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = dict(globals())
    exec(compile(source, file, "exec"), names)
    return names["f"]


def told(name, lines):
    (uses,) = classes(written(name, lines)).uses
    return EXACT if uses.exact else (uses.limits, uses.divisors)


def test_a_size_is_found_however_it_is_asked_for():
    window = "if 23 <= {0} < 150 and {0} % 4 == 1:\n    x = x * 2"
    assert {text: told(text, window.format(f"({text})")) for text in SPELT} == SPELT
    table = "x = x * TABLE.get(int({}), 1.0)"
    assert {told(f"{text} in a table", table.format(text)) for text in SPELT} == {EXACT}


def test_a_size_decides_by_an_error_that_is_caught_and_by_what_names_no_number():
    cases = FAILING | LOOKED_AT
    assert {name: told(name, lines) for name, (lines, _) in cases.items()} == {
        name: want for name, (_, want) in cases.items()
    }


@pytest.mark.parametrize("text", SPELT)
def test_a_size_is_found_where_python_tells_no_columns(text, monkeypatch):
    """As before Python 3.11, where no result of a call is known by its place in the line."""
    monkeypatch.setattr(size_values, "call_places", lambda code: {})
    monkeypatch.setattr(operand_values, "COLUMNS", False)
    assert told(f"{text} in a line", f"if ({text}) % 4 == 1: x = x * 2") != ((), ())


@pytest.mark.parametrize("name", LEFT)
def test_what_a_graph_follows_or_values_decide_is_left_out(name):
    (uses,) = classes(LEFT[name]).uses
    assert not uses.exact and not uses.divisors and set(uses.limits) <= {BIG - 0.5}, uses


def test_code_without_its_source_that_may_compute_with_sizes_has_no_classes():
    names = {}
    exec("def given(x): return x * 2 if len(x) == 33 else x\ndef other(x): return x + 1", names)
    read = classes(names["given"])
    assert read.uses[0].exact and read.texts == ["code without its source, <string>:1"]
    assert not classes(names["other"]).texts


def test_two_sizes_and_their_product_have_classes_of_their_own():
    known = KnownSizes(((0, 0), (0, 1)), (SizeUses((2.5,)), SizeUses(), SizeUses((65.5,), (4,))))
    assert known.class_of((2, 33)) == ((0,), (0,), (1, 2)) == known.class_of((1, 70)) != known.class_of((1, 71))
    assert known.class_of((3, 3)) == ((1,), (0,), (0, 1)) != known.class_of((1, 9))
    known.verified.add(((0,), (0,), (0, 2)))
    assert known.holds([(2, 1, H)]) and not known.holds([(3, 2, H)]) and not known.complete()
    assert known.refusal([(3, 2, H)]).startswith("it was called with size 3 and 2, and its code computes with sizes")
    one = KnownSizes(((0, 0),), (SizeUses((), (2,)),), {((0, 0),), ((0, 1),)})
    assert one.complete() and not KnownSizes(((0, 0),), (SizeUses(exact=True),), {((3,),)}).complete()
    short = SizeUses((3.5,), (8,))
    all_there_are = {(short.class_of(size),) for size in range(1, 12)}
    assert len(all_there_are) == 11 and KnownSizes(((0, 0),), (short,), all_there_are).complete()
    assert not KnownSizes(((0, 0),), (short,), all_there_are - {((0, 3),)}).complete()
    assert SizeUses((BIG - 0.5,), (4,)).classes() == 8


class Masked(nn.Module):
    """Every expert for every token, under a mask: nothing of the routing reaches Python."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 4, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(4, H, H) * 0.3), nn.Parameter(torch.randn(4, H, H) * 0.3)

    def after(self, x, y):
        return y

    def forward(self, x):
        rows = x.reshape(-1, H)
        w, ids = torch.topk(torch.softmax(self.gate(rows), -1), 2)
        mask = torch.zeros(len(rows), 4).scatter(1, ids, w)
        hidden = torch.einsum("th,ehi->tei", rows, self.w1).relu()
        return self.after(x, torch.einsum("tei,eih,te->th", hidden, self.w2, mask).view(x.shape))


class Window(Masked):
    def after(self, x, y):
        return y * 1.5 if 23 <= x.shape[1] < 150 and x.shape[1] % 4 == 1 else y


class Behind(Masked):
    """Only many tokens are asked for their remainder."""

    def after(self, x, y):
        if x.shape[1] > 100:
            y = y * 1.5 if x.shape[1] % 8 == 3 else y
        return y


class TwoParts(Masked):
    def after(self, x, y):
        return y * 1.5 if len(x.reshape(-1, H).split(100)) == 2 else y


class RowsInPairs(Masked):
    def after(self, x, y):
        return y * 1.5 if len(list(zip(*[x[0]] * 2))) == 71 else y  # noqa: B905


class WiderThanLong(Masked):
    def after(self, x, y):
        return y * 1.5 if x.shape[0] > x.shape[1] > 9 else y


class Parity(Masked):
    def after(self, x, y):
        return y + 0.0 * (len(x) % 2)


@pytest.mark.parametrize("verify", ["fast", "strict"])
def test_a_branch_that_some_sizes_take_is_declined_with_its_condition(verify):
    (block,) = [b for b in moeopt.explain(build(Window), seeded(2, 5, H), verify=verify).blocks if b.kind == "moe"]
    assert block.status == "declined", str(block)
    assert "tokens, which its code tells from others': " in block.reason
    assert "its code computes with sizes of its input (23 <= x.shape[1] < 150, x.shape[1] % 4" in block.reason


def test_a_branch_behind_another_is_found_by_the_calls_that_reach_it():
    (block,) = [b for b in moeopt.explain(build(Behind), seeded(2, 5, H), verify="fast").blocks if b.kind == "moe"]
    assert block.status == "declined" and "(x.shape[1] > 100, x.shape[1] % 8)" in block.reason


@pytest.mark.parametrize(("make", "text"), [(TwoParts, "split(100)"), (RowsInPairs, "zip")])
def test_a_size_that_is_only_counted_is_not_silent(make, text, monkeypatch):
    monkeypatch.setenv("MOEOPT_MEASURE", "off")
    opt, others = (
        moeopt.optimize(build(make), seeded(1, 5, H), verify="fast"),
        (seeded(1, n, H) for n in (71, 101, 201)),
    )
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert text in " ".join([block.reason, *opt.report.notes])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleModelWarning)
        for x in others:
            close(opt(x), build(make)(x))


@pytest.fixture(scope="module")
def bound():
    """A block that is bound to the sizes of its cases, and what was given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEOPT_MEASURE", "off")
        return build(WiderThanLong), moeopt.optimize(build(WiderThanLong), seeded(2, 5, H), verify="fast")


def test_sizes_of_no_known_class_run_the_own_code_and_the_report_says_so(bound):
    model, opt = bound
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    (note,) = [n for n in opt.report.notes if "computes with sizes of its input (x.shape[0] > x.shape[1] > 9)" in n]
    assert "calls of others run the block's own code" in note
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)
        close(opt(seeded(2, 5, H)), model(seeded(2, 5, H)))
    with torch.no_grad(), pytest.warns(StaleModelWarning, match="size 40 and 11, and its code computes with sizes"):
        assert torch.equal(opt(seeded(40, 11, H)), model(seeded(40, 11, H)))


def test_compiled_calls_of_other_sizes_are_not_compiled_each(bound):
    model, opt = bound
    graphs, known = [], 0
    torch._dynamo.reset()
    compiled = torch.compile(opt.model, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleModelWarning)
        for count, rows in enumerate((5, 81, 85, 87, 91)):
            close(compiled(seeded(2, rows, H)), model(seeded(2, rows, H)))
            if count == 2:
                known = len(graphs)
    torch._dynamo.reset()
    assert graphs and len(graphs) == known


def test_a_block_that_was_verified_for_every_class_is_bound_to_none():
    opt = moeopt.optimize(build(Parity), seeded(2, 5, H), verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"] and opt.model.forward.program.guard.sizes is None
    assert not [n for n in opt.report.notes if "computes with sizes" in n]


class Layers(nn.Module):
    """The second is alike to the first, but its weights make verification of the first's graph fail."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([WiderThanLong(), WiderThanLong()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_block_that_is_alike_has_a_guard_of_its_own(monkeypatch):
    calls = []

    def failing(*args, **kwargs):
        check = verify_block(*args, **kwargs)
        calls.append(args[0])
        if args[0] == "layers.1" and calls.count("layers.1") == 1:
            check.passed = False
        return check

    monkeypatch.setattr(block_pipeline, "verify_block", failing)
    opt = moeopt.optimize(build(Layers), seeded(2, 5, H), verify="fast")
    first, second = (layer.forward.program.guard for layer in opt.model.layers)
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten"] * 2
    assert first is not second and first.sizes is not None and second.sizes is not None


def test_whether_an_expert_has_tokens_is_no_question_of_sizes_where_all_choose_the_same():
    read = SizeClasses([of_numbers(n, {0, n}) for n in (14, 14, 33, 30, 52)])
    assert not read.uses[0].exact and not read.uses[0].limits


def of_numbers(n, numbers):
    """A call of ``n`` tokens in which ``count == 0`` was asked of ``numbers``."""
    seen = SizeValues()
    for number in sorted(numbers):
        seen.watching(asked, number)
    return SizedCall((n,), seen)


def asked(count):
    return count == 0


NAMELESS = {"__name__": None}
exec("def nameless(x):\n    return x", NAMELESS)


class Nameless(Block):
    def loop(self, x, ids, w):
        return NAMELESS["nameless"](super().loop(x, ids, w))


def test_a_function_of_no_module_is_looked_at_as_any_other():
    assert NAMELESS["nameless"].__module__ is None
    optimized(build(Nameless), verify="fast")


def test_an_error_while_the_code_is_watched_is_not_the_code_s(monkeypatch):
    """What could not be looked at counts as unread: each size is alike to itself alone."""

    def broken(*args):
        raise RuntimeError("of the watching")

    monkeypatch.setattr(size_values, "operand_value", broken)
    seen = SizeValues()
    assert seen.watching(asked, 3) is False
    assert [place.rpartition("/")[2].partition(":")[0] for place in seen.unread] == ["test_size_sweep.py"]


def test_the_trees_of_sources_are_let_go_of_with_the_run():
    optimized(build(), verify="fast")
    assert size_uses._uses.cache_info().currsize == size_values.call_places.cache_info().currsize == 0


MARGIN = """
def first(x):
    text = '''
at the margin
'''
    return x.shape[0] % 4, '''
        and again ''', text


@kept
@(
    twice
)
class Held:

    # of its own
    def second(self, x):
        return x.shape[0] % 8

last = 1
"""


@pytest.mark.parametrize(("name", "divisor"), [("def first", 4), ("def second", 8)])
def test_of_a_file_only_what_ran_is_parsed_and_all_of_it(name, divisor, tmp_path):
    file = tmp_path / "margin.py"
    file.write_text(MARGIN)
    lines = MARGIN.split("\n")
    at = next(n for n, text in enumerate(lines, 1) if name in text)
    found = size_uses.uses_in(str(file), at)
    (line,) = [n for n, text in enumerate(lines, 1) if f"% {divisor}" in text]
    assert f"x.shape[0] % {divisor}" in [ast.unparse(use.node) for use in found[line]]
    begin, end = size_uses._outermost(file.read_text().splitlines(keepends=True), at - 1)
    assert lines[begin:end][0] == ("def first(x):" if divisor == 4 else "class Held:")
    assert "last = 1" not in lines[begin:end]


def test_what_a_sample_chooses_by_its_own_argument_is_no_size():
    """Its numbers stand beside the tokens: as the example's, each call of one size would choose as every other."""
    case = CASES["samples_that_choose_beside_a_shared_expert"]
    opt = moeopt.optimize(case.build(), case.inputs()[0], verify="fast")
    assert not any("computes with sizes" in note for note in opt.report.notes)


def test_a_block_that_does_not_run_watched_holds_for_the_sizes_of_its_example(monkeypatch):
    def unable(*args, **kwargs):
        raise RuntimeError("under a trace function")

    monkeypatch.setattr(SizeValues, "watching", unable)
    model, example = build(), seeded(2, 5, H)
    opt = optimized(model, example, verify="fast")
    assert any("computes with sizes of its input (what could not be watched)" in note for note in opt.report.notes)
    close(opt(example), model(example))
    assert not opt.model.forward.fallbacks
    with pytest.warns(StaleModelWarning, match="called with size 2 and 6, .*what could not be watched"):
        close(opt(seeded(2, 6, H)), model(seeded(2, 6, H)))
