"""Where the samples of a batch lie inside a tensor, and how operations move them.

A tensor that carries samples has one dimension of size ``outer * B * inner`` whose order is (outer, sample, inner); plain activations have
``Layout(0, 1, 1)``, tokens flattened into the batch ``Layout(0, 1, T)``, time-major sequences ``Layout(1, 1, 1)``, time-major sequences
flattened ``Layout(0, T, 1)``. Rows that an index picked (packed sequences, the tokens of one expert, permuted samples) are :class:`Ragged`: a sample is noted
for each. The tap keeps layouts only for tensors that differ from the plain one, and :func:`propagate` follows them through the
operations that move dimensions. What cannot be followed becomes :class:`Mixed`, with the reason: such a tensor may still become a loss, but may
not meet a parameter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .reference import accumulation_dtype
from .samplewise import keeps_apart, tracing

__all__ = [
    "ELEMENTWISE",
    "FOLLOWED",
    "PLAIN",
    "AnyLayout",
    "Known",
    "Layout",
    "Mixed",
    "Ragged",
    "from_samples",
    "placed",
    "propagate",
    "sequences",
    "single",
    "sum_samples",
    "to_rows",
    "to_samples",
]


@dataclass(frozen=True)
class Layout:
    """The samples lie along ``dim``, which has size ``outer * B * inner``."""

    dim: int
    outer: int = 1
    inner: int = 1

    def at(self, dim: int) -> Layout:
        """The same order along another dimension."""
        return replace(self, dim=dim)

    def rows(self, x: Tensor, batch_size: int) -> Tensor:
        """The sample of each row along ``dim``, (x.shape[dim],)."""
        return torch.arange(x.shape[self.dim], device=x.device) // self.inner % max(batch_size, 1)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Row r along ``dim`` belongs to sample ``samples[r]``: any number of rows for each sample, in any order. Rows of a constant belong to -1, nobody."""

    dim: int
    samples: Tensor  # (n,) integers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged) or self.dim != other.dim:
            return False
        return self.samples is other.samples or torch.equal(self.samples, other.samples)

    __hash__ = None  # type: ignore[assignment]

    def at(self, dim: int) -> Ragged:
        """The same rows along another dimension."""
        return Ragged(dim, self.samples)

    def rows(self, x: Tensor, batch_size: int) -> Tensor:
        """The sample of each row along ``dim``, (x.shape[dim],)."""
        return self.samples


@dataclass(frozen=True)
class Mixed:
    """The samples can no longer be told apart. ``coupled``: because an operation combined them, rather than because it is not understood.
    ``unseen``: nothing is known of the tensor; a factory made it. ``gradient``: "summed" if elements add up what several samples give, as a loss does;
    "entangled" if it is no such sum, so that no part of its gradient is one sample's own."""

    reason: str
    coupled: bool = False
    unseen: bool = False
    gradient: Literal["", "summed", "entangled"] = ""


PLAIN = Layout(0)
Known = Layout | Ragged
AnyLayout = Known | Mixed


