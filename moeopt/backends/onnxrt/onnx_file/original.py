"""The file as it was given, run by ONNX Runtime: to see what flows into its regions, and to be compared with."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.bundle_files import ONNX_FILE
from moeopt.backends.onnxrt.onnx_file.stitch import all_names
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Prepare, Session, no_change
from moeopt.backends.onnxrt.trial import ended_by
from moeopt.errors import MoeoptError, UsageError
from moeopt.lower.onnx.experts_node import DOMAIN
from moeopt.onnx_in.counted_loops import with_counted_rounds
from moeopt.onnx_in.free_names import FreeNames
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.tensors import tensor_of
from moeopt.untrusted import shown_line
from moeopt.value_types import JsonValue, OnnxModel, PyObject


def session_on(
    proto: OnnxModel, directory: str | os.PathLike[str] | None, name: str, threads: int | None = None,
    prepare: Prepare = no_change,
) -> Session:  # fmt: skip
    """A session of a graph whose data files lie in ``directory``; weights stay there, unpacked.

    Loops whose rounds data decide run so many of them at most: such a run is a ``UsageError``.

    Raises:
        UsageError: ONNX Runtime does not load it; the message says why.
    """
    options = runtime().SessionOptions()
    options.log_severity_level = 4  # what fails here is told by an error
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.disable_prepacking", "1")
    if directory is not None:
        folder = os.path.realpath(directory)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if any(opset.domain == DOMAIN for opset in proto.opset_import):
        raise UsageError(
            f"{name}: its experts run in moeopt's own kernel already; give model.onnx, which is beside it in its bundle"
        )
    try:
        counted, guards = with_counted_rounds(proto)
        return CountedSession(counted, guards, name, options, prepare, Path(directory or "."))
    except MoeoptError:
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes
        raise UsageError(f"{name}: ONNX Runtime {runtime().__version__} does not load it: {_said(err)}") from None


NO_MORE_ROUNDS = "moeopt tries no more rounds of a loop"
"""What is said of a run that was stopped."""


class CountedSession(Session):
    """A session of a file whose loops are stopped after so many rounds.

    The first call with an input that has no elements is tried in a process of its own, which it may end.

    Args:
        guards: for the name of each node that stops a loop that loop's own and its rounds.
        name: of the file; ``folder``: where its weights lie.
    """

    def __init__(
        self, proto: OnnxModel, guards: Mapping[str, tuple[str, int]], name: str, options: PyObject, prepare: Prepare,
        folder: Path,
    ) -> None:  # fmt: skip
        super().__init__(proto.SerializeToString(), "cpu", options, prepare=prepare)
        self._guards, self._name, self._proto, self._folder = guards, name, proto, folder
        self._without_elements: set[tuple[tuple[int, ...], ...]] = set()

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        shapes = tuple(tuple(value.shape) for value in inputs.values())
        if shapes not in self._without_elements and any(not value.numel() for value in inputs.values()):
            self._try_apart(inputs)
            self._without_elements.add(shapes)
        try:
            return super().run(inputs)
        except UsageError as err:
            for guard, (loop, rounds) in self._guards.items():
                if f"{guard!r}" in str(err):
                    raise UsageError(
                        f"{self._name}: the node {shown_line(loop)!r} (Loop) ran its body {rounds} times and went on, "
                        f"and {NO_MORE_ROUNDS} whose condition data decide; give example inputs on which it ends"
                    ) from None
            raise

    def _try_apart(self, inputs: Mapping[str, Tensor]) -> None:
        signal = ended_by(self._proto, self._folder, inputs)
        if signal is not None:
            sizes = ", ".join(f"{shown_line(name)} {tuple(value.shape)}" for name, value in inputs.items())
            raise UsageError(
                f"{self._name}: ONNX Runtime {runtime().__version__} ends the process that runs the file on these "
                f"sizes (signal {signal}, in a process of its own): {sizes}; give inputs without a size of 0"
            )


_MOST_READ = 2000
"""Characters of a message, which may quote names of the file at any length."""


def _said(err: Exception) -> str:
    """The first line of an error of ONNX Runtime, without the place in its own code that it names first."""
    first = next(iter(str(err).strip()[:_MOST_READ].splitlines()), type(err).__name__)
    return shown_line(re.sub(r"\S+\.(?:cc|h):\d+ .*?\)(?: const)? (?=[A-Z])", "", first))[:300]


def with_outputs(proto: OnnxModel, names: Sequence[str]) -> OnnxModel:
    """A copy of a graph that also gives the values called ``names``, those left out that it gives already."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    there = {value.name for value in (*made.graph.output, *made.graph.input)}
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in there)
    return made


