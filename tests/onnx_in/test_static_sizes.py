"""Files that were exported for one size: numbers that happen to be that size, and are none."""

import numpy as np
import torch
from onnx import numpy_helper

from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, run
from tests.onnx_in.by_hand import E, File, H

T = 3


def fixed(file, result):
    """The file for T rows alone."""
    model = file.model(result)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = T
    return model


def right(model):
    found = optimized(model)
    assert [(b.status, b.reason) for b in found.report.blocks] == [("rewritten", "")]
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found(x=x), run(model, x=x)[0], rtol=1e-4, atol=1e-5)


def test_the_end_of_a_column_is_no_number_of_rows():
    """The third expert has the column from 2 to 3 of the table, and there are 3 rows."""
    for axes in ([1], [-1]):
        file, total = File(), None
        table = file.table(*file.router())
        for e in range(E):
            column = file.node("Slice", table, *map(file.constant, ([e], [e + 1], axes)))
            part = file.node("Mul", file.expert("x", f"experts.{e}"), column)
            total = part if total is None else file.node("Add", total, part)
        right(fixed(file, total))


def test_the_length_of_a_shape_is_no_number_of_rows():
    """Exporters put ones for what a size of -1 leaves as it is: as many as there are axes, 3 here."""
    file = File()
    table = file.table(*file.router())
    ones = file.node("ConstantOfShape", file.constant([3]), value=numpy_helper.from_array(np.array([1])))
    kept = file.constant([E, -1, -1])
    open_ = file.node("Equal", kept, file.node("Mul", ones, file.constant(np.int64(-1))))
    wide = file.node("Expand", file.node("Unsqueeze", "x", file.constant([0])), file.node("Where", open_, ones, kept))
    hidden = file.node("Relu", file.node("MatMul", wide, file.weight(E, H, 12, name="up")))
    every = file.node("MatMul", hidden, file.weight(E, 12, H, name="down"))
    columns = file.node("Unsqueeze", file.node("Transpose", table, perm=[1, 0]), file.constant([2]))
    right(fixed(file, file.sum(file.node("Mul", every, columns), 0, 0)))
