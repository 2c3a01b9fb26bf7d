"""Everything that only a GPU can tell, in one command that ends within ten minutes: build, tests, sanitizers, roofline, training steps.

    python benchmarks/gpu.py [--only roofline,steps] [--out DIR] [--minutes 9.5] [--device cuda]

Needs Python with a CUDA build of torch, nvcc, CMake, ninja and pybind11; the tests need pytest, numpy, scipy and hypothesis. No network. Results go to
benchmarks/results/<device>.json, with ``--out`` to DIR as well; a stage that is not run keeps what the file has. ``--device cpu`` runs every stage at toy
sizes, writes to DIR alone, and shows that the command works: nothing that it prints is a measurement.

Stages: build (in place), tests (those marked ``cuda``), sanitizer (memcheck and racecheck of every op, where compute-sanitizer is installed), roofline (copy
bandwidth and matrix products first, then every op over its floor and wgrad_sqnorm beside cuBLAS), steps (plain training steps against steps with norms, and
the libraries that are installed). Each has its share of the time, and what one leaves the next may use. Stages run in processes of their own: an exception,
a crash or a hang is recorded, and the next item is run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHILD = ROOT / "benchmarks" / "gpu_stages.py"
SHARES = {"build": 200, "tests": 130, "sanitizer": 50, "roofline": 80, "steps": 110}  # of 570 seconds, in this order
Row = dict[str, Any]


class Done(NamedTuple):
    status: int | None  # None: it ran into its limit
    output: str
    seconds: float


def tool_folders() -> list[str]:
    """Where CUDA's tools, and those that are installed as Python packages, may be, beside PATH."""
    folders = [str(Path(sys.executable).parent), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin"]
    for package, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        with contextlib.suppress(ImportError, AttributeError):
            folders.append(str(getattr(__import__(package), attribute)))
    return folders


def environment_of_children() -> dict[str, str]:
    # Our own tree comes first, before any installed ghostgrad, once its extension is built; the tools behind those that the user has on PATH.
    path = os.pathsep.join([os.environ.get("PATH", ""), *tool_folders()])
    own = [str(ROOT / "python")] if any((ROOT / "python" / "ghostgrad").glob("_C*.so")) else []
    python_path = [*own, str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, python_path)), "PYTHONUNBUFFERED": "1", "CI": "1"}


def run(command: Sequence[str], log: Path, limit: float, **environment: str) -> Done:
    """Run a command with its output in a file. At the limit it is interrupted, so that it may still report, and ten seconds later its processes are ended."""
    start = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment_of_children() | environment,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            for signum, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
                try:
                    os.killpg(process.pid, signum)  # the session that was started above, and nothing else
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    continue
                except ProcessLookupError:
                    break
    return Done(status, log.read_text(errors="replace"), time.monotonic() - start)


def last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])[-2000:]


