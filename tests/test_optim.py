"""NSO and SAM: their gradients against the formulas, torch's own optimisers fed with them, and everything around a step put back."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ghostgrad as gg
from ghostgrad import _C, noise
from helpers import in_own_process, needs_peak_memory

SGD, Adam = torch.optim.SGD, torch.optim.Adam
Closure = Callable[[], Tensor]


def build(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def build_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(12, 3))


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype), torch.randint(3, (16,), generator=generator)


def closure_of(model: nn.Module, opt: Any, zero_grad: Callable[[], None] | None = None) -> Closure:
    x, y = data(next(model.parameters()).dtype)
    x = x[:, None] if isinstance(model[0], nn.Conv1d) else x  # type: ignore[index]

    def closure() -> Tensor:
        (zero_grad or opt.zero_grad)()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8)) for x, y in zip(a, b))


def seen(opt: Any) -> list[list[Tensor]]:
    """The gradients that the base steps with, from now on."""
    found: list[list[Tensor]] = []
    opt.base.register_step_pre_hook(lambda base, args, kwargs: found.append([p.grad.clone() for g in base.param_groups for p in g["params"]]))
    return found


def quadratic(n: int = 12) -> tuple[Tensor, nn.Parameter, Closure]:
    """``(H, w, closure)`` of ``w' H w / 2`` in float64; H is symmetric."""
    torch.manual_seed(3)
    h = torch.randn(n, n, dtype=torch.float64)
    h, w = h + h.T, nn.Parameter(torch.randn(n, dtype=torch.float64))

    def closure() -> Tensor:
        loss = w @ h @ w / 2
        loss.backward()
        return loss

    return h, w, closure


# --- the gradient ---


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("num_perturbs", [1, 3])
@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_two_points_of_a_quadratic_are_exact(mix: float, num_perturbs: int, distribution: str) -> None:
    h, w, closure = quadratic()
    opt = gg.optim.NSO([w], SGD, lr=0.1, sigma=0.3, mix=mix, num_perturbs=num_perturbs, distribution=distribution)
    grads, start = seen(opt), w.detach().clone()
    loss = opt.step(closure)
    torch.testing.assert_close(grads[0][0], h @ start, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.detach(), start - 0.1 * grads[0][0], rtol=1e-15, atol=0)
    draws = []
    for j in range(num_perturbs):
        u = torch.zeros_like(start)
        noise.perturb_([u], opt.noise_seed(0, j), 0.3, distribution)
        draws.append((u @ h @ u / 2).item())
    assert loss.item() == pytest.approx((start @ h @ start / 2).item() + (1 - mix) * sum(draws) / num_perturbs, rel=1e-12)


