"""Discretisation drift: what a step of gradient descent does beyond following the gradient, and the flows that say so.

M. Rosca, "On discretisation drift and smoothness regularisation in neural network training", PhD thesis, UCL 2023 (arXiv:2310.14036). For batches: S. L. Smith,
B. Dherin, D. Barrett, S. De, "On the origin of implicit regularization in stochastic gradient descent", ICLR 2021.

*Flows.* A flow ``x' = f + h f1 + h^2 f2 + ...`` that passes through the steps ``x - h g`` of gradient descent, ``f = -g``: the Taylor series of its time-h
map is ``x + h f + h^2 (f1 + f'f / 2) + h^3 (f2 + (f1'f + f'f1) / 2 + (f''(f, f) + f'f'f) / 6) + ...``, and the terms beyond h must vanish: ``f1 = -f'f / 2``,
``f2 = f'f'f / 3 + f''(f, f) / 12``; with ``f' = -H`` and the energy's third derivative D:

- NGF, the negative gradient flow: ``-g``, with an error of ``(h^2 / 2) ||H g||`` a step, the *drift*;
- IGR, implicit gradient regularisation: ``-(g + (h/2) H g) = -grad (E + (h/4) ||g||^2)``;
- third order: ``-(g + (h/2) H g + h^2 (H^2 g / 3 + D[g, g] / 12))``;
- PF, the principal flow: all terms without third derivatives, ``-phi(h H) g`` with ``phi(z) = -log(1 - z) / z = 1 + z/2 + z^2/3 + ...``. On a quadratic energy
  it is exact: along an eigenvector ``x' = (log(1 - h l) / h) x`` multiplies x by ``1 - h l`` in time h. For h l > 1 the logarithm is complex,
  ``log|1 - h l| + i pi``: the flow turns through the complex plane, and meets the steps, whose sign alternates, at whole multiples of h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import one_hot

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Setting
from .figures import BLUE, GREEN, GREY, OCHRE, RED, SKY
from .image_setting import accuracy, built, perceptron
from .images import data_used, load_images
from .models import half_squared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FLOWS", "DriftAdjusted", "Flows", "Net", "Quadratic", "SGDDrift", "descent", "flow", "game"]

PAPER = "Rosca (PhD thesis, UCL 2023)"
TITLE = "On Discretisation Drift and Smoothness Regularisation in Neural Network Training"
FLOWS = {"NGF": GREY, "IGR": OCHRE, "third order": SKY, "PF": BLUE}  # with their colours


# ------------------------------------------------------------------------------------------------------------------------------------------- energies


class Quadratic:
    """A linear gradient ``M x``: of the energy ``x'Mx / 2``, or, if M is not symmetric, of a game (:func:`game`), in which "Hessian" is the Jacobian of it."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def grad(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix @ x)

    def hess(self, x: np.ndarray) -> np.ndarray:
        return self.matrix


def game(seed: int, curvature: float, size: int = 3) -> Quadratic:
    """Two players, ``E1 = a'Pa / 2 + a'Bb`` and ``E2 = b'Qb / 2 - a'Bb``, each down its own gradient: ``M = [[P, B], [-B', Q]]``.

    B is orthogonal; P and Q are Wishart matrices times ``curvature``.
    """
    rng = np.random.default_rng([seed, 2])
    b = np.linalg.qr(rng.standard_normal((size, size)))[0]
    p, q = (curvature * c @ c.T / size for c in rng.standard_normal((2, size, size)))
    return Quadratic(np.block([[p, b], [-b.T, q]]))


