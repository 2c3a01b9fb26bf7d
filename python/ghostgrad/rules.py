"""What happens to an intercepted call that uses a parameter: from function to op.

A *rule* is the fused form of ``operation after expand_tap`` for one operation. It gets the :class:`Call` and the arguments of the intercepted function
and returns the function's result; on the way it attaches to each parameter how the per-sample gradients follow from what the backward pass
brings: a *contribution* (:mod:`ghostgrad.contributions`). Whatever has no rule takes :func:`reference_call`, which gives every sample its
own copy of the parameter and is exact for any operation. A rule must equal that reference; it differs in cost alone.

Add a rule of your own with :func:`register_rule`::

    @gg.register_rule(scaled_linear)                      # a function that torch can intercept
    def _(call, x, weight, scale):
        return gg.rules.linear(call, x, weight) * scale   # said in terms of a rule that is there

    @gg.register_rule(torch.nn.functional.bilinear)       # or from scratch
    def _(call, x1, x2, weight, bias=None):
        ...
        return call.fuse(forward, backward, (x1, x2), (weight,), layout)

See :meth:`Call.fuse` for the two functions.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops
from .contributions import Affine, Contribution, Full, Outer, Positions, Rows, Segments
from .errors import BatchCouplingError, UnsupportedUseError
from .layout import ELEMENTWISE, PLAIN, AnyLayout, Known, Layout, Mixed, Ragged, propagate, single, sum_samples, to_rows, to_samples
from .samplewise import agree, map_samples, static, tracing, tried

__all__ = ["Call", "expand_tap", "linear", "reference_call", "register_rule", "rule_for"]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The meaning of everything here


class _ExpandTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, tap: Tensor) -> Tensor:
        return p.detach().expand(tap.shape[0], *p.shape)

    @staticmethod
    def backward(ctx: Any, per_sample: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample.sum(0), ops.row_sqnorm(per_sample)


def expand_tap(
    p: Tensor,  # (...)
    tap: Tensor,  # (B,) zeros that require a gradient
) -> Tensor:  # (B, ...)
    """``P = p.expand(B, ...)``, with the gradient of ``tap_i`` *defined* as ``||d loss / d P[i]||^2``.

    This is the reference meaning of the library: give sample i the copy ``P[i]``, run any operation, and backward leaves the squared norms of the
    per-sample gradients in ``tap.grad`` and their sum, as always, in ``p.grad``. Costs B copies of the gradient of ``p``. Differentiable twice.
    """
    out: Tensor = _ExpandTap.apply(p, tap)
    return out


# ---------------------------------------------------------------------------------------------------------------------------------------
# Where contributions go


class Sink(Protocol):
    """Where the contributions of one use of one parameter go (the tap implements it)."""

    def wanted(self) -> bool | None:
        """True: give a contribution. None: the parameter's gradient is not needed at all. False: give the plain gradient."""

    def add(self, contribution: Contribution) -> None: ...


def _deliver(sink: Sink, contribution: Callable[[], Contribution]) -> Tensor | None:
    wanted = sink.wanted()
    if wanted is None:
        return None
    if wanted:
        sink.add(contribution())
        return None  # the weight gradient is formed where all uses of the parameter meet
    return contribution().total()


# ---------------------------------------------------------------------------------------------------------------------------------------
# The two autograd nodes that rules are made of


def _summed(g: Tensor, layout: Known, batch_size: int, shape: Sequence[int]) -> Full:
    """The gradients of something of that shape that was broadcast over the samples, given those of the result."""
    g = sum_samples(g, layout, batch_size).unsqueeze(1 + layout.dim)  # (B, ..., 1, ...): a one where the samples were
    return Full(g.sum_to_size(batch_size, *(1,) * (g.dim() - 1 - len(shape)), *shape).reshape(batch_size, *shape))


