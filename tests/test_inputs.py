"""Derivatives by the inputs: Jacobians in float64 one sample at a time, penalties against torch.func, and samples that are mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg
from helpers import build, loss_fn, relative_error
from models import CASES, Attention, B, Case, D, T, Transformer

F64 = torch.float64


def loop(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, dtype: torch.dtype = F64) -> tuple[list[Tensor], Tensor]:
    """One sample at a time: for each input (B,) squared norms of the output's Jacobian, if that is small; and (B,) of the loss's gradient by all inputs."""
    model, inputs, target = copy.deepcopy(model).to(dtype), tuple(t.to(dtype) for t in inputs), target.to(dtype)
    jacobians, gradients = [], []
    for i in range(len(target)):
        one = tuple(t[i : i + 1].clone().requires_grad_() for t in inputs)
        out = model(*one)
        rows = [torch.autograd.grad(value, one, retain_graph=True, materialize_grads=True) for value in out.flatten() if out.numel() <= 60]
        jacobians.append([sum(row[k].double().square().sum() for row in rows) for k in range(len(inputs))])
        gradients.append(sum(g.double().square().sum() for g in torch.autograd.grad(loss_fn(out, target[i : i + 1]), one, materialize_grads=True)))
    return list(torch.tensor(jacobians).double().T), torch.tensor(gradients).double()


REAL = [case for case in CASES if all(t.is_floating_point() for t in case.inputs())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_exact_on_every_model(case: Case) -> None:
    """At most 1e-5, or twice the error of a loop in float32."""
    model, inputs, target = build(case)
    exact, exact_of_loss = loop(model, inputs, target)
    got = gg.input_sqnorms(model, *inputs, by_input=True) if sum(exact).any() else dict(enumerate(exact))
    of_loss = gg.input_sqnorms(model, *inputs, loss_fn=loss_fn, target=target)
    errors = [*(relative_error(got[k], e) for k, e in enumerate(exact)), relative_error(of_loss, exact_of_loss)]
    if max(errors) > 1e-5:
        plain, plain_of_loss = loop(model, inputs, target, torch.float32)
        of_loop = [*(relative_error(p, e) for p, e in zip(plain, exact)), relative_error(plain_of_loss, exact_of_loss)]
        assert all(ours <= max(1e-5, 2 * theirs) for ours, theirs in zip(errors, of_loop))


@pytest.fixture
def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)).double(), torch.randn(B, D, dtype=F64)


@pytest.mark.parametrize("how", ["outputs", "probes", "loss", "vector loss"])
@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)), lambda: Attention(D, 2)], ids=["mlp", "attention"])
def test_penalties_are_differentiable(build: Callable[[], nn.Module], how: str) -> None:
    """By parameters and by inputs that require grad, against torch.func."""
    torch.manual_seed(0)
    model, x, target = build().double(), torch.randn(B, T, D, dtype=F64, requires_grad=True), torch.randn(B, dtype=F64)
    options = {
        "outputs": {},
        "probes": {"num_probes": 3},
        "loss": {"loss_fn": loss_fn, "target": target},
        "vector loss": {"loss_fn": lambda out, target: torch.stack([loss_fn(o[None], t[None]) for o, t in zip(out, target)]), "target": target},
    }[how]
    result = gg.input_sqnorms(model, x, create_graph=True, **options)
    got = torch.autograd.grad((result.mean if how == "probes" else result).mean(), [x, *model.parameters()], allow_unused=True)
    size = model(x)[0].numel()
    if how == "probes":
        generator = torch.Generator().manual_seed(0)
        weights = torch.stack([(torch.randint(0, 2, (B, size), generator=generator) * 2 - 1).double() for _ in range(3)], 1) / 3**0.5
    else:
        weights = torch.eye(size, dtype=F64).expand(B, size, size)

    def penalty(params: dict[str, Tensor], x: Tensor) -> Tensor:
        def output(x: Tensor, w: Tensor) -> Tensor:
            return torch.func.functional_call(model, params, (x[None],)).flatten() @ w

        def loss(x: Tensor, t: Tensor) -> Tensor:
            return loss_fn(torch.func.functional_call(model, params, (x[None],)), t[None])

        if "loss" in how:
            return torch.func.vmap(torch.func.grad(loss))(x, target).square().sum() / B
        return torch.func.vmap(torch.func.vmap(torch.func.grad(output), (None, 0)))(x, weights).square().sum() / B

    by_params, by_x = torch.func.grad(penalty, (0, 1))({name: p.detach() for name, p in model.named_parameters()}, x.detach())
    for g, e in zip(got, [by_x, *by_params.values()]):
        torch.testing.assert_close(torch.zeros_like(e) if g is None else g, e, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


def test_fused_attention_has_a_penalty(net: tuple[nn.Module, Tensor]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    penalty = gg.input_sqnorms(layer, torch.randn(B, T, 8), create_graph=True, num_probes=1).mean.mean()
    penalty.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for name, p in layer.named_parameters() if "linear2.bias" not in name and "norm2.bias" not in name
    )


def test_probes_are_unbiased_and_their_errors_honest(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    exact = gg.input_sqnorms(model, x)
    estimates = [gg.input_sqnorms(model, x, num_probes=16, seed=seed) for seed in range(60)]
    mean, stderr = torch.stack([e.mean for e in estimates]), torch.stack([e.stderr for e in estimates])
    assert ((mean.mean(0) - exact).abs() < 3.5 * mean.std(0) / 60**0.5).all()
    torch.testing.assert_close(stderr.mean(0), mean.std(0), rtol=0.3, atol=0)
    one = gg.input_sqnorms(model, x, num_probes=1, by_input=True)
    assert one.stderr[0].isnan().all() and one.mean[0].shape == (B,)


# --- which inputs ---


def test_inputs_by_position_and_by_name() -> None:
    torch.manual_seed(0)
    table = torch.randn(5, D, dtype=F64)
    scores = torch.randn(B, D, dtype=F64)
    index = torch.randint(5, (B,))

    def model(x: Tensor, index: Tensor) -> Tensor:
        return (x * table[index]).sin()

    exact = (scores * table[index]).cos().mul(table[index]).square().sum(1)
    with pytest.raises(TypeError, match=r"input 1 must be a real tensor.*torch.int64.*wrt="):
        gg.input_sqnorms(model, scores, index)
    torch.testing.assert_close(gg.input_sqnorms(model, scores, index, wrt=[0]), exact, rtol=1e-12, atol=0)
    named = {"x": scores, "index": index}
    torch.testing.assert_close(gg.input_sqnorms(model, named, wrt=["x"], by_input=True), {"x": exact}, rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match="input 'index' must be a real tensor"):
        gg.input_sqnorms(model, named)
    with pytest.raises(TypeError, match="'z' must be a real tensor.*missing"):
        gg.input_sqnorms(model, named, wrt=["z"])
    with pytest.raises(TypeError, match="token numbers"):
        gg.input_sqnorms(Transformer(), torch.randint(11, (B, T)))
    with pytest.raises(ValueError, match="samples first"):
        gg.input_sqnorms(lambda x, y: x * y, scores, table)


# --- samples that are mixed ---


class Attending(nn.Module):
    """Attention with the samples and the positions confused."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=False).double()

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


