"""What the rules cost in memory: never more than the reference path, and no per-sample gradients of whole layers.

Peaks are those of the CPU allocator, as the profiler records it: everything that torch and the library's ops allocate through it. What oneDNN or BLAS take for
themselves, and Python objects, are not in it.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ghostgrad as gg
from ghostgrad import rules
from models import Lambda

B, T, D = 16, 6, 96  # B copies of a (D, D) matrix weigh more than the activations


@dataclass(frozen=True)
class Layer:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


def sequence() -> tuple[Tensor, ...]:
    return (torch.randn(B, T, D),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(500, (B, T)),)


def image(channels: int = 32, *size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(B, channels, *(size or (6, 6))),)


def first(module: nn.Module) -> nn.Module:
    """A module that gives the first result of another, called with as many times the same input as that takes."""
    wrapped = Lambda(lambda m, x: m.inner(*(x,) * (3 if isinstance(m.inner, nn.MultiheadAttention) else 1))[0])
    wrapped.inner = module
    return wrapped


def recurrent(module: nn.RNNBase) -> nn.Module:
    """All outputs, from a state that carries samples: of one that torch makes the reference path does not know."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 1 + module.bidirectional, D).transpose(0, 1).contiguous()
        out: Tensor = m.inner(x, (state, state) if isinstance(m.inner, nn.LSTM) else state)[0]
        return out

    wrapped = Lambda(run)
    wrapped.inner = module
    return wrapped


CONVOLUTIONS = [
    Layer("conv 1-d", lambda: nn.Conv1d(D, D, 3, padding=1), lambda: (torch.randn(B, D, T),)),
    Layer("conv 2-d", lambda: nn.Conv2d(64, 64, 3, padding=1), image(64)),
    Layer("conv 2-d, reflect", lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), image(64)),
    Layer("conv 2-d, stride, same channels last", lambda: nn.Conv2d(64, 96, 3, stride=2).to(memory_format=torch.channels_last), image(64)),
    Layer("conv 2-d, groups", lambda: nn.Conv2d(128, 128, 3, padding=1, groups=2), image(128, 3, 3)),
    Layer("conv 2-d, depthwise", lambda: nn.Conv2d(128, 128, 5, padding=2, groups=128), image(128, 3, 3)),
    Layer("conv 3-d", lambda: nn.Conv3d(16, 16, 3, padding=1), image(16, 3, 3, 3)),
    Layer("transposed conv 2-d", lambda: nn.ConvTranspose2d(64, 64, 3, stride=2), image(64, 3, 3)),
]
EMBEDDINGS = [
    Layer("embedding", lambda: nn.Embedding(500, D), tokens),
    Layer("embedding, padding", lambda: nn.Embedding(500, D, padding_idx=0), tokens),
    Layer("embedding bag, mean", lambda: nn.EmbeddingBag(500, D, mode="mean"), tokens),
    Layer("embedding bag, max", lambda: nn.EmbeddingBag(500, D, mode="max"), tokens),
]
NORMALISATIONS = [
    Layer("layer norm", lambda: nn.LayerNorm(D), sequence),
    Layer("layer norm without bias", lambda: nn.LayerNorm(D, bias=False), sequence),
    Layer("rms norm", lambda: nn.RMSNorm(D), sequence),
    Layer("group norm", lambda: nn.GroupNorm(4, 32), image()),
    Layer("instance norm", lambda: nn.InstanceNorm2d(32, affine=True), image()),
    Layer("batch norm eval", lambda: nn.BatchNorm2d(32).eval(), image()),
]
OTHERS = [
    Layer("linear", lambda: nn.Linear(D, D), sequence),
    Layer("linear, one position", lambda: nn.Linear(D, D), lambda: (torch.randn(B, D),)),
    Layer("linear used twice", lambda: (lambda layer: nn.Sequential(layer, nn.Tanh(), layer))(nn.Linear(D, D)), sequence),
    Layer("x @ W", lambda: Lambda(lambda m, x: x @ m.w, w=(D, D)), sequence),
    Layer("W @ x", lambda: Lambda(lambda m, x: m.w @ x.mT, w=(D, D)), sequence),
    Layer("einsum over heads", lambda: Lambda(lambda m, x: torch.einsum("bthp,hpd->bthd", x.unflatten(-1, (4, -1)), m.w), w=(4, D // 4, D)), sequence),
    Layer("baddbmm", lambda: Lambda(lambda m, x: torch.baddbmm(m.c, x, m.w.expand(len(x), -1, -1)), w=(1, D, D), c=(1, T, D)), sequence),
    Layer("bilinear", lambda: nn.Bilinear(24, 24, 48), lambda: (torch.randn(B, 24), torch.randn(B, 24))),
    Layer("prelu", lambda: nn.PReLU(32), image()),
    Layer("positions and scale", lambda: Lambda(lambda m, x: (x + m.p) * m.s, p=(T, D), s=(D,)), sequence),
    Layer("class token", lambda: Lambda(lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), x], 1), t=(1, 1, D)), sequence),
    Layer("lora", lambda: Lambda(lambda m, x: F.linear(x, m.w) + (x @ m.u.T) @ m.v.T, w=(D, D), u=(4, D), v=(D, 4)), sequence),
    Layer("multi-head attention", lambda: first(nn.MultiheadAttention(D, 4, batch_first=True)), sequence),
    Layer("encoder layer", lambda: nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, batch_first=True), sequence),
    Layer("rnn", lambda: recurrent(nn.RNN(D, D, batch_first=True)), sequence),
    Layer("lstm", lambda: recurrent(nn.LSTM(D, D, batch_first=True)), sequence),
    Layer("gru", lambda: recurrent(nn.GRU(D, D, batch_first=True)), sequence),
    Layer("lstm, both directions", lambda: recurrent(nn.LSTM(D, D, bidirectional=True, batch_first=True)), sequence),
]


