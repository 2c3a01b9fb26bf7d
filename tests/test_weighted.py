"""Weighted and clipped sums of per-sample gradients, against sums over single-sample autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghostgrad as gg
from helpers import build, loop_grads, net, sample_losses, sqnorm
from models import CASES, Case

F64 = torch.float64


def gradient_error(got: Tensor | None, exact: Tensor, scale: Tensor) -> float:
    """Of a sum, relative to the size of its terms."""
    got = torch.zeros_like(exact) if got is None else got.to_dense().double()
    return ((got - exact).norm() / scale.clamp_min(1e-300)).item()


def group_of(groups: Any, name: str) -> str:
    return {None: "", "parameter": name, "module": name.rpartition(".")[0]}[groups] if not callable(groups) else groups(name)


def clipped_sums(grads: dict[str, Tensor], max_norm: float, groups: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """``{name: (sum of clipped gradients, norm of the terms)}``"""
    squares: dict[str, Tensor] = {}
    for name, g in grads.items():
        squares[group_of(groups, name)] = squares.get(group_of(groups, name), 0) + sqnorm(g)
    sums = {}
    for name, g in grads.items():
        factor = (max_norm / squares[group_of(groups, name)].sqrt()).clamp(max=1)
        terms = g * factor.view(-1, *(1,) * (g.dim() - 1))
        sums[name] = terms.sum(0), sqnorm(terms).sqrt().sum()
    return sums


def median_norm(grads: dict[str, Tensor]) -> float:
    return sum(map(sqnorm, grads.values())).sqrt().median().item()


@pytest.mark.filterwarnings("ignore:.*no fused rule")
@pytest.mark.parametrize("memory", [1 << 40, 0], ids=["book-keeping", "two-passes"])
@pytest.mark.parametrize("groups", [None, "module"], ids=["flat", "module"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clipped_gradients_equal_the_loop(case: Case, groups: Any, memory: int) -> None:
    model, inputs, target = build(case, F64)
    grads = loop_grads(model, inputs, target)
    max_norm = median_norm(grads) if groups is None else median_norm(grads) / 3
    with gg.tap(model) as tap:
        losses = sample_losses(model(*inputs), target)
        gg.clipped_backward(losses, tap, max_norm, groups=groups, memory=memory)
    for name, (exact, scale) in clipped_sums(grads, max_norm, groups).items():
        assert gradient_error(model.get_parameter(name).grad, exact, scale) < 1e-10, name
    exact_norms = sum(map(sqnorm, grads.values()))
    torch.testing.assert_close(tap.sqnorms(), exact_norms, rtol=1e-9, atol=1e-300)


def weighted_sums(grads: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    return {name: torch.tensordot(weights.double(), g, 1) for name, g in grads.items()}


@pytest.mark.filterwarnings("ignore:.*no fused rule")
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_given_weights(case: Case, dtype: torch.dtype) -> None:
    model, inputs, target = build(case, dtype)
    weights = torch.linspace(-1, 2, len(target))
    exact = weighted_sums(grads := loop_grads(model, inputs, target), weights)
    with gg.tap(model, by_param=True) as tap:
        used = gg.weighted_backward(sample_losses(model(*inputs), target), tap, weights)
    assert used.equal(weights)
    tolerance = 1e-10 if dtype == F64 else 2e-5
    for name, sum_ in exact.items():
        assert gradient_error(model.get_parameter(name).grad, sum_, sqnorm(grads[name]).sqrt().sum()) < tolerance, name
        norms = tap.sqnorms(by_param=True)[name]
        torch.testing.assert_close(norms.double(), sqnorm(grads[name]), rtol=tolerance * 5, atol=float(sqnorm(grads[name]).sum() * tolerance + 1e-300))


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_weights_are_a_function_of_the_norms(memory: int) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    norms = sum(map(sqnorm, grads.values()))
    with gg.tap(model) as tap:
        used = gg.weighted_backward(sample_losses(model(x), y), tap, lambda sqnorms: (sqnorms < sqnorms.median()).to(sqnorms), memory=memory)
    torch.testing.assert_close(used, (norms < norms.median()).double())
    for name, exact in weighted_sums(grads, used).items():
        torch.testing.assert_close(model.get_parameter(name).grad, exact, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(tap.sqnorms(), norms)


@pytest.mark.parametrize("memory", [1 << 40, 0])
@pytest.mark.parametrize("groups", ["parameter", "module", lambda name: name.split(".")[-1]], ids=["parameter", "module", "kind"])
def test_each_group_has_weights_of_its_own(groups: Any, memory: int) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    with gg.tap(model) as tap:
        used = gg.weighted_backward(sample_losses(model(x), y), tap, lambda norms: {k: v.rsqrt() for k, v in norms.items()}, groups=groups, memory=memory)
    for name, g in grads.items():
        members = [sqnorm(other) for n, other in grads.items() if group_of(groups, n) == group_of(groups, name)]
        weights = sum(members).rsqrt()
        torch.testing.assert_close(used[group_of(groups, name)], weights)
        torch.testing.assert_close(model.get_parameter(name).grad, torch.tensordot(weights, g, 1), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_automatic_clipping(memory: int) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    norms = sum(map(sqnorm, grads.values())).sqrt()
    with gg.tap(model) as tap:
        factors = gg.clipped_backward(sample_losses(model(x), y), tap, 2.0, automatic=True, stability=0.1, memory=memory)
    torch.testing.assert_close(factors, 2 / (norms + 0.1))
    for name, exact in weighted_sums(grads, factors).items():
        torch.testing.assert_close(model.get_parameter(name).grad, exact, rtol=1e-11, atol=1e-14)


def test_limits_of_groups() -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    limits = {"0": 0.3, "2": 1.5}
    with gg.tap(model) as tap:
        gg.clipped_backward(sample_losses(model(x), y), tap, limits, groups="module")
    for name, g in grads.items():
        layer = name.split(".")[0]
        norms = (sqnorm(grads[f"{layer}.weight"]) + sqnorm(grads[f"{layer}.bias"])).sqrt()
        exact = torch.tensordot((limits[layer] / norms).clamp(max=1), g, 1)
        torch.testing.assert_close(model.get_parameter(name).grad, exact, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_gradients_are_added_and_others_left_alone(memory: int) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with gg.tap(model, params=["0.weight", "0.bias"]) as tap:
        factors = gg.clipped_backward(sample_losses(model(x), y), tap, 0.1, memory=memory)
    torch.testing.assert_close(factors, (0.1 / (sqnorm(grads["0.weight"]) + sqnorm(grads["0.bias"])).sqrt()).clamp(max=1))
    for name, exact in weighted_sums(grads, factors).items():
        torch.testing.assert_close(model.get_parameter(name).grad, 1 + exact if name.startswith("0") else torch.ones_like(exact), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_checkpointed(memory: int) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x, y = net()
    grads = loop_grads(model, (x,), y)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    with gg.tap(Checkpointed()) as tap:
        factors = gg.clipped_backward(sample_losses(tap._module(x), y), tap, 0.1, memory=memory)
    for name, exact in weighted_sums(grads, factors).items():
        torch.testing.assert_close(model.get_parameter(name).grad, exact, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_a_second_step_in_the_same_block(memory: int) -> None:
    model, x, y = net()
    grads = loop_grads(model, (x,), y)
    with gg.tap(model) as tap:
        for _ in range(2):
            model.zero_grad()
            factors = gg.clipped_backward(sample_losses(model(x), y), tap, 0.1, memory=memory)
            for name, exact in weighted_sums(grads, factors).items():
                torch.testing.assert_close(model.get_parameter(name).grad, exact, rtol=1e-11, atol=1e-14)


class Sampled(nn.Module):
    """A layer on single positions whose weight has another use, and whose bias is reached around it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.other = way, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.other(torch.tanh(self.layer(x)))
        if self.way == "tied":
            out = out @ self.layer.weight.T + self.layer.bias.tanh()
        return out


