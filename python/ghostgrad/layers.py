"""Rules of layers: normalisation, embeddings, convolutions, attention. Recurrent networks stand in :mod:`ghostgrad.recurrent`.

Each says what the layer is in terms of contributions or of the rules that are there (:mod:`ghostgrad.rules`); importing this module registers them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contributions import Affine, Arranged, Gathered, Outer, Patches, Positions, Segments
from .errors import BatchCouplingError
from .layout import PLAIN, Known, Ragged, from_samples, to_samples
from .reference import accumulation_dtype
from .rules import Call, add, body, linear, mul, reference_call, register_rule

__all__: list[str] = []


# ---------------------------------------------------------------------------------------------------------------------------------------
# Normalisation: a scale and a shift of what was normalised. Where torch has a kernel for all of it, one node keeps what torch's own keeps: the input and
# its statistics.


def _normalisation(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: Known,
    run: Callable[..., tuple[Tensor, ...]],
    input_grad: Callable[..., Tensor],
    plain: Callable[[Tensor], Tensor],
    arrange: Callable[[Tensor], Tensor],
    arrange_statistics: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    fused: bool = False,
) -> Tensor:
    """A layer that normalises, scales and shifts, as one node.

    Args:
        run: ``run(x, weight, bias)`` gives the result, mean and rstd.
        input_grad: ``input_grad(g, x, weight, bias, mean, rstd)``; need not be differentiable.
        plain: ``plain(x)`` is the layer without weight and bias, in differentiable operations.
        arrange: brings tensors like ``x`` to (B, T, d, S).
        arrange_statistics: brings mean and rstd to (B, T, G).
        shape: to which weight and bias are viewed to broadcast against ``x``.
        fused: mean and rstd are those of ``x`` itself, arranged in an order of memory that :func:`ops.norm_affine` takes: all of backward can be its.
    """

    scaled, batch_size = weight is not None and weight.requires_grad, call.batch_size

    def backward(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> tuple[Callable[[], Any] | None, ...]:
        recorded = torch.is_grad_enabled()
        normalised = plain(x) if recorded else None  # mean and rstd are constants here, but functions of x

        def of_input() -> Tensor:
            if normalised is not None:
                grad = g if weight is None else g * weight.view(shape)
                return torch.autograd.grad(normalised, x, grad.to(normalised.dtype), create_graph=True)[0]
            if not fused or not scaled or isinstance(layout, Ragged):
                return input_grad(g, x, weight, bias, mean, rstd)
            return from_samples(positions.backward(weight), layout, batch_size, x.shape)

        wide = accumulation_dtype(x.dtype)
        like_x = arrange(g.to(x.dtype))
        if not scaled:
            positions = Positions(like_x)
        elif normalised is not None:
            positions = Positions(like_x, arrange(normalised))
        else:
            positions = Positions(like_x, arrange(x), arrange_statistics(mean.to(wide)), arrange_statistics(rstd.to(wide)))
        of_weight = None if weight is None else functools.partial(Affine, positions, True, weight.shape)
        of_bias = None if bias is None else functools.partial(Affine, positions, False, bias.shape)
        return of_input, of_weight, of_bias

    if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):  # before the node, not inside it: its backward must see what its forward saw

        def widen(p: Tensor | None) -> Tensor | None:
            return p if p is None or p.dtype == torch.float32 else call.derive(torch.Tensor.float, p) if call.is_parameter(p) else p.float()

        x, weight, bias = call.mark(x.float(), layout), widen(weight), widen(bias)
    return call.fuse(run, backward, (x,), (weight, bias), layout)


def _affine(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, layout: Known, arrange: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> Tensor:
    """A scale and a shift of ``x``, for what is normalised by other means; ``arrange`` and ``shape`` as above."""

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = x if weight is None else x * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)).to(x.dtype)

    def backward(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Callable[[], Any] | None, ...]:
        positions = Positions(arrange(g), None if weight is None else arrange(x))
        of_weight = None if weight is None else functools.partial(Affine, positions, True, weight.shape)
        of_bias = None if bias is None else functools.partial(Affine, positions, False, bias.shape)
        return lambda: (g if weight is None else g * weight.view(shape)).to(x.dtype), of_weight, of_bias

    return call.fuse(run, backward, (x,), (weight, bias), layout)


def _outside(call: Call, input: Tensor, shape: tuple[int, ...]) -> Known:
    """The layout of the input of a layer that normalises over its last dimensions."""
    layout = call.layout(input, ragged=True)
    if layout.dim >= input.dim() - len(shape):
        raise BatchCouplingError(f"ghostgrad: '{call.operation}' of {call.names()} normalises over dimension {layout.dim}, along which the samples lie")
    return layout


def _rows(call: Call, layout: Known, dims: int) -> Callable[[Tensor], Tensor]:
    """Brings tensors to (B, T, d), with d the last ``dims`` dimensions together."""
    batch_size = call.batch_size
    return lambda t: to_samples(t, layout, batch_size, dims).flatten(2)


@register_rule(F.layer_norm)
def layer_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    shape = tuple(normalized_shape)
    layout = _outside(call, input, shape)
    rows = _rows(call, layout, len(shape))

    return _normalisation(
        call,
        input,
        weight,
        bias,
        layout,
        run=lambda x, weight, bias: torch.native_layer_norm(x, shape, weight, bias, eps),
        input_grad=lambda g, x, weight, bias, mean, rstd: torch.ops.aten.native_layer_norm_backward(
            g, x, shape, mean, rstd, weight, bias, (True, False, False)
        )[0],
        plain=lambda x: F.layer_norm(x, shape, None, None, eps),
        arrange=lambda t: rows(t).unsqueeze(-1),
        arrange_statistics=rows,
        shape=shape,
        fused=True,
    )


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    shape = tuple(normalized_shape)
    layout = _outside(call, input, shape)
    rows = _rows(call, layout, len(shape))
    return _affine(call, F.rms_norm(input, shape, None, eps), weight, None, layout, lambda t: rows(t).unsqueeze(-1), shape)


def _channels(input: Tensor) -> tuple[int, ...]:
    return (input.shape[1], *(1,) * (input.dim() - 2))


def _images(call: Call, layout: Known) -> Callable[[Tensor], Tensor]:
    """Brings (B * R, d, *size) to (B, R, d, S)."""
    batch_size = call.batch_size
    return lambda t: _runs(t.flatten(2) if t.dim() > 2 else t.unsqueeze(-1), layout, batch_size)


def _dense_format(x: Tensor) -> torch.memory_format:
    """The order of memory in which torch's group norm works on ``x``."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.device.type == "cpu" and x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


