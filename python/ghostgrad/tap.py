"""The tap: it watches a forward pass, attaches every use of a parameter, and turns the backward pass into per-sample squared gradient norms.

How it works, in the order of events:

1. ``with gg.tap(model)`` puts a ``TorchFunctionMode`` on torch's stack. Every torch function of the forward pass comes through :meth:`Tap.__torch_function__`.
2. A parameter that turns up is replaced by the output of a :class:`_Collect` node, whose second input is the *tap*: a leaf vector of B zeros. The
   parameter's uses are attached to it by rules (:mod:`ghostgrad.rules`). A function of parameters alone becomes a *derived* parameter: a view shares its
   root's collector, anything else gets a collector of its own that pulls the per-sample gradients back.
3. In backward, each use hands its *contribution* to the collector instead of a weight gradient. Autograd runs the collector when all uses are in:
   there, uses are added before they are squared, and one pass gives both the weight gradient and the tap's gradient ``||g_i||^2``.

A linear layer on single positions is the one exception (:class:`_Layer`): it keeps torch's own backward.

So a collector that is handed a plain gradient has found a use that the tap did not see, and a parameter that receives a gradient from anywhere but its
collector has been reached behind the tap's back: both are errors. Nothing is dropped silently.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from . import ops, rules
from .contributions import Affine, Contribution, Full, Outer, Positions, inner
from .errors import BatchCouplingError, GhostgradError, TapStateError, UnsupportedUseError
from .layout import ELEMENTWISE, FACTORIES, PLAIN, AnyLayout, Known, Layout, Mixed, placed, propagate
from .reference import accumulation_dtype
from .rules import Call, writes_in_place
from .samplewise import POINTWISE, hint, static, tracing

__all__ = ["Tap", "declare_samples", "leading_to_leaves", "tap", "total"]


class _Active(threading.local):
    def __init__(self) -> None:
        self.taps: list[Tap] = []  # whose blocks are open in this thread, innermost last


_ACTIVE = _Active()

_DENSE = (Tensor, nn.Parameter)  # what is no subclass, and so is not sharded
_LINEAR = nn.functional.linear
_OF_MODULES = vars(nn.Module()).keys()  # what every module has; a tensor under another name is a constant of the user's

# Functions that look at a tensor without using its value in a differentiable way, or hand it out as an object: they get the original.
_PASSIVE = frozenset(
    "size dim ndimension stride storage_offset numel nelement element_size is_contiguous is_floating_point is_complex data_ptr storage untyped_storage "
    "get_device __len__ __hash__ __repr__ __format__ __bool__ __deepcopy__ __reduce_ex__ __set__ requires_grad_ register_hook retain_grad backward grad item "
    "register_post_accumulate_grad_hook tolist numpy __array__ is_set_to is_shared share_memory_ is_same_size is_nonzero allclose equal is_inference "
    "result_type can_cast is_tensor is_storage _is_view has_names dim_order".split()
)
_TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "real", "imag", "data"))
_DETACHED = frozenset(("data", "detach", "detach_"))
# The derived tensor holds the root's elements, each once, in the same shape.
_COPIES = frozenset(("to", "type_as", "clone", "contiguous", "float", "double", "half", "bfloat16", "cuda", "cpu"))
_OVERLAPPING = frozenset(("as_strided", "unfold"))
_EXPANSIONS = frozenset(("expand", "expand_as", "broadcast_to"))


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, those inside of containers included."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value, {})
        elif isinstance(value, dict):
            found += _tensors((), value)
    return found


# ---------------------------------------------------------------------------------------------------------------------------------------
# Collectors


class _View(NamedTuple):
    """A tensor that shows elements of a collector's tensor, each at most once. Derivatives lead from ``tensor`` to ``root``."""

    tensor: Tensor
    root: Tensor


_Pending = tuple[Contribution, _View | None]
_POOL, _LAYERS = "(compiled)", "(layers)"  # not parameters' names
Consumer = Callable[["_LeafNode", Sequence[_Pending]], tuple[Tensor | None, Tensor | None]]


class _Pass:
    """What one forward and backward through a tap leaves behind."""

    def __init__(self, batch_size: int | None):
        self.batch_size = batch_size
        self.seen_input = False  # the tapped module has been called: what carries samples is known, not guessed
        self.armed = True  # collectors collect; afterwards they let gradients through
        self.leaves: dict[str, Tensor] = {}
        self.nodes: dict[int, _LeafNode] = {}
        self.derived_nodes: list[_DerivedNode] = []
        self.layers: list[_Layer] = []
        self.repeats = False  # more than one backward runs through the graph, each read by itself
        self.recomputes = False  # a part of the forward may run again in backward (checkpointing)
        self.recomputing = False  # it does so now
        self.repeated: set[str] = set()  # parameters that more than one backward reached
        self.bypassed: set[str] = set()
        self.norms: dict[str, Tensor] | None = None
        self.grad_sqnorms: dict[str, Tensor] | None = None  # of the batch's gradients as they arrive at the parameters, if asked for
        self.regions: Any = None  # of compiled code: see ghostgrad.compiled
        self.observe: Callable[[Sequence[_Node], Callable[[], Any]], Any] | None = None  # runs the collectors of some nodes, for ghostgrad.explain
        self.consume: Consumer | None = None  # makes something else of a parameter's contributions: its gradient and the tap's, if any
        self.squares: dict[str, Tensor] = {}  # second moments, if asked for
        self.output_bytes = 0  # of the operations that use parameters, and so of what all contributions hold beside what autograd keeps

    def expect_backward(self) -> None:
        """Another backward will be read apart from those before it."""
        self.repeats = True
        for node in self.nodes.values():
            node.collected = None
        if self.regions is not None:
            self.regions.backwards = 0

    @property
    def compiled(self) -> bool:
        """True if compiled code has run under the tap."""
        return self.regions is not None and self.regions.batch_size is not None

    def sources(self) -> dict[str, Tensor]:
        """The tensors whose gradients are the norms: the leaves by key, and what compiled code has instead of them."""
        return {**self.leaves, _POOL: self.regions.pool} if self.compiled else self.leaves

    def close(self) -> None:
        """Lets gradients through from now on, and frees what the graph would otherwise keep alive in a cycle."""
        self.armed = False
        for node in (*self.nodes.values(), *self.derived_nodes):
            node.release()
        for layer in self.layers:
            layer.release()