class InnerValues:
    """Runs of a file that also give values inside of it.

    Args:
        names: of the values.
    """

    def __init__(self, file: OnnxFile, names: Sequence[str]) -> None:
        self._names = list(dict.fromkeys(names))
        held = file.model.graph.initializers  # of an input that a caller may leave out
        self._defaults = {n: tensor_of(held[n].const_value, n) for n in self._names if n in held}
        self._session = session_on(with_outputs(file.proto, self._names), file.directory, file.name)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values by name. ``UsageError`` where the graph stops on these inputs."""
        results = dict(zip(self._session.outputs, self._session.run(feeds), strict=True))
        known = {**self._defaults, **feeds, **results}
        return {name: known[name] for name in self._names}


class ShakenOriginal:
    """The file with a factor behind each region's exit, which is 1 or 1 plus noise of the size of rounding.

    Args:
        exits: names of the values; ``scales``: the standard deviation of each one's noise, relative.
    """

    def __init__(self, file: OnnxFile, scales: Mapping[str, float], session_options: JsonValue = None) -> None:
        del session_options
        import onnx

        self._outputs = [value.name for value in file.proto.graph.output]
        self._scales = dict(scales)
        proto = onnx.ModelProto()
        proto.CopyFrom(file.proto)
        names = FreeNames(all_names(file.proto.graph))
        self._factors = {name: names.new(f"moeopt.factor.{n}") for n, name in enumerate(scales)}
        kinds = _element_types(file, list(scales))
        _multiply(proto.graph, self._factors)
        for name, factor in self._factors.items():
            proto.graph.input.append(onnx.helper.make_tensor_value_info(factor, kinds[name], None))
        self._kinds = kinds
        self._session = session_on(proto, file.directory, file.name)

    def run(self, feeds: Mapping[str, Tensor], seed: int | None, shapes: Mapping[str, Sequence[int]]) -> list[Tensor]:
        """The outputs; with a seed, under noise. ``shapes``: of the exits on these inputs."""
        generator = torch.Generator().manual_seed(seed or 0)
        given = dict(feeds)
        for name, factor in self._factors.items():
            noise = torch.zeros(1) if seed is None else torch.randn(list(shapes[name]), generator=generator)
            dtype = _torch_dtype(self._kinds[name])
            given[factor] = (1 + self._scales[name] * noise.double()).to(dtype)
        results = dict(zip(self._session.outputs, self._session.run(given), strict=True))
        return [results[name] for name in self._outputs]


def _multiply(graph: PyObject, factors: Mapping[str, str]) -> None:
    """Put a value times its factor where it is read; what makes the value makes it under another name."""
    import onnx

    names = FreeNames({*all_names(graph), *factors.values()})
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        for number, name in enumerate(node.output):
            if name in factors:
                inner, factor = names.new(f"{name}.moeopt.still"), factors[name]
                node.output[number] = inner
                nodes.append(onnx.helper.make_node("Mul", [inner, factor], [name], name=f"moeopt.{factor}"))
    held = onnx.GraphProto(node=nodes)  # a copy, before the originals go
    del graph.node[:]
    graph.node.MergeFrom(held.node)


def _element_types(file: OnnxFile, names: list[str]) -> dict[str, int]:
    import onnx

    if not names:
        return {}
    inner = InnerValues(file, names)
    types = {spec.name: spec.type for spec in inner._session.session.get_outputs()}
    words = {"tensor(float)": "FLOAT", "tensor(float16)": "FLOAT16", "tensor(bfloat16)": "BFLOAT16"}
    return {name: getattr(onnx.TensorProto, words.get(types[name], "DOUBLE")) for name in names}


def _torch_dtype(kind: int) -> torch.dtype:
    from moeopt.onnx_in.dtypes import torch_dtype

    return torch_dtype(kind, "a factor")


__all__ = ["InnerValues", "ShakenOriginal", "session_on", "with_outputs"]


def fingerprint(file: OnnxFile) -> dict[str, str]:
    """What a bundle says of the file that it was made of."""
    digest = hashlib.sha256()
    if file.path is None:
        digest.update(file.proto.SerializeToString(deterministic=True))
    else:
        with file.path.open("rb") as source:
            while piece := source.read(1 << 22):
                digest.update(piece)
    return {"class": file.name, "sha256": digest.hexdigest(), "kind": ONNX_FILE}
