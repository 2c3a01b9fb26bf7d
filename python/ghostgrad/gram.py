"""Inner products of per-sample gradients: the empirical neural tangent kernel.

One forward pass over all samples, and one backward pass for each output, in which a parameter's per-sample gradients are formed in pieces of some columns;
a piece's Gram matrix is added to the result in float64, and the piece is gone. What is stored is B x B, and one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .contributions import Full, Outer
from .norms import _run, _tapped
from .tap import _LeafNode, _materialise, _overlapping_groups, _Pending

__all__ = ["gram"]

_PIECE = 1 << 26  # bytes of a piece in float32
_STRIP = 128  # columns


def gram(
    model: Callable[..., Any],
    x: Any,
    x2: Any = None,
    *,
    per_output: bool = False,
    by_param: bool = False,
    block_size: int | None = None,
    params: Any = None,
    **options: Any,
) -> Any:
    """Inner products of the gradients of the samples' outputs, the empirical neural tangent kernel (Jacot, Gabriel, Hongler, NeurIPS 2018):
    ``K_ij = sum_k <grad_theta f_k(x_i), grad_theta f_k(x2_j)>``.

    ::

        K = gg.gram(model, x)  # (B, B), symmetric, positive semidefinite to rounding; its diagonal is gg.output_sqnorms(model, x)

    Args:
        model: a module, or any function with ``params`` given. It must return a tensor (B,) or (B, ...), of K numbers for each sample.
        x, x2: the model's input, samples first; a tuple of several, or a mapping of keyword arguments. Without ``x2``, ``x`` with itself.
        per_output: a matrix for each output instead of the sum over them.
        by_param: a dict with a matrix (or matrices) for each parameter. Those of a layer's parameters add up to the layer's.
        block_size: samples of ``x``, and of ``x2``, at a time: the memory of a training step on twice as many, for one more such step for each pair of blocks.
        params, options: as for :func:`ghostgrad.sqnorms`.

    Returns:
        float64 (B, B2), or (K, B, B2) with ``per_output``; or a dict of them. For the kernel of the loss's gradients, put the loss into the model.

    Products are formed in the dtype of the model and added in float64. Memory: a training step on the B + B2 samples, and 64 MiB of per-sample gradients.
    Cost: for each output a backward pass, the B + B2 per-sample gradients, and ``2 B B2 P`` operations for P parameters.

    Raises:
        the errors of :func:`ghostgrad.sqnorms`; TypeError if the model's result is not as above; ValueError for other arguments that are not.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"ghostgrad.gram: block_size must be at least 1, got {block_size}")
    rows, columns = _size("x", x), None if x2 is None else _size("x2", x2)
    if block_size is None or max(rows, columns or 0) <= block_size:
        kernels = _block(model, x, x2, rows, per_output, by_param, params, options)
    else:
        kernels = _blocks(model, x, x2, rows, columns, block_size, per_output, by_param, params, options)
    return kernels if by_param else kernels[""]


def _blocks(
    model: Callable[..., Any], x: Any, x2: Any, rows: int, columns: int | None, size: int, per_output: bool, by_param: bool, params: Any, options: Any
) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for i in range(0, rows, size):
        for j in range(i if columns is None else 0, rows if columns is None else columns, size):
            some = _slice(x, i, size, rows)
            others = None if columns is None and i == j else _slice(x if columns is None else x2, j, size, rows if columns is None else columns)
            for name, k in _block(model, some, others, min(size, rows - i), per_output, by_param, params, options).items():
                if name not in whole:
                    whole[name] = k.new_zeros(*k.shape[:-2], rows, rows if columns is None else columns)
                whole[name][..., i : i + size, j : j + size] = k
                if columns is None:
                    whole[name][..., j : j + size, i : i + size] = k.mT
    return whole


