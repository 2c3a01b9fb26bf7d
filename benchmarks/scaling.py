"""How the cost of a step grows with the batch, with the length of its sequences and with the width of its layers.

    python benchmarks/scaling.py [--rounds 9] [--threads 1] [--out results.json]
    python benchmarks/scaling.py --draw results.json docs/figures/scaling.svg

The step is that of a transformer encoder layer, forward and backward: plain, inside a tap, and norms alone. Each size is swept over two decades while the
others stay; every round runs the three in turn. A slope is that of log time over log size at the four largest sizes, by least squares.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from grid import Step, clock, keep_memory, machine, save
from scipy.stats import linregress
from torch import nn

import ghostgrad as gg

BASE = {"B": 8, "T": 64, "width": 128}
FITTED = 4  # of the largest sizes
SWEEPS = {"B": [1, 2, 4, 8, 16, 32, 64, 128, 256], "T": [4, 8, 16, 32, 64, 128, 256, 512, 1024], "width": [8, 16, 32, 64, 128, 256, 512, 1024]}
NAMES = {"plain": "plain step", "tap": "in a tap", "alone": "norms alone"}


def steps(B: int, T: int, width: int) -> dict[str, Step]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True)
    x, y = torch.randn(B, T, width), torch.randn(B, T, width)

    def plain() -> None:
        model.zero_grad()
        F.mse_loss(model(x), y).backward()

    def tapped() -> None:
        model.zero_grad()
        with gg.tap(model) as tap:
            F.mse_loss(model(x), y).backward()
        tap.sqnorms()

    return {"plain": plain, "tap": tapped, "alone": lambda: gg.sqnorms(model, F.mse_loss, x, y)}


def measure(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Milliseconds of each, medians over the rounds, and medians of the ratios to the plain step of the same round."""
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    ways = steps(**sizes)
    for i in range(rounds + 2):
        for name, step in ways.items():
            elapsed = clock(step, 1)
            if i >= 2:  # the first rounds warm up
                times[name].append(1e3 * elapsed)
    ratios = {name: statistics.median(x / y for x, y in zip(times[name], times["plain"])) for name in ("tap", "alone")}
    return {**sizes, "ms": {name: round(statistics.median(values), 4) for name, values in times.items()}, "ratio": {k: round(v, 3) for k, v in ratios.items()}}


def slope(sizes: list[int], ms: list[float]) -> tuple[float, float]:
    """Of log time over log size at the largest sizes, with its standard error."""
    fit = linregress(np.log(sizes[-FITTED:]), np.log(ms[-FITTED:]))
    return round(float(fit.slope), 3), round(float(fit.stderr), 3)


def draw(results: dict[str, Any], to: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"B": "samples B", "T": "positions T", "width": "width"}
    with mpl.rc_context({"svg.hashsalt": "ghostgrad", "svg.fonttype": "path", "font.size": 9}):
        figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), sharey=True, layout="constrained")
        for axis, key in zip(axes, SWEEPS):
            rows = results[key]
            sizes = [row[key] for row in rows]
            for name, style in zip(NAMES, ({"color": "0.45", "marker": "o"}, {"color": "C0", "marker": "s"}, {"color": "C1", "marker": "^", "ls": "--"})):
                fitted, _ = results["slopes"][key][name]
                axis.loglog(sizes, [row["ms"][name] for row in rows], markersize=3.5, lw=1.2, label=f"{NAMES[name]}: {fitted:.2f}", **style)
            rest = ", ".join(f"{other} = {rows[0][other]}" for other in BASE if other != key)
            axis.set_xlabel(labels[key])
            axis.set_title(rest, fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes[:: 2 if len(sizes) > 8 else 1], [str(size) for size in sizes[:: 2 if len(sizes) > 8 else 1]], minor=False)
            axis.grid(alpha=0.25, lw=0.6)
            axis.legend(title=f"slope at the {FITTED} largest", title_fontsize=8, fontsize=8, frameon=False, loc="upper left", alignment="left")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("milliseconds a step")
        figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("RESULTS", "FIGURE"), help="draw such a file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.draw[0].read_text()), arguments.draw[1])
        return
    keep_memory()
    torch.set_num_threads(arguments.threads)
    sweeps: dict[str, list[dict[str, Any]]] = {}
    slopes: dict[str, dict[str, tuple[float, float]]] = {}
    for key, sizes in SWEEPS.items():
        rows = sweeps[key] = [measure({**BASE, key: size}, arguments.rounds) for size in sizes]
        slopes[key] = {name: slope(sizes, [row["ms"][name] for row in rows]) for name in NAMES}
        for row in rows:
            print(f"{key:5} {row[key]:5}  {row['ms']['plain']:9.3f} ms  tap {row['ratio']['tap']:5.2f}  alone {row['ratio']['alone']:5.2f}", flush=True)
        print(f"{key:5} slopes " + ", ".join(f"{name} {value:.2f} +- {error:.2f}" for name, (value, error) in slopes[key].items()))
    if arguments.out:
        save(arguments.out, {**machine(arguments.threads), "rounds": arguments.rounds, "slopes": slopes}, sweeps)


if __name__ == "__main__":
    main()
