"""Linear regression whose risks have closed forms: regressors fitted to the labels of earlier regressors, and ridge regression on random features.

E. Dohmatob, Y. Feng, J. Kempe, "Model Collapse Demystified: The Case of Regression", NeurIPS 2024; J. B. Simon, D. Karkada, N. Ghosh, M. Belkin, "More is
Better in Modern Machine Learning: when Infinite Overparameterization is Optimal and Overfitting is Obligatory", ICLR 2024.

*One pair of equations serves both.* Inputs x of dimension m, E xx' = 1, a target v'x with noise of variance s^2, n samples; the regressor is a vector in the
span of k features ``F x``, ``F = G diag(l)^(1/2) / sqrt(k)`` with G standard normal (k = infinity: kernel ridge regression with eigenvalues l), fitted with the
penalty ``ridge``. Write ``L = diag(l)``, ``L_F = F'F``, S for the sample covariance of ``L_F^(1/2) x``.

1. Over the samples, ``(ridge/n) (S + ridge/n)^-1`` acts on fixed vectors as ``kappa (L_F + kappa)^-1`` with ``n = tr L_F (L_F + kappa)^-1 + ridge / kappa``,
   and the risk on a new noisy label is ``test = (kappa^2 v' (L_F + kappa)^-2 v + s^2) / (1 - tr L_F^2 (L_F + kappa)^-2 / n)``.
2. L_F is itself like the sample covariance of k samples of covariance L, so ``kappa (L_F + kappa)^-1`` acts as ``gamma (L + gamma)^-1`` with
   ``k = z + k kappa / gamma``, ``z = sum l / (l + gamma)``, which is also tr L_F (L_F + kappa)^-1.
3. Squares come from derivatives, ``(L_F + kappa)^-2 = -d/dkappa (L_F + kappa)^-1``, with ``dgamma / dkappa = k / (k - q)``, ``q = sum (l / (l + gamma))^2``:
   ``kappa^2 (L_F + kappa)^-2`` acts as ``gamma / (l + gamma) - kappa l / (l + gamma)^2 k / (k - q)`` and
   ``tr L_F^2 (L_F + kappa)^-2 = (q (k - 2z) + z^2) / (k - q)``.
4. The training error is ``(ridge / (n kappa))^2 test``: that is generalised cross-validation, with ``tr (K + ridge)^-1 = 1 / kappa`` for the Gram matrix K.

The two equations are one in gamma, ``gamma (1 - z/k) (1 - z/n) = ridge / n``, whose left side increases. All this is exact as sizes grow; what is left out is
of the order of 1/n.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Setting
from .figures import BLUE, GREEN, GREY, OCHRE, RED, name_curves
from .models import linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["CollapseScaling", "ModelCollapse", "MoreIsBetter", "Risk", "best_share", "eigenframework", "inherited", "spectrum", "tuned"]

DTYPE = torch.float64  # closed forms are met to a tenth of a percent, and Gram matrices are inverted


# ------------------------------------------------------------------------------------------------------------------------------------ what is shared


def spectrum(dim: int, decay: float) -> Array:
    """Eigenvalues ``j^-decay``, j = 1 ... dim."""
    return np.arange(1.0, dim + 1) ** -decay


@dataclass(frozen=True)
class Risk:
    """What the closed forms say of one ridge regression."""

    gamma: float
    kappa: float
    z: float
    q: float
    test: float  # with the noise of the labels
    train: float


def eigenframework(
    eigenvalues: Array,  # (m,)
    power: Array,  # (m,), v_i^2
    n: float,
    ridge: float,
    noise: float,  # variance s^2
    k: float = math.inf,
) -> Risk:
    """The risk by the equations at this module's top."""
    from scipy.optimize import brentq

    smaller = min(n, k)

    def excess(log_gamma: float) -> float:
        gamma = math.exp(log_gamma)
        z = float((eigenvalues / (eigenvalues + gamma)).sum())
        return gamma * max(0.0, 1 - z / k) * max(0.0, 1 - z / n) - ridge / n

    # At the lower end the factors are below 1, at the upper both are at least 1/2, for z <= sum l / gamma.
    gamma = math.exp(brentq(excess, math.log(ridge / n), math.log(2 * float(eigenvalues.sum()) / smaller + 4 * ridge / n), xtol=1e-13))
    learned = eigenvalues / (eigenvalues + gamma)
    z, q = float(learned.sum()), float((learned**2).sum())
    kappa, share = gamma * (1 - z / k), 1 / (1 - q / k)  # share is k / (k - q)
    missed = (1 - learned) - kappa * learned / (eigenvalues + gamma) * share
    overfitting = 1 / (1 - (q * (1 - 2 * z / k) + z * z / k) * share / n)
    test = overfitting * (float(missed @ power) + noise)
    return Risk(gamma, kappa, z, q, test, (ridge / (n * kappa)) ** 2 * test)


def inherited(eigenvalues: Array, risk: Risk, n: float) -> float:
    """What errors in the labels' own regressor cost: ``E |A delta|^2_L / c`` for delta of covariance ``c L^-1``, A the ridge regression of n samples.

    ``A - 1 = -t (S + t)^-1`` with ``t = ridge / n``, so ``tr L^-1 A'LA = m - 2 tr kappa (L + kappa)^-1 + tr kappa^2 (L + kappa)^-2 / (1 - q/n)
    = q + kappa^2 tr (L + kappa)^-2 (q/n) / (1 - q/n)``.
    """
    share = risk.q / n
    return risk.q + float(((risk.kappa / (eigenvalues + risk.kappa)) ** 2).sum()) * share / (1 - share)


def tuned(risk: Callable[[float], float], low: float, high: float) -> float:
    """The ridge between ``low`` and ``high`` at which ``risk`` is least."""
    from scipy.optimize import minimize_scalar

    grid = np.linspace(math.log(low), math.log(high), 25)
    best = int(np.argmin([risk(math.exp(t)) for t in grid]))
    around = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 24)]))
    return math.exp(minimize_scalar(lambda t: risk(math.exp(t)), bounds=around, method="bounded", options={"xatol": 1e-4}).x)


def generator(address: Sequence[int]) -> np.random.Generator:
    """Random numbers that are a function of the address alone: seed, replica, ..., and what they are for.

    Its length comes first: numpy fills addresses up with zeros, so that (1,) and (1, 0) would be one.
    """
    return np.random.Generator(np.random.PCG64([len(address), *address]))


