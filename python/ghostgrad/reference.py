"""The definition of every op, in plain PyTorch.

Each function here has the name of an op in :mod:`ghostgrad.ops` and *is* what that op means: it runs in any floating dtype, on any device,
is differentiable by autograd, and is short enough to be believed. Tests, benchmarks and readers meet here; memory and speed are not its business.

Shapes: ``B`` samples, ``T`` positions, ``p`` input features, ``d`` output features; activations ``a`` (B, T, p), gradients of the loss at the output
``b`` (B, T, d), per-sample weight gradient ``G_i = b_i^T a_i`` (d, p).
"""

from __future__ import annotations

import math
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
    "noise",
    "norm_affine",
    "nso_step_",
    "outer_sqnorm",
    "perturb_",
    "philox",
    "probe_dot",
    "row_sqnorm",
    "second_difference",
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


# --- noise with an address; blocks are (number, offset, run, pitch) of each tensor ---


def philox(
    counter: Sequence[Tensor | int],  # four words of 32 bits
    key: tuple[int, int],
) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits, in int64, from four of the counter and two of the key."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    low, high = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64, with a sign that the shift and the mask undo
        c0, c1, c2, c3 = (product1 >> 32 & mask) ^ c1 ^ low, product1 & mask, (product0 >> 32 & mask) ^ c3 ^ high, product0 & mask
        low, high = low + 0x9E3779B9 & mask, high + 0xBB67AE85 & mask
    return c0, c1, c2, c3


def noise(
    index: Tensor,  # (n,) int64
    number: int,
    seed: int,
    distribution: str = "rademacher",
) -> Tensor:  # (n,)
    """``xi`` of these elements of a parameter, float32: what ``csrc/core/noise.h`` defines. Rademacher and uniform noise is exact, normal noise is the float32
    nearest to its definition (the ops' is within 5 units in the last place)."""
    per_block = 128 if distribution == "rademacher" else 4
    block, place = index // per_block, index % per_block
    kind = ("rademacher", "normal", "uniform").index(distribution)
    words = torch.stack(philox((block & 0xFFFFFFFF, block >> 32, number, kind), (seed & 0xFFFFFFFF, seed >> 32)), -1)  # (n, 4)

    def word(i: Tensor) -> Tensor:  # (n,)
        return words.gather(-1, i[:, None])[:, 0]

    if distribution == "rademacher":
        return 1.0 - 2.0 * (word(place // 32) >> place % 32 & 1).float()
    if distribution == "uniform":
        return ((word(place) >> 8).double() * 2.0**-24 + 2.0**-25 - 0.5).float()
    u = ((word(place // 2 * 2) >> 1).float() + 0.5).double() * 2.0**-31  # in float32, up to the factor
    angle = word(place // 2 * 2 + 1).double() * (2 * math.pi * 2.0**-32)
    return ((-2 * u.log()).sqrt() * torch.where(place % 2 == 0, angle.cos(), angle.sin())).float()


def _noise_like(x: Tensor, i: int, seed: int, distribution: str, blocks: Sequence[tuple[int, int, int, int]] | None) -> Tensor:
    number, offset, run, pitch = (i, 0, x.numel(), x.numel()) if blocks is None else blocks[i]
    element = torch.arange(x.numel(), device=x.device)
    return noise(offset + element // max(run, 1) * pitch + element % max(run, 1), number, seed, distribution).reshape(x.shape)


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    seed: int,
    sigma: float,
    distribution: str = "rademacher",
    blocks: Sequence[tuple[int, int, int, int]] | None = None,
) -> None:
    """``w <- w + sigma * xi``."""
    for i, w in enumerate(params):
        dtype = accumulation_dtype(w.dtype)
        w.copy_(w.to(dtype) + sigma * _noise_like(w, i, seed, distribution, blocks).to(dtype))


def probe_dot(
    plus: Sequence[Tensor],
    minus: Sequence[Tensor] | None = None,
    *,
    seed: int,
    sigma: float = 0.5,
    distribution: str = "rademacher",
    blocks: Sequence[tuple[int, int, int, int]] | None = None,
) -> Tensor:  # (P,)
    """``sum xi (plus_i - minus_i) / (2 sigma)`` of each tensor, float64."""
    differences = [p.double() for p in plus] if minus is None else [p.double() - m.double() for p, m in zip(plus, minus)]
    return torch.stack([(_noise_like(d, i, seed, distribution, blocks) * d).sum() for i, d in enumerate(differences)]) / (2 * sigma)


def second_difference(
    plus: Tensor,  # (B,)
    zero: Tensor,  # (B,)
    minus: Tensor,  # (B,)
    sigma: float,
) -> Tensor:  # (B,)
    """``(plus + minus - 2 zero) / sigma^2``, differenced in float64."""
    return ((plus.double() - zero.double()) - (zero.double() - minus.double())) / sigma**2


@torch.no_grad()
def nso_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    centre: Sequence[Tensor] = (),
    momenta: Sequence[Tensor] = (),
    *,
    lr: float,
    passes: int,
    mix: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
) -> None:
    """``g = mix * centre + (1 - mix) / passes * grads`` and the step of ``torch.optim.SGD`` with it."""
    for i, w in enumerate(params):
        g = grads[i] * ((1 - mix) / passes)
        if centre:
            g = g.add(centre[i], alpha=mix)
        if weight_decay:
            g = g.add(w, alpha=weight_decay)
        if momenta:
            momenta[i].copy_(g if first else momenta[i].mul(momentum).add(g, alpha=1 - dampening))
            g = g.add(momenta[i], alpha=momentum) if nesterov else momenta[i]
        w.add_(g, alpha=-lr)
