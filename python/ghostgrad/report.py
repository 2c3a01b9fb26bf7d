"""One page over all settings: ``ghostgrad report`` runs what is not there yet, several at a time, and writes ``report.html`` and ``report.md``.

A setting is run by ``ghostgrad run`` in a process of its own, with a directory of its own under the report's, so that one that crashes loses no other and the
page's commands do again what it did. A finished run of the same fields is collected; one that was stopped is resumed. The page is written from
``summary.json`` and the figures alone.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fnmatch
import inspect
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jinja2
import torch
import tyro
from tqdm import tqdm

import ghostgrad as gg

from .papers import SETTINGS
from .training import RunDirectoryError, Setting, Size, Verdict, mean_interval

__all__ = ["Entry", "Report", "ReportOptions", "collect", "report", "write_page"]

KINDS = ("md", "html")

NOT_FINISHED = "It was not run to its end."


@dataclass(frozen=True)
class ReportOptions:
    """What to run, and where."""

    size: Size = "small"
    """small: each setting in about a minute; paper: the papers' own sizes, or the largest that a CPU can do; default: what ghostgrad run does."""
    jobs: int = 0
    """Settings that run at a time, each with its share of the cores; 0: one for each core."""
    out: Path = Path("runs/report-SIZE")
    """Directory of the page and of the runs. Finished runs in it are collected, stopped ones resumed."""
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Settings to report, as a pattern: 'regression/*'. May be given more than once."""
    data: str = ""
    """Images for the settings that read some: a folder for each class, CIFAR's binary version, or IDX files. Left away, scikit-learn's digits."""
    device: str = "cpu"
    """Torch device of every run."""
    collect: bool = False
    """Run nothing: a page of the finished runs."""
    overwrite: bool = False
    """Run everything again, in place of the runs in that directory."""
    quiet: bool = False
    """Show no progress."""

    @property
    def directory(self) -> Path:
        return self.out.with_name(f"report-{self.size}") if self.out == ReportOptions.out else self.out

    @property
    def at_a_time(self) -> int:
        return self.jobs or _cores()

    @property
    def threads(self) -> int:
        """Of each run."""
        return max(1, _cores() // self.at_a_time)


@dataclass(frozen=True)
class Entry:
    """A setting on the page: its run and, once it has finished, what ``summary.json`` says."""

    setting: Setting
    directory: Path
    command: tuple[str, ...]
    """Its words after ``ghostgrad``."""
    summary: dict[str, Any] | None = None
    problem: str = ""
    """Why there is no summary."""

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def figure(self) -> Path:
        return self.directory / "figures" / f"{self.name.replace('/', '-')}.png"

    @property
    def words(self) -> list[str]:
        """The verdicts of its claims."""
        return [claim["verdict"] for claim in self.summary["claims"]] if self.summary else []

    @property
    def share(self) -> float:
        """Share of its time in the library's calls."""
        time = self.summary["time"] if self.summary else {}
        return time["norm_seconds"] / time["seconds"] if time.get("seconds") else 0.0

    @property
    def log(self) -> Path:
        return self.directory.with_name(self.directory.name + ".log")


