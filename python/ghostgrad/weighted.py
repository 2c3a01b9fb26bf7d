"""Weighted sums of per-sample gradients, with weights that may depend on the gradients' norms: clipping, normalising, pruning.

The weights of a batch are known when its norms are, which is after the backward pass that the weighted sum needs. Two ways around that, both exact:

- *Book-keeping*: one backward pass, which forms no weight gradients but keeps what they are made of (the activations, which autograd has anyway, and the
  gradients at the outputs), or, where that takes less time, the per-sample gradients of one parameter. When the weights are known, the sums are formed.
- *Two passes*: the first for the norms alone; nothing is kept but autograd's graph. The second for the weighted sum.

Weights that are known, and those of groups of parameters that are complete early in the backward pass, need neither: their sums are formed on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .contributions import Outer
from .errors import TapStateError, UnsupportedUseError
from .layout import PLAIN
from .reference import accumulation_dtype
from .tap import _ACTIVE, Tap, _LeafNode, _Pending, leading_to_leaves, total

__all__ = ["clipped_backward", "weighted_backward"]

Groups = Literal["parameter", "module"] | Callable[[str], str] | None
Weights = Tensor | Mapping[str, Tensor] | Callable[[Any], Any]

_MEMORY = 1 << 31


class _Ledger:
    """What is known of a pass, and kept of it until the weights are."""

    def __init__(self, caller: str, tap: Tap, groups: Groups, weights: Weights, keep: bool):
        self.caller, self.tap, self.weigh, self.keep = caller, tap, weights, keep
        self.flat = groups is None
        label = {None: lambda name: "", "parameter": lambda name: name, "module": lambda name: name.rpartition(".")[0]}
        group_of: Callable[[str], str] = groups if callable(groups) else label[groups]
        self.members: dict[str, set[str]] = {}  # group -> names of its parameters
        for name, _ in tap._names.values():
            self.members.setdefault(group_of(name), set()).add(name)
        self.group = {name: group for group, names in self.members.items() for name in names}
        used = {node.name for node in tap._pass.nodes.values()}
        self.awaited = {group: names & used for group, names in self.members.items()}
        self.norms: dict[str, Tensor] = {}  # of parameters
        self.coefficients: dict[str, Tensor] = {}  # of groups
        self.held: dict[str, tuple[_LeafNode, Sequence[_Pending]]] = {}
        self.totals: dict[str, Tensor] = {}
        if not callable(weights):
            given = {"": weights} if isinstance(weights, Tensor) else weights
            for group in self.members:
                if group not in given:
                    raise ValueError(f"{caller}: weights has no entry for the group {group!r}; it has {', '.join(map(repr, given)) or 'none'}")
                self.coefficients[group] = self._checked(given[group], group)

    def _checked(self, weights: Any, group: str) -> Tensor:
        size = self.tap.batch_size
        if not isinstance(weights, Tensor) or weights.shape != (size,):
            found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            of = "" if self.flat else f" for the group {group!r}"
            raise ValueError(f"{self.caller}: weights must be one number for each sample, ({size},){of}, got {found}")
        return weights.detach()

    def group_sqnorm(self, group: str) -> Tensor:
        """``||g_i||^2`` over the parameters of the group, (B,)."""
        norms = [self.norms[name] for name in sorted(self.members[group]) if name in self.norms]
        wide = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
        return torch.stack([norm.to(norms[0].device, wide) for norm in norms]).sum(0)

    def _settle(self, group: str) -> None:
        """All norms of the group are known: so are its weights and, if its contributions were kept, its sums."""
        if self.flat and callable(self.weigh):
            self.coefficients[group] = self._checked(self.weigh(self.group_sqnorm(group)), group)
        elif callable(self.weigh):
            self.coefficients[group] = self._checked(self.weigh({group: self.group_sqnorm(group)})[group], group)
        for name in [name for name in self.held if self.group[name] == group]:
            node, contributions = self.held.pop(name)
            self._sum(node, contributions)

    def _sum(self, node: _LeafNode, contributions: Sequence[_Pending]) -> None:
        weights = self.coefficients[self.group[node.name]]
        self.totals[node.name] = total(contributions, weights.to(node.leaf.device)).to(node.dtype)

    def take(self, node: _LeafNode, contributions: Sequence[_Pending]) -> tuple[None, Tensor | None]:
        """Of the pass that measures: norms, and sums as soon as they can be formed. A collector's :attr:`_Pass.consume`."""
        group, (first, view) = self.group[node.name], contributions[0]
        weights = self.coefficients.get(group)
        if weights is not None and len(contributions) == 1 and view is None and isinstance(first, Outer) and first.wgrad_from() == "fused":
            self.totals[node.name], self.norms[node.name] = ops.wgrad_sqnorm(first.a, first.b, weights.to(first.a.device))
            return None, None
        if self.keep:
            contributions = [(c.formed() if isinstance(c, Outer) and _cheaper_formed(c) else c, view) for c, view in contributions]
        _, self.norms[node.name] = node.grad_and_sqnorm(contributions, False)
        if weights is not None:
            self._sum(node, contributions)
        elif self.keep:
            self.held[node.name] = node, contributions
        self.awaited[group].discard(node.name)
        if weights is None and not self.awaited[group]:
            self._settle(group)
        return None, None

    def take_again(self, node: _LeafNode, contributions: Sequence[_Pending]) -> tuple[None, None]:
        """Of a second pass: sums alone."""
        self._sum(node, contributions)
        return None, None

    def finish(self) -> None:
        """The pass is over: what it did not reach is zero."""
        if not self.norms:
            raise ValueError(f"{self.caller}: losses do not depend on a tapped parameter")
        for name, p in self.tap._names.values():
            if name not in self.norms:
                self.norms[name] = torch.zeros(self.tap.batch_size or 0, dtype=accumulation_dtype(p.dtype), device=p.device)
        for group in self.members:
            if group not in self.coefficients:
                self._settle(group)
        self.held.clear()

    def sqnorms(self) -> dict[str, Tensor]:
        """As the tap has them."""
        if self.tap.by_param:
            return {name: self.norms[name] for name, _ in self.tap._names.values()}
        return {"": torch.stack([self.group_sqnorm(group) for group in self.members]).sum(0)}


