"""The plan against the clock: every formula of a layer's norms, over a grid of shapes that straddles the plan's decisions.

    python benchmarks/grid.py [--threads 1] [--only float32 float64 bfloat16 conv] [--part 1/4] [--out results.json]
    python benchmarks/grid.py --show results.json

A round runs every formula once, in turn, with PyTorch's weight gradient (``matmul``, the plain one) at its start and once more at its end (``null``); small
shapes repeat each inside a round. All numbers are medians, over the rounds, of ratios within a round. Per shape:

    norms   the planned formula's time over the best one's, norms alone wanted
    both    the same, the weight gradient wanted too: fused, or a norm and a matrix product, by PyTorch (matmul) or by our kernel (product)
    fused   wgrad_sqnorm over the plain weight gradient
    cost    the planned way to both over the plain weight gradient

``--part k/n`` measures every n-th shape from the k-th on; rows of ``--out`` that are not measured again stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostgrad import _C, ops
from ghostgrad.bench.measure import ALLOCATORS, environment

Step = Callable[[], object]


class Product(NamedTuple):
    """A linear layer: activations (B, T, p), gradients at the output (B, T, d)."""

    B: int
    T: int
    p: int
    d: int
    dtype: str = "float32"


class Layer(NamedTuple):
    """A convolution with a square kernel over square images."""

    B: int
    c: int
    size: int
    d: int
    kernel: int
    stride: int = 1
    groups: int = 1
    dtype: str = "conv"


LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
WIDTHS = ((8, 8), (64, 16), (64, 64), (256, 256), (64, 1024), (1024, 1024), (2048, 512), (2048, 2048))
ODD = (
    (100, 7, 10, 20),
    (256, 1, 1024, 10),
    (64, 32, 33, 47),
    (32, 50, 768, 100),
    (8, 197, 192, 576),
    (4, 333, 1000, 10),
    (8, 256, 8, 2048),
    (1, 3000, 17, 129),
)
LAYERS = (
    Layer(64, 3, 32, 16, 3),
    Layer(64, 16, 32, 16, 3),
    Layer(64, 16, 32, 32, 3, 2),
    Layer(64, 32, 16, 32, 3),
    Layer(64, 32, 16, 64, 3, 2),
    Layer(64, 64, 8, 64, 3),
    Layer(64, 128, 16, 128, 3),
    Layer(8, 64, 56, 64, 3),
    Layer(8, 128, 28, 128, 3),
    Layer(16, 256, 14, 256, 1),
    Layer(16, 256, 14, 256, 3),
    Layer(16, 512, 7, 512, 3),
    Layer(8, 3, 112, 64, 7, 2),
    Layer(32, 64, 28, 64, 3, 1, 64),
    Layer(16, 128, 14, 128, 3, 1, 32),
)


def shapes() -> list[Product | Layer]:
    """Batches are such that the weight gradient takes 0.4 GFLOP where 1 to 256 samples can."""

    def batch(T: int, p: int, d: int) -> int:
        return min(256, 1 << max(0, int(2e8 / (T * p * d)).bit_length() - 1))

    grid = [Product(batch(T, p, d), T, p, d) for p, d in WIDTHS for T in LENGTHS] + [Product(*sizes) for sizes in ODD]
    for dtype in ("float64", "bfloat16"):
        grid += [Product(batch(T, p, d), T, p, d, dtype) for p, d in WIDTHS[1::2] for T in LENGTHS[1::2]]
    return [*grid, *LAYERS]


Ways = tuple[dict[str, Step], dict[str, Step], Step, str, str]


def product_ways(shape: Product) -> Ways:
    """Ways to the weight gradient and to the norms, the one pass to both, and what the plan says to the norms and to both."""
    dtype = getattr(torch, shape.dtype)
    a, b = torch.randn(shape.B, shape.T, shape.p).to(dtype), torch.randn(shape.B, shape.T, shape.d).to(dtype)

    def plain() -> Tensor:
        return b.flatten(0, 1).T @ a.flatten(0, 1)

    wgrads: dict[str, Step] = {"matmul": plain, "product": lambda: ops.wgrad_sqnorm(a.view(1, -1, shape.p), b.view(1, -1, shape.d))}
    norms: dict[str, Step] = {"gram": lambda: ops.gram_sqnorm(a, b), "outer": lambda: ops.outer_sqnorm(a, b)}
    if shape.T == 1:
        norms["row"] = lambda: ops.sqnorm(a, b)
    plan = ops.plan(*shape[:4], dtype, wgrad=True)
    both = "fused" if plan.formula == "fused" else f"{plan.wgrad}+{plan.formula}"
    return wgrads, norms, lambda: ops.wgrad_sqnorm(a, b), ops.plan(*shape[:4], dtype).formula, both


def layer_ways(layer: Layer) -> Ways:
    """The same for a convolution, whose op chooses the norms' formula itself."""
    pad, square, out = layer.kernel // 2, [layer.kernel] * 2, (layer.size + 2 * (layer.kernel // 2) - layer.kernel) // layer.stride + 1
    x, b = torch.randn(layer.B, layer.c, layer.size, layer.size), torch.randn(layer.B, layer.d, out, out)
    weight = torch.randn(layer.d, layer.c // layer.groups, *square)
    arguments = (square, [layer.stride] * 2, [pad] * 2, [1, 1])
    p, d = layer.c // layer.groups * layer.kernel**2, layer.d // layer.groups

    def plain() -> object:
        return torch.ops.aten.convolution_backward(b, x, weight, None, *arguments[1:], False, [0, 0], layer.groups, (False, True, False))

    formula, both = (ops.conv_plan(layer.B, out * out, p, d, layer.groups, wgrad=wgrad).formula for wgrad in (False, True))
    norms: dict[str, Step] = {formula: lambda: ops.conv_sqnorm(x[:, None], b[:, None], *arguments, layer.groups)}
    fused: Step = lambda: ops.conv_wgrad_sqnorm(x[:, None], b[:, None], *arguments, layer.groups)  # noqa: E731
    return {"matmul": plain}, norms, fused, formula, "fused" if both == "fused" else f"matmul+{both}"


def clock(step: Step, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def measure(shape: Product | Layer, seconds: float) -> dict[str, Any]:
    """Rounds for about `seconds`. A formula four times slower than another one of its kind is tried twice and then left out, unless it is the planned one."""
    torch.manual_seed(0)
    wgrads, norms, fused, planned_norm, planned_both = product_ways(shape) if isinstance(shape, Product) else layer_ways(shape)
    steps = {**wgrads, **norms, "fused": fused, "null": wgrads["matmul"]}
    tried = {name: min(clock(step, 1) for _ in range(2)) for name, step in steps.items()}
    for name in norms:
        if name not in (planned_norm, planned_both.split("+")[-1]) and tried[name] > 4 * min(tried[other] for other in norms):
            del steps[name]
    repeats = {name: max(1, int(2e-4 / tried[name])) for name in steps}
    rounds = max(5, min(51, int(seconds / sum(tried[name] * repeats[name] for name in steps))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(clock(step, repeats[name]))

    def over(first: list[float], second: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(first, second)), 3)

    def of_best(ways: dict[str, list[float]], planned: str) -> dict[str, Any]:
        best = min(ways, key=lambda name: statistics.median(ways[name]))
        return {"planned": planned, "best": best, "ratio": over(ways[planned], ways[best])}

    alone = {name: times[name] for name in norms if name in steps}
    pairs = {f"{first}+{second}": [x + y for x, y in zip(times[first], times[second])] for first in wgrads for second in alone}
    both = {**pairs, "fused": times["fused"]}
    return {
        **shape._asdict(),
        "us": {name: round(1e6 * statistics.median(values), 2) for name, values in times.items()},
        "rounds": rounds,
        "null": over(times["null"], times["matmul"]),
        "norms": of_best(alone, planned_norm),
        "both": of_best(both, planned_both),
        "fused": over(times["fused"], times["matmul"]),
        "cost": over(both[planned_both], times["matmul"]),
    }


def machine(threads: int) -> dict[str, Any]:
    return {**environment(), "kernels": _C.cpu_capability(), "threads": threads}


def keep_memory() -> None:
    """Runs the program anew with glibc told to keep freed memory, which it reads when the process starts, so that page faults do not decide the ratio."""
    kept = ALLOCATORS["kept"]
    if not kept.items() <= os.environ.items():
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | kept, check=False).returncode)


def save(to: Path, head: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> None:
    """A row a line, so that a change can be read."""
    entries = [f' "{key}": {json.dumps(value)}' for key, value in head.items()]
    entries += [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for key, rows in tables.items()]
    to.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def line(row: dict[str, Any]) -> str:
    sizes = " ".join(f"{row[key]:>5}" for key in (("B", "T", "p", "d") if "T" in row else ("B", "c", "size", "d", "kernel", "stride", "groups")))
    choices = "  ".join(f"{row[key]['planned']:>{n}} {row[key]['best']:>{n}} {row[key]['ratio']:5.2f}" for key, n in (("norms", 5), ("both", 13)))
    return f"{row['dtype']:8} {sizes}  {row['us']['matmul']:10.1f} {row['null']:5.2f}  {choices}  {row['fused']:6.2f} {row['cost']:5.2f}"


def summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        worst = {key: max(of_dtype, key=lambda row: row[key]["ratio"]) for key in ("norms", "both")}
        lines.append(f"{dtype}: {len(of_dtype)} shapes, worst planned / best: " + ", ".join(f"{key} {worst[key][key]['ratio']:.2f}" for key in worst))
        wide = [row["fused"] for row in of_dtype if "T" in row and row["T"] >= 128 and min(row["p"], row["d"]) >= 256]
        if wide:
            lines.append(f"    wgrad_sqnorm / matmul at T >= 128, p and d >= 256: {min(wide):.2f} to {max(wide):.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape, about")
    parser.add_argument("--only", nargs="*", default=["float32", "float64", "bfloat16", "conv"], help="dtypes, or conv")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th shape from the k-th on")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--show", type=Path, help="print such a file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        rows = json.loads(arguments.show.read_text())["rows"]
        print("\n".join(line(row) for row in rows), summary(rows), sep="\n")
        return
    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    known = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.exists() else []
    results = {tuple(row[key] for key in (Product if "T" in row else Layer)._fields): row for row in known}
    part, parts = map(int, arguments.part.split("/"))
    for shape in [shape for shape in shapes() if shape.dtype in arguments.only][part - 1 :: parts]:
        results[tuple(shape)] = row = measure(shape, arguments.seconds)
        print(line(row), flush=True)
    rows = [results[tuple(shape)] for shape in shapes() if tuple(shape) in results]
    print(summary(rows))
    if arguments.out:
        save(arguments.out, machine(arguments.threads), {"rows": rows})


if __name__ == "__main__":
    main()
