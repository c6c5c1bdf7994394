"""Experts that share a weight, each with a constant of its own: tools for graphs store equal weights once.

    MatMul(x, W_0), MatMul(x, W_1), MatMul(x, W_0)    ->    MatMul(x, W_0), MatMul(x, W_1), MatMul(x, W_2)    W_2 = W_0

Whoever reads modules tells experts by their weights. The new constant is the same memory, called otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from moeopt.onnx_in.free_names import FreeNames
from moeopt.onnx_in.products import PRODUCTS
from moeopt.onnx_in.program import NodeStep


def each_its_own(steps: Sequence[NodeStep], constants: dict[str, Tensor]) -> list[NodeStep]:
    """The steps, in which no two products, and no two sums of these, read one weight; ``constants`` gets new names."""
    names = FreeNames([*constants, *(n for step in steps for n in (*step.inputs, *step.outputs))])
    products, seen, kept = set[str](), set[str](), list[NodeStep]()
    for step in steps:
        product = (step.domain, step.op_type) in PRODUCTS
        if product:
            products |= set(step.outputs)
        if product or (step.op_type == "Add" and not products.isdisjoint(step.inputs)):
            inputs = list(step.inputs)
            for number, name in enumerate(inputs):
                if name not in constants or not constants[name].is_floating_point() or constants[name].numel() < 2:
                    continue
                if name in seen:
                    inputs[number] = names.new(name)
                    constants[inputs[number]] = constants[name].view(constants[name].shape)
                seen.add(name)
            step = replace(step, inputs=tuple(inputs))
        kept.append(step)
    return kept