@pytest.mark.parametrize("num_perturbs", [1, 4])
def test_one_point_has_the_mean_and_variance_of_the_formula(num_perturbs: int) -> None:
    """``g = H w + sigma H u``, averaged over k: unbiased, ``E |g - H w|^2 = sigma^2 |H|_F^2 / k``."""
    h, w, closure = quadratic()
    start, sigma = w.detach().clone(), 0.2
    opt = gg.optim.NSO([w], SGD, lr=0.0, sigma=sigma, two_point=False, num_perturbs=num_perturbs, seed=5)
    grads = seen(opt)
    for _ in range(1500):
        opt.step(closure)
    errors = torch.stack([g[0] for g in grads]) - h @ start
    standard_errors = errors.std(0) / math.sqrt(len(errors))
    assert (errors.mean(0).abs() < 3.5 * standard_errors).all()
    variance = errors.square().sum(1).mean().item()
    assert variance == pytest.approx(sigma**2 * h.square().sum().item() / num_perturbs, rel=0.1)
    u = torch.zeros_like(start)
    for j in range(num_perturbs):
        noise.perturb_([u], opt.noise_seed(0, j), sigma / num_perturbs, "normal")
    torch.testing.assert_close(grads[0][0], h @ (start + u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("two_point", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("base", [SGD, Adam])
def test_gradients_are_those_of_perturbed_bit_for_bit(base: Any, mix: float, two_point: bool) -> None:
    """What the optimiser steps with, taken apart with gg.perturbed and the addresses that it names."""
    model, k = build(), 2
    opt = gg.optim.NSO(model, base, lr=0.05, sigma=0.02, mix=mix, num_perturbs=k, two_point=two_point, seed=9)
    grads = seen(opt)
    signs = (1, -1) if two_point else (1,)
    for step in range(3):
        twin = copy.deepcopy(model)
        x, y = data()

        def gradient() -> list[Tensor]:
            return list(torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())))  # noqa: B023

        expected = [torch.zeros_like(p) for p in twin.parameters()]
        for j in range(k):
            for sign in signs:
                with gg.perturbed(twin, 0.02, opt.noise_seed(step, j), sign, "normal"):
                    expected = [total + g for total, g in zip(expected, gradient())]
        expected = [total * ((1 - mix) / (k * len(signs))) for total in expected]
        if mix:
            expected = [torch.add(total, g, alpha=mix) for total, g in zip(expected, gradient())]
        opt.step(closure_of(model, opt))
        assert same_bits(grads[step], expected)


BASES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "foreach": False}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    (torch.optim.Adagrad, {"lr": 0.01}),
]


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize(("base", "kwargs"), BASES, ids=str)
def test_the_base_steps_as_it_does_alone(base: Any, kwargs: dict[str, Any], mix: float) -> None:
    """Parameters and state equal those of the base fed with the same gradients, with and without a hook (which makes the base step by itself)."""
    model, hooked, alone = build(), build(), build()
    opt, hooked_opt = (gg.optim.NSO(m, base, sigma=0.02, mix=mix, seed=3, **kwargs) for m in (model, hooked))
    fed = base(alone.parameters(), **kwargs)
    grads = seen(hooked_opt)
    for step in range(4):
        assert opt.step(closure_of(model, opt)) == hooked_opt.step(closure_of(hooked, hooked_opt))
        for p, g in zip(alone.parameters(), grads[step]):
            p.grad = g
        fed.step()
        assert same_bits(values(hooked), values(alone))
        assert same_bits(values(model), values(alone))
    states = [o.state_dict()["state"] for o in (opt, hooked_opt, fed)]
    for state in states[:2]:
        assert state.keys() == states[2].keys()
        for i, entries in state.items():
            assert entries.keys() == states[2][i].keys()
            for name, value in entries.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[2][i][name]))


def test_when_the_fused_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(noise, "nso_step_", lambda *args, **kwargs: calls.append(1))
    fused = [False] * len(BASES)
    for i, (base, kwargs) in enumerate(BASES):
        calls.clear()
        model = build()
        opt = gg.optim.NSO(model, base, **kwargs)
        opt.step(closure_of(model, opt))
        fused[i] = bool(calls)
    able = _C.cpu_capability() != "portable"
    assert fused == [able] * 4 + [False, False, able] + [False] * 5
    model = build(torch.bfloat16)
    calls.clear()
    opt = gg.optim.NSO(model, SGD, lr=0.1)
    opt.step(closure_of(model, opt))
    model = build()
    scheduled = gg.optim.NSO(model, SGD, lr=0.1)
    torch.optim.lr_scheduler.StepLR(scheduled.base, 5)  # wraps the base's step
    scheduled.step(closure_of(model, scheduled))
    assert not calls


# --- what a step leaves ---


def test_parameters_are_perturbed_in_each_pass_and_back_after_it() -> None:
    model = build()
    opt = gg.optim.NSO(model, SGD, lr=0.0, sigma=0.05, mix=0.5, num_perturbs=2)
    closure, before = closure_of(model, opt), values(model)
    inside: list[list[Tensor]] = []

    def watched() -> Tensor:
        inside.append(values(model))
        return closure()

    opt.step(watched)
    assert same_bits(values(model), before) and same_bits(inside.pop(0), before)
    for j in range(2):
        for sign in (1, -1):
            expected = [p.clone() for p in before]
            noise.perturb_(expected, opt.noise_seed(0, j), sign * 0.05, "normal")
            assert same_bits(inside.pop(0), expected)
    assert not inside and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("kind", "at"), [("NSO", 0), ("NSO", 1), ("NSO", 2), ("SAM", 0), ("SAM", 1)])
def test_a_closure_that_raises_leaves_no_trace(kind: str, at: int) -> None:
    model, calm = build_norms(), build_norms()
    opt, calm_opt = (getattr(gg.optim, kind)(m, SGD, lr=0.1, momentum=0.9, **({"mix": 0.5} if kind == "NSO" else {})) for m in (model, calm))
    for m, o in ((model, opt), (calm, calm_opt)):
        o.step(closure_of(m, o))
    before, state, count = values(model), copy.deepcopy(opt.state_dict()), 0
    closure = closure_of(model, opt)

    def fails() -> Tensor:
        nonlocal count
        loss = closure()
        count += 1
        if count == at + 1:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        opt.step(fails)
    assert same_bits(values(model), before)
    assert str(opt.state_dict()) == str(state)
    opt.step(closure)
    calm_opt.step(closure_of(calm, calm_opt))
    assert same_bits(values(model), values(calm))


