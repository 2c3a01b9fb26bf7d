"""The tap under ``torch.compile``: two calls in the compiled graph, between which the usual interception runs while the graph is differentiated.

Dynamo cannot follow the interceptor, and need not: it records the user's own operations as if no tap were there. While a tap is open, a stand-in for the
forward of the tapped module puts two functions into that graph, :func:`_begin` and :func:`_end`. They are opaque to Dynamo but ordinary Python to
AOTAutograd, which runs the recorded graph on tensors without data to trace forward and backward together. In that run ``_begin`` opens a
:class:`_TracedTap`: it sees every operation, attaches rules and collectors as in eager mode, and what these do in backward is compiled with everything
else. Nothing of the tap is left to run in Python afterwards.

The norms leave the compiled graph the way everything leaves a backward pass: as a gradient. It is that of the *pool*, a leaf with a row for each name and
room for so many samples, from which :class:`_Draw` takes as many columns as the batch has. The first column counts the calls that did so.

What is known at compile time (a use without a rule, a gradient behind the tap's back) raises there. What is not, a parameter that is used by two compiled
calls or outside of them as well, is found by :meth:`Regions.read_graph`, which looks at the graph of the loss before backward.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from .errors import UnsupportedUseError
from .layout import Layout
from .samplewise import tracing
from .tap import _ACTIVE, Tap, leading_to_leaves

__all__: list[str] = []

_CAPACITY = 4096  # samples that the pool has room for unless the tap was given a batch size


class Regions:
    """What the compiled calls of a tapped module need to know, and what they leave behind. Made of plain attributes: Dynamo reads and writes them."""

    def __init__(self, tap: Tap):
        self.names = [name for name, _ in tap._names.values()]
        self.parameters = [p for _, p in tap._names.values()]
        self.constants = [t for key, t in tap._constants.items() if t.requires_grad and key not in tap._names]
        self.capacity = _CAPACITY if tap._given_batch_size is None else tap._given_batch_size
        rows = len(self.names) if tap.by_param else 1
        dtype = torch.float64 if tap._wide else torch.float32
        self.pool = torch.empty(rows, 1 + self.capacity, dtype=dtype, device=self.parameters[0].device, requires_grad=True)  # its values are never used
        self.pool.register_hook(self._count)
        self.batch_size: int | None = None  # of the compiled call
        self.refusal: str | None = None  # why the norms of a compiled call are not to be had
        self.backwards = 0  # that reached the pool
        self.calls = 0  # compiled calls that the loss depends on and that know the pool
        self.covered: set[int] = set()  # ids of the parameters whose whole gradient comes from one compiled call under the tap

    def read_graph(self, roots: Sequence[Tensor]) -> None:
        """Finds the parameters that compiled calls under the tap have used. Raises if one of them has another use."""
        by_variable = leading_to_leaves(roots)
        tapped = set(by_variable.get(id(self.pool), ()))
        self.calls = len(tapped)
        for name, p in zip(self.names, self.parameters):
            nodes = by_variable.get(id(p), ())
            if tapped.intersection(nodes):
                if len(nodes) > 1:
                    raise UnsupportedUseError(
                        f"ghostgrad: parameter {name!r} is used by a compiled call of the tapped module and outside of it (or by a second call) in one "
                        "backward, and the norm of the sum of these uses is not known to either. Compile a module or function that holds all of them."
                    )
                self.covered.add(id(p))

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1


# ---------------------------------------------------------------------------------------------------------------------------------------
# Under Dynamo


def _prepare(context: Any) -> None:
    """Runs while Dynamo traces: makes ready what could not be before the process first compiled something."""
    for function in (_begin, _end):
        torch.compiler.allow_in_graph(function)
    for tap in _ACTIVE.taps:
        if tap._pass.regions is None and tap._entry is not None:
            tap._pass.regions = Regions(tap)


def _arm(context: Any) -> None:
    """Runs while Dynamo traces: both calls are there, so if they are in one graph, the first is to work. After a graph break they are not."""
    for node in context.graph().nodes:
        if node.target is _begin:
            node.args = (*node.args[:-1], True)


def _tap_of(module: nn.Module) -> Tap | None:
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, Tap) and mode._entry is module:
            return mode
    return None


class _Forward:
    """The stand-in for a module's forward, and the handle that takes it away again. A hook would not do: of the module that is compiled itself, Dynamo
    runs the hooks outside of the graph."""

    def __init__(self, module: nn.Module):
        self.module = module
        module.forward = types.MethodType(_forward, module)  # the same function every time: nothing to recompile for

    def remove(self) -> None:
        del self.module.forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.comptime.comptime(_prepare)
    tap = _tap_of(module) if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled() else None
    if tap is None:
        return forward(module, *args, **kwargs)
    regions, dim = tap._pass.regions, tap.batch_dim
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sizes = [leaf.shape[dim] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > dim]
    size = tap._given_batch_size if tap._given_batch_size is not None and tap._given_batch_size in sizes else sizes[0] if sizes else 0
    if size > regions.capacity:
        regions.refusal = f"has more samples than the {regions.capacity} that a tap makes room for; say how many: gg.tap(..., batch_size=B)"
    if regions.batch_size is not None and regions.batch_size != size:
        regions.refusal = "has another number of samples than the one before it; use one block per batch"
    if not sizes or regions.refusal is not None:
        return forward(module, *args, **kwargs)
    regions.batch_size = size
    data = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == size]
    marked = _begin(
        regions.pool,
        [leaves[i] for i in data],
        regions.parameters,
        regions.constants,
        regions.names,
        tap.by_param,
        tap._want_grad,
        dim,
        tap.expand_limit,
        False,
    )
    for i, t in zip(data, marked):
        leaves[i] = t
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    leaves, spec = pytree.tree_flatten(forward(module, *args, **kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for i, t in zip(tensors, _end([leaves[i] for i in tensors])):
        leaves[i] = t
    torch._dynamo.comptime.comptime(_arm)
    return pytree.tree_unflatten(leaves, spec)


# ---------------------------------------------------------------------------------------------------------------------------------------
# In the graph


def _begin(
    pool: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    constants: list[Tensor],
    names: list[str],
    by_param: bool,
    want_grad: bool,
    batch_dim: int,
    expand_limit: int,
    armed: bool,
) -> list[Tensor]:
    """Opens the tap of the trace. Returns the inputs: the graph has to need this call."""
    inputs = [t.view_as(t) for t in inputs]
    if not armed:
        return inputs
    if tracing():
        options = {"by_param": by_param, "want_grad": want_grad, "batch_dim": batch_dim, "expand_limit": expand_limit, "constants": constants}
        _TracedTap(dict(zip(names, parameters)), pool, inputs, options).open()
    elif not isinstance(pool, torch._subclasses.FakeTensor):  # a backend that runs the graph as it is: the tap that is open sees it all
        _ACTIVE.taps[-1]._see_input(tuple(inputs), {})
    return inputs


def _end(outputs: list[Tensor]) -> list[Tensor]:
    """Closes the tap of the trace. Returns the outputs."""
    taps = _ACTIVE.taps
    if taps and isinstance(taps[-1], _TracedTap):
        tap = taps[-1]
        tap.close()
        if tap.error is not None:
            raise tap.error
    return [t.view_as(t) for t in outputs]


class _Draw(torch.autograd.Function):
    """Leaves of B zeros, one for each row of the pool; their gradients are its gradient."""

    @staticmethod
    def forward(ctx: Any, pool: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        ctx.columns = pool.shape[1]
        return tuple(pool.new_zeros(batch_size) for _ in range(pool.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows = torch.stack(grads)
        return F.pad(torch.cat([torch.ones_like(rows[:, :1]), rows], 1), (0, ctx.columns - 1 - rows.shape[1])), None


class _TracedTap(Tap):
    """The tap that serves while the graph is traced. Its leaves are drawn from the pool."""

    def __init__(self, parameters: Mapping[str, Tensor], pool: Tensor, inputs: Sequence[Tensor], options: dict[str, Any]):
        super().__init__(parameters, **options)
        self._inputs = {id(t) for t in inputs}
        self.error: Exception | None = None
        now = self._pass
        now.batch_size, now.seen_input = inputs[0].shape[self.batch_dim], True
        now.leaves = dict(zip(parameters if self.by_param else ("",), _Draw.apply(pool, now.batch_size)))
        for t in inputs:
            self._mark(t, Layout(self.batch_dim))

    def open(self) -> None:
        for name, p in self._names.values():
            self._handles.append(p.register_hook(self._gradient_hook(name, p)))
        _ACTIVE.taps.append(self)
        TorchFunctionMode.__enter__(self)

    def close(self) -> None:
        """Ends interception; the pass goes on, since backward is still to be traced."""
        TorchFunctionMode.__exit__(self, None, None, None)
        _ACTIVE.taps.remove(self)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.error is None:
            try:
                return super().__torch_function__(func, types, args, kwargs)
            except Exception as error:  # raised by _end: here it would unwind the compiler's own modes out of their order
                self.error = error
        return func(*args, **(kwargs or {}))

    def _linear(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """No hooks on what is traced: the compiler joins the operations of a contribution with those around them."""

    def _is_data(self, t: Tensor) -> bool:
        # A graph input that requires a gradient and is neither one of the module's arguments nor a tapped parameter is somebody's parameter.
        return super()._is_data(t) and not (t.requires_grad and t.is_leaf and id(t) not in self._inputs)

    def _see_gradient(self, name: str, key: int, grad: Tensor | None) -> None:
        super()._see_gradient(name, key, grad)
        if self._pass.bypassed:
            raise self._bypassed()


Tap._make_regions = Regions
Tap._make_stand_in = _Forward
