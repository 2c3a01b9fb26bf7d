"""The empirical neural tangent kernel, against Jacobians by autograd in float64, one sample and one output at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ghostgrad as gg
from helpers import build, net
from models import CASES, Case, Lambda

F64 = torch.float64


def jacobians(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """``{name: (K, B, elements)}``"""
    model = copy.deepcopy(model).double()
    cast = [t.double() if t.is_floating_point() else t for t in inputs]
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    table: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for i in range(len(inputs[0])):
        out = model(*(t[i : i + 1] for t in cast)).flatten()
        rows = [torch.autograd.grad(o, parameters, allow_unused=True, retain_graph=True) for o in out]
        for name, p, column in zip(names, parameters, zip(*rows)):
            table[name].append([torch.zeros(p.numel(), dtype=F64) if g is None else g.to_dense().flatten() for g in column])
    return {name: torch.stack([torch.stack(r) for r in column]).transpose(0, 1) for name, column in table.items()}


class FirstOutputs(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs).flatten(1)[:, :2]


@pytest.mark.filterwarnings("ignore:.*no fused rule")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_those_of_the_jacobians(case: Case) -> None:
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-5)):
        inner, inputs, _ = build(case, dtype)
        model = FirstOutputs(inner)
        exact = {name: torch.einsum("kin,kjn->kij", j, j) for name, j in jacobians(model, inputs).items()}
        kernels = gg.gram(model, inputs, by_param=True, per_output=True)
        scale = max(k.abs().max().item() for k in exact.values())
        assert set(kernels) == set(exact)
        if scale < 1e-20:
            continue  # these outputs do not depend on the parameters: what is left is rounding
        for name, kernel in kernels.items():
            assert kernel.dtype == F64 and kernel.shape == exact[name].shape
            assert ((kernel - exact[name]).abs().max() / max(exact[name].abs().max().item(), 1e-6 * scale)).item() < tolerance, name


def test_the_sum_over_outputs_and_parameters() -> None:
    model, x, _ = net()
    j = torch.cat(list(jacobians(model, (x,)).values()), 2)
    exact = torch.einsum("kin,kjn->kij", j, j)
    kernel = gg.gram(model, x)
    torch.testing.assert_close(kernel, exact.sum(0))
    torch.testing.assert_close(gg.gram(model, x, per_output=True), exact)
    torch.testing.assert_close(kernel.diagonal(), gg.output_sqnorms(model, x))
    assert kernel.equal(kernel.mT)
    by_param = gg.gram(model, x, by_param=True)
    assert list(by_param) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(sum(by_param.values()), kernel)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("block_size", [None, 1, 2, 4, 5])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_two_sets_and_blocks(kind: str, block_size: int | None) -> None:
    torch.manual_seed(0)
    if kind == "mlp":
        model, x, x2 = net()[0], torch.randn(5, 7, dtype=F64), torch.randn(3, 7, dtype=F64)
    else:
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 2)).double()
        x, x2 = torch.randn(5, 2, 7, 7, dtype=F64), torch.randn(3, 2, 7, 7, dtype=F64)
    j, j2 = (torch.cat(list(jacobians(model, (t,)).values()), 2) for t in (x, x2))
    torch.testing.assert_close(gg.gram(model, x, x2, block_size=block_size), torch.einsum("kin,kjn->ij", j, j2))
    torch.testing.assert_close(gg.gram(model, x, x2, block_size=block_size, per_output=True), torch.einsum("kin,kjn->kij", j, j2))
    own = gg.gram(model, x, block_size=block_size)
    torch.testing.assert_close(own, torch.einsum("kin,kjn->ij", j, j))
    assert own.equal(own.mT)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 6), Lambda(lambda m, h: torch.tanh(h @ m.w), w=(6, 5)), nn.Flatten(), nn.Linear(20, 2)).double()
    x = torch.randint(13, (7, 4))
    whole = gg.gram(model, x)
    monkeypatch.setattr(sys.modules["ghostgrad.gram"], "_PIECE", 4 * 7 * 8)
    monkeypatch.setattr(sys.modules["ghostgrad.gram"], "_STRIP", 3)
    torch.testing.assert_close(gg.gram(model, x), whole)


def test_semidefinite_to_rounding() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 1)), torch.randn(200, 5)
    x[100:] = x[:100]  # half of the eigenvalues are zero
    eigenvalues = torch.linalg.eigvalsh(gg.gram(model, x))
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]


def test_losses_and_other_calls() -> None:
    model, x, y = net()
    kernel = gg.gram(lambda x, y: (model(x).sum(1) - y).square(), (x, y), params=dict(model.named_parameters()))
    grads = []
    for i in range(5):
        loss = (model(x[i]).sum() - y[i]).square()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(grads)
    torch.testing.assert_close(kernel, g @ g.mT)
    named = gg.gram(lambda inputs, target: (model(inputs).sum(1) - target).square(), {"inputs": x, "target": y}, params=list(model.parameters()))
    torch.testing.assert_close(named, kernel)


def test_wrong_use_is_an_error() -> None:
    model, x, _ = net()
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        gg.gram(model, x, block_size=0)
    with pytest.raises(TypeError, match="the model must return a tensor of numbers with the 5 samples first"):
        gg.gram(nn.Sequential(model, Lambda(lambda m, h: h.sum())), x)
    with pytest.raises(ValueError, match=r"must have the same shape, got \(7,\) and \(3,\)"):
        gg.gram(model, x, x[:, :3])
    with pytest.raises(ValueError, match="same structure"):
        gg.gram(model, x, (x, x))
    with pytest.raises(TypeError, match="x must be a tensor with the samples first"):
        gg.gram(model, 3)
    with pytest.raises(gg.BatchCouplingError):
        gg.gram(nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 2)).double(), x)
