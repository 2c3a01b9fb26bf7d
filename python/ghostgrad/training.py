"""The loop that the papers' settings share: label noise, reading the regulariser, metrics, checkpoints, resume.

A :class:`Setting` says what is trained and what is claimed of it; :func:`train` runs it. Three decisions shape this module.

*Side by side.* The networks are tiny and the steps are many, so all arms and seeds of a setting are trained as one batched network (``torch.func.vmap``
over a leading dimension R of *replicas*), and ``CHUNK`` steps of it are traced into one graph, which ``torch.compile`` turns into one call where that pays.

*Randomness has an address.* Which sample a step sees and which noise its label gets is a function of (seed, step) alone, see :func:`draws`. Nothing about
the generator needs saving: a resumed run, a run of fewer seeds or one of another arm meets the same draws.

*Numbers apart from times.* ``metrics.csv`` holds what the seed determines, ``timings.csv`` what the machine does. A run that was killed and resumed ends
with the same ``metrics.csv``, byte for byte, as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm

import ghostgrad as gg

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "Arm",
    "Claim",
    "CompileError",
    "NonFiniteError",
    "Outcome",
    "Problem",
    "Replica",
    "RunDirectory",
    "RunDirectoryError",
    "Setting",
    "Verdict",
    "draws",
    "train",
]

CHUNK = 16  # steps per compiled call: long enough to hide the call (20 us), short enough to compile in seconds
DRAW_BLOCK = 1024  # steps per key of the counter-based generator; part of the address, so changing it changes every run
COMPILE_FROM = 100_000  # steps from which compiling (10 to 20 s, the first time) is cheaper than tracing alone


# ---------------------------------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Arm:
    """One way of training. All arms of a seed start from the same parameters and see the same samples in the same order."""

    name: str
    noise_variance: float  # of the fresh label noise; 0 for none
    variant: str = ""  # which of the setting's models, where it has several


@dataclass(frozen=True)
class Problem:
    """A model, at its start, with the data that it is to fit and the value that theory says its regulariser cannot go below."""

    model: nn.Module  # (n, ...) -> (n,)
    x: Tensor  # (n, ...)
    y: Tensor  # (n,)
    floor: float  # of reg = mean_i ||grad f(x_i)||^2, over all parameters with f(x_i) = y_i
    truth: Tensor | None = None  # what the model is to find, where that is known


@dataclass(frozen=True)
class Claim:
    """A statement about the last row of an arm: ``column relation bound``, for every seed."""

    text: str
    arm: str
    column: str
    relation: Literal["<=", ">=", "=="]
    bound: float

    def judge(self, by_seed: dict[int, float]) -> Verdict:
        """The worst seed decides; NaN never holds."""
        holds = {"<=": lambda v: v <= self.bound, ">=": lambda v: v >= self.bound, "==": lambda v: v == self.bound}[self.relation]
        badness = {"<=": lambda v: v, ">=": lambda v: -v, "==": lambda v: abs(v - self.bound)}[self.relation]
        worst = max(by_seed.values(), key=lambda v: math.inf if math.isnan(v) else badness(v))
        return Verdict(self, worst, holds(worst), by_seed)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: ``measured`` is its worst seed's value."""

    claim: Claim
    measured: float
    holds: bool
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Replica:
    """One of the networks trained side by side."""

    arm: Arm
    seed: int
    problem: Problem


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the trained networks, ``metrics.csv`` as a frame, and the claims judged."""

    setting: Setting
    replicas: list[Replica]
    metrics: pd.DataFrame
    verdicts: list[Verdict]
    seconds: float
    norm_seconds: float

    @property
    def holds(self) -> bool:
        return all(v.holds for v in self.verdicts)

    def table(self) -> str:
        """Each claim, the value measured, the bound, and whether it holds; then what it cost."""
        rows = [("claim", "measured (worst seed)", "bound", "")]
        for v in self.verdicts:
            rows.append((v.claim.text, f"{v.claim.column} = {v.measured:.6g}", f"{v.claim.relation} {v.claim.bound:g}", "holds" if v.holds else "FAILS"))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", f"{self.seconds:.0f} s, {self.norm_seconds / self.seconds:.1%} of them for the norms"])


@dataclass(frozen=True)
class Setting(ABC):
    """SGD with batch size 1 on ``1/2 (f(x_i) - y_i - z)^2``, the label noise ``z`` fresh in every step.

    At the end of the run, for the last ``settle`` of its steps, the labels are clean in every arm. Label noise keeps a network at a distance from the
    interpolating ones, and only for those is the floor a floor: with the noise on, ``reg`` does fall a few percent below it.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    duration: ClassVar[str]

    seed: int = 0
    """First seed; the run uses seed, seed + 1, ..."""
    num_seeds: int = 3
    """How many seeds are trained side by side."""
    steps: int = 100_000
    """Steps of SGD, one sample each."""
    read_every: int = 1_000
    """Steps between two readings of the regulariser; before the first of them it is also read at its halves, quarters, ..."""
    lr: float = 0.01
    """Learning rate, for the half-squared loss 1/2 (f - y)^2 (for the paper's (f - y)^2 it would be half of this)."""
    noise_variance: float = 1.0
    """Variance, not standard deviation, of the label noise. The drift per step is -(lr^2 variance / 4) grad reg."""
    settle: float = 0.2
    """Share of the steps, at the end, that have clean labels in every arm, so that all networks end at zero error."""

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("seed", self.seed >= 0, "at least 0"),
            ("num_seeds", self.num_seeds >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("read_every", self.read_every >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "positive and finite"),
            ("noise_variance", 0 <= self.noise_variance < math.inf, "at least 0 and finite"),
            ("settle", 0 <= self.settle <= 1, "between 0 and 1"),
            *self.rules(),
        ]
        for field, kept, rule in rules:
            if not kept:
                raise ValueError(f"{self.name}: {field} must be {rule}, got {getattr(self, field)!r}")

    def rules(self) -> list[tuple[str, bool, str]]:
        """Of the setting's own fields: (field, whether its rule is kept, the rule in words)."""
        return []

    def arms(self) -> list[Arm]:
        return [Arm("with noise", self.noise_variance), Arm("without noise", 0.0)]

    @abstractmethod
    def problem(self, arm: Arm, seed: int) -> Problem:
        """The model at its start and the data; a function of its arguments and the setting's fields alone."""

    @abstractmethod
    def measure(self, problem: Problem) -> dict[str, float]:
        """The setting's own columns of ``metrics.csv``, beside ``loss``, ``reg`` and ``reg_over_floor``."""

    @abstractmethod
    def claims(self) -> list[Claim]:
        """What the last row of the metrics must show."""

    def announcement(self) -> str:
        """What is run and what is claimed of it, to be said before."""
        last = self.seed + self.num_seeds - 1
        seeds = f"seed {self.seed}" if last == self.seed else f"seeds {self.seed} to {last}"
        return "\n".join([f"{self.name}, {seeds}; claimed for each:", *(f"  {c.text}: {c.column} {c.relation} {c.bound:g}" for c in self.claims())])

    @abstractmethod
    def figure(self, outcome: Outcome) -> Figure:
        """The one picture worth showing."""


