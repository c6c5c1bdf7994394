"""The owner of a Hugging Face directory: what is in it, what would be rewritten, an engine, the same tokens."""

import sys
import tempfile
from pathlib import Path

import torch

from examples.paths.walk import moeopt
from examples.transformers_engine import small_model


def main(directory: Path, bundle: Path) -> None:
    moeopt("inspect", str(directory))
    moeopt("explain", str(directory))
    moeopt("optimize", str(directory), "--backend", "onnxruntime", "--out", str(bundle), "--quiet")

    from transformers import AutoModelForCausalLM

    import moeopt as library

    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    want = AutoModelForCausalLM.from_pretrained(directory).eval().generate(prompt, max_new_tokens=16, do_sample=False)
    got = library.load(bundle).generate(prompt, max_new_tokens=16, do_sample=False)
    assert torch.equal(got, want), f"the engine's tokens {got.tolist()} are not the model's {want.tolist()}"
    print(f"\n{want.shape[1]} tokens of {directory.name} and of its engine: the same")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "model"
        if len(sys.argv) == 1:
            small_model().save_pretrained(given)
        main(given, Path(folder) / "engine")
