"""Gauss-Newton and Fisher traces: of ``J^T L J``, exact from norms, with ``L = d^2 l / d f^2`` cut into squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedUseError
from .norms import _backward, _run, _tapped
from .trace import _check_reduction, _loaded, _mean_and_stderr

__all__ = ["CurvatureTrace", "fisher_trace", "ggn_trace"]


@dataclass(frozen=True)
class CurvatureTrace:
    """What :func:`ggn_trace` and :func:`fisher_trace` found."""

    mean: float
    stderr: float  # 0 if exact; nan for one draw
    by_param: dict[str, float] = field(repr=False)
    by_sample: Tensor = field(repr=False)  # (B,)

    def __float__(self) -> float:
        return self.mean


_SEEDS_LIMIT = 1024  # outputs per sample of a loss whose second derivative by them is formed


def _kind(loss_fn: Any) -> str | None:
    """Which of the losses with known factors it is."""
    if isinstance(loss_fn, str):
        return loss_fn
    if loss_fn is nn.functional.cross_entropy or (type(loss_fn) is nn.CrossEntropyLoss and loss_fn.weight is None and loss_fn.reduction != "none"):
        return "cross_entropy"
    if loss_fn is nn.functional.mse_loss or (type(loss_fn) is nn.MSELoss and loss_fn.reduction != "none"):
        return "mse"
    return None


Seeds = Iterator[tuple[Tensor, Tensor | None]]  # cotangents of the output, and signs (B,) if not all are 1


def _of_cross_entropy(caller: str, loss_fn: Any, out: Tensor, target: Any, reduction: str, generator: torch.Generator | None) -> Seeds:
    """``sqrt(p_k) (e_k - p)`` for every class k, or ``e_y - p`` with ``y`` drawn from ``p``. Positions of a sample are independent: each has its own
    seeds, and a draw serves all of them at once."""
    first = isinstance(target, Tensor) and not target.is_floating_point() and target.shape == (*out.shape[:1], *out.shape[2:])
    last = isinstance(target, Tensor) and not target.is_floating_point() and target.shape == out.shape[:-1] and isinstance(loss_fn, str) and out.dim() > 2
    if first and last:
        raise ValueError(
            f"ghostgrad.{caller}: classes may be the second or the last dimension of the output {tuple(out.shape)}: pass F.cross_entropy and a model that has "
            "them second"
        )
    if not first and not last:
        found = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"ghostgrad.{caller}: cross-entropy needs class indices, one for each position of the output {tuple(out.shape)}, got {found}")
    p = out.detach().movedim(-1 if last else 1, 1).reshape(len(out), out.shape[-1 if last else 1], -1)  # (B, C, T)
    p = p.to(torch.promote_types(p.dtype, torch.float32)).softmax(1)
    seen = (target != getattr(loss_fn, "ignore_index", -100)).reshape(len(out), -1)  # (B, T)
    root = (seen.double() * (len(out) / seen.sum().double() if reduction == "mean" else 1.0)).sqrt().to(p.dtype)

    def shaped(seed: Tensor) -> Tensor:
        return (seed.movedim(1, 2).reshape(out.shape) if last else seed.reshape(out.shape)).to(out.dtype)

    if generator is not None:
        while True:
            u = torch.rand(p[:, 0].shape, generator=generator, dtype=torch.float64).to(p.device)
            drawn = (p.double().cumsum(1) < u[:, None]).sum(1, keepdim=True).clamp_max(p.shape[1] - 1)  # (B, 1, T)
            yield shaped((p - torch.zeros_like(p).scatter_(1, drawn, 1.0)) * root[:, None]), None
    for t in range(p.shape[2]):
        for k in range(p.shape[1]):
            seed = torch.zeros_like(p)
            seed[:, :, t] = -p[:, :, t]
            seed[:, k, t] += 1
            seed[:, :, t] *= (root[:, t] * p[:, k, t].sqrt())[:, None]
            yield shaped(seed), None


def _of_squares(out: Tensor, curvature: float, generator: torch.Generator | None) -> Seeds:
    """The outputs one by one, or all with independent normal weights."""
    root = math.sqrt(curvature)
    while generator is not None:
        yield (root * torch.randn(out.shape, generator=generator, dtype=torch.float64)).to(out), None
    for k in range(out[0].numel()):
        seed = torch.zeros_like(out, requires_grad=False).reshape(len(out), -1)
        seed[:, k] = root
        yield seed.view(out.shape), None


def _of_any_loss(caller: str, loss_fn: Callable[..., Tensor], out: Tensor, target: Any, reduction: str) -> Seeds:
    """Eigenvectors of every sample's ``d^2 l / d f^2`` (K, K), times the root of the eigenvalue."""
    size = out[0].numel()
    if size > _SEEDS_LIMIT:
        raise UnsupportedUseError(
            f"ghostgrad.{caller}: the model has {size} outputs per sample, too many to form the loss's second derivative by them (limit {_SEEDS_LIMIT}); "
            "give the loss by name, 'cross_entropy' or 'squared', or estimate with num_samples and one of these"
        )
    leaf = out.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(leaf, target)
        if loss.dim() and loss.shape != out.shape[:1]:
            raise ValueError(f"ghostgrad.{caller}: loss_fn must return a scalar or one loss per sample, ({len(out)},), got shape {tuple(loss.shape)}")
        (grad,) = torch.autograd.grad(loss.sum() * (len(out) if not loss.dim() and reduction == "mean" else 1), leaf, create_graph=True)
        grad = grad.reshape(len(out), -1)
        if not grad.requires_grad:
            return  # no curvature
        rows = [torch.autograd.grad(grad[:, k].sum(), leaf, retain_graph=True)[0].reshape(len(out), -1) for k in range(size)]
    values, vectors = torch.linalg.eigh(torch.stack(rows, 1).to(torch.promote_types(out.dtype, torch.float32)))
    for k in range(size):
        if float(values[:, k].abs().max()) > size * torch.finfo(values.dtype).eps * float(values.abs().max()):
            seed = vectors[:, :, k] * values[:, k, None].abs().sqrt()
            yield seed.view(out.shape).to(out.dtype), values[:, k].sign().double()


