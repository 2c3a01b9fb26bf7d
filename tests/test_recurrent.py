"""Recurrent layers as one node: the same numbers as written out step by step, to the second derivative; and what is written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad import recurrent
from helpers import loop_sqnorms, loss_fn
from models import B, D, Lambda, T

F64 = torch.float64
H = 5
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options)}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are run step by step in differentiable operations, in order."""
    run, seen = recurrent._run_steps, []

    def watched(kind: str, *args: object) -> object:
        seen.append(kind)
        return run(kind, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(recurrent, "_run_steps", watched)
    return seen


def everything(layer: nn.RNNBase, **parameters: tuple[int, ...]) -> Lambda:
    """All outputs and final states of a layer; with a parameter ``h``, from that initial state."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        given = tuple(h.expand(-1, len(x), -1).contiguous() for h in m._parameters.values() if h is not None)
        out, state = m.rnn(x) if not given else m.rnn(x, given if isinstance(m.rnn, nn.LSTM) else given[0])
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)

    model = Lambda(forward, **parameters)
    model.rnn = layer
    return model


def assert_exact(model: nn.Module, x: Tensor) -> None:
    model, target = model.double(), torch.randn(len(x), dtype=F64)
    exact = loop_sqnorms(model, (x,), target)
    plain = copy.deepcopy(model)
    loss_fn(plain(x), target).backward()
    with gg.tap(model, by_param=True) as tap:
        loss_fn(model(x), target).backward()
    norms = tap.sqnorms(by_param=True)
    assert norms.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, norm in norms.items():
        torch.testing.assert_close(norm, exact[name], rtol=1e-10, atol=1e-28)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(2, 5),
    t=st.integers(1, 6),
    kind=st.sampled_from(sorted(KINDS)),
    layers=st.integers(1, 3),
    options=st.fixed_dictionaries({"bias": st.booleans(), "batch_first": st.just(True), "bidirectional": st.booleans()}),
    learned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_option_against_the_loop(b: int, t: int, kind: str, layers: int, options: dict[str, bool], learned: bool, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (layers * (1 + options["bidirectional"]), 1, 4)
    states = ({"h": shape, "c": shape} if kind == "lstm" else {"h": shape}) if learned else {}
    assert_exact(everything(KINDS[kind](3, 4, layers, **options), **states), torch.randn(b, t, 3, dtype=F64))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_node_in_the_forward_and_backward_pass(kind: str, steps: list[str]) -> None:
    torch.manual_seed(0)
    model, x = everything(KINDS[kind](D, H, 2, batch_first=True, bidirectional=True)), torch.randn(B, T, D)
    norms = gg.sqnorms(model, loss_fn, x, torch.ones(B), by_param=True)
    assert not steps and len(norms) == len(list(model.parameters()))
    gg.sqnorms(model, loss_fn, x, torch.ones(B), create_graph=True).sum().backward()
    assert len(steps) == 4  # one for each layer and direction


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("frozen", [("weight_ih", "bias_ih"), ("weight_hh", "bias_hh"), ("weight_hh",), ("bias",), ("weight",)], ids=" ".join)
def test_frozen_parameters(kind: str, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = everything(KINDS[kind](D, H, 2, batch_first=True, bidirectional=True), **{"h": (4, 1, H), **({"c": (4, 1, H)} if kind == "lstm" else {})})
    for name, p in model.rnn.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    x = torch.randn(B, T, D, dtype=F64)
    assert_exact(model, x)
    target = torch.randn(B, dtype=F64)
    expected = gg.sqnorms(model, loss_fn, x, target)
    again = gg.sqnorms(model, loss_fn, x, target, create_graph=True)
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=0)
    assert again.requires_grad


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "of", [lambda out, h: out, lambda out, h: h[-1], lambda out, h: out[:, -1], lambda out, h: out[:, :1]], ids=["out", "last", "end", "start"]
)
def test_second_derivatives(kind: str, of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Of a penalty on the norms, by every parameter, the input and an initial state that is a function of the input; whichever results the loss uses."""
    torch.manual_seed(0)
    layer = KINDS[kind](D, D, batch_first=True, bidirectional=True).double()
    x, target = torch.randn(B, T, D, dtype=F64, requires_grad=True), torch.randn(B, dtype=F64)

    def run(x: Tensor) -> Tensor:
        h = torch.tanh(x[:, :2]).transpose(0, 1).contiguous()
        out, state = layer(x, (h, 2 * h) if kind == "lstm" else h)
        return of(out, state[1] if kind == "lstm" else state)

    def single(i: int) -> Tensor:
        grads = torch.autograd.grad(loss_fn(run(x[i : i + 1]), target[i : i + 1]), list(layer.parameters()), create_graph=True)
        return torch.stack([g.square().sum() for g in grads]).sum()

    wanted = [x, *layer.parameters()]
    norms = torch.stack([single(i) for i in range(B)])
    expected = torch.autograd.grad(norms.sum(), wanted)
    got = gg.sqnorms(run, loss_fn, x, target, params=list(layer.parameters()), create_graph=True)
    torch.testing.assert_close(got, norms, rtol=1e-10, atol=0)
    for g, e in zip(torch.autograd.grad(got.sum(), wanted), expected):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradients_of_input_and_states_are_the_plain_ones(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](D, H, 2, batch_first=True, bidirectional=True).double()
    x, h, c = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((B, T, D), (B, 4, H), (B, 4, H)))
    leaves = [x, h, c] if kind == "lstm" else [x, h]

    def loss() -> Tensor:
        states = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        out, state = layer(x, states if kind == "lstm" else states[0])
        return out.sin().sum() + sum(s.square().sum() for s in (state if kind == "lstm" else (state,)))

    expected = torch.autograd.grad(loss(), leaves)
    with gg.tap(list(layer.parameters()), batch_size=B):
        got = torch.autograd.grad(loss(), leaves)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-14)


