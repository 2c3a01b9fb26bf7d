"""Images from files that the tests write, in each of the formats, whole and broken."""

from __future__ import annotations

import builtins
import gzip
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ghostgrad.papers.images import ImageDataError, Images, load_images

RNG = np.random.default_rng(0)


def standardised(x: np.ndarray, train: np.ndarray) -> torch.Tensor:
    """(N, C, H, W) bytes by the channels of ``train``, in float64."""
    return torch.from_numpy((x - train.mean((0, 2, 3), keepdims=True)) / train.std((0, 2, 3), keepdims=True)).float()


def check(images: Images, train: tuple[np.ndarray, Any], test: tuple[np.ndarray, Any], classes: str) -> None:
    assert images.classes == tuple(classes.split())
    for x, y, (values, labels) in ((images.train_x, images.train_y, train), (images.test_x, images.test_y, test)):
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.is_contiguous()
        torch.testing.assert_close(x, standardised(values, train[0]), rtol=1e-5, atol=1e-6)
        assert y.tolist() == list(labels)


# -------------------------------------------------------------------------------------------------------------------------------- digits, and the split


def test_digits() -> None:
    images = load_images()
    assert images.train_x.shape == (899, 1, 8, 8) and images.test_x.shape == (898, 1, 8, 8)
    assert images.classes == tuple("0123456789") and images.name == "digits"
    assert abs(images.train_x.mean()) < 1e-6 and abs(images.train_x.std(correction=0) - 1) < 1e-6
    for y in (images.train_y, images.test_y):
        assert (y.bincount() >= 85).all()  # each class in each half


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (load_images("digits", seed=seed, test_share=0.2) for seed in (3, 3, 4))
    assert torch.equal(first.train_x, again.train_x) and torch.equal(first.test_y, again.test_y)
    assert len(first.test_y) == 359 and not torch.equal(first.test_x, other.test_x)
    raw = [torch.cat([i.train_x, i.test_x]).flatten(1) for i in (first, other)]
    # the same 1797 images in either: back on the scale from 0 to 16 their sums agree as multisets
    sums = [((x - x.min()) * 16 / (x.max() - x.min())).sum(1).round().sort().values for x in raw]
    assert torch.equal(*sums)


# -------------------------------------------------------------------------------------------------------------------------------------- class folders


