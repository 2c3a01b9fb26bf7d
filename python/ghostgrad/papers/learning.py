"""Penalties that steer what a network keeps: of tasks it has learnt before, and of its weights.

J. S. Smith, J. Tian, S. Halbe, Y.-C. Hsu, Z. Kira, "A closer look at rehearsal-free continual learning", CVPR Workshops 2023; and K. Bui, F. Park, S. Zhang,
Y. Qi, J. Xin, "Structured sparsity of convolutional neural networks via nonconvex sparse group regularization", Frontiers in Applied Mathematics and
Statistics 2021.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

import ghostgrad as gg

from ..training import Claim, Clock, GridRun, MeanClaim, Outcome
from .figures import BLUE, GREEN, GREY, OCHRE, RED
from .image_setting import DTYPE, ImageSetting, Split, accuracy, built, fit, perceptron
from .images import ImageDataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PROX", "RehearsalFree", "SparseGroupLasso", "prox_l0", "prox_l1", "prox_l1_minus_l2", "prox_transformed_l1"]

# ------------------------------------------------------------------------------------------------------------------------------- continual learning

# lambda of each penalty: the best of several on seeds 1000 to 1004
LAMBDAS = {
    "pretrained": {"none": 0.0, "L2": 0.05, "EWC": 300.0, "prediction distillation": 0.1, "feature distillation": 0.001},
    "from scratch": {"none": 0.0, "L2": 0.2, "EWC": 1000.0, "prediction distillation": 0.3, "feature distillation": 0.003},
}
STARTS, PENALTIES = tuple(LAMBDAS), tuple(LAMBDAS["pretrained"])


def _own_classes(logits: Tensor, labels: Tensor, first: int, count: int) -> Tensor:
    """Every class of the task against its own sigmoid, (n,): the outputs of other tasks have no part in it."""
    targets = one_hot(labels - first, count).to(logits.dtype)
    return binary_cross_entropy_with_logits(logits[:, first : first + count], targets, reduction="none").sum(1)


@dataclass(frozen=True)
class _Past:
    """What a task knows of those before it."""

    classes: int  # seen before
    network: nn.Sequential
    theta: dict[str, Tensor]  # its parameters
    fisher: dict[str, Tensor]

    def penalty(self, name: str, model: nn.Sequential, x: Tensor, logits: Tensor) -> Tensor:
        """Of the batch x, without its lambda."""
        if name in ("L2", "EWC"):
            squares = {key: (p - self.theta[key]).square() for key, p in model.named_parameters()}
            return 0.5 * torch.stack([(square if name == "L2" else self.fisher[key] * square).sum() for key, square in squares.items()]).sum()
        with torch.no_grad():
            target = self.network[:-1](x) if name == "feature distillation" else self.network(x)[:, : self.classes].sigmoid()
        if name == "feature distillation":
            return (model[:-1](x) - target).square().sum(1).mean()
        return binary_cross_entropy_with_logits(logits[:, : self.classes], target, reduction="none").sum(1).mean()


@dataclass(frozen=True)
class RehearsalFree(ImageSetting):
    """Two classes at a time, none of their images kept, and in the end all classes are told apart. The loss of task t is that of its own classes, each with
    a sigmoid of its own, plus a penalty for leaving ``theta*``, what the task before ended with:

    - L2: ``(lambda / 2) |theta - theta*|^2``.
    - EWC (Kirkpatrick et al., PNAS 2017): ``(lambda / 2) sum_j F_j (theta_j - theta*_j)^2``, F the sum over past tasks of ``(1/n) sum_i g_i^2`` at the task's
      end, with the images' own labels (the empirical Fisher matrix's diagonal): ``gg.second_moments``. Summed over the parameters it is the mean squared
      norm of the samples' gradients, ``sum_j sum_i g_ij^2 = sum_i ||g_i||^2``, which ``gg.sqnorms`` computes without them.
    - Prediction distillation: lambda times the cross-entropy of the old classes' sigmoids against those of the network before the task, on the task's images.
    - Feature distillation: lambda times the squared change of the last hidden layer on these images.

    The paper starts from networks pretrained on ImageNet and finds L2 ahead of EWC and of feature distillation, and that penalties on parameters do not fail
    without pretraining either. Here the pretrained start comes from the same images turned by a quarter to each side and mirrored both ways, 4 views with
    labels of their own (40 for digits), whose output layer is then thrown away. Two of the paper's circumstances are missing: pretraining is small, and
    there is no ViT. The loss over a task's own classes is a choice made here: with sigmoids that also push the classes of the past down, every one of these
    penalties forgot all but the last task, on the seeds tried.

    Each lambda is the best of two to four for its start, by final accuracy on seeds 1000 to 1004, which the run does not use; learning rate and epochs are
    the better of two without a penalty. EWC was ahead of L2 there already, by a point: 71.4 % against 70.5 %, feature distillation 70.9 %, none 69.9 %.
    """

    name: ClassVar[str] = "learning/rehearsal-free"
    title: ClassVar[str] = "A closer look at rehearsal-free continual learning"
    paper: ClassVar[str] = "Smith, Tian, Halbe, Hsu, Kira (CVPR Workshops 2023)"
    summary: ClassVar[str] = "digits two classes at a time: what L2, EWC and distillation keep of the classes learnt before"
    duration: ClassVar[str] = "1 to 2 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.second_moments", "gg.sqnorms")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 8}
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 20, "train_images": 50_000}
    needs: ClassVar[str] = "ResNet-18 and ViT-B/16 pretrained on ImageNet, on CIFAR-100 and ImageNet-R: a GPU for days"

    num_seeds: int = 20
    """How many seeds; each is another split of the images, start and order of batches."""
    width: int = 64
    """Units in each of the two hidden layers, ReLU."""
    task_classes: int = 2
    """Classes in a task."""
    batch: int = 32
    """Images in a step."""
    lr: float = 0.01
    """Learning rate of SGD with momentum 0.9, at the start of every task anew."""
    epochs: int = 8
    """Epochs of a task."""
    pretrain_lr: float = 0.05
    """Learning rate of the pretraining, with momentum 0.9."""
    pretrain_epochs: int = 15
    """Epochs of the pretraining."""
    strength: float = 1.0
    """Times every lambda, of the table at the top of the module."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *super().rules(),
            *self.at_least(1, "width", "task_classes", "batch", "epochs", "pretrain_epochs"),
            *self.positive("lr", "pretrain_lr"),
            ("strength", 0 <= self.strength < math.inf, "at least 0 and finite"),
        ]

    def network(self, seed: int, data: Split, outputs: int, device: torch.device) -> nn.Sequential:
        model = built(seed, lambda: perceptron([math.prod(data.shape), self.width, self.width, outputs]), device)
        assert isinstance(model, nn.Sequential)
        return model

    def pretrained(self, seed: int, data: Split, device: torch.device) -> nn.Sequential:
        """Trained on turned and mirrored images, with a new output layer."""
        views = [data.x.flip(3), data.x.flip(2)]
        if data.shape[1] == data.shape[2]:
            views += [data.x.rot90(1, (2, 3)), data.x.rot90(-1, (2, 3))]
        labels = torch.cat([data.y + data.classes * k for k in range(len(views))])
        model = self.network(seed, data, data.classes * len(views), device)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.pretrain_lr, momentum=0.9)
        for _ in fit(model, optimizer, torch.cat(views), labels, seed=seed, epochs=self.pretrain_epochs, batch=2 * self.batch, between=lambda: None):
            pass
        model[-1] = self.network(seed + 1, data, data.classes, device)[-1]
        return model

    def learn(
        self,
        model: nn.Sequential,
        penalty: str,
        strength: float,  # its lambda
        seed: int,
        data: Split,
        clock: Clock,
        between: Callable[[], None],
    ) -> list[dict[str, float]]:
        """All tasks, one after the other; a row after each."""
        firsts = range(0, data.classes, self.task_classes)
        fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        before, theta = model, {name: p.detach().clone() for name, p in model.named_parameters()}
        best: list[float] = []
        rows = []
        for task, first in enumerate(firsts):
            count = min(self.task_classes, data.classes - first)
            own = data.only(range(first, first + count))

            past = _Past(first, before, theta, fisher)

            def loss(step: int, x: Tensor, y: Tensor, past: _Past = past, count: int = count) -> Tensor:
                logits = model(x)
                fitted = _own_classes(logits, y, past.classes, count).mean()
                return fitted + strength * past.penalty(penalty, model, x, logits) if past.classes and strength else fitted

            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
            key, batch = seed * len(firsts) + task, min(self.batch, len(own.y))
            for _ in fit(model, optimizer, own.x, own.y, seed=key, epochs=self.epochs, batch=batch, between=between, loss=loss):
                pass
            with clock:
                task_loss = functools.partial(_own_classes, first=first, count=count)
                moments = gg.second_moments(model, task_loss, own.x, own.y, reduction="sum")
                norms = gg.sqnorms(model, task_loss, own.x, own.y, reduction="sum").sum().item()
            total = sum(m.sum().item() for m in moments.values())
            fisher = {name: f + moments[name] / len(own.y) for name, f in fisher.items()}
            before, theta = copy.deepcopy(model), {name: p.detach().clone() for name, p in model.named_parameters()}
            with torch.no_grad():
                by_task = [self.accuracy_among(model, data.only(range(k, k + self.task_classes)), first + count) for k in firsts[: task + 1]]
            best = [max(a, b) for a, b in zip(by_task, [*best, 0.0], strict=True)]
            forgotten = sum(b - a for a, b in zip(by_task[:-1], best[:-1], strict=True)) / max(task, 1)
            now = {"classes": first + count, "accuracy": sum(by_task) / len(by_task), "newest": by_task[-1], "forgetting": forgotten}
            mismatch = abs(total / norms - 1) if norms > 0 else total  # a last class alone can be fitted until no gradient is left
            rows.append({**now, "mean_sqnorm": norms / len(own.y), "fisher_trace": total / len(own.y), "mismatch": mismatch})
        return rows

    @staticmethod
    def accuracy_among(model: nn.Module, data: Split, classes: int) -> float:
        """On the test images, against all classes that have been seen."""
        return (model(data.test_x)[:, :classes].argmax(1) == data.test_y).double().mean().item()

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        splits = self.splits(device, self.batch)
        pretrained = functools.lru_cache(maxsize=1)(lambda seed: self.pretrained(seed, splits(seed), device))

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            origin, penalty = arm.split(", ")
            data = splits(seed)
            if without := set(range(data.classes)) - set(data.y.tolist()):
                found = f"among {len(data.y)} there is none of class {min(without)}"
                raise ImageDataError(Path(self.data), "every class is to have training images", found, "Give a larger --train-images.")
            model = copy.deepcopy(pretrained(seed)) if origin == "pretrained" else self.network(seed, data, data.classes, device)
            return self.learn(model, penalty, self.strength * LAMBDAS[origin][penalty], seed, data, clock, between)

        return GridRun([(f"{origin}, {penalty}", seed) for seed in self.seeds for origin in STARTS for penalty in PENALTIES], work)

    def claims(self) -> list[Claim]:
        def ahead(text: str, origin: str, ours: str, theirs: str, remark: str = "") -> Claim:
            return MeanClaim(text, f"{origin}, {ours}", "accuracy", ">=", 0.0, versus=f"{origin}, {theirs}", remark=remark)

        pretrained, scratch = STARTS
        small = (
            "In a run of 20 seeds the arms were within a point: little is forgotten at this learning rate, and what a penalty keeps of old classes "
            "the newest ones pay."
        )
        return [
            ahead("pretrained: L2 reads no fewer test images in the end than EWC", pretrained, "L2", "EWC", small),
            ahead("pretrained: nor than feature distillation", pretrained, "L2", "feature distillation", small),
            ahead("pretrained: L2 is ahead of no penalty", pretrained, "L2", "none", small),
            ahead("pretrained: EWC is ahead of no penalty", pretrained, "EWC", "none", small),
            MeanClaim("pretrained: L2 forgets less than no penalty", f"{pretrained}, L2", "forgetting", "<=", 0.0, versus=f"{pretrained}, none"),
            ahead("from scratch: L2 is ahead of no penalty", scratch, "L2", "none"),
            ahead("from scratch: EWC is ahead of no penalty", scratch, "EWC", "none"),
            Claim(
                "EWC's Fisher diagonal sums to the mean squared norm of the samples' gradients, to rounding",
                f"{pretrained}, EWC",
                "mismatch",
                "<=",
                1e-12,
                formula="Σⱼ Σᵢ gᵢⱼ² = Σᵢ ‖gᵢ‖²",
                remark="An identity: it checks the two calls against each other.",
            ),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.4), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=(1, 1, 1))
        frame, colours = outcome.metrics, dict(zip(PENALTIES, (GREY, BLUE, RED, OCHRE, GREEN), strict=True))
        for ax, origin in zip(axes, STARTS):
            for penalty, colour in colours.items():
                means = frame[frame["arm"] == f"{origin}, {penalty}"].groupby("classes")["accuracy"].mean()
                ax.plot(means.index, means, "o-", color=colour, ms=4, label=penalty)
            ax.set(xlabel="classes seen", ylabel="test accuracy among them, mean over seeds", title=origin.capitalize(), ylim=(0, 1.02))
        axes[0].legend(frameon=False, fontsize=8, loc="lower left")
        last = frame.drop_duplicates(["arm", "seed"], keep="last")
        for penalty, colour in colours.items():
            rows = last[last["arm"] == f"pretrained, {penalty}"]
            axes[2].plot(rows["forgetting"], rows["accuracy"], "o", color=colour, ms=4, alpha=0.4, mew=0)
            axes[2].plot([rows["forgetting"].mean()], [rows["accuracy"].mean()], "o", color=colour, ms=9)
        axes[2].set(xlabel="forgetting", ylabel="final test accuracy", title="Pretrained: every seed, and the mean")
        return figure


