"""The calls that need no block, and the check."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad import rules
from helpers import loop_sqnorms, loss_fn
from models import Attention, B, D, Lambda, T

F64 = torch.float64


@pytest.fixture
def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)).double(), torch.randn(B, D, dtype=F64)


def jacobian_sqnorms(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``{name: (B,)}``: squared norms of every output's gradient, summed over the outputs, by torch.func."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p, x: torch.func.functional_call(model, p, (x[None],)).flatten()), (None, 0))(params, x)
    return {name: j.flatten(1).square().sum(1) for name, j in jacobian.items()}


def test_scalar_outputs(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    exact = jacobian_sqnorms(nn.Sequential(model, Lambda(lambda m, h: h.sum(1))), x)
    torch.testing.assert_close(gg.output_sqnorms(lambda x: model(x).sum(1), x, params=model.parameters()), sum(exact.values()), rtol=1e-11, atol=0)


def test_vector_outputs(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    exact = jacobian_sqnorms(model, x)
    torch.testing.assert_close(gg.output_sqnorms(model, x), sum(exact.values()), rtol=1e-11, atol=0)
    for name, norm in gg.output_sqnorms(model, x, by_param=True).items():
        torch.testing.assert_close(norm, exact[name], rtol=1e-11, atol=0)


@pytest.mark.parametrize("num_probes", [None, 3])
def test_penalty_is_differentiable(net: tuple[nn.Module, Tensor], num_probes: int | None) -> None:
    model, x = net
    got = gg.output_sqnorms(model, x, create_graph=True, num_probes=num_probes)
    got = torch.autograd.grad((got if num_probes is None else got.mean).mean(), list(model.parameters()), allow_unused=True)

    def penalty(params: dict[str, Tensor]) -> Tensor:
        def f(p: dict[str, Tensor], x: Tensor, sign: Tensor) -> Tensor:
            return torch.func.functional_call(model, p, (x[None],)).flatten() @ sign

        if num_probes is None:
            signs = torch.eye(3, dtype=F64).expand(B, 3, 3)
        else:
            generator = torch.Generator().manual_seed(0)
            draws = [torch.randint(0, 2, (B, 3), generator=generator).double() * 2 - 1 for _ in range(num_probes)]
            signs = torch.stack(draws, 1) / num_probes**0.5
        grads = torch.func.vmap(torch.func.vmap(torch.func.grad(f), (None, None, 0)), (None, 0, 0))(params, x, signs)
        return sum(g.square().sum() for g in grads.values()) / B

    expected = torch.func.grad(penalty)({name: p.detach() for name, p in model.named_parameters()})
    for g, e in zip(got, expected.values()):
        torch.testing.assert_close(torch.zeros_like(e) if g is None else g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)), lambda: Attention(D, 2)], ids=["mlp", "attention"])
def test_penalty_gradient_in_float32(build: Callable[[], nn.Module]) -> None:
    """Against torch.func in float64: at most 1e-5, or twice torch.func's own error in float32."""
    torch.manual_seed(0)
    model, x, target = build(), torch.randn(B, T, D), torch.randn(B)

    def penalty_gradient(dtype: torch.dtype) -> Tensor:
        params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}

        def single(p: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
            return loss_fn(torch.func.functional_call(model, p, (x[None],)), t[None])

        def penalty(p: dict[str, Tensor]) -> Tensor:
            grads = torch.func.vmap(torch.func.grad(single), (None, 0, 0))(p, x.to(dtype), target.to(dtype))
            return sum(g.square().sum() for g in grads.values()) / B

        return torch.cat([g.flatten() for g in torch.func.grad(penalty)(params).values()]).double()

    exact, plain = penalty_gradient(F64), penalty_gradient(torch.float32)
    grads = torch.autograd.grad(gg.sqnorms(model, loss_fn, x, target, create_graph=True).mean(), list(model.parameters()), materialize_grads=True)
    ours = torch.cat([g.flatten() for g in grads]).double()
    assert (ours - exact).norm() / exact.norm() <= max(1e-5, 2 * (plain - exact).norm() / exact.norm())


def test_probes_are_unbiased_and_their_errors_honest(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    exact = gg.output_sqnorms(model, x)
    estimates = [gg.output_sqnorms(model, x, num_probes=16, seed=seed) for seed in range(60)]
    deviations = torch.stack([(e.mean - exact) / e.stderr for e in estimates])  # (60, B)
    mean, stderr = torch.stack([e.mean for e in estimates]), torch.stack([e.stderr for e in estimates])
    assert ((mean.mean(0) - exact).abs() < 3.5 * mean.std(0) / 60**0.5).all()
    assert (deviations.abs() < 3).double().mean() > 0.9  # t-distributed with 15 degrees of freedom
    torch.testing.assert_close(stderr.mean(0), mean.std(0), rtol=0.3, atol=0)
    assert gg.output_sqnorms(model, x, num_probes=1).stderr.isnan().all()


def test_at_zero_residual_the_hessian_trace_is_the_mean_norm(net: tuple[nn.Module, Tensor]) -> None:
    """The trace of the Hessian of ``mean_i |f(x_i) - y_i|^2 / 2`` at ``y = f(x)``."""
    model, x = net
    target = model(x).detach()
    params = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in params.values()])

    def loss(w: Tensor) -> Tensor:
        pieces, start = {}, 0
        for name, p in params.items():
            pieces[name], start = w[start : start + p.numel()].view(p.shape), start + p.numel()
        return 0.5 * (torch.func.functional_call(model, pieces, (x,)) - target).square().sum(1).mean()

    torch.testing.assert_close(gg.output_sqnorms(model, x).mean(), torch.func.hessian(loss)(flat).trace(), rtol=1e-10, atol=0)


