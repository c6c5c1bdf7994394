"""``--quantize``, ``--quantize-products``, ``--activations`` and ``--quantize-method`` as what ``optimize`` takes."""

from __future__ import annotations

from collections.abc import Sequence

from moeopt.errors import UsageError
from moeopt.value_types import PyObject


def as_quantize(
    experts: str | None, products: Sequence[str], activations: str | None, method: str | None = None
) -> PyObject:
    """The name of a format, or a ``QuantPlan`` where more than the experts is asked for; None for neither.

    Args:
        experts: a format.
        products: each a format, for all products, or ``pattern=format``.
        activations, method: as ``QuantPlan`` has them.

    Raises:
        UsageError: there is no such format, or a word of ``products`` is not one of the two, or says twice what holds
            for one pattern, or there is a method and nothing to round.
    """
    if method is not None and experts is None and not products:
        raise UsageError(f"--quantize-method {method} says how weights are rounded: give --quantize int4 as well")
    if not products and activations is None and method is None:
        return experts
    from moeopt.options import QuantPlan  # it loads torch
    from moeopt.options.quant_plan import NEAREST

    asked: dict[str, str] = {}
    for word in products:
        before, equals, after = (part.strip() for part in word.partition("="))
        name, format = (before, after) if equals else ("*", before)
        if not name or not format or "," in word:
            raise UsageError(
                f"--quantize-products {word}: it must be a format, or a pattern of names and a format, like "
                "--quantize-products lm_head=int8; give the option again for another one"
            )
        if name in asked:
            raise UsageError(
                f"--quantize-products is given twice for {'all products' if name == '*' else name}, {asked[name]} and "
                f"{format}: give it once"
            )
        asked[name] = format
    everything = asked.pop("*", None)  # the first pattern that matches decides
    given = asked if everything is None else {**asked, "*": everything}
    return QuantPlan(
        default=experts or "float", products=given, activations=activations or "float", method=method or NEAREST
    )
