"""A distributed model in the wrappers of torch computes what it did, or an error says that experts were made alike."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moeopt
from moeopt.distributed.own_experts import digest
from tests.distributed.models import Layers, Stacked, optimised, tokens
from tests.distributed.ranks import run_ranks
from tests.toy_moe import Block, build

CPU = torch.device("cpu")


def kept_out(fast):
    return set(fast.expert_parameters.values())


def under_fsdp(fast):
    fully_shard(fast.model)
    return fast


def under_fsdp_but_experts(fast):
    fully_shard(fast.model, ignored_params=kept_out(fast))
    return fast


RIGHT = {
    "data parallel": lambda fast: DistributedDataParallel(fast.model),
    "fully_shard but experts": under_fsdp_but_experts,
    "FSDP but experts": lambda fast: FullyShardedDataParallel(
        fast.model, device_id=CPU, use_orig_params=True, ignored_states=[*kept_out(fast)]
    ),
}
ALIKE = {
    "data parallel around more": lambda fast: DistributedDataParallel(nn.Sequential(fast.model)),
    "fully_shard": under_fsdp,
    "FSDP": lambda fast: FullyShardedDataParallel(fast.model, device_id=CPU, use_orig_params=True),
}


class Told(Stacked):
    """Its stacks are the model's own, and its owner has told a wrapper of a Parameter before."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(1), requires_grad=False)
        self._ddp_params_and_buffers_to_ignore = ["own"]


def trained(mesh: DeviceMesh) -> tuple[bool, list[str]]:
    """Whether a stack's gradients are those of the model without a wrapper, and what the wrapper was told."""
    fast, grads = moeopt.distribute(optimised(Told), mesh, timeout=60), []
    for forward in (fast, DistributedDataParallel(fast.model)):
        fast.model.zero_grad()
        forward(tokens(4)).square().sum().backward()
        grads.append(fast.model.w_in.grad.to_local().clone())
    return torch.equal(*grads), list(fast.model._ddp_params_and_buffers_to_ignore)


def wrapped(rank: int, size: int) -> dict:
    """What each wrapper gives, and what a model under FSDP is told."""
    mesh, found = DeviceMesh("cpu", list(range(size))), {}
    with torch.no_grad():
        for name, wrap in (RIGHT | ALIKE).items():
            for model in (Layers, Stacked) if name == "data parallel" else (Layers,):
                dist.barrier()
                opt = optimised(model)
                want, around = opt(tokens(4)), wrap(fast := moeopt.distribute(opt, mesh, timeout=60))
                try:
                    found[name, model.__name__] = torch.equal(around(tokens(4)), want)
                except moeopt.UsageError as err:
                    found[name, model.__name__] = str(err)
        found["held"] = sorted(name for name in fast.expert_parameters if name.startswith("layers.0"))
        for call in (lambda: moeopt.inspect(fast.model), lambda: moeopt.profile(fast, [tokens(4)])):
            with pytest.raises(moeopt.UsageError) as refused:
                call()
            found.setdefault("divided", []).append(str(refused.value))
        for again in (False, True):
            model = FullyShardedDataParallel(build(Block), device_id=CPU, use_orig_params=again)
            for call in (moeopt.optimize, lambda m, x: moeopt.distribute(m, mesh), lambda m, x: moeopt.inspect(m)):
                with pytest.raises(moeopt.UsageError) as refused:
                    call(model, tokens(4))
                found.setdefault("FSDP", []).append(str(refused.value))
        opt = optimised(Layers)
        fully_shard(opt.model)
        with pytest.raises(moeopt.UsageError) as refused:
            moeopt.distribute(opt, mesh)
        found["sharded after optimize"] = str(refused.value)
    dist.barrier()
    found["trained"] = trained(mesh)
    return found


@pytest.fixture(scope="module")
def seen():
    return run_ranks(wrapped, 2)


def test_wrappers_that_leave_experts_alone_change_nothing(seen):
    for found in seen:
        assert all(found[name, "Layers"] is True for name in RIGHT), found
        assert found["data parallel", "Stacked"] is True
        same, told = found["trained"]
        assert same and told == ["own", "w_in", "w_out", ".w_in", ".w_out"]


@pytest.mark.parametrize("name", ALIKE)
def test_experts_that_were_made_alike_are_an_error_on_every_rank(seen, name):
    for found in seen:
        text = str(found[name, "Layers"])
        assert text.startswith("layers.0: rank 0 and rank 1 have the same numbers for different experts"), text
        assert "ignored_params=set(fast.expert_parameters.values())" in text


def test_the_parameters_that_wrappers_leave_alone_are_this_ranks(seen):
    for rank, found in enumerate(seen):
        names = [f"layers.0.experts.{e}.{w}.weight" for e in (2 * rank, 2 * rank + 1) for w in ("w1", "w2", "w3")]
        assert found["held"] == names


def test_a_part_of_a_model_is_neither_counted_nor_profiled(seen):
    for found in seen:
        counted, profiled = found["divided"]
        assert counted.startswith("layers.0 of Layers has a part of its experts here")
        assert "give the model that was optimised, as it is before moeopt.distribute" in counted
        assert profiled.endswith("profile what moeopt.optimize returned, before moeopt.distribute")


def test_a_model_under_fsdp_is_refused_with_the_way_out(seen):
    for found in seen:
        for optimized, distributed, counted in (found["FSDP"][:3], found["FSDP"][3:]):
            for text in (optimized, distributed):
                assert text.startswith("gate.weight of FullyShardedDataParallel is divided over processes already")
                assert "before fully_shard or FullyShardedDataParallel), optimise it" in text
            assert counted.startswith("gate.weight of FullyShardedDataParallel lies in a vector of FSDP")
        assert "is divided over processes already" in found["sharded after optimize"]


def test_a_digest_is_of_what_tells_weights_apart():
    a, b = torch.randn(3, 9), torch.randn(3, 9)
    assert digest(({"w": a}, "w")) != digest(({"w": b}, "w")) and digest(({"w": a}, "w")) == digest(({"w": a * 1}, "w"))
    assert not any(digest(({"w": w}, "w")) for w in (torch.zeros(3, 9), a[:, :1], a[:0], None))
    assert all(digest(({"w": a.to(dtype).t()}, "w")) for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    assert not digest(None)
