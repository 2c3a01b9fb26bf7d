"""Rules of recurrent networks.

A layer in one direction is one autograd node (:func:`_layer`). Its forward runs the steps in place, in buffers that hold all of them. What a gate's gradient
is a multiple of, the state's, its backward computes for all steps at once; the loop back over time then only carries the states' gradients, and leaves those of
all gates in one buffer. So every parameter has one use, with T positions.

What that does not cover (packed and projected sequences, autocast, a graph that is traced) is written out in operations that have rules, step by step, as is
the backward pass when it has to be differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contributions import Affine, Outer, Positions
from .layout import PLAIN, Known, placed, sequences, to_samples
from .rules import Call, reference_call, register_rule
from .samplewise import tracing

__all__: list[str] = []

States = tuple[Tensor, ...]  # (h,) or (h, c), (sequences, H) each


class Direction(NamedTuple):
    """What a layer is in one direction."""

    kind: str
    weights: Sequence[Tensor]  # as torch lists them: w_ih, w_hh, the two biases, and the projection of an LSTM's state
    biased: bool
    reverse: bool

    @property
    def w_ih(self) -> Tensor:
        return self.weights[0]

    @property
    def w_hh(self) -> Tensor:
        return self.weights[1]

    @property
    def b_ih(self) -> Tensor | None:
        return self.weights[2] if self.biased else None

    @property
    def b_hh(self) -> Tensor | None:
        return self.weights[3] if self.biased else None

    @property
    def projection(self) -> Tensor | None:
        return self.weights[-1] if len(self.weights) > (4 if self.biased else 2) else None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Step by step


def _cell(kind: str, x: Tensor, recurrent: Tensor, state: States) -> States:
    """One step, from the projected input and the projected state, (sequences, gates) each."""
    if kind in ("rnn_tanh", "rnn_relu"):
        return (torch.tanh(x + recurrent) if kind == "rnn_tanh" else torch.relu(x + recurrent),)
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), recurrent.chunk(3, -1)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        new = torch.tanh(xn + reset * hn)
        return (new + update * (state[0] - new),)  # not lerp: under autocast the state is wide and the gates are narrow
    i, f, g, o = (x + recurrent).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _run_steps(
    kind: str, steps: Sequence[Tensor], initial: States, project: Callable[[Tensor], Tensor], reverse: bool, shrink: Tensor | None = None
) -> tuple[list[Tensor], States]:
    """One layer in one direction, from projected inputs (sequences, gates) for each step. Sequences come longest first: later steps may have fewer. Gives
    the outputs of the steps and the last state of every sequence. ``project`` is the product with the recurrent weight; ``shrink`` projects the new state."""
    outputs: list[Tensor] = []
    ended: list[States] = []
    state = tuple(s[: len(steps[-1])] for s in initial) if reverse else initial
    for x in steps[::-1] if reverse else steps:
        running, count = len(state[0]), len(x)
        if count < running:
            ended.append(tuple(s[count:] for s in state))
            state = tuple(s[:count] for s in state)
        elif count > running:
            state = tuple(torch.cat([s, start[running:count]]) for s, start in zip(state, initial))
        state = _cell(kind, x, project(state[0]), state)
        if shrink is not None:
            state = F.linear(state[0], shrink), *state[1:]
        outputs.append(state[0])
    last = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(state, *ended[::-1]))
    return outputs[::-1] if reverse else outputs, last


# ---------------------------------------------------------------------------------------------------------------------------------------
# All steps as one node. Buffers are time-major; lists of their rows come in the order in which the steps run.


def _in_order(buffer: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    return buffer.unbind(0)[:: -1 if reverse else 1]


def _trajectory(initial: Tensor, steps: int, reverse: bool) -> Tensor:
    """(steps + 1, sequences, H): room for a state before, between and after the steps, with the initial one in its place."""
    states = initial.new_empty(steps + 1, *initial.shape)
    states[-1 if reverse else 0] = initial
    return states


def _before_and_after(states: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states that the steps start from and those that they give, (steps, sequences, H) each."""
    return (states[1:], states[:-1]) if reverse else (states[:-1], states[1:])


