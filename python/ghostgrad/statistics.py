"""Statistics of gradients from norms: noise scale, signal-to-noise ratio, the covariance of an SGD step.

Of n samples with gradients ``g_i``, two numbers say it all: the mean of their squared norms ``s_i = ||g_i||^2``, and the squared norm of their mean
``gbar``. With ``G = E g`` and ``Sigma = Cov g`` over the distribution that the samples were drawn from, ``E s_i = |G|^2 + tr Sigma`` and
``E |gbar|^2 = |G|^2 + tr Sigma / n``. Solved for what is wanted:

    trace        = (mean s - |gbar|^2) n / (n - 1)        estimates  tr Sigma
    grad_sqnorm  = (n |gbar|^2 - mean s) / (n - 1)        estimates  |G|^2

Both are unbiased; the second is the mean of ``g_i . g_j`` over all pairs of different samples. Their ratio is the simple noise scale of McCandlish, Kaplan,
Amodei and the OpenAI Dota team (2018): the batch size at which the noise in the batch's gradient is as large as the gradient.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .norms import _check_arguments, _loss, _norms_and_grads, _tapped
from .tap import Tap, _sqnorm
from .trace import _check_reduction, _loaded, _t_quantile

__all__ = ["NoiseScale", "noise_scale"]


@dataclass(frozen=True)
class NoiseScale:
    """What :func:`noise_scale` found. Standard errors are nan, and the interval is open, where there was one batch."""

    trace: float  # tr Sigma, unbiased
    grad_sqnorm: float  # |G|^2, unbiased; negative where noise hides the gradient
    samples: int
    trace_stderr: float = math.nan
    grad_sqnorm_stderr: float = math.nan
    interval: tuple[float, float] = (0.0, math.inf)  # 95 %, of the scale; without an upper end where |G|^2 cannot be told from zero
    by_param: dict[str, NoiseScale] | None = field(default=None, repr=False)  # the same for each parameter's part of the gradient

    @classmethod
    def from_norms(cls, sqnorms: Tensor, grad_sqnorm: float | Tensor) -> NoiseScale:
        """From the squared norms (n,) of the samples' gradients and that of their mean, ``||gbar||^2``: gathered over processes, say."""
        n, columns = torch.tensor([float(len(sqnorms))], dtype=torch.float64), sqnorms.detach().double().sum().cpu().reshape(1, 1)
        sum_sqnorm = torch.as_tensor(grad_sqnorm).detach().double().cpu().reshape(1) * len(sqnorms) ** 2
        return _of_parts(n, columns, sum_sqnorm, sum_sqnorm[None], None)

    @property
    def scale(self) -> float:
        """``tr Sigma / |G|^2``, the ratio of two unbiased estimates, which is not unbiased itself; nan if the estimate of ``|G|^2`` is not positive."""
        return self.trace / self.grad_sqnorm if self.grad_sqnorm > 0 else math.nan

    def snr(self, batch_size: int = 1) -> float:
        """``|G|^2 / (tr Sigma / B)``: the signal-to-noise ratio of a gradient of B samples, in powers, not amplitudes. Negative where the estimate of
        ``|G|^2`` is."""
        return batch_size * self.grad_sqnorm / self.trace if self.trace else math.inf

    def step_covariance_trace(self, lr: float, batch_size: int, replacement: bool = False) -> float:
        """``E |dw - E dw|^2`` of an SGD step ``dw = -lr (mean gradient of B samples)``, the samples drawn from those that were measured.

        ``lr^2 / B (mean s - |gbar|^2)`` with replacement, times ``(n - B) / (n - 1)`` without. Exact for a data set that was measured as a whole.
        """
        n = self.samples
        if batch_size < 1 or (batch_size > n and not replacement):
            raise ValueError(f"ghostgrad: batch_size must be in [1, {n}], the number of samples measured, got {batch_size}")
        return lr**2 / batch_size * self.trace * ((n - 1) / n if replacement else (n - batch_size) / n)

    def __str__(self) -> str:
        low, high = self.interval
        interval = f" (95 %: {low:.4g} to {high:.4g})" if not math.isnan(self.trace_stderr) else ""
        return f"noise scale {self.scale:.4g}{interval}, tr Sigma {self.trace:.4g}, |G|^2 {self.grad_sqnorm:.4g}, {self.samples} samples"


def _estimates(n: Tensor, sqnorms: Tensor, sum_sqnorm: Tensor) -> Tensor:
    """(..., 2): trace and squared norm of the mean, from ``n`` samples, the sum of their squared norms and the squared norm of their sum."""
    return torch.stack([(sqnorms - sum_sqnorm / n) / (n - 1), (sum_sqnorm - sqnorms) / (n * (n - 1))], -1)


