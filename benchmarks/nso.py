"""What a step of NSO and SAM takes, over the plain step of torch.optim.SGD with momentum; two gradient evaluations are 2.

    python benchmarks/nso.py [--problems tiny mlp cnn] [--pairs 15] [--threads 1] [--out benchmarks/results/nso.json]

Medians over interleaved pairs: each step and the plain one run just before it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grid import keep_memory, machine, save
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad.bench.measure import interleave, summary
from ghostgrad.bench.problems import PROBLEMS, Problem

OPTIONS = {"lr": 1e-6, "momentum": 0.9}  # so small a step that the values stay what they are
OPTIMISERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), **OPTIONS),
    "NSO, one point": lambda model: gg.optim.NSO(model, torch.optim.SGD, two_point=False, **OPTIONS),
    "NSO, two points": lambda model: gg.optim.NSO(model, torch.optim.SGD, **OPTIONS),
    "SAM": lambda model: gg.optim.SAM(model, torch.optim.SGD, **OPTIONS),
}


def step(problem: Problem, optimiser: Callable[[nn.Module], Any]) -> Callable[[], object]:
    model = copy.deepcopy(problem.model)
    opt = optimiser(model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = problem.loss_fn(model(*problem.inputs), problem.target)
        loss.backward()
        return loss

    return lambda: opt.step(closure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["tiny", "mlp", "cnn"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.problems:
        torch.manual_seed(0)
        problem = PROBLEMS[name]()
        steps = {optimiser: step(problem, build) for optimiser, build in OPTIMISERS.items()}
        for optimiser, times in interleave(step(problem, OPTIMISERS["SGD"]), steps, arguments.pairs).items():
            row: dict[str, Any] = {"problem": name, "optimiser": optimiser, **summary(times)}
            rows.append(row)
            print(f"{name:6} {optimiser:16} {row['ratio']:.2f} plain steps ({row['low']:.2f} to {row['high']:.2f}) of {row['plain_ms']:.3g} ms", flush=True)
    if arguments.out:
        save(arguments.out, machine(arguments.threads), {"rows": rows})


if __name__ == "__main__":
    main()