class Session:
    """The stages' common ground: the device and its capability, the folder for logs, and the time that is left."""

    def __init__(self, device: str, minutes: float, stages: list[str], folder: Path, capability: str = "8.0"):
        self.device, self.small, self.folder, self.capability = device, device == "cpu", folder, capability
        self.start, scale = time.monotonic(), 60 * minutes / sum(SHARES[stage] for stage in stages)
        self.deadlines, total = {}, 0.0
        for stage in stages:
            total += SHARES[stage] * scale
            self.deadlines[stage] = self.start + total
        folder.mkdir(parents=True, exist_ok=True)

    def left(self, stage: str) -> float:
        return self.deadlines[stage] - time.monotonic()

    def child(self, stage: str) -> list[Row]:
        """One row for each item of a stage that gpu_stages.py measures; a process that dies is started again behind the item that it died of."""
        rows_file = self.folder / f"{stage}.jsonl"
        rows_file.unlink(missing_ok=True)
        request = {"stage": stage, "device": self.device, "small": self.small, "rows": str(rows_file)}
        listed = run([sys.executable, str(CHILD), json.dumps(request | {"list": True})], self.folder / f"{stage}-list.log", min(60.0, self.left(stage)))
        if listed.status != 0:
            return [{"item": stage, "verdict": "error", "message": last_lines(listed.output)}]
        items = json.loads(listed.output.strip().splitlines()[-1])
        failed: list[Row] = []
        while True:
            rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
            ended = {row["item"] for row in (*rows, *failed)}
            left = [item for item in items if item not in ended]
            if not left:
                break
            if self.left(stage) < 5:
                failed += [{"item": item, "verdict": "not run", "message": "no time left"} for item in left]
                break
            print(f"  {stage}: {len(left)} of {len(items)} items to go", flush=True)
            log = self.folder / f"{stage}-{len(failed)}.log"
            done = run([sys.executable, str(CHILD), json.dumps(request | {"items": left})], log, self.left(stage))
            now = {json.loads(line)["item"] for line in rows_file.read_text().splitlines()} if rows_file.exists() else set()
            rest = [item for item in left if item not in now]
            if rest and (done.status != 75 or not now & set(left)):  # 75: it asked for a fresh process, after an error that poisons the device's context
                why = "ran into the time limit" if done.status is None else f"the process ended with status {done.status}"
                failed.append({"item": rest[0], "verdict": "error", "message": f"{why}: {last_lines(done.output)}"})
        found = {row["item"]: row for row in (*rows, *failed)}
        return [found[item] for item in items]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Stages


def build(session: Session) -> list[Row]:
    """``setup.py build_ext --inplace``, and an import of what it made."""
    switch = {"MAX_JOBS": str(os.cpu_count()), **({} if session.small else {"GHOSTGRAD_CUDA": "1"})}
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], session.folder / "build.log", session.left("build"), **switch)
    row = {"item": "build", "verdict": "ok" if done.status == 0 else "error", "seconds": round(done.seconds, 1)}
    if done.status != 0:
        return [row | {"message": last_lines(done.output, 40)}]
    code = "import ghostgrad, torch; from ghostgrad import _C; print(ghostgrad.__file__, torch.__version__, _C.with_cuda)"
    imported = run([sys.executable, "-c", code], session.folder / "import.log", 120)
    words = imported.output.strip().splitlines()[-1].split() if imported.output.strip() else []
    right = imported.status == 0 and Path(words[0]).is_relative_to(ROOT) and (session.small or words[-1] == "True")
    return [row, {"item": "import", "verdict": "ok" if right else "error", "message": last_lines(imported.output)}]


