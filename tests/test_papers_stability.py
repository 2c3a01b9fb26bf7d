"""Dynamical stability: the exact threshold against the written-out map, batched steps against plain ones, the norms' formulas, exact resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ghostgrad as gg
from ghostgrad.papers.label_noise import draws
from ghostgrad.papers.models import half_squared
from ghostgrad.papers.stability import (
    GD,
    SGD,
    WARM,
    DiagonalNet,
    Ladder,
    LadderRun,
    Threshold,
    TwoLayerReLU,
    mean_square_map,
    mean_square_threshold,
)
from ghostgrad.training import train

DIAGONAL = DiagonalNet(dim=6, num_samples=5, steps=32, gd_steps=4, num_rates=2, num_seeds=2, clip=2.0)
RELU = TwoLayerReLU(dim=4, width=3, units=2, num_samples=5, steps=32, gd_steps=4, num_rates=2, num_seeds=2, clip=2.0)
LADDERS = pytest.mark.parametrize("setting", [DIAGONAL, RELU], ids=lambda s: s.name)

# -------------------------------------------------------------------------------------------------------------------------------------- the threshold


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 4), (2, 2)])
def test_the_written_out_map_loses_its_stability_at_the_threshold(n: int, d: int) -> None:
    g = normals(n, d)
    lr = mean_square_threshold(g @ g.T)
    radii = [torch.linalg.eigvals(mean_square_map(g, share * lr)).abs().max().item() for share in (0.98, 1.0, 1.02)]
    assert radii[0] < 1 < radii[2]
    assert radii[1] == pytest.approx(1, abs=1e-9)
    assert 2 / g.square().sum(1).max() < lr < 2 / g.square().sum(1).mean()


def test_the_map_is_the_mean_over_the_samples_of_a_step() -> None:
    g, u, lr = normals(3, 2), normals(2, seed=1), 0.3
    steps = [u - lr * (a @ u) * a for a in g]
    expected = torch.stack([torch.outer(v, v) for v in steps]).mean(0)
    torch.testing.assert_close((mean_square_map(g, lr) @ torch.outer(u, u).flatten()).view(2, 2), expected)


def test_threshold_measures_and_draws(tmp_path: Path) -> None:
    outcome = train(Threshold(walks=40_000, num_seeds=3), tmp_path, progress=False)
    frame = outcome.metrics
    for _, row in frame.iterrows():
        g = Threshold().gradients(row["arm"], row["seed"])
        assert row["eta_trace"] == pytest.approx(row["threshold"] * g.square().sum(1).mean().item())
    assert frame[frame["arm"] == "equal norms"]["predicted"].to_numpy() == pytest.approx(1.0)
    assert frame["growth"].to_numpy() == pytest.approx(frame["predicted"].to_numpy(), rel=0.1)
    assert all(v.holds for v in outcome.verdicts if v.claim.column in ("off_two", "off_one", "eta_largest"))


# -------------------------------------------------------------------------------------------------------------------------------------------- ladders


@LADDERS
def test_gradients_by_hand_are_autograds(setting: Ladder) -> None:
    run = LadderRun(setting, torch.device("cpu"))
    params = run.params["sgd"]
    for k, v in params.items():
        v += normals(*v.shape, seed=len(k))  # every network of its own
    gradients = setting.gradients(params, run.x[:, :3], run.y[:, :3])
    for arm in (0, 1):
        for s in (0, 1):
            for r in (0, 1):
                model = setting.model({k: v[arm, s, r] for k, v in params.items()})
                half_squared(model(run.x[s, :3]), run.y[s, :3]).backward()
                for p, name in zip(model.parameters(), ("a", "b") if setting is DIAGONAL else ("w", "a"), strict=True):
                    assert p.grad is not None
                    torch.testing.assert_close(p.grad.view_as(gradients[name][arm, s, r]), gradients[name][arm, s, r])


@LADDERS
def test_a_run_is_plain_clipped_sgd_of_each_network(setting: Ladder) -> None:
    run = LadderRun(setting, torch.device("cpu"))
    run.advance(0, 8, lambda: None)
    run.advance(8, 32, lambda: None)
    for s, seed in enumerate(setting.seeds):
        task = setting.task(seed)
        index = draws(seed, 0, 32, setting.num_samples)[0]
        for arm in (SGD, WARM, GD):
            for r, rate in enumerate(setting.rates(arm).tolist()):
                model = setting.model(task.start)
                for k in range(setting.gd_steps if arm == GD else 32):
                    x, y = (task.x, task.y) if arm == GD else (task.x[index[k], None], task.y[index[k], None])
                    lr = rate * min(1.0, (k + 1) / (setting.warmup * 32)) if arm == WARM else rate
                    model.zero_grad()
                    half_squared(model(x), y).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
                    with torch.no_grad():
                        for p in model.parameters():
                            p -= lr * p.grad  # type: ignore[operator]
                end = setting.model(run.network(arm, s, r))
                for p, q in zip(end.parameters(), model.parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # clip_grad_norm_ adds 1e-6 to the norm


def test_traces_over_the_inputs_distribution_bound_the_norms() -> None:
    """``(||a||^2 + ||b||^2) / 3`` and ``sum_j (||w_j||^2 + d a_j^2) / 2``, against means over many inputs; and the norms that they bound."""
    rng, n = np.random.default_rng(1), 100_000
    a, b = normals(2, 5).unbind()
    x = torch.from_numpy(rng.uniform(-1, 1, (n, 5)))
    trace = (a.square().sum() + b.square().sum()).item() / 3
    with pytest.warns(UserWarning, match="fused"):
        assert gg.output_sqnorms(DIAGONAL.model({"a": a, "b": b}), x).mean().item() == pytest.approx(trace, rel=0.01)
    assert trace >= 2 / 3 * (a * b).abs().sum()
    a, w = normals(3), normals(3, 4, seed=2)
    trace = (w.square().sum() + 4 * a.square().sum()).item() / 2
    assert gg.output_sqnorms(RELU.model({"a": a, "w": w}), RELU.inputs(rng, n)).mean().item() == pytest.approx(trace, rel=0.01)
    assert trace >= 2 * (a.abs() * w.norm(dim=1)).sum()


def test_a_step_of_sgd_shrinks_the_imbalance_by_its_factor() -> None:
    setting = DiagonalNet(dim=6, num_samples=5, num_rates=2, num_seeds=1, clip=1e9)
    run = LadderRun(setting, torch.device("cpu"))
    params, rates = run.params["gd"], setting.rates(GD)
    before = {k: v.clone() for k, v in params.items()}
    setting.step_(params, run.x[:, :1], run.y[:, :1], rates)
    e = run.x[0, 0] @ (before["a"] * before["b"])[0, 0, 0] - run.y[0, 0]
    factor = 1 - (rates[:, None] * e * run.x[0, 0]).square()
    torch.testing.assert_close((params["a"] ** 2 - params["b"] ** 2)[0, 0], factor * (before["a"] ** 2 - before["b"] ** 2)[0, 0])


def test_test_errors() -> None:
    task = DIAGONAL.task(0)
    x = torch.from_numpy(np.random.default_rng(5).uniform(-1, 1, (200_000, 6)))
    error = DIAGONAL.measure(task.start, task, 0.1)["test_error"]
    assert half_squared(DIAGONAL.model(task.start)(x), x @ task.truth).item() == pytest.approx(error, rel=0.02)
    relu = RELU.task(0)
    perfect = {"a": torch.ones(2, dtype=torch.float64), "w": relu.truth}
    assert RELU.measure(perfect, relu, 0.1)["test_error"] < 1e-25
    torch.testing.assert_close(RELU.model(perfect)(relu.x), relu.y)
    torch.testing.assert_close(relu.x.norm(dim=1), torch.full((5,), 2.0, dtype=torch.float64))


@LADDERS
def test_an_interrupted_run_ends_with_the_same_bytes(setting: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(setting, tmp_path / "whole", progress=False)
    read = LadderRun.read

    def stop(self: LadderRun, step: int) -> object:
        if step == setting.steps:
            raise KeyboardInterrupt
        return read(self, step)

    monkeypatch.setattr(LadderRun, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        train(setting, tmp_path / "cut", progress=False)
    monkeypatch.setattr(LadderRun, "read", read)
    train(setting, tmp_path / "cut", progress=False, resume=True)
    assert (tmp_path / "cut/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    assert (tmp_path / "whole/figures" / f"{setting.name.replace('/', '-')}.png").exists()
    frame = whole.metrics
    assert len(frame) == 4 * 3 * 2 * 2
    last = frame[(frame["step"] == 32) & (frame["arm"] == SGD) & (frame["seed"] == 1)]
    assert last["worst_trace"].nunique() == 1
    assert last["worst_trace"].iloc[0] == pytest.approx((last["lr"] * last["trace"]).max())
    assert last["error_ratio"].iloc[0] == pytest.approx(last["test_error"].iloc[-1] / last["test_error"].iloc[0])
    start = frame[frame["step"] == 0].drop_duplicates("seed")
    for _, row in start.iterrows():
        task = setting.task(row["seed"])
        model = copy.deepcopy(setting.model(task.start))
        norms = [sum(g.square().sum() for g in torch.autograd.grad(model(x[None])[0], list(model.parameters()))).item() for x in task.x]  # type: ignore[union-attr]
        assert row["trace"] == pytest.approx(np.mean(norms))
    assert math.isfinite(whole.verdicts[0].measured)


@pytest.mark.parametrize(
    ("cls", "field", "value"), [(DiagonalNet, "warmup", 1.5), (TwoLayerReLU, "width", 0), (Threshold, "dim", 40), (DiagonalNet, "log_lr_max", 1e9)]
)
def test_rules(cls: type, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        cls(**{field: value})


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Threshold()], ids=lambda s: s.name)
def test_claims_hold_at_full_size(setting: Threshold, tmp_path: Path) -> None:
    outcome = train(setting, tmp_path, progress=False)
    assert outcome.holds, outcome.table()
