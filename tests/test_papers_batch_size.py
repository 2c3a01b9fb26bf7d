"""The batch-size settings: steps and fits against brute force, ghost batches one by one, random matrices against their formulas, exact resume."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ghostgrad as gg
from ghostgrad.papers.batch_size import BatchHessian, GhostBatchNorm, TrainLonger, _Data, deviation, growth, spiked_wigner
from ghostgrad.papers.images import ImageDataError
from ghostgrad.training import Clock, train
from resume import killed_and_whole

TINY = TrainLonger(num_seeds=1, small=64, large=256, ratio=4, epochs=4, width=8, draws=20)

# -------------------------------------------------------------------------------------------------------------------------------------- train longer


@pytest.mark.parametrize(("size", "replacement"), [(2, True), (2, False), (3, False)])
def test_the_variance_of_a_step_by_enumeration(size: int, replacement: bool) -> None:
    """All ordered draws of B of 5 samples, each as likely, their gradients by autograd one sample at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    g = torch.stack([torch.cat([p.flatten() for p in torch.autograd.grad(cross_entropy(model(x[i]), y[i]), list(model.parameters()))]) for i in range(5)])
    draws = itertools.product(range(5), repeat=size) if replacement else itertools.permutations(range(5), size)
    steps = torch.stack([-0.3 * g[list(draw)].mean(0) for draw in draws])
    wanted = (steps - steps.mean(0)).square().sum(1).mean().item()
    scale = gg.NoiseScale.from_norms(gg.sqnorms(model, cross_entropy, x, y), g.mean(0).square().sum())
    assert scale.step_covariance_trace(0.3, size, replacement) == pytest.approx(wanted, rel=1e-12)


def test_ghost_batch_norm_normalises_each_piece_by_its_own_statistics() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 2
    norm = GhostBatchNorm(3, 4).double()
    out = norm(x)
    for piece, found in zip(x.split(4), out.split(4), strict=True):
        torch.testing.assert_close(found, (piece - piece.mean(0)) / (piece.var(0, correction=0) + 1e-5).sqrt())
    whole = nn.BatchNorm1d(3).double()
    torch.testing.assert_close(GhostBatchNorm(3, 12).double()(x), whole(x))
    norm.eval()
    torch.testing.assert_close(norm(x), (x - norm.norm.running_mean) / (norm.norm.running_var + 1e-5).sqrt())  # type: ignore[operator]


def test_growth_tells_a_logarithm_from_a_power() -> None:
    t = np.geomspace(1, 1000, 30)
    logarithm, power, _ = growth(t, 0.5 + 2 * np.log(t))
    assert logarithm == pytest.approx(1)
    assert power < 0.99
    logarithm, power, exponent = growth(t, 0.7 * t**0.4)
    assert power == pytest.approx(1)
    assert exponent == pytest.approx(0.4)
    assert logarithm < 0.95


