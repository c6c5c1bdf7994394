"""Calls of each command that a reader can copy; they end the command's help."""

EXAMPLES = {
    "optimize": (
        "path/to/hf-model --out bundle",
        "path/to/hf-model --backend onnxruntime --dtype bf16 --out engine",
        "my_models.py:build --quantize int4 --limit kl_mean=0.01 --html report.html",
        "model.onnx --out engine",
    ),
    "explain": ("my_models.py:build", "path/to/hf-model --html report.html"),
    "inspect": ("path/to/config.json --quantize int4", "path/to/hf-model --device H100 --batch 8"),
    "profile": ("my_models.py:build --data my_data.py:batches --html load.html",),
    "plan": ("path/to/config.json --devices 16 --device h100 --dtype fp8",),
    "verify": (
        "bundle",
        "bundle --original my_models.py:build",
        "bundle --against kept/certificate.json",
    ),
    "triton": ("bundle repository",),
}
"""The words after ``moeopt COMMAND``; a test reads each with that command's own parser."""


def examples(command: str) -> str:
    """The end of ``command``'s help, an example a paragraph."""
    return "\n\n".join(["Examples:", *(f"moeopt {command} {words}" for words in EXAMPLES[command])])
