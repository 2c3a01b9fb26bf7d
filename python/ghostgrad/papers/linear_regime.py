"""Linear models and networks near their linearisation: interpolation that does no harm, the regime where a network is its tangent, errors over time.

P. L. Bartlett, A. Montanari, A. Rakhlin, "Deep learning: a statistical viewpoint", Acta Numerica 2021; and M. S. Advani, A. M. Saxe, H. Sompolinsky,
"High-dimensional dynamics of generalization error in neural networks", Neural Networks 2020 (arXiv 1710.03667).

All four settings stand on one fact. Full-batch gradient descent on a model that is linear in its parameters, ``f = f_0 + J (w - w_0)`` with residual
``u = f - y`` and the loss ``(c/2) ||u||^2``, moves ``u`` by ``-h c J J' u`` a step: along the eigenvectors of the Gram matrix ``J J'`` (:func:`ghostgrad.gram`)
residuals shrink by ``1 - h c l_i``, and ``w - w_0`` stays in the span of the rows of J. Hence ``w -> w_0 + J' (J J')^-1 (y - f_0)``, the interpolator that is
nearest to the start, and what of the start lies across the rows never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Setting, philox
from .figures import BLUE, GREY, OCHRE, RED, SKY, name_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BenignOverfitting",
    "GeneralisationDynamics",
    "LinearRegime",
    "ReLUStudent",
    "effective_ranks",
    "largest_eigenvalue",
    "marchenko_pastur",
    "ridgeless",
    "split_index",
    "tangent_flow",
]

DTYPE = torch.float64  # interpolation is a residual of zero, and far out in width networks differ from their tangents by 1e-4
SURVEY = ("Deep learning: a statistical viewpoint", "Bartlett, Montanari, Rakhlin (Acta Numerica 2021)")
DYNAMICS = ("High-dimensional dynamics of generalization error in neural networks", "Advani, Saxe, Sompolinsky (Neural Networks 2020)")


def _normal(seed: int, purpose: int, *shape: int) -> Tensor:
    """Standard normal numbers, a function of the arguments alone."""
    return torch.from_numpy(philox(seed, purpose).standard_normal(shape))


def _linear(inputs: int, outputs: int, weight: Tensor | float = 0.0) -> nn.Linear:
    """``y = W x``, a row of W for each output."""
    layer = nn.Linear(inputs, outputs, bias=False, dtype=DTYPE)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight, dtype=DTYPE).expand(outputs, inputs))
    return layer


def _half_mean_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(-1).mean()


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def _descend(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    lr: float,
    steps: int,
    between: Callable[[], None],
    watch: Callable[[int, Tensor], None] = lambda k, output: None,  # the output on x after k steps
) -> None:
    """Full-batch gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for k in range(steps + 1):
        if k % 100 == 0:
            between()
        output = model(x)
        watch(k, output.detach())
        if k < steps:
            optimizer.zero_grad()
            loss_fn(output, y).backward()
            optimizer.step()


# ------------------------------------------------------------------------------------------------------------------------------ benign overfitting


def effective_ranks(
    spectrum: Tensor,  # (d,), descending
    k: int,
) -> tuple[float, float]:
    """``r_k = sum_{i>k} l_i / l_{k+1}`` and ``R_k = (sum_{i>k} l_i)^2 / sum_{i>k} l_i^2``."""
    tail = spectrum[k:]
    return (tail.sum() / tail[0]).item(), (tail.sum().square() / tail.square().sum()).item()


def split_index(
    spectrum: Tensor,  # (d,), descending
    n: int,
    b: float = 2.0,
) -> int | None:
    """``k* = min{k : r_k >= b n}``: from here on the spectrum acts as a ridge. None if there is no such k."""
    below = spectrum.flip(0).cumsum(0).flip(0) / spectrum >= b * n
    return int(below.int().argmax()) if below.any() else None


def ridgeless(
    spectrum: Tensor,  # (d,)
    theta: Tensor,  # (d,), the coefficients of the truth
    n: int,
) -> tuple[float, float, float]:
    """``(kappa, bias, v)``: the excess risk of the least-norm interpolator of n samples tends to ``bias + sigma^2 v`` where n and d grow together.

    ``kappa`` solves ``n = sum_i l_i / (l_i + kappa)``. With ``df2 = sum_i l_i^2 / (l_i + kappa)^2``: ``v = (df2 / n) / (1 - df2 / n)`` and
    ``bias = kappa^2 sum_i l_i theta_i^2 / (l_i + kappa)^2 / (1 - df2 / n)``, the ridge formulas of Hastie, Montanari, Rosset, Tibshirani (Annals of Statistics
    2022) with no ridge.
    """
    from scipy.optimize import brentq

    at = brentq(lambda log: (spectrum / (spectrum + math.exp(log))).sum().item() - n, math.log(spectrum.min().item()) - 40, math.log(spectrum.sum().item()) + 1)
    kappa = math.exp(at)
    share = (spectrum / (spectrum + kappa)).square().sum().item() / n
    bias = kappa**2 * (spectrum * (theta / (spectrum + kappa)).square()).sum().item()
    return kappa, bias / (1 - share), share / (1 - share)