def test_regimes_take_the_updates_and_rates_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """64 and 256 of 1078: 16 and 4 updates an epoch."""
    seen = []
    whole = TrainLonger.descend

    def descend(self: TrainLonger, seed: int, data: object, model: nn.Module, size: int, lr: float, updates: int, *rest: object) -> None:
        pieces = {m.size for m in model.modules() if isinstance(m, GhostBatchNorm)}
        seen.append((size, lr, updates, pieces))
        whole(self, seed, data, model, size, lr, updates, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainLonger, "descend", descend)
    outcome = train(TINY, tmp_path, progress=False)
    assert seen[0] == (64, 0.05, 32, set())  # the network whose steps are drawn
    assert seen[1:] == [
        (64, 0.05, 64, {64}),
        (256, 0.05, 16, {256}),
        (256, 0.1, 16, {256}),
        (256, 0.1, 16, {64}),
        (256, 0.1, 64, {64}),
        (256, 0.05, 64, {256}),
    ]
    frame = outcome.metrics
    assert len(frame["arm"].unique()) == 7
    steps = frame[frame["arm"] == "steps"].iloc[0]
    for kind, size in itertools.product(("with", "without"), (64, 256)):
        assert 0.5 < steps[f"{kind}_{size}"] / steps[f"{kind}_predicted_{size}"] < 2
    assert steps["with_predicted_64"] == pytest.approx(4 * steps["with_predicted_256"])
    assert steps["without_predicted_256"] == pytest.approx(steps["with_predicted_256"] * (1078 - 256) / 1077)
    assert {v.word for v in outcome.verdicts if v.claim.arm == "steps"} == {"not testable at this size"}, "one seed decides no closed form"
    assert all(p.exists() for p in (tmp_path / "figures" / f"batch-size-train-longer.{kind}" for kind in ("png", "svg")))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("large", 500, "small=32 times a power of ratio=2"), ("ratio", 1, "at least 2"), ("epochs", 3, "at least 4"), ("lr", 0.0, "positive and finite")],
)
def test_train_longer_rules(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got {value}"):
        TrainLonger(**{field: value})  # type: ignore[arg-type]


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ImageDataError, match=r"digits: the large batch is to have 2048 images, there are 1078 to train on\. Give a smaller --large"):
        TrainLonger(large=2048).start(torch.device("cpu"), False)


# ------------------------------------------------------------------------------------------------------------------------------------ batch Hessian

SMALL = BatchHessian(num_seeds=1, ratio=4, largest=64, width=3, epochs=1, draws=3, probes=2, steps=5, halvings=3, wigner_size=30, wigner_draws=2)


@pytest.mark.parametrize("spike", [0.4, 0.9, 1.1, 1.6, 2.5])
def test_a_spike_in_a_random_matrix(spike: float) -> None:
    """800 rows by a dense solver. The spectrum's end is short of its limit by the mean of the Tracy-Widom law, 1.2 / (2 P^(2/3)) = 0.7 %."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((800, 800))
    matrix = (noise + noise.T) / np.sqrt(2 * 800)
    matrix[0, 0] += spike
    assert np.linalg.eigvalsh(matrix)[-1] == pytest.approx(spiked_wigner(spike, 2.0), rel=0.025)
    assert spiked_wigner(3 * spike, 6.0) == pytest.approx(3 * spiked_wigner(spike, 2.0))


def test_wigner_learning_rates_never_rise_faster_than_the_root_of_b() -> None:
    b = np.geomspace(0.01, 1000, 500)
    rates = np.array([2 / spiked_wigner(1.0, 2 / np.sqrt(one)) for one in b])
    slopes = np.diff(np.log(rates)) / np.diff(np.log(b))
    assert slopes.max() < 0.5 + 1e-9
    assert slopes[0] == pytest.approx(0.5)
    assert slopes[-1] < 0.01


def tiny(n: int) -> tuple[nn.Module, _Data, torch.Tensor]:
    """A network of 17 parameters, n samples, and their Hessians (n, 17, 17) by autograd, one at a time."""
    torch.manual_seed(1)
    data = _Data(torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 3, torch.empty(0, 3), torch.empty(0), 3)
    model = BatchHessian(width=2).network(0, data)
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: torch.Tensor, i: int) -> torch.Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        named = dict(zip(dict(model.named_parameters()), pieces, strict=True))
        return cross_entropy(torch.func.functional_call(model, named, (data.x[i : i + 1],)), data.y[i : i + 1])

    return model, data, torch.stack([torch.autograd.functional.hessian(lambda f, i=i: loss(f, i), flat) for i in range(n)])  # type: ignore[arg-type]


def test_the_point_measures_what_the_samples_hessians_say() -> None:
    """Every moment against the samples' Hessians; the second-order coefficient against all pairs of samples."""
    model, data, hessians = tiny(7)
    setting = BatchHessian(width=2, directions=17, probes=300)
    point = setting.point("start", 0, data, Clock(), lambda: None)
    mean = hessians.mean(0)
    values, vectors = torch.linalg.eigh(mean)
    assert point.eigenvalue == pytest.approx(values[-1].item())
    assert point.elements == pytest.approx((hessians - mean).square().sum().item() / 7 / 17, rel=0.25)  # 300 probes
    total, along = deviation(model, data.x, data.y, vectors[:, -1], vectors.T)
    scatter = (hessians - mean) @ vectors[:, -1]  # (7, 17)
    assert total == pytest.approx(scatter.square().sum().item() / 7)
    torch.testing.assert_close(along, (scatter @ vectors).square().mean(0))

    second = []
    for pair in itertools.combinations(range(7), 2):
        noise = vectors.T @ (hessians[list(pair)].mean(0) - mean) @ vectors[:, -1]
        second.append((noise[:-1].square() / (values[-1] - values[:-1])).sum().item())
    b = 2 * (7 - 1) / (7 - 2)
    assert point.second_order / b == pytest.approx(np.mean(second))
    for index in ([0, 3], [1, 2, 5]):
        wanted = point.vector @ hessians[index].mean(0) @ point.vector
        assert setting.along(point, data.x[index], data.y[index]) == pytest.approx(wanted.item())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_largest_rate_trains_and_a_larger_one_does_not(kind: type[torch.optim.Optimizer]) -> None:
    setting = BatchHessian(width=4, steps=20, halvings=6)
    data = setting.load(0, torch.device("cpu"))
    point = setting.point("start", 0, data, Clock(), lambda: None)
    rate = setting.largest_rate(point, 0, 64, kind, lambda: None)

    def ends(lr: float) -> float:
        model = setting.network(0, data)
        setting.descend(model, data, 0, 64, kind(model.parameters(), lr=lr), 20, lambda: None)  # type: ignore[call-arg]
        return cross_entropy(model(data.x), data.y).item()

    assert ends(np.exp(rate)) < point.loss <= ends(np.exp(rate) * 2 ** (16 / 2**6))


