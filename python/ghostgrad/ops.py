"""The ops: per op a typed wrapper, its fake kernel and its autograd formula, under each other.

An op's meaning is the function of the same name in :mod:`ghostgrad.reference`. Schemas stand in ``csrc/torch/library.cpp``,
kernels in ``csrc/cpu`` and ``csrc/cuda``.

Shapes: ``B`` samples, ``T`` positions, ``p`` input features, ``d`` output features; activations ``a`` (B, T, p), gradients at the output ``b`` (B, T, d),
per-sample weight gradient ``G_i = b_i^T a_i`` (d, p). Squared norms come in the accumulation dtype: float64 for float64, float32 for everything narrower.

Every autograd formula here is made of differentiable torch operations, so gradients of gradients of these ops exist to any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, reference
from .reference import accumulation_dtype

__all__ = [
    "AffineGrads",
    "Plan",
    "affine_sqnorm",
    "conv_plan",
    "conv_sqnorm",
    "conv_wgrad_and_sqnorm",
    "conv_wgrad_sqnorm",
    "embedding_sqnorm",
    "gram_sqnorm",
    "norm_affine",
    "outer_sqnorm",
    "per_sample_conv_wgrad",
    "plan",
    "row_sqnorm",
    "sqnorm",
    "wgrad_and_sqnorm",
    "wgrad_moments",
    "wgrad_sqnorm",
    "whole_output",
]

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


LARGE_PRODUCT = 1 << 21
"""Multiplications in the weight gradient of a linear layer on single positions (B, p), B p d, from which on a faster kernel of ours pays for its call."""


# --- what all ops ask of their arguments; csrc/torch/check.h asks again, for callers of torch.ops ---


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_tensor(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    _check_device(op, name, x.device)


def _check_device(op: str, name: str, device: torch.device) -> None:
    if device.type == "cuda" and not _C.with_cuda:
        raise RuntimeError(
            f"{op}: {name} is on {device}, but this build of ghostgrad has no CUDA kernels. "
            "They are built where nvcc is on PATH and torch is a CUDA build: pip install --no-build-isolation --force-reinstall --no-deps ghostgrad "
            f"(GHOSTGRAD_CUDA=1 makes a missing nvcc an error). Until then, ghostgrad.reference.{op} computes the same in plain PyTorch."
        )


def _run(op: Any, *arguments: Any) -> Any:
    """Calls an op; where nothing is recorded, below the Python that records for custom ops, which takes longer than a small kernel."""
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _check_operands(
    op: str,
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> None:
    _check_tensor(op, "a", a)
    _check_tensor(op, "b", b)
    if a.dim() != 3:
        raise ValueError(f"{op}: a must be (B, T, p), got {_shape(a)}")
    if b.dim() != 3:
        raise ValueError(f"{op}: b must be (B, T, d), got {_shape(b)}")
    if a.shape[0] != b.shape[0] or a.shape[1] != b.shape[1]:
        raise ValueError(f"{op}: a and b must agree in batch and positions, got {_shape(a)} and {_shape(b)}")
    if a.device != b.device:
        raise ValueError(f"{op}: a and b must be on the same device, got {a.device} and {b.device}")
    _check_same_dtype(op, "a", a, b)


def _check_same_dtype(op: str, name: str, a: Tensor, b: Tensor) -> None:
    if a.dtype != b.dtype:
        hint = ""
        if {a.dtype, b.dtype} & {torch.float16, torch.bfloat16}:
            hint = (
                ". Under autocast a layer computes in the narrow dtype while its input may still be wide: "
                "cast the activations to the dtype of the gradients at the output"
            )
        raise TypeError(f"{op}: {name} and b must have the same dtype, got {a.dtype} and {b.dtype}{hint}")


# --- gradients of ||G_i||^2, shared by the ops that give it ---


def _sqnorm_grads(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
    v: Tensor,  # (B,) cotangent of the squared norms
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor | None, Tensor | None]:  # (B, T, p), (B, T, d)
    """``v_i d||G_i||^2 / d a_i = 2 v_i b_i G_i`` and ``v_i d||G_i||^2 / d b_i = 2 v_i a_i G_i^T``.

    Through ``G_i = b_i^T a_i`` itself, d p elements per sample, or through the Gram matrices ``b_i b_i^T`` and ``a_i a_i^T``, T T elements each, since
    ``b_i G_i = (b_i b_i^T) a_i``: whichever is smaller. And ``min(T T, d p) <= T sqrt(d p) <= T (p + d) / 2``, so no such buffer is ever more
    than half of the operands.
    """
    dtype = accumulation_dtype(a.dtype)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    scale = (2 * v.to(dtype))[:, None, None]
    grad_a = grad_b = None
    if a.shape[1] * a.shape[1] <= a.shape[2] * b.shape[2]:
        if want_a:
            grad_a = (wide_b @ wide_b.mT) @ (scale * wide_a)
        if want_b:
            grad_b = (wide_a @ wide_a.mT) @ (scale * wide_b)
    else:
        per_sample = scale * (wide_b.mT @ wide_a)  # (B, d, p)
        if want_a:
            grad_a = wide_b @ per_sample
        if want_b:
            grad_b = wide_a @ per_sample.mT
    return None if grad_a is None else grad_a.to(a.dtype), None if grad_b is None else grad_b.to(b.dtype)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _operands_backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if v is None:
        return None, None
    a, b = ctx.saved_tensors
    return _sqnorm_grads(a, b, v, ctx.needs_input_grad[0], ctx.needs_input_grad[1])


def _sqnorm_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], dtype=accumulation_dtype(a.dtype))


# --- outer_sqnorm ---


def outer_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """Squared norms of the per-sample weight gradients, by tiles of ``G_i`` that are squared in registers and never written.

    ``sq_i = ||b_i^T a_i||_F^2``

    Args:
        a: activations (B, T, p), in float32, float64, bfloat16 or float16. Strides are free; only a last dimension of other than unit stride is copied.
        b: gradients at the output (B, T, d), of the same dtype and device.

    Returns:
        (B,), float64 for float64 and float32 otherwise. Products are accumulated in that dtype, squares in float64.

    Memory: a few tiles per thread or thread block; never d * p elements, let alone B * d * p. Cost: 2 T p d floating-point operations per sample.
    Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_operands("outer_sqnorm", a, b)
    return _run(torch.ops.ghostgrad.outer_sqnorm.default, a, b)


