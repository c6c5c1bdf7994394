"""Files that were exported for one size: numbers that happen to be that size, and are none."""

import numpy as np
import torch
from onnx import numpy_helper

from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, reason, run
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


def in_patches(file, rows):
    """A block on ``rows`` of each patch, which the best expert of a patch's mean takes."""
    patches = file.node("Reshape", "x", file.constant([-1, rows, H]))
    mean = file.node("ReduceMean", patches, axes=[1], keepdims=0)
    best = file.node("ArgMax", file.node("MatMul", mean, file.weight(H, E)), axis=-1, keepdims=0)
    every = file.node("MatMul", patches, file.node("Gather", file.weight(E, H, H, name="experts.w"), best, axis=0))
    return file.node("Reshape", every, file.constant([-1, H]))


def test_a_file_that_takes_multiples_is_read_on_two_of_them():
    """On the one size of the first call that ran, the number of rows of a patch looks like the number of all rows."""
    file = File()
    model = file.model(in_patches(file, T))
    found, x = optimized(model), torch.randn(4 * T, H)
    torch.testing.assert_close(found(x=x), run(model, x=x)[0], rtol=1e-4, atol=1e-5)


def test_a_file_of_free_sizes_that_ran_on_one_alone_has_the_reason():
    file = File()
    rows = file.node("Reshape", "x", file.constant([T, H]))
    model = file.model(
        file.weighed(rows, file.table(*file.router(x=rows)), lambda x, e: file.expert(x, f"experts.{e}"))
    )
    assert reason(model).startswith(
        "the file says that sizes of its inputs are free (x ['t', 8]), and of those that were tried it ran on one "
        "alone ([3, 8]), so that nobody sees which numbers in it are sizes: export it with sizes that are fixed, or"
    )