def normal(address: Sequence[int], *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.from_numpy(generator(address).standard_normal(shape))


def half_squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * (outputs.squeeze(1) - labels).square().sum()


def averaged(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over the replicas of a seed."""
    return {column: float(np.mean([row[column] for row in rows])) for column in rows[0]}


def closed(text: str, arm: str, column: str, formula: str, slack: float = 1e-9) -> Claim:
    """A column against the formula's, ``column_predicted``."""
    return ClosedForm(text, arm, column, against=f"{column}_predicted", slack=slack, formula=formula)


# ------------------------------------------------------------------------------------------------------------------------------------ model collapse


COLLAPSE_AUTHORS = "Dohmatob, Feng, Kempe (NeurIPS 2024)"
COLLAPSE_TITLE = "Model Collapse Demystified: The Case of Regression"


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """Ordinary least squares."""
    return torch.cholesky_solve((x.T @ y)[:, None], torch.linalg.cholesky(x.T @ x))[:, 0]


@dataclass(frozen=True)
class ModelCollapse(Setting):
    """Each generation is fitted to T_0 new inputs with labels of the generation before, ``y = x'w_(m-1) + noise of variance s_0^2``; the last one, to T inputs
    with labels of w_n and noise of variance s^2. Inputs are normal with covariance S, dimension d. ``error`` is ``|w - w_0|_S^2``, the test error less noise.

    *Least squares, d + 2 <= T, T_0.* A fit adds ``(X'X)^-1 X'e`` to its labels' regressor, independently of what went before. Given X, that has the squared
    S-norm ``s^2 tr S (X'X)^-1`` in the mean, and the inverse Wishart mean is ``E (X'X)^-1 = S^-1 / (T - d - 1)``. Hence a line in n, exact and the same for
    all S: ``E error = s^2 d / (T - d - 1) + n s_0^2 d / (T_0 - d - 1)``.

    *Gradients*, of ``(x'w - y)^2 / 2``, are ``r_i x_i``; the library gives their squared norms.
    For the outputs they are |x_i|^2, in the mean tr S, the Fisher information's trace: no generation changes it.
    On the model's own T samples: with ``x = S^(1/2) u`` and h the leverage, ``E r_i^2 | X = s^2 (1 - h_i)``, and h_i depends on u_i by its length only:
    ``1 - h = Q / (R + Q)`` with R = |u|^2, Q independent chi-squared variables with d and T - d degrees of freedom. ``R / (R + Q)`` is a beta variable,
    independent of R + Q, so ``E R Q / (R + Q) = d (T - d) / (T + 2)`` and ``E r_i^2 |x_i|^2 = s^2 tr S (T - d) / (T + 2)``: no n, nothing of the collapse.
    On new samples with true labels: ``E (x'D)^2 |x|^2 = D'SD tr S + 2 D'S^2 D`` (Isserlis) and ``E DD' = (error / d) S^-1``:
    ``E r^2 |x|^2 = tr S ((1 + 2/d) error + s^2)``, which rises along the line.

    *Minimum norm, T_0 < d, S = 1.* ``w_m = P w_(m-1) + X'(XX')^-1 e`` with P the projection onto T_0 random directions, E P = eta 1, eta = T_0 / d, and
    ``E |P v|^2 = eta |v|^2``. So ``<w_n, w_0> / |w_0|^2`` (``kept``) has mean eta^n, and with ``E tr (XX')^-1 = T_0 / (d - T_0 - 1)`` (``gain``, here from
    gg.gram's kernel, with which the fit is computed too) ``E |w_n - w_0|^2 = |w_0|^2 (1 - eta^n) + s_0^2 T_0 / (d - T_0 - 1) (1 - eta^n) / (1 - eta)``: the
    signal is lost exponentially fast, without any noise. There is no last generation here.

    *Ridge, after n generations of least squares*, ``(X'X + T lambda)^-1 X'y``: bias and variance are :func:`eigenframework`'s with ``v_i^2 = l_i w_i^2``, and
    the generations add ``n s_0^2 / (T_0 - d - 1)`` times :func:`inherited`. Exact for large T; here T < d. ``slack`` is 0.02, for terms of order 1/T.
    The ridge that is best for n = 0 is too small after n generations (``clean_ridge_cost``, its error relative to that of the best ridge).

    The sizes of the paper's figures could not be confirmed, its code is not public: all sizes are ours, also those of ``--size paper``, where S = 1. Elsewhere
    eigenvalues fall as ``j^-decay``, which least squares cannot see. The paper's are the line, the exponential loss and the ridge formula; the claims about
    gradient norms and the Gram matrix are additions.
    """

    name: ClassVar[str] = "regression/model-collapse"
    title: ClassVar[str] = COLLAPSE_TITLE
    paper: ClassVar[str] = COLLAPSE_AUTHORS
    summary: ClassVar[str] = "regressors fitted to the labels of regressors: the error grows on a line, or the signal dies as η^n, as the formulas say"
    duration: ClassVar[str] = "1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.output_sqnorms", "gg.sqnorms", "gg.gram")
    SMALL: ClassVar[dict[str, Any]] = {
        **{"dim": 150, "samples": 500, "generator_samples": 300, "narrow_samples": 120, "ridge_samples": 100},
        **{"generations": 6, "replicas": 40},
    }
    PAPER: ClassVar[dict[str, Any]] = {"decay": 0.0, "noise": 0.5, "generator_noise": 0.5, "num_seeds": 10, "replicas": 50}

    COLUMNS: ClassVar[tuple[str, ...]] = (
        *("generation", "ridge", "error", "error_predicted", "slope", "slope_predicted", "start", "start_predicted"),
        *("kept", "kept_predicted", "gain", "gain_predicted", "clean_ridge_cost"),
        *("fisher", "fisher_predicted", "own_sqnorms", "own_sqnorms_predicted", "clean_sqnorms", "clean_sqnorms_predicted"),
    )
    DESIGN, NOISE, TEST = 0, 1, 2  # what numbers are drawn for
    LAST: ClassVar[int] = 1 << 20  # the last generation's, for each n: no generator has such a number

    num_seeds: int = 5
    """How many seeds, each with its own w_0."""
    replicas: int = 30
    """Runs of all generations in a seed, over which its numbers are averaged."""
    generations: int = 8
    """How many generations n of regressors there are before the last."""
    dim: int = 300
    """Dimension d."""
    decay: float = 1.0
    """Eigenvalues of the inputs' covariance are j^-decay; 1 each for the minimum-norm arms."""
    samples: int = 1000
    """Samples T of the last generation, with least squares."""
    generator_samples: int = 600
    """Samples T_0 of a generation."""
    narrow_samples: int = 240
    """Samples T_0 of a generation in the minimum-norm arms, fewer than dim."""
    ridge_samples: int = 200
    """Samples T of the last generation, with ridge."""
    noise: float = 0.1
    """Standard deviation s of the last generation's label noise."""
    generator_noise: float = 0.1
    """Standard deviation s_0 of the generations' label noise."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "replicas", "generations", "ridge_samples"),
            *self.at_least(8, "dim"),
            ("decay", 0 <= self.decay <= 2, "between 0 and 2"),
            ("samples", self.samples >= self.dim + 6, f"at least dim + 6 = {self.dim + 6}"),
            ("generator_samples", self.generator_samples >= self.dim + 6, f"at least dim + 6 = {self.dim + 6}"),
            ("narrow_samples", 1 <= self.narrow_samples <= self.dim - 6, f"between 1 and dim - 6 = {self.dim - 6}"),
            ("noise", 1e-50 <= self.noise <= 1e50, "between 1e-50 and 1e50"),
            ("generator_noise", 1e-50 <= self.generator_noise <= 1e50, "between 1e-50 and 1e50"),
        ]

    def truth(self, seed: int) -> Tensor:
        """w_0 has entries ``+- d^(-1/2)``: length 1, and one ridge formula for all seeds."""
        return normal((seed,), self.dim).sign() / math.sqrt(self.dim)

    def labelled(self, address: tuple[int, ...], samples: int, eigenvalues: Array, w: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        x = (normal((*address, self.DESIGN), samples, len(w)) * torch.from_numpy(eigenvalues).sqrt()).to(w.device)
        return x, x @ w + noise * normal((*address, self.NOISE), samples).to(w.device)

    def chain(
        self, w: Tensor, n: int, address: tuple[int, ...], samples: int, eigenvalues: Array, noise: float, fit: Callable[[Tensor, Tensor], Tensor] = fitted
    ) -> list[Tensor]:
        """w_0 ... w_n."""
        chain = [w]
        for m in range(n):
            chain.append(fit(*self.labelled((*address, m), samples, eigenvalues, chain[-1], noise)))
        return chain

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            w = self.truth(seed).to(device)
            if arm == "least squares":
                rows = self.line(w, seed, clock, between)
            elif arm.startswith("ridge"):
                rows = self.ridges(w, seed, 0 if arm == "ridge, n = 0" else self.generations, between)
            else:
                rows = self.narrow(w, seed, 0.0 if arm.endswith("no noise") else self.generator_noise, clock, between)
            return [{column: row.get(column, math.nan) for column in self.COLUMNS} for row in rows]

        return GridRun([(arm, seed) for arm in self.arms() for seed in self.seeds], work)

    def arms(self) -> tuple[str, ...]:
        return "least squares", "minimum norm, no noise", "minimum norm", "ridge, n = 0", f"ridge, n = {self.generations}"

    def line(self, w: Tensor, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        d, t, eigenvalues, variance = self.dim, self.samples, spectrum(self.dim, self.decay), self.noise**2
        trace = float(eigenvalues.sum())
        slope, intercept = self.generator_noise**2 * d / (self.generator_samples - d - 1), variance * d / (t - d - 1)
        measured: list[list[dict[str, float]]] = [[] for _ in range(self.generations + 1)]
        for replica in range(self.replicas):
            for n, labels in enumerate(self.chain(w, self.generations, (seed, replica), self.generator_samples, eigenvalues, self.generator_noise)):
                between()
                x, y = self.labelled((seed, replica, self.LAST, n), t, eigenvalues, labels, self.noise)
                new_x, new_y = self.labelled((seed, replica, self.LAST, n, self.TEST), t, eigenvalues, w, self.noise)
                last = fitted(x, y)
                model = linear(last[None])
                with clock:
                    fisher = gg.output_sqnorms(model, x).mean().item()
                    own = gg.sqnorms(model, half_squared, x, y, reduction="sum").mean().item()
                    clean = gg.sqnorms(model, half_squared, new_x, new_y, reduction="sum").mean().item()
                error = self.error(last - w, eigenvalues)
                measured[n].append({"error": error, "fisher": fisher, "own_sqnorms": own, "clean_sqnorms": clean})
        rows = [{"generation": float(n), "ridge": 0.0, **averaged(row)} for n, row in enumerate(measured)]
        fitted_slope = float(np.polyfit(range(len(rows)), [row["error"] for row in rows], 1)[0])
        for n, row in enumerate(rows):
            row["error_predicted"] = intercept + n * slope
            row |= {"slope": fitted_slope, "slope_predicted": slope, "start": rows[0]["error"], "start_predicted": intercept}
            row |= {"fisher_predicted": trace, "own_sqnorms_predicted": variance * trace * (t - d) / (t + 2)}
            row["clean_sqnorms_predicted"] = trace * ((1 + 2 / d) * row["error_predicted"] + variance)
        return rows

    def error(self, difference: Tensor, eigenvalues: Array) -> float:
        return float((difference.square().cpu() * torch.from_numpy(eigenvalues)).sum())

    def narrow(self, w: Tensor, seed: int, noise: float, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        d, t0, ones = self.dim, self.narrow_samples, spectrum(self.dim, 0.0)
        eta, gain = t0 / d, t0 / (d - t0 - 1)
        gains: list[float] = []

        def fit(x: Tensor, y: Tensor) -> Tensor:
            between()
            with clock:
                kernel = gg.gram(linear(w[None]), x)
            factor = torch.linalg.cholesky(kernel)
            gains.append(torch.cholesky_inverse(factor).trace().item())
            return x.T @ torch.cholesky_solve(y[:, None], factor)[:, 0]

        measured: list[list[dict[str, float]]] = [[] for _ in range(self.generations + 1)]
        for replica in range(self.replicas):
            for n, last in enumerate(self.chain(w, self.generations, (seed, replica), t0, ones, noise, fit)):
                measured[n].append({"error": self.error(last - w, ones), "kept": float(last @ w)})
        rows = [{"generation": float(n), **averaged(row)} for n, row in enumerate(measured)]
        for n, row in enumerate(rows):
            row["error_predicted"] = 1 - eta**n + noise**2 * gain * (1 - eta**n) / (1 - eta)
            row |= {"kept_predicted": eta**n, "gain": float(np.mean(gains)), "gain_predicted": gain}
        return rows

    def predicted(self, w: Tensor, n: int, ridge: float) -> float:
        """Of ridge regression after n generations of least squares."""
        eigenvalues, t = spectrum(self.dim, self.decay), self.ridge_samples
        risk = eigenframework(eigenvalues, eigenvalues * w.cpu().numpy() ** 2, t, t * ridge, self.noise**2)
        return risk.test - self.noise**2 + n * self.generator_noise**2 * inherited(eigenvalues, risk, t) / (self.generator_samples - self.dim - 1)

    def best(self, w: Tensor, n: int) -> float:
        return tuned(lambda ridge: self.predicted(w, n, ridge), 1e-6, 1e3)

    def ridges(self, w: Tensor, seed: int, n: int, between: Callable[[], None]) -> list[dict[str, float]]:
        """Along a path of ridges; the last two are the best for no generations and for n, as the formula has it."""
        t, eigenvalues = self.ridge_samples, spectrum(self.dim, self.decay)
        clean, best = self.best(w, 0), self.best(w, n)
        path = [*(best * np.logspace(-2.5, 1.5, 13)), clean, best]
        errors = []
        for replica in range(self.replicas):
            between()
            labels = self.chain(w, n, (seed, replica), self.generator_samples, eigenvalues, self.generator_noise)[-1]
            x, y = self.labelled((seed, replica, self.LAST, n), t, eigenvalues, labels, self.noise)
            values, vectors = torch.linalg.eigh(x.T @ x / t)
            projected = vectors.T @ (x.T @ y) / t
            errors.append([self.error(vectors @ (projected / (values.clamp(min=0) + ridge)) - w, eigenvalues) for ridge in path])
        mean = np.mean(errors, 0).tolist()
        rows = [
            {"generation": float(n), "ridge": ridge, "error": e, "error_predicted": self.predicted(w, n, ridge)} for ridge, e in zip(path, mean, strict=True)
        ]
        return [row | {"clean_ridge_cost": mean[-2] / mean[-1]} for row in rows]

    def claims(self) -> list[Claim]:
        n, line, quiet, noisy, first, last = self.generations, *self.arms()
        own, true = "E r²|x|² = σ² tr Σ (T−d)/(T+2)", "E r²|x|² = tr Σ ((1+2/d) E + σ²)"
        return [
            closed(f"least squares: the error after {n} generations", line, "error", "E = σ²d/(T−d−1) + n σ₀²d/(T₀−d−1)"),
            closed("least squares: its slope in n", line, "slope", "dE/dn = σ₀²d/(T₀−d−1)"),
            closed("least squares: the error without generations, where the line starts", line, "start", "E(n = 0) = σ²d/(T−d−1)"),
            closed("the Fisher trace, mean |x|², is tr Σ after any number of generations", line, "fisher", "E|x|² = tr Σ"),
            closed("squared gradient norms on the last model's own samples do not show the collapse", line, "own_sqnorms", own),
            closed("on samples with true labels they do", line, "clean_sqnorms", true),
            closed(f"minimum norm, no noise: what is kept of w₀ after {n} generations", quiet, "kept", "⟨w_n, w₀⟩/|w₀|² = ηⁿ, η = T₀/d"),
            closed("minimum norm, no noise: the error all the same", quiet, "error", "E = |w₀|²(1−ηⁿ)"),
            closed("minimum norm, with noise: the error", noisy, "error", "E = |w₀|²(1−ηⁿ) + σ₀² T₀/(d−T₀−1) (1−ηⁿ)/(1−η)"),
            closed("minimum norm: the gain of noise, from the Gram matrix", noisy, "gain", "E tr(XXᵀ)⁻¹ = T₀/(d−T₀−1)"),
            closed("ridge on true labels, at its best ridge", first, "error", "E = bias + variance", slack=0.02),
            closed(f"ridge after {n} generations, at its best ridge", last, "error", "E = bias + variance + n σ₀² ρ", slack=0.02),
            MeanClaim(f"after {n} generations the ridge that is best for true labels costs a tenth more error, or worse", last, "clean_ridge_cost", ">=", 1.1),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        frame = outcome.metrics
        holds = [v.holds for v in outcome.verdicts]

        def draw(ax: Axes, arm: str, column: str, colour: str, scale: float = 1.0, along: str = "generation") -> float:
            rows = frame[frame["arm"] == arm]
            curve = rows.groupby(along)[f"{column}_predicted"].mean() / scale
            ax.plot(rows[along], rows[column] / scale, "o", color=colour, ms=3.5, alpha=0.5, mew=0)
            ax.plot(curve.index, curve, color=colour, lw=1.3)
            return float(curve.iloc[-1])

        trace, line = float(spectrum(self.dim, self.decay).sum()), "least squares"
        ends = [
            (draw(left, line, "error", RED), "error", RED),
            (draw(left, line, "clean_sqnorms", BLUE, trace), "r²|x|² / tr Σ,\ntrue labels", BLUE),
            (draw(left, line, "own_sqnorms", GREY, trace), "r²|x|² / tr Σ,\nits own labels", GREY),
        ]
        title = "A model's own samples do not show its collapse" if all(holds[:6]) else "Least squares"
        left.set(xlabel="generations n", ylabel="mean over samples and replicas", title=title, ylim=(0, None))
        name_curves(left, ends)
        ends = [
            (draw(middle, "minimum norm", "error", RED), f"|wₙ − w₀|²,\nnoise {self.generator_noise:g}", RED),
            (draw(middle, "minimum norm, no noise", "error", GREEN), "|wₙ − w₀|²,\nno noise", GREEN),
            (draw(middle, "minimum norm, no noise", "kept", BLUE), "⟨wₙ, w₀⟩,\nno noise", BLUE),
        ]
        title = "Fewer samples than dimensions: the signal dies" if all(holds[6:10]) else "Minimum norm"
        middle.set(xlabel="generations n", ylabel="relative to |w₀|²", title=title, ylim=(0, None))
        name_curves(middle, ends)
        for arm, colour in zip(self.arms()[3:], (BLUE, RED), strict=True):
            draw(right, arm, "error", colour, along="ridge")
            rows = frame[frame["arm"] == arm].sort_values("error_predicted")
            right.plot(rows["ridge"].iloc[0], rows["error_predicted"].iloc[0], "v", color=colour, ms=9)
            text = arm.removeprefix("ridge, ")
            right.annotate(
                text, (rows["ridge"].iloc[0], rows["error_predicted"].iloc[0]), xytext=(0, 10), textcoords="offset points", color=colour, ha="center"
            )
        title = "The best ridge (▾) grows with the generations" if all(holds[10:]) else "Ridge on true and on inherited labels"
        right.set(xscale="log", yscale="log", xlabel="ridge λ", ylabel="error", title=title)
        right.margins(y=0.12)
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------ scaling laws


@dataclass(frozen=True)
class CollapseScaling(Setting):
    """Ridge regression on labels of n generations of least squares (:class:`ModelCollapse`), in a power law: ``l_j = j^-beta`` and
    ``l_j w_j^2 = j^-(1 + 2 r beta)``.

    How fast does the error fall with T samples, if the ridge is ``lambda = T^-l``? kappa is of the order of lambda. By :func:`eigenframework` and
    :func:`inherited` the error is bias + variance + inherited, up to constants

    - ``kappa^2 sum l_j w_j^2 / (l_j + kappa)^2 ~ kappa^(2 min(r, 1)) = T^(-2 min(r, 1) l)``,
    - ``s^2 df2 / T`` with ``df2 ~ kappa^(-1/beta)``: ``s^2 T^-(1 - l/beta)``,
    - ``n s_0^2 (df2 + (d - df1) df2 / T) / (T_0 - d - 1)``; for T above d ``n s_0^2 T^(l/beta) / (T_0 - d - 1)``.

    With rho = 2 beta min(r, 1), the first two balance at ``l = beta / (rho + 1)`` and give the fast rate ``T^-c, c = rho / (rho + 1)``. Where T_0 - d - 1 grows
    as T^b, b < 1, the third is ``T^-(b - l/beta)``. With the ridge that is best for true labels that is ``T^-(b - 1/(rho + 1))``: no better with more samples
    at b = 1 / (rho + 1), and worse with more below that, down to generations of one size, b = 0, where the error first falls at the fast rate and
    then rises. The adaptive ridge, ``l = b beta / (rho + 1)``, balances first and third: the slow rate ``T^-(b c)``. The crossover from fast to slow and
    the adaptive ridge are the paper's, by its abstract; exponents and count are this setting's, for n fixed. (The paper's third term, as
    recalled and not confirmed, ``max(T/T_0, phi_0) T^-(1 - l/beta) / (1 - phi_0)`` with phi_0 = d / T_0, is the same.)

    Two kinds of claims. The exponents fitted to the formula at 10^6, 10^7 and 10^8 samples in 100,000 dimensions are those of the power counting
    (``law_gap``); and the runs, at sizes that can be run, meet the formula, and the exponents to 0.1; the formula itself is up to 0.07 off at those sizes.

    A run draws ``X'X`` and ``X'e`` themselves: with X = Z diag(l)^(1/2), ``Z'Z = L L'`` with L lower triangular, its entries independent, normal below the
    diagonal and the roots of chi-squared variables of T, T - 1, ... degrees of freedom on it (Bartlett), and given it ``Z'e = L g`` with g normal. A
    regressor depends on nothing else, so that T costs nothing. gg.sqnorms gives the squared gradient norms of ``(x'w - y)^2 / 2`` on new samples with true
    labels; with D = w - w_0 and S = diag(l) they are ``(D'SD + s^2) tr S + 2 D'S^2 D`` in the mean.
    """

    name: ClassVar[str] = "regression/model-collapse-scaling"
    title: ClassVar[str] = COLLAPSE_TITLE
    paper: ClassVar[str] = COLLAPSE_AUTHORS
    summary: ClassVar[str] = (
        "power-law spectra: the ridge that is best for true labels stops learning on inherited ones; an adaptive ridge goes on, more slowly"
    )
    duration: ClassVar[str] = "2 to 3 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms",)
    SMALL: ClassVar[dict[str, Any]] = {"dim": 200, "doublings": 5}
    PAPER: ClassVar[dict[str, Any]] = {"dim": 1000, "first_samples": 2000, "doublings": 8}
    needs: ClassVar[str] = "MNIST for its kernel ridge regression, which is left out, and sizes that could not be confirmed"

    ARMS: ClassVar[tuple[str, ...]] = ("true labels", "clean ridge", "adaptive ridge", "one generator size")
    LAW: ClassVar[tuple[int, ...]] = (10**6, 10**7, 10**8)  # samples, where the formula's exponents are fitted
    LAW_DIM: ClassVar[int] = 100_000
    FACTOR, NOISE, FRESH, LABELS = 0, 1, 2, 3  # what numbers are drawn for

    num_seeds: int = 10
    """How many seeds."""
    replicas: int = 20
    """Runs of all generations in a seed, over which its numbers are averaged."""
    dim: int = 500
    """Dimension d."""
    first_samples: int = 1000
    """The least number of samples T."""
    doublings: int = 7
    """T doubles this often."""
    generations: int = 4
    """Generations n of regressors before the last."""
    excess: int = 100
    """T_0 - d - 1 at the least T."""
    growth: float = 0.4
    """Exponent b: T_0 - d - 1 grows as T^b."""
    large_excess: int = 5000
    """T_0 - d - 1 of the generations of one size."""
    beta: float = 1.5
    """Eigenvalues are j^-beta."""
    source: float = 0.5
    """Source exponent r."""
    noise: float = 1.0
    """Standard deviation of all label noise, s = s_0."""
    fresh: int = 200
    """New samples with true labels, for the squared gradient norms."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "replicas", "generations", "fresh"),
            *self.at_least(8, "dim"),
            ("first_samples", self.first_samples >= 2 * self.dim, f"at least 2 dim = {2 * self.dim}"),
            ("doublings", 2 <= self.doublings <= 20, "between 2 and 20"),
            *self.at_least(5, "excess", "large_excess"),
            ("growth", 0 < self.growth < 1, "between 0 and 1"),
            ("beta", 1 < self.beta <= 10, "above 1 and at most 10"),
            ("source", 0 < self.source < math.inf, "positive"),
            ("noise", 1e-50 <= self.noise <= 1e50, "between 1e-50 and 1e50"),
        ]

    @property
    def sizes(self) -> list[int]:
        return [self.first_samples * 2**j for j in range(self.doublings + 1)]

    @property
    def smoothness(self) -> float:
        return 2 * self.beta * min(self.source, 1.0)

    def ridge(self, arm: str, samples: float) -> float:
        best = self.beta / (self.smoothness + 1)
        return samples ** -(best * (self.growth if arm == "adaptive ridge" else 1.0))

    def excess_at(self, arm: str, samples: float) -> int:
        """T_0 - d - 1."""
        return self.large_excess if arm == "one generator size" else round(self.excess * (samples / self.first_samples) ** self.growth)

    def predicted(self, arm: str, samples: float, dim: int) -> float:
        eigenvalues, power, variance = spectrum(dim, self.beta), spectrum(dim, 1 + 2 * self.source * self.beta), self.noise**2
        risk = eigenframework(eigenvalues, power, samples, samples * self.ridge(arm, samples), variance)
        own = risk.test - variance
        return own if arm == "true labels" else own + self.generations * variance * inherited(eigenvalues, risk, samples) / self.excess_at(arm, samples)

    def law(self, arm: str) -> float:
        """The exponent of the error in T, by counting powers."""
        slow, fast = 1 / (self.smoothness + 1), self.smoothness / (self.smoothness + 1)
        return {"true labels": -fast, "clean ridge": slow - self.growth, "adaptive ridge": -self.growth * fast, "one generator size": slow}[arm]

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        limit = functools.cache(lambda arm: exponent(self.LAW, [self.predicted(arm, samples, self.LAW_DIM) for samples in self.LAW]))

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            rows = [self.size(arm, seed, samples, device, clock, between) for samples in self.sizes]
            errors = [row["error"] for row in rows]
            summary = {
                "exponent": exponent(self.sizes, errors),
                "exponent_predicted": exponent(self.sizes, [row["error_predicted"] for row in rows]),
                "law": self.law(arm),
                "law_gap": abs(limit(arm) - self.law(arm)),
                "rise": errors[-1] / min(errors),
            }
            return [row | summary | {"exponent_off": summary["exponent"] - summary["law"]} for row in rows]

        return GridRun([(arm, seed) for arm in self.ARMS for seed in self.seeds], work)

    def factor(self, address: tuple[int, ...], samples: int, root: Tensor) -> tuple[Tensor, Tensor]:
        """``(M, g)`` with ``X'X = M M'`` and ``X'e = M g`` of as many samples, noise of deviation 1."""
        rng = generator((*address, self.FACTOR))
        lower = np.tril(rng.standard_normal((self.dim, self.dim)), -1)
        np.fill_diagonal(lower, np.sqrt(rng.chisquare(samples - np.arange(self.dim))))
        m = root[:, None] * torch.from_numpy(lower).to(root.device)
        return m, normal((*address, self.NOISE), self.dim).to(root.device)

    def size(self, arm: str, seed: int, samples: int, device: torch.device, clock: Clock, between: Callable[[], None]) -> dict[str, float]:
        eigenvalues = torch.from_numpy(spectrum(self.dim, self.beta)).to(device)
        truth = torch.from_numpy(spectrum(self.dim, 1 + 2 * self.source * self.beta)).to(device).div(eigenvalues).sqrt()
        root, generations = eigenvalues.sqrt(), 0 if arm == "true labels" else self.generations
        excess, ridge, rows = self.excess_at(arm, samples), self.ridge(arm, samples), []
        for replica in range(self.replicas):
            between()
            w, address = truth, (seed, replica, samples)
            for generation in range(generations):  # w <- w + (X'X)^-1 X'e = w + M'^-1 g
                m, g = self.factor((*address, 1 + generation), excess + self.dim + 1, root)
                w = w + self.noise * torch.linalg.solve_triangular(m.T, g[:, None], upper=True)[:, 0]
            m, g = self.factor((*address, 0), samples, root)
            moments = m @ (m.T @ w + self.noise * g)  # X'y
            w = torch.cholesky_solve(moments[:, None], torch.linalg.cholesky(m @ m.T + samples * ridge * torch.eye(self.dim, device=device, dtype=DTYPE)))[:, 0]
            x = normal((*address, 0, self.FRESH), self.fresh, self.dim).to(device) * root
            y = x @ truth + self.noise * normal((*address, 0, self.LABELS), self.fresh).to(device)
            with clock:
                sqnorms = gg.sqnorms(linear(w[None]), half_squared, x, y, reduction="sum").mean().item()
            difference = (w - truth).square()
            error = (difference @ eigenvalues).item()
            expected = (error + self.noise**2) * eigenvalues.sum().item() + 2 * (difference @ eigenvalues.square()).item()
            rows.append({"error": error, "sqnorms": sqnorms, "sqnorms_predicted": expected})
        sizes = {"samples": float(samples), "generator_samples": float(excess + self.dim + 1) if generations else math.nan, "ridge": ridge}
        return sizes | {"error_predicted": self.predicted(arm, samples, self.dim)} | averaged(rows)

    def claims(self) -> list[Claim]:
        truth, clean, adaptive, fixed = self.ARMS
        law = {truth: "E ~ T^−c, c = 2βr/(2βr+1)", clean: "E ~ T^−(b−1/(2βr+1))", adaptive: "E ~ T^−bc", fixed: "E ~ T^(1/(2βr+1))"}
        largest, formulas = self.sizes[-1], "The closed form at 10⁶ to 10⁸ samples in 100,000 dimensions against its powers: no run enters."
        claims = [closed(f"{arm}: the error with {largest} samples", arm, "error", "E = bias + variance + n σ₀² ρ", slack=0.01) for arm in self.ARMS]
        for arm in self.ARMS:
            text = f"{arm}: the formula's exponent for large T is {self.law(arm):.2f}"
            claims.append(Claim(text, arm, "law_gap", "<=", 0.05, formula=law[arm], remark=formulas))
        for arm in (truth, clean, adaptive):
            claims += [
                MeanClaim(f"{arm}: the runs' exponent is at most {self.law(arm):.2f} + 0.1", arm, "exponent_off", "<=", 0.1, formula=law[arm]),
                MeanClaim(f"{arm}: and at least {self.law(arm):.2f} − 0.1", arm, "exponent_off", ">=", -0.1, formula=law[arm]),
            ]
        return [
            *claims,
            MeanClaim("with the most samples the adaptive ridge has less error than the clean one", adaptive, "error", "<=", 0.0, versus=clean),
            MeanClaim("generations of one size: the most samples have 1.2 times the least error, or more", fixed, "rise", ">=", 1.2, formula=law[fixed]),
            closed("squared gradient norms, true labels", clean, "sqnorms", "E r²|x|² = (DᵀΣD + σ²) tr Σ + 2 DᵀΣ²D"),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        frame = outcome.metrics
        grid = np.geomspace(self.sizes[0], self.sizes[-1], 30)
        ends = []
        far = np.geomspace(self.LAW[0] / 10, self.LAW[-1], 13)
        for arm, colour in zip(self.ARMS, (GREY, RED, BLUE, OCHRE), strict=True):
            rows = frame[frame["arm"] == arm]
            left.plot(rows["samples"], rows["error"], "o", color=colour, ms=4, alpha=0.6, mew=0)
            left.plot(grid, [self.predicted(arm, samples, self.dim) for samples in grid], color=colour, lw=1.3)
            curve = [self.predicted(arm, samples, self.LAW_DIM) for samples in far]
            right.plot(far, curve, color=colour, lw=1.3)
            ends.append((curve[-1], f"{arm}:\nlaw $T^{{{self.law(arm):.2f}}}$", colour))
        title = "On inherited labels a clean ridge stops learning" if outcome.holds else "Error against samples: runs and formula"
        left.set(xscale="log", yscale="log", xlabel="samples T", ylabel="error, (w − w₀)ᵀΣ(w − w₀)", title=title)
        title = f"The formula in {self.LAW_DIM:,} dimensions"
        right.set(xscale="log", yscale="log", xlabel="samples T", ylabel="error, (w − w₀)ᵀΣ(w − w₀)", title=title, xlim=(far[0], far[-1]))
        name_curves(right, ends)
        return figure


def exponent(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of log error in log size."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


# ------------------------------------------------------------------------------------------------------------------------------------ more is better


@dataclass(frozen=True)
class MoreIsBetter(Setting):
    """Ridge regression on random features, and with infinitely many of them on the kernel, against the closed forms of :func:`eigenframework`.

    Inputs are normal in m eigenmodes of the kernel (the Gaussian that features of real data are replaced by in the paper), eigenvalues ``i^-decay``, target
    coefficients ``v_i^2`` proportional to ``i^-source`` with sum 1. The features are a network's frozen first layer, its head is trained: gg.gram of the head's
    parameters is the kernel matrix K, whose eigenvalues give the fit, ``1 / tr (K + ridge)^-1 = kappa``, and gg.output_sqnorms its diagonal, in the mean
    tr diag(l). The test error is that on new noisy labels and exact for each fit: ``|v - F'a|^2 + s^2``.

    *More features, more samples.* At the ridge that is best for each size, the risk falls in n and in k (the paper's first result). ``rise`` is the largest
    relative increase from one size to the next: below 0. At one small ridge it has a peak at k = n.

    *Overfitting is obligatory.* Let ``rho = ridge / (n kappa)``, so ``train / test = rho^2``, and k infinite. For large n, z is ``c kappa^(-1/decay)`` and
    ``z - q = -kappa dz/dkappa = z / decay``; z = n (1 - rho); the bias ``kappa^2 sum v_i^2 / (l_i + kappa)^2`` goes as ``kappa^((source - 1) / decay)``,
    that is as ``(1 - rho)^-(source - 1)`` (for 1 < source < 2 decay + 1). With t = s^2 / bias at rho = 0,
    ``test ~ ((1 - rho)^-(source - 1) + t) / (1 - (1 - 1/decay) (1 - rho))``. Its derivative at rho = 0 has the sign of
    ``(source - 1) - (decay - 1) (1 + t)``: if this is positive, the best fit interpolates, else the best rho solves :func:`best_share`; without noise
    ``rho = (decay - source) / ((decay - 1) source)``. So unless the noise is large, near-optimal fits have a training error far below the test error.
    Noise is given relative to the test error of the noiseless interpolating fit, which is decay * bias: ``t = decay * relative noise``.

    The kernel arms go through training errors of 0.0001 to 0.8 of the test error, and end at the best of the formula; ``best_ratio`` is the path's train / test
    where the test error is least, ``underfit_cost`` the test error where train = test / 2, relative to the least, ``interpolation_cost`` that at 0.0001.

    The paper's code has n = 256, 10,000 modes, decay 1.2 and source 1.4, up to 10,000 features, no noise; and kernels of image data, which are not here.
    """

    name: ClassVar[str] = "regression/more-is-better"
    title: ClassVar[str] = "More is Better in Modern Machine Learning: when Infinite Overparameterization is Optimal and Overfitting is Obligatory"
    paper: ClassVar[str] = "Simon, Karkada, Ghosh, Belkin (ICLR 2024)"
    summary: ClassVar[str] = "random features: at the best ridge more of them and more samples help, and the best fit nearly interpolates, as the formulas say"
    duration: ClassVar[str] = "2 to 3 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.gram", "gg.output_sqnorms")
    SMALL: ClassVar[dict[str, Any]] = {"samples": 128, "modes": 1000, "replicas": 12}
    PAPER: ClassVar[dict[str, Any]] = {"modes": 10_000, "decay": 1.2, "source": 1.4, "noise": 0.0, "factor": 32}
    needs: ClassVar[str] = "the neural tangent kernels of convolutional networks on image data as well, which take a GPU; the synthetic part is as in its code"

    COLUMNS: ClassVar[tuple[str, ...]] = (
        *("samples", "features", "ridge", "noise", "test", "test_predicted", "train", "train_predicted", "kappa", "kappa_predicted"),
        *("fisher", "fisher_predicted", "rise", "best_ratio", "underfit_cost", "interpolation_cost", "law_gap"),
    )
    RATIOS: ClassVar[tuple[float, ...]] = (0.0001, 0.0025, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36, 0.5, 0.65, 0.8)  # train / test
    NOISES: ClassVar[tuple[float, ...]] = (0.0, 0.1, 10.0)  # of the kernel arms, relative
    INPUTS, NOISE, FEATURES = 0, 1, 2  # what numbers are drawn for

    num_seeds: int = 5
    """How many seeds."""
    replicas: int = 8
    """Draws of inputs, noise and features in a seed, over which its numbers are averaged."""
    samples: int = 256
    """Samples n, and features k, where they do not vary."""
    factor: int = 8
    """They vary from samples / 8 to this many times samples, each twice the one before; a power of 2."""
    modes: int = 3000
    """Eigenmodes m."""
    decay: float = 1.5
    """Eigenvalues are i^-decay."""
    source: float = 1.5
    """The target's power in mode i goes as i^-source."""
    noise: float = 0.1
    """Variance of the label noise with random features; the target's is 1."""
    small_ridge: float = 0.001
    """The ridge of the arm that has one for all sizes."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "replicas"),
            *self.at_least(16, "samples"),
            ("factor", self.factor >= 2 and self.factor & (self.factor - 1) == 0, "a power of 2, at least 2"),
            ("modes", self.modes >= 2 * self.samples, f"at least 2 samples = {2 * self.samples}"),
            ("decay", 1 < self.decay <= 10, "above 1 and at most 10"),
            ("source", 1 < self.source < 2 * self.decay + 1, f"between 1 and 2 decay + 1 = {2 * self.decay + 1:g}"),
            ("noise", 0 <= self.noise < math.inf, "at least 0 and finite"),
            *self.positive("small_ridge"),
        ]

    @property
    def sizes(self) -> list[int]:
        return [self.samples * 2**j // 8 for j in range(3 + self.factor.bit_length())]

    @property
    def eigenvalues(self) -> Array:
        return spectrum(self.modes, self.decay)

    @property
    def power(self) -> Array:
        power = spectrum(self.modes, self.source)
        return power / power.sum()

    def risk(self, n: int, k: float, ridge: float, noise: float) -> Risk:
        return eigenframework(self.eigenvalues, self.power, n, ridge, noise, k)

    def ridge_of(self, share: float) -> float:
        """The ridge of kernel regression with ``ridge / (n kappa)`` = share, the root of train / test: ``z = n (1 - share)`` gives kappa."""
        from scipy.optimize import brentq

        eigenvalues, n = self.eigenvalues, self.samples
        kappa = math.exp(brentq(lambda t: (eigenvalues / (eigenvalues + math.exp(t))).sum() - n * (1 - share), -60.0, 20.0, xtol=1e-13))
        return share * n * kappa

    def noise_of(self, relative: float) -> float:
        return relative * self.risk(self.samples, math.inf, self.ridge_of(self.RATIOS[0] ** 0.5), 0.0).test

    def arms(self) -> tuple[str, ...]:
        return "features", "samples", "features, one small ridge", *(self.kernel_arm(noise) for noise in self.NOISES)

    @staticmethod
    def kernel_arm(relative: float) -> str:
        return f"kernel, noise {relative:g}"

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            if arm.startswith("kernel"):
                rows = self.kernel(float(arm.split()[-1]), seed, device, clock, between)
            else:
                rows = self.random_features(arm, seed, device, clock, between)
            return [{column: row.get(column, math.nan) for column in self.COLUMNS} for row in rows]

        return GridRun([(arm, seed) for arm in self.arms() for seed in self.seeds], work)

    def fits(
        self,
        model: nn.Module,
        x: Tensor,  # (n, m), what the model takes
        y: Tensor,  # (n,)
        back: Callable[[Tensor], Tensor],  # (n, ridges) coefficients of the samples -> (m, ridges), of the eigenmodes
        target: Tensor,  # (m,)
        noise: float,
        ridges: Sequence[float],
        clock: Clock,
    ) -> list[dict[str, float]]:
        """Ridge regressions with the kernel of the model's last parameter."""
        last = [name for name, _ in model.named_parameters()][-1]
        with clock:
            kernel = gg.gram(model, x, params=[last])
            fisher = gg.output_sqnorms(model, x, params=[last]).mean().item()
        values, vectors = torch.linalg.eigh(kernel)
        ridge = torch.tensor(ridges, dtype=DTYPE, device=x.device)
        shrunk = 1 / (values.clamp(min=0)[:, None] + ridge)  # (n, ridges)
        dual = vectors @ (shrunk * (vectors.T @ y)[:, None])
        test = (target[:, None] - back(dual)).square().sum(0) + noise
        train = (ridge * dual).square().mean(0)
        columns = zip(ridges, test.tolist(), train.tolist(), (1 / shrunk.sum(0)).tolist(), strict=True)
        return [{"ridge": r, "test": e, "train": t, "kappa": kappa, "fisher": fisher} for r, e, t, kappa in columns]

    def labelled(self, seed: int, replica: int, n: int, noise: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels, target."""
        x = normal((seed, replica, self.INPUTS), n, self.modes).to(device)
        target = torch.from_numpy(self.power).sqrt().to(device)
        return x, x @ target + math.sqrt(noise) * normal((seed, replica, self.NOISE), n).to(device), target

    def random_features(self, arm: str, seed: int, device: torch.device, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        sizes = [(size, self.samples) if arm == "samples" else (self.samples, size) for size in self.sizes]
        if arm == "features, one small ridge":
            ridges = [self.small_ridge for _ in sizes]
        else:
            ridges = [tuned(lambda ridge, n=n, k=k: self.risk(n, k, ridge, self.noise).test, 1e-6, 1e4) for n, k in sizes]  # type: ignore[misc]
        measured: list[list[dict[str, float]]] = [[] for _ in sizes]
        for replica in range(self.replicas):
            x, y, target = self.labelled(seed, replica, max(n for n, _ in sizes), self.noise, device)
            most = normal((seed, replica, self.FEATURES), max(k for _, k in sizes), self.modes).to(device) * torch.from_numpy(self.eigenvalues).sqrt().to(
                device
            )
            for place, ((n, k), ridge) in enumerate(zip(sizes, ridges, strict=True)):
                between()
                features = most[:k] / math.sqrt(k)
                model = nn.Sequential(linear(features), linear(torch.zeros(1, k, device=device, dtype=DTYPE)))
                back = lambda dual, f=features, x=x[:n]: f.T @ (f @ (x.T @ dual))  # noqa: E731
                measured[place] += self.fits(model, x[:n], y[:n], back, target, self.noise, [ridge], clock)
        rows = [self.row(n, k, self.noise, averaged(row)) for (n, k), row in zip(sizes, measured, strict=True)]
        tests = [row["test"] for row in rows]
        return [row | {"rise": max(b / a - 1 for a, b in itertools.pairwise(tests))} for row in rows]

    def kernel(self, relative: float, seed: int, device: torch.device, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        n, noise, root = self.samples, self.noise_of(relative), torch.from_numpy(self.eigenvalues).sqrt().to(device)
        best = tuned(lambda share: self.risk(n, math.inf, self.ridge_of(share), noise).test, self.RATIOS[0] ** 0.5, 0.99)
        ridges = [self.ridge_of(share) for share in (*np.sqrt(self.RATIOS).tolist(), best)]
        measured: list[list[dict[str, float]]] = [[] for _ in ridges]
        for replica in range(self.replicas):
            between()
            x, y, target = self.labelled(seed, replica, n, noise, device)
            back = lambda dual, x=x: root[:, None] * ((x * root).T @ dual)  # noqa: E731
            for place, row in zip(measured, self.fits(linear(target[None]), x * root, y, back, target, noise, ridges, clock), strict=True):
                place.append(row)
        rows = [self.row(n, math.inf, noise, averaged(row)) for row in measured]
        path = rows[:-1]
        least = min(path, key=lambda row: row["test"])
        summary = {
            "best_ratio": least["train"] / least["test"],
            "underfit_cost": path[self.RATIOS.index(0.5)]["test"] / least["test"],
            "interpolation_cost": path[0]["test"] / least["test"],
            "law_gap": abs(best - best_share(self.decay, self.source, relative)),
        }
        return [row | summary for row in rows]

    def row(self, n: int, k: float, noise: float, measured: dict[str, float]) -> dict[str, float]:
        risk = self.risk(n, k, measured["ridge"], noise)
        predicted = {"test_predicted": risk.test, "train_predicted": risk.train, "kappa_predicted": risk.kappa, "fisher_predicted": self.eigenvalues.sum()}
        return {"samples": float(n), "features": float(k), "noise": noise, **measured, **predicted}

    def claims(self) -> list[Claim]:
        most, n = self.sizes[-1], self.samples
        formula = "n = Σ λ/(λ+γ) + δ/κ, k = Σ λ/(λ+γ) + kκ/γ"
        test = "E_te = [Σ (γ/(λ+γ) − κλ/(λ+γ)² k/(k−q)) v² + σ²] / (1 − (q(k−2z)+z²)/(n(k−q)))"
        train = "E_tr = (δ/(nκ))² E_te"
        law = "ρ = √(E_tr/E_te): (β−1)/((1−ρ)(1+τ(1−ρ)^(β−1))) = (1−1/α)/(1−(1−1/α)(1−ρ)), λᵢ = i^−α, v² = i^−β, τ = α times the noise"
        formulas = "The closed forms for n samples against their limit: no run enters."
        kernel, slack = "E_te = n/(n−q) (Σ (κ/(λ+κ))² v² + σ²)", 0.02
        quiet, little, loud = map(self.kernel_arm, self.NOISES)

        return [
            closed(f"test error, {n} samples, {most} features, best ridge", "features", "test", test, slack),
            closed(f"test error, {most} samples, {n} features, best ridge", "samples", "test", test, slack),
            closed(f"training error, {n} samples, {most} features", "features", "train", train, slack),
            closed(f"training error, {most} samples, {n} features", "samples", "train", train, slack),
            closed("kappa, from the Gram matrix's eigenvalues", "features", "kappa", formula, slack),
            closed("mean |φ|², the Fisher trace of the head", "features", "fisher", "E|φ|² = tr Λ"),
            Claim("at the best ridge, more features never hurt", "features", "rise", "<=", 0.0, formula="min_δ E_te(n, k, δ) falls in k"),
            Claim("at the best ridge, more samples never hurt", "samples", "rise", "<=", 0.0, formula="min_δ E_te(n, k, δ) falls in n"),
            Claim("at one small ridge they do: the error rises by half or more", "features, one small ridge", "rise", ">=", 0.5),
            closed("kernel, no noise: test error at the best ridge", quiet, "test", kernel, slack),
            closed("kernel, noise 10: test error at the best ridge", loud, "test", kernel, slack),
            closed("kernel, noise 10: training error at the best ridge", loud, "train", train, slack),
            Claim("no noise: the best fit trains to a twentieth of the test error, or less", quiet, "best_ratio", "<=", 0.05, formula=law),
            Claim("noise of a tenth: likewise", little, "best_ratio", "<=", 0.05, formula=law),
            MeanClaim("no noise: fitting to half the test error costs a quarter of it or more", quiet, "underfit_cost", ">=", 1.25),
            Claim("noise ten times as large: the best fit does not interpolate", loud, "best_ratio", ">=", 0.3, formula=law),
            MeanClaim("and interpolating costs a tenth or more", loud, "interpolation_cost", ">=", 1.1),
            Claim("the law for large n gives the best √(E_tr/E_te) to 0.05, at noise 0.1", little, "law_gap", "<=", 0.05, formula=law, remark=formulas),
            Claim("and at noise 10", loud, "law_gap", "<=", 0.05, formula=law, remark=formulas),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        frame = outcome.metrics
        holds = [v.holds for v in outcome.verdicts]
        sizes = np.geomspace(self.sizes[0], self.sizes[-1], 4 * len(self.sizes) - 3)  # the sizes are among them
        ends = []
        for ax, arm, column, colour in (
            (left, "features", "features", BLUE),
            (left, "features, one small ridge", "features", RED),
            (middle, "samples", "samples", BLUE),
        ):
            rows = frame[frame["arm"] == arm]
            ax.plot(rows[column], rows["test"], "o", color=colour, ms=4, alpha=0.6, mew=0)
            curve = []
            for size in sizes:
                n, k = (size, self.samples) if column == "samples" else (self.samples, size)
                ridge = self.small_ridge if "small" in arm else tuned(lambda ridge, n=n, k=k: self.risk(n, k, ridge, self.noise).test, 1e-6, 1e4)  # type: ignore[misc]
                curve.append(self.risk(n, k, ridge, self.noise).test)
            ax.plot(sizes, curve, color=colour, lw=1.3)
            if ax is left:
                ends.append((curve[-1], f"ridge {self.small_ridge:g}" if "small" in arm else "best ridge", colour))
        more = all(holds[6:9])
        title = "At the best ridge, more features help" if more else "Random features"
        left.set(xscale="log", yscale="log", xlabel="features k", ylabel="test error", title=title)
        name_curves(left, ends)
        left.axvline(self.samples, color="0.7", lw=0.8, ls=":")
        left.annotate("k = n", (self.samples, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points", color="0.4", fontsize=9)
        title = "and so do more samples" if more else "At the best ridge of each size"
        middle.set(xscale="log", yscale="log", xlabel="samples n", ylabel="test error", title=title)
        for relative, colour in zip(self.NOISES, (BLUE, GREEN, RED), strict=True):
            rows = frame[frame["arm"] == self.kernel_arm(relative)]
            noise = self.noise_of(relative)
            shares = np.linspace(self.RATIOS[0] ** 0.5, 0.93, 60)
            curve = [self.risk(self.samples, math.inf, self.ridge_of(share), noise).test for share in shares]
            least = min(curve)
            right.plot(rows["train"] / rows["test"], rows["test"] / least, "o", color=colour, ms=4, alpha=0.6, mew=0)
            right.plot(shares**2, np.array(curve) / least, color=colour, lw=1.3)
            best = int(np.argmin(curve))
            right.plot(shares[best] ** 2, 1, "^", color=colour, ms=8, clip_on=False)
            place, shift, align = ((0.55, (-6, 6), "right"), (0.35, (5, -12), "left"), (0.06, (4, 6), "left"))[self.NOISES.index(relative)]
            height = self.risk(self.samples, math.inf, self.ridge_of(place**0.5), noise).test / least
            right.annotate(f"noise {relative:g}", (place, height), xytext=shift, textcoords="offset points", ha=align, color=colour, fontsize=9)
        title = "With little noise the best fit (▴) nearly interpolates" if all(holds[12:17]) else "Kernel regression"
        right.set(xlabel="training error / test error", ylabel="test error, relative to the least", title=title, ylim=(0.95, 2.2))
        return figure


def best_share(decay: float, source: float, relative: float) -> float:
    """The best ``rho`` = sqrt(train / test) of kernel regression for large n; see :class:`MoreIsBetter`."""
    from scipy.optimize import brentq

    lost, noise = 1 - 1 / decay, decay * relative

    def slope(rho: float) -> float:  # of log test in rho
        return (source - 1) / ((1 - rho) * (1 + noise * (1 - rho) ** (source - 1))) - lost / (1 - lost * (1 - rho))

    return 0.0 if slope(0.0) >= 0 else float(brentq(slope, 0.0, 1 - 1e-9))
