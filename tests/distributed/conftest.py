"""This process as the only rank of a job."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@pytest.fixture
def alone(tmp_path):
    """A mesh of one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()
