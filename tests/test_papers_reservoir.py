"""The reservoir that forecasts Kuramoto-Sivashinsky: the simulator's order, the regulariser against automatic differentiation, each arm's minimum."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ghostgrad.papers.reservoir import LMNT, STD, UNRELATED, KStep, Reservoir, features, regulariser
from ghostgrad.papers.simulators import KuramotoSivashinsky
from ghostgrad.training import Clock, train

TINY = LMNT(nodes=16, train=150, k=3, weight=1e-4, tests=2, sync=20, climate=40, draws=20_000, num_seeds=1)


@pytest.fixture(scope="module")
def attractor() -> np.ndarray:
    """Twenty fields (20, 64), long after their start."""
    u = np.random.default_rng(0).standard_normal((20, 64))
    return KuramotoSivashinsky().trajectory(u - u.mean(1, keepdims=True), 800)[-1]


def test_the_simulator_is_of_fourth_order_and_a_step_is_near_many_fine_ones(attractor: np.ndarray) -> None:
    def after(steps: int, time: float = 1.0) -> np.ndarray:
        return KuramotoSivashinsky(step=time / steps).trajectory(attractor[:4], steps)[-1]

    fine = after(4096)
    errors = [float(np.abs(after(steps) - fine).max()) for steps in (128, 256, 512)]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert ((orders > 3.7) & (orders < 4.3)).all(), (errors, orders)
    assert np.abs(after(1, 0.25) - after(512, 0.25)).max() < 2e-3


def test_the_simulator_keeps_the_mean_grows_small_waves_as_the_linear_part_says_and_has_the_known_deviation(attractor: np.ndarray) -> None:
    simulator = KuramotoSivashinsky()
    x = np.arange(64) * 22 / 64
    for wave in (1, 2, 3, 5):
        k = 2 * math.pi * wave / 22
        u = 1e-7 * np.cos(k * x)
        np.testing.assert_allclose(simulator(u), math.exp(0.25 * (k**2 - k**4)) * u, atol=1e-12)
    path = simulator.trajectory(attractor, 2000)
    assert np.abs(path.mean(-1)).max() < 1e-10
    assert path.std() == pytest.approx(STD, rel=0.01)
    unrelated = np.sqrt(((path[:, 0] - path[:, 1]) ** 2).mean(-1)).mean() / STD
    assert unrelated == pytest.approx(UNRELATED, rel=0.05)


def test_a_reservoir_is_as_described_and_the_module_is_its_step() -> None:
    reservoir = Reservoir(60, 7, np.random.default_rng(1))
    assert np.abs(np.linalg.eigvals(reservoir.a.toarray())).max() == pytest.approx(0.6)
    assert reservoir.a.nnz / 60 == pytest.approx(3.0, abs=0.8)
    u = np.random.default_rng(2).standard_normal((5, 7, 3))
    r = reservoir.drive(u)
    b = np.zeros((60, 7))
    b[np.arange(60), reservoir.input] = reservoir.weight
    expected = np.tanh(reservoir.a.toarray() @ r[3] + b @ u[4] + reservoir.bias[:, None])
    np.testing.assert_allclose(r[4], expected, rtol=1e-13)
    out = KStep(reservoir)(torch.zeros(3, 60, dtype=torch.float64), torch.from_numpy(u.transpose(2, 0, 1).copy()))
    np.testing.assert_allclose(out.numpy().T, features(r[-1], u[-1]), rtol=1e-13)


def test_the_regulariser_is_the_mean_of_the_jacobians_products() -> None:
    """``M_m`` of every time by automatic differentiation through the whole drive, one by one."""
    k, times = 3, 7
    reservoir = Reservoir(11, 4, np.random.default_rng(3))
    u = np.random.default_rng(4).standard_normal((times, 4))
    r = reservoir.drive(u[:, :, None])[:, :, 0].T
    by_lag, norms = regulariser(reservoir, np.ascontiguousarray(r), k)
    step = KStep(reservoir)

    def s(inputs: torch.Tensor) -> torch.Tensor:  # (t, Q) -> (S,), from rest
        return step(torch.zeros(1, 11, dtype=torch.float64), inputs[None])[0]

    expected, squares = np.zeros_like(by_lag), []
    for t in range(k - 1, times):
        jacobian = torch.autograd.functional.jacobian(s, torch.from_numpy(u[: t + 1])).numpy()  # (S, t + 1, Q)
        squares.append((jacobian[:, -k:] ** 2).sum())
        for lag in range(k):
            m = jacobian[:, t - lag]
            expected[lag] += m @ m.T / (times - k + 1)
    np.testing.assert_allclose(by_lag, expected, atol=1e-13)
    np.testing.assert_allclose(norms, squares, rtol=1e-12)


def test_each_arm_minimises_its_loss() -> None:
    here = TINY.prepare(3)
    s, y = torch.from_numpy(features(here.r[:, 500:], here.u[:, 500:])), torch.from_numpy(here.y)
    assert s.shape == (1 + 32 + 64, 150) and y.shape == (64, 150)
    lags = torch.from_numpy(here.by_lag)
    zero = torch.from_numpy(regulariser(here.reservoir, np.zeros((16, 3)), 3)[0].sum(0))
    ridges = {
        "none": (0.0, lags.sum(0)),
        "Tikhonov": (1.0, 1e-6 * torch.eye(len(s), dtype=torch.float64)),
        "Jacobian": (1.0, 10**-5.4 * lags[0] + 10**-8.5 * torch.eye(len(s), dtype=torch.float64)),
        "LMNT": (1e-4, lags.sum(0)),
        "zero-input LMNT": (1e-4, zero),
    }
    for arm, (weight, matrix) in ridges.items():
        w = torch.from_numpy(TINY.fit(arm, 3, here)).requires_grad_()
        loss = (w @ s - y).square().sum() / 150 + weight * (w @ matrix @ w.T).trace()
        (gradient,) = torch.autograd.grad(loss, w)
        assert gradient.abs().max().item() < 1e-8, arm


def test_the_ridge_is_what_noise_moves_the_features_by() -> None:
    """``E ds ds' = v R`` for noise in all inputs, which 12 steps back are forgotten: the mean over 40 noisy drives."""
    setting = dataclasses.replace(TINY, k=12)
    here = setting.prepare(5)
    clean, moved = features(here.r[:, 511:], here.u[:, 511:]), np.zeros((97, 97))
    for seed in range(40):
        u = here.u + 1e-3 * np.random.default_rng(seed).standard_normal(here.u.shape)
        difference = features(setting.states(here.reservoir, u)[:, 511:], u[:, 511:]) - clean
        moved += difference @ difference.T / difference.shape[1] / 40
    ridge = 1e-6 * here.by_lag.sum(0)
    assert np.linalg.norm(moved - ridge) < 0.15 * np.linalg.norm(ridge)
    assert np.trace(moved) == pytest.approx(np.trace(ridge), rel=0.01)


