"""Dynamical stability: at which minima SGD can stay, and what that makes of their norms.

L. Wu, W. J. Su, "The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent", ICML 2023.

The loss is ``(1/2n) sum_i (f(x_i) - y_i)^2``. At zero error its Hessian is ``G = (1/n) sum_i g_i g_i'`` with ``g_i = grad f(x_i)``, and
``tr G = mean_i ||g_i||^2``, the mean of :func:`ghostgrad.output_sqnorms`. Close to such a minimum the deviation ``u`` moves linearly:

- *Gradient descent*, ``u <- (I - eta G) u``, stays if ``lambda_max(G) <= 2 / eta``: one number of the spectrum.
- *SGD in batches of 1*, ``u <- (I - eta g_i g_i') u``, with i drawn in every step. ``S = E u u'`` obeys
  ``S <- S - eta L(S) + eta^2 Q(S)``, with ``L(S) = G S + S G`` and ``Q(S) = (1/n) sum_i (g_i' S g_i) g_i g_i'``.

*The exact threshold in the mean square.* L is invertible on the span of the g_i, and ``L^-1(R) = int_0^inf e^{-Gt} R e^{-Gt} dt`` is positive, as Q is. So the
map has spectral radius below 1 just if ``eta L^-1 Q`` has (positive operators have a positive S with ``(r - 1) S + eta L(S) = eta^2 Q(S)``, r the radius). With
``q_i = g_i' S g_i`` this is a statement about n numbers:

    ``eta < 1 / rho(M)``,   ``M_ij = (1/n) int_0^inf (g_i' e^{-Gt} g_j)^2 dt``,   symmetric and nonnegative.

Its rows sum to ``int g_i' e^{-Gt} G e^{-Gt} g_i dt = ||g_i||^2 / 2``. Hence ``rho(M) >= 1'M1 / n = tr G / 2``: **stable in the mean square implies
tr G <= 2 / eta**, the paper's theorem, with equality just where 1 is an eigenvector, that is where all ``||g_i||`` are equal; and
``rho(M) <= max_i ||g_i||^2 / 2``. How far the threshold lies below ``2 / tr G`` is a matter of how unequal the per-sample norms are. (The exact threshold is
derived here, not the paper's.)

*Norms.* Where tr G bounds a norm of the function found, so does SGD's rate. A bound on lambda_max alone leaves tr G free up to n times that.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import normalize

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Reading, Run, Setting, check_finite, philox
from .figures import BLUE, OCHRE, RED, SKY
from .label_noise import draws
from .models import half_squared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DiagonalNet", "Threshold", "TwoLayerReLU", "mean_square_map", "mean_square_threshold"]

PAPER = "Wu, Su (ICML 2023)"
TITLE = "The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent"
DTYPE = torch.float64  # losses end at 1e-20, and whether a minimum is left again is decided by what is left of them
SGD, WARM, GD = "SGD", "SGD, warmed up", "GD"
COLOURS = {SGD: BLUE, WARM: SKY, GD: RED}


# -------------------------------------------------------------------------------------------------------------------------------------- the threshold


def mean_square_threshold(gram: Tensor) -> float:
    """The learning rate up to which batch-1 SGD is stable in the mean square: ``1 / rho(M)`` of this module's head.

    ``gram`` is ``K_ij = g_i' g_j`` (n, n). With ``K / n = V diag(l) V'`` and ``C = V diag(sqrt(n l))``, the g_i in G's eigenbasis, L divides entry (k, l) by
    ``l_k + l_l``: a product with M is ``q -> diag(C ((C' diag(q) C) / (n (l_k + l_l))) C')``.
    """
    n = len(gram)
    values, vectors = np.linalg.eigh(gram.double().cpu().numpy() / n)
    kept = values > 1e-12 * values[-1]
    values, c = values[kept], vectors[:, kept] * np.sqrt(n * values[kept])
    weights = 1 / (n * (values[:, None] + values))

    def product(q: np.ndarray) -> np.ndarray:
        middle: np.ndarray = (c.T * q.ravel()) @ c * weights
        return np.einsum("ik,ik->i", c @ middle, c)

    if n < 3:  # ARPACK wants more
        return float(1 / np.linalg.eigvalsh(np.stack([product(row) for row in np.eye(n)]))[-1])
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    return float(1 / eigsh(operator, k=1, which="LA", v0=np.ones(n), return_eigenvectors=False)[0])


def mean_square_map(g: Tensor, lr: float) -> Tensor:  # (n, d) -> (d * d, d * d)
    """The map of ``S = E u u'``, written out: ``mean_i A_i (x) A_i`` with ``A_i = I - lr g_i g_i'``. For few dimensions."""
    steps = torch.eye(g.shape[1], dtype=g.dtype) - lr * g[:, :, None] * g[:, None]
    return torch.stack([torch.kron(a, a) for a in steps]).mean(0)


@dataclass(frozen=True)
class Threshold(Setting):
    """Linear regression, where the linear dynamics is all there is: the threshold by formula, by the written-out map, and by walks of SGD.

    Per-sample gradients are the inputs: normal ones scaled to one length, normal ones, and Student's t with 3 degrees of freedom. ``eta_trace`` is the exact
    threshold times tr G, which is 2 if all lengths are equal and below otherwise. At the threshold, ``walks`` of SGD from ``u ~ N(0, I)`` take ``length``
    steps each; ``growth`` is their mean ``||u||^2`` over that of the start, ``predicted`` the same by the map. For equal lengths c the map gives
    ``tr S <- tr S - (2 eta - eta^2 c^2) tr G S``: at the threshold ||u||^2 keeps its mean, at every step and from every start.
    """

    name: ClassVar[str] = "stability/threshold"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = PAPER
    summary: ClassVar[str] = "the exact mean-square threshold of batch-1 SGD: 2/tr G for equal per-sample norms, less for unequal ones"
    duration: ClassVar[str] = "under 1 minute"
    ops: ClassVar[tuple[str, ...]] = ("gg.gram", "gg.output_sqnorms")
    SMALL: ClassVar[dict[str, Any]] = {"walks": 40_000}
    PAPER: ClassVar[dict[str, Any]] = {"walks": 1_000_000}

    ARMS: ClassVar[tuple[str, ...]] = ("equal norms", "normal", "heavy tails")

    num_seeds: int = 8
    """How many data sets of each kind."""
    num_samples: int = 8
    """Samples n."""
    dim: int = 10
    """Parameters; the map written out has dim^4 entries."""
    walks: int = 200_000
    """Walks of SGD."""
    length: int = 15
    """Steps of a walk. Longer ones have means that few of the walks carry."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(3, "num_samples"),
            ("dim", 2 <= self.dim <= 16, "between 2 and 16"),
            *self.at_least(2, "walks"),
            *self.at_least(1, "length"),
        ]

    def gradients(self, arm: str, seed: int) -> Tensor:
        g = torch.from_numpy(np.random.default_rng(seed).standard_normal((self.num_samples, self.dim)))
        if arm == "equal norms":
            return math.sqrt(self.dim) * normalize(g, dim=1)
        if arm == "heavy tails":
            return g * torch.from_numpy(np.sqrt(3 / np.random.default_rng([seed, 1]).chisquare(3, (self.num_samples, 1))))
        return g

    def walk(self, g: Tensor, lr: float, seed: int, between: Callable[[], None]) -> float:
        """The mean of ``||u||^2`` at the end over that at the start, d."""
        rng = philox(seed, 2)
        u = torch.from_numpy(rng.standard_normal((self.walks, self.dim))).to(g)
        for _ in range(self.length):
            between()
            a = g[torch.from_numpy(rng.integers(len(g), size=self.walks)).to(g.device)]
            u -= lr * (a * u).sum(1, keepdim=True) * a
        return u.square().sum(1).mean().item() / self.dim

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            g = self.gradients(arm, seed).to(device)
            model = nn.Linear(self.dim, 1, bias=False, dtype=DTYPE, device=device)
            with clock:
                kernel, norms = gg.gram(model, g), gg.output_sqnorms(model, g)
            lr, trace = mean_square_threshold(kernel), norms.mean().item()
            by_map = mean_square_map(g.cpu(), lr)
            moved = torch.eye(self.dim, dtype=DTYPE).flatten()
            for _ in range(self.length):
                moved = by_map @ moved
            # Off the span of the g_i nothing moves, which has the eigenvalue 1 as well; so the map is that of the span.
            basis = torch.linalg.svd(g.cpu(), full_matrices=False).Vh
            radius = torch.linalg.eigvalsh(mean_square_map(g.cpu() @ basis.T, lr)).abs().max().item()
            return [
                {
                    "threshold": lr,
                    "eta_trace": lr * trace,
                    "eta_largest": lr * norms.max().item(),
                    "off_two": abs(lr * trace - 2),
                    "spread": (norms.std(correction=0) / norms.mean()).item(),
                    "off_one": abs(radius - 1),
                    "predicted": moved.view(self.dim, self.dim).trace().item() / self.dim,
                    "growth": self.walk(g, lr, seed, between),
                }
            ]

        return GridRun([(arm, seed) for arm in self.ARMS for seed in self.seeds], work)

    def claims(self) -> list[Claim]:
        law, exact = "η tr G ≤ 2", "η = 1/ρ(M), M_ij = (1/n) ∫ (gᵢ′e^{−Gt}gⱼ)² dt"
        theorem = "A theorem about the formula (see the docstring): it checks the computation, no walk of SGD enters."
        twice = "One number computed in two ways: no walk of SGD enters."
        return [
            Claim("equal norms: the threshold is 2 / tr G", "equal norms", "off_two", "<=", 1e-9, formula="η tr G = 2", remark=theorem),
            *(Claim(f"{arm}: it is 2 / tr G at most", arm, "eta_trace", "<=", 2.0, formula=law, remark=theorem) for arm in self.ARMS[1:]),
            *(Claim(f"{arm}: and 2 / max ‖gᵢ‖² at least", arm, "eta_largest", ">=", 2.0, formula="η max ‖gᵢ‖² ≥ 2", remark=theorem) for arm in self.ARMS[1:]),
            MeanClaim("heavy tails take it further below than normal inputs do", "heavy tails", "eta_trace", "<=", 0.0, versus="normal"),
            *(Claim(f"{arm}: at it the written-out map has spectral radius 1", arm, "off_one", "<=", 1e-8, formula=exact, remark=twice) for arm in self.ARMS),
            *(
                ClosedForm(f"{arm}: walks of SGD grow as the map says", arm, "growth", precision=0.05, formula="E‖u_K‖²/E‖u₀‖² = tr T^K(I)/d")
                for arm in self.ARMS
            ),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for arm, colour in zip(self.ARMS, (BLUE, OCHRE, RED), strict=True):
            rows = outcome.metrics[outcome.metrics["arm"] == arm]
            left.plot(rows["spread"], rows["eta_trace"], "o", color=colour, label=arm)
            right.plot(rows["predicted"], rows["growth"], "o", color=colour)
        left.axhline(2, color="black", lw=1, ls=":")
        left.text(0.99, 2, "2 ", transform=left.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
        title = "Only equal norms let SGD have all of 2 / tr G" if outcome.holds else "The exact threshold"
        left.set(xlabel="standard deviation of ‖gᵢ‖² over its mean", ylabel="η tr G at the threshold", title=title, ylim=(0, 2.2))
        left.legend(frameon=False)
        ends = [outcome.metrics[["predicted", "growth"]].min().min(), outcome.metrics[["predicted", "growth"]].max().max()]
        right.plot(ends, ends, color="black", lw=0.8, ls=":")
        right.set(xlabel=f"by the map, after {self.length} steps at the threshold", ylabel=f"mean of {self.walks:,} walks", title="E‖u‖² over its start")
        return figure


# -------------------------------------------------------------------------------------------------------------------------------------------- ladders


@dataclass(frozen=True)
class Task:
    """What a seed's networks have in common."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    start: dict[str, Tensor]
    truth: Tensor  # the target's parameters
    test: Tensor = field(default_factory=lambda: torch.empty(0))  # fresh inputs, where the test error is a mean over such


@dataclass(frozen=True)
class Ladder(Setting):
    """SGD in batches of 1 and gradient descent, up a ladder of learning rates, from one start.

    At large rates the start is far from stable, and the network goes through a long phase of clipped, erratic steps before it fits; it may come out far below
    the bound. A third arm therefore raises the rate slowly, so that SGD stands at a minimum when its rate reaches what that minimum can bear.

    All rates and seeds of both kinds of SGD are trained as one batched network, those of gradient descent as another. Gradients longer than ``clip`` are
    scaled to that length.
    """

    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = PAPER
    ops: ClassVar[tuple[str, ...]] = ("gg.output_sqnorms", "gg.top_eigenvalue", "gg.gram")

    steps: int = 60_000
    """Steps of SGD, one sample each."""
    gd_steps: int = 3_000
    """Steps of gradient descent."""
    warmup: float = 0.7
    """Share of the steps in which the warmed-up arm raises its rate linearly."""
    clip: float = 50.0
    """Length to which longer gradients are scaled."""
    num_rates: int = 6
    """How many learning rates, evenly spaced in the logarithm."""
    log_lr_min: float = -2.4
    """Decimal logarithm of the smallest learning rate."""
    log_lr_max: float = -0.9
    """Decimal logarithm of the largest."""
    dim: int = 400
    """Dimension d of the inputs."""
    num_samples: int = 120
    """Training samples n."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(16, "steps"),
            *self.at_least(1, "gd_steps"),
            ("warmup", 0 < self.warmup <= 1, "positive and at most 1"),
            ("clip", self.clip > 0, "positive"),
            *self.at_least(2, "num_rates", "dim"),
            ("log_lr_min", -100 <= self.log_lr_min <= 100, "between -100 and 100"),
            ("log_lr_max", self.log_lr_min < self.log_lr_max <= 100, f"above log_lr_min={self.log_lr_min} and at most 100"),
            *self.at_least(3, "num_samples"),
        ]

    def rates(self, arm: str) -> Tensor:  # (L,)
        return torch.logspace(self.log_lr_min, self.log_lr_max, self.num_rates, dtype=DTYPE)

    @abstractmethod
    def task(self, seed: int) -> Task:
        """A function of its argument and the setting's fields alone."""

    @abstractmethod
    def gradients(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Of ``(1/2B) sum (f - y)^2``, batched by hand: parameters (K, S, L, ...), x (S, B, d), y (S, B)."""

    @abstractmethod
    def model(self, params: dict[str, Tensor]) -> nn.Module:
        """One network: (n, d) -> (n,)."""

    @abstractmethod
    def measure(self, params: dict[str, Tensor], task: Task, lr: float) -> dict[str, float]:
        """``norm``, ``norm_over_bound``, ``balance`` and ``test_error`` of a network."""

    def step_(self, params: dict[str, Tensor], x: Tensor, y: Tensor, lr: Tensor) -> None:
        """In place; ``lr`` is (K, S, L) or broadcasts to it."""
        gradients = self.gradients(params, x, y)
        squares = [g.square().flatten(3).sum(-1) for g in gradients.values()]
        factor = -lr * (self.clip / torch.stack(squares).sum(0).sqrt()).clamp(max=1.0)
        for name, g in gradients.items():
            params[name].addcmul_(factor.view(*factor.shape, *[1] * (g.dim() - 3)), g)

    def start(self, device: torch.device, compiled: bool) -> LadderRun:
        return LadderRun(self, device)

    def norm_claims(self) -> list[Claim]:
        """What the setting's own norm must show."""
        return []

    def claims(self) -> list[Claim]:
        law, exact = "η tr G ≤ 2", "η ρ(M) ≤ 1"
        slow = "The bound is 5 % above 2: just above the threshold a minimum is left so slowly that no run of this length shows it."
        weak = "The bound is 10 % above 1: for the same reason, and because single walks may stay where their mean square does not."
        late = "A network that passes the threshold late, or only just, may still be leaving its minimum when the run ends."
        erratic = "At large rates the erratic phase at the start can take tr G far below the bound before the network fits."
        unequal = "For unequal per-sample norms the exact threshold, which the next claim is about, lies below 2/tr G."
        untested = "Where η λ_max stays well below 2 at the largest rate, the bound is not put to the test."
        return [
            *(Claim(f"{arm} ends at minima: the training loss at every rate", arm, "worst_loss", "<=", 1e-3, remark=late) for arm in (SGD, WARM, GD)),
            *(Claim(f"{arm}: tr G is 2/η at most, at every rate", arm, "worst_trace", "<=", 2.1, formula=law, remark=slow) for arm in (SGD, WARM)),
            *(Claim(f"{arm}: the exact condition, at every rate", arm, "worst_exact", "<=", 1.1, formula=exact, remark=weak) for arm in (SGD, WARM)),
            Claim("SGD: tr G is 0.8 of 2/η at least, where the start's is above 2.2/η", SGD, "least_trace", ">=", 1.6, formula="η tr G ≈ 2", remark=erratic),
            Claim("SGD, warmed up: tr G is 0.8 of 2/η at least there", WARM, "least_trace", ">=", 1.6, formula="η tr G ≈ 2", remark=unequal),
            Claim("SGD, warmed up: there η is 0.9 of the exact threshold at least", WARM, "least_exact", ">=", 0.9, formula="η ρ(M) ≈ 1"),
            Claim("GD breaks 2/η for tr G, by a factor of 2 at least", GD, "worst_trace", ">=", 4.0, formula="η tr G ≥ 4"),
            Claim("GD keeps its own bound, λ_max ≤ 2/η, to 1 %", GD, "worst_sharpness", "<=", 2.02, formula="η λ_max ≤ 2", remark=untested),
            *self.norm_claims(),
            Claim("SGD: from the smallest rate to the largest, the test error is halved at least", SGD, "error_ratio", "<=", 0.5),
            Claim("SGD, warmed up: the test error is halved likewise", WARM, "error_ratio", "<=", 0.5),
            Claim(
                "GD: it is not halved",
                GD,
                "error_ratio",
                ">=",
                0.5,
                remark="Where gradient descent's rate is so large that 2/η binds its λ_max, its error can fall as well.",
            ),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(17, 4.2), layout="constrained")
        panels = figure.subplots(1, 4)
        frame = outcome.metrics[outcome.metrics["step"] == self.steps]
        ok = {v.claim.column: v.holds for v in outcome.verdicts if v.claim.arm == SGD}
        self._panel(panels[0], frame, "trace", "tr G", "SGD's trace keeps below 2/η" if ok["worst_trace"] else "Trace at the end", legend=True)
        self._panel(panels[1], frame, "lambda_max", "λ_max", "Largest eigenvalue")
        self._panel(panels[2], frame, "norm", self.NORM, "Norm of what is found")
        self._panel(panels[3], frame, "test_error", "test error", "and its test error falls" if ok["error_ratio"] else "Test error")
        for panel, column, name in ((panels[0], "trace", "2/η"), (panels[1], "lambda_max", "2/η"), (panels[2], "norm", self.BOUND)):
            product = frame["norm"] / frame["norm_over_bound"] * frame["lr"] if column == "norm" else 2.0 + 0.0 * frame["lr"]
            lr, top = np.unique(frame["lr"]), 3 * frame[column].max()
            panel.plot(lr, product.iloc[0] / lr, color="black", lw=1, ls=":")
            panel.set_ylim(frame[column].min() / 2, top)
            panel.annotate(f" {name}", (product.iloc[0] / top * 1.1, top / 1.1), fontsize=9, va="top", annotation_clip=True)
        return figure

    NORM: ClassVar[str]  # the axis' words
    BOUND: ClassVar[str]

    def _panel(self, ax: Axes, frame: Any, column: str, label: str, title: str, legend: bool = False) -> None:
        for arm, colour in COLOURS.items():
            for number, (_, rows) in enumerate(frame[frame["arm"] == arm].groupby("seed")):
                ax.plot(rows["lr"], rows[column], "o-", color=colour, ms=4, lw=1.2, alpha=0.85, label="_" * number + arm)
        if legend:
            ax.legend(frameon=False, fontsize=9)
        ax.set(xscale="log", yscale="log", xlabel="learning rate η", ylabel=label, title=title)


class LadderRun(Run):
    """All rates and seeds: parameters (kinds, seeds, rates, ...), of SGD's two kinds and of gradient descent."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {"sgd": (SGD, WARM), "gd": (GD,)}

    def __init__(self, setting: Ladder, device: torch.device) -> None:
        self.setting = setting
        self.reading_steps = [0, setting.steps // 16, setting.steps // 4, setting.steps]
        self.tasks = [setting.task(seed) for seed in setting.seeds]
        self.x, self.y = (torch.stack(list(t)).to(device) for t in zip(*[(t.x, t.y) for t in self.tasks], strict=True))  # (S, n, d), (S, n)
        self.params: dict[str, dict[str, Tensor]] = {}
        for group, arms in self.GROUPS.items():
            stacked = {k: torch.stack([t.start[k] for t in self.tasks])[None, :, None].to(device) for k in self.tasks[0].start}  # (1, S, 1, ...)
            self.params[group] = {k: v.expand(len(arms), -1, setting.num_rates, *v.shape[3:]).clone() for k, v in stacked.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no fused rule")
            starts = [setting.model(self.network(GD, s, 0)) for s in range(len(self.tasks))]
            self.start_trace = [gg.output_sqnorms(model, x).mean().item() for model, x in zip(starts, self.x, strict=True)]

    def advance(self, start: int, stop: int, between: Callable[[], None]) -> None:
        setting, row = self.setting, torch.arange(len(self.tasks))
        index = torch.from_numpy(np.stack([draws(seed, start, stop, setting.num_samples)[0] for seed in setting.seeds], axis=1))  # (steps, S)
        rates = setting.rates(SGD).to(self.x).expand(2, 1, -1).clone()
        for k, i in zip(range(start, stop), index, strict=True):
            between()
            rates[1] = min(1.0, (k + 1) / (setting.warmup * setting.steps)) * rates[0]
            setting.step_(self.params["sgd"], self.x[row, i][:, None], self.y[row, i][:, None], rates)
        rates = setting.rates(GD).to(self.x)
        for _ in range(start * setting.gd_steps // setting.steps, stop * setting.gd_steps // setting.steps):
            between()
            setting.step_(self.params["gd"], self.x, self.y, rates)
        networks = [(arm, s, r) for arms in self.GROUPS.values() for arm in arms for s in range(len(self.tasks)) for r in range(setting.num_rates)]
        names = [(f"{arm} at {setting.rates(arm)[r]:g}", setting.seeds[s]) for arm, s, r in networks]
        finite = [all(bool(p.isfinite().all()) for p in self.network(*network).values()) for network in networks]
        check_finite(names, finite, start, stop, "Try a smaller --log-lr-max or --clip.")

    def network(self, arm: str, s: int, r: int) -> dict[str, Tensor]:
        group = "gd" if arm == GD else "sgd"
        return {k: v[self.GROUPS[group].index(arm), s, r] for k, v in self.params[group].items()}

    def read(self, step: int) -> Reading:
        clock, rows = Clock(), []
        for arm in COLOURS:
            for s, seed in enumerate(self.setting.seeds):
                ladder = [self.row(arm, s, r, clock) for r in range(self.setting.num_rates)]
                rows += [{"step": step, "arm": arm, "seed": seed, **row, **self.over_ladder(ladder, self.start_trace[s])} for row in ladder]
        return Reading(rows, clock.seconds, f"loss {np.mean([row['loss'] for row in rows]):.1e}")

    def row(self, arm: str, s: int, r: int, clock: Clock) -> dict[str, float]:
        """One network. ``lr_over_threshold`` is eta rho(M), which is about stability where the loss is zero."""
        params, lr, x, y = self.network(arm, s, r), self.setting.rates(arm)[r].item(), self.x[s], self.y[s]
        model = self.setting.model(params)
        with clock, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no fused rule")  # one copy of a gradient of 2 d entries per sample is cheap
            norms, kernel = gg.output_sqnorms(model, x), gg.gram(model, x)
            top = float(gg.top_eigenvalue(model, half_squared, x, y, tol=1e-3))
        trace = norms.mean().item()
        with torch.no_grad():
            loss = half_squared(model(x), y).item()
        return {
            "lr": lr,
            "loss": loss,
            "trace": trace,
            "lr_trace": lr * trace,
            "lr_largest": lr * norms.max().item(),
            "lambda_max": top,
            "lr_lambda": lr * top,
            "lr_over_threshold": lr / mean_square_threshold(kernel),
            **self.setting.measure(params, self.tasks[s], lr),
        }

    @staticmethod
    def over_ladder(ladder: list[dict[str, float]], start_trace: float) -> dict[str, float]:
        """What holds for all rates of an arm and seed: the worst of each quantity, and the ends of the ladder against each other."""
        bound = [row for row in ladder if row["lr"] * start_trace > 2.2]
        return {
            "worst_loss": max(row["loss"] for row in ladder),
            "worst_trace": max(row["lr_trace"] for row in ladder),
            "least_trace": min((row["lr_trace"] for row in bound), default=math.nan),
            "least_exact": min((row["lr_over_threshold"] for row in bound), default=math.nan),
            "worst_exact": max(row["lr_over_threshold"] for row in ladder),
            "worst_sharpness": max(row["lr_lambda"] for row in ladder),
            "worst_norm": max(row["norm_over_bound"] for row in ladder),
            "error_ratio": ladder[-1]["test_error"] / ladder[0]["test_error"],
        }

    def state_dict(self) -> dict[str, Any]:
        return self.params

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.params = {group: {k: v.to(self.x) for k, v in held.items()} for group, held in state.items()}


# -------------------------------------------------------------------------------------------------------------------------------------- diagonal net


class _Diagonal(nn.Module):
    """``f(x) = <a o b, x>``."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())  # (d,)

    def forward(self, x: Tensor) -> Tensor:  # (n, d) -> (n,)
        return x @ (self.a * self.b)


@dataclass(frozen=True)
class DiagonalNet(Ladder):
    """Sparse regression by a diagonal network: ``f(x) = <a o b, x>``, x uniform in [-1, 1]^d, truth (1, 1, 1, 0, ...), fewer samples than dimensions.

    *Norm.* ``||grad f||^2 = sum_j x_j^2 (a_j^2 + b_j^2)`` and ``E x_j^2 = 1/3``, so over the inputs' distribution ``tr G = (||a||^2 + ||b||^2) / 3``, which is
    at least ``(2/3) ||a o b||_1``. With tr G <= 2 / eta: ``||beta||_1 <= 3 / eta``.

    *Balance.* A step with error e and clipping factor c multiplies ``a_j^2 - b_j^2`` by ``1 - (eta c e x_j)^2``, exactly: from ``a' = a - h b, b' = b - h a``,
    ``a'^2 - b'^2 = (a^2 - b^2)(1 - h^2)``. SGD's errors are of single samples and large as long as it cannot settle, so ``balance``,
    ``(||a||^2 + ||b||^2) / (2 ||a o b||_1)``, goes to 1; gradient descent's mean errors soon vanish, and leave it. In balance tr G is ``(2/3) ||beta||_1``.

    Sizes and rates at ``--size paper`` (d = 1000, n = 300) are the experiment's as a public reproduction has them; the warmed-up arm is not in the paper. The
    test error, ``E (f - y)^2 / 2 = ||a o b - truth||^2 / 6``, needs no test set.
    """

    name: ClassVar[str] = "stability/diagonal-net"
    summary: ClassVar[str] = "a diagonal network: SGD's rate bounds tr G and the l1 norm, and finds sparse truths that gradient descent misses"
    duration: ClassVar[str] = "about 1 minute"
    SMALL: ClassVar[dict[str, Any]] = {"dim": 200, "num_samples": 60, "steps": 50_000}
    PAPER: ClassVar[dict[str, Any]] = {"dim": 1000, "num_samples": 300, "steps": 80_000, "gd_steps": 4_000}

    NORM: ClassVar[str] = "‖a∘b‖₁"
    BOUND: ClassVar[str] = "3/η"

    def task(self, seed: int) -> Task:
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.uniform(-1, 1, (self.num_samples, self.dim)))
        a, b = torch.from_numpy(rng.standard_normal((2, self.dim))).unbind()
        truth = torch.zeros(self.dim, dtype=DTYPE)
        truth[:3] = 1
        return Task(x, x @ truth, {"a": a, "b": b}, truth)

    def gradients(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = params["a"], params["b"]
        back = ((a * b) @ x.mT - y[:, None]) @ x / x.shape[1]  # (K, S, L, d)
        return {"a": back * b, "b": back * a}

    def model(self, params: dict[str, Tensor]) -> nn.Module:
        return _Diagonal(params["a"], params["b"])

    def measure(self, params: dict[str, Tensor], task: Task, lr: float) -> dict[str, float]:
        a, b = params["a"], params["b"]
        norm = (a * b).abs().sum().item()
        return {
            "norm": norm,
            "norm_over_bound": norm * lr / 3,
            "balance": (a.square().sum() + b.square().sum()).item() / (2 * norm),
            "test_error": (a * b - task.truth.to(a)).square().sum().item() / 6,
        }

    def norm_claims(self) -> list[Claim]:
        norm, balance = "‖a∘b‖₁ ≤ 3/η", "(‖a‖² + ‖b‖²) / (2‖a∘b‖₁) → 1"
        return [
            *(Claim(f"{arm}: the l1 norm is 3/η at most, at every rate", arm, "worst_norm", "<=", 1.0, formula=norm) for arm in (SGD, WARM)),
            Claim("GD breaks SGD's bound on the norm by a factor of 2 at least", GD, "worst_norm", ">=", 2.0, formula=norm),
            Claim("SGD at the largest rate balances a and b", SGD, "balance", "<=", 1.05, formula=balance),
            Claim("GD at the largest rate does not", GD, "balance", ">=", 1.5, formula=balance),
        ]


# -------------------------------------------------------------------------------------------------------------------------------------- two-layer ReLU


@dataclass(frozen=True)
class TwoLayerReLU(Ladder):
    """A two-layer ReLU network, ``f(x) = sum_j a_j relu(w_j' x)``, x on the sphere of radius sqrt(d), learns a sum of 10 units with unit weights.

    ``||grad f||^2 = sum_j relu(w_j' x)^2 + a_j^2 1{w_j' x > 0} ||x||^2``. On the sphere ``E relu(w' x)^2 = ||w||^2 / 2`` and half of all inputs are active, so
    over the inputs' distribution ``tr G = sum_j (||w_j||^2 + d a_j^2) / 2 >= sqrt(d) ||theta||_P`` with the path norm ``sum_j |a_j| ||w_j||``. With
    tr G <= 2 / eta: ``||theta||_P <= 2 / (eta sqrt d)``.

    Start: a ~ N(0, 1), w ~ N(0, I / d). The ladder is gradient descent's; SGD's rates are those over sqrt(d). d = m = 100, n = 300 at ``--size paper``,
    again as a public reproduction has it; the warmed-up arm is not in the paper. Test errors are means over 2000 fresh inputs.
    """

    name: ClassVar[str] = "stability/two-layer-relu"
    summary: ClassVar[str] = "a two-layer ReLU network: SGD's rate bounds tr G and the path norm, gradient descent's only the largest eigenvalue"
    duration: ClassVar[str] = "2 to 3 minutes"
    SMALL: ClassVar[dict[str, Any]] = {"dim": 30, "width": 40, "num_samples": 60, "units": 3, "steps": 50_000, "gd_steps": 4_000}
    PAPER: ClassVar[dict[str, Any]] = {"dim": 100, "width": 100, "num_samples": 300, "units": 10, "steps": 200_000, "gd_steps": 2_000}

    NORM: ClassVar[str] = "path norm Σ|aⱼ|‖wⱼ‖"
    BOUND: ClassVar[str] = "2/(η√d)"

    num_rates: int = 5
    log_lr_min: float = -3.0
    log_lr_max: float = -1.0
    dim: int = 50
    num_samples: int = 150
    steps: int = 100_000
    gd_steps: int = 4_000
    warmup: float = 0.5
    width: int = 50
    """Hidden units m."""
    units: int = 5
    """Units of the target."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [*super().rules(), *self.at_least(1, "width", "units")]

    def rates(self, arm: str) -> Tensor:
        return super().rates(arm) / (1.0 if arm == GD else math.sqrt(self.dim))

    def inputs(self, rng: np.random.Generator, n: int) -> Tensor:
        return math.sqrt(self.dim) * normalize(torch.from_numpy(rng.standard_normal((n, self.dim))), dim=1)

    def task(self, seed: int) -> Task:
        rng = np.random.default_rng(seed)
        truth, x = normalize(torch.from_numpy(rng.standard_normal((self.units, self.dim))), dim=1), self.inputs(rng, self.num_samples)
        a, w = rng.standard_normal(self.width), rng.standard_normal((self.width, self.dim)) / math.sqrt(self.dim)
        start = {"a": torch.from_numpy(a), "w": torch.from_numpy(w)}
        return Task(x, torch.relu(x @ truth.T).sum(1), start, truth, self.inputs(rng, 2000))

    def gradients(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, w = params["a"], params["w"]
        lead = w.shape[:2]
        h = (w.reshape(*lead, -1, self.dim) @ x.mT).view(*w.shape[:4], -1).relu_()  # (K, S, L, m, B)
        e = ((a[..., None, :] @ h)[..., 0, :] - y[:, None]) / x.shape[1]  # (K, S, L, B)
        back = (a[..., None] * (h > 0) * e[..., None, :]).view(*lead, -1, x.shape[1]) @ x
        return {"a": (h @ e[..., None])[..., 0], "w": back.view_as(w)}

    def model(self, params: dict[str, Tensor]) -> nn.Module:
        weights = params["w"], params["a"][None]
        layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
        for layer, w in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(w.clone())
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Flatten(0))

    def measure(self, params: dict[str, Tensor], task: Task, lr: float) -> dict[str, float]:
        a, w, test = params["a"], params["w"], task.test.to(params["a"])
        norm = (a.abs() * w.norm(dim=1)).sum().item()
        e = torch.relu(test @ w.T) @ a - torch.relu(test @ task.truth.to(a).T).sum(1)
        return {
            "norm": norm,
            "norm_over_bound": norm * lr * math.sqrt(self.dim) / 2,
            "balance": (w.square().sum() + self.dim * a.square().sum()).item() / (2 * math.sqrt(self.dim) * norm),
            "test_error": 0.5 * e.square().mean().item(),
        }

    def norm_claims(self) -> list[Claim]:
        norm = "Σ|aⱼ|‖wⱼ‖ ≤ 2/(η√d)"
        return [
            *(Claim(f"{arm}: the path norm is 2/(η√d) at most, at every rate", arm, "worst_norm", "<=", 1.0, formula=norm) for arm in (SGD, WARM)),
            Claim("GD breaks SGD's bound on the norm by a factor of 2 at least", GD, "worst_norm", ">=", 2.0, formula=norm),
        ]


SETTINGS = (Threshold, DiagonalNet, TwoLayerReLU)
