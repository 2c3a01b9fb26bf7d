"""The regression settings: every closed form against brute force, the draws of sufficient statistics against data, tiny runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ghostgrad.papers.models import linear
from ghostgrad.papers.regression import (
    CollapseScaling,
    ModelCollapse,
    MoreIsBetter,
    best_share,
    eigenframework,
    exponent,
    generator,
    inherited,
    spectrum,
    tuned,
)
from ghostgrad.training import Clock, Setting, train

TINY: dict[str, Setting] = {
    "collapse": ModelCollapse(dim=12, samples=30, generator_samples=24, narrow_samples=6, ridge_samples=10, generations=3, replicas=3, num_seeds=2),
    "scaling": CollapseScaling(dim=12, first_samples=24, doublings=2, generations=2, replicas=2, num_seeds=2, fresh=5),
    "more": MoreIsBetter(samples=16, factor=2, modes=40, replicas=2, num_seeds=2),
}


def test_draws_have_addresses_of_their_own() -> None:
    addresses = [(1,), (1, 0), (1, 0, 0), (0, 1), (1, 1), (1, 0, 1)]
    assert len({generator(address).standard_normal() for address in addresses}) == len(addresses)
    assert generator((3, 1)).standard_normal() == generator((3, 1)).standard_normal()


# ------------------------------------------------------------------------------------------------------------------------------------ the equations


@pytest.mark.parametrize("k", [30.0, 50.0, 200.0, math.inf])
def test_the_equations_are_solved(k: float) -> None:
    eigenvalues = spectrum(300, 1.3)
    power = spectrum(300, 1.7)
    for ridge in (1e-6, 0.1, 30.0):
        risk = eigenframework(eigenvalues, power, 50, ridge, 0.2, k)
        z = (eigenvalues / (eigenvalues + risk.gamma)).sum()
        assert z + ridge / risk.kappa == pytest.approx(50)
        if math.isfinite(k):
            assert z + k * risk.kappa / risk.gamma == pytest.approx(k)
        else:
            assert risk.kappa == risk.gamma
        assert risk.kappa > 0


def test_squares_are_derivatives() -> None:
    """The bias is ``-kappa^2 d/dkappa v'(L_F + kappa)^-1 v``, with ``(gamma / kappa) / (l + gamma)`` for the inverse; here by a difference in kappa."""
    eigenvalues, power, n, k = spectrum(300, 1.3), spectrum(300, 1.7), 50, 80.0
    up, down, here = (eigenframework(eigenvalues, power, n, ridge, 0.2, k) for ridge in (1.001, 0.999, 1.0))

    def inverse(gamma: float, kappa: float) -> np.ndarray:
        return gamma / kappa / (eigenvalues + gamma)

    squared = -(inverse(up.gamma, up.kappa) - inverse(down.gamma, down.kappa)) / (up.kappa - down.kappa)
    traced = 300 - 2 * here.kappa * inverse(here.gamma, here.kappa).sum() + here.kappa**2 * squared.sum()
    assert here.test == pytest.approx((here.kappa**2 * (squared @ power) + 0.2) / (1 - traced / n), rel=1e-5)


def test_random_features_and_kernels_meet_their_risks() -> None:
    rng, m, n, noise, ridge = np.random.default_rng(0), 150, 60, 0.1, 0.3
    eigenvalues, power = spectrum(m, 1.2), spectrum(m, 1.4)
    for k in (45, 90, 0):
        tests, trains, kappas = [], [], []
        for _ in range(300):
            x = rng.standard_normal((n, m))
            y = x @ np.sqrt(power) + math.sqrt(noise) * rng.standard_normal(n)
            f = rng.standard_normal((k, m)) * np.sqrt(eigenvalues / k) if k else np.diag(np.sqrt(eigenvalues))
            inverse = np.linalg.inv(x @ f.T @ f @ x.T + ridge * np.eye(n))
            tests.append(((np.sqrt(power) - f.T @ f @ x.T @ inverse @ y) ** 2).sum() + noise)
            trains.append(((y - x @ f.T @ f @ x.T @ inverse @ y) ** 2).mean())
            kappas.append(1 / np.trace(inverse))
        risk = eigenframework(eigenvalues, power, n, ridge, noise, k or math.inf)
        for values, predicted in ((tests, risk.test), (trains, risk.train), (kappas, risk.kappa)):
            assert abs(np.mean(values) - predicted) < 4 * np.std(values) / math.sqrt(300) + 0.015 * predicted


