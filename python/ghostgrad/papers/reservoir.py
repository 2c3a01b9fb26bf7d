"""Forecasts of chaotic dynamics by a reservoir computer: noise in its inputs, and a ridge matrix that does the same without drawing any.

A. Wikner, J. Harvey, M. Girvan, B. R. Hunt, A. Pomerance, T. Antonsen, E. Ott, "Stabilizing machine learning prediction of dynamics: noise and noise-inspired
regularization", Neural Networks 2024 (arXiv 2211.05262). Constants are those of the authors' code, awikner/res-noise-stabilization.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Setting, philox
from .figures import BLUE, GREY, OCHRE, RED, SKY
from .simulators import KuramotoSivashinsky

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LMNT", "KStep", "Reservoir", "features", "regulariser"]

Array = NDArray[np.float64]

STD = 1.18768  # of u on the attractor (L = 22); data are divided by it
UNRELATED = 1.36980  # root mean square difference of two unrelated fields, after that
LYAPUNOV = 0.048  # largest exponent, per unit of time


# --------------------------------------------------------------------------------------------------------------------------------------- reservoir


class Reservoir:
    """``r_t = tanh(A r_{t-1} + B [1; u_t])``: nodes, columns for what runs side by side.

    A has three entries in a row in the mean, uniform in [-1, 1], scaled to spectral radius 0.6. Each node is fed by one input, node i by input i mod Q, with a
    weight uniform in [-0.1, 0.1], and by the constant with another such weight.
    """

    def __init__(self, nodes: int, inputs: int, rng: np.random.Generator, radius: float = 0.6, degree: float = 3.0, reach: float = 0.1) -> None:
        dense = rng.uniform(-1, 1, (nodes, nodes)) * (rng.random((nodes, nodes)) < degree / nodes)
        self.a = scipy.sparse.csr_array(dense * (radius / np.abs(np.linalg.eigvals(dense)).max()))
        self.input, self.weight, self.bias = np.arange(nodes) % inputs, rng.uniform(-reach, reach, nodes), rng.uniform(-reach, reach, nodes)
        self.nodes, self.inputs = nodes, inputs

    def step(self, r: Array, u: Array) -> Array:  # (N, n), (Q, n) -> (N, n)
        return np.tanh(self.a @ r + self.weight[:, None] * u[self.input] + self.bias[:, None])

    def drive(self, u: Array) -> Array:  # (T, Q, n) -> (T, N, n), from r = 0
        r, out = np.zeros((self.nodes, u.shape[2])), np.empty((len(u), self.nodes, u.shape[2]))
        for t, here in enumerate(u):
            out[t] = r = self.step(r, here)
        return out


def features(r: Array, u: Array) -> Array:  # (N, n), (Q, n) -> (S, n), S = 1 + 2N + Q
    return np.concatenate([np.ones((1, r.shape[1])), r, r * r, u])


def regulariser(reservoir: Reservoir, r: Array, k: int) -> tuple[Array, Array]:  # r: (N, T)
    """For lags m = 0 ... k - 1 the mean over times t of ``M M'``, ``M = ds_t / du_{t-m}`` (k, S, S); and, for each t, ``sum_m ||M||_F^2`` (T - k + 1,).

    By the chain rule the rows of M for r are ``P_m = diag(1 - r_t²) A diag(1 - r_{t-1}²) A ... diag(1 - r_{t-m}²) B``, those for r² are ``2 diag(r_t) P_m``,
    and those for u are the identity for m = 0, else 0. ``M M'`` is a sum over the columns of M, one for each input, and a column is 0 except at the nodes that
    this input reaches in m steps, the same ones at all times. So there is one product for each input and lag, of nodes reached by times; with three entries
    in a row of A and 64 inputs, these are together, for k = 4, a thirtieth of the operations of the full matrices.
    """
    n, q, times = reservoir.nodes, reservoir.inputs, r.shape[1] - k + 1
    slope = 1 - r * r
    out, norms = np.zeros((k, 1 + 2 * n + q, 1 + 2 * n + q)), np.zeros(times)
    for column in range(q):
        nodes = np.flatnonzero(reservoir.input == column)
        p = reservoir.weight[nodes, None] * slope[nodes]
        for m in range(k):
            if m > 0:
                before = reservoir.a[:, nodes]
                nodes = np.unique(before.nonzero()[0])
                p = slope[nodes, m:] * (before[nodes] @ p[:, :-1])
            last = p[:, -times:]
            rows, blocks = [1 + nodes, 1 + n + nodes], [last, 2 * r[nodes, -times:] * last]
            if m == 0:
                rows, blocks = [*rows, np.array([1 + 2 * n + column])], [*blocks, np.ones((1, times))]
            index, x = np.concatenate(rows), np.concatenate(blocks)
            out[m][np.ix_(index, index)] += x @ x.T / times
            norms += np.einsum("it,it->t", x, x)
    return out, norms


class KStep(nn.Module):
    """The features after k inputs (n, k, Q) from states (n, N), and with ``w`` what is forecast from them: the map whose input Jacobian is M."""

    def __init__(self, reservoir: Reservoir, w: Array | None = None) -> None:
        super().__init__()
        self.a, self.weight, self.bias = (torch.from_numpy(x) for x in (reservoir.a.toarray(), reservoir.weight, reservoir.bias))
        self.input, self.w = torch.from_numpy(reservoir.input), None if w is None else torch.from_numpy(w)

    def forward(self, r: Tensor, inputs: Tensor) -> Tensor:
        for u in inputs.unbind(1):
            r = torch.tanh(r @ self.a.T + self.weight * u[:, self.input] + self.bias)
        s = torch.cat([torch.ones_like(r[:, :1]), r, r * r, inputs[:, -1]], 1)
        return s if self.w is None else s @ self.w.T


# ------------------------------------------------------------------------------------------------------------------------------------------ setting


class _Seed(NamedTuple):
    """What the arms of a seed share."""

    reservoir: Reservoir
    u: Array  # (Q, washout + T), the inputs
    r: Array  # (N, washout + T), the states after them
    y: Array  # (Q, T), what is to be forecast
    by_lag: Array  # (k, S, S)
    norms: Array  # (T - k + 1,)
    tests: Array  # (sync + horizon, Q, tests)


@dataclass(frozen=True)
class LMNT(Setting):
    """A reservoir learns one step of the Kuramoto-Sivashinsky equation and then runs on its own forecasts, which drives it off the attractor unless its errors
    are damped. Six ways to fit its output weights.

    Data: :class:`KuramotoSivashinsky`, u divided by its standard deviation. Features ``s = [1; r; r²; u]``, forecast ``W s``, and, for targets Y,
    ``W = (Y S'/T) (S S'/T + tikhonov I + weight R)^-1``, the minimum of ``|W S - Y|²/T + tikhonov |W|² + weight tr(W R W')``. The arms:

    - *none*: Tikhonov 1e-16, which the last three have as well.
    - *Tikhonov*.
    - *Jacobian*: R of the last input alone (k = 1), and Tikhonov.
    - *noise*: the reservoir is driven once by inputs with normal noise of variance ``weight``; targets are without.
    - *LMNT*, linearised multi-noise training: R of the last k inputs.
    - *zero-input LMNT*: R at r = u = 0, which needs no data: k products instead of k T.

    *Why R stands for noise.* Independent noise of variance v in each of the last k inputs moves the features by ``sum_j M_j e_j + O(v)``,
    ``M_j = ds_t / du_{t-j}``, and so adds ``E|W ds|² = v tr(W R W')`` to the mean squared error, ``R = mean_t sum_{j<k} M_j M_j'`` (:func:`regulariser`).
    The cross term with the residual is of first order in v as well, ``v (W S - Y)' W tr(d²s/du²)``, but small where the residual is. Noise of all earlier
    inputs is left out; at radius 0.6 it is forgotten.

    Measured for each arm, over ``tests`` forecasts: valid time (until the root mean square error is 0.2 of that of unrelated fields), in Lyapunov times; the
    error of the map, ``u_{t+1} - F(u_t)`` along the reservoir's own orbit with F the equation's true step; and the authors' sign of stability: that error below
    0.005 in the mean, and variance within 10 % of the truth's. What leaves for infinity is held at +-100, and an error above 1 is given as 1: off the
    attractor its size means nothing.

    In the library: the squared norm of the k-step input Jacobian of the features, whose mean is tr R, at some times against the block form above, and that
    of the trained forecast by its last input, which is what R penalises.

    Differs from the paper: each node is fed by an input (there, 52 of 500 by none); noise is drawn once; fewer trainings; no grid search: weights are fields.
    """

    name: ClassVar[str] = "dynamics/lmnt"
    paper: ClassVar[str] = "Wikner et al. (Neural Networks 2024)"
    title: ClassVar[str] = "Stabilizing Machine Learning Prediction of Dynamics: Noise and Noise-inspired Regularization"
    summary: ClassVar[str] = "a ridge matrix of input Jacobians keeps a reservoir's forecast on the attractor as noisy inputs do, without noise"
    duration: ClassVar[str] = "about 5 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.input_sqnorms",)
    SMALL: ClassVar[dict[str, Any]] = {
        **{"nodes": 200, "train": 6000, "tests": 20, "sync": 200, "climate": 2500, "num_seeds": 6},
        **{"weight": 1e-6, "tikhonov": 1e-9, "jacobian": 10**-5.1},  # each arm's best of a grid at this size, on other seeds
    }
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 20}
    needs: ClassVar[str] = "10 trainings with 5 forecasts for each of 20 reservoirs, instead of one with 10"

    ARMS: ClassVar[tuple[str, ...]] = ("none", "Tikhonov", "Jacobian", "noise", "LMNT", "zero-input LMNT")

    num_seeds: int = 5
    """How many reservoirs, each with its own data."""
    nodes: int = 500
    """Nodes N of the reservoir."""
    train: int = 20_000
    """Steps T of training, after 500 that are discarded."""
    k: int = 4
    """How many inputs back the noise is followed."""
    weight: float = 10**-7.4
    """Variance of the input noise, and weight of R with LMNT."""
    tikhonov: float = 1e-6
    """Ridge of the arm Tikhonov."""
    jacobian: float = 10**-5.4
    """Weight of R in the arm Jacobian."""
    jacobian_tikhonov: float = 10**-8.5
    """Its ridge."""
    floor: float = 1e-16
    """Ridge of the other arms."""
    tests: int = 10
    """Forecasts of each arm."""
    sync: int = 2000
    """Steps of true inputs before a forecast."""
    climate: int = 16_000
    """Steps of a forecast."""
    draws: int = 4000
    """Pairs of noise by which W R W' is checked."""

    POINTS: ClassVar[int] = 64
    STEP: ClassVar[float] = 0.25
    WASHOUT: ClassVar[int] = 500
    HORIZON: ClassVar[int] = 1250  # steps with a truth beside the forecast, 15 Lyapunov times

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(8, "nodes"),
            ("k", 1 <= self.k <= self.WASHOUT, f"between 1 and {self.WASHOUT}"),
            *self.at_least(100, "train"),
            *self.positive("weight", "tikhonov", "jacobian", "jacobian_tikhonov", "floor"),
            *self.at_least(1, "tests", "climate"),
            *self.at_least(2, "sync", "draws"),
        ]

    def prepare(self, seed: int) -> _Seed:
        simulator, rng = KuramotoSivashinsky(points=self.POINTS, step=self.STEP), philox(seed, 0)
        u = rng.standard_normal((1 + self.tests, self.POINTS))
        u = simulator.trajectory(u - u.mean(1, keepdims=True), 1000)[-1]  # mean 0, which the equation keeps
        path = simulator.trajectory(u[0], self.WASHOUT + self.train + 1).T / STD
        tests = np.swapaxes(simulator.trajectory(u[1:], self.sync + min(self.climate, self.HORIZON)), 1, 2) / STD
        reservoir, inputs = Reservoir(self.nodes, self.POINTS, rng), path[:, :-1]
        r = self.states(reservoir, inputs)
        by_lag, norms = regulariser(reservoir, r[:, self.WASHOUT :], self.k)
        return _Seed(reservoir, inputs, r, path[:, self.WASHOUT + 1 :], by_lag, norms, tests)

    def states(self, reservoir: Reservoir, u: Array) -> Array:
        return np.ascontiguousarray(reservoir.drive(u.T[:, :, None])[:, :, 0].T)

    def fit(self, arm: str, seed: int, here: _Seed) -> Array:  # (Q, S)
        u, r, ridge = here.u, here.r, self.floor
        matrix: Array | float = 0.0
        if arm == "Tikhonov":
            ridge = self.tikhonov
        elif arm == "Jacobian":
            ridge, matrix = self.jacobian_tikhonov, self.jacobian * here.by_lag[0]
        elif arm == "noise":
            u = u + self.weight**0.5 * philox(seed, 1).standard_normal(u.shape)
            r = self.states(here.reservoir, u)
        elif arm == "LMNT":
            matrix = self.weight * here.by_lag.sum(0)
        elif arm == "zero-input LMNT":
            matrix = self.weight * regulariser(here.reservoir, np.zeros((self.nodes, self.k)), self.k)[0].sum(0)
        s = features(r[:, self.WASHOUT :], u[:, self.WASHOUT :])
        left = s @ s.T / s.shape[1] + ridge * np.eye(len(s)) + matrix
        return np.ascontiguousarray(np.linalg.solve(left, s @ here.y.T / s.shape[1]).T)

    def forecast(self, w: Array, reservoir: Reservoir, r: Array, u: Array, between: Callable[[], None]) -> Array:  # (climate, Q, n)
        """From states (N, n) that have not yet seen the inputs u (Q, n)."""
        out = np.empty((self.climate, *u.shape))
        for t in range(self.climate):
            if t % 1000 == 0:
                between()
            r = reservoir.step(r, u)
            out[t] = u = np.clip(w @ features(r, u), -100, 100)
        return out

    def gain(self, w: Array, seed: int, here: _Seed) -> float:
        """``E|W ds|² / v`` by noise of variance v in the last k inputs, at random times; pairs +-e, whose half difference has no second order."""
        rng = philox(seed, 2)
        first = self.WASHOUT + rng.integers(0, self.train - self.k + 1, self.draws)
        noise, ends = self.weight**0.5 * rng.standard_normal((self.k, len(here.u), self.draws)), []
        for sign in (1, -1):
            r = here.r[:, first - 1]
            for j in range(self.k):
                u = here.u[:, first + j] + sign * noise[j]
                r = here.reservoir.step(r, u)
            ends.append(w @ features(r, u))
        return float((((ends[0] - ends[1]) / 2) ** 2).sum(0).mean() / self.weight)

    def measure(self, w: Array, seed: int, here: _Seed, clock: Clock, between: Callable[[], None]) -> dict[str, float]:
        simulator, start, truth = KuramotoSivashinsky(points=self.POINTS, step=self.STEP), here.tests[self.sync - 1], here.tests[self.sync :]
        out = self.forecast(w, here.reservoir, here.reservoir.drive(here.tests[: self.sync - 1])[-1], start, between)
        wrong = np.sqrt(((out[: len(truth)] - truth) ** 2).mean(1)) > 0.2 * UNRELATED  # (horizon, tests)
        valid_time = float(np.concatenate([wrong, np.ones_like(wrong[:1])]).argmax(0).mean() * self.STEP * LYAPUNOV)
        truly = simulator(STD * np.concatenate([start[None], out[:-1]]).swapaxes(1, 2)).swapaxes(1, 2) / STD
        map_error, variance = np.sqrt(((out - truly) ** 2).mean(1)).mean(0), out.var((0, 1))  # (tests,)
        between()
        with clock:
            some = np.linspace(self.k - 1, self.train - 1, 16).astype(int)
            norms = gg.input_sqnorms(KStep(here.reservoir), *self.windows(here, some, self.k), wrt=[1]).numpy()
            some_more = np.linspace(0, self.train - 1, 100).astype(int)
            jacobian = gg.input_sqnorms(KStep(here.reservoir, w), *self.windows(here, some_more, 1), wrt=[1]).mean().item()
        fitted = w @ features(here.r[:, self.WASHOUT :], here.u[:, self.WASHOUT :])
        return {
            "valid_time": valid_time,
            "ln_valid_time": math.log(max(valid_time, self.STEP * LYAPUNOV)),
            "log10_map_error": float(np.log10(np.minimum(map_error, 1.0)).mean()),
            "stable": float(((map_error < 5e-3) & (np.abs(variance - 1) < 0.1)).mean()),
            "variance": float(variance.mean()),
            "fit_error": float(np.sqrt(((fitted - here.y) ** 2).mean())),
            "gain": self.gain(w, seed, here),
            "predicted": float(np.einsum("qs,st,qt->", w, here.by_lag.sum(0), w, optimize=True)),
            "jacobian": jacobian,
            "trace": float(here.norms.mean()),
            "trace_mismatch": float(np.abs(norms / here.norms[some - self.k + 1] - 1).max()),
        }

    def windows(self, here: _Seed, ends: NDArray[np.int64], k: int) -> tuple[Tensor, Tensor]:  # (n, N), (n, k, Q)
        """The states before the last k inputs, and these, at times of the training."""
        last = self.WASHOUT + ends
        inputs = np.stack([here.u[:, last - j].T for j in range(k - 1, -1, -1)], 1)
        return torch.from_numpy(here.r[:, last - k].T.copy()), torch.from_numpy(inputs)

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        prepare = functools.lru_cache(maxsize=1)(self.prepare)

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            here = prepare(seed)
            return [self.measure(self.fit(arm, seed, here), seed, here, clock, between)]

        return GridRun([(arm, seed) for seed in self.seeds for arm in self.ARMS], work)

    def claims(self) -> list[Claim]:
        formula = "E|W δs|² = v tr(W R Wᵀ)"
        zero_input = (
            "Where it fails, with 500 nodes: at r = 0 the derivative of r² is 0, and 64 inputs move r within 4 steps in 256 directions only; the others are "
            "held by a ridge of 1e-16 alone, below the rounding of S Sᵀ/T. With k = 8 (495 directions) and a ridge of 1e-13, all ten forecasts of two "
            "reservoirs stayed on the attractor; with either alone they did not. 200 nodes have all directions at k = 4."
        )
        capped = "That a forecast off the attractor has error 1 was set after a first run, in which two of them had errors without a bound."
        return [
            Claim(
                "the library's squared norm of the k-step input Jacobian is the block form's",
                "LMNT",
                "trace_mismatch",
                "<=",
                1e-9,
                formula="Σ ‖Mⱼ‖² = tr Σ Mⱼ Mⱼᵀ",
            ),
            ClosedForm(
                "LMNT: what noise in the inputs adds to the forecast's square is the ridge matrix's form", "LMNT", "gain", precision=0.05, formula=formula
            ),
            ClosedForm(
                "Tikhonov: what noise in the inputs adds to the forecast's square is the same form", "Tikhonov", "gain", precision=0.05, formula=formula
            ),
            Claim("without regularisation no forecast is stable", "none", "stable", "==", 0.0),
            Claim("with noise, four fifths or more of each reservoir's are", "noise", "stable", ">=", 0.8),
            Claim("with LMNT, four fifths or more of each reservoir's are", "LMNT", "stable", ">=", 0.8),
            MeanClaim("LMNT is valid at most 22 % less long than noise of the same weight", "LMNT", "ln_valid_time", ">=", -0.25, versus="noise"),
            MeanClaim("LMNT is valid at most 28 % longer than noise of the same weight", "LMNT", "ln_valid_time", "<=", 0.25, versus="noise"),
            MeanClaim("the map of LMNT errs at most 12 % more than that of noise", "LMNT", "log10_map_error", "<=", 0.05, versus="noise"),
            MeanClaim("the map of LMNT errs at most 11 % less than that of noise", "LMNT", "log10_map_error", ">=", -0.05, versus="noise"),
            MeanClaim("LMNT is valid longer than Tikhonov", "LMNT", "valid_time", ">=", 0.0, versus="Tikhonov"),
            MeanClaim("LMNT is valid longer than Jacobian", "LMNT", "valid_time", ">=", 0.0, versus="Jacobian"),
            MeanClaim("the map of LMNT errs less than that of Jacobian", "LMNT", "log10_map_error", "<=", 0.0, versus="Jacobian", remark=capped),
            Claim("R at r = u = 0 suffices for a stable forecast", "zero-input LMNT", "stable", ">=", 0.8, remark=zero_input),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14.5, 4.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        frame, colours = outcome.metrics, dict(zip(self.ARMS, (GREY, OCHRE, RED, SKY, BLUE, "#5b7f4b"), strict=True))
        middle.set_yscale("log")
        for place, (arm, colour) in enumerate(colours.items()):
            rows = frame[frame["arm"] == arm]
            self._strip(left, place, rows["valid_time"], colour)
            self._strip(middle, place, 10.0 ** rows["log10_map_error"], colour)
            middle.annotate(f"{rows['stable'].mean():.0%}", (place, 2.2), ha="center", va="center", fontsize=9, color=colour)
            right.plot(rows["predicted"], rows["gain"], "o", color=colour, ms=6, mew=0, alpha=0.8, label=arm)
        for ax in (left, middle):
            ax.set_xticks(range(len(colours)), [arm.replace(" ", "\n") for arm in colours])
        verdicts = {v.claim.text: v.holds for v in outcome.verdicts}
        same = (
            verdicts["LMNT is valid at most 22 % less long than noise of the same weight"]
            and verdicts["LMNT is valid at most 28 % longer than noise of the same weight"]
        )
        left.set(ylabel="valid time [Lyapunov times]", title="LMNT foresees as far as noise does" if same else "How far the forecast is valid", ylim=(0, None))
        title = "Error of the map, and % that stay on the attractor"
        middle.set(ylim=(None, 4), ylabel="map's error / deviation of u (1: or more)", title=title)
        low, high = 0.5 * frame["predicted"].min(), 2 * frame["predicted"].max()
        right.plot([low, high], [low, high], color="black", lw=0.8, ls=":")
        right.set(
            xscale="log", yscale="log", xlabel="tr(W R Wᵀ)", ylabel="E|W δs|² / v, by noise in the inputs", title="The ridge matrix is the noise's effect"
        )
        right.legend(frameon=False, fontsize=9)
        return figure

    @staticmethod
    def _strip(ax: Axes, place: float, values: Any, colour: str) -> None:
        ax.plot(np.full(len(values), place), values, "o", color=colour, ms=6, mew=0, alpha=0.6)
        ax.hlines(values.mean() if ax.get_yscale() == "linear" else np.exp(np.log(values).mean()), place - 0.28, place + 0.28, color=colour, lw=2)
