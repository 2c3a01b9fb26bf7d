"""The regimes of SGD's noise: the shortened perceptron against plain SGD, its mean-field formulas against sampling, the phase diagram's network, resume."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from ghostgrad.papers.images import ImageDataError
from ghostgrad.papers.noise_regimes import Fit, Perceptron, PhaseDiagram, ScaledNet, fit_perceptron, growth, hinge, signed_samples
from ghostgrad.training import train

# --------------------------------------------------------------------------------------------------------------------------------------- perceptron


def test_samples_have_their_density() -> None:
    z = signed_samples(1, 4000, 5, np.random.default_rng(0)) * math.sqrt(5)
    assert kstest(z[:, 0], "rayleigh").pvalue > 0.01  # |x| exp(-x^2 / 2)
    assert kstest(z[:, 1:].ravel(), "norm").pvalue > 0.01


def test_skipping_idle_steps_leaves_sgd_as_it_is() -> None:
    """The law of (steps, mistakes, w_1) at the end, against SGD that takes every step on autograd's gradient of the hinge loss."""
    z, lr, batch, alpha, runs = signed_samples(1, 16, 3, np.random.default_rng(1)), 0.3, 3, 4.0, 150
    x = torch.from_numpy(z)
    plain, short = [], []
    for run in range(runs):
        rng = np.random.default_rng([2, run])
        w, steps, mistakes = torch.zeros(3, dtype=torch.float64, requires_grad=True), 0, 0
        while (x @ w < 1 / alpha).any():
            index = rng.integers(16, size=batch)
            mistakes += int((x[index] @ w < 1 / alpha).sum())
            (grad,) = torch.autograd.grad(hinge(x[index] @ w, torch.ones(batch, dtype=torch.float64), alpha), w)
            w, steps = (w - lr * grad).detach().requires_grad_(), steps + 1
        plain.append((steps, mistakes, w[0].item()))
        fit = Fit(np.zeros(3))
        fit_perceptron(z, lr, batch, alpha, np.random.default_rng([3, run]), 0, fit, lambda: None)
        assert (z @ fit.w >= 1 / alpha).all()
        short.append((fit.steps, fit.mistakes, float(fit.w[0])))
    for ours, theirs in zip(np.array(short).T, np.array(plain).T, strict=True):
        stderr = math.sqrt((ours.var() + theirs.var()) / runs)
        assert abs(ours.mean() - theirs.mean()) < 4 * stderr
        assert stderr < 0.2 * theirs.mean()


@pytest.mark.parametrize("chi", [0, 1, 3])
def test_moments_of_the_unfitted(chi: int) -> None:
    """``E g = c``, ``E |x_perp|^2 = d + chi`` and ``E |x_1| = r c (1 + chi) / (2 + chi)`` where ``|x_1| < r g``, by sampling at a small r."""
    r, dim, rng = 0.02, 6, np.random.default_rng(chi)
    x_1 = 0.1 * rng.random(2_000_000) ** (1 / (1 + chi))  # of density |x_1|^chi up to 5 r
    perp = rng.standard_normal((2_000_000, dim - 1))
    unfitted = x_1 < r * perp[:, 0]
    assert perp[:, 0].max() < 6  # beyond which the cut at 5 r would count; g > 5 has probability 3e-7
    assert perp[unfitted, 0].mean() == pytest.approx(growth(chi), rel=0.02)
    assert np.square(perp[unfitted]).sum(1).mean() == pytest.approx(dim + chi, rel=0.02)
    assert x_1[unfitted].mean() == pytest.approx(r * growth(chi) * (1 + chi) / (2 + chi), rel=0.02)


TINY = Perceptron(dim=8, sizes_0=(64, 128), sizes_1=(64, 128), sizes_3=(64, 128), num_seeds=2)


def test_a_tiny_perceptron_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Perceptron, "LARGE", (4096, 8))
    monkeypatch.setattr(Perceptron, "BATCHES", 20_000)
    outcome = train(TINY, tmp_path, progress=False)
    frame = outcome.metrics
    assert len(outcome.verdicts) == len(TINY.claims())
    assert (frame[[f"fitted_norms_{part}" for part in Perceptron.PARTS]] == 0).all(axis=None)  # fitted samples carry no noise
    for part in Perceptron.PARTS[:2]:
        np.testing.assert_allclose(frame[f"variance_{part}"], frame[f"variance_{part}_predicted"], rtol=0.15)
    assert frame["signal_t"].between(0.9, 1.1).all()
    assert (tmp_path / "figures" / "sgd-noise-perceptron.png").exists()


