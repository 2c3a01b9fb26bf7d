"""The command line: ``ghostgrad list``, ``ghostgrad run NAME``, ``ghostgrad report``, ``ghostgrad tour``, ``ghostgrad bench``.

Exit codes: 0 all claims hold (a report: all settings have a result, whatever it is), 1 a claim fails, training diverges, or a setting of the report or a
problem of the benchmark has no result, 2 the command was not understood or its directory cannot be used, 130 interrupted.

A subcommand is a function of the words after it, entered in ``COMMANDS``; its first docstring line is its help.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

if TYPE_CHECKING:
    from .training import Setting, Size

__all__ = ["main"]

MISSING = 'ghostgrad: this command needs {name}, which is not installed. Install the extras with\n\n    pip install "ghostgrad[papers]"\n'

DEFAULT_OUT = Path("runs/NAME-SEED")


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run."""

    size: Literal["default", "small", "paper"] = "default"
    """Defaults of the options above: small for a run of about a minute, paper for the paper's own size or the largest that a CPU can do."""
    out: Path = DEFAULT_OUT
    """Directory of the run."""
    resume: bool = False
    """Go on with the run in that directory, to the same numbers as if it had not stopped. Options left away are taken from it."""
    overwrite: bool = False
    """Replace the run in that directory."""
    device: str = "cpu"
    """Torch device."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile chunks of steps; auto: where a compiler is found and the run is long."""
    checkpoint_seconds: float = 5.0
    """At least so many seconds between two checkpoints; a kill loses that much, Ctrl-C nothing."""
    quiet: bool = False
    """Show no progress bar."""


def run(args: Sequence[str]) -> int:
    """Train a setting and judge its claims."""
    import torch
    import tyro

    from .papers import SETTINGS, suggest
    from .papers.images import ImageDataError
    from .training import CompileError, NonFiniteError, RunDirectory, RunDirectoryError, train

    if not args or args[0].startswith("-"):
        print(f"usage: ghostgrad run NAME [options]      ghostgrad run NAME --help lists the options\n\nNAME is one of\n{_names()}")
        return 0 if args and args[0] in ("-h", "--help") else 2
    name, rest = args[0], list(args[1:])
    if name not in SETTINGS:
        close = suggest(name)
        return _usage_error(f"unknown setting {name!r}." + (f" Did you mean {' or '.join(close)}?" if close else "") + f"\nThere are\n{_names()}")
    cls = SETTINGS[name]

    def parse(*defaults: Any) -> tuple[Setting, RunOptions]:
        both = tuple[Annotated[cls, tyro.conf.arg(name="")], Annotated[RunOptions, tyro.conf.arg(name="")]]  # type: ignore[valid-type]
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
        text = f"{cls.summary}.\n{cls.paper}"
        parsed: tuple[Setting, RunOptions] = tyro.cli(both, args=rest, prog=f"ghostgrad run {name}", description=text, default=defaults, config=config)
        return parsed

    try:
        setting, options = parse(cls.sized(_size(rest)), RunOptions())
        out = Path(f"runs/{name}-{setting.seed}") if options.out == DEFAULT_OUT else options.out
        if options.resume:  # what is not given is taken from the run; what is given must agree with it
            stored = RunDirectory(out).read_config()
            if stored["setting"] != name:
                raise RunDirectoryError(f"{out} holds a run of {stored['setting']}, not of {name}. Pass another --out.")
            setting, options = parse(cls(**stored["fields"]), RunOptions(device=stored["device"]))
        torch.empty(0, device=options.device)
    except (ValueError, TypeError, RunDirectoryError) as error:
        return _usage_error(str(error))
    except (RuntimeError, AssertionError) as error:
        return _usage_error(f"--device: torch cannot use it here ({str(error).splitlines()[0]})")

    print(f"{setting.announcement()}\ninto {out}\n", flush=True)
    try:
        outcome = train(
            setting,
            out,
            device=options.device,
            compiled={"auto": None, "yes": True, "no": False}[options.compile],
            resume=options.resume,
            overwrite=options.overwrite,
            progress=not options.quiet,
            checkpoint_seconds=options.checkpoint_seconds,
        )
    except (RunDirectoryError, CompileError, ImageDataError) as error:
        return _usage_error(str(error))
    except NonFiniteError as error:
        print(f"\nghostgrad: {error}\nIt lies in {out}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. Go on with\n\n    ghostgrad run {name} --resume --out {shlex.quote(str(out))}\n", file=sys.stderr)
        return 130
    print(f"\n{outcome.table()}\nmetrics, summary and figures: {out}")
    return 0 if outcome.holds else 1


