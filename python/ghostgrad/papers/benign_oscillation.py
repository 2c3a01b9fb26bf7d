"""Large learning rates oscillate along a strong feature, and thereby learn a weak one.

M. Lu, B. Wu, X. Yang, D. Zou, "Benign oscillation of stochastic gradient descent with large learning rates", ICLR 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, MeanClaim, Outcome, Setting, Trainee, TrainingRun, reading_steps
from .figures import BLUE, GREY, OCHRE, RED, name_curves
from .models import half_squared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BenignOscillation", "PatchNet"]

DTYPE = torch.float64
COLOURS = {"large lr": BLUE, "small lr": GREY, "same kick": RED, "same residual": OCHRE}


class PatchNet(nn.Module):
    """``f(x) = sum_j a_j sum_p relu(<w_j, x_p>)^2``: m units with ``a = 1`` and m with ``a = -1``, the same for each patch p.

    Beside the weights it keeps what :class:`BenignOscillation` follows: sums over the steps, and peaks over the readings.
    """

    a: Tensor
    steps: Tensor
    sums: Tensor
    ends: Tensor
    flipped: Tensor
    peaks: Tensor

    def __init__(self, weights: Tensor) -> None:  # (2 m, d)
        super().__init__()
        units, dim = weights.shape
        self.hidden = nn.Linear(dim, units, bias=False, dtype=DTYPE)
        self.hidden.weight = nn.Parameter(weights)
        self.register_buffer("a", torch.tensor([1.0, -1.0], dtype=DTYPE).repeat_interleave(units // 2))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("sums", torch.zeros(2, 2, dtype=DTYPE))  # by label (1, -1): r^2 on strong samples, log(1 + 2 lr |u|^2 r) on weak ones
        self.register_buffer("ends", torch.full((2, 2, 2), torch.nan, dtype=DTYPE))  # where the sums begin and end: f_u and f_v by label
        self.register_buffer("flipped", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("peaks", torch.zeros(3, dtype=DTYPE))  # share of unstable samples among strong and among weak ones, lr times the sharpness

    def forward(self, x: Tensor) -> Tensor:  # (n, patches, d) -> (n,)
        return relu(self.hidden(x)).square().sum(1) @ self.a

    @torch.no_grad()
    def learnt(self, feature: Tensor) -> Tensor:  # (d,) -> (2,)
        """What the units of a label's own sign make of the feature, for y = 1 and y = -1: ``f_u``, ``f_v``."""
        products = self.hidden.weight @ feature
        return torch.stack([relu(sign * products[self.a == sign]).square().sum() for sign in (1, -1)])


@dataclass(frozen=True)
class _Data:
    x: Tensor  # (n, 3, d)
    y: Tensor  # (n,)
    strong: Tensor  # (n,) bool
    test_x: Tensor  # weak features alone
    test_y: Tensor


