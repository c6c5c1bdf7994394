"""What a graph's inputs and outputs are called: as the model's owner calls them, for users of plain ONNX Runtime.

    forward(input_ids, past, *, mask)        input_ids, past.0, past.1, mask
    returns {"logits": .., "rest": (.., ..)} logits, rest.0, rest.1;  a lone tensor is "output"

A name that is taken already, by an input say, gets "_out" or a number behind it; so every name is unique.

Free sizes are called by the end and the axis where they stand first, so that equal ones have one name; the two of a
tokenizer's ids are batch and sequence:

    x (x_0, x_1, 64), mask (x_0, x_1)        input_ids (batch, sequence)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moeopt.bundle.tree import LEAF
from moeopt.value_types import PyObject

KEY = "causal_lm"
"""Where the signature of a causal language model keeps how its caller is called."""
_OTHER = re.compile(r"[^A-Za-z0-9_.]")
_SIZE = re.compile(r"[A-Za-z_]\w*")
_MADE_UP = re.compile(r"[su]\d+")
"""What torch calls a size that nobody named."""
_KNOWN = {"input_ids": ("batch", "sequence"), "inputs_embeds": ("batch", "sequence"), "pixel_values": ("batch",)}


def input_names(signature: Mapping[str, Any]) -> list[str]:
    """One name for each leaf of the arguments, in order."""
    positional, keywords = signature["in_tree"]["items"]
    count, parameters = len(positional["items"]), list(signature["parameters"])
    named = parameters[:count] if len(parameters) == count + len(keywords["keys"]) else []
    paths = _paths({**positional, "type": "dict", "keys": named or [f"args.{n}" for n in range(count)]}, "")
    return _unique((*paths, *_paths(keywords, "")), set())


def output_names(signature: Mapping[str, Any], taken: Iterable[str]) -> list[str]:
    """One name for each leaf of the result, in order; none is in ``taken``."""
    return _unique([path or "output" for path in _paths(signature["out_tree"], "")], set(taken), "_out")


def name_ends(graph: PyObject, signature: dict[str, Any]) -> None:
    """Rename the ends of an ``onnx_ir`` graph and their free sizes, and write the names into ``signature``.

    An input entry gets ``"onnx"`` if it is a tensor of the graph, an output entry always.
    """
    for value in (*graph.inputs, *graph.outputs, *_inner_values(graph)):
        _settle(value)
    by_name = inputs_of(graph, signature)
    ins, inner = input_names(signature), _inner_values(graph)
    for entry, name in zip(signature["inputs"], ins, strict=True):
        if "dtype" in entry:
            entry["onnx"] = name
    outs = output_names(signature, ins)
    tensors = [(e["tensor"], name) for e, name in zip(signature["outputs"], outs, strict=True) if "tensor" in e]
    for entry, name in zip(signature["outputs"], outs, strict=True):
        if "tensor" in entry:
            entry["onnx"] = name
    wanted = {*ins, *outs}
    used = wanted | {value.name for value in inner}
    for value in inner:
        if value.name in wanted:
            number = next(n for n in range(1, len(used) + 2) if f"{value.name}_{n}" not in used)
            value.name = f"{value.name}_{number}"
            used.add(value.name)
    for number, value in enumerate((*graph.inputs, *graph.outputs)):
        value.name = f"moeopt.end.{number}"  # free every name first: two may trade places
    for entry in signature["inputs"]:
        if "onnx" in entry and entry["name"] in by_name:
            by_name[entry["name"]].name = entry["onnx"]
    for number, name in tensors:
        graph.outputs[number].name = name
    if KEY not in signature:  # whose sizes have names
        _name_free_sizes(graph, signature)


def name_sizes(graph: PyObject, names: Mapping[str, str]) -> None:
    """Rename free sizes wherever a shape of ``graph`` names them, alone or in an expression (``s70 + s44``)."""
    import onnx_ir as ir

    def renamed(dim: PyObject) -> int | ir.SymbolicDim:
        word = getattr(dim, "value", dim)
        return ir.SymbolicDim(_SIZE.sub(lambda m: names.get(m[0], m[0]), word)) if isinstance(word, str) else dim

    inner = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*graph.inputs, *graph.outputs, *inner):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])  # a shape may be frozen


def _name_free_sizes(graph: PyObject, signature: dict[str, Any]) -> None:
    """Names for sizes that have none yet; another graph of the same ends may have given them to ``signature``."""
    entries = [entry for entry in signature["inputs"] if "onnx" in entry]
    stated = [size for entry in entries for size in entry["shape"] if isinstance(size, str)]
    names = _SizeNames({size for size in stated if not _MADE_UP.fullmatch(size)})
    for entry in entries:
        sizes = list(enumerate(entry["shape"]))
        entry["shape"] = [names.give(n, entry["onnx"], axis) if isinstance(n, str) else n for axis, n in sizes]
    signature["sizes"] = {names.get(size, size): bounds for size, bounds in signature["sizes"].items()}
    shapes = {entry["onnx"]: entry["shape"] for entry in entries}
    for value in graph.inputs:
        told = zip(_words(value), shapes.get(value.name, ()), strict=False)
        names.update({size: name for size, name in told if size is not None and isinstance(name, str)})
    for value in graph.outputs:
        for axis, size in enumerate(_words(value)):
            if size is not None:
                names.give(size, value.name, axis)
    name_sizes(graph, names)


class _SizeNames(dict[str, str]):
    """What free sizes are called, by what torch called them. ``used``: names that others have."""

    def __init__(self, used: set[str]) -> None:
        super().__init__()
        self._used = used

    def give(self, size: str, end: str, axis: int) -> str:
        """The name of ``size``, which stands at ``axis`` of ``end``; one that a person gave stays."""
        if size in self or not _MADE_UP.fullmatch(size):
            return self.get(size, size)
        known = _KNOWN.get(end, ())
        name = known[axis] if axis < len(known) else ""
        if not name or name in self._used:
            name = f"{end}_{axis}".replace(".", "_")
        while name in self._used:
            name += "_"
        self._used.add(name)
        self[size] = name
        return name


def called(inputs: list[dict[str, Any]], bounds: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """``inputs`` of a bundle's signature, and the bounds of their free sizes, with a name for each that has none."""
    stated = {size for entry in inputs for size in entry.get("shape", ()) if isinstance(size, str)}
    names = _SizeNames({size for size in stated if not _MADE_UP.fullmatch(size)})
    told = []
    for entry in inputs:
        end = str(entry.get("onnx", entry.get("name", "")))
        sizes = enumerate(entry.get("shape", ()))
        shape = [names.give(size, end, axis) if isinstance(size, str) else size for axis, size in sizes]
        told.append({**entry, "shape": shape} if "shape" in entry else entry)
    return told, {names.get(size, size): of for size, of in bounds.items()}


