"""The loop that the settings share: draws with an address, the steps against a plain loop, run directories, exact resume after a kill."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from ghostgrad.papers.label_noise import CHUNK, MatrixSensing, OnePoint, draws
from ghostgrad.training import (
    Claim,
    Clock,
    ClosedForm,
    CompileError,
    GridRun,
    MeanClaim,
    NonFiniteError,
    Outcome,
    Run,
    RunDirectory,
    RunDirectoryError,
    Setting,
    Trainee,
    TrainingRun,
    batches,
    has_compiler,
    reading_steps,
    train,
)

SMALL = OnePoint(steps=200, read_every=50, num_seeds=2)


def params_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = RunDirectory(path).load_checkpoint()
    assert checkpoint is not None
    return checkpoint["state"]


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


# -------------------------------------------------------------------------------------------------------------- any optimiser, and grids of cells


class Crash(Exception):
    pass


@dataclass(frozen=True)
class Toy(Setting):
    """Whatever can go wrong in a step goes wrong at ``fail``."""

    name: ClassVar[str] = "test/toy"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    duration: ClassVar[str] = ""
    fail: ClassVar[Callable[[str, int], None]] = staticmethod(lambda arm, k: None)

    lr: float = 0.05

    def claims(self) -> list[Claim]:
        return [Claim("fits", "adam", "loss", "<=", 0.3), MeanClaim("adam beats momentum", "adam", "loss", "<=", 0.0, versus="momentum")]

    def figure(self, outcome: Outcome) -> Figure:
        return Figure()


class Fit(Toy):
    """Minibatch regression: Adam and SGD with momentum, whose buffers a resumed run must have."""

    def trainee(self, arm: str, seed: int) -> Trainee:
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed))
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        for i, p in enumerate(model.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        build = {"adam": torch.optim.Adam, "momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)}[arm]
        optimizer = build(model.parameters(), lr=self.lr)

        def step(k: int) -> None:
            type(self).fail(arm, k)
            batch = batches(seed, k // 4, 20, 5)[k % 4]
            optimizer.zero_grad()
            (model(x[batch])[:, 0] - x[batch].sum(1)).square().mean().backward()
            optimizer.step()

        return Trainee(arm, seed, model, optimizer, step)

    def start(self, device: torch.device, compiled: bool) -> Run:
        def measure(trainee: Trainee, clock: Clock) -> dict[str, float]:
            with clock:
                return {"loss": sum(p.square().sum().item() for p in trainee.model.parameters())}

        return TrainingRun([self.trainee(arm, seed) for arm in ("adam", "momentum") for seed in self.seeds], reading_steps(50, 10), measure)


class Grid(Toy):
    def start(self, device: torch.device, compiled: bool) -> Run:
        def work(arm: str, seed: int, clock: Clock, between: Callable[[], None]) -> list[dict[str, float]]:
            between()
            type(self).fail(arm, seed)
            return [{"n": n, "loss": float(np.sin(n * seed + len(arm)))} for n in (1, 2)]

        return GridRun([(arm, seed) for arm in ("adam", "momentum") for seed in self.seeds], work)


@pytest.mark.parametrize("cls", [Fit, Grid])
def test_a_crash_in_any_kind_of_run_loses_no_reading(cls: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(cls(), tmp_path / "whole", progress=False)
    calls: list[tuple[str, int]] = []

    def crash_once(arm: str, k: int) -> None:
        calls.append((arm, k))
        if (arm, k) == ("momentum", 23 if cls is Fit else 1) and calls.count((arm, k)) == 1:
            raise Crash

    monkeypatch.setattr(cls, "fail", staticmethod(crash_once))
    with pytest.raises(Crash):
        train(cls(), tmp_path / "run", progress=False)
    assert RunDirectory(tmp_path / "run").load_checkpoint()["step"] == (20 if cls is Fit else 4)  # type: ignore[index]
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("21,ad")
    before = len(calls)
    resumed = train(cls(), tmp_path / "run", progress=False, resume=True)
    assert calls[before] == (("adam", 20) if cls is Fit else ("momentum", 1)), "it began again too early or too late"
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    torch.testing.assert_close(resumed.run.state_dict(), whole.run.state_dict(), rtol=0, atol=0)
    assert resumed.verdicts == whole.verdicts


def test_a_checkpoint_is_not_moved_by_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimisers change their tensors in place, and their state_dict hands out those very tensors."""
    monkeypatch.setattr(Fit, "fail", staticmethod(lambda arm, k: (_ for _ in ()).throw(Crash) if (arm, k) == ("momentum", 17) else None))
    with pytest.raises(Crash):
        train(Fit(num_seeds=1), tmp_path / "run", progress=False)
    held = RunDirectory(tmp_path / "run").load_checkpoint()["state"]  # type: ignore[index]
    monkeypatch.undo()
    trainee = Fit(num_seeds=1).trainee("adam", 0)
    for k in range(10):
        trainee.step(k)
    torch.testing.assert_close(held["adam, seed 0"]["model"], dict(trainee.model.state_dict()), rtol=0, atol=0)


