"""The convolution ops: against their reference, by gradcheck, by opcheck, by their properties, and on the empty, the odd and the non-contiguous.

Tolerances are those of test_ops.py: at most twice the error of plain PyTorch, plus four units of rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ghostgrad as gg
from ghostgrad import ops, reference
from ghostgrad.reference import accumulation_dtype
from helpers import in_own_process, loop_sqnorms, loss_fn, needs_peak_memory
from test_ops import DEVICES, DTYPES, assert_honest, draw

OPS = ["conv_sqnorm", "conv_wgrad_sqnorm", "conv_wgrad_and_sqnorm"]
WGRADS = OPS[1:]


class Problem(NamedTuple):
    """A convolution's weight and input; ``missing``: how much of its output has no gradient."""

    B: int
    R: int
    c: int
    d: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    missing: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    @property
    def out(self) -> tuple[int, ...]:
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 - self.missing for n, k, s, p, d in sizes)

    def operands(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        x = draw((self.B, self.R, self.c, *self.size), dtype, device, 2 * seed)
        return x, draw((self.B, self.R, self.d, *self.out), dtype, device, 2 * seed + 1)


PROBLEMS = {
    "one of everything": Problem(1, 1, 1, 1, (1,), (1,), (1,), (0,), (1,)),
    "1-d, stride and dilation": Problem(3, 1, 4, 5, (23,), (3,), (2,), (2,), (3,)),
    "1-d, a line of several strips": Problem(2, 1, 2, 17, (1100,), (5,), (1,), (2,), (1,)),
    "2-d": Problem(3, 1, 3, 16, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2-d, several strips": Problem(2, 1, 5, 33, (33, 20), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2-d, all different": Problem(2, 1, 4, 6, (11, 14), (2, 3), (2, 3), (3, 1), (1, 2), 2),
    "2-d, runs": Problem(2, 3, 3, 4, (6, 7), (3, 2), (1, 2), (1, 0), (1, 1)),
    "2-d, padding larger than the kernel": Problem(2, 1, 3, 4, (4, 5), (2, 3), (1, 2), (4, 5), (1, 1)),
    "2-d, pointwise": Problem(2, 1, 40, 37, (6, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    "2-d, pointwise with stride": Problem(2, 1, 7, 9, (6, 7), (1, 1), (2, 2), (0, 0), (1, 1)),
    "2-d, kernel as large as the image": Problem(2, 1, 5, 7, (4, 5), (4, 5), (1, 1), (0, 0), (1, 1)),
    "2-d, depthwise": Problem(2, 1, 20, 20, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 20),
    "2-d, depthwise with multiplier": Problem(2, 1, 17, 34, (9, 9), (3, 3), (2, 2), (1, 1), (1, 1), 17),
    "2-d, groups": Problem(2, 1, 12, 60, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "2-d, many channels and few positions": Problem(3, 1, 70, 130, (3, 3), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2-d, stride leaves a rest": Problem(2, 1, 3, 4, (8, 9), (2, 2), (3, 3), (0, 0), (1, 1)),
    "2-d, the output ends early": Problem(2, 1, 3, 4, (7, 8), (2, 2), (2, 1), (1, 1), (2, 3), 1, 1),
    "2-d, many samples": Problem(1100, 1, 1, 2, (2, 3), (2, 2), (1, 1), (0, 0), (1, 1)),
    "3-d": Problem(2, 1, 4, 6, (4, 5, 6), (2, 3, 2), (1, 2, 3), (1, 0, 2), (2, 1, 1), 2),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
SMALL = Problem(2, 2, 4, 6, (5, 4), (3, 2), (1, 2), (2, 1), (1, 2), 2, 1)


def true_per_sample(x: Tensor, b: Tensor, problem: Problem) -> np.ndarray:
    """``G_i`` in long double, by the definition: one kernel offset at a time."""
    wide_x, wide_b = (t.detach().cpu().double().numpy().astype(np.longdouble) for t in (x, b))
    kernel, stride, padding, dilation, groups = problem.arguments
    wide_x = np.pad(wide_x, [(0, 0)] * 3 + [(p, p) for p in padding])
    B, R, d = b.shape[:3]
    c, T = x.shape[2] // groups, int(np.prod(b.shape[3:]))
    result = np.zeros((B, d, c, *kernel), dtype=np.longdouble)
    for offset in np.ndindex(*kernel):
        seen = tuple(slice(k * e, k * e + s * (n - 1) + 1, s) for k, e, s, n in zip(offset, dilation, stride, b.shape[3:]))
        patch = wide_x[(..., *seen)].reshape(B, R, groups, c, T)
        result[(..., *offset)] = np.einsum("brgot,brgct->bgoc", wide_b.reshape(B, R, groups, d // groups, T), patch).reshape(B, d, c)
    return result


def squares(per_sample: np.ndarray) -> np.ndarray:
    return (per_sample**2).sum(tuple(range(1, per_sample.ndim)))


def call(op: str, x: Tensor, b: Tensor, problem: Problem) -> tuple[Tensor | None, Tensor]:
    """The weight gradient, if the op gives one, and the squared norms."""
    result = getattr(ops, op)(x, b, *problem.arguments)
    return result if op in WGRADS else (None, result)


# --- against the reference ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@problems
@pytest.mark.parametrize("op", OPS)
def test_it_is_the_references(op: str, problem: Problem, dtype: torch.dtype, device: str) -> None:
    x, b = problem.operands(dtype, device)
    wgrad, sqnorm = call(op, x, b, problem)
    plain_wgrad, plain_sqnorm = reference.conv_wgrad_sqnorm(x, b, *problem.arguments)
    truth = true_per_sample(x, b, problem)
    assert sqnorm.dtype == accumulation_dtype(dtype)
    assert_honest(sqnorm, plain_sqnorm, squares(truth))
    assert torch.equal(plain_sqnorm, reference.conv_sqnorm(x, b, *problem.arguments))
    if wgrad is not None:
        assert wgrad.dtype == dtype
        assert_honest(wgrad, plain_wgrad, truth.sum(0))


@problems
def test_the_reference_is_autograds(problem: Problem) -> None:
    problem = problem._replace(B=min(problem.B, 3))
    x, b = problem.operands(torch.float64)
    rows = []
    for i in range(problem.B):
        weight = torch.zeros(problem.d, problem.c // problem.groups, *problem.kernel, dtype=torch.float64, requires_grad=True)
        out = getattr(F, f"conv{len(problem.size)}d")(x[i], weight, None, *problem.arguments[1:])
        out = out[(..., *(slice(0, n) for n in problem.out))]
        rows.append(torch.autograd.grad(out, weight, b[i])[0])
    wgrad, sqnorm = reference.conv_wgrad_sqnorm(x, b, *problem.arguments)
    torch.testing.assert_close(wgrad, sum(rows), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sqnorm, torch.stack(rows).square().flatten(1).sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(ops.per_sample_conv_wgrad(x, b, *problem.arguments), torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_long_sums_of_one_sign_keep_their_digits(op: str) -> None:
    problem = Problem(1, 1, 1, 2, (250, 400), (1, 2), (1, 1), (0, 0), (1, 1))
    x, b = (t.abs() + 0.5 for t in problem.operands(torch.float32))
    truth = (true_per_sample(x, b, problem) ** 2).sum()
    assert abs(call(op, x, b, problem)[1].item() / float(truth) - 1) < 4e-7


# --- gradients ---


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_gradients(op: str, groups: int) -> None:
    problem = Problem(2, 2, 2, 2, (3, 3), (2, 1), (1, 2), (1, 0), (2, 1), groups)
    inputs = tuple(t.requires_grad_() for t in problem.operands(torch.float64))
    function: Callable[[Tensor, Tensor], Any] = lambda x, b: getattr(ops, op)(x, b, *problem.arguments)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@problems
@pytest.mark.parametrize("used", ["wgrad", "sqnorm", "both"])
def test_gradients_are_the_references(used: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = problem.d * problem.c // problem.groups * int(np.prod(problem.kernel))
    monkeypatch.setattr(ops, "_WEIGHTS_AT_A_TIME", (problem.B + 1) // 2 * elements)  # the samples in two parts

    def grads(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        x, b = (t.requires_grad_() for t in problem.operands(torch.float64))
        wgrad, sqnorm = function(x, b, *problem.arguments)
        terms = {"wgrad": (wgrad**3).sum(), "sqnorm": (sqnorm**2).sum()}
        total = terms["wgrad"] + terms["sqnorm"] if used == "both" else terms[used]
        return torch.autograd.grad(total, (x, b))

    for value, truth in zip(grads(ops.conv_wgrad_sqnorm), grads(reference.conv_wgrad_sqnorm), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize("wanted", ["x", "b"])
def test_one_operand_may_need_no_gradient(wanted: str) -> None:
    x, b = SMALL.operands(torch.float64)
    leaf = (x if wanted == "x" else b).requires_grad_()
    (value,) = torch.autograd.grad(ops.conv_sqnorm(x, b, *SMALL.arguments).sum(), leaf)
    (truth,) = torch.autograd.grad(reference.conv_sqnorm(x, b, *SMALL.arguments).sum(), leaf)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


# --- the registration ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", [SMALL, SMALL._replace(B=0), PROBLEMS["3-d"], PROBLEMS["2-d, many channels and few positions"]], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, problem: Problem, dtype: torch.dtype, requires_grad: bool, device: str) -> None:
    operands = tuple(t.requires_grad_(requires_grad) for t in problem.operands(dtype, device))
    torch.library.opcheck(getattr(torch.ops.ghostgrad, op).default, (*operands, *problem.arguments))


# --- the plan ---


@pytest.mark.parametrize("problem", [PROBLEMS["2-d, several strips"], PROBLEMS["2-d, many channels and few positions"], SMALL], ids=str)
def test_the_planned_op_does_what_the_plan_says(problem: Problem) -> None:
    x, b = problem.operands(torch.float32)
    T, p = problem.R * b[0, 0, 0].numel(), problem.c // problem.groups * int(np.prod(problem.kernel))
    formula = ops.conv_plan(problem.B, T, p, problem.d // problem.groups, problem.groups, wgrad=True).formula
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        ops.conv_wgrad_and_sqnorm(x, b, *problem.arguments)
    called = {event.name for event in trace.events()}
    fused = formula == "fused" or problem.missing > 0  # PyTorch takes no output that ends early
    assert ("ghostgrad::conv_wgrad_sqnorm" in called) == fused
    assert ("ghostgrad::conv_sqnorm" in called) != fused
    assert ("aten::convolution_backward" in called) != fused


def test_the_plan() -> None:
    assert ops.conv_plan(8, 1024, 144, 16, wgrad=True).formula == "fused"
    assert ops.conv_plan(8, 1024, 144, 16).formula == "outer"
    assert ops.conv_plan(8, 9, 4608, 512).formula == "gram"
    assert ops.conv_plan(8, 9, 4608, 512, device="cuda").formula == "outer"
    assert ops.conv_plan(3, 2, 4608, 512, 2).flops == 3 * 2 * 4 * (4608 + 512)
    with pytest.raises(TypeError, match=r"conv_plan: dtype must be float32, .* got torch.int32"):
        ops.conv_plan(1, 2, 3, 4, 1, torch.int32)
    with pytest.raises(ValueError, match="conv_plan: sizes must not be negative, got B=1, T=-2, p=3, d=4, groups=1"):
        ops.conv_plan(1, -2, 3, 4)


# --- in a tap ---


def test_uses_on_images_of_one_size_join_as_runs_and_others_by_materialising() -> None:
    class Twice(nn.Module):
        def __init__(self, shrink: bool):
            super().__init__()
            self.conv, self.shrink = nn.Conv2d(2, 2, 3, padding=1), shrink

        def forward(self, x: Tensor) -> Tensor:
            once = self.conv(x).tanh()
            return self.conv(F.avg_pool2d(once, 2) if self.shrink else once)

    for shrink in (False, True):
        model, x, target = Twice(shrink).double(), draw((3, 2, 6, 4), torch.float64), draw((3,), torch.float64)
        with warnings.catch_warnings(record=True) as caught, gg.tap(model, by_param=True) as tap:
            warnings.simplefilter("always")
            loss_fn(model(x), target).backward()
        exact = loop_sqnorms(model, (x,), target)
        for name, value in tap.sqnorms(by_param=True).items():
            torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=0)
        assert any("'conv.weight'" in str(warning.message) for warning in caught) == shrink


# --- properties ---


@problems
@pytest.mark.parametrize("op", OPS)
def test_scaling_by_a_power_of_two_scales_by_its_square(op: str, problem: Problem) -> None:
    x, b = problem.operands(torch.float32)
    assert torch.equal(call(op, x, 8 * b, problem)[1], 64 * call(op, x, b, problem)[1])


@pytest.mark.parametrize("op", OPS)
def test_permuting_the_batch_permutes_the_norms(op: str) -> None:
    problem = PROBLEMS["2-d, several strips"]._replace(B=7)
    x, b = problem.operands(torch.float32)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(op, x, b, problem)[1][order], call(op, x[order], b[order], problem)[1])


@pytest.mark.parametrize("op", OPS)
def test_padding_is_zeros(op: str) -> None:
    problem = PROBLEMS["2-d, padding larger than the kernel"]
    x, b = problem.operands(torch.float64)
    padded = F.pad(x, [side for p in reversed(problem.padding) for side in (p, p)])
    torch.testing.assert_close(call(op, x, b, problem), call(op, padded, b, problem._replace(padding=(0, 0))), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("op", OPS)
def test_runs_add_before_they_are_squared(op: str) -> None:
    problem = PROBLEMS["2-d, runs"]
    x, b = problem.operands(torch.float64)
    negated = torch.cat([b[:, :1], -b[:, :1], b[:, 2:]], 1), torch.cat([x[:, :1], x[:, :1], x[:, 2:]], 1)
    single = call(op, x[:, 2:], b[:, 2:], problem._replace(R=1))
    torch.testing.assert_close(call(op, negated[1], negated[0], problem), single, rtol=1e-12, atol=1e-12)


# --- the empty, the odd, the non-contiguous ---


def layouts(t: Tensor) -> Iterator[Tensor]:
    """The same values, laid out in memory in several ways."""
    yield t
    yield t.movedim(2, -1).contiguous().movedim(-1, 2)  # channels last
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    wide[..., 1 : 1 + t.shape[-1]] = t
    yield wide[..., 1 : 1 + t.shape[-1]]  # cut from wider lines
    yield t.transpose(-1, 2).contiguous().transpose(-1, 2)
    yield t.flip(0).repeat_interleave(2, -1)[..., ::2].flip(0)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 3))
def test_any_shape_and_layout(data: st.DataObject, dims: int, dtype: torch.dtype, seed: int) -> None:
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.tuples(*[st.integers(low, high)] * dims)))

    groups = data.draw(st.sampled_from([1, 1, 2, 3, 9, 18]))
    channels = st.integers(1, 40 if groups == 1 else 4)
    kernel, dilation = each(1, 4), each(1, 3)
    size = tuple(e * (k - 1) + 1 + more for e, k, more in zip(dilation, kernel, each(0, 20 if dims < 3 else 5)))
    problem = Problem(
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(1, 2)),
        groups * data.draw(channels),
        groups * data.draw(channels),
        size,
        kernel,
        each(1, 3),
        each(0, 5),
        dilation,
        groups,
    )
    x, b = problem.operands(dtype, seed=seed)
    truth = true_per_sample(x, b, problem)
    plain_wgrad, plain_sqnorm = reference.conv_wgrad_sqnorm(x, b, *problem.arguments)
    laid_x, laid_b = (list(layouts(t))[data.draw(st.integers(0, 4))] for t in (x, b))
    for op in OPS:
        wgrad, sqnorm = call(op, laid_x, laid_b, problem)
        assert_honest(sqnorm, plain_sqnorm, squares(truth))
        if wgrad is not None:
            assert_honest(wgrad, plain_wgrad, truth.sum(0))


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradients(op: str) -> None:
    problem = PROBLEMS["2-d"]
    x, b = problem.operands(torch.float64)
    b = b[..., :1, :1].expand_as(b)  # of a mean over the image
    torch.testing.assert_close(call(op, x, b, problem), call(op, x, b.contiguous(), problem), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEMS["2-d"]._replace(B=0),
        PROBLEMS["2-d"]._replace(R=0),
        PROBLEMS["2-d"]._replace(c=0),
        PROBLEMS["2-d"]._replace(d=0),
        PROBLEMS["2-d"]._replace(missing=8),
    ],
    ids=["no samples", "no runs", "no channels", "no outputs", "no positions"],
)
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_zero(op: str, problem: Problem) -> None:
    wgrad, sqnorm = call(op, *problem.operands(torch.float32), problem)
    assert torch.equal(sqnorm, torch.zeros(problem.B))
    if wgrad is not None:
        assert torch.equal(wgrad, torch.zeros(problem.d, problem.c, *problem.kernel))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@problems
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_stay_with_their_sample(op: str, problem: Problem, bad: float) -> None:
    problem = problem._replace(B=4)
    x, b = problem.operands(torch.float32)
    clean = call(op, x, b, problem)[1]
    x[1, -1, -1].flatten()[0] = bad  # a view: the first element that the last channel has
    b[2, -1, -1].flatten()[-1] = bad  # in the corner, where the vector's padding is next door
    dirty = call(op, x, b, problem)[1]
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])
    plain = reference.conv_sqnorm(x, b, *problem.arguments)
    assert torch.equal(dirty.isfinite(), plain.isfinite())
    assert not dirty[2].isfinite()


# --- same inputs, same bits ---


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["2-d, several strips", "2-d, depthwise", "2-d, many channels and few positions", "2-d, many samples"])
@pytest.mark.parametrize("op", ["conv_sqnorm", "conv_wgrad_sqnorm"])
def test_bits_do_not_depend_on_threads(op: str, name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]._replace(B=60)
    x, b = problem.operands(dtype)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append([t for t in call(op, x, b, problem) if t is not None])
    for result in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(result, results[0], strict=True))


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_lesser_instruction_sets_agree(capability: str) -> None:
    code = (
        "import torch; from ghostgrad import _C, ops, reference as r\n"
        f"assert _C.cpu_capability() in ('portable', {capability!r})\n"
        "torch.manual_seed(0)\n"
        "for c, d, groups in ((5, 37, 1), (24, 24, 24), (70, 90, 1)):\n"
        "    x, b, a = torch.randn(3, 1, c, 9, 10), torch.randn(3, 1, d, 5, 10), ((3, 3), (2, 1), (1, 1), (1, 1), groups)\n"
        "    for x, y in zip((ops.conv_sqnorm(x, b, *a), *ops.conv_wgrad_sqnorm(x, b, *a)), (r.conv_sqnorm(x, b, *a), *r.conv_wgrad_sqnorm(x, b, *a))):\n"
        "        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "GHOSTGRAD_CPU_CAPABILITY": capability})


# --- memory ---


@needs_peak_memory
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("size", "channels"), [((64, 64), 64), ((7, 7), 512)], ids=["many positions", "many channels"])
def test_no_patches_and_no_per_sample_gradients(op: str, size: Sequence[int], channels: int) -> None:
    # Patches of the batch would take 576 or 55 MiB, per-sample gradients 9 or 576 MiB.
    code = f"""
import torch
from ghostgrad import ops

torch.set_num_threads(2)
x, b = (torch.randn(64, 1, {channels}, *{tuple(size)}) for _ in range(2))
arguments = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
first = ops.{op}(x[:2, :, :8], b[:2, :, :8], *arguments)
weight = torch.randn({channels}, {channels}, 3, 3)
torch.ops.aten.convolution_backward(b[:2, 0], x[:2, 0], weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, (False, True, False))
print(peak(lambda: ops.{op}(x, b, *arguments)))
"""
    extra, weight = in_own_process(code), channels * channels * 9 * 4 / 2**20
    assert extra < 2 * weight + 12, f"{extra:.1f} MiB beside the operands, on two threads"


@needs_peak_memory
def test_a_step_with_norms_needs_little_more_memory_than_a_plain_one() -> None:
    # Patches of the batch would take 144 MiB in the last layer, its per-sample gradients 9 MiB.
    code = """
import ghostgrad as gg
import torch
from torch import nn

def plain():
    model(x).square().mean().backward()

def tapped():
    with gg.tap(model) as tap:
        plain()
    tap.sqnorms()

torch.set_num_threads(2)
layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
model, x = nn.Sequential(*layers), torch.randn(64, 3, 32, 32)
plain()
tapped()
def of(step):
    model.zero_grad()
    return peak(step)

pairs = [(of(tapped), of(plain)) for _ in range(5)]
print(min(tapped for tapped, _ in pairs) - min(plain for _, plain in pairs))
"""
    # Freed memory goes back at once, so that peaks are of what is in use.
    extra = in_own_process(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    assert extra < 4, f"{extra:.1f} MiB more than a plain step"


# --- errors ---


def test_errors_name_op_argument_rule_and_value() -> None:
    problem = PROBLEMS["2-d"]
    x, b = problem.operands(torch.float32)
    kernel, stride, padding, dilation, groups = problem.arguments
    for op in OPS:
        function = getattr(ops, op)
        with pytest.raises(ValueError, match=rf"{op}: x must be \(B, R, c, \*size\) with one to three dimensions of size, got \(3, 1, 3\)"):
            function(x[..., 0, 0], b, *problem.arguments)
        with pytest.raises(ValueError, match=rf"{op}: b must be \(B, R, d, \*out\) with as many dimensions as x, got \(3, 1, 16, 9\)"):
            function(x, b[..., 0], *problem.arguments)
        with pytest.raises(ValueError, match=rf"{op}: x and b must agree in batch and runs, got \(2, 1, 3, 9, 8\) and \(3, 1, 16, 9, 8\)"):
            function(x[:2], b, *problem.arguments)
        with pytest.raises(ValueError, match=rf"{op}: x and b must be on the same device, got cpu and meta"):
            function(x, b.to("meta"), *problem.arguments)
        with pytest.raises(TypeError, match=rf"{op}: x and b must have the same dtype, got torch.float32 and torch.bfloat16\. Under autocast"):
            function(x, b.bfloat16(), *problem.arguments)
        with pytest.raises(TypeError, match=rf"{op}: x must be float32, .* got torch.int64"):
            function(x.long(), b, *problem.arguments)
        with pytest.raises(ValueError, match=rf"{op}: groups must divide the channels of x and b, got 2 groups"):
            function(x, b, kernel, stride, padding, dilation, 2)
        with pytest.raises(ValueError, match=rf"{op}: stride must be 2 integers of at least 1, got \(1, 0\)"):
            function(x, b, kernel, (1, 0), padding, dilation, groups)
        with pytest.raises(ValueError, match=rf"{op}: padding must be 2 integers of at least 0, got \(1,\)"):
            function(x, b, kernel, stride, (1,), dilation, groups)
        with pytest.raises(ValueError, match=rf"{op}: b must not be larger than the convolution's output, which is \(7, 6\) here"):
            function(x, b, kernel, stride, (0, 0), dilation, groups)


def test_the_bindings_check_again() -> None:
    problem = PROBLEMS["2-d"]
    x, b = problem.operands(torch.float32)
    kernel, stride, padding, dilation, groups = problem.arguments
    for op in OPS:
        function = getattr(torch.ops.ghostgrad, op)
        with pytest.raises(RuntimeError, match=rf"{op}: x must be \(B, R, channels, \*size\)"):
            function(x[..., 0, 0], b, *problem.arguments)
        with pytest.raises(RuntimeError, match=rf"{op}: b must be \(B, R, out_channels, \*out\)"):
            function(x, b[..., 0], *problem.arguments)
        with pytest.raises(RuntimeError, match=rf"{op}: x and b must agree in batch and runs"):
            function(x[:2], b, *problem.arguments)
        with pytest.raises(RuntimeError, match=rf"{op}: x and b must have the same dtype"):
            function(x, b.double(), *problem.arguments)
        with pytest.raises(RuntimeError, match=rf"{op}: groups must divide the channels of x and b, got 0 groups"):
            function(x, b, kernel, stride, padding, dilation, 0)
        with pytest.raises(RuntimeError, match=rf"{op}: kernel must be at least 1, got 0"):
            function(x, b, (3, 0), stride, padding, dilation, groups)
        with pytest.raises(RuntimeError, match=rf"{op}: dilation must have 2 elements, got 1"):
            function(x, b, kernel, stride, padding, (1,), groups)
        with pytest.raises(RuntimeError, match=rf"{op}: dimension 3 of b must be at most 7, the convolution's output size"):
            function(x, b, kernel, stride, (0, 0), dilation, groups)