MIXED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(D, 7), nn.BatchNorm1d(7), nn.Tanh()).double(),
    "batch norm, frozen and without statistics": lambda: nn.BatchNorm1d(D, affine=False, track_running_stats=False).double(),
    "batch norm by hand": lambda: lambda x: (x - x.mean(0)) / x.std(0),
    "mean subtracted": lambda: lambda x: x.tanh() - x.tanh().mean(0),
    "a mean of many, added": lambda: lambda x: x.tanh() + 0.01 * x.mean(),
    "softmax over the batch": lambda: lambda x: x.softmax(0),
    "neighbours": lambda: lambda x: x + x.roll(1, 0).sin(),
    "reversed": lambda: lambda x: x.flip(0).sin(),
}


@pytest.mark.parametrize("ask", [{}, {"num_probes": 2}, {"create_graph": True}, {"loss_fn": loss_fn, "target": torch.randn(64, dtype=F64)}], ids=str)
@pytest.mark.parametrize("mixed", MIXED)
def test_mixed_samples_are_refused(mixed: str, ask: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, x = MIXED[mixed](), torch.randn(64, D, dtype=F64)
    with pytest.raises(gg.BatchCouplingError, match="statistics of the batch" if mixed.startswith("batch norm") and "hand" not in mixed else "other samples"):
        gg.input_sqnorms(model, x, **ask)  # type: ignore[arg-type]
    if isinstance(model, nn.Module) and any(isinstance(m, nn.BatchNorm1d) and m.track_running_stats for m in model.modules()):
        with pytest.raises(gg.BatchCouplingError, match=r"module '1' \(BatchNorm1d\)"):
            gg.input_sqnorms(model, x)
        assert not model[1].running_mean.any()  # type: ignore[index]
        gg.input_sqnorms(model.eval(), x, **ask)  # type: ignore[arg-type]


def test_attention_across_samples_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(gg.BatchCouplingError, match="other samples"):
        gg.input_sqnorms(Attending(), torch.randn(B, T, D, dtype=F64))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": lambda out, y: F.cross_entropy(out @ out.T, torch.arange(len(out))),
    "variance": lambda out, y: out.var(0).mean(),
    "tilted": lambda out, y: F.cross_entropy(out, y, reduction="none").logsumexp(0),
    "log of the mean": lambda out, y: F.cross_entropy(out, y).log(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_compare_samples_are_refused(net: tuple[nn.Module, Tensor], loss: str) -> None:
    model, x = net
    y = torch.tensor([0, 2, 1, 1])
    with pytest.raises(gg.BatchCouplingError, match="no sum over the samples"):
        gg.input_sqnorms(model, x, loss_fn=LOSSES[loss], target=y)


def test_vector_losses_that_compare_samples_are_refused(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    with pytest.raises(gg.BatchCouplingError, match="the loss of a sample"):
        gg.input_sqnorms(model, x, loss_fn=lambda out, _: F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_their_reduction(net: tuple[nn.Module, Tensor], reduction: str) -> None:
    """With class weights, a mean's shares are those of the weights."""
    model, x = net
    y, weight = torch.tensor([0, 2, 1, 1]), torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    single = torch.stack([torch.autograd.functional.jacobian(lambda x, t=t: F.cross_entropy(model(x), t), x[i]) for i, t in enumerate(y)])
    share = weight[y] * (len(y) / weight[y].sum() if reduction == "mean" else 1)
    loss = nn.CrossEntropyLoss(weight, reduction=reduction)
    got = gg.input_sqnorms(model, x, loss_fn=loss, target=y, reduction="mean" if reduction == "none" else reduction)
    torch.testing.assert_close(got, single.square().sum(1) * share**2, rtol=1e-11, atol=0)
    with pytest.raises(ValueError, match="reduction"):
        gg.input_sqnorms(model, x, loss_fn=nn.CrossEntropyLoss(reduction="sum"), target=y)


def test_arguments(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    with pytest.raises(ValueError, match="num_probes"):
        gg.input_sqnorms(model, x, num_probes=0)
    with pytest.raises(ValueError, match="num_probes"):
        gg.input_sqnorms(model, x, num_probes=2, loss_fn=loss_fn)
    with pytest.raises(TypeError, match="none of the inputs"):
        gg.input_sqnorms(model)
    with pytest.raises(TypeError, match="samples first"):
        gg.input_sqnorms(lambda x: model(x).sum(), x)
    with pytest.raises(TypeError, match="wrap"):
        gg.input_sqnorms(lambda x: (model(x),), x)
    with pytest.raises(ValueError, match="no elements"):
        gg.input_sqnorms(lambda x: x[:, :0], x)
    with pytest.raises(ValueError, match="autograd can follow"):
        gg.input_sqnorms(lambda x: model(x.detach()).detach(), x)
    with pytest.raises(ValueError, match="one loss per sample"):
        gg.input_sqnorms(model, x, loss_fn=lambda out, _: out)
    with pytest.raises(TypeError, match="a scalar loss must be a function of outputs"):
        gg.input_sqnorms(lambda x: model(x).T, x, loss_fn=lambda out, _: out.square().sum(), reduction="sum")
    assert gg.input_sqnorms(model, x[:1]).shape == (1,)
    x.requires_grad_()
    gg.input_sqnorms(model, x)
    assert x.grad is None and x.requires_grad


def test_empty_batches(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    assert gg.input_sqnorms(model, x[:0]).shape == (0,)
