"""The loop that the papers' settings share: progress, metrics, checkpoints, exact resume, claims and their verdicts.

Three concepts:

- A :class:`Setting` is a frozen dataclass of an experiment's parameters. It states what is claimed (:class:`Claim`), draws its figure, and starts a run.
- A :class:`Run` is the experiment under way: it advances to the next of its ``reading_steps``, is read there (rows of ``metrics.csv``), and gives its state to
  be saved. What a step is, the run says. Two kinds are ready made: :class:`TrainingRun`, arms and seeds of ordinary models under any optimiser, and
  :class:`GridRun`, independent cells (a step is a cell). The label-noise settings bring one of their own, which trains all arms and seeds as one network.
- :func:`train` carries a setting out in a directory and returns an :class:`Outcome`.

>>> @dataclass(frozen=True)
... class Mine(Setting):
...     name, title, paper = "family/mine", "The paper's title", "Author (Venue year)"
...     summary, duration, ops = "what it shows", "1 minute", ("gg.sqnorms",)
...     SMALL = {"lr": 0.2}  # the fields that ``--size small`` changes
...     lr: float = 0.1
...     \"\"\"Learning rate: fields with docstrings are the options of ``ghostgrad run family/mine``.\"\"\"
...     def claims(self): return [Claim("the loss ends at 0.1 at most", "sgd", "loss", "<=", 0.1)]
...     def start(self, device, compiled): return TrainingRun(trainees, reading_steps(1000, 100), measure)
...     def figure(self, outcome): ...  # of outcome.metrics, outcome.run

Two decisions shape this module.

*Randomness has an address.* What step k of a seed sees is a function of (seed, k) alone (:func:`philox`, :func:`batches`), never of a generator that runs
along. Nothing about generators needs saving, and all arms of a seed meet the same draws.

*Numbers apart from times.* ``metrics.csv`` holds what the seed determines, ``timings.csv`` what the machine does. A run that was killed and resumed ends
with the same ``metrics.csv``, byte for byte, as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ghostgrad as gg

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from typing_extensions import Self

__all__ = [
    "Claim",
    "Clock",
    "ClosedForm",
    "CompileError",
    "GridRun",
    "MeanClaim",
    "NonFiniteError",
    "Outcome",
    "Reading",
    "Run",
    "RunDirectory",
    "RunDirectoryError",
    "Setting",
    "Size",
    "Trainee",
    "TrainingRun",
    "Verdict",
    "batches",
    "philox",
    "reading_steps",
    "train",
]


# ------------------------------------------------------------------------------------------------------------------------------------------ claims


@dataclass(frozen=True)
class Claim:
    """A statement about the last row of an arm: ``column relation bound``, for every seed.

    It holds if it does for every seed, and in part if for some. With ``needs`` it is not judged: it cannot be tested at this size, and that is what it takes.
    """

    text: str
    arm: str
    column: str
    relation: Literal["<=", ">=", "=="]
    bound: float
    formula: str = dataclasses.field(default="", kw_only=True)
    """What is claimed, as a formula in plain text."""
    remark: str = dataclasses.field(default="", kw_only=True)
    """What is known of a failure, or of where the setting departs from the paper."""
    needs: str = dataclasses.field(default="", kw_only=True)

    @property
    def quantity(self) -> str:
        """What is measured, in words."""
        return self.column

    @property
    def criterion(self) -> str:
        """What it is held against, in words."""
        return f"{self.relation} {self.bound:g}"

    def values(self, metrics: pd.DataFrame) -> dict[int, float]:
        """What is judged, by seed."""
        return _last(metrics, self.arm, self.column)

    def verdict(self, metrics: pd.DataFrame) -> Verdict:
        """What the metrics say to the claim."""
        return Verdict(self, math.nan, None, {}, reason=f"needs {self.needs}") if self.needs else self.judge(self.values(metrics))

    def judge(self, by_seed: dict[int, float]) -> Verdict:
        """The worst seed decides; NaN never holds."""
        holds = {"<=": lambda v: v <= self.bound, ">=": lambda v: v >= self.bound, "==": lambda v: v == self.bound}[self.relation]
        badness = {"<=": lambda v: v, ">=": lambda v: -v, "==": lambda v: abs(v - self.bound)}[self.relation]
        worst = max(by_seed.values(), key=lambda v: math.inf if math.isnan(v) else badness(v))
        holding = sum(map(holds, by_seed.values()))
        part = 0 < holding < len(by_seed)
        return Verdict(self, worst, holds(worst), by_seed, part=part, reason=f"for {holding} of {len(by_seed)} seeds" if part else _missing(by_seed))


@dataclass(frozen=True)
class MeanClaim(Claim):
    """A statement about the mean over seeds, of an arm's last rows or, with ``versus``, of their differences to another arm's: its interval decides.

    ``mean_s (column of arm - column of versus)``, both from seed s, whose draws they share, so that what the seed alone does cancels. The statement holds if
    the whole 95 % interval of Student's t does: its upper end for ``<=``, its lower end for ``>=``; in part, if the mean alone does. One seed has no interval,
    and so nothing holds.
    """

    versus: str = ""

    def __post_init__(self) -> None:
        if self.relation == "==":
            raise ValueError("MeanClaim: relation must be '<=' or '>=': no interval lies on a point")

    @property
    def quantity(self) -> str:
        return f"mean of {self.column}" + (f", {self.arm} less {self.versus}" if self.versus else "")

    @property
    def criterion(self) -> str:
        return f"95 % interval {self.relation} {self.bound:g}"

    def values(self, metrics: pd.DataFrame) -> dict[int, float]:
        ours = _last(metrics, self.arm, self.column)
        if not self.versus:
            return ours
        theirs = _last(metrics, self.versus, self.column)
        if ours.keys() != theirs.keys():
            raise ValueError(f"claim {self.text!r}: {self.arm!r} and {self.versus!r} have different seeds, which cannot be paired")
        return {seed: value - theirs[seed] for seed, value in ours.items()}

    def judge(self, by_seed: dict[int, float]) -> Verdict:
        mean, half = mean_interval(by_seed, 0.95)
        holds, mean_holds = (
            (m <= self.bound) if self.relation == "<=" else (m >= self.bound) for m in (mean + half if self.relation == "<=" else mean - half, mean)
        )
        part = mean_holds and not holds and not math.isnan(half)
        reason = "in the mean, but its interval goes beyond" if part else _missing(by_seed)
        return Verdict(self, mean, holds, by_seed, (mean - half, mean + half), part, reason)


@dataclass(frozen=True)
class ClosedForm(Claim):
    """A formula against its run: the mean over seeds of ``column / against`` is 1 within its Monte-Carlo interval.

    ``against`` is the column with the formula's value. The 99 % interval of Student's t, widened by ``slack`` to both sides, must contain 1. An interval that
    contains it because it is wide shows nothing: where its half-width is above ``precision``, or there are fewer than three seeds, the claim is not testable.

    ``slack`` is for what the formula leaves out (a limit taken, an order dropped), and is as large as the setting says beforehand that this is.
    """

    relation: Literal["<=", ">=", "=="] = "=="
    bound: float = 1.0
    against: str = "predicted"
    precision: float = 0.1
    slack: float = 1e-9  # rounding

    @property
    def quantity(self) -> str:
        return f"mean of {self.column} / {self.against}"

    @property
    def criterion(self) -> str:
        slack = f", widened by {self.slack:g}" if self.slack > 1e-6 else ""
        return f"99 % interval contains 1{slack}; its half-width is {self.precision:g} at most"

    def values(self, metrics: pd.DataFrame) -> dict[int, float]:
        ours, formula = (_last(metrics, self.arm, column) for column in (self.column, self.against))
        return {seed: value / formula[seed] if formula[seed] else math.nan for seed, value in ours.items()}

    def judge(self, by_seed: dict[int, float]) -> Verdict:
        mean, half = mean_interval(by_seed, 0.99) if len(by_seed) >= 3 else (float(np.mean(list(by_seed.values()))), math.inf)
        holds: bool | None = abs(mean - 1) <= half + self.slack
        reason = _missing(by_seed)
        if holds and half > self.precision:
            holds, reason = None, f"the interval's half-width, {half:.2g}, is above {self.precision:g}: it needs more seeds"
        return Verdict(self, mean, holds, by_seed, (mean - half, mean + half), reason=reason)


def mean_interval(by_seed: dict[int, float], level: float) -> tuple[float, float]:
    """The mean over seeds and the half-width of its interval of Student's t (NaN for one seed)."""
    from scipy.stats import t

    values = np.array(list(by_seed.values()))
    if not np.isfinite(values).all():  # no interval, and no warnings about infinities
        return float(values.mean()) if not (np.isposinf(values).any() and np.isneginf(values).any()) else math.nan, math.nan
    n = len(values)
    return float(values.mean()), float(t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def _missing(by_seed: dict[int, float]) -> str:
    """What to say of a claim where some seed gave nothing to judge."""
    missing = sum(map(math.isnan, by_seed.values()))
    return f"no value for {missing} of {len(by_seed)} seeds" if missing else ""


def _last(metrics: pd.DataFrame, arm: str, column: str) -> dict[int, float]:
    """The column in the last row of each of the arm's seeds."""
    rows = metrics[metrics["arm"] == arm].drop_duplicates("seed", keep="last")
    if not len(rows):
        raise ValueError(f"a claim is about arm {arm!r}, of which there are no metrics; there are {', '.join(map(repr, metrics['arm'].unique()))}")
    return dict(zip(rows["seed"].tolist(), rows[column].tolist(), strict=True))


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: ``measured`` is its worst seed's value, or the mean over seeds where the claim is about that, with its interval."""

    claim: Claim
    measured: float
    holds: bool | None  # None: not testable at this size
    by_seed: dict[int, float]
    interval: tuple[float, float] | None = None
    part: bool = False
    reason: str = ""  # why it is not testable, or which part holds

    WORDS: ClassVar = ("holds", "holds in part", "does not hold here", "not testable at this size")

    @property
    def word(self) -> str:
        """One of ``WORDS``."""
        return self.WORDS[3 if self.holds is None else 0 if self.holds else 1 if self.part else 2]

    def __str__(self) -> str:
        if not self.by_seed:
            return "not measured"
        interval = "" if self.interval is None else " in [{:.6g}, {:.6g}]".format(*self.interval)
        return f"{self.claim.quantity} = {self.measured:.6g}{interval}"


# ---------------------------------------------------------------------------------------------------------------------------------------- settings


Size = Literal["default", "small", "paper"]


@dataclass(frozen=True)
class Setting(ABC):
    """An experiment of a paper: its parameters, as fields; what is claimed of it; how it is run; the picture of its outcome."""

    name: ClassVar[str]
    title: ClassVar[str]  # of the paper
    paper: ClassVar[str]  # its authors, venue and year
    summary: ClassVar[str]
    duration: ClassVar[str]  # of the defaults
    ops: ClassVar[tuple[str, ...]] = ()  # the library's calls that measure, or train: "gg.output_sqnorms"
    SMALL: ClassVar[dict[str, Any]] = {}  # fields of a run of about a minute on one core, where the defaults take longer
    PAPER: ClassVar[dict[str, Any]] = {}  # fields of the paper's own size, or of the largest that a CPU can do
    needs: ClassVar[str] = ""  # what the paper's own size takes, where PAPER is not that
    compilable: ClassVar[bool] = False  # whether ``start`` heeds ``compiled``

    seed: int = 0
    """First seed; the run uses seed, seed + 1, ..."""
    num_seeds: int = 3
    """How many seeds are trained side by side."""

    def __post_init__(self) -> None:
        rules = [("seed", self.seed >= 0, "at least 0"), ("num_seeds", self.num_seeds >= 1, "at least 1"), *self.rules()]
        for field, kept, rule in rules:
            if not kept:
                raise ValueError(f"{self.name}: {field} must be {rule}, got {getattr(self, field)!r}")

    def rules(self) -> list[tuple[str, bool, str]]:
        """Of the setting's own fields: (field, whether its rule is kept, the rule in words)."""
        return []

    def at_least(self, least: int, *fields: str) -> list[tuple[str, bool, str]]:
        return [(field, getattr(self, field) >= least, f"at least {least}") for field in fields]

    def positive(self, *fields: str) -> list[tuple[str, bool, str]]:
        return [(field, 0 < getattr(self, field) < math.inf, "positive and finite") for field in fields]

    @classmethod
    def sized(cls, size: Size) -> Self:
        """With the fields of a size."""
        if size not in get_args(Size):
            raise ValueError(f"{cls.name}: size must be one of {', '.join(get_args(Size))}, got {size!r}")
        return cls(**{"default": {}, "small": cls.SMALL, "paper": cls.PAPER}[size])

    def data_used(self) -> str:
        """Where the data come from."""
        return "synthetic, drawn from the seed"

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    def compile_pays(self) -> bool:
        """Whether to compile where nobody has said so and there is a compiler."""
        return self.compilable

    @abstractmethod
    def claims(self) -> list[Claim]:
        """What the last rows of the metrics must show."""

    def announcement(self) -> str:
        """What is run and what is claimed of it, to be said before."""
        seeds = f"seed {self.seed}" if self.num_seeds == 1 else f"seeds {self.seed} to {self.seeds[-1]}"
        return "\n".join([f"{self.name}, {seeds}; claimed for each:", *(f"  {c.text}: {c.quantity} {c.criterion}" for c in self.claims())])

    @abstractmethod
    def start(self, device: torch.device, compiled: bool) -> Run:
        """The run at its start: a function of the setting's fields alone."""

    @abstractmethod
    def figure(self, outcome: Outcome) -> Figure:
        """The one picture worth showing."""


# -------------------------------------------------------------------------------------------------------------------------------------------- runs


class Clock:
    """``with clock:`` adds to ``clock.seconds``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.begun


class Reading(NamedTuple):
    """What is read of a run at a step."""

    rows: list[dict[str, Any]]  # of metrics.csv: step, arm, seed, and the same columns every time
    seconds: float = 0.0  # of them spent in the library's norms and traces
    status: str = ""  # for the progress bar


class Run(ABC):
    """An experiment under way.

    Everything it does is a function of the setting and the step; its state is tensors and numbers, in mappings and lists.
    """

    reading_steps: Sequence[int]
    """Where it is read, in ascending order; the last one is its end. Its start, 0, may be among them."""
    unit: str = "step"
    """What a step is, for the progress bar."""
    preparing: str = ""
    """What the next ``advance`` does before it takes steps (compiling), for the progress bar; Ctrl-C is not put off meanwhile."""

    @abstractmethod
    def advance(self, start: int, stop: int, between: Callable[[], None]) -> None:
        """Steps ``start ... stop - 1``. Calls ``between`` every second or more often: it raises KeyboardInterrupt after Ctrl-C.

        Raises :class:`NonFiniteError` where training leaves the finite numbers. After an exception the run is not used any more; what was saved at the last
        reading is what a resumed run begins with.
        """

    @abstractmethod
    def read(self, step: int) -> Reading:
        """The rows for ``metrics.csv`` at ``step``, where the run stands. Changes nothing that later steps depend on."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, and the figure. Need not be a copy."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the run stood whose state this is."""

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` is to say beyond the claims."""
        return {}


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Trainee:
    """One model in training: one arm, one seed.

    ``step(k)`` takes training step k, counted from 0. It depends on k and on what ``model`` and ``optimizer`` (torch's, or ``gg.optim.NSO``) hold; nothing else
    may run along. Whatever has a ``state_dict`` will do as an optimizer.
    """

    arm: str
    seed: int
    model: nn.Module
    optimizer: _Stateful
    step: Callable[[int], object]


class TrainingRun(Run):
    """Ordinary models under any optimiser, one after the other from reading to reading.

    Args:
        trainees: one for each arm and seed.
        reading_steps: see :func:`ghostgrad.training.reading_steps`.
        measure: the columns of one trainee, beside ``step``, ``arm`` and ``seed``: ``measure(trainee, clock)``, with the library's norms and traces under
            ``with clock:``. A column named ``loss`` is shown on the progress bar.
        advice: what to do if training diverges, for the error.
    """

    def __init__(
        self,
        trainees: Sequence[Trainee],
        reading_steps: Sequence[int],
        measure: Callable[[Trainee, Clock], dict[str, Any]],
        advice: str = "Try a smaller --lr.",
    ) -> None:
        self.trainees, self.reading_steps, self.measure, self.advice = trainees, reading_steps, measure, advice

    def advance(self, start: int, stop: int, between: Callable[[], None]) -> None:
        for trainee in self.trainees:
            for step in range(start, stop):
                between()
                trainee.step(step)
        finite = [all(bool(p.isfinite().all()) for p in t.model.parameters()) for t in self.trainees]
        check_finite([(t.arm, t.seed) for t in self.trainees], finite, start, stop, self.advice)

    def read(self, step: int) -> Reading:
        clock = Clock()
        rows = []
        for t in self.trainees:
            with _computing(t.arm, t.seed):
                rows.append({"step": step, "arm": t.arm, "seed": t.seed, **self.measure(t, clock)})
        return Reading(rows, clock.seconds, f"loss {np.mean([row['loss'] for row in rows]):.2e}" if "loss" in rows[0] else "")

    def state_dict(self) -> dict[str, Any]:
        return {f"{t.arm}, seed {t.seed}": {"model": t.model.state_dict(), "optimizer": t.optimizer.state_dict()} for t in self.trainees}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for t in self.trainees:
            held = state[f"{t.arm}, seed {t.seed}"]
            t.model.load_state_dict(held["model"])
            t.optimizer.load_state_dict(held["optimizer"])


class GridRun(Run):
    """Independent cells, one after the other: a step is a cell, and is read when it is done, so that what stands in ``metrics.csv`` is never done again.

    Args:
        cells: (arm, seed) of each.
        work: the rows of a cell, each of them the same columns, beside ``step`` (the cell's number, from 1), ``arm`` and ``seed``:
            ``work(arm, seed, clock, between)``. It calls ``between()`` now and then, as :meth:`Run.advance` does.
    """

    unit = "cell"

    def __init__(self, cells: Sequence[tuple[str, int]], work: Callable[[str, int, Clock, Callable[[], None]], list[dict[str, Any]]]) -> None:
        self.cells, self.work, self.reading_steps = cells, work, range(1, len(cells) + 1)

    def advance(self, start: int, stop: int, between: Callable[[], None]) -> None:
        between()
        arm, seed = self.cells[start]
        clock = Clock()
        with _computing(arm, seed):
            rows = [{"step": stop, "arm": arm, "seed": seed, **row} for row in self.work(arm, seed, clock, between)]
        self.done = Reading(rows, clock.seconds, f"{arm}, seed {seed}")

    def read(self, step: int) -> Reading:
        return self.done

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def philox(seed: int, purpose: int) -> np.random.Generator:
    """Random numbers with an address: what comes is a function of (seed, purpose) alone, and another address is another stream (the two are Philox's key).

    Purposes are numbered by the setting: blocks of steps, sizes, arms. :func:`batches` numbers epochs; purposes beside it begin at 2^32, where no epoch is.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)))


def batches(
    seed: int,
    epoch: int,
    n: int,
    size: int,
) -> list[Tensor]:  # of (size,), the last one shorter
    """The samples 0 ... n - 1 in a random order, in batches: a function of its arguments alone, at the address (seed, epoch)."""
    return list(torch.from_numpy(philox(seed, epoch).permutation(n)).split(size))


def reading_steps(steps: int, read_every: int) -> list[int]:
    """When a run is read: at every ``read_every``, at ``read_every / 2, / 4, ...`` before the first (curves are log-log), at the start and end."""
    early = {read_every >> k for k in range(1, 24)} - {0}
    return sorted({0, steps} | {s for s in early | set(range(read_every, steps, read_every)) if s < steps})


# -------------------------------------------------------------------------------------------------------------------------------- the run directory


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used. The message names the path, the rule and a way out."""


class RunDirectory:
    """``config.json``, ``metrics.csv``, ``timings.csv``, ``checkpoint.pt``, ``summary.json`` and ``figures/`` under one path."""

    OURS = ("config.json", "metrics.csv", "timings.csv", "checkpoint.pt", "summary.json", "figures")

    CHECKPOINT = ("step", "state", "metrics_bytes", "seconds", "norm_seconds")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.release: Callable[[], object] = lambda: None

    def claim(self) -> None:
        """Refuse the directory where another process runs in it: two that write the same files leave none whole. Until ``release``, or the process ends."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise RunDirectoryError(f"another process is running in {self.path}. Wait until it has ended, or pass another --out.") from error
        except OSError:  # a file system without locks
            pass
        self.release = weakref.finalize(self, os.close, handle)

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run that lies here."""
        file = self.path / "config.json"
        if not file.is_file():
            raise RunDirectoryError(f"{self.path} holds no run to resume (no config.json). Leave --resume away to start one there.")
        try:
            config: dict[str, Any] = json.loads(file.read_text())
            if not isinstance(config["fields"], dict):
                raise TypeError("fields is not an object")
            missing = {"setting", "device", "compiled"} - set(config)
            if missing:
                raise KeyError(", ".join(sorted(missing)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"{file} is not a configuration that ghostgrad wrote ({type(error).__name__}: {error}), or only half of one. "
                "Pass --overwrite to start again in this directory, or another --out."
            ) from error
        return config

    def create(self, config: dict[str, Any], overwrite: bool = False) -> None:
        """Claim the directory for a new run. Files of others are never touched; those of an earlier run only with ``overwrite``."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise RunDirectoryError(f"{self.path} is a file; a run needs a directory of its own. Pass another --out.")
            present = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            ours = {*self.OURS, *(f".{name}.part" for name in self.OURS)}  # the latter where a run was killed while it wrote
            foreign = [name for name in present if name not in ours]
            if foreign or (present and "config.json" not in present):
                raise RunDirectoryError(
                    f"{self.path} is not empty and is not a run of ghostgrad's alone (it holds {', '.join((foreign or present)[:3])}). "
                    "A run needs an empty directory: pass another --out."
                )
            if present and not overwrite:
                raise RunDirectoryError(
                    f"{self.path} already holds a run, and a run is never overwritten unasked. "
                    "Pass --resume to go on with it, --overwrite to replace it, or another --out."
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self.claim()
            for name in present:
                child = self.path / name
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            self.write("config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise RunDirectoryError(f"cannot write a run to {self.path}: {error.strerror or error}. Pass an --out that you may write to.") from error

    def check_same(self, config: dict[str, Any]) -> None:
        """Refuse to resume a run under another configuration, naming each difference."""
        stored = self.read_config()
        fields = {**stored["fields"], **{k: stored.get(k) for k in ("setting", "device", "compiled")}}
        wanted = {**config["fields"], **{k: config.get(k) for k in ("setting", "device", "compiled")}}
        differing = [f"  {k}: {fields.get(k)!r} there, {wanted.get(k)!r} asked for" for k in {**fields, **wanted} if fields.get(k) != wanted.get(k)]
        if differing:
            raise RunDirectoryError(
                f"{self.path} holds a run with another configuration:\n"
                + "\n".join(differing)
                + "\nResume it with its own (leave these options away), or start another run with another --out."
            )
        for package in ("ghostgrad", "torch"):
            if stored.get(package) != config.get(package):
                warnings.warn(
                    f"{self.path} was begun with {package} {stored.get(package)} and goes on with {config.get(package)}: "
                    "its numbers may differ from those of an uninterrupted run",
                    stacklevel=2,
                )

    def write(self, name: str, data: str) -> None:
        """Write a text file so that it is either the old one or the new one, never half of it."""
        with self._replacing(name) as temporary:
            temporary.write_text(data)

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with self._replacing("checkpoint.pt") as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if the run was stopped before its first."""
        file = self.path / "checkpoint.pt"
        if not file.exists():
            return None
        try:
            checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            missing = set(self.CHECKPOINT) - set(checkpoint)
            if missing:
                raise KeyError(", ".join(sorted(missing)))
        except Exception as error:  # torch.load raises many kinds
            raise RunDirectoryError(
                f"{file} cannot be read as a checkpoint ({type(error).__name__}). Pass --overwrite to start again in this directory, or another --out."
            ) from error
        return checkpoint

    def table(self, name: str, keep_bytes: int | None) -> _Table:
        """A CSV file cut back to its first ``keep_bytes`` (None: all of it)."""
        file = self.path / name
        size = file.stat().st_size if file.exists() else 0
        if keep_bytes is not None and size < keep_bytes:
            raise RunDirectoryError(
                f"{file} has {size} bytes, the checkpoint beside it knows of {keep_bytes}: it was changed or replaced. "
                "Pass --overwrite to start again in this directory, or another --out."
            )
        return _Table(file, size if keep_bytes is None else keep_bytes)

    def save_figure(self, name: str, figure: Figure) -> None:
        """As PNG and SVG, the same bytes for the same figure. A logarithmic axis without positive data, which cannot be drawn, becomes linear."""
        import matplotlib as mpl

        for ax in figure.axes:
            for axis, least in ((ax.xaxis, ax.dataLim.minposx), (ax.yaxis, ax.dataLim.minposy)):
                if axis.get_scale() == "log" and least == math.inf and ax.has_data():
                    ax.set(**{f"{axis.axis_name}scale": "linear"})
        (self.path / "figures").mkdir(exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "ghostgrad", "svg.fonttype": "path"}):
            figure.savefig(self.path / "figures" / f"{name}.svg", metadata={"Date": None})
            figure.savefig(self.path / "figures" / f"{name}.png", dpi=150, metadata={"Software": None})

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        temporary = self.path / f".{name}.part"
        try:
            yield temporary
            os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)