def _cheaper_formed(c: Outer) -> bool:
    """True if a product's per-sample gradients are better formed once, for norms and sum, than norms taken of its factors and the sum formed from these."""
    (*samples, T, p), d = c.a.shape, c.b.shape[-1]
    plan = ops.plan(math.prod(samples), T, p, d, c.a.dtype, c.a.device)
    return not c.sharded() and plan.formula != "row" and plan.flops > _FLOPS_PER_ELEMENT * math.prod(samples) * p * d


_FLOPS_PER_ELEMENT = 64.0  # what a float written and read twice costs, in operations of a matrix product


class _Deliver(torch.autograd.Function):
    """Hands out gradients that were formed apart by way of autograd: its hooks share them between processes, and it takes what nobody else holds as it is."""

    @staticmethod
    def forward(ctx: Any, totals: dict[str, Tensor], *parameters: Tensor) -> Tensor:
        ctx.totals = totals
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(ctx.totals.pop(name) for name in list(ctx.totals)))


def _backward(tap: Tap, losses: Tensor, consume: Any, retain_graph: bool) -> None:
    """One backward pass in which ``consume`` gets the contributions of every parameter. ``.grad`` is not touched."""
    now = tap._pass
    layers = [layer for layer in now.layers if layer.edge is not None and layer.alone() and all(tap._names[node.key][1].is_leaf for node in layer._nodes)]
    of_layers = {node.key: layer for layer in layers for node in layer._nodes}
    if layers:
        # Nothing of these is asked for but the gradient at the output, so that the operation's own backward forms no weight gradient. Then no hook sees what
        # arrives at the parameter around the tap: the graph has to.
        users = leading_to_leaves([losses])
        for key, layer in of_layers.items():
            if any(user is not layer.collector for user in users.get(key, ())):
                now.bypassed.add(tap._names[key][0])
    leaves = list({id(node.leaf): node.leaf for key, node in now.nodes.items() if key not in of_layers}.values())
    others = [p for key, (_, p) in tap._names.items() if key not in of_layers]
    now.consume = consume
    try:
        wanted = [*(layer.edge for layer in layers), *leaves, *others]
        grads = torch.autograd.grad(losses.sum(), wanted, retain_graph=retain_graph, allow_unused=True)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for layer, b in zip(layers, grads):
                x = layer.input()
                if b is not None and x is not None:
                    layer.contribute(x, b)
                    for node in layer._nodes:
                        node.collect()
    finally:
        now.consume = None
    if now.bypassed:
        raise tap._bypassed()