torch.library.register_fake("ghostgrad::outer_sqnorm", _sqnorm_fake)
torch.library.register_autograd("ghostgrad::outer_sqnorm", _operands_backward, setup_context=_save_operands)


# --- gram_sqnorm ---


def gram_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """Squared norms of the per-sample weight gradients from inner products of positions: the ghost norm.

    ``sq_i = sum_{s,t} <a_is, a_it> <b_is, b_it>``

    Args:
        a: activations (B, T, p), in float32, float64, bfloat16 or float16. Strides are free; only a last dimension of other than unit stride is copied.
        b: gradients at the output (B, T, d), of the same dtype and device.

    Returns:
        (B,), float64 for float64 and float32 otherwise. Inner products are accumulated in that dtype, their products, which have signs and cancel, in float64.

    Memory: one float64 per strip of positions; no T * T matrix. Cost: T^2 (p + d) floating-point operations per sample, both matrices being symmetric.
    Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_operands("gram_sqnorm", a, b)
    return _run(torch.ops.ghostgrad.gram_sqnorm.default, a, b)


torch.library.register_fake("ghostgrad::gram_sqnorm", _sqnorm_fake)
torch.library.register_autograd("ghostgrad::gram_sqnorm", _operands_backward, setup_context=_save_operands)


# --- wgrad_sqnorm ---


def wgrad_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
    weights: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor]:  # (d, p), (B,)
    """The weight gradient and all per-sample squared norms, from one pass over the tiles of ``G_i``.

    ``wgrad = sum_i c_i b_i^T a_i`` and ``sq_i = ||b_i^T a_i||_F^2``, with ``c = weights`` or ones. The norms are those of the unweighted gradients.

    Args:
        a: activations (B, T, p), in float32, float64, bfloat16 or float16. Strides are free; only a last dimension of other than unit stride is copied.
        b: gradients at the output (B, T, d), of the same dtype and device.
        weights: one factor per sample (B,), cast to the accumulation dtype; clip factors, for example.

    Returns:
        The weight gradient (d, p) in the dtype of ``a``, and the squared norms (B,), float64 for float64 and float32 otherwise.
        Products and the weighted sum are accumulated in the latter dtype, squares in float64.

    Memory: a few tiles per thread or thread block beside the outputs. Where the matrix is too small to occupy the machine, the batch is cut into
    runs with a weight gradient each, 16 tiles of them at most on a CPU. Cost: 2 T p d floating-point operations per sample, and 4 p d for the two sums.
    Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_operands("wgrad_sqnorm", a, b)
    if weights is not None:
        if weights.dim() != 1 or weights.shape[0] != a.shape[0]:
            raise ValueError(f"wgrad_sqnorm: weights must be (B,) with B = {a.shape[0]}, got {_shape(weights)}")
        if weights.device != a.device:
            raise ValueError(f"wgrad_sqnorm: weights must be on the device of a, got {weights.device} and {a.device}")
        weights = weights.to(accumulation_dtype(a.dtype))
    return _run(torch.ops.ghostgrad.wgrad_sqnorm.default, a, b, weights)


