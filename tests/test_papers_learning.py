"""The learning settings: every proximal map against brute force, penalties written out, what is forgotten, what is chosen, tiny runs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import binary_cross_entropy

from ghostgrad.papers.image_setting import built, perceptron
from ghostgrad.papers.images import ImageDataError
from ghostgrad.papers.learning import PROX, RehearsalFree, SparseGroupLasso, _own_classes, _Past, prox_l1_minus_l2
from ghostgrad.training import Clock, Setting, train

CPU = torch.device("cpu")
REHEARSAL = RehearsalFree(num_seeds=2, train_images=100, width=8, batch=8, epochs=2, pretrain_epochs=1, test_share=0.8)
SPARSE = SparseGroupLasso(num_seeds=2, train_images=100, width=8, batch=50, epochs=5, lambdas=2, test_share=0.8)


def penalised(name: str, v: np.ndarray, w: np.ndarray, mu: float) -> np.ndarray:
    """The objective of each row of v, (n,)."""
    penalty = {
        "l1": np.abs(v).sum(-1),
        "l0": (v != 0).sum(-1),
        "transformed l1": (2 * np.abs(v) / (1 + np.abs(v))).sum(-1),
        "l1 - l2": np.abs(v).sum(-1) - np.sqrt((v**2).sum(-1)),
    }[name]
    return 0.5 * ((v - w) ** 2).sum(-1) + mu * penalty


@pytest.mark.parametrize("mu", [0.02, 0.2, 0.25, 0.3, 1.5])
@pytest.mark.parametrize("name", ["l1", "l0", "transformed l1"])
def test_prox_of_single_weights_against_a_fine_grid(name: str, mu: float) -> None:
    w = torch.linspace(-3, 3, 241, dtype=torch.float64)
    ours = PROX[name](w, mu)
    grid = np.linspace(-3.5, 3.5, 70_001)
    grid = np.append(grid, 0.0)[:, None]
    for k in range(len(w)):
        found = penalised(name, grid, w[k : k + 1].numpy(), mu).min()
        reached = penalised(name, ours[k : k + 1].numpy()[None], w[k : k + 1].numpy(), mu)[0]
        assert found - 2e-8 <= reached <= found + 1e-12, w[k]  # the grid is fine to 1e-4, so its least value to 5e-9 (1 + mu)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 2.5])
def test_prox_of_l1_minus_l2_against_minimisation_from_many_starts(mu: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        w = rng.normal(size=3)
        ours = prox_l1_minus_l2(torch.from_numpy(w), mu).numpy()
        reached = penalised("l1 - l2", ours, w, mu)
        signs = np.array(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3)).reshape(3, -1).T
        found = min(minimize(lambda v, w=w: penalised("l1 - l2", v, w, mu), 1.1 * np.abs(w) * s, method="Nelder-Mead").fun for s in signs[::2])
        assert reached <= found + 1e-12


def test_thresholds() -> None:
    """What is dropped: l0 below sqrt(2 mu); transformed l1 with a = 1 below 2 mu, for mu of a quarter at most, and then below 2 sqrt(mu) - 1/2."""
    for name, mu, threshold in (("l1", 0.2, 0.2), ("l0", 0.02, 0.2), ("transformed l1", 0.2, 0.4), ("transformed l1", 0.49, 0.9)):
        w = torch.tensor([threshold - 1e-6, threshold + 1e-6], dtype=torch.float64)
        assert (PROX[name](w, mu) != 0).tolist() == [False, True], name


def test_penalties_written_out() -> None:
    before, model = (built(seed, lambda: perceptron([4, 5, 6]), CPU) for seed in (0, 1))
    assert isinstance(before, nn.Sequential)
    assert isinstance(model, nn.Sequential)
    theta = {key: p.detach() for key, p in before.named_parameters()}
    fisher = {key: torch.rand_like(p, dtype=torch.float64) for key, p in before.named_parameters()}
    past = _Past(2, before, theta, {key: f.detach() for key, f in fisher.items()})
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = {key: (p - theta[key]).detach().numpy() ** 2 for key, p in model.named_parameters()}
    logits = model(x)
    old, new = before(x)[:, :2].sigmoid().detach(), logits[:, :2].sigmoid()
    features = [net[1](x).relu() if isinstance(net[1], nn.Linear) else None for net in (before, model)]
    expected = {
        "L2": 0.5 * sum(d.sum() for d in moved.values()),
        "EWC": 0.5 * sum((fisher[key].detach().numpy() * d).sum() for key, d in moved.items()),
        "prediction distillation": 2 * binary_cross_entropy(new, old).item(),
        "feature distillation": (features[1] - features[0]).square().sum().item() / 7,  # type: ignore[operator]
    }
    for name, value in expected.items():
        assert past.penalty(name, model, x, logits).item() == pytest.approx(value, rel=1e-12), name
        if "prediction" not in name:
            assert past.penalty(name, copy.deepcopy(before), x, before(x)).item() == 0.0


def test_the_loss_of_a_task_is_that_of_its_own_classes() -> None:
    logits = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([4, 5, 4, 4, 5, 5])
    p = logits.sigmoid()
    expected = [-(math.log(p[k, y]) + math.log(1 - p[k, 9 - y])) for k, y in enumerate(labels.tolist())]
    np.testing.assert_allclose(_own_classes(logits, labels, 4, 2).numpy(), expected, rtol=1e-12)


def test_tasks_and_forgetting(tmp_path: Path) -> None:
    setting = replace(REHEARSAL, num_seeds=1)
    outcome = train(setting, tmp_path, progress=False)
    frame = outcome.metrics
    for _, rows in frame.groupby("arm"):
        assert rows["classes"].tolist() == [2, 4, 6, 8, 10]
        assert rows["forgetting"].iloc[0] == 0
        assert rows["accuracy"].iloc[0] == rows["newest"].iloc[0]
    assert frame["mismatch"].max() <= 1e-12
    first = frame[frame["arm"].str.startswith("from scratch")].groupby("arm").first()
    assert first["accuracy"].nunique() == 1  # nothing is past at the first task: all penalties do the same


def test_an_even_number_of_tasks_is_not_needed() -> None:
    run = replace(REHEARSAL, num_seeds=1, task_classes=4).start(CPU, False)
    run.advance(0, 1, lambda: None)
    assert [row["classes"] for row in run.read(1).rows] == [4, 8, 10]


def test_sparsity_is_counted_and_the_norm_in_zeroed_groups() -> None:
    data = SPARSE.splits(CPU, 50)(0)
    model = built(0, lambda: perceptron([64, 8, 8, 10]), CPU)
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        model.get_parameter("1.weight")[:, :16] = 0
        model.get_parameter("3.weight")[3] = 0
    row = SPARSE.measure(model, data, Clock())
    assert row["weight_sparsity"] == pytest.approx((16 * 8 + 8) / (64 * 8 + 8 * 8 + 80))
    assert row["group_sparsity"] == pytest.approx(16 / 80)
    total = dead = 0.0
    for x, y in zip(data.x, data.y, strict=True):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        total += sum(g.square().sum().item() for g in grads)
        dead += grads[0][:, :16].square().sum().item()
    assert row["norm_in_zeroed_groups"] == pytest.approx(dead / total, rel=1e-10)


def test_penalties_are_compared_at_one_training_loss() -> None:
    rows = [
        {"lambda": lam, "interpolated": 0, "loss": loss, "weight_sparsity": zero} for lam, loss, zero in ((1.0, 0.01, 0.2), (4.0, 0.4, 0.9), (2.0, 0.1, 0.6))
    ]
    setting = replace(SPARSE, target=0.2)  # half-way from 0.1 to 0.4, in logarithms
    assert setting.at_target(rows)["lambda"] == pytest.approx(3.0, rel=1e-12)
    assert setting.at_target(rows)["weight_sparsity"] == pytest.approx(0.75, rel=1e-12)
    assert math.isnan(replace(SPARSE, target=0.5).at_target(rows)["weight_sparsity"])


@pytest.mark.parametrize("setting", [REHEARSAL, SPARSE], ids=lambda setting: setting.name)
def test_a_cell_alone_is_what_it_is_among_the_others(setting: Setting, tmp_path: Path) -> None:
    """So that a run that is resumed goes on as it would have: starts are shared by cells, but depend on the seed alone."""
    outcome = train(setting, tmp_path, progress=False)
    assert (tmp_path / f"figures/{setting.name.replace('/', '-')}.png").exists()
    assert len(outcome.verdicts) == len(setting.claims())
    run = setting.start(CPU, False)
    cells = run.reading_steps[-1]
    run.advance(cells - 4, cells - 3, lambda: None)
    alone = pd.DataFrame(run.read(0).rows)
    among = outcome.metrics[outcome.metrics["step"] == cells - 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, among, check_exact=True, check_dtype=False)


def test_images_of_the_users_that_are_not_square(tmp_path: Path) -> None:
    """Pretraining then has the two mirrored views alone; the last task has one class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        for k in range(12):
            Image.fromarray((rng.integers(0, 100, (6, 7, 3)) + 50 * label).astype(np.uint8)).save(tmp_path / name / f"{k}.png")
    setting = replace(REHEARSAL, data=str(tmp_path), test_share=0.5)
    assert str(tmp_path) in setting.data_used()
    data = setting.splits(CPU, 8)(0)
    assert data.shape == (3, 6, 7)
    assert setting.pretrained(0, data, CPU)[-1].weight.shape == (3, 8)
    run = setting.start(CPU, False)
    run.advance(0, 1, lambda: None)
    assert [row["classes"] for row in run.read(1).rows] == [2, 3]


def test_rules() -> None:
    with pytest.raises(ValueError, match="learning/rehearsal-free: task_classes must be at least 1, got 0"):
        RehearsalFree(task_classes=0)
    with pytest.raises(ValueError, match="learning/sparse-group-lasso: ratio must be above 1 and finite, got 1.0"):
        SparseGroupLasso(ratio=1.0)


def test_a_class_without_training_images_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match="every class is to have training images.*--train-images"):
        train(RehearsalFree(train_images=3, batch=1), tmp_path, progress=False)
