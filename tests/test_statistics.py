"""Noise scale and its parts: per-sample gradients in float64 one by one, all batches of a small data set, populations with known covariance."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ghostgrad as gg
from ghostgrad.statistics import _ratio_interval
from helpers import build, loss_fn
from models import CASES, Case, Transformer

F64 = torch.float64


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning that a test does not ask for fails it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ghostgrad.noise_scale")
        yield


def per_sample(model: nn.Module, loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], target: Tensor) -> dict[str, Tensor]:
    """``{name: (B, elements)}`` gradients in float64, one sample at a time."""
    model = copy.deepcopy(model).double()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(target)):
        one = [t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1] for t in inputs]
        goal = target[i : i + 1].double() if target.is_floating_point() else target[i : i + 1]
        grads = torch.autograd.grad(loss(model(*one), goal), list(named.values()), materialize_grads=True)
        rows.append([g.flatten() for g in grads])
    return {name: torch.stack(column) for name, column in zip(named, zip(*rows))}


def estimates(g: Tensor) -> tuple[float, float]:
    """Of (B, n) gradients, as the definitions say: the sum of variances, and the mean of ``g_i . g_j`` over pairs."""
    gram = g @ g.T
    b = len(g)
    return float(g.var(0).sum()), float((gram.sum() - gram.trace()) / (b * (b - 1)))


def net(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(n: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator, dtype=F64).to(dtype), (torch.rand(n, generator=generator) < 0.2).long()


SEVERAL = [case for case in CASES if "one sample" not in case.name and "random" not in case.name]


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.name)
def test_every_use_of_parameters(case: Case) -> None:
    model, inputs, target = build(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gg.tap(model, by_param=True, grad_sqnorm=True) as tap:
            loss_fn(model(*inputs), target).backward()
        found = gg.noise_scale(tap)
    exact = per_sample(model, loss_fn, inputs, target)
    assert found.by_param is not None and found.by_param.keys() == exact.keys()
    for of, g in [(found, torch.cat(list(exact.values()), 1)), *((found.by_param[name], g) for name, g in exact.items())]:
        trace, grad_sqnorm = estimates(g)
        size = float(g.square().sum(1).mean())  # what both are differences of
        assert of.trace == pytest.approx(trace, rel=1e-5, abs=1e-5 * size)
        assert of.grad_sqnorm == pytest.approx(grad_sqnorm, rel=1e-5, abs=1e-5 * size)
    assert found.samples == len(target)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ways_to_ask_agree(reduction: str, measured: bool) -> None:
    model, (x, y) = net(), data(12)
    trace, grad_sqnorm = estimates(torch.cat(list(per_sample(model, F.cross_entropy, (x,), y).values()), 1))
    with gg.tap(model, reduction=reduction, grad_sqnorm=measured) as tap:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    vector = nn.CrossEntropyLoss(reduction="none")
    loader = DataLoader(TensorDataset(x, y), 5)  # 5, 5 and 2
    model.zero_grad()
    for found in (
        gg.noise_scale(tap) if measured else gg.noise_scale(model, vector, x, y),
        gg.noise_scale(model, loss, x, y, reduction=reduction),
        gg.noise_scale(model, loss, x, y, reduction=reduction, by_param=True),
        gg.noise_scale(model, loss, loader, reduction=reduction),
        gg.noise_scale(model, vector, loader, groups=1),
        gg.noise_scale(model, vector, [(x[:7], y[:7]), (x[7:], y[7:])], by_param=True),
        gg.noise_scale(list(model.parameters()) and (lambda x: model(x)), loss, x, y, reduction=reduction, params=list(model.parameters())),
    ):
        assert found.trace == pytest.approx(trace, rel=1e-11)
        assert found.grad_sqnorm == pytest.approx(grad_sqnorm, rel=1e-11)
        assert found.scale == pytest.approx(trace / grad_sqnorm, rel=1e-11)
        assert found.snr(10) == pytest.approx(10 * grad_sqnorm / trace, rel=1e-11)
        assert found.samples == 12
        if found.by_param is not None:
            assert sum(part.trace for part in found.by_param.values()) == pytest.approx(trace, rel=1e-11)
    assert all(p.grad is None for p in model.parameters())


def test_a_transformer_in_float32() -> None:
    torch.manual_seed(0)
    model, tokens, y = Transformer(tied=True), torch.randint(11, (6, 5)), torch.randint(11, (6,))
    found = gg.noise_scale(model, F.cross_entropy, tokens, y)
    trace, grad_sqnorm = estimates(torch.cat(list(per_sample(model, F.cross_entropy, (tokens,), y).values()), 1))
    assert (found.trace, found.grad_sqnorm) == (pytest.approx(trace, rel=1e-5), pytest.approx(grad_sqnorm, rel=1e-5))


# --- the gradient of the tapped batch, and no other ---


def tapped(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> gg.Tap:
    with gg.tap(model, **options) as tap:  # type: ignore[arg-type]
        F.cross_entropy(model(x), y).backward()
    return tap


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


ALTERED: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
    "clipped": lambda model, x, y: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "freed": lambda model, x, y: model.zero_grad(),
    "zeroed": lambda model, x, y: model.zero_grad(set_to_none=False),
    "added to": plain,
    "freed and made again": lambda model, x, y: (model.zero_grad(), plain(model, x.flip(0) + 1, y)),
    "another tensor": lambda model, x, y: [setattr(p, "grad", p.grad.clone()) for p in model.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("change", ALTERED)
def test_a_gradient_that_was_changed_is_refused_or_was_measured(change: str) -> None:
    model, (x, y) = net(), data(12)
    trace, grad_sqnorm = estimates(torch.cat(list(per_sample(model, F.cross_entropy, (x,), y).values()), 1))
    tap = tapped(model, x, y)
    assert gg.noise_scale(tap).scale == pytest.approx(trace / grad_sqnorm, rel=1e-11)
    ALTERED[change](model, x, y)
    with pytest.raises(gg.TapStateError, match=r"'0.weight' is not, or not only.*grad_sqnorm=True"):
        gg.noise_scale(tap)
    model.zero_grad()
    tap = tapped(model, x, y, grad_sqnorm=True)
    ALTERED[change](model, x, y)
    assert gg.noise_scale(tap).scale == pytest.approx(trace / grad_sqnorm, rel=1e-11)


def test_accumulated_gradients() -> None:
    model, (x, y) = net(), data(24)
    plain(model, x, y)
    with pytest.raises(gg.TapStateError, match="accumulated"):
        gg.noise_scale(tapped(model, x, y))
    taps = [tapped(model, x[i : i + 8], y[i : i + 8], grad_sqnorm=True, by_param=True) for i in (0, 8, 16)]
    parts = [estimates(torch.cat(list(per_sample(model, F.cross_entropy, (x[i : i + 8],), y[i : i + 8]).values()), 1)) for i in (0, 8, 16)]
    found = gg.noise_scale(taps)
    assert found.trace == pytest.approx(sum(trace for trace, _ in parts) / 3, rel=1e-11)
    assert found.grad_sqnorm == pytest.approx(sum(square for _, square in parts) / 3, rel=1e-11)
    assert found.trace_stderr == pytest.approx(float(torch.tensor(parts, dtype=F64)[:, 0].std()) / 3**0.5, rel=1e-11)  # the jackknife of a mean
    assert found.by_param is not None and sum(part.trace for part in found.by_param.values()) == pytest.approx(found.trace, rel=1e-11)
    again = gg.noise_scale([gg.noise_scale(tap) for tap in taps])
    assert (again.trace, again.interval) == (found.trace, found.interval)
    whole = torch.cat([tap.sqnorms() for tap in taps])
    model.zero_grad()
    plain(model, x, y)
    mean = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    expected = gg.noise_scale(model, F.cross_entropy, x, y)
    gathered = gg.NoiseScale.from_norms(whole, mean)
    assert (gathered.trace, gathered.grad_sqnorm) == (pytest.approx(expected.trace, rel=1e-11), pytest.approx(expected.grad_sqnorm, rel=1e-11))
    assert gg.noise_scale([taps[0], gg.noise_scale(model, F.cross_entropy, x[:8], y[:8])]).by_param is None


def test_batches_of_different_sizes_are_weighted() -> None:
    """The mean of ``g_i . g_j`` over all pairs within a batch, and the variance over all degrees of freedom."""
    model, (x, y) = net(), data(20)
    g = torch.cat(list(per_sample(model, F.cross_entropy, (x,), y).values()), 1)
    parts = [slice(0, 3), slice(3, 15), slice(15, 20)]
    squares = sum((g[part] @ g[part].T).sum() - g[part].square().sum() for part in parts) / sum(n * (n - 1) for n in (3, 12, 5))
    trace = sum((g[part] - g[part].mean(0)).square().sum() for part in parts) / (2 + 11 + 4)
    found = gg.noise_scale([tapped(model, x[part], y[part], grad_sqnorm=True) for part in parts])
    assert (found.trace, found.grad_sqnorm, found.samples) == (pytest.approx(float(trace), rel=1e-11), pytest.approx(float(squares), rel=1e-11), 20)


def test_inside_the_block_and_in_nested_blocks() -> None:
    model, (x, y) = net(), data(12)
    expected = gg.noise_scale(model, F.cross_entropy, x, y)
    with gg.tap(model) as outer, gg.tap(model) as inner:
        plain(model, x, y)
        assert gg.noise_scale(inner).trace == pytest.approx(expected.trace, rel=1e-11)
    for tap in (inner, outer):
        assert gg.noise_scale(tap).trace == pytest.approx(expected.trace, rel=1e-11)
    model.zero_grad()
    with gg.tap(model) as tap:
        for _ in range(2):
            model.zero_grad()
            plain(model, x, y)
            tap.sqnorms()
            assert gg.noise_scale(tap).trace == pytest.approx(expected.trace, rel=1e-11)


def test_compiled() -> None:
    torch._dynamo.reset()
    model, (x, y) = net(), data(12)
    expected = gg.noise_scale(model, F.cross_entropy, x, y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with gg.tap(compiled, grad_sqnorm=True) as tap:
        plain(compiled, x, y)
    assert gg.noise_scale(tap).trace == pytest.approx(expected.trace, rel=1e-11)
    model.zero_grad()
    with gg.tap(compiled) as tap:
        plain(compiled, x, y)
        tap.sqnorms()
        with pytest.raises(gg.TapStateError, match="inside the block"):
            gg.noise_scale(tap)
        plain(compiled, x, y)
    with pytest.raises(gg.TapStateError, match="grad_sqnorm=True"):
        gg.noise_scale(tap)


@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize("measured", [False, True])
def test_after_a_clipped_backward_there_is_no_gradient_of_the_batch(measured: bool, memory: int) -> None:
    model, (x, y) = net(), data(12)
    with gg.tap(model, grad_sqnorm=measured) as tap:
        gg.clipped_backward(F.cross_entropy(model(x), y, reduction="none"), tap, 0.1, memory=memory)
    with pytest.raises(gg.TapStateError, match="weighted or clipped"):
        gg.noise_scale(tap)


def test_beside_second_moments() -> None:
    model, (x, y) = net(), data(12)
    expected = gg.noise_scale(model, F.cross_entropy, x, y)
    tap = tapped(model, x, y, moments=True)
    assert gg.noise_scale(tap).trace == pytest.approx(expected.trace, rel=1e-11)
    moments = sum(square.sum() for square in tap.second_moments().values())
    assert expected.trace + expected.grad_sqnorm == pytest.approx(float(moments) / 12, rel=1e-11)


def test_parameters_without_a_gradient_count_as_zero() -> None:
    model, (x, y) = net(), data(6)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=F64)))
    found = gg.noise_scale(tapped(model, x, y, by_param=True))
    assert found.by_param is not None and (found.by_param["unused"].trace, found.by_param["unused"].grad_sqnorm) == (0, 0)


# --- what the numbers mean ---


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_step_covariance_over_all_batches(size: int, replacement: bool) -> None:
    """``E |dw - E dw|^2`` of SGD steps, by enumerating every batch that can be drawn."""
    model, (x, y) = net(), data(6)
    g = torch.cat(list(per_sample(model, F.cross_entropy, (x,), y).values()), 1)
    draws = itertools.product(range(6), repeat=size) if replacement else itertools.combinations(range(6), size)
    if replacement and size == 6:
        draws = itertools.product(range(4), repeat=6)  # 4^6 rather than 6^6
        x, y, g = x[:4], y[:4], g[:4]
    steps = -0.3 * torch.stack([g[list(batch)].mean(0) for batch in draws])
    exact = float((steps - steps.mean(0)).square().sum(1).mean())
    for found in (gg.noise_scale(model, F.cross_entropy, x, y), gg.noise_scale(model, F.cross_entropy, DataLoader(TensorDataset(x, y), 2))):
        assert found.step_covariance_trace(0.3, size, replacement) == pytest.approx(exact, rel=1e-11, abs=1e-15)


def linear_population(n: int, seed: int) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
    """A loss whose gradients are the inputs: normal with mean (1, ..., 1) / 10 and variances 1, ..., 20; so ``tr Sigma = 210``, ``|G|^2 = 0.2``."""
    model = nn.Linear(20, 1, bias=False, dtype=F64)
    variances = torch.arange(1, 21, dtype=F64)
    x = 0.1 + torch.randn(n, 20, generator=torch.Generator().manual_seed(seed), dtype=F64) * variances.sqrt()
    return model, (lambda out, _: out.mean()), x, torch.zeros(n)


def test_estimates_are_unbiased() -> None:
    """Over many batches of eight, of which most are too small for a ratio."""
    found = []
    for seed in range(400):
        model, loss, x, y = linear_population(8, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(gg.noise_scale(model, loss, x, y))
    both = torch.tensor([[one.trace, one.grad_sqnorm] for one in found], dtype=F64)
    error = (both.mean(0) - torch.tensor([210.0, 0.2])) / (both.std(0) / 400**0.5)
    assert (error.abs() < 3.5).all()
    assert sum(math.isnan(one.scale) for one in found) > 100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pooled = gg.noise_scale(found)
    assert abs(pooled.grad_sqnorm - 0.2) < 3.5 * pooled.grad_sqnorm_stderr
    assert pooled.trace_stderr == pytest.approx(float(both[:, 0].std()) / 20, rel=1e-9)


def test_intervals_cover() -> None:
    """Of 100 data sets of 2048 samples, the 95 % intervals of the noise scale have 1050 in them about as often."""
    covered = 0
    for seed in range(100):
        model, loss, x, y = linear_population(2048, seed)
        found = gg.noise_scale(model, loss, [(x[i : i + 128], y[i : i + 128]) for i in range(0, 2048, 128)])
        covered += found.interval[0] <= 1050 <= found.interval[1]
        assert 0 < found.trace_stderr < 15
    assert 0.88 <= covered / 100 <= 0.99


def test_intervals_of_ratios() -> None:
    """Fieller's interval is where the pivot is small enough, found by a search over ratios."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(0, 60, 60001, dtype=F64)
    for _ in range(200):
        root = torch.randn(2, 2, generator=generator, dtype=F64)
        c, top, bottom = root @ root.T, 5 + 3 * float(torch.rand((), generator=generator)), 4 * float(torch.rand((), generator=generator))
        inside = grid[(top - grid * bottom) ** 2 <= c[0, 0] - 2 * grid * c[0, 1] + grid**2 * c[1, 1]]
        low, high = _ratio_interval(top, bottom, c.tolist())
        if len(inside) and top**2 > c[0, 0] and low < 50:
            assert low == pytest.approx(float(inside[0]), abs=2e-3)
            assert min(high, 60) == pytest.approx(float(inside[-1]), abs=2e-3) or high > 60
    assert _ratio_interval(5.0, -1.0, [[0.1, 0.0], [0.0, 0.1]]) == (0.0, math.inf)


