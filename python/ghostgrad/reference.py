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

__all__ = [
    "accumulation_dtype",
    "affine_sqnorm",
    "conv_sqnorm",
    "conv_wgrad_sqnorm",
    "embedding_sqnorm",
    "gram_sqnorm",
    "norm_affine",
    "outer_sqnorm",
    "row_sqnorm",
    "wgrad_moments",
    "wgrad_sqnorm",
]


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


def wgrad_moments(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> tuple[Tensor, Tensor, Tensor]:  # (d, p), (d, p), (B,)
    """``(sum_i G_i, sum_i G_i^2, ||G_i||_F^2)``, the squares of the second element by element."""
    squares = _per_sample_wgrad(a, b).square()
    return wgrad_sqnorm(a, b)[0], squares.sum(0), squares.sum((1, 2))


def row_sqnorm(
    x: Tensor,  # (B, ...)
) -> Tensor:  # (B,)
    """``sq_i = sum_j x_ij^2`` over everything but the first dimension."""
    return x.to(accumulation_dtype(x.dtype)).flatten(1).square().sum(1) if x.dim() > 1 else x.to(accumulation_dtype(x.dtype)).square()


def embedding_sqnorm(
    index: Tensor,  # (B, T)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """``sq_i = sum_{v >= 0} ||sum_{t: index_it = v} b_it||^2``: rows of equal index add before they are squared, rows of negative index do not count."""
    b = torch.where(index[..., None] >= 0, b, 0).to(accumulation_dtype(b.dtype))
    token = torch.searchsorted(index.sort(1).values, index.contiguous())  # (B, T), below T: equal for equal indices of a sample
    summed = torch.zeros_like(b).scatter_add(1, token[..., None].expand_as(b), b)
    return summed.square().sum((1, 2))


def affine_sqnorm(
    b: Tensor,  # (B, T, d, S)
    x: Tensor | None = None,  # (B, T, d, S)
    mean: Tensor | None = None,  # (B, T, G)
    rstd: Tensor | None = None,  # (B, T, G)
    total: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (d,), (B,), (d,), (B,)
    """``(sum_i g_i, ||g_i||^2, sum_i h_i, ||h_i||^2)``, ``g_i = sum_{t,s} b_i (x_i - mean) rstd`` (d,) of a scale and ``h_i = sum_{t,s} b_i`` of a shift."""
    dtype = accumulation_dtype(b.dtype)
    shift, none = b.to(dtype).sum((1, 3)), b.new_empty(0, dtype=dtype)  # (B, d)
    of_shift = (shift.sum(0) if total else none, shift.square().sum(1))
    if x is None:
        return none, none, *of_shift
    normalised = x.to(dtype)
    if mean is not None:
        normalised = normalised - mean.repeat_interleave(x.shape[2] // mean.shape[2], 2)[..., None]
    if rstd is not None:
        normalised = normalised * rstd.repeat_interleave(x.shape[2] // rstd.shape[2], 2)[..., None]
    scale = (b.to(dtype) * normalised).sum((1, 3))
    return scale.sum(0) if total else none, scale.square().sum(1), *of_shift


def norm_affine(
    b: Tensor,  # (B, T, d, S)
    x: Tensor,  # (B, T, d, S)
    mean: Tensor,  # (B, T, G)
    rstd: Tensor,  # (B, T, G)
    weight: Tensor | None = None,  # (d,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # (B, T, d, S), (d,), (B,), (d,), (B,)
    """The gradient of ``x`` and what :func:`affine_sqnorm` gives, for a layer ``y = weight x' + shift``, ``x' = (x - mean) rstd``, whose mean and rstd are
    those of ``x`` over each group of channels of a position.

    With ``<.>`` the mean over a group: ``rstd (weight b - <weight b> - x' <weight b x'>)``.
    """
    dtype, groups = accumulation_dtype(b.dtype), mean.shape[2]
    g, rstd_of_group = b.to(dtype) if weight is None else b.to(dtype) * weight.to(dtype)[:, None], rstd[..., None, None]  # (B, T, G, 1, 1)
    g, normalised = g.unflatten(2, (groups, -1)), (x.to(dtype).unflatten(2, (groups, -1)) - mean[..., None, None]) * rstd_of_group  # (B, T, G, d / G, S)
    grad = rstd_of_group * (g - g.mean((3, 4), keepdim=True) - normalised * (g * normalised).mean((3, 4), keepdim=True))
    return grad.flatten(2, 3).to(x.dtype), *affine_sqnorm(b, x, mean, rstd)


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
