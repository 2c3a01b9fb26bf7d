"""Optimisers that step with gradients taken at other parameters: noise stability optimisation (:class:`NSO`), and sharpness-aware minimisation (:class:`SAM`).

Both wrap any optimiser of PyTorch, which steps at the unperturbed parameters, and both take a closure, as ``torch.optim.LBFGS`` does.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as _torch_optimizer

from . import _C, noise
from .perturb import Addressed, running_statistics

__all__ = ["NSO", "SAM", "exponential", "linear"]

_HOOKS = (_torch_optimizer._global_optimizer_pre_hooks, _torch_optimizer._global_optimizer_post_hooks)
_STATISTICS = ("first", "centre", "all", "none")
Closure = Callable[[], Any]
Gradients = dict[Tensor, Tensor]


def linear(sigma: float, steps: int, start: float = 0.0) -> Callable[[int], float]:
    """A schedule for :class:`NSO`: from ``start`` to ``sigma`` in ``steps`` equal increments, then ``sigma``."""
    _check_schedule("linear", sigma, steps, start, zero=True)
    return lambda step: start + (sigma - start) * min(step / steps, 1.0)


def exponential(sigma: float, steps: int, start: float = 1e-5) -> Callable[[int], float]:
    """A schedule for :class:`NSO`: from ``start`` to ``sigma`` by a constant factor in each of ``steps`` steps, then ``sigma``."""
    _check_schedule("exponential", sigma, steps, start, zero=False)
    return lambda step: sigma if step >= steps else start * (sigma / start) ** (step / steps)


class _Wrapper(Optimizer):
    """An optimiser around another one, ``base``, whose groups and state are its own: schedulers may be given either."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        base: type[Optimizer] | Optimizer,
        statistics: str | None,
        grad_scaler: torch.amp.GradScaler | None,
        base_kwargs: dict[str, Any],
    ):
        name = type(self).__name__
        self.model = params if isinstance(params, nn.Module) else None
        if statistics is None:
            statistics = "first" if self.model is not None else "all"
        if statistics not in _STATISTICS:
            raise ValueError(f"{name}: statistics must be 'first', 'centre', 'all' or 'none', got {statistics!r}")
        if statistics != "all" and self.model is None:
            raise ValueError(f"{name}: statistics={statistics!r} needs the model, whose normalisation layers are looked up; got parameters: give the model")
        given = [p for p in params.parameters() if p.requires_grad] if isinstance(params, nn.Module) else list(params)
        if isinstance(base, Optimizer):
            if base_kwargs:
                raise TypeError(f"{name}: {', '.join(base_kwargs)} must be given to the base optimiser, which is an instance already")
            self._check_same_parameters(name, given, base)
        elif isinstance(base, type) and issubclass(base, Optimizer):
            base = base(given, **base_kwargs)
        else:
            raise TypeError(f"{name}: base must be a class of torch optimisers, or an optimiser, got {base!r}")
        if isinstance(base, (torch.optim.LBFGS, _Wrapper)):
            raise TypeError(f"{name}: base must step from gradients that are there, but {type(base).__name__} takes a closure itself")
        self.statistics, self.grad_scaler = statistics, grad_scaler
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self._share()
        self._addressed()  # what has no address raises now

    @staticmethod
    def _check_same_parameters(name: str, given: list[Any], base: Optimizer) -> None:
        tensors = [p for g in given for p in (g["params"] if isinstance(g, dict) else [g])]
        mine = {id(p[1] if isinstance(p, tuple) else p) for p in tensors}
        theirs = {id(p) for group in base.param_groups for p in group["params"] if p.requires_grad}
        if mine != theirs:
            raise ValueError(
                f"{name}: params must be the parameters of the base optimiser that require grad; {len(mine - theirs)} of {len(mine)} are not among its "
                f"{len(theirs)}, and {len(theirs - mine)} of those are missing"
            )

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def _addressed(self) -> Addressed:
        return Addressed(self.model if self.model is not None else self._parameters())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # a scheduler's wrapper

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base optimiser's."""
        if hasattr(self, "base"):
            self.base.add_param_group(param_group)
        else:  # from the constructor of Optimizer
            super().add_param_group(param_group)

    def _own_state(self) -> dict[str, Any]:
        """The attributes that a checkpoint keeps: numbers and words."""
        return {"statistics": self.statistics}

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's, and what is this one's own under ``"ghostgrad"``: a few numbers."""
        return self.base.state_dict() | {"ghostgrad": {"class": type(self).__name__, **self._own_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; as with the options of torch's optimisers, what is loaded replaces what the constructor was given."""
        own = state_dict.get("ghostgrad", {})
        if own.get("class") != type(self).__name__:
            raise ValueError(
                f"{type(self).__name__}: the state dict must be one of {type(self).__name__}, got that of {own.get('class', 'another optimiser')}: "
                "for the state of the base optimiser alone there is .base.load_state_dict"
            )
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "ghostgrad"})
        self._share()
        for name in self._own_state():
            setattr(self, name, own[name])

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step. ``closure`` computes the loss, calls backward and returns the loss; whether it clears gradients does not matter, and what ``.grad`` held
        before is dropped. Afterwards ``.grad`` is None. If the closure raises, parameters are what they were, and the step may be taken again."""
        if closure is None:
            raise TypeError(f"{type(self).__name__}.step needs a closure that computes the loss, calls backward and returns the loss, got None")
        passes = _Passes(self, closure)
        loss = self._step(passes)
        passes.clear()
        return loss

    def _step(self, passes: _Passes) -> Any:
        raise NotImplementedError

    def _base_step(self, grads: Gradients) -> None:
        for p, grad in grads.items():
            p.grad = grad
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.base)
        else:
            self.base.step()


class _Passes:
    """The passes of one step, and what they start from: parameters, and running statistics as the first pass left them."""

    def __init__(self, optimiser: _Wrapper, closure: Closure):
        self.name, self.closure, self.statistics = type(optimiser).__name__, closure, optimiser.statistics
        self.params, self.addressed = optimiser._parameters(), optimiser._addressed()
        self.values = self.addressed.values()
        self.buffers = running_statistics(optimiser.model) if optimiser.model is not None and self.statistics != "all" else []
        self.kept: list[Tensor] | None = None  # None: the next pass may change the buffers
        if self.statistics == "none":
            self._keep_statistics()

    def run(self, grads: Gradients, move: Callable[[], None] | None = None) -> Any:
        """The loss after ``move`` has moved the parameters, which are put back; its gradients are added to ``grads``."""
        self.clear()
        try:
            if move is not None:
                move()
            with torch.enable_grad():
                loss = self.closure()
        finally:
            if move is not None:
                self.addressed.restore_(self.values)
            for buffer, value in zip(self.buffers, self.kept or ()):
                buffer.copy_(value)
        if self.kept is None:
            self._keep_statistics()
        self._take(grads)
        if loss is None:
            raise TypeError(f"{self.name}.step: the closure must return the loss, got None")
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _keep_statistics(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]

    def _take(self, grads: Gradients) -> None:
        """A gradient's memory may be a bucket that the next pass writes to (``DistributedDataParallel``), so the first one is copied."""
        found = [(p, p.grad) for p in self.params if p.grad is not None]
        if not found:
            raise RuntimeError(f"{self.name}.step: the closure left no gradient in any parameter: it must call loss.backward()")
        again = [(grads[p], grad) for p, grad in found if p in grads]
        grads |= {p: grad.clone() for p, grad in found if p not in grads}
        if again:
            torch._foreach_add_([total for total, _ in again], [grad for _, grad in again])
        self.clear()

    def clear(self) -> None:
        for p in self.params:
            p.grad = None