def list_settings(args: Sequence[str]) -> int:
    """List the settings: paper, what is shown, how long they take; with a name or a pattern, what is claimed."""
    from .papers import SETTINGS, suggest

    usage = "usage: ghostgrad list [NAME or pattern, as in 'stability/*']"
    if args and args[0].startswith("-"):
        print(usage)
        return 0 if args[0] in ("-h", "--help") else 2
    chosen = [name for name in SETTINGS if not args or any(fnmatch.fnmatchcase(name, pattern) for pattern in args)]
    if not chosen:
        close = suggest(args[0])
        return _usage_error(f"no setting is called {args[0]!r}." + (f" Did you mean {' or '.join(close)}?" if close else "") + f"\n{usage}")
    for name in chosen:
        cls = SETTINGS[name]
        claims = cls().claims()
        print(f"{name}\n  {cls.summary}\n  {cls.paper}; {cls.duration} on 2 cores; {len(claims)} claims")
        for claim in claims if args else ():
            print(f"    claim: {claim.text}: {claim.quantity} ({claim.arm}) {claim.criterion}")
        print()
    print("ghostgrad list NAME says what is claimed, ghostgrad run NAME runs one, ghostgrad run NAME --help lists its options, ghostgrad report runs them all.")
    return 0


def report(args: Sequence[str]) -> int:
    """Run all settings, or collect their runs, and write one page: per paper the claims, what was measured, the verdicts."""
    import tyro

    from .report import ReportOptions
    from .report import report as make
    from .training import RunDirectoryError

    config = (tyro.conf.FlagCreatePairsOff,)
    text = "Runs all settings, several at a time, or collects their runs, and writes report.html and report.md."
    options = tyro.cli(ReportOptions, args=list(args), prog="ghostgrad report", description=text, config=config)
    try:
        done = make(options)
    except (ValueError, RunDirectoryError) as error:
        return _usage_error(str(error))
    missing = [entry for entry in done.entries if entry.summary is None]
    for entry in missing:
        print(f"{entry.name} has no result. {entry.problem}", file=sys.stderr)
    print(f"{len(done.entries) - len(missing)} of {len(done.entries)} settings have a result, on {done.page}")
    if not done.complete:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
    return 130 if not done.complete else 1 if missing else 0


def tour(args: Sequence[str]) -> int:
    """The relu-1d picture, and the norms of a real network checked against autograd."""
    from .papers.tour import main as tour_main

    return tour_main(list(args))


def bench(args: Sequence[str]) -> int:
    """What norms cost on this machine: training steps with them over plain ones."""
    from .bench.command import main as bench_main

    return bench_main(list(args))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"list": list_settings, "run": run, "report": report, "tour": tour, "bench": bench}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    args = list(sys.argv[1:] if argv is None else argv)
    overview = "usage: ghostgrad COMMAND ...\n\n" + "\n".join(f"  {name:<8}{(f.__doc__ or '').splitlines()[0]}" for name, f in COMMANDS.items())
    if not args or args[0] in ("-h", "--help"):
        print(overview)
        return 0 if args else 2
    if args[0] == "--version":
        import ghostgrad

        print(f"ghostgrad {ghostgrad.__version__}")
        return 0
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        return _usage_error(f"unknown command {args[0]!r}." + (f" Did you mean {close[0]}?" if close else "") + f"\n{overview}")
    try:
        return COMMANDS[args[0]](args[1:])
    except SystemExit as stop:  # tyro's, after it has printed help or what it did not understand
        return stop.code if isinstance(stop.code, int) else 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {"tyro", "tqdm", "matplotlib", "pandas", "scipy", "sklearn", "PIL", "jinja2"}:
            print(MISSING.format(name=error.name), file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has read enough: ghostgrad list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _size(args: Sequence[str]) -> Size:
    """What ``--size`` says, ahead of the other options, whose defaults it changes; what is no size is left to be refused with them."""
    from .training import Size

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--size", choices=get_args(Size), default="default")
    try:
        size: Size = parser.parse_known_args(args)[0].size
    except argparse.ArgumentError:
        return "default"
    return size


def _names() -> str:
    from .papers import SETTINGS

    return "\n".join(f"  {name:<28}{cls.summary}" for name, cls in SETTINGS.items())


def _usage_error(message: str) -> int:
    print(f"ghostgrad: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