def _norm_trace(
    caller: str, model: Any, loss_fn: Any, batch: tuple[Any, ...], reduction: str, num_samples: int | None, seed: int, params: Any, options: Any
) -> Any:
    """(draws or 1, {name: (B,)}) of one batch."""
    *inputs, target = batch
    generator = None if num_samples is None else torch.Generator().manual_seed(seed)
    with torch.enable_grad(), _tapped(model, params, by_param=True, reduction="sum", **options) as tap:
        out = _run(tap, model, tuple(inputs), False)
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != tap.batch_size or not out.numel():
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"ghostgrad.{caller}: the model must return a tensor with the {tap.batch_size} samples first, got {found}; wrap it in a function")
        kind = _kind(loss_fn)
        if kind == "cross_entropy":
            seeds = _of_cross_entropy(caller, loss_fn, out, target, reduction, generator)
        elif kind is not None:
            curvature = 1.0 if kind == "squared" else 2.0 / (out[0].numel() if reduction == "mean" else 1)
            seeds = _of_squares(out.detach(), curvature, generator)
        elif generator is None:
            seeds = _of_any_loss(caller, loss_fn, out, target, reduction)
        else:
            raise ValueError(
                f"ghostgrad.{caller}: labels can be drawn for 'cross_entropy', 'squared', F.cross_entropy and F.mse_loss (unweighted), got {loss_fn}; "
                "num_samples=None is exact"
            )
        draws: list[dict[str, Tensor]] = []
        for i, (cotangent, sign) in enumerate(seeds):
            tap._pass.expect_backward()
            norms = _backward(tap, (out * cotangent).sum(), False, retain_graph=True)
            norms = {name: norm.detach().double() if sign is None else norm.detach() * sign for name, norm in norms.items()}
            if generator is None and draws:
                draws[0] = {name: draws[0][name] + norm for name, norm in norms.items()}
            else:
                draws.append(norms)
            if i + 1 == num_samples:
                break
        if not draws:  # a loss that is linear in the outputs
            draws = [{name: torch.zeros(len(out), dtype=torch.float64, device=out.device) for name, _ in tap._names.values()}]
    return draws


def _curvature(
    caller: str, model: Any, loss_fn: Any, batch: tuple[Any, ...], reduction: str, num_samples: int | None, seed: int, params: Any, options: dict[str, Any]
) -> CurvatureTrace:
    if isinstance(loss_fn, str) and loss_fn not in ("cross_entropy", "squared"):
        raise ValueError(f"ghostgrad.{caller}: loss_fn must be a function, 'cross_entropy' or 'squared', got {loss_fn!r}")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"ghostgrad.{caller}: num_samples must be at least 1, or None for the exact trace, got {num_samples}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"ghostgrad.{caller}: reduction must be 'mean' or 'sum', got {reduction!r}")
    _check_reduction(caller, loss_fn, reduction)
    if len(batch) == 1 and isinstance(model, nn.Module) and isinstance(batch[0], Iterable) and not isinstance(batch[0], Tensor):
        batches = _loaded(caller, model, batch[0])
    elif len(batch) < 2:
        raise TypeError(f"ghostgrad.{caller}: give the model's inputs and then the target, {caller}(model, loss_fn, x, y), or a loader")
    else:
        batches = iter([batch])
    pieces = [_norm_trace(caller, model, loss_fn, one, reduction, num_samples, seed + i, params, options) for i, one in enumerate(batches)]
    draws = [{name: torch.cat([piece[d][name].cpu() for piece in pieces]) for name in pieces[0][0]} for d in range(len(pieces[0]))]  # {name: (B,)} each
    reduce = torch.mean if reduction == "mean" else torch.sum
    totals = torch.stack([reduce(torch.stack(list(draw.values())).sum(0)) for draw in draws])
    mean, stderr = _mean_and_stderr(totals)
    by_param = {name: float(torch.stack([reduce(draw[name]) for draw in draws]).mean()) for name in draws[0]}
    by_sample = torch.stack([torch.stack(list(draw.values())).sum(0) for draw in draws]).mean(0)
    return CurvatureTrace(float(mean), 0.0 if num_samples is None else float(stderr), by_param, by_sample)


