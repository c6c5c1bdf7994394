"""What a backend says that has no form for what quantize= asks for."""

from __future__ import annotations

from moeopt.errors import UsageError
from moeopt.options import Options


def refuse_quantize(name: str, options: Options) -> None:
    """``UsageError`` where an engine of quantised experts is asked for."""
    if options.quantize is not None:
        raise UsageError(
            f"quantize is for the backends torch and onnxruntime, and backend={name!r} builds engines of float "
            "experts: leave one of the two out"
        )


def refuse_engine_parts(options: Options) -> None:
    """``UsageError`` where a plan asks the backend torch for what only engines have."""
    plan = options.quantize
    if plan is not None and plan.for_engines:
        raise UsageError(
            f"QuantPlan({plan.for_engines}=) is for engines, and backend='torch' keeps a model whose own modules "
            f"compute these: give backend='onnxruntime', or leave out {plan.for_engines}="
        )
