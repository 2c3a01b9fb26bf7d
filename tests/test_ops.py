"""Each op five ways: against its reference, by gradcheck, by opcheck, by its properties, and on the empty, the one, the odd and the non-contiguous.

"Against its reference" means an honest tolerance: the error against long double is at most twice the error that the reference itself makes in the
op's dtype on the same inputs, plus four units of rounding (with a handful of terms either error is luck). There is no tolerance to tune.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostgrad import _C, ops, reference
from ghostgrad.reference import accumulation_dtype
from helpers import in_own_process, needs_peak_memory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() and _C.with_cuda else ["cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORMS = ["outer_sqnorm", "gram_sqnorm", "sqnorm"]
WGRADS = ["wgrad_sqnorm", "wgrad_and_sqnorm", "wgrad_moments"]
# (B, T, p, d). The comments name what would go wrong unseen without the line.
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 17, 5),  # T = 1, the rank-one formula
    (2, 2, 1, 40),  # one column
    (2, 3, 40, 1),  # one row
    (3, 5, 31, 11),  # one less than a register block of AVX-512 (32 x 12) either way
    (3, 5, 32, 12),  # exactly one
    (3, 5, 33, 13),  # one more
    (2, 16, 7, 9),  # exactly one strip of positions
    (2, 17, 70, 66),  # one position more; a CUDA tile (64) and a rest
    (2, 65, 8, 9),  # several strips, an odd number of them
    (1, 256, 9, 10),  # exactly as many positions as are summed in one go
    (2, 257, 9, 10),  # one more
    (1, 1030, 5, 6),  # several times as many, and a rest
    (1, 3, 300, 270),  # several tiles of the weight gradient (256), with a rest
    (2, 4, 520, 7),
    (1100, 2, 3, 4),  # so many samples that their weighted sum moves on to float64
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def operands(B: int, T: int, p: int, d: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw((B, T, p), dtype, device, 2 * seed), draw((B, T, d), dtype, device, 2 * seed + 1)


def relative_error(value: Tensor, truth: np.ndarray) -> float:
    """Largest relative error over samples for vectors, relative error in the Frobenius norm for matrices."""
    assert tuple(value.shape) == truth.shape
    if truth.size == 0:
        return 0.0
    difference = value.detach().cpu().to(torch.float64).numpy().astype(np.longdouble) - truth
    if truth.ndim == 1:
        return float(np.max(np.abs(difference) / np.maximum(np.abs(truth), np.finfo(np.float64).tiny)))
    return float(np.sqrt((difference**2).sum()) / np.sqrt(np.maximum((truth**2).sum(), np.finfo(np.float64).tiny)))


def assert_honest(value: Tensor, plain: Tensor, truth: np.ndarray, condition: float = 1.0) -> None:
    """At most twice the error of plain PyTorch, plus four units of rounding of the result's dtype, or of what is added up where that is larger."""
    error, allowed = relative_error(value, truth), 2 * relative_error(plain, truth) + 4 * condition * torch.finfo(value.dtype).eps
    assert error <= allowed, f"relative error {error:.3g}, plain PyTorch allows {allowed:.3g}"


def cancellation(a: Tensor, b: Tensor) -> float:
    """``sum_{s,t} |<a_s, a_t> <b_s, b_t>| / ||G_i||^2``, the largest of all samples: by how much the terms of a norm outweigh it."""
    wide_a, wide_b = a.detach().double(), b.detach().double()
    terms = (wide_a @ wide_a.mT) * (wide_b @ wide_b.mT)
    return float((terms.abs().sum((1, 2)) / terms.sum((1, 2)).abs()).nan_to_num(1.0, 1.0, 1.0).amax()) if len(a) else 1.0


def true_per_sample(a: Tensor, b: Tensor) -> np.ndarray:
    """``G_i`` in long double."""
    wide_a, wide_b = (x.detach().cpu().to(torch.float64).numpy().astype(np.longdouble) for x in (a, b))
    return np.einsum("btd,btp->bdp", wide_b, wide_a)


def picks(B: int, T: int, d: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices drawn from -1, 0, ... ``vocabulary - 1``, and gradients at them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, vocabulary, (B, T), generator=generator).to(device), draw((B, T, d), dtype, device, seed)


def true_embedding_sqnorm(index: Tensor, b: Tensor) -> np.ndarray:
    """In long double, token by token."""
    tokens, rows = index.cpu().numpy(), b.detach().cpu().double().numpy().astype(np.longdouble)
    norms = [sum(((x[t == v].sum(0) ** 2).sum() for v in np.unique(t[t >= 0])), np.longdouble(0)) for t, x in zip(tokens, rows)]
    return np.array(norms, dtype=np.longdouble)