def _forward_rnn(kind: str, z: Tensor, initial: States, w: Tensor, b: Tensor | None, reverse: bool) -> tuple[Tensor, ...]:
    states = _trajectory(initial[0], len(z), reverse)
    rows, w = _in_order(states, reverse), w.t()
    for x, h, new in zip(_in_order(z, reverse), rows, rows[1:]):
        x.addmm_(h, w)
        torch.tanh(x, out=new) if kind == "rnn_tanh" else torch.clamp_min(x, 0, out=new)
    return (states,)


def _backward_rnn(kind: str, grads: Sequence[Tensor], last: States, kept: States, w: Tensor, reverse: bool) -> tuple[Tensor, Tensor, States]:
    after = _before_and_after(kept[0], reverse)[1]
    b = torch.ops.aten.tanh_backward(torch.ones_like(after), after) if kind == "rnn_tanh" else (after > 0).to(after.dtype)
    dh = last[0]
    for own, g in zip(_in_order(b, not reverse), grads):
        own.mul_(dh.add_(g))
        torch.mm(own, w, out=dh)
    return b, b, (dh,)


def _forward_gru(kind: str, z: Tensor, initial: States, w: Tensor, b: Tensor | None, reverse: bool) -> tuple[Tensor, ...]:
    size = initial[0].shape[-1]
    states, recurrent = _trajectory(initial[0], len(z), reverse), z.new_empty(*z.shape[:-1], size)
    rows, gates, new_gate = _in_order(states, reverse), w[: 2 * size].t(), w[2 * size :].t()
    bias = z.new_zeros(size) if b is None else b[2 * size :]
    parts = (_in_order(t, reverse) for t in (z[..., : 2 * size], z[..., :size], z[..., size : 2 * size], z[..., 2 * size :], recurrent))
    for both, reset, update, n, hn, h, new in zip(*parts, rows, rows[1:]):
        both.addmm_(h, gates).sigmoid_()
        torch.addmm(bias, h, new_gate, out=hn)
        n.addcmul_(reset, hn).tanh_()
        torch.lerp(n, h, update, out=new)
    return states, z, recurrent


def _backward_gru(kind: str, grads: Sequence[Tensor], last: States, kept: States, w: Tensor, reverse: bool) -> tuple[Tensor, Tensor, States]:
    states, gates, recurrent = kept
    (reset, update, n), (before, _) = gates.chunk(3, -1), _before_and_after(states, reverse)
    size, aten = n.shape[-1], torch.ops.aten
    # What the gradient of h is multiplied by: for the reset gate, the update gate, the new gate's recurrent and its input product.
    b = states.new_empty(*n.shape[:-1], 4 * size)
    br, bz, bh, bx = b.chunk(4, -1)
    aten.tanh_backward.grad_input(1 - update, n, grad_input=bx)
    aten.sigmoid_backward.grad_input(bx * recurrent, reset, grad_input=br)
    aten.sigmoid_backward.grad_input(before - n, update, grad_input=bz)
    torch.mul(bx, reset, out=bh)
    dh = last[0]
    for own, product, u, g in zip(*(_in_order(t, not reverse) for t in (b.unflatten(-1, (4, size)), b[..., : 3 * size], update)), grads):
        own.mul_(dh.add_(g).unsqueeze(1))
        dh = dh.mul_(u).addmm_(product, w)
    return torch.cat([b[..., : 2 * size], bx], -1), b[..., : 3 * size], (dh,)