def _from_estimates(whole: Tensor, without: Tensor | None, samples: int, by_param: dict[str, NoiseScale] | None = None) -> NoiseScale:
    """``whole``: (2,) estimates; ``without``: (M, 2), the same without each of the M parts (the jackknife)."""
    trace, grad_sqnorm = whole.tolist()
    if without is None or len(without) < 2:
        return NoiseScale(trace, grad_sqnorm, samples, by_param=by_param)
    m = len(without)
    off = without - without.mean(0)
    covariance = (m - 1) / m * off.T @ off
    trace_stderr, grad_sqnorm_stderr = covariance.diagonal().sqrt().tolist()
    interval = _ratio_interval(trace, grad_sqnorm, (_t_quantile(m - 1) ** 2 * covariance).tolist())
    return NoiseScale(trace, grad_sqnorm, samples, trace_stderr, grad_sqnorm_stderr, interval, by_param)


def _ratio_interval(top: float, bottom: float, c: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Fieller's interval: the ratios ``r >= 0`` for which ``(top - r bottom)^2`` is at most its variance ``c[0][0] - 2 r c[0][1] + r^2 c[1][1]``."""
    a, b, d = bottom**2 - c[1][1], top * bottom - c[0][1], top**2 - c[0][0]  # a r^2 - 2 b r + d <= 0
    root = math.sqrt(max(b**2 - a * d, 0.0))
    if a <= 0 or bottom <= 0:  # the denominator may be zero
        return (max(0.0, (b - root) / a) if a < 0 < d else 0.0), math.inf
    return max(0.0, (b - root) / a), max(0.0, (b + root) / a)


def _of_parts(n: Tensor, sqnorms: Tensor, sum_sqnorm: Tensor, sum_sqnorm_without: Tensor, names: Sequence[str] | None) -> NoiseScale:
    """From M parts of the data: sizes (M,), sums of squared norms (M, P), the squared norm (P,) of the sum of all gradients, and without each part (M, P)."""
    total, samples = n.sum(), int(n.sum())
    if samples < 2:
        raise ValueError(f"ghostgrad.noise_scale: a variance needs at least two samples, got {samples}")
    rest, usable = total - n, len(n) > 1 and bool((total - n >= 2).all())

    def one(columns: Any, by_param: dict[str, NoiseScale] | None) -> NoiseScale:
        of = [t[..., columns].sum(-1) for t in (sqnorms, sum_sqnorm, sum_sqnorm_without)]
        without = _estimates(rest, of[0].sum() - of[0], of[2]) if usable else None
        return _from_estimates(_estimates(total, of[0].sum(), of[1]), without, samples, by_param)

    return one(slice(None), None if names is None else {name: one([i], None) for i, name in enumerate(names)})


def noise_scale(
    source: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *data: Any,
    reduction: str = "mean",
    by_param: bool = False,
    groups: int = 8,
    params: Any = None,
    **options: Any,
) -> NoiseScale:
    """The gradient noise scale ``tr Sigma / |G|^2`` and what it is made of, from the norms of the samples' gradients and of their mean's.

    >>> with gg.tap(model) as tap:
    ...     loss_fn(model(x), y).backward()
    >>> gg.noise_scale(tap).scale                       # of the batch that the block has seen
    >>> gg.noise_scale(taps)                            # of several such batches: accumulated gradients, processes, the last hundred steps
    >>> print(gg.noise_scale(model, loss_fn, loader))   # of a data set, with an interval

    Args:
        source: a tap whose block has seen a backward; a list of taps, or of results of this function; or a model.
        loss_fn, reduction, params, options: for a model, as for :func:`ghostgrad.sqnorms`.
        data: for a model, the inputs and the target of one batch, or a loader of batches (inputs ..., target).
        by_param: for a model, also the same for every parameter. Taps and results say it themselves.
        groups: how many parts a loader's batches are dealt to, for the jackknife; 1 for none.

    Returns:
        A :class:`NoiseScale`. Of a tap: see :meth:`Tap.grad_sqnorm` for where the batch's gradient is taken from. Of several batches: ``trace`` and
        ``grad_sqnorm`` are means weighted with the degrees of freedom (B - 1) and the pairs B (B - 1); only pairs within a batch count, so the parameters may
        have changed between batches. Of a loader: the estimates from all pairs of the data set, at fixed parameters. In both cases intervals are those of the
        jackknife over the batches (or groups), the scale's by Fieller's theorem for ratios.

    Where the estimate of ``|G|^2`` is not positive, ``scale`` is nan, and for a model a warning says so: the samples are too few to tell the gradient from
    noise. In training that is a normal event: average ``trace`` and ``grad_sqnorm`` over several batches, each for itself, as a list of results does.

    Raises:
        the errors of :func:`ghostgrad.tap`; TapStateError if the gradient of a tap's batch is gone; ValueError if there are fewer than two samples; TypeError
        for arguments that are not as above.

    Cost: of a tap, one pass over the gradients. Of a model one training step for each batch, and for a loader the memory of ``groups`` gradients.
    """
    if isinstance(source, (Tap, NoiseScale)):
        return _of_one(source)
    if not isinstance(source, nn.Module) and loss_fn is None:
        if not isinstance(source, Iterable):
            raise TypeError(f"ghostgrad.noise_scale: give a tap, a list of taps or results, or (model, loss_fn, ...), got {type(source).__name__}")
        return _of_several([_of_one(one) for one in source])
    found = _of_data(source, loss_fn, data, reduction, by_param, groups, params, options)
    if found.grad_sqnorm <= 0 < found.trace:
        warnings.warn(
            f"ghostgrad.noise_scale: the estimate of |G|^2 is {found.grad_sqnorm:.3g}, so there is no ratio: {found.samples} samples are too few to tell the "
            "gradient from noise",
            stacklevel=2,
        )
    return found


def _of_one(one: Any) -> NoiseScale:
    if isinstance(one, NoiseScale):
        return one
    if not isinstance(one, Tap):
        raise TypeError(f"ghostgrad.noise_scale: a list must hold taps or results of noise_scale, got {type(one).__name__}")
    squares = one.grad_sqnorm(by_param=one.by_param)  # before the norms, whose reading may start a new pass
    norms = one.sqnorms(by_param=one.by_param)
    if not one.by_param:
        squares, norms = {"": squares}, {"": norms}
    b = one.batch_size or 0
    sum_sqnorm = _column(squares) * b**2
    return _of_parts(torch.tensor([float(b)]).double(), _column(norms)[None], sum_sqnorm, sum_sqnorm[None], list(norms) if one.by_param else None)


def _column(values: Mapping[str, Tensor]) -> Tensor:
    """(P,) float64 sums, on the CPU."""
    return torch.stack([value.detach().double().sum().cpu() for value in values.values()])


def _of_several(results: Sequence[NoiseScale]) -> NoiseScale:
    """Weighted means, and their jackknife over the results."""
    if not results:
        raise ValueError("ghostgrad.noise_scale: the list is empty")
    n = torch.tensor([float(result.samples) for result in results], dtype=torch.float64)
    weights = torch.stack([n - 1, n * (n - 1)], 1)  # (M, 2)

    def pooled(of: Sequence[NoiseScale], by_param: dict[str, NoiseScale] | None) -> NoiseScale:
        terms = weights * torch.tensor([[one.trace, one.grad_sqnorm] for one in of], dtype=torch.float64)
        without = (terms.sum(0) - terms) / (weights.sum(0) - weights) if len(of) > 1 else None
        return _from_estimates(terms.sum(0) / weights.sum(0), without, int(n.sum()), by_param)

    names = results[0].by_param
    if names is None or any(result.by_param is None or result.by_param.keys() != names.keys() for result in results):
        return pooled(results, None)
    return pooled(results, {name: pooled([result.by_param[name] for result in results if result.by_param is not None], None) for name in names})


def _batches(model: Any, loss_fn: Any, data: tuple[Any, ...], reduction: str) -> Iterator[tuple[Any, ...]]:
    if len(data) == 1 and isinstance(data[0], Iterable) and not isinstance(data[0], Tensor) and isinstance(model, nn.Module):
        _check_reduction("noise_scale", loss_fn, reduction)
        return _loaded("noise_scale", model, data[0])
    _check_arguments("noise_scale", loss_fn, data, reduction)
    return iter([data])


def _of_data(model: Any, loss_fn: Any, data: tuple[Any, ...], reduction: str, by_param: bool, groups: int, params: Any, options: dict[str, Any]) -> NoiseScale:
    if not callable(loss_fn):
        raise TypeError("ghostgrad.noise_scale: give noise_scale(model, loss_fn, x, y) or noise_scale(model, loss_fn, loader)")
    if groups < 1:
        raise ValueError(f"ghostgrad.noise_scale: groups must be at least 1, got {groups}")
    params = list(params) if isinstance(params, Iterator) else params  # there may be more than one batch
    sums: list[list[Tensor]] = []  # of gradients, by group and parameter
    counts: list[int] = []
    sqnorms: list[Tensor] = []
    names: list[str] = []
    for k, batch in enumerate(_batches(model, loss_fn, data, reduction)):
        with torch.enable_grad(), _tapped(model, params, want_grad=True, by_param=by_param, reduction=reduction, **options) as tap:
            norms, grads = _norms_and_grads(tap, _loss("noise_scale", tap, model, loss_fn, batch, False))
        size, parameters, names = tap.batch_size or 0, [p for _, p in tap._names.values()], list(norms)
        if k < groups:
            counts.append(0)
            sqnorms.append(torch.zeros(len(norms), dtype=torch.float64))
            sums.append([torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False) for p in parameters])
        counts[k % groups] += size
        sqnorms[k % groups] += _column(norms)
        for total, grad in zip(sums[k % groups], grads):
            if grad is not None:
                total.add_(grad.detach(), alpha=size if tap.reduction == "mean" else 1)
    whole = [functools.reduce(torch.add, parts) for parts in zip(*sums)]

    def columns(tensors: Iterable[Tensor]) -> Tensor:
        squares = torch.stack([_sqnorm(t).double().cpu() for t in tensors])
        return squares if by_param else squares.sum(0, keepdim=True)

    without = torch.stack([columns(all_ - part for all_, part in zip(whole, parts)) for parts in sums])
    n = torch.tensor(counts, dtype=torch.float64)
    return _of_parts(n, torch.stack(sqnorms), columns(whole), without, names if by_param else None)
