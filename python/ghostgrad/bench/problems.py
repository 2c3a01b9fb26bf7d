"""The problems: models on a batch, each at a size where another part of the step decides what norms cost.

A problem is a function of its sizes, entered in ``PROBLEMS``; its first docstring line is its title, for the sizes that it has by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["COMPILED", "PROBLEMS", "SMALL", "Problem", "build", "title"]


@dataclass(frozen=True)
class Problem:
    """A model on a batch of B samples, and its loss."""

    model: nn.Module
    inputs: tuple[Tensor, ...]  # samples first
    target: Tensor  # samples first
    loss_fn: Callable[[Tensor, Tensor], Tensor]  # the mean over the samples of
    losses: Callable[[Tensor, Tensor], Tensor]  # (B,): every sample's own
    forward: Callable[..., Tensor] | None = None  # what the plain step calls, where that is not the model but the same function written in another way

    def compiled(self) -> Problem:
        """The same by ``torch.compile``, in one graph."""
        model: Any = torch.compile(self.model, fullgraph=True)
        return replace(self, model=model, forward=self.forward and torch.compile(self.forward, fullgraph=True))


def cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), target.flatten())  # out: (B, K) or (B, T, K), target: (B,) or (B, T)


def cross_entropies(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), target.flatten(), reduction="none").view(len(target), -1).mean(1)  # (B,)


def square_errors(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, target, reduction="none").flatten(1).mean(1)  # (B,)


def regression(model: nn.Module, *size: int) -> Problem:
    """Of a model whose outputs are shaped like its inputs (B, ...)."""
    return Problem(model, (torch.randn(size),), torch.randn(size), F.mse_loss, square_errors)


def classification(model: nn.Module, x: Tensor, classes: int, *size: int) -> Problem:
    """Of whole samples, ``size`` (B,), or of their positions, (B, T)."""
    return Problem(model, (x,), torch.randint(classes, size), cross_entropy, cross_entropies)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Models


class Block(nn.Module):
    """A transformer block with learned projections and GELU: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))  # each (B, heads, T, width / heads)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Embedding, causal blocks, normalisation, and a head whose weight is the embedding's: (B, T) -> (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int, heads: int, blocks: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return out


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, blocks, and a head on the class token: (B, 3, size, size) -> (B, classes)."""

    def __init__(self, size: int, patch: int, width: int, heads: int, blocks: int, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, T, width)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        out: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return out


class Recurrent(nn.Module):
    """An LSTM and a head on its last output: (B, T, width) -> (B, classes)."""

    def __init__(self, width: int, classes: int = 10):
        super().__init__()
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out

    def as_cells(self, x: Tensor) -> Tensor:
        """The same function of the same parameters: the input's projection at once, then one position after the other in Python."""
        w_x, w_h, b_x, b_h = self.lstm.all_weights[0]
        h = c = x.new_zeros(len(x), self.lstm.hidden_size)
        for x_t in F.linear(x, w_x, b_x).unbind(1):  # (B, 4 width)
            i, f, g, o = (x_t + F.linear(h, w_h, b_h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        out: Tensor = self.head(h)
        return out


# ---------------------------------------------------------------------------------------------------------------------------------------
# Problems


def tiny(batch: int = 100) -> Problem:
    """two layers 10-20-1, B = 100"""
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
    return Problem(model, (torch.randn(batch, 10),), torch.randn(batch, 1), F.mse_loss, square_errors)


def mlp(batch: int = 256, width: int = 1024) -> Problem:
    """MLP 1024-1024-1024-10, B = 256"""
    layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return classification(nn.Sequential(*layers), torch.randn(batch, width), 10, batch)


def cnn(batch: int = 64, size: int = 32) -> Problem:
    """six convolutions with group normalisation, 3 x 32 x 32, B = 64"""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.ReLU()]

    layers = [*stage(3, 16, 1), *stage(16, 16, 1), *stage(16, 32, 2), *stage(32, 32, 1), *stage(32, 64, 2), *stage(64, 64, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return classification(model, torch.randn(batch, 3, size, size), 10, batch)


def block(batch: int = 16, length: int = 256, width: int = 256) -> Problem:
    """transformer block, d = 256, T = 256, B = 16"""
    return regression(Block(width, 4), batch, length, width)


def wide(batch: int = 32, length: int = 32, width: int = 1024) -> Problem:
    """transformer block, wide and short: d = 1024, T = 32, B = 32"""
    return regression(Block(width, 4), batch, length, width)


def lm(batch: int = 4, length: int = 256, width: int = 256, vocabulary: int = 8192) -> Problem:
    """language model, one block, tied head, vocabulary 8192, d = 256, T = 256, B = 4"""
    return classification(LanguageModel(vocabulary, width, 4, 1), torch.randint(vocabulary, (batch, length)), vocabulary, batch, length)


def vit(batch: int = 16, size: int = 64, width: int = 192) -> Problem:
    """vision transformer, 4 blocks, d = 192, 3 x 64 x 64 in patches of 8 x 8, B = 16"""
    return classification(VisionTransformer(size, 8, width, 3, 4), torch.randn(batch, 3, size, size), 10, batch)


def lstm_fused(batch: int = 32, length: int = 64, width: int = 128) -> Problem:
    """LSTM, T = 64, width 128, B = 32, over the step with nn.LSTM"""
    return classification(Recurrent(width), torch.randn(batch, length, width), 10, batch)


def lstm(batch: int = 32, length: int = 64, width: int = 128) -> Problem:
    """LSTM, T = 64, width 128, B = 32, over the step written as cells"""
    problem = lstm_fused(batch, length, width)
    assert isinstance(problem.model, Recurrent)
    return replace(problem, forward=problem.model.as_cells)


PROBLEMS: dict[str, Callable[..., Problem]] = {f.__name__.replace("_", "-"): f for f in (tiny, mlp, cnn, block, wide, lm, vit, lstm, lstm_fused)}

SMALL: dict[str, dict[str, int]] = {  # sizes of the same problems that take milliseconds by any method
    "tiny": {"batch": 5},
    "mlp": {"batch": 5, "width": 24},
    "cnn": {"batch": 4, "size": 8},
    "block": {"batch": 4, "length": 7, "width": 16},
    "wide": {"batch": 5, "length": 3, "width": 32},
    "lm": {"batch": 3, "length": 9, "width": 16, "vocabulary": 13},
    "vit": {"batch": 3, "size": 24, "width": 12},
    "lstm": {"batch": 4, "length": 6, "width": 10},
    "lstm-fused": {"batch": 4, "length": 6, "width": 10},
}
COMPILED = [name for name in PROBLEMS if not name.startswith("lstm")]  # torch.compile refuses nn.LSTM


def build(name: str, **sizes: int) -> Problem:
    """A problem, the same at every call; the generator of random numbers is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PROBLEMS[name](**sizes)


def title(name: str) -> str:
    return (PROBLEMS[name].__doc__ or name).splitlines()[0]