def test_inherited_errors_are_averaged_out_by_the_ridge() -> None:
    rng, d, n, ridge = np.random.default_rng(1), 80, 60, 6.0
    eigenvalues = spectrum(d, 1.1)
    risk = eigenframework(eigenvalues, eigenvalues, n, ridge, 0.0)
    costs = []
    for _ in range(200):
        x = rng.standard_normal((n, d)) * np.sqrt(eigenvalues)
        a = np.linalg.solve(x.T @ x + ridge * np.eye(d), x.T @ x)
        costs.append((a**2 * eigenvalues[:, None] / eigenvalues).sum())
    assert np.mean(costs) == pytest.approx(inherited(eigenvalues, risk, n), rel=0.02)


def test_tuned_finds_the_minimum() -> None:
    assert tuned(lambda ridge: math.log(ridge / 0.37) ** 2, 1e-5, 1e4) == pytest.approx(0.37, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------------------------------- generations


def test_least_squares_and_its_gradients_in_closed_form() -> None:
    """Tiny sizes, where every term of the exact formulas counts, by numpy alone."""
    rng, d, t, t0, s, s0, n = np.random.default_rng(2), 3, 12, 11, 0.7, 0.4, 2
    eigenvalues = spectrum(d, 1.0)
    w0, errors, own, clean = rng.standard_normal(d), [], [], []
    for _ in range(6000):
        w = w0
        for size, noise in [(t0, s0)] * n + [(t, s)]:
            x = rng.standard_normal((size, d)) * np.sqrt(eigenvalues)
            y = x @ w + noise * rng.standard_normal(size)
            w = np.linalg.lstsq(x, y, rcond=None)[0]
        errors.append((w - w0) ** 2 @ eigenvalues)
        own.append(((y - x @ w) ** 2 * (x**2).sum(1)).mean())
        new = rng.standard_normal((20, d)) * np.sqrt(eigenvalues)
        clean.append(((new @ (w0 - w) + s * rng.standard_normal(20)) ** 2 * (new**2).sum(1)).mean())
    error = s**2 * d / (t - d - 1) + n * s0**2 * d / (t0 - d - 1)
    trace = eigenvalues.sum()
    for values, predicted in ((errors, error), (own, s**2 * trace * (t - d) / (t + 2)), (clean, trace * ((1 + 2 / d) * error + s**2))):
        assert abs(np.mean(values) - predicted) < 4 * np.std(values) / math.sqrt(6000)
        assert np.std(values) / math.sqrt(6000) < 0.02 * predicted
    setting = ModelCollapse(dim=12, samples=30, generator_samples=24, narrow_samples=6, replicas=1, noise=s, generator_noise=s0)
    row = setting.line(setting.truth(0), 0, Clock(), lambda: None)[2]
    assert row["error_predicted"] == pytest.approx(s**2 * 12 / 17 + 2 * s0**2 * 12 / 11)
    assert row["own_sqnorms_predicted"] == pytest.approx(s**2 * spectrum(12, 1.0).sum() * 18 / 32)
    assert row["clean_sqnorms_predicted"] == pytest.approx(spectrum(12, 1.0).sum() * (14 / 12 * row["error_predicted"] + s**2))


def test_minimum_norm_generations_in_closed_form() -> None:
    rng, d, t0, s0, n = np.random.default_rng(3), 7, 4, 0.5, 3
    w0, errors, kept = np.ones(d) / math.sqrt(d), [], []
    for _ in range(4000):
        w = w0
        for _ in range(n):
            x = rng.standard_normal((t0, d))
            w = np.linalg.pinv(x) @ (x @ w + s0 * rng.standard_normal(t0))
        errors.append(((w - w0) ** 2).sum())
        kept.append(w @ w0)
    setting = ModelCollapse(dim=12, narrow_samples=6, samples=30, generator_samples=24, generations=n, replicas=1)
    row = setting.narrow(setting.truth(0), 0, 0.5, Clock(), lambda: None)[-1]
    assert (row["error_predicted"], row["kept_predicted"]) == pytest.approx((0.875 + 0.25 * 6 / 5 * 0.875 / 0.5, 0.125))
    eta = t0 / d
    assert abs(np.mean(kept) - eta**n) < 4 * np.std(kept) / math.sqrt(4000)
    predicted = 1 - eta**n + s0**2 * t0 / (d - t0 - 1) * (1 - eta**n) / (1 - eta)
    assert abs(np.mean(errors) - predicted) < 4 * np.std(errors) / math.sqrt(4000)


def test_minimum_norm_fits_are_those_of_the_pseudoinverse() -> None:
    setting = TINY["collapse"]
    assert isinstance(setting, ModelCollapse)
    w = setting.truth(4)
    rows = replace(setting, replicas=1).narrow(w, 4, 0.3, Clock(), lambda: None)
    last, gains = w, []
    for m in range(3):
        x, y = setting.labelled((4, 0, m), 6, spectrum(12, 0.0), last, 0.3)
        last = torch.linalg.pinv(x) @ y
        gains.append(torch.linalg.pinv(x).square().sum().item())
        assert rows[m + 1]["error"] == pytest.approx((last - w).square().sum().item())
        assert rows[m + 1]["kept"] == pytest.approx((last @ w).item())
    assert rows[-1]["gain"] == pytest.approx(np.mean(gains))


def test_sufficient_statistics_are_those_of_data() -> None:
    """Ridge fits after a generation, with X'X and X'e drawn, and with X and e drawn."""
    setting = CollapseScaling(dim=8, first_samples=16, doublings=2, generations=1, excess=7, replicas=1500, noise=0.8, fresh=1)
    drawn = setting.size("clean ridge", 0, 16, torch.device("cpu"), Clock(), lambda: None)
    rng, eigenvalues = np.random.default_rng(4), spectrum(8, setting.beta)
    w0, errors = np.sqrt(spectrum(8, 1 + 2 * setting.source * setting.beta) / eigenvalues), []
    assert drawn["generator_samples"] == 16
    for _ in range(3000):
        x = rng.standard_normal((16, 8)) * np.sqrt(eigenvalues)
        w = np.linalg.lstsq(x, x @ w0 + 0.8 * rng.standard_normal(16), rcond=None)[0]
        x = rng.standard_normal((16, 8)) * np.sqrt(eigenvalues)
        w = np.linalg.solve(x.T @ x + 16 * drawn["ridge"] * np.eye(8), x.T @ (x @ w + 0.8 * rng.standard_normal(16)))
        errors.append((w - w0) ** 2 @ eigenvalues)
    stderr = np.std(errors) * math.sqrt(1 / 3000 + 1 / 1500)
    assert stderr < 0.04 * np.mean(errors)
    assert abs(drawn["error"] - np.mean(errors)) < 4 * stderr


@pytest.mark.parametrize(("beta", "source", "growth"), [(1.3, 0.5, 0.6), (1.5, 1.5, 0.3), (2.0, 0.3, 0.5)])
def test_powers_are_counted_right_in_other_spectra(beta: float, source: float, growth: float) -> None:
    setting = CollapseScaling(beta=beta, source=source, growth=growth)
    for arm in setting.ARMS:
        found = exponent(setting.LAW, [setting.predicted(arm, samples, setting.LAW_DIM) for samples in setting.LAW])
        assert found == pytest.approx(setting.law(arm), abs=0.08), arm


# ------------------------------------------------------------------------------------------------------------------------------------ more is better


def test_the_best_share_of_large_samples() -> None:
    assert best_share(2.0, 1.5, 0.0) == pytest.approx(0.5 / 1.5)
    assert best_share(1.5, 1.5, 0.0) == 0.0
    assert best_share(1.5, 2.0, 0.1) == 0.0
    setting = MoreIsBetter(samples=1000, modes=100_000, source=2.0)
    for relative in (1.0, 10.0):
        noise = setting.noise_of(relative)
        shares = np.linspace(0.01, 0.9, 90)
        found = shares[np.argmin([setting.risk(1000, math.inf, setting.ridge_of(share), noise).test for share in shares])]
        assert found == pytest.approx(best_share(1.5, 2.0, relative), abs=0.08)


def test_a_share_has_its_ridge() -> None:
    setting = MoreIsBetter(samples=50, modes=400)
    for share in (0.01, 0.5, 0.95):
        risk = setting.risk(50, math.inf, setting.ridge_of(share), 0.3)
        assert risk.train / risk.test == pytest.approx(share**2)


def test_fits_are_ridge_regressions() -> None:
    """On random features, against the normal equations of the head."""
    setting = TINY["more"]
    assert isinstance(setting, MoreIsBetter)
    x, y, target = setting.labelled(0, 0, 16, 0.1, torch.device("cpu"))
    f = torch.randn(10, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = torch.nn.Sequential(linear(f), linear(torch.zeros(1, 10, dtype=torch.float64)))
    rows = setting.fits(model, x, y, lambda dual: f.T @ (f @ (x.T @ dual)), target, 0.1, [0.5, 3.0], Clock())
    features = x @ f.T
    for row in rows:
        head = torch.linalg.solve(features.T @ features + row["ridge"] * torch.eye(10), features.T @ y)
        assert row["test"] == pytest.approx((target - f.T @ head).square().sum().item() + 0.1)
        assert row["train"] == pytest.approx((y - features @ head).square().mean().item())
        assert row["kappa"] == pytest.approx(1 / torch.linalg.inv(features @ features.T + row["ridge"] * torch.eye(16)).trace().item())
        assert row["fisher"] == pytest.approx(features.square().sum(1).mean().item())


# --------------------------------------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("key", TINY)
def test_tiny_runs(key: str, tmp_path: Path) -> None:
    setting = TINY[key]
    outcome = train(setting, tmp_path / "both", progress=False)
    name = setting.name.replace("/", "-")
    assert (tmp_path / "both" / "figures" / f"{name}.png").exists()
    assert len(outcome.verdicts) == len(setting.claims())
    measured = outcome.metrics[[c for c in outcome.metrics if c in ("error", "error_predicted", "test", "test_predicted", "train", "sqnorms")]]
    assert np.isfinite(measured.to_numpy()).all() and (measured >= 0).all(axis=None)
    alone = train(replace(setting, seed=1, num_seeds=1), tmp_path / "one", progress=False).metrics
    shared = outcome.metrics[outcome.metrics["seed"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="step"), shared.drop(columns="step"), check_exact=True)


@pytest.mark.parametrize(
    ("cls", "fields", "rule"),
    [
        (ModelCollapse, {"generator_samples": 301}, "generator_samples must be at least dim \\+ 6 = 306, got 301"),
        (ModelCollapse, {"narrow_samples": 299}, "narrow_samples must be between 1 and dim - 6 = 294"),
        (CollapseScaling, {"first_samples": 900}, "first_samples must be at least 2 dim = 1000"),
        (MoreIsBetter, {"factor": 6}, "factor must be a power of 2"),
        (ModelCollapse, {"noise": 1e300}, "noise must be between 1e-50 and 1e50, got 1e\\+300"),
        (CollapseScaling, {"beta": 1e300}, "beta must be above 1 and at most 10, got 1e\\+300"),
        (MoreIsBetter, {"decay": 1e300}, "decay must be above 1 and at most 10, got 1e\\+300"),
        (MoreIsBetter, {"source": 4.5}, "source must be between 1 and 2 decay \\+ 1 = 4"),
    ],
)
def test_rules(cls: type[Setting], fields: dict[str, float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        cls(**fields)  # type: ignore[arg-type]
