"""Traces of Hessians, with error bars.

``tr H = E[xi^T H xi]`` for any probe ``xi`` with independent elements of mean 0 and variance 1. Four methods, which differ in how they come by ``xi^T H xi``:

==============  =====================================================  ==========================================  ======================
method          a probe is                                             needs of the loss                           free besides
==============  =====================================================  ==========================================  ======================
two_point       ``(l(w + s xi) + l(w - s xi) - 2 l(w)) / s^2``         that it can be called                       traces of each sample
two_point_grad  ``xi . (grad l(w + s xi) - grad l(w - s xi)) / (2 s)`` a first derivative                          traces of each parameter
hvp             ``xi . (H xi)``, by double backward                    a second derivative                         traces of each parameter
hutch++         the same on what a sketch of H leaves over             a second derivative, memory for the sketch  traces of each parameter
==============  =====================================================  ==========================================  ======================

Probes have addresses (:mod:`ghostgrad.noise`): probe ``i`` is the noise of seed ``seed + i * 2^32``, drawn again where it is needed, so two methods with one
seed see the same probes. The variance of a probe is ``2 (||H||_F^2 - sum H_jj^2)`` for rademacher noise and ``2 ||H||_F^2`` for normal noise.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import noise
from .errors import UnsupportedUseError
from .noise import Block
from .norms import _call
from .perturb import Addressed, _reshard

__all__ = ["HessianTrace", "hessian_trace"]

METHODS = ("two_point", "two_point_grad", "hvp", "hutch++")
_PILOT = {"two_point": 4, "two_point_grad": 2}  # probes to choose sigma by: gradients cost three times as much, and bear a wider range
_CHECKED = {"two_point": 8, "two_point_grad": 4}  # probes that are evaluated at twice sigma as well
_FIRST_LOOK = 16  # with fewer probes a standard error is too uncertain to stop by: its own relative error is 1 / sqrt(2 (n - 1))


def _probe_seed(seed: int, probe: int) -> int:
    return seed + (probe << 32)


def _whole(t: Any) -> Tensor:
    """All of a ``DTensor``, on every process."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _extra(module: str, caller: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'ghostgrad.{caller} needs {package}, which the core does not: pip install {package}, or "ghostgrad[papers]"') from error


# ---------------------------------------------------------------------------------------------------------------------------------------
# Results


def _t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution: exact for few degrees of freedom, then Fisher's expansion around the normal one (1e-4 or better)."""
    few = (math.nan, 12.706205, 4.302653, 3.182446, 2.776445, 2.570582)
    if freedom < len(few):
        return few[freedom]
    z, f = 1.959964, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * f**4)
    )


def _mean_and_stderr(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of (n, ...) independent draws. One draw has no standard error: nan."""
    n = len(rows)
    return rows.mean(0), rows.std(0) / n**0.5 if n > 1 else torch.full_like(rows[0], math.nan)


@dataclass(frozen=True)
class HessianTrace:
    """What :func:`hessian_trace` found."""

    mean: float
    stderr: float  # nan for one probe
    interval: tuple[float, float]  # 95 %, by Student's t distribution
    samples: Tensor = field(repr=False)  # (n,) float64: the probes, whose mean and standard error these are
    by_param: dict[str, float] | None = field(repr=False)  # the traces of the diagonal blocks; None for two_point
    by_param_stderr: dict[str, float] | None = field(repr=False)
    by_sample: Tensor | None = field(repr=False)  # (B,) traces of the samples' own Hessians; two_point with a vector of losses
    by_sample_stderr: Tensor | None = field(repr=False)
    sigma: float | None  # None where nothing is perturbed
    at_2_sigma: float | None  # the estimate at twice sigma, same probes: consistent if it differs by three times what you would tolerate, or less
    reason: str  # how sigma was chosen
    cost: float  # in plain training steps: a forward pass is a third of one, a product with the Hessian four thirds
    warnings: tuple[str, ...]

    def __float__(self) -> float:
        return self.mean

    def __str__(self) -> str:
        low, high = self.interval
        twice = "" if self.at_2_sigma is None else f"; at sigma = {self.sigma:.2g}, and {self.at_2_sigma:.6g} at twice that"
        lines = [f"{self.mean:.6g} ± {self.stderr:.2g} (95 %: {low:.6g} to {high:.6g}; {len(self.samples)} probes, {self.cost:.3g} steps{twice})"]
        return "\n".join((*lines, *(f"warning: {w}" for w in self.warnings)))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The loss, its parameters, and everything that must be as before when all is done


class _Generators:
    """The states of the random number generators that a loss may use."""

    def __init__(self, devices: Iterable[torch.device]):
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)


class _Buffers:
    """The buffers of modules, which are what they were again after :meth:`restore`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[nn.Module, str, Tensor, int, Tensor]] = {}

    def keep(self, module: nn.Module, _: Any = None) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and (id(module), name) not in self._kept:
                self._kept[id(module), name] = (module, name, buffer, buffer._version, buffer.clone())

    @torch.no_grad()
    def restore(self) -> None:
        for key, (module, name, buffer, version, value) in self._kept.items():
            module._buffers[name] = buffer
            if buffer._version != version or isinstance(module, _NormBase):  # native normalisation does not count versions
                buffer.copy_(value)
                self._kept[key] = (module, name, buffer, buffer._version, value)


# Straight to an op's kernel: between two passes of a small model every turn through the dispatcher, with its lists of tensors, shows.
_BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView

_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__  # of every function that is so marked


