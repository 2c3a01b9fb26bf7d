"""The noise-stability settings: every arm's step against its formula, the traces in closed form, rounding errors against uniform noise, exact resume."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._pytree import tree_leaves

import ghostgrad as gg
from ghostgrad.papers.noise_stability import MatrixSensing, Quantisation, label_variance, rounded
from ghostgrad.papers.tour import digits
from ghostgrad.training import Clock, RunDirectory, batches, train
from resume import killed_and_whole

SMALL = MatrixSensing(dim=6, num_measurements=9, batch=4, truth_trace=3.0, steps=40, read_every=20, num_seeds=2, lr=0.01, probes=4)

# ----------------------------------------------------------------------------------------------------------------------------------- matrix sensing


@pytest.mark.parametrize("arm", MatrixSensing.ARMS)
def test_each_arm_steps_by_its_formula(arm: str) -> None:
    """``W <- W - (lr/n) sum_i (<A_i, WW'> - y_i) A_i W``, at the point, over the samples and with the labels of the arm; one matrix at a time."""
    data = SMALL.measurements(5)
    trainee = SMALL.trainee(arm, 5, data)
    w = data.start.clone()
    noise = torch.zeros(100, dtype=w.dtype)
    gg.noise.perturb_([noise], 5, label_variance(SMALL.batch, SMALL.lr, SMALL.sigma) ** 0.5, "normal")
    for k in range(6):
        epoch, place = divmod(k, 2)
        index = batches(5, epoch, 9, 4)[place].tolist() if arm in ("SGD", "label noise") else range(9)
        labels = data.y[list(index)] + (noise[4 * k : 4 * k + 4] if arm == "label noise" else 0.0)
        points = [w]
        if "point" in arm:
            u = torch.zeros_like(w)
            gg.noise.perturb_([u], trainee.optimizer.noise_seed(k, 0), SMALL.sigma, "normal")  # type: ignore[attr-defined]
            points = [w + u, w - u] if arm == "two points" else [w + u]
        matrices = [data.a[i].view(6, 6) for i in index]
        grads = [((a * (p @ p.T)).sum() - y) * (a @ p) / len(labels) for p in points for a, y in zip(matrices, labels, strict=True)]
        w = w - SMALL.lr * sum(grads) / len(points)
        trainee.step(k)
        torch.testing.assert_close(trainee.model.get_parameter("w").detach(), w, rtol=1e-12, atol=1e-13)


def test_arms_share_start_and_data_and_the_truth_fits() -> None:
    data = SMALL.measurements(7)
    assert data.truth.trace().item() == pytest.approx(3.0)
    assert torch.linalg.matrix_rank(data.truth) == 1
    torch.testing.assert_close(data.a @ data.truth.flatten(), data.y)
    torch.testing.assert_close(data.a.view(9, 6, 6), data.a.view(9, 6, 6).mT)
    for arm in SMALL.ARMS:
        assert torch.equal(SMALL.trainee(arm, 7, data).model.get_parameter("w"), data.start)


def test_traces_in_closed_form(tmp_path: Path) -> None:
    """Of ``(1/4m) sum e_i^2``: ``tr H = (1/2m) sum_i (||2 A_i W||^2 + 2 d e_i tr A_i)``, of which norms give the first part."""
    outcome = train(SMALL, tmp_path, progress=False)
    frame = outcome.metrics
    held = RunDirectory(tmp_path).load_checkpoint()["state"]  # type: ignore[index]
    for seed in SMALL.seeds:
        data = SMALL.measurements(seed)
        matrices = data.a.view(9, 6, 6)
        u = torch.linalg.eigh(data.truth)
        truth = u.eigenvectors[:, -1:] * u.eigenvalues[-1].sqrt()
        assert data.truth_trace == pytest.approx(2 * (matrices @ truth).square().sum().item() / 9)
        for arm in SMALL.ARMS:
            w = held[f"{arm}, seed {seed}"]["model"]["w"]
            e = data.a @ (w @ w.T).flatten() - data.y
            row = frame[(frame["arm"] == arm) & (frame["seed"] == seed)].iloc[-1]
            norms = 2 * (matrices @ w).square().sum().item() / 9
            hessian = norms + 6 * (e * matrices.diagonal(dim1=1, dim2=2).sum(1)).sum().item() / 9
            assert row["loss"] == pytest.approx(e.square().mean().item() / 4)
            assert row["trace_by_norms"] == pytest.approx(norms)
            assert abs(row["trace"] - hessian) < 8 * row["trace_stderr"] + 1e-3 * hessian  # 4 probes
            assert row["distance"] == pytest.approx(((w @ w.T - data.truth).norm() / data.truth.norm()).item())


def test_label_noise_of_that_variance_drifts_as_fast_as_parameter_noise() -> None:
    """Many replicas from one interpolating matrix, both noises written out; the mean drops of reg agree."""
    replicas, d, m, lr, sigma, batch, steps = 100, 5, 6, 0.001, 0.05, 3, 1000
    g = torch.Generator().manual_seed(0)
    a = torch.randn(m, d, d, generator=g, dtype=torch.float64)
    a = (a + a.mT) / 2
    start = torch.randn(d, d, generator=g, dtype=torch.float64)
    y = (a * (start @ start.T)).sum((1, 2))

    def descend(w: torch.Tensor, use: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # (R, d, d), (R, n), (R, n) -> (R, d, d)
        e = torch.einsum("mij,rij->rm", a, w @ w.mT).gather(1, use) - target
        return torch.einsum("rn,rnij->rij", e, a[use]) @ w / use.shape[1]

    def drop(label: bool) -> float:
        w = start.expand(replicas, d, d).clone()
        everything = torch.arange(m).expand(replicas, m)
        for _ in range(steps):
            if label:
                use = torch.rand(replicas, m, generator=g).argsort(1)[:, :batch]
                noise = label_variance(batch, lr, sigma) ** 0.5 * torch.randn(replicas, batch, generator=g, dtype=w.dtype)
                w = w - lr * descend(w, use, y[use] + noise)
            else:
                u = sigma * torch.randn(w.shape, generator=g, dtype=w.dtype)
                w = w - lr / 2 * (descend(w + u, everything, y.expand(replicas, m)) + descend(w - u, everything, y.expand(replicas, m)))
        for _ in range(1000):  # back to zero error, or reg also differs by how far off it each noise keeps
            w = w - 5 * lr * descend(w, everything, y.expand(replicas, m))
        assert (torch.einsum("mij,rij->rm", a, w @ w.mT) - y).abs().max() < 1e-3
        reg = [torch.einsum("mij,rjk->rmik", a, v).square().sum((2, 3)).mean() for v in (start[None], w)]
        return (reg[0] - reg[1]).item()

    by_parameters, by_labels = drop(label=False), drop(label=True)
    assert by_parameters > 0
    assert by_labels == pytest.approx(by_parameters, rel=0.15)


@pytest.mark.parametrize(("field", "value", "rule"), [("num_measurements", 300, "statistical dimension 247.5"), ("batch", 151, "num_measurements=150")])
def test_sensing_rules(field: str, value: int, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*{rule}, got {value}"):
        MatrixSensing(**{field: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------------------------- quantisation


def test_rounding_on_a_shifted_grid_errs_uniformly_and_independently() -> None:
    """The reason why uniform noise stands for rounding: round to a grid that is shifted by an even offset of its own for each weight."""
    w = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step, shift = 0.3, torch.zeros_like(w)
    gg.noise.perturb_([shift], 1, step, "uniform")
    (shifted,) = rounded([w + shift], step)
    error = (shifted - shift - w).numpy()
    from scipy.stats import kstest, pearsonr

    assert kstest(error / step + 0.5, "uniform").pvalue > 0.01
    assert abs(pearsonr(error, w.numpy()).statistic) < 0.03
    (plainly,) = rounded([w], step)
    assert ((plainly - w).abs() <= step / 2 * (1 + 1e-12)).all()
    torch.testing.assert_close(plainly / step, (plainly / step).round())


def test_the_rise_of_the_loss_is_the_expansion() -> None:
    """At 8 bits the fourth order is gone: predicted and measured rises agree within their standard errors; and rounding is what it says."""
    setting = Quantisation(hidden=6, train_size=300, epochs=4, probes=300, draws=150)
    x, y = digits()
    model = setting.network(0)
    setting.fit(model, x[:300], y[:300], 0.0, 0, lambda: None)
    before = [p.detach().clone() for p in model.parameters()]
    row = setting.measure(model, x[:300], y[:300], x[300:], y[300:], Clock(), lambda: None)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    stderr = np.hypot(row["noise_stderr_8"], row["trace_stderr"] * row["step_8"] ** 2 / 24)
    assert abs(row["noise_8"] - row["predicted_8"]) < 3 * stderr
    assert stderr < 0.1 * row["predicted_8"]
    for b in setting.BITS:
        assert row[f"step_{b}"] == pytest.approx(2 * max(p.abs().max().item() for p in before) / 2**b)
        with torch.no_grad():
            for p, q in zip(model.parameters(), before, strict=True):
                p.copy_(torch.round(q / row[f"step_{b}"]) * row[f"step_{b}"])
            out, test = model(x[:300]), model(x[300:])
        assert row[f"rounded_{b}"] == pytest.approx(torch.nn.functional.cross_entropy(out, y[:300]).item() - row["loss"], rel=1e-9, abs=1e-12)
        assert row[f"accuracy_{b}"] == (test.argmax(1) == y[300:]).double().mean().item()


def test_noise_while_training_lowers_the_trace() -> None:
    setting = Quantisation(hidden=16, train_size=600, epochs=25)
    x, y = (t[:600] for t in digits())
    traces = []
    for width in (0.0, 0.4):
        model = setting.network(1)
        setting.fit(model, x, y, width, 1, lambda: None)
        traces.append(gg.hessian_trace(model, torch.nn.functional.cross_entropy, x, y, method="two_point_grad", probes=60))
    assert traces[1].interval[1] < traces[0].interval[0]


# -------------------------------------------------------------------------------------------------------------------------------------------- resume

RUNS = {
    "noise-stability/matrix-sensing": "--dim 6 --num-measurements 9 --batch 4 --truth-trace 3 --steps 200 --read-every 10 --lr 0.01 --probes 2 --num-seeds 1",
    "noise-stability/quantisation": "--epochs 2 --hidden 4 --train-size 200 --probes 2 --draws 2 --num-seeds 15",
}


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    killed, whole = killed_and_whole(name, RUNS[name], tmp_path, begun=not name.endswith("sensing"))
    ends = [RunDirectory(path).load_checkpoint()["state"] for path in (killed, whole)]  # type: ignore[index]
    leaves = [tree_leaves(end) for end in ends]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))
    assert {p.name for p in (killed / "figures").iterdir()} == {f"{name.replace('/', '-')}.{kind}" for kind in ("png", "svg")}


@pytest.mark.slow
@pytest.mark.parametrize("setting", [MatrixSensing(), Quantisation()], ids=lambda s: s.name)
def test_claims_hold_at_full_size(setting: MatrixSensing | Quantisation, tmp_path: Path) -> None:
    outcome = train(setting, tmp_path, progress=False)
    assert outcome.holds, outcome.table()
    assert np.isfinite(pd.DataFrame(outcome.metrics).drop(columns="arm").to_numpy()).all()
