"""The largest eigenvalues of Hessians and Gauss-Newton matrices, by Lanczos over products."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GhostgradError
from .trace import _extra, _Problem, _scale, _sigma

__all__ = ["Eigenvalues", "top_eigenvalue"]


@dataclass(frozen=True)
class Eigenvalues:
    """What :func:`top_eigenvalue` found."""

    values: Tensor  # (k,) float64, the largest first
    residuals: Tensor  # (k,) ||H v - value v||: an eigenvalue lies within this distance
    vectors: Tensor = field(repr=False)  # (k, n) float64, the parameters one after the other
    products: int

    def __float__(self) -> float:
        return float(self.values[0])


def top_eigenvalue(
    loss: Any,
    /,
    *args: Any,
    params: Any = None,
    k: int = 1,
    which: str = "LA",
    curvature: str = "hessian",
    method: str = "hvp",
    sigma: float | str = "auto",
    tol: float = 1e-4,
    max_products: int = 1000,
    seed: int = 0,
    reduction: str = "mean",
    progress: bool = False,
) -> Eigenvalues:
    """The k largest eigenvalues of the Hessian or of the Gauss-Newton matrix, by scipy's implicitly restarted Lanczos method (ARPACK) over products.

    >>> float(gg.top_eigenvalue(model, loss_fn, x, y))

    Args:
        loss, args, params, reduction, progress: as for :func:`hessian_trace`.
        k: how many.
        which: "LA" the largest, "LM" the largest in magnitude, "SA" the smallest.
        curvature: "hessian", or "ggn" (needs a model and data, and a loss that is twice differentiable in the model's output).
        method: "hvp", products by double backward; or "two_point_grad", ``(grad l(w + s v) - grad l(w - s v)) / (2 s)``, where operations have none
            (Hessian only).
        sigma: of "two_point_grad": ``s = sigma n^(1/4)`` for n elements and unit vectors v: eigenvectors lie between a single element, which sigma would
            suit, and noise, for which it would be ``sigma n^(1/2)``. "auto": as for :func:`hessian_trace`.
        tol: relative accuracy that the iteration asks for.
        max_products: about how many products before it gives up.
        seed: of the first vector.

    Returns:
        :class:`Eigenvalues`. Parameters, buffers, ``.grad`` and random number generators are left as they were.

    Memory: ``max(2 k + 1, 20)`` vectors in float64 on the CPU. Cost: some 20 to 60 products for the largest eigenvalue.

    Raises:
        ValueError, TypeError: arguments are not as above.
        UnsupportedUseError: an operation has no second derivative; use ``method="two_point_grad"``.
        GhostgradError: no convergence within ``max_products``.
        ImportError: scipy is not installed.
    """
    caller = "top_eigenvalue"
    if which not in ("LA", "LM", "SA"):
        raise ValueError(f"ghostgrad.{caller}: which must be 'LA', 'LM' or 'SA', got {which!r}")
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f"ghostgrad.{caller}: curvature must be 'hessian' or 'ggn', got {curvature!r}")
    if method not in ("hvp", "two_point_grad"):
        raise ValueError(f"ghostgrad.{caller}: method must be 'hvp' or 'two_point_grad', got {method!r}")
    if curvature == "ggn" and (method != "hvp" or not isinstance(loss, nn.Module)):
        raise ValueError(f"ghostgrad.{caller}: curvature='ggn' needs method='hvp', a model and data, got method={method!r} and a {type(loss).__name__}")
    if not (math.isfinite(tol) and tol >= 0):
        raise ValueError(f"ghostgrad.{caller}: tol must be finite and not negative, got {tol}")
    if max_products < 1:
        raise ValueError(f"ghostgrad.{caller}: max_products must be positive, got {max_products}")
    step = _sigma(caller, method, sigma)
    numpy, linalg = importlib.import_module("numpy"), _extra("scipy.sparse.linalg", caller, "scipy")
    with _Problem(caller, loss, args, params, reduction, seed, "normal", progress) as problem:
        n = sum(p.numel() for p in problem.params)
        if not 1 <= k <= n:
            raise ValueError(f"ghostgrad.{caller}: k must be in [1, {n}], the number of elements of the parameters, got {k}")
        if method == "two_point_grad" and step is None:
            step = _scale(problem, method, None, 1).sigma
        used = 0

        def multiply(vector: Any) -> Any:
            nonlocal used
            used += 1
            v = problem.unflat(torch.from_numpy(numpy.ascontiguousarray(vector, dtype=float).reshape(-1)))
            if step is None:
                (product,) = problem.multiply([v], problem.gauss_newton if curvature == "ggn" else None)
            else:
                product = _difference(problem, v, step * n**0.25)
            flat = problem.flat(product).double().cpu()
            if not flat.isfinite().all():
                raise ValueError(f"ghostgrad.{caller}: the loss, or its second derivative, is not finite at the parameters")
            return flat.numpy()

        if n <= max(20, k + 1):
            matrix = numpy.stack([multiply(row) for row in numpy.eye(n)])
            values, vectors = numpy.linalg.eigh((matrix + matrix.T) / 2)
        else:
            kept = min(n, max(2 * k + 1, 20))
            start = problem.flat(problem.noise(0)).double().cpu().numpy()
            operator = linalg.LinearOperator((n, n), matvec=multiply, dtype=float)
            try:
                values, vectors = linalg.eigsh(operator, k, which=which, v0=start, ncv=kept, tol=tol, maxiter=max(1, max_products // (kept - k)))
            except linalg.ArpackNoConvergence as error:
                raise GhostgradError(
                    f"ghostgrad.{caller}: no convergence to tol={tol:.1e} in {used} products, {len(error.eigenvalues)} of {k} eigenvalues found; "
                    "raise max_products or tol"
                ) from error
        key = {"LA": -values, "LM": -abs(values), "SA": values}[which]
        order = numpy.argsort(key)[:k]
        values, vectors = values[order], vectors[:, order].T
        residuals = [numpy.linalg.norm(multiply(v) - value * v) for value, v in zip(values, vectors)]
        found, residual, basis = (torch.from_numpy(numpy.ascontiguousarray(a, dtype=float)) for a in (values, residuals, vectors))
        return Eigenvalues(found, residual, basis, used)


def _difference(problem: _Problem, vector: Sequence[Tensor], s: float) -> list[Tensor]:
    """``H v`` by a difference of gradients, over all data."""
    total: list[Tensor] = [torch.zeros_like(p, requires_grad=False) for p in problem.params]
    count = 0
    for size, closure in problem.batches():
        weight = size if problem.reduction == "mean" else 1
        sides = []
        for sign in (1, -1):
            problem.shift(vector, sign * s)
            sides.append(problem.gradients(closure))
        total = [t + weight * (plus - minus) / (2 * s) for t, plus, minus in zip(total, *sides)]
        count += weight
    problem.restore_parameters()
    return [t / (count if problem.reduction == "mean" else 1) for t in total]
