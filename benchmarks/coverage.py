"""Which models each library gets right: every case of tests/models.py through every library of per-sample gradients that is installed.

    python benchmarks/coverage.py [--out docs/coverage.md] [--timeout 120] [--messages]

The libraries are those of peers.py, which says how to install them; one that is missing is left out of the table.

A library runs in a process of its own, every case on a freshly built model in float32, and its norms are compared with autograd in float64, one sample at a
time. A case that hangs or kills the process is recorded as such, and the next one starts in a new process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import queue
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from peers import PEERS, Peer, installed

from ghostgrad.bench.problems import Problem
from ghostgrad.bench.steps import Method, attempt
from helpers import build, loop_sqnorms, loss_fn
from models import CASES, Case


def ghostgrad(problem: Problem) -> Callable[[], dict[str, Tensor]]:
    import ghostgrad as gg

    return lambda: gg.sqnorms(problem.model, problem.loss_fn, *problem.inputs, problem.target, by_param=True)


def losses(out: Tensor, target: Tensor) -> Tensor:
    """(B,): each sample's own loss."""
    return torch.stack([loss_fn(out[i : i + 1], target[i : i + 1]) for i in range(len(target))])


# By the column's head
LIBRARIES: dict[str, Peer] = {
    peer.title: peer
    for peer in (
        Peer("ghostgrad", "ghostgrad", "ghostgrad", ghostgrad),
        *(PEERS[name] for name in "vmap opacus-hooks opacus-ghost opacus-functorch backpack torchjd torchjd-unbatched expanded-weights".split()),
    )
}


def verdict(case: Case, method: Method) -> tuple[str, str]:
    """The cell's text, and an exception's message."""
    model, inputs, target = build(case)
    text, particulars, _ = attempt(method, Problem(model, inputs, target, loss_fn, losses), loop_sqnorms(model, inputs, target))
    return text, particulars


def worker(library: str, start: int) -> None:
    """Prints one line of JSON per case."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    method = LIBRARIES[library].prepare
    for case in CASES[start:]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(json.dumps(verdict(case, method)), flush=True)


def run(library: str, timeout: float) -> list[tuple[str, str]]:
    """The verdicts of all cases; a process that hangs or dies costs the case that it was at."""
    rows: list[tuple[str, str]] = []
    while len(rows) < len(CASES):
        command = [sys.executable, __file__, "--worker", library, "--start", str(len(rows))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines: queue.Queue[str] = queue.Queue()

        def read(process: subprocess.Popen[str] = process, lines: queue.Queue[str] = lines) -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        while len(rows) < len(CASES):
            try:
                line = lines.get(timeout=timeout)
            except queue.Empty:
                rows.append(("error (no answer)", f"longer than {timeout:g} s"))
                break
            if not line:
                rows.append(("error (process died)", f"exit status {process.wait()}"))
                break
            if line.startswith('["'):  # a library may print
                cell, message = json.loads(line)
                rows.append((cell, message))
        process.kill()
        process.wait()
    return rows


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module: Any = importlib.import_module(package)  # run from a source tree
        return str(module.__version__)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


KINDS = ("ok", "wrong", "missing", "error", "refused")

TEXT = """# Which models each library gets right

{cases} small models, each using its parameters in one way, through the libraries that give per-sample gradients or their norms. Made by
`python benchmarks/coverage.py` on {device}, Python {python}, with
{versions}.

The models are those of [tests/models.py](../tests/models.py): **they were written to test ghostgrad**, which therefore passes them (`make test` fails
otherwise), and many of them are unusual on purpose. The share of cases that a library gets right says what it covers, not how well it does on the models
that it was made for.

- **ok**: every sample's squared norm, summed over the parameters, is within 1e-3 (relative) of autograd in float64, one sample at a time.
- **wrong**: a number came back without an exception and is further off than that; the largest relative error over the samples, or "shape" where a parameter's
  values were not one per sample.
- **missing** k of n: no exception, but k of the model's n parameters, with gradients that are not zero, got no value. Only where values are per parameter.
  A warning may have been given (BackPACK warns of modules that it skips).
- **error**: an exception. That includes deliberate refusals, which are the right answer to a model that a library does not support.
- **refused**: the same for ghostgrad's own exceptions.

Every library gets the model as it is written, in float32, and is called as it documents:

- Opacus with a summed loss and otherwise default arguments. Its replacements for recurrent layers and attention (`DPLSTM` and the like) were not put in, and
  `strict=False`, which it advises against, was not used: "batch norm eval" is out of its scope.
- BackPACK's `BatchL2Grad` without its converter. It covers a list of modules, so that parameters used in functions, which many of these cases are about, are
  missing. It follows a layer's first output only: "rnn" and "lstm" are wrong because the final states are part of the loss; with the outputs alone they are ok.
- TorchJD in two columns: `batch_dim=0`, which asks that every module's inputs and outputs are batched on their first dimension, and `batch_dim=None`, which
  it names as the dearer alternative where that does not hold.
- `call_for_per_sample_grads` (ExpandedWeights) with the batch size given.
- Modules whose input has no batch dimension ("transformer": positions) or another one first break the stated conditions of Opacus, TorchJD (`batch_dim=0`)
  and ExpandedWeights.{left_out}

## Totals

{totals}

## Cases

{table}
"""


def report(results: dict[str, list[tuple[str, str]]], left_out: list[str]) -> str:
    packages = dict.fromkeys(["torch", *(LIBRARIES[name].package for name in results)])
    counts = {name: Counter(cell.split()[0] for cell, _ in rows) for name, rows in results.items()}
    return TEXT.format(
        cases=len(CASES),
        versions=", ".join(f"{package} {version(package)}" for package in packages),
        python=platform.python_version(),
        device="one CPU thread",
        left_out=f"\n- Not installed and left out: {', '.join(left_out)}." if left_out else "",
        totals=table(["library", *KINDS], [[name, *(str(count[kind]) for kind in KINDS)] for name, count in counts.items()]),
        table=table(["case", *results], [[case.name, *(rows[i][0] for rows in results.values())] for i, case in enumerate(CASES)]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the Markdown report there instead of printing it")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one case may take")
    parser.add_argument("--messages", action="store_true", help="print what the exceptions said, to stderr")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.start)
    available = {name for name, peer in LIBRARIES.items() if installed(peer)}
    results = {}
    for name in (name for name in LIBRARIES if name in available):
        results[name] = run(name, args.timeout)
        print(f"{name}: {dict(Counter(cell.split()[0] for cell, _ in results[name]))}", file=sys.stderr)
        if args.messages:
            for case, (cell, message) in zip(CASES, results[name]):
                if cell != "ok":
                    print(f"    {case.name}: {cell} {' '.join(message.split())[:300]}", file=sys.stderr)
    text = report(results, [name for name in LIBRARIES if name not in available])
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
