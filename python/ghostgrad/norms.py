"""Per-sample squared gradient norms in one call, and the check of all of them against a loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .errors import TapStateError, UnsupportedUseError
from .tap import Tap

__all__ = ["CheckReport", "CheckRow", "ProbedSqnorms", "check", "gradient_variance", "output_sqnorms", "second_moments", "sqnorms"]

Parameters = Mapping[str, Tensor] | Iterable[Tensor]


def _call(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """``model(*inputs)``; one dict stands for keyword arguments, as from a tokenizer."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return model(**inputs[0])
    return model(*inputs)


def _tapped(model: Callable[..., Any], params: Parameters | None, want_grad: bool = False, **options: Any) -> Tap:
    if isinstance(model, nn.Module):
        return Tap(model, params=params, want_grad=want_grad, **options)
    if params is None:
        raise TypeError("ghostgrad: the model is not a torch.nn.Module, so its parameters must be given: params=[...] or params={name: tensor}")
    return Tap(params, want_grad=want_grad, **options)


def _run(tap: Tap, model: Callable[..., Any], inputs: tuple[Any, ...], create_graph: bool) -> Any:
    if not isinstance(model, nn.Module):  # functional code has no forward hook to tell the batch
        args, kwargs = ((), dict(inputs[0])) if len(inputs) == 1 and isinstance(inputs[0], Mapping) else (inputs, {})
        tap._see_input(args, kwargs)
    if not create_graph:
        return _call(model, inputs)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        return _call(model, inputs)


def _loss(caller: str, tap: Tap, model: Callable[..., Any], loss_fn: Callable[[Any, Any], Tensor], batch: tuple[Any, ...], create_graph: bool) -> Tensor:
    """The tapped model's loss, reduced to a scalar."""
    *inputs, target = batch
    loss = loss_fn(_run(tap, model, tuple(inputs), create_graph), target)
    if loss.dim() > 0:
        if loss.shape != (tap.batch_size,):
            raise ValueError(f"ghostgrad.{caller}: loss_fn must return a scalar or one loss per sample, ({tap.batch_size},), got shape {tuple(loss.shape)}")
        tap.reduction, loss = "sum", loss.sum()
    return loss


def _check_arguments(caller: str, loss_fn: Callable[..., Any], batch: tuple[Any, ...], reduction: str) -> None:
    if len(batch) < 2:
        raise TypeError(f"ghostgrad.{caller}: give the model's inputs and then the target: {caller}(model, loss_fn, x, y)")
    declared = getattr(loss_fn, "reduction", reduction)
    if declared in ("mean", "sum") and declared != reduction:
        raise ValueError(f"ghostgrad.{caller}: loss_fn has reduction={declared!r}, but reduction={reduction!r} was given; pass reduction={declared!r}")


