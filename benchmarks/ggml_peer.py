"""llama.cpp's ggml as a peer: built from the sources that llama-cpp-python carries, and called by ctypes.

    python -m benchmarks.ggml_peer

downloads the source package by pip, builds ggml's CPU backend for this machine with cmake (``pip install cmake ninja``;
some minutes of one core) into moeopt's cache, once, and says where it lies.
Benchmarks find it there, and leave ggml out where it is not. Nothing of it is part of moeopt.

A block is the graph that llama.cpp makes of one: ``mul_mat_id`` with up and with gate, ``swiglu_split``, ``mul_mat_id``
with down, times the routing weights, the K outputs added. In F32 the rows stay floats; with Q8_0 and Q4_0 ggml rounds
them to 8 bits in blocks of 32. ``repacked`` is its buffer type that lays eight rows of Q4_0 side by side.
Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate; ggml names the innermost size first.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tarfile
import tempfile
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.options import cache_directory

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
"""Of the package; its ggml is 0.25.3."""
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "I32": 26}
_NODES = 256
"""More than any graph here has."""


class Missing(ImportError):
    """ggml was not built; says how to."""


def folder() -> Path:
    cache = cache_directory()
    if cache is None:
        raise Missing("ggml has no folder to lie in: name one with MOEOPT_CACHE")
    return cache / "benchmarks" / f"ggml-of-{PACKAGE}-{VERSION}"


def build() -> Path:
    """Download and compile, where that was not done yet; the folder of the libraries."""
    place = folder()
    if _libraries(place):
        return place
    if not shutil.which("cmake"):
        raise Missing("building ggml takes cmake: apt install cmake, or pip install cmake")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as aside:
        words = ["download", "--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "-d", aside]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        (source,) = Path(aside).glob("*.tar.gz")
        with tarfile.open(source) as archive:
            wanted = [m for m in archive.getmembers() if "/vendor/llama.cpp/ggml/" in m.name]
            archive.extractall(aside, members=wanted, filter="data")
        (ggml,) = Path(aside).glob("*/vendor/llama.cpp/ggml")
        (ggml / "ggml.pc.in").touch()  # of pkg-config: cmake asks for it, and the package leaves it out
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "GGML_NATIVE": "ON", "GGML_OPENMP": "OFF"}
        options |= {"GGML_CCACHE": "OFF", "GGML_BUILD_TESTS": "OFF", "GGML_BUILD_EXAMPLES": "OFF"}
        given = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", str(ggml), "-B", f"{aside}/build", *ninja, *given], check=True)
        subprocess.run(["nice", "cmake", "--build", f"{aside}/build", "-j1"], check=True)
        for library in Path(aside, "build").rglob("libggml*.so*"):
            shutil.copy(library, place / library.name)  # what a link leads to
    return place


def _libraries(place: Path) -> list[Path]:
    found = [place / f"libggml-{part}.so" for part in ("base", "cpu")]
    return found if all(path.is_file() for path in found) else []


class _InitParams(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool)]


P = c_void_p
_BASE: dict[str, tuple[Any, ...]] = {  # name -> result and arguments
    "ggml_init": (P, _InitParams), "ggml_version": (c_char_p,), "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,), "ggml_new_tensor_3d": (P, P, c_int, c_int64, c_int64, c_int64),
    "ggml_new_tensor_2d": (P, P, c_int, c_int64, c_int64), "ggml_mul_mat_id": (P, P, P, P, P),
    "ggml_swiglu_split": (P, P, P, P), "ggml_mul": (P, P, P, P), "ggml_add": (P, P, P, P),
    "ggml_view_2d": (P, P, P, c_int64, c_int64, c_size_t, c_size_t), "ggml_new_graph": (P, P),
    "ggml_build_forward_expand": (None, P, P), "ggml_set_input": (None, P), "ggml_set_output": (None, P),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, P, P, c_int64, c_int64, c_int64, POINTER(c_float)),
    "ggml_gallocr_new": (P, P), "ggml_gallocr_alloc_graph": (c_bool, P, P),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P), "ggml_backend_tensor_set": (None, P, P, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, P, P, c_size_t, c_size_t), "ggml_backend_graph_compute": (c_int, P, P),
    "ggml_backend_reg_dev_get": (P, P, c_size_t), "ggml_backend_reg_get_proc_address": (P, P, c_char_p),
    "ggml_backend_buft_name": (c_char_p, P), "ggml_backend_cpu_buffer_type": (P,),
}  # fmt: skip
_CPU: dict[str, tuple[Any, ...]] = {
    "ggml_backend_cpu_init": (P,), "ggml_backend_cpu_reg": (P,), "ggml_backend_cpu_set_n_threads": (None, P, c_int),
}  # fmt: skip


@functools.cache
def api() -> Any:
    """ggml's functions without their prefix, as attributes; ``Missing`` where it was not built."""
    paths = _libraries(folder())
    if not paths:
        raise Missing("ggml was not built here: python -m benchmarks.ggml_peer")
    found = {}
    for path, table in zip(paths, (_BASE, _CPU), strict=True):
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in table.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            found[name.removeprefix("ggml_")] = function
    return type("Ggml", (), {name: staticmethod(function) for name, function in found.items()})


