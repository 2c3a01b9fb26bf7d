"""What the norms cost: floating-point operations, bytes moved and the time expected, counted op by op while they run, and :func:`explain`.

FLOPs: of the library's ops by the formulas below, of torch's products and convolutions as :mod:`torch.utils.flop_counter` counts them; a multiplication
and an addition are two. Sums and elementwise operations of torch count as none: what they take is memory.

Bytes: every operand read and every result written once for each pass over it, whatever caches do. Views and memory that is only reserved move nothing.

Time: that of the operations or that of the bytes, whichever is longer. For operations the speeds of ``csrc/core/plan.h``, by which formulas are chosen. An op
of torch that is neither a product nor one simple pass over its operands (sorting, a convolution) has no model, and on a GPU there is none yet.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import _C, ops
from .norms import _backward, _call, _check_arguments, _counted, _loss, _table, _tapped
from .tap import Tap, _DerivedNode, _Node

__all__ = ["Cost", "CostCounterMode", "ExplainReport", "ExplainRow", "explain"]

# ---------------------------------------------------------------------------------------------------------------------------------------
# Counting

_BYTES_PER_SECOND = 30e9  # of one thread; on the machine of plan.h's speeds our ops read at 20 (embedding) to 40e9 what no cache holds


@dataclass(frozen=True)
class Cost:
    """What one call of an op takes."""

    formula: str
    """``"row"``, ``"gram"``, ``"outer"`` and ``"fused"`` as in :class:`ghostgrad.ops.Plan`; ``"affine"``, ``"embedding"``, ``"squares"`` (of per-sample
    gradients that are there); ``"matmul"`` for a matrix product of torch; for other ops of torch ``""``."""
    sizes: dict[str, int]
    """By the letters of :mod:`ghostgrad.ops`; none for ops of torch."""
    flops: float
    bytes: float
    seconds: float | None
    """Expected on ``torch.get_num_threads()`` threads; None without a model."""


_Formula = tuple[str, dict[str, int], float, float | None, int]  # formula, sizes, FLOPs, seconds of them on one thread, passes over the operands


def _product_flops(formula: str, T: int, p: int, d: int) -> float:
    """Per sample and group."""
    return T * T * (p + d) if formula == "gram" else 2 * T * p * d + (4 if formula == "fused" else 2) * p * d


def _passes(formula: str, wgrad: bool) -> int:
    return 2 if wgrad and formula != "fused" else 1  # the weight gradient, if it has a product of its own, and the norms


def _planned(wgrad: bool) -> Callable[..., _Formula]:
    def cost(a: Tensor, b: Tensor) -> _Formula:
        (B, T, p), d = a.shape, b.shape[2]
        plan = ops.plan(B, T, p, d, a.dtype, a.device, wgrad)
        return plan.formula, {"B": B, "T": T, "p": p, "d": d}, plan.flops, plan.seconds, _passes(plan.formula, wgrad)

    return cost


def _direct(formula: str) -> Callable[..., _Formula]:
    def cost(a: Tensor, b: Tensor, weights: Tensor | None = None) -> _Formula:
        (B, T, p), d = a.shape, b.shape[2]
        return formula, {"B": B, "T": T, "p": p, "d": d}, B * _product_flops(formula, T, p, d), None, 1

    return cost


def _convolution(wgrad: bool, planned: bool = True) -> Callable[..., _Formula]:
    def cost(x: Tensor, b: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> _Formula:
        B, T = x.shape[0], x.shape[1] * math.prod(b.shape[3:])
        p, d = x.shape[2] // groups * math.prod(kernel), b.shape[2] // groups
        plan = ops.conv_plan(B, T, p, d, groups, x.dtype, x.device, wgrad)
        whole = list(b.shape[3:]) == ops._output_size(x, kernel, stride, padding, dilation)
        sizes = {"B": B, "T": T, "p": p, "d": d, **({"groups": groups} if groups > 1 else {})}
        if wgrad and plan.formula != "fused" and not (planned and whole):  # torch's own weight gradient takes a whole output alone
            return "fused", sizes, B * groups * _product_flops("fused", T, p, d), None, 1
        return plan.formula, sizes, plan.flops, plan.seconds, _passes(plan.formula, wgrad)

    return cost


def _rows(x: Tensor) -> _Formula:
    return "squares", {"B": x.shape[0], "N": math.prod(x.shape[1:])}, 2 * x.numel(), 0, 1


def _embedding(index: Tensor, b: Tensor) -> _Formula:
    return "embedding", dict(zip("BTd", b.shape)), 2 * b.numel(), 0, 1  # if no token repeats: those that do are added, not squared


def _affine(b: Tensor, x: Tensor | None = None, mean: Tensor | None = None, rstd: Tensor | None = None, total: bool = True) -> _Formula:
    B, T, d, S = b.shape
    sums = 1 + (x is not None)  # over positions, squared, added up for the gradient
    flops = sums * (max(T * S - 1, 0) + 2 + total) * B * d + (0 if x is None else 1 + (mean is not None) + (rstd is not None)) * b.numel()
    if x is None and T * S == 1:
        return "squares", {"B": B, "N": d}, flops, 0, 1
    return "affine", {"B": B, "T": T, "d": d} | ({"S": S} if S != 1 else {}), flops, 0, 1


_own = torch.ops.ghostgrad
_FORMULAS: dict[Any, Callable[..., _Formula]] = {
    _own.outer_sqnorm.default: _direct("outer"),
    _own.gram_sqnorm.default: _direct("gram"),
    _own.wgrad_sqnorm.default: _direct("fused"),
    _own.sqnorm.default: _planned(wgrad=False),
    _own.wgrad_and_sqnorm.default: _planned(wgrad=True),
    _own.conv_sqnorm.default: _convolution(wgrad=False),
    _own.conv_wgrad_sqnorm.default: _convolution(wgrad=True, planned=False),
    _own.conv_wgrad_and_sqnorm.default: _convolution(wgrad=True),
    _own.row_sqnorm.default: _rows,
    _own.embedding_sqnorm.default: _embedding,
    _own.affine_sqnorm.default: _affine,
}

_MATMULS = frozenset("mm bmm addmm baddbmm".split())
_SIMPLE_PASSES = frozenset("sum cat stack clone copy_ _to_copy fill_ zero_ zeros new_zeros constant_pad_nd".split())


def _tensors(values: Any) -> list[Tensor]:
    """The dense tensors that hold the elements: those of a sparse tensor are its indices and values."""
    found: list[Tensor] = []
    for t in pytree.tree_leaves(values):
        if isinstance(t, Tensor):
            found += [t] if t.layout == torch.strided else [t._indices(), t._values()]
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the elements that they have in memory, each once; dimensions that were expanded have none."""
    unique = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}
    return sum(math.prod(n for n, stride in zip(t.shape, t.stride()) if stride) * t.element_size() for t in unique.values())


