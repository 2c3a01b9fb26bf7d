"""Hessian traces: how near float32 comes to float64, what a probe costs, and what happens at kinks.

    python benchmarks/traces.py [--tables accuracy cost kinks] [--pairs 7] [--results benchmarks/results/traces.json] [--figure x.svg]

``accuracy`` and ``kinks`` depend on the seed alone (and on rounding), ``cost`` on the machine: medians over interleaved pairs with the plain training step.
Tables that are not asked for stay in the file as they are; ``--tables`` alone draws the figure from it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from grid import keep_memory, machine, save
from matplotlib.figure import Figure
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad.bench.measure import interleave
from ghostgrad.bench.problems import PROBLEMS

RESULTS = Path(__file__).resolve().parent / "results/traces.json"
Row = dict[str, Any]
PROBES = 64
FORMS = (("two_point_grad", "mean"), ("two_point", "mean"), ("two_point", "per sample"))  # and how the loss is given


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 20, width: int = 32, length: int = 12):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.body, self.head = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width)), nn.Linear(width, vocabulary)

    def forward(self, index: Tensor) -> Tensor:  # (B, T) -> (B, V, T)
        return self.head(self.body(self.tokens(index) + self.positions)).movedim(2, 1)


def mlp(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(128, 20), torch.randint(10, (128,))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "GELU MLP": lambda: (mlp(nn.GELU), *images()),
    "tanh MLP": lambda: (mlp(nn.Tanh), *images()),
    "transformer": lambda: (Transformer(), torch.randint(20, (32, 12)), torch.randint(20, (32, 12))),
}


def per_sample(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none").reshape(len(y), -1).mean(1)


def wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def nets() -> Iterator[tuple[str, int, str, nn.Module, Tensor, Tensor]]:
    """At the start and after 60 steps of Adam, which reach a small loss."""
    for (name, build), seed in itertools.product(NETS.items(), range(3)):
        torch.manual_seed(seed)
        model, x, y = build()
        yield name, seed, "start", model, x, y
        optimizer = torch.optim.Adam(model.parameters(), 1e-2 if name != "transformer" else 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        yield name, seed, "trained", model, x, y


def accuracy() -> list[Row]:
    """sigma="auto" in float32 against double backward in float64, with the same probes."""
    rows = []
    for name, seed, when, model, x, y in nets():
        exact = gg.hessian_trace(copy.deepcopy(model).double(), F.cross_entropy, wide(x), y, method="hvp", probes=PROBES)
        row: Row = {"net": name, "seed": seed, "when": when, "loss": float(F.cross_entropy(model(x), y)), "trace": exact.mean, "stderr": exact.stderr}
        for method, given in FORMS:
            est = gg.hessian_trace(model, per_sample if given == "per sample" else F.cross_entropy, x, y, method=method, probes=PROBES)
            row[f"{method}, {given}"] = {
                "error": abs(est.mean / exact.mean - 1),
                "sigma": est.sigma,
                "at_2_sigma": (est.at_2_sigma or math.nan) / est.mean - 1,
                "steps": est.cost,
                "warnings": len(est.warnings),
            }
        rows.append(row)
        print(f"{name:12} {seed} {when:8} {exact.mean:9.4g}", *(f"{form[0]}, {form[1]}: {row[', '.join(form)]['error']:.2%}" for form in FORMS), flush=True)
    return rows


def cost(pairs: int) -> list[Row]:
    """What one more probe takes, over the plain step."""
    few, many = 8, 20  # not fewer: as many probes are evaluated at twice sigma in both
    rows = []
    for name, sizes in (("mlp", {}), ("cnn", {"batch": 16}), ("block", {"batch": 2})):
        torch.manual_seed(0)
        problem = PROBLEMS[name](**sizes)
        model, target = problem.model, problem.target

        def plain() -> None:
            problem.loss_fn(model(*problem.inputs), target).backward()  # noqa: B023
            model.zero_grad(set_to_none=True)  # noqa: B023

        def call(method: str, probes: int) -> Callable[[], object]:
            options = {} if method == "hvp" else {"sigma": 1e-3}
            return lambda: gg.hessian_trace(model, problem.loss_fn, *problem.inputs, target, method=method, probes=probes, **options)  # noqa: B023

        methods = ("two_point", "two_point_grad", "hvp")
        times = interleave(plain, {f"{method} {n}": call(method, n) for method in methods for n in (few, many)}, pairs)
        for method in methods:
            ratios = [
                (more - less) / (many - few) / ((before + after) / 2)
                for (before, less), (after, more) in zip(times[f"{method} {few}"], times[f"{method} {many}"])
            ]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows.append(
                {"problem": name, **sizes, "method": method, "pairs": len(ratios), "ratio": round(ratio, 3), "low": round(low, 3), "high": round(high, 3)}
            )
            print(f"{name:6} {method:15} {ratio:.2f} plain steps a probe ({low:.2f} to {high:.2f})", flush=True)
    return rows


def kinks() -> list[Row]:
    """Estimates at many scales, of a smooth net and of one with kinks, in float32 and float64, beside double backward."""
    rows = []
    for name, activation in (("GELU", nn.GELU), ("ReLU", nn.ReLU)):
        torch.manual_seed(0)
        model, (x, y) = mlp(activation), images()
        for dtype in (torch.float64, torch.float32):
            net, inputs = copy.deepcopy(model).to(dtype), x.to(dtype)
            exact = gg.hessian_trace(net, F.cross_entropy, inputs, y, method="hvp", probes=256)
            rows.append({"net": name, "dtype": str(dtype)[6:], "method": "hvp", "sigma": None, "mean": exact.mean, "stderr": exact.stderr})
            for method, sigma in itertools.product(("two_point", "two_point_grad"), (10 ** (k / 4) for k in range(-20, -2))):
                est = gg.hessian_trace(net, F.cross_entropy, inputs, y, method=method, probes=256, sigma=sigma)
                rows.append({"net": name, "dtype": str(dtype)[6:], "method": method, "sigma": sigma, "mean": est.mean, "stderr": est.stderr})
    return rows


def figure(rows: list[Row]) -> Figure:
    fig = Figure(figsize=(9.5, 3.6), layout="constrained")
    styles = {"two_point": ("differences of losses", "#d1495b"), "two_point_grad": ("differences of gradients", "#00798c")}
    for ax, net in zip(fig.subplots(1, 2), ("GELU", "ReLU")):
        exact = next(row for row in rows if row["net"] == net and row["method"] == "hvp" and row["dtype"] == "float64")
        ax.axhline(exact["mean"], color="0.3", linewidth=1, label="double backward")
        ax.axhspan(exact["mean"] - 2 * exact["stderr"], exact["mean"] + 2 * exact["stderr"], color="0.9", zorder=0)
        for method, (label, colour) in styles.items():
            for dtype, line in (("float64", "-"), ("float32", ":")):
                chosen = [row for row in rows if (row["net"], row["method"], row["dtype"]) == (net, method, dtype)]
                sigma, mean = [row["sigma"] for row in chosen], [row["mean"] for row in chosen]
                ax.plot(sigma, mean, line, color=colour, linewidth=1.5, label=f"{label}, {dtype}")
                if dtype == "float64":
                    bounds = ([row["mean"] + sign * 2 * row["stderr"] for row in chosen] for sign in (-1, 1))
                    ax.fill_between(sigma, *bounds, color=colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log")
        reach = 4 if net == "GELU" else 8
        ax.set_ylim(exact["mean"] * (1 - reach), exact["mean"] * (1 + reach))
        ax.set_xlabel("sigma")
        ax.set_title(f"{net} network", fontsize=10)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    fig.axes[0].set_ylabel("trace of the Hessian")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="*", choices=("accuracy", "cost", "kinks"), default=["accuracy", "cost", "kinks"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="draw the figure there")
    arguments = parser.parse_args()
    if "cost" in arguments.tables:
        keep_memory()
    torch.set_num_threads(1)
    tables: dict[str, list[Row]] = {}
    head = machine(1)
    if arguments.results.exists():
        found = json.loads(arguments.results.read_text())
        tables = {name: found[name] for name in ("accuracy", "cost", "kinks") if name in found}
        if "cost" not in arguments.tables:
            head = {name: value for name, value in found.items() if name not in tables}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name in arguments.tables:
            tables[name] = {"accuracy": accuracy, "cost": lambda: cost(arguments.pairs), "kinks": kinks}[name]()
    if arguments.tables:
        save(arguments.results, head, tables)
    if arguments.figure:
        with mpl.rc_context({"svg.hashsalt": "ghostgrad", "svg.fonttype": "path"}):
            figure(tables["kinks"]).savefig(arguments.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
