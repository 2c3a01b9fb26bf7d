"""The loop that the settings share: draws with an address, the steps against a plain loop, run directories, exact resume after a kill."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ghostgrad.papers.label_noise import MatrixSensing, OnePoint
from ghostgrad.training import CHUNK, Claim, NonFiniteError, RunDirectory, RunDirectoryError, draws, has_compiler, reading_steps, train

SMALL = OnePoint(steps=200, read_every=50, num_seeds=2)


def params_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = RunDirectory(path).load_checkpoint()
    assert checkpoint is not None
    return checkpoint["params"]


# ------------------------------------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 3000), (1024, 2048), (1023, 1025), (5000, 5001)])
def test_draws_depend_on_the_step_and_not_on_where_one_begins(start: int, stop: int) -> None:
    index, normal = draws(7, 0, 6000, 12)
    part_index, part_normal = draws(7, start, stop, 12)
    np.testing.assert_array_equal(part_index, index[start:stop])
    np.testing.assert_array_equal(part_normal, normal[start:stop])


def test_draws_are_what_they_should_be() -> None:
    index, normal = draws(0, 0, 120_000, 12)
    assert np.abs(np.bincount(index, minlength=12) / 10_000 - 1).max() < 0.05
    assert abs(normal.mean()) < 0.01
    assert abs(normal.var() - 1) < 0.02
    assert not np.array_equal(draws(1, 0, 100, 12)[1], normal[:100])


def test_reading_steps() -> None:
    assert reading_steps(100, 30) == [0, 1, 3, 7, 15, 30, 60, 90, 100]
    assert reading_steps(1, 1000) == [0, 1]


# -------------------------------------------------------------------------------------------------------------------------------------------- steps


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Side by side, traced and in chunks, against SGD written out: one seed, one sample, one backward at a time."""
    setting = MatrixSensing(dim=4, rank=1, num_measurements=5, truth_trace=2.0, steps=3 * CHUNK + 5, read_every=20, lr=3e-3, noise_variance=0.5, seed=4)
    train(setting, tmp_path / "run", compiled=False, progress=False)
    params = params_of(tmp_path / "run")["u"]
    rows = [(arm, seed) for arm in setting.arms() for seed in (4, 5, 6)]
    clean_from = setting.steps - round(setting.settle * setting.steps)
    for r, (arm, seed) in enumerate(rows):
        problem = setting.problem(arm, seed)
        u = problem.model.get_parameter("u")
        index, normal = draws(seed, 0, setting.steps, 5)
        for step in range(setting.steps):
            i = int(index[step])
            noise = arm.noise_variance**0.5 * normal[step] if step < clean_from else 0.0
            loss = 0.5 * (problem.model(problem.x[i : i + 1])[0] - problem.y[i] - noise) ** 2
            (grad,) = torch.autograd.grad(loss, [u])
            with torch.no_grad():
                u -= setting.lr * grad
        torch.testing.assert_close(params[r], u.detach(), rtol=1e-11, atol=1e-12)


def test_a_seed_trains_alike_alone_and_beside_others(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "two", compiled=False, progress=False)
    train(replace(SMALL, seed=1, num_seeds=1), tmp_path / "one", compiled=False, progress=False)
    two, one = (pd.read_csv(tmp_path / d / "metrics.csv").query("seed == 1").reset_index(drop=True) for d in ("two", "one"))
    pd.testing.assert_frame_equal(two, one, rtol=1e-9)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_steps_agree(tmp_path: Path) -> None:
    setting = replace(SMALL, activation="tanh", steps=5 * CHUNK + 3, read_every=40)
    for name, compiled in (("plain", False), ("compiled", True)):
        train(setting, tmp_path / name, compiled=compiled, progress=False)
    for key, value in params_of(tmp_path / "plain").items():
        torch.testing.assert_close(params_of(tmp_path / "compiled")[key], value, rtol=1e-9, atol=1e-12)


def test_same_run_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(SMALL, tmp_path / name, compiled=False, progress=False)
    files = ["config.json", "metrics.csv", *(f"figures/label-noise-one-point.{kind}" for kind in ("png", "svg"))]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    a, b = (json.loads((tmp_path / d / "summary.json").read_text()) for d in ("a", "b"))
    assert {**a, "time": None} == {**b, "time": None}


# ------------------------------------------------------------------------------------------------------------------------------------------- resume