def cost_of(op: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Cost | None:
    """The cost of a call that has returned ``out``; None if it moved nothing."""
    operands, results = _tensors((args, kwargs)), _tensors(out)
    formula = _FORMULAS.get(op)
    name = op._overloadpacket.__name__
    if formula is None:
        memory = {t.untyped_storage()._cdata for t in operands}
        if "empty" in name or (not op._schema.is_mutable and any(t.untyped_storage()._cdata in memory for t in results)):
            return None
        count = flop_registry.get(op._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count is not None else 0
        seconds: float | None = None
        if name in _MATMULS and results[0].dtype in ops._DTYPES:
            seconds = _C.product_seconds(flops, ops._DTYPES[results[0].dtype], results[0].device.type)
        elif name in _SIMPLE_PASSES or torch.Tag.pointwise in op.tags:
            seconds = 0
        label, sizes, passes = ("matmul" if name in _MATMULS else ""), dict[str, int](), 1
    else:
        label, sizes, flops, seconds, passes = formula(*args, **kwargs)
    moved = passes * _bytes(operands) + _bytes(results)
    if any(t.device.type != "cpu" for t in operands):
        seconds = None
    expected = None if seconds is None else max(seconds, moved / _BYTES_PER_SECOND) / torch.get_num_threads()
    return Cost(label, sizes, flops, moved, expected)


class CostCounterMode(TorchDispatchMode):
    """Counts the ops that run inside its block: ``costs``, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cost = cost_of(func, args, kwargs or {}, out)
        if cost is not None:
            self.costs.append(cost)
        return out


# ---------------------------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class ExplainRow:
    """What one parameter's norms take, or those of one function of parameters (``derived``), whose per-sample gradients are formed and pulled back."""

    name: str
    shape: tuple[int, ...]
    derived: bool
    uses: dict[str, int]  # operation -> how often; uses are added before they are squared, so this is one cost
    formula: str  # as in Cost, in the order in which they ran; "shared" if another row of the layer has it, or the layer's own backward pass
    sizes: dict[str, int]  # of the op with the most FLOPs, by the letters of ghostgrad.ops: B samples, T positions, p in-features, d out-features
    flops: float
    bytes: float
    predicted: float | None  # seconds; None without a model
    measured: float  # seconds
    predicted_share: float | None  # of the step
    measured_share: float


@dataclass(frozen=True)
class ExplainReport:
    """What :func:`explain` found. Printing it gives a table."""

    rows: list[ExplainRow]
    wgrad: bool
    threads: int
    seconds: float  # of the step with norms in which the rows were measured
    plain_seconds: float
    ratio: float  # of a step with norms to the plain step

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    @property
    def measured(self) -> float:
        return sum(row.measured for row in self.rows)

    @property
    def predicted(self) -> float | None:
        """None if a row has no model."""
        known = [row.predicted for row in self.rows if row.predicted is not None]
        return sum(known) if len(known) == len(self.rows) else None

    def __str__(self) -> str:
        def cells(flops: float, size: float, predicted: float | None, measured: float) -> tuple[str, ...]:
            times = ("", "") if predicted is None else (_scaled(1e6 * predicted, _TIMES), f"{predicted / self.seconds:.1%}")
            return _scaled(flops, _COUNTS), _scaled(size, _SIZES, 1024), *times, _scaled(1e6 * measured, _TIMES), f"{measured / self.seconds:.1%}"

        head = ("parameter", "uses", "sizes", "formula", "FLOP", "bytes", "predicted", "share", "measured", "share")
        body = [
            (
                row.name,
                "pulled back" if row.derived else _counted(row.uses) or "none",
                " ".join(f"{letter}={size}" for letter, size in row.sizes.items()),
                row.formula,
                *cells(row.flops, row.bytes, row.predicted, row.measured),
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", *cells(self.flops, self.bytes, self.predicted, self.measured))
        gradients = "norms and weight gradients" if self.wgrad else "norms without weight gradients"
        return "\n".join(
            (
                *_table(head, [*body, total]),
                f"{gradients}; shares are of the step with norms, {_scaled(1e6 * self.seconds, _TIMES)} on {self.threads} thread{'s' * (self.threads > 1)}",
                f"plain step {_scaled(1e6 * self.plain_seconds, _TIMES)}, ratio {self.ratio:.2f}",
            )
        )


_COUNTS = ("", "k", "M", "G", "T")
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = ("µs", "ms", "s")


def _scaled(number: float, units: Sequence[str], step: int = 1000) -> str:
    """With three digits, in the unit that suits it."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}".rstrip()
        number /= step
    return f"{number:.3g} {units[-1]}"


class _Observer:
    """Runs a tap's collectors: counts what each does, or measures how long it takes. What several have in common is in the account of the first."""

    def __init__(self, wait: Callable[[], None] | None = None):
        self.wait = wait  # for the device; None: count
        self.costs: dict[_Node, list[Cost]] = {}
        self.seconds: dict[_Node, float] = {}

    def __call__(self, nodes: Sequence[_Node], collect: Callable[[], Any]) -> Any:
        if self.wait is None:
            with CostCounterMode() as counter:
                collected = collect()
            if counter.costs or any(t is not None for t in collected):  # else the loss does not reach them
                self.costs |= {node: counter.costs if i == 0 else [] for i, node in enumerate(nodes)}
            return collected
        self.wait()
        start = time.perf_counter()
        collected = collect()
        self.wait()
        self.seconds[nodes[0]] = time.perf_counter() - start
        return collected


def _collectors(tap: Tap) -> dict[tuple[str, int], _Node | None]:
    """The collectors of the parameters in their order, each followed by those of functions of it: by name, and by number where names are equal."""
    found: dict[tuple[str, int], _Node | None] = {}
    place: dict[_Node, int] = {tap._pass.nodes[key]: i for i, key in enumerate(tap._names) if key in tap._pass.nodes}
    first_root = [min((place[root] for root in node.roots() if root in place), default=0) for node in tap._pass.derived_nodes]
    for i, (key, (name, _)) in enumerate(tap._names.items()):
        found[name, 0] = tap._pass.nodes.get(key)
        for node in (node for node, first in zip(tap._pass.derived_nodes, first_root) if first == i):
            found[node.name, 1 + sum(other == node.name for other, _ in found)] = node
    return found


def _row(name: str, node: _Node | None, shape: Sequence[int], counted: Sequence[Cost] | None, measured: float, step: float) -> ExplainRow:
    parts, derived = counted or (), isinstance(node, _DerivedNode)
    formulas = Counter(["copies"] * derived + [cost.formula for cost in parts if cost.formula])
    sized = [cost for cost in parts if cost.sizes]
    known = [cost.seconds for cost in parts if cost.seconds is not None]
    predicted = sum(known) if len(known) == len(parts) else None
    return ExplainRow(
        name=name,
        shape=tuple(shape),
        derived=derived,
        uses=dict(node.uses) if node is not None else {},
        formula=_counted(formulas) or ("" if counted is None else "shared"),
        sizes=max(sized, key=lambda cost: cost.flops).sizes if sized else {},
        flops=sum(cost.flops for cost in parts),
        bytes=sum(cost.bytes for cost in parts),
        predicted=predicted,
        measured=measured,
        predicted_share=None if predicted is None else predicted / step,
        measured_share=measured / step,
    )


@contextlib.contextmanager
def _untouched(model: Any, devices: Iterable[torch.device]) -> Iterator[None]:
    """A block after which a module's buffers and the random number generators are as before."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    buffers = [(module, name, t, t.clone()) for module in modules for name, t in module.named_buffers(recurse=False)]
    with torch.random.fork_rng([device for device in devices if device.type != "cpu"]):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, t, before in buffers:
                    module._buffers[name] = t
                    t.copy_(before)


def explain(
    model: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *batch: Any,
    wgrad: bool = True,
    reduction: str = "mean",
    params: Any = None,
    repetitions: int = 5,
    **options: Any,
) -> ExplainReport:
    """What the norms of every parameter take in a step, and by which formula: FLOPs, bytes, time expected and time measured.

    A parameter's row is what runs where all of its uses meet: they are joined (along T, if they are products), squared, and with ``wgrad`` the weight
    gradient is formed, often by the same op. So FLOPs, bytes and times *include* the weight gradient, which a plain step forms as well; the ratio in the last
    line says what the norms add to a step. How they are counted: :mod:`ghostgrad.costs`. Not in a row: the forward pass, the gradients of activations, the
    copies of a parameter that an operation without a rule works on, and the weight gradient of a linear layer on single positions, which is left to torch.

    Args:
        model, loss_fn, batch, reduction, params, options: as for :func:`sqnorms`. ``.grad``, buffers, modes and random number generators stay as they are.
        wgrad: True for a training step in a tap; False for norms alone, as :func:`sqnorms` gives them.
        repetitions: how often a plain step, a step with norms and one whose parts are measured run, one after the other. The ratio is the median of theirs; the
            rows are those of the repetition with the median time, so shares add up to less than one. On a GPU each part is waited for while it is measured.

    Returns:
        An :class:`ExplainReport`: prints as a table; ``rows`` are :class:`ExplainRow`, parameters in their order, each followed by functions of it that are
        used; ``ratio`` is that of the last line.

    Raises:
        the errors of :func:`sqnorms`; ValueError if the model is compiled: a compiled graph does not tell its parts apart.

    Cost: ``3 repetitions + 2`` steps.
    """
    _check_arguments("explain", loss_fn, batch, reduction)
    if repetitions < 1:
        raise ValueError(f"ghostgrad.explain: repetitions must be at least 1, got {repetitions}")
    params = list(params) if isinstance(params, Iterator) else params  # used by every step
    *inputs, target = batch

    def with_norms(observer: _Observer | None = None) -> dict[tuple[str, int], _Node | None]:
        with torch.enable_grad(), _tapped(model, params, want_grad=wgrad, reduction=reduction, **options) as tap:
            tap._pass.observe = observer
            loss = _loss("explain", tap, model, loss_fn, batch, create_graph=False)
            if tap._pass.compiled:
                raise ValueError(
                    "ghostgrad.explain: the model is compiled, and a compiled graph does not tell its parts apart. Explain the module that was compiled "
                    "(model._orig_mod of torch.compile(model)): the formulas are the same."
                )
            collectors = {} if observer is None else _collectors(tap)
            _backward(tap, loss, create_graph=False, parameters=trained if wgrad else None)
            return collectors

    def plain() -> None:
        with torch.enable_grad():
            loss = loss_fn(_call(model, tuple(inputs)), target)
            torch.autograd.grad(loss.sum() if loss.dim() else loss, trained, allow_unused=True)

    tracked = dict(_tapped(model, params, **options)._names.values())
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else list(tracked.values())
    devices = {p.device for p in trained}

    def wait() -> None:
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

    def clock(step: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        wait()
        start = time.perf_counter()
        result = step(*args)
        wait()
        return time.perf_counter() - start, result

    plain_seconds, ratios, observed = [], [], []
    with _untouched(model, devices):
        counter = _Observer()
        collectors = with_norms(counter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given in the first step
            plain()
            for _ in range(repetitions):
                plain_seconds.append(clock(plain)[0])
                ratios.append(clock(with_norms)[0] / plain_seconds[-1])
                timer = _Observer(wait)
                seconds, nodes = clock(with_norms, timer)
                observed.append((seconds, {key: timer.seconds.get(node, 0.0) for key, node in nodes.items() if node is not None}))
    seconds, measured = sorted(observed, key=lambda entry: entry[0])[repetitions // 2]
    rows = []
    for (name, i), node in collectors.items():
        counted = None if node is None else counter.costs.get(node)
        if i == 0 or counted:  # a function of parameters on the way to another one may have nothing to do
            shape = tracked[name].shape if node is None else node.shape
            rows.append(_row(name, node, shape, counted, measured.get((name, i), 0.0), seconds))
    return ExplainReport(rows, wgrad, torch.get_num_threads(), seconds, statistics.median(plain_seconds), statistics.median(ratios))
