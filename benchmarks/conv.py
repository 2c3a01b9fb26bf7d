"""What a convolution's norms cost, layer by layer: our ops over PyTorch's weight gradient, in interleaved pairs.

    python benchmarks/conv.py [--pairs 31] [--threads 1] [--cpu-time]

Per layer the medians, over the pairs, of (weight gradient and norms / PyTorch's weight gradient just before it), of norms alone over the same, and of PyTorch's
weight gradient over itself. ``--cpu-time`` counts the thread's own time: for one thread on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ghostgrad import ops
from ghostgrad.bench.measure import ALLOCATORS


class Layer(NamedTuple):
    B: int
    c: int
    size: int
    d: int
    kernel: int
    stride: int = 1
    groups: int = 1


LAYERS = [
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
]


def measure(layer: Layer, pairs: int, now: Callable[[], float]) -> tuple[float, dict[str, float]]:
    torch.manual_seed(0)
    pad, square = layer.kernel // 2, (layer.kernel, layer.kernel)
    x, weight = torch.randn(layer.B, layer.c, layer.size, layer.size), torch.randn(layer.d, layer.c // layer.groups, *square)
    b = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, layer.stride, pad, 1, layer.groups))
    x1, b1, arguments = x[:, None], b[:, None], (square, (layer.stride,) * 2, (pad, pad), (1, 1), layer.groups)
    sizes = (None, [layer.stride] * 2, [pad] * 2, [1, 1], False, [0, 0], layer.groups, (False, True, False))

    def plain() -> None:
        torch.ops.aten.convolution_backward(b, x, weight, *sizes)

    steps: dict[str, Callable[[], object]] = {
        "null": plain,
        "both": lambda: ops.conv_wgrad_and_sqnorm(x1, b1, *arguments),
        "alone": lambda: ops.conv_sqnorm(x1, b1, *arguments),
    }

    def clock(step: Callable[[], object]) -> float:
        start = now()
        step()
        return now() - start

    ratios: dict[str, list[float]] = {key: [] for key in steps}
    seconds = []
    for i in range(pairs + 3):
        for key, step in steps.items():
            before = clock(plain)
            ratio = clock(step) / before
            if i >= 3:  # the first rounds warm up
                ratios[key].append(ratio)
                seconds.append(before)
    return 1e3 * statistics.median(seconds), {key: statistics.median(values) for key, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child:
        subprocess.run([sys.executable, *sys.argv, "--child"], env=os.environ | ALLOCATORS["kept"], check=True)
        return
    torch.set_num_threads(arguments.threads)
    print(f"{'B':>3} {'c':>4} {'size':>4} {'d':>4} {'kernel':>6} {'stride':>6} {'groups':>6} {'plain ms':>9} {'null':>6} {'both':>6} {'alone':>6}")
    for layer in LAYERS:
        ms, ratio = measure(layer, arguments.pairs, time.thread_time if arguments.cpu_time else time.perf_counter)
        sizes = f"{layer.B:3} {layer.c:4} {layer.size:4} {layer.d:4} {layer.kernel:6} {layer.stride:6} {layer.groups:6}"
        print(f"{sizes} {ms:9.2f} {ratio['null']:6.2f} {ratio['both']:6.2f} {ratio['alone']:6.2f}", flush=True)


if __name__ == "__main__":
    main()
