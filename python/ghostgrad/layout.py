"""Where the samples of a batch lie inside a tensor, and how operations move them.

A tensor that carries samples has one dimension of size ``outer * B * inner`` whose order is (outer, sample, inner); plain activations have
``Layout(0, 1, 1)``, tokens flattened into the batch ``Layout(0, 1, T)``, time-major sequences ``Layout(1, 1, 1)``, time-major sequences
flattened ``Layout(0, T, 1)``. The tap keeps layouts only for tensors that differ from the plain one, and :func:`propagate` follows them through the
operations that move dimensions. What cannot be followed becomes :class:`Mixed`, with the reason: such a tensor may still become a loss, but may
not meet a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .samplewise import keeps_apart

__all__ = ["ELEMENTWISE", "FOLLOWED", "PLAIN", "AnyLayout", "Layout", "Mixed", "propagate", "to_samples"]


@dataclass(frozen=True)
class Layout:
    """The samples lie along ``dim``, which has size ``outer * B * inner``."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Mixed:
    """The samples can no longer be told apart. ``coupled``: because an operation combined them, rather than because it is not understood."""

    reason: str
    coupled: bool = False


PLAIN = Layout(0)
AnyLayout = Layout | Mixed

# Operations that keep the order of the elements and change the shape alone.
_ORDER_KEEPING = frozenset("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as ravel atleast_1d".split())
# Views that permute dimensions or take parts of them: where the sample dimension went is read off the strides of a probe.
_STRIDED = frozenset(
    "transpose permute t T mT H mH movedim moveaxis swapaxes swapdims adjoint __getitem__ select narrow split split_with_sizes chunk tensor_split unbind "
    "hsplit vsplit dsplit".split()
)
_RESHAPED_IN_PLACE = frozenset("transpose_ t_ swapaxes_ swapdims_ squeeze_ unsqueeze_ resize_ set_".split())


def _with_dim(names: str, position: int, default: int | None) -> dict[str, tuple[int, int | None]]:
    return dict.fromkeys(names.split(), (position, default))


