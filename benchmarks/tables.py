"""The tables of docs/performance.md, from a file of results; those of GPUs from what benchmarks/gpu.py has left beside it.

    python benchmarks/tables.py [--results benchmarks/results/cpu-avx512.json] [--into docs/performance.md]

Each table replaces what stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; without ``--into`` all are printed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import roofline
from peers import PEERS
from store import RESULTS, Results, Row

from ghostgrad.bench import measure, steps
from ghostgrad.bench.problems import PROBLEMS, title

GOALS = {"tiny": 2.0, "mlp": 1.03, "cnn": 1.10, "block": 1.03, "wide": 1.03, "lm": 1.02, "vit": 1.05, "lstm": 1.10}  # of a step in a tap
PAIRS = 9  # what a cell of fewer is marked for


def name_of(method: str) -> str:
    return PEERS[method].title if method in PEERS else f"**ghostgrad, {steps.TITLES[method]}**"


def number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def ratio(row: Row | None, spread: bool = True) -> str:
    """A cell: the median over the processes, smallest and largest; or why there is none."""
    if row is None:
        return ""
    if row["verdict"] != "ok":
        return row["verdict"].split("(")[0].strip()
    found = measure.over_processes(row["processes"])
    mark = "°" if min(process["pairs"] for process in row["processes"]) < PAIRS else ""
    return number(found.median) + mark + (f" [{number(found.low)}-{number(found.high)}]" if spread and len(row["processes"]) > 1 else "")


def plain_ms(row: Row | None) -> str:
    return f"{measure.over_processes(row['processes'], 'plain_ms').median:.3g}" if row and row["verdict"] == "ok" else ""


def extra_memory(results: Results, problem: str, method: str) -> str:
    """What a method's step takes at most beyond the plain step's peak, and in per cent of that peak."""
    ours, plain = results.find(problem, method), results.find(problem, "null")
    if not ours or not plain or ours.get("peak_mib") is None or plain.get("peak_mib") is None:
        return ratio(ours) if ours and ours["verdict"] != "ok" else ""
    extra = ours["peak_mib"] - plain["peak_mib"]
    return f"{round(extra, 1) + 0.0:+.1f}" + (f" ({round(100 * extra / plain['peak_mib']) + 0:+d} %)" if plain["peak_mib"] >= 1 else "")


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [head, ["---"] * len(head), *rows])


def environment(results: Results) -> str:
    machine = results.environment
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return f"{machine['processor']} ({machine['cpu_capability']}, {machine['cores']} cores), {machine['system']}, torch {machine['torch']}, {versions}."


def ours(results: Results) -> str:
    rows = []
    for problem in PROBLEMS:
        for threads in sorted({row["threads"] for row in results.rows if row["problem"] == problem}):
            null, tap, alone = (results.find(problem, method, threads) for method in steps.METHODS)
            default = (results.find(problem, method, threads, allocator="default") for method in ("null", "tap"))
            if null or tap or alone:
                goal = f"{GOALS[problem]:.2f}" if problem in GOALS else ""
                rows.append([title(problem), str(threads), plain_ms(null), ratio(null), ratio(tap), goal, ratio(alone), *map(ratio, default)])
    head = ["problem", "threads", "plain, ms", "null", "in a tap", "goal", "norms alone", "null, default allocator", "in a tap, default allocator"]
    return markdown(head, rows)


def compiled(results: Results) -> str:
    rows = []
    for problem in PROBLEMS:
        for threads in sorted({row["threads"] for row in results.rows}):
            found = [results.find(problem, method, threads, compiled=True) for method in steps.METHODS]
            if any(found):
                rows.append([title(problem), str(threads), plain_ms(found[0]), *map(ratio, found)])
    return markdown(["problem", "threads", "plain, ms", "null", "in a tap", "norms alone"], rows)


def everyone(results: Results, cell: Callable[[str, str], str], threads: int = 1) -> str:
    """All methods by all problems."""
    problems = results.problems(threads=threads)
    methods = [method for method in (*steps.METHODS, *PEERS) if any(results.find(problem, method, threads) for problem in problems)]
    return markdown(["", *problems], [[name_of(method), *(cell(problem, method) for problem in problems)] for method in methods if method != "null"])


def peers(results: Results) -> str:
    return everyone(results, lambda problem, method: ratio(results.find(problem, method), spread=False))


def peers_two_threads(results: Results) -> str:
    return everyone(results, lambda problem, method: ratio(results.find(problem, method, 2), spread=False), 2)


def memory(results: Results) -> str:
    plain = {problem: results.find(problem, "null") or {} for problem in results.problems()}
    peaks = [f"{row['peak_mib']:.1f}" if row.get("peak_mib") is not None else "" for row in plain.values()]
    head, rule, *rows = everyone(results, lambda problem, method: extra_memory(results, problem, method)).splitlines()
    return "\n".join([head, rule, "| " + " | ".join(["plain step, MiB", *peaks]) + " |", *rows])


def refusals(results: Results) -> str:
    """What was not timed and why; the same reason on several problems is one line."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        if row["verdict"] != "ok" and row["method"] in PEERS and row["threads"] == 1:
            said = row["message"] if len(row["message"]) <= 110 else row["message"][:110].rsplit(" ", 1)[0] + " ..."
            reason = row["verdict"] + (f": {said}" if said else "")
            reasons.setdefault((PEERS[row["method"]].title, reason), []).append(row["problem"])
    return "\n".join(f"- {peer}, {' and '.join(problems)}: {reason}" for (peer, reason), problems in reasons.items())


def gpu_roofline(_: Results) -> str:
    return markdown(*roofline.predictions())


def gpu_measured(_: Results) -> str:
    """What benchmarks/gpu.py has measured: the ceilings, and training steps."""
    if not roofline.measured():
        return "Ceilings and training steps: not yet measured."
    ceilings = markdown(["device", "copy, TB/s", "bfloat16, TFLOP/s", "TF32", "float32"], roofline.ceilings())
    return f"{ceilings}\n\n{markdown(['device', 'problem', 'plain, ms', 'null', 'in a tap', 'norms alone'], roofline.training_steps())}"


TABLES: dict[str, Callable[[Results], str]] = {
    f.__name__.replace("_", "-"): f for f in (environment, ours, compiled, peers, peers_two_threads, memory, refusals, gpu_roofline, gpu_measured)
}


def fill(text: str, results: Results) -> str:
    """The document with its tables replaced.

    Raises:
        KeyError: it asks for a table that there is not.
    """
    pattern = r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)"
    return re.sub(pattern, lambda found: f"{found[1]}\n{TABLES[found[2]](results)}\n\n{found[3]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, help="the document; else they are printed")
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    if arguments.into:
        arguments.into.write_text(fill(arguments.into.read_text(), results))
    else:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
