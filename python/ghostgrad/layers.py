"""Rules of layers: normalisation, embeddings, convolutions, attention, recurrent networks.

Each says what the layer is in terms of contributions or of the rules that are there (:mod:`ghostgrad.rules`); importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contributions import Arranged, Full, Gathered, Outer, Patches
from .errors import BatchCouplingError
from .layout import PLAIN, Layout
from .rules import Call, add, body, linear, mul, reference_call, register_rule

__all__: list[str] = []


# ---------------------------------------------------------------------------------------------------------------------------------------
# Normalisation: the affine part is a broadcast multiply and add


def _affine(call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    for parameter, combine, plain in ((weight, mul, torch.mul), (bias, add, torch.add)):
        if parameter is None:
            continue
        if call.is_parameter(parameter):
            x = combine(call, x, parameter if parameter.shape == shape else call.derive(lambda t: t.view(shape), parameter))
        else:
            x = call.mark(plain(x, parameter.view(shape)), call.layout(x))
    return x


@register_rule(F.layer_norm)
def layer_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    layout, shape = call.layout(input), tuple(normalized_shape)
    if layout.dim >= input.dim() - len(shape):
        raise BatchCouplingError(f"ghostgrad: '{call.operation}' of {call.names()} normalises over dimension {layout.dim}, along which the samples lie")
    return _affine(call, call.mark(F.layer_norm(input, shape, None, None, eps), layout), weight, bias, shape)


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    layout, shape = call.layout(input), tuple(normalized_shape)
    if layout.dim >= input.dim() - len(shape):
        raise BatchCouplingError(f"ghostgrad: '{call.operation}' of {call.names()} normalises over dimension {layout.dim}, along which the samples lie")
    return _affine(call, call.mark(F.rms_norm(input, shape, None, eps), layout), weight, None, shape)


def _channels(input: Tensor) -> tuple[int, ...]:
    return (input.shape[1], *(1,) * (input.dim() - 2))


@register_rule(F.group_norm)
def group_norm(call: Call, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    if (layout := call.layout(input)) != PLAIN and layout.dim != 0:
        raise call.unsupported("group_norm normalises over the dimension along which the samples lie")
    return _affine(call, call.mark(F.group_norm(input, num_groups, None, None, eps), layout), weight, bias, _channels(input))


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
    layout = call.layout(input)
    if layout.dim != 0:
        raise call.unsupported("batch_norm's channels lie along the dimension of the samples")
    normalised = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(call, call.mark(normalised, layout), weight, bias, _channels(input))


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
    if (layout := call.layout(input)).dim != 0:
        raise call.unsupported("instance_norm's channels lie along the dimension of the samples")
    normalised = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(call, call.mark(normalised, layout), weight, bias, _channels(input))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Embeddings


def _samples_first(x: Tensor, layout: Layout, batch_size: int, rest: int) -> Tensor:
    """``x`` as (B, T, *last ``rest`` dimensions)."""
    if layout != PLAIN:
        x = x.unflatten(layout.dim, (layout.outer, batch_size, layout.inner)).movedim(layout.dim + 1, 0)
    return x.reshape(batch_size, x[:1].numel() // max(x.shape[x.dim() - rest :].numel(), 1) if batch_size else 0, *x.shape[x.dim() - rest :])


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
    layout, batch_size, rows = call.layout(input), call.batch_size, weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    if max_norm is not None:  # rescales the rows in place, as the function itself does
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)

    def forward(input: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(input, weight)

    def backward(g: Tensor, input: Tensor, weight: Tensor) -> tuple[Callable[[], Any] | None, ...]:
        def gathered() -> Gathered:
            index = _samples_first(input, layout, batch_size, 0)  # (B, T)
            index = index if padding is None else index.masked_fill(index == padding, -1)
            return Gathered(index, _samples_first(g, layout, batch_size, 1), rows, sparse)

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


def _runs(x: Tensor, layout: Layout, batch_size: int) -> Tensor:
    """(B * R, ...) with the samples along the first dimension, R rows each, as (B, R, ...)."""
    return x.unflatten(0, (layout.outer, batch_size, layout.inner)).movedim(1, 0).flatten(1, 2)


def _convolution(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any
) -> Tensor:
    dims = weight.dim() - 2
    layout, batch_size = call.layout(x), call.batch_size
    if layout.dim != 0 or x.dim() != dims + 2 or call.is_data(weight) or not call.is_parameter(weight):
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

        return input_grad, patches, lambda: Full(_runs(g, layout, batch_size).transpose(1, 2).flatten(2).sum(2))

    if bias is not None and not call.is_parameter(bias):
        return call.mark(call.fuse(run, backward, (x,), (weight, None), layout) + bias.view(-1, *(1,) * dims), layout)
    return call.fuse(run, backward, (x,), (weight, bias), layout)


def _unfused(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any
) -> Tensor:
    """A frozen weight with a bias of ours, or something unusual."""
    if not call.is_parameter(weight) and bias is not None and not call.is_data(weight) and x.dim() == weight.dim():
        layout = call.layout(x)
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
    layout = call.layout(input)
    if input.dim() > 2:
        weight = call.derive(lambda w: w.view(-1, *(1,) * (input.dim() - 2)), weight)
    return call.mark(input.clamp_min(0) + mul(call, call.mark(input.clamp_max(0), layout), weight), layout)


@register_rule(F.bilinear, torch.bilinear)
def bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x1^T W_k x2``: linear in the outer product of the inputs."""
    if not call.is_parameter(weight) or not call.is_data(input1) or not call.is_data(input2):
        out: Tensor = reference_call(call, input1, input2, weight, bias)
        return out
    layout = call.layout(input1, input2)
    products = call.mark((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), layout)
    return linear(call, products, call.derive(lambda w: w.flatten(1), weight), bias)


