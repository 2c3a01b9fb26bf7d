"""Linear layers on single positions, (B, p): torch's own operation runs, and its gradients are taken over where they are the layer's alone."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg
from helpers import relative_error

B, P, D = 7, 5, 6


class Net(nn.Module):
    """``use(net, x)`` with ``w`` (d, p), ``c`` (d,), ``v`` (p, d), ``e`` (p,) and ``s`` (B, p)."""

    def __init__(self, use: Callable[[Net, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        shapes = (D, P), (D,), (P, D), (P,), (B, P)
        self.w, self.c, self.v, self.e, self.s = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def loss_fn(out: Tensor) -> Tensor:
    return out.sin().square().sum()


def loop(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Squared norms by autograd, one sample at a time."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss_fn(net(x[i : i + 1])), list(net.parameters()), allow_unused=True)
        rows.append([0.0 if g is None else g.square().sum().item() for g in grads])
    return {name: torch.tensor(column, dtype=torch.float64) for (name, _), column in zip(net.named_parameters(), zip(*rows))}


def doubled(out: Tensor) -> Tensor:
    """A hook that changes what flows back."""
    if out.requires_grad:
        out.register_hook(lambda g: 2 * g)
    return out


USES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "alone": lambda m, x: F.linear(x, m.w, m.c),
    "without bias": lambda m, x: F.linear(x, m.w),
    "two layers": lambda m, x: F.linear(F.linear(x, m.w, m.c).tanh(), m.v, m.e),
    "in-place activation": lambda m, x: F.linear(F.linear(x, m.w, m.c).relu_(), m.v, m.e),
    "twice": lambda m, x: F.linear(F.linear(F.linear(x, m.w, m.c).tanh(), m.v, m.e).tanh(), m.w, m.c),
    "weight twice, biases apart": lambda m, x: F.linear(F.linear(F.linear(x, m.w).tanh(), m.v, m.e).tanh(), m.w, m.c),
    "weight turned as well": lambda m, x: F.linear(x, m.w, m.c).tanh() @ m.w,
    "weight turned before": lambda m, x: F.linear((x @ m.w.t()).tanh() @ m.w, m.w, m.c),
    "bias in another operation": lambda m, x: F.linear(x, m.w, m.c) * m.c,
    "weight as data's factor": lambda m, x: F.linear(x, m.w, m.c) @ m.v.t() * m.w.sum(0),
    "sequence after": lambda m, x: F.linear(x, m.w, m.c).sin() + F.linear(torch.stack([x, x.cos(), x * x], 1), m.w, m.c).sum(1),
    "hook on the result": lambda m, x: doubled(F.linear(x, m.w, m.c)).tanh(),
    "hook on a view of the result": lambda m, x: doubled(F.linear(x, m.w, m.c).t()).tanh().t(),
    "result used twice": lambda m, x: (lambda h: h * h.tanh() + h)(F.linear(x, m.w, m.c)),
    "a parameter as long as the batch": lambda m, x: x @ F.linear(m.s, m.w, m.c)[:P],
    "a function of a parameter, as long as the batch": lambda m, x: x @ F.linear(m.s * 2, m.w, m.c)[:P],
    "a vector for a weight": lambda m, x: F.linear(x, m.e, None)[:, None] + F.linear(x, m.w, m.c),
    "part of the result unused": lambda m, x: F.linear(x, m.w, m.c)[:, 1:3],
    "result written into": lambda m, x: F.linear(x, m.w, m.c).index_fill_(1, torch.tensor([0, 2]), 0.5),
}


@pytest.mark.parametrize("by_param", [False, True])
@pytest.mark.parametrize("frozen", ["", "w", "c"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_norms_and_gradients(use: Callable[[Net, Tensor], Tensor], frozen: str, by_param: bool) -> None:
    net, x = Net(use), torch.randn(B, P, dtype=torch.float64)
    if frozen:
        getattr(net, frozen).requires_grad_(False)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not net(x).requires_grad:
        pytest.skip("nothing of it is left to train")
    rows = [torch.autograd.grad(loss_fn(net(x[i : i + 1])), list(parameters.values()), allow_unused=True) for i in range(B)]
    exact = {
        name: torch.stack([torch.zeros((), dtype=torch.float64) if row[k] is None else row[k].square().sum() for row in rows])
        for k, name in enumerate(parameters)
    }
    loss_fn(net(x)).backward()
    plain = {name: p.grad for name, p in parameters.items()}
    net.zero_grad()
    with gg.tap(net, by_param=by_param, reduction="sum") as tap:
        loss_fn(net(x)).backward()
    norms = tap.sqnorms(by_param=True) if by_param else {"": tap.sqnorms()}
    assert relative_error(sum(norms.values()), sum(exact.values())) < 1e-12
    for name in exact if by_param else ():
        torch.testing.assert_close(norms[name], exact[name], rtol=1e-12, atol=1e-12)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, plain[name])


def test_other_backwards_before_and_after() -> None:
    net, x = Net(USES["two layers"]), torch.randn(B, P, dtype=torch.float64, requires_grad=True)
    exact = sum(loop(net, x.detach()).values())
    with gg.tap(net, reduction="sum") as tap:
        loss = loss_fn(net(x))
        torch.autograd.grad(loss, x, retain_graph=True)  # reaches no parameter
        loss.backward(retain_graph=True)
        torch.testing.assert_close(tap.sqnorms(), exact)
        before = net.w.grad.clone()
        loss.backward()  # after the norms were read: an ordinary one
    torch.testing.assert_close(net.w.grad, 2 * before)
    torch.testing.assert_close(tap.sqnorms(), exact)


def test_a_second_backward_is_refused() -> None:
    net, x = Net(USES["two layers"]), torch.randn(B, P, dtype=torch.float64)
    with pytest.raises(gg.TapStateError, match="more than one backward"), gg.tap(net) as tap:
        loss = loss_fn(net(x))
        loss.backward(retain_graph=True)
        loss.backward()
        tap.sqnorms()


class Square(torch.autograd.Function):
    """Sum of squares, out of sight of the tap."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.square().sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    "term",
    [
        lambda net, out, x: net.w.square().sum(),
        lambda net, out, x: Square.apply(net.w),
        lambda net, out, x: Square.apply(net.w.t()),
        lambda net, out, x: Square.apply(net.w[0]),
        lambda net, out, x: torch.autograd.grad(out.sum(), x, create_graph=True)[0].square().sum(),
    ],
    ids=["weight decay", "custom function", "custom function of a view", "custom function of a part", "gradient penalty"],
)
def test_what_is_not_the_layers_own_is_refused(term: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    net, x = Net(USES["two layers"]), torch.randn(B, P, dtype=torch.float64, requires_grad=True)
    with pytest.raises((gg.UnsupportedUseError, gg.BatchCouplingError), match=r"'[wv]'|\(w\)"), gg.tap(net) as tap:
        out = net(x)
        (loss_fn(out) + term(net, out, x)).backward()
        tap.sqnorms()


def test_an_input_that_was_overwritten_is_refused() -> None:
    net, x = Net(USES["two layers"]), torch.randn(B, P, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="modified by an in-?place operation"), gg.tap(net):
        loss = loss_fn(net(x))
        x.zero_()
        loss.backward()


def test_double_backward() -> None:
    net, x = Net(USES["two layers"]), torch.randn(B, P, dtype=torch.float64)
    used = [net.w, net.c, net.v, net.e]
    expected = torch.autograd.grad(gg.sqnorms(net, lambda out, _: loss_fn(out), x, x, create_graph=True, reduction="sum").sum(), used)
    with gg.tap(net, reduction="sum") as tap, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of reference cycles for backward(create_graph=True)
        loss_fn(net(x)).backward(create_graph=True)
        got = torch.autograd.grad(tap.sqnorms().sum(), used)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)


