"""The ops of noise with an address: per op a typed wrapper, its fake kernel and its autograd formula, under each other.

The noise ``xi`` of an element is a function of four numbers: the seed, the number of its parameter, the element's index in the full parameter (row by row),
and the distribution. Not of the device, the instruction set, the number of threads, the sharding or the dtype: the same bits everywhere. The page that defines
it is ``csrc/core/noise.h``; :func:`ghostgrad.reference.noise` says the same in PyTorch. Noise is never stored: it is drawn again where it is needed again.

============  =======================================================  ============
distribution  ``xi``                                                   variance
============  =======================================================  ============
rademacher    1 or -1                                                  1
normal        standard normal, up to 6.7 in magnitude                  1
uniform       in (-1/2, 1/2): what a quantiser with step 1 does wrong  1/12
============  =======================================================  ============

``P`` tensors are given as a list. Tensor ``i`` is the whole of parameter ``i``, unless a list of :class:`Block` says which part of which parameter it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import _check_tensor

__all__ = ["DISTRIBUTIONS", "Block", "nso_step_", "perturb_", "probe_dot", "second_difference"]

DISTRIBUTIONS = ("rademacher", "normal", "uniform")
_IMPL = torch.library.Library("ghostgrad", "IMPL")


class Block(NamedTuple):
    """A tensor as a part of parameter ``number``: its element ``e``, row by row, has index ``offset + e // run * pitch + e % run`` in the full parameter.

    The rows ``[a, b)`` of an ``(m, n)`` matrix are ``Block(number, a * n, (b - a) * n, (b - a) * n)``, its columns ``[a, b)`` ``Block(number, a, b - a, n)``.
    """

    number: int
    offset: int
    run: int
    pitch: int


# --- what all of these ops ask of their arguments; csrc/torch/noise.h asks again, for callers of torch.ops ---


def check_seed(op: str, seed: int) -> None:
    """Raises ValueError unless ``0 <= seed < 2^63``."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"{op}: seed must be in [0, 2^63), got {seed}")