def norms_of(op: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The op as a function from operands to squared norms."""
    function = getattr(ops, op)
    return function if op in NORMS else lambda a, b: function(a, b)[-1]


# --- against the reference ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_norm_is_the_references(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    a, b = operands(*shape, dtype, device)
    value = getattr(ops, op)(a, b)
    plain = reference.gram_sqnorm(a, b) if op == "gram_sqnorm" else reference.outer_sqnorm(a, b)
    assert value.dtype == accumulation_dtype(dtype)
    assert_honest(value, plain, (true_per_sample(a, b) ** 2).sum((1, 2)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_wgrad_sqnorm_is_the_references(shape: tuple[int, int, int, int], dtype: torch.dtype, weighted: bool, device: str) -> None:
    a, b = operands(*shape, dtype, device)
    weights = draw((shape[0],), accumulation_dtype(dtype), device, seed=9) if weighted else None
    wgrad, sqnorm = ops.wgrad_sqnorm(a, b, weights)
    per_sample = true_per_sample(a, b)
    factors = np.ones(shape[0]) if weights is None else weights.cpu().double().numpy()
    plain_wgrad, plain_sqnorm = reference.wgrad_sqnorm(a, b, weights)
    assert wgrad.dtype == dtype
    assert sqnorm.dtype == accumulation_dtype(dtype)
    assert_honest(wgrad, plain_wgrad, np.einsum("b,bdp->dp", factors, per_sample))
    assert_honest(sqnorm, plain_sqnorm, (per_sample**2).sum((1, 2)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wgrad_moments_is_the_references(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    a, b = operands(*shape, dtype, device)
    values, plain, per_sample = ops.wgrad_moments(a, b), reference.wgrad_moments(a, b), true_per_sample(a, b)
    truth = (per_sample.sum(0), (per_sample**2).sum(0), (per_sample**2).sum((1, 2)))
    for value, alike, true, of in zip(values, plain, truth, (dtype, *[accumulation_dtype(dtype)] * 2), strict=True):
        assert value.dtype == alike.dtype == of
        assert_honest(value, alike, true)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wgrad_and_sqnorm_is_the_references(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    a, b = operands(*shape, dtype, device)
    wgrad, sqnorm = ops.wgrad_and_sqnorm(a, b)
    per_sample = true_per_sample(a, b)
    plain_wgrad = b.flatten(0, 1).mT @ a.flatten(0, 1)
    assert wgrad.dtype == dtype
    assert sqnorm.dtype == accumulation_dtype(dtype)
    assert_honest(wgrad, plain_wgrad, per_sample.sum(0))
    assert_honest(sqnorm, reference.outer_sqnorm(a, b), (per_sample**2).sum((1, 2)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 63), (2, 64), (2, 65), (3, 7, 11), (2, 1025), (1, 32769), (2, 3, 5, 2731), (1, 2_000_000)], ids=str)
def test_row_sqnorm_is_the_references(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = draw(shape, dtype, device)
    truth = (x.cpu().double().numpy().astype(np.longdouble).reshape(shape[0], -1) ** 2).sum(1)
    value = ops.row_sqnorm(x)
    assert value.dtype == accumulation_dtype(dtype)
    assert_honest(value, reference.row_sqnorm(x), truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("B", "T", "d", "vocabulary"),
    [
        (3, 1, 5, 2),
        (2, 7, 33, 3),
        (4, 256, 64, 8192),  # most tokens stand alone
        (2, 256, 7, 1),  # two tokens, one of them padding
        (2, 600, 7, 1),  # one token more often than is summed in one go (256)
        (2, 2100, 3, 40),  # more positions than are sorted in shared memory (2048)
        (1, 130, 1030, 50),  # one sample cut up; more columns than are summed in one go (1024)
        (70, 5, 16, 4),
    ],
)
def test_embedding_sqnorm_is_the_references(B: int, T: int, d: int, vocabulary: int, index_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    index, b = picks(B, T, d, vocabulary, dtype, device)
    value = ops.embedding_sqnorm(index.to(index_dtype), b)
    assert value.dtype == accumulation_dtype(dtype)
    assert_honest(value, reference.embedding_sqnorm(index, b), true_embedding_sqnorm(index, b))


def test_embedding_sqnorm_keeps_its_digits() -> None:
    index, b = torch.zeros(1, 100_000, dtype=torch.int64), torch.rand(1, 100_000, 3) + 0.5
    assert relative_error(ops.embedding_sqnorm(index, b), true_embedding_sqnorm(index, b)) < 4e-7


# (B, T, d, S, G) for affine_sqnorm
AFFINE_SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 1, 17, 1, 1),  # one position: the bias of a linear layer
    (3, 5, 64, 1, 1),  # exactly one granule of channels; rows by four, and a rest
    (2, 4, 66, 1, 1),
    (2, 257, 10, 1, 1),  # one position more than are summed in one go
    (1, 1030, 5, 1, 5),
    (5, 3, 1040, 1, 2),  # several tiles of channels
    (40, 2, 33, 1, 1),  # several samples in a run, with a rest
    (3, 1, 12, 35, 4),  # an image: fewer pixels than four vectors, and a rest
    (3, 2, 6, 64, 3),  # frames
    (2, 1, 70, 5, 70),  # fewer pixels than a vector; one group for each channel
    (2, 1, 3, 4100, 1),  # more pixels than are summed in one go
]


def affine_operands(B: int, T: int, d: int, S: int, G: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, x, mean, rstd"""
    b, x = (draw((B, T, d, S), dtype, device, 4 * seed + i) for i in range(2))
    mean, rstd = (draw((B, T, G), accumulation_dtype(dtype), device, 4 * seed + i) for i in (2, 3))
    return b, x + 1, mean, rstd.abs() + 0.5


def affine_given(given: str, operands: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """The arguments by their names' initials: "b", "bx", "bxmr" or "bxr"."""
    return tuple(t if initial in given else None for initial, t in zip("bxmr", operands))


def true_affine(b: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> list[np.ndarray]:
    def long(t: Tensor) -> np.ndarray:
        return t.detach().cpu().to(torch.float64).numpy().astype(np.longdouble)

    def sums(per_sample: np.ndarray) -> list[np.ndarray]:
        return [per_sample.sum(0), (per_sample**2).sum(1)]

    shift = sums(long(b).sum((1, 3)))
    if x is None:
        return [np.zeros(0), np.zeros(0), *shift]
    normalised = long(x)
    if mean is not None:
        normalised = normalised - np.repeat(long(mean), b.shape[2] // mean.shape[2], 2)[..., None]
    if rstd is not None:
        normalised = normalised * np.repeat(long(rstd), b.shape[2] // rstd.shape[2], 2)[..., None]
    return [*sums((long(b) * normalised).sum((1, 3))), *shift]


def assert_affine_honest(values: tuple[Tensor, ...], plain: tuple[Tensor, ...], truth: list[np.ndarray]) -> None:
    """As assert_honest, with sums measured in the norm over the channels."""
    for value, alike, true in zip(values, plain, truth, strict=True):
        assert value.shape == alike.shape and value.dtype == alike.dtype
        if true.shape == truth[-1].shape and value is not values[0] and value is not values[2]:
            assert_honest(value, alike, true)
        else:
            assert_honest(value[None], alike[None], true[None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["b", "bx", "bxmr", "bxr"])
@pytest.mark.parametrize("shape", AFFINE_SHAPES, ids=str)
def test_affine_sqnorm_is_the_references(shape: tuple[int, int, int, int, int], given: str, dtype: torch.dtype, device: str) -> None:
    arguments = affine_given(given, affine_operands(*shape, dtype, device))
    values, plain, truth = ops.affine_sqnorm(*arguments), reference.affine_sqnorm(*arguments), true_affine(*arguments)
    assert all(value.dtype == accumulation_dtype(dtype) for value in values)
    assert_affine_honest(values, plain, truth)
    scale, scale_sqnorm, shift, shift_sqnorm = ops.affine_sqnorm(*arguments, total=False)
    assert scale.numel() == shift.numel() == 0
    assert torch.equal(scale_sqnorm, values.scale_sqnorm) and torch.equal(shift_sqnorm, values.shift_sqnorm)


@pytest.mark.parametrize("given", ["b", "bx", "bxmr"])
@pytest.mark.parametrize("shape", [(3, 5, 18, 1, 3), (3, 1, 18, 35, 3), (3, 2, 6, 7, 1), (3, 5, 1, 1, 1), (3, 9, 4, 1, 1)], ids=str)
def test_affine_sqnorm_of_any_layout(shape: tuple[int, int, int, int, int], given: str) -> None:
    operands = affine_operands(*shape, torch.float64)
    truth = reference.affine_sqnorm(*affine_given(given, operands))

    def laid_out(t: Tensor, order: tuple[int, ...]) -> Tensor:
        return t.permute(order).contiguous().permute([order.index(dim) for dim in range(t.dim())])

    orders = [(0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3), (0, 3, 2, 1), (3, 2, 1, 0), (1, 0, 2, 3)]
    b, x, mean, rstd = operands
    cases = [(laid_out(b, order), laid_out(x, other), mean, rstd) for order in orders for other in (order, orders[0])]
    cases += [(b, x, laid_out(mean, (2, 1, 0)), laid_out(rstd, (1, 0, 2)))]
    wide = torch.full((2 * shape[0], *shape[1:3], shape[3] + 2), float("nan"), dtype=torch.float64)
    wide[::2, ..., 1:-1] = b
    cases += [(wide[::2, ..., 1:-1], x, mean, rstd)]
    for case in cases:
        for value, true in zip(ops.affine_sqnorm(*affine_given(given, case)), truth):
            torch.testing.assert_close(value, true, rtol=1e-13, atol=1e-13)
    expanded = (b[:1, :1, :, :1].expand_as(b), x, mean[:1].expand_as(mean), rstd[:, :1].expand_as(rstd))
    for value, true in zip(ops.affine_sqnorm(*affine_given(given, expanded)), reference.affine_sqnorm(*affine_given(given, expanded))):
        torch.testing.assert_close(value, true, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("given", ["b", "bx", "bxmr"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 1, 2), (2, 0, 4, 1, 2), (2, 3, 0, 1, 1), (2, 1, 4, 0, 2), (0, 0, 0, 0, 1)], ids=str)
def test_affine_sqnorm_of_nothing_is_zero(shape: tuple[int, int, int, int, int], given: str) -> None:
    B, _, d, _, _ = shape
    scale, scale_sqnorm, shift, shift_sqnorm = ops.affine_sqnorm(*affine_given(given, affine_operands(*shape, torch.float32)))
    assert torch.equal(shift, torch.zeros(d)) and torch.equal(shift_sqnorm, torch.zeros(B))
    if given != "b":
        assert torch.equal(scale, torch.zeros(d)) and torch.equal(scale_sqnorm, torch.zeros(B))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("given", ["b", "bx", "bxmr", "bxr"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 1, 1), (2, 1, 4, 3, 2)], ids=str)
def test_gradients_of_affine_sqnorm(shape: tuple[int, int, int, int, int], given: str, total: bool, device: str) -> None:
    arguments = affine_given(given, affine_operands(*shape, torch.float64, device))
    inputs = tuple(t.requires_grad_() for t in arguments if t is not None)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        results = ops.affine_sqnorm(*(None if t is None else next(left) for t in arguments), total=total)
        return tuple(t for t in results if t.numel())

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(4, 5, 66, 1, 1), (4, 1, 7, 35, 1)], ids=str)
def test_nan_and_inf_of_affine_sqnorm_stay_with_their_sample(shape: tuple[int, int, int, int, int], bad: float) -> None:
    b, x, mean, rstd = affine_operands(*shape, torch.float32)
    clean = ops.affine_sqnorm(b, x, mean, rstd)
    b[1, -1, -1, -1], x[2, -1, -1, -1] = bad, bad
    dirty = ops.affine_sqnorm(b, x, mean, rstd)
    assert torch.equal(dirty.scale_sqnorm[[0, 3]], clean.scale_sqnorm[[0, 3]]) and not dirty.scale_sqnorm[[1, 2]].isfinite().any()
    assert torch.equal(dirty.shift_sqnorm[[0, 2, 3]], clean.shift_sqnorm[[0, 2, 3]]) and not dirty.shift_sqnorm[1].isfinite()
    assert torch.equal(dirty.shift[:-1], clean.shift[:-1]) and not dirty.shift[-1].isfinite()


# (B, T, d, S, G) for norm_affine
NORM_SHAPES = [
    *AFFINE_SHAPES,
    (2, 300, 33, 1, 1),  # few samples: each in pieces of its rows
    (1, 2, 5000, 1, 1),  # more channels than are summed in one go
    (2, 3, 36, 1, 4),  # groups of channels without pixels
]


def norm_operands(
    B: int, T: int, d: int, S: int, G: int, dtype: torch.dtype, weighted: bool = True, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """b, x, mean, rstd, weight"""
    return *affine_operands(B, T, d, S, G, dtype, device), draw((d,), accumulation_dtype(dtype), device, 5) if weighted else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_affine_is_the_references(shape: tuple[int, int, int, int, int], weighted: bool, dtype: torch.dtype, device: str) -> None:
    arguments = norm_operands(*shape, dtype, weighted, device)
    (grad, values), (plain_grad, *plain) = ops.norm_affine(*arguments), reference.norm_affine(*arguments)
    assert_affine_honest(values, tuple(plain), true_affine(*arguments[:4]))
    true_grad = reference.norm_affine(*(None if t is None else t.double() for t in arguments))[0]
    assert grad.dtype == dtype and grad.shape == true_grad.shape
    scale = float(true_grad.abs().max())
    assert float((grad - true_grad).abs().max()) <= 2 * float((plain_grad - true_grad).abs().max()) + 4 * torch.finfo(accumulation_dtype(dtype)).eps * scale


@pytest.mark.parametrize("shape", [(3, 5, 18, 1, 3), (3, 1, 18, 35, 3), (3, 2, 6, 7, 1), (3, 5, 1, 1, 1), (3, 9, 4, 1, 1)], ids=str)
def test_norm_affine_of_any_layout(shape: tuple[int, int, int, int, int]) -> None:
    b, x, mean, rstd, weight = norm_operands(*shape, torch.float64)
    assert weight is not None
    truth = reference.norm_affine(b, x, mean, rstd, weight)

    def laid_out(t: Tensor, order: tuple[int, ...]) -> Tensor:
        return t.permute(order).contiguous().permute([order.index(dim) for dim in range(t.dim())])

    orders = [(0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3), (0, 3, 2, 1), (3, 2, 1, 0), (1, 0, 2, 3)]
    cases = [(laid_out(b, order), laid_out(x, other), mean, rstd, weight) for order in orders for other in orders]
    cases += [(b, x, laid_out(mean, (2, 1, 0)), laid_out(rstd, (1, 0, 2)), weight.repeat_interleave(2)[::2])]
    for case in cases:
        grad, affine = ops.norm_affine(*case)
        swapped = case[1].stride(0) < case[1].stride(1)
        assert (grad.transpose(0, 1) if swapped else grad).is_contiguous()
        for value, true in zip((grad, *affine), truth):
            torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4, 1, 2), (2, 0, 4, 1, 2), (2, 3, 0, 1, 1), (2, 1, 4, 0, 2), (0, 0, 0, 0, 1)], ids=str)
def test_norm_affine_of_nothing_is_zero(shape: tuple[int, int, int, int, int]) -> None:
    grad, affine = ops.norm_affine(*norm_operands(*shape, torch.float32))
    assert grad.shape == shape[:4]
    for value, size in zip(affine, (shape[2], shape[0], shape[2], shape[0])):
        assert torch.equal(value, torch.zeros(size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 4, 1, 1), (2, 1, 4, 3, 2)], ids=str)
