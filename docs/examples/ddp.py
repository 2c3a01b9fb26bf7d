"""Per-sample gradient norms and the noise scale of the whole batch under ``DistributedDataParallel``, in plain PyTorch: two processes on the CPU.

Every process taps its own share of the batch: the norms are those of its samples, and need no communication. DDP averages ``.grad`` over the processes during
backward, so that afterwards it is the gradient of the whole batch, whose norm and the gathered norms of all samples give the noise scale over all pairs.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ghostgrad as gg

WORLD, B = 2, 16  # processes, samples in each


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(WORLD * B, 10, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


def train(rank: int, port: int, steps: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    model = DistributedDataParallel(make_model())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        x, y = (t[rank * B : (rank + 1) * B] for t in make_batch(step))
        optimiser.zero_grad()
        with gg.tap(model) as tap:
            nn.functional.cross_entropy(model(x), y).backward()
        own = tap.sqnorms()  # (B,)
        shares = [torch.empty_like(own) for _ in range(WORLD)]
        dist.all_gather(shares, own)
        norms = torch.cat(shares)  # (WORLD * B,)
        of_mean = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        noise = gg.NoiseScale.from_norms(norms, of_mean)
        if rank == 0:
            print(f"step {step} norm {norms.sqrt().mean():.6g} largest {norms.sqrt().max():.6g} trace {noise.trace:.6g} squared {noise.grad_sqnorm:.6g}")
        optimiser.step()
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    mp.spawn(train, (free_port(), 3), nprocs=WORLD)
