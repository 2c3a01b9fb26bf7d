"""Noise-stability training on handwritten digits, or on images of the user's, at an equal number of gradient evaluations.

H. R. Zhang, D. Li, H. Ju, "Noise Stability Optimization for Finding Flat Minima: A Hessian-based Regularization Approach", TMLR 2024.

Training on ``E f(W + U)`` instead of f, the noise U normal with deviation sigma, adds ``sigma^2 / 2 tr(Hessian)`` to the loss. The *one-point* gradient is
that at ``W + U``, the *two-point* one the mean of those at ``W + U`` and ``W - U``. The paper fine-tunes pretrained ResNets on six sets of images and reports,
against SGD and sharpness-aware minimisation (SAM), up to 2.4 % more accuracy, a Hessian trace lower by 15.8 % and a largest eigenvalue lower by 9.7 %.

Here two small networks start from random weights. They are smooth (GELU), so that their Hessians are those that the noise meets, without the kinks of ReLU. All
arms of a seed share the split of the images, the start, the order of the batches, learning rate, momentum, weight decay, and the number of gradients: a step
of SGD and of the one-point method takes one, of the two-point method and of SAM two, so the former two take twice as many steps.

Learning rate (0.1, 0.2), sigma (0.03, 0.06) and rho (0.05, 0.1) were chosen on seeds 100 and 101, which the run does not use: the smaller of each, with which
every arm trains safely. Larger ones gave minima as flat or flatter. At a learning rate of 0.2 the MLP read more of the test digits, by 0.5 points with SGD and
by 0.3 with two points.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu
from torch.optim.swa_utils import update_bn

import ghostgrad as gg

from ..training import Claim, Clock, MeanClaim, Outcome, Setting, Trainee, TrainingRun, batches
from .figures import BLUE, GREEN, RED
from .images import ImageDataError, Images, data_used, load_images
from .noise_stability import AUTHORS, TITLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHODS", "NoiseDigits", "mlp", "resnet"]

METHODS = {"SGD": 1, "one-point": 1, "two-point": 2, "SAM": 2}  # gradients per step
COLOURS = {"SGD": RED, "one-point": GREEN, "two-point": BLUE, "SAM": "#7a7a7a"}
PAPER_TRACE, PAPER_EIGENVALUE = -0.158, -0.097  # what the paper reports, relative to SGD
CHUNK = 1024  # images per forward pass where no gradient is needed; each counts alike in the batch statistics


# ---------------------------------------------------------------------------------------------------------------------------------------- the networks


def mlp(
    shape: tuple[int, int, int],  # (C, H, W)
    classes: int,
    width: int,
) -> nn.Module:
    """Two hidden layers."""
    layers = (nn.Flatten(), nn.Linear(math.prod(shape), width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))
    return nn.Sequential(*layers)


class _Block(nn.Module):
    """``gelu(shortcut(x) + bn(conv(gelu(bn(conv(x))))))``, the basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()

        def normed(inputs: int, kernel: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))

        self.first, self.second = normed(inputs, 3, stride), normed(outputs, 3, 1)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else normed(inputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:  # (n, inputs, H, W) -> (n, outputs, H / stride, W / stride)
        return gelu(self.shortcut(x) + self.second(gelu(self.first(x))))


def resnet(
    shape: tuple[int, int, int],  # (C, H, W)
    classes: int,
    width: int,
) -> nn.Module:
    """Three blocks of ``width``, ``2 width`` and ``4 width`` channels with batch normalisation, the last two with stride 2: 8 layers of weights."""
    stem = (nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.GELU())
    blocks = (_Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


NETWORKS: dict[str, Callable[[tuple[int, int, int], int, int], nn.Module]] = {"MLP": mlp, "ResNet": resnet}


# ----------------------------------------------------------------------------------------------------------------------------------------- the setting


@dataclass(frozen=True)
class _Data:
    """Images on the run's device."""

    train_x: Tensor  # (N, C, H, W)
    train_y: Tensor  # (N,)
    test_x: Tensor  # (M, C, H, W)
    test_y: Tensor  # (M,)
    traced: Tensor  # (n,), the training images that traces and eigenvalues are taken of


def _on(device: torch.device, images: Images, trace_images: int) -> _Data:
    traced = batches(0, 0, len(images.train_y), trace_images)[0]
    return _Data(*(t.to(device) for t in (images.train_x, images.train_y, images.test_x, images.test_y, traced)))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _against(sgd: dict[int, float], values: dict[int, float], ratio: bool) -> str:
    """The mean paired difference to SGD with its 95 % interval: of logarithms, as a percentage, or plainly, in percentage points."""
    difference = {seed: _log(value) - _log(sgd[seed]) if ratio else value - sgd[seed] for seed, value in values.items()}
    verdict = MeanClaim("", "", "", "<=", 0.0).judge(difference)
    assert verdict.interval is not None
    mean, *ends = (100 * (math.expm1(v) if ratio else v) for v in (verdict.measured, *verdict.interval))
    digits = 0 if ratio else 2
    interval = "" if len(sgd) == 1 else "\n[{:+.{d}f}, {:+.{d}f}]".format(*ends, d=digits)
    return f"{mean:+.{digits}f}{' %' if ratio else ''}{interval}"


@dataclass(frozen=True)
class NoiseDigits(Setting):
    """What is measured, at half-time and at the end: accuracy and cross-entropy on the test images; the training loss, the trace of its Hessian and of its
    Gauss-Newton matrix, and its largest eigenvalue, in evaluation mode, with batch statistics taken anew over all training images."""

    name: ClassVar[str] = "noise-stability/digits"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = AUTHORS
    summary: ClassVar[str] = "handwritten digits: training with weight noise finds flatter minima than SGD at equal cost"
    duration: ClassVar[str] = "8 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.optim.NSO", "gg.optim.SAM", "gg.hessian_trace", "gg.ggn_trace", "gg.top_eigenvalue")
    SMALL: ClassVar[dict[str, Any]] = {"network": "MLP"}
    needs: ClassVar[str] = "a ResNet-34 pretrained on ImageNet and six image sets: days of a GPU"

    num_seeds: int = 5
    """How many seeds; each is another split of the images, start and order of batches."""
    network: Literal["both", "MLP", "ResNet"] = "both"
    """Which networks are trained."""
    data: str = "digits"
    """Either digits, scikit-learn's, or a folder that holds a folder of images for each class, CIFAR's binary version, or IDX files."""
    image_size: int | None = None
    """Bring the images of class folders to this size."""
    test_share: float = 0.5
    """Share of the images to test on, where the data have no test half."""
    gradients: int = 1200
    """Gradient evaluations of each arm, an even number."""
    batch_size: int = 64
    """Images per gradient."""
    lr: float = 0.1
    """Learning rate, after a linear rise over the first tenth of the run and before a cosine down to 0."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes, in training and in the loss whose Hessian is taken: the loss then has a minimum at finite weights."""
    momentum: float = 0.9
    """Momentum of SGD, which every arm steps with."""
    weight_decay: float = 5e-4
    """Weight decay."""
    sigma: float = 0.03
    """Deviation of the noise."""
    rho: float = 0.05
    """Radius of SAM."""
    mlp_width: int = 128
    """Hidden units in each layer of the MLP."""
    resnet_width: int = 8
    """Channels of the ResNet's first block."""
    probes: int = 24
    """Hessian-vector products for a trace."""
    trace_images: int = 2048
    """Traces and eigenvalues are those of at most so many training images."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("gradients", self.gradients >= 4 and self.gradients % 2 == 0, "even and at least 4"),
            *self.at_least(1, "batch_size", "mlp_width", "resnet_width", "trace_images"),
            *self.at_least(2, "probes"),
            *self.positive("lr"),
            *((name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite") for name in ("weight_decay", "sigma", "rho")),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("test_share", 0 < self.test_share < 1, "between 0 and 1"),
            ("image_size", self.image_size is None or self.image_size >= 1, "at least 1"),
        ]

    def data_used(self) -> str:
        return data_used(self.data)

    @property
    def networks(self) -> list[str]:
        return list(NETWORKS) if self.network == "both" else [self.network]

    def claims(self) -> list[Claim]:
        out: list[Claim] = []
        for network in self.networks:
            ours, sgd = f"{network}, two-point", f"{network}, SGD"
            for column, what, paper in (("log_trace", "Hessian trace", PAPER_TRACE), ("log_eigenvalue", "largest eigenvalue", PAPER_EIGENVALUE)):
                text = f"{network}: two-point's {what} is lower than SGD's by the paper's {-paper:.1%} at least"
                out.append(MeanClaim(text, ours, column, "<=", round(math.log1p(paper), 4), versus=sgd))
            out.append(MeanClaim(f"{network}: two-point's accuracy is not lower than SGD's by half a point", ours, "accuracy", ">=", -0.005, versus=sgd))
        return out

    def start(self, device: torch.device, compiled: bool) -> TrainingRun:
        load = functools.partial(load_images, self.data, test_share=self.test_share, size=self.image_size)
        first = load(seed=self.seed)
        if len(first.train_y) < self.batch_size:
            found = f"there are {len(first.train_y)} to train on"
            raise ImageDataError(Path(self.data), f"a batch is to have {self.batch_size} images", found, "Give a smaller --batch-size.")
        images = {seed: load(seed=seed) if first.split and seed != self.seed else first for seed in self.seeds}
        data = {seed: _on(device, one, self.trace_images) for seed, one in images.items()}
        trainees = [
            self._trainee(network, method, seed, data[seed], len(first.classes), device)
            for network in self.networks
            for method in METHODS
            for seed in self.seeds
        ]
        steps = self.gradients // 2
        return TrainingRun(trainees, [steps // 2, steps], lambda trainee, clock: self._measure(trainee.model, data[trainee.seed], clock))

    def _trainee(self, network: str, method: str, seed: int, data: _Data, classes: int, device: torch.device) -> Trainee:
        """A step of the run is two gradients: two steps of SGD or one-point, one of two-point or SAM."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            channels, height, width = data.train_x.shape[1:]
            model = NETWORKS[network]((channels, height, width), classes, self.mlp_width if network == "MLP" else self.resnet_width).to(device)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if method == "SAM":
            optimizer = gg.optim.SAM(model, optimizer, rho=self.rho)
        elif method != "SGD":
            optimizer = gg.optim.NSO(model, optimizer, sigma=self.sigma, two_point=method == "two-point", seed=seed)
        steps, per_epoch = self.gradients // 2, len(data.train_y) // self.batch_size  # an incomplete batch at the end of an epoch is left out
        each = 2 // METHODS[method]
        epoch_of = functools.lru_cache(maxsize=1)(lambda epoch: batches(seed, epoch, len(data.train_y), self.batch_size))

        def step(k: int) -> None:
            for part in range(each):
                done = (k + part / each) / steps  # share of the run
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * min(1.0, 10 * (done + 1 / steps)) * 0.5 * (1 + math.cos(math.pi * done))
                epoch, number = divmod(each * k + part, per_epoch)
                index = epoch_of(epoch)[number].to(device)

                def closure(index: Tensor = index) -> Tensor:
                    optimizer.zero_grad()
                    loss = self._loss(model(data.train_x[index]), data.train_y[index])
                    loss.backward()
                    return loss

                optimizer.step(closure)  # type: ignore[arg-type]

        return Trainee(f"{network}, {method}", seed, model, optimizer, step)

    def _loss(
        self,
        logits: Tensor,  # (n, classes)
        target: Tensor,  # (n,)
        reduction: str = "mean",
    ) -> Tensor:
        return cross_entropy(logits, target, reduction=reduction, label_smoothing=self.label_smoothing)

    def _measure(self, trained: nn.Module, data: _Data, clock: Clock) -> dict[str, Any]:
        model = copy.deepcopy(trained)
        model.zero_grad()
        update_bn(data.train_x.split(CHUNK), model)
        model.eval()
        x, y = data.train_x[data.traced], data.train_y[data.traced]

        with clock:
            trace = gg.hessian_trace(model, functools.partial(self._loss, reduction="none"), x, y, method="hvp", probes=self.probes)
            gauss_newton = gg.ggn_trace(model, "cross_entropy", x, y)  # which depends on no label, and so on no smoothing
            eigenvalue = float(gg.top_eigenvalue(model, self._loss, x, y, tol=1e-2))
        with torch.no_grad():
            train, test = (torch.cat([model(part) for part in half.split(CHUNK)]) for half in (data.train_x, data.test_x))
        return {
            "loss": self._loss(train, data.train_y).item(),
            "accuracy": (test.argmax(1) == data.test_y).double().mean().item(),
            "test_loss": cross_entropy(test, data.test_y).item(),
            "trace": trace.mean,
            "trace_stderr": trace.stderr,
            "ggn_trace": gauss_newton.mean,
            "eigenvalue": eigenvalue,
            "log_trace": _log(trace.mean),
            "log_eigenvalue": _log(eigenvalue),
        }

    def figure(self, outcome: Outcome) -> Figure:
        """Every seed a dot, means with their 95 % intervals beside them, and above the paired difference to SGD in numbers."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        panels = (("trace", "trace of the Hessian"), ("eigenvalue", "largest eigenvalue"), ("accuracy", "test accuracy"))
        last = outcome.metrics.drop_duplicates(["arm", "seed"], keep="last")
        figure = Figure(figsize=(12, 0.5 + 3.4 * len(self.networks)), layout="constrained")
        finding = "Weight noise finds flatter minima than SGD with the same number of gradients, at the same accuracy to within half a point"
        figure.suptitle(finding if outcome.holds else "Flatness and accuracy after the same number of gradients (not all claims hold)")
        for row, network in zip(figure.subplots(len(self.networks), 3, squeeze=False), self.networks, strict=True):
            for ax, (column, label) in zip(row, panels, strict=True):
                logarithmic = column != "accuracy" and bool((last[column] > 0).all())  # curvature can be negative far from a minimum
                forth, back = (_log, math.exp) if logarithmic else (float, float)
                seeds = {method: last[last["arm"] == f"{network}, {method}"].set_index("seed")[column].to_dict() for method in METHODS}
                compared = logarithmic or column == "accuracy"
                for seed in seeds["SGD"]:
                    ax.plot([place - 0.1 for place in range(len(METHODS))], [values[seed] for values in seeds.values()], color="0.88", lw=0.8, zorder=0)
                for place, (method, values) in enumerate(seeds.items()):
                    mean = MeanClaim("", "", "", "<=", 0.0).judge({seed: forth(value) for seed, value in values.items()})
                    assert mean.interval is not None
                    ax.plot([place - 0.1] * len(values), list(values.values()), "o", color=COLOURS[method], ms=5, alpha=0.5, mew=0)
                    ax.plot([place + 0.1] * 2, [back(end) for end in mean.interval], color=COLOURS[method], lw=1.6)
                    ax.plot([place + 0.1], [back(mean.measured)], "_", color=COLOURS[method], ms=10, mew=2)
                    numbers = "against SGD,\n95 % interval" if method == "SGD" else _against(seeds["SGD"], values, logarithmic)
                    if compared:
                        ax.text(place, 1.02, numbers, transform=ax.get_xaxis_transform(), ha="center", fontsize=7.5, color=COLOURS[method])
                ax.set_xticks(range(len(METHODS)), list(METHODS))
                ax.set(xlim=(-0.5, len(METHODS) - 0.5), ylabel=f"{network}: {label}")
                if logarithmic:
                    ax.set_yscale("log")
                    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
                    ax.yaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.2%}" if column == "accuracy" else "{x:g}"))
        return figure