class _Expand(torch.autograd.Function):
    """Expands a parameter to a shape that carries samples; its backward reduces the gradient to one row per sample. The general expand_tap."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, sink: Sink, shape: tuple[int, ...], layout: Known, batch_size: int, rows: bool) -> Tensor:
        ctx.sink, ctx.p_shape, ctx.layout, ctx.batch_size, ctx.rows = sink, p.shape, layout, batch_size, rows
        ctx.set_materialize_grads(False)
        return p.detach().expand(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        if g is None:
            return None, None, None, None, None, None
        return _deliver(ctx.sink, lambda: _Expand.reduce(ctx, g)), None, None, None, None, None

    @staticmethod
    def reduce(ctx: Any, g: Tensor) -> Contribution:
        shape: torch.Size = ctx.p_shape
        if ctx.rows:
            place: Layout = ctx.layout
            return Rows(g.sum_to_size(shape), place.dim - (g.dim() - len(shape)), place.outer, place.inner)
        layout: Known = ctx.layout
        if isinstance(layout, Ragged) or g.is_complex():
            return _summed(g, layout, ctx.batch_size, shape) if ctx.batch_size != 1 else Full(g.sum_to_size(shape)[None])
        if ctx.batch_size == 1:
            g = g.unsqueeze(0)
        elif layout == PLAIN:
            g = g.unsqueeze(1)  # (B, 1, *rest)
        else:
            g = g.unflatten(layout.dim, (layout.outer, ctx.batch_size, layout.inner)).movedim(layout.dim + 1, 0).flatten(layout.dim + 1, layout.dim + 2)
        aligned = (1,) * (g.dim() - len(shape)) + tuple(shape)
        own = [dim for dim, size in enumerate(aligned) if size != 1]
        first, last = (own[0], own[-1] + 1) if own else (g.dim(), g.dim())
        if g.shape[first:last] == aligned[first:last]:  # positions before and after the parameter's dimensions, none between them
            sizes = (ctx.batch_size, g.shape[1:first].numel(), shape.numel(), g.shape[last:].numel())
            return Affine(Positions(g.reshape(sizes)), False, shape)
        return Full(g.sum_to_size(ctx.batch_size, *aligned[1:]).reshape(ctx.batch_size, *shape))


class _Fused(torch.autograd.Function):
    """An operation with a backward of its own that returns the inputs' gradients and the parameters' contributions. Made of differentiable torch ops."""

    @staticmethod
    def forward(ctx: Any, fused: tuple[Callable[..., Any], Callable[..., Any], tuple[Sink | None, ...], int], *tensors: Tensor | None) -> Any:
        forward, ctx.run_backward, ctx.sinks, results = fused
        ctx.set_materialize_grads(False)
        out = forward(*tensors)
        out, kept = (out[:results], out[results:]) if isinstance(out, tuple) else ((out,), ())
        ctx.save_for_backward(*tensors, *kept)
        return out[0] if results == 1 else out

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in g):
            return (None,) * (1 + len(ctx.sinks))
        lazy = ctx.run_backward(*g, *ctx.saved_tensors)
        grads = (
            None if item is None or not needed else _plain(item()) if sink is None else _deliver(sink, item)
            for item, sink, needed in zip(lazy, ctx.sinks, ctx.needs_input_grad[1:])
        )
        return None, *grads


def _plain(grad: Tensor | Contribution | None) -> Tensor | None:
    """The gradient of an input, or of a parameter that the tap does not track."""
    return grad.total() if isinstance(grad, Contribution) else grad


# ---------------------------------------------------------------------------------------------------------------------------------------
# What a rule works with


class Call:
    """One intercepted call that joins parameters with data: who is a parameter, where the samples lie, how to attach a contribution."""

    def __init__(self, tap: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.tap, self.func, self.args, self.kwargs = tap, func, args, kwargs
        self.marked: list[Tensor] = []  # results of which it is said where the samples lie
        self.followed = False  # the rule let the tap watch its operations, so it knows by itself

    @property
    def batch_size(self) -> int:
        size: int = self.tap._pass.batch_size
        return size

    @property
    def operation(self) -> str:
        return getattr(self.func, "__name__", str(self.func))

    def is_parameter(self, value: Any) -> bool:
        """True for tracked parameters and for functions of them alone."""
        return isinstance(value, Tensor) and self.tap._is_tracked(value)

    def is_data(self, value: Any) -> bool:
        """True for tensors that carry samples."""
        return isinstance(value, Tensor) and not self.is_parameter(value) and self.tap._is_data(value)

    def derive(self, func: Callable[..., Tensor], *args: Any) -> Tensor:
        """A function of parameters alone: the tap follows it."""
        out: Tensor = self.tap._derive(func, args, {})
        return out

    def names(self) -> str:
        leaves = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if self.is_parameter(leaf)]
        return ", ".join(sorted({repr(self.tap._name_of(leaf)) for leaf in leaves}))

    def unsupported(self, why: str) -> UnsupportedUseError:
        return UnsupportedUseError(f"ghostgrad: the use of parameter {self.names()} in '{self.operation}' has no per-sample gradient: {why}")

    @overload
    def layout(self, *tensors: Any) -> Layout: ...

    @overload
    def layout(self, *tensors: Any, ragged: Literal[True]) -> Known: ...

    def layout(self, *tensors: Any, ragged: bool = False) -> Known:
        """Where the samples lie in ``tensors`` (those that carry samples must agree, aligned from the right). Raises if that is not known, or if it is rows
        picked by an index and the rule does not take those (``ragged``)."""
        data = [t for t in tensors if self.is_data(t)]
        width = max(t.dim() for t in data)
        if self.batch_size == 1:
            data = [max(data, key=Tensor.dim)]
        layouts: list[AnyLayout] = []
        for t in data:
            layout = self.tap._layout_of(t)
            layouts.append(layout if isinstance(layout, Mixed) else layout.at(layout.dim + width - t.dim()))
        if self.tap._pass.recomputing:  # of this run nothing is kept but tensors; the layouts are those of the first
            layouts = [next((layout for layout in layouts if not isinstance(layout, Mixed)), PLAIN)]
            data = data[:1]
        if any(layout != layouts[0] for layout in layouts) and (sample := single(*layouts)) is not None:  # one sample's, wherever its rows lie
            layouts = [Ragged(0, sample.expand(torch.broadcast_shapes(*(t.shape for t in data))[0]))]
        for layout, t in zip(layouts, data):
            if isinstance(layout, Mixed):
                if layout.coupled:
                    raise BatchCouplingError(
                        f"ghostgrad: parameter {self.names()} meets in '{self.operation}' a tensor of shape {tuple(t.shape)} in which samples are mixed: "
                        f"{layout.reason}. A sample's gradient is then not its own; keep the samples apart, or take the parameter out of the tap."
                    )
                way_out = "say so with gg.declare_samples(tensor, dim=..., outer=..., inner=...) or gg.declare_samples(tensor, index=...) before this use"
                if tracing():
                    way_out = "rows that an index picks are not followed under torch.compile; run this model uncompiled"
                raise self.unsupported(
                    f"in its input of shape {tuple(t.shape)} it is not known which rows belong to which of the {self.batch_size} samples ({layout.reason}): "
                    f"{way_out}"
                )
            if layout != layouts[0]:
                raise self.unsupported("its inputs carry the samples along different dimensions, or in another order")
        first = layouts[0]
        assert not isinstance(first, Mixed)
        if isinstance(first, Ragged) and not self.tap._pass.recomputing:
            if not ragged:
                raise self.unsupported(
                    f"the rows of its input of shape {tuple(data[0].shape)} were picked by an index, {len(first.samples)} for {self.batch_size} samples, and "
                    "this operation takes none but equally many for each sample, in regular order. Apply it before rows are picked, or pad and mask"
                )
            if bool((first.samples < 0).any()):
                raise self.unsupported(
                    f"some rows of its input of shape {tuple(data[0].shape)} belong to no sample: they come from a constant. Leave them out, or say to whom "
                    "they belong with gg.declare_samples(tensor, index=...)"
                )
        return first

    def mark(self, out: Tensor, layout: AnyLayout) -> Tensor:
        """Notes where the samples lie in a result."""
        self.tap._mark(out, layout)
        self.marked.append(out)
        return out

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """A block in which interception goes on, for rules that write an operation out in others."""
        self.followed = True
        with self.tap.resumed():
            yield

    def expand(self, p: Tensor, shape: Sequence[int], layout: Known) -> Tensor:
        """A parameter expanded to ``shape``, whose samples lie as ``layout`` says: after that it may be used like data, in any elementwise way."""
        p = self.tap._before_expansion(p)
        own = layout.dim - (len(shape) - p.dim())  # the parameter's dimension along which the samples run, if it has one there
        rows = own >= 0 and p.shape[own] != 1 and self.batch_size != 1
        if rows and isinstance(layout, Ragged):
            raise self.unsupported(f"its dimension {own} runs along rows that were picked by an index; pick them out of the parameter by the same index")
        if rows and layout != Layout(layout.dim) and p.shape[own] != shape[layout.dim]:
            raise self.unsupported(f"its dimension {own} runs along samples and positions at once; use the parameter before flattening them")
        tensor, sink = self.tap._attach_use(p)
        out: Tensor = _Expand.apply(tensor, sink, tuple(shape), layout, self.batch_size, rows)
        return out

    def fuse(
        self,
        forward: Callable[..., Tensor | tuple[Tensor, ...]],
        backward: Callable[..., tuple[Callable[[], Any] | None, ...]],
        inputs: Sequence[Tensor | None],
        parameters: Sequence[Tensor | None],
        layout: Known = PLAIN,
    ) -> Tensor:
        """Runs ``forward(*inputs, *parameters)`` as one autograd node with a backward of its own.

        Args:
            forward: plain tensors in, one plain tensor out; nothing in it is recorded. Of a tuple the first is the result; the others are kept for backward,
                which gets them after its other arguments, as constants.
            backward: ``backward(grad_output, *inputs, *parameters, *kept)`` returns one zero-argument function (or None) for each input, giving its gradient,
                and for each parameter, giving its contribution (:class:`Outer`, :class:`Segments`, :class:`Affine`, :class:`Full`,
                :class:`Rows`). Only those needed are called.
                To serve ``create_graph=True`` it must use differentiable operations.
            inputs: tensors that carry samples, or constants.
            parameters: tracked parameters, functions of them, or untracked tensors or None.
            layout: where the samples lie in the result.
        """
        return self.mark(self._fused(forward, backward, inputs, parameters, 1), layout)

    def fuse_many(
        self,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Callable[[], Any] | None, ...]],
        inputs: Sequence[Tensor | None],
        parameters: Sequence[Tensor | None],
        layouts: Sequence[Known],
    ) -> tuple[Tensor, ...]:
        """The same with as many results as layouts: the first of what ``forward`` gives. ``backward`` gets their gradients first, None for results that are
        not used."""
        return tuple(map(self.mark, self._fused(forward, backward, inputs, parameters, len(layouts)), layouts))

    def _fused(
        self, forward: Callable[..., Any], backward: Callable[..., Any], inputs: Sequence[Tensor | None], parameters: Sequence[Tensor | None], results: int
    ) -> Any:
        attached = [(t, None) if t is None or not self.is_parameter(t) else self.tap._attach_use(t) for t in parameters]
        sinks = (*(None for _ in inputs), *(sink for _, sink in attached))
        return _Fused.apply((forward, backward, sinks, results), *inputs, *(t for t, _ in attached))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The registry


def writes_in_place(name: str) -> bool:
    """True for operations that overwrite an argument, by torch's naming."""
    return name == "__setitem__" or name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE_OPERATORS = frozenset("__iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __imod__ __ifloordiv__ __iand__ __ior__ __ixor__".split())