def save(path: Path, pixels: np.ndarray, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_train_and_test_folders(tmp_path: Path) -> None:
    """The test half has its classes in another order and without one of them; its files are grey, the training half's are not."""
    train = [save(tmp_path / f"train/{name}/{k}.png", pixels(4, 5, 3)) for name in ("cat", "dog", "owl") for k in range(2)]
    test = [save(tmp_path / f"test/{name}/0.png", pixels(4, 5)) for name in ("dog", "owl")]
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/.hidden").mkdir()
    x = np.stack(train).transpose(0, 3, 1, 2)
    t = np.repeat(np.stack(test)[:, None], 3, axis=1)
    check(load_images(str(tmp_path)), (x, [0, 0, 1, 1, 2, 2]), (t, [1, 2]), "cat dog owl")


def test_folders_without_halves_are_split_class_by_class(tmp_path: Path) -> None:
    for name, count in (("cat", 4), ("train", 2), ("dog", 8)):  # a class may be called train
        for k in range(count):
            save(tmp_path / name / f"{k}.jpg", pixels(6, 6))
    images = load_images(str(tmp_path), test_share=0.25)
    assert images.classes == ("cat", "dog", "train") and images.name == tmp_path.name
    assert images.train_x.shape == (10, 1, 6, 6)
    assert images.train_y.bincount().tolist() == [3, 6, 1] and images.test_y.bincount().tolist() == [1, 2, 1]


def test_validation_images_serve_where_there_is_no_test_half(tmp_path: Path) -> None:
    for half in ("train", "val"):
        for name in "ab":
            save(tmp_path / half / name / "0.png", pixels(3, 3))
    assert load_images(str(tmp_path)).test_y.tolist() == [0, 1]


def test_size_scales_and_cuts_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 200  # what a square at the centre sees
    save(tmp_path / "train/a/0.png", wide)
    save(tmp_path / "train/b/0.png", np.full((8, 8), 100, dtype=np.uint8))
    save(tmp_path / "test/a/0.png", np.full((2, 3), 200, dtype=np.uint8))
    images = load_images(str(tmp_path), size=4)
    assert images.train_x.shape == (2, 1, 4, 4)
    torch.testing.assert_close(images.train_x, torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4))
    torch.testing.assert_close(images.test_x, torch.ones(1, 1, 4, 4))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A good set: every test of errors breaks it in one place."""
    for name in "ab":
        for k in range(2):
            save(tmp_path / f"set/{name}/{k}.png", pixels(6, 6))
    return tmp_path / "set"


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "mixed sizes": (
        lambda p: save(p / "b/1.png", pixels(5, 6)),
        r"b/1\.png: all images must have one size, 6 x 6 as .*a/0\.png, got 6 x 5\. .*--image-size 32",
    ),
    "truncated": (lambda p: truncate(p / "b/0.png", 60), r"b/0\.png: must be an image that Pillow reads, it says: .*Replace the file"),
    "not an image": (lambda p: (p / "a/1.png").write_text("GIF"), r"a/1\.png: must be an image that Pillow reads, it says: cannot identify"),
    "empty file": (lambda p: (p / "a/1.png").write_bytes(b""), r"a/1\.png: must be an image that Pillow reads"),
    "16 bits": (lambda p: save(p / "a/1.png", pixels(6, 6).astype(np.uint16)), r"a/1\.png: must have 8 bits for each channel, its mode is I;16"),
    "empty class": (lambda p: (p / "c").mkdir(), r"set/c: must hold images \(\.png, .*\), got none\. Add some"),
    "one image": (lambda p: (p / "b/0.png").unlink(), r"set: a class needs at least 2 images, one to train and one to test, b has 1\."),
    "one class": (lambda p: [(p / "b" / f).unlink() for f in ("0.png", "1.png")] + [(p / "b").rmdir()], r"set: at least 2 classes are needed, got 1 \(a\)"),
    "all alike": (lambda p: [save(f, np.full((6, 6), 9, dtype=np.uint8)) for f in p.rglob("*.png")], r"images must differ, but channel 0 .* one value"),
    "train without classes": (
        lambda p: [f.unlink() for f in p.rglob("*.png")] + [(p / "a").rename(p / "train"), (p / "b").rename(p / "test")],
        r"set/train: must",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_FOLDERS)
def test_broken_folders_say_what_to_do(fault: str, folders: Path) -> None:
    load_images(str(folders))
    damage, message = BROKEN_FOLDERS[fault]
    damage(folders)
    with pytest.raises(ImageDataError, match=message):
        load_images(str(folders))


def test_a_class_of_the_test_half_alone(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/c"):
        save(tmp_path / folder / "0.png", pixels(3, 3))
    with pytest.raises(ImageDataError, match=r"test/c: a class must have training images, got no folder .*train/c"):
        load_images(str(tmp_path))


def test_without_pillow_the_extra_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "ghostgrad[papers]"')):
        load_images(str(folders))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'scikit-learn: pip install "ghostgrad\[papers\]"'):
        load_images()


# ---------------------------------------------------------------------------------------------------------------------------------------------- CIFAR


def cifar_file(path: Path, *labels: np.ndarray) -> np.ndarray:
    """A file of records; its images (N, 3, 32, 32)."""
    x = pixels(len(labels[0]), 3, 32, 32)
    path.write_bytes(b"".join(bytes([*(int(column[i]) for column in labels)]) + x[i].tobytes() for i in range(len(x))))
    return x


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    for k in range(1, 6):
        cifar_file(tmp_path / f"data_batch_{k}.bin", np.array([k, 9, 0]))
    cifar_file(tmp_path / "test_batch.bin", np.array([3, 4]))
    return tmp_path


def test_cifar_10(cifar10: Path) -> None:
    train = np.concatenate([cifar_file(cifar10 / f"data_batch_{k}.bin", np.array([k, 9, 0])) for k in range(1, 6)])
    test = cifar_file(cifar10 / "test_batch.bin", np.array([3, 4]))
    check(load_images(str(cifar10)), (train, [1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0, 5, 9, 0]), (test, [3, 4]), "0 1 2 3 4 5 6 7 8 9")
    (cifar10 / "batches.meta.txt").write_text("airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n")
    assert load_images(str(cifar10)).classes[:2] == ("airplane", "automobile")


def test_cifar_100_takes_the_fine_labels(tmp_path: Path) -> None:
    train = cifar_file(tmp_path / "train.bin", np.array([19, 0, 3]), np.array([99, 1, 40]))
    test = cifar_file(tmp_path / "test.bin", np.array([2]), np.array([7]))
    check(load_images(str(tmp_path)), (train, [99, 1, 40]), (test, [7]), " ".join(map(str, range(100))))


def put(path: Path, offset: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] = value
    path.write_bytes(bytes(data))


BROKEN_CIFAR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        lambda p: (p / "data_batch_3.bin").unlink(),
        r"data_batch_3\.bin: CIFAR-10 has the files data_batch_1\.bin, .*, test_batch\.bin, this one is missing",
    ),
    "truncated": (lambda p: truncate(p / "data_batch_2.bin", 3 * 3073 - 1), r"data_batch_2\.bin: must be whole records of 3073 bytes, got 9218 bytes"),
    "empty": (lambda p: truncate(p / "test_batch.bin", 0), r"test_batch\.bin: must be whole records of 3073 bytes, got 0 bytes"),
    "label": (lambda p: put(p / "data_batch_5.bin", 3073, 10), r"data_batch_5\.bin: byte 0 of a record, a label, must be below 10, got 10 in record 1"),
    "names": (lambda p: (p / "batches.meta.txt").write_text("cat\ndog\n"), r"batches\.meta\.txt: must name 10 classes, got 2"),
}


@pytest.mark.parametrize("fault", BROKEN_CIFAR)
def test_broken_cifar_says_what_to_do(fault: str, cifar10: Path) -> None:
    load_images(str(cifar10))
    damage, message = BROKEN_CIFAR[fault]
    damage(cifar10)
    with pytest.raises(ImageDataError, match=message):
        load_images(str(cifar10))


def test_cifars_pickles_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    monkeypatch.setattr(builtins, "open", lambda *args, **kwargs: pytest.fail("it was opened"))
    with pytest.raises(ImageDataError, match=r"binary version, this is the Python version: pickles, which run whatever code.*-binary\.tar\.gz"):
        load_images(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------------------------------------------ IDX


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for half, count in (("train", 6), ("t10k", 3)):
        (tmp_path / f"{half}-images-idx3-ubyte").write_bytes(idx(pixels(count, 5, 4)))
        (tmp_path / f"{half}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 3))
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("prefix", "test", "dot"), [("", "t10k", "-"), ("emnist-letters-", "test", "-"), ("", "t10k", ".")])
def test_idx(prefix: str, test: str, dot: str, zipped: bool, tmp_path: Path) -> None:
    """As MNIST and EMNIST come. EMNIST's letters begin at 1: labels are numbered anew."""
    data = {}
    for half, labels in (("train", [1, 2, 5, 2]), (test, [5, 1])):
        data[half] = pixels(len(labels), 5, 4)
        for kind, values in ((f"images{dot}idx3", data[half]), (f"labels{dot}idx1", np.array(labels))):
            file = tmp_path / f"{prefix}{half}-{kind}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    check(load_images(str(tmp_path)), (data["train"][:, None], [0, 1, 2, 1]), (data[test][:, None], [2, 0]), "1 2 5")


