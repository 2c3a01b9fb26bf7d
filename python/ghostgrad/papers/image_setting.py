"""What the settings that train classifiers of images share: the images of a seed, a loop over epochs, accuracy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..training import Setting, batches
from .images import ImageDataError, Images, data_used, load_images

__all__ = ["DTYPE", "ImageSetting", "Split", "accuracy", "built", "fit", "perceptron"]

DTYPE = torch.float64  # the same metrics.csv wherever it runs, and identities to rounding; at these sizes float32 would hardly be faster


@dataclass(frozen=True)
class Split:
    """The images of a seed, on the run's device."""

    x: Tensor  # (N, C, H, W), to train on
    y: Tensor  # (N,)
    test_x: Tensor  # (M, C, H, W)
    test_y: Tensor  # (M,)
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    def only(self, classes: Sequence[int]) -> Split:
        """The images of some classes; labels stay what they are."""
        train, test = (torch.isin(y, torch.tensor(classes, device=y.device)) for y in (self.y, self.test_y))
        return Split(self.x[train], self.y[train], self.test_x[test], self.test_y[test], self.classes)


@dataclass(frozen=True)
class ImageSetting(Setting):
    """A setting whose data are labelled images: scikit-learn's digits, or the user's own."""

    data: str = "digits"
    """Either digits, scikit-learn's, or a folder that holds a folder of images for each class, CIFAR's binary version, or IDX files."""
    image_size: int | None = None
    """Bring the images of class folders to this size."""
    test_share: float = 0.5
    """Share of the images to test on, where the data have no test half."""
    train_images: int = 1000
    """Train on at most so many images, drawn by the seed."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("test_share", 0 < self.test_share < 1, "between 0 and 1"),
            ("image_size", self.image_size is None or self.image_size >= 1, "at least 1"),
            *self.at_least(2, "train_images"),
        ]

    def data_used(self) -> str:
        return data_used(self.data)

    def splits(self, device: torch.device, batch: int) -> Callable[[int], Split]:
        """The split of a seed; read now, so that data that cannot be read or are too few for a batch are an error before anything is run."""
        load = functools.partial(load_images, self.data, test_share=self.test_share, size=self.image_size)
        first = load(seed=self.seed)
        if min(len(first.train_y), self.train_images) < batch:
            found = f"there are {min(len(first.train_y), self.train_images)} to train on"
            raise ImageDataError(Path(self.data), f"a batch is to have {batch} images", found, "Give a smaller --batch.")

        def split(seed: int) -> Split:
            images: Images = load(seed=seed) if first.split and seed != self.seed else first
            chosen = batches(seed, 1 << 32, len(images.train_y), self.train_images)[0]  # no epoch has this number
            halves = ((images.train_x[chosen], images.train_y[chosen]), (images.test_x, images.test_y))
            (x, y), (test_x, test_y) = ((x.to(device, DTYPE), y.to(device)) for x, y in halves)
            return Split(x, y, test_x, test_y, len(images.classes))

        return functools.lru_cache(maxsize=1)(split)


def built(seed: int, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A network whose start the seed alone determines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device, DTYPE)


def perceptron(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes, with an activation between any two."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,  # (N, ...)
    y: Tensor,  # (N,)
    *,
    seed: int,
    epochs: int,
    batch: int,
    between: Callable[[], None],
    loss: Callable[[int, Tensor, Tensor], Tensor] | None = None,  # of the step's number, images and labels; else the cross-entropy
) -> Iterator[int]:
    """Train, and yield after each step how many have been taken: the caller looks, and stops where it likes. An incomplete batch is left out."""
    per_epoch = len(y) // batch
    for epoch in range(epochs):
        for number, index in enumerate(batches(seed, epoch, len(y), batch)[:per_epoch]):
            between()
            model.train()
            optimizer.zero_grad()
            (cross_entropy(model(x[index]), y[index]) if loss is None else loss(epoch * per_epoch + number, x[index], y[index])).backward()
            optimizer.step()
            yield epoch * per_epoch + number + 1


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()
