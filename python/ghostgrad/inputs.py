"""Per-sample squared norms of derivatives by the inputs: the Jacobian of a model's output, or the gradient of its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import ops
from .errors import BatchCouplingError
from .norms import ProbedSqnorms, _call
from .rules import refuse_batch_statistics
from .tap import Tap

__all__ = ["input_sqnorms"]


class _NoBatchStatistics(TorchFunctionMode):
    """Refuses batch normalisation by the statistics of the batch, by name and before it runs."""

    _batch_norm_name = Tap._batch_norm_name

    def __init__(self, model: Any):
        super().__init__()
        self._module = model if isinstance(model, nn.Module) else None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "batch_norm":
            with torch.enable_grad():
                refuse_batch_statistics(self, args, kwargs)
        return func(*args, **kwargs)


def _leaves(inputs: tuple[Any, ...], wrt: Iterable[int | str] | None) -> tuple[tuple[Any, ...], dict[int | str, Tensor]]:
    """The inputs, and those by which to differentiate: by position, or by name in a mapping. They require grad, and are the caller's own if those do."""
    mapping = len(inputs) == 1 and isinstance(inputs[0], Mapping)
    named: dict[int | str, Any] = dict(inputs[0]) if mapping else dict(enumerate(inputs))
    chosen = list(wrt) if wrt is not None else [key for key, value in named.items() if isinstance(value, Tensor)]
    if not chosen:
        raise TypeError("ghostgrad.input_sqnorms: none of the inputs is a tensor")
    leaves: dict[int | str, Tensor] = {}
    for key in chosen:
        value = named.get(key)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = f"{value.dtype}" if isinstance(value, Tensor) else "missing" if value is None else type(value).__name__
            raise TypeError(
                f"ghostgrad.input_sqnorms: input {key!r} must be a real tensor to have a derivative, got {found}. Choose others with wrt=[...], or feed the "
                "model with embeddings instead of token numbers"
            )
        if value.dim() == 0 or len(value) != len(leaves[next(iter(leaves))] if leaves else value):
            raise ValueError(f"ghostgrad.input_sqnorms: input {key!r} must have the samples first, as the others, got shape {tuple(value.shape)}")
        leaves[key] = named[key] = value if value.requires_grad else value.detach().requires_grad_()
    return ((named,) if mapping else tuple(named.values())), leaves


def _rows(t: Tensor, signs: Tensor) -> Tensor:
    """``t`` with the rows multiplied by (B,) signs."""
    return t * signs.to(t).view(-1, *(1,) * (t.dim() - 1))


def _check_apart(grads: Callable[[Tensor], Sequence[Tensor]], size: int, dtype: torch.dtype, what: str) -> None:
    """Raises if samples are mixed. ``grads(r)`` are the derivatives of ``sum_i r_i l_i``: where ``l_i`` depends on sample i alone, they are ``r_i`` times those
    of ``sum_i l_i``, to the last bit. ``r``: random signs."""
    if size < 2:
        return
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    signs[:2] = torch.tensor([1, -1])
    plain, signed = grads(torch.ones(size)), grads(signs)
    for a, b in zip(plain, signed):
        error, largest = (_rows(a, signs) - b).abs(), a.abs().amax()
        if error.numel() and bool((error.amax() > torch.finfo(dtype).eps ** 0.5 * largest) & largest.isfinite()):
            raise BatchCouplingError(
                f"ghostgrad.input_sqnorms: {what} of a sample depends on the inputs of other samples, so derivatives by its own input alone do not come out of "
                "one backward pass. Is there a batch statistic, attention or an average across samples? Put such modules in eval mode, or give the samples one "
                "by one"
            )


