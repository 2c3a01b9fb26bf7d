"""Private training with Opacus' optimiser and accountant, against Opacus alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ghostgrad as gg
from ghostgrad.private import make_private, private_backward

opacus = pytest.importorskip("opacus")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus says that its generator is not secure, and that its hooks miss inputs without gradient
        yield


def digits(samples: int = 400) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:samples] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:samples]))


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def with_opacus(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], noise: float, epochs: int) -> float:
    engine = opacus.PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=0.7, rand_on_empty=False
    )
    torch.manual_seed(1)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=1e-5) if noise else float("inf")


def with_ours(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], noise: float, epochs: int, **options: Any) -> float:
    accountant = opacus.PrivacyEngine().accountant
    private, loader = make_private(accountant, optimizer, loader, noise_multiplier=noise, max_norm=0.7)
    torch.manual_seed(1)
    for _ in range(epochs):
        for x, y in loader:
            private.zero_grad()
            with gg.tap(model) as tap:
                private_backward(F.cross_entropy(model(x), y, reduction="none"), tap, private, **options)
            private.step()
    return accountant.get_epsilon(delta=1e-5) if noise else float("inf")


def optimizer_of(model: nn.Module, adam: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2) if adam else torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


@pytest.mark.parametrize("memory", [1 << 40, 0], ids=["book-keeping", "two-passes"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_without_noise_the_weights_are_those_of_opacus(kind: str, memory: int) -> None:
    ours, theirs = model_of(kind), model_of(kind)
    start = copy.deepcopy(ours.state_dict())
    loader = DataLoader(digits(), batch_size=50)
    with_opacus(theirs, optimizer_of(theirs, False), loader, 0.0, 2)
    with_ours(ours, optimizer_of(ours, False), loader, 0.0, 2, memory=memory)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=name)
        assert (p - start[name]).abs().max() > 1e-2  # they have been trained


@pytest.mark.parametrize("adam", [False, True])
def test_epsilon_is_that_of_opacus(adam: bool) -> None:
    ours, theirs = model_of("mlp"), model_of("mlp")
    loader = DataLoader(digits(), batch_size=50)
    epsilon = with_opacus(theirs, optimizer_of(theirs, adam), loader, 1.1, 2)
    assert with_ours(ours, optimizer_of(ours, adam), loader, 1.1, 2) == epsilon
    assert 0 < epsilon < 100


def test_private_training_learns() -> None:
    model = model_of("mlp")
    data = digits(1500)
    with_ours(model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader(data, batch_size=150), 0.8, 12)
    x, y = data.tensors
    assert (model(x).argmax(1) == y).float().mean() > 0.7


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    model = nn.Linear(200, 300)
    private, _ = make_private(
        opacus.accountants.RDPAccountant(),
        torch.optim.SGD(model.parameters(), lr=1.0),
        DataLoader(TensorDataset(torch.zeros(64, 200), torch.zeros(64)), batch_size=16),
        noise_multiplier=2.0,
        max_norm=0.5,
    )
    before = model.weight.detach().clone()
    with gg.tap(model) as tap:
        factors = private_backward(model(torch.zeros(16, 200)).sum(1) * 0, tap, private)
    private.step()
    assert factors.equal(torch.ones(16))
    assert ((model.weight - before).std() * 16).item() == pytest.approx(1.0, rel=0.02)


def test_an_empty_batch_gets_noise_alone() -> None:
    model = model_of("mlp")
    private, _ = make_private(
        opacus.accountants.RDPAccountant(), torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(digits(), batch_size=50), noise_multiplier=1.0, max_norm=1.0
    )
    before = copy.deepcopy(model.state_dict())
    x = torch.zeros(0, 1, 8, 8)
    with gg.tap(model) as tap:
        assert private_backward(F.cross_entropy(model(x), torch.zeros(0, dtype=torch.long), reduction="none"), tap, private).shape == (0,)
    private.step()
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_what_would_not_be_private_is_refused() -> None:
    model = model_of("mlp")
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(digits(), batch_size=50)
    accountant = opacus.accountants.RDPAccountant()
    private, _ = make_private(accountant, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0, max_norm=1.0)
    x, y = digits(8).tensors
    with gg.tap(model, params=["1.weight"]) as tap, pytest.raises(ValueError, match=r"changes 3 parameter\(s\) that the tap does not see"):
        private_backward(F.cross_entropy(model(x), y, reduction="none"), tap, private)
    normalised = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    private, _ = make_private(accountant, torch.optim.SGD(normalised.parameters(), lr=0.1), loader, noise_multiplier=1.0, max_norm=1.0)
    with gg.tap(normalised) as tap, pytest.raises(gg.BatchCouplingError):
        private_backward(F.cross_entropy(normalised(x), y, reduction="none"), tap, private)
    for options in ({"noise_multiplier": -1.0, "max_norm": 1.0}, {"noise_multiplier": 1.0, "max_norm": 0.0}):
        with pytest.raises(ValueError, match="make_private: "):
            make_private(accountant, torch.optim.SGD(model.parameters(), lr=0.1), loader, **options)