def weighted_backward(losses: Tensor, tap: Tap, weights: Weights, *, groups: Groups = None, memory: int = _MEMORY) -> Any:
    """Backward for a weighted sum of the per-sample gradients: ``.grad += sum_i c_i g_i``, ``g_i`` the gradient of ``losses[i]``.

    ::

        with gg.tap(model) as tap:
            losses = F.cross_entropy(model(x), y, reduction="none")  # (B,)
            gg.weighted_backward(losses, tap, lambda sqnorms: sqnorms.rsqrt())  # normalised gradients
        tap.sqnorms()  # those of the unweighted gradients, (B,)

    Args:
        losses: (B,), one loss for each sample, computed inside the tap's block, which must still be open.
        tap: of :func:`ghostgrad.tap`. Its parameters' ``.grad`` is added to; that of others is left alone.
        weights: (B,) numbers; or a function of the squared norms (B,) that returns them. With ``groups``, a dict ``{group: (B,)}``, or a function from
            ``{group: (B,) squared norms}`` to such a dict; it is called with one group at a time.
        groups: None: one weight for a sample's whole gradient. "parameter" or "module" (the parameters of one module, a layer), or a function from a
            parameter's name to the name of its group: weights for each of these parts of the gradient.
        memory: bytes that the gradients at the outputs of the operations may take when they are kept (book-keeping). If they take more, two backward passes
            run instead. They hold no more than autograd's graph.

    Returns:
        The weights that were used, (B,) or ``{group: (B,)}``.

    Weights are constants: nothing flows through them. A weight of zero does not hide a non-finite gradient, as nothing does in PyTorch. Under a gradient
    scaler the norms are those of scaled losses.

    Cost: book-keeping, the norms, and for each linear layer and convolution a product of the size of its weight gradient or less. Two passes: one more
    backward. Exact in both.

    Raises:
        ValueError: ``losses`` or ``weights`` are not one number for each sample.
        TapStateError: the block is not open, another tap's block is, the losses were differentiated before, or compiled code ran inside.
        UnsupportedUseError, BatchCouplingError: as in any backward pass through a tap.
    """
    return _weighted_backward("weighted_backward", losses, tap, weights, groups, memory)


def _weighted_backward(caller: str, losses: Tensor, tap: Tap, weights: Weights, groups: Groups, memory: int) -> Any:
    now = tap._pass
    if groups not in (None, "parameter", "module") and not callable(groups):
        raise ValueError(f"{caller}: groups must be None, 'parameter', 'module' or a function of a parameter's name, got {groups!r}")
    if not tap._open:
        raise TapStateError(f"{caller}: call it inside the tap's block: with gg.tap(model) as tap: ...")
    if len(_ACTIVE.taps) > 1:
        raise TapStateError(f"{caller}: more than one tap's block is open, and only one can form the weighted gradient; close the others")
    if tap._moments:
        raise TapStateError(f"{caller}: the tap was made with moments=True, and the moments of weighted gradients are not formed; use another tap")
    if now.compiled:
        raise TapStateError(f"{caller}: compiled code ran inside the block, whose backward forms sums without weights; call the model uncompiled")
    if not isinstance(losses, Tensor) or losses.dim() != 1 or losses.shape[0] != tap.batch_size:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{caller}: losses must be one loss for each of the {tap.batch_size} samples, ({tap.batch_size},), got {found}: use reduction='none'")
    if not losses.requires_grad:
        raise ValueError(f"{caller}: losses do not depend on a parameter")
    if not now.armed or now.norms is not None or any(node.collected is not None for node in now.nodes.values()):
        raise TapStateError(f"{caller}: the losses were differentiated before; call the model again, or tap.reset() before it")
    if tap.batch_size != 1 and tap._layout_of(losses) != PLAIN:
        layout = tap._layout_of(losses)
        raise UnsupportedUseError(f"{caller}: losses[i] must be the loss of sample i, but {getattr(layout, 'reason', f'they lie otherwise: {layout}')}")
    one_pass = not callable(weights) or now.output_bytes <= memory
    ledger = _Ledger(caller, tap, groups, weights, keep=one_pass)
    if not one_pass:
        now.expect_backward()
    _backward(tap, losses, ledger.take, retain_graph=not one_pass)
    with torch._C.DisableTorchFunction(), torch.no_grad():
        ledger.finish()
    if not one_pass and not ledger.flat:
        now.expect_backward()
        _backward(tap, losses, ledger.take_again, retain_graph=False)
    now.armed = False  # what comes now passes through
    parameters = {name: p for name, p in tap._names.values()}
    if one_pass or not ledger.flat:
        _Deliver.apply(ledger.totals, *(parameters[name] for name in ledger.totals)).backward()
    else:
        torch.autograd.backward((losses * ledger.coefficients[""].to(losses)).sum(), inputs=list(parameters.values()))
    now.norms = ledger.sqnorms()
    return ledger.coefficients[""] if ledger.flat else dict(ledger.coefficients)


