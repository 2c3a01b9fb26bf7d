"""Discretisation drift: fields against autograd and series, the principal flow on quadratics, one pass of SGD by hand, learning rates by their formula."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from ghostgrad.papers.discretisation import (
    FLOWS,
    DriftAdjusted,
    Flows,
    Net,
    Quadratic,
    SGDDrift,
    descent,
    field,
    flow,
    game,
    one_hot_squared,
    slope_and_drift,
    small_net,
)
from ghostgrad.papers.models import half_squared
from ghostgrad.training import Clock, Setting, train


@pytest.fixture
def net() -> tuple[Net, np.ndarray]:
    return small_net(3, 7, 3, 5)


def autograd_loss(net: Net, theta: torch.Tensor) -> torch.Tensor:
    w, c = theta[: -net.width].view(net.width, -1), theta[-net.width :]
    return 0.5 * (torch.tanh(torch.from_numpy(net.x) @ w.T) @ c - torch.from_numpy(net.y)).square().mean()


def test_gradient_and_hessian_are_autograds_and_holomorphic(net: tuple[Net, np.ndarray]) -> None:
    energy, theta = net
    point = torch.from_numpy(theta)
    assert energy.loss(theta) == pytest.approx(autograd_loss(energy, point).item())
    gradient = torch.func.grad(lambda t: autograd_loss(energy, t))(point)
    np.testing.assert_allclose(energy.grad(theta), gradient.numpy(), atol=1e-14)
    np.testing.assert_allclose(energy.hess(theta), torch.func.hessian(lambda t: autograd_loss(energy, t))(point).numpy(), atol=1e-14)
    v = np.random.default_rng(0).standard_normal(len(theta))
    slope = energy.grad(theta + 1e-20j * v).imag / 1e-20  # exact, if the gradient is holomorphic
    np.testing.assert_allclose(slope, energy.hess(theta) @ v, atol=1e-13)
    x, y = torch.from_numpy(energy.x), torch.from_numpy(energy.y)
    assert half_squared(energy.module(theta)(x), y).item() == pytest.approx(energy.loss(theta))


def test_fields_by_their_series(net: tuple[Net, np.ndarray]) -> None:
    """``-g``, ``-grad(E + (h/4) ||g||^2)``, the third order with autograd's third derivative, and the first terms of phi."""
    energy, theta = net
    point, h = torch.from_numpy(theta), 0.05
    loss = lambda t: autograd_loss(energy, t)  # noqa: E731
    g = torch.func.grad(loss)(point)
    igr = torch.func.grad(lambda t: loss(t) + h / 4 * torch.func.grad(loss)(t).square().sum())(point)
    hessian = torch.func.hessian(loss)(point)
    third = torch.func.grad(lambda t: g @ torch.func.hessian(loss)(t) @ g)(point)
    at = {kind: field(kind, energy, h)(0.0, theta) for kind in FLOWS}
    np.testing.assert_allclose(at["NGF"], -g.numpy(), atol=1e-14)
    np.testing.assert_allclose(at["IGR"], -igr.numpy(), atol=1e-14)
    np.testing.assert_allclose(at["third order"], -(igr + h**2 * (hessian @ hessian @ g / 3 + third / 12)).numpy(), atol=1e-10)
    series, term = torch.zeros_like(g), g
    for k in range(1, 40):
        series, term = series + h ** (k - 1) * term / k, hessian @ term
    np.testing.assert_allclose(at["PF"], -series.numpy(), atol=1e-13)