def ggn_trace(
    model: Callable[..., Any],
    loss_fn: Callable[..., Tensor] | str,
    *batch: Any,
    reduction: str = "mean",
    num_samples: int | None = None,
    seed: int = 0,
    params: Any = None,
    **options: Any,
) -> CurvatureTrace:
    """The trace of the generalised Gauss-Newton matrix, ``mean_i tr(J_i^T L_i J_i)`` with ``L_i = d^2 l / d f^2`` at sample i's outputs: exact, from norms.

    With ``L_i = sum_k c_k c_k^T`` it is ``sum_k ||J_i^T c_k||^2``, norms of the gradients of ``c_k . f(x_i)``. For cross-entropy ``c_k = sqrt(p_k) (e_k - p)``,
    for squared losses the outputs one by one; for another loss the eigenvectors of ``L_i``, with the sign of their eigenvalue. Equal to the Hessian's trace
    where the residual is zero or the model linear in its parameters; kinks of the model do not enter. ``.grad`` is not touched.

    Args:
        model: a module, or any function with ``params`` given. Its output is (B, ...).
        loss_fn: ``loss_fn(output, target)`` as for :func:`ghostgrad.sqnorms`, twice differentiable in the output; or "cross_entropy" (classes in the second
            or the last dimension), or "squared", ``||f - y||^2 / 2`` for each sample.
        batch: the model's inputs, samples first, then the target; or one loader of such batches.
        reduction: "mean" or "sum", how the loss is reduced over the samples. ``by_sample`` has the single samples' traces in either case.
        num_samples: instead of all seeds, this many with labels drawn from the model: ``e_y - p`` with ``y`` from ``p``, or normal residuals. Unbiased, one
            backward pass each, for cross-entropy and squared losses.
        seed: of the drawn labels.
        params, options: as for :func:`ghostgrad.sqnorms`.

    Returns:
        A :class:`CurvatureTrace`; its ``stderr`` is 0 if exact, nan for one draw.

    Raises:
        the errors of :func:`ghostgrad.tap`; ValueError and TypeError for arguments that are not as above; UnsupportedUseError for a loss without known factors
        on more than 1024 outputs.

    Cost: one forward pass; one backward pass without weight gradients per output of a sample (classes times positions), or ``num_samples``.
    """
    return _curvature("ggn_trace", model, loss_fn, batch, reduction, num_samples, seed, params, options)


def fisher_trace(
    model: Callable[..., Any],
    loss_fn: Callable[..., Tensor] | str,
    *batch: Any,
    reduction: str = "mean",
    num_samples: int | None = 1,
    seed: int = 0,
    params: Any = None,
    **options: Any,
) -> CurvatureTrace:
    """The trace of the Fisher information: ``mean_i E_y ||grad log p(y | f(x_i))||^2`` with labels ``y`` drawn from the model itself, one backward pass a draw.

    For cross-entropy (softmax) and squared losses (normal residuals), where it equals the Gauss-Newton trace; ``num_samples=None`` gives that, exactly. Of the
    target only the shape and ignored positions are used. With the data's labels instead it would be the "empirical Fisher", ``sqnorms(...).mean()``.

    Arguments, results, errors: as for :func:`ggn_trace`; ``loss_fn`` must be "cross_entropy", "squared", or torch's cross-entropy or mean squared error.
    """
    if _kind(loss_fn) is None:
        raise ValueError(
            "ghostgrad.fisher_trace: loss_fn must be a likelihood, 'cross_entropy', 'squared', F.cross_entropy or F.mse_loss (unweighted), "
            f"got {loss_fn}; ggn_trace takes any"
        )
    return _curvature("fisher_trace", model, loss_fn, batch, reduction, num_samples, seed, params, options)