# Operations that work along dimensions: the position of their ``dim`` argument, and its default (None: all dimensions).
_REDUCTIONS = {
    **_with_dim("sum mean var std var_mean std_mean prod amax amin max min aminmax logsumexp nansum nanmean argmax argmin any all", 1, None),
    **_with_dim("count_nonzero nanmedian median mode logcumsumexp nanvar nanstd", 1, None),
    **_with_dim("norm vector_norm linalg_norm linalg_vector_norm quantile nanquantile", 2, None),
    **_with_dim("kthvalue", 2, -1),
}
_ALONG = {
    **_with_dim("softmax log_softmax softmin cumsum cumprod cummax cummin flip gather index_select take_along_dim index_add index_fill", 1, None),
    **_with_dim("scatter scatter_add scatter_reduce index_copy", 1, None),
    **_with_dim("sort argsort glu", 1, -1),
    **_with_dim("roll", 2, None),
    **_with_dim("topk diff fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", 2, -1),
    **_with_dim("normalize", 2, 1),
    **_with_dim("gumbel_softmax", 4, -1),
}
_PRODUCTS = frozenset("matmul bmm mm __matmul__ __rmatmul__ baddbmm addmm addbmm".split())
_JOINS = frozenset(("cat", "concat", "concatenate"))
# Operations on several tensors that broadcast: dimensions are aligned from the right.
ELEMENTWISE = frozenset(
    ("add", "sub", "mul", "div", "true_divide", "divide", "multiply", "subtract", "rsub", "pow", "float_power", "maximum", "minimum", "fmax", "fmin")
    + ("where", "lerp", "addcmul", "addcdiv", "atan2", "hypot", "fmod", "remainder", "logaddexp", "xlogy", "copysign", "masked_fill")
    + ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__rdiv__", "__pow__", "__rpow__")
    + ("add_", "sub_", "mul_", "div_", "pow_", "lerp_", "addcmul_", "addcdiv_", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__")
)
# Others that broadcast, but have no rule by that.
_BROADCASTING = ELEMENTWISE | frozenset(
    "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ less greater less_equal greater_equal not_equal isclose logical_and logical_or logical_xor "
    "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ __rand__ __ror__ __rxor__ floor_divide __floordiv__ __mod__ heaviside ldexp complex polar "
    "masked_fill_ expand expand_as broadcast_to broadcast_tensors normal mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy "
    "binary_cross_entropy_with_logits gaussian_nll_loss poisson_nll_loss soft_margin_loss".split()
)
# What may move the samples of a plain tensor although the first dimension keeps its size.
FOLLOWED = (
    _ORDER_KEEPING
    | _STRIDED
    | _RESHAPED_IN_PLACE
    | _REDUCTIONS.keys()
    | _ALONG.keys()
    | _PRODUCTS
    | _JOINS
    | {"stack", "einsum", "linear", "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}
)


def to_samples(x: Tensor, layout: Layout, batch_size: int, feature_dims: int = 1) -> Tensor:
    """``x`` as (B, T, *features): the last ``feature_dims`` dimensions are kept, all others but the samples' are flattened into T, in order."""
    features = x.shape[x.dim() - feature_dims :]
    if layout == PLAIN and x.dim() == 2 + feature_dims - 1:
        return x.unsqueeze(1)  # (B, 1, features)
    if layout != PLAIN:
        x = x.unflatten(layout.dim, (layout.outer, batch_size, layout.inner)).movedim(layout.dim + 1, 0)
    positions = math.prod(x.shape[1 : x.dim() - feature_dims])
    return x.reshape(batch_size, positions, *features)


def _reshaped(shape: Sequence[int], layout: Layout, new_shape: Sequence[int], batch_size: int) -> AnyLayout:
    """The layout after an order-keeping change of shape: the flat order is (before, sample, after)."""
    if batch_size == 0:
        return next((Layout(dim) for dim, size in enumerate(new_shape) if size == 0), Mixed("an empty batch was reshaped"))
    before = math.prod(shape[: layout.dim]) * layout.outer
    prefix = 1
    for dim, size in enumerate(new_shape):
        if before % prefix == 0:
            outer = before // prefix
            if size and size % (outer * batch_size) == 0:
                return Layout(dim, outer, size // (outer * batch_size))
        prefix *= size
    return Mixed(f"a reshape from {tuple(shape)} to {tuple(new_shape)} splits samples")


def _indexed(x: Tensor, layout: Layout, index: Any, batch_size: int) -> AnyLayout:
    """Indexing by tensors: indexes the numbers of the samples in the same way, and looks along which dimension they come out in order."""
    along = torch.arange(x.size(layout.dim), device=x.device) // layout.inner % max(batch_size, 1)
    samples = along.view(-1, *(1,) * (x.dim() - 1 - layout.dim)).expand(x.shape)[index]
    for dim, size in enumerate(samples.shape):
        if size and batch_size and size % batch_size == 0:
            inner = size // batch_size
            expected = (torch.arange(size, device=x.device) // inner).view(-1, *(1,) * (samples.dim() - 1 - dim))
            if bool((samples == expected).all()):
                return Layout(dim, 1, inner)
    return Mixed("samples are picked by an index")


def _strided(
    func: Callable[..., Any], x: Tensor, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor], batch_size: int
) -> list[AnyLayout]:
    """Runs ``func`` on a probe without data whose strides are all different, and finds the sample dimension by its stride."""
    probe = torch.empty([max(size, 2) for size in x.shape], device="meta")
    try:
        probed = func.__self__.__get__(probe) if func.__name__ == "__get__" else func(probe, *args[1:], **kwargs)  # type: ignore[attr-defined]
    except Exception:
        return [Mixed(f"'{func.__name__}' could not be followed")] * len(outputs)
    probed = [probed] if isinstance(probed, Tensor) else list(probed)
    found: list[AnyLayout] = []
    for shadow, output in zip(probed, outputs):
        dims = [i for i, stride in enumerate(shadow.stride()) if stride == probe.stride(layout.dim) and shadow.size(i) > 1]
        if not shadow._is_view() or shadow.dim() != output.dim():
            found.append(_indexed(x, layout, args[1], batch_size) if func.__name__ == "__getitem__" else Mixed(f"'{func.__name__}' could not be followed"))
        elif len(dims) == 1 and output.size(dims[0]) == x.size(layout.dim):
            found.append(Layout(dims[0], layout.outer, layout.inner))
        else:
            found.append(Mixed("a part of the samples is picked"))
    return found


def _dims_argument(name: str, ndim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """The dimensions that a call works along; None stands for all of them."""
    position, default = (_REDUCTIONS | _ALONG)[name]
    if name == "flip" and len(args) > 2:
        args = (args[0], args[1:])
    dims = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims", args[position] if len(args) > position else default)))
    if dims is None or isinstance(dims, (str, Tensor, torch.dtype, bool)):
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [d % max(ndim, 1) for d in dims] if dims else None


def _along(name: str, x: Tensor, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> list[AnyLayout]:
    dims = _dims_argument(name, x.dim(), args, kwargs)
    if dims is None or layout.dim in dims:
        where = "all dimensions" if dims is None else f"dimension {layout.dim}, along which the samples lie"
        return [Mixed(f"'{name}' combines samples: it works along {where}", coupled=True)] * len(outputs)
    if name in _REDUCTIONS and outputs and outputs[0].dim() < x.dim():
        layout = Layout(layout.dim - sum(d < layout.dim for d in dims), layout.outer, layout.inner)
    return [layout] * len(outputs)


def _einsum(inputs: Sequence[tuple[Tensor, AnyLayout]], args: tuple[Any, ...]) -> AnyLayout | None:
    """The layout of an einsum over a written-out equation; None if it is given in another form."""
    if not isinstance(args[0], str) or "..." in args[0] or "->" not in args[0]:
        return None
    left, right = args[0].replace(" ", "").split("->")
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    labels = {id(t): term for t, term in zip(operands, left.split(","))}
    letters = {labels[id(t)][layout.dim] for t, layout in inputs if isinstance(layout, Layout) and id(t) in labels}
    if len(letters) != 1 or (letter := letters.pop()) not in right:
        return Mixed(f"einsum '{args[0]}' combines samples", coupled=True)
    _, first = inputs[0]
    assert isinstance(first, Layout)
    return Layout(right.index(letter), first.outer, first.inner)


def _contracts_samples(name: str, x: Tensor, layout: Layout, args: tuple[Any, ...]) -> bool:
    """True if a matrix product sums over the dimension of ``x`` along which the samples lie."""
    if name == "linear":
        return layout.dim == x.dim() - 1 or (len(args) > 1 and args[1] is x)
    operands = args[1:] if name in ("baddbmm", "addmm", "addbmm") else args
    if name == "__rmatmul__":
        operands = operands[::-1]
    if name == "addbmm" or len(operands) < 2:
        return True
    return (operands[0] is x and layout.dim == x.dim() - 1) or (operands[1] is x and layout.dim == max(x.dim() - 2, 0))


def propagate(
    func: Callable[..., Any],
    name: str,
    inputs: Sequence[tuple[Tensor, AnyLayout]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
    batch_size: int,
) -> list[AnyLayout]:
    """The layouts of ``outputs = func(*args, **kwargs)``, given those of the inputs that carry samples."""
    for _, layout in inputs:
        if isinstance(layout, Mixed):
            return [layout] * len(outputs)
    x, layout = inputs[0]
    assert isinstance(layout, Layout)
    if name in _ORDER_KEEPING:
        return [_reshaped(x.shape, layout, output.shape, batch_size) for output in outputs]
    if name in _STRIDED and args and args[0] is x:
        return _strided(func, x, layout, args, kwargs, outputs, batch_size)
    if name in _RESHAPED_IN_PLACE:
        return [Mixed(f"'{name}' changes the shape of a tensor in place")] * len(outputs)
    if (name in _REDUCTIONS or name in _ALONG) and not (name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)):
        return _along(name, x, layout, args, kwargs, outputs)
    if name == "einsum" and (found := _einsum(inputs, args)) is not None:
        return [found]
    if (name in _PRODUCTS or name == "linear") and any(_contracts_samples(name, t, o, args) for t, o in inputs if isinstance(o, Layout)):
        return [Mixed(f"'{name}' sums over the samples", coupled=True)]
    if name in ("layer_norm", "rms_norm") and layout.dim >= x.dim() - len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())):
        return [Mixed(f"'{name}' normalises over the samples", coupled=True)]
    if name in ("group_norm", "instance_norm", "batch_norm") and layout.dim != 0:
        return [Mixed(f"'{name}' takes dimension 0 for that of the samples, which lie along dimension {layout.dim}", coupled=True)]
    if name == "stack":
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % outputs[0].dim()
        if all(other == layout for _, other in inputs):
            return [Layout(layout.dim + (dim <= layout.dim), layout.outer, layout.inner)]
    if name in _JOINS:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % outputs[0].dim()
        if dim == layout.dim:
            return [Mixed(f"'{name}' puts further rows along the dimension of the samples")]
    # Anything else: the samples must lie in the same place in every input (aligned from the right where the operation broadcasts), and be there
    # in the output.
    aligned = name in _BROADCASTING or (name in ("max", "min") and len(inputs) > 1)
    width = max(t.dim() for t, _ in inputs) if aligned or name in _PRODUCTS else 0
    places = [(o.dim + max(width - t.dim(), 0), o.outer, o.inner) for t, o in inputs if isinstance(o, Layout)]
    if any(place != places[0] for place in places):
        return [Mixed(f"'{name}' combines tensors in which the samples lie along different dimensions", coupled=True)] * len(outputs)
    widest, place = max(inputs, key=lambda pair: pair[0].dim())
    assert isinstance(place, Layout)
    results: list[AnyLayout] = []
    for output in outputs:
        dim = place.dim + (max(output.dim() - widest.dim(), 0) if aligned else 0)
        there = output.dim() > dim and output.size(dim) == widest.size(place.dim)
        results.append(Layout(dim, place.outer, place.inner) if there else Mixed(f"'{name}' turns {tuple(widest.shape)} into {tuple(output.shape)}"))
    known = aligned or (name in FOLLOWED and name != "einsum")
    if known or all(isinstance(o, Mixed) for o in results) or keeps_apart(func, name, inputs, args, kwargs, results, batch_size):
        return results
    return [Mixed(f"'{name}' does not give on single samples what it gives on the batch: it combines samples, or they lie elsewhere")] * len(outputs)
