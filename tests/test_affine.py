"""Scales and shifts under the tap: every arrangement of samples, positions and channels, and what backward keeps in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostgrad as gg
import test_tap
from helpers import build, in_own_process, loss_fn, needs_peak_memory
from models import B, Case, D, Lambda, T, image, sequence

LAYERS: list[tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]] = [
    ("layer", lambda: nn.LayerNorm(D), lambda: torch.randn(B, T, D)),
    ("group", lambda: nn.GroupNorm(2, 4), lambda: torch.randn(B, 4, 5, 3)),
    ("batch", lambda: nn.BatchNorm2d(3).eval(), lambda: torch.randn(B, 3, 4, 5)),
    ("instance", lambda: nn.InstanceNorm1d(3, affine=True), lambda: torch.randn(B, 3, 7)),
    ("rms", lambda: nn.RMSNorm(D), lambda: torch.randn(B, T, D)),
]


def _running(norm: nn.Module, *size: int) -> nn.Module:
    """A normalisation in eval mode whose running statistics are not those it starts with."""
    norm(torch.randn(5, 3, *size) * 2 + 1)
    return nn.Sequential(nn.Conv2d(3, 3, 1) if len(size) == 2 else nn.Conv1d(3, 3, 1), norm.eval())


def _time_major_norm(m: Lambda, x: Tensor) -> Tensor:
    return F.layer_norm(torch.tanh(x.transpose(0, 1)), (D,), m.s, m.c).transpose(0, 1)


def _tokens_as_rows(m: Lambda, x: Tensor) -> Tensor:
    return F.group_norm(x.flatten(0, 1).tanh(), 3, m.s, m.c).view_as(x)


def _frames(m: Lambda, x: Tensor) -> Tensor:
    frames = x.flatten(0, 1)  # (B * T, 3, 4, 4)
    return F.group_norm(F.conv2d(frames, m.w, m.c), 2, m.s, m.c).view(*x.shape[:2], 4, 3, 3)


def _sizes(m: Lambda, x: Tensor) -> Tensor:
    return F.conv2d(x, m.w, m.c).flatten(1).mean(1, keepdim=True) + F.conv2d(x[..., :3], m.w, m.c).sin().flatten(1)


def _everywhere(m: Lambda, x: Tensor) -> Tensor:
    """One parameter as bias, scale and shift of a norm, and elementwise."""
    return F.layer_norm(F.linear(x, m.w, m.c), (D,), m.c, m.c) * m.c + m.c


CASES = [
    Case("layer norm, time-major", lambda: Lambda(_time_major_norm, s=(D,), c=(D,)), sequence()),
    Case(
        "layer norm, used twice", lambda: Lambda(lambda m, x: F.layer_norm(F.layer_norm(x, (D,), m.s, m.c).tanh(), (D,), m.s, m.c), s=(D,), c=(D,)), sequence()
    ),
    Case(
        "layer norm, twice with other positions",
        lambda: Lambda(lambda m, x: F.layer_norm(torch.cat([F.layer_norm(x, (D,), m.s), x], 1).tanh(), (D,), m.s), s=(D,)),
        sequence(),
    ),
    Case("layer norm, scale and shift tied", lambda: Lambda(lambda m, x: F.layer_norm(x, (D,), m.s, m.s), s=(D,)), sequence()),
    Case("layer norm, derived scale", lambda: Lambda(lambda m, x: F.layer_norm(x, (D,), m.s + 1, m.c), s=(D,), c=(D,)), sequence(), True),
    Case("layer norm, part of a parameter", lambda: Lambda(lambda m, x: F.layer_norm(x, (D,), m.s[0], m.s[1]), s=(2, D)), sequence()),
    Case("layer norm, transposed input", lambda: Lambda(lambda m, x: F.layer_norm(x.mT.tanh(), (T,), m.s, m.c), s=(T,), c=(T,)), sequence()),
    Case("layer norm, two dimensions", lambda: Lambda(lambda m, x: F.layer_norm(x, (6, 5), m.s, m.c), s=(6, 5), c=(6, 5)), image()),
    Case("group norm, tokens as rows", lambda: Lambda(_tokens_as_rows, s=(D,), c=(D,)), sequence()),
    Case("group norm, flat", lambda: nn.GroupNorm(2, D), lambda: (torch.randn(B, D),)),
    Case("group norm, channels last", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last), image()),
    Case("group norm, volumes", lambda: nn.GroupNorm(2, 4), lambda: (torch.randn(B, 4, 2, 3, 2),)),
    Case("group norm and conv bias on frames", lambda: Lambda(_frames, w=(4, 3, 2, 2), c=(4,), s=(4,)), lambda: (torch.randn(B, T, 3, 4, 4),)),
    Case("batch norm, flat", lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D).eval()), lambda: (torch.randn(B, D),)),
    Case("batch norm, running statistics", lambda: _running(nn.BatchNorm2d(3), 4, 4), image()),
    Case(
        "instance norm, running statistics", lambda: _running(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), 5), lambda: (torch.randn(B, 3, 5),)
    ),
    Case("conv bias, two sizes", lambda: Lambda(_sizes, w=(4, 3, 2, 2), c=(4,)), image(), True),
    Case("one parameter everywhere", lambda: Lambda(_everywhere, w=(D, D), c=(D,)), sequence()),
    Case("shift of one channel", lambda: Lambda(lambda m, x: torch.tanh(x @ m.w + m.c), w=(D, 1), c=(1,)), sequence()),
    Case("shift along the middle", lambda: Lambda(lambda m, x: torch.tanh(x + m.c) * m.s, c=(T, 1), s=(1, T, 1)), sequence()),
    Case("shift of time-major steps", lambda: Lambda(lambda m, x: torch.tanh(x.transpose(0, 1) + m.c).transpose(0, 1), c=(T, 1, D)), sequence()),
]


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_and_gradients_equal_the_loop(case: Case, dtype: torch.dtype) -> None:
    test_tap.test_norms_and_gradients_equal_the_loop(case, dtype)


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_penalty_gradient_equals_autograd(case: Case) -> None:
    test_tap.test_penalty_gradient_equals_autograd(case)


@pytest.mark.parametrize(("name", "layer", "draw"), LAYERS, ids=[name for name, _, _ in LAYERS])
def test_untracked_scale_or_shift_gets_its_gradient(name: str, layer: Callable[[], nn.Module], draw: Callable[[], Tensor]) -> None:
    model, (x,), target = build(Case(name, layer, lambda: (draw(),)), torch.float64)
    x.requires_grad_()
    loss_fn(model(x), target).backward()
    plain = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    exact = gg.sqnorms(model, loss_fn, x, target, by_param=True)
    for chosen in exact:
        model.zero_grad()
        x.grad = None
        with gg.tap(model, params=[chosen]) as tap:
            loss_fn(model(x), target).backward()
        torch.testing.assert_close(tap.sqnorms(), exact[chosen], rtol=1e-12, atol=0)
        for n, value in {"x": x, **dict(model.named_parameters())}.items():
            torch.testing.assert_close(value.grad, plain[n], msg=f"{n} with {chosen} tapped")
        other = [p for n, p in model.named_parameters() if n != chosen]
        for p in other:
            p.requires_grad_(False)
        torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, target), exact[chosen], rtol=1e-12, atol=0)
        for p in other:
            p.requires_grad_(True)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.LayerNorm(3), (2, 2, 3)), (nn.GroupNorm(2, 4), (2, 4, 2)), (nn.BatchNorm1d(2).eval(), (2, 2, 2)), (nn.InstanceNorm1d(2, affine=True), (2, 2, 3))],
    ids=["layer", "group", "batch", "instance"],
)
def test_second_and_third_derivatives_through_the_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x, target = layer.double(), torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64)
    names = [n for n, _ in model.named_parameters()]

    def norms(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters))
        return gg.sqnorms(lambda x: torch.func.functional_call(model, named, (x,)).sin(), loss_fn, x, target, params=named, create_graph=True)

    inputs = (x, *((p.detach() + 0.3 * torch.randn_like(p)).requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradcheck(norms, inputs)
    assert torch.autograd.gradgradcheck(norms, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_narrow_layers_give_what_plain_ones_give(mixed: bool, dtype: torch.dtype) -> None:
    """Results and gradients of layers in a narrow dtype, with parameters in it or in float32, as without the tap."""
    for name, layer, draw in LAYERS[:-1]:  # torch's rms norm rounds once, where the rule rounds before and after it scales
        model, (x,), target = build(Case(name, layer, lambda draw=draw: (draw(),)), torch.float32)
        model, x = (model if mixed else model.to(dtype)), x.to(dtype).requires_grad_()
        plain = model(x)
        loss_fn(plain.float(), target).backward()
        expected = [x.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        x.grad = None
        with gg.tap(model) as tap:
            out = model(x)
            loss_fn(out.float(), target).backward()
        assert out.dtype == plain.dtype
        torch.testing.assert_close(out, plain)
        for got, e in zip([x.grad, *(p.grad for p in model.parameters())], expected):
            assert got.dtype == e.dtype
            torch.testing.assert_close(got, e, rtol=0.02, atol=0.02 * float(e.abs().max()), msg=name)
        wide = gg.sqnorms(model.double(), loss_fn, x.detach().double(), target.double())
        torch.testing.assert_close(tap.sqnorms().double(), wide, rtol=0.05, atol=0)


@pytest.mark.parametrize(("dims", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_gives_the_same(dims: int, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, x, g = nn.GroupNorm(2, 4).double(), *torch.randn(2, B, 4, *(2, 3, 5)[:dims], dtype=torch.float64)
    results = []
    for layout_of_x in (torch.contiguous_format, memory_format):
        for layout_of_g in (torch.contiguous_format, memory_format):
            model.zero_grad()
            z = x.clone(memory_format=layout_of_x).requires_grad_()
            with gg.tap(model, reduction="sum") as tap:
                model(z).backward(g.clone(memory_format=layout_of_g))
            results.append((tap.sqnorms(), z.grad, model.weight.grad, model.bias.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_groups_that_do_not_divide_the_channels() -> None:
    model = Lambda(lambda m, x: F.group_norm(x, 4, m.s), s=(D,))
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        gg.sqnorms(model, loss_fn, torch.randn(B, D, 3), torch.randn(B))


def test_nothing_lives_longer_than_the_step() -> None:
    """The nodes of the layers keep their inputs, and nothing keeps the nodes: results go without the garbage collector."""
    for name, layer, draw in LAYERS:
        model, (x,), target = build(Case(name, layer, lambda draw=draw: (draw(),)))
        test_tap.gc.disable()
        try:
            with gg.tap(model):
                out = model(x)
                ref = test_tap.weakref.ref(out)
                loss_fn(out, target).backward()
                del out
                assert ref() is None, name
        finally:
            test_tap.gc.enable()


@needs_peak_memory
@pytest.mark.parametrize("layer", ["nn.LayerNorm(4096)", "nn.GroupNorm(4, 4096)", "nn.Linear(8, 4096)", "nn.Conv1d(8, 4096, 1)"])
def test_no_buffer_of_batch_by_channels(layer: str) -> None:
    """A step with norms takes less memory beyond the plain step's than a quarter of one gradient per sample, 64 MiB in float32 here.

    What it may take: 16 totals in float64 of scale and shift each (2 MiB), and a few vectors.
    """
    shape = {"nn.LayerNorm(4096)": "4096, 4096", "nn.GroupNorm(4, 4096)": "4096, 4096", "nn.Linear(8, 4096)": "4096, 8", "nn.Conv1d(8, 4096, 1)": "4096, 8, 1"}
    code = f"""
import torch
from torch import nn
import ghostgrad as gg

torch.set_num_threads(1)
model, x, grad = {layer}, torch.randn({shape[layer]}, requires_grad=True), torch.randn({"4096, 4096, 1" if "Conv" in layer else "4096, 4096"})

def plain(x):
    model(x).backward(grad[: len(x)])

def tapped(x):
    with gg.tap(model, reduction="sum") as tap:
        model(x).backward(grad[: len(x)])
    tap.sqnorms()

peaks = []
for step in (plain, tapped):
    for rows in (2, None):
        x.grad = None
        model.zero_grad()
        needed = peak(lambda: step(x if rows is None else x[:rows]))
    peaks.append(needed)
print(peaks[1] - peaks[0])
"""
    extra = in_own_process(code, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert extra < 16, f"{extra:.1f} MiB more than the plain step"