def version() -> str:
    return str(api().version().decode())


def _repacked() -> int:
    """The buffer type that lays rows side by side."""
    g = api()
    reg = g.backend_cpu_reg()
    address = g.backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
    kinds = ctypes.CFUNCTYPE(POINTER(P), P)(address)(g.backend_reg_dev_get(reg, 0))
    at = 0
    while kinds[at]:
        if g.backend_buft_name(kinds[at]) == b"CPU_REPACK":
            return int(kinds[at])
        at += 1
    raise Missing("this ggml has no repacked buffers")


class GgmlExperts:
    """One block on weights (E, 2 * I, H), gate before up, and (E, H, I), which are copied into ggml's own ``kind``."""

    def __init__(self, gate_up: Tensor, down: Tensor, K: int, kind: str, repacked: bool = False) -> None:
        g = api()
        self.K, self.backend, self.graphs = K, g.backend_cpu_init(), dict[int, Any]()
        g.backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        matrices = [down, *gate_up.chunk(2, dim=1)]
        context = g.init(_InitParams(4 * g.tensor_overhead(), None, True))
        held = [g.new_tensor_3d(context, TYPES[kind], m.shape[2], m.shape[1], m.shape[0]) for m in matrices]
        buffers = _repacked() if repacked else g.backend_cpu_buffer_type()
        if not g.backend_alloc_ctx_tensors_from_buft(context, buffers):
            raise MemoryError("ggml has no memory for the weights")
        for to, matrix in zip(held, matrices, strict=True):
            floats = matrix.contiguous()
            rows, n = floats.numel() // floats.shape[2], floats.shape[2]
            data = floats
            if kind != "F32":
                data = torch.empty(rows * g.row_size(TYPES[kind], n), dtype=torch.uint8)
                g.quantize_chunk(TYPES[kind], floats.data_ptr(), data.data_ptr(), 0, rows, n, None)
            g.backend_tensor_set(to, data.data_ptr(), 0, data.numel() * data.itemsize)
        self.down, self.gate, self.up = held
        self.H = down.shape[1]

    def _graph(self, T: int) -> tuple[Any, ...]:
        """The graph of T tokens, its three inputs and its output."""
        g, K, H = api(), self.K, self.H
        context = g.init(_InitParams(_NODES * g.tensor_overhead() + g.graph_overhead(), None, True))
        x = g.new_tensor_3d(context, TYPES["F32"], H, 1, T)
        ids = g.new_tensor_2d(context, TYPES["I32"], K, T)
        weights = g.new_tensor_3d(context, TYPES["F32"], 1, K, T)
        for one in (x, ids, weights):
            g.set_input(one)
        up, gate = (g.mul_mat_id(context, w, x, ids) for w in (self.up, self.gate))
        outputs = g.mul_mat_id(context, self.down, g.swiglu_split(context, gate, up), ids)
        weighed = g.mul(context, outputs, weights)
        rows = [g.view_2d(context, weighed, H, T, 4 * H * K, 4 * H * k) for k in range(K)]
        y = functools.reduce(functools.partial(g.add, context), rows)
        g.set_output(y)
        graph = g.new_graph(context)
        g.build_forward_expand(graph, y)
        if not g.gallocr_alloc_graph(g.gallocr_new(g.backend_cpu_buffer_type()), graph):
            raise MemoryError("ggml has no memory for its graph")
        return graph, x, ids, weights, y

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        g, T = api(), len(x)
        if T not in self.graphs:
            self.graphs[T] = self._graph(T)
        graph, *inputs, output = self.graphs[T]
        for to, given in zip(inputs, (x, ids.int(), weights), strict=True):
            g.backend_tensor_set(to, given.data_ptr(), 0, given.numel() * given.itemsize)
        if g.backend_graph_compute(self.backend, graph):
            raise RuntimeError("ggml refuses the graph")
        y = torch.empty(T, self.H)
        g.backend_tensor_get(output, y.data_ptr(), 0, y.numel() * y.itemsize)
        return y


if __name__ == "__main__":
    place = build()
    print(f"ggml {version()} in {place}")