def _forward_lstm(kind: str, z: Tensor, initial: States, w: Tensor, b: Tensor | None, reverse: bool) -> tuple[Tensor, ...]:
    size, w = initial[0].shape[-1], w.t()
    states, cells = (_trajectory(s, len(z), reverse) for s in initial)
    tanh_c = states.new_empty(*z.shape[:-1], size)
    h_rows, c_rows = _in_order(states, reverse), _in_order(cells, reverse)
    parts = (_in_order(t, reverse) for t in (z, z[..., : 2 * size], *z.chunk(4, -1), tanh_c))
    for x, both, i, f, g, o, tanh, h, new_h, c, new_c in zip(*parts, h_rows, h_rows[1:], c_rows, c_rows[1:]):
        x.addmm_(h, w)
        both.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=new_c).addcmul_(i, g)
        torch.mul(torch.tanh(new_c, out=tanh), o, out=new_h)
    return states, cells, tanh_c, z


def _backward_lstm(kind: str, grads: Sequence[Tensor], last: States, kept: States, w: Tensor, reverse: bool) -> tuple[Tensor, Tensor, States]:
    _, cells, tanh_c, gates = kept
    (i, f, g, o), (before, _) = gates.chunk(4, -1), _before_and_after(cells, reverse)
    size, aten = g.shape[-1], torch.ops.aten
    # What the gradient of c is multiplied by for the first three gates, that of h for the output gate and for c.
    b = torch.empty_like(gates)
    bi, bf, bg, bo = b.chunk(4, -1)
    aten.sigmoid_backward.grad_input(g, i, grad_input=bi)
    aten.sigmoid_backward.grad_input(before, f, grad_input=bf)
    aten.tanh_backward.grad_input(i, g, grad_input=bg)
    aten.sigmoid_backward.grad_input(tanh_c, o, grad_input=bo)
    to_c = aten.tanh_backward(o, tanh_c)
    dh, dc = last
    parts = (_in_order(t, not reverse) for t in (b, b[..., : 3 * size].unflatten(-1, (3, size)), bo, to_c, f))
    for own, three, output, factor, forget, grad in zip(*parts, grads):
        dc.addcmul_(dh.add_(grad), factor)
        three.mul_(dc.unsqueeze(1))
        output.mul_(dh)
        dc.mul_(forget)
        torch.mm(own, w, out=dh)
    return b, b, (dh, dc)


_FORWARD = {"lstm": _forward_lstm, "gru": _forward_gru, "rnn_tanh": _forward_rnn, "rnn_relu": _forward_rnn}
_BACKWARD = {"lstm": _backward_lstm, "gru": _backward_gru, "rnn_tanh": _backward_rnn, "rnn_relu": _backward_rnn}