def test_a_layer_that_is_used_twice() -> None:
    """Both uses are added before they are squared, and a second backward through the same graph gives the same gradients."""
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.rnn(torch.tanh(m.rnn(x)[0]))[0])
    model.rnn = nn.LSTM(D, D, batch_first=True)
    x = torch.randn(B, T, D, dtype=F64)
    assert_exact(model, x)
    model.zero_grad()
    with gg.tap(model):
        loss = loss_fn(model(x), torch.ones(B, dtype=F64))
        loss.backward(retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    for p, g in zip(model.parameters(), again):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-16)


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell, "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", sorted(CELLS))
def test_a_cell_is_a_layer_of_one_step(kind: str, bias: bool, steps: list[str]) -> None:
    """Called step by step, from a learned state, and on after the sequence has ended on an input that is the same for all samples."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        learned = m.h.expand(len(x), -1)
        state = (learned, torch.tanh(x[:, 0, :H])) if kind == "lstm" else learned
        for step in (*x.unbind(1), torch.ones(len(x), D, dtype=x.dtype)):
            state = m.cell(step, state)
        return torch.cat(state, -1) if kind == "lstm" else state

    torch.manual_seed(0)
    model = Lambda(forward, h=(H,))
    model.cell = CELLS[kind](D, H, bias=bias)
    x, target = torch.randn(B, T, D, dtype=F64), torch.randn(B, dtype=F64)
    assert_exact(model, x)
    assert not steps

    def single(i: int) -> Tensor:
        grads = torch.autograd.grad(loss_fn(model(x[i : i + 1]), target[i : i + 1]), list(model.parameters()), create_graph=True)
        return torch.stack([g.square().sum() for g in grads]).sum()

    expected = torch.autograd.grad(torch.stack([single(i) for i in range(B)]).mean(), list(model.parameters()))
    got = torch.autograd.grad(gg.sqnorms(model, loss_fn, x, target, create_graph=True).mean(), list(model.parameters()))
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])  # at a kink, rounding decides what the gradient is
def test_narrow_dtypes_are_as_exact_as_a_loop(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, target = everything(KINDS[kind](16, 32, batch_first=True)).to(dtype), torch.randn(8, 12, 16, dtype=dtype), torch.randn(8, dtype=dtype)
    exact, loop = (sum(loop_sqnorms(model, (x,), target, of).values()) for of in (F64, dtype))
    errors = [((norms.double() - exact) / exact).abs().max().item() for norms in (gg.sqnorms(model, loss_fn, x, target), loop)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.filterwarnings("ignore:ghostgrad")
def test_what_is_written_out(steps: list[str]) -> None:
    """Projections, and under autocast everything: a GRU's state stays wide there while its gates are narrow."""
    torch.manual_seed(0)
    x, target = torch.randn(B, T, D), torch.ones(B)
    for model, autocast in ((nn.LSTM(D, H, proj_size=3, batch_first=True), False), (nn.GRU(D, H, batch_first=True), True)):
        wrapped = everything(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            norms = gg.sqnorms(wrapped, loss_fn, x, target)
        torch.testing.assert_close(norms.double(), sum(loop_sqnorms(wrapped, (x,), target).values()), rtol=3e-2 if autocast else 1e-6, atol=0)
    assert steps == ["lstm", "gru"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_results_may_be_written_into(kind: str) -> None:
    torch.manual_seed(0)

    def forward(m: Lambda, x: Tensor) -> Tensor:
        out, state = m.rnn(x)
        first = state[0] if kind == "lstm" else state
        out.mul_(2)
        out[:, -1] = out[:, -1] - 1
        return torch.cat([out.flatten(1), first.transpose(0, 1).flatten(1)], 1)

    model = Lambda(forward)
    model.rnn = KINDS[kind](D, H, batch_first=True)
    assert_exact(model, torch.randn(B, T, D, dtype=F64))
