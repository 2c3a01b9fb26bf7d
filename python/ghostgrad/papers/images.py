"""Labelled images: scikit-learn's handwritten digits, or files of the user's. Nothing is downloaded.

:func:`load_images` takes ``"digits"`` or a folder, and tells by the names in it what it holds:

- *digits*: 1797 handwritten digits of 8 x 8 grey values, which come with scikit-learn.
- *A folder for each class*, ``cats/*.png``, ``dogs/*.jpg``, read by Pillow. Where there are only ``train`` and ``test`` (or ``val``), the folders of the
  classes lie in these.
- *CIFAR-10 or CIFAR-100, binary version*: ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or ``train.bin`` and ``test.bin``. A record is
  the label, one byte (CIFAR-100: the coarse label, then the fine one, which is taken), and 3 x 32 x 32 bytes. The Python version is refused: it is a
  pickle, which runs whatever code it holds when it is read.
- *IDX*, the format of MNIST and its kin, plain or ``.gz``: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and ``t10k`` or ``test`` for the test
  half. A file is 0, 0, the type (8 for bytes), the number of dimensions, each dimension in four bytes, most significant first, and the values.

What comes without a test half is split by a seed, class by class.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..training import philox

__all__ = ["ImageDataError", "Images", "data_used", "load_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
GREY = ("1", "L", "LA")  # Pillow's modes with 8 bits a channel
COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
IDX_IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?")


class ImageDataError(ValueError):
    """Images cannot be read. The message names the file, the rule, what was found and a way out."""

    def __init__(self, path: Path, rule: str, found: str, way_out: str):
        super().__init__(f"{path}: {rule}, {found}. {way_out}")


@dataclass(frozen=True)
class Images:
    """Labelled images in two halves. Each channel has mean 0 and standard deviation 1 over the training images; the test images are scaled as these are."""

    train_x: Tensor  # (N, C, H, W) float32
    train_y: Tensor  # (N,) int64, from 0 to len(classes) - 1
    test_x: Tensor  # (M, C, H, W) float32
    test_y: Tensor  # (M,) int64
    classes: tuple[str, ...]
    name: str
    split: bool  # whether the halves were split by the seed; else they came as two


@dataclass(frozen=True)
class _Half:
    """Images as files hold them."""

    x: np.ndarray  # (N, C, H, W) uint8
    y: np.ndarray  # (N,) int64

    def __getitem__(self, index: np.ndarray) -> _Half:
        return _Half(self.x[index], self.y[index])


_Source = tuple[_Half, _Half | None, tuple[str, ...]]  # training half, test half if there is one, names of the classes


def data_used(source: str) -> str:
    """What a setting says of its images, on its page of the report."""
    return "scikit-learn's digits (1797 grey images of 8 x 8 pixels), as --data names no others" if source == "digits" else f"the images in {source}"


def load_images(source: str = "digits", *, seed: int = 0, test_share: float = 0.5, size: int | None = None) -> Images:
    """Images with labels from ``source``; the formats stand at the top of :mod:`ghostgrad.papers.images`.

    >>> images = load_images("digits", seed=3)
    >>> images = load_images("~/data/cifar-10-batches-bin")
    >>> images = load_images("~/data/birds", size=64)

    Args:
        source: "digits", or the path of a folder (one that is called digits is "./digits").
        seed: of the split, for a source without a test half.
        test_share: of each class, for such a source; one image at least, and all but one at most.
        size: of class folders, whose images may differ in size: each is scaled until its shorter side has this length, and cut to a square at the centre.

    Returns:
        :class:`Images`: float32, one channel if all files are grey, else three; of a palette or with transparency counts as colour, transparency is dropped.

    Raises:
        ImageDataError: there is nothing to read; a file is broken, truncated or of another format; sizes differ; a label is out of range; a class has too few
            images; a size is given for images that have one.
        ValueError: ``test_share`` or ``size`` is not as above.
        ModuleNotFoundError: scikit-learn (for digits) or Pillow (for class folders) is not installed.

    Memory: four bytes for each value, and one while reading.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"load_images: test_share must be between 0 and 1, got {test_share}")
    if size is not None and size < 1:
        raise ValueError(f"load_images: size must be at least 1, got {size}")
    path = Path(source).expanduser()
    train, test, classes = _digits(size) if source == "digits" else _folder(path, size)
    if len(classes) < 2:
        raise ImageDataError(path, "at least 2 classes are needed", f"got {len(classes)} ({', '.join(classes)})", "Add images of another class.")
    split = test is None
    if test is None:
        train, test = _split(path, train, classes, seed, test_share)
    if train.x.shape[1:] != test.x.shape[1:]:
        shapes = [" x ".join(map(str, half.x.shape[1:])) for half in (train, test)]
        raise ImageDataError(path, "both halves need images of one shape", f"got {shapes[0]} for training and {shapes[1]} for testing", "Convert one of them.")
    train_x, test_x = (torch.from_numpy(half.x.astype(np.float32)) for half in (train, test))
    std, mean = torch.std_mean(train_x, (0, 2, 3), correction=0, keepdim=True)  # (1, C, 1, 1)
    if not std.all():
        raise ImageDataError(path, "images must differ", f"but channel {int(std.argmin())} of the training images has one value everywhere", "Check the files.")
    for x in (train_x, test_x):
        x.sub_(mean).div_(std)
    return Images(train_x, torch.from_numpy(train.y), test_x, torch.from_numpy(test.y), classes, source if source == "digits" else path.resolve().name, split)