def test_gradients_of_norm_affine(shape: tuple[int, int, int, int, int], weighted: bool, device: str) -> None:
    inputs = tuple(t.requires_grad_() for t in norm_operands(*shape, torch.float64, weighted, device) if t is not None)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        grad, affine = ops.norm_affine(*tensors)
        return grad, *affine

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    constants = tuple(t.detach() for t in inputs)
    for i, t in enumerate(inputs):  # what does not depend on the only input is no obstacle
        results = [r for r in function(*constants[:i], t, *constants[i + 1 :]) if r.requires_grad]
        assert torch.autograd.grad(sum(r.sum() for r in results), t)[0].shape == t.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(4, 5, 66, 1, 1), (4, 1, 7, 35, 1)], ids=str)
def test_nan_and_inf_of_norm_affine_stay_with_their_sample(shape: tuple[int, int, int, int, int], bad: float) -> None:
    b, x, *rest = norm_operands(*shape, torch.float32)
    clean_grad, clean = ops.norm_affine(b, x, *rest)
    b[1, -1, -1, -1], x[2, -1, -1, -1] = bad, bad
    grad, dirty = ops.norm_affine(b, x, *rest)
    assert torch.equal(grad[[0, 3]], clean_grad[[0, 3]]) and not grad[[1, 2], -1].isfinite().any()
    assert torch.equal(dirty.scale_sqnorm[[0, 3]], clean.scale_sqnorm[[0, 3]]) and not dirty.scale_sqnorm[[1, 2]].isfinite().any()
    assert torch.equal(dirty.shift_sqnorm[[0, 2, 3]], clean.shift_sqnorm[[0, 2, 3]]) and not dirty.shift_sqnorm[1].isfinite()


