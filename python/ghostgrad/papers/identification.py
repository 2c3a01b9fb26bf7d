"""Identification of linear systems by least squares.

Z. Du, Z. Liu, J. Weitze, N. Ozay, "Sample complexity analysis and self-regularization in identification of over-parameterized ARX models", CDC 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_discrete_lyapunov
from scipy.signal import lfilter
from torch import Tensor

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, Outcome, Setting, philox
from .figures import BLUE, GREY, RED
from .models import linear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARX", "regressors", "simulate", "state_space"]

Array = NDArray[np.float64]

A = (1.2, -0.5)  # y_t = 1.2 y_{t-1} - 0.5 y_{t-2} + u_{t-1} + 0.4 u_{t-2} + w_t: poles of modulus 0.71
B = (1.0, 0.4)


def simulate(u: Array, w: Array) -> Array:
    """y (..., T) from inputs and noise, from rest."""
    poles = [1.0, *(-a for a in A)]
    return lfilter([0.0, *B], poles, u) + lfilter([1.0], poles, w)


def regressors(y: Array, u: Array, order: int) -> Array:
    """``phi_t = (y_{t-1}, ..., y_{t-order}, u_{t-1}, ..., u_{t-order})`` for t = order, ...: (..., T - order, 2 order)."""
    lagged = [np.lib.stride_tricks.sliding_window_view(x[..., :-1], order, axis=-1)[..., ::-1] for x in (y, u)]
    return np.concatenate(lagged, -1)


def state_space(order: int, noise: float) -> tuple[Array, Array, Array]:
    """``phi_{t+1} = F phi_t + e_t``: F, the covariance of e_t (inputs of variance 1), and the true coefficients, ``y_t = theta'phi_t + w_t``."""
    theta, f, q = np.zeros(2 * order), np.zeros((2 * order, 2 * order)), np.zeros(2 * order)
    theta[: len(A)], theta[order : order + len(B)] = A, B
    f[0] = theta
    for first in (0, order):
        f[first + 1 : first + order, first : first + order - 1] = np.eye(order - 1)
    q[0], q[order] = noise**2, 1.0
    return f, np.diag(q), theta


