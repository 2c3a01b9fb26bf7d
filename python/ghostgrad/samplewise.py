"""Does an operation keep samples apart? What is known by name, and a trial run for everything else.

An operation on tensors that carry samples keeps them apart if the part of its result that belongs to a sample depends on that sample's parts of the inputs
alone. :mod:`ghostgrad.layout` knows the operations that move samples; :func:`keeps_apart` is asked about the rest. A name that says nothing is tried out:
run on single samples the operation must give what it gives on the batch. A trial costs the operation's forward three times, once for each kind of call
(shapes, dtypes, arguments); with indices or constants among the arguments every time.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from .reference import accumulation_dtype

__all__ = ["POINTWISE", "agree", "hint", "keeps_apart", "map_samples", "static", "tracing", "tried", "with_values"]

# Every element of the result depends on the element at its place alone (and on constants and chance), or on nothing but the shape.
POINTWISE = frozenset(
    "abs absolute neg negative positive sign sgn reciprocal square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh asinh "
    "acosh atanh erf erfc erfinv lgamma digamma i0 i0e sinc floor ceil round trunc frac fix clamp clip clamp_min clamp_max nan_to_num logit deg2rad rad2deg "
    "isnan isinf isfinite isneginf isposinf logical_not bitwise_not signbit angle real imag conj resolve_conj resolve_neg "
    "__neg__ __pos__ __abs__ __invert__ "
    "relu relu6 elu selu celu gelu silu mish leaky_relu rrelu sigmoid logsigmoid hardsigmoid hardswish hardtanh hardshrink softshrink tanhshrink threshold "
    "softsign softplus tanh dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d bernoulli poisson one_hot bucketize "
    "clone contiguous detach data to type type_as float double half bfloat16 cfloat cdouble long int short bool cpu cuda alias as_subclass "
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty "
    "fill zero normal uniform exponential random".split()
)

# How many of the last dimensions an operation combines; it maps over those before.
_TRAILING = {
    "scaled_dot_product_attention": 2,
    "multinomial": 1,
    **dict.fromkeys("cdist tril triu trace det logdet slogdet inverse pinverse matrix_exp matrix_power cholesky cholesky_solve lu_solve".split(), 2),
    **dict.fromkeys("linalg_det linalg_inv linalg_cholesky linalg_eigh linalg_qr linalg_svd linalg_matrix_exp linalg_matrix_power".split(), 2),
}
# Samples along dimension 0, and the sizes among the arguments may include the batch's.
_BATCH_FIRST = frozenset(
    "affine_grid cross_entropy nll_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_loss cosine_embedding_loss".split()
)
_SPATIAL = re.compile(r"(?:conv|conv_transpose|(?:adaptive_)?(?:max|avg)_pool|lp_pool|max_unpool)([123])d(?:_with_indices)?")
_TABLES = frozenset(("embedding", "embedding_bag"))

_TRIED: dict[Any, bool] = {}


def agree(x: Tensor, y: Tensor) -> bool:
    """Equal to half the digits of the dtype."""
    if not x.is_floating_point() and not x.is_complex():
        return torch.equal(x, y)
    eps = torch.finfo(accumulation_dtype(x.dtype) if x.dtype == torch.float64 else x.dtype).eps
    scale = y.abs().nan_to_num(0, 0, 0).amax().item() if y.numel() else 0.0
    return torch.allclose(x, y, rtol=math.sqrt(eps), atol=math.sqrt(eps) * scale, equal_nan=True)


def tracing() -> bool:
    """True while AOTAutograd traces a graph: tensors have shapes then, but no values."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def hint(n: Any) -> int:
    """A size; of a symbolic one the number at hand."""
    size: int = n if isinstance(n, int) else n.node.hint
    return size


def static(t: Tensor) -> Tensor:
    """A tensor of known sizes: nothing can be mapped over samples of an unknown number, so a graph that is being traced is specialised to those at hand."""
    return t if all(isinstance(n, int) for n in t.shape) else t.reshape([int(n) for n in t.shape])