@pytest.mark.parametrize("kind", ["NSO", "SAM"])
def test_closures_may_clear_gradients_or_not(kind: str) -> None:
    results = []
    for way in ("optimiser", "model", "zeros", "nobody", "leftovers"):
        model = build()
        opt: Any = getattr(gg.optim, kind)(model, Adam, lr=0.01)
        ways: dict[str, Callable[[], None]] = {"model": model.zero_grad, "zeros": lambda m=model: m.zero_grad(set_to_none=False)}  # type: ignore[misc]
        closure = closure_of(model, opt, ways.get(way, opt.zero_grad if way == "optimiser" else lambda: None))
        for _ in range(3):
            if way == "leftovers":
                for p in model.parameters():
                    p.grad = torch.full_like(p, 1e3)
            opt.step(closure)
        results.append(values(model))
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_gradients_that_share_memory_with_the_next_pass() -> None:
    """As with DistributedDataParallel's buckets: every pass writes to the same memory."""
    model, twin = build(), build()
    opt, twin_opt = (gg.optim.NSO(m, SGD, lr=0.1, num_perturbs=2) for m in (model, twin))
    buckets = [torch.empty_like(p) for p in model.parameters()]
    closure = closure_of(model, opt)

    def bucketed() -> Tensor:
        loss = closure()
        for p, bucket in zip(model.parameters(), buckets):
            p.grad = bucket.copy_(p.grad)  # type: ignore[arg-type]
        return loss

    for _ in range(2):
        opt.step(bucketed)
        twin_opt.step(closure_of(twin, twin_opt))
    assert same_bits(values(model), values(twin))


class Uneven(nn.Module):
    """Tied, frozen, unused and sometimes unused parameters, and sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4, sparse=True)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.tied = nn.Linear(4, 4)
        self.again = self.tied
        self.unused = nn.Linear(2, 2)
        self.sometimes = nn.Parameter(torch.ones(4))
        self.calls = 0

    def forward(self, index: Tensor) -> Tensor:
        self.calls += 1
        x = self.again(self.tied(self.frozen(self.table(index)))).tanh()
        out: Tensor = x * self.sometimes if self.calls % 2 else x
        return out


@pytest.mark.parametrize("mix", [0.0, 0.25])
def test_uneven_models(mix: float) -> None:
    model = Uneven()
    opt = gg.optim.NSO(model, SGD, lr=0.1, sigma=0.05, mix=mix)
    index = torch.arange(5)
    twin, before, untouched = copy.deepcopy(model), dict(model.named_parameters()), copy.deepcopy(model.state_dict())

    def closure_for(m: Uneven) -> Closure:
        def closure() -> Tensor:
            m.zero_grad()
            loss = m(index).square().sum()
            loss.backward()
            return loss

        return closure

    opt.step(closure_for(model))
    total = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    points = [(mix, 0)] * (mix > 0) + [((1 - mix) / 2, 1), ((1 - mix) / 2, -1)]
    for weight, sign in points:
        with gg.perturbed(twin, 0.05 * abs(sign), opt.noise_seed(0, 0), sign or 1, "normal"):
            closure_for(twin)()
        for name, p in twin.named_parameters():
            if p.grad is not None:
                total[name] += weight * p.grad.to_dense()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(before[name].detach(), p.detach() - 0.1 * total[name], rtol=1e-6, atol=1e-7)
    for name in ("frozen.weight", "frozen.bias", "unused.weight", "unused.bias"):
        assert torch.equal(model.state_dict()[name], untouched[name])


def test_frozen_and_foreign_parameters_get_no_noise() -> None:
    """Neither those that are frozen later, nor, in a list, those that are frozen now."""
    for given in (lambda m: m, lambda m: list(m.parameters())):
        model = build()
        opt = gg.optim.NSO(given(model), SGD, lr=0.1, sigma=0.1)
        model[0].requires_grad_(False)
        closure, before, inside = closure_of(model, opt), values(model), []

        def watched() -> Tensor:
            inside.append(values(model))  # noqa: B023
            return closure()  # noqa: B023

        opt.step(watched)
        for point in inside:
            assert same_bits(point[:2], before[:2]) and not torch.equal(point[2], before[2]) and not torch.equal(point[3], before[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = build(dtype)
    opt = gg.optim.NSO(model, SGD, lr=0.1, momentum=0.9, sigma=0.02)
    losses = [opt.step(closure_of(model, opt)).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0] and all(p.dtype == dtype for p in model.parameters())


def test_what_is_not_finite_passes_through() -> None:
    model = build()
    opt = gg.optim.NSO(model, SGD, lr=0.1)

    def closure() -> Tensor:
        loss = model(data()[0]).sum() * math.nan
        loss.backward()
        return loss  # type: ignore[no-any-return]

    assert math.isnan(opt.step(closure)) and all(p.isnan().all() for p in model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_channels_last_and_compiled_models(compiled: bool) -> None:
    results = []
    for plain in (False, True):  # a hook makes the base step by itself
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).to(memory_format=torch.channels_last)
        x, y = torch.randn(6, 3, 5, 5), torch.randint(3, (6,))
        forward = torch.compile(model, backend="aot_eager") if compiled and not plain else model
        opt = gg.optim.NSO(forward, SGD, lr=0.1, momentum=0.9, mix=0.2)
        if plain:
            seen(opt)

        def closure() -> Tensor:
            opt.zero_grad()  # noqa: B023
            loss = F.cross_entropy(forward(x), y)  # noqa: B023
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        results.append([*values(model), *(buffer.clone() for buffer in model.buffers())])
    assert same_bits(*results)  # on a CPU without AVX2, where nothing is fused, the base always steps by itself


_MEMORY = """
import ghostgrad as gg
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16)))
opt, x = gg.optim.{}(model, torch.optim.SGD, lr=1e-6, momentum=0.9), torch.randn(4, 1024)