def check_distribution(op: str, distribution: str) -> None:
    """Raises ValueError for a distribution that does not exist."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"{op}: distribution must be 'rademacher', 'normal' or 'uniform', got {distribution!r}")


def _check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        _check_tensor(op, f"{name}[{i}]", tensor)


def _check_sigma(op: str, sigma: float, zero: bool) -> None:
    if not math.isfinite(sigma) or (sigma == 0 and not zero):
        raise ValueError(f"{op}: sigma must be finite{'' if zero else ' and not zero'}, got {sigma}")


def _flat(op: str, tensors: Sequence[Tensor], blocks: Sequence[Block] | None) -> list[int] | None:
    if blocks is None:
        return None
    if len(blocks) != len(tensors):
        raise ValueError(f"{op}: blocks must have one entry for each tensor, got {len(blocks)} for {len(tensors)}")
    return [number for block in blocks for number in block]


def _register_in_place(name: str, *mutated: int) -> None:
    """Makes an op that changes the tensors of its arguments ``mutated`` behave as PyTorch's own in-place operations do: it raises where gradients of them are
    recorded, and counts their versions, so that a backward pass that needs the old values raises, too."""
    op = getattr(torch.ops.ghostgrad, name).default

    def changed(args: tuple[Any, ...]) -> list[Tensor]:
        return [tensor for i in mutated for tensor in args[i]]

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in changed(args)):
            raise RuntimeError(f"{name}: a tensor that requires grad is changed in place while gradients are recorded: call it under torch.no_grad()")
        versions(keyset, *args, **kwargs)  # straight on: a turn through the dispatcher, with lists of tensors, takes as long as a small model's noise

    def versions(keyset: Any, *args: Any, **kwargs: Any) -> None:
        torch.autograd.graph.increment_version(changed(args))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    _IMPL.impl(name, autograd, "Autograd", with_keyset=True)
    _IMPL.impl(name, versions, "ADInplaceOrView", with_keyset=True)


# --- perturb_ ---


def perturb_(
    params: Sequence[Tensor],  # P tensors
    seed: int,
    sigma: float,
    distribution: str = "rademacher",
    blocks: Sequence[Block] | None = None,
) -> None:
    """Adds noise in place, to all tensors in one call.

    ``w <- w + sigma * xi(seed, number, index)``, the product rounded and the sum rounded in the accumulation dtype (float64 for float64, float32 otherwise),
    then to the dtype of ``w``.

    Args:
        params: float32, float64, bfloat16 or float16 tensors of one device; dtypes may be mixed. Tensors whose elements do not lie in order (channels last,
            transposed) are copied and copied back. No two may share memory.
        seed: in [0, 2^63).
        sigma: finite; of either sign. The standard deviation for rademacher and normal noise; for uniform noise the width, with standard deviation
            ``sigma / sqrt(12)``.
        distribution: "rademacher", "normal" or "uniform".
        blocks: which part of which parameter each tensor is; without it tensor ``i`` is the whole of parameter ``i``.

    Memory: nothing. Cost: reading and writing the tensors; on a CPU, normal noise takes longer (with AVX-512 twice as long: docs/noise.md). On CUDA one launch
    for up to 384 tensors of a dtype, nothing waits, and a graph may capture it: its replays add the same noise again.
    The same bits on every device, in any number of threads, for any sharding.

    Raises:
        ValueError: the seed, sigma, distribution or blocks are not as above.
        TypeError: a dtype is not supported.
        RuntimeError: tensors share memory or lie on several devices, a tensor that requires grad is changed while gradients are recorded, or a CUDA tensor
            meets a build without CUDA.
    """
    _check_list("perturb_", "params", params)
    check_seed("perturb_", seed)
    _check_sigma("perturb_", sigma, zero=True)
    check_distribution("perturb_", distribution)
    numbers = _flat("perturb_", params, blocks)
    if params:
        torch.ops.ghostgrad.perturb_.default(list(params), seed, sigma, distribution, numbers)


@torch.library.register_fake("ghostgrad::perturb_")
def _(params: list[Tensor], seed: int, sigma: float, distribution: str = "rademacher", blocks: list[int] | None = None) -> None:
    return None


_register_in_place("perturb_", 0)


# --- probe_dot ---


def probe_dot(
    plus: Sequence[Tensor],  # P tensors
    minus: Sequence[Tensor] | None = None,  # P tensors
    *,
    seed: int,
    sigma: float = 0.5,
    distribution: str = "rademacher",
    blocks: Sequence[Block] | None = None,
) -> Tensor:  # (P,)
    """Inner products with noise that is drawn again: of each tensor, what a probe of a Hessian's trace contributes.

    ``dot_i = sum xi (plus_i - minus_i) / (2 sigma)``, with zeros for ``minus`` if there is none. With the gradients at ``w + sigma xi`` and ``w - sigma xi``
    it is ``xi^T H xi`` up to O(sigma^2), cut into the blocks of the parameters; with ``H xi`` alone and the default ``sigma`` of 1/2, ``xi^T H xi`` itself.
    (For uniform noise the expectation is ``tr H / 12``.)

    Args:
        plus: float32, float64, bfloat16 or float16 tensors of one device, in any layout; dtypes may be mixed.
        minus: tensors of the same shapes, dtypes and device.
        seed, distribution, blocks: as for :func:`perturb_`.
        sigma: finite and not zero.

    Returns:
        (P,) float64. Differences and sums are formed in float64, in a fixed order: on a CPU the same bits in any number of threads and any instruction set, on
        CUDA the same bits from run to run. The results of shards add up to that of the full tensor.

    Memory: one float64 for 32768 elements (8192 on CUDA). Cost: reading the tensors. Linear in ``plus`` and ``minus``, and differentiable.

    Raises:
        ValueError: the seed, sigma, distribution or blocks are not as above, or the lists are empty or not equally long.
        TypeError: a dtype is not supported.
        RuntimeError: shapes, dtypes or devices differ, or a CUDA tensor meets a build without CUDA.
    """
    _check_list("probe_dot", "plus", plus)
    if not plus or (minus is not None and len(minus) != len(plus)):
        raise ValueError(f"probe_dot: plus and minus must be equally many tensors, at least one, got {len(plus)} and {None if minus is None else len(minus)}")
    check_seed("probe_dot", seed)
    _check_sigma("probe_dot", sigma, zero=False)
    check_distribution("probe_dot", distribution)
    numbers = _flat("probe_dot", plus, blocks)
    return torch.ops.ghostgrad.probe_dot.default(list(plus), None if minus is None else list(minus), seed, sigma, distribution, numbers)


@torch.library.register_fake("ghostgrad::probe_dot")
def _(plus: list[Tensor], minus: list[Tensor] | None, seed: int, sigma: float, distribution: str = "rademacher", blocks: list[int] | None = None) -> Tensor:
    return plus[0].new_empty(len(plus), dtype=torch.float64)


def _probe_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    plus, minus, ctx.seed, ctx.sigma = inputs[:4]
    ctx.distribution, ctx.blocks = inputs[4:6]
    ctx.two, ctx.like = minus is not None, [(t.shape, t.dtype, t.device) for t in plus]


def _probe_dot_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    # The dispatcher drops arguments that have their defaults: hence the length.
    xi = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
    torch.ops.ghostgrad.perturb_.default(xi, ctx.seed, 1.0, ctx.distribution, ctx.blocks)
    grads = [(scale * x.double()).to(x.dtype) for scale, x in zip(v / (2 * ctx.sigma), xi)]
    return (grads, [-grad for grad in grads] if ctx.two else None, None, None, None, None)[: len(ctx.needs_input_grad)]


torch.library.register_autograd("ghostgrad::probe_dot", _probe_dot_backward, setup_context=_probe_dot_setup)


# --- second_difference ---


def second_difference(
    plus: Tensor,  # (B,)
    zero: Tensor,  # (B,)
    minus: Tensor,  # (B,)
    sigma: float,
) -> Tensor:  # (B,)
    """Second differences of per-sample losses, in float64.

    ``(plus_i + minus_i - 2 zero_i) / sigma^2``, as ``((plus - zero) - (zero - minus)) / sigma^2``. Of losses at ``w + sigma xi``, ``w`` and ``w - sigma xi`` it
    is sample i's ``xi^T H_i xi`` up to O(sigma^2) and the losses' own rounding, which no difference can undo.

    Args:
        plus, zero, minus: (B,) losses in float32, float64, bfloat16 or float16, of the same dtype and device.
        sigma: finite and not zero.

    Returns:
        (B,) float64. Differentiable.

    Raises:
        ValueError: sigma is zero or not finite, or the shapes are not as above.
        TypeError: the dtypes differ or are not supported.
        RuntimeError: the devices differ, or a CUDA tensor meets a build without CUDA.
    """
    for name, losses in (("plus", plus), ("zero", zero), ("minus", minus)):
        _check_tensor("second_difference", name, losses)
        if losses.dim() != 1 or losses.shape != plus.shape:
            raise ValueError(f"second_difference: {name} must be (B,), as long as plus, got {tuple(losses.shape)} and {tuple(plus.shape)}")
        if losses.dtype != plus.dtype:
            raise TypeError(f"second_difference: {name} must have the dtype of plus, got {losses.dtype} and {plus.dtype}")
    _check_sigma("second_difference", sigma, zero=False)
    return torch.ops.ghostgrad.second_difference.default(plus, zero, minus, sigma)


@torch.library.register_fake("ghostgrad::second_difference")
def _(plus: Tensor, zero: Tensor, minus: Tensor, sigma: float) -> Tensor:
    return plus.new_empty(plus.shape[0], dtype=torch.float64)


def _second_difference_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype, ctx.sigma = inputs[0].dtype, inputs[3]


def _second_difference_backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    scaled = v / ctx.sigma**2
    return scaled.to(ctx.dtype), (-2 * scaled).to(ctx.dtype), scaled.to(ctx.dtype), None


torch.library.register_autograd("ghostgrad::second_difference", _second_difference_backward, setup_context=_second_difference_setup)


# --- nso_step_ ---


def nso_step_(
    params: Sequence[Tensor],  # P tensors
    grads: Sequence[Tensor],  # P tensors
    centre: Sequence[Tensor] = (),  # P tensors, or none
    momenta: Sequence[Tensor] = (),  # P tensors, or none
    *,
    lr: float,
    passes: int,
    mix: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
) -> None:
    """A step of noise stability optimisation with SGD, in place and in one pass: the mean of the gradients of perturbed passes, mixed with the gradient at
    the centre, and the update of ``torch.optim.SGD`` with it.

    ``g = mix * centre + (1 - mix) / passes * grads``, then ``g += weight_decay * w``, ``m <- momentum * m + (1 - dampening) * g``, ``w <- w - lr * m`` (with
    ``nesterov``, ``w <- w - lr * (g + momentum * m)``; without a momentum, ``w <- w - lr * g``).

    Args:
        params: float32, float64, bfloat16 or float16 tensors of one device; dtypes may be mixed.
        grads: the *sum* of the gradients of all perturbed passes, which is what backward leaves in ``.grad``.
        centre: gradients at the unperturbed parameters; only if ``mix`` is not zero need they be given.
        momenta: buffers of the momentum, changed in place; with a momentum and only then.
        passes: how many passes ``grads`` is the sum of: 2 k for k two-point perturbations.
        mix: lambda, the weight of the centre's gradient.
        first: the buffers are empty: ``m <- g``, without dampening, as SGD begins.

    float32 and float64 parameters get the same bits as from the operations of PyTorch one by one, on the same device (a CPU without AVX2 fuses no
    multiplications and sums, where PyTorch may). 16-bit ones are computed in float32 and rounded once, where single operations round each time.
    Memory: nothing; elements that do not lie in order are copied. Cost: reading all tensors once and writing parameters and buffers. CUDA: as :func:`perturb_`.

    Raises:
        ValueError: the lists are not equally long, or centre, momenta, passes or nesterov do not fit the numbers.
        TypeError: a dtype is not supported.
        RuntimeError: shapes, dtypes or devices differ, tensors share memory, a tensor that requires grad is changed while gradients are recorded, or a CUDA
            tensor meets a build without CUDA.
    """
    op = "nso_step_"
    _check_list(op, "params", params)
    for name, tensors in (("grads", grads), *((n, t) for n, t in (("centre", centre), ("momenta", momenta)) if t)):
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} must be as many tensors as params, got {len(tensors)} and {len(params)}")
    for number_name, number in (("lr", lr), ("mix", mix), ("momentum", momentum), ("dampening", dampening), ("weight_decay", weight_decay)):
        if not math.isfinite(number):
            raise ValueError(f"{op}: {number_name} must be finite, got {number}")
    if passes < 1:
        raise ValueError(f"{op}: passes must be positive, got {passes}")
    if not params:
        return
    if mix != 0 and not centre:
        raise ValueError(f"{op}: mix is {mix}, so the gradients of the centre are needed, got none")
    if (momentum != 0) != bool(momenta):
        raise ValueError(f"{op}: momenta must be given with a momentum, and only then, got {len(momenta)} tensors and momentum {momentum}")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"{op}: nesterov needs a momentum and no dampening, got {momentum} and {dampening}")
    torch.ops.ghostgrad.nso_step_.default(
        list(params), list(grads), list(centre), list(momenta), lr, mix, passes, momentum, dampening, weight_decay, nesterov, first
    )


@torch.library.register_fake("ghostgrad::nso_step_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    centre: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    mix: float,
    passes: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
) -> None:
    return None


_register_in_place("nso_step_", 0, 3)
