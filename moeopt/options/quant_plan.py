"""Which format the experts of each block get: one name for all, or a plan by module pattern."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

FORMATS = {
    "int8": "int8, a scale for each output channel",
    "int4": "int4, symmetric, blocks of 32 along the inputs",
    "int4-block128": "the same in blocks of 128",
    "int4-asymmetric32": "int4 with zero points, blocks of 32 along the inputs, experts only",
    "int4-asymmetric128": "the same in blocks of 128",
    "fp8": "FP8 e4m3, blocks of 128 by 128",
    "mxfp4": "MXFP4, blocks of 32 along the inputs",
    "checkpoint": "the codes of the quantised checkpoint that the model was loaded from",
}
"""What ``quantize=`` may name, and what each is in words."""
CHECKPOINT = "checkpoint"
"""The name of "as in the files": no weight is rounded, the codes are those that were published."""
_EXPERTS_ONLY = (CHECKPOINT, "int4-asymmetric32", "int4-asymmetric128")
FLOAT = "float"
"""The name of "leave these experts as they are" in a plan."""
EVERY = "*"
"""The pattern of "all products, if there are any"."""
METHODS = {
    "nearest": "each weight to the nearest code, with the scale of its block's largest weight",
    "search": "to the nearest code, with the scale of least squared error",
    "gptq": "column by column, each error made good by the columns that follow; needs calibration=",
}
"""What ``QuantPlan(method=)`` may name, and what each is in words."""
NEAREST, SEARCH, GPTQ = METHODS
ACTIVATIONS = ("float", "int8")
"""What products of codes may read: the floats that they are given, or these rounded to 8 bits at each call."""


@dataclass(frozen=True)
class QuantPlan:
    """A format for the experts of each block.

    Args:
        blocks: module name pattern (as in ``fnmatch``) -> a name of ``FORMATS``, or ``"float"``; the first pattern
            that matches a block's module path decides.
        default: for blocks that no pattern matches.
        products: the same for products with a weight that lie outside of MoE blocks and are no part of a rewritten one,
            of an engine: attention's projections, ``lm_head``, dense FFNs that were left alone, shared experts too.
            Patterns match the path of the module that computes the product; one name of a format means all of them; {}
            leaves them.
        activations: what products of codes read: ``"float"``, or ``"int8"``, which is faster and another loss: each
            call rounds what they are given, block by block.
        method: how floats become codes: a name of ``METHODS``. ``"search"`` and ``"gptq"`` lose less in the same bytes;
            ``"gptq"`` reads the rows of ``calibration=`` that reach each expert and each product.
        costs: of a plan that was searched, what each block alone lost in each format: mean KL, or mean relative
            distance of the outputs of a model without next-token logits.

    Raises:
        UsageError: a format or a method that is none; a method for codes that are not rounded here.
    """

    blocks: Mapping[str, str] = field(default_factory=dict, hash=False)
    default: str = FLOAT
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False, compare=False, repr=False)
    products: Mapping[str, str] | str = field(default_factory=dict, hash=False)
    activations: str = "float"
    method: str = NEAREST

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Mapping) or not all(isinstance(p, str) and p for p in self.blocks):
            raise UsageError(
                f"QuantPlan(blocks={self.blocks!r}): it must map module name patterns to formats, like "
                "{'model.layers.0.*': 'int8'}"
            )
        for name in (*self.blocks.values(), self.default):
            check_format(name, "QuantPlan", (*FORMATS, FLOAT))
        object.__setattr__(self, "blocks", dict(self.blocks))
        products = as_products(self.products)
        object.__setattr__(self, "products", products)
        if self.activations not in ACTIVATIONS:
            raise UsageError(f"QuantPlan(activations={self.activations!r}): it must be one of {', '.join(ACTIVATIONS)}")
        check_method(self.method)
        asked = {*self.blocks.values(), self.default, *products.values()}
        if self.method != NEAREST and CHECKPOINT in asked <= {CHECKPOINT, FLOAT}:
            raise UsageError(
                f"QuantPlan(method={self.method!r}) is about rounding floats, and 'checkpoint' keeps the codes of the "
                "files: leave out method="
            )

    def format_of(self, block: str) -> str:
        """The name of the format that the block at this module path gets; ``"float"`` where it is left alone."""
        for pattern, name in self.blocks.items():
            if fnmatch.fnmatchcase(block, pattern):
                return name
        return self.default

    def product_format_of(self, path: str) -> str:
        """The name of the format that the product of the module at ``path`` gets; ``"float"`` where it is left."""
        return self.asked_of_product(path) or FLOAT

    def asked_of_product(self, path: str) -> str | None:
        """What the first pattern that matches ``path`` says; None where no pattern of ``products`` does."""
        assert isinstance(self.products, Mapping)
        return next((name for p, name in self.products.items() if fnmatch.fnmatchcase(path, p)), None)

    @property
    def for_engines(self) -> str:
        """What of the plan only engines have, in words; "" where there is nothing."""
        return "products" if self.products else ""

    @property
    def takes_checkpoint(self) -> bool:
        """Whether some block gets the codes of the checkpoint."""
        return CHECKPOINT in (*self.blocks.values(), self.default)

    def unmatched(self, blocks: Iterable[str]) -> list[str]:
        """The patterns that match none of ``blocks``."""
        names = list(blocks)
        return [p for p in self.blocks if not any(fnmatch.fnmatchcase(name, p) for name in names)]

    def __str__(self) -> str:
        told = [f"{pattern}: {name}" for pattern, name in self.blocks.items()]
        told.append(f"{'others' if told else 'all blocks'}: {self.default}")
        assert isinstance(self.products, Mapping)
        told += [f"products {pattern}: {name}" for pattern, name in self.products.items()]
        told += [f"activations: {self.activations}"] * (self.activations != "float")
        return ", ".join([*told, *[f"method: {self.method}"] * (self.method != NEAREST)])

    @classmethod
    def search(
        cls,
        model: PyObject,
        data: PyObject = None,
        *,
        budget: Mapping[str, float],
        formats: Sequence[str] = ("int8", "int4"),
        method: str = NEAREST,
        **fields: PyObject,
    ) -> QuantPlan:
        """The plan that meets ``budget``, chosen block by block from what each block's quantisation loses on ``data``.

        Args:
            model: what ``moeopt.optimize`` takes.
            data: the calls on which the loss is measured, as ``data=`` of ``moeopt.optimize``; None means inputs made
                up for the model.
            budget: a limit of a loss, like ``{"kl_mean": 0.01}`` (the fewest bytes that keep it are chosen), or
                ``{"bytes": n}`` of the experts' weights (the least loss that fits into them).
            formats: the names to choose among, beside ``"float"``.
            method: how floats become codes, in what is measured and in the plan.
            fields: of :class:`moeopt.Options`; ``verify`` is ``"off"`` here, for ``optimize`` verifies what it makes of
                the plan.

        Returns:
            a plan that names every block that can be quantised; its ``costs`` say what each lost alone. A limit of a
            loss that no format keeps for a block leaves that block's floats.

        Raises:
            UsageError: a budget or a method that is none, or bytes that no plan fits into; the message says how many
                are needed.
        """
        found: QuantPlan = importlib.import_module("moeopt.frontends.search_plan").search(
            model, data, budget, formats, method, fields
        )
        return found


def as_products(value: PyObject) -> dict[str, str]:
    """``QuantPlan(products=)`` by pattern; ``UsageError`` where it is neither a format nor a mapping to formats."""
    given = {EVERY: value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not all(isinstance(p, str) and p for p in given):
        raise UsageError(
            f"QuantPlan(products={value!r}): it must be a format, or map patterns of module paths to formats, like "
            "{'lm_head': 'int8', '*.self_attn.*': 'int4'}"
        )
    for name in given.values():
        check_format(name, "QuantPlan(products=)", [*(f for f in FORMATS if f not in _EXPERTS_ONLY), FLOAT])
    return dict(given)


def check_method(name: PyObject) -> None:
    """``UsageError`` where ``name`` is no way of rounding."""
    if not isinstance(name, str) or name not in METHODS:
        close = difflib.get_close_matches(str(name).lower(), METHODS, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]!r}? " if close else ""
        what = ", ".join(f"{n} ({words})" for n, words in METHODS.items())
        raise UsageError(f"method={name!r} is no way of rounding: {meant}the methods are {what}")


def check_format(name: PyObject, option: str, known: Iterable[str] = tuple(FORMATS)) -> None:
    """``UsageError`` where ``name`` is no format that experts can be quantised to."""
    names = list(known)
    if isinstance(name, str) and name in names:
        return
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5) if isinstance(name, str) else []
    meant = f"did you mean {close[0]!r}? " if close else ""
    what = ", ".join(f"{n} ({FORMATS[n]})" if n in FORMATS else n for n in names)
    raise UsageError(f"{option}={name!r} is no format: {meant}the formats are {what}")


def as_quantize(value: PyObject) -> QuantPlan | None:
    """``quantize=`` as a :class:`QuantPlan`; None stays None."""
    if value is None or isinstance(value, QuantPlan):
        return value
    if isinstance(value, Mapping):
        raise UsageError("quantize is a mapping: give quantize=QuantPlan({pattern: format, ...}, default=...)")
    check_format(value, "quantize")
    return QuantPlan(default=value)
