"""noise-stability/digits at a small size: what a step is, what is measured, resuming, data of the user's."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from ghostgrad.cli import main
from ghostgrad.papers.images import ImageDataError, load_images
from ghostgrad.papers.noise_digits import METHODS, NoiseDigits
from ghostgrad.training import Clock, batches, train

SMALL = NoiseDigits(num_seeds=2, gradients=8, batch_size=32, mlp_width=4, resnet_width=2, probes=2, trace_images=64, test_share=0.9)
CPU = torch.device("cpu")


@pytest.mark.parametrize("network", ["MLP", "ResNet"])
def test_every_arm_takes_the_same_number_of_gradients(network: str) -> None:
    setting = replace(SMALL, network=network, num_seeds=1)
    run = setting.start(CPU, False)
    calls = dict.fromkeys(METHODS, 0)
    for trainee in run.trainees:
        method = trainee.arm.split(", ")[1]
        trainee.model.register_forward_hook(lambda *_, method=method: calls.update({method: calls[method] + 1}))
    run.advance(0, run.reading_steps[-1], lambda: None)
    assert calls == dict.fromkeys(METHODS, 8)
    starts = [t.model.state_dict() for t in setting.start(CPU, False).trainees]
    for other in starts[1:]:
        for key, value in starts[0].items():
            assert torch.equal(value, other[key])  # all arms of a seed start alike


def test_sgd_is_a_plain_loop() -> None:
    """Two steps a step of the run; the learning rate rises over a tenth of the run and then follows a cosine to 0."""
    setting = replace(SMALL, network="MLP", num_seeds=1, seed=3, gradients=40)
    trained = setting.start(CPU, False)
    plain = setting.start(CPU, False).trainees[0].model
    trained.advance(0, 20, lambda: None)
    images = load_images("digits", seed=3, test_share=0.9)
    per_epoch = len(images.train_y) // 32
    order = [b for epoch in range(40) for b in batches(3, epoch, len(images.train_y), 32)[:per_epoch]]
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    for j in range(40):
        lr = 0.1 * min(1.0, (j / 2 + 1) / 2) * 0.5 * (1 + math.cos(math.pi * j / 40))
        grads = torch.autograd.grad(cross_entropy(plain(images.train_x[order[j]]), images.train_y[order[j]]), list(plain.parameters()))
        with torch.no_grad():
            for p, g, v in zip(plain.parameters(), grads, velocity, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(lr * v)
    for p, q in zip(plain.parameters(), trained.trainees[0].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_measured_against_the_whole_hessian_in_float64(smoothing: float) -> None:
    setting = replace(SMALL, network="MLP", label_smoothing=smoothing, num_seeds=1, gradients=40, probes=200, trace_images=5000)
    run = setting.start(CPU, False)
    run.advance(0, 20, lambda: None)
    row = run.read(20).rows[2]
    assert row["arm"] == "MLP, two-point"
    model, images = run.trainees[2].model, load_images("digits", test_share=0.9)
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    names, sizes = list(params), [p.numel() for p in params.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {name: part.view_as(params[name]) for name, part in zip(names, flat.split(sizes), strict=True)}
        return cross_entropy(functional_call(model, parts, (images.train_x.double(),)), images.train_y, label_smoothing=smoothing)

    flat = torch.cat([p.flatten() for p in params.values()])
    matrix = hessian(loss)(flat)
    assert abs(row["trace"] - matrix.trace().item()) <= 4 * row["trace_stderr"]
    assert row["trace_stderr"] <= 0.1 * row["trace"]
    assert row["eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=2e-3)
    assert row["log_trace"] == math.log(row["trace"]) and row["log_eigenvalue"] == math.log(row["eigenvalue"])
    assert row["loss"] == pytest.approx(loss(flat).item(), rel=1e-5)
    with torch.no_grad():
        right = model(images.test_x).argmax(1) == images.test_y
    assert row["accuracy"] == right.double().mean().item()


def test_reading_takes_batch_statistics_anew_and_changes_nothing() -> None:
    setting = replace(SMALL, network="ResNet", num_seeds=1)
    run = setting.start(CPU, False)
    run.advance(0, 2, lambda: None)
    before = {key: value.clone() for key, value in run.trainees[2].model.state_dict().items()}
    row = run.read(2).rows[2]
    model = run.trainees[2].model
    assert model.training
    for key, value in before.items():
        assert torch.equal(value, model.state_dict()[key])
    images = load_images("digits", test_share=0.9)
    with torch.no_grad():  # in training mode the statistics are those of the batch: of all training images
        assert row["loss"] == pytest.approx(cross_entropy(model(images.train_x), images.train_y).item(), rel=0.01)


def test_a_killed_and_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    """Killed while it measures at the end: the checkpoint is that at half-time."""
    setting = replace(SMALL, num_seeds=1)
    train(setting, tmp_path / "whole", progress=False)
    script = f"""
