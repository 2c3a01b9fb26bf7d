"""What gg.explain counts, against formulas by hand; never a time."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad import ops
from ghostgrad.costs import _FORMULAS, CostCounterMode, ExplainReport, ExplainRow
from helpers import build, loss_fn
from models import CASES, Case, Lambda, Recurrent, Transformer


def explained(model: nn.Module, *inputs: Tensor, wgrad: bool = True) -> dict[str, ExplainRow]:
    target = torch.randn(len(inputs[0]), dtype=next(model.parameters()).dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = gg.explain(model, loss_fn, *inputs, target, wgrad=wgrad, repetitions=1)
    return {row.name: row for row in report.rows}


def product_bytes(B: int, T: int, p: int, d: int, formula: str, wgrad: bool, size: int = 4) -> int:
    passes = 2 if wgrad and formula != "fused" else 1
    return passes * B * T * (p + d) * size + (d * p * size if wgrad else 0) + B * (8 if size == 8 else 4)


# --- products ---


@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 1, 24, 40), (4, 8, 96, 64), (3, 200, 12, 20), (2, 96, 96, 96)], ids=str)
def test_linear(shape: tuple[int, int, int, int], dtype: torch.dtype, wgrad: bool) -> None:
    B, T, p, d = shape
    rows = explained(nn.Linear(p, d, dtype=dtype), torch.randn(B, T, p, dtype=dtype), wgrad=wgrad)
    weight, bias, plan, size = rows["weight"], rows["bias"], ops.plan(*shape, dtype=dtype, wgrad=wgrad), dtype.itemsize
    assert (weight.formula, weight.sizes, weight.uses, weight.shape) == (plan.formula, {"B": B, "T": T, "p": p, "d": d}, {"linear": 1}, (d, p))
    product = 2 * T * p * d
    flops = {"row": 2 * (p + d), "gram": T * T * (p + d), "outer": product + 2 * p * d, "fused": product + 4 * p * d}[plan.formula]
    assert weight.flops == B * (flops + (product if wgrad and plan.formula != "fused" else 0))
    assert weight.bytes == product_bytes(*shape, plan.formula, wgrad, size)
    assert (bias.formula, bias.sizes) == (("squares", {"B": B, "N": d}) if T == 1 else ("affine", {"B": B, "T": T, "d": d}))
    assert bias.flops == B * d * (T - 1 + 2 + wgrad)  # add up; square and add; add once more for the gradient
    assert bias.bytes == B * T * d * size + (B + (d if wgrad else 0)) * max(size, 4)


@pytest.mark.parametrize("biased", [False, True])
def test_layers_on_single_positions(biased: bool) -> None:
    """With a weight gradient torch's own operation runs, and the norms of weight and bias are products of two numbers for each sample."""
    B, p, d = 16, 24, 40
    rows = explained(nn.Linear(p, d, bias=biased), torch.randn(B, p))
    weight = rows["weight"]
    assert (weight.formula, weight.flops, weight.sizes) == ("squares x2", 2 * B * (p + d), {"B": B, "N": d})
    assert weight.bytes == 4 * (B * (p + d) + 2 * B + 3 * B)
    if biased:
        assert (rows["bias"].formula, rows["bias"].bytes) == ("shared", 0)
    assert explained(nn.Linear(p, d, bias=biased), torch.randn(B, p), wgrad=False)["weight"].formula == "row"


def test_all_formulas_of_a_product_occur() -> None:
    """The shapes above are a test of each formula only if the plan has use for each."""
    shapes = [(16, 1, 24, 40), (4, 8, 96, 64), (3, 200, 12, 20), (2, 96, 96, 96)]
    assert {ops.plan(*shape, wgrad=wgrad).formula for shape in shapes for wgrad in (False, True)} == {"row", "gram", "outer", "fused"}