def _numbering(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that work on the numbers of rows: those have values even while a graph is traced, which is then specialised to the sizes at hand."""

    @functools.wraps(function)
    def on_values(*args: Any) -> Any:
        if not tracing():
            return function(*args)
        args = tuple(int(a) if isinstance(a, torch.SymInt) else a for a in args)
        with torch.utils._python_dispatch._disable_current_modes():
            return function(*args)

    return on_values


def placed(dim: int, samples: Tensor, batch_size: int) -> Known:
    """The layout of rows that belong to ``samples``: the regular one where they lie in regular order."""
    size = len(samples)
    if size and batch_size and size % batch_size == 0 and samples[0] == 0:
        inner = int((samples != 0).int().argmax()) or size  # how long the first sample's first run is
        regular = Layout(dim, size // (batch_size * inner), inner)
        if size % (batch_size * inner) == 0 and torch.equal(samples, torch.arange(size, device=samples.device) // inner % batch_size):
            return regular
    return Ragged(dim, samples)


# Operations that keep the order of the elements and change the shape alone.
_ORDER_KEEPING = frozenset("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as ravel atleast_1d".split())
# Views that permute dimensions or take parts of them: where the sample dimension went is read off the strides of a probe.
_STRIDED = frozenset(
    "transpose permute t T mT H mH movedim moveaxis swapaxes swapdims adjoint __getitem__ select narrow split split_with_sizes chunk tensor_split unbind "
    "hsplit vsplit dsplit".split()
)
_RESHAPED_IN_PLACE = frozenset("transpose_ t_ swapaxes_ swapdims_ squeeze_ unsqueeze_ resize_ set_".split())


def _with_dim(names: str, position: int, default: int | None) -> dict[str, tuple[int, int | None]]:
    return dict.fromkeys(names.split(), (position, default))


# Operations that work along dimensions: the position of their ``dim`` argument, and its default (None: all dimensions).
_REDUCTIONS = {
    **_with_dim("sum mean var std var_mean std_mean prod amax amin max min aminmax logsumexp nansum nanmean argmax argmin any all", 1, None),
    **_with_dim("count_nonzero nanmedian median mode logcumsumexp nanvar nanstd", 1, None),
    **_with_dim("norm vector_norm linalg_norm linalg_vector_norm quantile nanquantile", 2, None),
    **_with_dim("kthvalue", 2, -1),
}
_ALONG = {
    **_with_dim("softmax log_softmax softmin cumsum cumprod cummax cummin flip gather index_select take_along_dim index_add index_fill", 1, None),
    **_with_dim("scatter scatter_add scatter_reduce index_copy", 1, None),
    **_with_dim("sort argsort glu", 1, -1),
    **_with_dim("roll", 2, None),
    **_with_dim("topk diff fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", 2, -1),
    **_with_dim("normalize", 2, 1),
    **_with_dim("gumbel_softmax", 4, -1),
}
_PRODUCTS = frozenset("matmul bmm mm __matmul__ __rmatmul__ baddbmm addmm addbmm".split())
_JOINS = frozenset(("cat", "concat", "concatenate"))
# Operations that pick rows by an index, and those that write rows by one: the position of the index, and of what is written.
_PICKS = {"__getitem__": 1, "index_select": 2, "gather": 2, "take_along_dim": 1, "repeat_interleave": 1}
_WRITES = {
    **dict.fromkeys(("__setitem__", "index_put", "index_put_", "masked_scatter", "masked_scatter_"), (1, 2)),
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_"), (2, 3)),
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"), (2, 3)),
    "copy_": (None, 1),
}
_FOUND = frozenset("nonzero argwhere where".split())  # the places of the true elements, row by row
_EXPANSIONS = frozenset(("expand", "expand_as", "broadcast_to"))
_PAIRS = frozenset(  # of rows, or elements anywhere
    "cdist pdist outer ger inner kron tensordot cov corrcoef rot90 as_strided slice_scatter select_scatter diagonal_scatter put put_ chain_matmul".split()
)
_COUNTS = frozenset("unique unique_consecutive bincount histc masked_select take".split())
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
_PACKINGS = frozenset("_pack_padded_sequence _pad_packed_sequence pad_sequence".split())
# Operations on several tensors that broadcast: dimensions are aligned from the right.
ELEMENTWISE = frozenset(
    ("add", "sub", "mul", "div", "true_divide", "divide", "multiply", "subtract", "rsub", "pow", "float_power", "maximum", "minimum", "fmax", "fmin")
    + ("where", "lerp", "addcmul", "addcdiv", "atan2", "hypot", "fmod", "remainder", "logaddexp", "xlogy", "copysign", "masked_fill")
    + ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__rdiv__", "__pow__", "__rpow__")
    + ("add_", "sub_", "mul_", "div_", "pow_", "lerp_", "addcmul_", "addcdiv_", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__")
)
# Others that broadcast, but have no rule by that.
_BROADCASTING = ELEMENTWISE | frozenset(
    "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ less greater less_equal greater_equal not_equal isclose logical_and logical_or logical_xor "
    "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ __rand__ __ror__ __rxor__ floor_divide __floordiv__ __mod__ heaviside ldexp complex polar "
    "masked_fill_ expand expand_as broadcast_to broadcast_tensors normal mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy "
    "binary_cross_entropy_with_logits gaussian_nll_loss poisson_nll_loss soft_margin_loss".split()
)
_NEW = frozenset("new_zeros new_ones new_empty new_full".split())
# Made of sizes: what carries samples among their arguments is a number of rows.
FACTORIES = frozenset("zeros ones empty rand randn arange range eye tril_indices triu_indices".split())
# Linear in every tensor, or a choice among elements: what was summed over the samples stays a sum over the samples.
_LINEAR = (
    _ORDER_KEEPING
    | _STRIDED
    | _JOINS
    | frozenset(
        "sum mean nansum nanmean add sub subtract rsub neg negative positive __add__ __radd__ __sub__ __rsub__ __neg__ add_ sub_ __iadd__ __isub__".split()
    )
    | frozenset("to type_as float double half bfloat16 cuda cpu clone contiguous detach expand expand_as broadcast_to repeat stack cumsum flip roll".split())
    | frozenset("where masked_fill max min amax amin maximum minimum median kthvalue sort topk masked_select index_select gather trace diagonal".split())
)
_MULTIPLY = _PRODUCTS | frozenset("mul multiply __mul__ __rmul__ mul_ __imul__ dot mv vdot inner outer einsum linear".split())
_DIVIDE = frozenset("div divide true_divide __truediv__ div_ __itruediv__".split())
# What may move the samples of a plain tensor although the first dimension keeps its size.
FOLLOWED = (
    _ORDER_KEEPING
    | _STRIDED
    | _RESHAPED_IN_PLACE
    | _REDUCTIONS.keys()
    | _ALONG.keys()
    | _PRODUCTS
    | _JOINS
    | _PICKS.keys()
    | _WRITES.keys()
    | _FOUND
    | _COUNTS
    | _RECURRENT
    | _PACKINGS
    | _EXPANSIONS
    | _PAIRS
    | {"pad", "stack", "einsum", "linear", "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}
)


def to_samples(x: Tensor, layout: Known, batch_size: int, feature_dims: int = 1, fill: float = 0) -> Tensor:
    """``x`` as (B, T, *features): the last ``feature_dims`` dimensions are kept, all others but the samples' are flattened into T, in order. Ragged rows
    are filled up with ``fill`` to those of the sample that has most."""
    features = x.shape[x.dim() - feature_dims :]
    if isinstance(layout, Ragged):
        x, samples = to_rows(x, layout, batch_size, feature_dims)
        counts = torch.bincount(samples, minlength=batch_size)
        order = samples.argsort(stable=True)
        owner = samples[order]
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        longest = int(counts.max()) if batch_size else 0
        padded = x.new_full((batch_size * longest, *features), fill).index_copy(0, owner * longest + place, x[order])
        return padded.view(batch_size, longest, *features)
    if layout == PLAIN and x.dim() == 2 + feature_dims - 1:
        return x.unsqueeze(1)  # (B, 1, features)
    if layout != PLAIN:
        x = x.unflatten(layout.dim, (layout.outer, batch_size, layout.inner)).movedim(layout.dim + 1, 0)
    positions = math.prod(x.shape[1 : x.dim() - feature_dims])
    return x.reshape(batch_size, positions, *features)


def from_samples(x: Tensor, layout: Layout, batch_size: int, shape: Sequence[int]) -> Tensor:
    """What :func:`to_samples` made (B, T, ...) of a tensor of that shape, as such a tensor again."""
    if layout == PLAIN:
        return x.reshape(*shape)
    before, after = shape[: layout.dim], shape[layout.dim + 1 :]
    return x.reshape(batch_size, *before, layout.outer, layout.inner, *after).movedim(0, layout.dim + 1).reshape(*shape)


def to_rows(x: Tensor, layout: Known, batch_size: int, feature_dims: int = 1) -> tuple[Tensor, Tensor]:
    """``x`` as (n, *features), all dimensions but the last ``feature_dims`` flattened, and the sample of each row (n,)."""
    samples, features = layout.rows(x, batch_size), x.shape[x.dim() - feature_dims :]
    rest = math.prod(size for i, size in enumerate(x.shape[: x.dim() - feature_dims]) if i != layout.dim)
    return x.movedim(layout.dim, 0).reshape(len(samples) * rest, *features), samples.repeat_interleave(rest) if rest != 1 else samples


def sum_samples(x: Tensor, layout: Known, batch_size: int) -> Tensor:
    """``x`` with the rows of each sample added up, and the samples first: (B, *the other dimensions)."""
    if layout == PLAIN:
        return x
    if isinstance(layout, Ragged):
        x = x.movedim(layout.dim, 0)
        x = x.to(accumulation_dtype(x.dtype))
        return x.new_zeros(batch_size, *x.shape[1:]).index_add(0, layout.samples, x)
    return x.unflatten(layout.dim, (layout.outer, batch_size, layout.inner)).movedim(layout.dim + 1, 0).sum((layout.dim + 1, layout.dim + 2))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Views


def _along_dim(samples: Tensor, dim: int, ndim: int) -> Tensor:
    """Numbers of rows, shaped so that they broadcast along ``dim``."""
    return samples.view(-1, *(1,) * (ndim - 1 - dim))


def _located(owner: Tensor, shape: Sequence[int], batch_size: int) -> AnyLayout:
    """The layout of a tensor of that shape, whose elements belong to the samples ``owner``, which broadcasts to it."""
    owner = owner[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in owner.stride())]
    for dim, size in enumerate(shape):
        rows = owner[tuple(slice(None) if d == dim else slice(0, 1) for d in range(len(shape)))]
        if owner.shape[dim] == size == rows.numel() and bool((owner == rows).all()):
            return placed(dim, rows.flatten(), batch_size)
    if len(shape) and owner.numel() == 1:
        return Ragged(0, owner.flatten().expand(shape[0]))
    return Mixed("the samples no longer lie along one dimension")


def single(*layouts: AnyLayout) -> Tensor | None:
    """The sample to which all rows belong, if they do belong to one."""
    samples = [layout.samples if isinstance(layout, Ragged) else None for layout in layouts]
    first = next((s[0] for s in samples if s is not None and len(s)), None)
    if first is None or any(s is None or bool((s != first).any()) for s in samples):
        return None
    return first


def _reshaped(x: Tensor, layout: Known, new_shape: Sequence[int], batch_size: int) -> AnyLayout:
    """The layout after an order-keeping change of shape: the flat order is (before, sample, after), and ragged (before, row, after)."""
    shape = x.shape
    if batch_size == 0:
        return next((Layout(dim) for dim, size in enumerate(new_shape) if size == 0), Mixed("an empty batch was reshaped"))
    if isinstance(layout, Layout):
        before = math.prod(shape[: layout.dim]) * layout.outer
        prefix = 1
        for dim, size in enumerate(new_shape):
            if before % prefix == 0:
                outer = before // prefix
                if size and size % (outer * batch_size) == 0:
                    return Layout(dim, outer, size // (outer * batch_size))
            prefix *= size
    rows, before, after = layout.rows(x, batch_size), math.prod(shape[: layout.dim]), math.prod(shape[layout.dim + 1 :])
    if not x.numel():
        return next((Ragged(dim, rows) for dim, size in enumerate(new_shape) if size == 0 == len(rows)), Mixed("a tensor without elements was reshaped"))
    kept = len(new_shape)  # dimensions; those that follow lie within a row
    while kept and after % new_shape[kept - 1] == 0:
        kept -= 1
        after //= new_shape[kept]
    owner = rows.view(1, -1, 1).expand(before, -1, after).reshape([*new_shape[:kept], *(1,) * (len(new_shape) - kept)])
    return _located(owner, new_shape, batch_size)


def _touched(x: Tensor, index: Any) -> int:
    """How many of the first dimensions of ``x`` an index may change."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is Ellipsis or isinstance(item, list) for item in items):
        return x.dim()
    return sum(0 if item is None else item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1 for item in items)


def _indexed(rows: Tensor, x: Tensor, dim: int, index: Any) -> Tensor:
    """Numbers of the rows of ``x`` along ``dim``, one for each element of ``x[index]``; dimensions that the index leaves alone have size one."""
    touched = _touched(x, index)
    shape = [size if d < touched or d == dim else 1 for d, size in enumerate(x.shape)]
    return _along_dim(rows, dim, x.dim()).expand(shape)[index]


_Shadow = tuple[int | None, int, bool]


def _shadows(func: Callable[..., Any], shape: Sequence[int], dim: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> list[_Shadow]:
    """What ``func`` makes of a probe of that shape, without data, whose strides are all different. For each result the dimension of which dimension ``dim``
    of the probe has become, or None; its number of dimensions; and whether it is a view."""
    probe = torch.empty([max(size, 2) for size in shape], device="meta")
    stride = probe.stride(dim)
    found: list[_Shadow] = []
    for shadow in _results(func, probe, args, dict(kwargs)):
        dims = [d for d, s in enumerate(shadow.stride()) if s == stride and shadow.size(d) > 1]
        found.append((dims[0] if len(dims) == 1 else None, shadow.dim(), shadow._is_view()))
    return found


_known_shadows = functools.lru_cache(maxsize=4096)(_shadows)


def _results(func: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    out = func.__self__.__get__(x) if func.__name__ == "__get__" else func(x, *args, **kwargs)  # type: ignore[attr-defined]
    return [out] if isinstance(out, Tensor) else list(out)


def _strided(
    func: Callable[..., Any], x: Tensor, layout: Known, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor], batch_size: int
) -> list[AnyLayout]:
    """Runs ``func`` on a probe without data and finds the sample dimension by its stride; once for calls that are alike."""
    call = func, tuple(x.shape), layout.dim, args[1:], tuple(kwargs.items())
    try:
        try:
            shadows = _shadows(*call) if tracing() else _known_shadows(*call)
        except TypeError:  # slices and lists have no hash
            shadows = _shadows(*call)
    except Exception:
        return [Mixed(f"'{func.__name__}' could not be followed")] * len(outputs)
    found: list[AnyLayout] = []
    parts: list[Tensor] = []  # the samples of the outputs' elements, where a part of the rows is taken
    for i, ((dim, dims, view), output) in enumerate(zip(shadows, outputs)):
        if view and dim is not None and dims == output.dim() and output.size(dim) == x.size(layout.dim):
            found.append(layout.at(dim))
        elif func.__name__ == "__getitem__" and not (view and dims == output.dim()):
            found.append(_located(_indexed(layout.rows(x, batch_size), x, layout.dim, args[1]), output.shape, batch_size))
        else:
            parts = parts or _results(func, _along_dim(layout.rows(x, batch_size), layout.dim, x.dim()).expand(x.shape), args[1:], kwargs)
            found.append(_located(parts[i], output.shape, batch_size))
    return found


# ---------------------------------------------------------------------------------------------------------------------------------------
# Rows picked and written by an index


def _argument(name: str, position: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get(name) if name in kwargs else args[position] if position is not None and len(args) > position else None


@_numbering
def _picked(name: str, x: Tensor, layout: Known, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, batch_size: int) -> AnyLayout | None:
    """The layout of rows that are picked along the samples' dimension; None if the call picks along another."""
    index = _argument("repeats" if name == "repeat_interleave" else "indices" if name == "take_along_dim" else "index", _PICKS[name], args, kwargs)
    dim = _argument("dim", 1 if name in ("index_select", "gather") else 2, args, kwargs)
    if not isinstance(dim, int) or dim % max(x.dim(), 1) != layout.dim:
        return None if isinstance(dim, int) else Mixed(f"'{name}' without a dimension")
    rows = layout.rows(x, batch_size)
    if name == "repeat_interleave":
        return placed(layout.dim, rows.repeat_interleave(index), batch_size)
    if name == "index_select":
        return placed(layout.dim, rows[index.view(-1)], batch_size)
    index = index[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in index.stride())]  # expanded over the other dimensions
    return _located(rows[index], output.shape, batch_size) if index.dim() == x.dim() else Mixed(f"'{name}' with an index of fewer dimensions")


@_numbering
def _written(
    name: str, x: Tensor, layout: AnyLayout, value: tuple[Tensor, AnyLayout] | None, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> AnyLayout:
    """The layout of ``x`` after rows were written into it: its own, if every row went to a row of the same sample."""
    along = name.startswith(("index_add", "index_copy", "index_reduce", "scatter"))  # along one dimension, which comes before the index
    index = _argument("mask" if "masked" in name else "indices" if "put" in name else "index", _WRITES[name][0], args, kwargs)
    dim = _argument("dim", 1, args, kwargs) % max(x.dim(), 1) if along else 0
    if isinstance(layout, Mixed):
        if not layout.unseen or not x.dim():
            return layout
        layout = Ragged(dim, torch.full((x.shape[dim],), -1, device=x.device))  # a constant: its rows belong to whoever writes them
    if value is None:
        return layout
    source, other = value
    if isinstance(other, Mixed):
        return other
    places = torch.arange(x.shape[layout.dim], device=x.device)
    owner = _along_dim(other.rows(source, batch_size), other.dim, source.dim())
    if name.startswith("scatter"):
        if index.dim() != source.dim():
            return Mixed(f"'{name}' of a single number")
        owner = owner.expand(source.shape)[tuple(slice(0, size) for size in index.shape)]
        places = index if dim == layout.dim else _along_dim(places, layout.dim, x.dim()).expand(x.shape)[tuple(slice(0, size) for size in index.shape)]
    elif along:
        if source.dim() != x.dim():
            return Mixed(f"'{name}' of a single row")
        places = _along_dim(index.view(-1) if dim == layout.dim else places, layout.dim, x.dim())
    elif "masked" in name:
        places = _along_dim(places, layout.dim, x.dim()).expand(x.shape)[index.expand(x.shape)]
        owner = owner.expand(source.shape).reshape(-1)[: len(places)]
    elif name == "copy_":
        places = _along_dim(places, layout.dim, x.dim())
    else:
        places = _indexed(places, x, layout.dim, tuple(index) if "put" in name else index)
    while owner.dim() > places.dim() and owner.shape[0] == 1:
        owner = owner[0]
    places, owner = (t.flatten() for t in torch.broadcast_tensors(places, owner))
    places, owner = places[owner >= 0], owner[owner >= 0]
    rows = layout.rows(x, batch_size)
    free = rows[places] < 0
    rows = rows.index_put((places[free],), owner[free])
    if not torch.equal(rows[places], owner):
        return Mixed(f"'{name}' writes rows of one sample where those of another lie", coupled=True)
    return placed(layout.dim, rows, batch_size)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sequences of different lengths


def sequences(samples: Tensor, batch_sizes: Tensor) -> Tensor | None:
    """The sample of each sequence, given those of packed rows, which come step by step; None if a sequence has rows of several samples."""
    sizes = batch_sizes.tolist()
    first = samples[: sizes[0]] if sizes else samples
    return first if torch.equal(samples, torch.cat([first[:n] for n in sizes]) if sizes else samples) else None


def _packings(
    name: str, x: Tensor, layout: Known, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor], batch_size: int
) -> list[AnyLayout]:
    """Packed sequences, made and undone."""
    batch_first = bool(_argument("batch_first", 1 if name == "pad_sequence" else 2, args, kwargs))
    no_samples = Mixed("it holds lengths, not samples")
    owner: Tensor | None = None
    if name == "_pack_padded_sequence" and layout.dim == (0 if batch_first else 1):
        owner = layout.rows(x, batch_size)
        return [placed(0, torch.cat([owner[:n] for n in outputs[1].tolist()]), batch_size), no_samples]
    if name == "_pad_packed_sequence" and layout.dim == 0:
        owner = sequences(layout.rows(x, batch_size), args[1])
    return [Mixed(f"'{name}' joins rows of several samples") if owner is None else placed(0 if batch_first else 1, owner, batch_size), no_samples]


def _recurrence(x: Tensor, layout: Known, args: tuple[Any, ...], outputs: Sequence[Tensor], batch_size: int) -> list[AnyLayout]:
    """A recurrent network without tracked parameters: the outputs lie as the inputs do, the states (layers, sequences, features) have the sequences along 1."""
    if isinstance(args[3], (list, tuple)):  # packed
        owner = sequences(layout.rows(x, batch_size), args[1]) if layout.dim == 0 else None
        state: AnyLayout = Mixed("a sequence has rows of several samples") if owner is None else placed(1, owner, batch_size)
    else:
        state = layout.at(1)
        if x.dim() != 3 or layout.dim != (0 if args[-1] else 1):
            state = Mixed("a recurrent network runs along the dimension of the samples", coupled=True)
    return [state if isinstance(state, Mixed) else layout, *[state] * (len(outputs) - 1)]


def _dims_argument(name: str, ndim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """The dimensions that a call works along; None stands for all of them."""
    position, default = (_REDUCTIONS | _ALONG)[name]
    if name == "flip" and len(args) > 2:
        args = (args[0], args[1:])
    dims = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims", args[position] if len(args) > position else default)))
    if dims is None or isinstance(dims, (str, Tensor, torch.dtype, bool)):
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [d % max(ndim, 1) for d in dims] if dims else None


def _along(name: str, x: Tensor, layout: Known, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> list[AnyLayout]:
    dims = _dims_argument(name, x.dim(), args, kwargs)
    if dims is None or layout.dim in dims:
        where = "all dimensions" if dims is None else f"dimension {layout.dim}, along which the samples lie"
        return [Mixed(f"'{name}' combines samples: it works along {where}", coupled=True)] * len(outputs)
    if name in _REDUCTIONS and outputs and outputs[0].dim() < x.dim():
        layout = layout.at(layout.dim - sum(d < layout.dim for d in dims))
    return [layout] * len(outputs)


def _einsum(inputs: Sequence[tuple[Tensor, Known]], args: tuple[Any, ...]) -> AnyLayout | None:
    """The layout of an einsum over a written-out equation; None if it is given in another form."""
    if not isinstance(args[0], str) or "..." in args[0] or "->" not in args[0]:
        return None
    left, right = args[0].replace(" ", "").split("->")
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    labels = {id(t): term for t, term in zip(operands, left.split(","))}
    letters = {labels[id(t)][layout.dim] for t, layout in inputs if id(t) in labels}
    first = inputs[0][1]
    if len(letters) != 1 or (letter := letters.pop()) not in right or any(layout.at(0) != first.at(0) for _, layout in inputs):
        return Mixed(f"einsum '{args[0]}' combines samples", coupled=True)
    return first.at(right.index(letter))


@_numbering
def _joined(
    name: str, inputs: Sequence[tuple[Tensor, Known]], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, batch_size: int
) -> AnyLayout | None:
    """The layout of tensors that are stacked, or joined along the samples' dimension; None where they are joined along another."""
    layouts = [layout for _, layout in inputs]
    members = kwargs.get("tensors", kwargs.get("sequences", args[0] if args else ()))
    whole = [layout for member in members for t, layout in inputs if t is member]  # in order, and as often as they are joined
    if name == "pad_sequence":
        dim = 0 if _argument("batch_first", 1, args, kwargs) else 1
    else:
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % output.dim()
    if name in _JOINS:
        if all(layout.dim != dim for layout in layouts) and all(layout == layouts[0] for layout in layouts):
            return None
        rows = []
        for member in members:
            layout = next((layout for t, layout in inputs if t is member), None)
            if layout is None:
                rows.append(torch.full((member.shape[dim],), -1, device=output.device))
            elif layout.dim == dim:
                rows.append(layout.rows(member, batch_size))
            elif (sample := single(layout)) is not None:
                rows.append(sample.expand(member.shape[dim]))
            else:
                return Mixed(f"'{name}' joins tensors in which the samples lie along different dimensions", coupled=True)
        return placed(dim, torch.cat(rows), batch_size)
    if name == "stack" and all(layout == layouts[0] for layout in layouts):
        return layouts[0].at(layouts[0].dim + (dim <= layouts[0].dim))
    singles = [sample for layout in whole if (sample := single(layout)) is not None]
    if len(singles) == len(members):
        return placed(dim, torch.stack(singles), batch_size)
    return Mixed(f"'{name}' joins tensors in which the samples lie differently", coupled=True)


def _contracts_samples(name: str, x: Tensor, layout: Known, args: tuple[Any, ...]) -> bool:
    """True if a matrix product sums over the dimension of ``x`` along which the samples lie."""
    if name == "linear":
        return layout.dim == x.dim() - 1 or (len(args) > 1 and args[1] is x)
    operands = args[1:] if name in ("baddbmm", "addmm", "addbmm") else args
    if name == "__rmatmul__":
        operands = operands[::-1]
    if name == "addbmm" or len(operands) < 2:
        return True
    return (operands[0] is x and layout.dim == x.dim() - 1) or (operands[1] is x and layout.dim == max(x.dim() - 2, 0))


def propagate(
    func: Callable[..., Any],
    name: str,
    inputs: Sequence[tuple[Tensor, AnyLayout]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
    batch_size: int,
) -> list[AnyLayout]:
    """The layouts of ``outputs = func(*args, **kwargs)``, given those of the inputs that carry samples."""
    try:
        layouts = _propagate(func, name, inputs, args, kwargs, outputs, batch_size)
    except Exception:
        if not tracing():
            raise
        layouts = [Mixed(f"'{name}' depends on values, and while a graph is traced there are none")] * len(outputs)
    if tracing():
        layouts = [Mixed(f"'{name}' picks rows") if isinstance(layout, Ragged) else layout for layout in layouts]
    if any(isinstance(layout, Mixed) for layout in layouts) and (sample := single(*(layout for _, layout in inputs))) is not None:
        # What is made of one sample alone is that sample's, wherever its rows went.
        return [Ragged(0, sample.expand(output.shape[0])) if output.dim() else Mixed("it is a number of one sample") for output in outputs]
    return [
        replace(layout, gradient=_gradient(name, inputs, args))
        if isinstance(layout, Mixed) and layout.coupled and layout.gradient != "entangled" and output.requires_grad
        else layout
        for output, layout in zip(outputs, layouts)
    ]


def _gradient(name: str, inputs: Sequence[tuple[Tensor, AnyLayout]], args: tuple[Any, ...]) -> Literal["", "summed", "entangled"]:
    """What an operation that mixes samples, or works on mixed ones, does to their gradients (see :class:`Mixed`)."""
    flowing = [(t, layout) for t, layout in inputs if t.requires_grad]
    summed = [t for t, layout in flowing if isinstance(layout, Mixed) and layout.gradient]
    if len(flowing) == 1 and not summed and (len(inputs) > 1 or isinstance(flowing[0][1], Mixed)):
        return "summed" if name in _MULTIPLY else ""  # what is mixed in, here or before, is data without a gradient; or this is a sum with weights
    if name in _LINEAR:
        return "summed"
    scales = all(t.dim() == 0 for t, _ in inputs if t is not flowing[0][0])  # numbers: a normaliser
    if len(flowing) == 1 and scales and (name in _MULTIPLY or (name in _DIVIDE and args[0] is flowing[0][0])):
        return "summed"
    return "entangled"


def _propagate(
    func: Callable[..., Any],
    name: str,
    inputs: Sequence[tuple[Tensor, AnyLayout]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
    batch_size: int,
) -> list[AnyLayout]:
    if name in _WRITES and args:
        known = {id(t): layout for t, layout in inputs}
        target = args[0]
        position = _WRITES[name][1]
        value = args[position] if len(args) > position else next((kwargs[key] for key in ("values", "source", "src") if key in kwargs), None)
        written = (value, known[id(value)]) if isinstance(value, Tensor) and id(value) in known else None
        if written is not None or id(target) in known:
            unseen = Mixed(f"of a constant of shape {tuple(target.shape)} it is not known where the samples lie", unseen=True)
            before = known.get(id(target), PLAIN if target.dim() and target.shape[0] == batch_size else unseen)
            return [_written(name, target, before, written, args, kwargs, batch_size)] * len(outputs)
    if name in _PICKS or name == "_pack_padded_sequence" or name in _RECURRENT or name == "_pad_packed_sequence":
        # What picks holds no samples, and has no gradient: which rows it picks is all that matters.
        inputs = [(t, layout) for t, layout in inputs if t is args[0]] or inputs
    mixed = [layout for _, layout in inputs if isinstance(layout, Mixed)]
    if mixed or not outputs:
        return [max(mixed, key=lambda layout: (layout.gradient == "entangled", layout.coupled))] * len(outputs)
    placed_inputs = [(t, layout) for t, layout in inputs if not isinstance(layout, Mixed)]  # all of them
    x, layout = placed_inputs[0]
    first = bool(args) and args[0] is x
    if name in _ORDER_KEEPING:
        return [_reshaped(x, layout, output.shape, batch_size) for output in outputs]
    if name in _NEW and not (isinstance(layout, Layout) and outputs[0].dim() > layout.dim and outputs[0].shape[layout.dim] == x.shape[layout.dim]):
        plain = outputs[0].dim() and outputs[0].shape[0] == batch_size
        return [PLAIN if plain else Mixed(f"'{name}' made it, of shape {tuple(outputs[0].shape)}", unseen=True)]
    if name in _STRIDED and first:
        return _strided(func, x, layout, args, kwargs, outputs, batch_size)
    if name in _PICKS and first and (picked := _picked(name, x, layout, args, kwargs, outputs[0], batch_size)) is not None:
        return [picked]
    if name in _FOUND and first and len(args) + len(kwargs) == 1 + ("as_tuple" in kwargs):
        return [placed(0, _along_dim(layout.rows(x, batch_size), layout.dim, x.dim()).expand(x.shape)[x.bool()], batch_size)] * len(outputs)
    if name == "masked_select" and first:
        return [placed(0, func(_along_dim(layout.rows(x, batch_size), layout.dim, x.dim()), *args[1:], **kwargs), batch_size)]
    if name in _COUNTS:
        return [Mixed(f"'{name}' works on all elements", coupled=True)] * len(outputs)
    if name in _RECURRENT and first:
        return _recurrence(x, layout, args, outputs, batch_size)
    if name in _PACKINGS - {"pad_sequence"} and first:
        return _packings(name, x, layout, args, kwargs, outputs, batch_size)
    if name in _RESHAPED_IN_PLACE:
        return [Mixed(f"'{name}' changes the shape of a tensor in place")] * len(outputs)
    if (name in _REDUCTIONS or name in _ALONG) and not (name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)):
        return _along(name, x, layout, args, kwargs, outputs)
    if name == "einsum" and (found := _einsum(placed_inputs, args)) is not None:
        return [found]
    if (name in _PRODUCTS or name == "linear") and any(_contracts_samples(name, t, o, args) for t, o in placed_inputs):
        return [Mixed(f"'{name}' sums over the samples", coupled=True)]
    if name in ("layer_norm", "rms_norm") and layout.dim >= x.dim() - len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())):
        return [Mixed(f"'{name}' normalises over the samples", coupled=True)]
    if name in ("group_norm", "instance_norm", "batch_norm") and layout.dim != 0:
        return [Mixed(f"'{name}' takes dimension 0 for that of the samples, which lie along dimension {layout.dim}", coupled=True)]
    if name in _PAIRS and not (name == "cdist" and layout.dim < x.dim() - 2):
        return [Mixed(f"'{name}' may combine samples", coupled=True)] * len(outputs)
    if name == "pad" and first:
        sides = kwargs.get("pad", args[1] if len(args) > 1 else ())
        start = 2 * (x.dim() - 1 - layout.dim)
        if any(sides[start : start + 2]):
            return [Mixed("'pad' adds rows along the dimension of the samples, or takes some away")]
    if (name in _JOINS or name in ("stack", "pad_sequence")) and (joined := _joined(name, placed_inputs, args, kwargs, outputs[0], batch_size)) is not None:
        return [joined]
    # Anything else: the samples must lie in the same place in every input (aligned from the right where the operation broadcasts), and be there
    # in the output.
    aligned = name in _BROADCASTING or (name in ("max", "min") and len(placed_inputs) > 1)
    widest, place = max(placed_inputs, key=lambda pair: pair[0].dim())
    width = max(outputs[0].dim(), widest.dim()) if aligned else widest.dim() if name in _PRODUCTS else 0
    places = [o.at(o.dim + max(width - t.dim(), 0)) for t, o in placed_inputs]
    if any(place != places[0] for place in places[1:]):
        return [Mixed(f"'{name}' combines tensors in which the samples lie differently", coupled=True)] * len(outputs)
    size, place = widest.size(place.dim), place.at(place.dim + max(width - widest.dim(), 0))
    results: list[AnyLayout] = [
        place if output.dim() > place.dim and output.size(place.dim) == size else Mixed(f"'{name}' turns {tuple(widest.shape)} into {tuple(output.shape)}")
        for output in outputs
    ]
    sure = aligned or (name in FOLLOWED and name != "einsum")
    if sure or all(isinstance(o, Mixed) for o in results) or keeps_apart(func, name, placed_inputs, args, kwargs, results, batch_size):
        return results
    return [Mixed(f"'{name}' does not give on single samples what it gives on the batch: it combines samples, or they lie elsewhere")] * len(outputs)
