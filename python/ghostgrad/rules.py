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
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops
from .contributions import Affine, Contribution, Full, Outer, Positions, Rows
from .errors import BatchCouplingError, UnsupportedUseError
from .layout import ELEMENTWISE, PLAIN, AnyLayout, Layout, Mixed, propagate, to_samples
from .reference import accumulation_dtype

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


class _Expand(torch.autograd.Function):
    """Expands a parameter to a shape that carries samples; its backward reduces the gradient to one row per sample. The general expand_tap."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, sink: Sink, shape: tuple[int, ...], layout: Layout, batch_size: int, rows: bool) -> Tensor:
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
        layout: Layout = ctx.layout
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
    def forward(ctx: Any, fused: tuple[Callable[..., Any], Callable[..., Any], tuple[Sink | None, ...]], *tensors: Tensor | None) -> Tensor:
        forward, ctx.run_backward, ctx.sinks = fused
        ctx.set_materialize_grads(False)
        out = forward(*tensors)
        out, kept = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * (1 + len(ctx.sinks))
        lazy = ctx.run_backward(g, *ctx.saved_tensors)
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

    def layout(self, *tensors: Any) -> Layout:
        """Where the samples lie in ``tensors`` (those that carry samples must agree, aligned from the right). Raises if that is not known."""
        data = [t for t in tensors if self.is_data(t)]
        width = max(t.dim() for t in data)
        if self.batch_size == 1:
            data = [max(data, key=Tensor.dim)]
        layouts: list[AnyLayout] = []
        for t in data:
            layout = self.tap._layout_of(t)
            layouts.append(Layout(layout.dim + width - t.dim(), layout.outer, layout.inner) if isinstance(layout, Layout) else layout)
        if self.tap._pass.recomputing:  # of this run nothing is kept but tensors; the layouts are those of the first
            layouts = [next((layout for layout in layouts if isinstance(layout, Layout)), PLAIN)]
            data = data[:1]
        for layout, t in zip(layouts, data):
            if isinstance(layout, Mixed):
                if layout.coupled:
                    raise BatchCouplingError(
                        f"ghostgrad: parameter {self.names()} meets in '{self.operation}' a tensor of shape {tuple(t.shape)} in which samples are mixed: "
                        f"{layout.reason}. A sample's gradient is then not its own; keep the samples apart, or take the parameter out of the tap."
                    )
                raise self.unsupported(
                    f"in its input of shape {tuple(t.shape)} it is not known which rows belong to which of the {self.batch_size} samples "
                    f"({layout.reason}). Say so with gg.declare_samples(tensor, dim=..., outer=..., inner=...) before this use"
                )
            if layout != layouts[0]:
                raise self.unsupported("its inputs carry the samples along different dimensions")
        first = layouts[0]
        assert isinstance(first, Layout)
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

    def expand(self, p: Tensor, shape: Sequence[int], layout: Layout) -> Tensor:
        """A parameter expanded to ``shape``, whose samples lie as ``layout`` says: after that it may be used like data, in any elementwise way."""
        p = self.tap._before_expansion(p)
        own = layout.dim - (len(shape) - p.dim())  # the parameter's dimension along which the samples run, if it has one there
        rows = own >= 0 and p.shape[own] != 1 and self.batch_size != 1
        if rows and (layout.outer, layout.inner) != (1, 1) and p.shape[own] != shape[layout.dim]:
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
        layout: Layout = PLAIN,
    ) -> Tensor:
        """Runs ``forward(*inputs, *parameters)`` as one autograd node with a backward of its own.

        Args:
            forward: plain tensors in, one plain tensor out; nothing in it is recorded. Of a tuple the first is the result; the others are kept for backward,
                which gets them after its other arguments, as constants.
            backward: ``backward(grad_output, *inputs, *parameters, *kept)`` returns one zero-argument function (or None) for each input, giving its gradient,
                and for each parameter, giving its contribution (:class:`Outer`, :class:`Affine`, :class:`Full`, :class:`Rows`). Only those needed are called.
                To serve ``create_graph=True`` it must use differentiable operations.
            inputs: tensors that carry samples, or constants.
            parameters: tracked parameters, functions of them, or untracked tensors or None.
            layout: where the samples lie in the result.
        """
        attached = [(t, None) if t is None or not self.is_parameter(t) else self.tap._attach_use(t) for t in parameters]
        sinks = (*(None for _ in inputs), *(sink for _, sink in attached))
        out: Tensor = _Fused.apply((forward, backward, sinks), *inputs, *(t for t, _ in attached))
        return self.mark(out, layout)


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
    layout = call.layout(*tensors)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    width = max(t.dim() for t in tensors if call.is_data(t))
    layout = Layout(layout.dim + len(shape) - width, layout.outer, layout.inner)
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
    layout = call.layout(x)
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
        def outer() -> Outer:
            a, b = to_samples(x, layout, batch_size), to_samples(g, layout, batch_size)  # (B, T, p), (B, T, d)
            return Outer(b, a) if transposed else Outer(a, b)

        def shift() -> Affine:
            return Affine(Positions(to_samples(g, layout, batch_size).unsqueeze(-1)), False, g.shape[-1:])  # (B, T, d, 1)

        return lambda: g @ (weight.t() if transposed else weight), outer, shift

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
            return call.mark(out.squeeze(-1), call.layout(input))
        matrix = call.tap._before_expansion(other)  # one matrix expanded over the samples
        if matrix is not other and other.dim() == 3 and input.dim() == 3 and call.layout(input) == PLAIN and (matrix.dim() == 2 or matrix.shape[0] == 1):
            return _product(call, input, matrix if matrix.dim() == 2 else call.derive(lambda w: w[0], matrix), None, transposed=True)
    elif call.is_parameter(input) and call.is_data(other) and input.dim() == 2 and other.dim() >= 2:
        # W @ x = (x^T W^T)^T
        layout, last = call.layout(other), other.dim() - 1
        swapped = {last: last - 1, last - 1: last}
        turned = Layout(swapped.get(layout.dim, layout.dim), layout.outer, layout.inner)
        out = _product(call, call.mark(other.mT, turned), input, None, transposed=False)
        return call.mark(out.mT, layout)
    return reference_call(call, input, other)


@register_rule(torch.Tensor.__rmatmul__)
def rmatmul(call: Call, input: Tensor, other: Tensor) -> Any:
    return matmul(call, other, input)


@register_rule(torch.addmm, torch.Tensor.addmm)
def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``beta * input + alpha * (mat1 @ mat2)``."""
    if call.is_data(mat1) and call.is_parameter(mat2) and beta == 1 and alpha == 1 and not call.is_data(input):
        return _product(call, mat1, mat2, input, transposed=True)
    if not call.is_parameter(mat1) and not call.is_parameter(mat2):
        product = call.mark(mat1 @ mat2, call.layout(mat1, mat2))
    else:
        product = matmul(Call(call.tap, torch.matmul, (mat1, mat2), {}), mat1, mat2)
    if alpha != 1:
        product = call.mark(product * alpha, call.layout(product))
    if call.is_parameter(input):
        out: Tensor = elementwise(Call(call.tap, torch.add, (product, input), {"alpha": beta}), product, input, alpha=beta)
        return out
    return call.mark(torch.add(product, input, alpha=beta), call.layout(product))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batch statistics