Rule = Callable[..., Any]
_RULES: dict[Any, Rule] = {}


def register_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the intercepted ``functions`` (the objects that ``__torch_function__`` sees).

    The rule is called as ``rule(call, *args, **kwargs)`` whenever at least one argument is a tracked parameter (or a function of tracked parameters alone)
    and at least one carries samples. It must return what the function would return, with every parameter attached through
    :meth:`Call.fuse`, :meth:`Call.expand` or another rule. A later registration replaces an earlier one. See the module's docstring for examples.
    """

    def decorator(rule: Rule) -> Rule:
        for function in functions:
            _RULES[function] = rule
        return rule

    return decorator


def rule_for(func: Any) -> Rule | None:
    """The rule of an intercepted function, or None."""
    try:
        rule = _RULES.get(func)
    except TypeError:  # an unhashable callable
        return None
    if rule is None and getattr(func, "__name__", None) in ELEMENTWISE and (getattr(func, "__module__", None) or "torch").startswith("torch"):
        return elementwise
    return rule


def body(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch without its own hand-over to ``__torch_function__``."""
    if not isinstance(function, types.FunctionType):
        return function

    def nobody(*args: Any) -> bool:
        return False

    own = {**function.__globals__, "has_torch_function": nobody, "has_torch_function_unary": nobody, "has_torch_function_variadic": nobody}
    copy = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# ---------------------------------------------------------------------------------------------------------------------------------------
