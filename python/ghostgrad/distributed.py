"""Sharded tensors: how the ops run on the parts of a ``DTensor``.

Data-parallel training needs nothing (each rank has its own samples; ``DistributedDataParallel`` and ``fully_shard`` are followed by the tap). With tensor
parallelism a weight's rows or columns live on several ranks: norms of the parts add up, because squares do. Imported when a parameter is a ``DTensor``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__: list[str] = []

_OPS = torch.ops.ghostgrad


# Each entry: placements of the outputs, placements of the inputs. Samples may be spread (their norms are then spread too), or features (norms add up).


@register_sharding(_OPS.row_sqnorm.default)
def _(x: Any) -> list[Any]:
    features = [([Partial()], [Shard(dim)]) for dim in range(1, x.ndim)]
    return [([Replicate()], [Replicate()]), ([Shard(0)], [Shard(0)]), *features]


@register_sharding(_OPS.embedding_sqnorm.default)
def _(index: Any, b: Any) -> list[Any]:
    return [([Replicate()], [Replicate(), Replicate()]), ([Shard(0)], [Shard(0), Shard(0)]), ([Partial()], [Replicate(), Shard(2)])]


@register_sharding([_OPS.sqnorm.default, _OPS.outer_sqnorm.default, _OPS.gram_sqnorm.default])
def _(a: Any, b: Any) -> list[Any]:
    return [
        ([Replicate()], [Replicate(), Replicate()]),
        ([Shard(0)], [Shard(0), Shard(0)]),
        ([Partial()], [Shard(2), Replicate()]),
        ([Partial()], [Replicate(), Shard(2)]),
    ]


@register_sharding(_OPS.wgrad_and_sqnorm.default)
def _(a: Any, b: Any) -> list[Any]:
    return [
        ([Replicate(), Replicate()], [Replicate(), Replicate()]),
        ([Partial(), Shard(0)], [Shard(0), Shard(0)]),
        ([Shard(1), Partial()], [Shard(2), Replicate()]),
        ([Shard(0), Partial()], [Replicate(), Shard(2)]),
    ]


@register_sharding(_OPS.affine_sqnorm.default)
def _(b: Any, x: Any = None, mean: Any = None, rstd: Any = None, total: bool = True) -> list[Any]:
    def entry(of_sum: Any, of_sqnorm: Any, of_data: Any, of_statistics: Any) -> Any:
        empty = Replicate()  # results that are not asked for have no elements
        of_scale = [of_sum if total else empty, of_sqnorm] if x is not None else [empty, empty]
        operands = [of_data, *(None if t is None else p for t, p in ((x, of_data), (mean, of_statistics), (rstd, of_statistics))), None]
        return [*of_scale, of_sum if total else empty, of_sqnorm], operands

    spread = [entry(Partial(), Shard(0), Shard(0), Shard(0))]
    if all(statistic is None or statistic.shape[2] == 1 for statistic in (mean, rstd)):
        spread.append(entry(Shard(0), Partial(), Shard(2), Replicate()))
    return [entry(Replicate(), Replicate(), Replicate(), Replicate()), *spread]
