"""The figures of docs/performance.md, from a file of results; the same bytes for the same numbers.

python benchmarks/figures.py [--results benchmarks/results/cpu-avx512.json] [--out docs/figures]
"""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from peers import PEERS
from store import RESULTS, Results
from tables import GOALS

from ghostgrad.bench.measure import over_processes
from ghostgrad.bench.problems import title

OUT = Path(__file__).resolve().parent.parent / "docs/figures"

# method: (label, marker, colour, filled). Libraries by colour, their variants by marker.
STYLES = {
    "tap": ("ghostgrad, step with norms", "o", "#d1495b", True),
    "alone": ("ghostgrad, norms alone", "o", "#d1495b", False),
    "loop": ("a loop over samples", "x", "#333333", True),
    "vmap": (PEERS["vmap"].title, "s", "#00798c", True),
    "vmap-chunked": (PEERS["vmap-chunked"].title, "s", "#00798c", False),
    "opacus-hooks": (PEERS["opacus-hooks"].title, "^", "#edae49", True),
    "opacus-ghost": (PEERS["opacus-ghost"].title, "v", "#edae49", False),
    "opacus-functorch": (PEERS["opacus-functorch"].title, "D", "#edae49", False),
    "backpack": (PEERS["backpack"].title, "P", "#6a4c93", True),
    "torchjd": (PEERS["torchjd"].title, "*", "#52796f", True),
    "torchjd-unbatched": (PEERS["torchjd-unbatched"].title, "*", "#52796f", False),
    "expanded-weights": (PEERS["expanded-weights"].title, "h", "#7f8c9a", True),
}


def step_cost(results: Results) -> Figure:
    """Every method's step over the plain one, a line per problem; what is wrong or refused is not there."""
    problems, peers = results.problems(), [method for method in STYLES if method in PEERS]
    half = len(peers) // 2  # above the line that ours lie on, and the others below it, so that near ones can be told apart
    steps = {method: i - half + (i >= half) for i, method in enumerate(peers)}  # ..., -2, -1, 1, 2, ...
    height = {method: 0.07 * step + math.copysign(0.06, step) for method, step in steps.items()}
    figure = Figure(figsize=(9.5, 1.6 + 0.62 * len(problems)), layout="constrained")
    ax = figure.subplots()
    for y, problem in enumerate(problems):
        ax.axhline(y, color="0.9", linewidth=0.8, zorder=0)
        if problem in GOALS:
            ax.plot([GOALS[problem]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.2, zorder=1)
        for method, (_, marker, colour, filled) in reversed(STYLES.items()):  # ours on top
            row = results.find(problem, method)
            if row and row["verdict"] == "ok":
                x, size = over_processes(row["processes"]).median, {"*": 8.0, "o": 8.0}.get(marker, 5.5)
                style = {"color": colour, "markerfacecolor": colour if filled else "white", "markeredgewidth": 1.2, "markersize": size}
                ax.plot(x, y + height.get(method, 0), marker, zorder=2, **style)
    ax.axvline(1, color="0.4", linewidth=1, zorder=1)
    ax.set_xscale("log")
    ticks = [0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500]
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    labels = [textwrap.fill(title(problem).replace(" = ", "\u00a0=\u00a0").replace(" x ", "\u00a0x\u00a0"), 36) for problem in problems]
    ax.set_yticks(range(len(problems)), labels, fontsize=8)
    ax.tick_params(left=False)
    ax.set_ylim(len(problems) - 0.4, -0.6)
    ax.set_xlabel("time of a step over the plain training step (log scale)")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    used = {row["method"] for row in results.rows if row["verdict"] == "ok" and row["threads"] == 1}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markerfacecolor=colour if filled else "white", markersize=7, label=label)
        for method, (label, marker, colour, filled) in STYLES.items()
        if method in used
    ]
    handles.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=11, label="goal for the step with norms"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8, columnspacing=1.4, handletextpad=0.4)
    return figure


FIGURES = {"step-cost": step_cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    with mpl.rc_context({"svg.hashsalt": "ghostgrad", "svg.fonttype": "path"}):
        for name, draw in FIGURES.items():
            draw(results).savefig(arguments.out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
