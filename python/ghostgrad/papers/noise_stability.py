"""Noise in the parameters: training with it prefers minima with a small Hessian trace, and rounding the weights costs what the trace says.

H. R. Zhang, D. Li, H. Ju, "Noise stability optimization for finding flat minima: a Hessian-based regularization approach", TMLR 2024; and the quantisation
noise of E. Shvetsov et al., "QuantNAS for super resolution", 2022.

Both rest on one expansion. For noise ``u`` of independent entries with mean 0 and variance s^2, ``E f(w + u) = f(w) + (s^2 / 2) tr H(w) + O(s^4)``: the first
order vanishes in the mean, and so do the second order's cross terms. Normal noise of deviation sigma: s = sigma. Rounding to multiples of D with errors
spread evenly over (-D/2, D/2): s^2 = D^2 / 12, and hence ``E f(rounded w) - f(w) = (D^2 / 24) tr H``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ghostgrad as gg

from ..training import Claim, Clock, GridRun, MeanClaim, Outcome, Setting, Trainee, TrainingRun, batches, reading_steps
from .figures import BLUE, GREY, OCHRE, RED, SKY, name_curves
from .image_setting import accuracy, built, perceptron
from .images import data_used
from .label_noise import statistical_dimension
from .tour import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MatrixSensing", "Quantisation", "label_variance", "rounded"]

AUTHORS = "Zhang, Li, Ju (TMLR 2024)"
TITLE = "Noise Stability Optimization for Finding Flat Minima: A Hessian-based Regularization Approach"

DTYPE = torch.float64  # a rise of the loss by 1e-5, and a distance of 1 % left of 700, are differences of nearly equal numbers


# ----------------------------------------------------------------------------------------------------------------------------------- matrix sensing


class _Sensing(nn.Module):
    """``f(A) = <A, WW'>``."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)  # (d, columns)

    def forward(self, a: Tensor) -> Tensor:  # (n, d * d) -> (n,)
        return a @ (self.w @ self.w.T).flatten()


