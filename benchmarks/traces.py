"""Hessian traces: how near float32 comes to float64, what a probe costs, what happens at kinks; and the same probes by other libraries.

    pip install -r benchmarks/requirements.txt
    python benchmarks/traces.py [--tables accuracy answers cost kinks] [--pairs 7] [--results benchmarks/results/traces.json] [--figure x.svg]

``accuracy``, ``answers`` and ``kinks`` depend on the seed alone (and on rounding), ``cost`` on the machine: medians over interleaved pairs with the plain
training step. PyHessian and curvlinops take part in ``answers`` and ``cost`` where they are installed. Tables that are not asked for stay in the file as they
are; ``--tables`` alone draws the figure from it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from grid import keep_memory, machine, save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostgrad as gg
from ghostgrad.bench.measure import interleave
from ghostgrad.bench.problems import PROBLEMS, Problem

RESULTS = Path(__file__).resolve().parent / "results/traces.json"
Row = dict[str, Any]
TABLES = ("accuracy", "answers", "cost", "kinks")
PROBES = 64
WORKLOADS: dict[str, dict[str, int]] = {"mlp": {}, "cnn": {"batch": 16}, "block": {"batch": 2}}
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


def workloads(smooth: bool) -> Iterator[tuple[str, dict[str, int], Problem]]:
    """Those that traces are timed on; smooth ones have GELU in the place of ReLU."""
    for name, sizes in WORKLOADS.items():
        torch.manual_seed(0)
        problem = PROBLEMS[name](**sizes)
        for module in problem.model.modules() if smooth else ():
            for child, layer in module.named_children():
                if isinstance(layer, nn.ReLU):
                    setattr(module, child, nn.GELU())
        yield name, sizes, problem


# Other libraries: the trace with n probes of their own, as they document it, and v . H v of given vectors by the same product.
Vectors = list[list[Tensor]]


class PyHessian:
    package, module = "PyHessian", "pyhessian"

    def __init__(self, problem: Problem):
        import pyhessian

        self.problem, self.utils = problem, pyhessian.utils
        self.hessian = pyhessian.hessian(problem.model, problem.loss_fn, data=(*problem.inputs, problem.target), cuda=False)

    def trace(self, probes: int) -> None:
        self.hessian.trace(maxIter=probes, tol=-math.inf)  # or it stops as soon as the mean moves little
        self.problem.model.zero_grad(set_to_none=True)

    def samples(self, vectors: Vectors) -> Tensor:
        products = (self.utils.hessian_vector_product(self.hessian.gradsH, self.hessian.params, v) for v in vectors)
        return torch.stack([self.utils.group_product(product, v) for product, v in zip(products, vectors)])


class Curvlinops:
    package, module = "curvlinops-for-pytorch", "curvlinops"

    def __init__(self, problem: Problem):
        import curvlinops

        loss = nn.MSELoss() if problem.loss_fn is F.mse_loss else nn.CrossEntropyLoss()
        data = [(*problem.inputs, problem.target)]
        self.library = curvlinops
        self.operator = curvlinops.HessianLinearOperator(problem.model, loss, list(problem.model.parameters()), data, check_deterministic=False)

    def trace(self, probes: int) -> None:
        self.library.hutchinson_trace(self.operator, probes)

    def samples(self, vectors: Vectors) -> Tensor:
        return torch.stack([sum((a * b).sum() for a, b in zip(self.operator @ v, v)) for v in vectors])


PEERS = {"PyHessian": PyHessian, "curvlinops": Curvlinops}


def installed() -> dict[str, Any]:
    return {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(peer.module) is not None}


def versions() -> dict[str, str]:
    return {peer.package: importlib.metadata.version(peer.package) for peer in installed().values()}


def fails(step: Callable[[], object]) -> str | None:
    """Its error's first line."""
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def math_attention() -> contextlib.AbstractContextManager[None]:
    """The fused attention kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def answers() -> list[Row]:
    """The same probes, in float32, by each method and library: how far their samples are from those of double backward in float64."""
    rows, n = [], 8
    for name, sizes, problem in workloads(smooth=True):
        model, (x,), target = problem.model, problem.inputs, problem.target
        exact = gg.hessian_trace(copy.deepcopy(model).double(), problem.loss_fn, wide(x), wide(target), method="hvp", probes=n).samples
        vectors: Vectors = [[torch.zeros_like(p, requires_grad=False) for p in model.parameters()] for _ in range(n)]
        for i, v in enumerate(vectors):
            gg.noise.perturb_(v, i << 32, 1.0)
        found: dict[str, Tensor] = {}
        errors: dict[str, str | None] = {}
        for method in ("two_point", "two_point_grad", "hvp"):
            loss = problem.losses if method == "two_point" else problem.loss_fn  # of each sample: less rounding
            found[method] = gg.hessian_trace(model, loss, x, target, method=method, probes=n).samples
        for method, peer in installed().items():

            def samples() -> None:
                found[method] = peer(problem).samples(vectors).double()  # noqa: B023

            errors[method] = fails(samples)
            model.zero_grad(set_to_none=True)
            if errors[method]:
                with math_attention():
                    fails(samples)
            model.zero_grad(set_to_none=True)
        for method in dict.fromkeys((*found, *errors)):
            row: Row = {"problem": name, **sizes, "method": method}
            if method in found:
                row |= {"mean": float(found[method].mean()), "error": float((found[method] - exact).norm() / exact.norm())}
            if errors.get(method):
                row["fused attention" if method in found else "fails"] = errors[method]
            rows.append(row)
            print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), flush=True)
    return rows


def cost(pairs: int) -> list[Row]:
    """What one more probe takes, over the plain step: processor time of one thread."""
    few, many = 8, 20  # not fewer: as many probes are evaluated at twice sigma in both
    rows = []
    for name, sizes, problem in workloads(smooth=False):
        model, target = problem.model, problem.target

        def plain() -> None:
            problem.loss_fn(model(*problem.inputs), target).backward()  # noqa: B023
            model.zero_grad(set_to_none=True)  # noqa: B023

        def ours(method: str, probes: int) -> Callable[[], object]:
            options = {} if method == "hvp" else {"sigma": 1e-3}
            return lambda: gg.hessian_trace(model, problem.loss_fn, *problem.inputs, target, method=method, probes=probes, **options)  # noqa: B023

        def theirs(peer: Any, probes: int) -> Callable[[], object]:
            def step() -> None:
                with math_attention():
                    peer(problem).trace(probes)  # noqa: B023

            return step

        methods = {
            **{method: (ours, method) for method in ("two_point", "two_point_grad", "hvp")},
            **{name: (theirs, peer) for name, peer in installed().items() if not fails(theirs(peer, 1))},
        }
        times = interleave(plain, {f"{method} {n}": call(of, n) for method, (call, of) in methods.items() for n in (few, many)}, pairs, clock=time.process_time)
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


def figure(rows: list[Row], to: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

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
    with mpl.rc_context({"svg.hashsalt": "ghostgrad", "svg.fonttype": "path"}):
        fig.savefig(to, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="draw the figure there")
    arguments = parser.parse_args()
    if "cost" in arguments.tables:
        keep_memory()
    torch.set_num_threads(1)
    tables: dict[str, list[Row]] = {}
    head = machine(1) | {"peers": versions()}
    if arguments.results.exists():
        found = json.loads(arguments.results.read_text())
        tables = {name: found[name] for name in TABLES if name in found}
        if "cost" not in arguments.tables:
            head = {name: value for name, value in found.items() if name not in tables}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name in arguments.tables:
            tables[name] = {"accuracy": accuracy, "answers": answers, "cost": lambda: cost(arguments.pairs), "kinks": kinks}[name]()
    if arguments.tables:
        save(arguments.results, head, tables)
    if arguments.figure:
        figure(tables["kinks"], arguments.figure)


if __name__ == "__main__":
    main()
