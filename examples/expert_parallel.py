"""The experts of a model on several processes: here two on this machine's CPU, elsewhere GPUs by the same call.

    torchrun --standalone --nproc-per-node 2 -m examples.expert_parallel

Each rank calls the model on tokens of its own; a token whose expert lies on another rank is sent there and comes back.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moeopt
from examples.quickstart import TwoOfEight


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))

    torch.manual_seed(0)  # the same model on every rank; moeopt.distribute checks that it is
    model = TwoOfEight().eval()
    tokens = torch.randn(2, 16, 64)
    whole = moeopt.optimize(model, tokens)
    with torch.no_grad():
        expected = whole(tokens)

    fast = moeopt.distribute(whole, mesh)
    del model, whole  # the other ranks' experts are freed with them
    mine = tokens.view(size, -1, 64)[rank].unsqueeze(0)
    with torch.no_grad():
        got = fast(mine)

    held = sum(p.numel() for p in fast.model.parameters())
    far = (got - expected.view(size, -1, 64)[rank]).abs().max().item()
    for turn in range(size):
        dist.barrier()
        if turn == rank:
            print(
                f"rank {rank} of {size}: {held:,} weights, {fast.traffic.rows:,} bytes of tokens sent, at most "
                f"{far:.1e} from one process",
                flush=True,
            )
    if rank == 0:
        print(fast.certificate.notes[-2], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