@register_rule(torch.einsum)
def einsum(call: Call, equation: Any, *operands: Any, **kwargs: Any) -> Any:
    """Two operands, one of them a parameter: an outer product over the summed and the free indices, one for each of the shared ones."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    layout = propagated = None
    if (
        isinstance(equation, str)
        and "->" in equation
        and "." not in equation
        and len(tensors) == 2
        and call.is_parameter(tensors[0]) != call.is_parameter(tensors[1])
    ):
        left, out = equation.replace(" ", "").split("->")
        terms = left.split(",")
        if call.is_parameter(tensors[0]):
            tensors, terms = tensors[::-1], terms[::-1]
        (x, weight), (xs, ws) = tensors, terms
        repeated = any(len(set(term)) < len(term) for term in (xs, ws, out))
        layout = call.layout(x) if call.is_data(x) else None
        shared = [i for i in ws if i in xs and i in out]
        summed = [i for i in ws if i in xs and i not in out]
        free = [i for i in ws if i not in xs]
        alone = [i for i in xs if i not in ws and i not in out]
        if layout is not None and not repeated and not alone and all(i in out for i in free) and xs[layout.dim] not in ws:
            propagated = Layout(out.index(xs[layout.dim]), layout.outer, layout.inner)
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
            t = t.unflatten(0, (layout.outer, batch_size, layout.inner)).movedim(1, 0)  # (B, outer, inner, *shared, *rest, *own)
            t = t.movedim((1, 2), (1 + len(shared), 2 + len(shared)))
            t = t.reshape(*t.shape[: 1 + len(shared)], t.shape[1 + len(shared) :].numel() // max(t.shape[t.dim() - len(own) :].numel(), 1), -1)
            return t

        def outer() -> Any:
            a, b = arranged(x, xs, summed), arranged(g, out, free)
            return Arranged(Outer(a, b), [weight.shape[ws.index(i)] for i in (*shared, *free, *summed)], [[*shared, *free, *summed].index(i) for i in ws])

        return lambda: torch.einsum(f"{out},{ws}->{xs}", g, weight), outer

    return call.fuse(forward, backward, (x,), (weight,), propagated)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Functions that are written in Python: run as they are, watched from inside


@register_rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(call: Call, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """With a parameter as the mask (a relative position bias), which broadcasts against the scores."""
    if attn_mask is None or not call.is_parameter(attn_mask) or not all(map(call.is_data, (query, key, value))):
        return reference_call(call, query, key, value, attn_mask, *args, **kwargs)
    layout = call.layout(query, key, value)
    mask = call.expand(attn_mask, (*query.shape[:-1], key.shape[-2]), layout)
    return call.mark(F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs), layout)


_MULTI_HEAD_ATTENTION = body(F.multi_head_attention_forward)


@register_rule(F.multi_head_attention_forward)
def multi_head_attention(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Packed or separate projections, attention, output projection: torch's own code, each of its operations intercepted in turn."""
    with call.resumed():
        return _MULTI_HEAD_ATTENTION(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Recurrent networks: the fused calls, written out in operations that have rules


def _cell(kind: str, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], biased: bool) -> tuple[Tensor, ...]:
    """One step: ``x`` is the projected input (B, gates), ``state`` (h,) or (h, c)."""
    h = state[0]
    recurrent = F.linear(h, weights[1], weights[3] if biased else None)
    if kind in ("rnn_tanh", "rnn_relu"):
        return (torch.tanh(x + recurrent) if kind == "rnn_tanh" else torch.relu(x + recurrent),)
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), recurrent.chunk(3, -1)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return (torch.lerp(torch.tanh(xn + reset * hn), h, update),)
    i, f, g, o = (x + recurrent).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if len(weights) > 2 + 2 * biased:  # a projected state
        h = F.linear(h, weights[-1])
    return h, c


