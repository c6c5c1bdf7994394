"""Asks the native operator what is known; run as a program, with numpy and ONNX Runtime only.

Reads ``questions.json`` in the working directory; the last line that it prints is "good", or what is wrong.
"""

import json
import sys
from typing import Any

from moeopt.value_types import PyObject

NUMPY = {"x": "f4", "ids": "i8", "weights": "f4", "y": "f4"}
REFUSED = "moeopt::Experts: "
"""How the words of the operator's own refusals begin: that they arrive shows the entries that make a status."""


def main() -> str:
    import numpy
    import onnxruntime as ort

    with open("questions.json") as file:
        said = json.load(file)

    def session(model: str, threads: int) -> PyObject:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.add_session_config_entry(*said["entry"])
        options.register_custom_ops_library(said["library"])
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    feeds: dict[str, Any] = {}
    for number, block in enumerate(said["blocks"]):
        values = {
            name: numpy.fromfile(f"{number}.{name}", NUMPY[name]).reshape(shape)
            for name, shape in block["shapes"].items()
        }
        want = values.pop("y")
        feeds = values
        for threads in (1, 2):
            (got,) = session(block["model"], threads).run(None, feeds)
            if got.shape != want.shape or not numpy.allclose(got, want, rtol=1e-4, atol=1e-4):
                far = abs(got - want).max() if got.shape == want.shape else "another shape"
                return f"block {number} with {threads} threads differs from its definition by {far}"
        nobody = {**feeds, "x": feeds["x"][:0], "ids": feeds["ids"][:0], "weights": feeds["weights"][:0]}
        if session(block["model"], 1).run(None, nobody)[0].shape != (0, want.shape[1]):
            return f"block {number} gives something for no token"
    try:
        session("wrong.onnx", 1)
        return "it takes a node whose constants are not those that its attributes say"
    except Exception as err:  # ONNX Runtime's own, of several classes
        if REFUSED not in str(err):
            return f"a wrong node is refused with other words: {err}"
    try:
        session(said["blocks"][0]["model"], 1).run(None, {**feeds, "ids": feeds["ids"][:1]})
        return "it takes a call whose inputs do not fit one another"
    except Exception as err:  # ONNX Runtime's own, of several classes
        if REFUSED not in str(err):
            return f"a wrong call is refused with other words: {err}"
    return "good"


if __name__ == "__main__":
    try:
        verdict = main()
    except Exception as problem:  # whatever it is, the parent says it
        verdict = " ".join(f"{type(problem).__name__}: {problem}".split())
    print(verdict)
    sys.stdout.flush()