class NSO(_Wrapper):
    """Noise stability optimisation (Zhang, Li and Ju, TMLR 2024): any torch optimiser on ``E f(W + U)``, the loss averaged over noise in the parameters.

    ``E f(W + U) = f + sigma^2 / 2 tr(Hessian) + O(sigma^4)`` for noise of deviation sigma, so minima with a small Hessian trace are preferred. With ``k``
    perturbations, of step ``t`` and ``j = 0 .. k-1``, the base optimiser steps at ``W`` with

    ``g = mix grad f(W) + (1 - mix) / 2k sum_j [grad f(W + U_j) + grad f(W - U_j)]``

    or, with ``two_point=False``, ``g = mix grad f(W) + (1 - mix) / k sum_j grad f(W + U_j)``, whose noise has deviation ``sigma |H u|`` about grad f(W) where
    two points leave that of the third derivatives. The gradient at ``W`` is computed only if ``mix`` is not 0.

    >>> import torch, ghostgrad as gg
    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    >>> opt = gg.optim.NSO(model, torch.optim.Adam, lr=1e-3, sigma=0.01)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> loss = opt.step(closure)

    Noise has an address (:mod:`ghostgrad.noise`): ``U_j`` is what ``gg.perturbed(model, sigma, opt.noise_seed(t, j), sign, distribution)`` adds, the same on
    every rank, device and sharding. So :meth:`state_dict` needs the number of steps alone to resume exactly.

    Args:
        params: the model, or its parameters, or parameter groups. Noise is numbered as the model lists its parameters, or as the groups do. A ``fully_shard``
            model must be given as the model. Parameters that require no grad get no noise.
        base: a class of optimisers, to which further keyword arguments are passed, or an optimiser of exactly these parameters. Any that steps without a
            closure. Learning-rate schedulers take this optimiser, whose ``param_groups`` are the base's.
        sigma: deviation of the noise (the width, if it is uniform); finite and not negative. A parameter group may have a ``"sigma"`` of its own.
        num_perturbs: k.
        two_point: take both signs of each perturbation.
        mix: lambda, in [0, 1).
        distribution: "normal", "rademacher" or "uniform".
        seed: in [0, 2^63).
        sigma_schedule: gives the sigma of a step, in place of ``sigma``: :func:`linear`, :func:`exponential` or any function of the step's number.
        statistics: which passes the running statistics of batch and instance norms see. "first": the first of each step, which is at ``W`` if ``mix`` is not
            0, and at ``W + U_0`` otherwise. "centre": that at ``W``, made for this alone if ``mix`` is 0, at the price of a pass (as the paper's code does).
            "all": every pass. "none": they stay as they are. All but "all" need the model. None: "first" with a model, else "all".
        grad_scaler: the ``torch.amp.GradScaler`` that the closure scales its loss with. The mean gradient is unscaled, and the base's step skipped when it is
            not finite; ``scaler.update()`` remains the caller's. Without one, gradients are stepped with as they are, finite or not.

    The base steps in one pass over its memory (:func:`ghostgrad.noise.nso_step_`) if it is a ``torch.optim.SGD`` without hooks, ``maximize``, ``fused`` or
    ``differentiable``, and parameters are plain float32 or float64 tensors: the same bits, less memory traffic. To see or clip the gradient ``g``, register a
    step hook with the base: ``opt.base.register_step_pre_hook(lambda base, args, kwargs: ...)``; ``g`` is in ``.grad`` then, unscaled.

    Cost: ``2k`` calls of the closure (``k`` with one point), one more if ``mix`` is not 0; a copy of the parameters, and for each pass noise and a copy back.
    Memory: a copy of parameters and of gradients.

    Raises:
        ValueError: an argument is not as above, or a parameter has no address (see :func:`ghostgrad.perturbed`).
        TypeError: the base is no optimiser, or takes a closure itself.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        base: type[Optimizer] | Optimizer,
        *,
        sigma: float = 0.01,
        num_perturbs: int = 1,
        two_point: bool = True,
        mix: float = 0.0,
        distribution: str = "normal",
        seed: int = 0,
        sigma_schedule: Callable[[int], float] | None = None,
        statistics: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        **base_kwargs: Any,
    ):
        _check_sigma("NSO: sigma", sigma)
        if num_perturbs < 1:
            raise ValueError(f"NSO: num_perturbs must be at least 1, got {num_perturbs}")
        if not 0 <= mix < 1:
            raise ValueError(f"NSO: mix must be in [0, 1), got {mix}; at 1 the base optimiser is left, without noise")
        noise.check_distribution("NSO", distribution)
        noise.check_seed("NSO", seed)
        if sigma_schedule is not None and not callable(sigma_schedule):
            raise TypeError(f"NSO: sigma_schedule must be a function of the step's number, such as gg.optim.linear(sigma, steps), got {sigma_schedule!r}")
        # Python's own numbers, whatever was given: torch.load reads no others
        self.sigma, self.num_perturbs, self.two_point, self.mix = float(sigma), operator.index(num_perturbs), bool(two_point), float(mix)
        self.distribution, self.seed, self.sigma_schedule = distribution, operator.index(seed), sigma_schedule
        self.steps = 0  # taken so far
        super().__init__(params, base, statistics, grad_scaler, base_kwargs)

    def _own_state(self) -> dict[str, Any]:
        names = ("steps", "seed", "sigma", "num_perturbs", "two_point", "mix", "distribution")
        return super()._own_state() | {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["ghostgrad"]["scheduled"] = self.sigma_schedule is not None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        scheduled, here = state_dict.get("ghostgrad", {}).get("scheduled"), self.sigma_schedule is not None
        if scheduled is not None and scheduled != here:
            raise ValueError(
                f"NSO: the state dict is of a run {'with' if scheduled else 'without'} a sigma_schedule, which no checkpoint keeps, and this one is "
                f"{'with' if here else 'without'}: give the constructor what that run was given"
            )
        super().load_state_dict(state_dict)

    def noise_seed(self, step: int, perturbation: int) -> int:
        """The seed of a perturbation's noise: the address in :func:`ghostgrad.perturbed`. A hash, so that runs of neighbouring seeds share nothing."""
        return int.from_bytes(hashlib.blake2b(f"NSO {self.seed} {step} {perturbation}".encode(), digest_size=8).digest(), "little") >> 1

    def _sigmas(self, addressed: Addressed) -> list[float]:
        """Of each parameter at this step; 0 for those that do not train."""
        scheduled = self.sigma if self.sigma_schedule is None else self.sigma_schedule(self.steps)
        of_param = {id(p): group.get("sigma", scheduled) for group in self.param_groups for p in group["params"] if p.requires_grad}
        for sigma in {scheduled, *of_param.values()}:
            _check_sigma(f"NSO: sigma of step {self.steps}", sigma)
        return [of_param.get(id(p), 0.0) for p in addressed.params]

    def _step(self, passes: _Passes) -> Any:
        sigmas = self._sigmas(passes.addressed)
        signs = (1, -1) if self.two_point else (1,)
        centre: Gradients = {}
        sums: Gradients = {}
        loss: Any = 0.0
        if self.mix != 0 or self.statistics == "centre":
            at_centre = passes.run(centre)
            if self.mix != 0:
                loss = self.mix * at_centre
            else:
                centre.clear()
        weight = (1 - self.mix) / (len(signs) * self.num_perturbs)
        for j, sign in itertools.product(range(self.num_perturbs), signs):
            signed = [sign * sigma for sigma in sigmas]
            add_noise = functools.partial(passes.addressed.add_noise_, signed, self.noise_seed(self.steps, j), self.distribution)
            loss = loss + weight * passes.run(sums, add_noise)
        if self.mix != 0:  # a parameter may be used at one point alone
            for p in sums.keys() - centre.keys():
                centre[p] = torch.zeros_like(sums[p])
            for p in centre.keys() - sums.keys():
                sums[p] = torch.zeros_like(centre[p])
        if not self._sgd_step(sums, centre, len(signs) * self.num_perturbs):
            grads = list(sums.values())
            torch._foreach_mul_(grads, weight)
            if self.mix != 0:
                torch._foreach_add_(grads, [centre[p] for p in sums], alpha=self.mix)
            self._base_step(sums)
        self.steps += 1
        return loss

    def _sgd_step(self, sums: Gradients, centre: Gradients, passes: int) -> bool:
        """The step by :func:`ghostgrad.noise.nso_step_`, where that gives the same bits as the base; whether it does."""
        if not _steps_plainly(self.base, self.grad_scaler) or not all(_is_plain(p, sums[p], centre.get(p)) for p in sums):
            return False
        for group in self.param_groups:
            calls: dict[tuple[torch.device, bool], list[Tensor]] = {}
            for p in group["params"]:
                if p in sums:
                    first = group["momentum"] != 0 and self.state[p].get("momentum_buffer") is None
                    calls.setdefault((p.device, first), []).append(p)
            for (_, first), params in calls.items():
                for p in params if first else ():
                    self.state[p]["momentum_buffer"] = torch.empty_like(sums[p])
                noise.nso_step_(
                    params,
                    [sums[p] for p in params],
                    [centre[p] for p in params] if self.mix != 0 else (),
                    [self.state[p]["momentum_buffer"] for p in params] if group["momentum"] != 0 else (),
                    passes=passes,
                    mix=self.mix,
                    first=first,
                    **{name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")},
                )
        return True


class SAM(_Wrapper):
    """Sharpness-aware minimisation (Foret, Kleiner, Mobahi and Neyshabur, ICLR 2021), to compare with: any torch optimiser on ``max_{|e| <= rho} f(W + e)``.

    The base optimiser steps at ``W`` with the gradient at ``W + rho g / (||g|| + 1e-12)``, where ``g = grad f(W)`` and the norm is over all parameters. Two
    calls of the closure; the loss at ``W`` is returned. Arguments and errors are those of :class:`NSO`; ``statistics`` "first" and "centre" are the same.

    Args:
        rho: radius; finite and not negative.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        base: type[Optimizer] | Optimizer,
        *,
        rho: float = 0.05,
        statistics: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        **base_kwargs: Any,
    ):
        _check_sigma("SAM: rho", rho)
        self.rho = float(rho)
        super().__init__(params, base, statistics, grad_scaler, base_kwargs)

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | {"rho": self.rho}

    def _step(self, passes: _Passes) -> Any:
        ascent: Gradients = {}
        loss = passes.run(ascent)

        def climb() -> None:
            norm: Any = torch.nn.utils.get_total_norm(list(ascent.values()))  # that of a scaled gradient cancels the scale
            scale = self.rho / ((norm.full_tensor() if hasattr(norm, "full_tensor") else norm) + 1e-12)
            for p, grad in ascent.items():
                p.add_(grad * scale.to(p.device))
            ascent.clear()  # its memory is the second pass's

        grads: Gradients = {}
        passes.run(grads, climb)
        self._base_step(grads)
        return loss


def _steps_plainly(base: Optimizer, grad_scaler: Any) -> bool:
    """Whether the base is torch's SGD and nothing else happens in its step."""
    hooks = (*_HOOKS, base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks)
    return grad_scaler is None and type(base) is SGD and "step" not in vars(base) and not any(hooks) and all(_is_plain_group(g) for g in base.param_groups)


def _is_plain_group(group: dict[str, Any]) -> bool:
    numbers = all(isinstance(group[name], (int, float)) for name in ("lr", "momentum", "dampening", "weight_decay"))
    return numbers and not (group["maximize"] or group["differentiable"] or group["fused"])


def _is_plain(p: Tensor, *grads: Tensor | None) -> bool:
    """Whether :func:`ghostgrad.noise.nso_step_` rounds as PyTorch does for this parameter."""
    same_bits = p.dtype in (torch.float32, torch.float64) and (p.is_cuda or _C.cpu_capability() != "portable")
    return same_bits and all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.dtype == p.dtype for t in (p, *grads) if t is not None)


def _check_sigma(name: str, sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {sigma}")


def _check_schedule(name: str, sigma: float, steps: int, start: float, zero: bool) -> None:
    for argument, value in (("sigma", sigma), ("start", start)):
        _check_sigma(f"{name}: {argument}", value)
        if value == 0 and not zero:
            raise ValueError(f"{name}: {argument} must not be 0, from which no factor leads away")
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
