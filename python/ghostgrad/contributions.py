"""Contributions: how one use of a parameter gives its per-sample gradients, without forming them where that can be helped.

A contribution stands for B gradients ``g_i`` of one tensor's shape. It can give their sum (the ordinary gradient), their squared norms, and as a last resort
the gradients themselves. Those of one ``form`` can be joined: the uses of a parameter are added before anything is squared.
All arithmetic here is made of differentiable operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference import accumulation_dtype

__all__ = ["Arranged", "Contribution", "Full", "Gathered", "Outer", "Patches", "Rows", "inner"]


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

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        return self.total(), self.sqnorm()

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
            return ops.sqnorm(self.a, self.b)
        groups = self.a.shape[:-2]
        return ops.sqnorm(self.a.flatten(0, -3), self.b.flatten(0, -3)).view(groups).flatten(1).sum(1)

    def total_and_sqnorm(self) -> tuple[Tensor, Tensor]:
        return ops.wgrad_and_sqnorm(self.a, self.b) if self.a.dim() == 3 else super().total_and_sqnorm()

    def form(self) -> Any:
        return Outer, self.a.dtype, self.b.dtype, self.a.dim()

    def join(self, others: Sequence[Outer]) -> Outer:
        return Outer(torch.cat([self.a, *(o.a for o in others)], -2), torch.cat([self.b, *(o.b for o in others)], -2))


@dataclass
class Full(Contribution):
    """Per-sample gradients that are there."""

    g: Tensor  # (B, *shape)

    @property
    def batch_size(self) -> int:
        return self.g.shape[0]

    def total(self) -> Tensor:
        return self.g.sum(0)

    def materialise(self) -> Tensor:
        return self.g

    def sqnorm(self) -> Tensor:
        return ops.row_sqnorm(self.g)


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

    def _picked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, index and gradient of each pick that counts."""
        sample = torch.arange(self.batch_size, device=self.index.device)[:, None].expand_as(self.index)
        keep = self.index >= 0
        return sample[keep], self.index[keep], self.b[keep]

    def total(self) -> Tensor:
        _, index, b = self._picked()
        if self.sparse:
            return torch.sparse_coo_tensor(index[None], b, (self.rows, self.b.shape[-1]))
        return b.new_zeros(self.rows, self.b.shape[-1]).index_add(0, index, b)

    def materialise(self) -> Tensor:
        sample, index, b = self._picked()
        flat = b.new_zeros(self.batch_size * self.rows, self.b.shape[-1]).index_add(0, sample * self.rows + index, b)
        return flat.view(self.batch_size, self.rows, -1)

    def sqnorm(self) -> Tensor:
        sample, index, b = self._picked()
        keys, inverse = torch.unique(sample * self.rows + index, return_inverse=True)
        summed = b.new_zeros(len(keys), self.b.shape[-1]).index_add(0, inverse, b)  # equal tokens of a sample add before they are squared
        squares = ops.row_sqnorm(summed)
        return squares.new_zeros(self.batch_size).index_add(0, keys // max(self.rows, 1), squares)

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

    def form(self) -> Any:
        return Arranged, self.of.form(), tuple(self.shape), tuple(self.order)

    def join(self, others: Sequence[Arranged]) -> Arranged:
        return replace(self, of=self.of.join([other.of for other in others]))


def inner(x: Contribution, y: Contribution) -> Tensor | None:
    """``<g_i, h_i>`` (B,) of two contributions of different forms, where that is cheap; else None."""
    if isinstance(x, Outer) and isinstance(y, Gathered):
        x, y = y, x
    if isinstance(x, Gathered) and isinstance(y, Outer) and y.a.dim() == 3:
        # <e_v g_t^T summed, b^T a> = sum_{s,t} b_s[v_t] <a_s, g_t>: a tied embedding and head
        dtype = accumulation_dtype(y.a.dtype)
        index = x.index.clamp_min(0)[:, None, :].expand(-1, y.b.shape[1], -1)  # (B, S, T)
        picked = torch.where(x.index[:, None, :] >= 0, y.b.gather(2, index), 0).to(dtype)
        return (picked * (y.a.to(dtype) @ x.b.to(dtype).mT)).sum((1, 2))
    return None
