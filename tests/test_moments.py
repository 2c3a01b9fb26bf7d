"""Second moments and variances of the per-sample gradients, element by element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg
from helpers import build, loop_grads, loss_fn, net, sample_losses, sqnorm
from models import CASES, Case

F64 = torch.float64


def error(got: Tensor, exact: Tensor) -> float:
    """Relative to the largest element, below which an element's sum may be all rounding of its per-sample gradients."""
    return ((got.double() - exact).abs().max() / exact.max().clamp_min(1e-300)).item() if exact.numel() else 0.0


@pytest.mark.filterwarnings("ignore:.*no fused rule")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moments_equal_the_loop(case: Case) -> None:
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-5)):
        model, inputs, target = build(case, dtype)
        grads = loop_grads(model, inputs, target)
        moments = gg.second_moments(model, loss_fn, *inputs, target)
        assert list(moments) == [name for name, p in model.named_parameters() if p.requires_grad]
        scale = max(g.square().sum(0).max().item() for g in grads.values() if g.numel())
        for name, squares in moments.items():
            exact = grads[name].square().sum(0)
            assert squares.shape == exact.shape and squares.dtype == dtype
            if exact.numel() and exact.max() > scale * 1e-6:  # else it is rounding, as an attention's key bias is
                assert error(squares, exact) < tolerance, name
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*no fused rule")
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_in_a_training_step(case: Case) -> None:
    """The gradient is the plain one, and the sum of the moments is that of the norms."""
    model, inputs, target = build(case, F64)
    loss_fn(model(*inputs), target).backward()
    plain = {name: None if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()}
    model.zero_grad()
    with gg.tap(model, moments=True) as tap:
        loss_fn(model(*inputs), target).backward()
    for name, p in model.named_parameters():
        if plain[name] is not None:
            torch.testing.assert_close(p.grad.to_dense(), plain[name], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(sum(squares.sum() for squares in tap.second_moments().values()), tap.sqnorms().sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_agree(reduction: str) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    loss = (lambda out, y: loss_fn(out, y)) if reduction == "mean" else (lambda out, y: len(y) * loss_fn(out, y))
    for name, squares in gg.second_moments(model, loss, x, y, reduction=reduction).items():
        torch.testing.assert_close(squares, grads[name].square().sum(0))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_variance(reduction: str) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    loss = {"mean": loss_fn, "sum": lambda out, y: sample_losses(out, y).sum(), "none": sample_losses}[reduction]
    for name, variance in gg.gradient_variance(model, loss, x, y, reduction="sum" if reduction == "sum" else "mean").items():
        torch.testing.assert_close(variance, grads[name].var(0))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        gg.gradient_variance(model, loss_fn, x[:1], y[:1])


def test_variance_is_not_negative() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3).expand(50, 3)
    variance = gg.gradient_variance(model, lambda out, y: (out.sum(1) * y).mean(), x, torch.ones(50))
    assert all((v >= 0).all() and (v < 1e-5).all() for v in variance.values())


def test_frozen_and_unused_parameters() -> None:
    model, x, y = net()
    model[0].weight.requires_grad_(False)
    model.register_parameter("extra", nn.Parameter(torch.ones(2, dtype=F64)))
    moments = gg.second_moments(model, loss_fn, x, y)
    assert set(moments) == {"0.bias", "2.weight", "2.bias", "extra"} and moments["extra"].equal(torch.zeros(2, dtype=F64))


def test_sampled_labels_give_the_fisher_matrix() -> None:
    """The mean over all labels, weighted by the model's own probabilities."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=F64)
    p = model(x).softmax(1).detach()
    diagonal = sum(
        gg.second_moments(model, lambda out, y, k=k: (p[:, k].sqrt() * F.cross_entropy(out, y, reduction="none")).mean(), x, torch.full((6,), k))["weight"]
        for k in range(3)
    )
    exact = torch.einsum("ik,ij->kj", p * (1 - p), x.square())
    torch.testing.assert_close(diagonal, exact)


def test_wrong_use_is_an_error() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        loss_fn(model(x), y).backward()
    with pytest.raises(gg.TapStateError, match="moments=True"):
        tap.second_moments()
    with gg.tap(model, moments=True) as tap:
        with pytest.raises(gg.TapStateError, match="there are no norms yet"):
            tap.second_moments()
        with pytest.raises(gg.TapStateError, match="the tap was made with moments=True"):
            gg.clipped_backward(loss_fn(model(x), y).expand(5), tap, 1.0)
    with pytest.raises(TypeError, match="second_moments"):
        gg.second_moments(model, loss_fn, x)


def test_sums_of_batches() -> None:
    model, x, y = net()
    whole = gg.second_moments(model, loss_fn, x, y)
    parts = [gg.second_moments(model, loss_fn, x[i], y[i]) for i in (slice(0, 2), slice(2, 5))]
    for name, squares in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], squares)
        torch.testing.assert_close(squares, loop_grads(model, (x,), y)[name].square().sum(0))
    assert sum(map(sqnorm, loop_grads(model, (x,), y).values())).sum().item() == pytest.approx(sum(s.sum().item() for s in whole.values()))