def test_nothing_is_kept() -> None:
    inputs: list[weakref.ref[Tensor]] = []

    def use(m: Net, x: Tensor) -> Tensor:
        x = x * 2
        inputs.append(weakref.ref(x))
        return F.linear(x, m.w, m.c)

    net, x = Net(use), torch.randn(B, P, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        with gg.tap(net) as tap:
            loss = loss_fn(net(x))
            assert inputs[0]() is not None
            loss.backward()
            assert inputs[0]() is None  # although the block is open and the loss alive
        assert tap.sqnorms().shape == (B,)
        with gg.tap(net):
            loss = loss_fn(net(x))
        assert inputs[1]() is not None
        del loss
        assert inputs[1]() is None  # although there was no backward
    finally:
        gc.enable()


def test_deep_copies_and_later_steps_see_nothing_of_it() -> None:
    net, x = Net(USES["two layers"]), torch.randn(B, P, dtype=torch.float64)
    exact = sum(loop(net, x).values())
    with gg.tap(net, reduction="sum") as tap:
        for _ in range(3):
            loss_fn(net(x)).backward()
            torch.testing.assert_close(tap.sqnorms(), exact)
    other = copy.deepcopy(net)
    with gg.tap(other, reduction="sum") as tap:
        loss_fn(other(x)).backward()
    torch.testing.assert_close(tap.sqnorms(), exact)