def input_sqnorms(
    model: Callable[..., Any],
    *inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    target: Any = None,
    reduction: str = "mean",
    wrt: Iterable[int | str] | None = None,
    by_input: bool = False,
    create_graph: bool = False,
    num_probes: int | None = None,
    seed: int = 0,
) -> Any:
    """The squared Frobenius norm of every sample's input Jacobian, ``||d f(x_i) / d x_i||_F^2``, or of its loss's gradient, ``||d l(f(x_i), y_i) / d x_i||^2``.

    The first is the penalty of contractive autoencoders (Rifai et al. 2011) and Jacobian regularisation (Hoffman, Roberts and Yaida 2019), the second that of
    double backpropagation (Drucker and LeCun 1992): ``gg.input_sqnorms(model, x, create_graph=True, num_probes=1).mean.mean()`` is one to train with.

    >>> gg.input_sqnorms(model, x)                                            # (B,) exact
    >>> gg.input_sqnorms(model, x, num_probes=4)                              # mean and standard error
    >>> gg.input_sqnorms(model, x, loss_fn=F.cross_entropy, target=y)         # (B,) one backward pass

    Args:
        model: a module or any function. Without ``loss_fn`` its output is a tensor (B, ...): K numbers per sample.
        inputs: samples first. One mapping stands for keyword arguments.
        loss_fn: ``loss_fn(output, target)``, a scalar reduced as ``reduction`` says or one loss per sample (B,).
        target: its second argument.
        reduction: "mean" or "sum", how a scalar loss was reduced; results are those of the single sample's loss.
        wrt: positions (or names, for a mapping) of the inputs by which to differentiate; by default all tensors, which must then be floating point.
        by_input: a dict ``{position or name: (B,)}`` instead of the sum over these inputs.
        create_graph: makes the result differentiable, by the parameters and by inputs that require grad. Attention then runs by its plain formula.
        num_probes: instead of K backward passes, this many with random signs ``v``: ``E ||d (v . f) / d x||^2`` is the norm.
        seed: of the random signs.

    Returns:
        Tensor (B,) or dict of them, float64 for float64 inputs and float32 otherwise; with ``num_probes`` a :class:`ProbedSqnorms` of these (``stderr`` is nan
        for one probe). ``.grad`` is not touched.

    Raises:
        BatchCouplingError: batch statistics, found by name, or anything else by which a sample's output or loss depends on another's input, found by comparing
            two backward passes.
        TypeError: an input to differentiate by is not a floating-point tensor; the output is not as above.
        ValueError: arguments do not fit.

    Cost: one forward pass; K backward passes, or ``num_probes``, or one for a loss; one or two more to see that samples are not mixed.
    """
    if num_probes is not None and (num_probes < 1 or loss_fn is not None):
        raise ValueError(f"ghostgrad.input_sqnorms: num_probes must be at least 1, and is for outputs, not for a loss; got {num_probes}")
    if reduction not in ("mean", "sum") or getattr(loss_fn, "reduction", reduction) not in (reduction, "none"):
        declared = getattr(loss_fn, "reduction", reduction)
        raise ValueError(f"ghostgrad.input_sqnorms: reduction must be 'mean' or 'sum', and that of loss_fn ({declared!r}), got {reduction!r}")
    inputs, leaves = _leaves(inputs, wrt)
    size, tensors = len(next(iter(leaves.values()))), list(leaves.values())
    with torch.enable_grad(), _NoBatchStatistics(model), sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext():
        out = _call(model, inputs)
        if loss_fn is not None:
            return _of_loss(loss_fn, out, target, reduction, leaves, size, by_input, create_graph)
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != size:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"ghostgrad.input_sqnorms: the model must return a tensor with the {size} samples first, got {found}; wrap it in a function")
        flat, generator = out.unsqueeze(-1).flatten(1), torch.Generator().manual_seed(seed)  # (B, K)
        if not flat.shape[1]:
            raise ValueError("ghostgrad.input_sqnorms: the model's output has no elements")
        if not out.requires_grad:
            raise ValueError("ghostgrad.input_sqnorms: the output does not depend on the inputs in a way that autograd can follow")

        def signs() -> Tensor:
            return (torch.randint(0, 2, flat.shape, generator=generator) * 2 - 1).to(flat)

        def grads(scalar: Tensor, create_graph: bool, retain_graph: bool = True) -> tuple[Tensor, ...]:
            return torch.autograd.grad(scalar, tensors, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True)

        along = (torch.rand(flat.shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(flat)
        _check_apart(lambda r: grads((flat * _rows(along, r)).sum(), False), size, out.dtype, "an output")
        count = flat.shape[1] if num_probes is None else num_probes
        scalars = (flat[:, k].sum() if num_probes is None else (flat * signs()).sum() for k in range(count))
        draws = [_squares(grads(scalar, create_graph, create_graph or k + 1 < count)) for k, scalar in enumerate(scalars)]
    rows = [torch.stack(column) for column in zip(*draws)]  # for each input (K or probes, B)
    if num_probes is None:
        return _keyed([row.sum(0) for row in rows], leaves, by_input)
    rows = rows if by_input else [torch.stack(rows).sum(0)]
    stderr = [row.detach().std(0) / count**0.5 if count > 1 else torch.full_like(row[0], torch.nan, requires_grad=False) for row in rows]
    return ProbedSqnorms(_keyed([row.mean(0) for row in rows], leaves, by_input), _keyed(stderr, leaves, by_input))


def _squares(grads: Sequence[Tensor]) -> list[Tensor]:
    return [ops.row_sqnorm(grad) for grad in grads]


def _keyed(norms: Sequence[Tensor], leaves: Mapping[int | str, Tensor], by_input: bool) -> Any:
    return dict(zip(leaves, norms)) if by_input else torch.stack(list(norms)).sum(0)


def _of_loss(
    loss_fn: Callable[[Any, Any], Tensor],
    out: Any,
    target: Any,
    reduction: str,
    leaves: Mapping[int | str, Tensor],
    size: int,
    by_input: bool,
    create_graph: bool,
) -> Any:
    loss = loss_fn(out, target)
    if not isinstance(loss, Tensor) or (loss.dim() and loss.shape != (size,)):
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"ghostgrad.input_sqnorms: loss_fn must return a scalar or one loss per sample, ({size},), got {shape}")
    if not loss.requires_grad:
        raise ValueError("ghostgrad.input_sqnorms: the loss does not depend on the inputs in a way that autograd can follow")
    tensors = list(leaves.values())
    if loss.dim():
        _check_apart(lambda r: torch.autograd.grad((loss * r.to(loss)).sum(), tensors, retain_graph=True, materialize_grads=True), size, loss.dtype, "the loss")
    else:
        outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        by_output = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) if outputs else ()
        used = [(t, g) for t, g in zip(outputs, by_output) if g is not None]
        wrong = next((t for t, _ in used if t.dim() == 0 or len(t) != size), None)
        if not used or wrong is not None:
            found = "none that it depends on" if wrong is None else f"one of shape {tuple(wrong.shape)}"
            raise TypeError(
                f"ghostgrad.input_sqnorms: a scalar loss must be a function of outputs with the {size} samples first, got {found}; return one loss per sample"
            )
        _check_apart(
            lambda r: torch.autograd.grad([t for t, _ in used], tensors, [_rows(g, r) for _, g in used], retain_graph=True, materialize_grads=True),
            size,
            loss.dtype,
            "an output",
        )
        _check_loss_apart(loss_fn, out, target, outputs, by_output, size)
    grads = torch.autograd.grad(loss.sum(), tensors, create_graph=create_graph, materialize_grads=True)
    scale = size**2 if reduction == "mean" and not loss.dim() else 1
    return _keyed([norm * scale for norm in _squares(grads)], leaves, by_input)


