"""Traces: estimators against quadratics with known Hessians, sigma against float64, Gauss-Newton traces against Jacobians; nothing is left changed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

import ghostgrad as gg
from ghostgrad.trace import METHODS, _t_quantile
from models import Transformer

F64 = torch.float64
TWO_POINT = ("two_point", "two_point_grad")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning that a test does not ask for fails it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ghostgrad.hessian_trace")
        yield


# --- quadratics ---


def symmetric(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator, dtype=F64)
    return (a + a.T) / 2 + torch.diag(torch.rand(n, generator=generator, dtype=F64) * 3)


def low_rank(n: int, rank: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``diag(d) + V V^T`` without the matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=F64), torch.randn(n, rank, generator=generator, dtype=F64) / 10


def quadratic(h: Tensor) -> tuple[Callable[[], Tensor], nn.Parameter]:
    w = nn.Parameter(torch.randn(len(h), generator=torch.Generator().manual_seed(1), dtype=h.dtype))
    return (lambda: w @ h @ w / 2), w


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [5, 50, 500])
def test_dense_quadratics(n: int, method: str, distribution: str) -> None:
    h = symmetric(n)
    loss, w = quadratic(h)
    sigma = {"sigma": 0.1} if method in TWO_POINT else {}
    estimates = [gg.hessian_trace(loss, [w], method=method, probes=48, seed=seed, distribution=distribution, **sigma) for seed in range(4)]
    samples = torch.cat([e.samples for e in estimates])
    if method == "hutch++":
        means = torch.tensor([e.mean for e in estimates], dtype=F64)
        assert abs(means.mean() - h.trace()) <= 3 * math.sqrt(sum(e.stderr**2 for e in estimates)) / 4 + 1e-9 * n
    else:
        assert abs(samples.mean() - h.trace()) <= 3 * samples.std() / math.sqrt(len(samples))


@pytest.mark.parametrize("method", METHODS)
def test_five_thousand_dimensions(method: str) -> None:
    d, v = low_rank(5000)
    w = nn.Parameter(torch.zeros(5000, dtype=F64))
    trace = float(d.sum() + v.square().sum())
    est = gg.hessian_trace(lambda: (d * w * w).sum() / 2 + (v.T @ w).square().sum() / 2, [w], method=method, probes=90)
    assert abs(est.mean - trace) <= 3 * est.stderr
    assert est.interval[0] < est.mean < est.interval[1]
    torch.testing.assert_close(torch.tensor(est.mean), est.samples.mean().float())


@pytest.mark.parametrize("method", ["two_point", "two_point_grad", "hvp"])
def test_the_same_probes_give_the_same_samples(method: str) -> None:
    h = symmetric(40)
    loss, w = quadratic(h)
    est = gg.hessian_trace(loss, [w], method=method, probes=5, seed=3, distribution="normal")
    for i, sample in enumerate(est.samples):
        xi = [torch.zeros(40, dtype=F64)]
        gg.noise.perturb_(xi, 3 + (i << 32), 1.0, "normal")
        torch.testing.assert_close(sample, xi[0] @ h @ xi[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [5, 5000])
@pytest.mark.parametrize("method", METHODS)
def test_diagonal_hessians_are_exact_with_rademacher_noise(method: str, n: int) -> None:
    d = torch.linspace(-1, 3, n, dtype=F64)
    w = nn.Parameter(torch.ones(n, dtype=F64))
    est = gg.hessian_trace(lambda: (d * w * w).sum() / 2, [w], method=method, probes=60 if method == "hutch++" else 6)
    if method != "hutch++":  # whose projections of the noise are no signs
        torch.testing.assert_close(est.samples, d.sum().expand(6), rtol=1e-8, atol=0)
    assert abs(est.mean - float(d.sum())) <= max(3 * est.stderr, 1e-8 * n) if method == "hutch++" else est.stderr <= 1e-8 * n


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize(("n", "probes"), [(5, 12000), (50, 3000), (500, 2000)])  # few dimensions have heavy tails
def test_variances_of_dense_quadratics(n: int, probes: int, distribution: str) -> None:
    h = symmetric(n)
    loss, w = quadratic(h)
    squares = h.square().sum() - (h.diagonal().square().sum() if distribution == "rademacher" else 0)
    samples = gg.hessian_trace(loss, [w], sigma=0.1, probes=probes, distribution=distribution).samples
    torch.testing.assert_close(samples.var(), 2 * squares, rtol=0.1, atol=0)
    assert abs(samples.mean() - h.trace()) <= 3 * samples.std() / math.sqrt(probes)


@pytest.mark.parametrize(("n", "probes"), [(5, 12000), (5000, 2000)])
def test_variances_of_diagonal_quadratics(n: int, probes: int) -> None:
    """With normal noise, as with rademacher noise there is none."""
    d = torch.linspace(-1, 3, n, dtype=F64)
    w = nn.Parameter(torch.ones(n, dtype=F64))
    samples = gg.hessian_trace(lambda: (d * w * w).sum() / 2, [w], sigma=0.1, probes=probes, distribution="normal").samples
    torch.testing.assert_close(samples.var(), 2 * d.square().sum(), rtol=0.1, atol=0)
    assert abs(samples.mean() - d.sum()) <= 3 * samples.std() / math.sqrt(probes)


@pytest.mark.parametrize(
    ("method", "distribution"),
    [
        *(("two_point", "rademacher"), ("two_point", "normal"), ("two_point_grad", "rademacher"), ("hvp", "normal")),  # all have the same samples here
        *(("hutch++", "rademacher"), ("hutch++", "normal")),
    ],
)
def test_coverage(method: str, distribution: str) -> None:
    """Of 500 estimates with 24 probes, 92 to 98 % have the trace in their interval."""
    h = symmetric(30)
    loss, w = quadratic(h)
    sigma = {"sigma": 0.1} if method in TWO_POINT else {}
    estimates = [gg.hessian_trace(loss, [w], method=method, probes=24, seed=seed, distribution=distribution, **sigma) for seed in range(500)]
    means = torch.tensor([e.mean for e in estimates], dtype=F64)
    assert abs(means.mean() - h.trace()) <= 3 * means.std() / math.sqrt(500)
    covered = sum(e.interval[0] <= float(h.trace()) <= e.interval[1] for e in estimates) / 500
    assert 0.92 <= covered <= 0.98


def test_hutchpp_beats_hutchinson_where_the_spectrum_decays() -> None:
    n = 200
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64))
    h = q @ torch.diag(100.0 * torch.arange(1, n + 1, dtype=F64) ** -2) @ q.T
    loss, w = quadratic(h)
    errors = {
        method: max(abs(gg.hessian_trace(loss, [w], method=method, probes=60, seed=s).mean - float(h.trace())) for s in range(3))
        for method in ("hvp", "hutch++")
    }
    assert errors["hutch++"] < errors["hvp"] / 20
    exact = gg.hessian_trace(loss, [w], method="hutch++", probes=3 * n)  # the sketch spans everything
    assert exact.mean == pytest.approx(float(h.trace()), rel=1e-9) and exact.stderr < 1e-9


def test_quantiles_are_those_of_students_distribution() -> None:
    for freedom in (*range(1, 40), 100, 1000):
        assert _t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-4)


# --- when to stop ---


def test_stopping_looks_at_the_standard_error() -> None:
    h = symmetric(60) + 6 * torch.eye(60, dtype=F64)
    loss, w = quadratic(h)
    est = gg.hessian_trace(loss, [w], probes=4, rtol=0.02, sigma=0.1)
    assert est.stderr <= 0.02 * est.mean and 16 < len(est.samples) < 1024
    again = gg.hessian_trace(loss, [w], probes=len(est.samples), sigma=0.1)
    assert torch.equal(again.samples, est.samples)  # the same probes, whatever the rounds
    diagonal = gg.hessian_trace(lambda: w.square().sum(), [w], rtol=0.02, probes=1, sigma=0.1)
    assert len(diagonal.samples) == 16  # never fewer
    with pytest.warns(UserWarning, match="rtol=0.001 is not met"):
        short = gg.hessian_trace(loss, [w], rtol=1e-3, probes=16, max_probes=40, sigma=0.1)
    assert len(short.samples) == 40 and "max_probes" in short.warnings[0]
    sketched = gg.hessian_trace(loss, [w], method="hutch++", probes=12, rtol=0.01)
    assert sketched.stderr <= 0.01 * sketched.mean and abs(sketched.mean - h.trace()) < 4 * sketched.stderr


# --- networks ---


def mlp(activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 5))


class Attention(nn.Module):
    """With torch's own kernels, which have no double backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Classifier(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, width), nn.Parameter(torch.randn(6, width) / 10)
        feed_forward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.body, self.head = nn.Sequential(Attention(width), feed_forward, Attention(width), nn.LayerNorm(width)), nn.Linear(width, 11)

    def forward(self, index: Tensor) -> Tensor:  # (B, T) -> (B, V, T)
        return self.head(self.body(self.tokens(index) + self.positions)).movedim(2, 1)