@torch.library.register_fake("ghostgrad::wgrad_sqnorm")
def _(a: Tensor, b: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return a.new_empty(b.shape[2], a.shape[2]), a.new_empty(a.shape[0], dtype=accumulation_dtype(a.dtype))


def _wgrad_sqnorm_backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
    # u (d, p) is the cotangent of the weight gradient, v (B,) that of the squared norms. The first is linear in a, b and c:
    # d/d a_i = c_i b_i u, d/d b_i = c_i a_i u^T, d/d c_i = <b_i u, a_i>. The second is _sqnorm_grads, and does not know c.
    # Also the backward of wgrad_and_sqnorm, which has no weights; and the dispatcher drops weights=None, hence the tuples of two or three.
    a, b, *rest = ctx.saved_tensors
    weights = rest[0] if rest else None
    want_a, want_b = ctx.needs_input_grad[:2]
    want_weights = weights is not None and ctx.needs_input_grad[2]
    grad_a = grad_b = grad_weights = None
    if v is not None:
        grad_a, grad_b = _sqnorm_grads(a, b, v, want_a, want_b)
    if u is not None:
        scale = 1 if weights is None else weights[:, None, None]
        if want_a or want_weights:
            b_u = b @ u  # (B, T, p)
            if want_a:
                linear = (b_u * scale).to(a.dtype)
                grad_a = linear if grad_a is None else grad_a + linear
            if weights is not None and want_weights:
                grad_weights = (b_u.to(weights.dtype) * a.to(weights.dtype)).sum((1, 2))
        if want_b:
            linear = (a @ u.mT * scale).to(b.dtype)
            grad_b = linear if grad_b is None else grad_b + linear
    return (grad_a, grad_b, grad_weights)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("ghostgrad::wgrad_sqnorm", _wgrad_sqnorm_backward, setup_context=_save_operands)


# --- wgrad_moments ---


def wgrad_moments(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> tuple[Tensor, Tensor, Tensor]:  # (d, p), (d, p), (B,)
    """The weight gradient, the sum of the per-sample gradients' squares element by element and their squared norms, from one pass over the tiles of ``G_i``.

    ``wgrad = sum_i b_i^T a_i``, ``squares_jk = sum_i (b_i^T a_i)_jk^2`` and ``sq_i = ||b_i^T a_i||_F^2``. The squares are the diagonal of the empirical Fisher
    matrix, up to the scale of the loss.

    Args:
        a: activations (B, T, p), in float32, float64, bfloat16 or float16. Strides are free; only a last dimension of other than unit stride is copied.
        b: gradients at the output (B, T, d), of the same dtype and device.

    Returns:
        The weight gradient (d, p) in the dtype of ``a``; the squares (d, p) and the squared norms (B,), float64 for float64 and float32 otherwise.
        Products and both sums over samples are accumulated in the latter dtype (over more than 64 samples in float64), squares of a sample in float64.

    Memory: a few tiles per thread or thread block beside the outputs. Where the matrix is too small to occupy the machine, the batch is cut into
    runs with sums of their own, 16 tiles of either at most on a CPU. Cost: 2 T p d floating-point operations per sample, and 6 p d for the three sums.
    The gradient through ``squares`` forms per-sample gradients, of as many samples at a time as have no more elements than ``a`` and ``b``, or of one.
    Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_operands("wgrad_moments", a, b)
    return _run(torch.ops.ghostgrad.wgrad_moments.default, a, b)


@torch.library.register_fake("ghostgrad::wgrad_moments")
def _(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, d, p = accumulation_dtype(a.dtype), b.shape[2], a.shape[2]
    return a.new_empty(d, p), a.new_empty(d, p, dtype=dtype), a.new_empty(a.shape[0], dtype=dtype)


def _squares_grads(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
    w: Tensor,  # (d, p) cotangent of sum_i G_i^2
) -> tuple[Tensor, Tensor]:  # (B, T, p), (B, T, d)
    """``w`` gives ``2 w G_i`` to ``G_i``, element by element, and so ``b_i (2 w G_i)`` to ``a_i`` and ``a_i (2 w G_i)^T`` to ``b_i``."""
    samples = max(1, (a.numel() + b.numel()) // max(1, w.numel()))  # at a time
    grads = []
    for some_a, some_b in zip(a.to(w.dtype).split(samples), b.to(w.dtype).split(samples)):
        per_sample = 2 * w * (some_b.mT @ some_a)  # (samples, d, p)
        grads.append((some_b @ per_sample, some_a @ per_sample.mT))
    grad_a, grad_b = (torch.cat(parts) for parts in zip(*grads))
    return grad_a.to(a.dtype), grad_b.to(b.dtype)


def _wgrad_moments_backward(ctx: Any, u: Tensor | None, w: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
    # u (d, p) is the cotangent of the weight gradient, w (d, p) that of the squares, v (B,) that of the squared norms.
    grads = _wgrad_sqnorm_backward(ctx, u, v)
    if w is None:
        return grads
    a, b = ctx.saved_tensors
    more = _squares_grads(a, b, w)
    return tuple(None if not wanted else also if grad is None else grad + also for grad, also, wanted in zip(grads, more, ctx.needs_input_grad, strict=True))


torch.library.register_autograd("ghostgrad::wgrad_moments", _wgrad_moments_backward, setup_context=_save_operands)


# --- row_sqnorm ---


def row_sqnorm(
    x: Tensor,  # (B, ...)
) -> Tensor:  # (B,)
    """Squared norms of rows that are there already: per-sample gradients of biases, scales, positional embeddings.

    ``sq_i = sum_j x_ij^2`` over everything but the first dimension.

    Args:
        x: (B, ...), in float32, float64, bfloat16 or float16. Copied only if the elements of a row are not adjacent in memory.

    Returns:
        (B,), float64 for float64 and float32 otherwise. Squares are accumulated in that dtype over at most a thousand elements, beyond that in float64.

    Memory: one float64 per 32768 elements. Cost: reading x once. Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: x has no batch dimension.
        TypeError: the dtype is not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_tensor("row_sqnorm", "x", x)
    if x.dim() < 1:
        raise ValueError("row_sqnorm: x must have a batch dimension, got a scalar")
    return _run(torch.ops.ghostgrad.row_sqnorm.default, x)


@torch.library.register_fake("ghostgrad::row_sqnorm")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _row_sqnorm_backward(ctx: Any, v: Tensor | None) -> Tensor | None:
    if v is None:
        return None
    (x,) = ctx.saved_tensors
    return (2 * v).reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) * x


torch.library.register_autograd("ghostgrad::row_sqnorm", _row_sqnorm_backward, setup_context=_save_operands)


# --- embedding_sqnorm ---


def embedding_sqnorm(
    index: Tensor,  # (B, T)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """Squared norms of the per-sample gradients of a table (V, d) whose rows are picked by index: equal tokens of a sample add before they are squared.

    ``sq_i = sum_{v >= 0} ||sum_{t: index_it = v} b_it||^2``

    Args:
        index: rows picked (B, T), in int64 or int32. Positions of a negative index, padding for example, get nothing. There is no upper limit.
        b: gradients at the rows picked (B, T, d), in float32, float64, bfloat16 or float16. Strides are free; only a last dimension of other than unit
            stride is copied.

    Returns:
        (B,), float64 for float64 and float32 otherwise. Rows are added in that dtype, at most 256 at a time and from there on in float64; squares as in
        :func:`row_sqnorm`.

    Memory: on a CPU 32 bytes per position of one sample and thread, on CUDA 8 or 16 bytes per position of all samples; no table. Cost: reading b once,
    and finding equal tokens by hashing (CPU) or sorting (CUDA). Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding_sqnorm: index must be int64 or int32, got {index.dtype}")
    _check_tensor("embedding_sqnorm", "b", b)
    if index.dim() != 2:
        raise ValueError(f"embedding_sqnorm: index must be (B, T), got {_shape(index)}")
    if b.dim() != 3:
        raise ValueError(f"embedding_sqnorm: b must be (B, T, d), got {_shape(b)}")
    if index.shape[0] != b.shape[0] or index.shape[1] != b.shape[1]:
        raise ValueError(f"embedding_sqnorm: index and b must agree in batch and positions, got {_shape(index)} and {_shape(b)}")
    if index.device != b.device:
        raise ValueError(f"embedding_sqnorm: index and b must be on the same device, got {index.device} and {b.device}")
    return _run(torch.ops.ghostgrad.embedding_sqnorm.default, index, b)


@torch.library.register_fake("ghostgrad::embedding_sqnorm")
def _(index: Tensor, b: Tensor) -> Tensor:
    return b.new_empty(b.shape[0], dtype=accumulation_dtype(b.dtype))


def _embedding_sqnorm_backward(ctx: Any, v: Tensor | None) -> tuple[None, Tensor | None]:
    # d sq_i / d b_it is twice the sum over the positions of the token at t. No shape depends on the indices.
    if v is None:
        return None, None
    index, b = ctx.saved_tensors
    B, T, _ = b.shape
    if b.numel() == 0:  # which the double backward of embedding_dense_backward cannot shape
        return None, (2 * v)[:, None, None].to(b.dtype) * b
    index = index.contiguous()
    token = torch.searchsorted(index.sort(1).values, index) + T * torch.arange(B, device=index.device)[:, None]  # below B T: equal for equal tokens of a sample
    summed = torch.ops.aten.embedding_dense_backward(b.to(accumulation_dtype(b.dtype)), token, B * T, -1, False)  # (B T, d)
    grad = (2 * v)[:, None, None] * torch.ops.aten.embedding(summed, token)
    return None, torch.where(index[..., None] >= 0, grad, 0).to(b.dtype)


torch.library.register_autograd("ghostgrad::embedding_sqnorm", _embedding_sqnorm_backward, setup_context=_save_operands)


# --- affine_sqnorm ---


class AffineGrads(NamedTuple):
    """What :func:`affine_sqnorm` returns."""

    scale: Tensor
    """(d,) the scale's gradient."""
    scale_sqnorm: Tensor
    """(B,) squared norms of the scale's per-sample gradients."""
    shift: Tensor
    """(d,) the shift's gradient."""
    shift_sqnorm: Tensor
    """(B,) squared norms of the shift's per-sample gradients."""


def _check_affine(op: str, b: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> None:
    _check_tensor(op, "b", b)
    if b.dim() != 4:
        raise ValueError(f"{op}: b must be (B, T, d, S), got {_shape(b)}")
    if x is not None:
        if x.shape != b.shape:
            raise ValueError(f"{op}: x must have the shape of b, got {_shape(x)} and {_shape(b)}")
        if x.dtype != b.dtype:
            raise TypeError(f"{op}: b and x must have the same dtype, got {b.dtype} and {x.dtype}")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic is None:
            continue
        if x is None:
            raise ValueError(f"{op}: {name} without x")
        if statistic.dim() != 3 or statistic.shape[:2] != b.shape[:2] or not statistic.shape[2] or b.shape[2] % statistic.shape[2]:
            raise ValueError(f"{op}: {name} must be (B, T, G) with G a divisor of d, got {_shape(statistic)} for {_shape(b)}")
        if statistic.dtype != accumulation_dtype(b.dtype):
            raise TypeError(f"{op}: {name} must be {accumulation_dtype(b.dtype)} for {b.dtype}, got {statistic.dtype}")
    if mean is not None and rstd is not None and mean.shape != rstd.shape:
        raise ValueError(f"{op}: mean and rstd must have the same shape, got {_shape(mean)} and {_shape(rstd)}")
    for name, other in (("x", x), ("mean", mean), ("rstd", rstd)):
        if other is not None and other.device != b.device:
            raise ValueError(f"{op}: b and {name} must be on the same device, got {b.device} and {other.device}")


def affine_sqnorm(
    b: Tensor,  # (B, T, d, S)
    x: Tensor | None = None,  # (B, T, d, S)
    mean: Tensor | None = None,  # (B, T, G)
    rstd: Tensor | None = None,  # (B, T, G)
    total: bool = True,
) -> AffineGrads:
    """Gradients of a scale and a shift (d,) that broadcast over positions, and the squared norms of their per-sample gradients, from one pass over the data.

    ``g_i = sum_{t,s} b_its (x_its - mean_it) rstd_it`` for the scale and ``h_i = sum_{t,s} b_its`` for the shift give ``sum_i g_i``, ``||g_i||^2``,
    ``sum_i h_i`` and ``||h_i||^2``.

    Args:
        b: gradients at the output (B, T, d, S), in float32, float64, bfloat16 or float16, with T positions before the channels and S after them:
            (B, T, d, 1) for sequences, (B, 1, d, S) for images. Read as they lie in memory if channels are adjacent, or the positions after them; else copied.
        x: what the scale multiplied, or that before it was normalised; of the shape, dtype and device of ``b``. Without it there is only a shift.
        mean: (B, T, G) in the accumulation dtype, one mean for each of G groups of adjacent channels; zero if left out. G = 1 for layer norms.
        rstd: the same for the reciprocals of standard deviations; one if left out.
        total: False: the squared norms alone.

    Returns:
        :class:`AffineGrads`, float64 for float64 and float32 otherwise; what is not asked for has no elements. Sums over up to 256 positions (4096 if they
        are adjacent) are accumulated in that dtype, everything beyond in float64.

    Memory: d elements per thread, or fewer; at most 16 partial totals of d on a CPU, 4096 of 32 on a GPU. Never d * B. Cost: reading ``b`` and ``x`` once.
    Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree, or there are statistics without x.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_affine("affine_sqnorm", b, x, mean, rstd)
    return AffineGrads(*_run(torch.ops.ghostgrad.affine_sqnorm.default, b, x, mean, rstd, total))


@torch.library.register_fake("ghostgrad::affine_sqnorm")
def _(b: Tensor, x: Tensor | None = None, mean: Tensor | None = None, rstd: Tensor | None = None, total: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, scaled, (B, _, d, _) = accumulation_dtype(b.dtype), x is not None, b.shape
    sizes = (d if total and scaled else 0, B if scaled else 0, d if total else 0, B)
    scale, scale_sqnorm, shift, shift_sqnorm = (b.new_empty(size, dtype=dtype) for size in sizes)
    return scale, scale_sqnorm, shift, shift_sqnorm


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # The dispatcher drops arguments that have their default value.
    *tensors, ctx.total = inputs if len(inputs) == 5 else (*inputs, True)
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)
    ctx.save_for_backward(*tensors, *[None] * (4 - len(tensors)))


def _affine_sqnorm_backward(ctx: Any, u: Tensor | None, v: Tensor | None, w: Tensor | None, z: Tensor | None) -> tuple[Tensor | None, ...]:
    # Cotangents u (d,) and w (d,) of the sums, v (B,) and z (B,) of the norms of scale and shift. The sums are linear in g_i and h_i, whose cotangents are
    # u + 2 v_i g_i and w + 2 z_i h_i; those reach b through x' = (x - mean) rstd and as they are, x' through b.
    b, x, mean, rstd = ctx.saved_tensors
    want_b, want_x, want_mean, want_rstd = (*ctx.needs_input_grad[:4], False, False, False)[:4]
    dtype = accumulation_dtype(b.dtype)
    wide_b = b.to(dtype)

    def cotangent(of_sum: Tensor | None, of_sqnorm: Tensor | None, per_sample: Tensor) -> Tensor | None:  # (B or 1, 1, d, 1)
        total = of_sum[None] if of_sum is not None and ctx.total else None
        if of_sqnorm is not None:
            squares = 2 * of_sqnorm[:, None] * per_sample
            total = squares if total is None else total + squares
        return None if total is None else total[:, None, :, None]

    grads: list[Tensor | None] = [None] * 4
    of_shift = cotangent(w, z, wide_b.sum((1, 3)))
    if want_b and of_shift is not None:
        grads[0] = of_shift.expand_as(b).to(b.dtype)
    if x is not None:
        wide_mean, wide_rstd = (None if s is None else s.repeat_interleave(b.shape[2] // s.shape[2], 2)[..., None] for s in (mean, rstd))  # (B, T, d, 1)
        centred = x.to(dtype) if wide_mean is None else x.to(dtype) - wide_mean
        normalised = centred if wide_rstd is None else centred * wide_rstd
        of_scale = cotangent(u, v, (wide_b * normalised).sum((1, 3)))
        if of_scale is not None:
            if want_b:
                of_b = (of_scale * normalised).to(b.dtype)
                grads[0] = of_b if grads[0] is None else grads[0] + of_b
            of_normalised = of_scale * wide_b
            of_x = of_normalised if wide_rstd is None else of_normalised * wide_rstd
            if want_x:
                grads[1] = of_x.to(x.dtype)
            if want_mean:
                grads[2] = -of_x.sum(3).unflatten(2, (mean.shape[2], -1)).sum(3)
            if want_rstd:
                grads[3] = (of_normalised * centred).sum(3).unflatten(2, (rstd.shape[2], -1)).sum(3)
    return (*grads, None)[: ctx.arguments]


torch.library.register_autograd("ghostgrad::affine_sqnorm", _affine_sqnorm_backward, setup_context=_save_affine)


# --- norm_affine ---


def norm_affine(
    b: Tensor,  # (B, T, d, S)
    x: Tensor,  # (B, T, d, S)
    mean: Tensor,  # (B, T, G)
    rstd: Tensor,  # (B, T, G)
    weight: Tensor | None = None,  # (d,)
) -> tuple[Tensor, AffineGrads]:  # (B, T, d, S)
    """The whole backward of a layer that normalises, scales and shifts (layer, group and instance norms): the gradient of its input, and those of scale and
    shift with the squared norms of their per-sample gradients, from one pass over the data.

    ``y = weight x' + shift`` with ``x' = (x - mean) rstd``. With ``<.>`` the mean over what was normalised together, the input's gradient is
    ``rstd (weight b - <weight b> - x' <weight b x'>)``; the rest is as in :func:`affine_sqnorm`.

    Args:
        b: gradients at the output (B, T, d, S), in float32, float64, bfloat16 or float16, with T positions before the channels and S after them. Read as they
            lie in memory if the positions after the channels are adjacent (the channels, for S = 1); else copied.
        x: the layer's input; of the shape, dtype and device of ``b``.
        mean: (B, T, G) in the accumulation dtype: of ``x`` over each of G groups of adjacent channels and the positions after them, for each position before.
        rstd: the same for the reciprocals of standard deviations.
        weight: the scale (d,), cast to the accumulation dtype; ones if left out.

    Returns:
        The gradient of ``x`` (B, T, d, S) in its dtype, its positions before its samples in memory where ``x`` has them so, and :class:`AffineGrads`.

    Memory: on a CPU, d elements per thread, and at most 16 totals of d; on CUDA, two rows of d per piece of a sample, a few hundredths of ``b``. Cost: reading
    ``b`` and ``x`` and writing the gradient once; on CUDA, rows of more than 8192 channels (fewer in float64 or unaligned) and groups of more than
    48 KiB are read twice. Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_affine("norm_affine", b, x, mean, rstd)
    if weight is not None:
        if weight.dim() != 1 or weight.shape[0] != b.shape[2]:
            raise ValueError(f"norm_affine: weight must be (d,) with d = {b.shape[2]}, got {_shape(weight)}")
        if weight.device != b.device:
            raise ValueError(f"norm_affine: weight must be on the device of b, got {weight.device} and {b.device}")
        weight = weight.to(accumulation_dtype(b.dtype))
    grad, *affine = _run(torch.ops.ghostgrad.norm_affine.default, b, x, mean, rstd, weight)
    return grad, AffineGrads(*affine)


@torch.library.register_fake("ghostgrad::norm_affine")
def _(b: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    B, T, d, S = x.shape
    grad = x.new_empty(T, B, d, S).transpose(0, 1) if x.stride(0) < x.stride(1) else x.new_empty(B, T, d, S)
    return grad, *(b.new_empty(size, dtype=accumulation_dtype(b.dtype)) for size in (d, B, d, B))


def _norm_affine_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # By autograd of the reference, which is made of differentiable operations.
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
    with torch.enable_grad():
        results = reference.norm_affine(*saved)
    used = [(result, v) for result, v in zip(results, cotangents) if v is not None and result.requires_grad]
    if not used:
        return (None,) * len(wanted)
    outputs, v = zip(*used)
    inputs = [t for t, needed in zip(saved, wanted) if needed]
    grads = iter(torch.autograd.grad(outputs, inputs, v, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(next(grads) if needed else None for needed in wanted)


torch.library.register_autograd("ghostgrad::norm_affine", _norm_affine_backward, setup_context=_save_operands)


# --- planned ops: the formula that is expected to be fastest for the shapes at hand ---


class Plan(NamedTuple):
    """A choice of formula: see :func:`plan`."""

    formula: str
    """``"row"`` (T = 1: ``||a_i||^2 ||b_i||^2``), ``"gram"``, ``"outer"``, or ``"fused"`` with the weight gradient."""
    flops: float
    """Floating-point operations of everything asked for, the weight gradient included."""
    seconds: float
    """What those are expected to take on one thread, where they and not memory set the pace. Calibrated on one machine; on CUDA it is a guess."""
    wgrad: str
    """Where the weight gradient comes from: ``""`` (it is not wanted), ``"matmul"`` (PyTorch), ``"product"`` (:func:`wgrad_sqnorm` of the batch as one
    sample), or ``"fused"`` with the norms."""


def plan(B: int, T: int, p: int, d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", wgrad: bool = False) -> Plan:
    """The formula that :func:`sqnorm` (``wgrad=False``) or :func:`wgrad_and_sqnorm` (``wgrad=True``) uses for these sizes.

    A pure function: ``csrc/core/plan.h`` says how it decides. Without a weight gradient, about: Gram matrices if ``T < 2 p d / (p + d)``.

    Args:
        B: samples.
        T: positions.
        p: input features.
        d: output features.
        dtype: of the operands.
        device: where they are.
        wgrad: whether the weight gradient is wanted, too.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"plan: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if min(B, T, p, d) < 0:
        raise ValueError(f"plan: sizes must not be negative, got B={B}, T={T}, p={p}, d={d}")
    return Plan(*_C.plan(B, T, p, d, _DTYPES[dtype], torch.device(device).type, wgrad))


def sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> Tensor:  # (B,)
    """Squared norms of the per-sample weight gradients, by whichever formula :func:`plan` expects to be fastest.

    ``sq_i = ||b_i^T a_i||_F^2``

    Arguments, result, accumulation and errors are those of :func:`outer_sqnorm`; memory and cost are those of the formula chosen.
    The choice is made when the op runs, so under ``torch.compile`` with dynamic shapes it adds no guards.
    """
    _check_operands("sqnorm", a, b)
    return _run(torch.ops.ghostgrad.sqnorm.default, a, b)


torch.library.register_fake("ghostgrad::sqnorm", _sqnorm_fake)
torch.library.register_autograd("ghostgrad::sqnorm", _operands_backward, setup_context=_save_operands)


def wgrad_and_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> tuple[Tensor, Tensor]:  # (d, p), (B,)
    """The weight gradient and all per-sample squared norms, fused or from a matrix product and a norm, whichever :func:`plan` expects to be faster.

    ``wgrad = sum_i b_i^T a_i`` and ``sq_i = ||b_i^T a_i||_F^2``

    Arguments, results, accumulation and errors are those of :func:`wgrad_sqnorm` without weights; memory and cost are those of the formula chosen.
    The choice is made when the op runs, so under ``torch.compile`` with dynamic shapes it adds no guards.
    """
    _check_operands("wgrad_and_sqnorm", a, b)
    return _run(torch.ops.ghostgrad.wgrad_and_sqnorm.default, a, b)


@torch.library.register_fake("ghostgrad::wgrad_and_sqnorm")
def _(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(b.shape[2], a.shape[2]), a.new_empty(a.shape[0], dtype=accumulation_dtype(a.dtype))


torch.library.register_autograd("ghostgrad::wgrad_and_sqnorm", _wgrad_sqnorm_backward, setup_context=_save_operands)


def per_sample_wgrad_and_sqnorm(
    a: Tensor,  # (B, T, p)
    b: Tensor,  # (B, T, d)
) -> tuple[Tensor, Tensor]:  # (B, d, p), (B,)
    """``G_i = b_i^T a_i`` themselves, in the dtype of ``a``, and ``||G_i||^2``, by whichever product :func:`plan` expects to be faster. Not differentiable."""
    B, (T, p), d = a.shape[0], a.shape[1:], b.shape[2]
    if a.is_cpu and plan(1, T, p, d, a.dtype, a.device, True).wgrad != "matmul":
        g, squares = a.new_empty(B, d, p), a.new_empty(B, dtype=accumulation_dtype(a.dtype))
        for i in range(B):
            g[i], squares[i : i + 1] = wgrad_sqnorm(a[i : i + 1], b[i : i + 1])
        return g, squares
    g = b.mT @ a
    return g, row_sqnorm(g)


# --- convolutions: what the ops share ---


def _output_size(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Of the convolution of ``x`` (B, R, c, *size)."""
    return [max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1) for n, k, s, p, d in zip(x.shape[3:], kernel, stride, padding, dilation)]


def _check_convolution(
    op: str,
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    _check_tensor(op, "x", x)
    _check_tensor(op, "b", b)
    if not 4 <= x.dim() <= 6:
        raise ValueError(f"{op}: x must be (B, R, c, *size) with one to three dimensions of size, got {_shape(x)}")
    if b.dim() != x.dim():
        raise ValueError(f"{op}: b must be (B, R, d, *out) with as many dimensions as x, got {_shape(b)} for x of {_shape(x)}")
    if x.shape[:2] != b.shape[:2]:
        raise ValueError(f"{op}: x and b must agree in batch and runs, got {_shape(x)} and {_shape(b)}")
    if x.device != b.device:
        raise ValueError(f"{op}: x and b must be on the same device, got {x.device} and {b.device}")
    _check_same_dtype(op, "x", x, b)
    if groups < 1 or x.shape[2] % groups or b.shape[2] % groups:
        raise ValueError(f"{op}: groups must divide the channels of x and b, got {groups} groups for {_shape(x)} and {_shape(b)}")
    for name, given, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(given) != x.dim() - 3 or min(given) < least:
            raise ValueError(f"{op}: {name} must be {x.dim() - 3} integers of at least {least}, got {tuple(given)}")
    most = _output_size(x, kernel, stride, padding, dilation)
    if any(n > m for n, m in zip(b.shape[3:], most)):
        raise ValueError(f"{op}: b must not be larger than the convolution's output, which is {tuple(most)} here, got {_shape(b)}")


def whole_output(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # (B, R, d, *output size)
    """``b``, with zeros up to the size of the convolution's output."""
    most = _output_size(x, kernel, stride, padding, dilation)
    missing = [m - n for n, m in zip(b.shape[3:], most)]
    return F.pad(b, [side for m in reversed(missing) for side in (0, m)]) if any(missing) else b


def _side_by_side(t: Tensor) -> Tensor:
    """(B, R, c, ...) to (R, B * c, ...): samples become groups of one convolution, with weights of their own."""
    return t.transpose(0, 1).flatten(1, 2)


def per_sample_conv_wgrad(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (B, d, c / groups, *kernel)
    """``G_i`` themselves, in the dtype of ``x``. Differentiable."""
    B, zeros = x.shape[0], [0] * len(kernel)
    if not B * b.numel():
        return b.new_zeros(B, b.shape[2], x.shape[2] // groups, *kernel)
    b = whole_output(x, b, kernel, stride, padding, dilation)
    weight = x.new_zeros(()).expand(B * b.shape[2], x.shape[2] // groups, *kernel)
    grads = torch.ops.aten.convolution_backward(
        _side_by_side(b), _side_by_side(x), weight, None, stride, padding, dilation, False, zeros, B * groups, (False, True, False)
    )
    out: Tensor = grads[1].unflatten(0, (B, -1))
    return out


def _convolve_both_ways(
    x: Tensor,  # (N, channels, *size)
    b: Tensor,  # (N, out channels, *output size)
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    want_x: bool,
    want_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``<weight, G>`` with respect to ``x`` and ``b``: G is bilinear in them."""
    zeros = [0] * len(stride)
    grad_x = grad_b = None
    if want_x:
        grad_x = torch.ops.aten.convolution_backward(b, x, weight, None, stride, padding, dilation, False, zeros, groups, (True, False, False))[0]
    if want_b:
        grad_b = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, zeros, groups)
    return grad_x, grad_b


_WEIGHTS_AT_A_TIME = 1 << 22  # elements of per-sample weights that a derivative of the norms forms at a time


def _conv_grads(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    u: Tensor | None,  # (d, c / groups, *kernel) cotangent of the weight gradient
    v: Tensor | None,  # (B,) cotangent of the squared norms
    arguments: tuple[Any, ...],
    want_x: bool,
    want_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``<u, sum_i G_i> + sum_i v_i ||G_i||^2``: those of ``<W_i, G_i>`` with the constant ``W_i = u + 2 v_i G_i``, which are convolutions.

    With ``v``, every sample has a weight of its own; some samples are treated at a time.
    """
    kernel, stride, padding, dilation, groups = arguments
    dtype = accumulation_dtype(x.dtype)
    B, R = x.shape[:2]
    if not b.numel() or not x.numel():
        return (torch.zeros_like(x) if want_x else None), (torch.zeros_like(b) if want_b else None)
    wide_x, wide_b = x.to(dtype), whole_output(x, b, kernel, stride, padding, dilation).to(dtype)
    if v is None:
        assert u is not None
        weight, flat = u.to(dtype), (wide_x.flatten(0, 1), wide_b.flatten(0, 1))
        grads = [t if t is None else t.unflatten(0, (B, R)) for t in _convolve_both_ways(*flat, weight, stride, padding, dilation, groups, want_x, want_b)]
    else:
        step = max(1, _WEIGHTS_AT_A_TIME // max(b.shape[2] * (x.shape[2] // groups) * math.prod(kernel), 1))
        parts = []
        for start in range(0, B, step):
            part_x, part_b, part_v = (t[start : start + step] for t in (wide_x, wide_b, v))
            weights = per_sample_conv_wgrad(part_x, part_b, *arguments)
            weights = 2 * part_v.to(dtype).view(-1, *(1,) * (weights.dim() - 1)) * weights
            if u is not None:
                weights = weights + u.to(dtype)
            n = len(part_x)
            sides = _side_by_side(part_x), _side_by_side(part_b)
            both = _convolve_both_ways(*sides, weights.flatten(0, 1), stride, padding, dilation, n * groups, want_x, want_b)
            parts.append([t if t is None else t.unflatten(1, (n, -1)).transpose(0, 1) for t in both])
        grads = [None if column[0] is None else torch.cat(column) for column in zip(*parts)]
    grad_x, grad_b = grads
    if grad_b is not None:
        grad_b = grad_b[(slice(None),) * 3 + tuple(slice(0, n) for n in b.shape[3:])]
    return None if grad_x is None else grad_x.to(x.dtype), None if grad_b is None else grad_b.to(b.dtype)


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])
    ctx.arguments = inputs[2:]


# --- conv_sqnorm ---


def conv_sqnorm(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (B,)
    """Squared norms of the per-sample gradients of a convolution's weight, without patches of the image.

    ``sq_i = ||G_i||_F^2`` with ``G_i[o, c, k] = sum_{r, t} b[i, r, o, t] x[i, r, c', t * stride + k * dilation - padding]``, ``c'`` being the channel c of
    the group that o belongs to, and x zero outside of its size.

    Args:
        x: the convolution's input (B, R, c, *size) in one to three dimensions, in float32, float64, bfloat16 or float16; the convolution runs R times for
            each sample. Strides are free: nothing is copied as a whole, channels may come last. For a transposed convolution, the gradient at its output.
        b: the gradient at its output (B, R, d, *out), of the same dtype and device. It may end before the convolution's output does: the rest is zero.
            For a transposed convolution, its input.
        kernel, stride, padding, dilation: one number for each dimension of size.
        groups: of channels.

    Returns:
        (B,), float64 for float64 and float32 otherwise. Products are accumulated in that dtype, squares in float64.

    Memory: for each thread a tile and the part of an image that it sees, less than two MiB but for enormous kernels; on a CPU, where :func:`conv_plan` says
    ``"gram"``, the patches of one sample. Cost: as the weight gradient, 2 T p d floating-point operations per sample and group with T positions, p input
    channels times kernel elements and d output channels, or ``T^2 (p + d)``.
    Same inputs on the same machine give the same bits, on any number of threads.

    Raises:
        ValueError: shapes, devices or arguments do not agree.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: a CUDA tensor meets a build without CUDA.
    """
    _check_convolution("conv_sqnorm", x, b, kernel, stride, padding, dilation, groups)
    return _run(torch.ops.ghostgrad.conv_sqnorm.default, x, b, kernel, stride, padding, dilation, groups)


@torch.library.register_fake("ghostgrad::conv_sqnorm")
def _(x: Tensor, b: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _conv_sqnorm_backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
    if v is None:
        return (None,) * 7
    x, b = ctx.saved_tensors
    return *_conv_grads(x, b, None, v, ctx.arguments, *ctx.needs_input_grad[:2]), *(None,) * 5


torch.library.register_autograd("ghostgrad::conv_sqnorm", _conv_sqnorm_backward, setup_context=_save_convolution)


# --- conv_wgrad_sqnorm ---


def conv_wgrad_sqnorm(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:  # (d, c / groups, *kernel), (B,)
    """The gradient of a convolution's weight and the squared norms of its per-sample parts, from one pass over the tiles of ``G_i``.

    ``wgrad = sum_i G_i`` and ``sq_i = ||G_i||_F^2``, with ``G_i`` as in :func:`conv_sqnorm`.

    Arguments and errors are those of :func:`conv_sqnorm`.

    Returns:
        The weight gradient (d, c / groups, *kernel) in the dtype of ``x``, and the squared norms (B,), float64 for float64 and float32 otherwise.
        Products and their sum are accumulated in the latter dtype, squares in float64.

    Memory: that of :func:`conv_sqnorm` and a tile of the weight gradient per thread; where the weight is too small to occupy the machine, the batch is cut
    into runs with a weight gradient each, 16 tiles of them at most on a CPU. Cost: 2 T p d floating-point operations per sample and group, and 4 p d.
    """
    _check_convolution("conv_wgrad_sqnorm", x, b, kernel, stride, padding, dilation, groups)
    return _run(torch.ops.ghostgrad.conv_wgrad_sqnorm.default, x, b, kernel, stride, padding, dilation, groups)


def _conv_wgrad_sqnorm_fake(x: Tensor, b: Tensor, kernel: Sequence[int], *arguments: Any) -> tuple[Tensor, Tensor]:
    wgrad = x.new_empty(b.shape[2], x.shape[2] // arguments[-1], *kernel)
    return wgrad, x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _conv_wgrad_sqnorm_backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
    if u is None and v is None:
        return (None,) * 7
    x, b = ctx.saved_tensors
    return *_conv_grads(x, b, u, v, ctx.arguments, *ctx.needs_input_grad[:2]), *(None,) * 5


torch.library.register_fake("ghostgrad::conv_wgrad_sqnorm", _conv_wgrad_sqnorm_fake)
torch.library.register_autograd("ghostgrad::conv_wgrad_sqnorm", _conv_wgrad_sqnorm_backward, setup_context=_save_convolution)


# --- conv_wgrad_and_sqnorm, planned ---


def conv_plan(
    B: int, T: int, p: int, d: int, groups: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", wgrad: bool = False
) -> Plan:
    """The formula that :func:`conv_sqnorm` (``wgrad=False``) or :func:`conv_wgrad_and_sqnorm` (``wgrad=True``) uses for these sizes.

    A pure function: ``csrc/core/plan.h`` says how it decides. Gram matrices, for which patches are formed, if positions are few; never on CUDA.

    Args:
        B: samples.
        T: positions, of all runs that belong to a sample.
        p: input channels of a group times kernel elements.
        d: output channels of a group.
        groups: of channels.
        dtype: of the operands.
        device: where they are.
        wgrad: whether the weight gradient is wanted, too.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"conv_plan: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if min(B, T, p, d, groups) < 0:
        raise ValueError(f"conv_plan: sizes must not be negative, got B={B}, T={T}, p={p}, d={d}, groups={groups}")
    return Plan(*_C.conv_plan(B, T, p, d, groups, _DTYPES[dtype], torch.device(device).type, wgrad))


def conv_wgrad_and_sqnorm(
    x: Tensor,  # (B, R, c, *size)
    b: Tensor,  # (B, R, d, *out)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:  # (d, c / groups, *kernel), (B,)
    """The gradient of a convolution's weight and the squared norms of its per-sample parts, by :func:`conv_wgrad_sqnorm`, or by PyTorch's own weight
    gradient and :func:`conv_sqnorm`, whichever :func:`conv_plan` expects to be faster.

    Arguments, results and errors are those of :func:`conv_wgrad_sqnorm`; memory and cost are those of the formula chosen.
    The choice is made when the op runs, so under ``torch.compile`` with dynamic shapes it adds no guards.
    """
    _check_convolution("conv_wgrad_and_sqnorm", x, b, kernel, stride, padding, dilation, groups)
    return _run(torch.ops.ghostgrad.conv_wgrad_and_sqnorm.default, x, b, kernel, stride, padding, dilation, groups)


torch.library.register_fake("ghostgrad::conv_wgrad_and_sqnorm", _conv_wgrad_sqnorm_fake)
torch.library.register_autograd("ghostgrad::conv_wgrad_and_sqnorm", _conv_wgrad_sqnorm_backward, setup_context=_save_convolution)
