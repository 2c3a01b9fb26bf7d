"""When the noise of SGD matters: the perceptron's power laws in the temperature ``T = lr / B`` and the number P of samples, and a network's phase diagram.

A. Sclocchi, M. Geiger, M. Wyart, "Dissecting the effects of SGD noise in distinct regimes of deep learning", ICML 2023.

The loss is ``(1/alpha) max(0, 1 - alpha y (f - f_0))``, f_0 the model at its start, and training ends when it is zero on all samples. Its gradient is
``-y grad f`` on samples that are not fitted yet and zero on the others: the noise of a step is carried by the former alone, and dies with the last of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Setting, batches
from .figures import BLUE, GREEN, RED
from .images import data_used, load_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Perceptron", "PhaseDiagram", "ScaledNet", "fit_perceptron", "signed_samples"]

PAPER = "Sclocchi, Geiger, Wyart (ICML 2023)"
TITLE = "Dissecting the Effects of SGD Noise in Distinct Regimes of Deep Learning"

Between = Callable[[], None]


def _philox(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def hinge(output: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``mean (1/alpha) max(0, 1 - alpha y output)``, the output being ``f - f_0``."""
    return relu(1 - alpha * y * output).mean() / alpha


# --------------------------------------------------------------------------------------------------------------------------------------- perceptron


def signed_samples(chi: float, size: int, dim: int, rng: np.random.Generator) -> np.ndarray:  # (P, d)
    """``y_i x_i / sqrt(d)``: x_1 has the density ``|x_1|^chi exp(-x_1^2 / 2)``, the root of twice a Gamma((chi + 1) / 2); the others are standard normal, and
    ``y = sign(x_1)``. So the first column is positive and the others do not know of y."""
    z = rng.standard_normal((size, dim))
    z[:, 0] = np.sqrt(2 * rng.gamma((chi + 1) / 2, size=size))
    return z / math.sqrt(dim)


@dataclass
class Fit:
    """A perceptron on its way: after every step that changed it."""

    w: np.ndarray  # (d,), the change of the weights
    steps: int = 0
    mistakes: int = 0  # samples that were drawn and not fitted
    w_perp_sum: float = 0.0  # of |w_perp|, over the mistakes, after each


def fit_perceptron(z: np.ndarray, lr: float, batch: int, alpha: float, rng: np.random.Generator, until: int, fit: Fit, between: Between) -> None:
    """SGD with batches of ``batch`` samples, drawn with replacement, until at most ``until`` samples are unfitted: ``y f(x) < 1 / alpha``.

    A step whose samples are all fitted does nothing. Such steps are not taken but counted: the first unfitted sample is the g-th that is drawn, g geometric
    with the share n of unfitted samples; it comes in step ``(g - 1) // B``, and of the rest of that batch a binomial number is unfitted too.

    Samples that cannot be unfitted are left out: ``w_1 |x_1| > r |x_perp| + sqrt(d) / alpha`` rules it out while ``|w_perp| <= r``, because w_1 only grows.
    """
    size, margin = len(z), 1 / alpha
    norms = np.linalg.norm(z[:, 1:], axis=1)
    reach, renew_at, kept = 0.0, 0.0, z
    while True:
        w_1, w_perp = fit.w[0], math.sqrt(fit.w[1:] @ fit.w[1:])
        if w_perp > reach or w_1 > renew_at:
            reach, renew_at = 1.5 * w_perp, 1.3 * w_1
            kept = z[w_1 * z[:, 0] < reach * norms + margin]
            between()
        (unfitted,) = np.nonzero(kept @ fit.w < margin)
        if len(unfitted) <= until:
            return
        share = len(unfitted) / size
        drawn = int(rng.geometric(share)) - 1
        count = 1 + int(rng.binomial(batch - 1 - drawn % batch, share)) if batch > 1 else 1
        for i in rng.integers(len(unfitted), size=count):
            fit.w = fit.w + lr / batch * kept[unfitted[i]]
        fit.steps += drawn // batch + 1
        fit.mistakes += count
        fit.w_perp_sum += count * math.sqrt(fit.w[1:] @ fit.w[1:])


def growth(chi: float) -> float:
    """``c = E[g | unfitted]`` of :class:`Perceptron`: ``sqrt(2) Gamma((3 + chi) / 2) / Gamma((2 + chi) / 2)``."""
    return math.sqrt(2) * math.gamma((3 + chi) / 2) / math.gamma((2 + chi) / 2)


def _slopes(target: np.ndarray, *regressors: np.ndarray) -> np.ndarray:
    """The exponents of a power law, by least squares of the logarithms."""
    design = np.stack([np.ones(len(target)), *(np.log(r) for r in regressors)], axis=1)
    return np.asarray(np.linalg.lstsq(design, np.log(target), rcond=None)[0][1:])