import os, signal
from pathlib import Path
from ghostgrad.papers.noise_digits import NoiseDigits
from ghostgrad.training import train
measure, calls = NoiseDigits._measure, []
def counted(*args):
    calls.append(1)
    if len(calls) == 12:  # 2 networks and 4 arms have been read once, and some of them twice
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*args)
NoiseDigits._measure = counted
train({setting!r}, {str(tmp_path / "run")!r}, progress=False, checkpoint_seconds=0)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run/summary.json").exists()
    outcome = train(setting, tmp_path / "run", resume=True, progress=False)
    for file in ("metrics.csv", "config.json", "figures/noise-stability-digits.png"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert len(pd.read_csv(tmp_path / "run/metrics.csv")) == 16
    assert [v.claim.column for v in outcome.verdicts] == ["log_trace", "log_eigenvalue", "accuracy"] * 2
    assert not outcome.holds  # one seed has no interval


def class_folders(path: Path, halves: tuple[str, ...] = ("",)) -> None:
    rng = np.random.default_rng(0)
    for half in halves:
        for k, name in enumerate("abc"):
            (path / half / name).mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 100, (6, 7, 3)) + 50 * k
                Image.fromarray(pixels.astype(np.uint8)).save(path / half / name / f"{i}.png")


def test_images_of_the_users(tmp_path: Path) -> None:
    class_folders(tmp_path / "set")
    setting = ["--data", str(tmp_path / "set"), "--image-size", "8", "--gradients", "4", "--batch-size", "8", "--probes", "2", "--network", "ResNet"]
    code = main(["run", "noise-stability/digits", *setting, "--num-seeds", "2", "--resnet-width", "2", "--quiet", "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert code == (0 if summary["holds"] else 1)
    frame = pd.read_csv(tmp_path / "run/metrics.csv")
    assert set(frame["arm"]) == {f"ResNet, {method}" for method in METHODS}
    assert np.isfinite(frame[["loss", "accuracy", "trace", "eigenvalue"]]).all(axis=None)


def test_halves_that_the_data_bring_are_kept(tmp_path: Path) -> None:
    class_folders(tmp_path, ("train", "test"))
    setting = replace(SMALL, network="MLP", data=str(tmp_path), num_seeds=2)
    measured = []
    for trainee in setting.start(CPU, False).trainees[:2]:
        trainee.model[-1].weight.data.zero_()  # type: ignore[index,operator,union-attr]
        trainee.model[-1].bias.data.copy_(torch.tensor([1.0, 0.0, 0.0]))  # type: ignore[index,operator,union-attr]
        measured.append(setting.start(CPU, False).measure(trainee, Clock())["accuracy"])
    assert measured == [pytest.approx(1 / 3)] * 2
    split = load_images(str(tmp_path / "train"), seed=1)
    assert split.split and not load_images(str(tmp_path)).split


@pytest.mark.parametrize(("data", "message"), [("nowhere", "nowhere: must be 'digits' or a folder"), ("", "must hold a folder for each class")])
def test_data_that_cannot_be_read_is_a_usage_error(data: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert main(["run", "noise-stability/digits", "--data", str(tmp_path / "run" / data), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_a_batch_that_the_data_cannot_fill() -> None:
    with pytest.raises(ImageDataError, match="a batch is to have 2000 images, there are 899 to train on"):
        NoiseDigits(batch_size=2000).start(CPU, False)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("gradients", 7, "even and at least 4"),
        ("gradients", 2, "even and at least 4"),
        ("sigma", -1.0, "at least 0 and finite"),
        ("lr", 0.0, "positive and finite"),
        ("probes", 1, "at least 2"),
        ("test_share", 1.0, "between 0 and 1"),
        ("label_smoothing", 1.0, "at least 0 and below 1"),
        ("momentum", 1.0, "at least 0 and below 1"),
        ("image_size", 0, "at least 1"),
    ],
)
def test_rules(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"noise-stability/digits: {field} must be {rule}, got"):
        NoiseDigits(**{field: value})