def _check_loss_apart(loss_fn: Any, out: Any, target: Any, outputs: Sequence[Tensor], by_output: Sequence[Tensor | None], size: int) -> None:
    """Raises if the loss is no sum over the samples: then its derivative by the outputs of half of them changes with those of the others."""
    if size < 2:
        return
    for kept in (0, 1):
        swapped = {id(t): t.detach().clone() for t, g in zip(outputs, by_output) if g is not None}
        for t in swapped.values():
            pairs = len(t) // 2 * 2
            t[1 - kept : pairs : 2] = t[kept:pairs:2].clone()
            t.requires_grad_()
        altered = pytree.tree_map(lambda t: swapped.get(id(t), t) if isinstance(t, Tensor) else t, out)  # noqa: B023
        others = torch.autograd.grad(loss_fn(altered, target), list(swapped.values()))
        for grad, other in zip([g for g in by_output if g is not None], others):
            error, largest = (grad[kept::2] - other[kept::2]).abs(), grad.abs().amax()
            if bool((error.amax() > torch.finfo(grad.dtype).eps ** 0.5 * largest) & largest.isfinite()):
                raise BatchCouplingError(
                    "ghostgrad.input_sqnorms: the loss is no sum over the samples (a term compares them, or averages over them): there is no gradient of one "
                    "sample's loss. Take that term out, or keep the samples apart in it"
                )
