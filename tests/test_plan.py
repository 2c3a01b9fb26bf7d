"""The plan: a pure function of shapes, and the planned ops do what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from ghostgrad import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
sizes = st.one_of(st.integers(0, 64), st.integers(0, 1 << 20))


@settings(max_examples=300, deadline=None)
@given(B=sizes, T=sizes, p=sizes, d=sizes, dtype=st.sampled_from(DTYPES), device=st.sampled_from(["cpu", "cuda"]), wgrad=st.booleans())
def test_a_plan_for_every_problem(B: int, T: int, p: int, d: int, dtype: torch.dtype, device: str, wgrad: bool) -> None:
    plan = ops.plan(B, T, p, d, dtype, device, wgrad)
    assert plan == ops.plan(B, T, p, d, dtype, torch.device(device), wgrad)
    assert plan.formula in ("row", "gram", "outer", "fused")
    assert (plan.formula == "row") == (T <= 1)
    assert (plan.wgrad == "fused") == (plan.formula == "fused")
    assert (plan.wgrad in ("matmul", "product", "fused")) if wgrad else plan.wgrad == ""
    assert 0 <= plan.flops < float("inf") and 0 <= plan.seconds < float("inf")
    # a and b play the same part
    assert plan.formula == ops.plan(B, T, d, p, dtype, device, wgrad).formula
    # every cost of the norms is a sum over samples, but a lone sample's weight gradient may bring its norm along
    assert B < 2 or plan.formula == ops.plan(2, T, p, d, dtype, device, wgrad).formula


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
@pytest.mark.parametrize("shape", [(4, 1, 64, 64), (256, 1, 64, 64), (1, 2, 256, 256), (40, 2, 256, 256), (2, 512, 16, 16), (2, 128, 256, 256)], ids=str)
def test_planned_ops_do_what_the_plan_says(shape: tuple[int, int, int, int], wgrad: bool) -> None:
    B, T, p, d = shape
    a, b = torch.randn(B, T, p), torch.randn(B, T, d)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        (ops.wgrad_and_sqnorm if wgrad else ops.sqnorm)(a, b)
    called = {event.key for event in trace.key_averages()}
    plan = ops.plan(*shape, wgrad=wgrad)
    kernels = {"row", "gram", "outer", "wgrad"}
    expected = {plan.formula} & kernels | ({"wgrad"} if plan.wgrad in ("product", "fused") else set())
    assert {name for name in kernels if f"ghostgrad::{name}_sqnorm" in called} == expected
    assert ("aten::matmul" in called) == (plan.wgrad == "matmul")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 1, 70, 33), (2800, 1, 30, 20), (40, 2, 130, 260), (3, 100, 8, 5), (0, 2, 8, 5), (2, 0, 8, 5)], ids=str)
def test_planned_weight_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, T, p, d = shape
    torch.manual_seed(0)
    a, b = torch.randn(T, B, p).to(dtype).transpose(0, 1), torch.randn(B, T, d).to(dtype)  # a is not contiguous
    expected, norms = reference.wgrad_sqnorm(a.double(), b.double())
    wgrad, sqnorm = ops.wgrad_and_sqnorm(a, b)
    assert wgrad.dtype == dtype and wgrad.shape == (d, p)
    by_torch = b.flatten(0, 1).T @ a.flatten(0, 1)
    error, allowed = ((x.double() - expected).norm() for x in (wgrad, by_torch))
    assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * expected.norm()
    torch.testing.assert_close(sqnorm.double(), norms, rtol=1e-5, atol=0)