def _fused_recurrent(call: Call, input: Tensor, hx: Any, flat: Any, *rest: Any) -> Any:
    kind = call.operation
    if isinstance(flat, Tensor) or len(rest) < 6:
        raise call.unsupported("packed sequences are not supported; pad the sequences and mask the loss")
    biased, num_layers, dropout, training, bidirectional, batch_first = rest[:6]
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)  # (layers * directions, B, H) each
    layout = call.layout(input)
    if (layout != Layout(0 if batch_first else 1) and call.batch_size != 1) or input.dim() != 3:
        raise call.unsupported(
            f"its input of shape {tuple(input.shape)} must carry the samples along dimension {0 if batch_first else 1} (batch_first={batch_first})"
        )
    directions = 2 if bidirectional else 1
    per_cell = len(flat) // (num_layers * directions)
    with call.resumed():
        x = input if batch_first else input.transpose(0, 1)  # (B, T, p)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                which = layer * directions + direction
                weights = flat[which * per_cell : (which + 1) * per_cell]
                state = tuple(call.mark(s[which], PLAIN) for s in states)
                projected = F.linear(x, weights[0], weights[2] if biased else None)
                steps: list[Tensor] = []
                order = range(x.shape[1]) if direction == 0 else range(x.shape[1] - 1, -1, -1)
                for t in order:
                    state = _cell(kind, projected[:, t], state, weights, biased)
                    steps.append(state[0])
                outputs.append(torch.stack(steps if direction == 0 else steps[::-1], 1))
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and training and layer + 1 < num_layers:
                x = F.dropout(x, dropout)
        final = [torch.stack([state[i] for state in last]) for i in range(len(states))]
        return (x if batch_first else x.transpose(0, 1), *final)


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    register_rule(getattr(torch, _name))(_fused_recurrent)


def _fused_cell(call: Call, input: Tensor, hx: Any, *weights: Tensor | None) -> Any:
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    biased = len(weights) > 3 and weights[2] is not None
    with call.resumed():
        states = tuple(s if call.is_data(s) else call.mark(s, PLAIN) for s in states)
        projected = F.linear(input, weights[0], weights[2] if biased else None)  # type: ignore[arg-type]
        new = _cell(call.operation.removesuffix("_cell"), projected, states, weights[: 4 if biased else 2], biased)  # type: ignore[arg-type]
    return new if len(states) > 1 else new[0]


for _name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
    register_rule(getattr(torch, _name))(_fused_cell)
