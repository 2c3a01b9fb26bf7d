"""Minima that fit the training images alike and are not alike: where training starts decides, and what a network is built of.

S. Liu, D. Papailiopoulos, D. Achlioptas, "Bad global minima exist and SGD can reach them", NeurIPS 2020; and Z. Huang, S. Liang, M. Liang, H. Yang, "DIANet:
dense-and-implicit attention network", AAAI 2020.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.swa_utils import update_bn

import ghostgrad as gg

from ..training import Claim, Clock, GridRun, MeanClaim, Outcome, philox
from .figures import BLUE, GREY, RED
from .image_setting import DTYPE, ImageSetting, Split, accuracy, built, fit, perceptron

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BadMinima", "SharedAttention", "path_norm", "shifted"]

LOOK = 4  # steps of plain SGD between two looks at the training loss

# -------------------------------------------------------------------------------------------------------------------------------- bad global minima


def path_norm(model: nn.Sequential) -> float:
    """``sqrt(sum over paths of prod w^2)`` from every input and every bias to every output of a ReLU network: one forward pass of ones with squared weights.

    Neyshabur, Salakhutdinov, Srebro, "Path-SGD", NeurIPS 2015. It does not change when a unit's inputs are scaled by c > 0 and its outputs by 1 / c, as the
    function does not; the plain norm of the weights does.
    """
    flow: Tensor | None = None
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs = torch.ones(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device) if flow is None else flow
            flow = layer.weight.detach().square() @ inputs + layer.bias.detach().square()
    assert flow is not None
    return math.sqrt(flow.sum().item())


def shifted(
    x: Tensor,  # (n, C, H, W)
    seed: int,
    step: int,
    by: int = 1,
) -> Tensor:
    """Every image moved by up to ``by`` pixels to each side, at random; what comes in from outside is the smallest value."""
    n, _, height, width = x.shape
    wide = pad(x, (by,) * 4, value=x.min().item())
    down, right = torch.from_numpy(philox(seed, (2 << 32) + step).integers(0, 2 * by + 1, (2, n, 1))).to(x.device)
    rows, columns = down + torch.arange(height, device=x.device), right + torch.arange(width, device=x.device)  # (n, H), (n, W)
    return wide[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


@dataclass(frozen=True)
class BadMinima(ImageSetting):
    """Two starts, two ways to train. Stage 1 makes the bad start: the network is fitted to ``copies`` of the training images, in each of which a tenth of the
    pixels, drawn anew, are zero, with labels drawn at random. Stage 2 trains on the images themselves with their true labels, from the bad start and from
    the random one in which stage 1 began: by plain SGD, or with momentum, weight decay and shifted images.

    With a loss that goes to zero, curvature goes to zero as well: of the cross-entropy, ``tr H = mean_i sum_k p_k ||grad f_k - grad f_mean||^2 + residual
    terms``, where all p_k but one vanish. So the minima are compared at one loss: plain SGD stops at the first step after which the training loss is at most
    ``target`` and every training image is read. Then whether the bad minimum is the sharper one is not decided by how long was trained.

    Expected before the run: it is sharper, by trace and by largest eigenvalue, and its path norm is larger, because the weights that fit random labels are
    large and stage 2 hardly moves them. These three are this setting's own questions. The paper trains ResNets and others on CIFAR-10, CIFAR-100, CINIC-10
    and Restricted ImageNet; a perceptron has far less room on digits, and 5 points are claimed.
    """

    name: ClassVar[str] = "minima/bad-global-minima"
    title: ClassVar[str] = "Bad global minima exist and SGD can reach them"
    paper: ClassVar[str] = "Liu, Papailiopoulos, Achlioptas (NeurIPS 2020)"
    summary: ClassVar[str] = "digits: pretrained on random labels, SGD ends in a minimum that fits as well and generalises worse, unless it is regularised"
    duration: ClassVar[str] = "1 to 2 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms", "gg.hessian_trace", "gg.ggn_trace", "gg.top_eigenvalue")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 4}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 10, "train_images": 50_000, "test_share": 0.2}
    needs: ClassVar[str] = "ResNets on CIFAR-10, CIFAR-100, CINIC-10 and Restricted ImageNet, 350 epochs each: a GPU for days"

    ARMS: ClassVar[tuple[str, ...]] = ("random start", "bad start", "random start, regularised", "bad start, regularised")

    num_seeds: int = 8
    """How many seeds; each is another split of the images, start, random labels and order of batches."""
    width: int = 128
    """Units in each of the two hidden layers, ReLU."""
    batch: int = 64
    """Images in a step."""
    copies: int = 3
    """Stage 1: copies of the training images, each with labels of its own."""
    zeroed: float = 0.1
    """Stage 1: share of the pixels that are zeroed in a copy."""
    confuse_lr: float = 0.05
    """Stage 1: learning rate, with momentum 0.9."""
    confuse_epochs: int = 300
    """Stage 1: epochs at most; it stops where it has fitted 99.9 % of the random labels."""
    lr: float = 0.1
    """Stage 2: learning rate of plain SGD."""
    epochs: int = 300
    """Stage 2: epochs of plain SGD at most."""
    target: float = 0.005
    """Stage 2: the training loss at which plain SGD stops."""
    regularised_lr: float = 0.05
    """Regularised: learning rate, with momentum 0.9, down to 0 along a cosine."""
    regularised_epochs: int = 100
    """Regularised: epochs."""
    weight_decay: float = 5e-3
    """Regularised: weight decay. lr / (1 - 0.9) * decay * steps / 2 is then 1.8: what is left of the start is e^-1.8 of it."""
    probes: int = 16
    """Hessian-vector products for a trace."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *super().rules(),
            *self.at_least(1, "width", "batch", "copies", "confuse_epochs", "epochs", "regularised_epochs"),
            *self.positive("confuse_lr", "lr", "target", "regularised_lr"),
            ("zeroed", 0 <= self.zeroed < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            *self.at_least(2, "probes"),
        ]

    def confused(self, model: nn.Module, x: Tensor, classes: int, seed: int, between: Callable[[], None]) -> float:
        """Stage 1, in place; the share of the random labels that it ends with."""
        rng = philox(seed, 1 << 32)
        inputs = torch.cat([x * torch.from_numpy(rng.random(x.shape) >= self.zeroed).to(x.device) for _ in range(self.copies)])
        labels = torch.from_numpy(rng.integers(0, classes, len(inputs))).to(x.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.confuse_lr, momentum=0.9)
        batch, share = min(self.batch, len(inputs)), 0.0
        for step in fit(model, optimizer, inputs, labels, seed=seed, epochs=self.confuse_epochs, batch=batch, between=between):
            if step % (5 * (len(inputs) // batch)) == 0:
                share = accuracy(model, inputs, labels)
                if share >= 0.999:
                    break
        return share

    def trained(self, start: nn.Module, x: Tensor, y: Tensor, seed: int, regularised: bool, between: Callable[[], None]) -> tuple[nn.Module, float]:
        """Stage 2: the network, and after how many epochs."""
        model, batch = copy.deepcopy(start), min(self.batch, len(y))
        per_epoch = len(y) // batch
        if not regularised:
            plain = torch.optim.SGD(model.parameters(), lr=self.lr)
            for step in fit(model, plain, x, y, seed=seed, epochs=self.epochs, batch=batch, between=between):
                if step % LOOK == 0:
                    with torch.no_grad():
                        logits = model(x)
                    if cross_entropy(logits, y) <= self.target and bool((logits.argmax(1) == y).all()):
                        return model, step / per_epoch
            return model, float(self.epochs)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.regularised_lr, momentum=0.9, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.regularised_epochs * per_epoch)

        def loss(step: int, images: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(model(shifted(images, seed, step)), labels)

        for _ in fit(model, optimizer, x, y, seed=seed, epochs=self.regularised_epochs, batch=batch, between=between, loss=loss):
            schedule.step()
        return model, float(self.regularised_epochs)

    def measure(self, model: nn.Sequential, data: Split, clock: Clock) -> dict[str, float]:
        with clock:
            norms = gg.sqnorms(model, cross_entropy, data.x, data.y)
            test_norms = gg.sqnorms(model, cross_entropy, data.test_x, data.test_y)
            trace = gg.hessian_trace(model, cross_entropy, data.x, data.y, method="hvp", probes=self.probes)
            gauss_newton = gg.ggn_trace(model, "cross_entropy", data.x, data.y)
            eigenvalue = float(gg.top_eigenvalue(model, cross_entropy, data.x, data.y, tol=1e-2))
        with torch.no_grad():
            loss = cross_entropy(model(data.x), data.y).item()
        return {
            "loss": loss,
            "train_accuracy": accuracy(model, data.x, data.y),
            "accuracy": accuracy(model, data.test_x, data.test_y),
            "sqnorm": norms.mean().item(),
            "test_sqnorm": test_norms.mean().item(),
            "trace": trace.mean,
            "trace_stderr": trace.stderr,
            "ggn_trace": gauss_newton.mean,
            "eigenvalue": eigenvalue,
            "log_trace": math.log(gauss_newton.mean),
            "log_eigenvalue": math.log(max(eigenvalue, 1e-300)),
            "log_path_norm": math.log(path_norm(model)),
        }

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        splits = self.splits(device, self.batch)

        def network(seed: int) -> nn.Sequential:
            data = splits(seed)
            model = built(seed, lambda: perceptron([math.prod(data.shape), self.width, self.width, data.classes]), device)
            assert isinstance(model, nn.Sequential)
            return model

        @functools.lru_cache(maxsize=1)
        def bad(seed: int) -> tuple[nn.Sequential, float]:
            model = network(seed)
            return model, self.confused(model, splits(seed).x, splits(seed).classes, seed, lambda: None)

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            data = splits(seed)
            begun, fitted = bad(seed) if arm.startswith("bad") else (network(seed), math.nan)
            model, epochs = self.trained(begun, data.x, data.y, seed, arm.endswith("regularised"), between)
            assert isinstance(model, nn.Sequential)
            with torch.no_grad():
                moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(model.parameters(), begun.parameters(), strict=True)))
                away = math.sqrt(sum(p.square().sum().item() for p in begun.parameters()))
            return [{"random_labels_fitted": fitted, "epochs": epochs, "moved_by": moved / away, **self.measure(model, data, clock)}]

        return GridRun([(arm, seed) for seed in self.seeds for arm in self.ARMS], work)

    def claims(self) -> list[Claim]:
        ours, theirs = "bad start", "random start"
        return [
            Claim("plain SGD fits every training image from the bad start", ours, "train_accuracy", "==", 1.0),
            Claim("and from the random start", theirs, "train_accuracy", "==", 1.0),
            MeanClaim("from the bad start, it reads at least 5 points fewer of the test images", ours, "accuracy", "<=", -0.05, versus=theirs),
            MeanClaim(
                "with momentum, weight decay and shifted images, the bad start costs less than a point",
                f"{ours}, regularised",
                "accuracy",
                ">=",
                -0.01,
                versus=f"{theirs}, regularised",
            ),
            MeanClaim("at one training loss the bad minimum has the larger Gauss-Newton trace", ours, "log_trace", ">=", 0.0, versus=theirs),
            MeanClaim(
                "and the larger top eigenvalue",
                ours,
                "log_eigenvalue",
                ">=",
                0.0,
                versus=theirs,
                remark="Where it fails: what fits random labels curves the loss a little in many directions, plain training much in a few.",
            ),
            MeanClaim("and the larger path norm", ours, "log_path_norm", ">=", 0.0, versus=theirs),
        ]

    def toy(self, bad: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same in the plane, for the picture: 40 points (40, 2) of two half-moons, their labels (40,), and what the network says on a grid (200, 200)."""
        from sklearn.datasets import make_moons  # type: ignore[import-untyped]

        points, labels = make_moons(40, noise=0.08, random_state=self.seed)
        x, y = torch.from_numpy(points - points.mean(0)).to(DTYPE), torch.from_numpy(labels)
        model = built(self.seed, lambda: perceptron([2, 64, 64, 2]), torch.device("cpu"))
        if bad:
            rng = philox(self.seed, 3 << 32)
            inputs, targets = torch.from_numpy(rng.uniform(-2, 2, (150, 2))), torch.from_numpy(rng.integers(0, 2, 150))
            optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
            for _ in fit(model, optimizer, inputs, targets, seed=self.seed, epochs=1500, batch=150, between=lambda: None):
                pass
        plain = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in fit(model, plain, x, y, seed=self.seed, epochs=3000, batch=40, between=lambda: None):
            if cross_entropy(model(x), y) <= 0.02:
                break
        side = torch.linspace(-2, 2, 200, dtype=DTYPE)
        with torch.no_grad():
            said = model(torch.cartesian_prod(side, side)).softmax(1)[:, 1].view(200, 200).T
        return x.numpy(), labels, said.numpy()

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4), layout="constrained")
        axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.1, 1.2))
        for ax, bad in zip(axes, (False, True)):
            points, labels, said = self.toy(bad)
            ax.contourf(np.linspace(-2, 2, 200), np.linspace(-2, 2, 200), said, levels=(0, 0.5, 1), colors=("#f3d3c6", "#c8e0ea"))
            for label, colour in enumerate((RED, BLUE)):
                ax.plot(*points[labels == label].T, "o", color=colour, ms=4)
            ax.set(title=f"40 points in the plane,\n{'bad' if bad else 'random'} start", xlabel="x₁", ylabel="x₂", aspect="equal")
        frame, colours = outcome.metrics, dict(zip(self.ARMS, (GREY, RED, "#b5b5b5", BLUE), strict=True))
        for place, arm in enumerate(self.ARMS):
            values = frame[frame["arm"] == arm]["accuracy"]
            axes[2].plot([place] * len(values), values, "o", color=colours[arm], ms=5, alpha=0.7, mew=0)
            axes[2].text(place, values.mean(), f"   {values.mean():.1%}", va="center", fontsize=9)
        axes[2].set_xticks(range(4), ["random\nstart", "bad\nstart", "random,\nregular-\nised", "bad,\nregular-\nised"], fontsize=8)
        axes[2].set(ylabel="test accuracy", xlim=(-0.4, 3.9), title="Digits" if self.data == "digits" else "Images")
        self._ratios(axes[3], frame)
        found = all(v.holds for v in outcome.verdicts[:4])
        figure.suptitle(
            "From a bad start SGD fits as well and generalises worse; regularised, it forgets the start" if found else "Two starts, two ways to train"
        )
        return figure

    def _ratios(self, ax: Axes, frame: Any) -> None:
        """What the bad minimum has, relative to the other one of its seed."""
        columns = {
            "accuracy": "test accuracy",
            "sqnorm": "mean ‖gᵢ‖², training",
            "test_sqnorm": "mean ‖gᵢ‖², test",
            "ggn_trace": "Gauss-Newton trace",
            "trace": "Hessian trace",
            "eigenvalue": "top eigenvalue",
        }
        by_arm = {arm: frame[frame["arm"] == arm].set_index("seed") for arm in self.ARMS[:2]}
        ratios = {label: by_arm["bad start"][column] / by_arm["random start"][column] for column, label in columns.items()}
        ratios["path norm"] = np.exp(by_arm["bad start"]["log_path_norm"] - by_arm["random start"]["log_path_norm"])
        for place, values in enumerate(ratios.values()):
            ax.plot(values, [-place] * len(values), "o", color=RED, ms=5, alpha=0.7, mew=0)
        ax.axvline(1, color="black", lw=0.8, ls=":")
        ax.set_yticks([-place for place in range(len(ratios))], list(ratios))
        ax.set(xscale="log", xlabel="bad start / random start", title="At one training loss")


# --------------------------------------------------------------------------------------------------------------------------------------- DIA unit


class _Unit(nn.Module):
    """The LSTM cell that all layers share: ``h, c -> sigmoid(o) sigmoid(c')``, with a bottleneck to a quarter of the width before the gates."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def gates() -> nn.Module:
            return nn.Sequential(nn.Linear(width, max(width // 4, 1)), nn.ReLU(), nn.Linear(max(width // 4, 1), 4 * width))

        self.of_input, self.of_state = gates(), gates()

    def forward(self, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # each (n, width)
        entered, forgotten, candidate, out = (self.of_input(a) + self.of_state(h)).chunk(4, 1)
        c = forgotten.sigmoid() * c + entered.sigmoid() * candidate.tanh()
        return out.sigmoid() * c.sigmoid(), c


class _Deep(nn.Module):
    """Stem, ``depth`` layers of one width, output. A layer is ``x <- relu(skip x + a * h)``, ``a = norm(W x)``; without unit, h = 1."""

    def __init__(self, inputs: int, width: int, depth: int, classes: int, skips: bool, normalised: bool, unit: bool) -> None:
        super().__init__()
        self.skips = skips
        self.stem, self.head = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if normalised else nn.Identity() for _ in range(depth))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.unit = _Unit(width) if unit else None  # last, so that the other weights are drawn alike

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1)).relu()
        h = c = torch.zeros_like(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            a = norm(layer(x))
            if self.unit is not None:
                h, c = self.unit(a, h, c)
                a = a * h
            x = (x + a if self.skips else a).relu()
        return self.head(x)


@dataclass(frozen=True)
class SharedAttention(ImageSetting):
    """A deep perceptron, with and without the unit of the paper: one LSTM cell, the same for all layers, reads each layer's features ``a`` and gives factors
    h in (0, 1) that rescale them; its state runs through the layers. The cell is that of the authors' code: sigmoid where an LSTM has tanh at its output,
    and both of its inputs through a bottleneck of a quarter of the width. A layer is ``x <- relu(x + a h)``, ``a = batchnorm(W x)``. The paper pools a channel
    over positions before the cell; a perceptron's features have one position.

    Three bodies: whole, without skip connections, without batch normalisation; each plain and with the unit, from the same weights. The abstract claims a
    better accuracy, and that the unit stabilises training where skips or normalisation are removed. Stable is read as: the final test accuracy, and how
    evenly the samples' gradients are spread over depth, ``max_l s_l / min_l s_l`` with ``s_l = mean_i ||g_i^(l)||^2`` of the weights of layer l at the start
    of training (in evaluation mode, where statistics of a batch couple no samples), as its logarithm. Each body's learning rate is the same for both. The
    Hessian's trace at the end is written down beside it; no claim is about it.
    """

    name: ClassVar[str] = "minima/dia-unit"
    title: ClassVar[str] = "DIANet: dense-and-implicit attention network"
    paper: ClassVar[str] = "Huang, Liang, Liang, Yang (AAAI 2020)"
    summary: ClassVar[str] = "digits: one LSTM cell shared by all layers rescales their features, with and without skips and normalisation"
    duration: ClassVar[str] = "3 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms", "gg.hessian_trace")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 3, "epochs": 12}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 5, "depth": 54, "width": 64, "epochs": 40, "train_images": 50_000}
    needs: ClassVar[str] = "ResNet-164 and its kin on CIFAR-100, 164 epochs: a GPU for days"

    BODIES: ClassVar[tuple[str, ...]] = ("whole", "no skips", "no normalisation")
    UNITS: ClassVar[tuple[str, ...]] = ("plain", "DIA")

    num_seeds: int = 6
    """How many seeds; each is another split of the images, start and order of batches."""
    width: int = 32
    """Units in each layer."""
    depth: int = 24
    """Layers between the first and the last."""
    batch: int = 64
    """Images in a step."""
    epochs: int = 20
    """Epochs."""
    lr: float = 0.05
    """Learning rate of SGD with momentum 0.9, down to 0 along a cosine."""
    probes: int = 8
    """Hessian-vector products for the trace."""

    def rules(self) -> list[tuple[str, bool, str]]:
        rules = [*super().rules(), *self.at_least(1, "width", "epochs"), *self.positive("lr")]
        return [*rules, *self.at_least(2, "batch", "depth", "probes")]

    def network(self, arm: str, data: Split, seed: int, device: torch.device) -> _Deep:
        body, unit = arm.split(", ")
        size = (math.prod(data.shape), self.width, self.depth, data.classes)
        model = built(seed, lambda: _Deep(*size, body != "no skips", body != "no normalisation", unit == "DIA"), device)
        assert isinstance(model, _Deep)
        return model

    def by_layer(self, model: _Deep, data: Split, clock: Clock) -> np.ndarray:
        """``s_l``, the mean squared norm of the samples' gradients of each layer's weights, (depth,); batch statistics are those of all images."""
        model = copy.deepcopy(model)
        update_bn([data.x], model)
        model.eval()
        with clock:
            norms = gg.sqnorms(model, cross_entropy, data.x, data.y, by_param=True)
        return np.array([norms[f"layers.{k}.weight"].mean().item() for k in range(self.depth)])

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        splits = self.splits(device, self.batch)

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            data = splits(seed)
            model = self.network(arm, data, seed, device)
            begun = self.by_layer(model, data, clock)
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * (len(data.y) // self.batch))
            losses = []
            for step in fit(model, optimizer, data.x, data.y, seed=seed, epochs=self.epochs, batch=self.batch, between=between):
                schedule.step()
                if step % (len(data.y) // self.batch) == 0:
                    model.eval()
                    with torch.no_grad():
                        losses.append(cross_entropy(model(data.x), data.y).item())
            ended = self.by_layer(model, data, clock)
            trace = math.nan  # of a loss that is not finite
            if math.isfinite(losses[-1]):
                with clock:
                    trace = gg.hessian_trace(model, cross_entropy, data.x, data.y, method="hvp", probes=self.probes).mean
            rises = [max(b - a, 0.0) for a, b in itertools.pairwise(losses)]
            row = {
                "loss": losses[-1],
                "rises": float(np.sum(rises)),
                "accuracy": accuracy(model, data.test_x, data.test_y),
                "trace": trace,
                "log_spread": _log_spread(begun),
                "log_spread_end": _log_spread(ended),
            }
            return [{**row, "layer": k + 1, "sqnorm_start": float(begun[k]), "sqnorm_end": float(ended[k])} for k in range(self.depth)]

        return GridRun([(f"{body}, {unit}", seed) for seed in self.seeds for body in self.BODIES for unit in self.UNITS], work)

    def claims(self) -> list[Claim]:
        def ahead(body: str, text: str, remark: str = "") -> Claim:
            return MeanClaim(text, f"{body}, DIA", "accuracy", ">=", 0.0, versus=f"{body}, plain", remark=remark)

        def even(body: str, text: str, remark: str = "") -> Claim:
            return MeanClaim(text, f"{body}, DIA", "log_spread", "<=", 0.0, versus=f"{body}, plain", remark=remark)

        slower = (
            "Where it fails: batch normalisation undoes the factors' size, but not what differs between samples, and there is no way around a layer. "
            "With twelve layers and 15 epochs the unit was behind as well: 90 and 72 % against 93 and 95 % (seeds 1000 and 1001)."
        )
        level = "Where it fails: the plain network's gradients are as even, but far larger; their size is what the unit mends, which is not asked about here."
        return [
            ahead("whole", "the unit reads no fewer test images"),
            ahead("no skips", "nor without skip connections", slower),
            ahead("no normalisation", "nor without normalisation"),
            Claim("without normalisation, training with the unit ends at a loss of 0.5 at most", "no normalisation, DIA", "loss", "<=", 0.5),
            even("no normalisation", "without normalisation, gradients are spread over depth more evenly with the unit, at the start", level),
            even("no skips", "and without skip connections"),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4), layout="constrained")
        *axes, right = figure.subplots(1, 4)
        frame, colours = outcome.metrics, dict(zip(self.UNITS, (GREY, BLUE), strict=True))
        last = frame.drop_duplicates(["arm", "seed"], keep="last")
        for place, (ax, body) in enumerate(zip(axes, self.BODIES, strict=True)):
            for shift, (unit, colour) in zip((-0.12, 0.12), colours.items(), strict=True):
                rows = frame[frame["arm"] == f"{body}, {unit}"]
                for _, curve in rows.groupby("seed"):
                    ax.plot(curve["layer"], curve["sqnorm_start"], color=colour, lw=1.2, alpha=0.7)
                ax.plot([], [], color=colour, label=unit)
                values = last[last["arm"] == f"{body}, {unit}"]["accuracy"]
                right.plot([place + shift] * len(values), values, "o", color=colour, ms=5, alpha=0.7, mew=0)
            ax.set(yscale="log", xlabel="layer", ylabel="mean ‖gᵢ‖² of the layer's weights, at the start", title=body.capitalize())
        axes[0].legend(frameon=False)
        right.set_xticks(range(len(self.BODIES)), [body.replace("no ", "no\n") for body in self.BODIES])
        right.set(ylabel="test accuracy after training", ylim=(0, 1.02))
        return figure


def _log_spread(norms: np.ndarray) -> float:
    """``log(max / min)``, infinite where a layer gets no gradient."""
    return float(np.log(norms.max() / norms.min())) if norms.min() > 0 else math.inf
