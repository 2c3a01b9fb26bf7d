"""The empirical neural tangent kernel of a convolutional network with a million parameters, here and by torch.func, in time and in peak memory.

    python benchmarks/gram.py [--batch 512] [--outputs 10] [--limit-mib 4096] [--threads 1] [--out results.json]

Each way runs in a process of its own. torch.func has no form of it that needs no per-sample gradients of all parameters: those of one output at a time are
formed in chunks and multiplied ("by output"), or Jacobians of two chunks of samples, for every pair of chunks ("by blocks"). A way that is at its limit of
memory, or gives another kernel than a loop over some samples, is reported and not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from grid import machine, save
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad.bench.measure import ChildError, in_child, peak_memory


def network(outputs: int) -> nn.Module:
    """1.0 M parameters, nearly all of them in the convolutions."""
    torch.manual_seed(0)
    widths = [3, 64, 128, 192, 256, 112]
    layers: list[nn.Module] = []
    for i, (inputs, features) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(inputs, features, 3, stride=1 + i % 2, padding=1), nn.GroupNorm(8, features), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], outputs))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def ours(model: nn.Module, x: Tensor) -> Tensor:
    kernel: Tensor = gg.gram(model, x)
    return kernel


def by_output(model: nn.Module, x: Tensor, chunk: int = 32) -> Tensor:
    from torch.func import functional_call, grad, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)
    for k in range(model(x[:1]).shape[1]):
        one = grad(lambda p, t, k=k: functional_call(model, p, (t[None],))[0, k])
        g = torch.empty(len(x), sum(p.numel() for p in params.values()))
        for rows, some in zip(g.split(chunk), x.split(chunk), strict=True):
            torch.cat([grad.flatten(1) for grad in vmap(one, (None, 0))(params, some).values()], 1, out=rows)
        kernel += (g @ g.mT).double()
    return kernel


def by_blocks(model: nn.Module, x: Tensor, chunk: int = 32) -> Tensor:
    from torch.func import functional_call, jacrev, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}

    def jacobian(some: Tensor) -> Tensor:
        js = vmap(jacrev(lambda p, t: functional_call(model, p, (t[None],))[0]), (None, 0))(params, some)
        return torch.cat([j.flatten(2) for j in js.values()], 2).flatten(1)  # (chunk, K * parameters)

    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i in range(0, len(x), chunk):
        first = jacobian(x[i : i + chunk])
        for j in range(i, len(x), chunk):
            block = first @ (first if i == j else jacobian(x[j : j + chunk])).mT
            kernel[i : i + chunk, j : j + chunk], kernel[j : j + chunk, i : i + chunk] = block.double(), block.mT.double()
    return kernel


WAYS = {"ghostgrad": ours, "torch.func, by output": by_output, "torch.func, by blocks": by_blocks}


def child(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    model, x, way = network(request["outputs"]), images(request["batch"]), WAYS[request["way"]]
    way(model, x[:4])
    if request["memory"]:
        return {"peak_mib": peak_memory(lambda: way(model, x), calls=1)}
    start = time.process_time()
    kernel = way(model, x)
    seconds = time.process_time() - start
    params = list(model.parameters())
    some = [0, 1, len(x) - 1]
    rows = []
    for i in some:
        grads = [torch.autograd.grad(out, params, retain_graph=True) for out in model.double()(x[i : i + 1].double())[0]]
        rows.append(torch.cat([g.flatten() for grad in grads for g in grad]))
    exact = torch.stack(rows) @ torch.stack(rows).mT
    return {"seconds": seconds, "error": float((kernel[some][:, some] - exact).norm() / exact.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=10)
    parser.add_argument("--limit-mib", type=float, default=4096)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    rows = []
    for way in arguments.ways:
        request = {"way": way, "batch": arguments.batch, "outputs": arguments.outputs}
        row: dict[str, Any] = dict(request)
        try:
            for memory, allocator in ((True, "returned"), (False, "kept")):
                row |= in_child(
                    [sys.executable, __file__, "--child"],
                    request | {"memory": memory},
                    threads=arguments.threads,
                    allocator=allocator,
                    timeout=arguments.timeout,
                )
            row["verdict"] = "wrong" if row["error"] > 1e-4 else "ok" if row["peak_mib"] <= arguments.limit_mib else f"over {arguments.limit_mib:g} MiB"
        except ChildError as error:
            row["verdict"] = str(error)
        rows.append(row)
        print(
            f"{way:24} {row.get('seconds', float('nan')):8.1f} s of processor time  {row.get('peak_mib', float('nan')):8.0f} MiB  {row['verdict']}", flush=True
        )
    if arguments.out:
        save(arguments.out, machine(arguments.threads), {"rows": rows})


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(child(json.loads(sys.argv[-1]))))
    else:
        main()
