"""Contributions: how one use of a parameter gives its per-sample gradients, without forming them where that can be helped.

A contribution stands for B gradients ``g_i`` of one tensor's shape. It can give their sum (the ordinary gradient), their squared norms, and as a last resort
the gradients themselves. Those of one ``form`` can be joined: the uses of a parameter are added before anything is squared.
All arithmetic here is made of differentiable operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference import accumulation_dtype
from .samplewise import hint, tracing

__all__ = ["Affine", "Arranged", "Contribution", "Full", "Gathered", "Outer", "Patches", "Positions", "Rows", "Segments", "inner"]


def _squares(x: Tensor) -> Tensor:
    """What :func:`ghostgrad.ops.row_sqnorm` gives, in operations that a compiler fuses with those around: of single rows that is faster than a kernel."""
    return x.to(accumulation_dtype(x.dtype)).square().flatten(1).sum(1)


def _scale(b: Tensor, weights: Tensor) -> Tensor:
    """``weights_i b_i``, for ``b`` with the samples first."""
    weights = weights.to(b.dtype).view(-1, *(1,) * (b.dim() - 1))
    if hasattr(b, "device_mesh"):  # tensor parallel
        from torch.distributed.tensor import DTensor, Replicate

        weights = DTensor.from_local(weights, b.device_mesh, [Replicate()] * b.device_mesh.ndim)
    return b * weights


def _square_sum(g: Tensor) -> Tensor:
    """``sum_i g_i^2``, element by element, in the dtype that sums are accumulated in."""
    return g.to(accumulation_dtype(g.dtype)).square().sum(0)


_CHUNK = 1 << 19  # elements of a buffer that is formed for some samples at a time
_GRADIENTS = 1 << 22  # elements of the per-sample gradients that are formed at a time


class Contribution(ABC):
    """The per-sample gradients of one tensor, from one use of it or several joined ones."""

    @property
    @abstractmethod
    def batch_size(self) -> int: ...

    @abstractmethod
    def total(self) -> Tensor:
        """``sum_i g_i``, of the tensor's shape."""

    @abstractmethod
    def materialise(self) -> Tensor:
        """``g_i`` themselves, (B, *shape)."""

    @abstractmethod
    def sqnorm(self) -> Tensor:
        """``||g_i||^2``, (B,)."""

    def scaled(self, weights: Tensor) -> Contribution:
        """``c_i g_i`` for ``weights`` c (B,)."""
        return Full(_scale(self.materialise(), weights))

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        return self.total(), self.sqnorm()

    def weighted_total(self, weights: Tensor) -> Tensor:
        """``sum_i c_i g_i`` for ``weights`` c (B,)."""
        return self.scaled(weights).total()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``sum_i g_i``, ``sum_i g_i^2`` element by element, and ``||g_i||^2`` (B,)."""
        g = self.materialise()
        return g.sum(0), _square_sum(g), ops.row_sqnorm(g)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """The gradients (B, n) cut into pieces (B, about ``size``), in an order of the elements' own that depends on the form alone."""
        g = self.materialise()
        yield from (g.flatten(1) if g.dim() > 1 else g[:, None]).split(max(1, size), 1)

    def form(self) -> Any:
        """Contributions of equal forms can be joined."""
        return type(self)

    def join(self, others: Sequence[Any]) -> Contribution:
        """The sum of this contribution and others of its form."""
        return Full(sum((other.materialise() for other in others), self.materialise()))