class _Table:
    """A CSV file that grows by whole rows and can be cut back to where a checkpoint knew it."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.file = path.open("a+", newline="")
        self.file.truncate(keep_bytes)
        self.size = keep_bytes
        self.file.seek(0)
        self.columns = next(csv.reader(self.file), [])

    def append(self, rows: list[dict[str, Any]]) -> None:
        if self.size == 0:
            self.columns = list(rows[0])
        writer = csv.DictWriter(self.file, fieldnames=self.columns, lineterminator="\n")
        if self.size == 0:
            writer.writeheader()
        for row in rows:
            if list(row) != self.columns:
                raise ValueError(f"{self.file.name} has the columns {', '.join(self.columns)}, a row for it {', '.join(row)}")
        writer.writerows(rows)
        self.file.flush()
        self.size = os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()


# ----------------------------------------------------------------------------------------------------------------------------------------- training


class NonFiniteError(RuntimeError):
    """Training left the finite numbers. What was written until then is kept."""


class CompileError(RuntimeError):
    """The steps could not be compiled."""


def check_finite(
    trained: Sequence[tuple[str, int]],  # arm and seed of each
    finite: Sequence[bool],
    start: int,
    stop: int,
    advice: str,
) -> None:
    """Raises NonFiniteError, naming what was lost and between which steps, unless all are ``finite``."""
    lost = [f"arm '{arm}', seed {seed}" for (arm, seed), ok in zip(trained, finite, strict=True) if not ok]
    if lost:
        raise NonFiniteError(
            f"training left the finite numbers between step {start} and step {stop}: {'; '.join(lost)}. {advice} What was written up to then is kept."
        )


@contextlib.contextmanager
def _computing(arm: str, seed: int) -> Iterator[None]:
    """Numbers that overflow, vanish or are not finite, wherever it is found out, as NonFiniteError; all other errors as they are."""
    from scipy.sparse.linalg import ArpackError

    try:
        yield
    except (ArithmeticError, ValueError, RuntimeError) as error:
        numeric = isinstance(error, (ArithmeticError, ArpackError)) or type(error).__name__.endswith("LinAlgError")  # ARPACK fails for a Hessian that is 0
        if isinstance(error, NonFiniteError) or not (numeric or any(words in str(error) for words in ("finite", "infs or NaNs"))):
            raise
        raise NonFiniteError(
            f"arm '{arm}', seed {seed} left the numbers that can be computed with ({type(error).__name__}: {error}). "
            "Try a smaller learning rate, or options nearer their defaults. What was written up to then is kept."
        ) from error


def has_compiler() -> bool:
    return any(c and shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++"))


class _Interrupt:
    """Ctrl-C, or SIGTERM (a cluster's scheduler, a report's end), heard where the run says that its state is whole.

    A KeyboardInterrupt that is raised wherever Python happens to be can be lost: in 1 of 14 runs it fell into a callback below torch, which dropped it.
    So the first Ctrl-C is only noted, and :meth:`check` raises it where the state is whole. While a run prepares (compiles), and for a second Ctrl-C, it is
    raised at once too.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def __enter__(self) -> _Interrupt:
        # Not from other threads, which cannot, nor where somebody else has taken the signal (nohup, a notebook).
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        here = threading.current_thread() is threading.main_thread()
        self.ours = {kind: handler for kind, handler in usual.items() if here and signal.getsignal(kind) is handler}
        for kind in self.ours:
            signal.signal(kind, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.ours.items():
            signal.signal(kind, handler)

    def _note(self, *_: object) -> None:
        again, self.asked = self.asked, True
        if again or self.at_once:
            raise KeyboardInterrupt

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


def config_of(setting: Setting, device: str, compiled: bool) -> dict[str, Any]:
    """What determines a run's numbers, as ``config.json`` holds it."""
    return {
        "setting": setting.name,
        "fields": dataclasses.asdict(setting),
        "device": device,
        "compiled": compiled,
        "ghostgrad": gg.__version__,
        "torch": str(torch.__version__),
    }


def train(
    setting: Setting,
    out: str | Path,
    *,
    device: str = "cpu",
    compiled: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    checkpoint_seconds: float = 5.0,
) -> Outcome:
    """Run a setting into the directory ``out``.

    ``compiled=None`` compiles where the setting can, a compiler is found and the run is long enough; a resumed run does as it did before. Raises
    :class:`RunDirectoryError` before anything is trained, :class:`NonFiniteError` where training diverges. On any exception, ``KeyboardInterrupt`` among
    them, the last reading is saved as a checkpoint first.
    """
    import pandas as pd

    directory = RunDirectory(out)
    if resume and compiled is None:
        compiled = bool(directory.read_config().get("compiled"))
    if compiled is None:
        compiled = setting.compile_pays() and has_compiler()
    if compiled and not setting.compilable:
        raise CompileError(f"{setting.name} has nothing to compile. Leave --compile away.")
    config = config_of(setting, device, compiled)
    run = setting.start(torch.device(device), compiled)
    checkpoint = None
    if resume:
        directory.check_same(config)
        directory.claim()
        checkpoint = directory.load_checkpoint()
    else:
        directory.create(config, overwrite)

    # The last reading: its step, the state there, and how long metrics.csv was after it. A resumed run goes on from there and cuts off what was written
    # later. The three go together in one tuple, so that no interrupt can part them.
    reached: tuple[int, dict[str, Any], int] | None = None
    seconds = norm_seconds = 0.0
    if checkpoint is not None:
        reached = (checkpoint["step"], checkpoint["state"], checkpoint["metrics_bytes"])
        seconds, norm_seconds = checkpoint["seconds"], checkpoint["norm_seconds"]
        run.load_state_dict(copy.deepcopy(checkpoint["state"]))
    metrics = directory.table("metrics.csv", reached[2] if reached else 0)
    timings = directory.table("timings.csv", None if reached else 0)
    begun = saved_at = time.perf_counter()
    begun -= seconds

    def save() -> None:
        if reached is not None:
            directory.save_checkpoint(dict(zip(directory.CHECKPOINT, (*reached, time.perf_counter() - begun, norm_seconds), strict=True)))

    step, total = reached[0] if reached else 0, run.reading_steps[-1]
    seldom = 0.1 if sys.stderr.isatty() else 30.0  # a log file gets a line now and then
    bar = tqdm(total=total, initial=step, unit=run.unit, unit_scale=True, disable=not progress, file=sys.stderr, dynamic_ncols=True, mininterval=seldom)
    with _Interrupt() as interrupt:
        try:
            for stop in [s for s in run.reading_steps if reached is None or s > step]:
                interrupt.check()
                if step < stop:
                    interrupt.at_once = bool(run.preparing)
                    bar.set_description_str(run.preparing, refresh=interrupt.at_once)
                    run.advance(step, stop, interrupt.check)
                    interrupt.at_once = False
                rows, spent, status = run.read(stop)
                metrics.append(rows)
                step, norm_seconds, seconds = stop, norm_seconds + spent, time.perf_counter() - begun
                reached = (step, copy.deepcopy(run.state_dict()), metrics.size)
                timings.append([{"step": step, "seconds": round(seconds, 3), "norm_seconds": round(norm_seconds, 3)}])
                share = f"norms {norm_seconds / seconds:.0%} of the time" if norm_seconds else ""
                bar.set_postfix_str(", ".join(filter(None, (status, share))), refresh=False)
                bar.update(step - bar.n)
                if time.perf_counter() - saved_at > checkpoint_seconds:
                    save()
                    saved_at = time.perf_counter()
        finally:
            save()
            bar.close()
            metrics.close()
            timings.close()
            directory.release()

    frame = pd.read_csv(directory.path / "metrics.csv")
    outcome = Outcome(setting, run, frame, [claim.verdict(frame) for claim in setting.claims()], seconds, norm_seconds)
    directory.write("summary.json", json.dumps(_summary(outcome, config), indent=2) + "\n")
    directory.save_figure(setting.name.replace("/", "-"), setting.figure(outcome))
    return outcome


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the run at its end, ``metrics.csv`` as a frame, and the claims judged."""

    setting: Setting
    run: Run
    metrics: pd.DataFrame
    verdicts: list[Verdict]
    seconds: float
    norm_seconds: float  # of them spent in the library's norms and traces, while reading

    @property
    def holds(self) -> bool:
        """No claim fails."""
        return all(v.holds is not False for v in self.verdicts)

    def table(self) -> str:
        """Each claim, the value measured, the bound, and whether it holds; then what it cost."""
        rows = [("claim", "measured (worst seed)", "bound", "")]
        rows += [(v.claim.text, str(v), v.claim.criterion, v.word + (f" ({v.reason})" if v.reason else "")) for v in self.verdicts]
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", f"{self.seconds:.0f} s, {self.norm_seconds / self.seconds:.1%} of them for the norms"])


def _summary(outcome: Outcome, config: dict[str, Any]) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no others

    def told(v: Verdict) -> dict[str, Any]:
        return {
            **dataclasses.asdict(v.claim),
            "quantity": v.claim.quantity,
            "criterion": v.claim.criterion,
            "measured": number(v.measured),
            "interval": None if v.interval is None else [number(end) for end in v.interval],
            "holds": v.holds,
            "verdict": v.word,
            "reason": v.reason,
            "by_seed": {str(s): number(m) for s, m in v.by_seed.items()},
        }

    return {
        **config,
        "data": outcome.setting.data_used(),
        "holds": outcome.holds,
        "claims": [told(v) for v in outcome.verdicts],
        **outcome.run.summary(),
        "time": {"seconds": round(outcome.seconds, 2), "norm_seconds": round(outcome.norm_seconds, 2)},
    }