def test_gain_by_noise_is_the_form_of_the_regulariser() -> None:
    here = TINY.prepare(4)
    w = np.random.default_rng(0).standard_normal((64, 97))
    assert TINY.gain(w, 4, here) == pytest.approx(np.trace(w @ here.by_lag.sum(0) @ w.T), rel=0.02)


def test_measures_of_a_forecast_one_by_one() -> None:
    setting = dataclasses.replace(TINY, nodes=48, train=1500, weight=1e-6, climate=4)  # so small a reservoir is soon wrong
    here = setting.prepare(6)
    w = setting.fit("LMNT", 6, here)
    row = setting.measure(w, 6, here, Clock(), lambda: None)
    simulator, times, errors = KuramotoSivashinsky(), [], []
    for test in range(2):
        r = np.zeros((48, 1))
        for t in range(20):
            u = here.tests[t, :, test : test + 1]
            r = here.reservoir.step(r, u)
        valid, steps = None, []
        for t in range(4):
            forecast = w @ features(r, u)
            steps.append(math.sqrt(float(((forecast[:, 0] - simulator(STD * u[:, 0]) / STD) ** 2).mean())))
            u = forecast
            if valid is None and math.sqrt(float(((u[:, 0] - here.tests[20 + t, :, test]) ** 2).mean())) > 0.2 * UNRELATED:
                valid = t
            r = here.reservoir.step(r, u)
        times.append(4 if valid is None else valid)
        errors.append(math.log10(np.mean(steps)))
    assert row["valid_time"] == pytest.approx(np.mean(times) * 0.25 * 0.048)
    assert 0 < np.mean(times) < 4 and max(errors) < 0
    assert row["log10_map_error"] == pytest.approx(np.mean(errors), abs=1e-6)
    assert row["trace_mismatch"] < 1e-10
    assert row["predicted"] == pytest.approx(np.trace(w @ here.by_lag.sum(0) @ w.T))
    jacobian = [np.trace(w @ regulariser(here.reservoir, here.r[:, t : t + 1], 1)[0][0] @ w.T) for t in 500 + np.linspace(0, 1499, 100).astype(int)]
    assert row["jacobian"] == pytest.approx(np.mean(jacobian))
    gone = dataclasses.replace(setting, climate=200)
    row = gone.measure(gone.fit("none", 6, here), 6, here, Clock(), lambda: None)
    assert row["log10_map_error"] == 0.0 and row["stable"] == 0.0 and row["variance"] > 100


def test_a_run_has_a_row_for_each_cell_that_does_not_depend_on_the_others(tmp_path: Path) -> None:
    setting = dataclasses.replace(TINY, num_seeds=2, draws=50)
    outcome = train(setting, tmp_path, progress=False)
    frame = outcome.metrics
    assert list(zip(frame["seed"], frame["arm"], strict=True)) == [(seed, arm) for seed in (0, 1) for arm in LMNT.ARMS]
    assert np.isfinite(frame.drop(columns="arm").to_numpy()).all()
    assert len(outcome.verdicts) == len(setting.claims())
    assert (tmp_path / "figures" / "dynamics-lmnt.svg").stat().st_size > 10_000
    alone = setting.start(torch.device("cpu"), False).work("noise", 1, Clock(), lambda: None)[0]
    row = frame[(frame["arm"] == "noise") & (frame["seed"] == 1)].iloc[0]
    assert all(row[column] == value for column, value in alone.items())


@pytest.mark.parametrize(("field", "value"), [("nodes", 4), ("weight", 0.0), ("k", 0), ("sync", 1)])
def test_rules(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"dynamics/lmnt: {field} must be"):
        LMNT(**{field: value})  # type: ignore[arg-type]
