"""``ghostgrad bench``: each problem in one fresh process, few pairs, and a table that grows as they finish."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

from .measure import ChildError, environment, in_child
from .problems import COMPILED, PROBLEMS, title
from .steps import METHODS

__all__ = ["main"]

CHILD = [sys.executable, "-m", "ghostgrad.bench.steps"]

HOW_TO_READ = """
plain: milliseconds of a training step, forward and backward. The others are multiples of it: null, the plain step itself (how far it is from 1 says how
far the rest can be trusted); in a tap, the same step with the norms of all samples; alone, gg.sqnorms, which forms no weight gradients."""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _problem(text: str) -> str:
    if text not in PROBLEMS:
        close = difflib.get_close_matches(text, PROBLEMS, n=1)
        raise argparse.ArgumentTypeError(f"unknown problem {text!r}." + (f" Did you mean {close[0]}?" if close else "") + f" There are {', '.join(PROBLEMS)}")
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every problem has its numbers."""
    problems = "\n".join(f"  {name:<12}{title(name)}" for name in PROBLEMS)
    parser = argparse.ArgumentParser(
        prog="ghostgrad bench",
        description="What per-sample gradient norms cost on this machine: training steps with norms over plain ones, in interleaved pairs.",
        epilog=f"problems:\n{problems}\n{HOW_TO_READ}\n\nAll of them take one to two minutes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("problems", nargs="*", type=_problem, metavar="PROBLEM", help="which (default: all)")
    parser.add_argument("--pairs", type=_positive, default=3, help="how many (default: %(default)s); 9 and more give steadier medians")
    parser.add_argument("--threads", type=_positive, default=1, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="the models by torch.compile, in both steps; without the LSTM, which it refuses")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept", help="kept: glibc keeps freed memory, so that page faults do not decide")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args(argv)
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no directory {options.out.parent}")

    machine = environment()
    settings = {"threads": options.threads, "compiled": options.compile, "allocator": options.allocator}
    print(f"{machine['processor']} ({machine['cpu_capability']}), torch {machine['torch']}, {options.threads} thread{'s' * (options.threads > 1)}, ", end="")
    print(f"{options.pairs} pair{'s' * (options.pairs > 1)}{', compiled' * options.compile}\n")
    print(f"{'problem':12}{'plain':>12}{'null':>8}{'in a tap':>10}{'alone':>8}")
    rows: dict[str, Any] = {}
    request = {"methods": list(METHODS), "compiled": options.compile, "pairs": options.pairs, "seconds": 60.0}
    for name in options.problems or (COMPILED if options.compile else PROBLEMS):
        print(f"{name:12}", end="", flush=True)  # so that one sees what is running
        try:
            rows[name] = in_child(CHILD, request | {"problem": name}, threads=options.threads, allocator=options.allocator)
        except ChildError as error:
            rows[name] = {method: {"verdict": "error", "message": str(error)} for method in METHODS}
        cells = [f"{found['ratio']:.2f}" if "ratio" in found else "-" for found in rows[name].values()]
        plain = next((f"{found['plain_ms']:.4g} ms" for found in rows[name].values() if "plain_ms" in found), "-")
        print(f"{plain:>12}{cells[0]:>8}{cells[1]:>10}{cells[2]:>8}", flush=True)
    failures = dict.fromkeys(f"{name}: {found['verdict']}. {found['message']}" for name, row in rows.items() for found in row.values() if "ratio" not in found)
    for line in failures:
        print(f"ghostgrad bench: {line}", file=sys.stderr)
    print(HOW_TO_READ)
    if options.out:
        options.out.write_text(json.dumps({"environment": machine, **settings, "rows": rows}, indent=1) + "\n")
    return 1 if failures else 0