def _once_differentiable(root: Any) -> str | None:
    """The name of a function in the graph whose backward is marked as having no derivative."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                return str(node._forward_cls.__name__)
            backward = getattr(backward, "__wrapped__", None)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return None


class _Kinks(TorchDispatchMode):
    """Notes operations whose derivative jumps."""

    OPERATIONS = "relu leaky_relu prelu rrelu threshold hardtanh hardsigmoid hardswish hardshrink softshrink abs max_pool max amax maximum minimum min amin"
    NAMES = frozenset(
        (
            *OPERATIONS.split(),
            "_prelu_kernel",
            "rrelu_with_noise",
            *(f"{a}max_pool{d}d{i}" for a in ("", "adaptive_") for d in "123" for i in ("", "_with_indices")),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        fused = name == "_transformer_encoder_layer_fwd" and not args[7]  # of nn.TransformerEncoderLayer in eval: use_gelu
        if name in self.NAMES or fused:
            name = "relu" if fused else name
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


Batches = Callable[[], Iterable[tuple[int, Callable[[], Tensor]]]]  # (samples, the loss of this batch), over all data


Product = Callable[[Sequence[Tensor]], list[Tensor]]  # of a symmetric matrix with a vector, cut up as the parameters are


class _OfModel(NamedTuple):
    """The loss of a model on a batch."""

    caller: str
    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batch: tuple[Any, ...]

    def output(self) -> Any:
        return _call(self.model, self.batch[:-1])

    def loss(self, output: Any) -> Tensor:
        loss = self.loss_fn(output, self.batch[-1])
        if isinstance(loss, Tensor) and loss.dim() and loss.shape != (_size(self.batch),):
            raise ValueError(
                f"ghostgrad.{self.caller}: loss_fn must return a scalar or one loss per sample, ({_size(self.batch)},), got shape {tuple(loss.shape)}"
            )
        return loss

    def __call__(self) -> Tensor:
        return self.loss(self.output())


class _Problem:
    """A loss and its parameters. In its block parameters may be perturbed; when it ends, parameters, buffers and random number generators are as they were.

    Every evaluation on a batch starts from the same buffers and the same states of the generators: dropout draws the same masks, so the loss is a function of
    the parameters alone.
    """

    def __init__(self, caller: str, loss: Any, args: tuple[Any, ...], params: Any, reduction: str, seed: int, distribution: str, progress: bool):
        self.caller, self.reduction, self.seed, self.distribution = caller, reduction, seed, distribution
        if reduction not in ("mean", "sum"):
            raise ValueError(f"ghostgrad.{caller}: reduction must be 'mean' or 'sum', got {reduction!r}")
        if distribution not in ("rademacher", "normal"):
            raise ValueError(f"ghostgrad.{caller}: distribution must be 'rademacher' or 'normal', whose variance is 1, got {distribution!r}")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"ghostgrad.{caller}: seed must be in [0, 2^32), because probe i takes the noise of seed + i * 2^32, got {seed}")
        if isinstance(loss, nn.Module):
            self.loader, self._source = _from_model(caller, loss, args, reduction)
            self.model: nn.Module | None = loss
            params = loss if params is None else params
        else:
            self.model = None
            if len(args) > 1 or (len(args) == 1) != (params is None) or not callable(loss):
                raise TypeError(
                    f"ghostgrad.{caller}: give a closure and its parameters, {caller}(closure, params), or a model and data, {caller}(model, loss_fn, x, y) or "
                    f"{caller}(model, loss_fn, loader), got {type(loss).__name__} and {len(args)} more"
                )
            params = args[0] if params is None else params
            self.loader, self._source = False, lambda: [(1, loss)]
        self.names, self.addressed = _parameters(caller, params)
        self.params = self.addressed.params
        self.devices = sorted({p.device for p in self.params}, key=str)
        self._whole = []  # of each device: which parameters, and their addresses in full
        for device in self.devices:
            places = [i for i, p in enumerate(self.params) if p.device == device]
            blocks = [Block(self.addressed.numbers[i], 0, self.params[i].numel(), self.params[i].numel()) for i in places]
            self._whole.append((places, [number for block in blocks for number in block]))
        self.forwards = self.backwards = self.products = 0
        self.kinks: dict[str, int] = {}
        self._product: Product | None = None
        self.vector = False  # the loss has one element for each sample
        self._bar = _extra("tqdm", caller, "tqdm").tqdm(unit="pass", disable=not progress) if progress else None
        owner = self.model if self.model is not None else self.addressed.model
        self._buffers = _Buffers()
        self._watched = owner is not None
        for module in () if owner is None else owner.modules():
            self._buffers.keep(module)

    def __enter__(self) -> _Problem:
        self._initial = self._state = _Generators(self.devices)
        self._memory: list[int] | None = None
        self._look_up()
        self._kept = [t.clone() for t in self._tensors]
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore_parameters()
        self._buffers.restore()
        self._initial.restore()
        if self._bar is not None:
            self._bar.close()

    # -- what must be as before

    @torch.no_grad()
    def restore_parameters(self) -> None:
        self._look_up()
        if self._kept:  # a process may hold nothing of a sharded model
            torch._foreach_copy_(self._tensors, self._kept)

    def _look_up(self) -> None:
        """The tensors to be perturbed, and their addresses: anew where something is sharded, or memory is not what it was (``p.data = ...``)."""
        _reshard(self.addressed.model)
        memory = None if any(hasattr(p, "placements") for p in self.params) else [p.data_ptr() for p in self.params]
        if memory is None or memory != self._memory:
            parts = self.addressed.parts()
            self._memory, self._tensors = memory, [part.tensor for part in parts]
            here = ([part for part in parts if part.tensor.device == device] for device in self.devices)
            self._held = [([part.tensor for part in some], [number for part in some for number in part.block]) for some in here if some]

    # -- evaluations

    def batches(self) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """(samples, loss) of every batch. A loader that shuffles by torch's generator gives the same batches every time."""
        self._initial.restore()
        for size, closure in self._source():
            self._state = _Generators(self.devices)
            yield size, closure

    def prepare(self) -> None:
        """Before every forward pass."""
        self._buffers.restore()
        self._state.restore()
        self.forwards += 1
        if self._bar is not None:
            self._bar.update()

    def evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """The loss, () or (b,)."""
        self.prepare()
        if self._watched:
            loss = closure()
        else:  # a closure's modules are found when they are called for the first time
            handle = register_module_forward_pre_hook(self._buffers.keep)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")  # which may well fire twice
                    loss = closure()
            finally:
                handle.remove()
            self._watched = True
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.dim() > 1 or not loss.numel():
            found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"ghostgrad.{self.caller}: the loss must be a real scalar, or a vector of one loss per sample, got {found}")
        self.vector = loss.dim() == 1
        return loss

    def total(self, loss: Tensor) -> Tensor:
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def losses(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return self.evaluate(closure).reshape(-1)

    def gradients(self, closure: Callable[[], Tensor], create_graph: bool = False) -> list[Tensor]:
        """Of the loss of a batch; zeros where it does not depend on a parameter."""
        with torch.enable_grad():
            loss = self.evaluate(closure)
            total = self.total(loss)
            if not total.requires_grad:
                raise ValueError(
                    f"ghostgrad.{self.caller}: the loss does not depend on the parameters in a way that autograd can follow; is it detached, or computed under "
                    "torch.no_grad()? method='two_point' needs no gradient"
                )
            if create_graph and (name := _once_differentiable(total.grad_fn)) is not None:
                raise RuntimeError(f"{name} is once_differentiable")  # autograd itself takes its second derivative for zero where nothing else is in the way
            grads = torch.autograd.grad(total, self.params, create_graph=create_graph, materialize_grads=True)
        self.backwards += 1
        return list(grads)

    @torch.no_grad()
    def move(self, probe: int, sigma: float) -> None:
        """``w + sigma xi``."""
        self.restore_parameters()  # which counts the versions of the tensors up
        with _BelowAutograd():
            for tensors, blocks in self._held:
                torch.ops.ghostgrad.perturb_.default(tensors, _probe_seed(self.seed, probe), sigma, self.distribution, blocks)

    @torch.no_grad()
    def shift(self, vector: Sequence[Tensor], sigma: float) -> None:
        """``w + sigma v``."""
        self.restore_parameters()
        for p, v in zip(self.params, vector):
            p.add_(v, alpha=sigma)

    @torch.no_grad()
    def noise(self, probe: int) -> list[Tensor]:
        """``xi`` itself."""
        vector = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.addressed.add_noise_(1.0, _probe_seed(self.seed, probe), self.distribution, vector)
        return vector

    def dot(self, plus: Sequence[Tensor], minus: Sequence[Tensor] | None, probe: int, sigma: float = 0.5) -> Tensor:
        """(P,) ``xi . (plus - minus) / (2 sigma)`` of every parameter. Sharded gradients are gathered."""
        plus, minus = [_whole(t) for t in plus], None if minus is None else [_whole(t) for t in minus]
        with _BelowAutograd():
            dots: list[Tensor] = [
                torch.ops.ghostgrad.probe_dot.default(
                    [plus[i] for i in places],
                    None if minus is None else [minus[i] for i in places],
                    _probe_seed(self.seed, probe),
                    sigma,
                    self.distribution,
                    blocks,
                )
                for places, blocks in self._whole
            ]
        if len(dots) == 1:
            return dots[0]
        places = torch.tensor([i for places, _ in self._whole for i in places])
        return torch.cat([d.cpu() for d in dots])[places.argsort()]

    # -- products with the Hessian, or the Gauss-Newton matrix

    def hessian(self, closure: Callable[[], Tensor]) -> Product:
        """``v -> H v`` of the loss of a batch, by double backward through one graph."""
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
                grads = self.gradients(closure, create_graph=True)
        except RuntimeError as error:
            raise self._no_second_derivative(error) from error
        return lambda vector: self._products(grads, self.params, vector)

    def gauss_newton(self, closure: Callable[[], Tensor]) -> Product:
        """``v -> J^T (d^2 l / d f^2) J v`` of the loss of a batch, with ``J v`` as the derivative of ``J^T u`` by ``u``."""
        assert isinstance(closure, _OfModel)
        self.prepare()
        with torch.enable_grad():
            with sdpa_kernel(SDPBackend.MATH):
                output = closure.output()
            if not isinstance(output, Tensor):
                raise TypeError(f"ghostgrad.{self.caller}: curvature='ggn' needs a model that returns one tensor, got {type(output).__name__}; wrap it")
            leaf, u = output.detach().requires_grad_(), torch.zeros_like(output, requires_grad=True)
            (of_output,) = torch.autograd.grad(self.total(closure.loss(leaf)), leaf, create_graph=True)
            try:
                pulled = torch.autograd.grad(output, self.params, u, create_graph=True, materialize_grads=True)
            except RuntimeError as error:
                raise self._no_second_derivative(error) from error
        self.backwards += 1

        def product(vector: Sequence[Tensor]) -> list[Tensor]:
            (along,) = self._products(pulled, [u], vector)
            (curved,) = self._products([of_output], [leaf], [along])
            self.products -= 1  # that of the loss alone costs nothing
            return list(torch.autograd.grad(output, self.params, curved, retain_graph=True, materialize_grads=True))

        return product

    def _products(self, tensors: Sequence[Tensor], by: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of ``tensors . vector``."""
        self.products += 1
        if self._bar is not None:
            self._bar.update()
        live = [i for i, t in enumerate(tensors) if t.requires_grad]
        if not live:  # linear
            return [torch.zeros_like(t, requires_grad=False) for t in by]
        try:
            return list(torch.autograd.grad([tensors[i] for i in live], by, [vector[i] for i in live], retain_graph=True, materialize_grads=True))
        except RuntimeError as error:
            raise self._no_second_derivative(error) from error

    def _no_second_derivative(self, error: RuntimeError) -> RuntimeError:
        text = str(error)
        if any(sign in text for sign in ("derivative for", "not implemented", "once_differentiable", "double backward", "create_graph", "no grad_fn")):
            way = "method='two_point_grad', which takes differences of gradients" + ("" if self.caller == "top_eigenvalue" else ", or 'two_point', of losses")
            return UnsupportedUseError(f"ghostgrad.{self.caller}: an operation of the loss has no second derivative ({text.splitlines()[0]}); use {way}")
        return error

    def multiply(self, vectors: Sequence[Sequence[Tensor]], matrix: Callable[[Callable[[], Tensor]], Product] | None = None) -> list[list[Tensor]]:
        """``H v`` for each of the vectors, over all data. A single batch keeps its graph."""
        totals: list[list[Tensor]] = []
        count = 0
        for size, closure in self.batches():
            weight = size if self.reduction == "mean" else 1
            product = self._product if self._product is not None else (matrix or self.hessian)(closure)
            self._product = None if self.loader else product
            products = [[weight * t for t in product(v)] for v in vectors]
            totals = products if not totals else [[a + b for a, b in zip(total, new)] for total, new in zip(totals, products)]
            count += weight
        scale = count if self.reduction == "mean" else 1
        return [[t / scale for t in total] for total in totals]

    def flat(self, vector: Sequence[Tensor]) -> Tensor:
        if any(hasattr(t, "full_tensor") for t in vector):
            raise UnsupportedUseError(f"ghostgrad.{self.caller}: whole vectors of sharded parameters cannot be kept; hessian_trace's other methods work")
        return torch.cat([t.detach().flatten().to(vector[0].device) for t in vector])

    def unflat(self, flat: Tensor) -> list[Tensor]:
        return [t.view(p.shape).to(p) for t, p in zip(flat.split([p.numel() for p in self.params]), self.params)]

    def check_repeats(self, closure: Callable[[], Tensor]) -> Tensor:
        """The losses at ``w``, evaluated twice to see that nothing but the parameters decides them. Notes the kinks on the way."""
        self.restore_parameters()
        losses = self.losses(closure)
        with _Kinks() as kinks:
            again = self.losses(closure)
        self.kinks = kinks.seen
        for values in (losses, again):
            if not values.isfinite().all():
                raise ValueError(f"ghostgrad.{self.caller}: the loss must be finite at the parameters, got {values[~values.isfinite()][0].item()}")
        if losses.shape != again.shape or float((losses - again).abs().max()) > 8 * torch.finfo(losses.dtype).eps * float(losses.abs().max()):
            raise ValueError(
                f"ghostgrad.{self.caller}: the loss differs between two evaluations at the same parameters; is it random, by another generator than torch's "
                "default one, or does it draw a new batch? It must be a function of the parameters alone"
            )
        return losses

    @property
    def cost(self) -> float:
        return (self.forwards + 2 * self.backwards + 4 * self.products) / 3


def _from_model(caller: str, model: nn.Module, args: tuple[Any, ...], reduction: str) -> tuple[bool, Callable[[], Any]]:
    """Whether the data come in batches, and these."""
    if len(args) < 2 or not callable(args[0]):
        raise TypeError(
            f"ghostgrad.{caller}: give {caller}(model, loss_fn, x, y) or {caller}(model, loss_fn, loader), got {len(args)} arguments after the model"
        )
    loss_fn, *data = args
    _check_reduction(caller, loss_fn, reduction)
    if len(data) == 1 and not isinstance(data[0], Tensor) and not isinstance(data[0], Iterable):
        raise TypeError(f"ghostgrad.{caller}: a single argument after loss_fn must be a loader, an iterable of batches (x, y), got {type(data[0]).__name__}")
    if len(data) == 1 and not isinstance(data[0], Tensor):
        if iter(data[0]) is data[0]:
            raise TypeError(f"ghostgrad.{caller}: the loader must be iterable more than once, got a {type(data[0]).__name__}: put its batches in a list")
        return True, lambda: ((_size(batch), _OfModel(caller, model, loss_fn, batch)) for batch in _loaded(caller, model, data[0]))
    if len(data) == 1:
        raise TypeError(f"ghostgrad.{caller}: give the model's inputs and then the target: {caller}(model, loss_fn, x, y)")
    return False, lambda: [(1, _OfModel(caller, model, loss_fn, tuple(data)))]


def _check_reduction(caller: str, loss_fn: Any, reduction: str) -> None:
    declared = getattr(loss_fn, "reduction", reduction)
    if declared in ("mean", "sum") and declared != reduction:
        raise ValueError(f"ghostgrad.{caller}: loss_fn has reduction={declared!r}, but reduction={reduction!r} was given; pass reduction={declared!r}")


def _loaded(caller: str, model: nn.Module, loader: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = True
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"ghostgrad.{caller}: a loader's batches must be (inputs ..., target), got {type(batch).__name__}")
        empty = False
        yield pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tuple(batch))
    if empty:
        raise ValueError(f"ghostgrad.{caller}: the loader gave no batches")


def _size(batch: tuple[Any, ...]) -> int:
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _parameters(caller: str, params: Any) -> tuple[list[str], Addressed]:
    """The parameters that require grad, by name."""
    if isinstance(params, Tensor):
        raise TypeError(f"ghostgrad.{caller}: params must be a model, a mapping or an iterable of parameters, got a tensor: put it in a list")
    if isinstance(params, nn.Module):
        named, model = list(params.named_parameters()), params
    elif isinstance(params, Mapping):
        named, model = list(params.items()), None
    elif isinstance(params, Iterable):
        named, model = [(f"params[{i}]", p) for i, p in enumerate(params)], None
    else:
        raise TypeError(f"ghostgrad.{caller}: params must be a model, a mapping or an iterable of parameters, got {type(params).__name__}")
    wrong = next((p for _, p in named if not isinstance(p, Tensor)), None)
    if wrong is not None:
        raise TypeError(f"ghostgrad.{caller}: params must be tensors, got a {type(wrong).__name__}")
    named = [(name, p) for name, p in named if p.requires_grad]
    if not named:
        raise ValueError(f"ghostgrad.{caller}: params must hold at least one parameter that requires grad, got none: call requires_grad_() on those you mean")
    return [name for name, _ in named], Addressed(params if model is not None else [p for _, p in named])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Two points: what a probe gives at a scale, and which scale


class _Table(NamedTuple):
    """n probes over all data."""

    samples: Tensor  # (n,)
    columns: Tensor | None  # (n, P) for each parameter or (n, B) for each sample
    zero: Tensor | None  # (B,) the losses at w


def _batch_rows(problem: _Problem, method: str, closure: Callable[[], Tensor], probes: Sequence[int], sigma: float) -> tuple[Tensor, Tensor | None]:
    """(n, b) second differences of losses and the losses at ``w``; or (n, P) and None."""
    if method == "hvp":
        product = problem.hessian(closure)
        return torch.stack([problem.dot(product(problem.noise(probe)), None, probe) for probe in probes]), None
    problem.restore_parameters()
    zero = problem.losses(closure) if method == "two_point" else None
    rows = []
    for probe in probes:
        if zero is None:
            rows.append(problem.dot(*_at_both(problem, probe, sigma, lambda: problem.gradients(closure)), probe, sigma))
        else:
            plus, minus = _at_both(problem, probe, sigma, lambda: problem.losses(closure))
            rows.append(noise.second_difference(plus, zero, minus, sigma))
    problem.restore_parameters()
    return torch.stack(rows), zero


def _at_both(problem: _Problem, probe: int, sigma: float, evaluate: Callable[[], Any]) -> tuple[Any, Any]:
    """At ``w + sigma xi`` and ``w - sigma xi``."""
    sides = []
    for sign in (1, -1):
        problem.move(probe, sign * sigma)
        sides.append(evaluate())
    return sides[0], sides[1]


def _table(problem: _Problem, method: str, probes: Sequence[int], sigma: float) -> _Table:
    weighted = problem.reduction == "mean"
    samples, columns, zeros, count = torch.zeros(len(probes), dtype=torch.float64), [], [], 0
    for size, closure in problem.batches():
        rows, zero = _batch_rows(problem, method, closure, probes, sigma)
        rows, weight = rows.cpu(), size if weighted else 1
        if zero is None:
            columns.append(weight * rows)
            samples += weight * rows.sum(1)
        else:
            columns.append(rows)
            zeros.append(zero.cpu())
            samples += weight * (rows.mean(1) if weighted else rows.sum(1))
        count += weight
    samples /= count if weighted else 1
    if not samples.isfinite().all():
        at = int((~samples.isfinite()).nonzero()[0])
        what = "at w" if method == "hvp" else f"at w ± sigma xi of probe {probes[at]} with sigma = {sigma:.3g}: choose a smaller one"
        raise ValueError(f"ghostgrad.{problem.caller}: the loss, or its derivative, must be finite, and is not {what}")
    if zeros:
        return _Table(samples, torch.cat(columns, 1) if problem.vector else None, torch.cat(zeros))
    return _Table(samples, torch.stack(columns).sum(0) / (count if weighted else 1), None)


class _Scale(NamedTuple):
    """A sigma, and what is known of the errors at it."""

    sigma: float
    rounding: float  # of one probe at sigma = 1: it grows as sigma^-order
    reason: str
    lawless: bool  # values at several scales differ as those of a smooth loss do not


_ORDER = {"two_point": 2, "two_point_grad": 1}  # the power of sigma that differences are divided by


def _of_mean(method: str, rounding: float, n: int) -> float:
    """The rounding error of the mean of n probes: of six units of variance in a second difference, the four of ``2 l(w)`` are the same in every probe."""
    return rounding * math.sqrt((4 + 2 / n) / 6 if method == "two_point" else 1 / n)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _scale(problem: _Problem, method: str, sigma: float | None, n: int) -> _Scale:
    """Measures rounding on a few probes of the first batch and, if no sigma is given, truncation too; the sigma at which they balance in the mean of n probes.

    Rounding shows at a sigma of ``eps^(2/3)`` of a typical weight, in float32 200 units in the last place: large enough to round every operation anew, too
    small for anything else to show. Truncation is ``c sigma^2`` where the loss is smooth: from a quarter of the weights' root mean square downwards, in steps
    of four, until differences fall by about 16 from step to step, or drown in rounding. With kinks there is no such law, a single one close to ``w`` looks like
    ``1 / sigma``: then a step that differs little from the one above it, rounding included.
    """
    order = _ORDER[method]
    _, closure = next(problem.batches())
    few = range(min(_PILOT[method], n))

    def values(s: float) -> Tensor:
        rows, zero = _batch_rows(problem, method, closure, few, s)
        return (rows.mean(1) if zero is not None and problem.reduction == "mean" else rows.sum(1)).cpu()

    count = sum(p.numel() for p in problem.params)
    squares = sum(float(_whole(p.detach().double().square().sum())) for p in problem.params)
    rms = math.sqrt(squares / count) if squares > 0 and math.isfinite(squares) else 1.0
    eps = max(torch.finfo(p.dtype).eps for p in problem.params)
    tiny = eps ** (2 / 3) * rms
    losses = problem.check_repeats(closure)
    # A loss that is rounded to the same number near w has an error all the same: that of storing it.
    stored = 0.29 * torch.finfo(losses.dtype).eps * float(losses.double().norm()) / (len(losses) if problem.reduction == "mean" else 1)
    floor = math.sqrt(6) * stored if method == "two_point" else 0.0
    noisy = values(tiny)

    def rounding(reference: Tensor) -> float:
        return max(floor, _rms(noisy - reference) * tiny**order)

    if sigma is not None:
        return _Scale(sigma, rounding(values(sigma)), "given", False)
    s, last, before, rungs = rms / 4, values(rms / 4), math.inf, []
    stuck = 0  # how often in a row differences did not fall
    while True:
        s /= 4
        value = values(s)
        a, difference = rounding(value), _rms(last - value)
        difference = difference if math.isfinite(difference) else math.inf  # too far away for this loss
        rungs.append((difference + a / s**order, s))
        smooth = not problem.kinks and 8 * difference <= before <= 32 * difference
        stuck = stuck + 1 if before < 2.5 * difference else 0
        if smooth or a / s**order >= difference / 15 or s <= 4 * tiny:
            break
        last, before = value, difference
    lawless = bool(problem.kinks) or (stuck >= 2 and difference > 4 * a / s**order)
    c = difference / 15 / s**2
    best = (order * _of_mean(method, a, n) / (2 * c)) ** (1 / (2 + order)) if c > 0 else math.inf
    if lawless:  # the largest of the scales that do about as well as any
        best = max(s for error, s in rungs if error <= 2 * min(rungs)[0])
    best = min(max(best, 2 * tiny), rms / 4)
    if lawless:
        law = "values at several scales differ as they do at kinks, so the scale where they and rounding differ least"
    else:
        shares = f"rounding {_of_mean(method, a, n) / best**order:.1e} and truncation {c * best**2:.1e}"
        law = f"{shares}, about, of a trace near {float(value.mean()):.3g} are in balance"
    return _Scale(best, a, f"auto: {law}; the weights' root mean square is {rms:.2g}", lawless)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The estimate


def _gather(first: int, most: int, rtol: float | None, more: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """(n, ...) rows, by ``more`` and in rounds: as many probes as the standard error of the first column asks for, but at most twice as many as there are."""
    rows = more(range(first))
    while rtol is not None and len(rows) < most:
        n = len(rows)
        mean, stderr = (float(t) for t in _mean_and_stderr(rows[:, 0]))
        if stderr <= rtol * abs(mean):
            break
        wanted = n * (stderr / max(rtol * abs(mean), 1e-300)) ** 2
        n_next = min(most, max(n + 4, math.ceil(min(wanted, 2 * n))))
        rows = torch.cat([rows, more(range(n, n_next))])
    return rows


def _check_numbers(caller: str, probes: int, rtol: float | None, max_probes: int, least: int) -> None:
    if probes < least:
        raise ValueError(
            f"ghostgrad.{caller}: probes must be at least {least}{' for hutch++, which spends two thirds on its sketch' if least > 1 else ''}, got {probes}"
        )
    if rtol is not None and not (math.isfinite(rtol) and rtol > 0):
        raise ValueError(f"ghostgrad.{caller}: rtol must be positive, or None for a fixed number of probes, got {rtol}")
    if rtol is not None and max_probes < probes:
        raise ValueError(f"ghostgrad.{caller}: max_probes must be at least probes, {probes}, got {max_probes}")


def _sigma(caller: str, method: str, sigma: float | str) -> float | None:
    """None for "auto"."""
    if isinstance(sigma, str):
        if sigma != "auto":
            raise ValueError(f"ghostgrad.{caller}: sigma must be a positive number or 'auto', got {sigma!r}")
        return None
    if method not in _ORDER:
        raise ValueError(f"ghostgrad.{caller}: sigma has no meaning for method={method!r}, which perturbs nothing, got {sigma}: leave it out")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"ghostgrad.{caller}: sigma must be a positive number or 'auto', got {sigma}")
    return float(sigma)


def hessian_trace(
    loss: Any,
    /,
    *args: Any,
    params: Any = None,
    method: str = "two_point",
    probes: int = 64,
    rtol: float | None = None,
    max_probes: int = 1024,
    sigma: float | str = "auto",
    distribution: str = "rademacher",
    seed: int = 0,
    reduction: str = "mean",
    progress: bool = False,
) -> HessianTrace:
    """The trace of the Hessian of a loss, estimated with random probes, with its standard error.

    >>> est = gg.hessian_trace(lambda: loss_fn(model(x), y), model.parameters(), rtol=0.02)
    >>> est = gg.hessian_trace(model, loss_fn, x, y, method="two_point_grad")
    >>> est = gg.hessian_trace(model, loss_fn, loader)
    >>> print(est)  # mean ± standard error, interval, value at twice sigma, warnings

    The table at the top of :mod:`ghostgrad.trace` has the methods. ``two_point`` and ``two_point_grad`` work with any attention kernel and with operations
    without a double backward. At a kink (ReLU, max pooling, absolute values) there is no second derivative: they give the trace of the loss *smoothed* by the
    noise, which double backward does not see and noise-stability training minimises, and say so in a warning. With normal noise ``two_point_grad`` is the
    trace of the Hessian of ``E l(w + sigma xi)``, and ``two_point`` its mean over the scales up to sigma (``docs/traces.md``).

    Errors other than that of the probes: truncation, ``O(sigma^2)``, and rounding, ``e / sigma^2`` for ``two_point`` and ``e / sigma`` for ``two_point_grad``,
    with ``e`` that of the forward and of the backward pass. In float32 ``two_point_grad`` is the more exact, ``two_point`` the cheaper one.

    Args:
        loss: a closure without arguments that returns a scalar, or a vector with one loss for each sample; or a model.
        args: after a closure its parameters: a model, a mapping by name or an iterable; those that require grad count. After a model ``loss_fn, x, y``,
            or ``loss_fn, loader`` with batches ``(x, y)``. Scalar losses of batches are weighted with the sizes of these.
        params: for a model, restricts the parameters; for a closure, another way to give them.
        method: "two_point", "two_point_grad", "hvp" or "hutch++" (Meyer, Musco, Musco, Woodruff 2021): with ``r = probes // 3`` random vectors ``S`` and
            ``Q`` an orthonormal basis of ``H S``, ``tr(Q^T H Q)`` exactly, plus probes of ``(I - Q Q^T) H (I - Q Q^T)``. Its samples are those probes,
            shifted by the exact part.
        probes: how many; for hutch++ how many products with H.
        rtol: go on until the standard error is at most ``rtol`` times the mean's magnitude. It is looked at after ``probes`` probes, 16 at least, and then
            at most after each doubling. How little the mean moved is never looked at.
        max_probes: then the end; a warning says that ``rtol`` was not met.
        sigma: a positive number, or "auto": measured with up to 4 probes on the first batch, see ``reason`` of the result.
        distribution: "rademacher" (smaller variance; exact for a diagonal Hessian) or "normal".
        seed: in [0, 2^32). Same seed, same probes, whatever the method, device or number of threads.
        reduction: how a loss is reduced over samples: the trace is of the mean (or sum) of a vector, and of the mean over a loader's samples (or the sum).
        progress: show a bar (needs tqdm).

    Returns:
        A :class:`HessianTrace`.

    Afterwards parameters are what they were, bit for bit, as are ``.grad``, torch's random number generators, and the buffers of all modules involved. All
    evaluations start from the same buffers and generators, so dropout draws the same masks each time, and a loader that shuffles gives the same batches.

    Memory: a copy of the parameters; for ``two_point`` no graph; for hutch++ ``2 probes / 3`` vectors. Cost per probe: ``two_point`` two forward passes,
    ``two_point_grad`` two plain steps, ``hvp`` one double backward. The first two also take a pilot on the first batch (4 probes at about 5 values of sigma for
    "auto", of which 2 if sigma is given; gradients half of that) and evaluate 8 probes (4) at twice sigma.

    Raises:
        ValueError: an argument is not as above; the loss is not finite, has another shape, or differs between two evaluations at the same parameters.
        TypeError: the data are not as above, or parameters are no tensors in 16 to 64 bits.
        UnsupportedUseError: method "hvp" or "hutch++", and an operation has no second derivative; "hutch++" and sharded parameters (``DTensor``). The other
            methods take them; the loss must then be the same number on every process.
    """
    caller = "hessian_trace"
    if method not in METHODS:
        raise ValueError(f"ghostgrad.{caller}: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    _check_numbers(caller, probes, rtol, max_probes, 6 if method == "hutch++" else 1)
    given = _sigma(caller, method, sigma)
    if rtol is not None:
        probes = min(max(probes, 3 * _FIRST_LOOK if method == "hutch++" else _FIRST_LOOK), max_probes)
    with _Problem(caller, loss, args, params, reduction, seed, distribution, progress) as problem:
        if method in _ORDER:
            return _two_point(problem, method, probes, rtol, max_probes, given)
        if method == "hvp":
            rows = _gather(probes, max_probes, rtol, lambda some: _with_sums(_table(problem, method, some, 0.0)))
        else:
            rows = _hutchpp(problem, probes, rtol, max_probes)
        return _result(problem, method, rows, rtol, None, None, "nothing is perturbed", [])


def _with_sums(table: _Table) -> Tensor:
    """(n, 1 + C): the samples, then their columns."""
    return table.samples[:, None] if table.columns is None else torch.cat([table.samples[:, None], table.columns], 1)


def _two_point(problem: _Problem, method: str, probes: int, rtol: float | None, most: int, given: float | None) -> HessianTrace:
    scale = _scale(problem, method, given, probes)
    sigma, messages = scale.sigma, []
    zero: Tensor | None = None

    def more(some: Sequence[int]) -> Tensor:
        nonlocal zero
        table = _table(problem, method, some, sigma)
        if zero is not None and table.columns is not None and table.zero is not None and not torch.equal(zero, table.zero):
            raise ValueError(
                "ghostgrad.hessian_trace: the loader gives its samples in another order each time, so that losses per sample cannot be matched: use a loader "
                "that shuffles by torch's own generator, or not at all, or a scalar loss"
            )
        zero = table.zero
        return _with_sums(table)

    rows = _gather(probes, most, rtol, more)
    checked = range(min(_CHECKED[method], len(rows)))
    moved = _table(problem, method, checked, 2 * sigma).samples - rows[: len(checked), 0]
    mean, stderr = (float(t) for t in _mean_and_stderr(rows[:, 0]))
    shift, uncertain = (float(t) for t in _mean_and_stderr(moved))
    tolerable = max(0.01 * abs(mean), 0.0 if math.isnan(stderr) else stderr)
    rounding = _of_mean(method, scale.rounding, len(rows)) / sigma ** _ORDER[method]
    if rounding > 0.01 * abs(mean) and rounding > 0.5 * tolerable:
        way = "method='two_point_grad', a larger sigma or float64" if method == "two_point" else "a larger sigma or float64"
        messages.append(f"rounding: about {rounding:.2g} of {mean:.4g} at sigma = {sigma:.2g}; use {way}")
    if problem.kinks or scale.lawless:
        found = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in problem.kinks.items()) or "values at several scales say so"
        messages.append(
            f"kinks ({found}): this is the trace of the loss smoothed over sigma = {sigma:.2g}, which counts the jumps of the derivative (at twice sigma it is "
            f"{mean + shift:.4g}); the second derivative away from them is what method='hvp' gives"
        )
    elif abs(shift) / 3 > tolerable and not abs(shift) < 2 * uncertain and not rounding > tolerable:
        due = f"about {abs(shift) / 3:.2g} of {mean:.4g} is due to sigma: choose a smaller one"
        messages.append(f"truncation: at twice sigma = {sigma:.2g} the estimate moves by {shift:.2g}, so {due}")
    return _result(problem, method, rows, rtol, sigma, mean + shift, scale.reason, messages)


def _hutchpp(problem: _Problem, probes: int, rtol: float | None, most: int) -> Tensor:
    """(n, 1 + P)."""
    rank = probes // 3
    dtype = torch.promote_types(torch.float32, problem.params[0].dtype)

    def basis() -> Tensor:
        sketch = problem.multiply([problem.noise(probe) for probe in range(rank)])
        return torch.linalg.qr(torch.stack([problem.flat(v).to(dtype) for v in sketch], 1))[0]  # (n, r)

    def blocks(left: Tensor, right: Sequence[Tensor]) -> Tensor:
        """(P,) inner products by parameter."""
        return torch.stack([(a.double() * b.double()).sum() for a, b in zip(problem.unflat(left), right)]).cpu()

    q = basis()
    exact = torch.stack([blocks(column, product) for column, product in zip(q.T, problem.multiply([problem.unflat(column) for column in q.T]))]).sum(0)

    def more(some: Sequence[int]) -> Tensor:
        vectors = (problem.flat(problem.noise(rank + probe)).to(dtype) for probe in some)
        rest = [v - q @ (q.T @ v) for v in vectors]
        rows = exact + torch.stack([blocks(v, product) for v, product in zip(rest, problem.multiply([problem.unflat(v) for v in rest]))])
        if not rows.isfinite().all():
            raise ValueError("ghostgrad.hessian_trace: the loss, or its second derivative, is not finite at w")
        return torch.cat([rows.sum(1, keepdim=True), rows], 1)

    return _gather(probes - 2 * rank, most - 2 * rank, rtol, more)


def _result(
    problem: _Problem,
    method: str,
    rows: Tensor,  # (n, 1 + C)
    rtol: float | None,
    sigma: float | None,
    at_2_sigma: float | None,
    reason: str,
    messages: list[str],
) -> HessianTrace:
    means, stderrs = _mean_and_stderr(rows)
    mean, stderr = float(means[0]), float(stderrs[0])
    if rtol is not None and not stderr <= rtol * abs(mean):
        messages.append(f"rtol={rtol:.2g} is not met: the standard error is {stderr:.2g} of {mean:.4g} after {len(rows)} probes; raise max_probes")
    for message in messages:
        warnings.warn(f"ghostgrad.hessian_trace: {message}", stacklevel=4)
    half = _t_quantile(len(rows) - 1) * stderr
    by_param, by_param_stderr = (
        None if method == "two_point" else {name: float(value) for name, value in zip(problem.names, values[1:])} for values in (means, stderrs)
    )
    of_samples = method == "two_point" and len(means) > 1
    return HessianTrace(
        mean=mean,
        stderr=stderr,
        interval=(mean - half, mean + half),
        samples=rows[:, 0],
        by_param=by_param,
        by_param_stderr=by_param_stderr,
        by_sample=means[1:] if of_samples else None,
        by_sample_stderr=stderrs[1:] if of_samples else None,
        sigma=sigma,
        at_2_sigma=at_2_sigma,
        reason=reason,
        cost=problem.cost,
        warnings=tuple(messages),
    )