# ------------------------------------------------------------------------------------------------------------------------------ sparse group lasso


def prox_l1(w: Tensor, mu: float) -> Tensor:
    """``argmin_v (1/2)|v - w|^2 + mu |v|_1``: soft thresholding."""
    return w.sign() * (w.abs() - mu).clamp(min=0)


def prox_l0(w: Tensor, mu: float) -> Tensor:
    """``argmin_v (1/2)|v - w|^2 + mu |v|_0``: keeping w costs mu, dropping it w^2 / 2, so what is above ``sqrt(2 mu)`` stays."""
    return w * (w.abs() > math.sqrt(2 * mu))


def prox_transformed_l1(w: Tensor, mu: float, a: float = 1.0) -> Tensor:
    """``argmin_v (1/2)|v - w|^2 + mu sum_i (a + 1)|v_i| / (a + |v_i|)`` (Zhang, Xin, "Minimization of transformed l1 penalty", 2017).

    For v > 0 it is stationary where ``(w - v)(a + v)^2 = mu a (a + 1)``. With ``s = a + v`` and ``c = a + w`` this is ``s^3 - c s^2 + mu a (a + 1) = 0``,
    whose largest root is ``s = (c/3)(1 + 2 cos(phi/3))``, ``phi = arccos(1 - 27 mu a (a + 1) / (2 c^3))``. Zero is better up to a threshold: where the root
    reaches v = 0 continuously, ``mu (a + 1) / a``, if ``mu <= a^2 / (2 (a + 1))``, else where both cost the same, ``sqrt(2 mu (a + 1)) - a / 2``.
    """
    threshold = mu * (a + 1) / a if mu <= a**2 / (2 * (a + 1)) else math.sqrt(2 * mu * (a + 1)) - a / 2
    c = a + w.abs()
    phi = (1 - 13.5 * mu * a * (a + 1) / c**3).clamp(-1, 1).arccos()
    return torch.where(w.abs() > threshold, w.sign() * (c / 3 * (1 + 2 * (phi / 3).cos()) - a), torch.zeros_like(w))


