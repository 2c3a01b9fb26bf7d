"""A file of results: one environment, and a row for every problem, method and setting measured in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ghostgrad.bench.problems import PROBLEMS

RESULTS = Path(__file__).resolve().parent / "results/cpu-avx512.json"
KEY = ("problem", "method", "threads", "compiled", "allocator")  # what identifies a row

Row = dict[str, Any]


class Results:
    """Rows, looked up by their key. The versions of packages may be completed by other environments, the rest of the environment is the file's."""

    def __init__(self, environment: Row, rows: list[Row]):
        self.environment, self.rows = environment, rows

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls(**json.loads(path.read_text()))

    def find(self, problem: str, method: str, threads: int = 1, compiled: bool = False, allocator: str = "kept", **_: Any) -> Row | None:
        key = {"problem": problem, "method": method, "threads": threads, "compiled": compiled, "allocator": allocator}
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def problems(self, **key: Any) -> list[str]:
        """Those of which the plain step was measured."""
        return [problem for problem in PROBLEMS if self.find(problem, "null", **key)]

    def put(self, row: Row) -> None:
        """Add a row, in the place of the one with its key if there is one."""
        found = self.find(**row)
        self.rows = [row if each is found else each for each in self.rows] + [row] * (found is None)

    def merge_environment(self, here: Row) -> None:
        """Raises ValueError if ``here`` is another machine or torch, or has another version of a package."""
        versions = here["versions"] | self.environment["versions"]
        if here | {"versions": {}} != self.environment | {"versions": {}} or versions != self.environment["versions"] | here["versions"]:
            raise ValueError(f"the results were measured in another environment:\n  there {self.environment}\n  here  {here}")
        self.environment = here | {"versions": versions}

    def save(self, path: Path) -> None:
        """A row a line, so that a change can be read."""
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        part = path.with_suffix(".part")
        part.write_text(f'{{\n "environment": {json.dumps(self.environment)},\n "rows": [\n  {lines}\n ]\n}}\n')
        os.replace(part, path)
