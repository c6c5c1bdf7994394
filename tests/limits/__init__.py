"""Programs for docs/limits.md: each line of the page, named by its bold words, has programs that meet its limit."""

import ast
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import X
from tests.zoo import CASES

ROOT = Path(__file__).parents[2]
LIMITS: dict[str, list[Callable[..., None]]] = {}


def limit(words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers the decorated program for the line of the page that begins with ``words`` in bold; the program takes
    the path of an empty folder."""

    def register(program: Callable[..., None]) -> Callable[..., None]:
        LIMITS.setdefault(words, []).append(program)
        return program

    return register


def tested_in(words: str, test: str) -> None:
    """The line's program is the test of that name, which must exist once, in whichever file."""

    def exists(_: Path) -> None:
        texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
        holding = [text for text in texts if f"def {test}(" in text]
        assert len(holding) == 1
        assert test in {node.name for node in ast.parse(holding[0]).body if isinstance(node, ast.FunctionDef)}

    limit(words)(exists)


def moe_blocks(model: nn.Module, inputs: Any = X, **options: Any) -> list[Any]:
    """The entries of the report that are mixtures."""
    report = moeopt.optimize(model, inputs, **{"verify": "fast", **options}).report
    return [b for b in report.blocks if b.kind == "moe"]


def declines(make: Callable[[], nn.Module], reason: str, inputs: Any = X) -> None:
    """``make()`` has one mixture, which is declined for ``reason``, a part of the text of the report."""
    torch.manual_seed(0)
    (block,) = moe_blocks(make().eval(), inputs)
    assert block.status == "declined" and reason in block.reason, block


def zoo_declines(name: str, reason: str) -> None:
    """The same for a model of the zoo."""
    case = CASES[name]
    (block,) = moe_blocks(case.build(), case.inputs()[0])
    assert block.status == "declined" and reason in block.reason, block


def told(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of ``call()`` without gradients, and the texts of its ``StaleModelWarning``s."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if w.category is StaleModelWarning]
