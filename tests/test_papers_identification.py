"""Over-parametrised ARX models: regressors and covariances against brute force, the null space without noise, the library's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ghostgrad.papers.identification import ARX, regressors, simulate, state_space
from ghostgrad.training import Clock, train

TINY = ARX(longest=1024, most=256, repeats=30, num_seeds=3)


def test_simulation_regressors_and_state_space_are_the_equation() -> None:
    u, w = np.random.default_rng(0).standard_normal((2, 3, 30))
    y = simulate(u, w)
    expected = np.zeros((3, 30))
    for t in range(30):
        past = [(expected[:, t - k] if t >= k else 0.0, u[:, t - k] if t >= k else 0.0) for k in (1, 2)]
        expected[:, t] = 1.2 * past[0][0] - 0.5 * past[1][0] + past[0][1] + 0.4 * past[1][1] + w[:, t]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    phi = regressors(y, u, 4)
    assert phi.shape == (3, 26, 8)
    np.testing.assert_array_equal(phi[1, 7], [*y[1, [10, 9, 8, 7]], *u[1, [10, 9, 8, 7]]])  # t = 11
    f, _, theta = state_space(4, 0.3)
    np.testing.assert_allclose(phi @ theta + w[:, 4:], y[:, 4:], atol=1e-12)
    driven = np.zeros((3, 25, 8))
    driven[..., 0], driven[..., 4] = w[:, 4:-1], u[:, 4:-1]
    np.testing.assert_allclose(phi[:, 1:], phi[:, :-1] @ f.T + driven, atol=1e-12)


@pytest.mark.parametrize("arm", ARX.ARMS)
def test_covariances_are_those_of_the_data(arm: str) -> None:
    setting = ARX(longest=4096, most=4096)
    phi, y = setting.data(arm, 1, 0, 40)
    steps = setting.length if arm == "many trajectories" else 1
    assert phi.shape == (40, 4096 * steps, 8) and y.shape == phi.shape[:2]
    empirical = np.einsum("rti,rtj->ij", phi, phi) / (40 * 4096)
    gamma = setting.covariance(arm)
    assert np.linalg.norm(empirical - gamma) < 0.02 * np.linalg.norm(gamma)
    residual = y - phi @ state_space(4, 0.5)[2]
    assert residual.std() == pytest.approx(0.0 if arm == "no noise" else 0.5, rel=0.01, abs=1e-12)


@pytest.mark.parametrize("arm", ARX.ARMS)
def test_rows_are_least_squares_one_by_one(arm: str) -> None:
    """Of smallest norm, by an SVD of each regression."""
    rows = TINY.work(arm, 2, Clock(), lambda: None)
    theta, many = state_space(4, 0.5)[2], arm == "many trajectories"
    assert [row["samples"] for row in rows] == ([128, 256] if many else [512, 1024])
    data = [TINY.data(arm, 2, block, 15) for block in (0, 1)]
    for row in rows:
        n = int(row["samples"]) * (16 if many else 1)
        fits = [np.linalg.lstsq(x[:n], y[:n], rcond=1e-8)[0] for phi, out in data for x, y in zip(phi, out, strict=True)]
        squares = ((np.array(fits) - theta) ** 2).mean(0)
        assert row["error"] == pytest.approx(np.sqrt(squares.sum()), rel=1e-6)
        assert row["scaled"] == pytest.approx(row["samples"] * squares.sum(), rel=1e-6)
        assert row["superfluous"] == pytest.approx(row["samples"] * squares[[2, 3, 6, 7]].sum(), rel=1e-6)
    slope = np.log(rows[1]["error"] / rows[0]["error"]) / np.log(2)
    assert rows[0]["rate"] == pytest.approx(slope, abs=1e-9)


def test_without_noise_what_is_lost_is_the_part_in_the_relations_that_the_equation_makes() -> None:
    """The null space of Gamma written out: the equation at t - 1 and at t - 2."""
    relations = np.zeros((2, 8))
    for k in (0, 1):
        relations[k, [k, k + 1, k + 2]] = 1, -1.2, 0.5
        relations[k, [4 + k + 1, 4 + k + 2]] = -1.0, -0.4
    theta = state_space(4, 0.5)[2]
    np.testing.assert_allclose(TINY.covariance("no noise") @ relations.T, 0.0, atol=1e-12)
    part = relations.T @ np.linalg.solve(relations @ relations.T, relations @ theta)
    rows = TINY.work("no noise", 0, Clock(), lambda: None)
    for row in rows:
        assert row["error"] == pytest.approx(np.linalg.norm(part))
        assert row["limit"] == pytest.approx(row["samples"] * (part**2).sum())
    assert np.linalg.norm(part) > 0.5


def test_the_librarys_numbers_are_those_of_the_regressors() -> None:
    phi, y = TINY.data("one trajectory", 0, 0, 1)
    fit = np.linalg.lstsq(phi[0], y[0], rcond=None)[0]
    numbers = TINY.measure(fit, phi[0], y[0], Clock())
    squares = (phi[0] ** 2).sum(1)
    assert numbers["sqnorm"] == pytest.approx(((y[0] - phi[0] @ fit) ** 2 * squares).mean())
    assert numbers["fisher"] == pytest.approx(squares.mean())
    assert numbers["smallest"] == pytest.approx(np.linalg.eigvalsh(phi[0].T @ phi[0] / 1024)[0])


def test_a_run(tmp_path: Path) -> None:
    outcome = train(TINY, tmp_path, progress=False)
    frame = outcome.metrics
    assert len(frame) == 3 * 3 * 2
    assert np.isfinite(frame.drop(columns="arm").to_numpy()).all()
    assert len(outcome.verdicts) == len(TINY.claims())
    assert (tmp_path / "figures" / "identification-arx.svg").stat().st_size > 10_000
    alone = TINY.start(torch.device("cpu"), False).work("many trajectories", 1, Clock(), lambda: None)[-1]
    row = frame[(frame["arm"] == "many trajectories") & (frame["seed"] == 1)].iloc[-1]
    assert all(row[column] == value for column, value in alone.items())


@pytest.mark.parametrize(("field", "value"), [("order", 2), ("noise", 0.0), ("longest", 512), ("length", 12), ("repeats", 1)])
def test_rules(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"identification/arx: {field} must be"):
        ARX(**{field: value})  # type: ignore[arg-type]