def refuse_batch_statistics(tap: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises if an intercepted batch normalisation uses the statistics of the batch."""
    if getattr(func, "__name__", "") != "batch_norm":
        return
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
    layout = call.layout(*tensors)
    dim = dim % tensors[0].dim()
    if dim == layout.dim and call.batch_size != 1:
        raise call.unsupported(f"it is joined along dimension {dim}, along which the samples lie")
    joined = [call.expand(t, t.shape, layout) if call.is_parameter(t) else t for t in tensors]
    return call.mark(torch.cat(joined, dim, **kwargs), layout)


@register_rule(torch.Tensor.__setitem__)
def setitem(call: Call, input: Tensor, index: Any, value: Any) -> None:
    """``x[index] = p``: the parameter is expanded to the shape of what it overwrites."""
    if not call.is_data(input) or not call.is_parameter(value):
        raise call.unsupported("it is written to, or indexed with; assign to a copy that carries samples")
    part = input.detach()[index]
    place = propagate(torch.Tensor.__getitem__, "__getitem__", [(input.detach(), call.layout(input))], (input.detach(), index), {}, [part], call.batch_size)[0]
    if isinstance(place, Mixed):
        raise call.unsupported(f"it overwrites a part of the data of which it is not known which samples it holds: {place.reason}")
    input[index] = call.expand(value, part.shape, place)


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

    rng = torch.get_rng_state()
    plain, plain_spec = pytree.tree_flatten(run({}))
    random = not torch.equal(rng, torch.get_rng_state())
    if not any(isinstance(t, Tensor) and t.requires_grad for t in plain):  # a comparison, say: nothing flows back
        return pytree.tree_unflatten(plain, plain_spec)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in plain]
    copies = sum(batch_size * leaves[i].numel() * leaves[i].element_size() for i in parameters)
    call.tap._admit(call.names(), f"'{call.operation}'", copies)

    # Each sample as a batch of its own: samples first, the dimension itself shortened to outer * 1 * inner.
    split: dict[int, Tensor] = {}
    for i, layout in data.items():
        x = leaves[i].unflatten(layout.dim, (layout.outer, batch_size, layout.inner)).movedim(layout.dim + 1, 0)
        split[i] = x.flatten(layout.dim + 1, layout.dim + 2)  # (B, ..., outer * inner, ...)
    for i in parameters:
        split[i] = call.expand(leaves[i], (batch_size, *leaves[i].shape), PLAIN)
    where = list(split)

    def single(*values: Tensor) -> list[Any]:
        return list(pytree.tree_leaves(run(dict(zip(where, values)))))

    if batch_size == 0:
        raise call.unsupported("an empty batch cannot take the reference path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap's own advice on operations that it maps slowly
            results = torch.vmap(single, randomness="different")(*split.values())
    except Exception:
        try:
            rows = [single(*(t[i] for t in split.values())) for i in range(batch_size)]
        except Exception as error:
            raise call.unsupported(f"the operation does not run on single samples ({type(error).__name__}: {error})") from error
        results = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*rows)]

    outputs = []
    for result, whole in zip(results, plain):
        if not isinstance(whole, Tensor):
            outputs.append(whole)
            continue
        layout = _output_layout(call, result.shape[1:], whole.shape, batch_size)
        merged = result.unflatten(layout.dim + 1, (layout.outer, layout.inner)).movedim(0, layout.dim + 1).flatten(layout.dim, layout.dim + 2)
        if not random and not _agree(merged.detach(), whole):
            raise call.unsupported("run on single samples it gives another result than on the batch, so it mixes samples or another dimension holds them")
        outputs.append(call.mark(merged, layout))
    return pytree.tree_unflatten(outputs, plain_spec)


def _output_layout(call: Call, single: torch.Size, whole: torch.Size, batch_size: int) -> Layout:
    """The dimension that is ``batch_size`` times longer in the result for the batch than in the result for one sample."""
    if len(single) == len(whole):
        longer = [i for i, (one, all_) in enumerate(zip(single, whole)) if one != all_]
        if batch_size == 1 and not longer and len(whole):
            return Layout(0, 1, whole[0])
        if len(longer) == 1 and whole[longer[0]] == batch_size * single[longer[0]]:
            return Layout(longer[0], 1, single[longer[0]])
    raise call.unsupported(f"its result has shape {tuple(whole)} for the batch and {tuple(single)} for one sample, so the samples' parts cannot be told apart")


def _agree(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    eps = torch.finfo(accumulation_dtype(x.dtype) if x.dtype == torch.float64 else x.dtype).eps
    scale = y.abs().nan_to_num(0, 0, 0).amax().item() if y.numel() else 0.0
    return torch.allclose(x, y, rtol=math.sqrt(eps), atol=math.sqrt(eps) * scale, equal_nan=True)