# -------------------------------------------------------------------------------------------------------------------------------- the run directory


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used. The message names the path, the rule and a way out."""


class RunDirectory:
    """``config.json``, ``metrics.csv``, ``timings.csv``, ``checkpoint.pt``, ``summary.json`` and ``figures/`` under one path."""

    OURS = ("config.json", "metrics.csv", "timings.csv", "checkpoint.pt", "summary.json", "figures")

    CHECKPOINT = ("step", "params", "metrics_bytes", "seconds", "norm_seconds")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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
            for name in present:
                child = self.path / name
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
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
        """As PNG and SVG, the same bytes for the same figure."""
        import matplotlib as mpl

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

    def append(self, rows: list[dict[str, Any]]) -> None:
        writer = csv.DictWriter(self.file, fieldnames=list(rows[0]), lineterminator="\n")
        if self.size == 0:
            writer.writeheader()
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


def draws(seed: int, start: int, stop: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample index and standard normal of each of the steps ``start ... stop - 1``: a function of (seed, step, num_samples) alone.

    Philox with key (seed, step // 1024): any range of steps can be drawn without drawing what came before it.
    """
    index, normal = [], []
    for block in range(start // DRAW_BLOCK, -(-stop // DRAW_BLOCK)):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, block], dtype=np.uint64)))
        steps = slice(max(start - block * DRAW_BLOCK, 0), min(stop - block * DRAW_BLOCK, DRAW_BLOCK))
        index.append(rng.integers(num_samples, size=DRAW_BLOCK)[steps])
        normal.append(rng.standard_normal(DRAW_BLOCK)[steps])
    return np.concatenate(index), np.concatenate(normal)


def reading_steps(steps: int, read_every: int) -> list[int]:
    """When the regulariser is read: at every ``read_every``, at ``read_every / 2, / 4, ...`` before the first (curves are log-log), at the start and end."""
    early = {read_every >> k for k in range(1, 24)} - {0}
    return sorted({0, steps} | {s for s in early | set(range(read_every, steps, read_every)) if s < steps})


def has_compiler() -> bool:
    return any(c and shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++"))


class _Interrupt:
    """Ctrl-C, heard between two chunks of steps.

    A KeyboardInterrupt that is raised wherever Python happens to be can be lost: in 1 of 14 runs it fell into a callback below torch, which dropped it.
    So the first Ctrl-C is only noted, and :meth:`check` raises it where the state is whole. While compiling, and for a second Ctrl-C, it is raised at once too.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def __enter__(self) -> _Interrupt:
        # Not from other threads, which cannot, nor where somebody else has taken the signal (nohup, a notebook).
        self.ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: object) -> None:
        again, self.asked = self.asked, True
        if again or self.at_once:
            raise KeyboardInterrupt

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


class _Stack:
    """All replicas as one batched network: parameters (R, ...), samples (R, n, ...), and the step that moves them."""

    def __init__(self, replicas: list[Replica], lr: float, device: torch.device, compiled: bool) -> None:
        self.template = replicas[0].problem.model
        self.lr, self.device, self.compiled = lr, device, compiled
        models = [r.problem.model for r in replicas]
        self.params = {k: torch.stack([m.get_parameter(k).detach() for m in models]) for k, _ in self.template.named_parameters()}
        self.fixed = {
            "buffers": {k: torch.stack([m.get_buffer(k) for m in models]) for k, _ in self.template.named_buffers()},
            "x": torch.stack([r.problem.x for r in replicas]),  # (R, n, ...)
            "y": torch.stack([r.problem.y for r in replicas]),  # (R, n)
            "row": torch.arange(len(replicas), device=device),  # (R,)
        }
        self.calls: dict[int, Callable[..., dict[str, Tensor]]] = {}

    def _chunk(
        self,
        params: dict[str, Tensor],  # (R, ...)
        fixed: dict[str, Any],
        index: Tensor,  # (K, R)
        noise: Tensor,  # (K, R)
    ) -> dict[str, Tensor]:  # (R, ...)
        """K steps of SGD: ``theta <- theta - lr grad 1/2 (f(x_i) - y_i - z)^2``."""

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            return 0.5 * (functional_call(self.template, {**params, **buffers}, (x[None],))[0] - target).square()

        x = fixed["x"][fixed["row"], index]  # (K, R, ...)
        target = fixed["y"][fixed["row"], index] + noise  # (K, R)
        for k in range(index.shape[0]):
            gradient = vmap(grad(loss))(params, fixed["buffers"], x[k], target[k])
            params = {name: p - self.lr * gradient[name] for name, p in params.items()}
        return params

    def advance(self, index: Tensor, noise: Tensor, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """The parameters after the steps of ``index`` and ``noise``, both (K, R). ``self.params`` stay, so that an interrupt leaves a whole state.

        ``between`` is called before every chunk.
        """
        params = self.params
        whole = len(index) // CHUNK
        sizes = [CHUNK] * whole + [1] * (len(index) - whole * CHUNK)  # the rest one by one: two graphs serve every length
        for i, z in zip(index.split(sizes), noise.split(sizes), strict=True):
            between()
            if len(i) not in self.calls:
                # Traced once to plain operations: without a compiler this alone is three times as fast as vmap(grad(...)) in every step.
                call = make_fx(lambda *args: self._chunk(*args))(params, self.fixed, i, z)
                self.calls[len(i)] = self._compile(call, (params, self.fixed, i, z)) if self.compiled and len(i) == CHUNK else call
            params = self.calls[len(i)](params, self.fixed, i, z)
        return params

    def _compile(self, call: Callable[..., dict[str, Tensor]], example: tuple[Any, ...]) -> Callable[..., dict[str, Tensor]]:
        compiled = torch.compile(call)
        try:
            compiled(*example)
        except Exception as error:  # whatever is wrong with the compiler of this machine
            raise CompileError(
                f"torch.compile failed here ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}). "
                "Run with --compile no (and --overwrite, or another --out): the same training, some 30 times slower for the smallest networks."
            ) from error
        return compiled

    def write_back(self, replicas: list[Replica]) -> None:
        with torch.no_grad():
            for r, replica in enumerate(replicas):
                for name, p in replica.problem.model.named_parameters():
                    p.copy_(self.params[name][r])


def _replicas(setting: Setting, device: torch.device) -> list[Replica]:
    out = []
    for arm in setting.arms():
        for seed in range(setting.seed, setting.seed + setting.num_seeds):
            problem = setting.problem(arm, seed)
            out.append(Replica(arm, seed, dataclasses.replace(problem, model=problem.model.to(device), x=problem.x.to(device), y=problem.y.to(device))))
    return out


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

    ``compiled=None`` compiles where a compiler is found and the run is long enough; a resumed run does as it did before. Raises
    :class:`RunDirectoryError` before anything is trained, :class:`NonFiniteError` where training diverges. On any exception, ``KeyboardInterrupt`` among
    them, the last reading is saved as a checkpoint first.
    """
    import pandas as pd

    directory = RunDirectory(out)
    if resume and compiled is None:
        compiled = bool(directory.read_config().get("compiled"))
    if compiled is None:
        compiled = has_compiler() and setting.steps >= COMPILE_FROM
    config = config_of(setting, device, compiled)
    replicas = _replicas(setting, torch.device(device))
    checkpoint = None
    if resume:
        directory.check_same(config)
        checkpoint = directory.load_checkpoint()
    else:
        directory.create(config, overwrite)

    stack = _Stack(replicas, setting.lr, torch.device(device), compiled)
    step, metrics_bytes, seconds, norm_seconds = 0, 0, 0.0, 0.0
    if checkpoint is not None:
        step, metrics_bytes = checkpoint["step"], checkpoint["metrics_bytes"]
        seconds, norm_seconds = checkpoint["seconds"], checkpoint["norm_seconds"]
        stack.params = {k: v.to(device) for k, v in checkpoint["params"].items()}

    # A checkpoint is taken *before* the reading at its step and remembers how long metrics.csv was then: a resumed run cuts off what was written after
    # it, takes that reading again, and thus writes the same bytes. The three go together in one tuple, so that no interrupt can part them.
    state = (step, stack.params, metrics_bytes)
    metrics = directory.table("metrics.csv", metrics_bytes)
    timings = directory.table("timings.csv", None if checkpoint else 0)
    begun = time.perf_counter() - seconds

    def save() -> None:
        directory.save_checkpoint(dict(zip(directory.CHECKPOINT, (*state, time.perf_counter() - begun, norm_seconds), strict=True)))

    schedule = [s for s in reading_steps(setting.steps, setting.read_every) if s >= step]
    seldom = 0.1 if sys.stderr.isatty() else 30.0  # a log file gets a line now and then
    bar = tqdm(total=setting.steps, initial=step, unit="step", unit_scale=True, disable=not progress, file=sys.stderr, dynamic_ncols=True, mininterval=seldom)
    saved_at = time.perf_counter()
    with _Interrupt() as interrupt:
        try:
            for step, stop in zip(schedule, [*schedule[1:], setting.steps], strict=True):
                state = (step, stack.params, metrics.size)
                stack.write_back(replicas)
                rows, spent = _read(setting, replicas, step)
                norm_seconds += spent
                metrics.append(rows)
                seconds = time.perf_counter() - begun
                timings.append([{"step": step, "seconds": round(seconds, 3), "norm_seconds": round(norm_seconds, 3)}])
                noisy = [row for row, r in zip(rows, replicas, strict=True) if r.arm.noise_variance > 0] or rows
                loss, reg = (np.mean([row[k] for row in noisy]) for k in ("loss", "reg"))
                bar.set_postfix_str(f"loss {loss:.2e}, reg {reg:.4g}, norms {norm_seconds / seconds:.0%} of the time", refresh=False)
                bar.update(step - bar.n)
                if time.perf_counter() - saved_at > checkpoint_seconds:
                    save()
                    saved_at = time.perf_counter()
                if step < stop:
                    interrupt.at_once = compiled and CHUNK not in stack.calls
                    bar.set_description_str("compiling" if interrupt.at_once else "", refresh=interrupt.at_once)
                    moved = _advance(stack, replicas, setting, step, stop, interrupt.check)
                    _check_finite(moved, replicas, setting, step, stop)
                    stack.params = moved
        finally:
            save()
            bar.close()
            metrics.close()
            timings.close()

    frame = pd.read_csv(directory.path / "metrics.csv")
    last = frame[frame["step"] == setting.steps]
    verdicts = [claim.judge(last[last["arm"] == claim.arm].set_index("seed")[claim.column].to_dict()) for claim in setting.claims()]
    outcome = Outcome(setting, replicas, frame, verdicts, seconds, norm_seconds)
    directory.write("summary.json", json.dumps(_summary(outcome, config), indent=2) + "\n")
    directory.save_figure(setting.name.replace("/", "-"), setting.figure(outcome))
    return outcome


def _advance(stack: _Stack, replicas: list[Replica], setting: Setting, start: int, stop: int, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Steps ``start ... stop - 1``. Arms of one seed share its draws; the noise is scaled by the arm, and is 0 while the run settles."""
    num_samples = len(replicas[0].problem.y)
    by_seed = {seed: draws(seed, start, stop, num_samples) for seed in {r.seed for r in replicas}}
    index = np.stack([by_seed[r.seed][0] for r in replicas], axis=1)  # (K, R)
    noise = np.stack([math.sqrt(r.arm.noise_variance) * by_seed[r.seed][1] for r in replicas], axis=1)  # (K, R)
    noise[np.arange(start, stop) >= setting.steps - round(setting.settle * setting.steps)] = 0.0
    return stack.advance(torch.from_numpy(index).to(stack.device), torch.from_numpy(noise).to(stack.device, replicas[0].problem.y.dtype), between)


def _read(setting: Setting, replicas: list[Replica], step: int) -> tuple[list[dict[str, Any]], float]:
    """One row per replica, and the seconds that the regulariser took. The loss is that of the clean labels."""
    rows, spent = [], 0.0
    for replica in replicas:
        problem = replica.problem
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no fused rule")  # one copy of a tiny network's gradient per sample is cheap
            reg = gg.output_sqnorms(problem.model, problem.x).mean().item()
        spent += time.perf_counter() - begun
        with torch.no_grad():
            loss = 0.5 * (problem.model(problem.x) - problem.y).square().mean().item()
            measured = setting.measure(problem)
        rows.append({"step": step, "arm": replica.arm.name, "seed": replica.seed, "loss": loss, "reg": reg, "reg_over_floor": reg / problem.floor, **measured})
    return rows, spent


def _check_finite(params: dict[str, Tensor], replicas: list[Replica], setting: Setting, start: int, stop: int) -> None:
    finite = torch.stack([p.isfinite().reshape(len(p), -1).all(1) for p in params.values()]).all(0).tolist()
    lost = [f"arm '{r.arm.name}', seed {r.seed}" for r, ok in zip(replicas, finite, strict=True) if not ok]
    if lost:
        raise NonFiniteError(
            f"{setting.name} left the finite numbers between step {start} and step {stop}: {'; '.join(lost)}. "
            f"The learning rate is too large for this noise or start: try --lr {setting.lr / 2:g}, or a smaller --noise-variance. "
            "What was written up to then is kept."
        )


def _summary(outcome: Outcome, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **config,
        "holds": outcome.holds,
        "claims": [
            {**dataclasses.asdict(v.claim), "measured": v.measured, "holds": v.holds, "by_seed": {str(s): m for s, m in v.by_seed.items()}}
            for v in outcome.verdicts
        ],
        "floors": [{"arm": r.arm.name, "seed": r.seed, "floor": r.problem.floor} for r in outcome.replicas],
        "time": {"seconds": round(outcome.seconds, 2), "norm_seconds": round(outcome.norm_seconds, 2)},
    }