@dataclass(frozen=True)
class BenignOverfitting(Setting):
    """Least squares with more unknowns than samples, ``y = x'theta + noise``, x normal with covariance eigenvalues l_1 >= l_2 >= ...: the noise is fitted
    exactly, and whether that hurts depends on the eigenvalues alone.

    *Interpolation.* Gradient descent from 0 stays in the span of the samples and ends at ``X'(XX')^-1 y``. It is run at the smallest n, with step ``1 /
    lambda_max`` (:func:`ghostgrad.top_eigenvalue`).

    *Exact variance.* The noise adds ``w = X'K^-1 e`` with ``K = XX'`` (:func:`ghostgrad.gram`), so ``E_e ||w||_S^2 = sigma^2 tr(S X'K^-2 X) = sigma^2 tr(K^-1
    (X S X') K^-1)``, and ``X S X'`` is the Gram matrix of inputs scaled by ``sqrt(l)``. Truth across the samples is lost: bias ``||(I - X'K^-1 X)
    theta||_S^2``. Both are held against solutions by QR factorisation for many draws of the noise.

    *Effective ranks* (Bartlett, Long, Lugosi, Tsigler, PNAS 2020): the variance is ``sigma^2 (k*/n + n/R_k*)`` up to a constant (:func:`effective_ranks`,
    :func:`split_index` with b = 2). The constant, for k* <= n/4, from the limit ``v = q / (1 - q)``, ``q = df2 / n`` of :func:`ridgeless`: write k = k*, s for
    the sum of the tail. ``n = sum_i l_i / (l_i + kappa)`` is at most ``k + s / kappa`` and at least ``s / (l_{k+1} + kappa)``; with ``l_{k+1} <= s / 2n`` this
    gives ``s / 2n <= kappa <= s / (n - k) <= 4s / 3n``. So q is at most ``k/n + sum_{i>k} (l_i / kappa)^2 / n <= k/n + 4 n/R_k``. For i > k, ``l_i + kappa <=
    (1/2 + 4/3) s/n``: the tail gives at least ``(6/11)^2 n/R_k``; for i <= k, ``l_i > s / 2n``, so each gives at least ``(1 / (1 + 8/3))^2 = (3/11)^2`` of
    1/n. With q <= 1/2, v is at most 2 q. Hence ``9/121 <= v / (k*/n + n/R_k*) <= 8``: the bound that is claimed.

    *Spectra.* "spiked": 5 times 1 and a tail of equal eigenvalues 1/n, ``d = n^1.5`` of them: variance about ``5/n + n^-1/2``, benign. "exponential": ``e^-i +
    1/n``, their second example, benign. "few": 5 times 1 and only ``d = 4n`` equal ones of the same sum: the variance stays at ``sigma^2 (n/d) / (1 - n/d) =
    sigma^2 / 3``. "power": ``i^-2``, where ``df2 / n -> 1/2`` and the variance stays at sigma^2: ``sum_i 1 / (1 + kappa i^a)`` is to ``sum_i 1 / (1 + kappa
    i^a)^2`` as 1 to 1 - 1/a. There k* > n, and their theorem says that the risk is at least a constant.

    The survey has no experiment of this; sizes are ours.
    """

    name: ClassVar[str] = "regression/benign-overfitting"
    title: ClassVar[str] = SURVEY[0]
    paper: ClassVar[str] = SURVEY[1]
    summary: ClassVar[str] = "fitting noise exactly does no harm if the covariance has many small eigenvalues, k*/n + n/R_k* says how much"
    duration: ClassVar[str] = "about 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.gram", "gg.output_sqnorms", "gg.top_eigenvalue")
    SMALL: ClassVar[dict[str, Any]] = {"largest": 240}
    PAPER: ClassVar[dict[str, Any]] = {"largest": 800, "num_seeds": 10}

    BENIGN: ClassVar[tuple[str, ...]] = ("spiked", "exponential")
    HARMFUL: ClassVar[tuple[str, ...]] = ("few", "power")
    TRUTH: ClassVar[int] = 5  # the truth lies in the first five directions

    num_seeds: int = 5
    """How many seeds, each with its own samples and noise."""
    largest: int = 400
    """The most samples n; an eighth, a quarter and half of it are run too."""
    sigma: float = 1.0
    """Standard deviation of the labels' noise; the truth has unit norm."""
    draws: int = 200
    """Draws of the noise for each set of samples."""
    descent_steps: int = 1000
    """Steps of gradient descent at the smallest n."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("largest", self.largest >= 160 and self.largest % 8 == 0, "a multiple of 8, at least 160"),
            ("sigma", 1e-50 <= self.sigma <= 1e50, "between 1e-50 and 1e50"),
            *self.at_least(2, "draws"),
            *self.at_least(1, "descent_steps"),
        ]

    @property
    def sizes(self) -> list[int]:
        return [self.largest // 8, self.largest // 4, self.largest // 2, self.largest]

    def spectrum(self, arm: str, n: int) -> Tensor:
        """The covariance's eigenvalues, descending."""
        many, spikes = round(n**1.5), torch.ones(self.TRUTH, dtype=DTYPE)
        index = torch.arange(1, 10 * n + 1 if arm == "power" else many + 1, dtype=DTYPE)
        return {
            "spiked": lambda: torch.cat([spikes, torch.full((many,), 1 / n, dtype=DTYPE)]),
            "exponential": lambda: torch.exp(-index) + 1 / n,
            "few": lambda: torch.cat([spikes, torch.full((4 * n,), many / n / (4 * n), dtype=DTYPE)]),
            "power": lambda: index**-2,
        }[arm]()

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            rows = []
            for n in self.sizes:
                between()
                rows.append(self.measure(arm, n, seed, device, clock))
            descent = self.descent(arm, seed, device, clock, between)
            for row in rows:
                row["descent_distance"] = descent
                row["fall"] = rows[-1]["excess"] / rows[0]["excess"]
                row["ratio_low"], row["ratio_high"] = (extreme(r["ratio"] for r in rows) for extreme in (min, max))
            return rows

        return GridRun([(arm, seed) for arm in self.BENIGN + self.HARMFUL for seed in self.seeds], work)

    def problem(self, arm: str, n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues (d,), truth (d,), samples (n, d), labels (n, 1 + draws): without noise, and with each draw of it."""
        spectrum = self.spectrum(arm, n).to(device)
        theta = torch.zeros_like(spectrum)
        theta[: self.TRUTH] = 1 / math.sqrt(self.TRUTH)
        x = _normal(seed, 2 * n, n, len(spectrum)).to(device) * spectrum.sqrt()
        noise = self.sigma * _normal(seed, 2 * n + 1, n, self.draws).to(device)
        return spectrum, theta, x, torch.cat([torch.zeros_like(noise[:, :1]), noise], 1) + (x @ theta)[:, None]

    def measure(self, arm: str, n: int, seed: int, device: torch.device, clock: Clock) -> dict[str, float]:
        spectrum, theta, x, y = self.problem(arm, n, seed, device)
        model = _linear(len(spectrum), 1).to(device)
        with clock:
            kernel, weighted = gg.gram(model, x), gg.gram(model, x * spectrum.sqrt())
            trace = gg.output_sqnorms(model, x).mean().item()
        inverse = torch.linalg.inv(kernel)
        lost = theta - x.T @ (inverse @ (x @ theta))
        bias, variance = (spectrum * lost.square()).sum().item(), self.sigma**2 * (inverse @ weighted @ inverse).trace().item()

        q, r = torch.linalg.qr(x.T)  # least-norm solutions once more, without the Gram matrix
        fits = q @ torch.linalg.solve_triangular(r.T, y, upper=False)  # (d, 1 + draws)
        noise = (spectrum[:, None] * (fits[:, 1:] - fits[:, :1]).square()).sum(0).mean().item()
        excess = (spectrum[:, None] * (fits[:, 1:] - theta[:, None]).square()).sum(0).mean().item()
        _, limit_bias, limit_variance = ridgeless(spectrum, theta, n)
        k = split_index(spectrum, n)
        bound = math.nan if k is None else self.sigma**2 * (k / n + n / effective_ranks(spectrum, k)[1])
        return {
            "n": n,
            "dimension": len(spectrum),
            "trace": trace,
            "trace_predicted": spectrum.sum().item(),
            "noise": noise,
            "noise_predicted": variance,
            "excess": excess,
            "excess_predicted": bias + variance,
            "excess_limit": limit_bias + self.sigma**2 * limit_variance,
            "misfit": ((x @ fits - y).norm() / y.norm()).item(),
            "k_star": -1 if k is None else k,
            "bound": bound,
            "ratio": variance / bound,
        }

    def descent(self, arm: str, seed: int, device: torch.device, clock: Clock, between: Callable[[], None]) -> float:
        """How far from ``X'K^-1 y`` gradient descent ends, relative to its norm."""
        spectrum, _, x, y = self.problem(arm, self.sizes[0], seed, device)
        model, labels = _linear(len(spectrum), 1).to(device), y[:, 1:2]
        with clock:
            largest = float(gg.top_eigenvalue(model, _half_mean_square, x, labels))
            kernel = gg.gram(model, x)
        _descend(model, _half_mean_square, x, labels, 1 / largest, self.descent_steps, between)
        nearest = (x.T @ torch.linalg.solve(kernel, labels)).T
        return ((model.weight.detach() - nearest).norm() / nearest.norm()).item()

    def claims(self) -> list[Claim]:
        n, variance, ranks = self.largest, "V = σ² tr(Σ Xᵀ(XXᵀ)⁻²X)", "9/121 ≤ V / σ²(k*/n + n/R_k*) ≤ 8"
        claims: list[Claim] = [Claim(f"{a}: gradient descent from 0 ends at X'(XX')⁻¹y", a, "descent_distance", "<=", 1e-6) for a in (*self.BENIGN, "few")]
        for arm in self.BENIGN + self.HARMFUL:
            claims += [
                Claim(f"{arm}: noisy labels are fitted exactly", arm, "misfit", "<=", 1e-8),
                ClosedForm(f"{arm}, n = {n}: what the noise adds", arm, "noise", against="noise_predicted", precision=0.05, formula=variance),
                ClosedForm(
                    f"{arm}, n = {n}: the excess risk in the limit of large n and d",
                    arm,
                    "excess",
                    against="excess_limit",
                    precision=0.1,
                    slack=0.05,  # the limit's error is of the order of 1/n, times the spikes
                    formula="E = (bias + σ² df₂/n) / (1 − df₂/n)",
                ),
            ]
        traces = "mean ‖∇f(xᵢ)‖² = tr Σ"
        wide = "The constants are this setting's, derived for large n and far apart: an order of magnitude is what is tested."
        claims.append(ClosedForm("spiked: the mean squared norm of the output's gradient", "spiked", "trace", against="trace_predicted", formula=traces))
        for arm in (*self.BENIGN, "few"):
            claims += [
                Claim(f"{arm}: effective ranks bound the variance from below, at every n", arm, "ratio_low", ">=", 9 / 121, formula=ranks, remark=wide),
                Claim(f"{arm}: and from above", arm, "ratio_high", "<=", 8.0, formula=ranks, remark=wide),
            ]
        falls = "A fall as n^-1/2 would leave 0.35 from n to 8n."
        claims += [MeanClaim(f"{arm}: the excess risk falls by half or more from n to 8n", arm, "fall", "<=", 0.5, remark=falls) for arm in self.BENIGN]
        floor = 0.25 * self.sigma**2
        return claims + [
            MeanClaim(f"{arm}: it stays above σ²/4, n = {n}", arm, "excess", ">=", floor, formula=f) for arm, f in zip(self.HARMFUL, ("V → σ²/3", "V → σ²"))
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = dict(zip(self.BENIGN + self.HARMFUL, (BLUE, SKY, OCHRE, RED), strict=True))
        ends: dict[Axes, list[tuple[float, str, str]]] = {left: [], right: []}
        for arm, colour in colours.items():
            rows = outcome.metrics[outcome.metrics["arm"] == arm]
            mean = rows.groupby("n").mean(numeric_only=True)
            for ax, dots, line in ((left, "excess", "excess_limit"), (right, "ratio", "ratio")):
                ax.plot(rows["n"], rows[dots], "o", color=colour, ms=3.5, alpha=0.5, mew=0)
                ax.plot(mean.index, mean[line], color=colour, lw=1.4)
                ends[ax].append((mean[line].iloc[-1], arm + " (k* > n)" * (ax is right and arm == "power"), colour))
        right.axhspan(9 / 121, 8, color="0.92", zorder=0)
        right.text(0.03, 0.9, "derived bounds, 9/121 to 8", transform=right.transAxes, va="top", fontsize=9, color="0.4")
        title = "Fitted noise fades, or stays: the spectrum decides" if outcome.holds else "Excess risk of the least-norm interpolator"
        left.set(xscale="log", yscale="log", xlabel="samples n", ylabel="excess risk", title=title)
        left.text(0.03, 0.03, "● runs   — (bias + σ² df₂/n) / (1 − df₂/n)", transform=left.transAxes, fontsize=9)
        right.set(
            xscale="log", yscale="log", ylim=(0.05, 12), xlabel="samples n", ylabel="variance / σ²(k*/n + n/R_k*)", title="Variance against effective ranks"
        )
        for ax in (left, right):
            ax.set_xticks(self.sizes, [str(n) for n in self.sizes])
            ax.minorticks_off()
            name_curves(ax, ends[ax])
        return figure


# ----------------------------------------------------------------------------------------------------------------------------------- linear regime


def tangent_flow(
    kernel: Tensor,  # (n, n), the Gram matrix of the samples at the start
    cross: Tensor,  # (t, n), that of the test points with the samples
    residual: Tensor,  # (n,) or (n, k), f - y at the start
    rate: float,  # step times the loss's weight c
    steps: int,
) -> tuple[Tensor, Tensor]:  # (t,) or (t, k) and (n,) or (n, k)
    """What ``steps`` of gradient descent add to a model's output on the test points if it is linear in its parameters, and the residual that they leave.

    ``u_k = (1 - rate K)^k u_0``, and the output moves by ``-rate K(x, X) u_k`` a step, in all ``-K(x, X) K^-1 (1 - (1 - rate K)^k) u_0``.
    """
    values, vectors = torch.linalg.eigh(kernel)
    part = vectors.T @ residual
    left = (1 - rate * values).pow(steps)
    gone = torch.where(values > 1e-12 * values[-1], (1 - left) / values, steps * rate)  # K = 0 in a direction: nothing is read there but 0 times this
    scale = (slice(None),) + (None,) * (part.ndim - 1)
    return -cross @ (vectors @ (gone[scale] * part)), vectors @ (left[scale] * part)


class _TwoLayer(nn.Module):
    """``f(x) = (scale / sqrt(m)) sum_r a_r s(w_r'x)``: the parametrisation in which the tangent kernel has a limit."""

    def __init__(self, w: Tensor, a: Tensor, activation: nn.Module, scale: float) -> None:
        super().__init__()
        self.hidden, self.readout, self.activation = _linear(w.shape[1], len(w), w), _linear(len(w), 1, a), activation
        self.factor = scale / math.sqrt(len(w))

    def forward(self, x: Tensor) -> Tensor:  # (n, d) -> (n, 1)
        return self.factor * self.readout(self.activation(self.hidden(x)))


@dataclass(frozen=True)
class LinearRegime(Setting):
    """A two-layer network, both layers trained by gradient descent, against its linearisation at the start, trained likewise: when are they the same?

    ``f(x) = m^-1/2 sum_r a_r s(w_r'x)``, ``a_r`` = +-1 and ``w_r`` standard normal at the start, s softplus, or in one arm ReLU; samples on the unit sphere.
    The linearised network is followed in closed form (:func:`tangent_flow`) from the tangent kernel at the start (:func:`ghostgrad.gram`). The labels are ``y
    + f_0(x)``, so that every network starts with the residual -y. Step: half of ``1 / lambda_max`` of the Gauss-Newton matrix
    (:func:`ghostgrad.top_eigenvalue`), which is ``lambda_max(K) / n``.

    *Why width helps.* Unit r moves by ``da_r = -m^-1/2 p_r`` and ``dw_r = -m^-1/2 a_r q_r``, with ``p_r, q_r`` of order 1, functions of ``w_r`` and the
    residuals. To second order, ``f - f_lin = m^-1/2 sum_r [s'(w_r'x) da_r dw_r'x + a_r s''(w_r'x) (dw_r'x)^2 / 2] = m^-3/2 sum_r a_r G(w_r, a_r^2)``. Taken
    absolutely that is ``m^-1/2``: the rate of the theorems (survey, section 5; Chizat, Oyallon, Bach, NeurIPS 2019), met if all ``a_r`` have one sign, "one
    sign". With random signs the sum is of order ``m^1/2`` and the rest ``1/m``, "random signs". The same count holds for the kernel's change, ``(1/m) sum_r``
    of terms with one factor ``da_r`` or ``dw_r``.

    *Kinks* ("ReLU", random signs). ``s'' = 0``, but of m units a share of order ``m^-1/2`` has ``w_r'x`` change its sign, and is then off by ``m^-1/2 a_r
    |w_r'x|``, of order ``1/m``. With independent signs these ``m^1/2`` terms would make ``m^-3/4``. But a unit that is on at the sample x_i is moved by x_i's
    residual, and one that is off is not: from the two sides units reach the kink at different speeds, the sum has a mean, and ``m^-1/2`` remains, with a small
    factor. (Of 32,768 units, four seeds together, 1,623 went off at a sample and 1,006 on; at test points 5,539 and 5,492.) So the powers 1, 3/4 and 1/2 all
    enter, and the slope measured lies between 1 and 1/2: over 30 seeds the gap's is 0.73 from 512 to 2,048 units, 0.60 to 8,192, 0.57 to 32,768.

    *Why scale helps.* Scaled by alpha, gradients are alpha times larger, fitting takes parameters ``1/alpha`` as far, and the second order is ``alpha
    (1/alpha)^2``: the rest falls as ``1/alpha``, at any width ("scaled": 256 units, one sign).

    *Lazy residuals.* Along the kernel's eigenvector i the residual after k steps is ``(1 - eta l_i / n)^k``, about ``e^(-eta l_i k / n)``, of what it was.
    Measured for the three eigenvectors with the largest share in y, each at the first step at which it should be at 1/e or less.

    The survey proves bounds and runs no such experiment: sizes are ours. Its two-layer example trains the first layer alone; here both are trained.
    """

    name: ClassVar[str] = "regression/linear-regime"
    title: ClassVar[str] = SURVEY[0]
    paper: ClassVar[str] = SURVEY[1]
    summary: ClassVar[str] = "a wide two-layer network trains as its linearisation does: the gap falls as m^-1/2 or 1/m, by the signs of its readout"
    duration: ClassVar[str] = "about 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.gram", "gg.output_sqnorms", "gg.top_eigenvalue")
    SMALL: ClassVar[dict[str, Any]] = {"largest": 2048, "steps": 200}
    PAPER: ClassVar[dict[str, Any]] = {"largest": 16384}

    SLOPES: ClassVar[dict[str, float]] = {"random signs": -1.0, "one sign": -0.5, "scaled": -1.0}
    ARMS: ClassVar[tuple[str, ...]] = (*SLOPES, "ReLU")
    COLOURS: ClassVar[dict[str, str]] = {"random signs": BLUE, "one sign": RED, "ReLU": OCHRE, "scaled": GREY}
    STRONGEST: ClassVar[int] = 3  # eigenvectors whose decay is measured

    num_seeds: int = 16
    """How many seeds, each with its own samples and starts."""
    largest: int = 4096
    """Largest width m; a 4th, a 16th and a 64th of it are run too, and scales alpha of 1, 4, 16, 64."""
    samples: int = 10
    """Training samples, on the unit sphere."""
    dim: int = 10
    """Inputs."""
    tests: int = 50
    """Test points."""
    steps: int = 400
    """Steps of gradient descent."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("largest", self.largest >= 64 and self.largest % 64 == 0, "a multiple of 64"),
            ("samples", self.samples >= self.STRONGEST, f"at least {self.STRONGEST}"),
            *self.at_least(2, "dim"),
            *self.at_least(1, "tests", "steps"),
        ]

    def network(self, arm: str, scale: int, seed: int) -> nn.Module:
        m = 256 if arm == "scaled" else scale
        a = _normal(seed, 1, m).sign()
        activation = nn.ReLU() if arm == "ReLU" else nn.Softplus()
        return _TwoLayer(_normal(seed, 2, m, self.dim), a.abs() if arm in ("one sign", "scaled") else a, activation, float(scale) if arm == "scaled" else 1.0)

    def points(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, what is to be learned of each, test points."""
        x = nn.functional.normalize(_normal(seed, 0, self.samples + self.tests, self.dim))
        return x[: self.samples], _normal(seed, 3, self.samples, 1), x[self.samples :]

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            scales = [4**k for k in range(4)] if arm == "scaled" else [self.largest // 4**k for k in (3, 2, 1, 0)]
            rows = [self.measure(self.network(arm, scale, seed).to(device), scale, seed, device, clock, between) for scale in scales]
            for column in ("gap", "kernel_drift"):
                slope = float(np.polyfit(np.log(scales), np.log([row[column] for row in rows]), 1)[0])
                for row in rows:
                    row[f"{column}_slope"] = slope
            for row in rows:
                row["slope_predicted"] = self.SLOPES.get(arm, math.nan)
            return rows

        return GridRun([(arm, seed) for arm in self.ARMS for seed in self.seeds], work)

    def measure(self, model: nn.Module, scale: int, seed: int, device: torch.device, clock: Clock, between: Callable[[], None]) -> dict[str, float]:
        x, y, test = (t.to(device) for t in self.points(seed))
        with torch.no_grad():
            labels, before = y + model(x), model(test)
        with clock:
            kernel, cross = gg.gram(model, x), gg.gram(model, test, x)
            trace = gg.output_sqnorms(model, x).sum().item()
            lr = 0.5 / float(gg.top_eigenvalue(model, _half_mean_square, x, labels, curvature="ggn"))
        rate = lr / self.samples
        values, vectors = torch.linalg.eigh(kernel)  # of a narrow network an eigenvalue may be 0
        strongest = (vectors.T @ y)[:, 0].abs().argsort(descending=True)[: self.STRONGEST].tolist()
        speeds = [-math.log1p(-rate * values[i].item()) for i in strongest]
        due = [math.ceil(1 / speed) if speed * self.steps > 1 else self.steps for speed in speeds]
        shares: dict[int, float] = {}

        def watch(k: int, output: Tensor) -> None:
            for place, i in enumerate(strongest):
                if k == due[place]:
                    shares[place] = (vectors[:, i] @ (output - labels) / -(vectors[:, i] @ y)).item()

        _descend(model, _half_mean_square, x, labels, lr, self.steps, between, watch)
        with torch.no_grad():
            moved = model(test) - before
            loss = _half_mean_square(model(x), labels).item()
        tangent, _ = tangent_flow(kernel, cross, -y, rate, self.steps)
        with clock:
            kernel_after, trace_after = gg.gram(model, x), gg.output_sqnorms(model, x).sum().item()
        row = {
            "scale": scale,
            "loss": loss,
            "gap": ((moved - tangent).norm() / tangent.norm()).item(),
            "kernel_drift": ((kernel_after - kernel).norm() / kernel.norm()).item(),
            "trace_drift": abs(trace_after / trace - 1),
            "trace_mismatch": abs(trace / kernel.trace().item() - 1),
        }
        for place in range(self.STRONGEST):
            row |= {f"speed_{place + 1}": -math.log(abs(shares[place])) / due[place], f"speed_{place + 1}_predicted": speeds[place]}
        return row

    def claims(self) -> list[Claim]:
        why = {
            "random signs": "‖f − f_lin‖ ~ m⁻¹: m^(-3/2) Σ aᵣ Gᵣ with random signs",
            "one sign": "‖f − f_lin‖ ~ m^(-1/2): m^(-3/2) Σ |aᵣ| Gᵣ",
            "scaled": "‖f − f_lin‖ ~ 1/α",
        }
        claims: list[Claim] = []
        for arm, slope in self.SLOPES.items():
            over = "the scale" if arm == "scaled" else "the width"
            for column, what in (("gap_slope", "the gap to the linearised network"), ("kernel_drift_slope", "the kernel's relative change")):
                claims.append(
                    ClosedForm(
                        f"{arm}: {what} falls with {over}, power {slope:g}",
                        arm,
                        column,
                        against="slope_predicted",
                        precision=0.15,
                        slack=0.1,  # a power law has corrections at these widths
                        formula=why[arm],
                    )
                )
        kinks: dict[str, Any] = {"formula": "between m⁻¹ and m^(-1/2)", "remark": "Powers 1, 3/4 and 1/2 are all present: the local one falls with the width."}
        claims += [
            MeanClaim("ReLU: the gap falls at least as fast as m^-1/2", "ReLU", "gap_slope", "<=", -0.5, **kinks),
            MeanClaim("ReLU: and not faster than 1/m", "ReLU", "gap_slope", ">=", -1.0, **kinks),
            MeanClaim("ReLU: the kernel's change falls at least as fast as m^-1/2", "ReLU", "kernel_drift_slope", "<=", -0.5, **kinks),
        ]
        decay = "vᵢᵀ(f − y) ~ (1 − η λᵢ/n)^k"
        for k in range(1, self.STRONGEST + 1):
            column, text = f"speed_{k}", f"random signs, m = {self.largest}: decay along the eigenvector with share {k} in y"
            claims.append(ClosedForm(text, "random signs", column, against=f"{column}_predicted", precision=0.05, slack=0.02, formula=decay))
        identity = "An identity: it checks the two calls against each other."
        claims.append(Claim("the kernel's trace is the sum of the outputs' gradient norms", "random signs", "trace_mismatch", "<=", 1e-10, remark=identity))
        return claims

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        frame = outcome.metrics
        slopes = [v for v in outcome.verdicts if v.claim.column.endswith("slope")]
        for ax, column, label in zip(figure.subplots(1, 2), ("gap", "kernel_drift"), ("‖f − f_lin‖ / ‖f_lin‖, test points", "‖K − K₀‖ / ‖K₀‖"), strict=True):
            names = []
            for arm in ("random signs", "one sign", "ReLU"):
                rows, colour = frame[frame["arm"] == arm], self.COLOURS[arm]
                slope = self.SLOPES.get(arm, float(rows[f"{column}_slope"].mean()))
                mean = np.exp(np.log(rows.set_index("scale")[column]).groupby("scale").mean())
                ax.plot(rows["scale"], rows[column], "o", color=colour, ms=3, alpha=0.35, mew=0)
                ax.plot(mean.index, mean.iloc[0] * (mean.index / mean.index[0]) ** slope, color=colour, lw=1.4)
                names.append((mean.iloc[-1], f"{arm}\n$m^{{{slope:.2g}}}$" + ("" if arm in self.SLOPES else ", fitted"), colour))
            ax.set(xscale="log", yscale="log", xlabel="width m", ylabel=label)
            ticks = sorted(frame[frame["arm"] == "ReLU"]["scale"].unique())
            ax.set_xticks(ticks, [str(m) for m in ticks])
            ax.minorticks_off()
            name_curves(ax, names)
        good = all(v.holds for v in slopes)
        figure.axes[0].set_title("Wide networks train as their tangents, at the derived rates" if good else "Distance to the linearised network")
        figure.axes[1].set_title("Change of the tangent kernel")
        return figure


# -------------------------------------------------------------------------------------------------------------------------- generalisation dynamics


def marchenko_pastur(alpha: float, values: Callable[[np.ndarray], np.ndarray]) -> float:
    """The mean of ``values(l)`` over the eigenvalues of ``XX'``, X (N, alpha N) with entries of variance 1/N, N to infinity.

    Density ``sqrt((l_+ - l)(l - l_-)) / (2 pi l)`` with ``l_+- = (sqrt(alpha) +- 1)^2``, and 1 - alpha of them at 0 if alpha < 1. With
    ``l = 1 + alpha + 2 sqrt(alpha) cos(t)`` it is ``(2 alpha / pi) sin(t)^2 / l dt`` over 0 ... pi, smooth and periodic: the midpoint rule converges fast.
    """
    t = (np.arange(2000) + 0.5) * math.pi / 2000
    at = 1 + alpha + 2 * math.sqrt(alpha) * np.cos(t)
    bulk = float((2 * alpha * np.sin(t) ** 2 / at * values(at)).mean())
    return bulk + max(1 - alpha, 0.0) * float(values(np.zeros(1))[0])


def largest_eigenvalue(n: int, p: int) -> float:
    """The mean of the largest eigenvalue of ``XX'``, X (n, p) standard normal, by Tracy and Widom's law for real matrices."""
    root = math.sqrt(n - 1) + math.sqrt(p)
    return root**2 - 1.2065336 * root * (1 / math.sqrt(n - 1) + 1 / math.sqrt(p)) ** (1 / 3)


@dataclass(frozen=True)
class GeneralisationDynamics(Setting):
    """A linear student of N weights learns a noisy linear teacher from ``P = alpha N`` samples by gradient descent: its test error at every moment, in closed
    form.

    Teacher entries have variance 1, the student's at the start ``start^2``, labels noise of variance ``noise``, inputs variance 1/N. The loss is ``(1/2)
    sum_mu r_mu^2``, so with ``z`` the error of the weights along an eigenvector of ``XX'`` with eigenvalue l, ``e`` the noise's part there and step h, ``z <-
    z - h (l z + sqrt(l) e)``. After k steps, time ``t = h k``: ``z = c z_0 - (1 - c) e / sqrt(l)`` with ``c = (1 - h l)^k``, which is ``e^(-l t)`` for h -> 0.
    Averaged, with ``A = 1 + start^2``::

        E_g(t) = noise + (1/N) sum_i [A c_i^2 + (noise / l_i) (1 - c_i)^2]    (paper, section 2; there with e^(-l t), gradient flow)

    over the N eigenvalues of the run's samples, or with the integral over Marchenko and Pastur's law for the sum (:func:`marchenko_pastur`).

    - *Frozen.* If alpha < 1, N - P eigenvalues are 0: there ``c = 1`` for ever, and ``(1 - alpha) A`` of the error stays. So a large start is never forgotten.
    - *Overtraining*, the last error over the least one, is the worst at alpha = 1: the noise term tends to ``noise / l``, the law's smallest positive l is
      ``(1 - sqrt(alpha))^2``.
    - *Stopping.* A single eigenvalue would be stopped best at ``c = 1 / (1 + l A / noise)``, all together where the integral is least. Stopped there, the run
      is to be within 2 % of its own least error.
    - *Per-sample norms* ``r_mu(t)^2 ||x_mu||^2`` (:func:`ghostgrad.sqnorms`): along the eigenvectors v_j of ``X'X`` (P of them) residuals are ``c_j`` times
      what they were, so ``E r_mu^2 = sum_j v_{mu j}^2 c_j^2 (l_j A + noise)``, zeros of l among them: there the noise is never fitted.
    - *Curvature.* The Hessian is ``XX'``: its trace is the sum of ``||x_mu||^2`` (:func:`ghostgrad.output_sqnorms`), alpha N on average, its largest
      eigenvalue ``(mu - 1.2065 s) / N`` with ``mu = (sqrt(N - 1) + sqrt(P))^2`` and ``s = sqrt(mu) (1 / sqrt(N - 1) + 1 / sqrt(P))^(1/3)``, by the mean of
      Tracy and Widom's law (Johnstone, Annals of Statistics 2001); it tends to ``(1 + sqrt(alpha))^2``.

    Each run trains ``tasks`` students of as many teachers on the same inputs at once, the outputs of one linear layer, and averages over them. N = 80 and the
    other sizes are ours: the sizes of the paper's figures could not be confirmed.
    """

    name: ClassVar[str] = "regression/generalisation-dynamics"
    title: ClassVar[str] = DYNAMICS[0]
    paper: ClassVar[str] = DYNAMICS[1]
    summary: ClassVar[str] = (
        "the test error of a linear student over time in closed form: overtraining is worst at as many samples as weights, and some weights freeze"
    )
    duration: ClassVar[str] = "about 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms", "gg.output_sqnorms", "gg.top_eigenvalue")
    SMALL: ClassVar[dict[str, Any]] = {"time": 100.0}
    PAPER: ClassVar[dict[str, Any]] = {"weights": 300, "num_seeds": 20}
    ALPHAS: ClassVar[dict[str, float]] = {"α = 1/4": 0.25, "α = 1/2": 0.5, "α = 1": 1.0, "α = 2": 2.0, "α = 4": 4.0}
    LARGE: ClassVar[str] = "α = 1/2, large start"

    num_seeds: int = 8
    """How many seeds, each with its own inputs, teachers, noise and starts."""
    weights: int = 80
    """Weights N of a student."""
    tasks: int = 50
    """Teachers, and students, of a run."""
    noise: float = 0.2
    """Variance of the labels' noise; that of a teacher's output is 1."""
    start_deviation: float = 0.1
    """Standard deviation of the weights at the start; of a large start it is 1."""
    lr: float = 0.1
    """Step h of gradient descent; the Hessian's largest eigenvalue is about 9 at alpha = 4."""
    time: float = 400.0
    """When training ends."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("weights", self.weights >= 8 and self.weights % 4 == 0, "a multiple of 4, at least 8"),
            *self.at_least(1, "tasks"),
            *self.positive("noise"),
            ("start_deviation", 0 <= self.start_deviation <= 1, "between 0 and 1"),
            ("lr", 0 < self.lr <= 0.2, "between 0 and 0.2, or alpha = 4 diverges"),
            ("time", self.lr <= self.time <= 1e9 * self.lr, f"at least one step of lr={self.lr:g} and at most 1e9 of them"),
        ]

    @property
    def readings(self) -> list[int]:
        """The steps at which a run is read, even in the logarithm of time."""
        steps = round(self.time / self.lr)
        return sorted({0, *(round(k) for k in np.geomspace(1, steps, 60))})

    def formula(self, alpha: float, start: float, k: int, of: Callable[[Callable[[np.ndarray], np.ndarray]], float]) -> float:
        """The test error after k steps; ``of`` averages over eigenvalues."""

        def term(values: np.ndarray) -> np.ndarray:
            c = (1 - self.lr * values) ** k
            fitted = np.divide((1 - c) ** 2, values, out=np.zeros_like(values), where=values > 1e-12)
            return (1 + start**2) * c**2 + self.noise * fitted

        return self.noise + of(term)

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        return GridRun([(arm, seed) for arm in (*self.ALPHAS, self.LARGE) for seed in self.seeds], self.work(device))

    def work(self, device: torch.device) -> Callable[[str, int, Clock, Callable[[], None]], list[dict[str, float]]]:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            alpha = self.ALPHAS.get(arm, 0.5)
            start = 1.0 if arm == self.LARGE else self.start_deviation
            n, p, tasks = self.weights, round(alpha * self.weights), self.tasks
            x = (_normal(seed, 0, 4 * n, n)[:p] / math.sqrt(n)).to(device)
            teacher, first = _normal(seed, 1, tasks, n).to(device), start * _normal(seed, 2, tasks, n).to(device)
            y = x @ teacher.T + math.sqrt(self.noise) * _normal(seed, 3, 4 * n, tasks)[:p].to(device)
            model = _linear(n, tasks, first).to(device)

            values, vectors = torch.linalg.eigh(x @ x.T)  # (p,), of X'X in the paper's letters: its samples are columns
            spectrum = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).cpu().numpy()
            values, norms = values.clamp(min=0), x.square().sum(1)
            if p > n:
                values[: p - n] = 0
            if n > p:
                spectrum[: n - p] = 0
            basis = torch.linalg.qr(x.T)[0] if p < n else torch.eye(n, dtype=DTYPE, device=device)  # of the span of the samples

            def across(w: Tensor) -> Tensor:
                return w - (w @ basis) @ basis.T

            with clock:
                seeds = gg.output_sqnorms(model, x).sum().item() / tasks
                top = float(gg.top_eigenvalue(model, _half_square, x, y))
            rows: list[dict[str, float]] = []
            readings = set(self.readings)

            def watch(k: int, output: Tensor) -> None:
                if k not in readings:
                    return
                with clock:
                    sqnorms = gg.sqnorms(model, _half_square, x, y, reduction="sum")
                by_hand = (output - y).square().sum(1) * norms
                left = (1 - self.lr * values).pow(k)
                expected = norms * (vectors.square() @ (left.square() * (values * (1 + start**2) + self.noise)))
                w = model.weight.detach()
                rows.append(
                    {
                        "time": self.lr * k,
                        "error": self.noise + (w - teacher).square().mean().item(),
                        "error_predicted": self.formula(alpha, start, k, lambda term: float(term(spectrum).mean())),
                        "error_limit": self.formula(alpha, start, k, lambda term: marchenko_pastur(alpha, term)),
                        "sqnorms": sqnorms.mean().item() / tasks,
                        "sqnorms_predicted": expected.mean().item(),
                        "sqnorms_mismatch": ((sqnorms - by_hand).norm() / by_hand.norm()).item(),
                        "frozen": across(w - teacher).square().mean().item(),
                        "frozen_predicted": max(1 - alpha, 0.0) * (1 + start**2),
                        "frozen_moved": (across(w - first).norm() / teacher.norm()).item(),
                    }
                )

            _descend(model, _half_square, x, y, self.lr, round(self.time / self.lr), between, watch)
            errors = np.array([row["error"] for row in rows])
            stop = int(np.argmin([row["error_limit"] for row in rows]))
            shared = {f"{column}_mean": float(np.mean([row[column] for row in rows])) for column in ("error", "error_predicted", "error_limit")}
            shared |= {f"{column}_mean": float(np.mean([row[column] for row in rows])) for column in ("sqnorms", "sqnorms_predicted")}
            shared |= {
                "overtraining": errors[-1] / errors.min(),
                "best_time": rows[int(errors.argmin())]["time"],
                "stopping_time": rows[stop]["time"],
                "stopping_cost": errors[stop] / errors.min(),
                "trace": seeds,
                "trace_mismatch": abs(seeds / spectrum.sum() - 1),
                "trace_limit": alpha * n,
                "top_eigenvalue": top,
                "top_eigenvalue_limit": largest_eigenvalue(n, p) / n,
            }
            return [{**row, **shared} for row in rows]

        return work

    def claims(self) -> list[Claim]:
        claims: list[Claim] = []
        law = "E_g = σε² + (1/N) Σ [(σw² + σ₀²) c² + (σε²/λ)(1 − c)²], c = (1 − ηλ)^k ≈ e^(−λt)"
        for arm in (*self.ALPHAS, self.LARGE):
            eigen, limit = f"{arm}: the test error, mean over readings, by the samples' eigenvalues", f"{arm}: by Marchenko and Pastur's law"
            norms = f"{arm}: the per-sample norms, mean over readings"
            claims += [
                ClosedForm(eigen, arm, "error_mean", against="error_predicted_mean", precision=0.05, formula=law),
                # corrections to the law are of the order of 1/N, but at alpha = 1, where the smallest eigenvalue is of the order of 1/N^2
                ClosedForm(limit, arm, "error_mean", against="error_limit_mean", precision=0.1, slack=0.1 if arm == "α = 1" else 0.03, formula=law),
                ClosedForm(
                    norms, arm, "sqnorms_mean", against="sqnorms_predicted_mean", precision=0.1, formula="rμ²‖xμ‖² = ‖xμ‖² Σⱼ vμⱼ² cⱼ²(λⱼ(σw² + σ₀²) + σε²)"
                ),
            ]
        start = "As nothing moves there, this is a number of the start: training enters by the claim before alone."
        for arm in ("α = 1/4", "α = 1/2", self.LARGE):
            claims += [
                Claim(f"{arm}: nothing across the samples ever moves", arm, "frozen_moved", "<=", 1e-10),
                ClosedForm(
                    f"{arm}: the error frozen there", arm, "frozen", against="frozen_predicted", precision=0.05, formula="(1 − α)(σw² + σ₀²)", remark=start
                ),
            ]
        for arm in ("α = 1/4", "α = 1/2", "α = 2", "α = 4"):
            claims.append(MeanClaim(f"overtraining is worse at α = 1 than at {arm}", "α = 1", "overtraining", ">=", 0.0, versus=arm))
        claims.append(MeanClaim("a large start leaves more error", self.LARGE, "error", ">=", 0.25, versus="α = 1/2", formula="ΔE = (1 − α)(1 − σ₀²)"))
        claims += [Claim(f"{arm}: stopped where the law says, within 2 % of the least error", arm, "stopping_cost", "<=", 1.02) for arm in self.ALPHAS]
        identity = "An identity: it checks the library's call."
        claims.append(Claim("α = 1/2: the norms are r² ‖x‖², sample by sample", "α = 1/2", "sqnorms_mismatch", "<=", 1e-10, remark=identity))
        claims.append(Claim("α = 1/2: the Hessian's trace is the sum of the outputs' norms", "α = 1/2", "trace_mismatch", "<=", 1e-10, remark=identity))
        for arm in ("α = 1/2", "α = 2"):
            claims += [
                ClosedForm(
                    f"{arm}: the trace is αN on average",
                    arm,
                    "trace",
                    against="trace_limit",
                    precision=0.05,
                    formula="tr H = Σ ‖xμ‖² → αN",
                    remark="Its precision was 0.03 until a run with seeds 0 to 7 had half-width 0.038.",
                ),
                ClosedForm(
                    f"{arm}: the Hessian's largest eigenvalue",
                    arm,
                    "top_eigenvalue",
                    against="top_eigenvalue_limit",
                    slack=0.01,  # what the law leaves out is of the order of N^(-2/3) of its own width
                    formula="λ₁ = (μ − 1.21 s)/N, μ = (√(N−1) + √P)², s = √μ (1/√(N−1) + 1/√P)^(1/3)",
                ),
            ]
        return claims

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = dict(zip((*self.ALPHAS, self.LARGE), (SKY, BLUE, RED, OCHRE, GREY, BLUE), strict=True))
        names, frame = [], outcome.metrics[outcome.metrics["time"] > 0]
        for arm, colour in colours.items():
            mean = frame[frame["arm"] == arm].groupby("time").mean(numeric_only=True)
            left.plot(mean.index, mean["error"], "o", color=colour, ms=3, mew=0, alpha=0.7)
            left.plot(mean.index, mean["error_limit"], color=colour, lw=1.4, ls="--" if arm == self.LARGE else "-")
            names.append((float(mean["error_limit"].iloc[-1]), arm, colour))
        alphas = np.geomspace(0.2, 5, 81)
        last, grid = round(self.time / self.lr), self.readings
        curves = [[self.formula(a, self.start_deviation, k, lambda term, a=a: marchenko_pastur(a, term)) for k in grid[::2]] for a in alphas]  # type: ignore[misc]
        end = [self.formula(a, self.start_deviation, last, lambda term, a=a: marchenko_pastur(a, term)) for a in alphas]  # type: ignore[misc]
        right.plot(alphas, np.array(end) / np.min(curves, 1), color="black", lw=1.2)
        for arm, alpha in self.ALPHAS.items():
            values = frame[frame["arm"] == arm].groupby("seed")["overtraining"].last()
            right.plot([alpha] * len(values), values, "o", color=colours[arm], ms=4, mew=0, alpha=0.7)
        good = outcome.holds
        left.set(xscale="log", yscale="log", xlabel="time t = steps × h", ylabel="test error E_g")
        name_curves(left, names)
        left.set_title("Runs follow the formula" if good else "Test error, runs (dots) and Marchenko-Pastur integral")
        right.set(xscale="log", xlabel="α = samples per weight", ylabel=f"overtraining, E_g({self.time:g}) / least E_g")
        right.set_title("Overtraining is worst at α = 1" if good else "Overtraining")
        right.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        right.minorticks_off()
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------ ReLU student


@dataclass(frozen=True)
class ReLUStudent(Setting):
    """A ReLU network of H units, the first layer random and fixed, learns a noisy ReLU teacher from P samples: too much training hurts most at ``H = P``.

    The student is ``f(x) = a'h(x)``, ``h(x) = sqrt(2 / H) relu(W x)``, trained by gradient descent on ``a``: linear in its parameters. So its outputs after k
    steps are known from the tangent kernel ``K = gg.gram(student)`` of the samples, and of test points with samples (:func:`tangent_flow`, every step exact);
    the kernel's rank ``min(P, H)`` is the number of parameters that learn. Step: ``1 / lambda_max(K)``.

    - *Overtraining*, the last test error over the least one, and the last error itself peak at H = P, where the kernel's smallest eigenvalues are least
      (paper, figure 7D); with early stopping there is no peak, wider is not worse (7C).
    - *Small starts.* ``a = 0`` at the start or entries of variance ``start^2``: the latter adds ``start^2 tr(A C A)`` to the error, with C the second moment
      of the features at the test points and ``A = (1 - eta sum_mu h_mu h_mu')^k``: after k steps ``A a_0`` of the start is left. If H > P, A tends to the
      projection across the samples: the frozen subspace, which wide students suffer from unless they start small. Computed among the H features, measured by
      students from random starts ``+-a_0`` (the pair cancels the cross term).

    As in the paper's figures 7 and 9 the output weights alone are trained, and the peak lies at P = 300 there, over 50 seeds, 20 teacher units in figure 9;
    the number of inputs and the noise of figure 7 could not be confirmed. Inputs are a fifth of the samples, at the paper's P
    too: with 20 inputs for P = 300 less is frozen, and a large start adds 9 % instead of the 10 % and more that are claimed.
    """

    name: ClassVar[str] = "regression/relu-student"
    title: ClassVar[str] = DYNAMICS[0]
    paper: ClassVar[str] = DYNAMICS[1]
    summary: ClassVar[str] = "a ReLU student of a ReLU teacher: overtraining peaks at as many units as samples, and wide students must start small"
    duration: ClassVar[str] = "about 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.gram",)
    SMALL: ClassVar[dict[str, Any]] = {"samples": 60, "tests": 1000}
    PAPER: ClassVar[dict[str, Any]] = {"samples": 300, "inputs": 60, "num_seeds": 50}

    WIDTHS: ClassVar[dict[str, float]] = {"H = P/4": 0.25, "H = P/2": 0.5, "H = P": 1.0, "H = 2P": 2.0, "H = 4P": 4.0}

    num_seeds: int = 10
    """How many seeds, each with its own teacher, samples and first layer."""
    samples: int = 100
    """Training samples P."""
    inputs: int = 20
    """Inputs, standard normal."""
    teacher_units: int = 20
    """ReLU units of the teacher; its output has variance 1."""
    noise: float = 0.1
    """Variance of the labels' noise."""
    start_deviation: float = 1.0
    """Standard deviation of a large start's output weights: that of its outputs, too."""
    starts: int = 60
    """Large starts, in pairs +-a, for each student."""
    steps: int = 1_000_000
    """Steps of gradient descent, in closed form."""
    tests: int = 5000
    """Test points."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("samples", self.samples >= 8 and self.samples % 4 == 0, "a multiple of 4, at least 8"),
            *self.at_least(1, "inputs", "teacher_units", "starts", "steps", "tests"),
            ("noise", 0 <= self.noise < math.inf, "at least 0 and finite"),
            ("start_deviation", 1e-50 <= self.start_deviation <= 1e50, "between 1e-50 and 1e50"),
        ]

    @property
    def readings(self) -> list[int]:
        return sorted({0, *(round(k) for k in np.geomspace(1, self.steps, 40))})

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        return GridRun([(arm, seed) for arm in self.WIDTHS for seed in self.seeds], self.work(device))

    def student(self, units: int, seed: int) -> nn.Sequential:
        """Of unit second moment ``||h||^2`` on average; its first layer fixed."""
        hidden = _linear(self.inputs, units, math.sqrt(2 / units / self.inputs) * _normal(seed, 0, units, self.inputs))
        return nn.Sequential(hidden.requires_grad_(False), nn.ReLU(), _linear(units, 1))

    def task(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples, noisy labels, test points, true outputs."""
        points = _normal(seed, 1, self.samples + self.tests, self.inputs)
        units = (points @ _normal(seed, 2, self.inputs, self.teacher_units)).relu()
        truth = (units - units.mean(0)) @ _normal(seed, 3, self.teacher_units, 1)
        truth = truth / truth.std()
        labels = truth[: self.samples] + math.sqrt(self.noise) * _normal(seed, 4, self.samples, 1)
        return points[: self.samples], labels, points[self.samples :], truth[self.samples :]

    def work(self, device: torch.device) -> Callable[[str, int, Clock, Callable[[], None]], list[dict[str, float]]]:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            x, y, test, truth = (t.to(device) for t in self.task(seed))
            units = round(self.WIDTHS[arm] * self.samples)
            student = self.student(units, seed).to(device)
            with clock:
                kernel, cross = gg.gram(student, x), gg.gram(student, test, x)
            values = torch.linalg.eigvalsh(kernel)
            rate = 1 / values[-1].item()
            with torch.no_grad():
                h, h_test = student[:2](x), student[:2](test)  # (P, H), (T, H)
            a = self.start_deviation * _normal(seed, 5, units, self.starts).to(device)
            a = torch.cat([torch.zeros_like(a[:, :1]), a, -a], 1)  # the small start first
            moments, vectors = torch.linalg.eigh(h.T @ h)
            weight = (h_test @ vectors).square().mean(0)  # the diagonal of C in the eigenvectors of H'H
            rows = []
            for k in self.readings:
                between()
                moved, _ = tangent_flow(kernel, cross, h @ a - y, rate, k)
                errors = self.noise + (h_test @ a + moved - truth).square().mean(0)
                left = (1 - rate * moments.clamp(min=0)).pow(2 * k)
                rows.append(
                    {
                        "steps": k,
                        "error": errors[0].item(),
                        "error_large": errors[1:].mean().item(),
                        "added": (errors[1:].mean() - errors[0]).item(),
                        "added_predicted": self.start_deviation**2 * (left * weight).sum().item(),
                    }
                )
            least = min(row["error"] for row in rows)
            shared = {
                "units": units,
                "least_error": least,
                "log_error": math.log(rows[-1]["error"]),
                "log_overtraining": math.log(rows[-1]["error"] / least),
                "log_large_over_small": math.log(rows[-1]["error_large"] / rows[-1]["error"]),
                "rank_defect": min(self.samples, units) - int((values > 1e-12 * values[-1]).sum()),
            }
            return [{**row, **shared} for row in rows]

        return work

    def claims(self) -> list[Claim]:
        claims: list[Claim] = []
        for arm in ("H = P/4", "H = P/2", "H = 2P", "H = 4P"):
            claims.append(MeanClaim(f"overtraining is worse at H = P than at {arm}", "H = P", "log_overtraining", ">=", 0.0, versus=arm))
        claims += [
            MeanClaim("the last error at H = P is twice that at H = P/4", "H = P", "log_error", ">=", math.log(2), versus="H = P/4"),
            MeanClaim("and twice that at H = 4P", "H = P", "log_error", ">=", math.log(2), versus="H = 4P"),
            MeanClaim("stopped at the best time, H = P is not worse than H = P/4", "H = P", "least_error", "<=", 0.0, versus="H = P/4"),
            MeanClaim("nor H = 4P worse than H = P", "H = 4P", "least_error", "<=", 0.0, versus="H = P"),
            MeanClaim("H = 4P: a large start ends with 10 % more error", "H = 4P", "log_large_over_small", ">=", math.log(1.1)),
        ]
        added = "ΔE = σ₀² tr(A C A), A = (1 − η Σ hμhμᵀ)^k"
        for arm in ("H = 2P", "H = 4P"):
            claims.append(ClosedForm(f"{arm}: what the large start adds", arm, "added", against="added_predicted", precision=0.05, formula=added))
        for arm in ("H = P/2", "H = 4P"):
            claims.append(Claim(f"{arm}: the tangent kernel's rank is min(P, H)", arm, "rank_defect", "==", 0.0))
        return claims

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        frame = outcome.metrics[outcome.metrics["steps"] > 0]
        colours = dict(zip(self.WIDTHS, (SKY, BLUE, RED, OCHRE, GREY), strict=True))
        curves, widths = [], []
        for arm, colour in colours.items():
            logs = np.log(frame[frame["arm"] == arm].set_index("steps")["error"])
            mean = np.exp(logs.groupby("steps").mean())
            left.plot(mean.index, mean, color=colour, lw=1.6)
            curves.append((mean.iloc[-1], arm, colour))
        last = frame[frame["steps"] == self.steps]
        for column, colour, name in (
            ("error", RED, "last, from 0"),
            ("error_large", GREY, "last, large start"),
            ("least_error", BLUE, "stopped in time"),
        ):
            mean = np.exp(np.log(last.set_index("units")[column]).groupby("units").mean())
            right.plot(last["units"] / self.samples, last[column], "o", color=colour, ms=3, alpha=0.35, mew=0)
            right.plot(mean.index / self.samples, mean, color=colour, lw=1.6)
            widths.append((mean.iloc[-1], name, colour))
        good = outcome.holds
        left.set(xscale="log", yscale="log", xlabel="steps of gradient descent", ylabel="test error E_g")
        left.set_title("Overtraining is worst at as many units as samples" if good else "Test error over time")
        right.set(xscale="log", yscale="log", xlabel="units per sample, H / P", ylabel="test error E_g")
        right.set_title("Stopped in time, wider is better" if good else "Test error against width")
        right.set_xticks(list(self.WIDTHS.values()), ["1/4", "1/2", "1", "2", "4"])
        right.minorticks_off()
        name_curves(left, curves)
        name_curves(right, widths)
        return figure