def test_idx_without_a_test_half_is_split(mnist: Path) -> None:
    for file in mnist.glob("t10k*"):
        file.unlink()
    assert load_images(str(mnist), test_share=0.5).test_y.tolist() in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"

BROKEN_IDX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "magic": (lambda p: put(p / IMAGES, 2, 13), r"train-images-idx3-ubyte: must begin with the bytes 0, 0, 8, 3 .*got \[0, 0, 13, 3\]"),
    "dimensions": (lambda p: put(p / LABELS, 3, 2), r"train-labels-idx1-ubyte: must begin with the bytes 0, 0, 8, 1 .*got \[0, 0, 8, 2\]"),
    "truncated": (
        lambda p: truncate(p / IMAGES, 100),
        r"train-images-idx3-ubyte: must hold 6 x 5 x 4 bytes after its header, one at least, got 84\. .*truncated",
    ),
    "half a header": (lambda p: truncate(p / IMAGES, 9), r"must begin with .*got \[0, 0, 8, 3\] and 9 bytes"),
    "too long": (lambda p: (p / LABELS).write_bytes((p / LABELS).read_bytes() + b"1"), r"must hold 6 bytes after its header, one at least, got more than 6"),
    "empty": (lambda p: (p / IMAGES).write_bytes(idx(np.zeros((0, 5, 4)))), r"must hold 0 x 5 x 4 bytes after its header, one at least, got 0"),
    "counts": (
        lambda p: (p / LABELS).write_bytes(idx(np.arange(5) % 3)),
        r"train-labels-.*: must have a label for each of the 6 images of train-images.*got 5",
    ),
    "no labels": (lambda p: (p / LABELS).unlink(), r"train-images-idx3-ubyte: needs its labels, train-labels-idx1-ubyte or .*gz, beside it, got neither"),
    "test label": (lambda p: put(p / "t10k-labels-idx1-ubyte", 9, 7), r"labels must be among those of the training images, got 7 for image 1"),
    "test alone": (lambda p: (p / IMAGES).unlink(), r"must hold training images .*, got t10k-images-idx3-ubyte alone"),
    "two sets": (lambda p: (p / f"other-{IMAGES}").write_bytes(b""), r"one file of train images is read, got other-train-images.*, train-images"),
    "packed without .gz": (lambda p: (p / IMAGES).write_bytes(gzip.compress(b"x")), r"must begin with .*Unpack it first, or call it \.gz"),
    "shapes": (
        lambda p: (p / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(3, 4, 4))),
        r"both halves need images of one shape, got 1 x 5 x 4 .* and 1 x 4 x 4",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_IDX)