def closure():
    loss = model(x).square().mean()
    loss.backward()
    return loss

opt.step(closure)  # makes the momenta
print(peak(lambda: opt.step(closure)) / 64)
"""


@needs_peak_memory
@pytest.mark.parametrize("kind", ["NSO", "SAM"])
def test_memory(kind: str) -> None:
    """A copy of the parameters, and one of the gradients, beside the gradients themselves."""
    assert 2.5 < in_own_process(_MEMORY.format(kind), MALLOC_MMAP_THRESHOLD_=str(1 << 16), MALLOC_TRIM_THRESHOLD_="0") < 3.3


# --- running statistics ---


@pytest.mark.parametrize(
    ("mix", "statistics", "passes"), [(0.0, None, 1), (0.5, None, 1), (0.0, "centre", 1), (0.0, "all", 4), (0.5, "all", 5), (0.0, "none", 0)]
)
def test_running_statistics(mix: float, statistics: str | None, passes: int) -> None:
    model = build_norms()
    opt = gg.optim.NSO(model, SGD, lr=0.1, sigma=0.2, mix=mix, num_perturbs=2, statistics=statistics)
    start, calls = copy.deepcopy(model), 0
    closure = closure_of(model, opt)

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return closure()

    opt.step(counted)
    assert calls == 4 + (mix > 0 or statistics == "centre")
    assert model[1].num_batches_tracked.item() == passes  # instance norms do not count
    if passes == 1:  # the statistics of one forward pass, at W or at W + U
        at_centre = mix > 0 or statistics == "centre"
        with gg.perturbed(start, 0.0 if at_centre else 0.2, opt.noise_seed(0, 0), 1, "normal"):
            start(data()[0][:, None])
        for name, buffer in start.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer)


def test_the_centre_is_visited_for_statistics_alone() -> None:
    """The pass at W that "centre" makes does not change the gradient."""
    results = []
    for statistics in ("first", "centre"):
        model = build_norms()
        opt = gg.optim.NSO(model, SGD, lr=0.1, statistics=statistics)
        losses = [opt.step(closure_of(model, opt)) for _ in range(3)]
        results.append([*values(model), *losses])
    assert same_bits(*results)


# --- schedules and schedulers ---


def test_schedules() -> None:
    linear, exponential = gg.optim.linear(0.1, 10, start=0.02), gg.optim.exponential(0.01, 6)
    assert [linear(0), linear(5), linear(10), linear(50)] == pytest.approx([0.02, 0.06, 0.1, 0.1])
    assert [exponential(0), exponential(2), exponential(6), exponential(60)] == pytest.approx([1e-5, 1e-4, 0.01, 0.01])
    for schedule in (linear, exponential, lambda step: 0.01 * (step % 2)):
        model = build()
        opt = gg.optim.NSO(model, SGD, lr=0.1, sigma=99.0, sigma_schedule=schedule)
        for step in range(3):
            closure, before, inside = closure_of(model, opt), values(model), []

            def watched() -> Tensor:
                inside.append(values(model))  # noqa: B023
                return closure()  # noqa: B023

            opt.step(watched)
            noise.perturb_(before, opt.noise_seed(step, 0), schedule(step), "normal")
            assert same_bits(inside[0], before)


def test_a_group_may_have_its_own_sigma() -> None:
    model = build()
    opt = gg.optim.NSO([{"params": model[0].parameters(), "sigma": 0.0}, {"params": model[2].parameters(), "lr": 0.5}], SGD, lr=0.1, sigma=0.1)
    closure, before, inside = closure_of(model, opt), values(model), []

    def watched() -> Tensor:
        inside.append(values(model))
        return closure()

    opt.step(watched)
    noise.perturb_(before[2:], opt.noise_seed(0, 0), 0.1, "normal", [noise.Block(2, 0, 24, 24), noise.Block(3, 0, 3, 3)])
    assert same_bits(inside[0], before)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=10),  # changes the momentum, too
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt, [torch.optim.lr_scheduler.ConstantLR(opt, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)], [2]
        ),
    ],
)
@pytest.mark.parametrize("kind", ["NSO", "SAM"])
def test_learning_rate_schedulers(kind: str, scheduler: Callable[[Any], Any]) -> None:
    model, alone = build(), build()
    opt: Any = getattr(gg.optim, kind)(model, SGD, lr=0.3, momentum=0.9)
    grads, plain = seen(opt), SGD(alone.parameters(), lr=0.3, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [scheduler(opt), scheduler(plain)]
        for step in range(6):
            opt.step(closure_of(model, opt))
            for p, g in zip(alone.parameters(), grads[step]):
                p.grad = g
            plain.step()
            for s in schedulers:
                s.step()
    assert same_bits(values(model), values(alone)) and opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"] != 0.3
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    before = opt.base.param_groups[0]["lr"]
    for _ in range(3):
        plateau.step(1.0)
    assert opt.base.param_groups[0]["lr"] < before


def test_hooks_and_groups_added_later() -> None:
    model, extra = build(), nn.Parameter(torch.ones(3))
    opt, called = gg.optim.NSO(list(model.parameters()), SGD, lr=0.1, sigma=0.1), []
    opt.register_step_post_hook(lambda *_: called.append("after"))
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.add_param_group({"params": [extra], "lr": 1.0})
    assert opt.param_groups is opt.base.param_groups and len(opt.param_groups) == 2

    def closure() -> Tensor:
        loss = F.cross_entropy(model(data()[0]) * extra, data()[1])
        loss.backward()
        return loss

    opt.step(closure)
    assert called == ["before", "after"] and not torch.equal(extra, torch.ones(3))


# --- resuming ---


def train(bases: dict[str, Any], folder: Path, steps: int, kill_at: int | None = None) -> None:
    """Trains with dropout and batch norms, saving everything after each step; killed in the middle of a pass, or resumed from what is there."""
    for name, base in bases.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        kwargs = {"momentum": 0.9} if base is SGD else {}
        opt = gg.optim.NSO(model, base, lr=0.01, num_perturbs=2, seed=4, sigma_schedule=gg.optim.exponential(0.05, steps // 2), **kwargs)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 7, 0.8)
        losses: list[float] = []
        path = folder / f"{name}.pt"
        if path.exists():
            saved = torch.load(path)  # weights_only
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
            scheduler.load_state_dict(saved["scheduler"])
            torch.set_rng_state(saved["rng"])
            losses = saved["losses"]
        closure, passes = closure_of(model, opt), 0

        def counted() -> Tensor:
            nonlocal passes
            passes += 1
            loss = closure()  # noqa: B023
            if kill_at is not None and opt.steps == kill_at and passes % 4 == 2:  # noqa: B023
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        while opt.steps < steps:
            losses.append(opt.step(counted).item())
            scheduler.step()
            saved = {"model": model.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(saved | {"rng": torch.get_rng_state(), "losses": losses}, folder / "part")
            os.replace(folder / "part", path)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(base: str, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_optim as t; from pathlib import Path; "
    code += f"t.train({{{base!r}: t.{base}}}, Path({str(tmp_path)!r}), 24, kill_at=11)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert torch.load(tmp_path / f"{base}.pt")["opt"]["ghostgrad"]["steps"] == 11
    with torch.random.fork_rng():
        train({base: globals()[base]}, tmp_path, 24)
        resumed = torch.load(tmp_path / f"{base}.pt")
        (tmp_path / f"{base}.pt").unlink()
        train({base: globals()[base]}, tmp_path, 24)
    whole = torch.load(tmp_path / f"{base}.pt")
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 24
    for key in ("model", "opt", "scheduler", "rng"):
        assert flat(resumed[key]) == flat(whole[key])


def flat(x: Any) -> Any:
    """Tensors as bytes, so that == compares bits."""
    if isinstance(x, Tensor):
        return str(x.dtype), x.numpy().tobytes()
    return {k: flat(v) for k, v in x.items()} if isinstance(x, dict) else [flat(v) for v in x] if isinstance(x, (list, tuple)) else x


def test_what_is_loaded_replaces_what_was_given(tmp_path: Path) -> None:
    model = build()
    sigma, seed = np.float64(0.03), np.int64(8)
    opt = gg.optim.NSO(model, SGD, lr=0.1, momentum=0.9, sigma=sigma, num_perturbs=2, two_point=False, mix=0.25, distribution="rademacher", seed=seed)
    opt.step(closure_of(model, opt))
    other_model = copy.deepcopy(model)
    other = gg.optim.NSO(other_model, SGD, lr=0.7)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    other.load_state_dict(torch.load(tmp_path / "opt.pt"))
    assert other.steps == 1 and other.param_groups is other.base.param_groups and other.state is other.base.state
    for m, o in ((model, opt), (other_model, other)):
        o.step(closure_of(m, o))
    assert same_bits(values(model), values(other_model))
    with pytest.raises(ValueError, match=r"NSO: the state dict must be one of NSO, got that of another optimiser: .*\.base\.load_state_dict"):
        opt.load_state_dict(opt.base.state_dict())
    with pytest.raises(ValueError, match="SAM: the state dict must be one of SAM, got that of NSO"):
        gg.optim.SAM(build(), SGD, lr=0.1).load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="sigma_schedule, which no checkpoint keeps"):
        gg.optim.NSO(build(), SGD, lr=0.1, sigma_schedule=gg.optim.linear(0.1, 5)).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    model = build()
    opt = gg.optim.NSO(model, SGD, lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(opt, 3)
    opt.step(closure_of(model, opt))
    other_model, other = copied((model, opt))
    assert other.param_groups is other.base.param_groups and other.state is other.base.state
    for m, o in ((model, opt), (other_model, other)):
        o.step(closure_of(m, o))
    assert same_bits(values(model), values(other_model))


# --- mixed precision ---


@pytest.mark.parametrize("kind", ["NSO", "SAM"])
@pytest.mark.parametrize("base", [SGD, Adam])
def test_gradient_scaling_changes_no_bit(base: Any, kind: str) -> None:
    """The scale is a power of two and nothing overflows: the same bits as without it."""
    results = []
    for scaled in (False, True):
        model, scaler = build(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        opt: Any = getattr(gg.optim, kind)(model, base, lr=0.01, grad_scaler=scaler, **({"mix": 0.5} if kind == "NSO" else {}))

        def closure() -> Tensor:
            opt.zero_grad()  # noqa: B023
            loss = F.cross_entropy(model(data()[0]), data()[1])  # noqa: B023
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # noqa: B023
            return loss

        for _ in range(5):
            opt.step(closure)
            scaler.update()
        results.append(values(model))
        assert not scaled or scaler.get_scale() == 2.0**12
    if kind == "NSO":
        assert same_bits(*results)
    else:  # the norm of a scaled gradient, and the 1e-12, round in another place
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_overflow_skips_the_step_and_lowers_the_scale() -> None:
    model, scaler = build(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    opt = gg.optim.NSO(model, Adam, lr=0.01, grad_scaler=scaler)
    bad, passes = True, 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = F.cross_entropy(model(data()[0]), data()[1])
        scaler.scale(loss * math.inf if bad and passes == 2 else loss).backward()  # type: ignore[no-untyped-call]
        return loss

    before = values(model)
    assert math.isfinite(opt.step(closure))
    scaler.update()
    assert same_bits(values(model), before) and not opt.state and scaler.get_scale() == 2.0**7 and opt.steps == 1
    bad = False
    opt.step(closure)
    scaler.update()
    assert not same_bits(values(model), before) and scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Half precision inside the closure: the gradient of each point is autocast's own, as with gg.perturbed."""
    model = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=dtype == torch.float16)
    opt = gg.optim.NSO(model, SGD, lr=0.1, sigma=0.02, grad_scaler=scaler)
    grads, twin = seen(opt), build()

    def closure_for(m: nn.Module, scale: Any) -> Closure:
        def closure() -> Tensor:
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(m(data()[0]), data()[1])
            scale(loss).backward()
            return loss

        return closure

    opt.step(closure_for(model, scaler.scale))
    for sign in (1, -1):
        with gg.perturbed(twin, 0.02, opt.noise_seed(0, 0), sign, "normal"):
            closure_for(twin, lambda loss: loss * scaler.get_scale())()
    assert same_bits(grads[0], [p.grad / (2 * scaler.get_scale()) for p in twin.parameters()])  # type: ignore[operator]


