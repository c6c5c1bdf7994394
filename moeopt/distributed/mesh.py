"""Which processes share a model: the ranks of a one-dimensional ``DeviceMesh``, or of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Ranks(NamedTuple):
    """The mesh, its ranks in the job in the mesh's order, and the backend that connects them."""

    mesh: DeviceMesh
    ranks: list[int]
    backend: str


def ranks_of(mesh: PyObject) -> Ranks:
    """``mesh`` as :class:`Ranks`.

    Raises:
        UsageError: it is no such thing, has several dimensions, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError(
            "moeopt.distribute needs an initialised torch.distributed: start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            which = f"mesh[{names[-1]!r}]" if names else "one of its dimensions"
            raise UsageError(
                f"mesh has {mesh.ndim} dimensions; give the one that the experts are divided over: {which}"
            )
        group = mesh.get_group()
    elif isinstance(mesh, dist.ProcessGroup):
        group = mesh
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        mesh = DeviceMesh.from_group(group, device)
    else:
        raise UsageError(
            f"mesh is a {type(mesh).__name__}; give a torch.distributed DeviceMesh of one dimension, as "
            "init_device_mesh('cpu', (2,)) makes it, or a process group"
        )
    if dist.get_rank(group) < 0:
        raise UsageError("this process is not in the mesh: call moeopt.distribute on the mesh's own ranks only")
    return Ranks(mesh, dist.get_process_group_ranks(group), dist.get_backend(group))
