"""Who was given a bundle and nothing else: what it holds, whether it is right here, how damage is told."""

import shutil
import sys
import tempfile
from pathlib import Path

from examples.paths.walk import moeopt
from examples.serve_engine import make


def main(bundle: Path, folder: Path) -> None:
    moeopt("info", str(bundle))
    moeopt("verify", str(bundle))

    import onnxruntime

    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    print("\nplain ONNX Runtime takes", {i.name: i.shape for i in session.get_inputs()})

    damaged = Path(shutil.copytree(bundle, folder / "damaged"))
    weights = damaged / "model.onnx.data"
    blob = bytearray(weights.read_bytes())
    blob[len(blob) // 2] ^= 1
    weights.write_bytes(blob)
    said = moeopt("verify", str(damaged), code=1)
    assert "model.onnx.data" in said and "Traceback" not in said
    print("\none bit of the weights was turned, and the bundle was refused by name")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "bundle"
        if len(sys.argv) == 1:
            make(given)
        main(given, Path(scratch))