def test_perceptron_rules() -> None:
    with pytest.raises(ValueError, match=r"sizes_1 must be two different numbers or more, each at least 4 dim = 256, got \(100, 1000\)"):
        Perceptron(sizes_1=(100, 1000))


# ------------------------------------------------------------------------------------------------------------------------------------- phase diagram

SMALL = PhaseDiagram(hidden=8, depth=2, train_size=64, kernel_images=6, num_seeds=1, max_steps=24)


def test_scaled_network() -> None:
    model, x = ScaledNet(5, 7, 2, seed=3), torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b, c = (p.detach().numpy() for p in model.parameters())
    hidden = np.maximum(np.maximum(x.numpy() @ a.T, 0) * math.sqrt(2 / 5) @ b.T, 0) * math.sqrt(2 / 7)
    np.testing.assert_allclose(model(x).detach(), (hidden @ c.T)[:, 0] / math.sqrt(7))


def test_training_ends_where_all_are_fitted_and_has_no_scale_but_the_weights() -> None:
    """Far above the margin and far from the weights' own size, twice the temperature is twice the change, in as many steps."""
    data = SMALL.images(0, torch.device("cpu"))
    assert set(data.train_y.tolist()) == {1.0, -1.0}
    x, y, changes, steps = data.train_x[:64], data.train_y[:64], [], []
    for temperature in (1e-7, 2e-7):
        model = ScaledNet(64, 8, 2, seed=1)
        before, start = [p.detach().clone() for p in model.parameters()], model(x).detach()
        steps.append(PhaseDiagram(max_steps=4000).train(model, x, y, 1e12, temperature, 0, lambda: None))
        assert (1e12 * y * (model(x) - start) >= 1).all()
        changes.append(torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before, strict=True)]))
    assert 0 < steps[0] == steps[1] < 4000
    assert ((changes[1] - 2 * changes[0]).norm() / changes[1].norm()).item() < 1e-3


def test_powers_are_read_off() -> None:
    rows = [
        {"size": p, "temperature": t, "change": 3 * t * p**0.4, "time": t * p**1.3, "drift": 0.1 * t**0.8 * p**0.4}
        for p in (100, 200, 400)
        for t in (2.0**-9, 2.0**-6, 2.0**-4, 1.0)
    ]
    for row in rows:
        if row["temperature"] in (2.0**-9, 1.0):  # beyond where powers are fitted
            row["change"] = row["time"] = row["drift"] = 7.0
    powers = PhaseDiagram()._powers(rows, 3)
    assert powers == pytest.approx({"change_t": 1.0, "change_p": 0.4, "time_t": 1.0, "time_p": 1.3, "drift_t": 0.8, "critical_p": -0.5})


def test_a_tiny_phase_diagram_runs(tmp_path: Path) -> None:
    outcome = train(SMALL, tmp_path, progress=False)
    frame = outcome.metrics
    assert len(outcome.verdicts) == len(SMALL.claims())
    lazy = frame[frame["arm"] == PhaseDiagram.LAZY]
    assert sorted(lazy["size"].unique()) == [16, 32, 64]
    cold = lazy[(lazy["temperature"] == lazy["temperature"].min()) & (lazy["size"] == 64)]
    assert (cold["drift"] == cold["drift_cold"]).all()
    data = SMALL.images(0, torch.device("cpu"))  # the drift of one cell, from gradients one by one
    model, kernels = ScaledNet(64, 8, 2, seed=0), []
    for stage in range(2):
        if stage:
            SMALL.train(model, data.train_x, data.train_y, 1.0, 0.25, 0, lambda: None)
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(model(x[None]).sum(), list(model.parameters()))]) for x in data.train_x[:6]]
        kernels.append(torch.stack(grads) @ torch.stack(grads).T)
    row = frame[(frame["arm"] == "α = 1") & (frame["seed"] == 0) & (frame["temperature"] == 0.25)].iloc[0]
    assert row["drift"] == pytest.approx(((kernels[1] - kernels[0]).norm() / kernels[0].norm()).item())
    assert (tmp_path / "figures" / "sgd-noise-phase-diagram.png").exists()


def test_phase_diagram_of_no_images(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match="no such folder"):
        train(PhaseDiagram(data=str(tmp_path / "none")), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="train_size must be at least 4 batch = 64, got 10"):
        PhaseDiagram(train_size=10)
