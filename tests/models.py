"""Small models that use their parameters in one particular way each; the cases of the tests. All are deterministic and written as users write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

B, T, D = 4, 3, 6  # batch, positions, features; cases with coinciding sizes are below


class Lambda(nn.Module):
    """A module from named parameters (by shape) and a forward function ``f(module, x)``."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]):
        super().__init__()
        self.f = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1] if shape else 1)))

    def forward(self, *x: Tensor) -> Tensor:
        return self.f(self, *x)


class Attention(nn.Module):
    """Self-attention of plain linear layers, with one packed projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens, learned positions, two blocks, the head tied to the embedding or not."""

    def __init__(self, vocabulary: int = 11, width: int = 8, length: int = 5, tied: bool = False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks, self.norm, self.head = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:  # (B, T)
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1]))
        return self.head(self.norm(self.blocks(x))).mean(1)  # (B, V)


class Recurrent(nn.Module):
    """An RNN cell written by hand: time-major or batch-major."""

    def __init__(self, time_major: bool = False, factory: bool = False):
        super().__init__()
        self.factory, self.time_major = factory, time_major
        self.inner, self.outer = nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        h = torch.zeros(x.shape[0], D, dtype=x.dtype) if self.factory else x.new_zeros(x.shape[0], D)
        steps = x.transpose(0, 1) if self.time_major else x.unbind(1)
        hidden = []
        for step in steps:
            h = torch.tanh(self.inner(step) + self.outer(h))
            hidden.append(h)
        return torch.stack(hidden).mean(0)


def _mha_time_major(m: Lambda, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    y = F.multi_head_attention_forward(x, x, x, D, 2, m.w, m.c, None, None, False, 0.0, m.o, m.e, need_weights=False)[0]
    return y.transpose(0, 1)


def _stacked(m: Lambda, x: Tensor) -> Tensor:
    steps = torch.stack([torch.tanh(step * m.s) for step in x.unbind(1)])  # (T, B, D)
    return torch.tanh(F.linear(steps, m.w)).mean(0)


def _frames(m: Lambda, x: Tensor) -> Tensor:  # (B, T, 3, H, W)
    return F.conv2d(x.flatten(0, 1), m.w, m.c).view(*x.shape[:2], -1).tanh()


def _shared_conv() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.Tanh(), conv)


def _assigned(m: Lambda, x: Tensor) -> Tensor:
    y = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    y[:, 0] = m.t
    return torch.tanh(y @ m.w)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    warns: bool = False  # takes the reference path


def flat(b: int = B, d: int = D) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(b, d),)


def sequence(b: int = B, t: int = T, d: int = D) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(b, t, d),)


def image(b: int = B) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(b, 3, 6, 5),)


def channels_last() -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(B, 3, 6, 5).contiguous(memory_format=torch.channels_last),)


def tokens(b: int = B, t: int = 5) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(11, (b, t)),)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 5)), nn.Tanh(), nn.Linear(5, 2))


def _orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, 2))


def _shared() -> nn.Module:
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)


def _time_major(m: Lambda, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)  # (T, B, D)
    return torch.tanh(F.linear(x, m.w, m.c)).mean(0)


