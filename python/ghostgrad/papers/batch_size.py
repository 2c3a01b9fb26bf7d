"""Batch size: what large batches lose, and what gets it back; how much sharper a batch's Hessian is, and which learning rate that allows.

E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better: closing the generalization gap in large batch training of neural networks", NeurIPS 2017;
D. Granziol, S. Zohren, S. Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training", JMLR 2022.

Both rest on one fact about sampling. Of N numbers (or vectors, or matrices) with mean m and mean squared deviation S^2, the mean of B drawn with replacement
has variance ``S^2 / B``, and of B different ones ``(S^2 / B) (N - B) / (N - 1)``: it is ``S^2 / b`` with ``b = B (N - 1) / (N - B)``, about
``B / (1 - B / N)``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ghostgrad as gg

from ..training import Claim, Clock, ClosedForm, GridRun, MeanClaim, Outcome, Setting, philox
from .figures import BLUE, GREEN, OCHRE, RED, name_curves
from .image_setting import DTYPE, accuracy, built, fit, perceptron
from .images import ImageDataError, data_used, load_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["BatchHessian", "GhostBatchNorm", "TrainLonger", "deviation", "growth", "spiked_wigner"]

CHUNK = 256  # samples whose Hessian-vector products are held at once
ALONE = (
    "The learning rate is that of the small batch, and so a step of the large one has less noise. "
    "Where this fails, the claim before says what √B and ghost pieces add."
)
DRIFT = (
    "Where it fails: most of the way is gone in the first 30 updates, where the loss falls and the mean gradient, more than its noise, moves the weights: "
    "a higher learning rate goes farther."
)
SATURATES = (
    "Where it fails: these digits are fitted after some 30 updates of a large batch, and the weights then hardly move: the curve bends to a plateau. "
    "The paper's walk needs gradients that go on."
)
NOT_WIGNER = (
    "Where it fails, the noise is no random matrix with independent elements: a sample's Gauss-Newton matrix has a rank below the number of classes, and "
    "scatters in the directions of the large eigenvalues, v₁ among them; the mean over all P² elements misses that."
)
FLATTER = (
    "Where it fails, large batches above 2/λ₁ do not diverge: they move to where the largest eigenvalue is below 2/η, and the loss falls there. "
    "2/λ₁(B) is the limit of a quadratic."
)
TEST_SHARE = 0.4  # of digits: 1078 to train on
NO_EPOCH = 1 << 40  # random numbers beside the epochs' orders have addresses from here on


@dataclass(frozen=True)
class _Data:
    x: Tensor  # (N, inputs)
    y: Tensor  # (N,)
    test_x: Tensor  # (M, inputs)
    test_y: Tensor  # (M,)
    classes: int


@dataclass(frozen=True)
class _OnImages(Setting):
    """What both settings have: images, flattened, and a small network."""

    data: str = "digits"
    """Either digits, scikit-learn's, or a folder that holds a folder of images for each class, CIFAR's binary version, or IDX files."""
    image_size: int | None = None
    """Bring the images of class folders to this size."""
    lr: float = 0.05
    """Learning rate."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [("image_size", self.image_size is None or self.image_size >= 1, "at least 1"), *self.positive("lr")]

    def data_used(self) -> str:
        return data_used(self.data)

    def load(self, seed: int, device: torch.device) -> _Data:
        images = load_images(self.data, seed=seed, test_share=TEST_SHARE, size=self.image_size)
        x, test_x = (t.flatten(1).to(device, DTYPE) for t in (images.train_x, images.test_x))
        return _Data(x, images.train_y.to(device), test_x, images.test_y.to(device), len(images.classes))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _label_log(axis: Axis, style: str) -> None:
    """Numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter(style))


# -------------------------------------------------------------------------------------------------------------------------------------- train longer


class GhostBatchNorm(nn.Module):
    """Batch normalisation that takes a batch's statistics over pieces of ``size`` samples, each normalised by its own."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.norm, self.size = nn.BatchNorm1d(features), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(piece) for piece in x.split(self.size)]) if self.training else self.norm(x)


def growth(
    t: np.ndarray,  # (n,) from 1
    distance: np.ndarray,  # (n,)
) -> tuple[float, float, float]:
    """R^2 of the least-squares fits ``a + b log t`` and ``c t^d``, two parameters each, and d."""
    from scipy.optimize import curve_fit

    def power(t: np.ndarray, c: float, d: float) -> np.ndarray:
        return c * t**d

    total = ((distance - distance.mean()) ** 2).sum()
    line = np.polyval(np.polyfit(np.log(t), distance, 1), np.log(t))
    found, _ = curve_fit(power, t, distance, p0=(distance[0], 0.3), maxfev=10_000)
    return tuple(float(v) for v in (*(1 - ((distance - fit) ** 2).sum() / total for fit in (line, power(t, *found))), found[1]))  # type: ignore[return-value]


