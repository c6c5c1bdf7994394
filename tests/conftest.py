"""One thread, and nothing measured: the machines that run the suite are small, and sums are then in one order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MOEOPT_MEASURE", "off")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory):
    """The bundle of a small block, for tests that only read it."""
    from tests.toy_moe import build, optimized

    return optimized(build()).save(tmp_path_factory.mktemp("toy") / "bundle")
