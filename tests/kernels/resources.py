"""Reads what ptxas says about kernels (``nvcc --resource-usage``) and prints it as a table: ``python resources.py build.log``.

``cuobjdump`` is not needed. Of a kernel that was compiled several times into one log, the last report counts.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Resources(NamedTuple):
    """What one kernel needs on one architecture."""

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_TYPES = {"f": "float32", "d": "float64", "8BFloat16": "bfloat16", "7Float16": "float16", "Lb1E": "true", "Lb0E": "false"}


def readable(symbol: str) -> str:
    """``..._sqnorm_kernelIfE...`` as ``..._sqnorm_kernel<float32>``: the name and the first template argument are all that tells our kernels apart."""
    # A kernel in an unnamed namespace: _ZN9ghostgrad4cuda<length>_GLOBAL__N__...<length><name>I<arguments>E...
    match = re.search(r"\d+([a-z][a-z_]*?)I((?:f|d|Lb[01]E|Li\d+E|NS_4core(?:8BFloat16|7Float16)E|S\w*_)+)E", symbol)
    if match is None:
        return symbol
    arguments = re.findall(r"8BFloat16|7Float16|S\w*?_|Lb[01]E|Li\d+E|f|d", re.sub(r"NS_4core|(?<=16)E", "", match.group(2)))
    return f"{match.group(1)}<{', '.join(_TYPES.get(argument) or argument[2:-1] if argument != 'S' else 'same' for argument in arguments)}>"


def parse(log: str) -> list[Resources]:
    """One row per kernel and architecture, sorted."""
    rows: dict[tuple[str, str], Resources] = {}
    entry, stack, spill = None, 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, stack, spill = (match.group(1), match.group(2)), 0, 0
        elif match := _STACK.search(line):
            stack, spill = int(match.group(1)), int(match.group(2)) + int(match.group(3))
        elif (match := _USED.search(line)) and entry is not None:
            rows[entry] = Resources(readable(entry[0]), entry[1], int(match.group(1)), int(match.group(2) or 0), stack, spill)
            entry = None
    return sorted(rows.values())


def table(rows: list[Resources]) -> str:
    """The rows as text."""
    width = max((len(row.kernel) for row in rows), default=6)
    lines = [f"{'kernel':{width}}  {'arch':6}  registers  shared  stack  spills"]
    lines += [f"{r.kernel:{width}}  {r.arch:6}  {r.registers:9}  {r.shared_bytes:6}  {r.stack_bytes:5}  {r.spill_bytes:6}" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(parse(Path(sys.argv[1]).read_text())))