def prox_l1_minus_l2(w: Tensor, mu: float) -> Tensor:
    """``argmin_v (1/2)|v - w|^2 + mu (|v|_1 - |v|_2)`` of the whole tensor (Lou, Yan, "Fast L1-L2 minimization via a proximal operator", 2018).

    Where v has the signs of w, stationary: ``v (1 - mu / |v|) = soft(w, mu) = z``, so ``v = z (|z| + mu) / |z|``. If z = 0, one entry alone has no penalty, and
    the largest stays as it is.
    """
    z = prox_l1(w, mu)
    size = z.norm()
    if size > 0:
        return z * (1 + mu / size)
    largest = torch.zeros_like(w).flatten()
    place = w.abs().argmax()
    largest[place] = w.flatten()[place]
    return largest.view_as(w)


PROX: dict[str, Callable[[Tensor, float], Tensor]] = {"l1": prox_l1, "l0": prox_l0, "transformed l1": prox_transformed_l1, "l1 - l2": prox_l1_minus_l2}


@dataclass(frozen=True)
class SparseGroupLasso(ImageSetting):
    """Weights and whole neurons are driven to zero: ``loss(W) + lambda sum_g sqrt(n_g) |W_g|_2 + lambda r(W)``, r one of the l1 norm, the number of nonzero
    weights, the transformed l1 ``sum (a+1)|w| / (a+|w|)`` with a = 1, and ``|W|_1 - |W|_2`` of a layer. Split: ``loss(W) + lambda sum_g sqrt(n_g) |W_g|_2 +
    lambda r(V) + (beta/2)|W - V|^2``. A step of Adam in W, then the minimum in V, which is exact: the proximal map of ``(lambda / beta) r``. beta grows by 1.25
    four times. A group is what one unit, or one pixel, feeds forward (n_g weights), as in the authors' code for dense layers.

    Judged is the network with the weights V, which have exact zeros. Penalties of one lambda are not of one strength, so they are compared where they cost
    alike: each is trained with ``lambdas`` values of lambda, and its columns are interpolated, linearly in the logarithm of the training loss, to the
    loss ``target``; claimed is that the test accuracy there is within a point, too. (Picking the sparsest lambda by the accuracy on some hundred
    images instead left the sparsity uncertain by 0.3 over four seeds.)

    Per-sample norms, and what of them falls on zeroed groups, are written down beside it; no claim is about them.

    The paper trains LeNet-5 and residual networks on MNIST, CIFAR-10 and CIFAR-100 and also has SCAD; here it is a perceptron, beta belongs to the mean
    loss, not to the sum.
    """

    name: ClassVar[str] = "learning/sparse-group-lasso"
    title: ClassVar[str] = "Structured sparsity of convolutional neural networks via nonconvex sparse group regularization"
    paper: ClassVar[str] = "Bui, Park, Zhang, Qi, Xin (Frontiers in Applied Mathematics and Statistics 2021)"
    summary: ClassVar[str] = "digits: how many weights and neurons nonconvex penalties zero, against l1 at the same training loss"
    duration: ClassVar[str] = "2 to 3 minutes"
    ops: ClassVar[tuple[str, ...]] = ("gg.sqnorms", "gg.second_moments")
    SMALL: ClassVar[dict[str, Any]] = {"num_seeds": 3, "epochs": 50, "lambdas": 6, "ratio": 2.0}
    PAPER: ClassVar[dict[str, Any]] = {"epochs": 200, "train_images": 50_000, "num_seeds": 5}
    needs: ClassVar[str] = "LeNet-5 on MNIST's 60,000 images and residual networks on CIFAR, 200 epochs: a GPU for days"

    num_seeds: int = 5
    """How many seeds; each is another split of the images, start and order of batches."""
    width: int = 64
    """Units in each of the two hidden layers, ReLU."""
    batch: int = 100
    """Images in a step."""
    epochs: int = 80
    """Epochs; beta grows after each fifth of them."""
    lr: float = 5e-3
    """Learning rate of Adam, down to 0 along a cosine."""
    beta: float = 0.05
    """Weight of |W - V|^2 / 2 at first."""
    growth: float = 1.25
    """What beta is multiplied with."""
    smallest: float = 5e-5
    """The smallest lambda."""
    lambdas: int = 9
    """How many values of lambda."""
    target: float = 0.05
    """The training loss at which penalties are compared."""
    ratio: float = 1.5
    """Of a value of lambda to the one before."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *super().rules(),
            *self.at_least(1, "width", "batch", "lambdas"),
            *self.positive("lr", "beta", "smallest", "target"),
            *self.at_least(5, "epochs"),
            ("ratio", 1 < self.ratio < math.inf, "above 1 and finite"),
            ("growth", 1 <= self.growth < math.inf, "at least 1 and finite"),
        ]

    def trained(self, penalty: str, lam: float, seed: int, data: Split, device: torch.device, between: Callable[[], None]) -> nn.Sequential:
        """The network with the weights V; with lambda 0, trained without penalty."""
        model = built(seed, lambda: perceptron([math.prod(data.shape), self.width, self.width, data.classes]), device)
        assert isinstance(model, nn.Sequential)
        weights = [p for p in model.parameters() if p.ndim == 2]
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        steps = self.epochs * (len(data.y) // self.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        beta, held = self.beta, [w.detach().clone() for w in weights]

        def loss(step: int, x: Tensor, y: Tensor) -> Tensor:
            fitted = cross_entropy(model(x), y)
            if lam == 0:
                return fitted
            groups = sum((math.sqrt(len(w)) * w.norm(dim=0).sum() for w in weights), start=torch.zeros((), dtype=DTYPE))
            apart = sum(((w - v).square().sum() for w, v in zip(weights, held, strict=True)), start=torch.zeros((), dtype=DTYPE))
            return fitted + lam * groups + 0.5 * beta * apart

        for step in fit(model, optimizer, data.x, data.y, seed=seed, epochs=self.epochs, batch=self.batch, between=between, loss=loss):
            schedule.step()
            if lam > 0:
                beta = self.beta * self.growth ** (5 * step // (steps + 1))
                held = [PROX[penalty](w.detach(), lam / beta) for w in weights]
        if lam > 0:
            with torch.no_grad():
                for w, v in zip(weights, held, strict=True):
                    w.copy_(v)
        return model

    def measure(self, model: nn.Sequential, data: Split, clock: Clock) -> dict[str, float]:
        with clock:
            norms = gg.sqnorms(model, cross_entropy, data.x, data.y)
            moments = gg.second_moments(model, cross_entropy, data.x, data.y)
        weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
        zero = {name: w.count_nonzero(0) == 0 for name, w in weights.items()}
        in_zeroed = sum(moments[name][:, dead].sum().item() for name, dead in zero.items())
        total = sum(w.numel() for w in weights.values())
        with torch.no_grad():
            loss = cross_entropy(model(data.x), data.y).item()
        return {
            "loss": loss,
            "weight_sparsity": 1 - sum(int(w.count_nonzero()) for w in weights.values()) / total,
            "group_sparsity": sum(int(dead.sum()) for dead in zero.values()) / sum(len(dead) for dead in zero.values()),
            "accuracy": accuracy(model, data.test_x, data.test_y),
            "mean_sqnorm": norms.mean().item(),
            "norm_in_zeroed_groups": in_zeroed / norms.sum().item(),
        }

    def at_target(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """All columns where the training loss is ``target``; NaN if that is not among the losses reached."""
        ordered = sorted(rows, key=lambda row: row["loss"])
        losses = [math.log(row["loss"]) for row in ordered]

        def at(column: str) -> float:
            return float(np.interp(math.log(self.target), losses, [row[column] for row in ordered], left=math.nan, right=math.nan))

        return {column: {"interpolated": 1, "loss": self.target}.get(column, at(column)) for column in rows[0]}

    def start(self, device: torch.device, compiled: bool) -> GridRun:
        splits = self.splits(device, self.batch)

        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            data = splits(seed)
            if arm == "no penalty":
                return [{"lambda": 0.0, "interpolated": 0, **self.measure(self.trained("l1", 0.0, seed, data, device, between), data, clock)}]
            rows = []
            for k in range(self.lambdas):
                lam = self.smallest * self.ratio**k
                rows.append({"lambda": lam, "interpolated": 0, **self.measure(self.trained(arm, lam, seed, data, device, between), data, clock)})
            return [*rows, self.at_target(rows)]

        return GridRun([(arm, seed) for seed in self.seeds for arm in ("no penalty", *PROX)], work)

    def claims(self) -> list[Claim]:
        out: list[Claim] = []
        one = (
            "Where it fails: one λ scales both penalties, as in the paper, and what zeroes weights first reaches the loss at a smaller λ, "
            "with less for the groups."
        )
        for ours in list(PROX)[1:]:
            out += [
                MeanClaim(f"{ours} zeroes no smaller a share of the weights than l1", ours, "weight_sparsity", ">=", 0.0, versus="l1"),
                MeanClaim(f"{ours} zeroes no smaller a share of the groups than l1", ours, "group_sparsity", ">=", 0.0, versus="l1", remark=one),
                MeanClaim(f"{ours} costs at most a point of accuracy against l1", ours, "accuracy", ">=", -0.01, versus="l1"),
            ]
        out.append(MeanClaim("l0 costs at most a point against no penalty", "l0", "accuracy", ">=", -0.01, versus="no penalty"))
        return out

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        frame, colours = outcome.metrics, dict(zip(PROX, (GREY, RED, BLUE, GREEN), strict=True))
        dense = frame[frame["arm"] == "no penalty"]["accuracy"].mean()
        for arm, colour in colours.items():
            rows = frame[frame["arm"] == arm]
            path = rows[rows["interpolated"] == 0].groupby("lambda").mean(numeric_only=True)
            chosen = rows[rows["interpolated"] == 1]
            for ax, column in ((left, "weight_sparsity"), (right, "group_sparsity")):
                ax.plot(path[column], path["accuracy"], "-", color=colour, lw=1.5, label=arm.replace(" - ", " − "))
                ax.plot(chosen[column], chosen["accuracy"], "o", color=colour, ms=5, alpha=0.7, mew=0)
        for ax, what in ((left, "weights"), (right, "groups")):
            ax.axhline(dense, color="black", lw=0.8, ls=":")
            ax.set(xlabel=f"share of the {what} that is zero", ylabel="test accuracy", ylim=(max(0.0, dense - 0.12), min(1.0, dense + 0.03)))
        left.text(0.02, dense, "no penalty", transform=left.get_yaxis_transform(), va="bottom", fontsize=9)
        left.legend(frameon=False, loc="lower left")
        figure.suptitle("Lines: mean over seeds as λ grows; dots: every seed at the training loss where penalties are compared")
        return figure