@register_rule(F.group_norm)
def group_norm(call: Call, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    if (layout := call.layout(input, ragged=True)).dim != 0:
        raise call.unsupported("group_norm normalises over the dimension along which the samples lie")
    rows, channels, groups, batch_size = input.shape[0], input.shape[1], num_groups, call.batch_size
    sizes = (rows, channels, input.shape[2:].numel(), groups)

    def dense(x: Tensor, like: Tensor) -> Tensor:
        return x.contiguous(memory_format=_dense_format(like))

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        out: tuple[Tensor, ...] = torch.native_group_norm(dense(x, x), weight, bias, *sizes, eps)
        return out

    def input_grad(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        weight = None if weight is None else weight.contiguous()
        mask = (True, False, False)
        out: Tensor = torch.ops.aten.native_group_norm_backward(dense(g, x), dense(x, x), mean, rstd, weight, *sizes, mask)[0]
        return out

    return _normalisation(
        call,
        input,
        weight,
        bias,
        layout,
        run=run,
        input_grad=input_grad,
        plain=lambda x: F.group_norm(x, groups, None, None, eps),
        arrange=_images(call, layout),
        arrange_statistics=lambda t: _runs(t, layout, batch_size),
        shape=_channels(input),
        fused=_dense_format(input) == torch.contiguous_format,
    )


@register_rule(F.batch_norm)
def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    layout, shape, batch_size, rows = call.layout(input, ragged=True), _channels(input), call.batch_size, input.shape[0]
    if layout.dim != 0:
        raise call.unsupported("batch_norm's channels lie along the dimension of the samples")
    if running_mean is None or running_var is None:
        raise call.unsupported("batch_norm without running statistics uses those of the batch")

    def input_grad(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        return (g * (rstd if weight is None else rstd * weight).view(shape)).to(x.dtype)

    return _normalisation(
        call,
        input,
        weight,
        bias,
        layout,
        run=lambda x, weight, bias: (
            F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps),
            running_mean,
            (running_var + eps).rsqrt(),
        ),
        input_grad=input_grad,
        plain=lambda x: F.batch_norm(x, running_mean, running_var, None, None, False, momentum, eps),
        arrange=_images(call, layout),
        arrange_statistics=lambda t: _runs(t.expand(rows, -1), layout, batch_size),  # one group for each channel
        shape=shape,
    )


@register_rule(F.instance_norm)
def instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if (layout := call.layout(input, ragged=True)).dim != 0:
        raise call.unsupported("instance_norm's channels lie along the dimension of the samples")
    if not use_input_stats or running_mean is not None or input.shape[2:].numel() <= 1:
        normalised = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
        return _affine(call, normalised, weight, bias, layout, _images(call, layout), _channels(input))
    rows, channels, batch_size = input.shape[0], input.shape[1], call.batch_size

    def merged(t: Tensor) -> Tensor:  # as torch does it: batch norm of one sample that has all channels of all samples
        return t.reshape(1, rows * channels, *t.shape[2:])

    def repeated(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.repeat(rows)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        out, mean, rstd = torch.native_batch_norm(merged(x), repeated(weight), repeated(bias), None, None, True, momentum, eps)
        return out.view(x.shape), mean.view(rows, channels), rstd.view(rows, channels)

    def input_grad(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        statistics = (None, None, mean.flatten(), rstd.flatten())
        merged_grad = torch.ops.aten.native_batch_norm_backward(merged(g), merged(x), repeated(weight), *statistics, True, eps, (True, False, False))[0]
        out: Tensor = merged_grad.view(x.shape)
        return out

    return _normalisation(
        call,
        input,
        weight,
        bias,
        layout,
        run=run,
        input_grad=input_grad,
        plain=lambda x: F.instance_norm(x, None, None, None, None, True, momentum, eps),
        arrange=_images(call, layout),
        arrange_statistics=lambda t: _runs(t, layout, batch_size),  # one group for each channel
        shape=_channels(input),
        fused=True,
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# Mixtures of experts: one product for each group of rows


def _grouped_mm(call: Call, input: Tensor, weight: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """``y_r = x_r W_e``, ``input`` (n, p), ``weight`` (experts, p, d): rows up to ``offs[0]`` meet the first matrix, those up to ``offs[1]`` the second."""
    if not call.is_data(input) or not call.is_parameter(weight) or input.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None:
        out: Tensor = reference_call(call, input, weight, offs=offs, bias=bias, out_dtype=out_dtype)
        return out
    layout, batch_size, experts = call.layout(input, ragged=True), call.batch_size, len(weight)
    if layout.dim != 0:
        raise call.unsupported("the product sums over the dimension along which the samples lie")
    ends = offs.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends)]
    used = sum(sizes)

    def products(x: Tensor, weight: Tensor) -> Tensor:
        parts = [part @ matrix for part, matrix in zip(x[:used].split(sizes), weight)]
        return torch.cat([*parts, x.new_zeros(len(x) - used, weight.shape[-1])])

    def backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Callable[[], Any], ...]:
        def segments() -> Arranged:
            group = torch.arange(experts, device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
            outer = Segments(x[:used], g[:used], layout.rows(x, batch_size)[:used], batch_size, group, experts)  # (experts, d, p)
            return Arranged(outer, (experts, *weight.shape[:0:-1]), (0, 2, 1))

        return lambda: products(g, weight.mT), segments

    return call.fuse(lambda x, w: call.func(x, w, offs=offs, out_dtype=out_dtype), backward, (input,), (weight,), layout)


if hasattr(torch, "_grouped_mm"):
    register_rule(torch._grouped_mm)(_grouped_mm)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Embeddings


@register_rule(F.embedding)
def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table: ``g_i`` adds the gradients of sample i's tokens, equal tokens first."""
    if scale_grad_by_freq:
        raise BatchCouplingError(
            f"ghostgrad: '{call.operation}' of parameter {call.names()} scales gradients by a token's frequency in the batch (scale_grad_by_freq), so a "
            "sample's gradient depends on the others. Turn it off."
        )
    if not call.is_data(input):
        return reference_call(call, input, weight, padding_idx, max_norm, norm_type, False, sparse)
    layout, batch_size, rows = call.layout(input, ragged=True), call.batch_size, weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    if max_norm is not None:  # rescales the rows in place, as the function itself does
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)

    def forward(input: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(input, weight)

    def backward(g: Tensor, input: Tensor, weight: Tensor) -> tuple[Callable[[], Any] | None, ...]:
        def gathered() -> Gathered:
            index = to_samples(input, layout, batch_size, 0, fill=-1)  # (B, T)
            index = index if padding is None else index.masked_fill(index == padding, -1)
            return Gathered(index, to_samples(g, layout, batch_size), rows, sparse)

        return None, gathered

    return call.fuse(forward, backward, (input,), (weight,), layout)


@register_rule(F.embedding_bag)
def embedding_bag(
    call: Call,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding, then the sum, mean or maximum over each bag; bags given by offsets are one per sample."""
    if not call.is_parameter(weight) or (per_sample_weights is not None and call.is_parameter(per_sample_weights)):
        raise call.unsupported("only the table of an embedding bag may be a parameter")
    batch_size = call.batch_size
    if offsets is not None:  # ragged bags as rows of equal length, filled up with -1
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        starts = offsets[:-1] if include_last_offset else offsets
        if len(starts) != batch_size:
            raise call.unsupported(f"it has {len(starts)} bags for {batch_size} samples")
        place = starts[:, None] + torch.arange(int((ends - starts).max()) if batch_size else 0, device=input.device)
        inside = place < ends[:, None]
        place = place.clamp_max(max(len(input) - 1, 0))
        index = torch.where(inside, input[place], -1)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[place]
    else:
        call.layout(input)
        index = input
    kept = (index >= 0) if padding_idx is None else (index >= 0) & (index != padding_idx % weight.shape[0])
    rows = embedding(call, call.mark(index.clamp_min(0), PLAIN), weight, None, max_norm, norm_type, scale_grad_by_freq, sparse)  # (B, n, d)
    if mode == "max":
        out = rows.masked_fill(~kept[..., None], -torch.inf).amax(1) if index.shape[1] else rows.sum(1)
        return call.mark(out.masked_fill(~kept.any(1, keepdim=True), 0), PLAIN)
    share = kept.to(rows.dtype) if per_sample_weights is None else kept * per_sample_weights
    if mode == "mean":
        share = share / kept.sum(1, keepdim=True).clamp_min(1)
    return call.mark((rows * share[..., None]).sum(1), PLAIN)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Convolutions


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _pad(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The zeros to add on both sides of each dimension, in the order of :func:`torch.nn.functional.pad`."""
    if padding == "valid":
        return [0] * 2 * len(kernel)
    sides: list[int] = []
    for i, (k, d) in reversed(list(enumerate(zip(kernel, dilation)))):
        both = d * (k - 1)
        sides += [both // 2, both - both // 2] if padding == "same" else [_tuple(padding, len(kernel))[i]] * 2
    return sides


def _runs(x: Tensor, layout: Known, batch_size: int) -> Tensor:
    """(B * R, ...) with the samples along the first dimension, R rows each, as (B, R, ...); ragged rows are filled up with zeros."""
    if layout == PLAIN:
        return x.unsqueeze(1)
    if isinstance(layout, Ragged):
        return to_samples(x, layout, batch_size, x.dim() - 1)
    return x.unflatten(0, (layout.outer, batch_size, layout.inner)).movedim(1, 0).flatten(1, 2)


def _convolution(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any
) -> Tensor:
    dims = weight.dim() - 2
    layout, batch_size = call.layout(x, ragged=True), call.batch_size
    if layout.dim != 0 or x.dim() != dims + 2 or call.is_data(weight) or not call.is_parameter(weight) or x.is_complex():
        return _unfused(call, x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)
    stride, dilation, output_padding = _tuple(stride, dims), _tuple(dilation, dims), _tuple(output_padding, dims)
    kernel = tuple(weight.shape[2:])
    if not transposed:
        sides = _pad(padding, kernel, dilation)
        even = all(low == high for low, high in zip(sides[::2], sides[1::2]))
        x, zeros = (x, sides[::-2]) if even else (F.pad(x, sides), [0] * dims)
    else:
        zeros = list(_tuple(padding, dims))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.aten.convolution(x, weight, bias, stride, zeros, dilation, transposed, output_padding, groups)

    def backward(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Callable[[], Any], ...]:
        def input_grad() -> Tensor:
            sizes = (stride, zeros, dilation, transposed, output_padding, groups)
            return torch.ops.aten.convolution_backward(g, x, weight, None, *sizes, (True, False, False))[0]

        def patches() -> Patches:
            # A transposed convolution is the other one with input and output exchanged, and so is its weight's gradient.
            wide, narrow = (g, x) if transposed else (x, g)
            return Patches(_runs(wide, layout, batch_size), _runs(narrow, layout, batch_size), kernel, stride, tuple(zeros), dilation, groups)

        def shift() -> Affine:
            return Affine(Positions(_runs(g, layout, batch_size).flatten(3)), False, g.shape[1:2])  # (B, R, d, positions)

        return input_grad, patches, shift

    if bias is not None and not call.is_parameter(bias):
        return call.mark(call.fuse(run, backward, (x,), (weight, None), layout) + bias.view(-1, *(1,) * dims), layout)
    return call.fuse(run, backward, (x,), (weight, bias), layout)


def _unfused(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any
) -> Tensor:
    """A frozen weight with a bias of ours, or something unusual."""
    if not call.is_parameter(weight) and bias is not None and not call.is_data(weight) and x.dim() == weight.dim():
        layout = call.layout(x, ragged=True)
        plain = call.func(x, weight, None, stride, padding, *((output_padding, groups, dilation) if transposed else (dilation, groups)))
        return add(call, call.mark(plain, layout), call.derive(lambda t: t.view(-1, *(1,) * (weight.dim() - 2)), bias))
    out: Tensor = reference_call(call, *call.args, **call.kwargs)
    return out


@register_rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    return _convolution(call, input, weight, bias, stride, padding, dilation, groups, False, 0)


@register_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    return _convolution(call, input, weight, bias, stride, padding, dilation, groups, True, output_padding)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Small ones


@register_rule(F.prelu, torch.prelu, torch.Tensor.prelu)
def prelu(call: Call, input: Tensor, weight: Tensor) -> Tensor:
    """``max(x, 0) + w min(x, 0)``."""
    layout = call.layout(input, ragged=True)
    if input.dim() > 2:
        weight = call.derive(lambda w: w.view(-1, *(1,) * (input.dim() - 2)), weight)
    return call.mark(input.clamp_min(0) + mul(call, call.mark(input.clamp_max(0), layout), weight), layout)


@register_rule(F.bilinear, torch.bilinear)
def bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x1^T W_k x2``: linear in the outer product of the inputs."""
    if not call.is_parameter(weight) or not call.is_data(input1) or not call.is_data(input2):
        out: Tensor = reference_call(call, input1, input2, weight, bias)
        return out
    layout = call.layout(input1, input2, ragged=True)
    products = call.mark((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), layout)
    return linear(call, products, call.derive(lambda w: w.flatten(1), weight), bias)


@register_rule(torch.einsum)
def einsum(call: Call, equation: Any, *operands: Any, **kwargs: Any) -> Any:
    """Two operands, one of them a parameter: an outer product over the summed and the free indices, one for each of the shared ones."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    layout = propagated = None
    if isinstance(equation, str) and "->" not in equation:  # the indices that occur once, in alphabetical order
        letters = equation.replace(" ", "").replace(",", "")
        equation += "->" + "".join(sorted(i for i in set(letters) if letters.count(i) == 1))
    if isinstance(equation, str) and "." not in equation and len(tensors) == 2 and call.is_parameter(tensors[0]) != call.is_parameter(tensors[1]):
        left, out = equation.replace(" ", "").split("->")
        terms = left.split(",")
        if call.is_parameter(tensors[0]):
            tensors, terms = tensors[::-1], terms[::-1]
        (x, weight), (xs, ws) = tensors, terms
        repeated = any(len(set(term)) < len(term) for term in (xs, ws, out))
        layout = call.layout(x, ragged=True) if call.is_data(x) else None
        shared = [i for i in ws if i in xs and i in out]
        summed = [i for i in ws if i in xs and i not in out]
        free = [i for i in ws if i not in xs]
        alone = [i for i in xs if i not in ws and i not in out]
        if layout is not None and not repeated and not alone and all(i in out for i in free) and xs[layout.dim] not in ws:
            propagated = layout.at(out.index(xs[layout.dim]))
    if layout is None or propagated is None:
        return reference_call(call, equation, *operands, **kwargs)
    sample, batch_size = xs[layout.dim], call.batch_size
    rest = [i for i in xs if i in out and i not in shared and i != sample]  # positions

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum(f"{xs},{ws}->{out}", x, weight)

    def backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Callable[[], Any], ...]:
        def arranged(t: Tensor, term: str, own: list[str]) -> Tensor:
            """(B, *shared, T, product of ``own``)"""
            t = t.permute([term.index(i) for i in (sample, *shared, *rest, *own)])
            if isinstance(layout, Ragged):
                t = to_samples(t, layout.at(0), batch_size, t.dim() - 1).unsqueeze(1)  # (B, 1, rows, *shared, *rest, *own)
            else:
                t = t.unflatten(0, (layout.outer, batch_size, layout.inner)).movedim(1, 0)  # (B, outer, inner, *shared, *rest, *own)
            t = t.movedim((1, 2), (1 + len(shared), 2 + len(shared)))
            return t.reshape(*t.shape[: 1 + len(shared)], t.shape[1 + len(shared) : t.dim() - len(own)].numel(), t.shape[t.dim() - len(own) :].numel())

        def outer() -> Any:
            a, b = arranged(x.conj(), xs, summed), arranged(g, out, free)  # conj is the identity on real tensors
            return Arranged(Outer(a, b), [weight.shape[ws.index(i)] for i in (*shared, *free, *summed)], [[*shared, *free, *summed].index(i) for i in ws])

        return lambda: torch.einsum(f"{out},{ws}->{xs}", g, weight.conj()), outer

    return call.fuse(forward, backward, (x,), (weight,), propagated)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Functions that are written in Python: run as they are, watched from inside


@register_rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(call: Call, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """With a parameter as the mask (a relative position bias), which broadcasts against the scores."""
    if attn_mask is None or not call.is_parameter(attn_mask) or not all(map(call.is_data, (query, key, value))):
        return reference_call(call, query, key, value, attn_mask, *args, **kwargs)
    layout = call.layout(query, key, value, ragged=True)
    mask = call.expand(attn_mask, (*query.shape[:-1], key.shape[-2]), layout)
    return call.mark(F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs), layout)


_MULTI_HEAD_ATTENTION = body(F.multi_head_attention_forward)


@register_rule(F.multi_head_attention_forward)
def multi_head_attention(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Packed or separate projections, attention, output projection: torch's own code, each of its operations intercepted in turn."""
    with call.resumed():
        return _MULTI_HEAD_ATTENTION(*args, **kwargs)