def count_tests(report: Path) -> Row:
    """What a junit file says: numbers, and the failures with their first lines."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = {f"{case.get('classname')}::{case.get('name')}": fault for case in cases for fault in case if fault.tag in ("failure", "error")}
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    messages = {name: " ".join((fault.get("message") or fault.text or "").split())[:400] for name, fault in list(bad.items())[:60]}
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": len(bad), "failures": messages}


def primitives(session: Session) -> Row:
    """tests/kernels/test_primitives.cu: whether the hardware does what the emulation says that it does."""
    arch = "sm_" + session.capability.replace(".", "") + ("a" if session.capability == "9.0" else "")
    program = str(session.folder / "test_primitives")
    command = ["nvcc", "-std=c++17", "-O2", "-Icsrc", f"-arch={arch}", "tests/kernels/test_primitives.cu", "-o", program]
    try:
        done = run(command, session.folder / "primitives-build.log", 60)
        done = run([program], session.folder / "primitives.log", 30) if done.status == 0 else done
    except FileNotFoundError as error:
        return {"item": "primitives", "verdict": "error", "message": str(error)}
    return {"item": "primitives", "verdict": "ok" if done.status == 0 else "error", "seconds": round(done.seconds, 1), "message": last_lines(done.output)}


def tests(session: Session) -> list[Row]:
    """The primitives; then tests marked ``cuda``: tests/test_cuda.py first, then the rest of the suite, in several processes if pytest-xdist is installed."""
    suites = {"tests/test_cuda.py": ["tests/test_cuda.py"], "the rest": ["tests", "--ignore=tests/test_cuda.py", "--ignore=tests/kernels"]}
    select = ["-m", "cuda"]
    if session.small:
        suites, select = {"tests/test_cuda.py": ["tests/test_cuda.py"]}, ["-k", "row_sqnorm and cpu"]
    have = run(
        [sys.executable, "-c", "import importlib.util as u; print([n for n in ('xdist', 'hypothesis') if u.find_spec(n)])"], session.folder / "have.log", 30
    )
    workers = ["-n", str(min(6, os.cpu_count() or 1))] if "xdist" in have.output and not session.small else []
    alone = [] if "hypothesis" in have.output else ["--noconftest"]  # all that conftest.py does is to set hypothesis up
    rows = [] if session.small else [primitives(session)]
    for i, (name, arguments) in enumerate(suites.items()):
        report = session.folder / f"tests-{i}.xml"
        report.unlink(missing_ok=True)
        limit = session.left("tests") * (0.5 if i + 1 < len(suites) else 1.0)
        common = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}", *select, *workers, *alone]
        done = run([sys.executable, "-m", "pytest", *arguments, *common], session.folder / f"tests-{i}.log", limit)
        numbers = count_tests(report) if report.exists() else {"message": last_lines(done.output)}
        # pytest: 0 all passed, 5 nothing selected
        verdict = "ok" if done.status == 0 else "time limit" if done.status is None else "nothing to run" if done.status == 5 else "failed"
        rows.append({"item": name, "verdict": verdict, "seconds": round(done.seconds, 1), **numbers})
        print(f"  {name}: {verdict}, {numbers.get('passed', '?')} passed, {numbers.get('failed', '?')} failed", flush=True)
    return rows


def sanitizer(session: Session) -> list[Row]:
    """Every op at odd toy sizes in four dtypes, bare and under compute-sanitizer; the allocator does not keep memory, so that every tensor has bounds."""
    rows = [row | {"item": f"bare: {row['item']}"} for row in session.child("sanitizer")]
    tool = shutil.which("compute-sanitizer", path=environment_of_children()["PATH"])
    for check in () if session.small else ("memcheck", "racecheck"):
        if tool is None:
            rows.append({"item": check, "verdict": "not run", "message": "compute-sanitizer is not installed"})
            continue
        share = session.left("sanitizer") * (0.5 if check == "memcheck" else 1.0)
        request = {"stage": "sanitizer", "device": session.device, "small": True, "rows": str(session.folder / f"{check}.jsonl")}
        (session.folder / f"{check}.jsonl").unlink(missing_ok=True)
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, str(CHILD), json.dumps(request)]
        done = run(command, session.folder / f"{check}.log", share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        verdict = "ok" if done.status == 0 else "time limit" if done.status is None else "found errors" if done.status == 9 else "error"
        rows.append({"item": check, "verdict": verdict, "seconds": round(done.seconds, 1), "message": "" if verdict == "ok" else last_lines(done.output, 40)})
    return rows


def roofline(session: Session) -> list[Row]:
    return session.child("roofline")


def steps(session: Session) -> list[Row]:
    return session.child("steps")


STAGES = {stage.__name__: stage for stage in (build, tests, sanitizer, roofline, steps)}


# ---------------------------------------------------------------------------------------------------------------------------------------
# The report


def lines_of(stage: str, row: Row) -> list[str]:
    if row["verdict"] not in ("ok", "failed", "time limit"):
        return [f"{row['item']}: {row['verdict']} {row.get('message', '')}"[:300]]
    if stage == "tests":
        counts = [f"{row[key]} {key}" for key in ("passed", "failed", "skipped") if key in row]
        said = ", ".join([row["verdict"], *counts, f"{row['seconds']} s"])
        return [f"{row['item']}: {said}", *(f"    {name}: {why}"[:240] for name, why in row.get("failures", {}).items())]
    if stage == "roofline":
        rate = f"{row['rate']:.4g} {row['unit']}" if "rate" in row else ""
        floor = f"{row['over_floor']:6.2f} x its floor" if row.get("over_floor") else ""
        beside = f"{row['over_plain']:6.2f} x {row['plain']}" if "over_plain" in row else ""
        return [f"{row['item']:66} {row['us']:10.1f} us  {floor} {beside} {rate}".rstrip()]
    if stage == "steps":
        lines = [f"{row['item']}: plain step {row['plain_ms']:.3g} ms, peak {row['plain_peak_mib']} MiB"]
        for name, method in row["methods"].items():
            if "ratio" in method:
                peak = f", peak {method['peak_mib']} MiB" if method.get("peak_mib") is not None else ""
                lines.append(f"    {name:18} {method['ratio']:7.3f} [{method['low']:.3f}-{method['high']:.3f}]{peak}")
            else:
                lines.append(f"    {name:18} {method['verdict']} {method['message']}"[:200])
        return lines
    return [f"{row['item']}: {row['verdict']}" + (f", {row['seconds']} s" if "seconds" in row else "")]


def report(results: Row) -> str:
    found = results["environment"]
    lines = [f"\n{found['device']}, torch {found['torch']}, CUDA {found['cuda']}, {found['date']}"]
    for name, stage in results["stages"].items():
        lines += [f"\n{name}: {stage['seconds']} s", *(f"  {line}" for row in stage["rows"] for line in lines_of(name, row))]
    return "\n".join(lines)


def save(results: Row, path: Path) -> None:
    """A row a line, so that a change can be read."""
    stages = ",\n".join(
        f'  {json.dumps(name)}: {{"seconds": {stage["seconds"]}, "rows": [\n   ' + ",\n   ".join(map(json.dumps, stage["rows"])) + "\n  ]}"
        for name, stage in results["stages"].items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "environment": {json.dumps(results["environment"])},\n "stages": {{\n{stages}\n }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the results, and for the logs")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    chosen = [stage for stage in STAGES if stage in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    folder = arguments.out or ROOT / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    asked = run([sys.executable, str(CHILD), json.dumps({"stage": "environment", "device": arguments.device})], folder / "environment.log", 120)
    if asked.status != 0:
        print(f"gpu.py: there is no GPU here that torch can use; --device cpu shows that the command works. {last_lines(asked.output, 1)}")
        return 1
    here = json.loads(asked.output.strip().splitlines()[-1]) | {"date": datetime.date.today().isoformat()}
    slug = re.sub(r"[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    path = folder / f"{slug}.json" if arguments.device == "cpu" else RESULTS / f"{slug}.json"
    results: Row = {"environment": here, "stages": {}}
    if path.exists():
        before = json.loads(path.read_text())
        if {**before["environment"], "date": ""} == {**here, "date": ""}:  # another torch or driver: its numbers do not belong here
            results["stages"] = before["stages"]
    session = Session(arguments.device, arguments.minutes, chosen, folder, here.get("capability", "8.0"))
    for name in chosen:
        print(f"{name}: {session.left(name):.0f} s at most", flush=True)
        start = time.monotonic()
        try:
            rows = STAGES[name](session)
        except Exception as error:  # of this program itself: the next stage does not suffer from it
            rows = [{"item": name, "verdict": "error", "message": f"{type(error).__name__}: {error}"}]
        results["stages"][name] = {"seconds": round(time.monotonic() - start, 1), "rows": rows}
        save(results, path)
        print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)
        if name == "build" and rows[-1]["verdict"] != "ok":
            print(report(results))
            return 1
    if arguments.out and path.parent != arguments.out:
        save(results, arguments.out / path.name)
    print(report(results))
    good = all(row["verdict"] in ("ok", "nothing to run", "not run") for name in chosen for row in results["stages"][name]["rows"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