def test_divergence_of_any_optimiser_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"between step \d+ and step \d+: arm 'adam', seed 0; .*arm 'momentum', seed 1. Try a smaller --lr"):
        train(Fit(lr=1e18, num_seeds=2), tmp_path / "run", progress=False)


@pytest.mark.parametrize("error", [OverflowError("too large"), np.linalg.LinAlgError("singular"), ValueError("the loss is not finite")])
def test_a_cell_that_cannot_be_computed_is_named_and_loses_no_other(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grid, "fail", staticmethod(lambda arm, seed: (_ for _ in ()).throw(error) if (arm, seed) == ("momentum", 1) else None))
    with pytest.raises(NonFiniteError, match=rf"arm 'momentum', seed 1 left the numbers .*\({type(error).__name__}: {error}\)\. Try a smaller learning rate"):
        train(Grid(), tmp_path / "run", progress=False)
    assert RunDirectory(tmp_path / "run").load_checkpoint()["step"] == 4  # type: ignore[index]


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the second one is told to do, the first one goes on to its end as if alone; then the directory is free."""
    whole = train(Grid(), tmp_path / "whole", progress=False)
    refused: list[str] = []

    def again(arm: str, seed: int) -> None:
        if not refused:
            for options in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(RunDirectoryError, match="another process is running in") as error:
                    train(Grid(), tmp_path / "run", progress=False, **options)  # type: ignore[arg-type]
                refused.append(str(error.value))

    monkeypatch.setattr(Grid, "fail", staticmethod(again))
    train(Grid(), tmp_path / "run", progress=False)
    assert len(refused) == 2
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert train(Grid(), tmp_path / "run", progress=False, resume=True).verdicts == whole.verdicts
    train(Grid(), tmp_path / "run", progress=False, overwrite=True)


def test_what_cannot_be_compiled_says_so(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="test/toy has nothing to compile"):
        train(Fit(), tmp_path / "run", compiled=True, progress=False)
    assert not (tmp_path / "run").exists()


def test_rows_with_other_columns_are_refused(tmp_path: Path) -> None:
    table = RunDirectory(tmp_path).table("metrics.csv", 0)
    table.append([{"step": 1, "arm": "a"}])
    for again in (table, RunDirectory(tmp_path).table("metrics.csv", None)):
        with pytest.raises(ValueError, match=r"metrics\.csv has the columns step, arm, a row for it step, loss"):
            again.append([{"step": 2, "loss": 1.0}])
        again.close()


def test_batches_are_a_permutation_with_an_address() -> None:
    some = batches(3, 7, 23, 5)
    assert [len(b) for b in some] == [5, 5, 5, 5, 3]
    assert sorted(torch.cat(some).tolist()) == list(range(23))
    assert torch.equal(torch.cat(some), torch.cat(batches(3, 7, 23, 10)))
    assert not torch.equal(torch.cat(some), torch.cat(batches(3, 8, 23, 5)))


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


METRICS = pd.DataFrame(
    [
        (step, arm, seed, value + step)
        for arm, values in {"a": (1.0, 2.0, 4.5), "b": (0.5, 1.0, 2.5)}.items()
        for seed, value in enumerate(values)
        for step in (0, 1)
    ],
    columns=["step", "arm", "seed", "loss"],
)


def test_mean_claims_are_students_t_of_paired_differences() -> None:
    from scipy.stats import ttest_rel

    claim = MeanClaim("", "a", "loss", ">=", 0.0, versus="b")
    by_seed = claim.values(METRICS)
    assert by_seed == {0: 0.5, 1: 1.0, 2: 2.0}
    expected = ttest_rel([2.0, 3.0, 5.5], [1.5, 2.0, 3.5]).confidence_interval(0.95)
    verdict = claim.judge(by_seed)
    assert verdict.interval == pytest.approx((expected.low, expected.high))
    assert verdict.measured == pytest.approx(3.5 / 3)
    assert not verdict.holds, "the mean is above 0, its interval is not"
    for relation, bound, holds in ((">=", expected.low - 1e-9, True), (">=", expected.low + 1e-9, False), ("<=", expected.high + 1e-9, True)):
        assert replace(claim, relation=relation, bound=bound).judge(by_seed).holds == holds  # type: ignore[arg-type]
    assert replace(claim, versus="").values(METRICS) == {0: 2.0, 1: 3.0, 2: 5.5}
    assert "mean of loss, a less b = 1.16667 in [" in str(verdict)


@pytest.mark.parametrize("relation", ["<=", ">="])
@pytest.mark.parametrize("by_seed", [{0: 1.0, 1: float("nan"), 2: 1.0}, {0: 1.0}])
def test_without_an_interval_a_mean_claim_never_holds(relation: str, by_seed: dict[int, float]) -> None:
    assert not MeanClaim("", "", "", relation, 1.0).judge(by_seed).holds  # type: ignore[arg-type]


def test_claims_about_what_is_not_there_are_errors() -> None:
    with pytest.raises(ValueError, match=r"arm 'c', of which there are no metrics; there are 'a', 'b'"):
        Claim("", "c", "loss", "<=", 1.0).values(METRICS)
    with pytest.raises(KeyError, match="trace"):
        Claim("", "a", "trace", "<=", 1.0).values(METRICS)
    with pytest.raises(ValueError, match="cannot be paired"):
        MeanClaim("", "a", "loss", "<=", 1.0, versus="b").values(METRICS[(METRICS["arm"] == "a") | (METRICS["seed"] == 0)])
    with pytest.raises(ValueError, match="no interval lies on a point"):
        MeanClaim("", "a", "loss", "==", 1.0)


def test_the_last_row_counts_even_where_it_is_nan() -> None:
    frame = pd.DataFrame({"step": [0, 1], "arm": ["a", "a"], "seed": [0, 0], "loss": [1.0, float("nan")]})
    claim = Claim("", "a", "loss", "<=", 2.0)
    assert not claim.judge(claim.values(frame)).holds


def test_a_claim_that_some_seeds_fail_holds_in_part() -> None:
    verdict = Claim("", "", "", "<=", 1.0).judge({0: 0.5, 1: 2.0, 2: 1.0})
    assert (verdict.word, verdict.reason, verdict.holds) == ("holds in part", "for 2 of 3 seeds", False)
    assert Claim("", "", "", "<=", 1.0).judge({0: 2.0, 1: 2.0}).word == "does not hold here"
    assert MeanClaim("", "", "", "<=", 1.0).judge({0: 0.0, 1: 1.9}).word == "holds in part"
    assert MeanClaim("", "", "", "<=", 1.0).judge({0: 0.0, 1: 2.1}).word == "does not hold here"
    assert MeanClaim("", "", "", "<=", 1.0).judge({0: 0.0}).word == "does not hold here", "one seed has no interval"


@pytest.mark.parametrize(
    ("by_seed", "slack", "word"),
    [
        ({0: 0.99, 1: 1.02, 2: 1.0, 3: 0.98}, 1e-9, "holds"),
        ({0: 1.21, 1: 1.2, 2: 1.19, 3: 1.2}, 1e-9, "does not hold here"),
        ({0: 1.21, 1: 1.2, 2: 1.19, 3: 1.2}, 0.25, "holds"),  # what the formula leaves out
        ({0: 0.5, 1: 2.0, 2: 1.0, 3: 0.7}, 1e-9, "not testable at this size"),  # 1 is in the interval because it is wide
        ({0: 1.0, 1: 1.0}, 1e-9, "not testable at this size"),
        ({0: 1.0, 1: float("nan"), 2: 1.0}, 1e-9, "does not hold here"),
    ],
)
def test_a_closed_form_holds_within_its_monte_carlo_interval(by_seed: dict[int, float], slack: float, word: str) -> None:
    verdict = ClosedForm("", "", "", slack=slack).judge(by_seed)
    assert verdict.word == word
    assert (verdict.holds is None) == (word == "not testable at this size")
    assert bool(verdict.reason) == (verdict.holds is None or any(map(np.isnan, by_seed.values())))


def test_a_claim_without_a_value_says_so() -> None:
    """A formula that is 0 gives no ratio; infinities give no interval; neither is a crash, a warning or a claim that holds."""
    frame = pd.DataFrame({"arm": ["a"] * 3, "seed": [0, 1, 2], "risk": [1.0, 1.0, 1.0], "predicted": [1.0, 0.0, 1.0], "huge": [np.inf, -np.inf, 1.0]})
    verdict = ClosedForm("", "a", "risk").verdict(frame)
    assert (verdict.holds, verdict.reason) == (False, "no value for 1 of 3 seeds")
    missing = {0: 1.0, 1: float("nan"), 2: float("nan")}
    assert MeanClaim("", "", "", "<=", 2.0).judge(missing).reason == "no value for 2 of 3 seeds"
    assert Claim("", "", "", "<=", 0.5).judge(missing).reason == "no value for 2 of 3 seeds"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MeanClaim("", "a", "huge", "<=", 2.0).verdict(frame).holds is False


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, 0.0], [float("nan"), float("nan")]])
def test_a_figure_is_drawn_without_positive_data_on_its_logarithmic_axes(values: list[float], tmp_path: Path) -> None:
    figure = Figure()
    for ax, (x, y) in zip(figure.subplots(1, 3), (([1.0, 2.0], values), (values, [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0])), strict=True):
        ax.plot(x, y)
        ax.set(xscale="log", yscale="log")
    RunDirectory(tmp_path).save_figure("f", figure)
    if not np.isnan(values).any():  # such points are not drawn at all
        assert [(ax.get_xscale(), ax.get_yscale()) for ax in figure.axes] == [("log", "linear"), ("linear", "log"), ("log", "log")]
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"f.png", "f.svg"}


def test_closed_forms_cover_at_their_level() -> None:
    """Of 2000 means of five draws with mean 1, 99 % have it in their interval: 1 % fail, within four standard errors."""
    draws = np.random.default_rng(0).normal(1.0, 0.01, (2000, 5))
    failed = np.mean([ClosedForm("", "", "").judge(dict(enumerate(row.tolist()))).holds is False for row in draws])
    assert abs(failed - 0.01) < 4 * (0.01 * 0.99 / 2000) ** 0.5


def test_a_closed_form_divides_by_the_formula_of_the_same_seed() -> None:
    frame = pd.DataFrame({"arm": ["a"] * 4, "seed": [0, 1, 0, 1], "risk": [9.0, 9.0, 2.0, 3.0], "theory": [1.0, 1.0, 4.0, 2.0]})
    assert ClosedForm("", "a", "risk", against="theory").values(frame) == {0: 0.5, 1: 1.5}, "of the last rows"


def test_a_claim_that_needs_more_is_not_judged() -> None:
    verdict = Claim("", "an arm that is not there", "", "<=", 1.0, needs="a larger machine").verdict(pd.DataFrame({"arm": [], "seed": []}))
    assert (verdict.word, verdict.reason, str(verdict)) == ("not testable at this size", "needs a larger machine", "not measured")