def step(layer: Layer) -> Callable[[], Tensor]:
    """A training step inside a tap, built and warmed up."""
    torch.manual_seed(0)
    model, inputs = layer.build(), layer.inputs()

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with gg.tap(model) as tap:
                model(*inputs).square().mean().backward()
        norms: Tensor = tap.sqnorms()
        model.zero_grad()  # at the end: memory that is freed at the start, if the profiler misses it, would count as used
        return norms

    run()
    return run


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that were allocated at a time while ``run`` ran, on top of what was there."""
    most = 0
    for _ in range(2):  # the profiler may miss the first events of a run
        gc.disable()  # else cycles that hold memory go at any time
        try:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                kept = run()
        finally:
            gc.enable()
        held = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        del kept
    return most


def test_the_measurement_sees_a_peak() -> None:
    def run() -> Tensor:
        x = torch.zeros(1 << 16)
        y = x + 1
        del x
        return y.sum() + torch.zeros(1 << 14).sum()

    assert 2 * 4 * (1 << 16) <= peak(run) < 2.1 * 4 * (1 << 16)


@pytest.mark.parametrize("layer", CONVOLUTIONS + EMBEDDINGS + NORMALISATIONS + OTHERS, ids=lambda layer: layer.name)
def test_no_rule_costs_more_than_the_reference_path(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = step(layer)
    by_rules, norms = peak(run), run()
    monkeypatch.setattr(rules, "rule_for", lambda function: None)
    by_reference, exact = peak(run), run()
    torch.testing.assert_close(norms, exact, rtol=1e-4, atol=0)
    assert by_rules <= by_reference, f"{by_rules / 1024:.0f} KiB by rules, {by_reference / 1024:.0f} KiB by the reference path"


class Allocations(TorchDispatchMode):
    """The shapes of all tensors with memory of their own that operations return. On the CPU the backward runs in this thread, so it is watched as well."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_sparse}
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and not t.is_sparse and t.untyped_storage().data_ptr() not in before:
                self.shapes.append((str(func), t.shape))
        return out


def allocations(layer: Layer) -> list[tuple[str, torch.Size]]:
    run = step(layer)
    with Allocations() as seen:
        run()
    assert any("backward" in name or "ghostgrad" in name for name, _ in seen.shapes)  # the backward was watched as well
    return seen.shapes


@pytest.mark.parametrize("layer", CONVOLUTIONS + EMBEDDINGS + NORMALISATIONS, ids=lambda layer: layer.name)
def test_no_per_sample_gradients_of_a_layer(layer: Layer) -> None:
    """No tensor has the size of B copies of the weight; where the input is smaller than that, none is larger either."""
    copies = B * layer.build().weight.numel()
    padded = 8 * max(t.numel() for t in layer.inputs())
    found = [(name, tuple(shape)) for name, shape in allocations(layer) if (shape.numel() == copies and shape[0] == B) or shape.numel() > max(copies, padded)]
    assert not found, f"{found}: {copies} elements are B copies of the weight"