def _split(path: Path, whole: _Half, classes: Sequence[str], seed: int, test_share: float) -> tuple[_Half, _Half]:
    """Class by class, so that both halves know every class; in the order in which the images came."""
    rng = philox(seed, 0)
    is_test = np.zeros(len(whole.y), dtype=bool)
    for label, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(whole.y == label))
        if len(members) < 2:
            raise ImageDataError(
                path, "a class needs at least 2 images, one to train and one to test", f"{name} has {len(members)}", "Add some, or a test half."
            )
        is_test[members[: min(max(round(test_share * len(members)), 1), len(members) - 1)]] = True
    return whole[~is_test], whole[is_test]


def _check_no_size(path: Path, size: int | None) -> None:
    if size is not None:
        raise ImageDataError(path, "a size is for class folders", f"these images have one already, got {size}", "Leave it away.")


def _digits(size: int | None) -> _Source:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ModuleNotFoundError('the handwritten digits come with scikit-learn: pip install "ghostgrad[papers]"', name="sklearn") from error
    _check_no_size(Path("digits"), size)
    data = load_digits()
    return _Half(data.images[:, None].astype(np.uint8), data.target.astype(np.int64)), None, tuple(map(str, data.target_names))


def _folder(path: Path, size: int | None) -> _Source:
    """What the folder holds, told by the names in it."""
    if path.is_file():
        way_out = "Unpack it, and give the folder." if path.suffix in (".gz", ".tgz", ".tar", ".zip") else "Give the folder that it lies in."
        raise ImageDataError(path, "images are read from a folder", "this is a file", way_out)
    if not path.is_dir():
        raise ImageDataError(path, "must be 'digits' or a folder", "no such folder is here", "Check the path.")
    try:
        visible = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise ImageDataError(path, "must be readable", error.strerror or str(error), "Check its permissions.") from error
    files, folders = {p.name for p in visible if p.is_file()}, [p for p in visible if p.is_dir()]
    if any(re.fullmatch(r"(data|test)_batch.*\.bin", name) for name in files):
        return _cifar(path, size, [f"data_batch_{k}.bin" for k in range(1, 6)], "test_batch.bin", (10,), "batches.meta.txt")
    if {"train.bin", "test.bin"} & files:
        return _cifar(path, size, ["train.bin"], "test.bin", (20, 100), "fine_label_names.txt")
    if "data_batch_1" in files or {"train", "meta"} <= files:
        raise ImageDataError(
            path,
            "CIFAR is read in its binary version",
            "this is the Python version: pickles, which run whatever code they hold when they are read",
            "Fetch the archive that is called ...-binary.tar.gz from the same page.",
        )
    if any(map(IDX_IMAGES.fullmatch, files)):
        return _idx(path, size, files)
    if folders:
        return _class_folders(path, folders, size)
    raise ImageDataError(
        path,
        "must hold a folder for each class, CIFAR's *.bin, or IDX files (*-images-idx3-ubyte, *-labels-idx1-ubyte)",
        f"got {', '.join(sorted(files)[:4])}{', ...' if len(files) > 4 else ''}" if files else "it is empty",
        "Move images into folders that are called like their classes.",
    )


# ------------------------------------------------------------------------------------------------------------------------------------- class folders