Problem = tuple[nn.Module, Tensor, Tensor]
NETS: dict[str, Callable[[], Problem]] = {
    "gelu": lambda: (mlp(), torch.randn(64, 12), torch.randint(5, (64,))),
    "tanh": lambda: (mlp(nn.Tanh), torch.randn(64, 12), torch.randint(5, (64,))),
    "transformer": lambda: (Classifier(), torch.randint(11, (8, 6)), torch.randint(11, (8, 6))),
}


def build(name: str, trained: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    model, x, y = NETS[name]()
    if trained:
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(80):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x, y


def per_sample(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none").flatten(1).mean(1) if out.dim() > 2 else F.cross_entropy(out, y, reduction="none")


def hessian(model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(n, n) by torch.func."""
    names, tensors = zip(*((name, p.detach()) for name, p in model.named_parameters()))
    shapes = [t.shape for t in tensors]

    def loss(flat: Tensor) -> Tensor:
        pieces = [t.view(shape) for t, shape in zip(flat.split([s.numel() for s in shapes]), shapes)]
        return loss_fn(torch.func.functional_call(model, dict(zip(names, pieces)), (x,)), y)

    return torch.func.hessian(loss)(torch.cat([t.flatten() for t in tensors]))


@pytest.mark.parametrize("trained", [False, True], ids=["start", "trained"])
@pytest.mark.parametrize("net", NETS)
def test_sigma_auto_in_float32_against_double_backward_in_float64(net: str, trained: bool) -> None:
    """With the same probes: 1 % for differences of gradients, 3 % for differences of losses."""
    exact = gg.hessian_trace(*(lambda m, x, y: (m, F.cross_entropy, x, y))(*build(net, trained, F64)), method="hvp", probes=24)
    model, x, y = build(net, trained)
    for method, loss_fn, tolerance in (("two_point_grad", F.cross_entropy, 0.01), ("two_point", F.cross_entropy, 0.03), ("two_point", per_sample, 0.03)):
        est = gg.hessian_trace(model, loss_fn, x, y, method=method, probes=24)
        assert abs(est.mean / exact.mean - 1) <= tolerance, (method, est)
        assert not est.warnings and est.sigma is not None and est.at_2_sigma is not None and est.reason.startswith("auto: rounding")
        assert abs(est.at_2_sigma / est.mean - 1) < 4 * tolerance
        assert abs(est.stderr / exact.stderr - 1) < 3 * tolerance


@pytest.mark.parametrize("method", METHODS)
def test_traces_of_parameters_and_samples(method: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(7, 4, dtype=F64), torch.randint(3, (7,))
    diagonal = hessian(model, F.cross_entropy, x, y).diagonal()
    est = gg.hessian_trace(model, per_sample if method == "two_point" else F.cross_entropy, x, y, method=method, probes=900, distribution="normal")
    assert abs(est.mean - diagonal.sum()) < 3.5 * est.stderr + 1e-9
    if method == "two_point":
        assert est.by_param is None and est.by_sample is not None and est.by_sample_stderr is not None
        exact = torch.stack([hessian(model, F.cross_entropy, x[i : i + 1], y[i : i + 1]).trace() for i in range(7)])
        assert ((est.by_sample - exact).abs() < 3.5 * est.by_sample_stderr).all()
        assert est.mean == pytest.approx(float(est.by_sample.mean()))
        total = gg.hessian_trace(model, per_sample, x, y, probes=900, distribution="normal", reduction="sum", sigma=est.sigma)
        assert total.mean == pytest.approx(7 * est.mean) and torch.equal(total.by_sample, est.by_sample)
    else:
        assert est.by_sample is None and est.by_param is not None and est.by_param_stderr is not None
        start = 0
        for name, p in model.named_parameters():
            block = float(diagonal[start : (start := start + p.numel())].sum())
            assert abs(est.by_param[name] - block) < 3.5 * est.by_param_stderr[name] + 1e-9
        assert est.mean == pytest.approx(sum(est.by_param.values()))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(24, 3))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), lambda: torch.randn(16, 6)),
        (cnn, lambda: torch.randn(8, 2, 6, 6)),
        (lambda: Transformer(width=4), lambda: torch.randint(11, (8, 4))),
    ],
    ids=["mlp", "cnn", "transformer"],
)
def test_at_an_interpolating_solution_the_trace_is_the_mean_norm(model: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    net, inputs = model(), x()
    target = net(inputs).detach()
    exact = float(gg.output_sqnorms(net, inputs).mean())
    est = gg.hessian_trace(net, lambda out, y: (out - y).square().sum(1) / 2, inputs, target, rtol=0.007, max_probes=8000)
    assert est.mean == pytest.approx(exact, rel=0.02)
    assert gg.ggn_trace(net, "squared", inputs, target).mean == pytest.approx(exact, rel=1e-5)


def relu_net(dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    return mlp(nn.ReLU).to(dtype), torch.randn(64, 12).to(dtype), torch.randint(5, (64,))


@pytest.mark.parametrize("method", TWO_POINT)
def test_kinks_are_named_and_the_smoothed_trace_is_right(method: str) -> None:
    with pytest.warns(UserWarning, match="kinks .relu x2.: this is the trace of the loss smoothed over sigma"):
        est = gg.hessian_trace(relu_net()[0], F.cross_entropy, *relu_net()[1:], method=method)
    with pytest.warns(UserWarning, match="kinks"):
        exact = gg.hessian_trace(relu_net(F64)[0], F.cross_entropy, *relu_net(F64)[1:], method=method, sigma=est.sigma, probes=1000, seed=1)
    assert abs(est.mean - exact.mean) < 3 * math.hypot(est.stderr, exact.stderr)
    assert est.sigma is not None and est.sigma > 1e-3 and "kinks" in est.reason


@pytest.mark.parametrize("method", TWO_POINT)
def test_at_kinks_the_interval_holds_the_trace_of_the_gaussian_smoothed_loss(method: str) -> None:
    """Which is computed here in float64 from draws of torch's own: tr of the Hessian of ``E l(w + s xi)``, and ``2 (E l(w + s xi) - l(w)) / s^2``."""
    with pytest.warns(UserWarning, match="kinks .relu x2."):
        est = gg.hessian_trace(relu_net()[0], F.cross_entropy, *relu_net()[1:], method=method, distribution="normal")
    assert est.sigma is not None
    model, x, y = relu_net(F64)
    w = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    def draw(xi: dict[str, Tensor]) -> Tensor:
        plus, minus = ({name: w[name] + sign * est.sigma * xi[name] for name in w} for sign in (1, -1))
        if method == "two_point":
            return (loss(plus) + loss(minus) - 2 * loss(w)) / est.sigma**2
        above, below = torch.func.grad(loss)(plus), torch.func.grad(loss)(minus)
        return sum(((above[name] - below[name]) * xi[name]).sum() for name in w) / (2 * est.sigma)

    torch.manual_seed(1)
    draws = torch.cat([torch.func.vmap(draw)({name: torch.randn(250, *p.shape, dtype=F64) for name, p in w.items()}) for _ in range(20)])
    stderr = float(draws.std()) / math.sqrt(len(draws))
    assert stderr < est.stderr / 5
    assert est.interval[0] - 2 * stderr <= float(draws.mean()) <= est.interval[1] + 2 * stderr


def test_hidden_kinks_show_in_the_values() -> None:
    """An absolute value that no operation gives away."""
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(100)), torch.randn(40000, 100) / 10

    def loss() -> Tensor:
        z = x @ w
        return (z * z.sign()).mean()

    with pytest.warns(UserWarning, match="kinks .values at several scales say so"):
        est = gg.hessian_trace(loss, [w], method="two_point_grad", probes=16)
    smoothed = 2 * x.square().sum(1).mean() / math.sqrt(2 * math.pi) / w.detach().norm() * 10  # the density of z at 0, whose variance is |w|^2 / 100
    assert est.mean == pytest.approx(float(smoothed), rel=0.1)


def test_rounding_and_truncation_are_warned_of() -> None:
    model, x, y = build("gelu")
    with pytest.warns(UserWarning, match="rounding: about .* use method='two_point_grad', a larger sigma or float64"):
        gg.hessian_trace(model, F.cross_entropy, x, y, sigma=1e-5)
    with pytest.warns(UserWarning, match="rounding: about .* use a larger sigma or float64"):
        gg.hessian_trace(model, F.cross_entropy, x, y, sigma=1e-8, method="two_point_grad")
    w = nn.Parameter(torch.full((50,), 0.1, dtype=F64))
    with pytest.warns(UserWarning, match="truncation: at twice sigma = 1 the estimate moves by .* choose a smaller one"):
        est = gg.hessian_trace(lambda: w.pow(4).sum(), [w], sigma=1.0)
    assert est.mean - 50 * 12 * 0.01 == pytest.approx(50 * 2, rel=1e-6)  # sigma^2 times a twelfth of the fourth derivative
    assert est.at_2_sigma is not None and est.at_2_sigma - est.mean == pytest.approx(3 * 50 * 2, rel=1e-6)


# --- data, and nothing changed ---


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_is_the_mean_over_its_samples(method: str) -> None:
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh).double(), torch.randn(23, 12, dtype=F64), torch.randint(5, (23,))
    given: dict[str, Any] = {"sigma": 1e-3} if method in TWO_POINT else {}
    for shuffle in (False, True):
        loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=shuffle)
        for loss_fn in (F.cross_entropy, per_sample):
            batches = gg.hessian_trace(model, loss_fn, loader, method=method, probes=9, **given)
            whole = gg.hessian_trace(model, loss_fn, x, y, method=method, probes=9, **given)
            torch.testing.assert_close(batches.samples, whole.samples, rtol=1e-4, atol=1e-8)
            if batches.by_sample is not None and whole.by_sample is not None:
                torch.testing.assert_close(batches.by_sample.sort()[0], whole.by_sample.sort()[0], rtol=1e-3, atol=1e-6)
    total = gg.hessian_trace(model, nn.CrossEntropyLoss(reduction="sum"), loader, method=method, probes=9, reduction="sum", **given)
    assert total.mean == pytest.approx(23 * batches.mean, rel=1e-4)


