"""The definition of every op, in plain PyTorch.

Each function here has the name of an op in :mod:`ghostgrad.ops` and *is* what that op means: it runs in any floating dtype, on any device,
is differentiable by autograd, and is short enough to be believed. Tests, benchmarks and readers meet here; memory and speed are not its business.

Shapes: ``B`` samples, ``T`` positions, ``p`` input features, ``d`` output features; activations ``a`` (B, T, p), gradients of the loss at the output
``b`` (B, T, d), per-sample weight gradient ``G_i = b_i^T a_i`` (d, p).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["accumulation_dtype", "conv_sqnorm", "conv_wgrad_sqnorm", "gram_sqnorm", "outer_sqnorm", "row_sqnorm", "wgrad_sqnorm"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which squared norms of ``dtype`` are accumulated and returned: float64 for float64, float32 for every narrower one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_sample_wgrad(a: Tensor, b: Tensor) -> Tensor:
    dtype = accumulation_dtype(a.dtype)
    return b.to(dtype).mT @ a.to(dtype)  # (B, d, p)


def outer_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """``sq_i = ||b_i^T a_i||_F^2``."""
    return _per_sample_wgrad(a, b).square().sum((1, 2))


def gram_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """``sq_i = sum_{s,t} <a_is, a_it> <b_is, b_it>``, the same number as :func:`outer_sqnorm` without forming ``G_i``."""
    dtype = accumulation_dtype(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))


def wgrad_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
    weights: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor]:  # (d, p), (B,)
    """``(sum_i c_i G_i, ||G_i||_F^2)``: the weight gradient (weighted by ``c = weights`` if given) and the unweighted squared norms."""
    per_sample = _per_sample_wgrad(a, b)
    weighted = per_sample if weights is None else per_sample * weights.to(per_sample.dtype)[:, None, None]
    return weighted.sum(0).to(a.dtype), per_sample.square().sum((1, 2))


def row_sqnorm(
    x: Tensor,  # (B, ...)
) -> Tensor:  # (B,)
    """``sq_i = sum_j x_ij^2`` over everything but the first dimension."""
    return x.to(accumulation_dtype(x.dtype)).flatten(1).square().sum(1) if x.dim() > 1 else x.to(accumulation_dtype(x.dtype)).square()


def _patches(
    x: Tensor,  # (B, R, c, *size)
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (B, groups, R * positions, c / groups * kernel elements)
    """What each output position sees."""
    dims = len(kernel)
    x = F.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
    for i in range(dims):
        x = x.unfold(3 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i]).narrow(3 + i, 0, out[i])[..., :: dilation[i]]  # (B, R, c, *out, *kernel)
    x = x.unflatten(2, (groups, -1)).movedim((2, 3), (1, 3 + dims))  # (B, groups, R, *out, c / groups, *kernel)
    return x.flatten(3 + dims).flatten(2, 2 + dims)


def _per_sample_conv_wgrad(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (B, d, c / groups, *kernel)
    dtype = accumulation_dtype(x.dtype)
    patches = _patches(x.to(dtype), b.shape[3:], kernel, stride, padding, dilation, groups)
    grads = b.to(dtype).unflatten(2, (groups, -1)).flatten(4).permute(0, 2, 3, 1, 4).flatten(3)  # (B, groups, d / groups, R * positions)
    return (grads @ patches).reshape(x.shape[0], b.shape[2], x.shape[2] // groups, *kernel)


def conv_sqnorm(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (B,)
    """``sq_i = ||G_i||_F^2``, where ``G_i`` (d, c / groups, *kernel) is the weight gradient of a convolution that is run R times for each sample, on
    ``x[i, r]`` with zeros around it; ``b[i, r]`` is the gradient at its output, or at the first part of its output."""
    return _per_sample_conv_wgrad(x, b, kernel, stride, padding, dilation, groups).flatten(1).square().sum(1)


def conv_wgrad_sqnorm(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:  # (d, c / groups, *kernel), (B,)
    """``(sum_i G_i, ||G_i||_F^2)`` with ``G_i`` as in :func:`conv_sqnorm`."""
    per_sample = _per_sample_conv_wgrad(x, b, kernel, stride, padding, dilation, groups)
    return per_sample.sum(0).to(x.dtype), per_sample.flatten(1).square().sum(1)