@dataclass(frozen=True)
class TrainLonger(_OnImages):
    """A network with batch normalisation, SGD with momentum: half of the updates at the learning rate, a quarter at a tenth, a quarter at a hundredth.

    *Regimes.* ``small`` trains for ``epochs``. Large batches do so for as many epochs, hence with fewer updates; with the learning rate times
    ``sqrt(B / small)``; also with batch statistics over pieces as large as a small batch (ghost batch normalisation); also for as many updates. The
    paper adds them in this order. A last regime has as many updates and nothing else.

    *Why the square root.* Samples drawn with replacement have independent gradients ``g_i`` with mean ``gbar``. A step ``dw = -(lr/B) sum_i g_i`` then has
    ``E |dw - E dw|^2 = (lr^2 / B) (mean_i s_i - |gbar|^2)`` with the per-sample norms ``s_i = |g_i|^2``; B different samples give ``(N - B) / (N - 1)`` times
    that (top of the module). The paper drops ``|gbar|^2`` and that factor. ``lr ~ sqrt(B)`` keeps the first constant. Within batch normalisation a sample has
    no gradient of its own, so the arm "steps" is a network without it, after ``warm_up`` epochs: steps are drawn and compared with the norms.

    *How far.* The paper models SGD as a random walk on a random landscape, with ``|w_t - w_0| ~ log t`` while the learning rate is high. ``growth`` fits that
    and a power of t to the first half of the updates, at times that are evenly spread in log t. The walk's speed is set by the step's covariance: with
    sqrt(B), ghost pieces and as many updates, large batches should go as far as small ones.

    The paper trains ResNets, VGG and others on MNIST, CIFAR-10, CIFAR-100 and ImageNet, with pieces of 128 images.
    """

    name: ClassVar[str] = "batch-size/train-longer"
    title: ClassVar[str] = "Train longer, generalize better: closing the generalization gap in large batch training of neural networks"
    paper: ClassVar[str] = "Hoffer, Hubara, Soudry (NeurIPS 2017)"
    summary: ClassVar[str] = "large batches lose accuracy because they take fewer updates; sqrt(B) keeps the noise of a step"
    duration: ClassVar[str] = "4 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms", "gg.NoiseScale")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 6, "ratio": 16}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 20, "epochs": 100}
    needs: ClassVar[str] = "ResNet-44, VGG and AlexNet on CIFAR and ImageNet: days of a GPU"

    REGIMES: ClassVar[dict[str, tuple[bool, bool, bool]]] = {  # lr times sqrt(B / small), ghost pieces, as many updates
        "equal epochs": (False, False, False),
        "√B lr": (True, False, False),
        "√B lr, ghost": (True, True, False),
        "√B lr, ghost, equal updates": (True, True, True),
        "equal updates": (False, False, True),
    }

    num_seeds: int = 10
    """How many seeds; each is another split of the images, start and order of batches."""
    small: int = 32
    """The small batch."""
    large: int = 512
    """The largest batch."""
    ratio: int = 2
    """Factor between a batch size and the next."""
    epochs: int = 30
    """Epochs of the small batch."""
    momentum: float = 0.9
    """Momentum."""
    width: int = 64
    """Hidden units in each of two layers."""
    warm_up: int = 2
    """Epochs, of small batches, before steps are drawn."""
    draws: int = 400
    """Steps drawn for each batch size."""

    def rules(self) -> list[tuple[str, bool, str]]:
        powers = {self.small * self.ratio**k for k in range(64)} if self.ratio >= 2 else set()
        return [
            *super().rules(),
            *self.at_least(2, "small", "ratio", "draws"),  # of one sample there is no batch normalisation
            *self.at_least(4, "epochs"),
            ("large", self.large in powers and self.large > self.small, f"small={self.small} times a power of ratio={self.ratio}"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            *self.at_least(1, "width"),
            *self.at_least(0, "warm_up"),
        ]

    @property
    def sizes(self) -> list[int]:
        return [self.small * self.ratio**k for k in range(64) if self.small * self.ratio**k <= self.large]

    def arm(self, size: int, regime: str) -> str:
        return f"B = {size}, {regime}" if size > self.small else f"B = {size}"

    def network(self, seed: int, data: _Data, ghost: int | None) -> nn.Module:
        """Two hidden layers, with batch normalisation over pieces of ``ghost`` unless that is None."""

        def layer(inputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, self.width), *([] if ghost is None else [GhostBatchNorm(self.width, ghost)]), nn.ReLU()]

        return built(seed, lambda: nn.Sequential(*layer(data.x.shape[1]), *layer(self.width), nn.Linear(self.width, data.classes)), data.x.device)

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        load = functools.lru_cache(maxsize=1)(lambda seed: self.load(seed, device))
        found = len(load(self.seed).y)
        if found < self.large:
            rule = f"the large batch is to have {self.large} images"
            raise ImageDataError(Path(self.data), rule, f"there are {found} to train on", "Give a smaller --large.")
        regimes = {self.arm(size, regime): (size, regime) for size in self.sizes for regime in self.REGIMES}

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            if arm == "steps":
                return self.steps(seed, load(seed), clock, between)
            size, regime = regimes[arm]
            scaled, ghost, updates = self.REGIMES[regime] if size > self.small else (False, False, False)
            return self.train(seed, load(seed), size, self.lr * math.sqrt(size / self.small) if scaled else self.lr, ghost, updates, between)

        return GridRun([(arm, seed) for seed in self.seeds for arm in ("steps", *regimes)], work)

    def columns(self) -> dict[str, float]:
        names = ["update", "distance", "log_distance", "loss", "train_accuracy", "accuracy", "r2_log", "r2_power", "r2_difference", "exponent"]
        steps = [f"{kind}_{size}" for size in self.sizes for kind in ("with", "with_predicted", "without", "without_predicted", "scaled")]
        return dict.fromkeys([*names, *steps], math.nan)

    def descend(
        self,
        seed: int,
        data: _Data,
        model: nn.Module,
        size: int,
        lr: float,
        updates: int,
        momentum: float,
        between: Callable[[], None],
        read: Callable[[int], object] = lambda k: None,
    ) -> None:
        """``read(k)`` after update k. An incomplete batch at the end of an epoch is left out."""
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        epochs = -(-updates // (len(data.y) // size))
        for k in itertools.islice(fit(model, optimizer, data.x, data.y, seed=seed, epochs=epochs, batch=size, between=between), updates):
            read(k)
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 if 2 * k < updates else 0.1 if 4 * k < 3 * updates else 0.01)

    def train(self, seed: int, data: _Data, size: int, lr: float, ghost: bool, equal: bool, between: Callable[[], None]) -> list[dict[str, float]]:
        updates = self.epochs * (len(data.y) // (self.small if equal else size))
        model = self.network(seed, data, self.small if ghost else size)
        first, rows = _flat(model.parameters()), []
        marks = {round(t) for t in np.geomspace(1, updates // 2, 40)} | {updates}

        def read(k: int) -> None:
            if k in marks:
                distance = (_flat(model.parameters()) - first).norm().item()
                rows.append(self.columns() | {"update": k, "distance": distance, "log_distance": math.log(distance)})

        self.descend(seed, data, model, size, lr, updates, self.momentum, between, read)
        model.eval()
        with torch.no_grad():
            out = model(data.x)
        early = [row for row in rows if row["update"] <= updates // 2]
        logarithm, power, exponent = growth(*(np.array([row[column] for row in early]) for column in ("update", "distance")))
        rows[-1] |= {
            "loss": cross_entropy(out, data.y).item(),
            "train_accuracy": (out.argmax(1) == data.y).double().mean().item(),
            "accuracy": accuracy(model, data.test_x, data.test_y),
            "r2_log": logarithm,
            "r2_power": power,
            "r2_difference": logarithm - power,
            "exponent": exponent,
        }
        return rows

    def steps(self, seed: int, data: _Data, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
        """``E |dw - E dw|^2`` of plain SGD steps, drawn with and without replacement, and what the norms say."""
        model, n = self.network(seed, data, None), len(data.y)
        self.descend(seed, data, model, self.small, self.lr, self.warm_up * (n // self.small), 0.0, between)
        params = list(model.parameters())

        def gradient(index: Tensor) -> Tensor:
            return _flat(torch.autograd.grad(cross_entropy(model(data.x[index]), data.y[index]), params))

        mean = gradient(torch.arange(n))
        with clock:
            scale = gg.NoiseScale.from_norms(gg.sqnorms(model, cross_entropy, data.x, data.y), mean.square().sum())
        row, rng = self.columns(), philox(seed, NO_EPOCH)
        for size in self.sizes:
            for kind, replacement in (("with", True), ("without", False)):
                total = 0.0
                for _ in range(self.draws):
                    between()
                    index = torch.from_numpy(rng.choice(n, size, replace=replacement))
                    total += self.lr**2 * (gradient(index) - mean).square().sum().item()
                row[f"{kind}_{size}"] = total / self.draws
                row[f"{kind}_predicted_{size}"] = scale.step_covariance_trace(self.lr, size, replacement)
            row[f"scaled_{size}"] = row[f"with_{size}"] * size / self.small  # at lr sqrt(B / small)
        return [row]

    def claims(self) -> list[Claim]:
        small = self.arm(self.small, "")
        plain, scaled, ghost, adapted, updates = (self.arm(self.large, regime) for regime in self.REGIMES)
        log, same = "|w_t − w₀| ~ log t", "E|Δw − EΔw|² = (η²/B)(meanᵢ sᵢ − |ḡ|²)"
        return [
            MeanClaim(
                f"after as many epochs, batches of {self.large} read fewer test images than batches of {self.small}", plain, "accuracy", "<=", 0, versus=small
            ),
            MeanClaim("the learning rate times √B gets back part of it", scaled, "accuracy", ">=", 0, versus=plain),
            MeanClaim("ghost batch normalisation more", ghost, "accuracy", ">=", 0, versus=scaled),
            MeanClaim("with as many updates too, the gap is closed, to within half a point", adapted, "accuracy", ">=", -0.005, versus=small),
            MeanClaim("as many updates alone close it, to within half a point", updates, "accuracy", ">=", -0.005, versus=small, remark=ALONE),
            Claim(f"while the learning rate is high, the distance grows as log t: R² ≥ 0.95, B = {self.small}", small, "r2_log", ">=", 0.95, formula=log),
            MeanClaim("which fits better than a power of t", small, "r2_difference", ">=", 0, formula=log),
            Claim(f"likewise for B = {self.large} in the adapted regime", adapted, "r2_log", ">=", 0.95, formula=log, remark=SATURATES),
            MeanClaim("and better than a power of t", adapted, "r2_difference", ">=", 0, formula=log),
            MeanClaim("the adapted regime ends no more than 10 % farther away", adapted, "log_distance", "<=", math.log(1.1), versus=small, remark=DRIFT),
            MeanClaim("nor 10 % nearer", adapted, "log_distance", ">=", -math.log(1.1), versus=small),
            *(
                ClosedForm(f"the variance of a step of {size}, drawn with replacement", "steps", f"with_{size}", against=f"with_predicted_{size}", formula=same)
                for size in (self.small, self.large)
            ),
            ClosedForm(
                f"of {self.large} different samples",
                "steps",
                f"without_{self.large}",
                against=f"without_predicted_{self.large}",
                formula=f"{same} (n−B)/(n−1)",
            ),
            ClosedForm(
                f"η ~ √B: a step of {self.large} has the variance of one of {self.small}",
                "steps",
                f"scaled_{self.large}",
                against=f"with_{self.small}",
                formula="η²/B constant",
                remark="A consequence of the claims before, which hold for any gradients drawn independently.",
            ),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        colours = dict(zip(self.REGIMES, (RED, OCHRE, GREEN, BLUE, "#8a6fb0"), strict=True))
        frame = outcome.metrics
        figure = Figure(figsize=(17, 4.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
        last = frame.drop_duplicates(["arm", "seed"], keep="last")
        ends = []
        means = {(regime, size): 100 * last[last["arm"] == self.arm(size, regime)]["accuracy"] for regime in self.REGIMES for size in self.sizes}
        for regime in self.REGIMES:
            values = [means[regime, size] for size in self.sizes]
            centre = np.array([v.mean() for v in values])
            half = np.array([1.96 * v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in values])
            left.errorbar(self.sizes, centre, half, fmt="o-", color=colours[regime], ms=4, lw=1.4, elinewidth=0.8)
            ends.append((centre[-1], regime, colours[regime]))
        adapted = [v for v in outcome.verdicts if (v.claim.arm, v.claim.column) == (self.arm(self.large, "√B lr, ghost, equal updates"), "accuracy")]
        title = "√B, ghost pieces and as many updates close the gap" if all(v.holds for v in adapted) else "Test accuracy and batch size"
        left.set(xscale="log", xlabel="batch size B", ylabel="test accuracy, %, mean and 95 % interval", title=title)
        name_curves(left, ends)

        shown = {self.arm(self.small, ""): "black"} | {self.arm(self.large, regime): colour for regime, colour in colours.items()}
        for arm, colour in shown.items():
            for _, rows in frame[frame["arm"] == arm].groupby("seed"):
                middle.plot(rows["update"], rows["distance"], color=colour, lw=1, alpha=0.6)
        middle.text(0.03, 0.95, f"black: B = {self.small}\ncolours: B = {self.large}, as at the left", transform=middle.transAxes, va="top", fontsize=9)
        middle.set(xscale="log", xlabel="update t", ylabel="‖w_t − w_0‖", title="How far the weights go: straight is log t")

        steps, ends = frame[frame["arm"] == "steps"], []
        for kind, marker, colour, text in (("with", "o", BLUE, "with replacement"), ("without", "s", RED, "without")):
            lines = [steps[f"{kind}_predicted_{size}"].mean() for size in self.sizes]
            right.plot(self.sizes, lines, color=colour, lw=1)
            right.plot(
                self.sizes, [steps[f"{kind}_{size}"].mean() for size in self.sizes], marker, color=colour, ms=5, mfc="none" if kind == "with" else colour
            )
            ends.append((lines[-1], text, colour))
        right.plot(self.sizes, [steps[f"scaled_{size}"].mean() for size in self.sizes], "^", color=GREEN, ms=5)
        ends.append((steps[f"scaled_{self.large}"].mean(), "η ~ √B", GREEN))
        right.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="E |Δw − EΔw|²", title="A step's noise: drawn (marks), from norms (lines)")
        for ax in (left, right):
            ax.set_xticks(self.sizes, list(map(str, self.sizes)))
            ax.xaxis.minorticks_off()
        _label_log(right.yaxis, "{x:.0e}")
        name_curves(right, ends)
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------ batch Hessian


def spiked_wigner(spike: float, edge: float) -> float:
    """The largest eigenvalue of a spike plus a symmetric random matrix whose spectrum ends at ``edge`` (see :class:`BatchHessian`)."""
    return spike + edge**2 / (4 * spike) if 2 * spike > edge else edge


def deviation(
    model: nn.Module,
    x: Tensor,  # (N, inputs)
    y: Tensor,  # (N,)
    vector: Tensor,  # (P,)
    basis: Tensor | None = None,  # (k, P), orthonormal
) -> tuple[float, Tensor]:
    """How ``H_i v`` scatters over the samples, ``mean_i |H_i v - H v|^2``, exactly; and along each vector of the basis, (k,)."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    pieces = vector.split([p.numel() for p in params.values()])
    tangent = {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}

    def product(one: Tensor, label: Tensor) -> Tensor:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return cross_entropy(torch.func.functional_call(model, params, (one[None],)), label[None])

        rows: dict[str, Tensor] = torch.func.jvp(torch.func.grad(loss), (params,), (tangent,))[1]
        return torch.cat([row.flatten() for row in rows.values()])

    mean, square, along = torch.zeros_like(vector), 0.0, []
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        rows = torch.func.vmap(product)(part, labels)  # (n, P)
        mean, square = mean + rows.sum(0), square + rows.square().sum().item()
        along += [] if basis is None else [rows @ basis.T]
    total = square / len(y) - (mean / len(y)).square().sum().item()
    return total, torch.cat(along).var(0, correction=0) if along else torch.zeros(0)


@dataclass(frozen=True)
class _Point:
    """A network, and its Hessian over all training images."""

    model: nn.Module
    data: _Data
    loss: float
    eigenvalue: float  # lambda_1
    vector: Tensor  # (P,), of lambda_1
    trace: float  # of the Gauss-Newton matrix
    elements: float  # P sigma^2: the variance of an element of H_i, times the number of rows
    second_order: float  # b times what the noise adds to lambda_1, to second order
    noise_scale: float


@dataclass(frozen=True)
class BatchHessian(_OnImages):
    """The largest eigenvalue of the loss's Hessian over a batch, ``lambda_1(B)``, and the largest learning rate that trains with such batches.

    A batch's Hessian is ``H + E``; over the draws of a batch E has mean 0 and a covariance that goes as ``1 / b`` (top of the module). The population is all N
    training images. Since the largest eigenvalue is convex, ``E lambda_1(B) >= lambda_1``. How much larger, four formulas say:

    *Wigner*, the paper's. Let E's elements be independent, of variance ``s^2 = sigma^2 / b``, and H a spike ``lambda_1 v v'``. With the resolvent
    ``G(z) = (z - E)^-1``, z is an eigenvalue of the sum if ``lambda_1 v' G(z) v = 1``. For large P ``v' G(z) v`` tends to the semicircle's
    ``m = (z - sqrt(z^2 - 4 P s^2)) / (2 P s^2)``, which inverts to ``z = 1 / m + P s^2 m``. Hence ``lambda_1 + (P / b) sigma^2 / lambda_1`` as long as that
    lies outside of the spectrum of E, ``lambda_1 > sqrt(P / b) sigma``; else the largest eigenvalue is the spectrum's end, ``2 sqrt(P / b) sigma`` (Feral and
    Peche 2007; Benaych-Georges and Nadakuditi 2011). Random matrices of size ``wigner_size`` show it, up to about ``1.2 / (2 P^(2/3))`` at the end of the
    spectrum (the mean of the Tracy-Widom law). A consequence: 2 over this has at most the slope 1/2 in log b; it is never linear in B. ``sigma^2`` is the
    mean variance of an element of the samples' Hessians ``H_i``: ``P^2 sigma^2 = E_v mean_i |(H_i - H) v|^2`` for standard normal v.

    *Second order.* Whatever E is, if it is small against the gap, it adds ``sum_j E (v_j' E v_1)^2 / (lambda_1 - lambda_j)``, with
    ``E (v_j' E v_1)^2 = Var_i(v_j' H_i v_1) / b``, measured over all samples. Eigenvalues beyond ``directions`` count as 0. What is left out is smaller by
    about this over the gap. *Wigner along v_1* takes Wigner's formula with the sigma^2 that gives as much for large b: the noise that v_1 meets.

    *Wishart*. Let ``H_i = g_i g_i'`` with normal ``g_i`` of covariance H. Then ``Var(v_j' H_i v_1) = lambda_j lambda_1``, and with
    ``lambda_j << lambda_1`` second order gives ``lambda_1 + (tr H - lambda_1) / b``. It needs no fit, is exact for b = 1 as well if the H_i have rank 1, and
    does give learning rates that are linear in small B. It is the Gauss-Newton matrix's trace that stands for tr H.

    ``excess`` is the mean over the draws of ``lambda_1(B) - v_1' (H + E) v_1``, which has the mean of ``lambda_1(B) - lambda_1`` and less noise.

    *Learning rates.* From the start, ``steps`` of plain SGD: it trains if the loss over all images ends below where it began. Bisected in log lr. The paper
    says ``2 / lambda_1(B)``, linear in small B, and for Adam, whose steps are divided by roots of squared gradients, the square root of that. For comparison
    stands the gradient's noise scale ``tr Sigma / |G|^2``, where by McCandlish et al. (2018) half of the best learning rate of large batches is reached.

    The paper: VGG-16 and WideResNets on CIFAR-100 and ImageNet.
    """

    name: ClassVar[str] = "batch-size/batch-hessian"
    title: ClassVar[str] = "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training"
    paper: ClassVar[str] = "Granziol, Zohren, Roberts (JMLR 2022)"
    summary: ClassVar[str] = "a batch's Hessian is sharper than the full one: by how much, by four formulas, and which learning rates that leaves"
    duration: ClassVar[str] = "3 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.top_eigenvalue", "gg.ggn_trace", "gg.noise_scale")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 8, "ratio": 4}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 10, "width": 128, "draws": 50}
    needs: ClassVar[str] = "VGG-16 and WideResNets on CIFAR-100 and ImageNet: days of a GPU"

    POINTS: ClassVar[tuple[str, ...]] = ("start", "trained")
    SPIKES: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0)  # in units of sqrt(P) s, half the spectrum of E

    num_seeds: int = 12
    """How many seeds; each is another split of the images, start, and draws."""
    lr: float = 0.1
    """Learning rate of the training that leads to the second network."""
    epochs: int = 5
    """Its epochs, in batches of 32."""
    width: int = 32
    """Hidden units in one layer, tanh."""
    largest: int = 256
    """The largest batch."""
    ratio: int = 2
    """Factor between a batch size and the next, from 1."""
    draws: int = 24
    """Batches drawn for each size."""
    directions: int = 12
    """How many eigenvectors of the Hessian are taken one by one."""
    probes: int = 4
    """Random vectors for the variance of the Hessian's elements."""
    steps: int = 100
    """Steps of SGD that say whether a learning rate trains."""
    halvings: int = 7
    """Of the interval from 2^-10 to 2^6 that the largest learning rate is sought in."""
    wigner_size: int = 400
    """Rows of a random matrix."""
    wigner_draws: int = 10
    """Random matrices for each spike."""

    def rules(self) -> list[tuple[str, bool, str]]:
        least = {"epochs": 1, "width": 1, "draws": 2, "directions": 2, "probes": 1, "steps": 1, "halvings": 1, "wigner_size": 30, "wigner_draws": 1, "ratio": 2}
        return [
            *super().rules(),
            *((name, getattr(self, name) >= value, f"at least {value}") for name, value in least.items()),
            ("largest", self.largest in {self.ratio**k for k in range(3, 64)}, f"ratio={self.ratio} to the power of 3 or more"),
        ]

    @property
    def sizes(self) -> list[int]:
        return [self.ratio**k for k in range(64) if self.ratio**k <= self.largest]

    def network(self, seed: int, data: _Data) -> nn.Module:
        return built(seed, lambda: perceptron([data.x.shape[1], self.width, data.classes], nn.Tanh), data.x.device)

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        load = functools.lru_cache(maxsize=1)(lambda seed: self.load(seed, device))
        found = len(load(self.seed).y)
        if found <= self.largest:
            rule = f"there must be more than largest={self.largest} images to train on"
            raise ImageDataError(Path(self.data), rule, f"there are {found}", "Give a smaller --largest.")
        network = {f"{point}, B = {size}": (point, size) for point in self.POINTS for size in self.sizes}
        wigner = {f"spike {spike:g}": spike for spike in self.SPIKES}
        held: dict[tuple[str, int], _Point] = {}  # the last one: a resumed run finds the same

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            if arm in wigner:
                return [self.columns() | self.random_matrix(seed, wigner[arm], clock, between)]
            name, size = network[arm]
            if (name, seed) not in held:
                held.clear()
                held[name, seed] = self.point(name, seed, load(seed), clock, between)
            return [self.columns() | self.measure(held[name, seed], name == "start", seed, size, clock, between)]

        return GridRun([(arm, seed) for seed in self.seeds for arm in (*wigner, *network)], work)

    @staticmethod
    def columns() -> dict[str, float]:
        hessian = "spike eigenvalue full log_ratio excess second_order wigner log_wigner wigner_along wishart trace noise_scale"
        return dict.fromkeys(f"{hessian} lr log_lr log_product adam_lr log_adam_lr".split(), math.nan)

    def random_matrix(self, seed: int, spike: float, clock: Clock, between: Callable[[], None]) -> dict[str, float]:
        """The mean largest eigenvalue, in units of ``sqrt(P) s``."""
        found, size = [], self.wigner_size
        for draw in range(self.wigner_draws):
            between()
            rng = philox(seed, NO_EPOCH + draw)
            noise, direction = rng.standard_normal((size, size)), rng.standard_normal(size)
            direction /= np.linalg.norm(direction)
            matrix = torch.from_numpy((noise + noise.T) / math.sqrt(2 * size) + spike * np.outer(direction, direction))
            w = nn.Parameter(torch.zeros(size, dtype=DTYPE))
            with clock:
                found.append(float(gg.top_eigenvalue(lambda w=w, matrix=matrix: w @ matrix @ w / 2, [w], tol=1e-3)))
        return {"spike": spike, "eigenvalue": float(np.mean(found)), "wigner": spiked_wigner(spike, 2.0)}

    def point(self, name: str, seed: int, data: _Data, clock: Clock, between: Callable[[], None]) -> _Point:
        model = self.network(seed, data)
        if name == "trained":
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr)
            self.descend(model, data, seed, 32, optimizer, self.epochs * (len(data.y) // 32), between)
        with torch.no_grad():
            loss = cross_entropy(model(data.x), data.y).item()
        with clock:
            top = gg.top_eigenvalue(model, cross_entropy, data.x, data.y, k=self.directions, tol=1e-4)
            trace = float(gg.ggn_trace(model, "cross_entropy", data.x, data.y).mean)
            noise = gg.noise_scale(model, cross_entropy, data.x, data.y)
        between()
        vectors, count = top.vectors.to(data.x.device), top.vectors.shape[1]
        total, along = deviation(model, data.x, data.y, vectors[0], vectors)
        gaps = top.values[0] - top.values[1:]
        second = (along[1:].cpu() / gaps).sum().item() + (total - along.sum().item()) / float(top)
        probes = torch.from_numpy(philox(seed, NO_EPOCH + (1 << 20)).standard_normal((self.probes, count))).to(data.x.device)
        elements = float(np.mean([deviation(model, data.x, data.y, probe)[0] for probe in probes])) / count
        return _Point(model, data, loss, float(top), vectors[0], trace, elements, second, noise.scale)

    @staticmethod
    def descend(model: nn.Module, data: _Data, seed: int, size: int, optimizer: torch.optim.Optimizer, steps: int, between: Callable[[], None]) -> None:
        epochs = -(-steps // (len(data.y) // size))
        for _ in itertools.islice(fit(model, optimizer, data.x, data.y, seed=seed, epochs=epochs, batch=size, between=between), steps):
            pass

    def measure(self, point: _Point, rates: bool, seed: int, size: int, clock: Clock, between: Callable[[], None]) -> dict[str, float]:
        x, y, n = point.data.x, point.data.y, len(point.data.y)
        b, rng, found, less = size * (n - 1) / (n - size), philox(seed, NO_EPOCH + (1 << 30) + size), [], []
        for _ in range(self.draws):
            between()
            index = torch.from_numpy(rng.choice(n, size, replace=False)).to(y.device)
            with clock:
                found.append(float(gg.top_eigenvalue(point.model, cross_entropy, x[index], y[index], tol=1e-2)))
            less.append(found[-1] - self.along(point, x[index], y[index]))
        eigenvalue, wigner = float(np.mean(found)), spiked_wigner(point.eigenvalue, 2 * math.sqrt(point.elements / b))
        row = {
            "eigenvalue": eigenvalue,
            "full": point.eigenvalue,
            "log_ratio": math.log(eigenvalue / point.eigenvalue),
            "excess": float(np.mean(less)),
            "second_order": point.second_order / b,
            "wigner": wigner,
            "log_wigner": math.log(max(float(np.mean(less)), 1e-300) / (wigner - point.eigenvalue)),
            "wigner_along": spiked_wigner(point.eigenvalue, 2 * math.sqrt(point.second_order * point.eigenvalue / b)),
            "wishart": point.eigenvalue + (point.trace - point.eigenvalue) / b,
            "trace": point.trace,
            "noise_scale": point.noise_scale,
        }
        if rates:
            log_lr, log_adam = (self.largest_rate(point, seed, size, optimizer, between) for optimizer in (torch.optim.SGD, torch.optim.Adam))
            row |= {"lr": math.exp(log_lr), "log_lr": log_lr, "log_product": log_lr + math.log(eigenvalue / 2)}
            row |= {"adam_lr": math.exp(log_adam), "log_adam_lr": log_adam}
        return row

    @staticmethod
    def along(point: _Point, x: Tensor, y: Tensor) -> float:
        """``v_1' H_B v_1``, by two derivatives along ``v_1``."""
        params = {name: p.detach() for name, p in point.model.named_parameters()}
        pieces = point.vector.split([p.numel() for p in params.values()])
        tangent = {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}

        def loss(t: Tensor) -> Tensor:
            moved = {name: p + t * tangent[name] for name, p in params.items()}
            return cross_entropy(torch.func.functional_call(point.model, moved, (x,)), y)

        return float(torch.func.grad(torch.func.grad(loss))(x.new_zeros(())))

    def largest_rate(self, point: _Point, seed: int, size: int, kind: Callable[..., torch.optim.Optimizer], between: Callable[[], None]) -> float:
        """The logarithm of the largest learning rate that trains."""
        low, high = -10.0, 6.0
        for _ in range(self.halvings):
            middle = (low + high) / 2
            model = copy.deepcopy(point.model)
            self.descend(model, point.data, seed, size, kind(model.parameters(), lr=2**middle), self.steps, between)
            with torch.no_grad():
                ends = cross_entropy(model(point.data.x), point.data.y).item()
            low, high = (middle, high) if ends < point.loss else (low, middle)  # NaN does not train
        return low * math.log(2)

    def claims(self) -> list[Claim]:
        one, few, many, most = (self.sizes[k] for k in (0, 1, -2, -1))
        formula = "λ₁ + (P/b) σ²/λ₁ if λ₁ > √(P/b) σ, else 2 √(P/b) σ"
        out: list[Claim] = [
            ClosedForm("random matrices: a spike above the threshold", "spike 2", "eigenvalue", against="wigner", precision=0.02, slack=0.01, formula=formula),
            ClosedForm("and one below", "spike 0.5", "eigenvalue", against="wigner", precision=0.02, slack=0.02, formula=formula),
        ]
        middle = self.sizes[len(self.sizes) // 2]
        for point in self.POINTS:
            here = {"start": "at the start", "trained": "trained"}[point]
            arm = f"{point}, B = {most}"
            out += [
                MeanClaim(f"{here}: the Hessian of a batch of {middle} is sharper than the full one", f"{point}, B = {middle}", "log_ratio", ">=", 0),
                MeanClaim(
                    f"{here}: for B = {most}, by no more than 1.25 times what the variance of its elements says",
                    arm,
                    "log_wigner",
                    "<=",
                    math.log(1.25),
                    formula="λ₁(B) − λ₁ = (P/b) σ²/λ₁",
                    remark=NOT_WIGNER,
                ),
                ClosedForm(
                    f"{here}: by what the variance of its product with v₁ says",
                    arm,
                    "excess",
                    against="second_order",
                    precision=0.35,
                    slack=0.2,
                    formula="λ₁(B) − λ₁ = (1/b) Σⱼ Varᵢ(vⱼᵀHᵢv₁) / (λ₁ − λⱼ)",
                ),
                *(
                    ClosedForm(
                        f"{here}: the formula with that variance, B = {size}",
                        f"{point}, B = {size}",
                        "eigenvalue",
                        against="wigner_along",
                        precision=0.2,
                        slack=0.15,
                        formula=formula,
                        remark="No prediction: this claim was added when runs with seeds 0 to 11 had been seen.",
                    )
                    for size in (middle, one)
                ),
                ClosedForm(
                    f"{here}: λ₁ + (tr H − λ₁)/b, B = {middle}",
                    f"{point}, B = {middle}",
                    "eigenvalue",
                    against="wishart",
                    precision=0.15,
                    slack=0.15,
                    formula="λ₁ + (tr H − λ₁)/b",
                ),
            ]
        first, last, adam = (f"start, B = {size}" for size in (one, most, middle))
        rise, product = math.log(self.ratio), "η_max = 2/λ₁(B)"
        return [
            *out,
            MeanClaim(
                "the largest learning rate is linear in small batches: exponent 0.75 or more", f"start, B = {few}", "log_lr", ">=", 0.75 * rise, versus=first
            ),
            MeanClaim("and saturates: exponent 0.5 or less", last, "log_lr", "<=", 0.5 * rise, versus=f"start, B = {many}"),
            MeanClaim(
                f"η_max λ₁(B) at B = {most} is at most twice that at 1", last, "log_product", "<=", math.log(2), versus=first, formula=product, remark=FLATTER
            ),
            MeanClaim("and at least half", last, "log_product", ">=", -math.log(2), versus=first, formula=product),
            MeanClaim(f"Adam's goes as √B, up to B = {middle}: exponent 0.25 or more", adam, "log_adam_lr", ">=", 0.25 * math.log(middle), versus=first),
            MeanClaim("and 0.75 or less", adam, "log_adam_lr", "<=", 0.75 * math.log(middle), versus=first),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        frame = outcome.metrics
        figure = Figure(figsize=(17, 4.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(0.8, 1, 1))
        grid = np.linspace(0.05, 3.2, 200)
        left.plot(grid, [spiked_wigner(spike, 2.0) for spike in grid], color="black", lw=1)
        spikes = frame[frame["spike"].notna()]
        left.plot(spikes["spike"], spikes["eigenvalue"], "o", color=BLUE, ms=5, alpha=0.6, mew=0)
        left.set(
            xlabel="λ₁ / (√(P/b) σ)", ylabel="largest eigenvalue / (√(P/b) σ)", title=f"A spike in {self.wigner_size} x {self.wigner_size} random matrices"
        )

        def mean(point: str, column: str) -> np.ndarray:
            return np.array([np.exp(np.log(frame[frame["arm"] == f"{point}, B = {size}"][column]).mean()) for size in self.sizes])

        ends: dict[Axes, list[tuple[float, str, str]]] = {middle: [], right: []}
        sharper = all(v.holds for v in outcome.verdicts if v.claim.column == "log_ratio")
        for point, colour in zip(self.POINTS, (RED, BLUE), strict=True):
            middle.plot(self.sizes, mean(point, "eigenvalue"), "o", color=colour, ms=5)
            for column, style in (("wishart", "-"), ("wigner_along", "--"), ("wigner", ":")):
                middle.plot(self.sizes, mean(point, column), style, color=colour, lw=1.3)
            ends[middle].append((mean(point, "eigenvalue")[-1], {"start": "at the start", "trained": "trained"}[point], colour))
        middle.text(
            0.97,
            0.97,
            "dots: batches\ndashed: Wigner, with the noise along v₁\nsolid: λ₁ + (tr H − λ₁)/b\ndotted: Wigner, with that of all elements",
            transform=middle.transAxes,
            ha="right",
            va="top",
            fontsize=9,
        )
        middle.set(
            xscale="log",
            yscale="log",
            xlabel="batch size B",
            ylabel="largest eigenvalue of the batch's Hessian",
            title="A batch's Hessian is sharper" if sharper else "Batches and all images",
        )

        for _, rows in frame[frame["lr"].notna()].groupby("seed"):
            right.plot(self.sizes, rows["lr"], color="0.8", lw=0.8)
        curves = {"η_max": (mean("start", "lr"), "o-", "black"), "2/λ₁(B)": (2 / mean("start", "eigenvalue"), "o-", RED)}
        for text, (values, style, colour) in curves.items():
            right.plot(self.sizes, values, style, color=colour, ms=4, lw=1.4)
            ends[right].append((values[-1], text, colour))
        right.plot(self.sizes, mean("start", "adam_lr"), "s-", color=GREEN, ms=4, lw=1.4)
        ends[right].append((mean("start", "adam_lr")[-1], "Adam's", GREEN))
        wigner = 2 / mean("start", "wigner")
        right.plot(self.sizes, wigner, ":", color=RED, lw=1.4)
        right.annotate("by Wigner", (self.sizes[0], wigner[0]), (0, 6), textcoords="offset points", color=RED, fontsize=9)
        scale = float(mean("start", "noise_scale")[0])
        right.axvline(scale, color="0.5", lw=0.8, ls=":")
        right.text(scale, 0.03, " gradient noise scale", transform=right.get_xaxis_transform(), fontsize=9, color="0.4")
        right.set(
            xscale="log", yscale="log", xlabel="batch size B", ylabel="learning rate", title=f"The largest that trains, {self.steps} steps from the start"
        )
        for ax in (middle, right):
            ax.set_xticks(self.sizes, list(map(str, self.sizes)))
            ax.xaxis.minorticks_off()
            _label_log(ax.yaxis, "{x:g}")
            name_curves(ax, ends[ax])
        return figure