@dataclass
class Outer(Contribution):
    """``G_i = b_i^T a_i`` (d, p), not formed; with ``groups`` dimensions after the batch, one such product for each group: (*groups, d, p)."""

    a: Tensor  # (B, *groups, T, p)
    b: Tensor  # (B, *groups, T, d)

    @property
    def batch_size(self) -> int:
        return self.a.shape[0]

    def total(self) -> Tensor:
        if self.a.dim() == 3:
            return self.b.flatten(0, 1).mT @ self.a.flatten(0, 1)
        a, b = (t.movedim(0, -3).flatten(-3, -2) for t in (self.a, self.b))  # (*groups, B * T, .)
        return b.mT @ a

    def materialise(self) -> Tensor:
        return self.b.mT @ self.a

    def sqnorm(self) -> Tensor:
        if self.a.dim() == 3:
            if tracing() and self._single():
                return _squares(self.a) * _squares(self.b)
            return ops.sqnorm(self.a, self.b)
        groups = self.a.shape[:-2]
        return ops.sqnorm(self.a.flatten(0, -3), self.b.flatten(0, -3)).view(groups).flatten(1).sum(1)

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        fused = self.a.dim() == 3 and not (tracing() and self._single())
        return ops.wgrad_and_sqnorm(self.a, self.b) if fused else super().total_and_sqnorm()

    def formed(self) -> Full:
        """The same with the ``G_i`` formed. Not differentiable."""
        return Full(*ops.per_sample_wgrad_and_sqnorm(self.a, self.b)) if self.a.dim() == 3 else Full(self.materialise())

    def scaled(self, weights: Tensor) -> Outer:
        if self.a.shape[-1] < self.b.shape[-1]:  # the smaller of the two
            return replace(self, a=_scale(self.a, weights))
        return replace(self, b=_scale(self.b, weights))

    def weighted_total(self, weights: Tensor) -> Tensor:
        return ops.wgrad_sqnorm(self.a, self.b, weights)[0] if self.wgrad_from() == "fused" else self.scaled(weights)._product()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.a.dim() != 3:
            return super().moments()
        if self.a.shape[1] == 1:  # the squares of a product of two numbers
            dtype = accumulation_dtype(self.a.dtype)
            total, sqnorm = self.total_and_sqnorm()
            return total, Outer(self.a.to(dtype).square(), self.b.to(dtype).square())._product(), sqnorm
        return ops.wgrad_moments(self.a, self.b)

    def sharded(self) -> bool:
        return hasattr(self.a, "device_mesh") or hasattr(self.b, "device_mesh")

    def wgrad_from(self) -> str:
        """What :func:`ghostgrad.ops.plan` says of the weight gradient: ``"matmul"``, ``"product"`` or ``"fused"``."""
        if self.a.dim() != 3 or self.sharded():
            return "matmul"
        (B, T, p), d = self.a.shape, self.b.shape[2]
        return ops.plan(B, T, p, d, self.a.dtype, self.a.device, True).wgrad

    def _product(self) -> Tensor:
        """:meth:`total` by whichever product is faster."""
        return self.total() if self.wgrad_from() == "matmul" else ops.wgrad_sqnorm(self.a.flatten(0, 1)[None], self.b.flatten(0, 1)[None])[0]

    def pieces(self, size: int) -> Iterator[Tensor]:
        rows = max(1, size // max(1, self.a.shape[-1] * self.a.shape[1:-2].numel()))
        for b in self.b.split(rows, -1):
            yield (b.mT @ self.a).flatten(1)

    def _single(self) -> bool:
        """One position for each sample, and little to compute."""
        (B, T, p), d = self.a.shape, self.b.shape[2]
        return isinstance(T, int) and T == 1 and hint(B) * hint(p) * hint(d) < ops.LARGE_PRODUCT

    def form(self) -> Any:
        return Outer, self.a.dtype, self.b.dtype, self.a.dim()

    def segments(self) -> Segments:
        samples = torch.arange(self.batch_size, device=self.a.device).repeat_interleave(self.a.shape[1])
        return Segments(self.a.flatten(0, 1), self.b.flatten(0, 1), samples, self.batch_size)

    def join(self, others: Sequence[Outer | Segments]) -> Outer | Segments:
        if any(isinstance(o, Segments) for o in others):
            return self.segments().join(others)
        return Outer(torch.cat([self.a, *(o.a for o in others)], -2), torch.cat([self.b, *(o.b for o in others)], -2))


@dataclass
class Segments(Contribution):
    """``G_i = sum_r b_r^T a_r`` (d, p) over the rows r of sample i, not formed: an outer product whose samples have any number of rows, in any order.
    With ``groups`` it is (groups, d, p), and row r adds to the product ``group[r]``."""

    a: Tensor  # (n, p)
    b: Tensor  # (n, d)
    samples: Tensor  # (n,) integers
    samples_in_all: int  # B
    group: Tensor | None = None  # (n,) integers
    groups: int = 1

    @property
    def batch_size(self) -> int:
        return self.samples_in_all

    def _padded(self) -> list[tuple[Tensor, Outer]]:
        """The products (numbered sample by sample, group by group) that have rows, as outer products of equally many rows, filled up with zeros. Products
        with half as many rows to as many stand together, so that rows at most double, however unevenly they are distributed."""
        owner = self.samples if self.group is None else self.samples * self.groups + self.group
        order = owner.argsort(stable=True)
        products, counts = torch.unique_consecutive(owner[order], return_counts=True)
        starts = counts.cumsum(0) - counts
        parts = []
        for size in torch.unique((counts.double() - 0.5).log2().floor()).tolist():  # 2^size < rows <= 2^(size + 1)
            chosen = (counts > 2**size) & (counts <= 2 ** (size + 1))
            rows = counts[chosen]
            longest = int(rows.max())
            place = torch.arange(longest, device=rows.device)
            inside = place < rows[:, None]
            picked, to = order[(starts[chosen, None] + place)[inside]], inside.flatten().nonzero()[:, 0]
            a, b = (t.new_zeros(len(rows) * longest, t.shape[1]).index_copy(0, to, t[picked]).view(len(rows), longest, -1) for t in (self.a, self.b))
            parts.append((products[chosen], Outer(a, b)))
        return parts

    def total(self) -> Tensor:
        if self.group is None:
            return self.b.mT @ self.a
        order = self.group.argsort(stable=True)
        sizes = torch.bincount(self.group, minlength=self.groups).tolist()
        return torch.stack([b.mT @ a for a, b in zip(self.a[order].split(sizes), self.b[order].split(sizes))])

    def materialise(self) -> Tensor:
        g = self.b.new_zeros(self.batch_size * self.groups, self.b.shape[1], self.a.shape[1])
        for products, outer in self._padded():
            g = g.index_copy(0, products, outer.materialise())
        return g if self.group is None else g.unflatten(0, (self.batch_size, self.groups))

    def sqnorm(self) -> Tensor:
        squares = self.a.new_zeros(self.batch_size * self.groups, dtype=accumulation_dtype(self.a.dtype))
        for products, outer in self._padded():
            squares = squares.index_copy(0, products, outer.sqnorm())
        return squares.view(self.batch_size, self.groups).sum(1)

    def scaled(self, weights: Tensor) -> Segments:
        return replace(self, b=_scale(self.b, weights[self.samples]))

    def pieces(self, size: int) -> Iterator[Tensor]:
        for b in self.b.split(max(1, size // max(1, self.a.shape[1] * self.groups)), 1):
            yield replace(self, b=b).materialise().flatten(1)

    def form(self) -> Any:
        return Outer, self.a.dtype, self.b.dtype, 3 if self.group is None else ("groups", self.groups)

    def join(self, others: Sequence[Outer | Segments]) -> Segments:
        parts = [self, *(o.segments() if isinstance(o, Outer) else o for o in others)]
        group = None if self.group is None else torch.cat([part.group for part in parts if part.group is not None])
        a, b, samples = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts]), torch.cat([part.samples for part in parts])
        return replace(self, a=a, b=b, samples=samples, group=group)


@dataclass
class Full(Contribution):
    """Per-sample gradients that are there."""

    g: Tensor  # (B, *shape)
    squares: Tensor | None = None  # (B,) their norms, if these are there, too

    @property
    def batch_size(self) -> int:
        return self.g.shape[0]

    def total(self) -> Tensor:
        return self.g.sum(0)

    def materialise(self) -> Tensor:
        return self.g

    def sqnorm(self) -> Tensor:
        return ops.row_sqnorm(self.g) if self.squares is None else self.squares

    def scaled(self, weights: Tensor) -> Full:
        return Full(_scale(self.g, weights))

    def weighted_total(self, weights: Tensor) -> Tensor:
        return torch.tensordot(weights.to(self.g.dtype), self.g, 1)


@dataclass
class Positions:
    """What the gradients of a scale and a shift that broadcast over positions are summed from; both are computed once for the two."""

    b: Tensor  # (B, T, d, S) gradients at the output
    x: Tensor | None = None  # (B, T, d, S) what the scale multiplied is (x - mean) rstd
    mean: Tensor | None = None  # (B, T, G)
    rstd: Tensor | None = None  # (B, T, G)
    _grads: tuple[bool, ops.AffineGrads] | None = field(default=None, init=False)

    def grads(self, total: bool) -> ops.AffineGrads:
        if self._grads is None or (total and not self._grads[0]):
            self._grads = total, ops.affine_sqnorm(self.b, self.x, self.mean, self.rstd, total)
        return self._grads[1]

    def backward(self, weight: Tensor | None) -> Tensor:
        """The gradient of ``x`` (B, T, d, S), scaled by ``weight``, where mean and rstd are those of ``x``; those of scale and shift come with it."""
        assert self.x is not None and self.mean is not None and self.rstd is not None
        grad, grads = ops.norm_affine(self.b, self.x, self.mean, self.rstd, None if weight is None else weight.flatten())
        self._grads = True, grads
        return grad

    def normalised(self) -> Tensor | None:
        x = self.x
        for statistic, combine in ((self.mean, torch.sub), (self.rstd, torch.mul)):
            if x is not None and statistic is not None:
                x = combine(x, statistic.repeat_interleave(x.shape[2] // statistic.shape[2], 2)[..., None])
        return x


@dataclass
class Affine(Contribution):
    """A parameter that scales or shifts all positions alike: ``g_i = sum_{t,s} b_its x_its`` or ``sum_{t,s} b_its``. No ``g_i`` is formed, no product."""

    of: Positions
    scale: bool
    shape: Sequence[int]  # of the parameter, of d elements

    @property
    def batch_size(self) -> int:
        return self.of.b.shape[0]

    def _rows(self) -> bool:
        """A shift of single positions, while a graph is traced."""
        return tracing() and not self.scale and all(isinstance(self.of.b.shape[dim], int) and self.of.b.shape[dim] == 1 for dim in (1, 3))

    def total(self) -> Tensor:
        if self._rows():
            return self.of.b.sum((0, 1, 3)).view(tuple(self.shape))
        grads = self.of.grads(total=True)
        return (grads.scale if self.scale else grads.shift).view(tuple(self.shape))

    def materialise(self) -> Tensor:
        x = self.of.normalised() if self.scale else None
        return (self.of.b if x is None else self.of.b * x).sum((1, 3)).view(self.batch_size, *self.shape)

    def sqnorm(self) -> Tensor:
        if self._rows():
            return _squares(self.of.b)
        grads = self.of.grads(total=False)
        return grads.scale_sqnorm if self.scale else grads.shift_sqnorm

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        return self.total(), self.sqnorm()  # the sums come with the norms

    def form(self) -> Any:
        return Full  # with any other; only uses that are alike stay sums that are not formed

    def join(self, others: Sequence[Contribution]) -> Contribution:
        alike = [other.of for other in others if isinstance(other, Affine) and other._kind() == self._kind()]
        if len(alike) < len(others):
            return super().join(others)
        uses = [self.of, *alike]
        b = torch.cat([use.b for use in uses], 1)
        if not self.scale:
            return replace(self, of=Positions(b))
        columns = zip(*((use.x, use.mean, use.rstd) for use in uses))
        return replace(self, of=Positions(b, *(None if column[0] is None else torch.cat(column, 1) for column in columns)))

    def _kind(self) -> Any:
        """Of positions that can stand one after the other."""
        of = self.of
        statistics = [None if t is None else t.shape[2] for t in (of.mean, of.rstd)] if self.scale else []
        return self.scale, of.b.dtype, of.b.shape[2:], statistics


@dataclass
class Rows(Contribution):
    """The tensor has rows of its own for each sample: along ``dim``, of size ``outer * B * inner``, sample i touches its part alone. ``g``: their gradients."""

    g: Tensor  # (*shape)
    dim: int
    outer: int = 1
    inner: int = 1

    def _samples_first(self) -> Tensor:
        """(B, ..., outer, inner, ...)"""
        return self.g.unflatten(self.dim, (self.outer, -1, self.inner)).movedim(self.dim + 1, 0)

    @property
    def batch_size(self) -> int:
        return self.g.shape[self.dim] // (self.outer * self.inner)

    def total(self) -> Tensor:
        return self.g

    def materialise(self) -> Tensor:
        own = torch.diag_embed(self._samples_first().movedim(0, -1)).movedim(-1, 0)  # (B, ..., outer, inner, ..., B): zero for other samples
        return own.movedim(-1, self.dim + 2).flatten(self.dim + 1, self.dim + 3)

    def sqnorm(self) -> Tensor:
        return ops.row_sqnorm(self._samples_first())

    def scaled(self, weights: Tensor) -> Rows:
        own = weights.to(self.g.dtype).repeat_interleave(self.inner).repeat(self.outer)
        return replace(self, g=self.g * own.view(-1, *(1,) * (self.g.dim() - 1 - self.dim % self.g.dim())))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.g, self.g.to(accumulation_dtype(self.g.dtype)).square(), self.sqnorm()

    def form(self) -> Any:
        return Rows, self.dim, self.outer, self.inner

    def join(self, others: Sequence[Rows]) -> Rows:
        return replace(self, g=sum((o.g for o in others), self.g))


@dataclass
class Gathered(Contribution):
    """Rows of a table (V, d) picked by index: row ``index[i, t]`` of ``g_i`` gets ``b[i, t]``, equal indices add up. Negative indices get nothing."""

    index: Tensor  # (B, T) integers
    b: Tensor  # (B, T, d)
    rows: int  # V
    sparse: bool = False  # the ordinary gradient as a sparse tensor

    @property
    def batch_size(self) -> int:
        return self.index.shape[0]

    def _added(self, index: Tensor, rows: int) -> Tensor:
        """(rows, d): row v is the sum of ``b`` where ``index`` is v. Its shape depends on no value: what has a negative index is added to a row too many."""
        if self.b.numel() == 0:  # zeros that stay in the graph: the double backward of the function below cannot shape an empty tensor
            return self.b.new_zeros(rows, self.b.shape[-1]) + self.b.sum()
        index = torch.where(self.index >= 0, index, rows)
        return torch.ops.aten.embedding_dense_backward(self.b, index, rows + 1, rows, False).narrow(0, 0, rows)

    def total(self) -> Tensor:
        if self.sparse:
            keep = self.index >= 0
            return torch.sparse_coo_tensor(self.index[keep][None], self.b[keep], (self.rows, self.b.shape[-1]))
        return self._added(self.index, self.rows)

    def materialise(self) -> Tensor:
        first = self.rows * torch.arange(self.batch_size, device=self.index.device)[:, None]
        return self._added(first + self.index, self.batch_size * self.rows).view(self.batch_size, self.rows, self.b.shape[-1])

    def sqnorm(self) -> Tensor:
        return ops.embedding_sqnorm(self.index, self.b)

    def scaled(self, weights: Tensor) -> Gathered:
        return replace(self, b=_scale(self.b, weights))

    def _merged(self) -> tuple[Tensor, Tensor]:
        """``(keys, sums)``: the n rows that a sample touches, as ``sample * rows + row`` in ascending order, and what they get (n, d)."""
        samples = torch.arange(self.batch_size, device=self.index.device)[:, None].expand_as(self.index)
        keep = self.index >= 0
        keys, place = torch.unique((samples * self.rows + self.index)[keep], return_inverse=True)
        b = self.b[keep].to(accumulation_dtype(self.b.dtype))
        return keys, b.new_zeros(len(keys), b.shape[-1]).index_add(0, place, b)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, sums = self._merged()
        return self.total(), sums.new_zeros(self.rows, sums.shape[1]).index_add(0, keys % self.rows, sums.square()), self.sqnorm()

    def pieces(self, size: int) -> Iterator[Tensor]:
        keys, sums = self._merged()
        touched, place = torch.unique(keys % self.rows, return_inverse=True)
        samples, width = keys // self.rows, max(1, size // max(1, sums.shape[1]))
        for first in range(0, len(touched), width):
            inside = (place >= first) & (place < first + width)
            g = sums.new_zeros(self.batch_size, min(width, len(touched) - first), sums.shape[1])
            g[samples[inside], place[inside] - first] = sums[inside]
            yield g.flatten(1)

    def form(self) -> Any:
        return Gathered, self.b.dtype, self.sparse

    def join(self, others: Sequence[Gathered]) -> Gathered:
        index, b = torch.cat([self.index, *(o.index for o in others)], 1), torch.cat([self.b, *(o.b for o in others)], 1)
        return Gathered(index, b, self.rows, self.sparse)


@dataclass
class Patches(Contribution):
    """The weight (d, c / groups, *kernel) of a convolution: ``g_i`` is the outer product of output gradients and input patches, which are not formed."""

    x: Tensor  # (B, R, c, *size); R runs of the convolution belong to each sample
    b: Tensor  # (B, R, d, *out)
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def batch_size(self) -> int:
        return self.x.shape[0]

    def _arguments(self) -> tuple[Any, ...]:
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    def total(self) -> Tensor:
        x, b = self.x, ops.whole_output(self.x, self.b, *self._arguments()[:-1])
        weight, zeros = b.new_zeros(()).expand(b.shape[2], x.shape[2] // self.groups, *self.kernel), [0] * len(self.kernel)
        sizes = (self.stride, self.padding, self.dilation, False, zeros, self.groups)
        _, grad, _ = torch.ops.aten.convolution_backward(b.flatten(0, 1), x.flatten(0, 1), weight, None, *sizes, (False, True, False))
        return grad

    def materialise(self) -> Tensor:
        return ops.per_sample_conv_wgrad(self.x, self.b, *self._arguments())

    def sqnorm(self) -> Tensor:
        return ops.conv_sqnorm(self.x, self.b, *self._arguments())

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        return ops.conv_wgrad_and_sqnorm(self.x, self.b, *self._arguments())

    def scaled(self, weights: Tensor) -> Patches:
        return replace(self, b=_scale(self.b, weights))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        each = self.b.shape[2] * self.x.shape[2] // self.groups * math.prod(self.kernel)
        some = max(1, _GRADIENTS // max(1, each))
        total, squares, norms = torch.zeros(()), torch.zeros(()), []
        for x, b in zip(self.x.split(some), self.b.split(some)):
            parts = Full(replace(self, x=x, b=b).materialise()).moments()
            total, squares = total + parts[0], squares + parts[1]
            norms.append(parts[2])
        return total, squares, torch.cat(norms)

    def pieces(self, size: int) -> Iterator[Tensor]:
        if self.groups != 1:
            yield from super().pieces(size)
            return
        for b in self.b.split(max(1, size // max(1, self.x.shape[2] * math.prod(self.kernel))), 2):
            yield replace(self, b=b).materialise().flatten(1)

    def form(self) -> Any:
        return Patches, self.x.dtype, self.x.shape[2:], self.b.shape[2:], self._arguments()

    def join(self, others: Sequence[Patches]) -> Patches:
        return replace(self, x=torch.cat([self.x, *(o.x for o in others)], 1), b=torch.cat([self.b, *(o.b for o in others)], 1))


@dataclass
class Arranged(Contribution):
    """Another contribution's gradients, reshaped and with their dimensions permuted: norms do not see that."""

    of: Contribution
    shape: Sequence[int]  # to which each gradient is reshaped
    order: Sequence[int]  # in which its dimensions then come

    @property
    def batch_size(self) -> int:
        return self.of.batch_size

    def total(self) -> Tensor:
        return self.of.total().reshape(*self.shape).permute(*self.order)

    def materialise(self) -> Tensor:
        return self.of.materialise().reshape(self.batch_size, *self.shape).permute(0, *(1 + i for i in self.order))

    def sqnorm(self) -> Tensor:
        return self.of.sqnorm()

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        total, sqnorm = self.of.total_and_sqnorm()
        return total.reshape(*self.shape).permute(*self.order), sqnorm

    def scaled(self, weights: Tensor) -> Arranged:
        return replace(self, of=self.of.scaled(weights))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        total, squares, sqnorm = self.of.moments()
        return total.reshape(*self.shape).permute(*self.order), squares.reshape(*self.shape).permute(*self.order), sqnorm

    def pieces(self, size: int) -> Iterator[Tensor]:
        return self.of.pieces(size)

    def form(self) -> Any:
        return Arranged, self.of.form(), tuple(self.shape), tuple(self.order)

    def join(self, others: Sequence[Arranged]) -> Arranged:
        return replace(self, of=self.of.join([other.of for other in others]))


def inner(x: Contribution, y: Contribution) -> Tensor | None:
    """``<g_i, h_i>`` (B,) of two contributions of different forms, where that is cheap; else None."""
    if isinstance(y, Gathered):
        x, y = y, x
    if isinstance(x, Gathered) and isinstance(y, Full):  # (B, V, d)
        samples = torch.arange(x.batch_size, device=x.index.device)[:, None]
        products = y.g[samples, x.index.clamp_min(0)] * x.b  # (B, T, d)
        return torch.where(x.index >= 0, products.sum(2, dtype=accumulation_dtype(products.dtype)), 0).sum(1)
    if isinstance(x, Gathered) and isinstance(y, Segments) and y.group is None:
        products = x.b.new_zeros(x.batch_size, dtype=accumulation_dtype(y.a.dtype))
        for samples, outer in y._padded():
            part = inner(replace(x, index=x.index[samples], b=x.b[samples]), outer)
            assert part is not None
            products = products.index_copy(0, samples, part)
        return products
    if isinstance(x, Gathered) and isinstance(y, Outer) and y.a.dim() == 3:
        # <e_v g_t^T summed, b^T a> = sum_{s,t} b_s[v_t] <a_s, g_t>: a tied embedding and head. Formed for a few samples at a time, or for a few s.
        T, S, dtype = x.index.shape[1], y.a.shape[1], accumulation_dtype(y.a.dtype)
        positions = min(max(1, _CHUNK // max(T, 1)), max(S, 1))
        few = max(1, _CHUNK // max(positions * T, 1))
        chunks = []
        for index, g, a, b in zip(x.index.split(few), x.b.split(few), y.a.split(few), y.b.split(few)):
            parts = []  # (few, T), for each few s
            for a_s, b_s in zip(a.split(positions, 1), b.split(positions, 1)):
                picked = b_s.gather(2, index.clamp_min(0).long()[:, None].expand(-1, b_s.shape[1], -1))  # (few, positions, T)
                parts.append((picked.to(dtype) * (a_s.to(dtype) @ g.to(dtype).mT)).sum(1))
            chunks.append(torch.where(index >= 0, sum(parts[1:], parts[0]), 0).sum(1))
        return torch.cat(chunks)
    return None