def test_clipping_sees_the_mean_gradient() -> None:
    model = build()
    opt = gg.optim.NSO(model, SGD, lr=1.0)
    opt.base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    before = values(model)
    opt.step(closure_of(model, opt))
    moved = sum((a - b).square().sum() for a, b in zip(values(model), before)).sqrt()  # type: ignore[union-attr]
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


# --- several processes ---

WORLD = 2


def _sharded(model: nn.Sequential) -> nn.Module:
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def _tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)  # type: ignore[arg-type]


PREPARE: dict[str, Callable[[Any], Any]] = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "buckets": lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fully_shard": _sharded,
    "tensor parallel": _tensor_parallel,
}
OPTIMISERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda model: gg.optim.NSO(model, SGD, lr=0.1, momentum=0.9, sigma=0.05, mix=0.25, num_perturbs=2, seed=2),
    "Adam": lambda model: gg.optim.NSO(model, Adam, lr=0.01, sigma=0.05, two_point=False, distribution="uniform"),
    "SAM": lambda model: gg.optim.SAM(model, SGD, lr=0.1, rho=0.1),
}


def _train(model: nn.Module, opt: Any, samples: slice) -> list[Tensor]:
    x, y = data(torch.float64)
    for _ in range(4):

        def closure() -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x[samples]), y[samples])
            loss.backward()
            return loss

        opt.step(closure)
        with torch.no_grad():
            model(x)  # leaves a fully sharded model with parameters gathered
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for kind, prepare in PREPARE.items():
        for name, optimiser in OPTIMISERS.items():
            model = prepare(build(torch.float64))
            results[kind, name] = _train(model, optimiser(model), slice(None) if kind == "tensor parallel" else slice(rank * 8, rank * 8 + 8))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # as in test_distributed.py