def _block(
    model: Callable[..., Any], x: Any, x2: Any, rows: int, per_output: bool, by_param: bool, params: Any, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """All samples of ``x``, and of ``x2`` after them, in one pass."""
    inputs = x if isinstance(x, tuple) else (x,)
    if x2 is not None:
        inputs = _joined(inputs, x2 if isinstance(x2, tuple) else (x2,))
    found: dict[str, Tensor] = {}

    def take(node: _LeafNode, contributions: Sequence[_Pending]) -> tuple[None, None]:
        kernel = _kernel(node, contributions, rows if x2 is not None else None)
        name = node.name if by_param else ""
        found[name] = found[name] + kernel.to(found[name].device) if name in found else kernel
        return None, None

    with torch.enable_grad(), _tapped(model, params, reduction="sum", **options) as tap:
        out = _run(tap, model, inputs, create_graph=False)
        B = tap.batch_size or 0
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != B or not out.numel():
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"ghostgrad.gram: the model must return a tensor of numbers with the {B} samples first, got {shape}; wrap it in a function")
        outputs = out.reshape(B, -1).unbind(1)
        zero = torch.zeros(rows, B if x2 is None else B - rows, dtype=torch.float64, device=out.device)
        kernels: dict[str, Any] = {name: [] if per_output else zero for name in ([name for name, _ in tap._names.values()] if by_param else [""])}
        tap._pass.consume = take
        for k, output in enumerate(outputs):
            tap._pass.expect_backward()
            found.clear()
            _differentiate(tap, output.sum(), retain_graph=k + 1 < len(outputs))
            for name in kernels:
                kernel = found.get(name, zero).to(out.device)
                kernels[name] = [*kernels[name], kernel] if per_output else kernels[name] + kernel
    return {name: torch.stack(kernel) if per_output else kernel for name, kernel in kernels.items()}


def _differentiate(tap: Any, scalar: Tensor, retain_graph: bool) -> None:
    parameters = [p for _, p in tap._names.values()]
    torch.autograd.grad(scalar, [*tap._pass.sources().values(), *parameters], retain_graph=retain_graph, allow_unused=True)
    if tap._pass.bypassed:
        raise tap._bypassed()


def _kernel(node: _LeafNode, contributions: Sequence[_Pending], rows: int | None) -> Tensor:
    """Of one parameter: the Gram matrix of all samples, or of the first ``rows`` with the others."""
    B = node.leaf.shape[0]
    kernel = torch.zeros(B if rows is None else rows, B if rows is None else B - rows, dtype=torch.float64, device=node.leaf.device)
    # Of a symmetric matrix the lower triangle is enough, in columns wide enough for a matrix product.
    strips = [(slice(0, rows), slice(rows, B))] if rows is not None else [(slice(i, B), slice(i, min(i + _STRIP, B))) for i in range(0, B, _STRIP)]

    def add(*factors: Tensor) -> None:
        """The product, element by element, of the factors' Gram matrices."""
        for left, right in strips:
            part = math.prod((g[left] @ g[right].mT).double() for g in factors)
            kernel[left, right if rows is None else slice(None)] += part

    for group in _overlapping_groups(contributions, node.attached):
        if len(group) > 1:
            node.admit(B * node.shape.numel() * node.dtype.itemsize)
        c = group[0][0] if len(group) == 1 else Full(_materialise(group))  # inner products do not see where a view's elements lie
        if isinstance(c, Outer) and c.a.dim() == 3 and c.a.shape[1] == 1:
            add(c.a[:, 0], c.b[:, 0])
            continue
        for piece in c.pieces(max(1, _PIECE // (4 * max(1, B)))):
            add(piece)
    return kernel if rows is not None else kernel.tril() + kernel.tril(-1).mT


def _size(name: str, x: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        raise TypeError(f"ghostgrad.gram: {name} must be a tensor with the samples first, or a tuple or mapping of such, got {type(x).__name__}")
    return tensors[0].shape[0]


def _slice(x: Any, start: int, size: int, of: int) -> Any:
    return pytree.tree_map(lambda t: t[start : start + size] if isinstance(t, Tensor) and t.dim() and t.shape[0] == of else t, x)


def _joined(first: Any, second: Any) -> Any:
    """The samples of both inputs, leaf by leaf."""
    leaves, spec = pytree.tree_flatten(first)
    others, other_spec = pytree.tree_flatten(second)
    if spec != other_spec:
        raise ValueError("ghostgrad.gram: x and x2 must be of the same structure")
    joined = []
    for one, other in zip(leaves, others):
        if isinstance(one, Tensor) and one.dim():
            if one.shape[1:] != other.shape[1:]:
                raise ValueError(f"ghostgrad.gram: samples of x and x2 must have the same shape, got {tuple(one.shape[1:])} and {tuple(other.shape[1:])}")
            joined.append(torch.cat([one, other]))
        else:
            joined.append(one)
    return pytree.tree_unflatten(joined, spec)