LONG = ["label-noise/one-point", "--compile", "no", "--steps", "20000", "--read-every", "100", "--num-seeds", "1", "--activation", "tanh"]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ghostgrad.cli", "run", *LONG, "--quiet", "--checkpoint-seconds", "0.2", "--out", str(out), *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert subprocess.run(command(out), capture_output=True).returncode in (0, 1)
    return out


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT"])
def test_a_resumed_run_ends_with_the_same_numbers(kind: str, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    # A shell that runs the tests in the background has its children ignore SIGINT: not this one.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "checkpoint.pt").exists() and (out / "metrics.csv").read_text().count("\n") > 40:
            break
        time.sleep(0.02)
    process.send_signal(getattr(signal, kind))
    _, errors = process.communicate(timeout=60)
    if kind == "SIGINT":
        assert process.returncode == 130, errors
        assert f"ghostgrad run label-noise/one-point --resume --out {out}" in errors
    else:
        assert process.returncode == -signal.SIGKILL
        with (out / "metrics.csv").open("a") as file:  # as if it had died while writing a row
            file.write("1234,tanh, wi")
    assert not (out / "summary.json").exists(), "it had finished before the signal"
    step = RunDirectory(out).load_checkpoint()["step"]  # type: ignore[index]
    assert 0 < step < 20_000

    again = [sys.executable, "-m", "ghostgrad.cli", "run", "label-noise/one-point", "--resume", "--quiet", "--out", str(out)]
    whole = json.loads((uninterrupted / "summary.json").read_text())
    assert subprocess.run(again, capture_output=True).returncode == (0 if whole["holds"] else 1)
    assert (out / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    for key, value in params_of(uninterrupted).items():
        assert torch.equal(params_of(out)[key], value)
    assert {**json.loads((out / "summary.json").read_text()), "time": None} == {**whole, "time": None}


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", compiled=False, progress=False)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    train(SMALL, tmp_path / "run", compiled=False, progress=False, resume=True)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------------------- run directories


def test_a_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", compiled=False, progress=False)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"never overwritten unasked.*--resume.*--overwrite.*--out"):
        train(replace(SMALL, lr=0.05), tmp_path / "run", compiled=False, progress=False)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    train(replace(SMALL, lr=0.05), tmp_path / "run", compiled=False, progress=False, overwrite=True)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(RunDirectoryError, match=r"thesis\.tex.*another --out"):
        train(SMALL, tmp_path, compiled=False, progress=False, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        train(SMALL, tmp_path / "file", compiled=False, progress=False)
    with pytest.raises(RunDirectoryError, match="cannot write a run to .*--out"):
        train(SMALL, tmp_path / "file" / "below", compiled=False, progress=False)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        train(SMALL, tmp_path / "run", compiled=False, progress=False, resume=True)


def test_resume_under_another_configuration_names_each_field(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", compiled=False, progress=False)
    with pytest.raises(RunDirectoryError, match=r"lr: 0\.1 there, 0\.05 asked for\n  width: 5 there, 6 asked for"):
        train(replace(SMALL, lr=0.05, width=6), tmp_path / "run", compiled=False, progress=False, resume=True)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", b'{"setting": "label-no', r"config\.json is not a configuration.*--overwrite"),
        ("checkpoint.pt", b"PK\x03\x04 half a checkpoint", r"checkpoint\.pt cannot be read as a checkpoint.*--overwrite"),
        ("metrics.csv", b"step,arm\n", r"metrics\.csv has 9 bytes, the checkpoint beside it knows of \d+.*--overwrite"),
    ],
)
def test_half_written_directories_say_what_to_do(file: str, damage: bytes, message: str, tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", compiled=False, progress=False)
    (tmp_path / "run" / file).write_bytes(damage)
    with pytest.raises(RunDirectoryError, match=message):
        train(SMALL, tmp_path / "run", compiled=False, progress=False, resume=True)
    train(SMALL, tmp_path / "run", compiled=False, progress=False, overwrite=True)  # the way out that it names


def test_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "whole", compiled=False, progress=False)
    train(SMALL, tmp_path / "run", compiled=False, progress=False)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "run" / ".checkpoint.pt.part").write_bytes(b"half")
    train(SMALL, tmp_path / "run", compiled=False, progress=False, resume=True)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_divergence_names_arm_seed_and_step_and_keeps_what_was_written(tmp_path: Path) -> None:
    setting = MatrixSensing(steps=400, read_every=10, lr=1e-2, num_seeds=2)
    with pytest.raises(NonFiniteError, match=r"between step \d+ and step \d+: arm 'with.* noise', seed \d.*--lr 0\.005"):
        train(setting, tmp_path / "run", compiled=False, progress=False)
    frame = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert np.isfinite(frame["reg"]).all()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# ------------------------------------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("relation", "values", "worst", "holds"),
    [
        ("<=", {0: 0.5, 1: 1.0}, 1.0, True),
        ("<=", {0: 0.5, 1: 1.1}, 1.1, False),
        (">=", {0: 0.9, 1: 7.0}, 0.9, False),
        (">=", {0: 1.0}, 1.0, True),
        ("==", {0: 1.0, 1: 3.0, 2: 2.0}, 3.0, False),
        ("==", {0: 1.0}, 1.0, True),
    ],
)
def test_the_worst_seed_decides(relation: str, values: dict[int, float], worst: float, holds: bool) -> None:
    verdict = Claim("", "", "", relation, 1.0).judge(values)  # type: ignore[arg-type]
    assert (verdict.measured, verdict.holds) == (worst, holds)


@pytest.mark.parametrize("relation", ["<=", ">=", "=="])
def test_nan_never_holds(relation: str) -> None:
    verdict = Claim("", "", "", relation, 1.0).judge({0: 1.0, 1: float("nan"), 2: 1.0})  # type: ignore[arg-type]
    assert np.isnan(verdict.measured)
    assert not verdict.holds