@pytest.mark.filterwarnings("ignore:.*no fused rule")
@pytest.mark.parametrize("memory", [1 << 40, 0])
@pytest.mark.parametrize("groups", [None, "parameter"])
def test_layers_with_other_uses(memory: int, groups: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Sampled("tied").double(), torch.randn(5, 6, dtype=F64), torch.randn(5, dtype=F64)
    grads = loop_grads(model, (x,), y)
    with gg.tap(model) as tap:
        gg.clipped_backward(sample_losses(model(x), y), tap, 0.05, groups=groups, memory=memory)
    for name, (exact, scale) in clipped_sums(grads, 0.05, groups).items():
        assert gradient_error(model.get_parameter(name).grad, exact, scale) < 1e-11, name


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_what_comes_around_the_tap_is_refused(memory: int) -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        out = model(x)
        with torch._C.DisableTorchFunction():  # as an extension's kernel would be
            out = out + model[2].bias
        with pytest.raises(gg.UnsupportedUseError, match="'2.bias' received a gradient that did not pass through the tap"):
            gg.clipped_backward(sample_losses(out, y), tap, 1.0, memory=memory)
    assert all(p.grad is None for p in model.parameters())


def test_what_comes_around_a_layer_that_the_loss_does_not_use_is_refused() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        model(x)
        hidden = model[0](x)
        with torch._C.DisableTorchFunction():
            hidden = hidden[:, :3] + model[2].bias
        with pytest.raises(gg.UnsupportedUseError, match="'2.bias' received a gradient that did not pass through the tap"):
            gg.clipped_backward(sample_losses(hidden, y), tap, 1.0)


def test_a_loss_of_the_batch_is_no_loss_of_each_sample() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        losses = sample_losses(model(x), y)
        for mixed in (losses.mean().expand(5), losses - losses.mean(), losses.softmax(0), losses.cumsum(0)):
            with pytest.raises(gg.GhostgradError):
                gg.weighted_backward(mixed, tap, torch.ones(5))


def test_no_weight_gradient_is_formed_before_the_weights_are_known() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        losses = sample_losses(model(x), y)
        with torch.profiler.profile(record_shapes=True) as profile:
            gg.clipped_backward(losses, tap, 1.0)
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert len(products) == 3  # the two weight gradients, and the gradient of the one hidden layer


def test_hooks_of_parameters_see_the_clipped_gradient() -> None:
    model, x, y = net()
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for memory in (1 << 40, 0):
        model.zero_grad()
        with gg.tap(model) as tap:
            gg.clipped_backward(sample_losses(model(x), y), tap, 0.1, memory=memory)
        assert seen.pop().equal(model[0].weight.grad) and not seen


def test_sparse_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(11, (5, 3)), torch.randn(5, dtype=F64)
    grads = loop_grads(model, (x,), y)
    with gg.tap(model) as tap:
        factors = gg.clipped_backward(sample_losses(model(x), y), tap, 0.1)
    assert model[0].weight.grad.is_sparse
    for name, exact in weighted_sums(grads, factors).items():
        torch.testing.assert_close(model.get_parameter(name).grad.to_dense(), exact, rtol=1e-11, atol=1e-14)


def test_mixed_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 4))
    x, y = torch.randn(8, 40), torch.randn(8)
    exact: dict[str, Tensor] = {}
    names = [name for name, _ in model.named_parameters()]
    with gg.tap(model) as tap, torch.autocast("cpu", torch.bfloat16):
        factors = gg.clipped_backward(sample_losses(model(x).float(), y), tap, 0.05)
    for i in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            (loss,) = sample_losses(model(x[i : i + 1]).float(), y[i : i + 1])
        for name, g in zip(names, torch.autograd.grad(loss, list(model.parameters()))):
            exact[name] = exact.get(name, 0) + factors[i] * g
    assert factors.max() < 1
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert ((p.grad - exact[name]).norm() / exact[name].norm()).item() < 1e-2


