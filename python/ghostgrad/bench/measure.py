"""How steps are timed: interleaved pairs in fresh processes, the allocator and the threads fixed.

A method's number is a *ratio*: the median, over the pairs of one process, of (method's step / plain step run just before it); then the median over the
processes, with the smallest and the largest beside it. Slow drifts of the machine cancel within a pair, and what a process is dealt for its life (addresses,
caches, pages) is seen by repeating processes. The plain step over itself, measured in the same way, is the *null*: how far it is from 1 says how far
the others can be trusted.

glibc maps tensors above a threshold anew for each allocation, and the threshold adapts to what was freed before, so that page faults may decide a ratio.
Under the allocator "kept" it is told to keep freed memory; "default" leaves it as users have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["ALLOCATORS", "ChildError", "Spread", "environment", "in_child", "interleave", "over_processes", "peak_memory", "summary"]

ALLOCATORS: dict[str, dict[str, str]] = {
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)},
    "default": {},
    "returned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"},  # freed memory goes back at once: for peak_memory
}
SHORTEST = 0.02  # seconds: a step that takes less is repeated until the clock has run so long
FEWEST = 3  # pairs that are measured however long they take

Step = Callable[[], object]


def _clock(step: Step, repeat: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call."""
    start = clock()
    for _ in range(repeat):
        step()
    return (clock() - start) / repeat


def interleave(
    plain: Step, steps: Mapping[str, Step], pairs: int, seconds: float = math.inf, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[tuple[float, float]]]:
    """``{name: [(plain, step), ...]}``: seconds of each step and of the plain one run just before it, in rounds over the steps, after one warm-up round.

    Stops early, after a full round, when the rounds have taken ``seconds`` for each step, but not before the third.
    With ``time.process_time`` for a clock what else runs on the machine does not count: for one thread.
    """
    repeats = {}
    for name, step in {"": plain, **steps}.items():
        once = _clock(step, clock=clock)  # warms up
        once = once if once > 10 * SHORTEST else _clock(step, clock=clock)
        repeats[name] = max(1, math.ceil(SHORTEST / max(once, 1e-9)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(pairs):
        if done >= FEWEST and time.perf_counter() - start > seconds * len(steps):
            break
        for name, step in steps.items():
            before = _clock(plain, repeats[""], clock=clock)
            times[name].append((before, _clock(step, repeats[name], clock=clock)))
    return times


def summary(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """One process's part of a result: the number of pairs, the median of the plain step, and the ratio with its quartiles."""
    ratios = sorted(step / plain for plain, step in times)
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    plain_ms = 1e3 * statistics.median(plain for plain, _ in times)
    return {"pairs": len(times), "plain_ms": float(f"{plain_ms:.4g}"), **{k: round(v, 4) for k, v in (("ratio", ratio), ("low", low), ("high", high))}}


class Spread(NamedTuple):
    """A number over several processes."""

    median: float
    low: float
    high: float


def over_processes(processes: Sequence[Mapping[str, float]], key: str = "ratio") -> Spread:
    """The median of the processes' numbers, the smallest and the largest."""
    values = [process[key] for process in processes]
    return Spread(statistics.median(values), min(values), max(values))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Memory


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def peak_memory(step: Step, calls: int = 3) -> float | None:
    """MiB of resident memory that the first ``calls`` calls of a step take at most, on top of what the process holds; None where the system does not tell.

    Whatever a call takes counts: tensors, the vendor libraries' buffers, scratch that is kept for the next call. Mapped files (code that is run for the
    first time) do not. Linux alone tells; freed memory that is still resident would hide what is taken again, so run it with the allocator "returned".
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the system's high-water mark
        before, files = _status("VmRSS"), _status("RssFile")
    except (OSError, AttributeError, StopIteration):
        return None
    kept = [step() for _ in range(calls)][-1:]  # as a caller would, the last result is held
    peak = _status("VmHWM") - before - max(0.0, _status("RssFile") - files)
    del kept
    return round(max(0.0, peak), 3)  # the system counts in batches of pages, so that next to nothing may come out below zero


# ---------------------------------------------------------------------------------------------------------------------------------------
# Processes


class ChildError(RuntimeError):
    """A process that was to measure gave no answer; ``str()`` says why in one line."""


def in_child(command: Sequence[str], request: Mapping[str, Any], *, threads: int, allocator: str = "kept", timeout: float | None = None) -> dict[str, Any]:
    """What a fresh process answers to a request: ``command`` is run with the request as its last argument, in JSON, and prints the answer as its last line.

    Raises:
        ChildError: it died, or gave no answer in ``timeout`` seconds.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(
            [*command, json.dumps({**request, "threads": threads})],
            env={**inherited, **limits, **ALLOCATORS[allocator]},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"no answer in {timeout:g} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ChildError(f"the process ended with status {done.returncode}" + (f": {said[-1].strip()}" if said else ""))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def environment() -> dict[str, Any]:
    """The machine and the software, as far as they decide a result."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return {
        "processor": processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", "),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