def test_output_arguments(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    with pytest.raises(ValueError, match="num_probes"):
        gg.output_sqnorms(model, x, num_probes=0)
    with pytest.raises(TypeError, match="samples first"):
        gg.output_sqnorms(lambda x: model(x).sum(), x, params=list(model.parameters()))
    with pytest.raises(TypeError, match="dict"):
        gg.output_sqnorms(lambda x: {"logits": model(x)}, x, params=list(model.parameters()))
    with pytest.raises(gg.TapStateError, match="does not depend"):
        gg.output_sqnorms(lambda x: x.sum(1), x, params=list(model.parameters()))


# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_check_agrees(net: tuple[nn.Module, Tensor], dtype: torch.dtype) -> None:
    model, x = net
    report = gg.check(model.to(dtype), F.cross_entropy, x.to(dtype), torch.tensor([0, 2, 1, 1]))
    assert report
    assert [row.name for row in report.rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(row.uses == {"linear": 1} for row in report.rows)
    assert "all agree" in str(report)


def test_check_finds_a_wrong_rule() -> None:
    """Three mistakes that peers ship: a use forgotten, the squares of the uses added, a half bias."""
    torch.manual_seed(0)
    x, y = torch.randn(B, T, D), torch.randn(B)
    model = Lambda(lambda m, x: torch.tanh(torch.tanh(F.linear(x, m.w, m.c)) @ m.w), w=(D, D), c=(D,))
    right = rules._RULES[F.linear]

    def half_bias(call: rules.Call, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        def backward(g: Tensor, x: Tensor, w: Tensor, c: Tensor) -> tuple[object, ...]:
            return lambda: g @ w, lambda: gg.Outer(x, g), lambda: gg.Full(g.sum(1) / 2)

        return call.fuse(F.linear, backward, (x,), (w, c), call.layout(x))  # type: ignore[arg-type]

    def forgotten(call: rules.Call, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        def backward(g: Tensor, x: Tensor, w: Tensor, c: Tensor) -> tuple[object, ...]:
            return lambda: g @ w, lambda: gg.Outer(x, 0 * g), lambda: gg.Full(g.sum(1))

        return call.fuse(F.linear, backward, (x,), (w, c), call.layout(x))  # type: ignore[arg-type]

    assert gg.check(model, loss_fn, x, y)
    try:
        for wrong, name in ((half_bias, "c"), (forgotten, "w")):
            gg.register_rule(F.linear)(wrong)
            report = gg.check(model, loss_fn, x, y)
            assert not report
            assert [row.name for row in report.rows if not row.ok] == [name]
            assert "WRONG" in str(report) and "1 of 2 differ" in str(report)
    finally:
        gg.register_rule(F.linear)(right)


def test_check_refuses_random_models(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        gg.check(nn.Sequential(model, nn.Dropout()), loss_fn, x, torch.randn(B, dtype=F64))
    assert gg.check(nn.Sequential(model, nn.Dropout()).eval(), loss_fn, x, torch.randn(B, dtype=F64))


def test_dropout_norms_are_of_the_realised_mask(net: tuple[nn.Module, Tensor]) -> None:
    """Samples share nothing, so the norms of a batch under one mask are those of the network with that mask."""
    model, x = net
    dropped, target = nn.Sequential(model[0], nn.Dropout(0.5), model[2]), torch.randn(B, dtype=F64)
    torch.manual_seed(1)
    got = gg.sqnorms(dropped, loss_fn, x, target, by_param=True)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(B, 7, dtype=F64), 0.5)
    masked = Lambda(lambda m, x, mask: m.second(m.first(x) * mask))
    masked.first, masked.second = model[0], model[2]
    exact = loop_sqnorms(masked, (x, mask), target)
    for (_, norm), e in zip(got.items(), exact.values()):
        torch.testing.assert_close(norm, e, rtol=1e-11, atol=0)


def test_reference_path_keeps_randomness_of_the_call() -> None:
    model = nn.MultiheadAttention(D, 2, dropout=0.5, batch_first=True)
    x = torch.randn(B, T, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms = gg.output_sqnorms(lambda x: model(x, x, x)[0].sum((1, 2)), x, params=dict(model.named_parameters()))
    assert norms.shape == (B,) and norms.isfinite().all()
