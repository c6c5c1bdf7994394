"""``--quantize``, ``--quantize-products`` and ``--activations`` as what ``optimize`` takes."""

from __future__ import annotations

from collections.abc import Sequence

from moeopt.value_types import PyObject


def as_quantize(experts: str | None, products: Sequence[str], activations: str | None) -> PyObject:
    """The name of a format, or a ``QuantPlan`` where more than the experts is asked for; None for neither.

    Args:
        experts: a format.
        products: each a format, for all products, or ``pattern=format``.
        activations: as ``QuantPlan`` has it.

    Raises:
        UsageError: there is no such format.
    """
    if not products and activations is None:
        return experts
    from moeopt.options import QuantPlan  # it loads torch

    words = [word.partition("=") for word in products]
    asked = dict((name, format) if equals else ("*", name) for name, equals, format in words)
    everything = asked.pop("*", None)  # the first pattern that matches decides
    given = asked if everything is None else {**asked, "*": everything}
    return QuantPlan(default=experts or "float", products=given, activations=activations or "float")
