"""The floors of the label-noise settings against brute force, their regularisers in closed form against the ops, and the constants of the drift."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize, minimize_scalar

import ghostgrad as gg
from ghostgrad.papers import SETTINGS
from ghostgrad.papers.label_noise import Arm, LabelNoise, MatrixSensing, OnePoint, ReLU1D, one_point_floor, relu_1d_floor, statistical_dimension, unit_cost
from ghostgrad.training import train

pytestmark = pytest.mark.filterwarnings("ignore:.*has no fused rule")

FAMILY = {name: cls for name, cls in SETTINGS.items() if issubclass(cls, LabelNoise)}
SLOPE = {"tanh": (np.tanh, lambda h: 1 - h**2), "logistic": (lambda z: 0.5 * (1 + np.tanh(z / 2)), lambda h: h * (1 - h))}

# ---------------------------------------------------------------------------------------------------------------------------------------- one point


@pytest.mark.parametrize("activation", ["tanh", "logistic"])
@pytest.mark.parametrize("o", [0.05, 0.7, -2.0])
@pytest.mark.parametrize("q", [0.3, 1.0, 5.0])
def test_unit_cost_is_the_least_over_the_hidden_value(activation: str, o: float, q: float) -> None:
    derivative = SLOPE[activation][1]
    found = minimize_scalar(lambda h: h**2 + (o / h) ** 2 * derivative(h) ** 2 * q, bounds=(1e-6, 1 - 1e-9), method="bounded", options={"xatol": 1e-12})
    assert unit_cost(activation, o, q) == pytest.approx(found.fun, rel=1e-8)


@pytest.mark.parametrize("activation", ["tanh", "logistic"])
@pytest.mark.parametrize(("y", "q", "width"), [(2.0, 1.0, 5), (0.4, 1.0, 3), (3.0, 0.5, 2), (-1.5, 2.0, 4), (1.0, 1.0, 1)])
def test_one_point_floor_against_minimisation_over_all_parameters(activation: str, y: float, q: float, width: int) -> None:
    s, derivative = SLOPE[activation]

    def reg(v: np.ndarray) -> float:
        h = s(v[width:])
        return float(np.sum(h**2 + v[:width] ** 2 * derivative(h) ** 2 * q))

    fits = {"type": "eq", "fun": lambda v: v[:width] @ s(v[width:]) - y}
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=2 * width) for _ in range(30)]
    lone = np.zeros(2 * width)  # one unit alone, which random starts may miss
    lone[0], lone[width] = y, 1.0
    found = [minimize(reg, v, constraints=fits, method="SLSQP", options={"maxiter": 2000, "ftol": 1e-14}) for v in [*starts, lone]]
    found = [f.fun for f in found if abs(fits["fun"](f.x)) < 1e-8]  # type: ignore[operator]
    floor = one_point_floor(activation, y, q, width)
    assert min(found) >= floor * (1 - 1e-6)
    assert min(found) <= floor * (1 + 1e-4)


def test_tanh_floor_is_one_units_cost() -> None:
    assert one_point_floor("tanh", 1.0, 1.0, 6) == pytest.approx(2 * (math.sqrt(2) - 1))


# ------------------------------------------------------------------------------------------------------------------------------------------ 1-D ReLU


def relu_reg(x: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """n reg of the network with a trained affine part, in closed form."""
    z = np.outer(x, a) + b
    on = z > 0
    return float(np.sum(np.where(on, z, 0) ** 2 + c**2 * (1 + x[:, None] ** 2) * on) + np.sum(x**2 + 1))


def test_relu_floor_by_hand() -> None:
    # (-1, 1), (0, 0), (1, 1): a bend of 2 at 0, active on x = 1 alone, S2 = 1 and S1 = 2, costs 2 * 2 sqrt(2); the affine part adds 2 + 1 + 2.
    assert relu_1d_floor(np.array([-1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0])) == pytest.approx((4 * math.sqrt(2) + 5) / 3, rel=1e-8)


def test_relu_floor_of_points_on_a_line_is_the_affine_part() -> None:
    x = np.array([-1.0, 0.3, 0.8, 2.0])
    assert relu_1d_floor(x, 3 * x - 1) == pytest.approx(np.mean(x**2 + 1))


def _cases() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    cases = [(np.sort(rng.uniform(-1.5, 1.5, n)), rng.normal(size=n)) for n in (4, 6, 9)]
    return [*cases, ReLU1D.data()]


@pytest.mark.parametrize("case", range(4))
def test_relu_floor_against_a_dense_grid_of_kinks(case: int) -> None:
    x, y = _cases()[case]
    grid = np.unique(np.concatenate([np.linspace(x[0], x[-1], 3001), x]))
    columns, weights = [], []
    for k, right in itertools.product(grid, (True, False)):
        active = x[x > k] if right else x[x < k]
        columns.append(np.maximum(x - k, 0) if right else np.maximum(k - x, 0))
        weights.append(2 * np.sqrt(np.sum((active - k) ** 2) * np.sum(active**2 + 1)))
    bends, w = np.stack(columns, 1), np.array(weights)
    a_eq = np.concatenate([bends, -bends, np.ones((len(x), 1)), x[:, None]], axis=1)
    bounds = [(0, None)] * (2 * len(w)) + [(None, None)] * 2
    dense = linprog(np.concatenate([w, w, [0, 0]]), A_eq=a_eq, b_eq=y, bounds=bounds).fun + np.sum(x**2 + 1)
    floor = len(x) * relu_1d_floor(x, y)
    assert floor <= dense * (1 + 1e-9)
    assert floor >= dense * (1 - 1e-3)


def test_relu_floor_against_minimisation_over_all_parameters() -> None:
    """No network found by direct minimisation lies below the floor, and the best comes close to it."""
    x, y = np.array([-1.0, -0.2, 0.5, 1.0]), np.array([0.0, 1.0, 0.3, 0.9])
    # One unit for every gap and direction. Its kink may move within the gap, so that the pattern of active points is fixed and the problem smooth.
    gap, sign = np.repeat(np.arange(3), 2), np.tile([1.0, -1.0], 3)
    width, rng, best = len(gap), np.random.default_rng(0), math.inf
    floor = len(x) * relu_1d_floor(x, y)
    for _ in range(6):

        def parts(v: np.ndarray) -> tuple[np.ndarray, ...]:
            a = sign * np.exp(v[:width])
            return a, -a * v[width : 2 * width], v[2 * width : 3 * width]

        def objective(v: np.ndarray) -> float:
            a, b, c = parts(v)
            return relu_reg(x, a, b, c)

        def residual(v: np.ndarray) -> np.ndarray:
            a, b, c = parts(v)
            return np.maximum(np.outer(x, a) + b, 0) @ c + v[-2] * x + v[-1] - y

        start = np.concatenate([rng.normal(size=width) * 0.3, (x[gap] + x[gap + 1]) / 2, rng.normal(size=width), [0.0, 0.0]])
        inside = [(x[g] + 1e-6, x[g + 1] - 1e-6) for g in gap]
        bounds = [(-6, 4)] * width + inside + [(None, None)] * (width + 2)
        found = minimize(objective, start, bounds=bounds, constraints={"type": "eq", "fun": residual}, method="SLSQP", options={"maxiter": 300, "ftol": 1e-10})
        if np.abs(residual(found.x)).max() < 1e-7:
            assert found.fun >= floor * (1 - 1e-5)
            best = min(best, found.fun)
    assert best <= floor * 1.01


# ----------------------------------------------------------------------------------------------------------------------------------- matrix sensing


def test_statistical_dimension() -> None:
    assert statistical_dimension(30, 1) == 247.5
    assert statistical_dimension(100, 5) == 2770  # the paper's size, with 2500 measurements
    # E ||projection of a standard normal onto the cone||^2, the definition, for {symmetric, lower block of size d - r semidefinite}
    d, r, rng = 8, 2, np.random.default_rng(0)
    g = rng.normal(size=(4000, d, d))
    g = (g + np.swapaxes(g, 1, 2)) / 2  # isometric: unit variance on the diagonal, 1/2 off it, where the inner product counts twice
    removed = np.minimum(np.linalg.eigvalsh(g[:, r:, r:]), 0.0)
    estimate = np.mean(np.sum(g**2, axis=(1, 2)) - np.sum(removed**2, axis=1))
    assert statistical_dimension(d, r) == pytest.approx(estimate, rel=0.02)


def test_too_many_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_measurements must be .* below the statistical dimension 247\.5 .* got 300"):
        MatrixSensing(num_measurements=300)


@pytest.mark.parametrize("seed", [0, 1, 2, 10])
def test_the_truth_has_the_least_reg_of_all_matrices_that_fit(seed: int) -> None:
    """Duality: if ``S = M - sum l_i A_i`` is semidefinite and S X* = 0, then <M, X> - <M, X*> = <S, X> >= 0 for every X >= 0 with <A_i, X> = <A_i, X*>."""
    setting = MatrixSensing()
    problem = setting.problem(Arm("", 0.0), seed)
    assert problem.truth is not None
    a = ((problem.x + problem.x.mT) / 2).numpy()
    m = 4 * (a @ a).mean(0)
    assert problem.floor == pytest.approx(float((m * problem.truth.numpy()).sum()), rel=1e-12)
    _, vectors = np.linalg.eigh(problem.truth.numpy())
    u, rest = vectors[:, -1], vectors[:, :-1]
    rows = np.stack([ai @ u for ai in a], axis=1)  # (d, n): S u = 0 is rows l = M u
    particular, *_ = np.linalg.lstsq(rows, m @ u, rcond=None)
    free = np.linalg.svd(rows)[2][len(u) :].T  # (n, n - d)
    blocks = np.stack([rest.T @ ai @ rest for ai in a])
    base = rest.T @ (m - np.tensordot(particular, a, 1)) @ rest

    def negative_part(v: np.ndarray) -> tuple[float, np.ndarray]:
        w, q = np.linalg.eigh(base - np.tensordot(free @ v, blocks, 1) - 0.05 * np.trace(m) / len(m) * np.eye(len(base)))
        low = np.minimum(w, 0.0)
        return 0.5 * float(low @ low), -free.T @ np.tensordot(blocks, (q * low) @ q.T, 2)

    v = minimize(negative_part, np.zeros(free.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-30, "gtol": 1e-12}).x
    multipliers = particular + free @ v
    slack = m - np.tensordot(multipliers, a, 1)
    assert np.abs(slack @ u).max() < 1e-9 * np.abs(m).max()
    assert np.linalg.eigvalsh(rest.T @ slack @ rest).min() > 0


def test_mean_reg_over_the_measurements_is_the_nuclear_norm() -> None:
    setting = MatrixSensing(dim=5, num_measurements=9)
    g = torch.randn(40_000, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = setting.problem(Arm("", 0.0), 0).truth
    assert u is not None
    root = torch.linalg.cholesky(u + 1e-9 * torch.eye(5))
    assert ((g + g.mT) @ root).square().sum((1, 2)).mean().item() == pytest.approx(2 * 6 * u.trace().item(), rel=0.02)


# ------------------------------------------------------------------------------------------------------------------------- regulariser, claims, drift


def test_reg_in_closed_form_is_what_the_ops_read() -> None:
    for activation, (s, derivative) in SLOPE.items():
        problem = OnePoint(width=4, input_sqnorm=2.0).problem(Arm("", 0.0, activation), 3)
        h = s((problem.model.get_parameter("weight").detach() @ problem.x[0]).numpy())
        c = problem.model.get_parameter("c").detach().numpy()
        expected = np.sum(h**2 + c**2 * derivative(h) ** 2 * 2.0)
        assert gg.output_sqnorms(problem.model, problem.x).item() == pytest.approx(expected, rel=1e-11)

    problem = ReLU1D().problem(Arm("", 0.0), 3)
    a, b, c = (problem.model.get_parameter(k).detach().numpy() for k in "abc")
    x = problem.x.numpy()
    assert gg.output_sqnorms(problem.model, problem.x).sum().item() == pytest.approx(relu_reg(x, a, b, c), rel=1e-11)

    problem = MatrixSensing(dim=6, num_measurements=8).problem(Arm("", 0.0), 3)
    u = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    problem.model.get_parameter("u").data.copy_(u)
    torch.testing.assert_close(gg.output_sqnorms(problem.model, problem.x), ((problem.x + problem.x.mT) @ u).square().sum((1, 2)), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", FAMILY)
def test_arms_start_alike_and_the_floor_is_below(name: str) -> None:
    setting = FAMILY[name]()
    by_variant: dict[str, list[torch.Tensor]] = {}
    for arm in setting.arms():
        problem = setting.problem(arm, 5)
        by_variant.setdefault(arm.variant, []).append(torch.cat([p.detach().flatten() for p in problem.model.parameters()]))
        assert 0 < problem.floor < 2 * gg.output_sqnorms(problem.model, problem.x).mean().item()
    for noisy, clean in by_variant.values():
        assert torch.equal(noisy, clean)
    assert {claim.arm for claim in setting.claims()} <= {arm.name for arm in setting.arms()}


def test_the_variance_of_the_noise_enters_and_the_learning_rate_squared() -> None:
    """Drift ``-(lr^2 variance / 4) grad reg``: twice the variance halves the time, twice the learning rate quarters it. And E loss = (lr variance / 4) reg."""

    def drop(steps: int, lr: float, noise_variance: float) -> float:
        setting = OnePoint(activation="tanh", lr=lr, noise_variance=noise_variance, num_seeds=200)
        stack = setting.start(torch.device("cpu"), compiled=False)
        stack.advance(0, steps, lambda: None)
        params = stack.params
        h = torch.tanh((params["weight"] @ stack.fixed["x"].mT)[:, :, 0])  # (R, width)
        reg = (h**2 + params["c"] ** 2 * (1 - h**2) ** 2).sum(1)
        loss = 0.5 * ((params["c"] * h).sum(1) - setting.target).square()
        noisy = torch.tensor([r.arm.noise_variance > 0 for r in stack.replicas])
        assert loss[noisy].mean().item() == pytest.approx(lr * noise_variance / 4 * reg[noisy].mean().item(), rel=0.3)
        return (reg[~noisy].mean() - reg[noisy].mean()).item()

    # The same shrinkage by three ways; were it the standard deviation that enters, the second would lag behind by a factor 1.4.
    one, two, four = drop(2000, 0.01, 1.0), drop(1000, 0.01, 2.0), drop(500, 0.02, 1.0)
    assert two == pytest.approx(one, rel=0.15)
    assert four == pytest.approx(one, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_claims_hold_at_full_size(name: str, tmp_path) -> None:
    setting = FAMILY[name]()
    assert train(setting, tmp_path, progress=False).holds
