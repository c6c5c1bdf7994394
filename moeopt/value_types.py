"""Names for values that have no Python type here: of libraries that load lazily or have no types, and of users' code.

Each name is ``Any`` to the type checker and says to the reader what stands there. No other file writes a bare ``Any``
as the type of a parameter, a result, a field or a variable (``tests/test_types.py``).
"""

from typing import Any, TypeAlias

OnnxValue: TypeAlias = Any
"""An ``onnx_ir.Value``."""

OnnxNode: TypeAlias = Any
"""An ``onnx_ir.Node``."""

OnnxGraph: TypeAlias = Any
"""An ``onnx_ir.Graph`` or ``onnx_ir.Function``."""

OnnxModel: TypeAlias = Any
"""An ``onnx_ir.Model``."""

OnnxAttribute: TypeAlias = Any
"""What an attribute of an ONNX node may hold: a number, a word, a list, a tensor or a graph."""

OrtObject: TypeAlias = Any
"""An object of ``onnxruntime``: a session, its options, a value on a device."""

TrtObject: TypeAlias = Any
"""An object of ``tensorrt``: a builder, a network, a layer, an engine, a context."""

FxArg: TypeAlias = Any
"""An argument of an ``fx.Node``: a node, a plain value, or a tuple, list, dict or slice of such."""

FxTarget: TypeAlias = Any
"""The target of an ``fx.Node``: an overload of ATen, a Python function, or a name."""

TritonDtype: TypeAlias = Any
"""A dtype of ``triton.language``, or None where the kernel has no such value."""

ExpertFunction: TypeAlias = Any
"""What each expert computes: an ``ExpertsSpec``, or a ``RowFunction`` where it fits none."""

ExpertBank: TypeAlias = Any
"""The weights of a block's experts: ``ExpertWeights``, or a ``SlotBank`` for a ``RowFunction``."""

JsonValue: TypeAlias = Any
"""What ``json`` reads: None, a bool, a number, a string, a list or a dict of such."""

PyObject: TypeAlias = Any
"""Any object at all, mostly of the user's model: an argument, a result, an attribute, a leaf of a nested structure."""