class Stateful(nn.Module):
    """Running statistics, dropout, and a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.net(x)


@pytest.mark.parametrize("closure", [False, True], ids=["model", "closure"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_changed(method: str, closure: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Stateful(), torch.randn(16, 12), torch.randint(5, (16,))
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = [copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()]
    form = (lambda: F.cross_entropy(model(x), y), model.parameters()) if closure else (model, F.cross_entropy, x, y)
    first = gg.hessian_trace(*form, method=method, probes=8)
    form = (lambda: F.cross_entropy(model(x), y), model.parameters()) if closure else (model, F.cross_entropy, x, y)
    again = gg.hessian_trace(*form, method=method, probes=8)
    assert torch.equal(first.samples, again.samples) and first.sigma == again.sigma  # dropout's masks, too
    after = [model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state()]
    for a, b in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(after)):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_may_give_parameters_other_memory(method: str) -> None:
    h = symmetric(30)
    loss, w = quadratic(h)
    before, expected = w.detach().clone(), gg.hessian_trace(loss, [w], method=method, probes=6)

    def moved() -> Tensor:
        w.data = w.data.clone()
        return loss()

    assert torch.equal(gg.hessian_trace(moved, [w], method=method, probes=6).samples, expected.samples)
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_return_when_the_loss_raises(method: str) -> None:
    model, x, y = build("gelu")
    before, calls = [p.detach().clone() for p in model.parameters()], 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > (0 if method in ("hvp", "hutch++") else 9):
            raise ZeroDivisionError
        return F.cross_entropy(model(x), y)

    with pytest.raises(ZeroDivisionError):
        gg.hessian_trace(loss, model, method=method)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_frozen_and_unused_parameters() -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), torch.randn(9, 12, dtype=F64), torch.randint(5, (9,))
    model[0].requires_grad_(False)
    extra = nn.Parameter(torch.ones(3, dtype=F64))
    est = gg.hessian_trace(lambda: F.cross_entropy(model(x), y), {**dict(model.named_parameters()), "extra": extra}, method="hvp", probes=300)
    assert est.by_param is not None and set(est.by_param) == {"2.weight", "2.bias", "4.weight", "4.bias", "extra"} and est.by_param["extra"] == 0
    only = gg.hessian_trace(model, F.cross_entropy, x, y, params=[model[4].bias], method="hvp", probes=300)
    assert only.mean == pytest.approx(est.by_param["4.bias"], abs=3 * only.stderr + 3 * est.by_param_stderr["4.bias"])  # type: ignore[index]
    linear = gg.hessian_trace(lambda: extra.sum(), [extra], method="hvp", probes=3)
    assert linear.mean == 0


def test_compiled_closures() -> None:
    model, x, y = build("gelu")
    compiled = torch.compile(model, backend="aot_eager")
    for method in TWO_POINT:
        est = gg.hessian_trace(lambda: F.cross_entropy(compiled(x), y), model.parameters(), method=method, probes=6, sigma=2e-3)
        plain = gg.hessian_trace(lambda: F.cross_entropy(model(x), y), model, method=method, probes=6, sigma=2e-3)
        torch.testing.assert_close(est.samples, plain.samples, rtol=0.05, atol=0.05)


class Once(torch.autograd.Function):
    """An operation without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