@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize(("groups", "image"), [(1, 9), (2, 9), (1, 4)])
def test_conv(groups: int, image: int, wgrad: bool) -> None:
    B, c, d, k = 3, 8, 6, 3
    row = explained(nn.Conv2d(c, d, k, stride=2, padding=1, groups=groups, bias=False), torch.randn(B, c, image, image), wgrad=wgrad)["weight"]
    out = (image + 2 - k) // 2 + 1
    T, p = out * out, c // groups * k * k
    plan = ops.conv_plan(B, T, p, d // groups, groups, wgrad=wgrad)
    assert (row.formula, row.uses) == (plan.formula, {"conv2d": 1})
    assert row.sizes == {"B": B, "T": T, "p": p, "d": d // groups} | ({"groups": groups} if groups > 1 else {})
    per_group = T * T * (p + d // groups) if plan.formula == "gram" else 2 * T * p * d // groups + (4 if wgrad else 2) * p * d // groups
    assert row.flops == B * groups * per_group + (2 * B * T * p * d if plan.formula == "gram" and wgrad else 0)
    passes = 2 if wgrad and plan.formula == "gram" else 1
    assert row.bytes == passes * 4 * B * (c * image * image + d * T) + 4 * B + (4 * p * d if wgrad else 0)


def test_a_transposed_conv_whose_output_ends_early_is_fused() -> None:
    """PyTorch's own weight gradient takes a whole output alone; what the op does then is not what the plan says, but what is reported."""
    model = nn.ConvTranspose1d(256, 256, 3, dilation=2, output_padding=1, bias=False)
    row = explained(model, torch.randn(2, 256, 2))["weight"]
    B, T, p, d = 2, 2, 3 * 256, 256
    assert ops.conv_plan(B, T, p, d, wgrad=True).formula == "gram"
    assert (row.formula, row.flops) == ("fused", B * (2 * T * p * d + 4 * p * d))


# --- what memory decides ---


@pytest.mark.parametrize("wgrad", [False, True])
def test_embedding(wgrad: bool) -> None:
    B, T, V, d = 3, 7, 50, 8
    model = nn.Embedding(V, d)
    row = explained(model, torch.randint(V, (B, T)), wgrad=wgrad)["weight"]
    assert (row.formula, row.sizes, row.uses) == ("embedding", {"B": B, "T": T, "d": d}, {"embedding": 1})
    assert row.flops == 2 * B * T * d
    norms = B * T * (8 + 4 * d) + 4 * B  # indices and gradients, once
    assert row.bytes >= norms + 4 * V * d if wgrad else row.bytes == norms


@pytest.mark.parametrize("wgrad", [False, True])
def test_layer_norm(wgrad: bool) -> None:
    """Scale and shift come from one pass over the data, which stands in the row of the one that is asked for first."""
    B, T, d = 3, 7, 16
    first, second = sorted(explained(nn.LayerNorm(d), torch.randn(B, T, d), wgrad=wgrad).values(), key=lambda row: row.flops)
    assert (first.formula, first.sizes, first.flops, first.bytes, first.predicted) == ("shared", {}, 0, 0, 0)
    assert (second.formula, second.sizes, second.uses) == ("affine", {"B": B, "T": T, "d": d}, {"layer_norm": 1})
    assert second.flops == 3 * B * T * d + 2 * B * d * (T - 1 + 2 + wgrad)  # subtract the mean, times rstd, times b; both sums as that of a bias
    assert second.bytes == 4 * (2 * B * T * d + 2 * B * T + 2 * B + (2 * d if wgrad else 0))


def test_group_norm_has_positions_after_the_channels() -> None:
    rows = explained(nn.GroupNorm(2, 6), torch.randn(3, 6, 5, 4))
    assert {"B": 3, "T": 1, "d": 6, "S": 20} in [row.sizes for row in rows.values()]


# --- several uses, and uses without a rule ---


def test_tied_embedding_is_one_row() -> None:
    B, T, V, d = 3, 5, 11, 8
    row = explained(Transformer(V, d, tied=True), torch.randint(V, (B, T)), wgrad=False)["tokens.weight"]
    plan = ops.plan(B, T, d, V)
    assert row.uses == {"embedding": 1, "linear": 1}
    assert sorted(row.formula.split(", ")) == sorted([plan.formula, "embedding", "matmul"])
    assert row.flops == plan.flops + 2 * B * T * d + 2 * B * T * T * d  # head, embedding, and the inner product of the two
    assert row.sizes == {"B": B, "T": T, "p": d, "d": V}


@pytest.mark.parametrize("wgrad", [False, True])
def test_uses_are_joined_along_positions(wgrad: bool) -> None:
    B, T, p, d = 3, 5, 6, 8
    rows = explained(Recurrent(), torch.randn(4, T, 6), wgrad=wgrad)
    plan = ops.plan(4, T, 6, 6, wgrad=wgrad)
    assert rows["inner.weight"].uses == {"linear": T}
    assert (rows["inner.weight"].formula, rows["inner.weight"].flops, rows["inner.weight"].sizes["T"]) == (plan.formula, plan.flops, T)
    assert rows["inner.weight"].bytes > product_bytes(4, T, 6, 6, plan.formula, wgrad)  # joining them copies them

    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = super().forward(x)[0]
            return out

    row = explained(Last(p, d, batch_first=True), torch.randn(B, T, p), wgrad=wgrad)["weight_ih_l0"]
    plan = ops.plan(B, T, p, 4 * d, wgrad=wgrad)
    assert (row.formula, row.flops, row.sizes) == (plan.formula, plan.flops, {"B": B, "T": T, "p": p, "d": 4 * d})
    assert row.uses["lstm"] == 1


@pytest.mark.parametrize("wgrad", [False, True])
def test_reference_path(wgrad: bool) -> None:
    B, T, D = 3, 4, 6
    row = explained(Lambda(lambda m, x: torch.cdist(x, m.w).tanh(), w=(5, D)), torch.randn(B, T, D), wgrad=wgrad)["w"]
    assert (row.uses, row.formula, row.sizes) == ({"cdist (reference)": 1}, "squares", {"B": B, "N": 5 * D})
    assert row.flops == (2 + wgrad) * B * 5 * D
    assert row.bytes == 4 * (B * 5 * D + B + (5 * D if wgrad else 0))


def test_a_function_of_parameters_has_a_row_of_its_own() -> None:
    B, D = 3, 6
    rows = explained(Lambda(lambda m, x: torch.tanh(x @ m.w.exp()), w=(D, 5)), torch.randn(B, D), wgrad=False)
    assert list(rows) == ["w", "exp(w)"]
    assert (rows["w"].formula, rows["w"].uses, rows["w"].derived) == ("squares", {"matmul": 1}, False)
    copies = rows["exp(w)"]
    assert (copies.formula, copies.derived, copies.shape) == ("copies, matmul", True, (D, 5))
    assert copies.flops == 2 * B * D * 5  # b_i^T a_i with one position
    assert copies.bytes > 4 * 3 * B * D * 5  # written, read, and written again


def test_rows_in_any_order() -> None:
    """Ragged uses: with equally many rows for each sample, one product."""
    B, T, p, d = 4, 3, 6, 5

    def shuffled(m: Lambda, x: Tensor) -> Tensor:
        sample = torch.arange(B).repeat_interleave(T)
        order = torch.randperm(B * T, generator=torch.Generator().manual_seed(0))
        rows = gg.declare_samples(x.flatten(0, 1)[order], index=sample[order])
        return x.new_zeros(B, d).index_add(0, sample[order], F.linear(rows, m.w).tanh())

    row = explained(Lambda(shuffled, w=(d, p)), torch.randn(B, T, p))["w"]
    plan = ops.plan(B, T, p, d)
    assert (row.formula, row.sizes) == (f"matmul, {plan.formula}", {"B": B, "T": T, "p": p, "d": d})
    assert row.flops == plan.flops + 2 * B * T * p * d


def test_frozen_and_unused_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    rows = explained(model, torch.randn(4, 6))
    assert list(rows) == ["idle", "0.bias", "2.weight", "2.bias"]
    assert rows["0.bias"].flops == 3 * 4 * 5
    idle = rows["idle"]
    assert (idle.uses, idle.formula, idle.flops, idle.bytes, idle.predicted, idle.measured, idle.shape) == ({}, "", 0, 0, 0, 0, (2,))


def test_restricted_to_some_parameters() -> None:
    """The step forms the other weight gradients as well, or the ratio would compare two different things."""
    model, x, y = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(4, 6), torch.randn(4)
    seen = []
    handle = model[0].weight.register_hook(seen.append)
    assert [row.name for row in gg.explain(model, loss_fn, x, y, params=["1.weight"], repetitions=1).rows] == ["1.weight"]
    assert len(seen) == 5 and all(grad is not None for grad in seen)
    handle.remove()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_of_every_case_is_listed(case: Case) -> None:
    model, inputs, target = build(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = gg.explain(model, loss_fn, *inputs, target, repetitions=1)
        with gg.tap(model) as tap:
            loss_fn(model(*inputs), target)
            uses = tap.uses()
    assert {row.name: row.uses for row in report.rows if not row.derived} == uses
    for row in report.rows:
        assert bool(row.formula) == bool(row.uses or row.derived)
        assert (row.bytes > 0) == (row.formula not in ("", "shared"))
        assert 0 <= row.flops < math.inf
    assert sum(row.measured_share for row in report.rows) <= 1
    assert str(report)


# --- the report ---


@pytest.fixture
def report() -> ExplainReport:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    return gg.explain(model, F.mse_loss, torch.randn(4, 3, 6), torch.randn(4, 3, 5), repetitions=3)


def test_report(report: ExplainReport) -> None:
    assert report.wgrad and report.threads == torch.get_num_threads()
    assert report.flops == sum(row.flops for row in report.rows) and report.bytes == sum(row.bytes for row in report.rows)
    assert 0 < report.measured <= report.seconds and report.ratio > 0 and report.plain_seconds > 0
    assert report.predicted == sum(row.predicted or 0 for row in report.rows)
    for row in report.rows:
        assert row.measured > 0
        assert row.measured_share == row.measured / report.seconds
        assert row.predicted_share is not None and row.predicted is not None
        assert row.predicted_share == row.predicted / report.seconds


def test_table(report: ExplainReport) -> None:
    lines = str(report).splitlines()
    assert len(lines) == 1 + 4 + 1 + 2
    assert lines[0].split() == "parameter uses sizes formula FLOP bytes predicted share measured share".split()
    for line, row in zip(lines[1:], report.rows):
        assert line.startswith(row.name) and line.index(row.formula) == lines[0].index("formula")
    assert lines[5].startswith("total")
    assert f"{report.threads} thread" in lines[6] and "norms and weight gradients" in lines[6]
    assert lines[7].endswith(f"ratio {report.ratio:.2f}")


def test_no_model_no_prediction() -> None:
    """The weight gradient of an embedding is a scatter by PyTorch, for which there is no model."""
    model, x = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), torch.randint(11, (4, 3))
    report = gg.explain(model, loss_fn, x, torch.randn(4), repetitions=1)
    assert [row.predicted is None for row in report.rows] == [True, False, False]
    assert report.predicted is None and str(report)


def test_prediction_of_a_product() -> None:
    """The plan's time, or that of the bytes where there are so many that memory sets the pace."""
    row = explained(nn.Linear(256, 256), torch.randn(4, 256, 256))["weight"]
    assert row.predicted == ops.plan(4, 256, 256, 256, wgrad=True).seconds / torch.get_num_threads()
    row = explained(nn.Linear(256, 256), torch.randn(4, 256), wgrad=False)["weight"]
    assert row.predicted is not None and row.predicted > ops.plan(4, 1, 256, 256).seconds == 0


# --- arguments, and what stays as it was ---


class Remembering(nn.Module):
    """Draws random numbers, writes into one buffer and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 5), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        out: Tensor = self.linear(self.dropout(x))
        return out


@pytest.mark.parametrize("wgrad", [False, True])
def test_nothing_is_left_behind(wgrad: bool) -> None:
    model, x, y = Remembering(), torch.randn(4, 6), torch.randn(4)
    model(x).sum().backward()
    grads, buffers = [p.grad for p in model.parameters()], list(model.buffers())
    values = [t.clone() for t in (*grads, *buffers, *model.parameters()) if t is not None]
    rng, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    gg.explain(model, loss_fn, x, y, wgrad=wgrad, repetitions=2)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads)) and all(t is before for t, before in zip(model.buffers(), buffers))
    assert all(torch.equal(t, value) for t, value in zip((*grads, *buffers, *model.parameters()), values) if t is not None)
    assert torch.equal(rng, torch.get_rng_state()) and modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module) for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_functional_code() -> None:
    w, c, x, y = (torch.randn(n, requires_grad=n in ((6, 5), (5,))) for n in ((6, 5), (5,), (4, 6), (4,)))
    for params in ({"w": w, "c": c}, [w, c], iter([w, c])):
        report = gg.explain(lambda x: torch.tanh(x @ w + c), loss_fn, x, y, params=params, repetitions=2)
        assert [row.uses for row in report.rows] == [{"matmul": 1}, {"add": 1}]
        assert [row.name for row in report.rows] == (["w", "c"] if isinstance(params, dict) else ["0", "1"])
    with pytest.raises(TypeError, match="parameters must be given"):
        gg.explain(lambda x: x @ w, loss_fn, x, y)


def test_inputs_and_losses_as_sqnorms_takes_them() -> None:
    model = Lambda(lambda m, x, z: torch.tanh(x @ m.w) * z.mean(1), w=(6, 6))
    x, z, y = torch.randn(4, 6), torch.randn(4, 3, 6), torch.randn(4)
    (row,) = gg.explain(model, loss_fn, x, z, y, repetitions=1).rows
    assert row.sizes == {"B": 4, "T": 1, "p": 6, "d": 6}
    summed = gg.explain(model, lambda out, y: out.square().sum(), x, z, y, reduction="sum", repetitions=1)
    losses = gg.explain(model, lambda out, y: out.square().sum(1), x, z, y, repetitions=1)
    assert summed.flops == losses.flops == row.flops


def test_errors() -> None:
    model, x, y = nn.Linear(6, 5), torch.randn(4, 6), torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"ghostgrad.explain: .* explain\(model, loss_fn, x, y\)"):
        gg.explain(model, F.mse_loss, x)
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        gg.explain(model, F.mse_loss, x, y, repetitions=0)
    with pytest.raises(ValueError, match="ghostgrad.explain: loss_fn has reduction='sum'"):
        gg.explain(model, nn.MSELoss(reduction="sum"), x, y)
    with pytest.raises(ValueError, match="ghostgrad.explain: loss_fn must return a scalar or one loss per sample"):
        gg.explain(model, nn.MSELoss(reduction="none"), x, y)
    with pytest.raises(ValueError, match="nothing to tap"):
        gg.explain(nn.Tanh(), F.mse_loss, x, x)
    with pytest.raises(gg.TapStateError, match="does not depend"):
        gg.explain(model, lambda out, y: y.sum(), x, y)
    norm = nn.Sequential(model, nn.BatchNorm1d(5))
    with pytest.raises(gg.BatchCouplingError, match="'1'"):
        gg.explain(norm, F.mse_loss, x, y)
    assert not norm[1].running_mean.any() and norm[1].num_batches_tracked == 0


def test_compiled_models_are_refused() -> None:
    model, x, y = nn.Linear(6, 5), torch.randn(4, 6), torch.randn(4, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"model\._orig_mod"):
        gg.explain(compiled, F.mse_loss, x, y)
    assert gg.explain(compiled._orig_mod, F.mse_loss, x, y, repetitions=1).rows


# --- counting ---


def test_every_op_that_gives_norms_has_a_formula() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ghostgrad::") and name.endswith("sqnorm")}
    assert registered == {op.name() for op in _FORMULAS}


def test_counting() -> None:
    x, row, out = torch.randn(4, 6), torch.randn(6), torch.empty(4, 6)
    with CostCounterMode() as counter:
        x.view(2, 12).mT, x.detach(), torch.empty(3), x.new_empty(5)
        x + row.expand(4, 6)
        x.add_(x)
        torch.mm(x, x.mT, out=torch.empty(4, 4))
        x @ x.mT
        x.sum(0)
        x.sort()
        torch.add(x, 1, out=out)
    assert [(cost.formula, cost.flops, cost.bytes) for cost in counter.costs] == [
        ("", 0, 4 * (24 + 6 + 24)),
        ("", 0, 4 * (24 + 24)),
        ("matmul", 2 * 4 * 6 * 4, 4 * (24 + 24 + 16 + 16)),
        ("matmul", 2 * 4 * 6 * 4, 4 * (24 + 24 + 16)),
        ("", 0, 4 * (24 + 6)),
        ("", 0, 4 * 24 + 12 * 24),
        ("", 0, 4 * (24 + 24 + 24)),
    ]
    assert [cost.seconds is None for cost in counter.costs] == [False, False, False, False, False, True, False]


@pytest.mark.parametrize("formula", ["outer", "gram", "wgrad"])
def test_ops_called_by_name(formula: str) -> None:
    """By a rule of one's own, say: counted alike, but the plan says nothing of their time."""
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 4)
    with CostCounterMode() as counter:
        getattr(ops, f"{formula}_sqnorm")(a, b)
    (cost,) = counter.costs
    flops = {"outer": 2 * 5 * 28 + 2 * 28, "gram": 25 * 11, "wgrad": 2 * 5 * 28 + 4 * 28}[formula]
    assert (cost.flops, cost.bytes, cost.seconds) == (3 * flops, 4 * (3 * 5 * 11 + 3 + (28 if formula == "wgrad" else 0)), None)
