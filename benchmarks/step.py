"""What the norms cost: a training step inside a tap over the plain one, in interleaved pairs.

    python benchmarks/step.py [--pairs 15] [--threads 1] [--compile] [--out results.json]

Each problem runs in a fresh process with glibc told to keep freed memory, so that page faults do not decide the ratio. Per problem it gives the median
over the pairs of (step with norms / plain step run just before it), the same for norms alone (no weight gradients), and for the plain step against itself:
how far that null is from 1 says how far the other two can be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
Problem = tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


class Block(nn.Module):
    """A transformer block with learned projections, 4 heads, GELU."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def tiny() -> Problem:
    return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1)), torch.randn(100, 10), torch.randn(100, 1), F.mse_loss


def mlp() -> Problem:
    layers = (nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return nn.Sequential(*layers), torch.randn(256, 1024), torch.randint(10, (256,)), F.cross_entropy


def cnn() -> Problem:
    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.ReLU()]

    layers = [*stage(3, 16, 1), *stage(16, 16, 1), *stage(16, 32, 2), *stage(32, 32, 1), *stage(32, 64, 2), *stage(64, 64, 1)]
    return (
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        torch.randn(64, 3, 32, 32),
        torch.randint(10, (64,)),
        F.cross_entropy,
    )


def block() -> Problem:
    return Block(256), torch.randn(16, 256, 256), torch.randn(16, 256, 256), F.mse_loss


def wide() -> Problem:
    return Block(1024), torch.randn(32, 32, 1024), torch.randn(32, 32, 1024), F.mse_loss


PROBLEMS = {f.__name__: f for f in (tiny, mlp, cnn, block, wide)}


def measure(name: str, pairs: int, compiled: bool) -> dict[str, float]:
    torch.manual_seed(0)
    model, x, y, loss_fn = PROBLEMS[name]()
    if compiled:
        model = torch.compile(model, fullgraph=True)

    def plain() -> None:
        model.zero_grad()
        loss_fn(model(x), y).backward()

    def tapped() -> None:
        model.zero_grad()
        with gg.tap(model) as tap:
            loss_fn(model(x), y).backward()
        tap.sqnorms()

    def norms_alone() -> None:
        gg.sqnorms(model, loss_fn, x, y)

    def clock(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    ratios: dict[str, list[float]] = {"null": [], "tap": [], "norms_alone": []}
    seconds = []
    for i in range(pairs + 2):
        for key, step in zip(ratios, (plain, tapped, norms_alone)):
            before = clock(plain)
            ratio = clock(step) / before
            if i >= 2:  # the first two rounds warm up
                ratios[key].append(ratio)
                seconds.append(before)
    return {"plain_ms": 1e3 * statistics.median(seconds), **{key: statistics.median(values) for key, values in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), help=f"of {', '.join(PROBLEMS)}")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="the model in both steps by torch.compile, in one graph")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.problems[0], arguments.pairs, arguments.compile)))
        return
    rows = {}
    print(f"{'problem':8} {'plain ms':>9} {'null':>6} {'tap':>6} {'norms alone':>12}")
    for name in arguments.problems:
        command = [
            sys.executable,
            __file__,
            name,
            "--child",
            f"--pairs={arguments.pairs}",
            f"--threads={arguments.threads}",
            *["--compile"] * arguments.compile,
        ]
        out = subprocess.run(command, env=os.environ | KEEP_MEMORY, check=True, capture_output=True, text=True).stdout
        row = rows[name] = json.loads(out.splitlines()[-1])
        print(f"{name:8} {row['plain_ms']:9.2f} {row['null']:6.2f} {row['tap']:6.2f} {row['norms_alone']:12.2f}")
    if arguments.out:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
        settings = {"threads": arguments.threads, "pairs": arguments.pairs, "compiled": arguments.compile}
        arguments.out.write_text(json.dumps({**machine, **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