def _class_folders(path: Path, folders: list[Path], size: int | None) -> _Source:
    """Classes in the order of their names. All files are read as one, so that both halves have the same size and number of channels."""
    halves = {p.name: p for p in folders}
    if "train" not in halves or not set(halves) <= {"train", "test", "val"}:
        return _images(_files(folders), size), None, tuple(halves)
    classes = _subfolders(halves["train"])
    train, names = _files(classes), tuple(p.name for p in classes)
    if len(halves) == 1:
        return _images(train, size), None, names
    test_folder = halves.get("test", path / "val")
    for p in _subfolders(test_folder):
        if p.name not in names:
            raise ImageDataError(p, "a class must have training images", f"got no folder {halves['train'] / p.name}", "Add it, or take this one away.")
    test = _files(_subfolders(test_folder), names)
    both = _images(train + test, size)
    return both[np.arange(len(train))], both[np.arange(len(train), len(both.y))], names


def _subfolders(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise ImageDataError(folder, "must hold a folder for each class", "got none", "Move the images into folders that are called like their classes.")
    return found


def _files(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[tuple[Path, int]]:
    """The image files at or below each class's folder, in the order of their names, and their labels. Files of other kinds are not looked at."""
    found: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise ImageDataError(folder, f"must hold images ({', '.join(SUFFIXES)})", "got none", "Add some, or take the folder away.")
        found += [(file, label if names is None else names.index(folder.name)) for file in files]
    return found


def _images(files: list[tuple[Path, int]], size: int | None) -> _Half:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ModuleNotFoundError('image files are read by Pillow: pip install "ghostgrad[papers]"', name="PIL") from error

    def read(file: Path, mode: str | None) -> tuple[str, tuple[int, int], np.ndarray | None]:
        """Pillow's mode, (width, height), and, if a mode is asked for, the values in it."""
        try:
            with Image.open(file) as image:
                if mode is None:
                    return image.mode, image.size, None
                found = image.convert(mode)
                if size is not None:
                    found = ImageOps.fit(found, (size, size), Image.Resampling.BICUBIC)
                return mode, found.size, np.asarray(found)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for broken files
            raise ImageDataError(file, "must be an image that Pillow reads", f"it says: {error}", "Replace the file, or take it away.") from error

    modes, sizes = zip(*(read(file, None)[:2] for file, _ in files))  # the headers alone
    for (file, _), mode, its_size in zip(files, modes, sizes):
        if mode not in GREY + COLOUR:
            raise ImageDataError(file, "must have 8 bits for each channel", f"its mode is {mode}", "Convert it to 8 bits.")
        if size is None and its_size != sizes[0]:
            raise ImageDataError(
                file,
                f"all images must have one size, {sizes[0][0]} x {sizes[0][1]} as {files[0][0]}",
                f"got {its_size[0]} x {its_size[1]}",
                "Give a size to which all are brought, --image-size 32 or load_images(..., size=32).",
            )
    mode = "L" if set(modes) <= set(GREY) else "RGB"
    width, height = sizes[0] if size is None else (size, size)
    x = np.empty((len(files), len(mode) if mode == "RGB" else 1, height, width), dtype=np.uint8)
    for row, (file, _) in zip(x, files):
        values = read(file, mode)[2]
        assert values is not None
        row[:] = values.reshape(height, width, -1).transpose(2, 0, 1)
    return _Half(x, np.array([label for _, label in files], dtype=np.int64))


# ------------------------------------------------------------------------------------------------------------------------------------------ binaries


def _read(file: Path, most: int | None = None) -> bytes:
    """The bytes of a file, unpacked if it is a .gz; with ``most`` not more than these."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return stream.read(-1 if most is None else most)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageDataError(file, "must be readable", f"got {type(error).__name__}: {error}", "Fetch it again.") from error


def _cifar(path: Path, size: int | None, train: list[str], test: str, limits: tuple[int, ...], meta: str) -> _Source:
    """Records of one byte for each of ``limits``, the number of labels of that kind, and 3 x 32 x 32 bytes. The last label counts."""
    _check_no_size(path, size)
    record = len(limits) + 3 * 32 * 32

    def half(names: list[str]) -> _Half:
        parts = []
        for file in (path / name for name in names):
            if not file.is_file():
                raise ImageDataError(file, f"CIFAR-{limits[-1]} has the files {', '.join([*train, test])}", "this one is missing", "Unpack the archive again.")
            data = np.frombuffer(_read(file), dtype=np.uint8)
            if len(data) == 0 or len(data) % record:
                raise ImageDataError(file, f"must be whole records of {record} bytes", f"got {len(data)} bytes", "It is truncated or no CIFAR: fetch it again.")
            parts.append(data.reshape(-1, record))
            for column, limit in enumerate(limits):
                (wrong,) = np.nonzero(parts[-1][:, column] >= limit)
                if len(wrong):
                    found = f"got {parts[-1][wrong[0], column]} in record {wrong[0]}"
                    raise ImageDataError(file, f"byte {column} of a record, a label, must be below {limit}", found, "It is no CIFAR file: fetch it again.")
        records = np.concatenate(parts)
        return _Half(records[:, len(limits) :].reshape(-1, 3, 32, 32), records[:, len(limits) - 1].astype(np.int64))

    classes = tuple(map(str, range(limits[-1])))
    if (path / meta).is_file():
        classes = tuple(_read(path / meta).decode(errors="replace").split())
        if len(classes) != limits[-1]:
            raise ImageDataError(path / meta, f"must name {limits[-1]} classes", f"got {len(classes)}", "Fetch it again, or take it away.")
    return half(train), half([test]), classes


def _idx(path: Path, size: int | None, files: set[str]) -> _Source:
    """Labels are numbered anew, in their order, if the training labels leave numbers out (EMNIST's letters begin at 1)."""
    _check_no_size(path, size)
    pairs: dict[str, list[str]] = {"train": [], "test": []}
    for name in sorted(files):
        match = IDX_IMAGES.fullmatch(name)
        if match and not (match[3] and name.removesuffix(".gz") in files):  # of a file and its .gz the former
            pairs["test" if re.search("test|t10k|val", match[1]) else "train"].append(name)
    for kind, names in pairs.items():
        if len(names) > 1:
            raise ImageDataError(path, f"one file of {kind} images is read", f"got {', '.join(names)}", "Move one of the pairs into a folder of its own.")
    if not pairs["train"]:
        raise ImageDataError(path, "must hold training images (train-images-idx3-ubyte)", f"got {pairs['test'][0]} alone", "Add them.")
    train = _idx_pair(path, pairs["train"][0], files)
    known = np.unique(train.y)

    def numbered(half: _Half) -> _Half:
        return _Half(half.x, np.searchsorted(known, half.y))

    if not pairs["test"]:
        return numbered(train), None, tuple(map(str, known))
    test = _idx_pair(path, pairs["test"][0], files)
    (wrong,) = np.nonzero(~np.isin(test.y, known))
    if len(wrong):
        found = f"got {test.y[wrong[0]]} for image {wrong[0]}"
        raise ImageDataError(path / pairs["test"][0], "labels must be among those of the training images", found, "Check that the pairs belong together.")
    return numbered(train), numbered(test), tuple(map(str, known))


def _idx_pair(path: Path, images: str, files: set[str]) -> _Half:
    match = IDX_IMAGES.fullmatch(images)
    assert match is not None
    labels = f"{match[1]}labels{match[2]}idx1-ubyte"
    found = next((name for name in (labels, f"{labels}.gz") if name in files), None)
    if found is None:
        raise ImageDataError(path / images, f"needs its labels, {labels} or {labels}.gz, beside it", "got neither", "Fetch them, or rename yours.")
    x, y = _idx_array(path / images, 3), _idx_array(path / found, 1)
    if len(x) != len(y):
        raise ImageDataError(path / found, f"must have a label for each of the {len(x)} images of {images}", f"got {len(y)}", "Check the pair.")
    return _Half(x[:, None], y.astype(np.int64))


def _idx_array(file: Path, dims: int) -> np.ndarray:
    """(N,) or (N, H, W) bytes."""
    header = _read(file, 4 + 4 * dims)
    if header[:4] != bytes([0, 0, 8, dims]) or len(header) < 4 + 4 * dims:
        way_out = "Unpack it first, or call it .gz." if header[:2] == b"\x1f\x8b" else "It is no IDX file of bytes: fetch it again."
        raise ImageDataError(
            file, f"must begin with the bytes 0, 0, 8, {dims} and {dims} dimensions", f"got {list(header[:4])} and {len(header)} bytes", way_out
        )
    shape = tuple(int(n) for n in np.frombuffer(header[4:], dtype=">u4"))
    size = math.prod(shape)
    data = np.frombuffer(_read(file, len(header) + size + 1), dtype=np.uint8)[len(header) :]
    if size == 0 or len(data) != size:
        found = f"got {'more than ' if len(data) > size else ''}{min(len(data), size)}"
        raise ImageDataError(
            file, f"must hold {' x '.join(map(str, shape))} bytes after its header, one at least", found, "It is truncated or damaged: fetch it again."
        )
    return data.reshape(shape)