def test_without_double_backward() -> None:
    w = nn.Parameter(torch.linspace(0, 1, 20, dtype=F64))
    exact = float(-w.detach().sin().sum())
    for method in TWO_POINT:
        assert gg.hessian_trace(lambda: Once.apply(w).sum(), [w], method=method).mean == pytest.approx(exact, rel=1e-4)
    for method in ("hvp", "hutch++"):
        with pytest.raises(gg.UnsupportedUseError, match="no second derivative .* use method='two_point_grad', .* or 'two_point'"):
            gg.hessian_trace(lambda: Once.apply(w).sum(), [w], method=method)
    with pytest.raises(gg.UnsupportedUseError, match="no second derivative"):
        gg.top_eigenvalue(lambda: Once.apply(w).sum(), [w])
    assert float(gg.top_eigenvalue(lambda: Once.apply(w).sum(), [w], method="two_point_grad")) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        blind = gg.hessian_trace(lambda: torch.from_numpy(np.sin(w.detach().numpy())).sum(), [w])  # not even a first derivative
    assert blind.mean == pytest.approx(exact, rel=1e-4)


def test_half_precision() -> None:
    """Coarse, but not silently: within its interval, or warned of."""
    model, x, y = build("gelu", dtype=torch.bfloat16)
    exact = gg.hessian_trace(copy.deepcopy(model).double(), F.cross_entropy, x.double(), y, method="hvp")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        est = gg.hessian_trace(model, per_sample, x, y, method="two_point_grad")
    assert est.warnings or abs(est.mean / exact.mean - 1) < 0.2