def test_broken_idx_says_what_to_do(fault: str, mnist: Path) -> None:
    load_images(str(mnist))
    damage, message = BROKEN_IDX[fault]
    damage(mnist)
    with pytest.raises(ImageDataError, match=message):
        load_images(str(mnist))


@pytest.mark.parametrize("data", [gzip.compress(idx(pixels(6, 5, 4)))[:-9], b"no gzip at all", b""])
def test_broken_gz(data: bytes, mnist: Path) -> None:
    (mnist / IMAGES).unlink()
    (mnist / f"{IMAGES}.gz").write_bytes(data)
    with pytest.raises(ImageDataError, match=r"train-images-idx3-ubyte\.gz: must (be readable|begin with)"):
        load_images(str(mnist))


# ------------------------------------------------------------------------------------------------------------------------------------------ elsewhere


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"x: must be 'digits' or a folder, no such folder is here\. Check the path\."),
        (lambda p: p.mkdir(), r"x: must hold a folder for each class, CIFAR's \*\.bin, or IDX files .*, it is empty\. Move"),
        (lambda p: (p.mkdir(), (p / "0.png").write_bytes(b"")), r"must hold a folder for each class.*, got 0\.png\. Move"),
        (lambda p: p.write_bytes(b""), r"x: images are read from a folder, this is a file\. Give the folder that it lies in\."),
    ],
)
def test_what_is_no_set_of_images(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(ImageDataError, match=message):
        load_images(str(tmp_path / "x"))


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"")
    with pytest.raises(ImageDataError, match="Unpack it, and give the folder"):
        load_images(str(tmp_path / "cifar-10-binary.tar.gz"))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="test_share must be between 0 and 1, got"):
        load_images("digits", test_share=share)


@pytest.mark.parametrize("kind", ["digits", "cifar10", "mnist"])
def test_size_is_for_class_folders(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load_images("digits", size=0)
    source = kind if kind == "digits" else str(request.getfixturevalue(kind))
    with pytest.raises(ImageDataError, match=r"a size is for class folders, these images have one already, got 16\. Leave it away"):
        load_images(source, size=16)