def _input_product(kind: str, x: Tensor, w: Tensor, b: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """``x W_ih^T`` with all biases that are added to it; that of a GRU's new gate is multiplied by the reset gate before."""
    if b is not None and b_hh is not None and kind == "gru":
        gates = len(b) // 3 * 2
        b = torch.cat([b[:gates] + b_hh[:gates], b[gates:]])
    elif b is not None and b_hh is not None:
        b = b + b_hh
    return F.linear(x, w, b)


def _layer(call: Call, x: Tensor, initial: States, own: Direction, layout: Known, owner: Known) -> tuple[Tensor, States]:
    """One layer in one direction as one node: from ``x`` (T, sequences, p) the outputs (T, sequences, H) and the last states."""
    batch_size, kind, reverse, count = call.batch_size, own.kind, own.reverse, len(initial)

    def forward(x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        initial, (w_ih, w_hh, b_ih, b_hh) = tensors[:count], tensors[count:]
        kept = _FORWARD[kind](kind, _input_product(kind, x, w_ih, b_ih, b_hh), initial, w_hh, b_hh, reverse)
        results = _before_and_after(kept[0], reverse)[1], *(_in_order(s, reverse)[-1] for s in kept[:count])
        return *(t.clone() for t in results), *kept  # may be written into; the buffers must stay

    def backward(*tensors: Any) -> tuple[Callable[[], Any], ...]:
        g, last, x, initial = tensors[0], tensors[1 : 1 + count], tensors[1 + count], tensors[2 + count : 2 + 2 * count]
        weights, kept = tensors[2 + 2 * count : 6 + 2 * count], tensors[6 + 2 * count :]
        if torch.is_grad_enabled():
            before, by_input, by_state, of_initial = _differentiable(kind, g, last, x, initial, weights, reverse)
        else:
            grads = [x.new_zeros(())] * len(x) if g is None else _in_order(g, not reverse)
            ends = tuple(torch.zeros_like(s) if end is None else end.clone() for s, end in zip(initial, last))
            before = _before_and_after(kept[0], reverse)[0]
            by_input, by_state, of_initial = _BACKWARD[kind](kind, grads, ends, kept, weights[1], reverse)

        def outer(a: Tensor, b: Tensor) -> Outer:
            return Outer(to_samples(a, layout, batch_size), to_samples(b, layout, batch_size))  # (B, T, .)

        def shift(b: Tensor) -> Positions:
            return Positions(to_samples(b, layout, batch_size).unsqueeze(-1))  # (B, T, gates, 1)

        shifts = (shift(by_input),) * 2 if by_state is by_input else (shift(by_input), shift(by_state))
        return (
            lambda: by_input @ weights[0],
            *(lambda s=s: s for s in of_initial),
            functools.partial(outer, x, by_input),
            functools.partial(outer, before, by_state),
            *(functools.partial(Affine, positions, False, by_input.shape[-1:]) for positions in shifts),
        )

    parameters = own.w_ih, own.w_hh, own.b_ih, own.b_hh
    outputs, *last = call.fuse_many(forward, backward, (x, *initial), parameters, [layout, *[owner] * count])
    return outputs, tuple(last)


def _differentiable(
    kind: str, g: Tensor | None, last: Sequence[Tensor | None], x: Tensor, initial: States, weights: Sequence[Tensor | None], reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """What the backward pass gives, in differentiable operations: the layer runs again step by step. In the order of time: the states before the steps, the
    gradients of the input and of the recurrent products (T, sequences, gates); and the gradients of the initial states."""
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None and w_hh is not None
    before: list[Tensor] = []
    products: list[Tensor] = []

    def project(h: Tensor) -> Tensor:
        before.append(h)
        products.append(F.linear(h, w_hh, b_hh))
        return products[-1]

    initial = tuple(s.view_as(s) for s in initial)  # aliases: what else depends on a state is not of this layer
    inputs = F.linear(x, w_ih, b_ih)
    outputs, final = _run_steps(kind, inputs.unbind(0), initial, project, reverse)
    results = [(t, grad) for t, grad in zip((torch.stack(outputs), *final), (g, *last)) if grad is not None]
    targets = (inputs, *products, *initial)
    found = iter(
        torch.autograd.grad(
            [t for t, _ in results],
            [t for t in targets if t.requires_grad],
            [grad for _, grad in results],
            create_graph=True,
            materialize_grads=True,
        )
    )
    by_input, *others = (next(found) if t.requires_grad else torch.zeros_like(t) for t in targets)
    by_state, of_initial = others[: len(products)], others[len(products) :]
    order = slice(None, None, -1 if reverse else 1)
    return torch.stack(before[order]), by_input, torch.stack(by_state[order]), of_initial


# ---------------------------------------------------------------------------------------------------------------------------------------
# The rules


def _fused_recurrent(call: Call, input: Tensor, *args: Any) -> Any:
    """Layer by layer, direction by direction. A packed sequence, whose rows come step by step, is one with fewer and fewer rows per step."""
    kind, packed = call.operation, isinstance(args[2], (list, tuple))
    sizes, (hx, flat, biased, num_layers, dropout, training, bidirectional, *rest) = (args[0].tolist(), args[1:]) if packed else (None, args)
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)  # (layers * directions, sequences, H) each
    along = 0 if packed or rest[0] else 1
    layout = call.layout(input, ragged=True)
    if layout.dim != along and call.batch_size != 1:
        raise call.unsupported(f"its input of shape {tuple(input.shape)} must carry the samples along dimension {along}")
    if call.batch_size == 1:
        owner: Known | None = PLAIN
    elif packed:
        first = sequences(layout.rows(input, call.batch_size), args[0])
        owner = None if first is None else placed(0, first, call.batch_size)
    else:
        owner = layout.at(0)
    if owner is None:
        raise call.unsupported("the steps of a packed sequence belong to several samples")
    if any(call.is_data(s) and call.layout(s, ragged=True) != owner.at(1) for s in states) and call.batch_size != 1 and not call.tap._pass.recomputing:
        raise call.unsupported("its initial states do not belong to the samples to which its sequences belong, in that order")
    states = tuple(call.mark(call.expand(s, s.shape, owner.at(1)), owner.at(1)) if call.is_parameter(s) else s for s in states)
    directions = 2 if bidirectional else 1
    per_cell = len(flat) // (num_layers * directions)
    cells = [Direction(kind, flat[i : i + per_cell], biased, bidirectional and i // per_cell % 2 == 1) for i in range(0, len(flat), per_cell)]
    x = input if packed or not rest[0] else call.mark(input.transpose(0, 1), layout.at(1))  # (T, sequences, p), or packed (rows, p)
    layout = call.layout(x, ragged=True)
    last: list[States] = []
    for layer in range(num_layers):
        outputs = []
        for which in range(layer * directions, (layer + 1) * directions):
            initial = tuple(call.mark(s[which], owner) for s in states)
            out, final = _run(call, x, initial, cells[which], owner, sizes)
            outputs.append(out)
            last.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and layer + 1 < num_layers:
            x = F.dropout(x, dropout)
        call.mark(x, layout)
    final_states = [call.mark(torch.stack([state[i] for state in last]), owner.at(1)) for i in range(len(states))]
    return (x if packed or not rest[0] else call.mark(x.transpose(0, 1), layout.at(0)), *final_states)


def _run(call: Call, x: Tensor, initial: States, own: Direction, owner: Known, sizes: Sequence[int] | None = None) -> tuple[Tensor, States]:
    """One layer in one direction: as one node, or in operations that have rules."""
    usual = sizes is None and own.projection is None and all(t.dtype == x.dtype for t in (*own.weights, *initial))
    if usual and not tracing() and not torch.is_autocast_enabled(x.device.type) and not any(map(call.is_data, own.weights)):
        return _layer(call, x, initial, own, call.layout(x, ragged=True), owner)
    with call.resumed():
        projected = F.linear(x, own.w_ih, own.b_ih)
        inputs = projected.unbind(0) if sizes is None else projected.split(sizes)
        steps, final = _run_steps(own.kind, inputs, initial, lambda h: F.linear(h, own.w_hh, own.b_hh), own.reverse, own.projection)
        return torch.stack(steps) if sizes is None else torch.cat(steps), final


for _name in _FORWARD:
    register_rule(getattr(torch, _name))(_fused_recurrent)


def _fused_cell(call: Call, input: Tensor, hx: Any, *weights: Tensor | None) -> Any:
    """A layer of one step."""
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    data = [t for t in (input, *states) if call.is_data(t)]
    if not data:
        return reference_call(call, input, hx, *weights)
    layout = call.layout(*data, ragged=True)
    x, *initial = (t if call.is_data(t) else call.mark(call.expand(t, t.shape, layout) if call.is_parameter(t) else t, layout) for t in (input, *states))
    given = [w for w in weights if w is not None]
    own = Direction(call.operation.removesuffix("_cell"), given, len(given) == 4, False)
    _, new = _run(call, call.mark(x.unsqueeze(0), layout.at(1)), tuple(initial), own, layout)
    return new if len(new) > 1 else new[0]


for _name in _FORWARD:
    register_rule(getattr(torch, f"{_name}_cell"))(_fused_cell)
