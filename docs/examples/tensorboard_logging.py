"""Per-sample gradient norms as a histogram, and the noise scale as a curve, in TensorBoard: ``tensorboard --logdir runs``."""

from __future__ import annotations

import collections

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import ghostgrad as gg


def main(folder: str, epochs: int = 3) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 64, shuffle=True)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    recent: collections.deque[gg.NoiseScale] = collections.deque(maxlen=20)
    step = 0
    with SummaryWriter(folder) as writer:
        for _ in range(epochs):
            for inputs, target in loader:
                optimiser.zero_grad()
                with gg.tap(model, by_param=True, grad_sqnorm=True) as tap:
                    loss = nn.functional.cross_entropy(model(inputs), target)
                    loss.backward()
                recent.append(gg.noise_scale(tap))
                noise = gg.noise_scale(recent)  # numerator and denominator are averaged, each for itself
                writer.add_scalar("loss", loss.detach(), step)
                writer.add_histogram("sample_norm", tap.sqnorms().sqrt(), step)
                writer.add_scalar("noise/scale", noise.scale, step)
                writer.add_scalar("noise/trace", noise.trace, step)
                writer.add_scalar("noise/grad_sqnorm", noise.grad_sqnorm, step)
                for name, of_param in (noise.by_param or {}).items():
                    writer.add_scalar(f"snr/{name}", of_param.snr(len(inputs)), step)
                optimiser.step()
                step += 1


if __name__ == "__main__":
    main("runs")