def test_a_batch_too_small_is_warned_of() -> None:
    model, loss, x, y = linear_population(4, 3)
    with pytest.warns(UserWarning, match="4 samples are too few"):
        found = gg.noise_scale(model, loss, x, y)
    assert math.isnan(found.scale)
    assert found.grad_sqnorm < 0 < found.trace
    assert "nan" in str(found)
    model, (x, y) = net(), data(40)
    assert "95 %" in str(gg.noise_scale(model, F.cross_entropy, DataLoader(TensorDataset(x, y), 5)))


def test_arguments() -> None:
    model, (x, y) = net(), data(6)
    loss = F.cross_entropy
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        gg.noise_scale(model, loss, x[:1], y[:1])
    with pytest.raises(ValueError, match="groups"):
        gg.noise_scale(model, loss, x, y, groups=0)
    with pytest.raises(ValueError, match="empty"):
        gg.noise_scale([])
    with pytest.raises(TypeError, match="list must hold"):
        gg.noise_scale([1])
    with pytest.raises(TypeError, match="give a tap"):
        gg.noise_scale(3)
    with pytest.raises(TypeError, match="noise_scale\\(model, loss_fn"):
        gg.noise_scale(model)
    with pytest.raises(ValueError, match="reduction='sum'"):
        gg.noise_scale(model, nn.CrossEntropyLoss(reduction="sum"), [(x, y)])
    with pytest.raises(ValueError, match="no batches"):
        gg.noise_scale(model, loss, [])
    with pytest.raises(TypeError, match="inputs and then the target"):
        gg.noise_scale(lambda x: model(x), loss, [(x, y)], params=model.parameters())
    restricted = gg.noise_scale(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])], params=(p for p in model[2].parameters()))
    assert restricted.trace < gg.noise_scale(model, loss, x, y).trace
    with pytest.raises(gg.TapStateError, match="no norms yet"):
        gg.noise_scale(gg.tap(model))
    found = gg.noise_scale(model, loss, x, y)
    for size in (0, 7):
        with pytest.raises(ValueError, match="batch_size must be in"):
            found.step_covariance_trace(0.1, size)
    assert found.step_covariance_trace(0.1, 7, replacement=True) > 0