def _trace_by_norms(model: nn.Module, a: Tensor) -> float:
    """The Hessian's trace of ``(1/4m) sum e_i^2`` where all errors are zero: half the mean squared norm of the outputs' gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no fused rule")  # one copy of a gradient of 900 entries per sample is cheap
        return 0.5 * gg.output_sqnorms(model, a).mean().item()


@dataclass(frozen=True)
class _Measurements:
    """What all arms of a seed share."""

    a: Tensor  # (m, d * d), symmetric matrices
    y: Tensor  # (m,)
    truth: Tensor  # (d, d)
    truth_trace: float  # of the Hessian at the truth
    start: Tensor  # (d, d)


def label_variance(batch: int, lr: float, sigma: float) -> float:
    """The variance of label noise that drifts as fast as parameter noise of deviation ``sigma`` does, to first order in the learning rate.

    With loss ``(1/4n) sum e_i^2``, at zero error: ``tr H = reg / 2`` with ``reg = mean_i ||grad f_i||^2``. Parameter noise moves by
    ``-lr (sigma^2 / 2) grad tr H = -(lr sigma^2 / 4) grad reg`` a step. Label noise of variance v in batches of B is SGD on the half-squared loss with
    learning rate lr / 2 and gradient noise of variance v / B: ``-((lr / 2)^2 v / 4B) grad reg`` (:mod:`ghostgrad.papers.label_noise`). The two are equal for
    ``v = 4 B sigma^2 / lr``.
    """
    return 4 * batch * sigma**2 / lr


@dataclass(frozen=True)
class MatrixSensing(Setting):
    """A matrix of rank 1 from fewer measurements than pin it, ``min (1/4m) sum_i (<A_i, WW'> - y_i)^2``, from one full-size start in five ways.

    Zero error leaves a wide set of matrices. On it the Hessian's trace is half of ``(1/m) sum_i ||2 A_i W||^2``, about ``d+1`` times the nuclear norm of WW',
    which the truth has the least of. Gradient descent stops at the first zero it meets; noise in the parameters goes on, down the trace, to the truth. So
    does label noise of the same drift (:func:`label_variance`), but at a training loss that stays high. One point instead of two leaves more loss as well,
    because its gradient has the noise ``H u``.

    ``distance`` is ``||WW' - X*||_F / ||X*||_F``, not squared. Where gradient descent stops hardly depends on the truth, so its distance goes as 1 / tr X*:
    with standard normal U*, tr X* is 30 on average, and it stops at 3.5 to 5. Here U* is normal and then scaled to ``truth_trace``.
    """

    name: ClassVar[str] = "noise-stability/matrix-sensing"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = AUTHORS
    summary: ClassVar[str] = "matrix sensing: noise in the parameters finds the low-rank matrix that gradient descent and SGD miss"
    duration: ClassVar[str] = "5 to 10 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.optim.NSO", "gg.output_sqnorms", "gg.hessian_trace")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 3, "probes": 8, "read_every": 10_000}
    needs: ClassVar[str] = "d = 100, r = 5, n = 2500: 200 MB of measurements read twice in each of 100,000 gradients"

    ARMS: ClassVar[tuple[str, ...]] = ("GD", "SGD", "label noise", "one point", "two points")

    num_seeds: int = 5
    """How many seeds, each with its own matrices, truth and start."""
    steps: int = 30_000
    """Steps; with two points each takes two gradients."""
    read_every: int = 2_000
    """Steps between two readings; before the first of them also at its halves, quarters, ..."""
    lr: float = 0.0025
    """Learning rate, for the loss (1/4m) sum e^2."""
    sigma: float = 0.05
    """Standard deviation of the noise in the parameters. The matrix found is too small by a share of the order of sigma^2."""
    batch: int = 50
    """Measurements in a step of SGD and label noise. Much smaller ones diverge at the start, where the Hessian's trace is 28,000."""
    dim: int = 30
    """Size d of the matrix."""
    rank: int = 1
    """Rank r of the true matrix X*."""
    num_measurements: int = 150
    """How many inner products <A_i, X*> are known; below the statistical dimension, or gradient descent finds X* as well."""
    truth_trace: float = 20.0
    """Trace of X*."""
    probes: int = 32
    """Probes of the Hessian's trace at a reading."""

    def rules(self) -> list[tuple[str, bool, str]]:
        delta = statistical_dimension(self.dim, self.rank)
        return [
            *self.at_least(1, "steps", "read_every", "dim"),
            *self.positive("lr", "sigma"),
            ("rank", 1 <= self.rank <= self.dim, f"between 1 and dim={self.dim}"),
            ("num_measurements", 1 <= self.num_measurements < delta, f"at least 1 and below the statistical dimension {delta:g}"),
            ("batch", 1 <= self.batch <= self.num_measurements, f"between 1 and num_measurements={self.num_measurements}"),
            ("truth_trace", self.truth_trace > 0, "positive"),
            *self.at_least(2, "probes"),
        ]

    def measurements(self, seed: int) -> _Measurements:
        draw = torch.randn(self.num_measurements + 2, self.dim, self.dim, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
        a, u = (draw[2:] + draw[2:].mT) / 2, draw[0, :, : self.rank]
        a, u = a.flatten(1), u * math.sqrt(self.truth_trace / u.square().sum().item())
        return _Measurements(a, a @ (u @ u.T).flatten(), u @ u.T, _trace_by_norms(_Sensing(u), a), draw[1])

    def trainee(self, arm: str, seed: int, data: _Measurements) -> Trainee:
        model = _Sensing(data.start.clone())
        if arm in ("one point", "two points"):
            two_point = arm == "two points"
            optimizer: Any = gg.optim.NSO(model, torch.optim.SGD, lr=self.lr, sigma=self.sigma, two_point=two_point, distribution="normal", seed=seed)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr)
        stochastic, noise = arm in ("SGD", "label noise"), math.sqrt(label_variance(self.batch, self.lr, self.sigma))
        per_epoch = self.num_measurements // self.batch

        def sample(k: int) -> tuple[Tensor, Tensor]:
            if not stochastic:
                return data.a, data.y
            index = batches(seed, k // per_epoch, self.num_measurements, self.batch)[k % per_epoch].to(data.a.device)
            a, y = data.a[index], data.y[index]
            if arm == "label noise":  # step k has its own stretch of one long vector of noise
                gg.noise.perturb_([y], seed, noise, "normal", [gg.noise.Block(0, k * self.batch, self.batch, self.batch)])
            return a, y

        def step(k: int) -> None:
            a, y = sample(k)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = 0.25 * (model(a) - y).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

        return Trainee(arm, seed, model, optimizer, step)

    def start(self, device: torch.device, compiled: bool) -> TrainingRun:
        data = {}
        for seed in self.seeds:
            here = self.measurements(seed)
            data[seed] = _Measurements(here.a.to(device), here.y.to(device), here.truth.to(device), here.truth_trace, here.start.to(device))

        def measure(trainee: Trainee, clock: Clock) -> dict[str, float]:
            model, here = trainee.model, data[trainee.seed]
            assert isinstance(model, _Sensing)

            def loss() -> Tensor:
                return 0.25 * (model(here.a) - here.y).square().mean()

            with clock:
                norms = _trace_by_norms(model, here.a)
                trace = gg.hessian_trace(loss, model, method="two_point_grad", probes=self.probes)
            with torch.no_grad():
                found = model.w @ model.w.T
                return {
                    "loss": loss().item(),
                    "distance": ((found - here.truth).norm() / here.truth.norm()).item(),
                    "nuclear_ratio": (found.trace() / here.truth.trace()).item(),
                    "trace": trace.mean,
                    "trace_stderr": trace.stderr,
                    "trace_by_norms": norms,
                    "trace_mismatch": abs(trace.mean - norms) / trace.stderr,
                    "trace_over_truth": norms / here.truth_trace,
                }

        trainees = [self.trainee(arm, seed, data[seed]) for arm in self.ARMS for seed in self.seeds]
        return TrainingRun(trainees, reading_steps(self.steps, self.read_every), measure, f"Try --lr {self.lr / 2:g}, or a larger --batch.")

    def claims(self) -> list[Claim]:
        return [
            Claim("with two points, ||WW' - X*||_F / ||X*||_F ends at 0.05 at most", "two points", "distance", "<=", 0.05),
            Claim("with gradient descent, it stays above 5", "GD", "distance", ">=", 5.0),
            Claim(
                "with two points, the Hessian's trace ends within 5 % of the truth's",
                "two points",
                "trace_over_truth",
                "<=",
                1.05,
                formula="E f(w + σu) = f(w) + (σ²/2) tr H + O(σ⁴)",
            ),
            Claim("where the loss is 0, norms and gradient differences give one trace, within 3 standard errors", "GD", "trace_mismatch", "<=", 3.0),
            MeanClaim("one point leaves more training loss than two", "one point", "loss", ">=", 0.0, versus="two points"),
            MeanClaim("so does label noise of the same drift", "label noise", "loss", ">=", 0.0, versus="two points"),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        frame = outcome.metrics[outcome.metrics["step"] > 0]
        finding = outcome.holds
        self._curves(
            left, frame, "distance", "‖WW′ − X*‖ / ‖X*‖", "Noise finds the matrix; GD and SGD stop at the first fit" if finding else "Distance to the truth"
        )
        truth = outcome.metrics["trace_by_norms"] / outcome.metrics["trace_over_truth"]
        middle.axhline(truth.mean(), color="black", lw=1, ls=":")
        self._curves(middle, frame, "trace_by_norms", "½ mean ‖∇f(Aᵢ)‖²", "down the Hessian's trace" if finding else "The Hessian's trace at zero error")
        middle.text(0.02, 0.96 * truth.mean(), "the truth's", transform=middle.get_yaxis_transform(), va="top", fontsize=9)
        noisy = frame[~frame["arm"].isin(["GD", "SGD"])]
        self._curves(right, noisy, "loss", "training loss", "Two points pay the least for it" if finding else "Training loss")
        return figure

    def _curves(self, ax: Axes, frame: Any, column: str, label: str, title: str) -> None:
        colours = dict(zip(self.ARMS, (GREY, RED, OCHRE, SKY, BLUE), strict=True))
        ends = []
        for arm in frame["arm"].unique():
            curves = [rows for _, rows in frame[frame["arm"] == arm].groupby("seed")]
            for rows in curves:
                ax.plot(rows["step"], rows[column], color=colours[arm], lw=1.4, alpha=0.85)
            ends.append((float(np.exp(np.mean([np.log(rows[column].iloc[-1]) for rows in curves]))), arm, colours[arm]))
        ax.set(xscale="log", yscale="log", xlabel="step", ylabel=label, title=title, xlim=(min(4, self.steps / 2), self.steps))
        name_curves(ax, ends)


# ------------------------------------------------------------------------------------------------------------------------------------- quantisation


def rounded(params: Sequence[Tensor], step: float) -> list[Tensor]:
    """Every entry to the nearest multiple of ``step``."""
    return [step * torch.round(p / step) for p in params]


@dataclass(frozen=True)
class Quantisation(Setting):
    """A small network that reads digits, with its weights rounded to b bits: what that costs, against the Hessian's trace, and what training with noise saves.

    All parameters are rounded to multiples of one step, ``D = 2 max|w| / 2^b``. Three numbers for each b: the expansion, ``(D^2 / 24) tr H``, with the trace
    from gradients (:func:`ghostgrad.hessian_trace`); the mean rise of the training loss under errors spread evenly over (-D/2, D/2), which is what rounding on
    a randomly shifted grid does; and the rise when the weights are simply rounded, one draw in which the first order, ``grad f . u``, need not vanish.

    One arm is trained plainly and one with :class:`ghostgrad.optim.NSO` and uniform noise, about as wide as the step of 3 bits. Each cell of the run is one
    network: trained, measured, rounded.
    """

    name: ClassVar[str] = "noise-stability/quantisation"
    title: ClassVar[str] = "QuantNAS for super resolution: searching for efficient quantization-friendly architectures against quantization noise"
    paper: ClassVar[str] = "after Shvetsov et al. (2022)"
    summary: ClassVar[str] = "rounded weights: the loss rises by D^2/24 tr H, and training with noise makes that less"
    duration: ClassVar[str] = "about 2 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.optim.NSO", "gg.hessian_trace", "gg.perturbed")
    SMALL: ClassVar[dict[str, Any]] = {"draws": 100}
    needs: ClassVar[str] = "searched super-resolution networks: a GPU for days. The setting keeps the noise model alone"

    BITS: ClassVar[tuple[int, ...]] = (8, 6, 4, 3, 2)

    num_seeds: int = 5
    """How many networks of each arm; the seed also picks the test half."""
    epochs: int = 30
    """Passes over the training digits."""
    lr: float = 0.1
    """Learning rate of SGD with momentum 0.9."""
    batch: int = 100
    """Digits in a step."""
    hidden: int = 32
    """Width of the one hidden layer, tanh."""
    width: float = 0.4
    """Width D of the uniform noise while training."""
    train_size: int = 1200
    """Training digits; the rest of the 1797 are for the test."""
    probes: int = 400
    """Probes of the Hessian's trace."""
    draws: int = 300
    """Pairs +-u of rounding errors, for each number of bits."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "epochs", "hidden"),
            *self.positive("lr", "width"),
            ("train_size", 1 <= self.train_size <= 1700, "between 1 and 1700"),
            ("batch", 1 <= self.batch <= self.train_size, f"between 1 and train_size={self.train_size}"),
            *self.at_least(2, "probes", "draws"),
        ]

    def data_used(self) -> str:
        return data_used("digits")

    def network(self, seed: int) -> nn.Module:
        return built(seed, lambda: perceptron([64, self.hidden, 10], nn.Tanh), torch.device("cpu"))

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        x, y = (t.to(device) for t in digits())

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            split = batches(seed, 1 << 32, len(x), len(x))[0].to(device)  # no epoch has this number
            train, test = split[: self.train_size], split[self.train_size :]
            model = self.network(seed).to(device)
            self.fit(model, x[train], y[train], self.width if arm == "with noise" else 0.0, seed, between)
            return [self.measure(model, x[train], y[train], x[test], y[test], clock, between)]

        return GridRun([(arm, seed) for arm in ("plain", "with noise") for seed in self.seeds], work)

    def fit(self, model: nn.Module, x: Tensor, y: Tensor, width: float, seed: int, between: Callable[[], None]) -> None:
        if width > 0:
            optimizer: Any = gg.optim.NSO(model, torch.optim.SGD, lr=self.lr, momentum=0.9, sigma=width, distribution="uniform", seed=seed)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
        for epoch in range(self.epochs):
            between()
            for index in batches(seed, epoch, len(x), self.batch):
                xs, ys = x[index.to(x.device)], y[index.to(y.device)]

                def closure(xs: Tensor = xs, ys: Tensor = ys) -> Tensor:
                    optimizer.zero_grad()
                    loss = cross_entropy(model(xs), ys)
                    loss.backward()
                    return loss

                optimizer.step(closure)

    @torch.no_grad()
    def measure(self, model: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, clock: Clock, between: Callable[[], None]) -> dict[str, float]:
        """The network's own columns, and for b bits ``step_b``, ``predicted_b``, ``noise_b`` (its standard error beside it) with its ratio to the prediction,
        ``rounded_b`` and ``accuracy_b``."""
        params = list(model.parameters())

        def loss(model: nn.Module = model) -> float:
            return cross_entropy(model(x), y).item()

        with clock:
            trace = gg.hessian_trace(lambda: cross_entropy(model(x), y), model, method="two_point_grad", probes=self.probes)
        here, largest = loss(), max(p.abs().max().item() for p in params)
        row = {"loss": here, "accuracy": accuracy(model, test_x, test_y), "trace": trace.mean, "trace_stderr": trace.stderr, "largest_weight": largest}
        for b in self.BITS:
            step = 2 * largest / 2**b
            rises = []
            for draw in range(self.draws):
                between()
                both = []
                for sign in (1, -1):  # the pair cancels the first order, which is noise here
                    with gg.perturbed(model, step, seed=draw, sign=sign, distribution="uniform"):
                        both.append(loss() - here)
                rises.append(sum(both) / 2)
            predicted, noise = step**2 / 24 * trace.mean, float(np.mean(rises))
            plain = copy.deepcopy(model)
            for p, value in zip(plain.parameters(), rounded(params, step), strict=True):
                p.copy_(value)
            row |= {
                f"step_{b}": step,
                f"predicted_{b}": predicted,
                f"noise_{b}": noise,
                f"noise_stderr_{b}": float(np.std(rises, ddof=1)) / math.sqrt(self.draws),
                f"ratio_{b}": noise / predicted,
                f"mismatch_{b}": abs(noise / predicted - 1),
                f"rounded_{b}": loss(plain) - here,
                f"accuracy_{b}": accuracy(plain, test_x, test_y),
            }
        return row

    def claims(self) -> list[Claim]:
        return [
            Claim(
                "plain, errors of 6 bits: the mean rise of the loss is D^2/24 tr H within 10 %", "plain", "mismatch_6", "<=", 0.1, formula="E Δf = (D²/24) tr H"
            ),
            Claim("trained with noise: likewise", "with noise", "mismatch_6", "<=", 0.1),
            MeanClaim("at 3 bits the expansion is too small by a tenth or more", "plain", "ratio_3", ">=", 1.1),
            MeanClaim("training with noise lowers the Hessian's trace", "with noise", "trace", "<=", 0.0, versus="plain"),
            MeanClaim("and costs less than a percentage point of test accuracy", "with noise", "accuracy", ">=", -0.01, versus="plain"),
            MeanClaim("rounded to 2 bits, the network trained with noise reads more test digits", "with noise", "accuracy_2", ">=", 0.0, versus="plain"),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        frame, ends = outcome.metrics, []
        for arm, colour in (("plain", RED), ("with noise", BLUE)):
            rows = frame[frame["arm"] == arm]
            for b in self.BITS:
                left.plot(rows[f"predicted_{b}"], rows[f"noise_{b}"], "o", color=colour, ms=5, alpha=0.8, mew=0)
                positive = rows[rows[f"rounded_{b}"] > 0]
                left.plot(positive[f"predicted_{b}"], positive[f"rounded_{b}"], "o", color=colour, ms=4, alpha=0.8, mfc="none")
            share = rows[["accuracy", *(f"accuracy_{b}" for b in self.BITS)]].to_numpy().T  # (1 + bits, seeds)
            right.plot(share, color=colour, lw=0.8, alpha=0.4)
            right.plot(share.mean(1), "o-", color=colour, lw=2)
            ends.append((share[-1].mean(), arm, colour))
        for b in self.BITS:
            middle = float(np.exp(np.log(frame[f"predicted_{b}"]).mean()))
            left.annotate(f"{b} bits", (middle, middle / 12), ha="center", fontsize=9, color="0.3")
        low, high = 0.5 * frame[f"predicted_{max(self.BITS)}"].min(), 2 * frame[f"predicted_{min(self.BITS)}"].max()
        left.plot([low, high], [low, high], color="black", lw=0.8, ls=":")
        title = "Rounding errors cost D²/24 tr H in the mean, down to 4 bits" if outcome.holds else "The rise of the loss, expected and measured"
        left.set(xscale="log", yscale="log", xlabel="(D²/24) tr H", ylabel="rise of the training loss", title=title, ylim=(low / 20, None))
        left.text(0.03, 0.93, "● errors spread evenly, mean\n○ simply rounded (where the loss rises)", transform=left.transAxes, va="top", fontsize=9)
        title = "Trained with noise, a network stands coarser weights" if outcome.holds else "Test accuracy after rounding"
        right.set(ylabel="test accuracy", xlabel="bits per weight", title=title)
        right.set_xticks(range(len(self.BITS) + 1), ["not rounded", *map(str, self.BITS)])
        name_curves(right, ends)
        return figure
