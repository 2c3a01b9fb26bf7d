"""Every op beside PyTorch's own operation whose place it takes, at a small and a large shape.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/ops.py --benchmark-columns=median,iqr,rounds [-k wgrad] [--benchmark-json=results.json]

Of a group, ``plain`` is what a step without norms does: the weight gradient by a matrix product, a convolution's or an embedding's backward, the sum of a
bias, the gradients of a normalisation's scale and shift. The comparison that decides on formulas, in interleaved rounds, is benchmarks/grid.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from ghostgrad import ops

SIZES = ("small", "large")
Step = Callable[[], object]


def products(size: str) -> dict[str, tuple[Step, Step]]:
    B, T, p, d = {"small": (8, 16, 32, 32), "large": (8, 128, 512, 1024)}[size]
    a, b, x = torch.randn(B, T, p), torch.randn(B, T, d), torch.randn(B, T * d)

    def wgrad() -> object:
        return b.flatten(0, 1).T @ a.flatten(0, 1)

    names = ("outer_sqnorm", "gram_sqnorm", "sqnorm", "wgrad_sqnorm", "wgrad_and_sqnorm")
    by_product: dict[str, tuple[Step, Step]] = {name: (partial(getattr(ops, name), a, b), wgrad) for name in names}
    return {**by_product, "row_sqnorm": (lambda: ops.row_sqnorm(x), lambda: x.sum(0))}


def picks(size: str) -> dict[str, tuple[Step, Step]]:
    B, T, d, vocabulary = {"small": (8, 16, 32, 100), "large": (8, 512, 512, 8192)}[size]
    index, b = torch.randint(vocabulary, (B, T)), torch.randn(B, T, d)
    return {"embedding_sqnorm": (lambda: ops.embedding_sqnorm(index, b), lambda: torch.ops.aten.embedding_dense_backward(b, index, vocabulary, -1, False))}


def normalisations(size: str) -> dict[str, tuple[Step, Step]]:
    B, T, d = {"small": (8, 16, 32), "large": (16, 256, 1024)}[size]
    x, b, weight = torch.randn(B, T, d), torch.randn(B, T, d), torch.ones(d)
    _, mean, rstd = torch.native_layer_norm(x, [d], weight, weight, 1e-5)

    def plain() -> object:
        return torch.ops.aten.native_layer_norm_backward(b, x, [d], mean, rstd, weight, weight, [False, True, True])

    return {"affine_sqnorm": (lambda: ops.affine_sqnorm(b[..., None], x[..., None], mean, rstd), plain)}


def convolutions(size: str) -> dict[str, tuple[Step, Step]]:
    B, c, d, n = {"small": (4, 4, 8, 8), "large": (16, 64, 64, 32)}[size]
    x, b, weight = torch.randn(B, c, n, n), torch.randn(B, d, n, n), torch.randn(d, c, 3, 3)
    arguments = ([3, 3], [1, 1], [1, 1], [1, 1], 1)

    def wgrad() -> object:
        return torch.ops.aten.convolution_backward(b, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, (False, True, False))

    names = ("conv_sqnorm", "conv_wgrad_sqnorm", "conv_wgrad_and_sqnorm", "per_sample_conv_wgrad")
    return {name: (partial(getattr(ops, name), x[:, None], b[:, None], *arguments), wgrad) for name in names}


CASES = [(make, name) for make in (products, picks, normalisations, convolutions) for name in make("small")]


@pytest.mark.parametrize("way", ["ghostgrad", "plain"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("make", "name"), CASES, ids=[name for _, name in CASES])
def test_op(benchmark: Any, make: Callable[[str], dict[str, tuple[Step, Step]]], name: str, size: str, way: str) -> None:
    torch.manual_seed(0)
    benchmark.group = f"{name}, {size}"
    step = make(size)[name][way == "plain"]
    with torch.no_grad():
        benchmark.pedantic(step, rounds=31 if size == "large" else 301, warmup_rounds=3, iterations=1 if size == "large" else 5)