# Broadcasting


def elementwise(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Any operation that broadcasts: the parameters are expanded to the shape of the result, sample by sample, and the operation runs unchanged."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    layout = call.layout(*tensors, ragged=True)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    width = max(t.dim() for t in tensors if call.is_data(t))
    layout = layout.at(layout.dim + len(shape) - width)
    if call.is_parameter(args[0]) and writes_in_place(call.operation):
        raise call.unsupported("it is overwritten in place by data; write into a copy")
    for t in tensors:
        if call.is_parameter(t) and call.tap._ambiguous(t, shape, layout, tensors):
            raise call.unsupported(
                f"its leading size {t.shape[0]} equals the batch size and the other operand may be data or a constant; "
                "tell which by gg.tap(..., constants=[tensor]) or by tapping the module that is called with the data"
            )

    def expanded(leaf: Any) -> Any:
        return call.expand(leaf, shape, layout) if call.is_parameter(leaf) else leaf

    args, kwargs = pytree.tree_map(expanded, (args, kwargs))
    out = call.func(*args, **kwargs)
    return call.mark(out, layout)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Matrix products


def _autocast(*tensors: Tensor | None) -> torch.dtype | None:
    """The dtype to which autocast would bring a product of these tensors, or None outside autocast."""
    device = next(t.device.type for t in tensors if t is not None)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _product(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``x @ weight.T + bias`` with ``weight`` (d, p), or ``x @ weight + bias`` with ``weight`` (p, d) if ``transposed``."""
    layout = call.layout(x, ragged=True)
    if layout.dim == x.dim() - 1:
        raise call.unsupported(f"the product sums over dimension {layout.dim} of its input of shape {tuple(x.shape)}, along which the samples lie")
    if (dtype := _autocast(x, weight)) is not None:  # cast before the node, not inside it: its backward must see what its forward saw

        def narrow(t: Tensor) -> Tensor:
            return t if t.dtype == dtype else call.derive(torch.Tensor.to, t, dtype) if call.is_parameter(t) else t.to(dtype)

        x, weight, bias = narrow(x), narrow(weight), None if bias is None else narrow(bias)
    root = call.tap._untransposed(weight)
    if root is not None:
        weight, transposed = root, not transposed
    batch_size = call.batch_size

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.t() if transposed else weight, bias)

    def backward(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Callable[[], Any], ...]:
        def outer() -> Contribution:
            a, b = (g, x.conj()) if transposed else (x.conj(), g)
            if isinstance(layout, Ragged):
                (a, samples), (b, _) = to_rows(a, layout, batch_size), to_rows(b, layout, batch_size)  # (n, p), (n, d)
                return Segments(a, b, samples, batch_size)
            return Outer(to_samples(a, layout, batch_size), to_samples(b, layout, batch_size))  # (B, T, p), (B, T, d)

        def shift() -> Contribution:
            if isinstance(layout, Ragged) or g.is_complex():
                return _summed(g, layout, batch_size, g.shape[-1:])
            return Affine(Positions(to_samples(g, layout, batch_size).unsqueeze(-1)), False, g.shape[-1:])  # (B, T, d, 1)

        # conj is the identity on real tensors; complex weights are functions of real parameters
        return lambda: g @ (weight.t() if transposed else weight).conj(), outer, shift

    weight_tracked = call.is_parameter(weight)
    if not weight_tracked or (bias is not None and (not call.is_parameter(bias) or bias.dim() != 1)):
        # Only one of the two is ours: the other one takes its usual way.
        plain_weight = weight.t() if transposed else weight
        out = call.fuse(forward, backward, (x,), (weight, None), layout) if weight_tracked else call.mark(F.linear(x, plain_weight), layout)
        if bias is None:
            return out
        return add(call, out, bias) if call.is_parameter(bias) else call.mark(out + bias, layout)
    return call.fuse(forward, backward, (x,), (weight, bias), layout)


def add(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` for rules that are composed of others."""
    out: Tensor = elementwise(Call(call.tap, torch.add, (x, y), {}), x, y)
    return out


def mul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` for rules that are composed of others."""
    out: Tensor = elementwise(Call(call.tap, torch.mul, (x, y), {}), x, y)
    return out


@register_rule(F.linear)
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + c``: ``G_i = b_i^T a_i``, bias ``sum_t b_it``."""
    if not call.is_data(input) or weight.dim() != 2 or call.is_data(weight) or input.dim() < 2:
        out: Tensor = reference_call(call, input, weight, bias)
        return out
    return _product(call, input, weight, bias, transposed=False)


@register_rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm)
def matmul(call: Call, input: Tensor, other: Tensor, **kwargs: Any) -> Any:
    """``x @ W`` and ``W @ x``."""
    if kwargs:
        return reference_call(call, input, other, **kwargs)
    if call.is_data(input) and call.is_parameter(other):
        if other.dim() == 2 and input.dim() >= 2:
            return _product(call, input, other, None, transposed=True)
        if other.dim() == 1 and input.dim() >= 2:
            out = _product(call, input, call.derive(lambda v: v.unsqueeze(0), other), None, transposed=False)  # (..., 1)
            return call.mark(out.squeeze(-1), call.layout(input, ragged=True))
        matrix = call.tap._before_expansion(other)  # one matrix expanded over the samples
        if (
            matrix is not other
            and other.dim() == 3
            and input.dim() == 3
            and call.layout(input, ragged=True) == PLAIN
            and (matrix.dim() == 2 or matrix.shape[0] == 1)
        ):
            return _product(call, input, matrix if matrix.dim() == 2 else call.derive(lambda w: w[0], matrix), None, transposed=True)
        if other.dim() > 2 and input.dim() > other.dim() and (layout := call.layout(input, ragged=True)).dim < input.dim() - other.dim():
            return _stacked(call, input, other, layout)
    elif call.is_parameter(input) and call.is_data(other) and input.dim() == 2 and other.dim() >= 2:
        # W @ x = (x^T W^T)^T
        layout, last = call.layout(other, ragged=True), other.dim() - 1
        swapped = {last: last - 1, last - 1: last}
        turned = layout.at(swapped.get(layout.dim, layout.dim))
        out = _product(call, call.mark(other.mT, turned), input, None, transposed=False)
        return call.mark(out.mT, layout)
    return reference_call(call, input, other)


def _stacked(call: Call, x: Tensor, weight: Tensor, layout: Known) -> Any:
    """``x @ W`` with a stack of matrices, one for each head, say: (..., h, t, p) @ (h, p, d), where x may have h = 1."""
    lead, stack = x.dim() - weight.dim(), weight.dim() - 2
    letters = "abcdefghijklmnopqrstuvw"[: x.dim() - 1]  # of all dimensions of x but the last, which is z; the new one is y
    broadcast = [i for i in range(lead, lead + stack) if x.shape[i] == 1 != weight.shape[i - lead]]
    if any(weight.shape[i - lead] == 1 != x.shape[i] for i in range(lead, lead + stack)):
        return reference_call(call, x, weight)
    kept = "".join(letter for i, letter in enumerate(letters) if i not in broadcast)
    equation = f"{kept}z,{letters[lead : lead + stack]}zy->{letters}y"
    squeezed = call.mark(x.squeeze(broadcast), layout) if broadcast else x
    rule = rule_for(torch.einsum)
    assert rule is not None
    return rule(Call(call.tap, torch.einsum, (equation, squeezed, weight), {}), equation, squeezed, weight)


@register_rule(torch.Tensor.__rmatmul__)
def rmatmul(call: Call, input: Tensor, other: Tensor) -> Any:
    return matmul(call, other, input)


@register_rule(torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm)
def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``beta * input + alpha * (mat1 @ mat2)``."""
    if call.is_data(mat1) and call.is_parameter(mat2) and mat2.dim() == 2 and beta == 1 and alpha == 1 and not call.is_data(input):
        return _product(call, mat1, mat2, input, transposed=True)
    if not call.is_parameter(mat1) and not call.is_parameter(mat2):
        product = call.mark(mat1 @ mat2, call.layout(mat1, mat2, ragged=True))
    else:
        product = matmul(Call(call.tap, torch.matmul, (mat1, mat2), {}), mat1, mat2)
    if alpha != 1:
        product = call.mark(product * alpha, call.layout(product, ragged=True))
    if call.is_parameter(input):
        out: Tensor = elementwise(Call(call.tap, torch.add, (product, input), {"alpha": beta}), product, input, alpha=beta)
        return out
    return call.mark(torch.add(product, input, alpha=beta), call.layout(product, ragged=True))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batch statistics


def refuse_batch_statistics(tap: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises if an intercepted batch normalisation uses the statistics of the batch."""
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if not training or not torch.is_grad_enabled():
        return
    raise BatchCouplingError(
        f"ghostgrad: {tap._batch_norm_name(args, kwargs)} normalises with the statistics of the batch, so each sample's output depends on all samples and "
        "per-sample gradients do not exist. Put it in eval mode (module.eval()), or use GroupNorm, LayerNorm or InstanceNorm instead."
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# Joining a parameter with data along another dimension (class tokens)


@register_rule(torch.cat, torch.concat, torch.concatenate)
def cat(call: Call, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    dim = kwargs.pop("axis", dim)
    layout = call.layout(*tensors, ragged=True)
    dim = dim % tensors[0].dim()
    if dim == layout.dim and call.batch_size != 1:
        raise call.unsupported(f"it is joined along dimension {dim}, along which the samples lie")
    joined = [call.expand(t, t.shape, layout) if call.is_parameter(t) else t for t in tensors]
    return call.mark(torch.cat(joined, dim, **kwargs), layout)


@register_rule(torch.stack)
def stack(call: Call, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    layout = call.layout(*tensors)
    stacked = torch.stack([call.expand(t, t.shape, layout) if call.is_parameter(t) else t for t in tensors], dim, **kwargs)
    return call.mark(stacked, Layout(layout.dim + (dim % stacked.dim() <= layout.dim), layout.outer, layout.inner))


@register_rule(torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.type_as, torch.Tensor.to)
def like(call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of the data it is the shape or the dtype that matters."""
    if not call.is_parameter(input):
        out = call.func(input, other, *args, **kwargs)
        return out if call.operation in ("type_as", "to") else reference_call(call, input, other)
    return call.tap._derive(call.func, (input, other.detach(), *args), kwargs)


@register_rule(torch.Tensor.__setitem__)
def setitem(call: Call, input: Tensor, index: Any, value: Any) -> None:
    """``x[index] = p``: the parameter is expanded to the shape of what it overwrites."""
    if not call.is_data(input) or not call.is_parameter(value):
        raise call.unsupported("it is written to, or indexed with; assign to a copy that carries samples")
    whole = input.detach()
    part = whole[index]
    place = propagate(torch.Tensor.__getitem__, "__getitem__", [(whole, call.layout(input, ragged=True))], (whole, index), {}, [part], call.batch_size)[0]
    if isinstance(place, Mixed):
        raise call.unsupported(f"it overwrites a part of the data of which it is not known which samples it holds: {place.reason}")
    input[index] = call.expand(value, part.shape, place)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Rows of a parameter picked by data


@register_rule(torch.Tensor.__getitem__)
def getitem(call: Call, input: Tensor, index: Any) -> Tensor:
    """``p[index]``: a number picks a part of the parameter (an expert's weights), a tensor of numbers one part for each (an embedding)."""
    items = index if isinstance(index, tuple) else (index,)
    if all(not isinstance(item, Tensor) or (item.dim() == 0 and item.dtype != torch.bool) for item in items):
        numbers = tuple(int(item) if isinstance(item, Tensor) else item for item in items)
        return call.derive(torch.Tensor.__getitem__, input, numbers)
    if len(items) == 1 and not items[0].is_floating_point() and items[0].dtype not in (torch.bool, torch.uint8):
        table = input if input.dim() == 2 else call.derive(lambda p: p.flatten(1) if p.dim() > 1 else p.unsqueeze(1), input)
        layout = call.layout(items[0], ragged=True)
        rows = _RULES[F.embedding](call, call.mark(items[0] % len(input), layout), table)  # negative numbers count from the end
        return call.mark(rows.reshape(*items[0].shape, *input.shape[1:]), layout)
    out: Tensor = reference_call(call, input, index)
    return out


@register_rule(torch.index_select, torch.Tensor.index_select)
def index_select(call: Call, input: Tensor, dim: int, index: Tensor) -> Tensor:
    """Of a parameter that was expanded along ``dim``, any rows are alike; else as ``p[index]``."""
    whole = call.tap._before_expansion(input)
    own = dim % input.dim() - input.dim() + whole.dim()
    if whole is not input and (own < 0 or whole.shape[own] == 1):
        shape = [len(index) if d == dim % input.dim() else size for d, size in enumerate(input.shape)]
        return call.derive(torch.Tensor.expand, whole, shape)
    if dim % input.dim() == 0:
        return getitem(call, input, index)
    out: Tensor = reference_call(call, input, dim, index)
    return out


# ---------------------------------------------------------------------------------------------------------------------------------------
# Everything else: one copy of the parameter for each sample


def reference_call(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Runs any operation with one copy of each parameter per sample, and checks that the result is the plain one.

    The operation is mapped over the samples (``torch.vmap``, or a loop where it cannot be vectorised), each seeing a batch of one. Costs B copies of the
    gradients of the parameters: warned of once per parameter and operation, refused beyond the tap's ``expand_limit``.
    """
    if writes_in_place(call.operation) or kwargs.get("out") is not None:
        raise call.unsupported("the operation writes its result into one of its arguments; use the one that returns a new tensor")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batch_size = call.batch_size
    parameters = [i for i, leaf in enumerate(leaves) if call.is_parameter(leaf)]
    data = {i: call.layout(leaf) for i, leaf in enumerate(leaves) if call.is_data(leaf)}
    if not data:
        raise call.unsupported("none of its inputs carries samples")

    def run(values: dict[int, Any]) -> Any:
        filled_args, filled_kwargs = pytree.tree_unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return call.func(*filled_args, **filled_kwargs)

    rng = None if tracing() else torch.get_rng_state()
    plain, plain_spec = pytree.tree_flatten(run({}))
    if not any(isinstance(t, Tensor) and t.requires_grad for t in plain):  # a comparison, say: nothing flows back
        return pytree.tree_unflatten(plain, plain_spec)
    random = rng is not None and not torch.equal(rng, torch.get_rng_state())
    batch_size = int(batch_size)  # a graph that is being traced is specialised to it
    plain = [t.detach() if isinstance(t, Tensor) else t for t in plain]
    if batch_size == 0:
        raise call.unsupported("an empty batch cannot take the reference path")

    mixes = call.unsupported("run on single samples it gives another result than on the batch, so it mixes samples or another dimension holds them")

    def mapped(own: Sequence[int]) -> Any:
        """The operation mapped over the samples. Parameters in ``own`` have a row for each sample, where the data has it; of the others each has a copy."""
        places = data | dict.fromkeys(own, place)
        copies = sum((1 if i in places else batch_size) * leaves[i].numel() * leaves[i].element_size() for i in parameters)
        call.tap._admit(call.names(), f"'{call.operation}'", copies)
        # Each sample as a batch of its own: samples first, the dimension itself shortened to outer * 1 * inner.
        split: dict[int, Tensor] = {}
        for i, layout in places.items():
            x = call.expand(leaves[i], leaves[i].shape, layout) if i in own else leaves[i]
            x = x.unflatten(layout.dim, (layout.outer, batch_size, layout.inner)).movedim(layout.dim + 1, 0)
            split[i] = x.flatten(layout.dim + 1, layout.dim + 2)  # (B, ..., outer * inner, ...)
        for i in parameters:
            if i not in places:
                split[i] = call.expand(leaves[i], (batch_size, *leaves[i].shape), PLAIN)

        def single(*values: Tensor) -> list[Any]:
            return list(pytree.tree_leaves(run(dict(zip(split, values)))))

        try:
            results = map_samples(single, [static(t) for t in split.values()], batch_size)
        except Exception as error:
            raise call.unsupported(f"the operation does not run on single samples ({type(error).__name__}: {error})") from error
        outputs: list[Any] = []
        layouts: list[AnyLayout] = []
        for result, whole in zip(results, plain):
            if not isinstance(whole, Tensor):
                outputs.append(whole)
                continue
            layout = _output_layout(call, result.shape[1:], whole.shape, batch_size)
            merged = result.unflatten(layout.dim + 1, (layout.outer, layout.inner)).movedim(0, layout.dim + 1).flatten(layout.dim, layout.dim + 2)
            if rng is not None and not random and not agree(merged.detach(), whole):
                raise mixes
            layouts.append(layout)
            outputs.append(merged)
        if rng is None or (not random and any(_alike(leaves[i]) for i in split)):  # zeros hide what is mixed, and a traced graph has no values
            others = [torch.rand_like(leaf) if i in split and i not in places else leaf for i, leaf in enumerate(leaves)]
            other_args, other_kwargs = pytree.tree_unflatten(others, spec)
            if not tried(call.func, [(leaves[i], layout) for i, layout in places.items()], other_args, other_kwargs, layouts, batch_size):
                raise mixes
        marks = iter(layouts)
        return pytree.tree_unflatten([call.mark(t, next(marks)) if isinstance(t, Tensor) else t for t in outputs], plain_spec)

    # A parameter that was expanded over the batch (learned queries), or computed from one that was, has a row for each sample.
    place = next(iter(data.values()))
    long = [i for i in parameters if leaves[i].dim() > place.dim and leaves[i].shape[place.dim] == place.outer * batch_size * place.inner]
    ways = [[i for i in long if leaves[i].stride(place.dim) == 0], [], long] if batch_size > 1 else [[]]
    errors: list[UnsupportedUseError] = []
    for own in (way for n, way in enumerate(ways) if way not in ways[:n]):
        try:
            return mapped(own)
        except UnsupportedUseError as error:
            errors.append(error)
    raise errors[0]


def _alike(t: Tensor) -> bool:
    """True if all elements are equal, as after initialisation with zeros."""
    return t.numel() > 1 and bool((t == t.flatten()[0]).all())


def _output_layout(call: Call, single: torch.Size, whole: torch.Size, batch_size: int) -> Layout:
    """The dimension that is ``batch_size`` times longer in the result for the batch than in the result for one sample."""
    if len(single) == len(whole):
        longer = [i for i, (one, all_) in enumerate(zip(single, whole)) if one != all_]
        if batch_size == 1 and not longer and len(whole):
            return Layout(0, 1, whole[0])
        if len(longer) == 1 and whole[longer[0]] == batch_size * single[longer[0]]:
            return Layout(longer[0], 1, single[longer[0]])
    raise call.unsupported(f"its result has shape {tuple(whole)} for the batch and {tuple(single)} for one sample, so the samples' parts cannot be told apart")
