"""What ``make run`` ends with: label noise at work on a small network, and the norms of a real one checked against autograd.

``ghostgrad tour`` or ``python -m ghostgrad.papers.tour``; under ``--out`` (runs/tour) it leaves the relu-1d run and ``figures/digits.png``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ghostgrad as gg

from ..training import CompileError, RunDirectory, RunDirectoryError, train
from .label_noise import ReLU1D

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["digits", "digits_figure", "main", "train_digits"]


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits, (1797, 64) with grey values from 0 to 1, and what they show, (1797,). They come with scikit-learn."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    return torch.from_numpy(data.data / 16.0), torch.from_numpy(data.target)


def train_digits(x: Tensor, y: Tensor, epochs: int = 20, seed: int = 0) -> tuple[nn.Module, float]:
    """A 64-128-64-10 network trained with Adam, and the share of the digits that it then gets right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # float64, because a digit read with certainty leaves a gradient of p - 1 ~ 1e-8, of which float32 keeps no figure to compare
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return model, (model(x).argmax(1) == y).double().mean().item()


def digits_figure(x: Tensor, y: Tensor, predicted: Tensor, sq: Tensor, show: int = 8) -> Figure:
    """The digits with the smallest and with the largest gradient norm."""
    from matplotlib.figure import Figure

    order = sq.argsort()
    figure = Figure(figsize=(1.15 * show, 4.0), layout="constrained")
    halves = np.atleast_1d(np.array(figure.subfigures(2, 1)))
    titles = ("Smallest gradient norm: nothing left to learn from these", "Largest gradient norm: odd, ambiguous or wrong")
    for half, which, title in zip(halves.flat, (order[:show], order.flip(0)[:show]), titles, strict=True):
        half.suptitle(title, fontsize=11)
        for ax, i in zip(half.subplots(1, show), which.tolist(), strict=True):
            ax.imshow(x[i].view(8, 8), cmap="gray_r", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            right = bool(predicted[i] == y[i])
            ax.set_title(f"a {y[i]}" + ("" if right else f", read as {predicted[i]}"), fontsize=8, color="black" if right else "#b00020")
            ax.set_xlabel(f"‖g‖ = {sq[i].sqrt():.1e}", fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the tour; 0 if every claim holds and every norm agrees."""
    parser = argparse.ArgumentParser(prog="ghostgrad tour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tour"), help="directory (default: %(default)s); a run that lies there is gone on with")
    parser.add_argument("--overwrite", action="store_true", help="start again instead")
    parser.add_argument("--steps", type=int, default=ReLU1D.steps, help="steps of the relu-1d run (default: %(default)s)")
    options = parser.parse_args(argv)

    print("1. A ReLU network through 12 points, with and without label noise\n")
    run = options.out / "relu-1d"
    try:
        setting = ReLU1D(steps=options.steps)
        print(f"{setting.announcement()}\n", flush=True)
        outcome = train(setting, run, resume=(run / "config.json").exists() and not options.overwrite, overwrite=options.overwrite)
    except (ValueError, RunDirectoryError, CompileError) as error:
        print(f"ghostgrad tour: {error}", file=sys.stderr)
        return 2
    print(f"\n{outcome.table()}")

    print("\n2. The gradient norms of a network that reads handwritten digits\n")
    x, y = digits()
    model, accuracy = train_digits(x, y)
    sq = gg.sqnorms(model, cross_entropy, x, y)  # (1797,)
    report = gg.check(model, cross_entropy, x[:64], y[:64])
    with torch.no_grad():
        predicted = model(x).argmax(1)
    print(f"A 64-128-64-10 network, trained to read {accuracy:.1%} of {len(x)} digits.")
    print("gg.check(model, loss, x, y): every parameter's norms against autograd, one sample at a time\n")
    print(report)
    share = np.sort(sq.double().numpy())[::-1]
    top = max(len(share) // 100, 1)
    print(f"\ngg.sqnorms(model, loss, x, y): {len(sq)} squared norms, median {sq.median():.1e}, largest {sq.max():.1e};")
    print(f"the top 1 % of the digits hold {share[:top].sum() / share.sum():.0%} of the sum.")

    directory = RunDirectory(options.out / "digits")
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.save_figure("digits", digits_figure(x, y, predicted, sq))
    print("\nPictures:")
    for picture in sorted(options.out.glob("*/figures/*.png")):
        print(f"  {picture}")
    return 0 if outcome.holds and report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