def test_processes_step_alike_and_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, optimiser in OPTIMISERS.items():
        model = build(torch.float64)
        alone = _train(model, optimiser(model), slice(None))
        for kind in PREPARE:
            assert same_bits(ranks[0][kind, name], ranks[1][kind, name])
            for got, expected in zip(ranks[0][kind, name], alone):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# --- SAM ---


def test_sam_is_its_formula() -> None:
    h, w, closure = quadratic()
    opt = gg.optim.SAM([w], SGD, lr=0.1, momentum=0.9, rho=0.3)
    grads, twin = seen(opt), nn.Parameter(w.detach().clone())
    sgd = SGD([twin], lr=0.1, momentum=0.9)
    for step in range(3):
        g = h @ w.detach()
        expected, before = h @ (w.detach() + 0.3 * g / g.norm()), (w @ h @ w / 2).item()
        assert opt.step(closure).item() == pytest.approx(before)
        torch.testing.assert_close(grads[step][0], expected, rtol=1e-12, atol=1e-12)
        twin.grad = grads[step][0]
        sgd.step()
        assert torch.equal(w, twin)


def test_sams_statistics_and_zero_gradients() -> None:
    model = build_norms()
    opt = gg.optim.SAM(model, SGD, lr=0.1)
    opt.step(closure_of(model, opt))
    assert model[1].num_batches_tracked.item() == 1
    w = nn.Parameter(torch.ones(3))
    still = gg.optim.SAM([w], SGD, lr=0.1)

    def closure() -> Tensor:
        loss = (0 * w).sum()
        loss.backward()
        return loss

    still.step(closure)
    assert torch.equal(w, torch.ones(3))


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sigma": -0.1}, ValueError, "NSO: sigma must be finite and not negative, got -0.1"),
        ({"sigma": math.nan}, ValueError, "NSO: sigma must be finite and not negative, got nan"),
        ({"num_perturbs": 0}, ValueError, "NSO: num_perturbs must be at least 1, got 0"),
        ({"mix": 1.0}, ValueError, r"NSO: mix must be in \[0, 1\), got 1.0"),
        ({"mix": -0.5}, ValueError, r"NSO: mix must be in \[0, 1\), got -0.5"),
        ({"distribution": "gauss"}, ValueError, "NSO: distribution must be 'rademacher', 'normal' or 'uniform', got 'gauss'"),
        ({"seed": -1}, ValueError, r"NSO: seed must be in \[0, 2\^63\), got -1"),
        ({"sigma_schedule": 0.1}, TypeError, "NSO: sigma_schedule must be a function of the step's number"),
        ({"statistics": "last"}, ValueError, "NSO: statistics must be 'first', 'centre', 'all' or 'none', got 'last'"),
        ({"base": "sgd"}, TypeError, "NSO: base must be a class of torch optimisers, or an optimiser, got 'sgd'"),
        ({"base": nn.Linear}, TypeError, "NSO: base must be a class of torch optimisers"),
        ({"base": torch.optim.LBFGS}, TypeError, "NSO: base must step from gradients that are there, but LBFGS takes a closure itself"),
        ({"momentun": 0.9}, TypeError, "momentun"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": [torch.ones(2)] * 2}, ValueError, "are the same tensor"),
        ({"params": list(build().parameters()), "statistics": "first"}, ValueError, "NSO: statistics='first' needs the model"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"params": build(), "base": SGD, "lr": 0.1} | arguments
    with pytest.raises(error, match=match):
        gg.optim.NSO(arguments.pop("params"), arguments.pop("base"), **arguments)


def test_more_errors() -> None:
    model = build()
    base = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="NSO: momentum must be given to the base optimiser, which is an instance already"):
        gg.optim.NSO(model, base, momentum=0.9)
    with pytest.raises(ValueError, match="NSO: params must be the parameters of the base optimiser .*; 4 of 4 are not among its 4, and 4 of those are missing"):
        gg.optim.NSO(build(), base)
    with pytest.raises(ValueError, match="SAM: rho must be finite and not negative, got -1"):
        gg.optim.SAM(model, SGD, lr=0.1, rho=-1)
    with pytest.raises(ValueError, match="exponential: start must not be 0"):
        gg.optim.exponential(0.1, 5, start=0.0)
    with pytest.raises(ValueError, match="linear: steps must be at least 1, got 0"):
        gg.optim.linear(0.1, 0)
    opt = gg.optim.NSO(model, base, sigma_schedule=lambda step: -1.0)
    with pytest.raises(ValueError, match="NSO: sigma of step 0 must be finite and not negative, got -1.0"):
        opt.step(closure_of(model, opt))
    opt = gg.optim.NSO(model, base)
    with pytest.raises(TypeError, match=r"NSO.step needs a closure that computes the loss, calls backward and returns the loss"):
        opt.step()
    with pytest.raises(RuntimeError, match=r"the closure left no gradient in any parameter: it must call loss.backward\(\)"):
        opt.step(lambda: torch.ones(()))
    closure = closure_of(model, opt)
    with pytest.raises(TypeError, match="the closure must return the loss, got None"):
        opt.step(lambda: closure() and None)


def test_a_base_that_is_there_already() -> None:
    model, twin = build(), build()
    for m in (model, twin):
        m[0].bias.requires_grad_(False)  # it may be among the base's
    opt = gg.optim.NSO(model, SGD([{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.01}], lr=0.1), seed=1)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.01]
    twin_opt = gg.optim.NSO(twin, SGD, lr=0.1, seed=1)
    twin_opt.base.param_groups[:] = [
        {**twin_opt.param_groups[0], "params": [*twin[2].parameters()]},
        {**twin_opt.param_groups[0], "params": [twin[0].weight], "lr": 0.01},
    ]
    for m, o in ((model, opt), (twin, twin_opt)):
        o.step(closure_of(m, o))
    assert same_bits(values(model), values(twin))  # the model numbers the noise, whatever the groups' order


def test_noise_seeds_differ() -> None:
    opts = [gg.optim.NSO(build(), SGD, lr=0.1, seed=seed) for seed in range(3)]
    seeds = {opt.noise_seed(t, j) for opt in opts for t in range(50) for j in range(4)}
    assert len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)
    assert opts[1].noise_seed(7, 1) == 8447204542359724115  # it must never change: checkpoints rely on it
