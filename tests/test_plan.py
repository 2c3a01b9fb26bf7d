"""The plan: a pure function of shapes, and the planned ops do what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from ghostgrad import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
sizes = st.one_of(st.integers(0, 64), st.integers(0, 1 << 20))


@settings(max_examples=300, deadline=None)
@given(B=sizes, T=sizes, p=sizes, d=sizes, dtype=st.sampled_from(DTYPES), device=st.sampled_from(["cpu", "cuda"]), wgrad=st.booleans())
def test_a_plan_for_every_problem(B: int, T: int, p: int, d: int, dtype: torch.dtype, device: str, wgrad: bool) -> None:
    plan = ops.plan(B, T, p, d, dtype, device, wgrad)
    assert plan == ops.plan(B, T, p, d, dtype, torch.device(device), wgrad)
    assert plan.formula in ("row", "gram", "outer", "fused")
    assert (plan.formula == "row") == (T <= 1)
    assert plan.formula != "fused" or wgrad
    assert 0 <= plan.flops < float("inf") and 0 <= plan.seconds < float("inf")
    # a and b play the same part
    assert plan.formula == ops.plan(B, T, d, p, dtype, device, wgrad).formula
    # every cost is a sum over samples
    assert B == 0 or plan.formula == ops.plan(1, T, p, d, dtype, device, wgrad).formula


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_choice_without_weight_gradient_is_about_the_flops(device: str) -> None:
    # Gram wins when T < 2 p d / (p + d); far from that line no calibration may overrule it.
    for p, d in [(256, 256), (1024, 4096), (512, 2048)]:
        line = 2 * p * d / (p + d)
        assert ops.plan(8, int(line / 8), p, d, device=device).formula == "gram"
        assert ops.plan(8, int(line * 8), p, d, device=device).formula == "outer"


def test_flops() -> None:
    assert ops.plan(3, 1, 5, 7).flops == 3 * 2 * (5 + 7)
    assert ops.plan(3, 1, 5, 7, wgrad=True).flops == 3 * (2 * (5 + 7) + 2 * 5 * 7)
    assert ops.plan(2, 4, 1024, 1024).flops == 2 * 4 * 4 * 2048


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_seconds(device: str) -> None:
    for T, p, d in [(2, 256, 256), (64, 512, 64), (4096, 64, 64)]:
        one, two = ops.plan(1, T, p, d, device=device), ops.plan(2, T, p, d, device=device)
        assert 0 < one.seconds < ops.plan(1, T, p, d, device=device, wgrad=True).seconds
        assert two.seconds == pytest.approx(2 * one.seconds)
        assert ops.conv_plan(2, T, p, d, 3, device=device).seconds == pytest.approx(6 * ops.conv_plan(1, T, p, d, device=device).seconds)
    assert ops.plan(3, 1, 64, 64, device=device).seconds == 0  # reading is all there is to do


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"plan: dtype must be float32, .* got torch.int32"):
        ops.plan(1, 2, 3, 4, torch.int32)
    with pytest.raises(ValueError, match="plan: sizes must not be negative, got B=1, T=-2, p=3, d=4"):
        ops.plan(1, -2, 3, 4)


@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize("shape", [(4, 1, 64, 64), (4, 2, 256, 256), (2, 512, 16, 16), (2, 128, 256, 256)], ids=str)
def test_planned_ops_do_what_the_plan_says(shape: tuple[int, int, int, int], wgrad: bool) -> None:
    B, T, p, d = shape
    a, b = torch.randn(B, T, p), torch.randn(B, T, d)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        (ops.wgrad_and_sqnorm if wgrad else ops.sqnorm)(a, b)
    called = {event.key for event in trace.key_averages()}
    formula = ops.plan(*shape, wgrad=wgrad).formula
    expected = f"ghostgrad::{'wgrad' if formula == 'fused' else formula}_sqnorm"
    others = {f"ghostgrad::{name}_sqnorm" for name in ("row", "gram", "outer", "wgrad")} - {expected}
    assert expected in called
    assert not others & called
    assert ("aten::matmul" in called) == (wgrad and formula != "fused")
