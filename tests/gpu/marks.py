"""What a test of ONNX Runtime's CUDA provider is marked with."""

import pytest
import torch

from moeopt.backends.onnxrt.providers import available

ON_CUDA_PROVIDER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "cuda" not in available(),
        reason="needs a CUDA GPU, a torch that sees it, and onnxruntime-gpu",
    ),
]