@dataclass(frozen=True)
class BenignOscillation(Setting):
    """A weak feature u in every sample, a strong one v in a share rho, and noise to tell samples apart: SGD, one sample a step, on ``(f(x) - y)^2 / 2``.

    A sample is three patches: ``y u``; ``y v``, or nothing; noise xi, normal and orthogonal to both. The network is :class:`PatchNet`. A small learning rate
    fits the strong samples by v, and the rest by their noise. To tell y from u alone it has not learnt.

    *The mechanism.* Let ``r = y (label - f)`` before a step. A step multiplies the ``<w_j, u>`` of the label's units by ``1 + 2 lr |u|^2 r``, and on strong
    samples their ``<w_j, v>`` by ``1 + 2 lr |v|^2 r``. With ``c = 2 lr |v|^2``: where <w, v> neither grows nor falls, ``sum log(1 + c r) = 0``, so
    ``sum r = (c/2) sum r^2`` to second order. Residuals that cancel in the logarithm do not cancel in the sum, and the weak feature, for which
    ``2 lr |u|^2`` is small, feels the sum: **log <w, u> grows by 2 lr^2 |u|^2 |v|^2 sum r^2**, whatever makes r: an oscillation, or noise in the labels. It is
    compared with what the steps on strong samples did between two steps of the run, with ``(|u|^2/|v|^2) change of log <w, v>`` added.

    *Who oscillates.* A step on sample i alone multiplies its small residual by ``1 - lr |grad f(x_i)|^2``, and ``|grad f(x_i)|^2`` is at most
    ``4 max_p |x_p|^2 f`` where one sign's units fit: 16 with |v| = 2. So strong samples are unstable from lr = 1/8 on, weak ones are not, and the sharpness of
    the whole loss, about rho / 2 times that, stays below 2/lr. As u takes its share of f, |grad f|^2 falls, and where ``lr |grad f|^2 = 2`` the oscillation
    ends. The paper assumes that it goes on, ``|y f - 1| >= delta``.

    *Instead of the oscillation: label noise* +-s, fresh in each step, at the small learning rate. "same residual": s is the oscillation's root mean square
    residual. By the formula this is slower by (lr / lr')^2; "same kick": s is larger by lr / lr', and as fast. It also does not end: label noise makes
    ``mean |grad f|^2`` small among the networks that fit (Blanc et al., COLT 2020), and that prefers u to v altogether.

    The paper's sizes are not known to us. Here features are shared by all patches, and the values were chosen on seeds 1000 and 1001: with more weak samples
    or a longer u a small learning rate learns u as well, from these; with longer noise the weak samples are unstable too, and everything diverges.
    """

    name: ClassVar[str] = "sgd-noise/benign-oscillation"
    title: ClassVar[str] = "Benign Oscillation of Stochastic Gradient Descent with Large Learning Rates"
    paper: ClassVar[str] = "Lu, Wu, Yang, Zou (ICLR 2024)"
    summary: ClassVar[str] = "a learning rate at which strong features oscillate learns the weak one; so does label noise"
    duration: ClassVar[str] = "1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.output_sqnorms", "gg.sqnorms", "gg.top_eigenvalue")
    SMALL: ClassVar[dict[str, Any]] = {"steps": 4_000}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 10, "steps": 20_000}

    num_seeds: int = 5
    """How many seeds, each with its own samples and start."""
    steps: int = 8_000
    """Steps of one sample each."""
    read_every: int = 500
    """Steps between two readings; before the first of them also at its halves, quarters, ..."""
    lr: float = 0.15
    """The large learning rate."""
    small_lr: float = 0.05
    """The small one, and that of label noise."""
    residual: float = 0.3
    """Label noise s of "same residual"; of "same kick" it is lr / small_lr times as large."""
    follow_from: int = 300
    """Step from which the growth of <w, u> and peaks are followed: v has been learnt."""
    follow_to: int = 1_000
    """Step to which it is, when the weak samples have been learnt."""
    dim: int = 200
    """Length d of a patch."""
    samples: int = 100
    """Training samples n."""
    units: int = 20
    """Units m of either sign."""
    weak: float = 0.4
    """|u|."""
    strong: float = 2.0
    """|v|."""
    share: float = 0.9
    """The share rho of the samples that have v."""
    noise: float = 0.12
    """Standard deviation of an entry of xi."""
    start_scale: float = 0.5
    """Weights start normal with this standard deviation over sqrt(d)."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "follow_from", "read_every", "units"),
            ("follow_to", self.follow_to > self.follow_from, f"above follow_from={self.follow_from}"),
            ("steps", self.steps > self.follow_to, f"above follow_to={self.follow_to}"),
            *self.positive("lr", "residual", "weak", "strong"),
            ("small_lr", 0 < self.small_lr < self.lr, f"positive and below lr={self.lr:g}"),
            *self.at_least(3, "dim"),
            *self.at_least(4, "samples"),
            ("share", 0 < self.share < 1 and 1 <= round(self.share * self.samples) < self.samples, "such that there are samples with v and without"),
            *self.positive("noise", "start_scale"),
        ]

    def arms(self) -> dict[str, tuple[float, float]]:
        """Learning rate and label noise."""
        small = self.small_lr
        return {
            "large lr": (self.lr, 0.0),
            "small lr": (small, 0.0),
            "same kick": (small, self.residual * self.lr / small),
            "same residual": (small, self.residual),
        }

    def features(self) -> tuple[Tensor, Tensor]:
        """u and v."""
        axes = torch.eye(self.dim, dtype=DTYPE)
        return self.weak * axes[0], self.strong * axes[1]

    def data(self, seed: int) -> _Data:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 0))))
        u, v = self.features()

        def draw(n: int, strong: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.from_numpy(rng.choice([-1.0, 1.0], n))
            noise = torch.from_numpy(rng.standard_normal((n, self.dim))) * self.noise
            noise[:, :2] = 0
            return torch.stack([y[:, None] * u, (y * strong)[:, None] * v, noise], dim=1), y

        strong = torch.arange(self.samples) < round(self.share * self.samples)
        return _Data(*draw(self.samples, strong), strong, *draw(1000, torch.zeros(1000, dtype=torch.bool)))

    def trainee(self, arm: str, seed: int, data: _Data) -> Trainee:
        lr, label_noise = self.arms()[arm]
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1))))
        model = PatchNet(torch.from_numpy(rng.standard_normal((2 * self.units, self.dim))) * (self.start_scale / math.sqrt(self.dim))).to(data.x.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        order = torch.from_numpy(rng.integers(self.samples, size=self.steps))  # arms share it, and the signs
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 2))))
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], self.steps))
        u, v = (feature.to(data.x.device) for feature in self.features())

        def follow(label: int, r: float, strong: bool) -> None:
            """Of the label's last step; until one turns the sign of every <w_j, v>, which has no logarithm any more."""
            model.flipped[label] |= strong and 2 * lr * self.strong**2 * r <= -1
            if not model.flipped[label]:
                model.sums[int(not strong), label] += r**2 if strong else math.log1p(2 * lr * self.weak**2 * r)
                model.ends[1, :, label] = torch.stack([model.learnt(u), model.learnt(v)])[:, label]

        def step(k: int) -> None:
            if k == self.follow_from:
                model.ends[:] = torch.stack([model.learnt(u), model.learnt(v)])
            i = int(order[k])
            x, y = data.x[i : i + 1], data.y[i]
            error = y + label_noise * signs[k] - model(x)[0]
            optimizer.zero_grad()
            (0.5 * error.square()).backward()
            optimizer.step()
            model.steps += 1
            if self.follow_from <= k < self.follow_to:
                follow(int(y < 0), float(y * error.detach()), bool(data.strong[i]))

        return Trainee(arm, seed, model, optimizer, step)

    def measure(self, trainee: Trainee, data: _Data, clock: Clock) -> dict[str, float]:
        model, lr = trainee.model, self.arms()[trainee.arm][0]
        assert isinstance(model, PatchNet)
        u, v = (feature.to(data.x.device) for feature in self.features())

        with clock:
            outputs = gg.output_sqnorms(model, data.x)
            losses = gg.sqnorms(model, half_squared, data.x, data.y)
            sharpness = float(gg.top_eigenvalue(model, half_squared, data.x, data.y, tol=1e-2))
        f_u, f_v = model.learnt(u), model.learnt(v)
        unstable = (lr * outputs > 2).to(DTYPE)
        now = torch.stack([unstable[data.strong].mean(), unstable[~data.strong].mean(), outputs.new_tensor(lr * sharpness)])
        if model.steps >= self.follow_from:
            model.peaks.copy_(torch.maximum(model.peaks, now))
        known = model.ends[0, 1] > 0  # a label may have lost v before, see ``follow``
        growth, change = 0.5 * torch.log(model.ends[1] / model.ends[0])  # of <w, u> and <w, v>, whose squares f_u and f_v are
        formula = 2 * (lr * self.weak * self.strong) ** 2 * model.sums[0] + (self.weak / self.strong) ** 2 * change
        with torch.no_grad():
            residual = model(data.x) - data.y
            right = (model(data.test_x) * data.test_y > 0).double()
        return {
            "loss": 0.5 * residual.square().mean().item(),
            "residual_strong": residual[data.strong].square().mean().sqrt().item(),
            "residual_weak": residual[~data.strong].square().mean().sqrt().item(),
            "accuracy": right.mean().item(),
            "f_u": f_u.mean().item(),
            "f_v": f_v.mean().item(),
            "step_strong": lr * outputs[data.strong].mean().item(),
            "step_weak": lr * outputs[~data.strong].mean().item(),
            "step_whole": lr * sharpness,
            "unstable_strong": now[0].item(),
            "unstable_weak": now[1].item(),
            "peak_strong": model.peaks[0].item(),
            "peak_weak": model.peaks[1].item(),
            "peak_whole": model.peaks[2].item(),
            "norms_strong": losses[data.strong].mean().item(),
            "norms_weak": losses[~data.strong].mean().item(),
            "growth": (growth - model.sums[1])[known].mean().item(),
            "growth_predicted": formula[known].mean().item(),
        }

    def start(self, device: torch.device, compiled: bool) -> TrainingRun:
        data = {}
        for seed in self.seeds:
            here = self.data(seed)
            data[seed] = _Data(*(t.to(device) for t in (here.x, here.y, here.strong, here.test_x, here.test_y)))
        trainees = [self.trainee(arm, seed, data[seed]) for arm in self.arms() for seed in self.seeds]
        steps = reading_steps(self.steps, self.read_every)
        return TrainingRun(trainees, steps, lambda trainee, clock: self.measure(trainee, data[trainee.seed], clock))

    def claims(self) -> list[Claim]:
        growth = "Δ log⟨w,u⟩ = 2η²‖u‖²‖v‖² Σr² + (‖u‖²/‖v‖²) Δ log⟨w,v⟩"
        stable = "Where it fails, the oscillation has ended itself: it moves f from v to u until η‖∇f(xᵢ)‖² ≤ 2. The paper assumes that it goes on."
        second = "The step's own algebra to second order, with the residuals of the run: what could break it is the third order."
        looked = "This bound was set after a first look at seeds 0 to 4."
        weak = f"{looked} With the default values η‖∇f‖² is near 1.7 f on a weak sample: where f overshoots, such a sample is unstable too, for a while."
        turned = "Where it fails: a residual below −1 / (2η‖v‖²) turns the sign of every ⟨w,v⟩ of a label at once, and v is lost to it."
        return [
            Claim("the large learning rate tells labels by the weak feature alone", "large lr", "accuracy", ">=", 0.95),
            Claim("the small one hardly better than by chance", "small lr", "accuracy", "<=", 0.65),
            Claim("the small one fits the training samples", "small lr", "loss", "<=", 0.001),
            Claim("the large one's training loss does not converge", "large lr", "loss", ">=", 0.001, remark=stable),
            Claim(
                "at some reading steps on 40 % of the strong samples are unstable",
                "large lr",
                "peak_strong",
                ">=",
                0.4,
                formula="η‖∇f(xᵢ)‖² > 2",
                remark=looked,
            ),
            Claim("and at each on 20 % of the weak ones at most", "large lr", "peak_weak", "<=", 0.2, formula="η‖∇f(xᵢ)‖² > 2", remark=weak),
            Claim("gradient descent on the whole loss would be stable: its sharpness is below 2/η", "large lr", "peak_whole", "<=", 2.0, formula="η λ_max ≤ 2"),
            Claim("with the small learning rate no step on a strong sample is unstable", "small lr", "peak_strong", "==", 0.0, formula="η‖∇f(xᵢ)‖² ≤ 2"),
            ClosedForm(
                "oscillation: growth of ⟨w,u⟩ on strong samples", "large lr", "growth", against="growth_predicted", slack=0.1, formula=growth, remark=second
            ),
            ClosedForm("label noise, same residual: likewise", "same residual", "growth", against="growth_predicted", slack=0.1, formula=growth, remark=second),
            ClosedForm("label noise, same kick: likewise", "same kick", "growth", against="growth_predicted", slack=0.1, formula=growth, remark=second),
            Claim("label noise of the same kick, at the small learning rate, learns the weak feature too", "same kick", "accuracy", ">=", 0.95),
            MeanClaim("label noise of the same residual learns it more slowly", "same residual", "growth", "<=", 0.0, versus="large lr"),
            MeanClaim("but learns it: more than without", "same residual", "accuracy", ">=", 0.1, versus="small lr"),
            Claim("the oscillation leaves a part of f to the strong feature", "large lr", "f_v", ">=", 0.2, remark=turned),
            Claim("label noise, which lowers mean ‖∇f‖², none", "same kick", "f_v", "<=", 0.05),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 4.6), layout="constrained")
        left, second, third, right = figure.subplots(1, 4)
        frame = outcome.metrics[outcome.metrics["step"] > 0]
        held = {v.claim.text: v.holds for v in outcome.verdicts}
        learns = held["the large learning rate tells labels by the weak feature alone"] and held["the small one hardly better than by chance"]
        self._curves(left, frame, "accuracy", "test accuracy, weak feature alone", "The weak feature is learnt by kicks" if learns else "Weak feature")
        parts = []
        for arm in ("large lr", "same kick"):
            rows = frame[frame["arm"] == arm].groupby("step")[["f_u", "f_v"]].mean()
            for column, style in (("f_v", "-"), ("f_u", "--")):
                second.plot(rows.index, rows[column], style, color=COLOURS[arm], lw=1.8)
                name = "⟨w,v⟩" if column == "f_v" else "⟨w,u⟩"
                parts.append((rows[column].iloc[-1], f"{name}, {arm}", COLOURS[arm]))
        second.set(xscale="log", xlabel="step", ylabel="part of f, sum of the squares", title="Strong feature (full), weak one (dashed)")
        name_curves(second, parts)
        third.axhline(2, color="black", lw=0.8, ls=":")
        self._curves(third, frame, "step_strong", "η‖∇f(xᵢ)‖², mean over strong samples", "Unstable above 2: steps on strong samples")
        ends = frame[frame["step"] == frame["step"].max()]
        for arm, colour in COLOURS.items():
            rows = ends[ends["arm"] == arm]
            right.plot(rows["growth_predicted"], rows["growth"], "o", color=colour, ms=6, alpha=0.8, mew=0)
            right.annotate(arm, (rows["growth_predicted"].mean(), rows["growth"].mean()), xytext=(8, -8), textcoords="offset points", color=colour, fontsize=9)
        high = 1.1 * max(ends["growth"].max(), ends["growth_predicted"].max())
        right.plot([0, high], [0, high], color="black", lw=0.8, ls=":")
        right.set(
            xlabel="2η²‖u‖²‖v‖² Σr² + (‖u‖²/‖v‖²) Δ log⟨w,v⟩", ylabel="growth of log⟨w,u⟩", title=f"Steps {self.follow_from} to {self.follow_to}: what r² does"
        )
        return figure

    def _curves(self, ax: Axes, frame: Any, column: str, label: str, title: str) -> None:
        ends = []
        for arm, colour in COLOURS.items():
            rows = frame[frame["arm"] == arm]
            for _, one in rows.groupby("seed"):
                ax.plot(one["step"], one[column], color=colour, lw=0.8, alpha=0.5)
            mean = rows.groupby("step")[column].mean()
            ax.plot(mean.index, mean, color=colour, lw=2)
            ends.append((float(mean.iloc[-1]), arm, colour))
        ax.set(xscale="log", xlabel="step", ylabel=label, title=title)
        name_curves(ax, ends)
