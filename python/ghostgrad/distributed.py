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