@dataclass(frozen=True)
class Perceptron(Setting):
    """A perceptron ``f(x) = w . x / sqrt(d)`` learns ``y = sign(x_1)`` where the density of x_1 goes as ``|x_1|^chi`` near the boundary.

    Let T = lr / B, and w the change of the weights: a signal w_1 and noise w_perp. A mistake (a sample that is drawn and not fitted) adds ``T y x / sqrt(d)``.
    Far above the margin, alpha T >> 1, a sample is unfitted if ``w_1 |x_1| < |w_perp| g``, g the standard normal number ``-y w_perp . x_perp / |w_perp|``. So
    the share of unfitted samples is ``n ~ (|w_perp| / w_1)^(1 + chi)``, and for small n, with ``E g^k = E[g_+^(1 + chi + k)] / E[g_+^(1 + chi)]`` among them:

    - *noise*: ``E g = c = sqrt(2) Gamma((3 + chi)/2) / Gamma((2 + chi)/2)`` and ``E |x_perp|^2 = d + chi``, so a mistake changes |w_perp|^2 by
      ``-2 T c |w_perp| / sqrt(d) + T^2 (d + chi) / d`` in the mean. It stays where this is zero: **|w_perp| = T (d + chi) / (2 c sqrt(d))**, whatever n is.
    - *signal*: among them ``E |x_1| = (|w_perp| / w_1) c (1 + chi) / (2 + chi)``, so a mistake adds to w_1^2 twice w_1 T E|x_1| / sqrt(d):
      **w_1^2 = T^2 M (1 + chi) / (2 + chi) (1 + chi / d)** after M mistakes.
    - *the end*: the last sample is fitted when n ~ 1/P, so **|w_1| ~ T P^(1/(1 + chi))**, and because dt = lr dM / (B n) = T dM / n,
      **t* ~ T P^(1 + 2/(1 + chi))**. The weights' change reaches their start's size, |w| = |w_0|, at **T_c ~ P^(-1/(1 + chi))**: where a network leaves
      the lazy regime. Below alpha T ~ 1 the margin takes the noise's place, and |w_1| no longer depends on T.

    The paper states and measures power laws; derivation, exponents and prefactors as they stand here were made for this setting. Without a margin the dynamics
    scales with T exactly, so the power of T is 1 but for the margin and the draws. The last mistakes are made on fewer samples than there are dimensions, which
    w_perp fits one by one: |w_perp| falls with P at the end, and powers of P lie below their limits. Prefactors are taken before, down to 10 d such samples.

    ``gg.noise_scale`` reads the noise of a step off the per-sample norms, which are zero on fitted samples: ``(lr^2/B)(mean_i |g_i|^2 - |g|^2)``.
    """

    name: ClassVar[str] = "sgd-noise/perceptron"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = PAPER
    summary: ClassVar[str] = "perceptron: how signal, noise and time to fit grow with temperature and number of samples"
    duration: ClassVar[str] = "2 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.tap", "gg.noise_scale")
    SMALL: ClassVar[dict[str, Any]] = {"sizes_0": (512, 1024, 2048)}
    PAPER: ClassVar[dict[str, Any]] = {f"sizes_{chi}": (1024, 2048, 4096, 8192, 16384) for chi in (0, 1, 3)}

    CHIS: ClassVar[tuple[int, ...]] = (0, 1, 3)
    TEMPERATURES: ClassVar[tuple[float, ...]] = (16.0, 256.0, 4096.0, 65536.0)  # alpha T, where the margin counts no more
    COLD: ClassVar[tuple[float, ...]] = (0.125, 0.5)  # where it counts more than the noise; with chi = 1 and the two smallest P alone: steps are many
    DRAWS: ClassVar[dict[int, int]] = {0: 2, 1: 2, 3: 4}  # data sets for each P and temperature, by chi
    LARGE: ClassVar[tuple[int, int]] = (2**16, 16)  # samples and dimensions: for the prefactors
    RUNS: ClassVar[dict[int, int]] = {0: 1, 1: 24}  # of them: with chi = 1 a run makes 50 mistakes there, with chi = 0 5,000
    PARTS: ClassVar[tuple[int, ...]] = (4, 16, 64)  # a step's variance is measured where a share of 1/4, 1/16, 1/64 is unfitted
    BATCHES: ClassVar[int] = 200_000  # drawn to measure a step's variance

    num_seeds: int = 5
    """How many seeds; all samples are drawn anew for each."""
    dim: int = 64
    """Dimensions d."""
    alpha: float = 32768.0
    """The scale alpha of the loss: the margin is 1 / alpha."""
    batch: int = 2
    """Samples in a step, drawn with replacement."""
    sizes_0: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Numbers P of samples where chi = 0."""
    sizes_1: tuple[int, ...] = (1024, 4096, 16384)
    """Likewise where chi = 1."""
    sizes_3: tuple[int, ...] = (1024, 4096, 16384)
    """Likewise where chi = 3."""

    def rules(self) -> list[tuple[str, bool, str]]:
        sizes = [(f"sizes_{chi}", min(s, default=0) >= 4 * self.dim and len(set(s)) >= 2) for chi, s in zip(self.CHIS, self.sizes())]
        return [
            *self.at_least(2, "dim"),
            *self.positive("alpha"),
            *self.at_least(1, "batch"),
            *((field, kept, f"two different numbers or more, each at least 4 dim = {4 * self.dim}") for field, kept in sizes),
        ]

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        return self.sizes_0, self.sizes_1, self.sizes_3

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        sizes = {f"χ = {chi}": (chi, sizes) for chi, sizes in zip(self.CHIS, self.sizes(), strict=True)}

        def work(arm: str, seed: int, clock: Clock, between: Between) -> list[dict[str, float]]:
            chi, numbers = sizes[arm]
            temperatures = (*(self.COLD if chi == 1 else ()), *self.TEMPERATURES)
            rows = [
                self._cell(chi, size, temperature / self.alpha, seed, draw, between)
                for place, size in enumerate(numbers)
                for temperature in temperatures
                for draw in range(self.DRAWS[chi] if temperature in self.TEMPERATURES else int(place < 2))
            ]
            whole = {**self._exponents(chi, rows), **self._prefactors(chi, seed, between), **self._noise(chi, max(numbers), seed, device, clock, between)}
            return [{**row, **whole} for row in rows]

        return GridRun([(arm, seed) for arm in sizes for seed in self.seeds], work)

    def _cell(self, chi: int, size: int, temperature: float, seed: int, draw: int, between: Between) -> dict[str, float]:
        """One data set, fitted at one temperature."""
        rng = _philox(seed, chi, size, round(1000 * temperature * self.alpha), draw)
        fit = Fit(np.zeros(self.dim))
        fit_perceptron(signed_samples(chi, size, self.dim, rng), temperature * self.batch, self.batch, self.alpha, rng, 0, fit, between)
        return {
            "size": size,
            "temperature": temperature,
            "signal": float(fit.w[0]),
            "noise": fit.w_perp_sum / fit.mistakes,
            "noise_end": float(np.linalg.norm(fit.w[1:])),
            "change": float(np.linalg.norm(fit.w)) / math.sqrt(self.dim),  # |w| / |w_0|, of standard normal w_0
            "time": temperature * self.batch * fit.steps,
            "mistakes": fit.mistakes,
        }

    def _exponents(self, chi: int, rows: list[dict[str, float]]) -> dict[str, float]:
        size, temperature, signal, noise, change, time = (
            np.array([row[c] for row in rows]) for c in ("size", "temperature", "signal", "noise", "change", "time")
        )
        noisy = temperature * self.alpha >= min(self.TEMPERATURES)
        noise_end = np.array([row["noise_end"] for row in rows])
        signal_t, signal_p = _slopes(signal[noisy], temperature[noisy], size[noisy])
        time_t, time_p = _slopes(time[noisy], temperature[noisy], size[noisy])
        numbers = np.unique(size)
        critical = []  # where the line through log change against log T crosses 0
        for number in numbers:
            here = noisy & (size == number)
            slope, offset = np.polyfit(np.log(temperature[here]), np.log(change[here]), 1)
            critical.append(math.exp(-offset / slope))
        return {
            "noise_t": float(_slopes(noise[noisy], temperature[noisy], size[noisy])[0]),
            "signal_t": float(signal_t),
            "signal_t_cold": math.nan if noisy.all() else float(_slopes(signal[~noisy], temperature[~noisy], size[~noisy])[0]),
            "signal_p": float(signal_p),
            "ratio_p": float(_slopes((signal / noise_end)[noisy], temperature[noisy], size[noisy])[1]),
            "noise_end_p": float(_slopes(noise_end[noisy], temperature[noisy], size[noisy])[1]),
            "time_t": float(time_t),
            "time_p": float(time_p),
            "critical_p": float(_slopes(np.array(critical), numbers)[0]),
            "one": 1.0,
            "signal_p_predicted": 1 / (1 + chi),
            "ratio_p_predicted": 1 / (1 + chi),
            "time_p_predicted": 1 + 2 / (1 + chi),
            "critical_p_predicted": -1 / (1 + chi),
        }

    def _prefactors(self, chi: int, seed: int, between: Between) -> dict[str, float]:
        """From a twentieth of many samples down to 10 d, at alpha T = 1024."""
        size, dim = self.LARGE
        temperature = 1024 / self.alpha
        sums = np.zeros(3)  # mistakes, |w_perp| over them, w_1^2
        for run in range(self.RUNS.get(chi, 0)):
            rng, fit = _philox(seed, chi, size, 0, run), Fit(np.zeros(dim))
            z = signed_samples(chi, size, dim, rng)
            for until, sign in ((size // 20, -1), (10 * dim, 1)):
                fit_perceptron(z, temperature * self.batch, self.batch, self.alpha, rng, until, fit, between)
                sums += sign * np.array([fit.mistakes, fit.w_perp_sum, fit.w[0] ** 2])
        mistakes, w_perp, signal = sums.tolist() if sums.any() else (math.nan,) * 3
        return {
            "w_perp": w_perp / mistakes / temperature,
            "w_perp_predicted": (dim + chi) / (2 * growth(chi) * math.sqrt(dim)),
            "gain": signal / mistakes / temperature**2,
            "gain_predicted": (1 + chi) / (2 + chi) * (1 + chi / dim),
        }

    def _noise(self, chi: int, size: int, seed: int, device: torch.device, clock: Clock, between: Between) -> dict[str, float]:
        """The variance of a step where 1/4, 1/16, 1/64 of the samples are unfitted, from the norms and from steps drawn; the share and the noise there."""
        rng, lr, fit = _philox(seed, chi, size, 1), 16 / self.alpha * self.batch, Fit(np.zeros(self.dim))
        row: dict[str, float] = {}
        z = signed_samples(chi, size, self.dim, rng)
        x = torch.from_numpy(z).to(device)
        model = nn.Linear(self.dim, 1, bias=False, dtype=torch.float64, device=device)
        ones = torch.ones(size, 1, dtype=torch.float64, device=device)
        for part in self.PARTS:
            fit_perceptron(z, lr, self.batch, self.alpha, rng, size // part, fit, between)
            with torch.no_grad():
                model.weight.copy_(torch.from_numpy(fit.w))
            with clock:
                with gg.tap(model) as tap:
                    hinge(model(x), ones, self.alpha).backward()
                predicted = gg.noise_scale(tap).step_covariance_trace(lr, self.batch, replacement=True)
                sqnorms = tap.sqnorms().cpu().numpy()
                model.zero_grad(set_to_none=True)
            unfitted = z @ fit.w < 1 / self.alpha
            index = rng.integers(size, size=(self.BATCHES, self.batch))
            index = index[unfitted[index].any(1)]  # the other steps are zero
            steps = lr / self.batch * (z[index] * unfitted[index][:, :, None]).sum(1)
            row |= {
                f"share_{part}": float(unfitted.mean()),
                f"norms_{part}": float(sqnorms.mean()),
                f"fitted_norms_{part}": float(sqnorms[~unfitted].max()),
                f"variance_{part}": float(np.square(steps).sum() / self.BATCHES - np.square(steps.sum(0) / self.BATCHES).sum()),
                f"variance_{part}_predicted": predicted,
            }
        return row

    def claims(self) -> list[Claim]:
        drift = "The last d samples are fitted one by one, at the cost of |w⊥|, which falls with P: exponents come out smaller than their limits."
        added = "No prediction: this claim was added when a run with seeds 0 to 4 had been seen."
        scales = "Without a margin the dynamics scales with T exactly: what could break this is the margin, and too few draws."
        middle = "χ = 1"
        claims: list[Claim] = [
            ClosedForm("noise is proportional to T (χ = 1)", middle, "noise_t", against="one", slack=0.05, formula="|w⊥| ~ T", remark=scales),
            ClosedForm("signal is proportional to T (χ = 1)", middle, "signal_t", against="one", slack=0.05, formula="|w₁| ~ T", remark=scales),
            MeanClaim("but between αT of 1/8 and 1/2 it hardly depends on T (χ = 1)", middle, "signal_t_cold", "<=", 0.25, formula="|w₁| ~ T⁰ for αT ≪ 1"),
            ClosedForm("time to fit is proportional to T (χ = 1)", middle, "time_t", against="one", slack=0.05, formula="t* ~ T", remark=scales),
        ]
        for chi in self.CHIS:
            arm = f"χ = {chi}"
            powers = [
                ("signal", "signal_p", "|w₁| ~ T P^(1/(1+χ))", drift),
                ("signal over noise at the end", "ratio_p", "|w₁| / |w⊥| ~ 1 / min |x₁| ~ P^(1/(1+χ))", added),
                ("T_c, where |w| = |w_0|,", "critical_p", "T_c ~ P^(−1/(1+χ))", drift),
                ("time to fit", "time_p", "t* ~ T P^(1+2/(1+χ))", drift),
            ]
            claims += [
                ClosedForm(f"{arm}: the power of P of {what}", arm, column, against=f"{column}_predicted", slack=0.15, formula=formula, remark=remark)
                for what, column, formula, remark in powers
            ]
            if chi in self.RUNS:  # with chi = 3 a share of 1/100 reaches x_1 ~ 1/3, where the density is no power any more
                noise, gain = "|w⊥| = T (d+χ) / (2c√d)", "w₁² = T² M (1+χ)/(2+χ) (1+χ/d)"
                claims += [
                    ClosedForm(f"{arm}: the noise's prefactor", arm, "w_perp", against="w_perp_predicted", slack=0.05, formula=noise),
                    ClosedForm(f"{arm}: what a mistake adds to the signal", arm, "gain", against="gain_predicted", slack=0.05, formula=gain),
                ]
            variance = f"variance_{self.PARTS[1]}"
            formula = "Var Δw = (η²/B)(mean ‖gᵢ‖² − ‖ḡ‖²)"
            claims.append(
                ClosedForm(f"{arm}: a step's variance from the norms", arm, variance, against=f"{variance}_predicted", precision=0.05, formula=formula)
            )
        return claims

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 4.6), layout="constrained")
        left, second, third, right = figure.subplots(1, 4)
        frame = outcome.metrics
        colours = dict(zip((f"χ = {chi}" for chi in self.CHIS), (RED, BLUE, GREEN), strict=True))
        frame = frame.assign(log_signal=np.log(frame["signal"] * self.alpha), log_noise=np.log(frame["noise"] * self.alpha), log_time=np.log(frame["time"]))
        middle = frame[frame["arm"] == "χ = 1"]
        numbers = sorted(middle["size"].unique())
        for size, shade in zip(numbers, np.linspace(0.35, 1, len(numbers)), strict=True):
            means = np.exp(middle[middle["size"] == size].groupby("temperature")[["log_signal", "log_noise"]].mean())
            x = means.index.to_numpy() * self.alpha
            left.plot(x, means["log_signal"], "o-", color=BLUE, ms=3, lw=1.2, alpha=shade)
            left.plot(x, means["log_noise"], "o-", color="#7a7a7a", ms=3, lw=1.2, alpha=shade)
            left.annotate(f"{size:,}", (x[-1], means["log_signal"].iloc[-1]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
        left.text(0.05, 0.72, "signal α|w₁|, by P", color=BLUE, transform=left.transAxes, fontsize=9)
        left.text(0.3, 0.1, "noise α|w⊥|", color="#7a7a7a", transform=left.transAxes, fontsize=9)
        left.set(
            xscale="log",
            yscale="log",
            xlabel="temperature αT",
            ylabel="weights, in units of the margin",
            title="χ = 1: noise and signal grow with T",
            xlim=(0.05, 1e6),
        )
        noisy = frame[frame["temperature"] * self.alpha >= min(self.TEMPERATURES)]
        noisy = noisy.assign(log_signal=np.log(noisy["signal"] / noisy["temperature"]), log_time=np.log(noisy["time"] / noisy["temperature"]))
        panels = [(second, "log_signal", "signal_p", "signal |w₁| / T"), (third, "log_time", "time_p", "time to fit t* / T")]
        for ax, column, power, label in panels:
            for arm, colour in colours.items():
                rows = noisy[noisy["arm"] == arm]
                means = np.exp(rows.groupby("size")[column].mean())
                ax.plot(means.index, means, "o", color=colour, ms=5)
                middle_x, middle_y = np.exp(np.log(means.index.to_numpy()).mean()), np.exp(np.log(means).mean())
                predicted = rows[f"{power}_predicted"].iloc[0]
                ax.plot(means.index, middle_y * (means.index / middle_x) ** predicted, color=colour, lw=1)
                text = f"{arm}: P^{rows.groupby('seed')[power].first().mean():.2f}, line P^{predicted:.2f}"
                ax.annotate(text, (means.index[0], means.iloc[0]), xytext=(6, -12), textcoords="offset points", color=colour, fontsize=8)
            ax.set(xscale="log", yscale="log", xlabel="samples P", ylabel=label, title="… growing with P" if ax is second else "… and training longer")
        for arm, colour in colours.items():
            rows = frame[frame["arm"] == arm].groupby("seed").first()
            for part in self.PARTS:
                right.plot(rows[f"variance_{part}_predicted"], rows[f"variance_{part}"], "o", color=colour, ms=4, alpha=0.8, mew=0)
        ends = [frame[f"variance_{part}_predicted"] for part in self.PARTS]
        span = [min(e.min() for e in ends) / 1.5, max(e.max() for e in ends) * 1.5]
        right.plot(span, span, color="black", lw=0.8, ls=":")
        right.set(
            xscale="log", yscale="log", xlabel="(η²/B)(mean ‖gᵢ‖² − ‖ḡ‖²)", ylabel="variance of the steps drawn", title="Noise of a step, from per-sample norms"
        )
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------- phase diagram


class ScaledNet(nn.Module):
    """Hidden layers of ReLU and one output, all weights standard normal, ``sqrt(2 / inputs)`` between them: a tangent kernel of order 1 at any width."""

    def __init__(self, inputs: int, hidden: int, depth: int, seed: int) -> None:
        super().__init__()
        sizes, generator = [inputs, *[hidden] * depth, 1], torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False, dtype=torch.float64) for n, m in itertools.pairwise(sizes))
        for layer in self.parameters():
            layer.data.copy_(torch.randn(layer.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:  # (n, inputs) -> (n,)
        *hidden, last = self.layers
        for layer in hidden:
            x = relu(layer(x)) * math.sqrt(2 / x.shape[1])
        result: Tensor = last(x)[:, 0] / math.sqrt(x.shape[1])
        return result


@dataclass(frozen=True)
class _Parity:
    train_x: Tensor  # (P, inputs)
    train_y: Tensor  # (P,), 1 or -1
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class PhaseDiagram(Setting):
    """Parity of images by a network of five hidden layers, over the scale alpha and the temperature T = lr / B; training ends where all samples are fitted.

    With alpha >> 1 an output needs to change by 1 / alpha only, the kernel ``K_ij = <grad f(x_i), grad f(x_j)>`` stays what it was (the lazy regime), and the
    network is a perceptron in its gradients: its weights change by ``T P^gamma`` times a constant, its time is ``T P^b``, with exponents of the data, and no
    scale but the weights' own ends this. At ``T_c ~ P^-a`` the kernel has changed as much as it was large, whatever alpha: noise leaves the lazy regime. With
    alpha <= 1 the kernel changes without noise. The paper measures powers ``T^delta P^gamma``, ``T P^b`` and ``P^-a`` on MNIST and CIFAR-10; that the weights'
    change has delta = 1 is the argument of :class:`Perceptron`.

    What noise does to the test error the paper measured too: leaving the lazy regime by T and leaving it by alpha can have opposite effects. Here: the error of
    the largest temperature less that of the smallest, and of small alpha less that of large, at their smallest temperatures.

    ``drift`` is ``|K - K_0| / |K_0|`` (Frobenius) on ``kernel_images`` of the training images, T_c where a power law through it crosses 1/2, ``change`` is
    ``|w - w_0| / |w_0|``. Different from the paper: 8 x 8 digits, at most 898 of them for training, width 64, no convolutional network.
    """

    name: ClassVar[str] = "sgd-noise/phase-diagram"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = PAPER
    summary: ClassVar[str] = "images' parity: noise makes a lazy network leave its kernel, at a temperature that falls with the number of samples"
    duration: ClassVar[str] = "1 to 2 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.gram",)
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 6}
    PAPER: ClassVar[dict[str, Any]] = {"hidden": 128, "num_seeds": 10}
    needs: ClassVar[str] = "MNIST and CIFAR-10 (--data), 2^14 of their images, and a convolutional network: days of a CPU"

    LAZY: ClassVar[str] = "α = 2^15"
    SCALES: ClassVar[dict[str, tuple[float, tuple[int, ...]]]] = {  # alpha, log2 T: from where it takes too many steps to where training diverges
        LAZY: (2.0**15, (-10, -8, -6, -5, -4, -3, -2, -1)),
        "α = 1": (1.0, (-6, -5, -4, -3, -2, -1)),
        "α = 2^-3": (2.0**-3, (-5, -4, -3, -2)),
    }
    POWER: ClassVar[tuple[float, float]] = (2.0**-8, 2.0**-3)  # where powers of T are fitted, alpha = 2^15

    num_seeds: int = 8
    """How many seeds, each with its own split of the images and start."""
    data: str = "digits"
    """Images: "digits", or a folder (see ghostgrad.papers.images). What is learnt is whether a class has an even number."""
    train_size: int = 896
    """Training images P at most; with alpha = 2^15 also a half and a quarter of them."""
    hidden: int = 64
    """Width of a hidden layer."""
    depth: int = 5
    """Hidden layers."""
    batch: int = 16
    """Images in a step."""
    max_steps: int = 40_000
    """Steps after which training ends even if images are not fitted."""
    kernel_images: int = 48
    """Images that the kernel is taken of."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "hidden", "depth", "batch", "max_steps"),
            ("train_size", self.train_size >= 4 * self.batch, f"at least 4 batch = {4 * self.batch}"),
            *self.at_least(2, "kernel_images"),
        ]

    def data_used(self) -> str:
        return data_used(self.data)

    def images(self, seed: int, device: torch.device) -> _Parity:
        images = load_images(self.data, seed=seed)
        order = batches(seed, 1 << 32, len(images.train_y), len(images.train_y))[0][: self.train_size]  # no epoch has this number

        def half(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1).double().to(device), (1.0 - 2.0 * (y % 2)).double().to(device)

        return _Parity(*half(images.train_x[order], images.train_y[order]), *half(images.test_x, images.test_y))

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        def work(arm: str, seed: int, clock: Clock, between: Between) -> list[dict[str, float]]:
            data, (alpha, temperatures) = self.images(seed, device), self.SCALES[arm]
            whole = len(data.train_y)
            sizes = (whole // 4, whole // 2, whole) if arm == self.LAZY else (whole,)
            rows = [self._cell(data, size, alpha, 2.0**k, seed, clock, between) for size in sizes for k in temperatures]
            ends = [row for row in rows if row["size"] == whole]
            cold, hot = ends[0], ends[-1]
            last = {"drift_cold": cold["drift"], "drift_hot": hot["drift"], "error_cold": cold["error"], "error_gain": hot["error"] - cold["error"], "one": 1.0}
            last |= {"unfitted_most": max(row["unfitted"] for row in rows), **self._powers(rows, len(sizes))}
            return [{**row, **last} for row in rows]

        return GridRun([(arm, seed) for arm in self.SCALES for seed in self.seeds], work)

    def _powers(self, rows: list[dict[str, float]], sizes: int) -> dict[str, float]:
        names = ("change_t", "change_p", "time_t", "time_p", "drift_t", "critical_p")
        if sizes == 1:
            return dict.fromkeys(names, math.nan)
        fitted = [row for row in rows if self.POWER[0] <= row["temperature"] <= self.POWER[1]]
        size, temperature, change, time, drift = (np.array([row[c] for row in fitted]) for c in ("size", "temperature", "change", "time", "drift"))
        powers = [_slopes(values, temperature, size) for values in (change, time, drift)]
        # drift = C T^p P^q is 1/2 at T = (1 / 2 C)^(1 / p) P^(-q / p)
        return dict(zip(names, [*powers[0], *powers[1], powers[2][0], -powers[2][1] / powers[2][0]], strict=True))

    def train(self, model: nn.Module, x: Tensor, y: Tensor, alpha: float, temperature: float, seed: int, between: Between) -> int:
        """Until all are fitted: how many steps."""
        params: list[Tensor] = list(model.parameters())
        with torch.no_grad():
            start = model(x)
        steps, epoch = 0, 0
        while steps < self.max_steps:
            between()
            with torch.no_grad():
                if not (alpha * y * (model(x) - start) < 1).any():
                    break
            for index in batches(seed, epoch, len(y), self.batch)[: len(y) // self.batch]:
                steps += 1
                outputs = model(x[index]) - start[index]
                if (alpha * y[index] * outputs < 1).any():  # else there is no gradient
                    grads = torch.autograd.grad(hinge(outputs, y[index], alpha), params)
                    with torch.no_grad():
                        torch._foreach_add_(params, grads, alpha=-temperature * self.batch)
            epoch += 1
        return steps

    def _cell(self, data: _Parity, size: int, alpha: float, temperature: float, seed: int, clock: Clock, between: Between) -> dict[str, float]:
        x, y = data.train_x[:size], data.train_y[:size]
        model = ScaledNet(x.shape[1], self.hidden, self.depth, seed).to(x.device)
        before = [p.detach().clone() for p in model.parameters()]
        with clock:
            kernel = gg.gram(model, x[: self.kernel_images])
        with torch.no_grad():
            start, test_start = model(x), model(data.test_x)
        steps = self.train(model, x, y, alpha, temperature, seed, between)
        with clock:
            drift = (gg.gram(model, x[: self.kernel_images]) - kernel).norm() / kernel.norm()
        with torch.no_grad():
            moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True))
            return {
                "size": size,
                "temperature": temperature,
                "steps": steps,
                "time": temperature * self.batch * steps,
                "unfitted": int((alpha * y * (model(x) - start) < 1).sum()),
                "drift": drift.item(),
                "change": float(torch.as_tensor(moved).sqrt() / sum(q.square().sum() for q in before) ** 0.5),
                "error": ((model(data.test_x) - test_start) * data.test_y <= 0).double().mean().item(),
            }

    def claims(self) -> list[Claim]:
        lazy, one, small = self.SCALES
        return [
            Claim("every image is fitted at the end (α = 2^15)", lazy, "unfitted_most", "==", 0),
            Claim("large α, small T: the kernel stays", lazy, "drift_cold", "<=", 0.1, formula="‖K−K₀‖ ≤ 0.1 ‖K₀‖"),
            Claim("large α, large T: it does not, noise has left the lazy regime", lazy, "drift_hot", ">=", 0.5, formula="‖K−K₀‖ ≥ 0.5 ‖K₀‖"),
            Claim("α = 1: the kernel changes at small T too", one, "drift_cold", ">=", 0.5),
            Claim("α = 1/8: likewise", small, "drift_cold", ">=", 0.5),
            ClosedForm("lazy: the weights' change is proportional to T", lazy, "change_t", against="one", slack=0.2, formula="‖Δw‖ ~ T P^γ"),
            MeanClaim("and grows with P", lazy, "change_p", ">=", 0.0, formula="γ > 0"),
            ClosedForm("lazy: time to fit is proportional to T", lazy, "time_t", against="one", slack=0.2, formula="t* ~ T P^b"),
            MeanClaim("and grows with P", lazy, "time_p", ">=", 0.0, formula="b > 0"),
            MeanClaim("the temperature at which noise leaves the lazy regime falls with P", lazy, "critical_p", "<=", 0.0, formula="T_c ~ P^−a, a > 0"),
            MeanClaim(
                "leaving the lazy regime by T lowers the test error",
                lazy,
                "error_gain",
                "<=",
                0.0,
                remark="The paper finds noise useful in some regimes and detrimental in others; that it is useful on these images is this setting's guess.",
            ),
            MeanClaim(
                "leaving it by α raises it: an opposite effect",
                small,
                "error_cold",
                ">=",
                0.0,
                versus=lazy,
                remark="The paper says that the two can have opposite effects, on MNIST and CIFAR-10. Where this fails, and the claim before holds, both help.",
            ),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        frame = outcome.metrics
        whole = frame[frame["size"] == frame["size"].max()]
        for arm, colour in zip(self.SCALES, (BLUE, GREEN, RED), strict=True):
            rows = whole[whole["arm"] == arm]
            for ax, column, factor in ((left, "drift", 1.0), (right, "error", 100.0)):
                by_seed = rows.pivot(index="temperature", columns="seed", values=column) * factor
                ax.plot(by_seed.index, by_seed, color=colour, lw=0.8, alpha=0.35)
                ax.plot(by_seed.index, by_seed.mean(axis=1), "o-", color=colour, lw=2, ms=4)
                ends = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
                ax.annotate(arm, (by_seed.index[0], by_seed.mean(axis=1).iloc[0]), color=colour, **ends)
        lazy, most = frame[frame["arm"] == self.LAZY], 0.0
        for size, shade in zip(sorted(lazy["size"].unique()), (0.35, 0.65, 1.0), strict=True):
            mean = lazy[lazy["size"] == size].groupby("temperature")["change"].mean()
            mean /= mean.index
            most = max(most, mean.max())
            middle.plot(mean.index, mean, "o-", color=BLUE, lw=1.6, ms=4, alpha=shade)
            middle.annotate(f"{size} images", (mean.index[0], mean.iloc[0]), xytext=(-4, 5), textcoords="offset points", color=BLUE, fontsize=9)
        left.axhline(0.5, color="black", lw=0.8, ls=":")
        titles = ("Noise makes the lazy network leave its kernel", "Lazy: weights move in proportion to T")
        held = {v.claim.column: v.holds for v in outcome.verdicts}
        left.set(xscale="log", yscale="log", xlabel="temperature T", ylabel="‖K − K₀‖ / ‖K₀‖", title=titles[0] if held["drift_hot"] else "Change of the kernel")
        middle.set(
            xscale="log",
            xlabel="temperature T",
            ylabel="‖w − w₀‖ / (T ‖w₀‖)",
            ylim=(0, 1.1 * most),
            title=titles[1] if held["change_t"] else "Change of the weights",
        )
        right.set(xscale="log", xlabel="temperature T", ylabel="test error (%)", title="Test error")
        for ax in (left, middle, right):
            ax.margins(x=0.3)
        return figure
