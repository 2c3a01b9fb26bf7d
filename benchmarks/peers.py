"""Other ways to the norms of every sample's gradient: the libraries, and what PyTorch itself offers.

    pip install -r benchmarks/requirements.txt    # one environment serves all

A peer is a method of ``ghostgrad.bench.steps``: a function of a :class:`Problem` that prepares whatever can be prepared once (wrappers, hooks) and returns the
step: forward, backward, and the squared norms, each called as its library documents. The model is the peer's own: most leave hooks or attributes on it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostgrad.bench.problems import Problem
from ghostgrad.bench.steps import Method

Step = Callable[[], Tensor | dict[str, Tensor]]


class SumOfLosses(nn.Module):
    """A problem's loss is a mean over the samples; this is their sum."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.loss_fn = problem.loss_fn

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        return len(target) * self.loss_fn(out, target)


def square_sum(grads: Tensor) -> Tensor:
    """(B, ...) -> (B,), without a second tensor of that size."""
    return torch.linalg.vector_norm(grads.reshape(len(grads), -1), dim=1).square()  # a scalar parameter's are (B,)


def of_attribute(params: dict[str, Tensor], attribute: str) -> dict[str, Tensor]:
    """What the library left on the parameters. They are looked up before its call, as a module used twice may not hold them any more after it."""
    found = {name: getattr(p, attribute, None) for name, p in params.items()}
    return {name: value for name, value in found.items() if value is not None}


def loop(problem: Problem) -> Step:
    params = [p for p in problem.model.parameters() if p.requires_grad]

    def sqnorm(i: int) -> Tensor:
        loss = problem.loss_fn(problem.model(*(t[i : i + 1] for t in problem.inputs)), problem.target[i : i + 1])
        return torch.stack(torch._foreach_norm(torch.autograd.grad(loss, params))).square().sum()

    return lambda: torch.stack([sqnorm(i) for i in range(len(problem.target))])


def vmap_grad(problem: Problem, chunk_size: int | None = None) -> Step:
    from torch.func import functional_call, grad, vmap

    params, buffers = {k: v.detach() for k, v in problem.model.named_parameters()}, dict(problem.model.named_buffers())

    def loss(params: dict[str, Tensor], sample: tuple[Tensor, ...], goal: Tensor) -> Tensor:
        return problem.loss_fn(functional_call(problem.model, (params, buffers), tuple(t[None] for t in sample)), goal[None])

    def sqnorms(params: dict[str, Tensor], sample: tuple[Tensor, ...], goal: Tensor) -> dict[str, Tensor]:
        return {name: g.square().sum() for name, g in grad(loss)(params, sample, goal).items()}

    return lambda: vmap(sqnorms, (None, 0, 0), chunk_size=chunk_size)(params, problem.inputs, problem.target)


def opacus_hooks(problem: Problem, force_functorch: bool = False) -> Step:
    from opacus import GradSampleModule

    params = dict(problem.model.named_parameters())
    wrapped, loss_fn = GradSampleModule(problem.model, loss_reduction="sum", force_functorch=force_functorch), SumOfLosses(problem)

    def step() -> dict[str, Tensor]:
        wrapped.zero_grad(set_to_none=True)
        loss_fn(wrapped(*problem.inputs), problem.target).backward()
        return {name: square_sum(g) for name, g in of_attribute(params, "grad_sample").items()}

    return step


def opacus_ghost(problem: Problem) -> Step:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(problem.model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True)
    loss_fn = SumOfLosses(problem)

    def step() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        loss_fn(wrapped(*problem.inputs), problem.target).backward()
        norms: Tensor = wrapped.get_norm_sample()  # raises if a parameter has none
        return norms.square()

    return step


def backpack_l2(problem: Problem) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    params = dict(problem.model.named_parameters())
    model, loss_fn = extend(problem.model), extend(SumOfLosses(problem))

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with backpack(BatchL2Grad()):
            loss_fn(model(*problem.inputs), problem.target).backward()
        return of_attribute(params, "batch_l2")

    return step


def torchjd_gramian(problem: Problem, batch_dim: int | None = 0) -> Step:
    from torchjd.autogram import Engine

    engine = Engine(problem.model, batch_dim=batch_dim)

    def step() -> Tensor:
        gramian: Tensor = engine.compute_gramian(problem.losses(problem.model(*problem.inputs), problem.target))
        return gramian.diagonal()

    return step


def expanded_weights(problem: Problem) -> Step:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    params, loss_fn = dict(problem.model.named_parameters()), SumOfLosses(problem)

    def step() -> dict[str, Tensor]:
        for p in params.values():
            p.grad_sample = None
        out = call_for_per_sample_grads(problem.model, batch_size=len(problem.target), loss_reduction="sum")(*problem.inputs)
        loss_fn(out, problem.target).backward()
        return {name: square_sum(g) for name, g in of_attribute(params, "grad_sample").items()}

    return step


class Peer(NamedTuple):
    title: str
    module: str  # as imported
    package: str  # as installed
    prepare: Method


PEERS: dict[str, Peer] = {
    "loop": Peer("a loop over samples", "torch", "torch", loop),
    "vmap": Peer("torch.func vmap(grad)", "torch", "torch", vmap_grad),
    "vmap-chunked": Peer("vmap(grad), chunks of 8", "torch", "torch", partial(vmap_grad, chunk_size=8)),
    "opacus-hooks": Peer("Opacus hooks", "opacus", "opacus", opacus_hooks),
    "opacus-ghost": Peer("Opacus ghost", "opacus", "opacus", opacus_ghost),
    "opacus-functorch": Peer("Opacus functorch", "opacus", "opacus", partial(opacus_hooks, force_functorch=True)),
    "backpack": Peer("BackPACK", "backpack", "backpack-for-pytorch", backpack_l2),
    "torchjd": Peer("TorchJD", "torchjd", "torchjd", torchjd_gramian),
    "torchjd-unbatched": Peer("TorchJD, batch_dim=None", "torchjd", "torchjd", partial(torchjd_gramian, batch_dim=None)),
    "expanded-weights": Peer("ExpandedWeights", "torch", "torch", expanded_weights),
}


def installed(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.module) is not None