def _words(value: PyObject) -> list[str | None]:
    """Of each size of a value: its name, None for a number or an expression."""
    words = [getattr(dim, "value", dim) for dim in value.shape or ()]
    return [word if isinstance(word, str) and word.isidentifier() else None for word in words]


def inputs_of(graph: PyObject, signature: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of an ``onnx_ir`` graph by the name of their entry in ``signature``.

    torch's exporter calls an input that is returned as it came ``x_orig``, and the output ``x``.
    """
    known = {entry["name"] for entry in signature["inputs"]}
    return {v.name if v.name in known else v.name.removesuffix("_orig"): v for v in graph.inputs}


def _settle(value: PyObject) -> None:
    """Sizes that the exporter wrote as words, "16", become numbers."""
    for axis, dim in enumerate(value.shape or ()):
        word = getattr(dim, "value", None)
        if isinstance(word, str) and word.isdigit():
            value.shape[axis] = int(word)


def _inner_values(graph: PyObject) -> list[Any]:
    ends = {id(v) for v in (*graph.inputs, *graph.outputs)}
    values = [v for node in graph.all_nodes() for v in node.outputs] + list(graph.initializers.values())
    return [v for v in values if id(v) not in ends]


def _paths(tree: PyObject, prefix: str) -> Iterator[str]:
    if tree == LEAF:
        yield prefix
        return
    keys = tree.get("keys") or range(len(tree["items"]))
    for key, item in zip(keys, tree["items"], strict=True):
        word = _OTHER.sub("_", str(key)) or "_"
        lead = prefix or ("output" if isinstance(key, int) else "")
        yield from _paths(item, f"{lead}.{word}" if lead else word)


def _unique(names: Iterable[str], taken: set[str], suffix: str = "") -> list[str]:
    out: list[str] = []
    for name in names:
        free = name
        if free in taken and suffix:
            free = f"{name}{suffix}"
        number = 1
        while free in taken:
            number += 1
            free = f"{name}{suffix}_{number}"
        taken.add(free)
        out.append(free)
    return out