def _time_major_flat(m: Lambda, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    y = F.linear(x.reshape(-1, x.shape[-1]), m.w, m.c)  # (T * B, E): position-major rows
    return torch.tanh(y.view(x.shape[0], x.shape[1], -1)).sum(0)


def _windows(m: Lambda, x: Tensor) -> Tensor:  # (B, 4, 4, D)
    b, d = x.shape[0], x.shape[-1]
    windows = x.view(b, 2, 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, d)  # (B * 4, 4, D)
    y = F.linear(windows, m.w)
    return torch.tanh(y).view(b, 2, 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, -1).mean((1, 2))


def _heads(m: Lambda, x: Tensor) -> Tensor:
    """Attention as fused implementations write it: time-major, heads folded into the batch."""
    t, b, d = x.shape[1], x.shape[0], x.shape[2]
    x = x.transpose(0, 1)
    q, k, v = F.linear(x, m.w, m.c).chunk(3, -1)
    q, k, v = (s.reshape(t, b * 2, d // 2).transpose(0, 1) for s in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
    return F.linear(out.transpose(0, 1).reshape(t * b, d), m.o).view(t, b, d).transpose(0, 1).mean(1)


def _in_place(m: Lambda, x: Tensor) -> Tensor:
    y = x * 1.0
    y += m.c
    y.mul_(m.s)
    return torch.tanh(y) @ m.w


CASES = [
    Case("mlp", _mlp, flat()),
    Case("mlp on sequences", _mlp, sequence()),
    Case("linear 4-d", lambda: nn.Linear(D, 5), lambda: (torch.randn(B, 2, T, D),)),
    Case("linear without bias", lambda: nn.Linear(D, 5, bias=False), sequence()),
    Case("x @ W", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w), w=(D, 5)), flat()),
    Case("x @ W.T", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w.T), w=(5, D)), sequence()),
    Case("W @ x", lambda: Lambda(lambda m, x: torch.tanh(m.w @ x), w=(5, T)), sequence()),
    Case("(W @ x.T).T", lambda: Lambda(lambda m, x: torch.tanh(m.w @ x.T).T, w=(5, D)), flat()),
    Case("matmul with a vector", lambda: Lambda(lambda m, x: torch.matmul(x, m.v), v=(D,)), sequence()),
    Case("mm", lambda: Lambda(lambda m, x: torch.mm(x, m.w), w=(D, 5)), flat()),
    Case("addmm", lambda: Lambda(lambda m, x: torch.addmm(m.c, x, m.w), w=(D, 5), c=(5,)), flat()),
    Case("addmm beta alpha", lambda: Lambda(lambda m, x: torch.addmm(m.c, x, m.w, beta=0.5, alpha=2.0), w=(D, 5), c=(1, 5)), flat()),
    Case("bmm with an expanded matrix", lambda: Lambda(lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)), w=(D, 5)), sequence()),
    Case("matmul with a stack of matrices", lambda: Lambda(lambda m, x: torch.tanh(x.unsqueeze(1) @ m.w).sum(1), w=(2, D, 5)), sequence(), True),
    Case("einsum", lambda: Lambda(lambda m, x: torch.einsum("btp,pd->btd", x, m.w), w=(D, 5)), sequence()),
    Case("einsum, parameter first, transposed", lambda: Lambda(lambda m, x: torch.einsum("dp,btp->dbt", m.w, x).transpose(0, 1), w=(5, D)), sequence()),
    Case("einsum over heads", lambda: Lambda(lambda m, x: torch.einsum("bthp,hpd->bthd", x.unflatten(-1, (2, -1)), m.w).tanh(), w=(2, D // 2, 4)), sequence()),
    Case(
        "einsum, output projection",
        lambda: Lambda(lambda m, x: torch.einsum("bthp,ohp->bto", x.unflatten(-1, (2, -1)), m.w).tanh(), w=(4, 2, D // 2)),
        sequence(),
    ),
    Case("einsum, used twice", lambda: Lambda(lambda m, x: torch.einsum("btp,pq->btq", torch.einsum("btp,pq->btq", x, m.w).tanh(), m.w), w=(D, D)), sequence()),
    Case("einsum, implicit", lambda: Lambda(lambda m, x: torch.einsum("btp,p", x, m.v), v=(D,)), sequence(), True),
    Case("bilinear", lambda: Lambda(lambda m, x: F.bilinear(x, x, m.w, m.c), w=(5, D, D), c=(5,)), flat()),
    Case("scale and shift", lambda: Lambda(lambda m, x: torch.tanh(x * m.s + m.c), s=(D,), c=(D,)), sequence()),
    Case("scalar parameter", lambda: Lambda(lambda m, x: torch.tanh(m.s * x) / (1 + m.c**2), s=(), c=()), sequence(), True),
    Case("positions and channels", lambda: Lambda(lambda m, x: torch.tanh(x - m.p) * m.s, p=(T, 1), s=(T, D)), sequence()),
    Case("1 - p, p / x, x ** p", lambda: Lambda(lambda m, x: (1 - m.s) * x.abs() ** m.e.abs() + m.s / (2 + x.abs()), s=(D,), e=(D,)), sequence(), True),
    Case("where, lerp, maximum", lambda: Lambda(lambda m, x: torch.where(x > 0, m.s, x).lerp(m.c, 0.3).maximum(m.c), s=(D,), c=(D,)), sequence()),
    Case("in place", lambda: Lambda(_in_place, c=(D,), s=(D,), w=(D, 2)), flat()),
    Case("parameter with a leading one", lambda: Lambda(lambda m, x: torch.tanh(x + m.p), p=(1, T, D)), sequence()),
    Case(
        "class token",
        lambda: Lambda(lambda m, x: torch.tanh(torch.cat([m.t.expand(x.shape[0], -1, -1), x], 1)) @ m.w, t=(1, 1, D), w=(D, 2)),
        sequence(),
    ),
    Case("class token by repeat", lambda: Lambda(lambda m, x: torch.tanh(torch.cat([m.t.repeat(x.shape[0], 1, 1), x], 1)), t=(1, 1, D)), sequence()),
    Case("class token by assignment", lambda: Lambda(_assigned, t=(D,), w=(D, 2)), sequence()),
    Case("compared with data", lambda: Lambda(lambda m, x: torch.where(x > m.s, x, m.s) * m.s, s=(D,)), sequence()),
    Case("positional slice", lambda: Lambda(lambda m, x: torch.tanh(x + m.p[: x.shape[1]]), p=(T + 2, D)), sequence()),
    Case(
        "positional embedding",
        lambda: Lambda(lambda m, x: torch.tanh(x + F.embedding(torch.arange(x.shape[1]), m.p)), p=(T + 2, D)),
        sequence(),
        True,
    ),
    Case("embedding", lambda: nn.Sequential(nn.Embedding(11, D), nn.Linear(D, 2)), tokens()),
    Case("layer norm", lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2)), sequence()),
    Case("layer norm 2-d", lambda: nn.LayerNorm((T, D)), sequence()),
    Case("layer norm without bias", lambda: nn.LayerNorm(D, bias=False), sequence()),
    Case("rms norm", lambda: nn.RMSNorm(D), sequence()),
    Case("group norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), image()),
    Case("instance norm", lambda: nn.InstanceNorm2d(3, affine=True), image()),
    Case("batch norm eval", lambda: nn.BatchNorm2d(3).eval(), image()),
    Case("conv", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)), image()),
    Case("conv groups", lambda: nn.Conv2d(3, 6, 2, stride=2, groups=3), image()),
    Case("prelu", lambda: nn.Sequential(nn.Linear(D, 5), nn.PReLU(5)), flat()),
    Case("conv 1-d, stride and dilation", lambda: nn.Conv1d(D, 4, 2, stride=2, padding=2, dilation=2), lambda: (torch.randn(B, D, 9),)),
    Case("conv 1-d, same", lambda: nn.Conv1d(D, 4, 4, padding="same"), lambda: (torch.randn(B, D, 9),)),
    Case("conv 2-d, same", lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), image()),
    Case("conv 2-d, valid", lambda: nn.Conv2d(3, 4, 2, padding="valid", bias=False), image()),
    Case("conv 2-d, stride leaves a rest", lambda: nn.Conv2d(3, 4, 2, stride=(3, 2), padding=(1, 0)), image()),
    Case("conv 2-d, reflect", lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), image()),
    Case("conv 2-d, replicate", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), image()),
    Case("conv 2-d, depthwise", lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), image()),
    Case("conv 2-d, channels last", lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), channels_last()),
    Case("conv 3-d", lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1), lambda: (torch.randn(B, 2, 4, 5, 3),)),
    Case("transposed conv 1-d", lambda: nn.ConvTranspose1d(D, 4, 3, stride=2, padding=1, output_padding=1, dilation=2), lambda: (torch.randn(B, D, 5),)),
    Case("transposed conv 2-d", lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), image()),
    Case("transposed conv 2-d, groups", lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, groups=2), lambda: (torch.randn(B, 4, 4, 3),)),
    Case("transposed conv 3-d", lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), lambda: (torch.randn(B, 2, 3, 2, 3),)),
    Case("conv used twice", _shared_conv, image()),
    Case("conv on frames", lambda: Lambda(_frames, w=(2, 3, 2, 2), c=(2,)), lambda: (torch.randn(B, T, 3, 4, 4),)),
    Case("in-place relu after conv", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2)), image()),
    Case("embedding with padding", lambda: nn.Sequential(nn.Embedding(11, D, padding_idx=3), nn.Linear(D, 2)), tokens(B, 20)),
    Case("embedding, one index", lambda: nn.Sequential(nn.Embedding(11, D), nn.Linear(D, 2)), lambda: (torch.randint(11, (B,)),)),
    Case("embedding with max_norm", lambda: nn.Embedding(11, D, max_norm=1.0), tokens()),
    Case("embedding bag, sum", lambda: nn.EmbeddingBag(11, D, mode="sum"), tokens()),
    Case("embedding bag, mean, padding", lambda: nn.EmbeddingBag(11, D, mode="mean", padding_idx=2), tokens(B, 8)),
    Case("embedding bag, max", lambda: nn.Sequential(nn.EmbeddingBag(11, D, mode="max"), nn.Linear(D, 2)), tokens()),
    Case(
        "embedding bag, weights",
        lambda: Lambda(lambda m, x: F.embedding_bag(x, m.w, mode="sum", per_sample_weights=x.sin().to(m.w.dtype)), w=(11, D)),
        tokens(),
    ),
    Case("embedding used twice", lambda: Lambda(lambda m, x: torch.tanh(F.embedding(x, m.w)) * F.embedding(x.flip(1), m.w), w=(11, D)), tokens()),
    Case("attention function, time-major", lambda: Lambda(_mha_time_major, w=(3 * D, D), c=(3 * D,), o=(D, D), e=(D,)), sequence()),
    Case("encoder layer", lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), sequence()),
    Case("encoder layer, norm first", lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True), sequence()),
    Case("decoder layer", lambda: nn.TransformerDecoderLayer(D, 2, 8, 0.0, batch_first=True), lambda: (torch.randn(B, T, D), torch.randn(B, T + 1, D))),
    Case("attention, separate projections", lambda: _Mha(kdim=4, vdim=5), lambda: (torch.randn(B, T, D), torch.randn(B, 4, 4), torch.randn(B, 4, 5))),
    Case("attention, bias_k and bias_v", lambda: _Mha(add_bias_kv=True, add_zero_attn=True), sequence()),
    Case("attention, masks and weights", lambda: _MaskedMha(), sequence()),
    Case("attention", lambda: Attention(D, 2), sequence()),
    Case("transformer", Transformer, tokens(), True),
    Case("transformer, tied", lambda: Transformer(tied=True), tokens(), True),
    Case("multi-head attention module", lambda: _Mha(), sequence()),
    Case("rnn", lambda: _Rnn(nn.RNN(D, 5, batch_first=True)), sequence()),
    Case("rnn, relu, time-major", lambda: _Rnn(nn.RNN(D, 5, nonlinearity="relu")), sequence()),
    Case("lstm", lambda: _Rnn(nn.LSTM(D, 5, batch_first=True)), sequence()),
    Case("lstm, two layers, both directions, time-major", lambda: _Rnn(nn.LSTM(D, 5, 2, bidirectional=True)), sequence()),
    Case("lstm, projected, without bias", lambda: _Rnn(nn.LSTM(D, 5, 2, bias=False, proj_size=3, batch_first=True)), sequence()),
    Case("gru", lambda: _Rnn(nn.GRU(D, 5, 2, batch_first=True)), sequence()),
    Case("gru, both directions", lambda: _Rnn(nn.GRU(D, 5, bidirectional=True)), sequence()),
    Case("rnn with a given state", lambda: _Rnn(nn.GRU(D, D, batch_first=True), given=True), sequence()),
    Case("lstm cell", lambda: _Cell(nn.LSTMCell(D, D)), sequence()),
    Case("gru cell", lambda: _Cell(nn.GRUCell(D, D)), sequence()),
    Case("rnn cell", lambda: _Cell(nn.RNNCell(D, D, bias=False)), sequence()),
    Case("recurrent", Recurrent, sequence()),
    Case("recurrent, state by a factory", lambda: Recurrent(factory=True), sequence(), True),  # a constant, for all the tap knows
    Case("recurrent, time-major", lambda: Recurrent(True), sequence()),
    Case("module used three times", _shared, flat()),
    Case("module used three times on sequences", _shared, sequence()),
    Case("weight and its transpose", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, w=(D, D)), flat()),
    Case("autoencoder, tied", lambda: Lambda(lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t(), m.c), w=(4, D), c=(D,)), sequence()),
    Case("bias used twice", lambda: Lambda(lambda m, x: torch.tanh(F.linear(x, m.w, m.c)) * m.c, w=(D, D), c=(D,)), sequence()),
    Case("weight used elementwise too", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w) + (x.unsqueeze(-1) * m.w).sum(-1), w=(D, D)), flat(), True),
    Case("packed projections", lambda: Lambda(lambda m, x: sum(torch.tanh(x @ w.T) for w in m.w.chunk(3)), w=(3 * D, D)), sequence()),
    Case("overlapping slices", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w[:, :4]) + torch.tanh(x @ m.w[:, 2:6]), w=(D, 6)), sequence(), True),
    Case("disjoint columns", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w[:, :3]) + torch.tanh(x @ m.w[:, 3:]), w=(D, 6)), sequence()),
    Case("slice used twice", lambda: Lambda(lambda m, x: torch.tanh(torch.tanh(x @ m.w[:D]) @ m.w[:D]), w=(D + 2, D)), sequence()),
    Case("reshaped parameter", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w.view(D, 5)), w=(D * 5,)), sequence()),
    Case("weight norm", _weight_norm, flat(), True),
    Case("orthogonal", _orthogonal, flat(), True),
    Case("product of parameters", lambda: Lambda(lambda m, x: torch.tanh(F.linear(x, m.u @ m.v)), u=(5, 2), v=(2, D)), sequence(), True),
    Case("lora", lambda: Lambda(lambda m, x: F.linear(x, m.w) + (x @ m.u.T) @ m.v.T, w=(5, D), u=(2, D), v=(5, 2)), sequence()),
    Case("masked weight", lambda: _Masked(), flat(), True),
    Case("parameter of parameters twice", lambda: Lambda(lambda m, x: torch.tanh(x * m.s.exp()) * m.s.exp().sum(), s=(D,)), sequence(), True),
    Case("cast parameter", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w.double().to(x.dtype)), w=(D, 5)), flat()),
    Case("stacked steps", lambda: Lambda(_stacked, s=(D,), w=(5, D)), sequence()),
    Case("stacked steps, equal sizes", lambda: Lambda(_stacked, s=(4,), w=(4, 4)), sequence(4, 4, 4)),
    Case("reshaped whole and a slice", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w.view(D, 5)) + x[:, :5] * m.w[:5], w=(D * 5,)), flat(), True),
    Case("time-major", lambda: Lambda(_time_major, w=(5, D), c=(5,)), sequence()),
    Case("time-major, flattened", lambda: Lambda(_time_major_flat, w=(5, D), c=(5,)), sequence()),
    Case(
        "flattened tokens",
        lambda: Lambda(lambda m, x: F.linear(x.flatten(0, 1), m.w, m.c).tanh().view(*x.shape[:2], -1), w=(5, D), c=(5,)),
        sequence(),
    ),
    Case("windows", lambda: Lambda(_windows, w=(5, D)), lambda: (torch.randn(B, 4, 4, D),)),
    Case("heads folded into the batch", lambda: Lambda(_heads, w=(3 * D, D), c=(3 * D,), o=(D, D)), sequence()),
    Case("two inputs", lambda: Lambda(lambda m, x, z: torch.tanh(x @ m.w) * z.mean(1), w=(D, D)), lambda: (torch.randn(B, D), torch.randn(B, T, D))),
    # Sizes that coincide: batch = positions = features
    Case("all sizes equal", lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), sequence(4, 4, 4)),
    Case("equal sizes, positions", lambda: Lambda(lambda m, x: torch.tanh(x + m.p) * m.s, p=(4, 4), s=(4,)), sequence(4, 4, 4)),
    Case("equal sizes, time-major", lambda: Lambda(_time_major, w=(4, 4), c=(4,)), sequence(4, 4, 4)),
    Case("equal sizes, time-major flat", lambda: Lambda(_time_major_flat, w=(4, 4), c=(4,)), sequence(4, 4, 4)),
    Case("equal sizes, W @ x", lambda: Lambda(lambda m, x: torch.tanh(m.w @ x), w=(4, 4)), sequence(4, 4, 4)),
    Case("equal sizes, W @ x.T", lambda: Lambda(lambda m, x: torch.tanh(m.w @ x.T).T, w=(4, 4)), flat(4, 4)),
    Case("equal sizes, masked", lambda: _Masked(4), flat(4, 4), True),
    Case("equal sizes, heads", lambda: Lambda(_heads, w=(12, 4), c=(12,), o=(4, 4)), sequence(4, 4, 4)),
    Case("one sample", _mlp, flat(1)),
    Case("one sample, sequence", Recurrent, sequence(1)),
    Case("one sample, conv", lambda: nn.Conv2d(3, 4, 3), image(1)),
    Case("one position", _mlp, sequence(B, 1)),
]


class _Mha(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(D, 2, batch_first=True, **options)

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        out: Tensor = self.a(x, x if k is None else k, x if v is None else v, need_weights=False)[0]
        return out


class _Rnn(nn.Module):
    """All outputs and final states of a recurrent layer."""

    def __init__(self, rnn: nn.RNNBase, given: bool = False):
        super().__init__()
        self.rnn, self.given = rnn, given

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        out, state = self.rnn(x, x[:, :1].transpose(0, 1).contiguous()) if self.given else self.rnn(x)
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


class _Cell(nn.Module):
    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(state, -1) if isinstance(state, tuple) else state


class _MaskedMha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.arange(x.shape[1])
        causal = length[None, :] > length[:, None]
        padding = x[:, :, 0] > 1.5
        padding[:, 0] = False
        out, weights = self.a(x, x, x, attn_mask=causal, key_padding_mask=padding)
        return torch.cat([out, weights], -1)


class _Masked(nn.Module):
    """A weight times a mask that is no buffer."""

    def __init__(self, size: int = D):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.mask = torch.tril(torch.ones(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight * self.mask.to(x.dtype)))