@pytest.mark.parametrize(("kind", "order"), [("NGF", 2), ("IGR", 3), ("third order", 4), ("PF", 3)])
def test_the_error_of_a_step_has_the_flows_order(kind: str, order: int, net: tuple[Net, np.ndarray]) -> None:
    energy, theta = net
    errors = [np.linalg.norm(flow(kind, energy, theta, h, 1, rtol=1e-13)[-1] - descent(energy, theta, h, 1)[-1]) for h in (0.1, 0.05)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("h", [0.3, 0.8, 1.2])
def test_on_a_quadratic_the_principal_flow_is_exact_and_the_others_are_not(h: float) -> None:
    rates = np.array([2.0, 0.3])
    energy, start = Quadratic(np.diag(rates)), np.array([1.0, -2.0])
    walked = descent(energy, start, h, 12)
    np.testing.assert_allclose(walked, start * (1 - h * rates) ** np.arange(13)[:, None], rtol=1e-12)
    np.testing.assert_allclose(flow("PF", energy, start, h, 12), walked, atol=1e-7)
    np.testing.assert_allclose(flow("NGF", energy, start, h, 12), start * np.exp(-h * rates * np.arange(13)[:, None]), atol=1e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_flow_that_cannot_be_followed_is_not_a_number() -> None:
    """At h l = 1 the principal flow would be at 0 at once."""
    assert np.isnan(flow("PF", Quadratic(np.array([[2.0]])), np.array([1.0]), 0.5, 2)).all()


def test_the_drift_of_a_game_is_that_of_its_modified_losses() -> None:
    """Player 1's second order by autograd: ``-grad_a (E1 + (h/4) ||grad_a E1||^2 + (h/2) grad_b E1 . grad_b E2)``, the last factor held fixed."""
    h, m = 0.1, game(4, 0.3)
    p, b, q = (torch.from_numpy(block) for block in (m.matrix[:3, :3], m.matrix[:3, 3:], m.matrix[3:, 3:]))
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, two = x[:3].clone().requires_grad_(), x[3:].clone().requires_grad_()
    first, second = one @ p @ one / 2 + one @ b @ two, two @ q @ two / 2 - one @ b @ two
    own, cross = torch.autograd.grad(first, (one, two), create_graph=True)
    (other,) = torch.autograd.grad(second, two, retain_graph=True)
    modified = first + h / 4 * own.square().sum() + h / 2 * cross @ other.detach()
    (expected,) = torch.autograd.grad(modified, one)
    np.testing.assert_allclose(field("IGR", m, h)(0.0, x.numpy())[:3], -expected.numpy(), atol=1e-14)


def test_one_pass_over_all_orders() -> None:
    """The batched passes against autograd, sample by sample; and the formula against a Taylor series with autograd's Hessians."""
    setting = SGDDrift(num_samples=3, width=2)
    net, theta = small_net(1, 3, 2, 5)
    orders = np.array(list(permutations(range(3))))
    ends = []
    for order in orders:
        point = torch.from_numpy(theta)
        for i in order:
            point = point - 0.1 * torch.func.grad(lambda t, i=i: autograd_loss(Net(net.x[[i]], net.y[[i]], 2), t))(point)
        ends.append(point.numpy())
    np.testing.assert_allclose(setting.mean_pass(net, theta, 0.1, orders), np.mean(ends, axis=0), atol=1e-13)
    singles = [Net(net.x[[i]], net.y[[i]], 2) for i in range(3)]
    expected = -sum(0.1**2 / 2 * one.hess(theta) @ one.grad(theta) for one in singles)
    np.testing.assert_allclose(setting.predicted(net, theta, 0.1, "all orders", Clock()), expected, atol=1e-13)


def test_slope_and_drift_and_the_rate(net: tuple[Net, np.ndarray]) -> None:
    energy, theta = net
    model = energy.module(theta)
    g, slope, bend = slope_and_drift(model, half_squared, torch.from_numpy(energy.x), torch.from_numpy(energy.y))
    gradient = energy.grad(theta)
    np.testing.assert_allclose(torch.nn.utils.parameters_to_vector(g).numpy(), gradient, atol=1e-14)
    assert slope == pytest.approx(np.linalg.norm(gradient))
    assert bend == pytest.approx(np.linalg.norm(energy.hess(theta) @ gradient))


def test_drift_adjusted_steps() -> None:
    """A few steps of each arm against the formula, with autograd's Hessian; and a run that diverges ends."""
    setting = DriftAdjusted(steps=4, readings=4, divisor=7.0)
    x, y = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
    start = torch.nn.Linear(3, 2, dtype=torch.float64)
    rows = {}
    for arm, power, divisor in (
        (setting.ONE, 1.0, 1.0),
        (setting.HALF, 0.5, 1.0),
        (setting.SCALED, 0.5, 7.0),
        ("rate 0.1", None, 1.0),
        ("rate 900", None, 1.0),
    ):
        model = torch.nn.Linear(3, 2, dtype=torch.float64)
        model.load_state_dict(start.state_dict())
        rows[arm] = setting.descend(arm, model, x, y, x, y, Clock(), lambda: None)
        w = torch.cat([start.weight.detach(), start.bias.detach()[:, None]], 1).flatten()
        design = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
        hessian = torch.kron(torch.eye(2, dtype=torch.float64), design.T @ design / 9) / divisor
        for k, row in enumerate(rows[arm][:4]):
            f = design @ w.view(2, 4).T
            g = ((f - torch.nn.functional.one_hot(y, 2)).T @ design).flatten() / 9 / divisor
            rate = float(arm.split()[1]) if power is None else min(5 * divisor, 2 * (g.norm() / (hessian @ g).norm()).item() ** power)
            assert row["iteration"] == k
            assert row["loss"] == pytest.approx(one_hot_squared(f, y).item())
            assert row["rate"] == pytest.approx(rate)
            assert row["lambda"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
            w = w - rate * g
    assert rows["rate 900"][-1]["diverged"] == 1
    assert len(rows["rate 900"]) < 5 == len(rows["rate 0.1"])
    assert rows[setting.ONE][0]["least"] == min(row["rate_lambda"] for row in rows[setting.ONE])


TINY: list[Setting] = [
    Flows(num_seeds=1, steps=2, quadratic_steps=4, minimum_steps=10),
    SGDDrift(num_seeds=3, num_samples=4, width=2),
    DriftAdjusted(num_seeds=2, steps=6, readings=4, train_size=40, width=4),
]


@pytest.mark.parametrize("setting", TINY, ids=lambda s: s.name)
def test_a_tiny_run(setting: Setting, tmp_path: Path) -> None:
    outcome = train(setting, tmp_path, progress=False)
    assert {v.word for v in outcome.verdicts} <= {"holds", "holds in part", "does not hold here", "not testable at this size"}
    assert (tmp_path / "figures" / f"{setting.name.replace('/', '-')}.png").exists()
    texts = {v.claim.text: v.holds for v in outcome.verdicts}
    if isinstance(setting, Flows):
        assert all(texts[f"quadratic, h = {h:g}: PF passes through every step"] for h in setting.RATES)
        assert all(texts[f"minimum, hλ = {z:g}: u₁′g changes sign in every step"] for z in setting.NEAR)
    if isinstance(setting, SGDDrift):
        assert texts["all orders: what the formula leaves out is of one order more in h"]


@pytest.mark.parametrize(("cls", "field_name", "value"), [(Flows, "width", 0), (SGDDrift, "num_samples", 9), (DriftAdjusted, "readings", 3)])
def test_rules(cls: type, field_name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field_name} must be .*, got {value}"):
        cls(**{field_name: value})


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Flows(), SGDDrift()], ids=lambda s: s.name)
def test_claims_hold_at_full_size(setting: Setting, tmp_path: Path) -> None:
    outcome = train(setting, tmp_path, progress=False)
    assert outcome.holds, outcome.table()