class _Node:
    """Where the uses of one parameter (or of one derived parameter) meet."""

    parents: Sequence[tuple[Tensor, _Node, _View | None]] = ()

    def __init__(self, owner: _Pass, name: str, source: Tensor):
        self.owner, self.name, self.dtype, self.shape = owner, name, source.dtype, source.shape
        self.uses: dict[str, int] = {}  # operation -> how often, for reports
        self._pending: dict[int, list[_Pending]] = {}  # by backward pass
        self._attached: Tensor | None = None
        self._in_layer: Tensor | None = None  # what a layer's own operation works on, instead

    @property
    def attached(self) -> Tensor:
        """The tensor that goes into the operations."""
        if self._attached is None:
            assert self._in_layer is not None
            self._attached = _Apart.apply(self, self._in_layer)
        return self._attached

    def collect(self, grad: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Runs in backward when all uses are in: the gradients of ``source`` and of the tap. ``grad``: that of the only use, if it is there already."""
        raise NotImplementedError

    def observed(self, grad: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`collect`, by way of who observes it."""
        observe = self.owner.observe
        return self.collect(grad) if observe is None else observe((self,), lambda: self.collect(grad))

    def release(self) -> None:
        self._attached = self._in_layer = None
        self._pending.clear()
        self.parents = ()

    def add(self, contribution: Contribution, view: _View | None) -> None:
        """Takes the contribution of a use, of the node's tensor itself or of a view of it."""
        self._pending.setdefault(torch._C._current_graph_task_id(), []).append((contribution, view))

    def refuse(self, grad: Tensor | None) -> None:
        """Raises if a plain gradient has arrived."""
        if grad is not None:
            raise UnsupportedUseError(
                f"ghostgrad: parameter {self.name!r} received a gradient from a use that has no per-sample form: a term that is added to the loss of the "
                "whole batch (weight decay, say), or a gradient penalty. Add the term to each sample's loss, or keep it out of the tapped block."
            )

    def take(self) -> list[_Pending]:
        taken = self._pending.pop(torch._C._current_graph_task_id(), [])
        self._pending.clear()
        return taken

    def will_run(self) -> bool:
        attached = self._attached if self._in_layer is None else self._in_layer
        function = None if attached is None else attached.grad_fn
        return function is not None and torch._C._will_engine_execute_node(function)

    def roots(self) -> set[_LeafNode]:
        """The parameters' collectors that this one leads to."""
        return set().union(*(node.roots() for _, node, _ in self.parents))


def _pull_back(view: _View, grad: Tensor, batched: bool = False) -> Tensor:
    """The vector-Jacobian product of a view, for one gradient or for a batch of them."""
    grad = static(grad) if batched else grad
    (pulled,) = torch.autograd.grad(
        view.tensor, view.root, grad.to(view.tensor.dtype), retain_graph=True, create_graph=torch.is_grad_enabled(), is_grads_batched=batched
    )
    return pulled


def _merge(contributions: Sequence[_Pending]) -> list[_Pending]:
    """One contribution for all uses of the same elements in the same form: outer products are concatenated along T, full ones added."""
    alike: dict[Any, list[_Pending]] = {}
    for c, view in contributions:
        alike.setdefault((c.form(), None if view is None else _geometry(view.tensor)), []).append((c, view))
    return [(uses[0][0] if len(uses) == 1 else uses[0][0].join([c for c, _ in uses[1:]]), uses[0][1]) for uses in alike.values()]


def total(contributions: Sequence[_Pending], weights: Tensor | None = None) -> Tensor:
    """The sum over samples and uses: the ordinary gradient, or one in which sample i counts ``weights[i]`` times."""
    sums = ((c.total() if weights is None else c.weighted_total(weights), view) for c, view in contributions)
    return functools.reduce(torch.add, [part if view is None else _pull_back(view, part) for part, view in sums])


def _materialise(contributions: Sequence[_Pending]) -> Tensor:
    """The per-sample gradients themselves, (B, *shape), summed over the uses."""
    parts = (c.materialise() if view is None else _pull_back(view, c.materialise(), batched=True) for c, view in contributions)
    total = next(parts)
    for part in parts:
        total = total + part
    return total


class _Collect(torch.autograd.Function):
    """The identity on parameters; its backward is where their uses meet."""

    @staticmethod
    def forward(ctx: Any, nodes: tuple[_Node, ...], layer: _Layer | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """``tensors``: the parameters, and for each the leaf of the tap or None."""
        ctx.nodes, ctx.layer = nodes, layer
        ctx.set_materialize_grads(False)
        return tuple(source.detach() for source in tensors[: len(nodes)] if source is not None)  # aliases, not views: the optimiser may step in the block

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nodes: tuple[_Node, ...] = ctx.nodes
        if not nodes[0].owner.armed:
            return (None, None, *grads, *(None,) * len(nodes))
        if ctx.layer is not None:
            return (None, None, *ctx.layer.collect(grads))
        for node, grad in zip(nodes, grads):
            node.refuse(grad)
        with torch._C.DisableTorchFunction():  # interception goes on in backward while a checkpoint recomputes
            collected = [node.observed() for node in nodes]
        return (None, None, *(grad for grad, _ in collected), *(sqnorm for _, sqnorm in collected))


class _Apart(torch.autograd.Function):
    """The identity on a parameter that a layer's own operation works on, for its other uses: a gradient that comes this way is none of the layer's."""

    @staticmethod
    def forward(ctx: Any, node: _Node, parameter: Tensor) -> Tensor:
        ctx.node = node
        ctx.set_materialize_grads(False)
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        if not ctx.node.owner.armed:
            return None, grad
        ctx.node.refuse(grad)
        return None, None


class _Layer:
    """A linear layer on one position for each sample, (B, p). Its norms are products of two numbers, ``||b_i||^2 ||a_i||^2`` for the weight and
    ``||b_i||^2`` for the bias, so there is nothing to fuse: torch's own operation runs on parameters that share one collector, its backward forms the
    gradients as always, and a hook on it brings ``b``. Where the weight or the bias has other uses too, these gradients are dropped and formed with theirs.
    """

    __slots__ = ("_b", "_nodes", "_recorded", "_task", "_version", "_x", "edge")

    def __init__(self, x: Tensor, nodes: Sequence[_LeafNode], sources: Sequence[Tensor]):
        self._x: Tensor | None = x  # (B, p)
        self._b: Tensor | None = None  # (B, d)
        self.edge: Any = None  # where b arrives: the operation in autograd's graph
        self._version, self._nodes = x._version, nodes
        self._task = self._recorded = -1  # the last backward pass that ran through the operation, and the last one that was recorded
        tensors = _Collect.apply(tuple(nodes), self, *sources, *(node.leaf for node in nodes))
        for node, tensor in zip(nodes, tensors):
            node._in_layer = tensor

    def __call__(self, grad_inputs: Any, grad_outputs: tuple[Tensor | None, ...]) -> None:
        """Hook of the operation's backward."""
        if self._nodes[0].owner.armed:
            self._task, self._b = torch._C._current_graph_task_id(), grad_outputs[0]
            if torch.is_grad_enabled():
                self._recorded = self._task

    def release(self) -> None:
        self._x = self._b = self.edge = None

    def input(self) -> Tensor | None:
        x = self._x
        if x is not None and x._version != self._version:
            raise RuntimeError(
                f"ghostgrad: the input of the layer with parameter {self._nodes[0].name!r} was modified by an in-place operation before backward"
            )
        return x

    @property
    def collector(self) -> Any:
        """Its node in autograd's graph."""
        return None if self._nodes[0]._in_layer is None else self._nodes[0]._in_layer.grad_fn

    def alone(self) -> bool:
        """True if its parameters have no other uses."""
        return all(node._attached is None for node in self._nodes)

    def contribute(self, x: Tensor, b: Tensor) -> None:
        """Hands the contributions to the collectors."""
        self._nodes[0].add(Outer(x.unsqueeze(1), b.unsqueeze(1)), None)
        if len(self._nodes) > 1:
            self._nodes[1].add(Affine(Positions(b[:, None, :, None]), False, b.shape[1:]), None)

    def _sqnorm(self, x: Tensor, b: Tensor) -> Tensor:
        """Of all parameters together."""
        of_bias, of_input = ops.row_sqnorm(b), ops.row_sqnorm(x)
        return of_bias * of_input if len(self._nodes) == 1 else torch.addcmul(of_bias, of_bias, of_input)

    def collect(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters, and of their leaves. ``grads``: what the operation's backward made of them."""
        nodes, x, b, task = self._nodes, self.input(), self._b, torch._C._current_graph_task_id()
        if self._task != task or self._recorded not in (-1, task):  # not from the operation itself, or not alone: from a gradient penalty
            for node, grad in zip(nodes, grads):
                node.refuse(grad)
        if b is None or self._task != task:  # the parameters' other uses alone
            collected = [node.observed() for node in nodes]
            return (*(grad for grad, _ in collected), *(sqnorm for _, sqnorm in collected))
        self._b = None
        if x is None:  # the second backward through this graph, which sqnorms() refuses
            for node, grad in zip(nodes, grads):
                node.reach()
                node.hand_out(grad)
            return (*grads, *(None,) * len(nodes))
        if not nodes[0].owner.repeats:
            self._x = None
        if nodes[0].leaf is nodes[-1].leaf and nodes[0].owner.consume is None and not any(node._pending for node in nodes):
            for node, grad in zip(nodes, grads):
                node.reach()
                node.hand_out(grad)
            observe = nodes[0].owner.observe
            sqnorm = self._sqnorm(x, b) if observe is None else observe(nodes, lambda: self._sqnorm(x, b))
            return (*grads, _like(sqnorm, nodes[0].leaf), *(None,) * (len(nodes) - 1))
        self.contribute(x, b)
        collected = [node.observed(grad) for node, grad in zip(nodes, grads)]
        return (*(grad for grad, _ in collected), *(sqnorm for _, sqnorm in collected))


class _LeafNode(_Node):
    """The collector of a parameter in one tap: gives its gradient and the tap's. ``outer`` is its collector in the enclosing tap, if any."""

    def __init__(self, owner: _Pass, name: str, source: Tensor, leaf: Tensor, admit: Callable[[int], None], want_grad: bool, outer: _LeafNode | None):
        super().__init__(owner, name, source)
        self.key, self.leaf, self.outer, self.want_grad, self.admit = id(source), leaf, outer, want_grad, admit
        self.returned: tuple[Any, ...] | None = None  # identity of the gradient that was handed out
        self.collected: int | None = None  # the backward pass that reached this parameter

    def roots(self) -> set[_LeafNode]:
        return {self}

    def reach(self) -> None:
        """Notes which backward pass it is."""
        task = torch._C._current_graph_task_id()
        if self.collected not in (None, task):
            self.owner.repeated.add(self.name)
        self.collected = task

    def hand_out(self, grad: Tensor | None) -> Tensor | None:
        """Notes the gradient: no other may arrive at the parameter."""
        if grad is not None:
            self.returned = _identity(grad)
        return grad

    def collect(self, grad: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        contributions = self.take()
        if not contributions:
            return None, None
        self.reach()
        for c, _ in contributions:
            if c.batch_size != self.leaf.shape[0]:
                raise TapStateError(f"ghostgrad: parameter {self.name!r} was used with {c.batch_size} samples in a tap of batch size {self.leaf.shape[0]}")
        if self.owner.consume is not None:
            formed, sqnorm = self.owner.consume(self, contributions if len(contributions) == 1 else _merge(contributions))
            return self.hand_out(formed), sqnorm
        want = self.want_grad
        if want and self.outer is not None and self.outer.owner.armed:  # then the enclosing tap forms the gradient
            want = False
            if self.outer.will_run():
                for c, view in contributions:
                    self.outer.add(c, view)
        if len(contributions) > 1:
            contributions, grad = _merge(contributions), None
        formed, sqnorm = self.grad_and_sqnorm(contributions, want and grad is None)
        grad = None if not want else formed if grad is None else grad
        if grad is not None and grad.dtype != self.dtype:
            grad = grad.to(self.dtype)
        return self.hand_out(grad), sqnorm

    def grad_and_sqnorm(self, contributions: Sequence[_Pending], want: bool) -> tuple[Tensor | None, Tensor]:
        """The gradient, if wanted, and the squared norms: uses of the same elements are added before they are squared, uses of disjoint elements may be squared
        apart. Only what is formed for each sample takes two passes."""
        grads: list[Tensor] = []
        squares: list[Tensor] = []
        for group in [contributions] if len(contributions) == 1 else _overlapping_groups(contributions, self.attached):
            cross = inner(group[0][0], group[1][0]) if len(group) == 2 and all(view is None for _, view in group) else None
            if len(group) > 1 and cross is None:
                self.admit(self.leaf.shape[0] * self.shape.numel() * self.dtype.itemsize)
                squares.append(ops.row_sqnorm(_materialise(group)))
                grads += [total(group)] * want
                continue
            if cross is not None:  # ||g + h||^2
                squares.append(2 * cross)
            for c, view in group:
                summed, square = c.total_and_sqnorm() if want else (None, c.sqnorm())
                squares.append(square)
                if summed is not None:
                    grads.append(summed if view is None else _pull_back(view, summed))
        sqnorm = functools.reduce(torch.add, squares)
        if type(sqnorm) is not Tensor and hasattr(sqnorm, "full_tensor"):  # squares of a sharded parameter's parts
            sqnorm = sqnorm.full_tensor()
        return functools.reduce(torch.add, grads) if want else None, _like(sqnorm, self.leaf)


class _DerivedNode(_Node):
    """The collector of a function of parameters: pulls the per-sample gradients back to what it was computed from, by one batched VJP."""

    def __init__(self, owner: _Pass, name: str, source: Tensor, parents: Sequence[tuple[Tensor, _Node, _View | None]]):
        super().__init__(owner, name, source)
        self.source, self.parents = source, parents
        (self._attached,) = _Collect.apply((self,), None, source, None)

    def release(self) -> None:
        super().release()
        del self.source

    def collect(self, grad: Tensor | None = None) -> tuple[None, None]:
        contributions = self.take()
        if contributions:
            per_sample = static(_materialise(contributions).to(self.dtype))  # (B, *shape)
            pulled = torch.autograd.grad(
                self.source,
                [tensor for tensor, _, _ in self.parents],
                per_sample,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                is_grads_batched=True,
                allow_unused=True,
            )
            for grad, (_, node, view) in zip(pulled, self.parents):
                if grad is not None:
                    node.add(Full(grad), view)
        return None, None


def _box(view: _View, root: Tensor) -> list[tuple[int, int]] | None:
    """The range of indices, per dimension of ``root``, that a view covers; None if that cannot be told (then it counts as everything)."""
    t = view.tensor
    if t.numel() == root.numel() or _memory(t) != _memory(root):
        return None
    strides = root.stride()
    order = sorted((d for d in range(root.dim()) if root.size(d) > 1), key=lambda d: -strides[d])
    offset, starts = int(t.storage_offset()) - int(root.storage_offset()), [0] * root.dim()
    for d in order:
        starts[d], offset = divmod(offset, root.stride(d))
    ends = list(starts)
    for size, stride in zip(t.size(), t.stride()):
        if size <= 1:
            continue
        dim = next((d for d in order if root.stride(d) <= stride), None)
        if dim is None or stride % root.stride(dim):
            return None
        ends[dim] += (size - 1) * (stride // root.stride(dim))
        if ends[dim] >= root.size(dim):
            return None
    return None if offset else list(zip(starts, ends))


def _overlapping_groups(contributions: Sequence[_Pending], root: Tensor) -> list[list[_Pending]]:
    """Splits contributions into groups such that those of different groups touch disjoint elements of ``root``."""
    if len(contributions) == 1 or any(view is None for _, view in contributions):
        return [list(contributions)]
    groups: list[tuple[list[Any], list[_Pending]]] = []  # the boxes of a group, and its members
    for pending in contributions:
        assert pending[1] is not None
        box = _box(pending[1], root)
        joined: tuple[list[Any], list[_Pending]] = ([box], [pending])
        apart = []
        for group in groups:
            if any(box is None or other is None or all(a <= d and c <= b for (a, b), (c, d) in zip(box, other)) for other in group[0]):
                joined = (group[0] + joined[0], group[1] + joined[1])
            else:
                apart.append(group)
        groups = [*apart, joined]
    return [members for _, members in groups]


class _Use:
    """One use's way to its node: the :class:`ghostgrad.rules.Sink`."""

    __slots__ = ("node", "view")

    def __init__(self, node: _Node, view: _View | None):
        self.node, self.view = node, view

    def wanted(self) -> bool | None:
        if not self.node.owner.armed:
            return False
        return True if self.node.will_run() else None

    def add(self, contribution: Contribution) -> None:
        self.node.add(contribution, self.view)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The tap


class _Trace:
    """What is known of the tensors of the running forward pass; nested taps share it."""

    def __init__(self) -> None:
        self.derived: dict[int, tuple[Tensor, _Node, _View | None]] = {}  # functions of parameters, held so that their ids stay theirs
        self.expanded: dict[int, Tensor] = {}  # id of an expanded parameter -> the parameter before it was expanded
        self.layouts: dict[int, tuple[weakref.ref[Tensor], AnyLayout]] = {}  # layouts other than the plain one
        self.data: dict[int, weakref.ref[Tensor]] = {}  # tensors without gradient that carry samples
        self.shared: dict[int, weakref.ref[Tensor]] = {}  # tensors with gradient that carry none

    def forget(self, owner: _Pass) -> None:
        """Lets go of what belongs to a pass that is over, and of what no longer lives."""
        self.derived = {key: entry for key, entry in self.derived.items() if entry[1].owner is not owner}
        self.expanded = {key: t for key, t in self.expanded.items() if key in self.derived}
        self.layouts = {key: entry for key, entry in self.layouts.items() if entry[0]() is not None}
        self.data = {key: ref for key, ref in self.data.items() if ref() is not None}
        self.shared = {key: ref for key, ref in self.shared.items() if ref() is not None}


def _is(ref: weakref.ref[Tensor] | None, t: Tensor) -> bool:
    return ref is not None and ref() is t


class Tap(TorchFunctionMode):
    """Per-sample squared gradient norms of what runs inside its block. Made by :func:`tap`, which documents the arguments."""

    _make_regions: Callable[[Tap], Any]  # both are set by ghostgrad.compiled, which stands after this module
    _make_stand_in: Callable[[nn.Module], Any]

    def __init__(
        self,
        target: nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor],
        *,
        by_param: bool = False,
        reduction: str = "mean",
        batch_size: int | None = None,
        batch_dim: int = 0,
        params: Iterable[Tensor | str] | None = None,
        constants: Iterable[Tensor] = (),
        expand_limit: int = 1 << 31,
        moments: bool = False,
        want_grad: bool = True,
        grad_sqnorm: bool = False,
    ):
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"ghostgrad.tap: reduction says how the loss was averaged over the samples and must be 'mean' or 'sum', got {reduction!r}")
        if batch_size is not None and batch_size < 0:
            raise ValueError(f"ghostgrad.tap: batch_size must not be negative, got {batch_size}")
        self.by_param, self.reduction, self.expand_limit, self.batch_dim = by_param, reduction, expand_limit, batch_dim
        self._module = target if isinstance(target, nn.Module) else None
        self._entry = getattr(target, "_orig_mod", self._module)  # the module whose call says what the batch is
        modules = [] if self._module is None else list(self._module.named_modules())
        self._names = _named(target, modules, params)  # id -> (name, parameter)
        self._wide = False
        for _, p in self._names.values():
            self._wide |= p.dtype == torch.float64
            if type(p) not in _DENSE and hasattr(p, "to_local"):
                from . import distributed as distributed  # tells torch how the ops run on sharded tensors
        self._given_batch_size = batch_size
        self._constants = {id(t): t for t in constants}
        for _, module in modules:
            own = vars(module)
            for tensor in (*own["_parameters"].values(), *own["_buffers"].values(), *(own[name] for name in own.keys() - _OF_MODULES)):
                if isinstance(tensor, Tensor):
                    self._constants[id(tensor)] = tensor
        self._want_grad, self._moments = want_grad, moments
        self._measure = grad_sqnorm
        self._left: dict[int, weakref.ref[Tensor]] = {}  # the .grad of the parameters when the block ended
        self._open = False
        self._handles: list[Any] = []
        self._warned: set[tuple[str, str]] = set()
        self._pass = _Pass(batch_size)
        self._trace = _Trace()

    # -- the block

    def __enter__(self) -> Tap:
        if self._open:
            raise TapStateError("ghostgrad: this tap's block is open already; make another tap for a nested block")
        taps = _ACTIVE.taps
        self._open, self._pass, self._trace = True, self._new_pass(), taps[-1]._trace if taps else _Trace()
        if self._entry is not None:
            self._handles.append(self._entry.register_forward_pre_hook(_input_hook(self), prepend=True, with_kwargs=True))
            if "forward" not in vars(self._entry):
                self._handles.append(type(self)._make_stand_in(self._entry))
        for name, p in self._names.values():
            self._handles.append(p.register_hook(self._gradient_hook(name, p)))
        taps.append(self)
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        while _ACTIVE.taps[-1] is not self:  # a compilation that failed has left its tap open
            _ACTIVE.taps.pop()
        modes = _get_current_function_mode_stack()
        for mode in reversed(modes[modes.index(self) + 1 :] if self in modes else ()):
            TorchFunctionMode.__exit__(mode, None, None, None)
        super().__exit__(exc_type, exc_value, traceback)
        _ACTIVE.taps.remove(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pass.close()
        self._left = {key: weakref.ref(p.grad) for key, (_, p) in self._names.items() if p.grad is not None}
        self._trace, self._open = _Trace(), False
        if isinstance(inner_error := getattr(exc_value, "inner_exception", None), GhostgradError):
            raise inner_error from exc_value  # the compiler's error wraps ours

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """For rules of composite functions: interception goes on inside."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    @property
    def batch_size(self) -> int | None:
        """B, once it is known."""
        return self._pass.regions.batch_size if self._pass.compiled else self._pass.batch_size

    def reset(self) -> None:
        """Forgets the last pass, for another one in the same block. Calling the tapped module after the norms were read does it by itself."""
        self._pass.close()
        self._trace.forget(self._pass)
        self._pass = self._new_pass()

    def _new_pass(self) -> _Pass:
        new = _Pass(self._given_batch_size)
        new.consume = self._take_moments if self._moments else None
        new.grad_sqnorms = {} if self._measure else None
        if self._entry is not None and "torch._dynamo" in sys.modules:  # this process may compile; if not, it costs nothing
            new.regions = type(self)._make_regions(self)
        return new

    def _see_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The tapped module is called: its inputs carry the samples."""
        if self._pass.norms is not None:
            self.reset()
        leaves = args if not kwargs and all(isinstance(t, Tensor) for t in args) else pytree.tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim() > self.batch_dim]
        if not tensors:
            return
        sizes = [t.shape[self.batch_dim] for t in tensors]
        size = self._given_batch_size if self._given_batch_size in sizes else sizes[0]  # declared, it may be that of a later input (the offsets of bags)
        if self._pass.batch_size not in (None, size):
            raise TapStateError(
                f"ghostgrad: the tap has batch size {self._pass.batch_size} and the model is called with {size} samples (dimension {self.batch_dim} of its "
                "first tensor input). Use one block per batch, or declare the sample dimension with gg.tap(..., batch_dim=...)."
            )
        self._pass.batch_size, self._pass.seen_input = size, True
        for t in tensors:
            if t.shape[self.batch_dim] == size and id(t) not in self._constants:
                if not t.requires_grad:
                    self._trace.data[id(t)] = weakref.ref(t)
                self._mark(t, Layout(self.batch_dim))

    def _see_gradient(self, name: str, key: int, grad: Tensor | None) -> None:
        """Tensor hook of a parameter: its gradient must be the one that its outermost collector handed out."""
        if grad is None or not self._pass.armed:
            return
        if self._pass.grad_sqnorms is not None:
            with torch._C.DisableTorchFunction():
                self._pass.grad_sqnorms[name] = _sqnorm(grad)
        node = self._pass.nodes.get(key)
        while node is not None and node.outer is not None and node.outer.owner.armed:
            node = node.outer
        if node is None and self._pass.compiled and key in self._pass.regions.covered:
            return
        if node is None or node.returned != _identity(grad):
            self._pass.bypassed.add(name)

    # -- interception

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # records the user's operations as they are; ghostgrad.compiled is there when they are differentiated
            return args[0].unflatten(*args[1:], **kwargs) if func is Tensor.unflatten else func(*args, **kwargs)  # which it cannot follow as a function
        if _ACTIVE.taps[-1] is not self:  # the innermost tap serves all
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _TENSOR_PROPERTIES:
                return func(*args, **kwargs)
        elif name in _PASSIVE:
            if name not in ("backward", "grad"):
                return func(*args, **kwargs)
            if args and self._pass.armed:
                self._refuse_entangled(args[0])
            return self._backward(func, args, kwargs)
        if self._pass.compiled:
            if not torch.is_grad_enabled():  # the inside of a graph that a backend runs
                return func(*args, **kwargs)
            if self._pass.batch_size is None:
                self._pass.batch_size, self._pass.seen_input = self._pass.regions.batch_size, True
        tensors = _tensors(args, kwargs)
        if torch._C._are_functorch_transforms_active() and any(_requires_grad(t) for t in tensors):
            raise self._transformed(name, tensors)
        self._pass.recomputes |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if torch.is_grad_enabled():
            if func is _LINEAR and not kwargs and (direct := self._linear(func, *args)) is not None:
                return direct
            for t in tensors:
                if self._is_tracked(t):
                    return func(*args, **kwargs) if name in _DETACHED else self._use(func, name, tensors, args, kwargs)
            if name == "batch_norm":
                rules.refuse_batch_statistics(self, args, kwargs)
        elif not self._pass.recomputes and any(map(self._is_tracked, tensors)):
            self._pass.recomputes = True  # a reentrant checkpoint's first run looks like this
        blank = self._blank(args[0]) if args and writes_in_place(name) else None
        out = func(*args, **kwargs)
        if tensors and self._pass.batch_size is not None and name not in FACTORIES:
            self._follow(func, name, tensors, args, kwargs, out)
            if blank is not None:
                self._mark(blank, self._of_base(args[0], blank))
        return out

    def _blank(self, t: Any) -> Tensor | None:
        """What is about to be written through a view, if nothing that carries samples was written there yet."""
        base = t._base if isinstance(t, Tensor) and t._is_view() else None
        return None if base is None or base is t or self._is_data(base) else base

    def _of_base(self, view: Tensor, base: Tensor) -> AnyLayout:
        """Where the samples lie in a tensor after they were written into a view of it."""
        layout = self._layout_of(view)
        if isinstance(layout, Mixed):
            return layout
        there = [d for d in range(base.dim()) if (base.stride(d), base.size(d)) == (view.stride(layout.dim), view.size(layout.dim))]
        return layout.at(there[0]) if len(there) == 1 else Mixed(f"samples were written into a view of shape {tuple(view.shape)} of a constant")

    def _refuse_entangled(self, losses: Any) -> None:
        """Raises if what is differentiated is not a sum over the samples."""
        for loss in losses if isinstance(losses, (list, tuple)) else [losses]:
            layout = self._layout_of(loss) if isinstance(loss, Tensor) else None
            if isinstance(layout, Mixed) and layout.gradient == "entangled":
                raise BatchCouplingError(
                    f"ghostgrad: the loss is no sum over the samples: it is computed from a tensor in which they are mixed ({layout.reason}), so there is no "
                    "gradient of one sample's loss. Take that term out of the tapped loss, or keep the samples apart in it."
                )

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Backward over a checkpointed forward: what it recomputes must take the same way as before, so interception goes on. Only recomputation runs torch
        functions with gradients enabled there, unless the backward itself is recorded; then this is left alone, and the checkpoint raises."""
        if self._pass.compiled:
            roots = args[0] if args else kwargs["outputs"]
            self._pass.regions.read_graph([roots] if isinstance(roots, Tensor) else roots)
        if not self._pass.recomputes or self._pass.compiled or kwargs.get("create_graph"):  # what was compiled recomputes by itself
            return func(*args, **kwargs)
        before, self._pass.recomputing = self._pass.recomputing, True
        try:
            with self.resumed():
                return rules.body(func)(*args, **kwargs)
        finally:
            self._pass.recomputing = before

    def _follow(self, func: Any, name: str, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Keeps track of where the samples are in the result of a call that uses no parameter."""
        outputs = [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)] if isinstance(out, (tuple, list)) else []
        if name == "__setitem__" and any(isinstance(t, Tensor) and self._is_data(t) for t in (args[0], args[2])):
            outputs = [args[0]]
        data = [t for t in tensors if self._is_data(t)]
        trace, batch_size = self._trace, self._pass.batch_size
        assert batch_size is not None
        if not data:
            for output in outputs:
                if output.requires_grad:
                    trace.shared[id(output)] = weakref.ref(output)
            return
        for output in outputs:
            if not output.requires_grad:
                trace.data[id(output)] = weakref.ref(output)
        if batch_size == 1:
            return  # see _layout_of
        samplewise = name in POINTWISE or (name in ELEMENTWISE and len(data) == 1 and all(o.dim() == data[0].dim() for o in outputs))
        if trace.layouts or not samplewise or any(o.dim() == 0 or o.shape[0] != batch_size for o in outputs):
            inputs = [(t, self._layout_of(t)) for t in data]
            for output, layout in zip(outputs, propagate(func, name, inputs, args, kwargs, outputs, batch_size)):
                if output._is_view() and writes_in_place(name) and isinstance(layout, Mixed) and output._base is not None:
                    self._mark(output._base, layout)  # what a part shows is now there in the whole
                self._mark(output, layout)

    def _use(self, func: Any, name: str, leaves: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call with at least one tracked parameter among its arguments."""
        parameters = [t for t in leaves if self._is_tracked(t)]
        others = [t for t in leaves if not any(t is p for p in parameters)]
        if not any(map(self._is_data, others)):
            # Before the batch is known there is nothing to attach to; should the result reach the loss, the hooks on the parameters will see it.
            if self._pass.batch_size is not None:
                return self._derive(func, args, kwargs)
            out = func(*args, **kwargs)
            self._trace.shared.update((id(t), weakref.ref(t)) for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out
        if self._pass.batch_size is None:
            raise self._no_batch_size(parameters[0])
        if self._pass.compiled:
            raise UnsupportedUseError(
                f"ghostgrad: parameter {self._name_of(parameters[0])!r} is used in '{name}' outside of the compiled call, and where the samples lie in what "
                "such a call returns is not known. Compile a module or function that holds this use as well."
            )
        if name == "batch_norm":
            rules.refuse_batch_statistics(self, args, kwargs)
        rule = rules.rule_for(func) or rules.reference_call
        if len(parameters) > 1 and len(_ACTIVE.taps) == 1:
            self._attach_first({id(p): p for p in parameters if id(p) in self._names and id(p) not in self._pass.nodes})
        label = name if rule is not rules.reference_call else f"{name} (reference)"
        for parameter in parameters:
            node = self._node_of(parameter)
            for root in node.roots():
                if root.owner is not self._pass and root.key in self._names:
                    raise UnsupportedUseError(
                        f"ghostgrad: {node.name!r} was computed before the innermost tap's block began, so that tap cannot see its use in '{name}'. "
                        "Compute it inside the block."
                    )
                if not self._pass.recomputing:
                    root.uses[label] = root.uses.get(label, 0) + 1
        call = Call(self, func, args, kwargs)
        out = rule(call, *args, **kwargs)
        if not (call.followed or tracing()):  # where interception went on inside, the operations were seen one by one
            self._pass.output_bytes += sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
        if self._trace.layouts and not call.followed:  # what the rule does not say follows from the inputs
            data = [(t, self._layout_of(t)) for t in others if self._is_data(t)]
            silent = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and not any(t is marked for marked in call.marked)]
            if silent and any(layout != PLAIN for _, layout in data) and self._pass.batch_size != 1:
                for t, layout in zip(silent, propagate(func, name, data, args, kwargs, silent, self._pass.batch_size)):
                    self._mark(t, layout)
        return out

    # -- what a tensor is

    def _is_tracked(self, t: Tensor) -> bool:
        key = id(t)
        if key in self._names or key in self._trace.derived:
            return True
        if len(_ACTIVE.taps) > 1 and any(key in tap._names for tap in _ACTIVE.taps):
            return True
        return isinstance(t, nn.Parameter) and key not in self._constants and self._meet(t)

    def _meet(self, p: nn.Parameter) -> bool:
        """A parameter object that was not there when the block began: sharded training swaps a module's parameters while its forward runs."""
        found = False
        for tap in _ACTIVE.taps:
            wanted = {name for name, _ in tap._names.values()}
            for name, now in tap._module.named_parameters() if tap._module is not None else ():
                if now is p and name in wanted and p.requires_grad:
                    tap._names[id(p)] = (name, p)
                    tap._handles.append(p.register_hook(tap._gradient_hook(name, p)))
                    found = True
        if not found:
            self._constants[id(p)] = p
        return found

    def _gradient_hook(self, name: str, p: Tensor) -> Callable[[Tensor | None], None]:
        key = id(p)
        return lambda grad: self._see_gradient(name, key, grad)

    def _is_data(self, t: Tensor) -> bool:
        key = id(t)
        if t.requires_grad:
            return not (key in self._constants or _is(self._trace.shared.get(key), t) or isinstance(t, nn.Parameter))
        if key in self._constants:
            return False
        if _is(self._trace.data.get(key), t):
            return True
        # Functional code: no module is called that says what the batch is, so whatever is as long as the batch is taken to be the batch. And torch wraps
        # inputs into sharded tensors out of sight.
        now = self._pass
        return (
            (not now.seen_input or hasattr(t, "to_local"))
            and now.batch_size is not None
            and t.dim() > self.batch_dim
            and t.shape[self.batch_dim] == now.batch_size
        )

    def _ambiguous(self, p: Tensor, shape: Sequence[int], layout: Known, tensors: Sequence[Tensor]) -> bool:
        """True if a parameter would be taken row by row because of tensors of which only the size says that they carry samples."""
        own = layout.dim - (len(shape) - p.dim())
        if self._pass.seen_input or own < 0 or p.shape[own] == 1 or p.stride(own) == 0:
            return False
        return not any(t.requires_grad for t in tensors if not self._is_tracked(t) and self._is_data(t))

    def _layout_of(self, t: Tensor) -> AnyLayout:
        if self._pass.batch_size == 1 and t.dim():
            return Layout(0, 1, t.shape[0])  # a single sample owns all there is, wherever it lies
        entry = self._trace.layouts.get(id(t))
        if entry is not None and entry[0]() is t:
            return entry[1]
        if not self._pass.seen_input and self.batch_dim and t.dim() > self.batch_dim and t.shape[self.batch_dim] == self._pass.batch_size and t.grad_fn is None:
            return Layout(self.batch_dim)
        if t.dim() == 0 or t.shape[0] != self._pass.batch_size:
            return Mixed(f"its first dimension is {t.shape[0] if t.dim() else 'missing'}, not the batch size {self._pass.batch_size}", unseen=True)
        return PLAIN

    def _mark(self, t: Tensor, layout: AnyLayout) -> None:
        if not t.requires_grad and self._trace is not None:
            self._trace.data[id(t)] = weakref.ref(t)
        if self._pass.batch_size == 1 or (layout == PLAIN and t.dim() and t.shape[0] == self._pass.batch_size):
            self._trace.layouts.pop(id(t), None)
        else:
            self._trace.layouts[id(t)] = (weakref.ref(t), layout)

    def _name_of(self, t: Tensor) -> str:
        for tap in _ACTIVE.taps:
            if id(t) in tap._names:
                return tap._names[id(t)][0]
        return self._trace.derived[id(t)][1].name if id(t) in self._trace.derived else "?"

    def _batch_norm_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        mean, weight = kwargs.get("running_mean", args[1] if len(args) > 1 else None), kwargs.get("weight", args[3] if len(args) > 3 else None)
        for name, module in self._module.named_modules() if self._module is not None else ():
            if any(
                known is not None and known is seen
                for known, seen in ((getattr(module, "running_mean", None), mean), (getattr(module, "weight", None), weight))
            ):
                return f"module '{name}' ({type(module).__name__})"
        return "a call of batch_norm"

    def _transformed(self, name: str, tensors: Sequence[Tensor]) -> UnsupportedUseError:
        parameters = ", ".join(sorted({repr(self._name_of(t)) for t in tensors if self._is_tracked(t)}))
        what = f"parameter {parameters}" if parameters else "a tensor that carries samples"
        return UnsupportedUseError(
            f"ghostgrad: '{name}' uses {what} inside a transform of torch.func (vmap, grad, jvp ...), out of which the samples cannot be followed. Write the "
            "operation for the whole batch, or keep what it uses out of the tapped block."
        )

    def _no_batch_size(self, p: Tensor) -> TapStateError:
        return TapStateError(
            f"ghostgrad: parameter {self._name_of(p)!r} is used before the batch size is known: the tapped module itself has not been called (its first tensor "
            "input says it). Call the module that you tap, or pass gg.tap(..., batch_size=B)."
        )

    # -- attaching

    def _node_of(self, t: Tensor) -> _Node:
        if id(t) in self._trace.derived:
            return self._trace.derived[id(t)][1]
        node: _LeafNode | None = None
        for tap in _ACTIVE.taps:
            if id(t) in tap._names:
                node = tap._own_node(t, node)
        assert node is not None
        return node

    def _own_node(self, p: Tensor, outer: _LeafNode | None) -> _LeafNode:
        node = self._pass.nodes.get(id(p))
        if node is None:
            node = self._new_node(p, outer)
            (node._attached,) = _Collect.apply((node,), None, p if outer is None else outer.attached, node.leaf)
        if node._attached is None or id(node._attached) not in self._trace.derived:
            self._trace.derived[id(node.attached)] = (node.attached, node, None)
        return node

    def _attach_first(self, sources: Mapping[int, Tensor]) -> None:
        """Gives parameters that meet in a call, and have met no samples before, one collector for all."""
        if len(sources) < 2:
            return
        nodes = [self._new_node(p) for p in sources.values()]
        for node, attached in zip(nodes, _Collect.apply(tuple(nodes), None, *sources.values(), *(node.leaf for node in nodes))):
            node._attached = attached
            self._trace.derived[id(attached)] = (attached, node, None)

    def _new_node(self, p: Tensor, outer: _LeafNode | None = None, shared_leaf: str = "") -> _LeafNode:
        now = self._pass
        if now.batch_size is None:
            raise self._no_batch_size(p)
        name = self._names[id(p)][0]
        key = name if self.by_param else shared_leaf
        leaf = now.leaves.get(key)
        if leaf is None:
            dtype = accumulation_dtype(p.dtype) if self.by_param or not self._wide else torch.float64
            leaf = now.leaves[key] = torch.zeros(now.batch_size, dtype=dtype, device=p.device, requires_grad=True)
        admit = lambda copies: self._admit(repr(name), "several overlapping uses", copies)  # noqa: E731
        node = now.nodes[id(p)] = _LeafNode(now, name, p, leaf, admit, self._want_grad, outer)
        return node

    def _linear(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """The first use of a weight and a bias, if it is by a layer that gets along with torch's own operation (see :class:`_Layer`); else None."""
        now, sources = self._pass, (weight,) if bias is None else (weight, bias)
        if (
            not self._want_grad
            or self._moments
            or x.dim() != 2
            or weight.dim() != 2
            or x.shape[0] != now.batch_size
            or now.recomputes
            or now.compiled
            or weight is bias
            or any(id(p) not in self._names or id(p) in now.nodes or type(p) not in _DENSE or p.dtype != x.dtype for p in sources)
            or type(x) is not Tensor
            or len(_ACTIVE.taps) > 1
            or self._is_tracked(x)
            or not self._is_data(x)
            or self._layout_of(x) is not PLAIN
            or x.is_complex()
            or torch._C._is_any_autocast_enabled()
            or (
                x.shape[0] * weight.numel() >= ops.LARGE_PRODUCT
                and ops.plan(x.shape[0], 1, x.shape[1], weight.shape[0], x.dtype, x.device, True).wgrad != "matmul"
            )
        ):
            return None
        nodes = [self._new_node(p, shared_leaf=_LAYERS) for p in sources]
        layer = _Layer(x, nodes, sources)
        now.layers.append(layer)
        out: Tensor = func(x, *(node._in_layer for node in nodes))
        assert out.grad_fn is not None
        out.grad_fn.register_hook(layer)
        layer.edge = torch.autograd.graph.get_gradient_edge(out)
        now.output_bytes += out.nbytes
        for node in nodes:
            node.uses["linear"] = 1
        return out

    def _attach(self, t: Tensor) -> tuple[Tensor, _Use]:
        """The tensor that stands for a tracked one in the graph, and where its contributions go."""
        if id(t) in self._trace.derived:
            tensor, node, view = self._trace.derived[id(t)]
            return tensor, _Use(node, view)
        node = self._node_of(t)
        return node.attached, _Use(node, None)

    def _attach_use(self, t: Tensor) -> tuple[Tensor, _Use]:
        """The same for a use by data: asks whether the copies that a function of parameters needs on the way back may be made."""
        tensor, use = self._attach(t)
        nodes = [use.node]
        while nodes:
            node = nodes.pop()
            if isinstance(node, _DerivedNode):
                self._admit(repr(node.name), "its use by the samples", (self._pass.batch_size or 0) * node.shape.numel() * node.dtype.itemsize)
                nodes += [parent for _, parent, _ in node.parents]
        return tensor, use

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose tensors are parameters, functions of them, and constants: its results are parameters again."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        parents: list[tuple[Tensor, _Node, _View | None]] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and self._is_tracked(leaf):
                tensor, use = self._attach(leaf)
                leaves[i] = tensor.view_as(tensor)  # an alias of its own, so that a VJP with respect to it sees this call alone
                parents.append((leaves[i], use.node, use.view))
                before = tensor
        new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
        name = getattr(func, "__name__", str(func))
        name = getattr(func.__self__, "__name__", name) if name == "__get__" else name
        if writes_in_place(name):
            raise UnsupportedUseError(
                f"ghostgrad: {parents[0][1].name!r}, or a function of it, is overwritten by '{name}'; use the operation that returns a new tensor"
            )
        out = _repeat_as_expand(*new_args, **new_kwargs) if name == "repeat" else None
        name, out = (name, func(*new_args, **new_kwargs)) if out is None else ("expand", out)
        outputs, out_spec = pytree.tree_flatten(out)
        adopted = [self._adopt(o, name, parents) for o in outputs]
        if name in _EXPANSIONS and len(parents) == 1:
            self._trace.expanded[id(adopted[0])] = before
        elif name in ("contiguous", "clone") and id(before) in self._trace.expanded:
            self._trace.expanded[id(adopted[0])] = self._trace.expanded[id(before)]
        return pytree.tree_unflatten(adopted, out_spec)

    def _adopt(self, out: Any, name: str, parents: Sequence[tuple[Tensor, _Node, _View | None]]) -> Any:
        """Makes a result a derived parameter."""
        if not isinstance(out, Tensor) or not out.requires_grad or id(out) in self._trace.derived:
            return out
        tensor, node, _ = parents[0]
        if len(parents) == 1 and (_shows_elements(out, tensor, name) or (name in _COPIES and out.shape == tensor.shape)):
            # Each element is one of the root's, so norms are the same; the root's collector serves.
            whole = _geometry(out) == _geometry(node.attached)
            self._trace.derived[id(out)] = (out, node, None if whole else _View(out, node.attached))
            return out
        label = f"{name}({', '.join(sorted({node.name for _, node, _ in parents}))})"
        derived = _DerivedNode(self._pass, label, out, parents)
        self._pass.derived_nodes.append(derived)
        self._trace.derived[id(derived.attached)] = (derived.attached, derived, None)
        return derived.attached

    def _before_expansion(self, t: Tensor) -> Tensor:
        """An expanded parameter as it was before it was expanded; other tensors as they are."""
        while id(t) in self._trace.expanded:
            t = self._trace.expanded[id(t)]
        return t

    def _untransposed(self, t: Tensor) -> Tensor | None:
        """For a matrix that is the transpose of a whole parameter (or of a whole derived one): that parameter."""
        _, node, view = self._trace.derived.get(id(t), (None, None, None))
        if view is None or node is None or view.tensor.dim() != 2 or view.root.dim() != 2 or view.tensor.dtype != view.root.dtype:
            return None
        same = _memory(view.tensor) == _memory(view.root)
        turned = view.tensor.shape == view.root.shape[::-1] and view.tensor.stride() == view.root.stride()[::-1]
        return view.root if same and turned else None

    def _admit(self, names: str, operation: str, copies: Any) -> None:
        """Warns once of copies of a parameter for each sample; refuses those that do not fit."""
        copies = hint(copies)
        size = f"{copies / 2**20:.1f} MiB" if copies < 1 << 30 else f"{copies / 2**30:.2f} GiB"
        if copies > self.expand_limit:
            raise UnsupportedUseError(
                f"ghostgrad: parameter {names} in {operation} has no fused rule, and one copy of its gradient per sample takes {size}, more than the limit of "
                f"{self.expand_limit / 2**30:.2f} GiB. Use a smaller batch, raise gg.tap(..., expand_limit=bytes), or register a rule (gg.register_rule)."
            )
        if (names, operation) not in self._warned:
            self._warned.add((names, operation))
            warnings.warn(f"ghostgrad: parameter {names} in {operation} has no fused rule: one copy of its gradient per sample, {size}", stacklevel=2)

    # -- reading

    def sqnorms(self, by_param: bool = False) -> Any:
        """``||grad of sample i's loss||^2`` of the backward that ran inside the block.

        Args:
            by_param: a dict with one vector per parameter instead of their sum; needs ``gg.tap(..., by_param=True)``.

        Returns:
            Tensor (B,), or ``{name: Tensor (B,)}``; float64 if a parameter is, else float32. Of each sample's own loss: with ``reduction="mean"`` the factor
            1/B that the mean puts on every sample's gradient is taken out. Parameters that the loss does not reach count as zero.

        Raises:
            TapStateError: no backward, or more than one, has run inside the block.
            UnsupportedUseError: a parameter received a gradient that did not come through the tap.
        """
        if by_param and not self.by_param:
            raise TapStateError("ghostgrad: norms by parameter must be asked for when the tap is made: gg.tap(..., by_param=True)")
        if self._pass.norms is None or (self._open and self._pass.compiled):
            norms = self._read({key: leaf.grad for key, leaf in self._pass.sources().items()})
            if self._open and self._pass.compiled:
                self.reset()  # compiled code cannot do it when it is called next
            else:
                self._pass.armed = False  # a backward through these norms lets gradients pass
            self._pass.norms = norms
        norms = self._pass.norms
        assert norms is not None
        if by_param:
            return dict(norms)
        return norms[""] if not self.by_param else torch.stack([norm.to(next(iter(norms.values()))) for norm in norms.values()]).sum(0)

    def _take_moments(self, node: _LeafNode, contributions: Sequence[_Pending]) -> tuple[Tensor | None, Tensor]:
        """Gradient, squares and norms of a parameter from one pass over the tiles of its per-sample gradients: a pass's ``consume``."""
        parts = []
        for group in _overlapping_groups(contributions, node.attached):
            if len(group) > 1:
                node.admit(node.leaf.shape[0] * node.shape.numel() * node.dtype.itemsize)
            c, view = group[0] if len(group) == 1 else (Full(_materialise(group)), None)
            summed, squares, sqnorm = c.moments()
            parts.append((summed, squares, sqnorm) if view is None else (_pull_back(view, summed), _pull_back(view, squares), sqnorm))
        summed, squares, sqnorm = (functools.reduce(torch.add, column) for column in zip(*parts))
        scale = c.batch_size**2 if self.reduction == "mean" else 1
        self._pass.squares[node.name] = squares * scale if torch.is_grad_enabled() else squares.mul_(scale)  # while they are in the cache
        return summed.to(node.dtype) if node.want_grad else None, _like(sqnorm, node.leaf)

    def second_moments(self) -> dict[str, Tensor]:
        """``sum_i g_i^2``, element by element, of the backward that ran inside the block; needs ``gg.tap(..., moments=True)``.

        Returns:
            ``{name: tensor of the parameter's shape}``, zeros where the loss does not reach; float64 for float64, else float32. Of each sample's own loss, as
            :meth:`sqnorms`, which are their sums.

        Raises:
            the errors of :meth:`sqnorms`; TapStateError if they were not asked for, or the model is compiled.
        """
        if not self._moments:
            raise TapStateError("ghostgrad: second moments must be asked for when the tap is made: gg.tap(..., moments=True)")
        if self._pass.compiled:
            raise TapStateError("ghostgrad: second moments are not formed in compiled code; call the model uncompiled")
        if self._pass.norms is None:
            self.sqnorms()
        moments = {}
        for name, p in self._names.values():
            squares, dtype = self._pass.squares.get(name), accumulation_dtype(p.dtype)
            moments[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False) if squares is None else squares.to(dtype)
        return moments

    def grad_sqnorm(self, by_param: bool = False) -> Any:
        """``||gbar||^2`` of the same backward: the squared norm of the gradient of the samples' mean loss, whatever ``reduction`` is.

        Measured as gradients arrive if the tap was made with ``gg.tap(..., grad_sqnorm=True)``: one more pass over them, and right under gradient
        accumulation and ``DistributedDataParallel`` (of the samples of this process). Without it, it is read from ``.grad``, if that is the very tensor which
        the backward has left there: it had been None before, and nothing has written to it since (what is written through ``.grad.data`` is not seen).

        Args:
            by_param: a dict ``{name: ()}`` instead of the sum over the parameters.

        Returns:
            Tensor (), or a dict of them; float64 if a parameter is, else float32.

        Raises:
            the errors of :meth:`sqnorms`; TapStateError if ``.grad`` is not what the backward left there.
        """
        now, batch_size = self._pass, self.batch_size or 1
        if now.norms is None:
            self.sqnorms()
        measured, squares = now.grad_sqnorms, {}
        for key, (name, p) in self._names.items():
            square = self._sqnorm_in_grad(now, key, name, p) if measured is None else measured.get(name)
            if square is not None:
                squares[name] = square / batch_size**2 if self.reduction == "sum" else square
        if not squares:
            raise TapStateError(
                "ghostgrad: the tap has seen no gradient of the batch: the backward was weighted or clipped, or norms of a compiled model were read "
                "inside the block (ask for the batch gradient's norm before them)"
            )
        if by_param:
            zero = {name: torch.zeros((), device=p.device) for name, p in self._names.values()}
            return {name: squares.get(name, zero[name]).to(accumulation_dtype(p.dtype)) for name, p in self._names.values()}
        first = next(iter(squares.values()))
        total = torch.stack([square.to(first.device, torch.float64) for square in squares.values()]).sum()
        return total if self._wide else total.float()

    def _sqnorm_in_grad(self, now: _Pass, key: int, name: str, p: Tensor) -> Tensor | None:
        """Of ``.grad``, which must be the gradient that was handed out; None if there was none."""
        node, grad = now.nodes.get(key), p.grad
        while node is not None and node.returned is None and node.outer is not None:
            node = node.outer  # of an enclosing tap
        returned = None if node is None else node.returned
        unknown = not self._want_grad or (now.regions is not None and key in now.regions.covered)
        if returned is None and not unknown:
            return None
        left = grad if self._open else self._left[key]() if key in self._left else None
        if unknown or grad is None or left is not grad or returned != _identity(grad):
            raise TapStateError(
                f"ghostgrad: the .grad of parameter {name!r} is not, or not only, the gradient of the tapped backward: it was accumulated, changed (clipped, "
                "averaged over processes) or freed, or the model is compiled. Make the tap with gg.tap(..., grad_sqnorm=True), which measures gradients as "
                "they arrive."
            )
        return _sqnorm(grad)

    def _bypassed(self) -> UnsupportedUseError:
        return UnsupportedUseError(
            f"ghostgrad: parameter {', '.join(map(repr, sorted(self._pass.bypassed)))} received a gradient that did not pass through the tap: from a custom "
            "autograd.Function, an extension's kernel, a part of the model that was compiled on its own (compile the module that is tapped, in one graph: "
            "fullgraph=True), a forward that was recomputed (checkpointed) outside the tap, or a function of the parameter computed before the block or before "
            "the model was called. Write that use with torch functions inside the block, or take the parameter out of the tap (gg.tap(model, params=...))."
        )

    def _read(self, grads: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        now = self._pass
        if now.regions is not None and now.regions.refusal is not None:
            raise TapStateError(f"ghostgrad: a compiled call of the tapped module {now.regions.refusal}")
        if now.bypassed:
            raise self._bypassed()
        if now.repeated or (now.compiled and now.regions.backwards > 1):
            reached = f"parameter {', '.join(map(repr, sorted(now.repeated)))}" if now.repeated else "the compiled model"
            raise TapStateError(
                f"ghostgrad: more than one backward pass reached {reached} in one tap, and the norm of a sum is not the sum of the norms. Add the losses and "
                "call backward once, or use one block per backward."
            )
        if not any(grad is not None for grad in grads.values()):
            raise TapStateError("ghostgrad: there are no norms yet: loss.backward() has to run inside the tap's block, and the loss to use a tapped parameter")
        batch_size = self.batch_size or 0
        scale = batch_size**2 if self.reduction == "mean" else 1
        pooled = grads.get(_POOL)  # (K, 1 + at least B)
        if pooled is not None and pooled[0, 0].item() != now.regions.calls:
            raise TapStateError("ghostgrad: a compiled call of the tapped module was split by a graph break, so its norms are incomplete; use fullgraph=True")
        parameters = [p for _, p in self._names.values()]
        norms = {}
        for row, (key, p) in enumerate(zip([name for name, _ in self._names.values()], parameters) if self.by_param else [("", parameters[0])]):
            dtype = accumulation_dtype(p.dtype) if self.by_param or not self._wide else torch.float64
            norm = grads.get(key)
            if not self.by_param and (of_layers := grads.get(_LAYERS)) is not None:
                norm = of_layers if norm is None else norm + of_layers
            if pooled is not None:
                part = pooled[row, 1 : 1 + batch_size].to(p.device, dtype)
                norm = part if norm is None else norm + part
            norms[key] = torch.zeros(batch_size, dtype=dtype, device=p.device) if norm is None else norm * scale
        return norms

    def uses(self) -> dict[str, dict[str, int]]:
        """Per parameter, the operations that used it in the last pass and how often; those of a compiled call are not counted."""
        return {name: dict(self._pass.nodes[key].uses) if key in self._pass.nodes else {} for key, (name, _) in self._names.items()}


def _input_hook(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that a copy of the module, made inside the block, may carry along: it holds no tap and serves the tapped module alone."""
    ref = weakref.ref(tap)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        tap = ref()
        if tap is not None and tap._open and module is tap._entry:
            with torch._C.DisableTorchFunction():
                tap._see_input(args, kwargs)

    return hook


def leading_to_leaves(roots: Sequence[Tensor]) -> dict[int, list[Any]]:
    """``{id of a leaf: autograd's nodes that hand it a gradient}``, of all leaves that ``roots`` depend on."""
    users: dict[Any, list[Any]] = {}  # AccumulateGrad node -> the nodes that lead to it
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if hasattr(following, "variable"):
                users.setdefault(following, []).append(node)
            elif following not in seen:
                seen.add(following)
                waiting.append(following)
    return {id(node.variable): nodes for node, nodes in users.items()}


def _requires_grad(t: Tensor) -> bool:
    """The same for the tensor inside the wrappers of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


def _memory(t: Tensor) -> int:
    """The identity of a tensor's storage; unlike an address, tensors without data have one."""
    return t.untyped_storage()._cdata


def _identity(grad: Tensor) -> tuple[Any, ...]:
    """Place and version of a gradient's memory: equal for the same gradient that nothing was added to."""
    if type(grad) is Tensor and grad.layout is torch.strided and grad.is_cpu:
        return grad.data_ptr(), grad._version
    memory = grad._values() if grad.is_sparse else grad.to_local() if hasattr(grad, "to_local") else grad
    return _memory(memory), memory.storage_offset(), grad._version


def _sqnorm(grad: Tensor) -> Tensor:
    """() squared norm of all elements of a gradient, dense, sparse or sharded."""
    grad = grad.detach()
    values = grad.coalesce().values() if grad.is_sparse else grad
    square = ops.row_sqnorm(values.reshape(1, -1))
    return (square.full_tensor() if hasattr(square, "full_tensor") else square)[0]


def _like(t: Tensor, other: Tensor) -> Tensor:
    return t if t.dtype == other.dtype and t.device == other.device else t.to(other)


def _geometry(t: Tensor) -> tuple[Any, ...]:
    """Which elements of which memory a tensor shows, and how. Hashable."""
    sizes = (t.storage_offset(), *t.size(), *t.stride())
    return t.dtype, _memory(t), *(n if isinstance(n, int) else n.node.expr for n in sizes)  # a symbolic size is not hashable, its expression is


def _shows_elements(out: Tensor, root: Tensor, name: str) -> bool:
    """True if ``out`` is a view of elements of ``root``, each at most once."""
    return (
        name not in _OVERLAPPING
        and (out.dtype, out.is_conj(), out.is_neg()) == (root.dtype, root.is_conj(), root.is_neg())
        and _memory(out) == _memory(root)
        and all(stride != 0 or size == 1 for size, stride in zip(out.size(), out.stride()))
    )


def _repeat_as_expand(x: Tensor, *sizes: Any, repeats: Any = None) -> Tensor | None:
    """``x.repeat(...)`` as an expand, where only dimensions of size one are repeated."""
    sizes = tuple(repeats) if repeats is not None else tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = (1,) * (len(sizes) - x.dim()) + tuple(x.shape)
    if len(sizes) < x.dim() or any(n != 1 and size != 1 for n, size in zip(sizes, shape)):
        return None
    return x.expand(tuple(n * size for n, size in zip(sizes, shape)))


def _named(target: Any, modules: Iterable[tuple[str, nn.Module]], params: Iterable[Tensor | str] | None) -> dict[int, tuple[str, Tensor]]:
    """The parameters to track: ``{id: (name, parameter)}``, those that require a gradient. ``modules``: those of the target, by name."""
    named: dict[str, Tensor] = {}
    if isinstance(target, nn.Module):
        scripted = torch.jit.ScriptModule
        for prefix, module in modules:
            if isinstance(module, scripted):
                raise UnsupportedUseError(
                    f"ghostgrad.tap: module {prefix!r} is TorchScript ({type(module).__name__}), whose operations cannot be intercepted. Tap the Python "
                    "module that it was made from; torch.compile works."
                )
            named.update((f"{prefix}.{name}" if prefix else name, p) for name, p in module._parameters.items() if p is not None)
        if type(target).named_parameters is not nn.Module.named_parameters:
            named = dict(target.named_parameters())
    elif isinstance(target, Mapping):
        named = dict(target)
    elif isinstance(target, Tensor):
        named = {"0": target}
    else:
        named = {str(i): p for i, p in enumerate(target)}
    for name, p in named.items():
        if not isinstance(p, Tensor):
            raise TypeError(
                f"ghostgrad.tap: the first argument must be a module, a tensor, or a collection or mapping of tensors; {name!r} is {type(p).__name__}"
            )
    if params is not None:
        chosen = list(params)
        unknown = [c for c in chosen if isinstance(c, str) and c not in named] + [
            c for c in chosen if isinstance(c, Tensor) and not any(c is p for p in named.values())
        ]
        if unknown:
            raise ValueError(f"ghostgrad.tap: params names {unknown[0]!r}, which is not a parameter of the target; it has {', '.join(list(named)[:8])} ...")
        named = {name: p for name, p in named.items() if any(c is p or (isinstance(c, str) and c == name) for c in chosen)}
    tracked: dict[int, tuple[str, Tensor]] = {}
    for name, p in named.items():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"ghostgrad.tap: parameter {name!r} of a lazy module has no shape yet; run the model on a batch once before it is tapped")
        if p.requires_grad and p.is_complex():
            raise UnsupportedUseError(
                f"ghostgrad.tap: parameter {name!r} is complex, and only real parameters have norms here. Keep it as a real parameter and use "
                "torch.view_as_complex on it, or leave it out (params=...)."
            )
        if p.requires_grad:
            tracked.setdefault(id(p), (name, p))
    if not tracked:
        raise ValueError("ghostgrad.tap: nothing to tap: none of the parameters requires a gradient")
    return tracked


def tap(target: nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor], **options: Any) -> Tap:
    """A block in which backward also gives the squared norm of every sample's gradient. ``.grad`` is filled as always.

    ::

        with gg.tap(model) as tap:
            loss = loss_fn(model(x), y)
            loss.backward()
        tap.sqnorms()  # (B,)

    Args:
        target: a module, or for functional code the parameters (a list, a mapping by name, one tensor). Those that require a gradient are tracked.
        by_param: keep the norms of each parameter apart, for ``tap.sqnorms(by_param=True)``.
        reduction: "mean" (default) or "sum": how the loss was reduced over the samples. A vector of losses is summed: "sum".
        batch_size: B; read off the first tensor input of the tapped module if that is called, required otherwise, and for compiled calls of more than 4096
            samples.
        batch_dim: the dimension of the module's inputs along which the samples lie.
        params: parameters (or their names) to restrict the tap to.
        constants: tensors that carry no samples although their first dimension is as long as the batch (functional code only; buffers of a tapped module
            are known).
        expand_limit: bytes that one copy of a parameter's gradient per sample may take where there is no fused rule; more raises.
        moments: also sum the squares of the per-sample gradients, element by element, for ``tap.second_moments()``.
        grad_sqnorm: also measure the squared norm of the batch's gradient as it arrives, for ``tap.grad_sqnorm()`` and :func:`ghostgrad.noise_scale`.

    Cost: no copy per sample for ``F.linear``, matrix products, broadcast operations and normalisation layers; one copy per sample, with a warning, for an
    operation without a rule.

    Raises:
        UnsupportedUseError: in forward, a use that has no per-sample gradient or does not fit; in backward, a gradient that came from such a use.
        BatchCouplingError: batch statistics, or a tensor in which samples are mixed, meet a parameter.
        TapStateError: calls out of order, or a batch of another size.
    """
    return Tap(target, **options)


def declare_samples(x: Tensor, dim: int = 0, outer: int = 1, inner: int = 1, index: Tensor | None = None) -> Tensor:
    """Tells the running taps where the samples lie in ``x``, where they could not follow: along ``dim``, of size ``outer * B * inner``, in that order.

    Args:
        x: the tensor, (..., outer * B * inner, ...).
        dim: the dimension along which the samples lie.
        outer: how many rows come before a sample's number changes again, counted in whole batches: T for time-major sequences that were flattened.
        inner: how many rows of one sample come after each other.
        index: instead of ``outer`` and ``inner``, the sample of each row along ``dim``: integers (x.shape[dim],) between 0 and B - 1, in any order, any
            number of rows for each sample. For rows that a kernel sorted or packed.

    Returns ``x``. Outside of a tap's block it does nothing, so it may stand in a model. For example ``declare_samples(tokens, inner=T)`` for tokens
    flattened sample by sample, ``declare_samples(steps, dim=1)`` for time-major sequences, ``declare_samples(tokens[keep], index=keep.nonzero()[:, 0])``.

    Raises:
        ValueError: the size of ``dim`` is not what was declared, or ``index`` is not one sample for each row.
    """
    for tap in _ACTIVE.taps[-1:]:
        batch_size = tap._pass.batch_size
        if index is not None:
            numbers = not (index.is_floating_point() or index.dtype == torch.bool) and index.shape == (x.shape[dim],)
            if batch_size is None or not numbers or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < batch_size):
                raise ValueError(
                    f"ghostgrad.declare_samples: index must be the sample, from 0 to {batch_size} - 1, of each of the {x.shape[dim]} rows of dimension {dim}, "
                    f"got {index.dtype} {tuple(index.shape)}"
                )
            tap._mark(x, placed(dim % x.dim(), index.to(x.device, torch.long), batch_size))
            continue
        if batch_size is None or x.shape[dim] != outer * batch_size * inner:
            raise ValueError(f"ghostgrad.declare_samples: dimension {dim} has size {x.shape[dim]}, not outer * B * inner = {outer} * {batch_size} * {inner}")
        tap._mark(x, Layout(dim % x.dim(), outer, inner))
    return x