def test_a_run_of_the_batch_hessian(tmp_path: Path) -> None:
    outcome = train(SMALL, tmp_path, progress=False)
    frame = outcome.metrics.set_index("arm")
    assert len(frame) == 5 + 2 * 4
    one = frame.loc["start, B = 1"]
    assert (frame.loc[[f"{point}, B = {size}" for point in SMALL.POINTS for size in SMALL.sizes], "excess"] > -1e-9).all()
    assert one["log_product"] == pytest.approx(np.log(one["lr"] * one["eigenvalue"] / 2))
    assert one["wishart"] == pytest.approx(one["trace"])  # of one sample: everything
    assert np.isnan(frame.loc["trained, B = 1", "lr"])
    many = frame.loc["start, B = 64"]
    assert many["second_order"] < many["full"], "above the threshold"
    assert many["wigner_along"] == pytest.approx(many["full"] + many["second_order"])
    (row,) = SMALL.start(torch.device("cpu"), False).work("trained, B = 64", 0, Clock(), lambda: None)  # as a resumed run does
    pd.testing.assert_series_equal(pd.Series(row), frame.loc["trained, B = 64"].drop(["step", "seed"]).astype(float), check_names=False, rtol=0, atol=0)
    assert all(p.exists() for p in (tmp_path / "figures" / f"batch-size-batch-hessian.{kind}" for kind in ("png", "svg")))


@pytest.mark.parametrize(("field", "value", "rule"), [("largest", 100, "ratio=2 to the power of 3 or more"), ("directions", 1, "at least 2")])
def test_batch_hessian_rules(field: str, value: int, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got {value}"):
        BatchHessian(**{field: value})  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------------------------------------- resume

RUNS = {
    "batch-size/train-longer": "--small 64 --large 256 --ratio 4 --epochs 4 --width 8 --draws 5 --num-seeds 3",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    killed_and_whole(name, RUNS[name], tmp_path)