def clipped_backward(
    losses: Tensor,
    tap: Tap,
    max_norm: float | Mapping[str, float],
    *,
    groups: Groups = None,
    automatic: bool = False,
    stability: float = 0.01,
    memory: int = _MEMORY,
) -> Any:
    """Backward for the sum of clipped per-sample gradients, as differentially private SGD takes it before noise is added (Abadi et al., CCS 2016, algorithm 1):
    ``.grad += sum_i c_i g_i`` with ``c_i = min(1, C / ||g_i||)``.

    ::

        with gg.tap(model) as tap:
            losses = F.cross_entropy(model(x), y, reduction="none")  # (B,)
            gg.clipped_backward(losses, tap, max_norm=1.0)
        optimizer.step()

    Args:
        losses, tap, groups, memory: as for :func:`weighted_backward`.
        max_norm: C, positive. With ``groups``, one number for each part, or a dict of one for each group (for a total of C over K parts, ``C / sqrt(K)`` each).
        automatic: ``c_i = C / (||g_i|| + stability)`` instead: normalised gradients, "automatic clipping" (Bu et al., NeurIPS 2023, AUTO-S), in which C is a
            factor of the learning rate.
        stability: a small positive number, with ``automatic`` alone.

    Returns:
        The factors ``c_i``, (B,) or ``{group: (B,)}``. ``tap.sqnorms()`` has the squared norms before clipping.

    Cost and errors: those of :func:`weighted_backward`; ValueError if ``max_norm`` or ``stability`` is not positive and finite.
    """
    limits = max_norm if isinstance(max_norm, Mapping) else {"": max_norm}
    for group, limit in limits.items():
        if not (0 < limit < float("inf")):
            raise ValueError(f"clipped_backward: max_norm must be positive and finite, got {limit}{f' for {group!r}' if group else ''}")
    if automatic and not (0 < stability < float("inf")):
        raise ValueError(f"clipped_backward: stability must be positive and finite, got {stability}")
    if isinstance(max_norm, Mapping) and groups is None:
        raise ValueError("clipped_backward: max_norm has an entry for each group, but groups is None: say what the groups are, or give one number")

    def factor(sqnorm: Tensor, limit: float) -> Tensor:
        norm = sqnorm.sqrt()
        return limit / (norm + stability) if automatic else (limit / norm).clamp(max=1)

    def weights(sqnorms: Any) -> Any:
        if isinstance(sqnorms, Tensor):
            return factor(sqnorms, limits[""])
        missing = [group for group in sqnorms if isinstance(max_norm, Mapping) and group not in max_norm]
        if missing:
            raise ValueError(f"clipped_backward: max_norm has no entry for the group {missing[0]!r}; it has {', '.join(map(repr, limits))}")
        return {group: factor(sqnorm, limits[group] if isinstance(max_norm, Mapping) else limits[""]) for group, sqnorm in sqnorms.items()}

    return _weighted_backward("clipped_backward", losses, tap, weights, groups, memory)