class Net:
    """``(1/2n) sum_i (c' tanh(W x_i) - y_i)^2``, with gradient and Hessian as holomorphic functions of theta = (W, c), which may be complex."""

    def __init__(self, x: np.ndarray, y: np.ndarray, width: int) -> None:
        self.x, self.y, self.width = x, y, width  # (n, k), (n,)

    def _parts(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        w, c = theta[: -self.width].reshape(self.width, -1), theta[-self.width :]
        t = np.tanh(self.x @ w.T)  # (n, width)
        return c, t, 1 - t**2, t @ c - self.y

    def _jacobian(self, c: np.ndarray, t: np.ndarray, slope: np.ndarray) -> np.ndarray:
        inner: np.ndarray = (slope * c)[:, :, None] * self.x[:, None]
        return np.concatenate([inner.reshape(len(t), -1), t], axis=1)

    def grad(self, theta: np.ndarray) -> np.ndarray:
        c, t, slope, r = self._parts(theta)
        return self._jacobian(c, t, slope).T @ r / len(r)

    def hess(self, theta: np.ndarray) -> np.ndarray:
        c, t, slope, r = self._parts(theta)
        j = self._jacobian(c, t, slope)
        h, k = j.T @ j, self.x.shape[1]
        for unit in range(self.width):
            rows, last = slice(unit * k, (unit + 1) * k), len(theta) - self.width + unit
            h[rows, rows] += (self.x.T * (-2 * r * c[unit] * t[:, unit] * slope[:, unit])) @ self.x
            mixed = (r * slope[:, unit]) @ self.x
            h[rows, last] += mixed
            h[last, rows] += mixed
        return h / len(r)

    def loss(self, theta: np.ndarray) -> float:
        return 0.5 * float(np.mean(self._parts(theta)[3] ** 2))

    def module(self, theta: np.ndarray) -> nn.Module:
        model = nn.Sequential(nn.Linear(self.x.shape[1], self.width, bias=False), nn.Tanh(), nn.Linear(self.width, 1, bias=False), nn.Flatten(0)).double()
        nn.utils.vector_to_parameters(torch.from_numpy(theta), model.parameters())
        return model


# ---------------------------------------------------------------------------------------------------------------------------------------------- flows

EVALUATIONS = 1000


class FlowError(RuntimeError):
    """A flow takes more evaluations than it is allowed."""


def _phi(z: np.ndarray) -> np.ndarray:
    """``-log(1 - z) / z``; the logarithm's cut lies along the negative imaginary axis, away from the real z > 1 of unstable directions."""
    small = np.abs(z) < 1e-4
    safe = np.where(small, 0.5, z)
    log = np.log(-1j * (1 - safe)) + 0.5j * math.pi
    return np.where(small, 1 + z / 2 + z**2 / 3, -log / safe)


def field(kind: str, energy: Quadratic | Net, h: float) -> Callable[[float, np.ndarray], np.ndarray]:
    """The flow's right-hand side."""

    def right(_: float, x: np.ndarray) -> np.ndarray:
        g = energy.grad(x)
        if kind == "NGF":
            return -g
        hessian = energy.hess(x)
        if kind == "PF":
            values, vectors = np.linalg.eig(hessian)
            along: np.ndarray = np.linalg.solve(vectors, g)
            return -(vectors @ (_phi(h * values.astype(complex)) * along))
        hg = hessian @ g
        if kind == "IGR":
            return -(g + h / 2 * hg)
        eps = 1e-4 / max(1.0, float(np.linalg.norm(g)))
        third = (energy.hess(x + eps * g) - energy.hess(x - eps * g)) @ g / (2 * eps)
        return -(g + h / 2 * hg + h**2 * (hessian @ hg / 3 + third / 12))

    return right


def flow(
    kind: str,
    energy: Quadratic | Net,
    start: np.ndarray,  # (p,)
    h: float,
    steps: int,
    rtol: float = 1e-9,
) -> np.ndarray:  # (steps + 1, p)
    """The flow at the times 0, h, 2h, ..., by Dormand and Prince's method of order 8; NaN where it could not be followed.

    The principal flow is singular where an eigenvalue passes 1 / h. ``EVALUATIONS`` for each step are far more than any other flow here takes.
    """
    times, right, evaluations = h * np.arange(steps + 1), field(kind, energy, h), 0

    def counted(t: float, x: np.ndarray) -> np.ndarray:
        nonlocal evaluations
        evaluations += 1
        if evaluations > EVALUATIONS * steps:
            raise FlowError
        return right(t, x)

    start = start.astype(complex) if kind == "PF" else start
    try:
        solution = solve_ivp(counted, (0.0, times[-1]), start, method="DOP853", t_eval=times, rtol=rtol, atol=1e-3 * rtol)
    except FlowError:
        return np.full((steps + 1, len(start)), math.nan)
    return np.asarray(solution.y.T) if solution.success else np.full((steps + 1, len(start)), math.nan)


def descent(energy: Quadratic | Net, start: np.ndarray, h: float, steps: int) -> np.ndarray:
    """Gradient descent: (steps + 1, p)."""
    points = [start]
    for _ in range(steps):
        points.append(points[-1] - h * energy.grad(points[-1]))
    return np.stack(points)


def small_net(seed: int, n: int, width: int, steps: int) -> tuple[Net, np.ndarray]:
    """A regression in two dimensions, and where ``steps`` steps of gradient descent at rate 0.05 come to.

    All weights start positive, so that the Hessian has one eigenvalue far above the others: the principal flow is singular where h l = 1 for any of them.
    """
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(0, 1, (n, 2)), np.ones((n, 1))], axis=1)
    net = Net(x, np.sin(3 * x[:, 0]) + x[:, 1] ** 2, width)
    start = np.abs(rng.standard_normal(4 * width)) * np.repeat([0.5, 1 / math.sqrt(width)], [3 * width, width])
    return net, descent(net, start, 0.05, steps)[-1]


