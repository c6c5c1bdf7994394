"""Without a GPU, tests/conftest.py has Triton's interpreter run the kernels: NumPy instead of PTX, the same source."""

import pytest


@pytest.fixture(scope="session")
def interpreted():
    """Skips where the kernels can't be interpreted, with the reason."""
    triton = pytest.importorskip("triton", reason="triton is not installed here")
    if not triton.knobs.runtime.interpret:
        pytest.skip("a GPU is here, so Triton compiles; tests/ops/test_cuda.py runs the kernels on it")