@dataclass(frozen=True)
class ARX(Setting):
    """A linear system of order 2, identified by least squares with a higher order: the superfluous coefficients go to 0 although nothing penalises them.

    ``y_t = a_1 y_{t-1} + a_2 y_{t-2} + b_1 u_{t-1} + b_2 u_{t-2} + w_t`` with normal inputs of variance 1 and noise w of deviation s, regressed on ``order``
    past outputs and inputs, phi_t; theta is the truth, padded with zeros. Two arms with noise: one stationary trajectory of T steps, and N trajectories of
    ``length`` steps each, from rest.

    *Limit.* ``error = (sum phi phi')^-1 sum phi w``. w_t has mean 0 given phi_t and all before, so the terms ``phi_t w_t`` are martingale differences with
    covariance ``s² Gamma``, ``Gamma = E phi phi'``; with ``sum phi phi' / T -> Gamma`` (ergodic theorem) and the martingale central limit theorem
    ``sqrt(T) error -> N(0, s² Gamma^-1)``, hence ``T E|error|² -> s² tr Gamma^-1``, and on the superfluous coefficients the trace of their block: an error like
    ``1 / sqrt(T)`` for an order too high as for the right one. Gamma solves ``Gamma = F Gamma F' + Q`` where ``phi_{t+1} = F phi_t + e_t``,
    ``Q = E e e'`` (:func:`state_space`). For trajectories from rest T becomes N and Gamma the sum of ``G_0 = 0, G_{t+1} = F G_t F' + Q`` over a trajectory.

    *Without noise* (third arm) nothing regularises. Gamma is singular: the system's equation, and the same one step earlier, are linear relations among the
    entries of phi, ``order - 2`` of them. Least squares of smallest norm finds the projection of theta on the range of Gamma, at any T, and misses theta by its
    part in the null space, spanned by these relations. It is one of the models (A C, B C), C any polynomial, which have poles and zeros that cancel.

    In the library, for the fitted model as an ``nn.Linear``: squared gradient norms ``r_t² |phi_t|²`` of the loss ``r²/2``, in the mean ``s² tr Gamma``; the
    Fisher trace for unit variance, ``tr Gamma``; the Gram matrix of the gradients of the output, ``phi_t . phi_t'``, whose eigenvalue number 2 order is that of
    the Fisher matrix that is 0 without noise.

    Differs from the paper: exact limits take the place of its bounds; the coefficients, the arm without noise and what is read off gradients are ours.
    """

    name: ClassVar[str] = "identification/arx"
    paper: ClassVar[str] = "Du, Liu, Weitze, Ozay (CDC 2022)"
    title: ClassVar[str] = "Sample Complexity Analysis and Self-regularization in Identification of Over-parameterized ARX Models"
    summary: ClassVar[str] = "least squares of too high an order finds the low-order system at rate 1/sqrt(T), by the noise alone"
    duration: ClassVar[str] = "about 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms", "gg.fisher_trace", "gg.gram")
    SMALL: ClassVar[dict[str, Any]] = {"longest": 8192, "most": 1024}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 20, "longest": 65_536, "most": 8192}

    ARMS: ClassVar[tuple[str, ...]] = ("one trajectory", "many trajectories", "no noise")

    num_seeds: int = 10
    """How many batches of repeats: the intervals are over these."""
    order: int = 4
    """Past outputs, and past inputs, in the regression; the truth has 2."""
    noise: float = 0.5
    """Deviation s of the noise."""
    longest: int = 16_384
    """Longest single trajectory; errors are read at this T and its halves, down to 512."""
    most: int = 4096
    """Most trajectories; errors are read at this N and its halves, down to 128."""
    length: int = 16
    """Steps of each of many trajectories."""
    repeats: int = 500
    """Fits whose squared errors are averaged."""

    BURN_IN: ClassVar[int] = 200  # 0.71^200 = 1e-30

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("order", 3 <= self.order <= 10, "between 3 and 10"),
            ("noise", 1e-50 <= self.noise <= 1e50, "between 1e-50 and 1e50"),
            *self.at_least(1024, "longest"),
            *self.at_least(256, "most"),
            ("length", self.length > 3 * self.order, f"above {3 * self.order}, three times order"),
            *self.at_least(2, "repeats"),
        ]

    def sizes(self, arm: str) -> list[int]:
        largest, smallest = (self.most, 128) if arm == "many trajectories" else (self.longest, 512)
        return [largest >> k for k in range(int(math.log2(largest / smallest)), -1, -1)]

    def covariance(self, arm: str) -> Array:
        """Gamma: of a step, or of a whole trajectory from rest."""
        f, q, _ = state_space(self.order, 0.0 if arm == "no noise" else self.noise)
        if arm != "many trajectories":
            return np.asarray(solve_discrete_lyapunov(f, q), np.float64)
        here = total = np.zeros_like(f)
        for _ in range(self.length - 1):
            here = f @ here @ f.T + q
            total = total + here
        return total

    def data(self, arm: str, seed: int, block: int, repeats: int) -> tuple[Array, Array]:
        """phi (repeats, steps, 2 order) and y (repeats, steps), trajectory after trajectory; a function of the arguments alone."""
        rng = philox(seed, 1000 * self.ARMS.index(arm) + block)
        many = arm == "many trajectories"
        u, w = rng.standard_normal((2, repeats, self.most, self.length) if many else (2, repeats, 1, self.BURN_IN + self.longest))
        y = simulate(u, (0.0 if arm == "no noise" else self.noise) * w)
        if many:
            u, y = (np.concatenate([np.zeros((*x.shape[:2], self.order)), x], -1) for x in (u, y))
        else:
            u, y = (x[..., self.BURN_IN - self.order :] for x in (u, y))
        return regressors(y, u, self.order).reshape(repeats, -1, 2 * self.order), y[..., self.order :].reshape(repeats, -1)

    def work(self, arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        sizes, steps = self.sizes(arm), self.length if arm == "many trajectories" else 1
        theta, gamma = state_space(self.order, self.noise)[2], self.covariance(arm)
        squares = np.zeros((len(sizes), 2 * self.order))  # of the errors
        for block, repeats in enumerate(len(part) for part in np.array_split(np.arange(self.repeats), -(-self.repeats // 25))):  # no more in memory at once
            between()
            phi, y = self.data(arm, seed, block, repeats)
            products, targets, done = np.zeros((repeats, 2 * self.order, 2 * self.order)), np.zeros((repeats, 2 * self.order, 1)), 0
            for place, size in enumerate(sizes):
                new = slice(done, size * steps)
                products, targets, done = products + phi[:, new].mT @ phi[:, new], targets + phi[:, new].mT @ y[:, new, None], size * steps
                fits = (np.linalg.pinv(products, rcond=1e-9, hermitian=True) @ targets)[..., 0]  # of smallest norm where there are many
                squares[place] += ((fits - theta) ** 2).sum(0) / self.repeats
            if block == 0:
                measured = self.measure(fits[0], phi[0], y[0], clock)
        inverse = np.linalg.pinv(gamma, rcond=1e-9, hermitian=True)
        lost = (theta - inverse @ gamma @ theta) ** 2
        limits = [size * lost if arm == "no noise" else self.noise**2 * np.diag(inverse) for size in sizes]
        extra = np.arange(2 * self.order) % self.order >= len(A)
        trace = float(np.trace(gamma)) / steps
        shared = {
            "rate": float(np.polyfit(np.log(sizes), np.log(squares.sum(1)) / 2, 1)[0]),
            "expected_rate": 0.0 if arm == "no noise" else -0.5,
            **measured,
            "sqnorm_predicted": self.noise**2 * trace,
            "fisher_predicted": trace,
            "smallest_predicted": float(np.linalg.eigvalsh(gamma)[0]) / steps,
        }
        return [
            {
                "samples": size,
                "error": math.sqrt(square.sum()),
                "scaled": float(size * square.sum()),
                "limit": float(limit.sum()),
                "superfluous": float(size * square[extra].sum()),
                "superfluous_limit": float(limit[extra].sum()),
                **shared,
            }
            for size, square, limit in zip(sizes, squares, limits, strict=True)
        ]

    def measure(self, fit: Array, phi: Array, y: Array, clock: Clock) -> dict[str, float]:
        """The library's numbers for one fitted model, on its data."""
        model = linear(torch.from_numpy(fit)[None])
        x, target = torch.from_numpy(phi.copy()), torch.from_numpy(y.copy())[:, None]

        def loss(out: Tensor, target: Tensor) -> Tensor:
            return (out - target).square().sum(1) / 2

        with clock:
            norms = gg.sqnorms(model, loss, x, target, reduction="sum").mean().item()
            fisher = gg.fisher_trace(model, "squared", x, target, num_samples=None).mean
            gram = gg.gram(model, x[:1024])
        eigenvalues = torch.linalg.eigvalsh(gram) / len(gram)
        return {"sqnorm": norms, "fisher": fisher, "smallest": eigenvalues[-len(fit)].clamp(min=0.0).item()}

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        return GridRun([(arm, seed) for arm in self.ARMS for seed in self.seeds], self.work)

    def claims(self) -> list[Claim]:
        one, many, none = self.ARMS
        return [
            ClosedForm(
                "the error of one trajectory falls like 1/√T", one, "rate", against="expected_rate", slack=0.04, formula="d log |error| / d log T = −1/2"
            ),
            ClosedForm("that of N trajectories like 1/√N", many, "rate", against="expected_rate", slack=0.04, formula="d log |error| / d log N = −1/2"),
            ClosedForm("of one trajectory, T E|error|² is its limit", one, "scaled", against="limit", slack=0.01, formula="T E|error|² → σ² tr Γ⁻¹"),
            ClosedForm("of many, N E|error|² is its limit", many, "scaled", against="limit", slack=0.01, formula="N E|error|² → σ² tr (Σₜ Γₜ)⁻¹"),
            ClosedForm(
                "the superfluous coefficients alone vanish as their block says",
                one,
                "superfluous",
                against="superfluous_limit",
                slack=0.01,
                formula="T E|superfluous|² → σ² tr (Γ⁻¹)ₛₛ",
            ),
            ClosedForm(
                "without noise, the error stays the part of the truth in Γ's null space",
                none,
                "scaled",
                against="limit",
                slack=1e-6,
                formula="error = −(1 − Γ⁺Γ) θ",
            ),
            Claim("without noise, the coefficients are off by half a unit or more", none, "error", ">=", 0.5),
            Claim("without noise, the Fisher matrix is singular", none, "smallest", "<=", 1e-10, formula="λ_min(Γ) = 0"),
            ClosedForm(
                "with noise, its smallest eigenvalue, from the Gram matrix, is that of Γ",
                one,
                "smallest",
                against="smallest_predicted",
                precision=0.2,
                slack=0.05,
                formula="λ_min(Γ) > 0",
            ),
            ClosedForm(
                "squared gradient norms have the mean of independent factors",
                one,
                "sqnorm",
                against="sqnorm_predicted",
                slack=0.01,
                formula="E r²|φ|² = σ² tr Γ",
            ),
            ClosedForm("the Fisher trace is Γ's", one, "fisher", against="fisher_predicted", slack=0.01, formula="E|φ|² = tr Γ"),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        holds = {v.claim.column: v.holds for v in reversed(outcome.verdicts)}  # the first claim about a column
        rates = "Too high an order costs no rate, if there is noise" if holds["rate"] else "Errors of fits of too high an order"
        limits = "and the error has an exact limit" if holds["scaled"] else "Against the limit"
        for arm, colour in zip(self.ARMS, (BLUE, RED, GREY), strict=True):
            rows = outcome.metrics[outcome.metrics["arm"] == arm]
            by_size = rows.groupby("samples")
            sizes = by_size["samples"].first()
            for _, one in rows.groupby("seed"):
                left.plot(one["samples"], one["error"], "o", color=colour, ms=4, mew=0, alpha=0.5)
            left.plot(sizes, np.sqrt(by_size["limit"].first() / sizes), color=colour, lw=1, ls=":")
            left.annotate(
                arm, (sizes.iloc[-1], by_size["error"].mean().iloc[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center", fontsize=9
            )
            if arm != "no noise":
                ratio = (rows["scaled"] / rows["limit"]).groupby(rows["samples"])
                right.errorbar(sizes, ratio.mean(), 2 * ratio.sem(), fmt="o-", color=colour, lw=1, ms=4, capsize=2, label=arm)
        left.set(xscale="log", yscale="log", xlabel="T steps, or N trajectories", ylabel="|error|, root mean square", title=rates)
        left.set_xlim(right=8 * left.get_xlim()[1])  # for the names
        right.axhline(1, color="black", lw=0.8, ls=":")
        right.set(xscale="log", xlabel="T steps, or N trajectories", ylabel="T E|error|² or N E|error|², over its limit", title=limits)
        right.legend(frameon=False, loc="upper right")
        return figure
