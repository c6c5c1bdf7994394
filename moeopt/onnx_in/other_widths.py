"""Experts of one block whose hidden layers have different widths: none of them is missing, and they are no one shape.

x (T, H) -> W1 (H, 12) -> W2 (12, H)      beside      x (T, H) -> W1 (H, 20) -> W2 (20, H)
"""

from __future__ import annotations

from moeopt.onnx_in.chains import ExpertChains, expert_chains, matrices
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.products import weight_products


def other_widths(index: GraphIndex, chains: ExpertChains, scored: int) -> str:
    """Why ``chains`` are fewer than the experts that are ``scored``: those of other widths that begin at the same rows
    are the rest; "" where they are not."""
    held = [c for c in expert_chains(index, weight_products(index)) if c.root is chains.root]
    ends = _ends(chains)
    alike = [c for c in held if ends is not None and _ends(c) == ends]
    widths = sorted({matrices(c)[0][0][-1] for c in alike})
    if sum(c.experts for c in alike) != scored or len(widths) < 2:
        return ""
    return (
        f"its {scored} experts have hidden layers of different widths ({', '.join(map(str, widths[:4]))}"
        f"{', ...' if len(widths) > 4 else ''}), and blocks are cut out of a file around experts of one shape; read as "
        "a module it may be rewritten: moeopt.optimize(moeopt.from_onnx(path), inputs, backend='onnxruntime')"
    )


def _ends(chains: ExpertChains) -> tuple[int, int] | None:
    """The features that its functions read and give; None where their matrices are not to be seen."""
    first, last = matrices(chains)
    shapes = (first[0], last[0]) if len(first) == len(last) == 1 else ()
    return (shapes[0][0], shapes[1][-1]) if shapes else None
