"""The minima settings: path norms by enumeration, shifted images, the shared cell against its equations, norms by layer against autograd, tiny runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ghostgrad.papers.image_setting import built, perceptron
from ghostgrad.papers.images import ImageDataError
from ghostgrad.papers.minima import BadMinima, SharedAttention, _Unit, path_norm, shifted
from ghostgrad.training import Clock, Setting, train

CPU = torch.device("cpu")
BAD = BadMinima(
    num_seeds=2, train_images=64, width=16, batch=16, copies=1, confuse_epochs=10, epochs=30, target=0.2, regularised_epochs=2, probes=2, test_share=0.9
)
DIA = SharedAttention(num_seeds=2, train_images=64, width=8, depth=3, batch=16, epochs=2, probes=2, test_share=0.9)


def test_path_norm_is_the_sum_over_all_paths() -> None:
    model = built(0, lambda: perceptron([3, 4, 2, 2]), CPU)
    assert isinstance(model, nn.Sequential)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    w, b = [layer.weight.detach().numpy() for layer in linear], [layer.bias.detach().numpy() for layer in linear]
    total = sum((w[2][o, k] * w[1][k, j] * w[0][j, i]) ** 2 for o, k, j, i in itertools.product(range(2), range(2), range(4), range(3)))
    total += sum((w[2][o, k] * w[1][k, j] * b[0][j]) ** 2 for o, k, j in itertools.product(range(2), range(2), range(4)))
    total += sum((w[2][o, k] * b[1][k]) ** 2 for o, k in itertools.product(range(2), range(2))) + (b[2] ** 2).sum()
    assert path_norm(model) == pytest.approx(math.sqrt(total), rel=1e-12)
    with torch.no_grad():  # a unit's inputs times c, its outputs by c: the same function
        linear[0].weight[1] *= 3
        linear[0].bias[1] *= 3
        linear[1].weight[:, 1] /= 3
    assert path_norm(model) == pytest.approx(math.sqrt(total), rel=1e-12)


def test_shifted_images_are_shifts_and_depend_on_seed_and_step_alone() -> None:
    x = torch.randn(40, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = shifted(x, 3, 7)
    assert torch.equal(moved, shifted(x, 3, 7))
    assert not torch.equal(moved, shifted(x, 3, 8))
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1), value=x.min().item())
    windows = {(i, j): wide[:, :, i : i + 5, j : j + 4] for i in range(3) for j in range(3)}
    found = [[where for where, window in windows.items() if torch.equal(window[n], moved[n])] for n in range(40)]
    assert all(len(where) == 1 for where in found)
    assert len({where[0] for where in found}) == 9


def test_the_bad_start_fits_random_labels_and_plain_training_stops_at_the_target() -> None:
    setting = replace(BAD, confuse_epochs=300, confuse_lr=0.1)
    data = setting.splits(CPU, 16)(0)
    model = built(0, lambda: perceptron([64, 64, 64, 10]), CPU)
    assert setting.confused(model, data.x, 10, 0, lambda: None) >= 0.999
    trained, epochs = setting.trained(model, data.x, data.y, 0, False, lambda: None)
    with torch.no_grad():
        logits = trained(data.x)
    assert cross_entropy(logits, data.y) <= 0.2
    assert bool((logits.argmax(1) == data.y).all())
    assert 0 < epochs < 30


def test_the_shared_cell_by_its_equations() -> None:
    unit = built(1, lambda: _Unit(8), CPU)
    a, h, c = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    new_h, new_c = unit(a, h, c)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def gates(name: str, x: np.ndarray) -> np.ndarray:
        p = {key: value.detach().numpy() for key, value in unit.get_submodule(name).named_parameters()}
        return np.maximum(x @ p["0.weight"].T + p["0.bias"], 0) @ p["2.weight"].T + p["2.bias"]

    i, f, g, o = np.split(gates("of_input", a.numpy()) + gates("of_state", h.numpy()), 4, axis=1)
    expected = sigmoid(f) * c.numpy() + sigmoid(i) * np.tanh(g)
    np.testing.assert_allclose(new_c.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(new_h.detach().numpy(), sigmoid(o) * sigmoid(expected), rtol=1e-12)


@pytest.mark.parametrize("body", SharedAttention.BODIES)
def test_norms_by_layer_against_autograd_one_sample_at_a_time(body: str) -> None:
    data = replace(DIA, train_images=16).splits(CPU, 16)(0)
    model = DIA.network(f"{body}, DIA", data, 0, CPU)
    measured = DIA.by_layer(model, data, Clock())
    model.train()
    for norm in model.norms:
        if isinstance(norm, nn.BatchNorm1d):
            norm.momentum = None  # cumulative: the statistics of the one batch
            norm.reset_running_stats()
    with torch.no_grad():
        model(data.x)
    model.eval()
    expected = np.zeros(DIA.depth)
    weights = [layer.weight for layer in model.layers]
    for k in range(len(data.y)):
        grads = torch.autograd.grad(cross_entropy(model(data.x[k : k + 1]), data.y[k : k + 1]), weights)  # type: ignore[arg-type]
        expected += np.array([g.square().sum().item() for g in grads]) / len(data.y)
    np.testing.assert_allclose(measured, expected, rtol=1e-10)


def test_both_units_start_from_the_same_weights() -> None:
    data = DIA.splits(CPU, 16)(0)
    plain, unit = (DIA.network(f"whole, {name}", data, 0, CPU).state_dict() for name in DIA.UNITS)
    assert plain.keys() < unit.keys()
    assert all(torch.equal(value, unit[key]) for key, value in plain.items())


@pytest.mark.parametrize("setting", [BAD, DIA], ids=lambda setting: setting.name)
def test_a_tiny_run(setting: Setting, tmp_path: Path) -> None:
    outcome = train(setting, tmp_path / "run", progress=False)
    assert (tmp_path / f"run/figures/{setting.name.replace('/', '-')}.png").exists()
    assert len(outcome.verdicts) == len(setting.claims())
    frame = pd.read_csv(tmp_path / "run/metrics.csv")
    assert sorted(frame["seed"].unique()) == [0, 1]
    assert frame["accuracy"].between(0, 1).all()
    run = setting.start(CPU, False)  # a cell alone is what it is among the others
    run.advance(len(frame["step"].unique()) - 1, len(frame["step"].unique()), lambda: None)
    alone = run.read(0).rows[-1]
    for column, value in alone.items():
        expected = frame.iloc[-1][column]
        assert value == expected or (math.isnan(value) and math.isnan(expected)), column


def test_rules() -> None:
    with pytest.raises(ValueError, match="minima/bad-global-minima: zeroed must be at least 0 and below 1, got 1.0"):
        BadMinima(zeroed=1.0)
    with pytest.raises(ValueError, match="minima/dia-unit: depth must be at least 2, got 1"):
        SharedAttention(depth=1)
    with pytest.raises(ImageDataError, match="a batch is to have 16 images, there are 10 to train on"):
        replace(BAD, train_images=10).start(CPU, False)
