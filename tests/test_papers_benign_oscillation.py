"""Benign oscillation: the network and one step against their formulas, what a step does to both features, a tiny run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ghostgrad as gg
from ghostgrad.papers.benign_oscillation import BenignOscillation, PatchNet
from ghostgrad.training import train

SETTING = BenignOscillation(dim=12, samples=10, units=3, steps=40, follow_from=5, follow_to=20, read_every=20, num_seeds=2)


def test_network_and_its_gradient_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 12)), rng.standard_normal((4, 3, 12))
    model = PatchNet(torch.from_numpy(w.copy()))
    a = [1, 1, 1, -1, -1, -1]
    outputs = [sum(a[j] * max(w[j] @ patch, 0) ** 2 for j in range(6) for patch in sample) for sample in x]
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach(), outputs)
    norms = [sum(np.square(sum(2 * max(w[j] @ patch, 0) * patch for patch in sample)).sum() for j in range(6)) for sample in x]
    np.testing.assert_allclose(gg.output_sqnorms(model, torch.from_numpy(x)), norms)


def test_features_are_orthogonal_and_only_strong_samples_have_v() -> None:
    data = SETTING.data(3)
    u, v = SETTING.features()
    products = data.x @ torch.stack([u, v]).T  # (n, 3, 2)
    assert data.strong.sum() == 9
    np.testing.assert_allclose(products[:, 0, 0], data.y * 0.16)
    np.testing.assert_allclose(products[:, 1, 1], data.y * data.strong * 4)
    assert products[:, [0, 0, 1, 2, 2], [1, 1, 0, 0, 1]].abs().max() == 0
    assert (data.test_x @ v).abs().max() == 0


@pytest.mark.parametrize("arm", BenignOscillation().arms())
def test_a_step_multiplies_both_features(arm: str) -> None:
    """By ``1 + 2 lr |u|^2 r`` and, on strong samples, ``1 + 2 lr |v|^2 r``, for units of the label's sign; and the sums hold what they say."""
    data = SETTING.data(3)
    trainee = SETTING.trainee(arm, 3, data)
    model, (lr, noise) = trainee.model, SETTING.arms()[arm]
    assert isinstance(model, PatchNet)
    u, v = SETTING.features()
    squares, logs, kicks = [0.0, 0.0], [0.0, 0.0], set()
    for k in range(SETTING.follow_to + 1):
        before, outputs = model.hidden.weight.detach().clone(), model(data.x).detach()
        trainee.step(k)
        after = model.hidden.weight.detach()
        seen = [
            i
            for i in range(10)  # whose step it can have been: a multiple of the sample's noise is in the change
            if torch.linalg.matrix_rank(torch.cat([after - before, data.x[i]]), atol=1e-9) <= 3
        ]
        (i,) = seen
        y = data.y[i]
        own = (model.a == y) & (y * (before @ u) > 0)
        r = ((y * (after @ u))[own] / (y * (before @ u))[own]).sub(1).div(2 * lr * 0.16)
        assert r.max() - r.min() < 1e-9
        r = r[0].item()
        kicks.add(round(r - (1 - y * outputs[i]).item(), 9))
        if data.strong[i]:
            mine = (model.a == y) & (y * (before @ v) > 0)
            torch.testing.assert_close((after @ v)[mine], (before @ v)[mine] * (1 + 8 * lr * r))
        if SETTING.follow_from <= k < SETTING.follow_to:
            (squares if data.strong[i] else logs)[int(y < 0)] += r**2 if data.strong[i] else math.log1p(2 * lr * 0.16 * r)
    assert kicks == ({0.0} if noise == 0 else {round(noise, 9), round(-noise, 9)})
    np.testing.assert_allclose(model.sums, [squares, logs], atol=1e-9)


def test_a_tiny_run(tmp_path: Path) -> None:
    outcome = train(SETTING, tmp_path, progress=False)
    frame = outcome.metrics
    assert len(outcome.verdicts) == len(SETTING.claims())
    assert set(frame["arm"]) == set(SETTING.arms())
    quiet = frame[(frame["arm"] == "small lr") & (frame["step"] == 40)]
    np.testing.assert_allclose(quiet["peak_strong"], frame[(frame["arm"] == "small lr") & (frame["step"] >= 5)].groupby("seed")["unstable_strong"].max())
    assert (tmp_path / "figures" / "sgd-noise-benign-oscillation.png").exists()


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps and the readings sum up, and the peaks, are in the checkpoint."""
    setting = dataclasses.replace(SETTING, num_seeds=1)
    train(setting, tmp_path / "whole", progress=False)
    measure, calls = BenignOscillation.measure, iter(range(1000))

    def interrupted(self: BenignOscillation, *args: Any) -> dict[str, float]:
        if next(calls) == 4 * 6 + 2:  # in the last reading; the one before it, at step 20, is the checkpoint
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(BenignOscillation, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(setting, tmp_path / "stopped", progress=False)
    monkeypatch.undo()
    train(setting, tmp_path / "stopped", progress=False, resume=True)
    assert (tmp_path / "stopped" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_rules() -> None:
    with pytest.raises(ValueError, match=r"small_lr must be positive and below lr=0.15, got 0.2"):
        BenignOscillation(small_lr=0.2)
