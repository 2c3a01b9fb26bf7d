"""What each CUDA kernel needs: registers and memory as ptxas reports them (``nvcc --resource-usage``), threads and dynamic shared memory as its launcher asks
for them, and how many warps a multiprocessor then holds.

    python tests/kernels/resources.py build/tests            # the table of a build with tests (tests/kernels/test_build.py makes it)
    python tests/kernels/resources.py build/tests --write    # keep it as tests/kernels/resources.txt

``cuobjdump`` is not needed. Of a kernel that was compiled several times into one log, the last report counts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "resources.txt"


class Report(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    symbol: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


class Resources(NamedTuple):
    """A line of the table. Threads, dynamic shared memory and warps of a multiprocessor: "-" where no launcher starts the kernel on this architecture;
    of several launches the one that leaves fewest warps."""

    kernel: str
    arch: str
    registers: str
    shared: str
    dynamic: str
    threads: str
    warps: str
    stack: str
    spills: str


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_WORDS = {"float": "float32", "double": "float64", "BFloat16": "bfloat16", "Float16": "float16", "TF32": "tf32"}


def readable(symbols: list[str]) -> list[str]:
    """``..._sqnorm_kernelIfE...`` as ``..._sqnorm_kernel<float32>``: names and template arguments, without the namespaces."""
    plain = subprocess.run(["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True).stdout.splitlines()
    names = []
    for name in plain:
        name = re.sub(r"\(anonymous namespace\)|_GLO\w*", "", name.removeprefix("void "))
        name = re.sub(r"(\w*::)+", "", name)
        depth, end = 0, len(name)
        for i, letter in enumerate(name):  # up to the arguments of the function
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        names.append(re.sub(r"\w+", lambda word: _WORDS.get(word[0], word[0]), name[:end]).replace(" >", ">"))
    return names


def parse(log: str) -> list[Report]:
    """One report per kernel and architecture, sorted."""
    reports: dict[tuple[str, str], Report] = {}
    entry, stack, spill = None, 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, stack, spill = (match.group(1), match.group(2)), 0, 0
        elif match := _STACK.search(line):
            stack, spill = int(match.group(1)), int(match.group(2)) + int(match.group(3))
        elif (match := _USED.search(line)) and entry is not None:
            reports[entry] = Report(*entry, int(match.group(1)), int(match.group(2) or 0), stack, spill)
            entry = None
    return sorted(reports.values())


def occupancy(build: Path, mode: str, given: str = "") -> list[str]:
    return subprocess.run([str(build / "occupancy"), mode], input=given, check=True, capture_output=True, text=True).stdout.splitlines()


def capability(arch: str) -> str:
    return re.sub(r"\D", "", arch)


def read(build: Path) -> list[Resources]:
    """The table of a build; kernels that its log knows from earlier and that are no more are left out."""
    kernels = set(occupancy(build, "kernels"))
    reports = [report for report in parse((build / "build.log").read_text()) if report.symbol in kernels]
    launches: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for line in occupancy(build, "launches"):
        device, symbol, threads, dynamic = line.split()
        launches.setdefault((device, symbol), set()).add((threads, dynamic))
    shapes = [(report, shape) for report in reports for shape in sorted(launches.get((capability(report.arch), report.symbol), {("-", "-")}))]
    asked = [(report, shape) for report, shape in shapes if shape[0] != "-"]
    lines = [f"{capability(report.arch)} {threads} {report.registers} {report.shared_bytes} {dynamic}" for report, (threads, dynamic) in asked]
    warps = dict(zip(asked, occupancy(build, "warps", "\n".join(lines)), strict=True))
    fewest: dict[Report, tuple[str, str]] = {}  # of a kernel that is launched in several shapes, the one that leaves fewest warps
    for report, shape in sorted(shapes, key=lambda each: (int(warps.get(each, "0")), -int(each[1][1].replace("-", "0")))):
        fewest.setdefault(report, shape)
    rows = {
        Resources(
            name,
            report.arch,
            str(report.registers),
            str(report.shared_bytes),
            dynamic,
            threads,
            warps.get((report, (threads, dynamic)), "-"),
            str(report.stack_bytes),
            str(report.spill_bytes),
        )
        for name, (report, (threads, dynamic)) in zip(readable([report.symbol for report in fewest]), fewest.items(), strict=True)
    }
    return sorted(rows)  # a kernel that several files compile to the same is one line


def table(rows: list[Resources]) -> str:
    """The rows as text."""
    lines = [Resources._fields, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(Resources._fields))]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))) for line in lines)


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", said)
    return match.group(1) if match else said.strip()


def document(build: Path) -> str:
    head = f"nvcc {nvcc_version()}\nTo keep the table of a changed kernel: python tests/kernels/resources.py build/tests --write\n\n"
    return head + table(read(build)) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[2:]:
        TABLE.write_text(document(Path(sys.argv[1])))
    else:
        print(document(Path(sys.argv[1])), end="")