def _sharded(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 5, dtype=F64, generator=generator), torch.randn(9, 5, dtype=F64, generator=generator)
    plain, sharded, inputs = nn.Parameter(w.clone()), nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])), distribute_tensor(x, mesh, [Replicate()])

    def of_shards() -> Tensor:
        return (inputs @ sharded.T).sin().sum().full_tensor()  # type: ignore[attr-defined]

    for method in METHODS[:3]:
        whole = gg.hessian_trace(lambda: (x @ plain.T).sin().sum(), [plain], method=method, probes=6)
        parts = gg.hessian_trace(of_shards, [sharded], method=method, probes=6)
        torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-4, atol=1e-4)
    with pytest.raises(gg.UnsupportedUseError, match="sharded parameters cannot be kept; hessian_trace's other methods work"):
        gg.hessian_trace(of_shards, [sharded], method="hutch++", probes=6)
    dist.destroy_process_group()


def test_sharded_parameters(tmp_path: Path) -> None:
    mp.spawn(_sharded, (str(tmp_path / "store"),), 2)


def test_printing() -> None:
    loss, w = quadratic(symmetric(10))
    est = gg.hessian_trace(loss, [w], sigma=0.1)
    assert str(est).startswith(f"{est.mean:.6g} ± {est.stderr:.2g} (95 %: ") and "64 probes" in str(est) and float(est) == est.mean
    assert est.cost == pytest.approx((2 + 9 + 9 + 129 + 17) / 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "lanczos"}, ValueError, "method must be one of 'two_point', .* got 'lanczos'"),
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"probes": 5, "method": "hutch++"}, ValueError, "probes must be at least 6 .*, got 5"),
        ({"rtol": 0.0}, ValueError, "rtol must be positive, or None .*, got 0.0"),
        ({"rtol": 0.1, "max_probes": 10}, ValueError, "max_probes must be at least probes, 64, got 10"),
        ({"sigma": 0.0}, ValueError, "sigma must be a positive number or 'auto', got 0.0"),
        ({"sigma": -1.0}, ValueError, "sigma must be a positive number or 'auto', got -1.0"),
        ({"sigma": math.nan}, ValueError, "sigma must be a positive number or 'auto', got nan"),
        ({"sigma": "big"}, ValueError, "sigma must be a positive number or 'auto', got 'big'"),
        ({"sigma": 0.1, "method": "hvp"}, ValueError, "sigma has no meaning for method='hvp'.* leave it out"),
        ({"distribution": "uniform"}, ValueError, "distribution must be 'rademacher' or 'normal', .* got 'uniform'"),
        ({"seed": -1}, ValueError, "seed must be in .0, 2.32., .* got -1"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    loss, w = quadratic(symmetric(5))
    with pytest.raises(error, match=match):
        gg.hessian_trace(loss, [w], **change)


def test_losses_and_parameters_that_do_not_do() -> None:
    w = nn.Parameter(torch.ones(3))
    model, x, y = build("gelu")
    for loss, error, match in (
        (lambda: w[:, None], ValueError, "must be a real scalar, or a vector of one loss per sample, got a torch.float32 tensor of shape .3, 1."),
        (lambda: 1.0, ValueError, "must be a real scalar, .* got float"),
        (lambda: (w * math.nan).sum(), ValueError, "the loss must be finite at the parameters, got nan"),
        (lambda: torch.from_numpy(np.random.default_rng().normal(size=1))[0] + w.sum(), ValueError, "differs between two evaluations .* function of the param"),
    ):
        with pytest.raises(error, match=match):
            gg.hessian_trace(loss, [w])
    with pytest.raises(ValueError, match="must be finite, and is not at w ± sigma xi of probe 0 with sigma = 2: choose a smaller one"):
        gg.hessian_trace(lambda: w.log().sum(), [w], sigma=2.0)
    with pytest.raises(ValueError, match="does not depend on the parameters in a way that autograd can follow"):
        gg.hessian_trace(lambda: w.detach().sum(), [w], method="hvp")
    for params, error, match in (
        ([torch.ones(3)], ValueError, "at least one parameter that requires grad, got none: call requires_grad_"),
        ([], ValueError, "at least one parameter that requires grad, got none"),
        (w, TypeError, "got a tensor: put it in a list"),
        (3, TypeError, "must be a model, a mapping or an iterable of parameters, got int"),
        ([1.0], TypeError, "params must be tensors, got a float"),
        ([w, w], ValueError, "are the same tensor"),
    ):
        with pytest.raises(error, match=match):
            gg.hessian_trace(lambda: w.sum(), params)
    for args, error, match in (
        ((model,), TypeError, "got 0 arguments after the model"),
        ((model, F.cross_entropy), TypeError, "got 1 arguments after the model"),
        ((model, F.cross_entropy, x), TypeError, "give the model's inputs and then the target"),
        ((model, F.cross_entropy, 3), TypeError, "must be a loader, .* got int"),
        ((model, F.cross_entropy, iter([(x, y)])), TypeError, "iterable more than once, .* put its batches in a list"),
        ((model, F.cross_entropy, []), ValueError, "the loader gave no batches"),
        ((model, F.cross_entropy, [x]), TypeError, "batches must be .inputs ..., target., got Tensor"),
        ((model, nn.CrossEntropyLoss(reduction="sum"), x, y), ValueError, "loss_fn has reduction='sum', but reduction='mean' was given"),
        ((model, lambda out, y: out[:3, 0], x, y), ValueError, "a scalar or one loss per sample, .64,., got shape .3,."),
        ((lambda: w.sum(),), TypeError, "give a closure and its parameters"),
        ((lambda: w.sum(), [w], x), TypeError, "give a closure and its parameters"),
    ):
        with pytest.raises(error, match=match):
            gg.hessian_trace(*args)
    shuffled = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    class Restless(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            self.append(self.pop(0))
            return super().__iter__()

    with pytest.raises(ValueError, match="gives its samples in another order each time"):
        gg.hessian_trace(model, per_sample, Restless(shuffled), rtol=1e-3, sigma=2e-3)


# --- Gauss-Newton and Fisher ---


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(B, K, n)."""
    names, tensors = zip(*((name, p.detach()) for name, p in model.named_parameters()))
    one = torch.func.jacrev(lambda ps, x: torch.func.functional_call(model, dict(zip(names, ps)), (x[None],)).flatten())
    return torch.cat([j.flatten(2) for j in torch.func.vmap(one, (None, 0))(tensors, x)], 2)


@pytest.mark.parametrize(
    ("loss_fn", "curvature"),
    [
        (F.cross_entropy, lambda z, y: torch.diag_embed(z.softmax(1)) - z.softmax(1)[:, :, None] * z.softmax(1)[:, None]),
        ("cross_entropy", lambda z, y: torch.diag_embed(z.softmax(1)) - z.softmax(1)[:, :, None] * z.softmax(1)[:, None]),
        (per_sample, lambda z, y: torch.diag_embed(z.softmax(1)) - z.softmax(1)[:, :, None] * z.softmax(1)[:, None]),
        ("squared", lambda z, y: torch.eye(5, dtype=F64).expand(9, 5, 5)),
        (lambda z, y: z.cos().sum(1).mean(), lambda z, y: torch.diag_embed(-z.cos())),  # not convex
        (lambda z, y: z.sum(), lambda z, y: torch.zeros(9, 5, 5, dtype=F64)),
        (lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, 6, dtype=F64), reduction="none"), None),
    ],
    ids=["cross-entropy", "named", "per sample", "squared", "cosine", "linear", "weighted"],
)
def test_gauss_newton_traces_against_jacobians(loss_fn: Any, curvature: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).double(), torch.randn(9, 4, dtype=F64), torch.randint(5, (9,))
    j, z = jacobian(model, x), model(x).detach()
    inner = curvature(z, y) if curvature is not None else torch.func.vmap(torch.func.hessian(lambda z, y: loss_fn(z[None], y[None])[0]))(z, y)
    diagonal = torch.einsum("bkn,bkl,bln->bn", j, inner, j)
    got = gg.ggn_trace(model, loss_fn, x, y)
    torch.testing.assert_close(got.by_sample, diagonal.sum(1), rtol=1e-10, atol=1e-12)
    assert got.mean == pytest.approx(float(diagonal.sum(1).mean()), rel=1e-10, abs=1e-12) and got.stderr == 0
    start = 0
    for name, p in model.named_parameters():
        assert got.by_param[name] == pytest.approx(float(diagonal[:, start : (start := start + p.numel())].sum() / 9), rel=1e-10, abs=1e-12)
    batches = gg.ggn_trace(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert batches.mean == pytest.approx(got.mean, rel=1e-10, abs=1e-12)


def test_gauss_newton_of_sequences_and_of_mean_squares() -> None:
    model, x, y = build("transformer", dtype=F64)
    y[0, :2] = -100  # ignored positions
    exact = gg.ggn_trace(model, lambda z, t: F.cross_entropy(z, t), x, y)  # by the loss's own second derivative
    assert gg.ggn_trace(model, F.cross_entropy, x, y).mean == pytest.approx(exact.mean, rel=1e-9)
    last = nn.Sequential(model, nn.Flatten(0, 0))
    last.forward = lambda x: model(x).movedim(1, 2)  # type: ignore[method-assign]
    assert gg.ggn_trace(last, "cross_entropy", x, y).mean == pytest.approx(exact.mean, rel=1e-9)
    for seed in range(2):
        drawn = gg.fisher_trace(model, F.cross_entropy, x, y, num_samples=300, seed=seed)
        assert abs(drawn.mean - exact.mean) < 3.5 * drawn.stderr and drawn.stderr < 0.1 * exact.mean
    model, x, _ = build("gelu", dtype=F64)
    y = torch.randn(64, 5, dtype=F64)
    squares = gg.ggn_trace(model, nn.MSELoss(), x, y)
    assert squares.mean == pytest.approx(float(2 / 5 * gg.output_sqnorms(model, x).mean()), rel=1e-9)
    drawn = gg.fisher_trace(model, F.mse_loss, x, y, num_samples=300)
    assert abs(drawn.mean - squares.mean) < 3.5 * drawn.stderr
    assert gg.fisher_trace(model, F.mse_loss, x, y, num_samples=None).mean == squares.mean
    assert math.isnan(gg.fisher_trace(model, F.mse_loss, x, y).stderr)
    total = gg.ggn_trace(model, nn.MSELoss(reduction="sum"), x, y, reduction="sum")
    assert total.mean == pytest.approx(64 * 5 * squares.mean, rel=1e-9)


def test_gauss_newton_is_the_hessian_for_models_linear_in_their_parameters() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 4).double(), torch.randn(20, 6, dtype=F64), torch.randint(4, (20,))
    assert gg.ggn_trace(model, F.cross_entropy, x, y).mean == pytest.approx(float(hessian(model, F.cross_entropy, x, y).trace()), rel=1e-10)


def test_arguments_of_gauss_newton() -> None:
    model, x, y = build("gelu")
    for args, options, error, match in (
        ((model, "hinge", x, y), {}, ValueError, "must be a function, 'cross_entropy' or 'squared', got 'hinge'"),
        ((model, "squared", x, y), {"num_samples": 0}, ValueError, "num_samples must be at least 1, or None .* got 0"),
        ((model, "squared", x, y), {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ((model, "squared", x), {}, TypeError, "inputs and then the target"),
        ((model, F.cross_entropy, x, y[:5]), {}, ValueError, "class indices, one for each position .* got torch.int64 .5,."),
        ((model, per_sample, x, y), {"num_samples": 2}, ValueError, "labels can be drawn for .* num_samples=None is exact"),
        (
            (lambda x: {"logits": model(x)}, "squared", x, y),
            {"params": model.parameters()},
            TypeError,
            "must return a tensor with the 64 samples first, got dict",
        ),
        ((nn.Linear(12, 2000), per_sample, x, y), {}, gg.UnsupportedUseError, "2000 outputs per sample, too many .* 'cross_entropy' or 'squared'"),
    ):
        with pytest.raises(error, match=match):
            gg.ggn_trace(*args, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss_fn must be a likelihood, .* ggn_trace takes any"):
        gg.fisher_trace(model, per_sample, x, y)


# --- eigenvalues ---


@pytest.mark.parametrize("form", ["batch", "loader", "differences"])
def test_eigenvalues_of_the_hessian(form: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double(), torch.randn(12, 6, dtype=F64), torch.randint(3, (12,))
    h = hessian(model, F.cross_entropy, x, y)
    exact = torch.linalg.eigvalsh(h)
    data = ([(x[:5], y[:5]), (x[5:], y[5:])],) if form == "loader" else (x, y)
    method = "two_point_grad" if form == "differences" else "hvp"
    top = gg.top_eigenvalue(model, F.cross_entropy, *data, k=3, method=method)
    torch.testing.assert_close(top.values, exact.flip(0)[:3], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(top.residuals, (top.vectors @ h - top.values[:, None] * top.vectors).norm(dim=1), rtol=0.1, atol=1e-5)
    assert (top.residuals < 1e-3 * top.values[0]).all() and float(top) == float(top.values[0]) and 10 < top.products < 200
    smallest = gg.top_eigenvalue(model, F.cross_entropy, *data, which="SA", method=method)
    assert float(smallest) == pytest.approx(float(exact[0]), rel=1e-4)
    largest = gg.top_eigenvalue(lambda: -F.cross_entropy(model(x), y), model, which="LM", method=method)
    assert float(largest) == pytest.approx(float(-exact[-1]), rel=1e-4)


def test_eigenvalues_of_the_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)).double(), torch.randn(12, 6, dtype=F64), torch.randint(3, (12,))
    j, p = jacobian(model, x), model(x).softmax(1).detach()
    matrix = torch.einsum("bkn,bkl,blm->nm", j, torch.diag_embed(p) - p[:, :, None] * p[:, None], j) / 12
    for data in ((x, y), ([(x[:5], y[:5]), (x[5:], y[5:])],)):
        top = gg.top_eigenvalue(model, F.cross_entropy, *data, k=2, curvature="ggn")
        torch.testing.assert_close(top.values, torch.linalg.eigvalsh(matrix).flip(0)[:2], rtol=1e-6, atol=0)
    attention, index, target = build("transformer", dtype=F64)
    top = gg.top_eigenvalue(attention, F.cross_entropy, index, target, curvature="ggn")
    assert 0 < float(top) < gg.ggn_trace(attention, F.cross_entropy, index, target).mean


def test_eigenvalues_in_few_dimensions_and_arguments() -> None:
    h = symmetric(6)
    loss, w = quadratic(h)
    torch.testing.assert_close(gg.top_eigenvalue(loss, [w], k=6).values, torch.linalg.eigvalsh(h).flip(0), rtol=1e-9, atol=1e-9)
    for change, error, match in (
        ({"k": 0}, ValueError, "k must be in .1, 6., the number of elements of the parameters, got 0"),
        ({"k": 7}, ValueError, "k must be in .1, 6., .* got 7"),
        ({"which": "top"}, ValueError, "which must be 'LA', 'LM' or 'SA', got 'top'"),
        ({"curvature": "fisher"}, ValueError, "curvature must be 'hessian' or 'ggn', got 'fisher'"),
        ({"curvature": "ggn"}, ValueError, "curvature='ggn' needs method='hvp', a model and data"),
        ({"method": "two_point"}, ValueError, "method must be 'hvp' or 'two_point_grad', got 'two_point'"),
        ({"sigma": 0.1}, ValueError, "sigma has no meaning for method='hvp'"),
        ({"tol": -1.0}, ValueError, "tol must be finite and not negative, got -1.0"),
        ({"max_products": 0}, ValueError, "max_products must be positive, got 0"),
    ):
        with pytest.raises(error, match=match):
            gg.top_eigenvalue(loss, [w], **change)  # type: ignore[arg-type]
    many, v = quadratic(torch.diag(torch.linspace(0, 1, 400, dtype=F64)))
    with pytest.raises(gg.GhostgradError, match="no convergence to tol=1.0e-12 in .* products, .* raise max_products or tol"):
        gg.top_eigenvalue(many, [v], k=3, tol=1e-12, max_products=20)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    loss, w = quadratic(symmetric(5))
    gg.hessian_trace(loss, [w], sigma=0.1, probes=8, progress=True)
    assert "pass" in capsys.readouterr().err
