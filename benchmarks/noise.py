"""Noise with an address beside a copy and beside PyTorch's generators, on 25 million float32 parameters.

    python benchmarks/noise.py [--pairs 21] [--threads 1 2] [--allocator kept] [--out benchmarks/results/noise.json]

Every number is a median over interleaved pairs: the step, and what it is measured against run just before it. With the allocator "kept" buffers cost nothing
after the first time, with "default" glibc maps large ones anew, as it does for users.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grid import keep_memory, machine, save
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad import noise, reference
from ghostgrad.bench.measure import interleave, summary

ELEMENTS, SIGMA, SEED = 25_000_000, 0.01, 7
Step = Callable[[], object]


def comparisons() -> dict[str, tuple[Step, dict[str, Step]]]:
    """``{plain: (its step, {name: step})}``."""
    w, to, buffer, grads = (torch.randn(ELEMENTS) for _ in range(4))
    centre, momentum = torch.randn(ELEMENTS), torch.zeros(ELEMENTS)
    p = nn.Parameter(w)

    def copy() -> object:
        return to.copy_(w)

    def perturb(distribution: str) -> Step:
        return lambda: noise.perturb_([w], SEED, SIGMA, distribution)

    def normal(out: Tensor | None) -> Step:
        return lambda: w.add_(torch.randn(ELEMENTS, out=out), alpha=SIGMA)

    def signs() -> object:
        return w.add_(buffer.bernoulli_(0.5).mul_(2).sub_(1), alpha=SIGMA)

    def block(copy: bool) -> Step:
        def step() -> None:
            with gg.perturbed([p], SIGMA, SEED, copy=copy):
                pass

        return step

    def dot() -> object:
        return noise.probe_dot([grads], [centre], seed=SEED, sigma=SIGMA)

    def dot_of_stored_noise() -> object:
        return torch.dot(torch.sub(grads, centre, out=to), buffer)

    def step_by(function: Callable[..., None]) -> Step:
        # so small a step that the values stay what they are, however often it runs
        return lambda: function([w], [grads], [centre], [momentum], lr=1e-12, passes=2, mix=0.5, momentum=0.9, weight_decay=1e-4)

    return {
        "copy": (
            copy,
            {"copy": copy, **{f"perturb_, {d}": perturb(d) for d in noise.DISTRIBUTIONS}, "perturbed": block(True), "perturbed, copy=False": block(False)},
        ),
        "perturb_, normal": (perturb("normal"), {"torch.randn(out=...) and add": normal(buffer), "torch.randn and add": normal(None)}),
        "perturb_, rademacher": (perturb("rademacher"), {"bernoulli and add": signs}),
        "probe_dot": (dot, {"difference and torch.dot": dot_of_stored_noise}),
        "nso_step_": (step_by(noise.nso_step_), {"the same by PyTorch's operations": step_by(reference.nso_step_)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    if arguments.allocator == "kept":
        keep_memory()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        against = comparisons()
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for plain, (step, others) in against.items():
                for other in 6 * list(others.values()):  # until the heap has grown to what they take
                    other()
                for name, times in interleave(step, others, arguments.pairs).items():
                    row: dict[str, Any] = {"threads": threads, "step": name, "against": plain, **summary(times)}
                    row["ns_per_element"] = round(row["ratio"] * row["plain_ms"] * 1e6 / ELEMENTS, 3)
                    rows.append(row)
                    print(f"{threads} threads  {name:34} {row['ratio']:7.2f} x {plain:20}  {row['ns_per_element']:7.3f} ns an element", flush=True)
    if arguments.out:
        head = machine(arguments.threads[0])
        del head["threads"]
        save(arguments.out, {**head, "allocator": arguments.allocator, "elements": ELEMENTS}, {"rows": rows})


if __name__ == "__main__":
    main()