@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_long_sums_of_one_sign_keep_their_digits(op: str) -> None:
    # All products positive: the case in which adding one by one in float32 loses most.
    a, b = torch.rand(1, 100_000, 2) + 0.5, torch.rand(1, 100_000, 3) + 0.5
    if op == "gram_sqnorm":
        a, b = a[:, :3000], b[:, :3000]
    truth = (true_per_sample(a, b) ** 2).sum((1, 2))
    assert relative_error(norms_of(op)(a, b), truth) < 4e-7


def test_long_sums_of_affine_sqnorm_keep_their_digits() -> None:
    for shape in ((1, 100_000, 3, 1), (1, 1, 3, 100_000)):
        b, x = torch.rand(shape) + 0.5, torch.rand(shape) + 0.5
        for value, truth in zip(ops.affine_sqnorm(b, x), true_affine(b, x, None, None)):
            assert relative_error(value, truth) < 4e-7
        statistics = torch.zeros(1, shape[1], 1), torch.ones(1, shape[1], 1)
        for value, truth in zip(ops.norm_affine(b, x, *statistics)[1], true_affine(b, x, None, None)):
            assert relative_error(value, truth) < 4e-7


# --- gradients ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_gradients(op: str, T: int, device: str) -> None:
    inputs = tuple(x.requires_grad_() for x in operands(3, T, 4, 5, torch.float64, device))
    assert torch.autograd.gradcheck(getattr(ops, op), inputs)
    assert torch.autograd.gradgradcheck(getattr(ops, op), inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [1, 3, 7])
def test_gradients_of_weights(T: int, device: str) -> None:
    a, b = operands(3, T, 4, 5, torch.float64, device)
    weights = draw((3,), torch.float64, device, seed=5)
    inputs = tuple(x.requires_grad_() for x in (a, b, weights))
    assert torch.autograd.gradcheck(ops.wgrad_sqnorm, inputs)
    assert torch.autograd.gradgradcheck(ops.wgrad_sqnorm, inputs)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 2)], ids=str)
def test_gradients_of_rows(shape: tuple[int, ...]) -> None:
    x = draw(shape, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.row_sqnorm, (x,))
    assert torch.autograd.gradgradcheck(ops.row_sqnorm, (x,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "vocabulary"), [(0, 1), (1, 2), (6, 1), (6, 4)])