def _backward(tap: Tap, scalar: Tensor, create_graph: bool, retain_graph: bool | None = None, parameters: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """The tap's norms for one scalar, without touching ``.grad``. Weight gradients are formed if the tap wants them, those of other ``parameters``, too."""
    return _norms_and_grads(tap, scalar, create_graph, retain_graph, parameters)[0]


def _norms_and_grads(
    tap: Tap, scalar: Tensor, create_graph: bool = False, retain_graph: bool | None = None, parameters: Sequence[Tensor] | None = None
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """The same and the gradients of the parameters, those that there are."""
    leaves = tap._pass.sources()
    if not scalar.requires_grad:
        raise TapStateError("ghostgrad: the result does not depend on any of the tapped parameters")
    if not leaves:
        raise UnsupportedUseError(
            "ghostgrad: no use of a tapped parameter was seen, although the result has a gradient; is it computed outside of torch's functions?"
        )
    parameters = [p for _, p in tap._names.values()] if parameters is None else parameters
    # The parameters are asked for too: what arrives without having been returned by the tap took a way around it, and the tap's hooks see that.
    grads = torch.autograd.grad(scalar, [*leaves.values(), *parameters], create_graph=create_graph, retain_graph=retain_graph, allow_unused=True)
    return tap._read(dict(zip(leaves, grads))), grads[len(leaves) :]


def _result(tap: Tap, norms: dict[str, Tensor], by_param: bool, create_graph: bool) -> Any:
    if not create_graph:
        norms = {name: norm.detach() for name, norm in norms.items()}
    return norms if by_param else norms[""]


def sqnorms(
    model: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *batch: Any,
    reduction: str = "mean",
    by_param: bool = False,
    create_graph: bool = False,
    params: Any = None,
    **options: Any,
) -> Any:
    """The squared norm of every sample's loss gradient: ``||grad_theta l(f(x_i), y_i)||^2``. ``.grad`` is not touched.

    Args:
        model: a module, or any function with ``params`` given.
        loss_fn: ``loss_fn(output, target)``, a scalar reduced over the samples as ``reduction`` says, or a vector (B,) of losses.
        batch: the model's inputs, samples first, then the target. An input may be a mapping: it becomes keyword arguments.
        reduction: "mean" or "sum", how a scalar loss was reduced. Results are those of the single sample's loss in either case.
        by_param: a dict ``{name: (B,)}`` instead of the sum over the parameters.
        create_graph: makes the result differentiable (double backward).
        params: restricts a module's parameters (tensors or names); for functional code, the parameters: a list or a mapping by name.
        options: further ones of :func:`ghostgrad.tap`.

    Returns:
        Tensor (B,), or a dict of them; float64 if a parameter is, else float32.

    Raises:
        the errors of :func:`ghostgrad.tap`; ValueError if ``loss_fn.reduction`` contradicts ``reduction``.

    Cost: the forward pass and the backward pass without weight gradients, plus the norms.
    """
    _check_arguments("sqnorms", loss_fn, batch, reduction)
    with torch.enable_grad(), _tapped(model, params, by_param=by_param, reduction=reduction, **options) as tap:
        loss = _loss("sqnorms", tap, model, loss_fn, batch, create_graph)
        return _result(tap, _backward(tap, loss, create_graph), by_param, create_graph)


def second_moments(
    model: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *batch: Any,
    reduction: str = "mean",
    params: Any = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The sum over the samples of the squared gradient, element by element: ``sum_i g_i^2``, ``g_i = grad_theta l(f(x_i), y_i)``. ``.grad`` is not touched.

    Divided by the number of samples it is the diagonal of the empirical Fisher matrix, and, if the labels are drawn from the model's own distribution, of the
    Fisher matrix: the weights of elastic weight consolidation (Kirkpatrick et al., PNAS 2017, eq. 3). Of several batches they add up. The sum over the
    elements of all parameters is that of :func:`sqnorms`.

    Args:
        model, loss_fn, batch, reduction, params, options: as for :func:`sqnorms`.

    Returns:
        ``{name: tensor of the parameter's shape}``, float64 for float64 and float32 otherwise.

    In a training step of your own: ``gg.tap(model, moments=True)`` and ``tap.second_moments()``.

    Cost: a training step, and 6 operations for each element of a sample's gradient, which is little where samples have many positions; for a linear layer on
    single positions, another product of the size of its weight gradient. Convolutions, and uses that overlap, form some samples' gradients at a time.

    Raises:
        the errors of :func:`sqnorms`.
    """
    _check_arguments("second_moments", loss_fn, batch, reduction)
    with torch.enable_grad(), _tapped(model, params, reduction=reduction, moments=True, **options) as tap:
        tap._pass.norms = _backward(tap, _loss("second_moments", tap, model, loss_fn, batch, create_graph=False), create_graph=False)
        return tap.second_moments()


def gradient_variance(
    model: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *batch: Any,
    reduction: str = "mean",
    params: Any = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The variance of the per-sample gradients, element by element: ``(sum_i g_i^2 - B gbar^2) / (B - 1)``, ``gbar`` the mean gradient. Unbiased.

    Arguments, cost and errors are those of :func:`second_moments`; ValueError for fewer than two samples. Where all samples' gradients agree to more than the
    digits of their dtype, what is left is rounding; it is never negative.

    Returns:
        ``{name: tensor of the parameter's shape}``. Its sum over everything, divided by the size of a batch, is the trace of the covariance of the batch's
        mean gradient.
    """
    _check_arguments("gradient_variance", loss_fn, batch, reduction)
    with torch.enable_grad(), _tapped(model, params, want_grad=True, reduction=reduction, moments=True, **options) as tap:
        loss, names = _loss("gradient_variance", tap, model, loss_fn, batch, create_graph=False), tap._names.values()
        B = tap.batch_size or 0
        if B < 2:
            raise ValueError(f"ghostgrad.gradient_variance: a variance needs at least two samples, got {B}")
        leaves = tap._pass.sources()
        grads = torch.autograd.grad(loss, [*leaves.values(), *(p for _, p in names)], allow_unused=True)
        tap._pass.norms = tap._read(dict(zip(leaves, grads)))
        variance = {}
        for (name, squares), grad in zip(tap.second_moments().items(), grads[len(leaves) :]):
            mean = 0.0 if grad is None else grad.to_dense().to(squares.dtype) / (1 if tap.reduction == "mean" else B)
            variance[name] = ((squares - B * mean * mean) / (B - 1)).clamp_min(0)
        return variance


class ProbedSqnorms(NamedTuple):
    """Squared norms estimated from random projections: the mean over the probes, and its standard error."""

    mean: Any
    stderr: Any


def output_sqnorms(
    model: Callable[..., Any],
    *inputs: Any,
    create_graph: bool = False,
    by_param: bool = False,
    num_probes: int | None = None,
    seed: int = 0,
    params: Any = None,
    **options: Any,
) -> Any:
    """The squared norm of the gradient of every sample's output: ``sum_k ||grad_theta f_k(x_i)||^2``, the trace of the empirical NTK's diagonal blocks.

    Its mean over the samples is the regulariser that SGD with label noise follows (Blanc et al., COLT 2020, eq. 1), and at zero residual the trace of the
    Hessian of the half-squared loss. As an explicit penalty: ``output_sqnorms(model, x, create_graph=True).mean()``.

    Args:
        model, params, options: as for :func:`sqnorms`.
        inputs: the model's inputs, samples first. The output has shape (B,) or (B, ...): K numbers per sample.
        create_graph: makes the result differentiable.
        by_param: a dict ``{name: (B,)}``.
        num_probes: instead of K backward passes, this many with random signs ``v``: ``E ||grad (v . f)||^2`` is the sum. Returns :class:`ProbedSqnorms`.
        seed: of the random signs.

    Returns:
        Tensor (B,) or dict of them; with ``num_probes`` a :class:`ProbedSqnorms` of these (``stderr`` is nan for one probe).

    Cost: one forward pass; K backward passes without weight gradients, or ``num_probes``.
    """
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"ghostgrad.output_sqnorms: num_probes must be at least 1, got {num_probes}")
    with torch.enable_grad(), _tapped(model, params, by_param=by_param, reduction="sum", **options) as tap:
        out = _run(tap, model, inputs, create_graph)
        batch_size = tap.batch_size
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != batch_size:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"ghostgrad.output_sqnorms: the model must return a tensor with the {batch_size} samples first, got {found}; wrap it in a function")
        flat = out.reshape(batch_size, -1) if out.numel() else out.reshape(batch_size, 0)  # (B, K)
        if num_probes is None:
            seeds: Iterable[Tensor] = (flat[:, k].sum() for k in range(flat.shape[1]))
            count = flat.shape[1]
        else:
            generator = torch.Generator().manual_seed(seed)
            signs = (torch.randint(0, 2, flat.shape, generator=generator).to(flat) * 2 - 1 for _ in range(num_probes))
            seeds, count = ((flat * sign).sum() for sign in signs), num_probes
        draws = []
        for i, scalar in enumerate(seeds):
            tap._pass.expect_backward()  # one per output, read one by one
            draws.append(_backward(tap, scalar, create_graph, retain_graph=create_graph or i + 1 < count))
        if not draws:
            raise ValueError("ghostgrad.output_sqnorms: the model's output has no elements")
        stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        if num_probes is None:
            return _result(tap, {name: rows.sum(0) for name, rows in stacked.items()}, by_param, create_graph)
        means = _result(tap, {name: rows.mean(0) for name, rows in stacked.items()}, by_param, create_graph)
        stderr = {name: rows.detach().std(0) / num_probes**0.5 if num_probes > 1 else torch.full_like(rows[0], torch.nan) for name, rows in stacked.items()}
        return ProbedSqnorms(means, stderr if by_param else stderr[""])


# ---------------------------------------------------------------------------------------------------------------------------------------
# The check


def _counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in names.items())


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *body)]


