"""What norms cost, step by step: every problem of ``ghostgrad.bench`` by our methods and by the peers, merged into one file of results.

    python benchmarks/run.py [--out benchmarks/results/cpu-avx512.json] [--problems mlp lm] [--methods ours peers] [--threads 1] [--compile]
                             [--allocator kept] [--processes 3] [--pairs 9] [--seconds 60] [--memory] [--resume]

Our methods are measured together in ``--processes`` fresh processes, every peer in as many of its own. ``--seconds`` bounds a method's time in a process: a
slow one gets fewer pairs, at least 3, and then one process; the results say how many of both. A peer whose norms are wrong, or that raises, is not timed: its
row says so. ``--memory`` measures the peak memory of the steps that are in the file instead of timing. A run can be split by problems, methods and settings
as one likes: rows are added to the file or replace their predecessors; ``--resume`` leaves alone those that are there. How a ratio is defined:
``ghostgrad.bench.measure``. The environment: requirements.txt; peers that are not installed are left out. tables.py and figures.py read the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from peers import PEERS, installed
from store import RESULTS, Results

import ghostgrad
from ghostgrad.bench import measure, steps
from ghostgrad.bench.problems import COMPILED, PROBLEMS

METHODS = {**steps.METHODS, **{name: peer.prepare for name, peer in PEERS.items()}}
GROUPS = {"ours": tuple(steps.METHODS), "peers": tuple(name for name, peer in PEERS.items() if installed(peer))}


def open_results(path: Path) -> Results:
    """The file's, or new ones; an environment without the peers may add our rows to those of one with them."""
    packages = sorted({peer.package for peer in PEERS.values() if installed(peer)} - {"torch"})
    versions = {"ghostgrad": ghostgrad.__version__, **{package: importlib.metadata.version(package) for package in packages}}
    here = {**measure.environment(), "versions": versions}
    results = Results.load(path) if path.exists() else Results(here, [])
    try:
        results.merge_environment(here)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}\nGive another --out.") from None
    return results


def ask(problem: str, methods: tuple[str, ...], arguments: argparse.Namespace, **request: Any) -> dict[str, Any]:
    """A fresh process's answer; if it gives none, that as the verdict on every method."""
    request |= {"problem": problem, "methods": methods, "compiled": arguments.compile}
    allocator = "returned" if arguments.memory else arguments.allocator
    try:
        return measure.in_child([sys.executable, __file__, "--child"], request, threads=arguments.threads, allocator=allocator, timeout=arguments.timeout)
    except measure.ChildError as error:
        return {name: {"verdict": "error (no answer)", "message": str(error)} for name in methods}


def time_them(problem: str, methods: tuple[str, ...], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of the methods, which share processes."""
    processes: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    verdicts: dict[str, dict[str, str]] = {}
    for _ in range(arguments.processes):
        answer = ask(problem, methods, arguments, pairs=arguments.pairs, seconds=arguments.seconds)
        for name, found in answer.items():
            if name not in verdicts or verdicts[name]["verdict"] == "ok":  # one failure is kept
                verdicts[name] = {key: found[key] for key in ("verdict", "message")}
        timed = {name: {key: found[key] for key in ("pairs", "plain_ms", "ratio", "low", "high")} for name, found in answer.items() if "ratio" in found}
        for name, numbers in timed.items():
            processes[name].append(numbers)
        if not timed or any(numbers["pairs"] < arguments.pairs for numbers in timed.values()):
            break  # nothing to time, or too slow for more
    key = {"threads": arguments.threads, "compiled": arguments.compile, "allocator": arguments.allocator}
    return [{"problem": problem, "method": name, **key, **verdicts[name], "processes": processes[name]} for name in methods]


def show(row: dict[str, Any]) -> None:
    cell = f"{row['verdict']} {row['message']}"[:120]
    if row["verdict"] == "ok":
        ratio, ms = measure.over_processes(row["processes"]), measure.over_processes(row["processes"], "plain_ms").median
        pairs = "+".join(str(process["pairs"]) for process in row["processes"])
        cell = f"{ratio.median:8.3f} [{ratio.low:.3f}-{ratio.high:.3f}] of {ms:.4g} ms, {pairs} pairs"
    print(f"{row['problem']:10} {row['method']:18} {cell}", flush=True)


def main() -> None:
    if "--child" in sys.argv[1:2]:
        return steps.main(METHODS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, metavar="PROBLEM", help=f"of {', '.join(PROBLEMS)}")
    names = [*GROUPS, *METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=list(GROUPS), metavar="METHOD", help=f"of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="the models by torch.compile, in one graph")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a method in a process")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a process is given up")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has")
    arguments = parser.parse_args()
    results = open_results(arguments.out)
    ours = tuple(name for name in GROUPS["ours"] if name in arguments.methods or "ours" in arguments.methods)
    peers = [(name,) for name in PEERS if name in arguments.methods or ("peers" in arguments.methods and name in GROUPS["peers"])]
    key = {"threads": arguments.threads, "compiled": arguments.compile, "allocator": arguments.allocator}
    for problem in arguments.problems or (COMPILED if arguments.compile else PROBLEMS):
        for methods in [*([ours] if ours else []), *peers]:
            refused = (results.find(problem=problem, method="torchjd", **key) or {"verdict": ""})["verdict"].startswith("error")
            if methods == ("torchjd-unbatched",) and not refused and "torchjd-unbatched" not in arguments.methods:
                continue  # TorchJD names it as the dearer way, for models that batch_dim=0 refuses
            found = [results.find(problem=problem, method=name, **key) for name in methods]
            if arguments.memory:
                for row in (row for row in found if row and row["verdict"] == "ok" and not (arguments.resume and "peak_mib" in row)):
                    row["peak_mib"] = ask(problem, (row["method"],), arguments, memory=True)[row["method"]].get("peak_mib")
                    print(f"{problem:10} {row['method']:18} peak {row['peak_mib']} MiB", flush=True)
            elif not (arguments.resume and all(found)):
                for row in time_them(problem, methods, arguments):
                    before = results.find(**row) or {}
                    results.put(row | {name: before[name] for name in ("peak_mib",) if name in before})
                    show(row)
            results.save(arguments.out)


if __name__ == "__main__":
    main()