def test_gradients_of_picks(T: int, vocabulary: int, device: str) -> None:
    index, b = picks(3, T, 4, vocabulary, torch.float64, device)
    assert torch.autograd.gradcheck(lambda b: ops.embedding_sqnorm(index, b), (b.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda b: ops.embedding_sqnorm(index, b), (b,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_picks_are_the_references(dtype: torch.dtype) -> None:
    index, b = picks(3, 40, 6, 12, dtype)
    index[index == 3] = 2**60
    b[0, index[0] < 0] = float("inf")  # where nothing is picked nothing leaks
    grads = [torch.autograd.grad((op(index, b.requires_grad_()) ** 2).sum(), b)[0] for op in (ops.embedding_sqnorm, reference.embedding_sqnorm)]
    assert grads[0].dtype == dtype and (grads[0][index < 0] == 0).all() and (index < 0).any()
    torch.testing.assert_close(*grads, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("op", NORMS)
def test_third_derivatives_are_the_references(op: str, T: int) -> None:
    a, b = (x.requires_grad_() for x in operands(2, T, 3, 4, torch.float64))

    def third(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        value = (function(a, b) ** 2).sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, (a, b), create_graph=True)
            value = sum((grad**2).sum() for grad in grads)
        return torch.autograd.grad(value, (a, b))

    for value, truth in zip(third(getattr(ops, op)), third(reference.outer_sqnorm), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", ["wgrad", "sqnorm", "both"])
@pytest.mark.parametrize("wanted", ["a", "b", "weights", "all"])
def test_partial_gradients_are_the_references(used: str, wanted: str, dtype: torch.dtype) -> None:
    # Unused outputs and inputs that need no gradient take other paths through the formula than gradcheck does.
    def grads(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        a, b = operands(3, 4, 6, 5, dtype)
        inputs = {"a": a, "b": b, "weights": draw((3,), torch.float32, seed=5)}
        chosen = list(inputs) if wanted == "all" else [wanted]
        for name in chosen:
            inputs[name].requires_grad_()
        wgrad, sqnorm = function(*inputs.values())
        total = (wgrad.float() ** 2).sum() * (used != "sqnorm") if used != "sqnorm" else 0
        total = total + ((sqnorm**2).sum() if used != "wgrad" else 0)
        if not total.requires_grad:
            return []
        return list(torch.autograd.grad(total, [inputs[name] for name in chosen], allow_unused=True))

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    if used == "sqnorm" and wanted == "weights":
        return  # the norms do not depend on the weights
    for value, truth in zip(grads(ops.wgrad_sqnorm), grads(reference.wgrad_sqnorm), strict=True):
        if truth is None:
            assert value is None
        else:
            torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (9, 2, 20, 30)], ids=str)  # in the second, samples are taken two at a time
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("wanted", ["a", "b", "ab"])
def test_gradients_of_wgrad_moments_are_the_references(wanted: str, used: tuple[int, ...], shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    def grads(function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        inputs = dict(zip("ab", operands(*shape, dtype)))
        chosen = [inputs[name].requires_grad_() for name in wanted]
        results = function(*inputs.values())
        return torch.autograd.grad(sum((results[i].float() ** 2).sum() for i in used), chosen)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for value, truth in zip(grads(ops.wgrad_moments), grads(reference.wgrad_moments), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


# --- the registration ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (2, 3, 4, 5), (2, 9, 4, 3), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("op", [*NORMS, *WGRADS, "row_sqnorm", "weights"])
def test_opcheck(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, requires_grad: bool, device: str) -> None:
    a, b = operands(*shape, dtype, device)
    arguments = [a] if op == "row_sqnorm" else [a, b]
    if op == "weights":
        op, arguments = "wgrad_sqnorm", [a, b, torch.rand(shape[0], device=device)]
    torch.library.opcheck(getattr(torch.ops.ghostgrad, op).default, tuple(x.requires_grad_(requires_grad) for x in arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 4), (2, 9, 4), (0, 3, 4), (2, 0, 4)], ids=str)
def test_opcheck_of_picks(shape: tuple[int, int, int], dtype: torch.dtype, index_dtype: torch.dtype, requires_grad: bool, device: str) -> None:
    index, b = picks(*shape, 4, dtype, device)
    torch.library.opcheck(torch.ops.ghostgrad.embedding_sqnorm.default, (index.to(index_dtype), b.requires_grad_(requires_grad)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("given", ["b", "bx", "bxmr"])
def test_opcheck_of_affine_sqnorm(given: str, total: bool, requires_grad: bool, device: str) -> None:
    for shape, dtype in (((3, 2, 4, 1, 1), torch.float32), ((2, 1, 4, 3, 2), torch.bfloat16), ((0, 1, 4, 3, 2), torch.float32)):
        arguments = affine_given(given, affine_operands(*shape, dtype, device))
        for t in arguments:
            if t is not None:
                t.requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.ghostgrad.affine_sqnorm.default, (*arguments, total))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck_of_norm_affine(weighted: bool, requires_grad: bool, device: str) -> None:
    for shape, dtype in (((3, 2, 4, 1, 1), torch.float32), ((2, 1, 4, 3, 2), torch.bfloat16), ((0, 1, 4, 3, 2), torch.float32)):
        b, x, *rest = norm_operands(*shape, dtype, weighted, device)
        for time_major in (False, True):
            given = (b, x.transpose(0, 1).contiguous().transpose(0, 1) if time_major else x, *rest)
            torch.library.opcheck(torch.ops.ghostgrad.norm_affine.default, tuple(None if t is None else t.requires_grad_(requires_grad) for t in given))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_breaks(dynamic: bool | None) -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        wgrad, sqnorm = ops.wgrad_and_sqnorm(a, b)
        index = torch.arange(a.shape[1]).remainder(2).expand(a.shape[0], -1)
        affine = ops.affine_sqnorm(b[..., None], b[..., None].sin())
        norms = (sqnorm, ops.sqnorm(a, b), ops.row_sqnorm(a), ops.embedding_sqnorm(index, b), affine.scale_sqnorm)
        return wgrad.sum() + affine.shift.sum() + sum(norm.sum() for norm in norms)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, T in [(4, 3), (3, 3), (2, 9)]:
        grads = []
        for function in (compiled, step):
            a, b = (x.requires_grad_() for x in operands(B, T, 4, 5, torch.float32))
            function(a, b).backward()
            grads.append((a.grad, b.grad))
        torch.testing.assert_close(grads[0], grads[1])
    torch._dynamo.reset()


# --- properties ---


@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_permuting_the_batch_permutes_the_norms(op: str) -> None:
    a, b = operands(7, 5, 40, 30, torch.float32)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norms_of(op)(a, b)[order], norms_of(op)(a[order], b[order]))


@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_scaling_by_a_power_of_two_scales_by_its_square(op: str) -> None:
    a, b = operands(3, 9, 40, 30, torch.float32)
    assert torch.equal(norms_of(op)(a, 8 * b), 64 * norms_of(op)(a, b))


@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_splitting_positions_into_features_leaves_the_parallelogram(op: str) -> None:
    # ||G + H||^2 + ||G - H||^2 = 2 ||G||^2 + 2 ||H||^2 with G and H the parts of either half of the positions.
    a, b = operands(3, 12, 20, 10, torch.float64)
    first, second = (a[:, :6], b[:, :6]), (a[:, 6:], b[:, 6:])
    norms = norms_of(op)
    together = norms(a, b) + norms(a, torch.cat([b[:, :6], -b[:, 6:]], 1))
    torch.testing.assert_close(together, 2 * norms(*first) + 2 * norms(*second), rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_one_position_is_rank_one(op: str) -> None:
    a, b = operands(4, 1, 50, 70, torch.float64)
    torch.testing.assert_close(norms_of(op)(a, b), ops.row_sqnorm(a) * ops.row_sqnorm(b), rtol=1e-13, atol=0)


def test_renaming_and_reordering_tokens_changes_nothing() -> None:
    index, b = picks(5, 60, 40, 30, torch.float64)
    norms = ops.embedding_sqnorm(index, b)
    names = torch.tensor([2**62, *range(28), 2**63 - 1])[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(ops.embedding_sqnorm(torch.where(index >= 0, names[index], -(2**63)), b), norms)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.embedding_sqnorm(index[:, order], b[:, order]), norms, rtol=1e-13, atol=0)
    assert torch.equal(ops.embedding_sqnorm(index.flip(0), b.flip(0)), norms.flip(0))


def test_tokens_that_are_all_different_or_all_equal() -> None:
    b = draw((3, 20, 50), torch.float64)
    torch.testing.assert_close(ops.embedding_sqnorm(torch.arange(20).expand(3, -1), b), ops.row_sqnorm(b), rtol=1e-13, atol=0)
    torch.testing.assert_close(ops.embedding_sqnorm(torch.tensor(7).expand(3, 20), b), ops.row_sqnorm(b.sum(1)), rtol=1e-13, atol=0)
    assert torch.equal(ops.embedding_sqnorm(torch.full((3, 20), -1), b), torch.zeros(3, dtype=torch.float64))


def test_weights_of_one_change_nothing() -> None:
    a, b = operands(5, 6, 40, 30, torch.float32)
    for value, truth in zip(ops.wgrad_sqnorm(a, b, torch.ones(5)), ops.wgrad_sqnorm(a, b), strict=True):
        assert torch.equal(value, truth)


# --- the empty, the one, the odd, the non-contiguous ---


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, laid out in memory in several ways."""
    yield "contiguous", x
    yield "last dimension strided", x.mT.contiguous().mT
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    yield "cut from wider rows", wide[..., 1 : 1 + x.shape[-1]]
    yield "positions first", x.transpose(0, 1).contiguous().transpose(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 5),
    T=st.one_of(st.integers(0, 20), st.sampled_from([255, 257])),
    p=st.integers(0, 70),
    d=st.integers(0, 70),
    a_layout=st.integers(0, 3),
    b_layout=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)
def test_any_shape_and_layout(B: int, T: int, p: int, d: int, a_layout: int, b_layout: int, dtype: torch.dtype, seed: int) -> None:
    a, b = operands(B, T, p, d, dtype, seed=seed)
    per_sample = true_per_sample(a, b)
    truth = (per_sample**2).sum((1, 2))
    weights = draw((B,), accumulation_dtype(dtype), seed=77)
    plain_wgrad, plain_sqnorm = reference.wgrad_sqnorm(a, b, weights)
    plain_gram = reference.gram_sqnorm(a, b)
    laid_a, laid_b = list(layouts(a))[a_layout][1], list(layouts(b))[b_layout][1]
    condition = cancellation(a, b)  # without it, PyTorch's good luck with one sum of numbers that cancel would be the measure
    assert_honest(ops.outer_sqnorm(laid_a, laid_b), plain_sqnorm, truth, condition)
    assert_honest(ops.gram_sqnorm(laid_a, laid_b), plain_gram, truth, condition)
    assert_honest(ops.sqnorm(laid_a, laid_b), plain_sqnorm if T > 1 else plain_gram, truth, condition)
    wgrad, sqnorm = ops.wgrad_sqnorm(laid_a, laid_b, weights)
    assert_honest(wgrad, plain_wgrad, np.einsum("b,bdp->dp", weights.double().numpy(), per_sample))
    assert_honest(sqnorm, plain_sqnorm, truth, condition)
    _, squares, sqnorm = ops.wgrad_moments(laid_a, laid_b)
    assert_honest(squares, reference.wgrad_moments(a, b)[1], (per_sample**2).sum(0))
    assert_honest(sqnorm, plain_sqnorm, truth, condition)
    wgrad, sqnorm = ops.wgrad_and_sqnorm(laid_a, laid_b)
    assert_honest(wgrad, b.flatten(0, 1).mT @ a.flatten(0, 1), per_sample.sum(0))
    assert_honest(ops.row_sqnorm(laid_a), reference.row_sqnorm(a), (a.double().numpy().astype(np.longdouble) ** 2).sum((1, 2)))


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 5),
    T=st.one_of(st.integers(0, 20), st.sampled_from([255, 257])),
    d=st.integers(0, 70),
    vocabulary=st.integers(0, 20),
    layout=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)
def test_picks_of_any_shape_and_layout(B: int, T: int, d: int, vocabulary: int, layout: int, dtype: torch.dtype, seed: int) -> None:
    index, b = picks(B, T, d, vocabulary, dtype, seed=seed)
    truth, plain = true_embedding_sqnorm(index, b), reference.embedding_sqnorm(index, b)
    assert_honest(ops.embedding_sqnorm(index, list(layouts(b))[layout][1]), plain, truth)
    assert_honest(ops.embedding_sqnorm(index.mT.contiguous().mT, b), plain, truth)


def test_picks_of_nan_and_inf_stay_with_their_sample() -> None:
    index, b = picks(5, 20, 33, 6, torch.float32)
    index[3:, 0] = torch.tensor([-1, 0])
    clean = ops.embedding_sqnorm(index, b)
    b[1, 0, -1], b[2, 1, -1], b[3, 0, -1] = float("nan"), float("inf"), float("nan")
    index[1:3] = 3
    dirty = ops.embedding_sqnorm(index, b)
    assert torch.equal(dirty[[0, 3, 4]], clean[[0, 3, 4]])  # padding may hold anything
    assert dirty[1].isnan() and dirty[2].isinf()


@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_expanded_operands(op: str) -> None:
    a, b = draw((1, 1, 6), torch.float64).expand(3, 4, 6), draw((3, 1, 5), torch.float64).expand(3, 4, 5)
    torch.testing.assert_close(norms_of(op)(a, b), reference.outer_sqnorm(a, b), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_nothing_is_zero(op: str, shape: tuple[int, int, int, int]) -> None:
    B, _, p, d = shape
    result = getattr(ops, op)(*operands(*shape, torch.float32))
    *sums, norms = (result,) if op in NORMS else result
    assert torch.equal(norms, torch.zeros(B))
    assert all(torch.equal(value, torch.zeros(d, p)) for value in sums)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 5, 33, 13), (4, 20, 8, 9), (4, 1, 5, 6)], ids=str)
@pytest.mark.parametrize("op", [*NORMS, *WGRADS])
def test_nan_and_inf_stay_with_their_sample(op: str, shape: tuple[int, int, int, int], bad: float) -> None:
    a, b = operands(*shape, torch.float32)
    clean = norms_of(op)(a, b)
    a[1, -1, -1] = bad  # the corner, where padding is next door
    b[2, 0, -1] = bad
    dirty = norms_of(op)(a, b)
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])
    if bad != bad or op in ("gram_sqnorm", "sqnorm", "wgrad_and_sqnorm"):
        assert not dirty[[1, 2]].isfinite().any()
    else:  # what plain PyTorch gives: inf where no product is undefined
        assert torch.equal(dirty[[1, 2]], reference.outer_sqnorm(a, b)[[1, 2]])


def test_row_sqnorm_of_any_layout() -> None:
    x = draw((4, 6, 5), torch.float64)
    truth = reference.row_sqnorm(x)
    for name, laid in layouts(x):
        torch.testing.assert_close(ops.row_sqnorm(laid), truth, rtol=1e-14, atol=0, msg=name)
    torch.testing.assert_close(ops.row_sqnorm(x[::2]), truth[::2], rtol=1e-14, atol=0)
    assert torch.equal(ops.row_sqnorm(torch.empty(0, 3)), torch.zeros(0))
    assert torch.equal(ops.row_sqnorm(torch.empty(3, 0)), torch.zeros(3))


# --- same inputs, same bits ---


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 33, 40, 50), (60, 40, 70, 64), (2, 300, 300, 280)], ids=str)
@pytest.mark.parametrize("op", [*NORMS, "wgrad_sqnorm", "wgrad_moments", "row_sqnorm"])
def test_bits_do_not_depend_on_threads(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    a, b = operands(*shape, dtype)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        result = ops.row_sqnorm(a) if op == "row_sqnorm" else getattr(ops, op)(a, b)
        results.append(result if isinstance(result, tuple) else (result,))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3000, 70), (3, 700, 64), (60, 128, 64)], ids=str)
def test_bits_of_picks_do_not_depend_on_threads(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    index, b = picks(*shape, 200, dtype)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(ops.embedding_sqnorm(index, b))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(60, 40, 700, 1, 1), (2, 300, 1300, 1, 2), (50, 1, 64, 300, 4)], ids=str)
def test_bits_of_affine_sqnorm_do_not_depend_on_threads(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    arguments, results = affine_operands(*shape, dtype), []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(ops.affine_sqnorm(*arguments))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(60, 40, 700, 1, 1), (2, 300, 1300, 1, 2), (3, 1000, 64, 1, 1), (50, 1, 64, 300, 4), (2, 1, 64, 3000, 4)], ids=str)
def test_bits_of_norm_affine_do_not_depend_on_threads(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    arguments, results = norm_operands(*shape, dtype), []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        grad, affine = ops.norm_affine(*arguments)
        results.append((grad, *affine))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_lesser_instruction_sets_agree(capability: str) -> None:
    code = (
        "import torch; from ghostgrad import _C, ops, reference as r\n"
        f"assert _C.cpu_capability() in ('portable', {capability!r})\n"
        "torch.manual_seed(0); a, b, c = torch.randn(3, 21, 45), torch.randn(3, 21, 33), torch.rand(3)\n"
        "d, e, m, s = torch.randn(3, 6, 70, 1), torch.randn(3, 1, 9, 75), torch.randn(3, 6, 2), torch.rand(3, 1, 9)\n"
        "def affine(f): return *f(d, d.sin()), *f(d, d, m, m), *f(e, e.sin()), *f(e, e, s, s)\n"
        "def products(o): return o.outer_sqnorm(a, b), o.gram_sqnorm(a, b), o.row_sqnorm(a), *o.wgrad_sqnorm(a, b, c), *o.wgrad_moments(a, b)\n"
        "for x, y in zip((*products(ops), *affine(ops.affine_sqnorm)), (*products(r), *affine(r.affine_sqnorm))):\n"
        "    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)\n"
        "for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 0.05), (torch.float16, 0.01)):\n"
        "    for y, mean in ((d, m), (e, s)):\n"
        "        arguments = y.to(dtype), y.sin().to(dtype), *(t.to(r.accumulation_dtype(dtype)) for t in (mean, mean.exp()))\n"
        "        (grad, affine), expected = ops.norm_affine(*arguments), r.norm_affine(*arguments)\n"
        "        torch.testing.assert_close(grad, expected[0], rtol=tolerance, atol=tolerance)\n"
        "        torch.testing.assert_close(tuple(affine), expected[1:], rtol=1e-4, atol=1e-3)\n"
        "index = torch.randint(-1, 8, (3, 21)); torch.testing.assert_close(ops.embedding_sqnorm(index, b), r.embedding_sqnorm(index, b))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "GHOSTGRAD_CPU_CAPABILITY": capability})


# --- memory ---


@needs_peak_memory
def test_wgrad_sqnorm_needs_few_megabytes() -> None:
    code = """
import torch
from ghostgrad import ops

torch.set_num_threads(2)
a, b = torch.randn(64, 256, 1024), torch.randn(64, 256, 1024)
ops.wgrad_sqnorm(a[:2, :2, :8], b[:2, :2, :8])
print(peak(lambda: ops.wgrad_sqnorm(a, b)) - 1024 * 1024 * 4 / 2**20)
"""
    extra = in_own_process(code)
    assert extra < 2 * 4, f"{extra:.1f} MiB beside inputs and outputs, on two threads"


@needs_peak_memory
def test_affine_sqnorm_makes_no_buffer_of_batch_by_channels() -> None:
    # B d is 128 MiB here, in one position; totals of 16 runs of samples are 2 MiB in float64, for scale and shift each.
    code = """
import torch
from ghostgrad import ops

torch.set_num_threads(2)
b, x, mean = torch.randn(2048, 1, 16384, 1), torch.randn(2048, 1, 16384, 1), torch.randn(2048, 1, 1)
ops.affine_sqnorm(b[:2, :, :8], x[:2, :, :8], mean[:2])
print(peak(lambda: ops.affine_sqnorm(b, x, mean)))
"""
    extra = in_own_process(code)
    assert extra < 8, f"{extra:.1f} MiB beside inputs, on two threads"


# --- errors ---


def test_errors_name_op_argument_rule_and_value() -> None:
    a, b = operands(2, 3, 4, 5, torch.float32)
    for op in (*NORMS, *WGRADS):
        function = getattr(ops, op)
        with pytest.raises(ValueError, match=rf"{op}: a must be \(B, T, p\), got \(2, 4\)"):
            function(a[:, 0], b)
        with pytest.raises(ValueError, match=rf"{op}: b must be \(B, T, d\), got \(2, 5\)"):
            function(a, b[:, 0])
        with pytest.raises(ValueError, match=rf"{op}: a and b must agree in batch and positions, got \(2, 3, 4\) and \(2, 2, 5\)"):
            function(a, b[:, :2])
        with pytest.raises(ValueError, match=rf"{op}: a and b must agree in batch and positions, got \(1, 3, 4\) and \(2, 3, 5\)"):
            function(a[:1], b)
        with pytest.raises(TypeError, match=rf"{op}: a and b must have the same dtype, got torch.float32 and torch.float64$"):
            function(a, b.double())
        with pytest.raises(TypeError, match=rf"{op}: .* got torch.float32 and torch.bfloat16\. Under autocast"):
            function(a, b.bfloat16())
        with pytest.raises(TypeError, match=rf"{op}: a must be float32, .* got torch.int64"):
            function(a.long(), b)
        with pytest.raises(ValueError, match=rf"{op}: a and b must be on the same device, got cpu and meta"):
            function(a, b.to("meta"))
    with pytest.raises(ValueError, match=r"wgrad_sqnorm: weights must be \(B,\) with B = 2, got \(3,\)"):
        ops.wgrad_sqnorm(a, b, torch.ones(3))
    with pytest.raises(ValueError, match="row_sqnorm: x must have a batch dimension"):
        ops.row_sqnorm(torch.tensor(1.0))
    with pytest.raises(TypeError, match="row_sqnorm: x must be float32"):
        ops.row_sqnorm(torch.zeros(2, 2, dtype=torch.complex64))
    index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"embedding_sqnorm: index must be int64 or int32, got torch.int16"):
        ops.embedding_sqnorm(index.short(), b)
    with pytest.raises(TypeError, match=r"embedding_sqnorm: b must be float32, .* got torch.int64"):
        ops.embedding_sqnorm(index, b.long())
    with pytest.raises(ValueError, match=r"embedding_sqnorm: index must be \(B, T\), got \(3,\)"):
        ops.embedding_sqnorm(index[0], b)
    with pytest.raises(ValueError, match=r"embedding_sqnorm: b must be \(B, T, d\), got \(3, 5\)"):
        ops.embedding_sqnorm(index, b[0])
    with pytest.raises(ValueError, match=r"embedding_sqnorm: index and b must agree in batch and positions, got \(2, 3\) and \(2, 2, 5\)"):
        ops.embedding_sqnorm(index, b[:, :2])
    with pytest.raises(ValueError, match="embedding_sqnorm: index and b must be on the same device, got cpu and meta"):
        ops.embedding_sqnorm(index, b.to("meta"))


def test_errors_of_affine_sqnorm() -> None:
    b, x, mean, rstd = affine_operands(2, 3, 4, 5, 2, torch.float32)
    wrong: list[tuple[type[Exception], str, tuple[Tensor | None, ...]]] = [
        (ValueError, r"b must be \(B, T, d, S\), got \(2, 4, 5\)", (b[:, 0],)),
        (ValueError, r"x must have the shape of b, got \(2, 2, 4, 5\) and \(2, 3, 4, 5\)", (b, x[:, :2])),
        (TypeError, "b and x must have the same dtype", (b, x.double())),
        (ValueError, "mean without x", (b, None, mean)),
        (ValueError, r"rstd must be \(B, T, G\) with G a divisor of d, got \(2, 3, 3\)", (b, x, None, torch.ones(2, 3, 3))),
        (ValueError, r"mean must be \(B, T, G\) with G a divisor of d, got \(2, 2, 2\)", (b, x, mean[:, :2])),
        (ValueError, r"mean and rstd must have the same shape, got \(2, 3, 2\) and \(2, 3, 1\)", (b, x, mean, rstd[..., :1])),
        (TypeError, "mean must be torch.float32 for torch.float32, got torch.float64", (b, x, mean.double())),
        (ValueError, "b and x must be on the same device", (b, x.to("meta"))),
        (TypeError, "b must be float32", (b.long(),)),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=f"affine_sqnorm: {message}"):
            ops.affine_sqnorm(*arguments)
    raw = torch.ops.ghostgrad.affine_sqnorm
    for _, message, arguments in wrong[:7]:
        with pytest.raises(RuntimeError, match=f"affine_sqnorm: {message}"):
            raw(*arguments)
    with pytest.raises(RuntimeError, match="affine_sqnorm: mean must have the accumulation dtype"):
        raw(b, x, mean.double())


def test_errors_of_norm_affine() -> None:
    b, x, mean, rstd, weight = norm_operands(2, 3, 4, 5, 2, torch.float32)
    assert weight is not None
    wrong: list[tuple[type[Exception], str, tuple[Tensor, ...]]] = [
        (ValueError, r"b must be \(B, T, d, S\), got \(2, 4, 5\)", (b[:, 0], x[:, 0], mean, rstd)),
        (ValueError, r"x must have the shape of b, got \(2, 2, 4, 5\) and \(2, 3, 4, 5\)", (b, x[:, :2], mean, rstd)),
        (TypeError, "b and x must have the same dtype", (b, x.double(), mean, rstd)),
        (ValueError, r"mean must be \(B, T, G\) with G a divisor of d, got \(2, 2, 2\)", (b, x, mean[:, :2], rstd)),
        (ValueError, r"weight must be \(d,\) with d = 4, got \(3,\)", (b, x, mean, rstd, weight[:3])),
    ]
    raw = torch.ops.ghostgrad.norm_affine
    for error, message, arguments in wrong:
        with pytest.raises(error, match=f"norm_affine: {message}"):
            ops.norm_affine(*arguments)
        with pytest.raises(RuntimeError, match=f"norm_affine: {message}"):
            raw(*arguments)
    with pytest.raises(ValueError, match="norm_affine: weight must be on the device of b, got meta and cpu"):
        ops.norm_affine(b, x, mean, rstd, weight.to("meta"))
    with pytest.raises(RuntimeError, match="norm_affine: weight must have the accumulation dtype of b"):
        raw(b, x, mean, rstd, weight.double())


def test_the_bindings_check_again() -> None:
    a, b = operands(2, 3, 4, 5, torch.float32)
    raw = torch.ops.ghostgrad
    for op in (*NORMS, *WGRADS):
        function = getattr(raw, op)
        with pytest.raises(RuntimeError, match=rf"{op}: a and b must agree in batch and positions, got \(2, 3, 4\) and \(2, 2, 5\)"):
            function(a, b[:, :2])
        with pytest.raises(RuntimeError, match=rf"{op}: a must be \(B, T, p\), got \(4,\)"):
            function(a[0, 0], b)
    for op in ("outer_sqnorm", "gram_sqnorm", "wgrad_sqnorm", "wgrad_moments"):
        with pytest.raises(RuntimeError, match=f"{op}: a and b must have the same dtype"):
            getattr(raw, op)(a, b.double())
        with pytest.raises(RuntimeError, match=f"{op}: a must be float32"):
            getattr(raw, op)(a.int(), b.int())
    with pytest.raises(RuntimeError, match="wgrad_sqnorm: weights must have the accumulation dtype"):
        raw.wgrad_sqnorm(a, b, torch.ones(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"wgrad_sqnorm: weights must be \(B,\) with B = 2, got \(3,\)"):
        raw.wgrad_sqnorm(a, b, torch.ones(3))
    with pytest.raises(RuntimeError, match="row_sqnorm: x must have a batch dimension"):
        raw.row_sqnorm(torch.tensor(1.0))
    index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="embedding_sqnorm: index must be int64 or int32"):
        raw.embedding_sqnorm(index.short(), b)
    with pytest.raises(RuntimeError, match=r"embedding_sqnorm: index and b must agree in batch and positions, got \(2, 3\) and \(1, 3, 5\)"):
        raw.embedding_sqnorm(index, b[:1])


@pytest.mark.skipif(_C.with_cuda, reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"sqnorm: a is on cuda:0, but this build of ghostgrad has no CUDA kernels.*pip install --no-build-isolation"):
        ops._check_device("sqnorm", "a", torch.device("cuda:0"))