@dataclass(frozen=True)
class CheckRow:
    """One parameter's comparison."""

    name: str
    shape: tuple[int, ...]
    uses: dict[str, int]  # operation -> how often
    error: float  # of the tap, relative to the float64 loop, the worst sample
    loop_error: float  # of a loop in the model's own dtype
    ok: bool


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found. True if everything agrees; printing it gives a table."""

    rows: list[CheckRow]
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = ("parameter", "shape", "uses", "error", "loop's error", "")
        body = [
            (
                row.name,
                "x".join(map(str, row.shape)) or "scalar",
                _counted(row.uses) or "none",
                f"{row.error:.1e}",
                f"{row.loop_error:.1e}",
                "ok" if row.ok else "WRONG",
            )
            for row in self.rows
        ]
        wrong = sum(not row.ok for row in self.rows)
        verdict = "all agree" if not wrong else f"{wrong} of {len(self.rows)} differ"
        return "\n".join(
            (*_table(head, body), f"{verdict} with single-sample float64 autograd (relative, tolerance {self.tolerance:.0e} or twice the loop's own error)")
        )


def _loop(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple[Any, ...], names: list[str]) -> Tensor:
    """(P, B): squared norms by autograd, one sample at a time."""
    *inputs, target = batch
    size = next(leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    parameters = dict(model.named_parameters())
    columns = []
    for i in range(size):
        one, one_target = pytree.tree_map(
            lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) and t.dim() and t.shape[0] == size else t, (tuple(inputs), target)
        )
        loss = loss_fn(_call(model, one), one_target).sum()
        grads = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
        columns.append(torch.stack([torch.zeros((), dtype=torch.float64) if g is None else g.detach().double().square().sum().cpu() for g in grads]))
    return torch.stack(columns, 1)


def check(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], *batch: Any, reduction: str = "mean", params: Any = None, **options: Any) -> CheckReport:
    """Compares every parameter's norms with autograd in float64, one sample at a time.

    Args:
        model: a module without randomness in its forward (put dropout in eval mode). It is copied, not changed.
        loss_fn, batch, reduction, params, options: as for :func:`sqnorms`.

    Returns:
        A :class:`CheckReport`: prints as a table, is true if all parameters agree, so ``assert gg.check(...)`` works in a test. A parameter agrees if its
        relative error is at most 1e-5 (float64: 1e-10; half: 5e-2) or twice that of a loop in the model's own dtype. Errors are relative to the parameter's
        squared norm, or to rounding of the sample's whole norm where that is larger.

    Cost: 2 B forward and backward passes with a batch of one.
    """
    names_of = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        *inputs, _ = batch
        first, second = (torch.cat([t.double().flatten() for t in pytree.tree_leaves(_call(model, tuple(inputs))) if isinstance(t, Tensor)]) for _ in range(2))
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise ValueError("ghostgrad.check: the model's output is random (dropout?), so there is nothing to compare with; call model.eval() first")
    tap_rows = sqnorms(model, loss_fn, *batch, reduction=reduction, by_param=True, params=params, **options)
    with torch.enable_grad(), Tap(model, params=params, by_param=True, reduction=reduction, want_grad=False, **options) as tap:
        _call(model, tuple(inputs))
        uses = tap.uses()
    names = [name for name in tap_rows if name in names_of]
    double = pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)
    exact = _loop(copy.deepcopy(model).double(), loss_fn, double, names)
    plain = _loop(copy.deepcopy(model), loss_fn, batch, names)
    ours = torch.stack([tap_rows[name].detach().double().cpu() for name in names])
    dtype = max((p.dtype for p in model.parameters()), key=lambda d: torch.finfo(d).eps)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 5e-2
    floor = exact.sum(0) * torch.finfo(dtype).eps
    scale = torch.maximum(exact, floor).clamp_min(torch.finfo(torch.float64).tiny)
    errors, loop_errors = ((x - exact).abs().div(scale).nan_to_num(float("inf")) for x in (ours, plain))
    both = exact.isfinite()
    rows = []
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for i, name in enumerate(names):
        error = errors[i][both[i]].max().item() if both[i].any() else 0.0
        loop_error = loop_errors[i][both[i]].max().item() if both[i].any() else 0.0
        rows.append(CheckRow(name, shapes[name], uses[name], error, loop_error, error <= max(tolerance, 2 * loop_error)))
    return CheckReport(rows, tolerance)
