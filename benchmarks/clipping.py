"""What a step with clipped gradients takes, and one with second moments, over the plain step: here and in the peers.

    pip install -r benchmarks/requirements.txt    # for the peers; without them they are reported as missing
    python benchmarks/clipping.py [--problems mlp block lm wide cnn] [--methods ...] [--pairs 15] [--seconds 30] [--threads 1] [--out results.json]

Medians over interleaved pairs: each step and the plain one run just before it. A method is timed if its gradients (or moments) are those of a loop over the
samples, to 1e-3 of their norm.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grid import keep_memory, machine, save
from torch import Tensor

import ghostgrad as gg
from ghostgrad.bench.measure import interleave, summary
from ghostgrad.bench.problems import Problem, build
from ghostgrad.bench.steps import plain

MAX_NORM = 0.01  # below the norms, so that every sample is clipped

Gradients = dict[str, Tensor]
Method = Callable[[Problem], Callable[[], Gradients]]


def in_a_tap(problem: Problem, **options: Any) -> Callable[[], Gradients]:
    model = problem.model

    def step() -> Gradients:
        model.zero_grad()
        with gg.tap(model) as tap:
            gg.clipped_backward(problem.losses(model(*problem.inputs), problem.target), tap, MAX_NORM, **options)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return step


def second_moments(problem: Problem) -> Callable[[], Gradients]:
    def step() -> Gradients:
        problem.model.zero_grad()
        with gg.tap(problem.model, moments=True) as tap:
            problem.loss_fn(problem.model(*problem.inputs), problem.target).backward()
        return tap.second_moments()

    return step


def opacus(problem: Problem, ghost: bool) -> Callable[[], Gradients]:
    from opacus import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    options = {"noise_multiplier": 0.0, "max_grad_norm": MAX_NORM, "expected_batch_size": 1, "loss_reduction": "sum"}
    sgd = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    params = dict(problem.model.named_parameters())
    wrap = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    extra = {"max_grad_norm": MAX_NORM, "use_ghost_clipping": True} if ghost else {}
    wrapped = wrap(problem.model, loss_reduction="sum", **extra)
    optimizer = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(sgd, **options)

    def step() -> Gradients:
        optimizer.zero_grad(set_to_none=True)
        losses = problem.losses(wrapped(*problem.inputs), problem.target)
        if ghost:
            DPTensorFastGradientClipping(wrapped, optimizer, losses, loss_reduction="sum").backward()
            return {name: p.grad for name, p in params.items() if p.grad is not None}
        losses.sum().backward()
        optimizer.clip_and_accumulate()
        return {name: p.summed_grad for name, p in params.items() if getattr(p, "summed_grad", None) is not None}

    return step


def vmap(problem: Problem, chunks: int) -> Callable[[], Gradients]:
    from torch.func import functional_call, grad
    from torch.func import vmap as over_samples

    params, buffers = {k: v.detach() for k, v in problem.model.named_parameters()}, dict(problem.model.named_buffers())

    def loss(params: Gradients, sample: tuple[Tensor, ...], goal: Tensor) -> Tensor:
        return problem.loss_fn(functional_call(problem.model, (params, buffers), tuple(t[None] for t in sample)), goal[None])

    def step() -> Gradients:
        total: Gradients = {}
        for *inputs, target in zip(*(t.chunk(chunks) for t in (*problem.inputs, problem.target)), strict=True):
            grads = over_samples(grad(loss), (None, 0, 0))(params, tuple(inputs), target)
            norms = torch.stack([g.flatten(1).norm(dim=1) if g.dim() > 1 else g.abs() for g in grads.values()]).norm(dim=0)
            factors = (MAX_NORM / norms).clamp(max=1)
            for name, g in grads.items():
                clipped = torch.tensordot(factors, g, 1)
                total[name] = total[name] + clipped if name in total else clipped
        return total

    return step


METHODS: dict[str, Method] = {
    "null": lambda problem: lambda: plain(problem)() or {},
    "book-keeping": lambda problem: in_a_tap(problem, memory=1 << 40),
    "two passes": lambda problem: in_a_tap(problem, memory=0),
    "by layer": lambda problem: in_a_tap(problem, groups="module"),
    "second moments": second_moments,
    "Opacus": lambda problem: opacus(problem, ghost=False),
    "Opacus, ghost": lambda problem: opacus(problem, ghost=True),
    "vmap": lambda problem: vmap(problem, 1),
    "vmap, chunked": lambda problem: vmap(problem, 8 if len(problem.target) >= 8 else len(problem.target)),
}


def loop(problem: Problem, method: str) -> Gradients:
    """What a method is to give, by autograd, one sample at a time."""
    names, params = zip(*problem.model.named_parameters(), strict=True)
    total = {name: torch.zeros_like(p) for name, p in zip(names, params, strict=True)}
    for i in range(len(problem.target)):
        loss = problem.loss_fn(problem.model(*(t[i : i + 1] for t in problem.inputs)), problem.target[i : i + 1])
        grads = torch.autograd.grad(loss, params)
        factor = min(1.0, MAX_NORM / float(torch.stack(torch._foreach_norm(grads)).norm()))
        for name, g in zip(names, grads, strict=True):
            if method == "second moments":
                total[name].addcmul_(g, g)
            elif method == "by layer":
                layer = [h for n, h in zip(names, grads, strict=True) if n.rpartition(".")[0] == name.rpartition(".")[0]]
                total[name].add_(g, alpha=min(1.0, MAX_NORM / float(torch.stack(torch._foreach_norm(layer)).norm())))
            else:
                total[name].add_(g, alpha=factor)
    return total


def verdict(got: Gradients, exact: Gradients) -> str:
    missing = [name for name in exact if name not in got]
    if missing:
        return f"misses {len(missing)} of {len(exact)} parameters"
    error = float(torch.stack([(got[name].detach() - g).norm() for name, g in exact.items()]).norm() / torch.stack([g.norm() for g in exact.values()]).norm())
    return "ok" if error < 1e-3 else f"wrong by {error:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", default=["mlp", "block", "lm", "wide", "cnn"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each method, three pairs at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.problems:
        truths: dict[str, Gradients] = {}
        for method in arguments.methods:
            row: dict[str, Any] = {"problem": name, "method": method}
            kind = method if method in ("second moments", "by layer") else ""
            try:
                problem = build(name)
                if method != "null" and kind not in truths:
                    truths[kind] = loop(build(name), kind)
                step = METHODS[method](problem)
                row["verdict"] = "ok" if method == "null" else verdict(step(), truths[kind])
                if row["verdict"] == "ok":
                    row |= summary(interleave(plain(build(name)), {method: step}, arguments.pairs, arguments.seconds)[method])
            except Exception as error:  # a peer's, whatever it is
                row["verdict"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            rows.append(row)
            ratio = f"{row['ratio']:.2f} plain steps ({row['low']:.2f} to {row['high']:.2f})" if "ratio" in row else row["verdict"]
            print(f"{name:6} {method:16} {ratio}", flush=True)
            step = None  # type: ignore[assignment]
            gc.collect()
    if arguments.out:
        save(arguments.out, machine(arguments.threads), {"rows": rows})


if __name__ == "__main__":
    main()
