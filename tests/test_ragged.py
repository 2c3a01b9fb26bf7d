"""Rows that an index picks: any number for each sample, in any order, exactly; and refused where they reach another sample's rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import rnn

import ghostgrad as gg
from ghostgrad.contributions import Outer, Segments
from ghostgrad.layout import Layout, Ragged, placed, to_samples
from helpers import loss_fn
from models import B, D, Experts, Lambda, Packed, T
from test_tap import assert_exact

F64 = torch.float64


class Picked(nn.Module):
    """A network on the rows ``x[index]``, whose results go back to their samples."""

    def __init__(self, network: nn.Module, index: Tensor):
        super().__init__()
        self.network, self.index = network, index

    def forward(self, x: Tensor) -> Tensor:
        rows = self.network(x[self.index])
        return rows.new_zeros(len(x), *rows.shape[1:]).index_add(0, self.index, rows)


class Einsum(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(width, 4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...tp,pd->...td", x, self.w) if x.dim() > 3 else torch.einsum("ntd,de->nte", torch.einsum("ntp,pd->ntd", x, self.w).tanh(), self.u)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "norms": lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4), nn.RMSNorm(4), nn.PReLU(), nn.Linear(4, 2)),
    "channels": lambda: nn.Sequential(nn.GroupNorm(1, T), nn.Conv1d(T, 4, 2, padding=1), nn.BatchNorm1d(4).eval(), nn.Tanh()),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 5, 0.0, batch_first=True),
    "einsum": lambda: Einsum(D),
    "used twice": lambda: Lambda(lambda m, x: torch.tanh(torch.tanh(x @ m.w + m.c) @ m.w.T) * m.s, w=(D, 5), c=(5,), s=(T, 1)),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 5), data=st.data(), seed=st.integers(0, 99))
@example(b=3, data=None, seed=0)
def test_any_rows_in_any_order(network: Callable[[], nn.Module], b: int, data: st.DataObject | None, seed: int) -> None:
    """Samples without rows, rows that come twice, interleaved rows, and (the example) no rows at all; permuting the rows changes nothing."""
    index = torch.tensor([] if data is None else data.draw(st.lists(st.integers(0, b - 1), max_size=12)), dtype=torch.long)
    torch.manual_seed(seed)
    model, x, target = Picked(network().double(), index), torch.randn(b, T, D, dtype=F64), torch.randn(b, dtype=F64)
    norms = gg.sqnorms(model, loss_fn, x, target, by_param=True)
    exact: dict[str, list[float]] = {name: [] for name in norms}
    for i in range(b):
        model.index = torch.zeros(int((index == i).sum()), dtype=torch.long)
        grads = torch.autograd.grad(loss_fn(model(x[i : i + 1]), target[i : i + 1]), list(model.parameters()), allow_unused=True)
        for name, g in zip(exact, grads):
            exact[name].append(0.0 if g is None else g.square().sum().item())
    for name, norm in norms.items():
        torch.testing.assert_close(norm, torch.tensor(exact[name], dtype=F64), rtol=1e-9, atol=1e-20)
    model.index = index[torch.randperm(len(index))]
    torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, target), torch.stack(list(norms.values())).sum(0), rtol=1e-9, atol=1e-20)


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 5),
    t=st.integers(1, 6),
    kind=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
    layers=st.integers(1, 2),
    both=st.booleans(),
    batch_first=st.booleans(),
    as_list=st.booleans(),
    sort=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_sequences_of_any_lengths(
    b: int, t: int, kind: type[nn.RNNBase], layers: int, both: bool, batch_first: bool, as_list: bool, sort: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = kind(3, 4, layers, batch_first=batch_first and not as_list, bidirectional=both)
    assert_exact(Packed(layer, as_list=as_list, sort=sort), torch.randn(b, t, 3, dtype=F64))


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 5), t=st.integers(1, 5), experts=st.integers(2, 6), seed=st.integers(0, 99))
def test_mixture_of_experts_of_any_size(b: int, t: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_exact(Experts(experts), torch.randn(b, t, D, dtype=F64))


def test_dropout_between_packed_layers_is_that_of_the_run() -> None:
    """Sequences that are equal but for dropout: their norms differ, and a repetition with the same seed gives the same."""
    model, x = Packed(nn.GRU(D, 5, 2, dropout=0.5)).double(), torch.randn(1, 6, D, dtype=F64).expand(B, -1, -1)
    norms = []
    for _ in range(2):
        torch.manual_seed(0)
        norms.append(gg.sqnorms(model, loss_fn, x, torch.ones(B, dtype=F64)))
    assert norms[0].equal(norms[1]) and len(norms[0].unique()) == B


def test_rows_belong_to_the_sample_that_they_come_from() -> None:
    """A model that permutes its samples: the norm of row r is that of the sample that lies there."""
    torch.manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])
    pick = [
        lambda x: x[order],
        lambda x: torch.cat([x[2:3], x[:1], x[3:], x[1:2]]),
        lambda x: x.index_select(0, order),
        lambda x: torch.stack([x[i] for i in order]),
    ]
    x, target = torch.randn(B, D, dtype=F64), torch.randn(B, dtype=F64)
    plain = Lambda(lambda m, x: torch.tanh(torch.tanh(x @ m.w) @ m.v), w=(D, D), v=(D, D)).double()
    exact = gg.sqnorms(plain, loss_fn, x, target)
    for permuted in pick:
        plain.f = lambda m, x, permuted=permuted: torch.tanh(permuted(torch.tanh(x @ m.w)) @ m.v)
        torch.testing.assert_close(gg.sqnorms(plain, loss_fn, x, target[order]), exact, rtol=1e-12, atol=0)


def test_frozen_recurrent_networks_are_followed() -> None:
    torch.manual_seed(0)
    for packed in (Packed(nn.LSTM(D, D, 2, bidirectional=True)), Packed(nn.GRU(D, D, batch_first=True), sort=True)):
        packed.rnn.requires_grad_(False)
        assert_exact(packed, torch.randn(4, 4, D, dtype=F64))  # as many layers and directions, steps and samples
    for frozen in (nn.LSTM(D, D, 2, batch_first=True, bidirectional=True), nn.LSTM(D, D, 4)):
        frozen.requires_grad_(False)
        model = Lambda(lambda m, x: torch.tanh(m.rnn(x if m.rnn.batch_first else x.transpose(0, 1))[1][0] @ m.w).mean(0), w=(D, 2))
        model.rnn = frozen
        assert_exact(model, torch.randn(4, 4, D, dtype=F64))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Refusals

ORDER = torch.tensor([1, 0, 3, 2])


def _written(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    y = x.clone()
    write(y)
    return y


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "mixup": lambda x: x + x[ORDER],
    "compared with another sample": lambda x: (x - x.index_select(0, ORDER)).abs(),
    "multiplied with another sample": lambda x: torch.einsum("bi,bi->bi", x, x[ORDER]),
    "rows by a product": lambda x: x[ORDER] @ x.T,
    "sum of picked rows": lambda x: x - x[:2].sum(0),
    "softmax over picked rows": lambda x: x[ORDER].softmax(0),
    "cumulative sum of picked rows": lambda x: x[ORDER].cumsum(0),
    "another index for each column": lambda x: x.gather(0, torch.stack([ORDER, ORDER, torch.arange(B), ORDER], 1)),
    "halves swapped within rows": lambda x: torch.cat([x[:, :2], x[ORDER][:, 2:]], 1),
    "added to other samples": lambda x: torch.zeros_like(x).index_add_(0, ORDER, x),
    "added to other samples of a constant": lambda x: torch.zeros(B, B).index_add(0, ORDER, x),
    "copied to other samples": lambda x: x.index_copy(0, ORDER, x),
    "assigned to other samples": lambda x: _written(x, lambda y: y.__setitem__(ORDER, x)),
    "one row assigned to another": lambda x: _written(x, lambda y: y.__setitem__(0, x[1])),
    "put to other samples": lambda x: x.index_put((ORDER,), x),
    "scattered to other samples": lambda x: torch.zeros_like(x).scatter(0, ORDER[:, None].expand_as(x), x),
    "scattered and added to other samples": lambda x: torch.zeros(B, B).scatter_add_(0, ORDER[:, None].expand_as(x), x),
    "masked scatter": lambda x: x.masked_scatter(torch.tensor([[True], [False], [True], [False]]), x),
    "copied through a view": lambda x: _written(x, lambda y: y[0].copy_(x[1])),
    "added through a view": lambda x: _written(x, lambda y: y[0].add_(x[1])),
    "rows of nobody": lambda x: torch.cat([x, torch.zeros(1, B)])[1:],
    "rows of a constant that were not written": lambda x: torch.zeros(B + 2, B).index_add(0, torch.arange(B), x)[2:],
    "stacked differently": lambda x: torch.stack([x, x[ORDER]]).sum(0),
    "joined differently": lambda x: torch.cat([x, x[ORDER]], 1)[:, :B],
    "samples flipped into rows": lambda x: x[ORDER].T,
    "distances between samples": lambda x: torch.cdist(x, x),
    "inner products of samples": lambda x: torch.inner(x, x),
    "outer product": lambda x: torch.outer(x[:, 0], x[:, 1]),
    "shifted by padding": lambda x: F.pad(x, (0, 0, 1, -1)),
    "shifted by a scatter": lambda x: x.slice_scatter(x[1:], 0, 0, B - 1),
    "reduced into other samples": lambda x: x.index_reduce(0, ORDER, x, "mean"),
    "a column along a constant": lambda x: x[:, 0] + torch.ones(B, B),
    "a column expanded": lambda x: x[:, 0].expand(B, B),
    "sorted by value": lambda x: x[ORDER].sort(0).values,
}


@pytest.mark.parametrize("mix", REFUSED.values(), ids=REFUSED.keys())
def test_rows_that_reach_another_sample_are_refused(mix: Callable[[Tensor], Tensor]) -> None:
    model = Lambda(lambda m, x: mix(x @ m.w) @ m.v, w=(B, B), v=(B, B))
    with pytest.raises(gg.GhostgradError, match="'v'"):
        gg.sqnorms(model, loss_fn, torch.randn(B, B), torch.randn(B))


def _distances(m: Lambda, x: Tensor) -> Tensor:
    return torch.cdist(x[[0, 0, 1]].unflatten(1, (2, -1)), m.w[None, :, :3].expand(3, -1, -1))


def _packed_by_hand(m: Lambda, x: Tensor) -> Tensor:
    return m.rnn(rnn.PackedSequence(x[:3], torch.tensor([2, 1])))[0].data  # the second step of sequence 0 is sample 2


UNSUPPORTED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "the reference path": (_distances, r"picked by an index.*pad and mask"),
    "a parameter with as many rows": (lambda m, x: x[[0, 0, 1]] * m.w[:3], "same index"),
    "steps of several samples": (_packed_by_hand, "steps of a packed sequence"),
    "states of other samples": (lambda m, x: m.rnn(x[None], x[ORDER][None])[0][0], "initial states"),
}


@pytest.mark.parametrize(("forward", "match"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
@pytest.mark.filterwarnings("ignore:ghostgrad")
def test_unsupported_uses_of_picked_rows_say_so(forward: Callable[..., Tensor], match: str) -> None:
    model = Lambda(forward, w=(D, D))
    model.rnn = nn.GRU(D, D)
    with pytest.raises(gg.UnsupportedUseError, match=match):
        gg.sqnorms(model, loss_fn, torch.randn(B, D), torch.randn(B))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Declared rows


def test_declared_rows() -> None:
    w, c = torch.randn(D, 5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64, requires_grad=True)
    rows, index = torch.randn(7, D, dtype=F64), torch.tensor([2, 0, 0, 3, 2, 2, 0])  # sample 1 has none
    with gg.tap([w, c], batch_size=B, reduction="sum") as tap:
        F.linear(gg.declare_samples(rows, index=index), w.T, c).sin().sum().backward()
    exact = []
    for i in range(B):
        grads = torch.autograd.grad(F.linear(rows[index == i], w.T, c).sin().sum(), (w, c))
        exact.append(sum(g.square().sum() for g in grads))
    torch.testing.assert_close(tap.sqnorms(), torch.stack(exact), rtol=1e-11, atol=0)
    assert gg.declare_samples(rows, index=index) is rows
    for wrong in (index[:-1], index - 1, index + 1, index.double(), index > 0):
        with gg.tap([w], batch_size=B), pytest.raises(ValueError, match="index must be the sample"):
            gg.declare_samples(rows, index=wrong)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The parts


@given(outer=st.integers(1, 3), b=st.integers(1, 4), inner=st.integers(1, 3), dim=st.integers(0, 2))
def test_regular_rows_are_recognised(outer: int, b: int, inner: int, dim: int) -> None:
    layout = Layout(dim, outer, inner)
    samples = layout.rows(torch.empty([outer * b * inner if d == dim else 2 for d in range(3)]), b)
    assert placed(dim, samples, b).rows(torch.empty([len(samples)] * 3), b).equal(samples)
    assert isinstance(placed(dim, samples, b), Layout)
    if b > 1:
        assert placed(dim, samples.flip(0), b) == Ragged(dim, samples.flip(0))
        assert Ragged(dim, samples) != Ragged(dim, samples.flip(0)) and Ragged(dim, samples) != layout and Ragged(dim, samples) != Ragged(dim + 1, samples)


@settings(deadline=None)
@given(b=st.integers(1, 4), n=st.integers(0, 20), groups=st.integers(0, 3), skewed=st.booleans(), seed=st.integers(0, 99))
def test_segments_equal_the_outer_products(b: int, n: int, groups: int, skewed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    samples = torch.randint(b, (n,)) * (torch.rand(n) < (0.1 if skewed else 1.0))
    x, g = torch.randn(n, 3, dtype=F64), torch.randn(n, 2, dtype=F64)
    group = torch.randint(groups, (n,)) if groups else None
    segments = Segments(x, g, samples, b, group, max(groups, 1))
    exact = torch.zeros(b, max(groups, 1), 2, 3, dtype=F64)
    for r in range(n):
        exact[samples[r], 0 if group is None else group[r]] += g[r, :, None] * x[r]
    torch.testing.assert_close(segments.materialise(), exact if groups else exact[:, 0])
    torch.testing.assert_close(segments.total(), exact.sum(0) if groups else exact[:, 0].sum(0))
    torch.testing.assert_close(segments.sqnorm(), exact.square().sum((1, 2, 3)))
    torch.testing.assert_close(segments.join([segments]).sqnorm(), 4 * exact.square().sum((1, 2, 3)))
    assert sum(outer.a.shape[0] * outer.a.shape[1] for _, outer in segments._padded()) <= 2 * n  # the zeros that are filled in
    if not groups:
        outer = Outer(to_samples(x, Ragged(0, samples), b), to_samples(g, Ragged(0, samples), b))
        torch.testing.assert_close(outer.sqnorm(), segments.sqnorm())
        torch.testing.assert_close(outer.join([segments]).sqnorm(), 4 * segments.sqnorm())


def test_one_sample_with_most_rows_costs_no_memory() -> None:
    """4000 rows of one sample and one each of 63 others: no tensor of 64 * 4000 rows is made."""
    samples = torch.cat([torch.zeros(4000, dtype=torch.long), torch.arange(1, 64)])
    segments = Segments(torch.randn(4063, 8), torch.randn(4063, 4), samples, 64)
    assert [outer.a.shape[:2] for _, outer in segments._padded()] == [(63, 1), (1, 4000)]


# ---------------------------------------------------------------------------------------------------------------------------------------
# What a layout says, the Jacobian must confirm

INDEX = torch.tensor([2, 0, 0, 3, 1, 2])
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "pick": lambda x: x[INDEX % len(x)],
    "pick the second": lambda x: x[:, INDEX % x.shape[1]],
    "pick pairs": lambda x: x[INDEX % len(x), INDEX % x.shape[1]],
    "index_select": lambda x: x.index_select(-1, INDEX % x.shape[-1]),
    "mask": lambda x: x[torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 3 > 0],
    "slice": lambda x: x[1:],
    "step": lambda x: x[::2, None],
    "number": lambda x: x[0],
    "transpose": lambda x: x.transpose(0, 1),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten all": lambda x: x.flatten(),
    "unflatten": lambda x: x.reshape(2, -1, *x.shape[1:]),
    "unflatten the last": lambda x: x.reshape(*x.shape[:-1], -1, 2),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(),
    "expand": lambda x: x.expand(2, *x.shape),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeat": lambda x: x.repeat(2, *(1,) * (x.dim() - 1)),
    "cat": lambda x: torch.cat([x, x[:1], x]),
    "cat the last": lambda x: torch.cat([x, x[INDEX[: len(x)] % len(x)]], -1),
    "stack": lambda x: torch.stack([x, 2 * x], 1),
    "stack parts": lambda x: torch.stack(list(x.unbind(0))[::-1]),
    "chunk": lambda x: x.chunk(2)[1],
    "split": lambda x: x.split([1, len(x) - 1])[1],
    "sum": lambda x: x.sum(0),
    "mean of the last": lambda x: x.mean(-1),
    "softmax": lambda x: x.softmax(1),
    "gather": lambda x: x.gather(0, torch.zeros_like(x, dtype=torch.long)),
    "gather rows": lambda x: x.gather(0, (torch.arange(len(x)).flip(0).view(-1, *(1,) * (x.dim() - 1))).expand(x.shape)),
    "write": lambda x: _written(x, lambda y: y.__setitem__(slice(0, 1), x[-1:])),
    "write its own": lambda x: _written(x, lambda y: y.__setitem__(INDEX[:1] % len(x), x[INDEX[:1] % len(x)].sin())),
    "write through a view": lambda x: _written(x, lambda y: y[:1].mul_(x[-1:])),
    "index_add": lambda x: torch.zeros(7, *x.shape[1:], dtype=x.dtype).index_add(0, torch.arange(len(x)) % 7, x),
    "index_add of picked": lambda x: torch.zeros_like(x).index_add(0, INDEX % len(x), x[INDEX % len(x)]),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(0, torch.arange(len(x)).flip(0).view(-1, *(1,) * (x.dim() - 1)).expand(x.shape), x),
    "constant": lambda x: x * torch.ones(4, *x.shape, dtype=x.dtype),
    "by another": lambda x: x * x.flip(0).detach() + x[:1],
    "matmul": lambda x: x @ torch.ones(x.shape[-1], 3, dtype=x.dtype),
    "square": lambda x: torch.sin(x @ x.mT),
    "einsum": lambda x: torch.einsum("i...,i...->i...", x, x[INDEX[: len(x)] % len(x)]) if len(x) <= 6 else x,
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
}


@settings(max_examples=400, deadline=None)
@given(names=st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=5), b=st.integers(2, 4), t=st.integers(1, 4), d=st.sampled_from([1, 2, 4]))
def test_layouts_say_what_the_jacobian_says(names: list[str], b: int, t: int, d: int) -> None:
    """Chains of operations: an element that is said to belong to a sample has no derivative with respect to another one."""
    x = (torch.randn(b, t, d, dtype=F64) + 3).requires_grad_()

    used: list[str] = []

    def run(x: Tensor) -> Tensor:
        used.clear()
        for name in names:
            try:
                y = STEPS[name](x)
            except (RuntimeError, IndexError, ValueError, TypeError):  # not for this shape
                continue
            if 0 < y.numel() <= 300:
                x = y
                used.append(name)
        return x

    with gg.tap([torch.zeros(1, requires_grad=True)], batch_size=b) as tap:
        y = run(x)
        layout = tap._layout_of(y)
    inside = list(used)
    assert run(x).shape == y.shape and used == inside  # following them raises nothing of its own
    if isinstance(layout, Layout | Ragged):
        owner = layout.rows(y, b).view(-1, *(1,) * (y.dim() - 1 - layout.dim)).expand(y.shape).flatten()
        influence = torch.autograd.functional.jacobian(run, x).flatten(y.dim() + 1).ne(0).any(-1).view(y.numel(), b)  # type: ignore[no-untyped-call]
        for i in range(b):
            assert not influence[(owner != i) & (owner >= 0), i].any()
        assert not influence[owner < 0].any()
