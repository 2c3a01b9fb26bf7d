"""The linear-regime settings: every formula against brute force, simulation or explicit gradient descent, and small runs to their verdicts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from ghostgrad.papers.linear_regime import (
    BenignOverfitting,
    GeneralisationDynamics,
    LinearRegime,
    ReLUStudent,
    effective_ranks,
    largest_eigenvalue,
    marchenko_pastur,
    ridgeless,
    split_index,
    tangent_flow,
)
from ghostgrad.training import Clock, Setting, train

F64, CPU = torch.float64, torch.device("cpu")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------------------------------------------------------ benign overfitting


def test_effective_ranks_by_hand() -> None:
    spectrum = torch.tensor([8.0, 4.0, 1.0, 1.0, 1.0, 1.0], dtype=F64)
    assert effective_ranks(spectrum, 0) == pytest.approx((16 / 8, 16**2 / (64 + 16 + 4)))
    assert effective_ranks(spectrum, 2) == pytest.approx((4.0, 4.0))
    for n, b in ((1, 1.0), (1, 2.0), (2, 2.0), (3, 2.0)):
        brute = [k for k in range(6) if effective_ranks(spectrum, k)[0] >= b * n]
        assert split_index(spectrum, n, b) == (brute[0] if brute else None)


def test_the_limit_is_the_known_one_for_equal_eigenvalues() -> None:
    """``kappa = l (d - n) / n``, variance ``n / (d - n)``, bias ``l (1 - n/d) ||theta||^2``."""
    theta = _random(300)
    kappa, bias, variance = ridgeless(torch.full((300,), 0.7, dtype=F64), theta, 100)
    assert kappa == pytest.approx(0.7 * 2)
    assert variance == pytest.approx(0.5)
    assert bias == pytest.approx(0.7 * 2 / 3 * theta.square().sum().item())


@pytest.mark.parametrize("arm", BenignOverfitting.BENIGN + BenignOverfitting.HARMFUL)
def test_bias_and_variance_by_pseudoinverse(arm: str) -> None:
    setting = BenignOverfitting(sigma=0.7, draws=400)
    row = setting.measure(arm, 20, 3, CPU, Clock())
    spectrum, theta, x, _ = setting.problem(arm, 20, 3, CPU)
    inverse = torch.linalg.pinv(x)
    variance = 0.7**2 * (spectrum[:, None] * inverse.square()).sum().item()
    bias = (spectrum * (theta - inverse @ (x @ theta)).square()).sum().item()
    assert row["noise_predicted"] == pytest.approx(variance, rel=1e-8)
    assert row["excess_predicted"] == pytest.approx(bias + variance, rel=1e-8)
    assert row["noise"] == pytest.approx(variance, rel=0.12)  # 400 draws of about 10 to 20 degrees of freedom
    assert row["misfit"] < 1e-10
    assert spectrum[0] == spectrum.max()


def test_the_derived_constants_apply_to_the_spectra_they_are_claimed_for() -> None:
    """They were derived for ``k* <= n/4`` and ``df2 <= n/2``."""
    setting = BenignOverfitting()
    for n in (30, 50, 400):
        for arm in (*setting.BENIGN, "few"):
            spectrum = setting.spectrum(arm, n)
            k, variance = split_index(spectrum, n), ridgeless(spectrum, torch.zeros_like(spectrum), n)[2]
            assert k is not None and k <= n / 4
            assert variance <= 1  # q / (1 - q) at q = 1/2
            assert 9 / 121 <= variance / (k / n + n / effective_ranks(spectrum, k)[1]) <= 8
        assert (split_index(setting.spectrum("power", n), n) or n) >= n


def test_descent_from_zero_finds_the_least_norm() -> None:
    setting = BenignOverfitting(largest=160)
    assert setting.descent("few", 0, CPU, Clock(), lambda: None) < 1e-10


# ----------------------------------------------------------------------------------------------------------------------------------- linear regime


@pytest.mark.parametrize("features", [3, 12])
def test_tangent_flow_is_descent_on_a_linear_model(features: int) -> None:
    """3 features for 6 samples: the Gram matrix is singular."""
    x, test, y, w = _random(6, features), _random(4, features, seed=1), _random(6, 2, seed=2), _random(features, 2, seed=3)
    before, rate = test @ w, 0.02
    added, left = tangent_flow(x @ x.T, test @ x.T, x @ w - y, rate, 300)
    for _ in range(300):
        w = w - rate * x.T @ (x @ w - y)
    torch.testing.assert_close(before + added, test @ w)
    torch.testing.assert_close(left, x @ w - y)


def _linearised_gap(setting: LinearRegime, arm: str, scale: int, seed: int) -> float:
    """Both networks trained parameter by parameter, with torch's Jacobians."""
    model = setting.network(arm, scale, seed)
    x, y, test = setting.points(seed)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def jacobian(params: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        return torch.cat([j.flatten(1) for j in jacrev(lambda p: functional_call(model, p, (at,))[:, 0])(params).values()], 1)

    j, j_test = jacobian(start, x), jacobian(start, test)
    lr = 0.5 / torch.linalg.eigvalsh(j @ j.T / setting.samples)[-1].item()
    moved, params = torch.zeros(j.shape[1], dtype=F64), start
    for _ in range(setting.steps):
        moved = moved - lr / setting.samples * j.T @ (j @ moved - y[:, 0])
        residual = functional_call(model, params, (x,)) - functional_call(model, start, (x,)) - y
        flat = -lr / setting.samples * jacobian(params, x).T @ residual[:, 0]
        pieces = flat.split([p.numel() for p in params.values()])
        params = {name: p + piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
    change = (functional_call(model, params, (test,)) - functional_call(model, start, (test,)))[:, 0]
    return ((change - j_test @ moved).norm() / (j_test @ moved).norm()).item()


@pytest.mark.parametrize("arm", LinearRegime.ARMS)
def test_gap_against_the_linearised_network_trained_explicitly(arm: str) -> None:
    setting = LinearRegime(samples=5, dim=3, tests=7, steps=12)
    scale = 4 if arm == "scaled" else 24
    row = setting.measure(setting.network(arm, scale, 2), scale, 2, CPU, Clock(), lambda: None)
    assert row["gap"] == pytest.approx(_linearised_gap(setting, arm, scale, 2), rel=1e-4)  # the step comes from an iteration that ends at 1e-4
    assert row["trace_mismatch"] < 1e-12


def test_a_network_of_large_scale_is_its_tangent() -> None:
    setting = LinearRegime(steps=30)
    row = setting.measure(setting.network("scaled", 10**6, 0), 10**6, 0, CPU, Clock(), lambda: None)
    assert row["gap"] < 1e-5 and row["kernel_drift"] < 1e-5
    for k in (1, 2, 3):
        assert row[f"speed_{k}"] == pytest.approx(row[f"speed_{k}_predicted"], rel=1e-4)


# -------------------------------------------------------------------------------------------------------------------------- generalisation dynamics


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_marchenko_pastur_moments_and_a_random_matrix(alpha: float) -> None:
    assert marchenko_pastur(alpha, np.ones_like) == pytest.approx(1)
    assert marchenko_pastur(alpha, lambda v: v) == pytest.approx(alpha)
    assert marchenko_pastur(alpha, np.square) == pytest.approx(alpha + alpha**2)
    x = np.random.default_rng(0).standard_normal((400, int(400 * alpha))) / 20
    assert marchenko_pastur(alpha, lambda v: np.exp(-2 * v)) == pytest.approx(np.exp(-2 * np.linalg.eigvalsh(x @ x.T)).mean(), rel=0.02)


def test_largest_eigenvalue_of_random_matrices() -> None:
    draws = [np.linalg.norm(np.random.default_rng(k).standard_normal((40, 60)), 2) ** 2 for k in range(400)]
    assert largest_eigenvalue(40, 60) == pytest.approx(np.mean(draws), abs=3.5 * np.std(draws) / 20)


@pytest.mark.parametrize("arm", [*GeneralisationDynamics.ALPHAS, GeneralisationDynamics.LARGE])
def test_error_and_norms_over_time_against_many_students(arm: str) -> None:
    """2000 students: where one eigenvalue makes the error, its mean over them has a standard error of 3 %."""
    setting = GeneralisationDynamics(weights=8, tasks=2000, time=10.0)
    rows = setting.work(CPU)(arm, 1, Clock(), lambda: None)
    assert [row["time"] for row in rows] == pytest.approx([0.1 * k for k in setting.readings])
    for row in rows:
        assert row["error"] == pytest.approx(row["error_predicted"], rel=0.12)
        assert row["sqnorms"] == pytest.approx(row["sqnorms_predicted"], rel=0.12)
        assert row["frozen"] == pytest.approx(row["frozen_predicted"], rel=0.12, abs=1e-20)
        assert row["sqnorms_mismatch"] < 1e-12 and row["frozen_moved"] < 1e-12


def test_law_and_eigenvalues_agree_for_a_large_matrix() -> None:
    setting = GeneralisationDynamics()
    x = np.random.default_rng(1).standard_normal((600, 300)) / math.sqrt(600)
    values = np.linalg.eigvalsh(x @ x.T).clip(0)
    values[:300] = 0
    for k in (0, 10, 100, 3000):
        by_law = setting.formula(0.5, 0.3, k, lambda term: marchenko_pastur(0.5, term))
        assert by_law == pytest.approx(setting.formula(0.5, 0.3, k, lambda term: float(term(values).mean())), rel=0.01)


# ------------------------------------------------------------------------------------------------------------------------------------ ReLU student


def test_student_in_closed_form_is_the_student_trained() -> None:
    setting = ReLUStudent(samples=12, inputs=5, teacher_units=4, starts=3, steps=150, tests=40)
    (*_, row) = setting.work(CPU)("H = 2P", 4, Clock(), lambda: None)
    x, y, test, truth = setting.task(4)
    student = setting.student(24, 4)
    with torch.no_grad():
        h = student[:2](x)
        lr = 1 / torch.linalg.eigvalsh(h @ h.T)[-1].item()
    optimizer = torch.optim.SGD(student[2:].parameters(), lr=lr)
    for _ in range(150):
        optimizer.zero_grad()
        (0.5 * (student(x) - y).square().sum()).backward()
        optimizer.step()
    error = setting.noise + (student(test) - truth).square().mean().item()
    assert row["steps"] == 150
    assert row["error"] == pytest.approx(error, rel=1e-9)


def test_what_a_large_start_adds_is_the_mean_over_starts() -> None:
    setting = ReLUStudent(samples=12, inputs=5, starts=4000, steps=1000, tests=60)
    for row in setting.work(CPU)("H = 2P", 4, Clock(), lambda: None)[::8]:
        assert row["added"] == pytest.approx(row["added_predicted"], rel=0.1)


# -------------------------------------------------------------------------------------------------------------------------------------- whole runs

TINY: list[Setting] = [
    BenignOverfitting(largest=160, draws=20, num_seeds=3),
    LinearRegime(largest=256, num_seeds=3, steps=60, tests=10),
    GeneralisationDynamics(weights=24, tasks=8, num_seeds=3, time=20.0),
    ReLUStudent(samples=24, tests=200, num_seeds=3, starts=4),
]


@pytest.mark.parametrize("setting", TINY, ids=lambda s: s.name)
def test_a_small_run(setting: Setting, tmp_path: Path) -> None:
    outcome = train(setting, tmp_path / "run", progress=False)
    again = train(setting, tmp_path / "again", progress=False)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "again" / "metrics.csv").read_bytes()
    assert len(outcome.verdicts) == len(again.verdicts) == len(setting.claims())
    assert {v.claim.arm for v in outcome.verdicts} <= set(outcome.metrics["arm"])
    exact = [v for v in outcome.verdicts if v.claim.bound <= 1e-6 and v.claim.relation == "<=" and not v.interval]
    assert all(v.holds for v in exact), outcome.table()
    assert {p.suffix for p in (tmp_path / "run" / "figures").iterdir()} == {".png", ".svg"}


@pytest.mark.parametrize(
    ("cls", "field", "value", "rule"),
    [
        (BenignOverfitting, "largest", 100, "a multiple of 8"),
        (LinearRegime, "largest", 100, "a multiple of 64"),
        (GeneralisationDynamics, "lr", 0.5, "between 0 and 0.2"),
        (GeneralisationDynamics, "time", 1e300, "at least one step of lr=0.1 and at most 1e9 of them"),
        (ReLUStudent, "samples", 30, "a multiple of 4"),
        (ReLUStudent, "start_deviation", 1e300, "between 1e-50 and 1e50"),
        (BenignOverfitting, "sigma", 1e300, "between 1e-50 and 1e50"),
    ],
)
def test_rules(cls: type[Setting], field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field} must be {rule}") + ".*" + re.escape(f", got {value}")):
        cls(**{field: value})