def collect(entry: Entry) -> Entry:
    """With the summary of its run, if that has finished and is of the same fields; else with the reason why there is none."""
    try:
        summary = json.loads((entry.directory / "summary.json").read_text())
        fields, wanted = summary["fields"], json.loads(json.dumps(asdict(entry.setting)))
        if fields != wanted:
            differing = ", ".join(f"{k}: {fields.get(k)!r} there, {wanted.get(k)!r} here" for k in {**fields, **wanted} if fields.get(k) != wanted.get(k))
            return replace(entry, problem=f"{entry.directory} holds a run of other fields ({differing}). Pass --overwrite to replace it, or another --out.")
        if missing := {"claims", "time", "data", "torch", "ghostgrad"} - set(summary):
            raise KeyError(", ".join(sorted(missing)))
        return replace(entry, summary=summary, problem="")
    except FileNotFoundError:
        return replace(entry, problem=NOT_FINISHED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{entry.directory / 'summary.json'} cannot be read ({type(error).__name__}: {error}). Pass --overwrite to run the setting again."
        return replace(entry, problem=problem)


def plan(options: ReportOptions) -> list[Entry]:
    """The settings asked for, in the order of ``ghostgrad list``. Raises ValueError for a pattern that names none, or an option out of range."""
    if options.jobs < 0:
        raise ValueError(f"report: jobs must be at least 0, got {options.jobs}")
    for pattern in options.only:
        if not fnmatch.filter(SETTINGS, pattern):
            raise ValueError(f"report: no setting is called {pattern!r}. ghostgrad list names them")
    out = options.directory
    entries = []
    for name, cls in SETTINGS.items():
        if options.only and not any(fnmatch.fnmatchcase(name, pattern) for pattern in options.only):
            continue
        setting, command = cls.sized(options.size), ["run", name, "--size", options.size]
        if options.device != "cpu":
            command += ["--device", options.device]
        if options.data and any(field.name == "data" for field in dataclasses.fields(cls)):
            setting = replace(setting, data=options.data)  # type: ignore[call-arg]
            command += ["--data", options.data]
        entries.append(Entry(setting, out / name, (*command, "--out", str(out / name))))
    return entries


# ------------------------------------------------------------------------------------------------------------------------------------------- running


@dataclass
class _Pool:
    """Settings in processes of their own."""

    options: ReportOptions
    running: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)
    stopped: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def work(self, entry: Entry) -> Entry:
        """Runs the setting, and collects it. Its output is kept beside its directory. Raises nothing: what goes wrong is this entry's problem."""
        try:
            return self._work(entry)
        except OSError as error:
            return replace(entry, problem=f"It could not be run ({type(error).__name__}: {error}).")

    def _work(self, entry: Entry) -> Entry:
        begun = (entry.directory / "config.json").exists()
        mode = ["--overwrite"] if self.options.overwrite and begun else ["--resume"] if begun else []
        entry.directory.parent.mkdir(parents=True, exist_ok=True)
        threads = str(self.options.threads)
        with entry.log.open("wb") as log:
            with self.lock:
                if self.stopped:
                    return replace(entry, problem="It was not begun: the report was interrupted.")
                process = subprocess.Popen(
                    [sys.executable, "-m", "ghostgrad.cli", *entry.command, *mode, "--quiet"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "MPLBACKEND": "Agg"},
                    start_new_session=True,  # Ctrl-C reaches it once, from here
                )
                self.running[entry.name] = process
            code = process.wait()
            with self.lock:
                del self.running[entry.name]
        done = collect(entry)
        if done.summary is None:
            said = entry.log.read_text(errors="replace").strip().splitlines()
            how = "was interrupted" if code == 130 else f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            done = replace(done, problem="\n".join([f"It {how}. What it said last (all of it: {entry.log}):", *said[-12:]]))
        return done

    def stop(self) -> None:
        """What runs is asked to save itself and end."""
        with self.lock:
            self.stopped = True
            for process in self.running.values():
                process.send_signal(signal.SIGTERM)  # SIGINT is ignored below a shell's background job


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM as Ctrl-C: the runs are asked to save themselves rather than left behind."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(entries: Sequence[Entry], options: ReportOptions) -> tuple[list[Entry], bool]:
    """The entries with their summaries, and whether all were run: on KeyboardInterrupt the runs save themselves, and what is there so far is returned."""
    pool = _Pool(options)
    done = {entry.name: entry for entry in map(collect, entries)}
    waiting = [entry for entry in entries if options.overwrite or done[entry.name].problem == NOT_FINISHED]
    bar = tqdm(total=len(entries), initial=len(entries) - len(waiting), unit="setting", disable=options.quiet, file=sys.stderr, dynamic_ncols=True)
    with _terminated(), ThreadPoolExecutor(options.at_a_time) as executor, bar:
        pending: set[Future[Entry]] = {executor.submit(pool.work, entry) for entry in waiting}
        while pending:
            try:
                for future in wait(pending, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    entry = future.result()
                    done[entry.name] = entry
                    pending.discard(future)
                    bar.update()
                    if not options.quiet:
                        bar.write(f"{entry.name}: {_said(entry)}", file=sys.stderr)
                bar.set_postfix_str(", ".join(list(pool.running)), refresh=sys.stderr.isatty())
            except KeyboardInterrupt:
                pool.stop()
    return [done[entry.name] for entry in entries], not pool.stopped


def _said(entry: Entry) -> str:
    """The entry in a line."""
    if entry.summary is None:
        return "no result: " + entry.problem.splitlines()[0]
    return f"{_counted(entry.words)} ({entry.summary['time']['seconds']:.0f} s)"


def _counted(words: Sequence[str]) -> str:
    """'holds: 5, does not hold here: 1' of a list of verdicts."""
    count = Counter(words)
    return ", ".join(f"{word}: {count[word]}" for word in Verdict.WORDS if count[word])


# ------------------------------------------------------------------------------------------------------------------------------------------ the page


def _part(out: Path, kind: str) -> Path:
    """The page while it is written, by this process alone."""
    return out / f".report.{kind}.{os.getpid()}.part"


def write_page(entries: Sequence[Entry], options: ReportOptions, seconds: float) -> Path:
    """``report.html``, whole in one file, and ``report.md``, beside the runs. Returns the former."""
    papers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        papers.setdefault((entry.setting.title, entry.setting.paper), []).append(_section(entry, options))
    context = {
        "size": options.size,
        "papers": [
            {
                "title": title,
                "authors": authors,
                "settings": settings,
                "verdict": _of_paper([word for s in settings for word in s["words"]]) if any(s["words"] for s in settings) else "no result",
                "seconds": sum(s["seconds"] for s in settings),
            }
            for (title, authors), settings in papers.items()
        ],
        "words": Verdict.WORDS,
        "claims": sum(len(entry.words) for entry in entries),
        "counted": _counted([word for entry in entries for word in entry.words]),
        "unfinished": [entry.name for entry in entries if entry.summary is None],
        "machine": f"{platform.machine()}, {_cores()} cores, torch {torch.__version__}, ghostgrad {gg.__version__}",
        "at_a_time": f"{options.at_a_time} at a time with {options.threads} thread{'s' if options.threads > 1 else ''} each",
        "run_seconds": sum(entry.summary["time"]["seconds"] for entry in entries if entry.summary),
        "seconds": seconds,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ghostgrad", "templates"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    out = options.directory
    for kind in KINDS:
        text = environment.get_template(f"report.{kind}.j2").render(context)
        temporary = _part(out, kind)
        temporary.write_text(text)
        os.replace(temporary, out / f"report.{kind}")
    return out / "report.html"


def _section(entry: Entry, options: ReportOptions) -> dict[str, Any]:
    """A setting, as the templates want it."""
    setting, summary = entry.setting, entry.summary
    changed = {"small": setting.SMALL, "paper": setting.PAPER}.get(options.size, {})
    figure = entry.figure if summary and entry.figure.exists() else None
    return {
        "name": entry.name,
        "summary": setting.summary,
        "about": inspect.getdoc(type(setting)) or "",
        "fields": ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in changed.items()) or "the defaults",
        "seeds": f"{setting.seeds[0]} to {setting.seeds[-1]}" if len(setting.seeds) > 1 else str(setting.seed),
        "needs": setting.needs if options.size == "paper" else "",
        "ops": setting.ops,
        "share": entry.share,
        "problem": entry.problem,
        "command": "ghostgrad " + shlex.join(entry.command[:-2]),
        "words": entry.words,
        "data": summary["data"] if summary else "",
        "seconds": summary["time"]["seconds"] if summary else 0.0,
        "claims": [_claim(claim) for claim in summary["claims"]] if summary else [],
        "path": figure.relative_to(options.directory).with_suffix(".svg").as_posix() if figure else "",
        "image": base64.b64encode(figure.read_bytes()).decode() if figure else "",
    }


def _claim(claim: dict[str, Any]) -> dict[str, str]:
    """A claim and its verdict in words: the mean over seeds with its 95 % interval (a closed form's: 99 %), and the worst seed where that decides."""
    values = {int(seed): math.nan if value is None else value for seed, value in claim["by_seed"].items()}
    measured = "not measured"
    if values:
        mean, half = mean_interval(values, 0.95)
        low, high = claim["interval"] if claim["interval"] and None not in claim["interval"] else (mean - half, mean + half)
        measured = f"{mean:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low < high else "")
        if claim["interval"] is None and claim["measured"] is not None and max(values.values()) > min(values.values()):
            measured += f", worst seed {claim['measured']:.4g}"
    notes = ". ".join(note for note in (claim["reason"], claim["remark"]) if note)
    return {key: claim[key] for key in ("text", "formula", "quantity", "criterion", "verdict")} | {"arm": claim["arm"], "measured": measured, "notes": notes}


def _of_paper(words: Sequence[str]) -> str:
    """All that can be tested holds, or a part of it, or nothing."""
    tested = [word for word in words if word != Verdict.WORDS[3]]
    if not tested:
        return Verdict.WORDS[3]
    holding = [word == Verdict.WORDS[0] for word in tested]
    part = any(holding) or Verdict.WORDS[1] in tested
    return Verdict.WORDS[0] if all(holding) else Verdict.WORDS[1] if part else Verdict.WORDS[2]


@dataclass(frozen=True)
class Report:
    """What :func:`report` leaves."""

    entries: list[Entry]
    page: Path
    complete: bool
    """Not interrupted."""


def report(options: ReportOptions) -> Report:
    """Run (unless told to collect alone) and write the page. Raises RunDirectoryError where it cannot be written, ValueError for options that name nothing."""
    begun, entries, complete = time.perf_counter(), plan(options), True
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:  # refused now rather than after the runs
            if (options.directory / f"report.{kind}").is_dir():
                raise IsADirectoryError(0, f"report.{kind} is a directory there")
            _part(options.directory, kind).touch()
        if options.collect:
            entries = [collect(entry) for entry in entries]
        else:
            entries, complete = _run(entries, options)
        # Another report may have ended meanwhile what this one could not.
        entries = [entry if entry.summary or (again := collect(entry)).summary is None else again for entry in entries]
        page = write_page(entries, options, time.perf_counter() - begun)
    except OSError as error:
        raise RunDirectoryError(f"cannot write a report to {options.directory}: {error.strerror or error}. Pass an --out that you may write to.") from error
    finally:
        for kind in KINDS:
            with contextlib.suppress(OSError):
                _part(options.directory, kind).unlink()
    return Report(entries, page, complete)