@contextmanager
def with_values(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """The arguments of a call; of a graph that is being traced, with random numbers in the place of its tensors, on which torch functions then run.
    Raises TypeError for a tensor that has no values and does not take random ones: an index, a mask."""
    if not any(is_fake(leaf) for leaf in leaves):
        yield list(leaves)
        return
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():

        def real(t: Tensor) -> Tensor:
            if not t.is_floating_point() and not t.is_complex():
                raise TypeError("an index or a mask has no values while a graph is traced")
            return torch.rand([hint(n) for n in t.shape], dtype=t.dtype, device=t.device)

        yield [real(leaf) if isinstance(leaf, Tensor) else hint(leaf) if isinstance(leaf, torch.SymInt) else leaf for leaf in leaves]


def map_samples(single: Callable[..., list[Any]], tensors: Sequence[Tensor], batch_size: int) -> list[Any]:
    """``single`` on the slices of ``tensors`` (B, ...), its results stacked: by ``torch.vmap``, or by a loop where it cannot be vectorised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap's own advice on operations that it maps slowly
            mapped: list[Any] = torch.vmap(single, randomness="different")(*tensors)
            return mapped
    except Exception:
        rows = [single(*(t[i] for t in tensors)) for i in range(batch_size)]
        return [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*rows)]


def keeps_apart(
    func: Callable[..., Any],
    name: str,
    inputs: Sequence[tuple[Tensor, Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layouts: Sequence[Any],
    batch_size: int,
) -> bool:
    """True if ``func(*args, **kwargs)`` keeps the samples of ``inputs`` (tensors with their layouts) apart and its results hold them as ``layouts`` say."""
    if name.removesuffix("_") in POINTWISE:
        return True
    if name in _TRAILING:
        return all(layout.dim < t.dim() - _TRAILING[name] for t, layout in inputs)
    if name in _BATCH_FIRST:
        return all(layout.dim == 0 for _, layout in inputs)
    if name in _TABLES:
        return all(t is args[0] for t, _ in inputs)
    if name == "pad":
        pad = kwargs.get("pad", args[1] if len(args) > 1 else ())
        return all(layout.dim < t.dim() - len(pad) // 2 for t, layout in inputs)
    if (spatial := _SPATIAL.fullmatch(name)) and len(inputs) == 1:
        t, layout = inputs[0]
        return layout.dim == 0 and t.dim() == int(spatial[1]) + 2 and (t is kwargs.get("input") or (bool(args) and t is args[0]))
    if name.endswith("_") or kwargs.get("out") is not None or not all(hasattr(layout, "outer") for _, layout in inputs):
        return False
    if isinstance(func, torch._ops.OpOverload) and func.namespace == "aten":  # kernels that check less than the functions that call them
        return False
    key = _signature(func, inputs, args, kwargs, layouts, batch_size)
    if key is None or key not in _TRIED:
        apart = tried(func, inputs, args, kwargs, layouts, batch_size)
        if key is None:
            return apart
        if len(_TRIED) >= 1 << 12:
            _TRIED.clear()
        _TRIED[key] = apart
    return _TRIED[key]


def _signature(func: Any, inputs: Sequence[tuple[Tensor, Any]], args: Any, kwargs: Any, layouts: Sequence[Any], batch_size: int) -> Any:
    """What a trial's outcome depends on; None if on values as well: indices, and constants that may be zero in places."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = {id(t): layout for t, layout in inputs}
    signed = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if id(leaf) not in places or not (leaf.is_floating_point() or leaf.is_complex()):
                return None
            leaf = (leaf.shape, leaf.dtype, leaf.device, places[id(leaf)])
        signed.append(leaf)
    key = (func, str(spec), tuple(signed), tuple(layouts), batch_size)
    try:
        hash(key)
    except TypeError:
        return None
    return key


@contextmanager
def _own_chance(t: Tensor) -> Iterator[None]:
    """A trial neither records a graph nor moves the random state."""
    with torch.no_grad(), torch.random.fork_rng([t.device] if t.is_cuda else []):
        yield


def tried(func: Any, inputs: Sequence[tuple[Tensor, Any]], args: Any, kwargs: Any, layouts: Sequence[Any], batch_size: int) -> bool:
    """Runs the operation on the batch and on single samples and compares: on random numbers, for the data may be alike (a state that is zero), or on the data
    where the operation does not take random numbers. ``inputs``: the tensors among the arguments that carry samples, with their layouts; ``layouts``: those of
    the results."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = {i: _known(layout) for i, leaf in enumerate(leaves) for t, layout in inputs if leaf is t}
    layouts, batch_size = [_known(layout) for layout in layouts], hint(batch_size)
    try:
        with _own_chance(inputs[0][0]), with_values(leaves) as values:
            return _tried(func, values, spec, places, layouts, batch_size)
    except TypeError:
        return False


def _known(layout: Any) -> Any:
    return replace(layout, outer=hint(layout.outer), inner=hint(layout.inner)) if hasattr(layout, "outer") else layout


def _tried(func: Any, leaves: list[Any], spec: Any, places: dict[int, Any], layouts: Sequence[Any], batch_size: int) -> bool:

    def run(values: dict[int, Tensor]) -> list[Any]:
        filled_args, filled_kwargs = pytree.tree_unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return list(pytree.tree_leaves(func(*filled_args, **filled_kwargs)))

    def outcome(data: dict[int, Tensor]) -> bool:
        whole = [t for t in run(data) if isinstance(t, Tensor)]
        split = []
        for i, place in places.items():
            x = data[i].unflatten(place.dim, (place.outer, batch_size, place.inner)).movedim(place.dim + 1, 0)
            split.append(x.flatten(place.dim + 1, place.dim + 2))  # (B, ..., outer * inner, ...)
        singles = [t for t in map_samples(lambda *values: run(dict(zip(places, values))), split, batch_size) if isinstance(t, Tensor)]
        for single, t, place in zip(singles, whole, layouts):
            if not hasattr(place, "outer"):
                continue
            if single.shape[1:] != (*t.shape[: place.dim], place.outer * place.inner, *t.shape[place.dim + 1 :]):
                return False
            merged = single.unflatten(place.dim + 1, (place.outer, place.inner)).movedim(0, place.dim + 1).flatten(place.dim, place.dim + 2)
            if not agree(merged, t):
                return False
        return True

    given = {i: leaves[i].detach() for i in places}
    alone = all(i in places for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))  # then it can be run in any dtype

    def random(t: Tensor) -> Tensor:
        wide = torch.complex128 if t.is_complex() else torch.float64
        return torch.rand_like(t, dtype=wide if alone else t.dtype) if t.is_floating_point() or t.is_complex() else t

    for data in ({i: random(t) for i, t in given.items()}, given):
        try:
            return outcome(data)
        except Exception:  # random numbers that it does not take, or single samples that it does not take
            continue
    return False