def test_zero_and_infinite_gradients() -> None:
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    with gg.tap(model) as tap:
        factors = gg.clipped_backward(model(x).squeeze(1), tap, 1.0)
    assert factors.tolist() == [1.0, pytest.approx(0.2)]
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    model.zero_grad()
    with gg.tap(model) as tap:
        gg.clipped_backward(model(torch.tensor([[float("inf"), 0.0], [3.0, 4.0]])).squeeze(1), tap, 1.0)
    assert model.weight.grad.isnan().any()


def test_wrong_use_is_an_error() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        out = model(x)
        with pytest.raises(ValueError, match=r"losses must be one loss for each of the 5 samples, \(5,\), got \(\)"):
            gg.clipped_backward(sample_losses(out, y).mean(), tap, 1.0)
        with pytest.raises(ValueError, match="max_norm must be positive and finite, got 0"):
            gg.clipped_backward(sample_losses(out, y), tap, 0.0)
        with pytest.raises(ValueError, match="max_norm has an entry for each group, but groups is None"):
            gg.clipped_backward(sample_losses(out, y), tap, {"0": 1.0})
        with pytest.raises(ValueError, match="stability must be positive and finite, got -1"):
            gg.clipped_backward(sample_losses(out, y), tap, 1.0, automatic=True, stability=-1)
        with pytest.raises(ValueError, match="groups must be None, 'parameter', 'module' or a function of a parameter's name, got 'layer'"):
            gg.clipped_backward(sample_losses(out, y), tap, 1.0, groups="layer")
        with pytest.raises(ValueError, match=r"weights must be one number for each sample, \(5,\), got \(4,\)"):
            gg.weighted_backward(sample_losses(out, y), tap, torch.ones(4))
        with pytest.raises(ValueError, match="weights has no entry for the group '2'; it has '0'"):
            gg.weighted_backward(sample_losses(out, y), tap, {"0": torch.ones(5)}, groups="module")
        with pytest.raises(ValueError, match="losses do not depend on a parameter"):
            gg.weighted_backward(torch.ones(5), tap, torch.ones(5))
        with gg.tap(model), pytest.raises(gg.TapStateError, match="more than one tap's block is open"):
            gg.weighted_backward(sample_losses(out, y), tap, torch.ones(5))
        with pytest.raises(gg.UnsupportedUseError, match=r"losses\[i\] must be the loss of sample i"):
            gg.weighted_backward(sample_losses(out, y).flip(0), tap, torch.ones(5))
        losses = sample_losses(out, y)
        losses.sum().backward(retain_graph=True)
        with pytest.raises(gg.TapStateError, match="the losses were differentiated before"):
            gg.clipped_backward(losses, tap, 1.0)
    with pytest.raises(gg.TapStateError, match="call it inside the tap's block"):
        gg.clipped_backward(losses, tap, 1.0)
    with gg.tap(model) as tap, pytest.raises(ValueError, match="max_norm has no entry for the group '2'; it has '0'"):
        gg.clipped_backward(sample_losses(model(x), y), tap, {"0": 1.0}, groups="module")


def test_samples_that_are_mixed_are_refused() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        out = model(x)
        with pytest.raises(gg.GhostgradError):
            gg.clipped_backward(sample_losses(out - out.mean(0), y), tap, 1.0)


@pytest.mark.slow
def test_compiled_models_are_refused() -> None:
    model, x, y = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with gg.tap(compiled) as tap:
        losses = sample_losses(compiled(x), y)
        with pytest.raises(gg.TapStateError, match="compiled code ran inside the block"):
            gg.clipped_backward(losses, tap, 1.0)


def test_backward_of_a_layer_that_was_not_reached() -> None:
    model, x, y = net()
    with gg.tap(model) as tap:
        model(x)  # says how many samples there are
        losses = sample_losses(model[0](x), y)
        factors = gg.clipped_backward(losses, tap, 0.1)
    assert factors.shape == (5,) and model[2].weight.grad is None