@dataclass(frozen=True)
class Flows(Setting):
    """Gradient descent beside the four flows: on a quadratic, in games, on a small tanh network at rates up to 2 / lambda, and around that at a minimum.

    *Quadratic*: ``x' diag(1, 0.01) x``, eigenvalues 2 and 0.02, rates up to and beyond 2 / 2; its errors are relative to the size of the iterate. *Network*:
    from a half-trained start, h so that h lambda_1 is 0.1, 0.5, 1.5, 1.9 there (the principal flow is complex from 1 on). *At a minimum*: 1e-6 away from it,
    where gradient descent multiplies the gradient's part along u_1 by ``1 - h lambda_1``: the instability sets in at h lambda_1 = 2, with a change of sign in
    every step.

    *Games*: the expansion at this module's head asks nothing of f, so with M the Jacobian of both players' gradients, ``-(g + (h/2) M g)`` follows a game to
    second order. For player 1 of :func:`game`, ``M g`` has the part ``P grad_a E1 + B grad_b E2``: the loss gets ``(h/4) ||grad_a E1||^2``, and from the
    other's move ``(h/2) grad_b E1 . grad_b E2`` with grad_b E2 held fixed. A bilinear game with B orthogonal has ``M^2 = -I``: the gradient flow circles, and
    the drift drives outwards, ``||x|| <- e^{h^2/2} ||x||`` in a step, where the step itself has ``sqrt(1 + h^2)``, less by a share of h^4/4. (M. Rosca,
    Y. Wu, B. Dherin, D. Barrett, "Discretization drift in two-player games", ICML 2021.)

    The drift, ``||x - h g - NGF(h)||``, is ``(h^2 / 2) ||H g||`` to leading order. Along an eigenvector it is ``(e^-z - 1 + z) / l`` times the gradient's
    part, z = h l, that is ``1 - z / 3`` of the leading order: hence the slack of 0.05 at z = 0.1.
    """

    name: ClassVar[str] = "discretisation/flows"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = PAPER
    summary: ClassVar[str] = "four flows beside gradient descent: the principal flow is exact on quadratics and the nearest to a network's steps near 2/λ"
    duration: ClassVar[str] = "about 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.top_eigenvalue",)
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 3, "steps": 10, "quadratic_steps": 50}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 10, "quadratic_steps": 200}
    needs: ClassVar[str] = "larger networks on real data, of whose Hessians the principal flow takes all eigenvalues at every evaluation"

    RATES: ClassVar[tuple[float, ...]] = (0.4, 0.9, 1.0, 1.05)
    EDGES: ClassVar[tuple[float, ...]] = (0.1, 0.5, 1.5, 1.9)
    NEAR: ClassVar[tuple[float, ...]] = (1.95, 2.05)
    GAMES: ClassVar[dict[str, float]] = {"bilinear game": 0.0, "quadratic game": 0.3}  # with their curvatures
    PLAYED: ClassVar[dict[str, float]] = {"bilinear game": 0.2, "quadratic game": 0.05}  # with their rates

    num_seeds: int = 5
    """How many networks."""
    steps: int = 15
    """Steps of gradient descent that the flows are to follow on the network."""
    quadratic_steps: int = 100
    """Steps of gradient descent on the quadratic."""
    minimum_steps: int = 30
    """Steps of gradient descent at the minimum."""
    width: int = 6
    """Hidden units."""
    num_samples: int = 16
    """Samples."""
    pretraining: int = 20
    """Steps at rate 0.05 before the flows start."""

    def rules(self) -> list[tuple[str, bool, str]]:
        own = ("steps", "quadratic_steps", "minimum_steps", "width", "num_samples")
        return [*self.at_least(1, *own), *self.at_least(0, "pretraining")]

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        cells = [(f"quadratic, h = {h:g}", self.seed) for h in self.RATES]
        cells += [(f"{kind}, h = {h:g}", seed) for kind, h in self.PLAYED.items() for seed in self.seeds]
        cells += [(f"network, hλ = {z:g}", seed) for z in self.EDGES for seed in self.seeds]
        cells += [(f"minimum, hλ = {z:g}", seed) for z in self.NEAR for seed in self.seeds]
        return GridRun(cells, self.work)

    def work(self, arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        kind, value = arm.split(",")[0], float(arm.split("= ")[1])
        energy: Quadratic | Net
        if kind == "quadratic":
            energy, point, steps = Quadratic(np.diag([2.0, 0.02])), np.array([-0.35, -0.2]), self.quadratic_steps
            top, u, h = 2.0, np.array([1.0, 0.0]), value
        elif kind in self.GAMES:
            energy, steps, h = game(seed, self.GAMES[kind]), self.quadratic_steps, value
            point, top, u = np.random.default_rng([seed, 3]).standard_normal(6), math.nan, np.full(6, math.nan)
        else:
            energy, point = small_net(seed, self.num_samples, self.width, self.pretraining)
            steps = self.steps if kind == "network" else self.minimum_steps
            if kind == "minimum":
                point = minimize(energy.loss, point, jac=energy.grad, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).x
                point = point + 1e-6 * np.random.default_rng([seed, 1]).standard_normal(len(point))
            with clock:
                data = torch.from_numpy(energy.x), torch.from_numpy(energy.y)
                found = gg.top_eigenvalue(energy.module(point), half_squared, *data, tol=1e-8)
            top, u = float(found), found.vectors[0].numpy()
            h = value / top
        walked = descent(energy, point, h, steps)
        along = np.linalg.norm(walked, axis=1) if kind in self.GAMES else np.array([u @ energy.grad(x) for x in walked])
        errors: dict[str, np.ndarray] = {}
        for name in FLOWS if kind != "minimum" else ():
            between()
            distances = np.linalg.norm(flow(name, energy, point, h, steps) - walked, axis=1)
            errors[name] = distances / np.linalg.norm(walked, axis=1) if kind == "quadratic" else distances
        means = {name: float(errors[name].mean()) if errors else math.nan for name in FLOWS}
        overall = {
            "h": h,
            "h_lambda": h * top,
            **{f"mean {name}": mean for name, mean in means.items()},
            "worst PF": float(errors["PF"].max()) if errors else math.nan,
            "IGR over NGF": means["IGR"] / means["NGF"],
            "PF over IGR": means["PF"] / means["IGR"],
            "drift": float(errors["NGF"][1]) if kind in ("network", *self.GAMES) else math.nan,
            "drift_predicted": float(h**2 / 2 * np.linalg.norm(energy.hess(point) @ energy.grad(point))),
            "growth": float(abs(along[-1] / along[0]) ** (1 / steps)),
            "growth_predicted": math.exp(h**2 / 2) if kind == "bilinear game" else abs(1 - h * top),
            "flips": float(np.mean(along[1:] * along[:-1] < 0)),
        }
        return [
            {"iteration": k, **{f"error {name}": float(errors[name][k]) if errors else math.nan for name in FLOWS}, "along": abs(along[k]), **overall}
            for k in range(steps + 1)
        ]

    def claims(self) -> list[Claim]:
        exact, factor = "x(kh) = (1 − hλ)^k x(0)", "u₁′g ← (1 − hλ₁) u₁′g"
        algebra = "Exact by algebra, as the docstring says: what could fail is the integration, and the logarithm's branch."
        steps = "With B orthogonal the steps grow by √(1 + h²), whatever the seed: one formula against another, as far as h² tells them apart."
        nets, games = [f"network, hλ = {z:g}" for z in self.EDGES], [f"{kind}, h = {h:g}" for kind, h in self.PLAYED.items()]
        return [
            *(
                Claim(f"quadratic, h = {h:g}: PF passes through every step", f"quadratic, h = {h:g}", "worst PF", "<=", 1e-6, formula=exact, remark=algebra)
                for h in self.RATES
            ),
            *(Claim(f"{arm}: IGR keeps closer to the steps than NGF", arm, "IGR over NGF", "<=", 1.0) for arm in nets[1:]),
            *(Claim(f"{arm}: PF closer than IGR", arm, "PF over IGR", "<=", 1.0) for arm in nets[1:]),
            *(
                ClosedForm(f"{arm}: the drift of a step", arm, "drift", against="drift_predicted", slack=0.05, formula="‖x − hg − NGF(h)‖ = (h²/2) ‖Hg‖")
                for arm in (nets[0], games[1])
            ),
            ClosedForm(
                f"{games[0]}: the drift drives outwards",
                games[0],
                "growth",
                against="growth_predicted",
                precision=1e-3,
                slack=1e-3,
                formula="‖x‖ ← e^(h²/2) ‖x‖",
                remark=steps,
            ),
            *(Claim(f"{arm}: IGR's form for games keeps closer to the steps than NGF", arm, "IGR over NGF", "<=", 1.0) for arm in games),
            *(Claim(f"{arm}: PF passes through every step", arm, "worst PF", "<=", 1e-6, formula="x(kh) = (I − hM)^k x(0)", remark=algebra) for arm in games),
            *(
                ClosedForm(f"{arm}: growth along u₁", arm, "growth", against="growth_predicted", precision=0.01, slack=1e-3, formula=factor)
                for arm in (f"minimum, hλ = {z:g}" for z in self.NEAR)
            ),
            *(Claim(f"minimum, hλ = {z:g}: u₁′g changes sign in every step", f"minimum, hλ = {z:g}", "flips", "==", 1.0) for z in self.NEAR),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        frame = outcome.metrics
        last = frame[frame["arm"] == f"network, hλ = {self.EDGES[-1]:g}"]
        ends = frame[frame["arm"].str.startswith("network")].drop_duplicates(["arm", "seed"])
        for name, colour in FLOWS.items():
            for number, (_, rows) in enumerate(last[last["iteration"] > 0].groupby("seed")):
                left.plot(rows["iteration"], rows[f"error {name}"], color=colour, lw=1.2, alpha=0.8, label="_" * number + name)
            middle.plot(ends["h_lambda"], ends[f"mean {name}"], "o", color=colour, ms=4, alpha=0.8)
            middle.plot(self.EDGES, np.exp(np.log(ends[f"mean {name}"]).groupby(ends["h_lambda"].round(3)).mean()), color=colour, lw=1)
        nearest = all(v.holds for v in outcome.verdicts if "over" in v.claim.column)
        left.set(yscale="log", xlabel="step", ylabel="distance from gradient descent", title=f"A network at hλ₁ = {self.EDGES[-1]:g}")
        left.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)
        title = "The principal flow keeps nearest to the steps" if nearest else "Mean distance over the steps"
        middle.set(yscale="log", xlabel="hλ₁ at the start", ylabel="mean distance from gradient descent", title=title)
        for z, colour in zip(self.NEAR, (BLUE, RED), strict=True):
            for number, (_, rows) in enumerate(frame[frame["arm"] == f"minimum, hλ = {z:g}"].groupby("seed")):
                right.plot(rows["iteration"], rows["along"], color=colour, lw=1.2, label="_" * number + f"hλ₁ = {z:g}")
        right.set(yscale="log", xlabel="step", ylabel="|u₁′g|", title="At a minimum: along the top eigenvector")
        right.legend(frameon=False, fontsize=9)
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class SGDDrift(Setting):
    """One pass of SGD, one sample a step, averaged exactly over all orders: it follows the gradient of ``E + (h/4) mean_i ||grad E_i||^2``.

    After n steps, ``theta_n = theta - h sum_k g_k + h^2 sum_{j<k} H_k g_j + O(h^3)``, k and j in the order of the pass. In the mean over all n! orders the
    double sum is half of ``sum_{j != k} H_k g_j = n^2 H g - sum_k H_k g_k``, and ``H_k g_k = grad ||g_k||^2 / 2``. The gradient flow on E goes to
    ``theta - n h g + (n h)^2/2 H g``. The difference, ``-(h^2/4) grad sum_k ||g_k||^2``, is what a flow on ``(h/4) mean_k ||g_k||^2`` does in time n h:
    per-sample norms, with a positive sign.

    *Control:* with samples drawn anew in each step (all n^n sequences), ``E sum_{j<k} H_k g_j = (n (n-1)/2) H g``, and the difference is ``-(n h^2/2) H g``:
    the norm of the mean gradient, ``(h/4) ||g||^2``, in place of the mean of the norms. What is new is thus owed to drawing without replacement.
    """

    name: ClassVar[str] = "discretisation/sgd-drift"
    title: ClassVar[str] = "On the Origin of Implicit Regularization in Stochastic Gradient Descent"
    paper: ClassVar[str] = "Smith, Dherin, Barrett, De (ICLR 2021)"
    summary: ClassVar[str] = "one pass of SGD, over all orders of the samples: the drift is down (h/4) mean ‖∇E_i‖²"
    duration: ClassVar[str] = "under 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms",)
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 20}
    needs: ClassVar[str] = "a Wide-ResNet on CIFAR-10, for test accuracies: a GPU for days"

    SCHEMES: ClassVar[tuple[str, ...]] = ("all orders", "all sequences")

    num_seeds: int = 8
    """How many networks."""
    num_samples: int = 6
    """Samples n: n! orders and n^n sequences."""
    width: int = 4
    """Hidden units."""
    h: float = 0.0001
    """Learning rate; a pass is a time of n h. The relative error of the formula is of this order."""
    coarser: float = 10.0
    """How many times as large the rate of a second look is, at which the formula's error must show."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("num_samples", 2 <= self.num_samples <= 7, "between 2 and 7"),
            *self.at_least(1, "width"),
            *self.positive("h"),
            ("coarser", self.coarser > 1, "above 1"),
        ]

    def mean_pass(self, net: Net, theta: np.ndarray, h: float, sequences: np.ndarray) -> np.ndarray:
        """Where the sequences (R, n) lead in the mean."""
        ends = np.repeat(theta[None], len(sequences), axis=0)  # (R, p)
        for i in sequences.T:
            x, w, c = net.x[i], ends[:, : -self.width].reshape(len(ends), self.width, -1), ends[:, -self.width :]
            t = np.tanh(np.einsum("rmk,rk->rm", w, x))
            r = (c * t).sum(1) - net.y[i]
            inner = np.einsum("rm,rk->rmk", r[:, None] * c * (1 - t**2), x).reshape(len(ends), -1)
            ends -= h * np.concatenate([inner, r[:, None] * t], axis=1)
        return np.asarray(ends.mean(0))

    def predicted(self, net: Net, theta: np.ndarray, h: float, scheme: str, clock: Clock) -> np.ndarray:
        if scheme == "all sequences":
            return np.asarray(-self.num_samples * h**2 / 2 * net.hess(theta) @ net.grad(theta))
        model = net.module(theta)
        with clock:
            norms = gg.sqnorms(model, half_squared, torch.from_numpy(net.x), torch.from_numpy(net.y), create_graph=True)
            gradient = torch.autograd.grad(norms.sum(), list(model.parameters()))
        return np.asarray(-(h**2) / 4 * nn.utils.parameters_to_vector(gradient).numpy())

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        n = self.num_samples
        sequences = {"all orders": np.array(list(permutations(range(n)))), "all sequences": np.array(list(product(range(n), repeat=n)))}

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            net, theta = small_net(seed, n, self.width, 20)
            row: dict[str, float] = {}
            for suffix, h in (("", self.h), (" coarser", self.coarser * self.h)):
                between()
                drift = self.mean_pass(net, theta, h, sequences[arm]) - flow("NGF", net, theta, n * h, 1, rtol=1e-13)[-1]
                formula = self.predicted(net, theta, h, arm, clock)
                length = float(np.linalg.norm(formula))
                row |= {f"along{suffix}": float(drift @ formula) / length, f"predicted{suffix}": length}
                row |= {f"residual{suffix}": float(np.linalg.norm(drift - formula)) / length}
            other = self.predicted(net, theta, self.h, self.SCHEMES[arm == self.SCHEMES[0]], Clock())
            return [{**row, "other_over_own": float(np.linalg.norm(other)) / row["predicted"], "order": row["residual coarser"] / row["residual"]}]

        return GridRun([(arm, seed) for arm in self.SCHEMES for seed in self.seeds], work)

    def claims(self) -> list[Claim]:
        orders, sequences = self.SCHEMES
        text, control = "E θ_n − flow = −(h²/4) ∇ Σ ‖∇E_k‖²", "E θ_n − flow = −(n h²/2) H g"
        return [
            ClosedForm("all orders: the drift is down the mean squared per-sample norm", orders, "along", precision=0.02, slack=0.02, formula=text),
            Claim("all orders: it is nothing else", orders, "residual", "<=", 0.05, formula=text),
            Claim("all orders: what the formula leaves out is of one order more in h", orders, "order", ">=", 0.7 * self.coarser),
            ClosedForm("all sequences: down the squared norm of the mean", sequences, "along", precision=0.02, slack=0.02, formula=control),
            Claim("all sequences: it is nothing else", sequences, "residual", "<=", 0.05, formula=control),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4.4), layout="constrained")
        ax = figure.subplots()
        for arm, colour in zip(self.SCHEMES, (BLUE, RED), strict=True):
            rows = outcome.metrics[outcome.metrics["arm"] == arm]
            for suffix, fill in (("", colour), (" coarser", "none")):
                h = self.h * (self.coarser if suffix else 1.0)
                ax.plot(rows[f"predicted{suffix}"], rows[f"along{suffix}"], "o", color=colour, mfc=fill, label=f"{arm}, h = {h:g}")
        ends = [outcome.metrics["predicted"].min() / 2, outcome.metrics["predicted coarser"].max() * 2]
        ax.plot(ends, ends, color="black", lw=0.8, ls=":")
        title = "One pass of SGD drifts down the penalty that theory names" if outcome.holds else "Drift of one pass of SGD"
        ax.set(xscale="log", yscale="log", xlabel="size of the drift by the formula", ylabel="drift measured, along the formula's", title=title)
        ax.legend(frameon=False, fontsize=9)
        return figure


# ------------------------------------------------------------------------------------------------------------------------------ drift-adjusted rates


def one_hot_squared(f: Tensor, y: Tensor) -> Tensor:
    """``mean_i ||f_i - e_{y_i}||^2 / 2``. Its curvature stays when the data are fitted, which that of the cross-entropy does not."""
    return 0.5 * (f - one_hot(y, f.shape[1])).square().sum(1).mean()


def slope_and_drift(model: nn.Module, energy: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[list[Tensor], float, float]:
    """The gradient g of the energy, ``||g||`` and ``||H g||``."""
    params = list(model.parameters())
    g = torch.autograd.grad(energy(model(x), y), params, create_graph=True)
    fixed = [v.detach() for v in g]
    hg = torch.autograd.grad(g, params, fixed)
    norms = [math.sqrt(sum(float(v.square().sum()) for v in vs)) for vs in (fixed, hg)]
    return fixed, norms[0], norms[1]


@dataclass(frozen=True)
class DriftAdjusted(Setting):
    """Full-batch training of a small network with the drift-adjusted learning rate DAL-p, ``h = 2 (||g|| / ||H g||)^p``, at most 5, and with fixed rates.

    The drift of a step relative to the step is ``(h/2) ||H g|| / ||g||``; DAL-1 holds it at 1. As ``||H g|| <= lambda_1 ||g||`` (lambda_1 the eigenvalue
    largest in magnitude), ``h lambda_1 >= 2``, with equality where g lies along u_1. That is stable by itself: above 2 the part of g along u_1 grows, with it
    ``||H g|| / ||g||`` towards lambda_1, and h falls towards 2 / lambda_1.

    DAL-1/2 has ``h lambda_1 >= 2 sqrt(lambda_1)`` by the same inequality, and so depends on the scale of the loss: it is bolder than DAL-1 where
    ``||H g|| / ||g|| > 1`` and tamer below. One arm therefore has the loss divided by ``divisor`` (and 5 times that as its largest rate).

    A fixed rate is stable up to lambda_1 = 2 / h. A run ends where its loss is 1000 times that of its start. The thesis trains VGG and ResNet-18 with
    cross-entropy on CIFAR-10 and ImageNet. Read are lambda_1, the relative drift, and ``mean ||grad E_i||^2``, of which SGD's drift is made.
    """

    name: ClassVar[str] = "discretisation/drift-adjusted"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = PAPER
    summary: ClassVar[str] = "a learning rate from ‖g‖/‖Hg‖ keeps λ₁ times the rate near 2, untuned"
    duration: ClassVar[str] = "about 2 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.top_eigenvalue", "gg.sqnorms")
    SMALL: ClassVar[dict[str, Any]] = {"steps": 200, "train_size": 300}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 5, "steps": 1500, "train_size": 800}
    needs: ClassVar[str] = "VGG and ResNet-18 on CIFAR-10 and ImageNet: GPUs for days"

    LARGEST: ClassVar[float] = 5.0
    RATES: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3)
    ONE, HALF, SCALED = "DAL, p = 1", "DAL, p = 0.5", "DAL, p = 0.5, loss divided"

    steps: int = 500
    """Steps, each on all training images."""
    readings: int = 20
    """How often lambda_1 is read, at even distances."""
    train_size: int = 600
    """Training images used."""
    width: int = 32
    """Width of the one hidden layer, tanh."""
    divisor: float = 20.0
    """Of the loss in one arm."""
    data: str = ""
    """Images of your own: a folder, CIFAR batches or IDX files, as for noise-stability/digits; without it, scikit-learn's digits."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("steps", self.steps >= self.readings, f"at least readings={self.readings}"),
            *self.at_least(4, "readings"),
            *self.at_least(1, "train_size", "width"),
            *self.positive("divisor"),
        ]

    def data_used(self) -> str:
        return data_used(self.data)

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        source = self.data or "digits"

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            images = load_images(source, seed=seed)
            x, test_x = (t.flatten(1).double().to(device) for t in (images.train_x[: self.train_size], images.test_x))
            y, test_y = images.train_y[: self.train_size].to(device), images.test_y.to(device)
            model = built(seed, lambda: perceptron([x.shape[1], self.width, len(images.classes)], nn.Tanh), device)
            return self.descend(arm, model, x, y, test_x, test_y, clock, between)

        arms = [self.ONE, self.HALF, self.SCALED, *(f"rate {h:g}" for h in self.RATES)]
        return GridRun([(arm, seed) for arm in arms for seed in self.seeds], work)

    def descend(
        self, arm: str, model: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, clock: Clock, between: Callable[[], None]
    ) -> list[dict[str, float]]:
        divisor = self.divisor if arm == self.SCALED else 1.0
        power = {self.ONE: 1.0, self.HALF: 0.5, self.SCALED: 0.5}.get(arm, 0.0)

        def energy(f: Tensor, y: Tensor) -> Tensor:
            return one_hot_squared(f, y) / divisor

        rows: list[dict[str, float]] = []
        read_at = set(np.linspace(0, self.steps, self.readings + 1).round().astype(int).tolist())
        diverged = False
        for k in range(self.steps + 1):
            between()
            with torch.no_grad():
                loss = one_hot_squared(model(x), y).item()
            if k and not loss < 1000 * rows[0]["loss"]:
                diverged = True
                break
            g, slope, bend = slope_and_drift(model, energy, x, y)
            rate = min(self.LARGEST * divisor, 2 * (slope / bend) ** power) if power else float(arm.split()[1])
            if k in read_at:
                with clock:
                    top = abs(float(gg.top_eigenvalue(model, energy, x, y, which="LM", tol=1e-4)))
                    norms = gg.sqnorms(model, energy, x, y)
                read = {"iteration": k, "loss": loss, "log_loss": math.log(loss), "accuracy": accuracy(model, test_x, test_y), "rate": rate, "lambda": top}
                rows.append({**read, "rate_lambda": rate * top, "relative_drift": rate * bend / slope / 2, "mean_sqnorm": norms.mean().item()})
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), g, alpha=rate)
        products = [row["rate_lambda"] for row in rows]
        overall = {"least": min(products), "late_median": float(np.median(products[len(products) // 2 :])), "diverged": float(diverged)}
        return [{**row, **overall} for row in rows]

    def claims(self) -> list[Claim]:
        one, half, best = self.ONE, self.HALF, f"rate {self.RATES[2]:g}"
        scale = "The rate depends on the scale of the loss: where ‖Hg‖/‖g‖ is above 1, the square root makes it larger, hλ₁ ≥ 2√λ₁."
        theorem = f"A theorem as long as the rate is not cut at {self.LARGEST:g}: what could break it is that cut."
        return [
            Claim(f"{one}: hλ₁ is never below 2", one, "least", ">=", 1.999, formula="h = 2‖g‖/‖Hg‖ ≥ 2/λ₁", remark=theorem),
            Claim(f"{one}: and near 2 in the second half", one, "late_median", "<=", 2.2, formula="hλ₁ ≈ 2"),
            Claim(f"{one} does not diverge", one, "diverged", "==", 0.0),
            MeanClaim(
                f"{one} ends at 1.1 times the loss of {best} at most, the largest below 2/λ₁",
                one,
                "log_loss",
                "<=",
                round(math.log(1.1), 4),
                versus=best,
            ),
            Claim(f"{half} does not diverge", half, "diverged", "==", 0.0, remark=scale),
            Claim(f"{half}, the loss divided by {self.divisor:g}: does not diverge", self.SCALED, "diverged", "==", 0.0),
            Claim(f"{half}, the loss divided by {self.divisor:g}: hλ₁ is 2.2 at most in the second half", self.SCALED, "late_median", "<=", 2.2),
            *(Claim(f"rate {h:g}, where hλ₁ starts below 2, does not diverge", f"rate {h:g}", "diverged", "==", 0.0) for h in self.RATES[:3]),
            Claim(f"rate {self.RATES[3]:g}, where it starts above 2 by far, does", f"rate {self.RATES[3]:g}", "diverged", "==", 1.0),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = {self.ONE: BLUE, self.HALF: SKY, self.SCALED: GREEN}
        colours |= {f"rate {h:g}": grey for h, grey in zip(self.RATES, ("#e3b9a7", "#dd9a7f", RED, "#7a2f15"), strict=True)}
        frame = outcome.metrics
        for arm, colour in colours.items():
            for number, (_, rows) in enumerate(frame[frame["arm"] == arm].groupby("seed")):
                fate = ", diverges" if rows["diverged"].iloc[0] else ""
                left.plot(rows["iteration"], rows["rate_lambda"], ".-", color=colour, lw=1.2)
                right.plot(rows["iteration"], rows["loss"], ".-", color=colour, lw=1.2, label="_" * number + arm + fate)
        left.axhline(2, color="black", lw=1, ls=":")
        near = all(v.holds for v in outcome.verdicts[:2])
        left.set(yscale="log", xlabel="step", ylabel="hλ₁", title="DAL-1 keeps the rate at the edge of stability" if near else "Rate times largest eigenvalue")
        top = 3 * float(frame[frame["diverged"] == 0]["loss"].max())
        right.set(yscale="log", xlabel="step", ylabel="training loss", title="Loss", ylim=(None, top))
        right.legend(frameon=False, fontsize=8)
        return figure


SETTINGS = (Flows, SGDDrift, DriftAdjusted)
