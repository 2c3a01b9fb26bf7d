"""The noise ops: against the reference, by opcheck and gradcheck; the same bits for any shards, threads and instruction set; the statistics of noise."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from ghostgrad import _C, noise, reference
from ghostgrad.noise import Block

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() and _C.with_cuda else ["cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(0,), (1,), (5,), (3, 43), (128,), (2, 65), (4097,), (32768,), (70, 1001)]  # around blocks of bits, vectors and units of work
SEED = 0x123456789ABCDEF


def draw(seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu", sizes: Sequence[tuple[int, ...]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device) for size in sizes]


def xi(count: int, seed: int, distribution: str, block: Block | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The noise itself, as the op draws it."""
    x = torch.zeros(count, dtype=dtype, device=device)
    noise.perturb_([x], seed, 1.0, distribution, None if block is None else [block])
    return x


# --- known answers ---


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_published_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in reference.philox(counter, key)) == answer


def test_the_address_is_kept() -> None:
    # The first call of Philox above, read through the op: seed 0, parameter 0, Rademacher, block 0. These bits must never change, nor those of the others.
    bits = [word >> bit & 1 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8) for bit in range(32)]
    assert xi(128, 0, "rademacher").tolist() == [1.0 - 2.0 * bit for bit in bits]
    assert [value.hex() for value in xi(4, 0, "normal").tolist()] == [
        "0x1.a6b3960000000p+0",
        "0x1.b0f8760000000p-1",
        "-0x1.a232200000000p-4",
        "-0x1.d9a5360000000p-4",
    ]
    words = [int(word) for word in reference.philox((0, 0, 0, 2), (0, 0))]
    assert xi(4, 0, "uniform").tolist() == [(word >> 8) * 2.0**-24 + 2.0**-25 - 0.5 for word in words]


# --- against the reference ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb_is_the_references(dtype: torch.dtype, distribution: str, device: str) -> None:
    got, expected = draw(1, dtype, device), draw(1, dtype, device)
    before = draw(1, dtype, device)
    noise.perturb_(got, SEED, 0.37, distribution)
    reference.perturb_(expected, SEED, 0.37, distribution)
    for g, e, b in zip(got, expected, before):
        if distribution == "normal":  # xi within 5 units in the last place, then one rounding of each step
            torch.testing.assert_close(g, e, rtol=2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6, atol=0.37 * 7 * 5 * 2.0**-23)
        else:
            assert torch.equal(g, e)
        assert b.numel() == 0 or not torch.equal(g, b)


@pytest.mark.parametrize("device", DEVICES)
def test_normal_noise_is_box_muller(device: str) -> None:
    got, exact = xi(1 << 20, SEED, "normal", device=device), reference.noise(torch.arange(1 << 20), 0, SEED, "normal")
    unit = torch.finfo(torch.float32).eps * exact.abs().clamp_min(0.125).log2().floor().exp2()  # in the last place
    assert ((got.cpu() - exact).abs() / unit).max() <= 5
    assert exact.abs().max() > 4.5


@pytest.mark.parametrize("device", DEVICES)
def test_all_dtypes_draw_the_same_noise(device: str) -> None:
    for distribution in noise.DISTRIBUTIONS:
        single = xi(1000, 3, distribution, device=device)
        assert torch.equal(xi(1000, 3, distribution, dtype=torch.float64, device=device), single.double())
        assert torch.equal(xi(1000, 3, distribution, dtype=torch.bfloat16, device=device), single.bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("two", [True, False])
def test_probe_dot_is_the_references(two: bool, dtype: torch.dtype, distribution: str, device: str) -> None:
    plus, minus = draw(1, dtype, device), draw(2, dtype, device) if two else None
    kwargs: dict[str, Any] = {"seed": SEED, "sigma": 0.01, "distribution": distribution}
    got, expected = noise.probe_dot(plus, minus, **kwargs), reference.probe_dot(plus, minus, **kwargs)
    assert got.dtype == torch.float64 and got.shape == (len(plus),)
    scale = torch.tensor([max(1.0, p.numel()) ** 0.5 for p in plus], dtype=torch.float64, device=device) / 0.02
    assert ((got - expected).abs() <= (1e-6 if distribution == "normal" else 1e-13) * scale).all()
    assert got[0] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_difference_is_the_references(dtype: torch.dtype, device: str) -> None:
    for B in (0, 1, 1000):
        plus, zero, minus = draw(3, dtype, device, [(B,)] * 3)
        assert torch.equal(noise.second_difference(plus, zero, minus, 0.01), reference.second_difference(plus, zero, minus, 0.01))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_nso_step_is_the_references(
    mix: float, weight_decay: float, momentum: float, dampening: float, nesterov: bool, first: bool, dtype: torch.dtype, device: str
) -> None:
    kwargs: dict[str, Any] = {"lr": 0.1, "passes": 4, "mix": mix, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    kwargs |= {"nesterov": nesterov, "first": first}
    grads, centre = draw(2, dtype, device), draw(3, dtype, device) if mix else []
    results = []
    for step in (noise.nso_step_, reference.nso_step_):
        params, momenta = draw(1, dtype, device), draw(4, dtype, device) if momentum else []
        step(params, grads, centre, momenta, **kwargs)
        results.append([*params, *momenta])
    for got, expected in zip(*results):
        if dtype in (torch.float32, torch.float64) and (device == "cuda" or _C.cpu_capability() != "portable"):
            assert torch.equal(got, expected)
        else:  # rounded once instead of after each operation
            torch.testing.assert_close(got, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_nso_step_is_sgd() -> None:
    for kwargs in ({}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.8, "dampening": 0.3}):
        mine, theirs = draw(1), [p.requires_grad_() for p in draw(1)]
        sgd = torch.optim.SGD(theirs, lr=0.05, **kwargs)  # type: ignore[arg-type]
        momenta = [torch.empty_like(p) for p in mine] if "momentum" in kwargs else []
        for step in range(4):
            plus, minus = draw(10 + step), draw(20 + step)
            for p, a, b in zip(theirs, plus, minus):
                p.grad = (a + b) / 2
            sgd.step()
            noise.nso_step_(mine, [a + b for a, b in zip(plus, minus)], (), momenta, lr=0.05, passes=2, first=step == 0, **kwargs)  # type: ignore[arg-type]
        for p, q in zip(mine, theirs):
            assert torch.equal(p, q) or _C.cpu_capability() == "portable"


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout(device: str) -> None:
    """Indices are those of rows, whatever the memory looks like."""
    x = torch.randn(4, 6, 5, 7, device=device)
    for y in (
        x.to(memory_format=torch.channels_last),
        x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        torch.randn(4, 6, 5, 14, device=device)[..., ::2],
    ):
        y, expected = y.copy_(x), x.clone()
        plus = [y.clone(memory_format=torch.preserve_format)]
        assert torch.equal(noise.probe_dot(plus, seed=1), noise.probe_dot([x], seed=1))
        noise.perturb_([y], 5, 0.1, "normal")
        noise.perturb_([expected], 5, 0.1, "normal")
        assert torch.equal(y, expected)
        mine, straight = y.clone(memory_format=torch.preserve_format), expected.clone()
        noise.nso_step_([mine], [y], lr=0.1, passes=1)
        noise.nso_step_([straight], [expected], lr=0.1, passes=1)
        assert torch.equal(mine, straight)


# --- the same bits ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_shards_draw_what_the_full_tensor_would(distribution: str, device: str) -> None:
    full = torch.zeros(37, 41, 11, device=device)
    noise.perturb_([full, full.new_zeros(3)], 9, 1.0, distribution, [Block(5, 0, full.numel(), full.numel()), Block(6, 0, 3, 3)])
    flat = full.flatten()
    for begin, end in ((0, 1), (1, 130), (127, 129), (130, 16000), (16684, 16687)):
        part = torch.zeros(end - begin, device=device)
        noise.perturb_([part], 9, 1.0, distribution, [Block(5, begin, end - begin, end - begin)])
        assert torch.equal(part, flat[begin:end])
    columns = torch.zeros(37, 13, 11, device=device)
    block = Block(5, 7 * 11, 13 * 11, 41 * 11)
    noise.perturb_([columns], 9, 1.0, distribution, [block])
    assert torch.equal(columns, full[:, 7:20])
    grads = torch.randn(37, 41, 11, device=device)
    whole = noise.probe_dot([grads], seed=9, distribution=distribution, blocks=[Block(5, 0, grads.numel(), grads.numel())])
    parts = [grads[:, :7], grads[:, 7:20], grads[:, 20:]]
    blocks = [Block(5, 0, 77, 451), block, Block(5, 220, 231, 451)]
    torch.testing.assert_close(noise.probe_dot(parts, seed=9, distribution=distribution, blocks=blocks).sum()[None], whole, rtol=1e-12, atol=1e-12)


def test_far_indices() -> None:
    offset, number = (1 << 41) + 77, 0xFFFFFFFF
    for distribution in ("rademacher", "uniform"):
        got = xi(500, SEED, distribution, Block(number, offset, 500, 500))
        assert torch.equal(got, reference.noise(offset + torch.arange(500), number, SEED, distribution))


_HASH = """
import hashlib, torch
from ghostgrad import _C, noise
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for distribution in noise.DISTRIBUTIONS:
            w, g = ([torch.randn(n, generator=generator).to(dtype) for n in (5, 130, 200_003)] for _ in range(2))
            noise.perturb_(w, 11, 0.1, distribution)
            digest.update(noise.probe_dot(w, g, seed=11, sigma=0.1, distribution=distribution).numpy().tobytes())
            for x in w:
                digest.update(x.view(torch.uint8).numpy().tobytes())
    print(_C.cpu_capability(), digest.hexdigest())
"""


def test_threads_and_instruction_sets_do_not_show() -> None:
    lines = []
    for capability in ("portable", "avx2", "avx512", "avx512bf16"):
        environment = os.environ | {"GHOSTGRAD_CPU_CAPABILITY": capability}
        lines += subprocess.run([sys.executable, "-c", _HASH], check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert len(lines) == 12 and len({line.split()[1] for line in lines}) == 1, lines
    assert {line.split()[0] for line in lines} >= {"portable", _C.cpu_capability()}


@pytest.mark.cuda
@pytest.mark.skipif(len(DEVICES) == 1, reason="needs CUDA")
def test_cuda_draws_the_cpus_bits() -> None:
    for distribution in noise.DISTRIBUTIONS:
        cpu, cuda = draw(1), draw(1, device="cuda")
        noise.perturb_(cpu, SEED, 0.1, distribution)
        noise.perturb_(cuda, SEED, 0.1, distribution)
        assert all(torch.equal(x, y.cpu()) for x, y in zip(cpu, cuda))


@pytest.mark.cuda
@pytest.mark.skipif(len(DEVICES) == 1, reason="needs CUDA")
def test_a_cuda_graph_captures_it() -> None:
    params, once = draw(1, device="cuda"), draw(1, device="cuda")
    noise.perturb_(once, 3, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise.perturb_(params, 3, 0.5)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(params, once))


# --- statistics, of fixed seeds ---

COUNT = 1 << 20
# mean, variance, third and fourth moments of xi, and the eighth, which gives the fourth its deviation
MOMENTS = {"rademacher": (0, 1, 0, 1, 1), "normal": (0, 1, 0, 3, 105), "uniform": (0, 1 / 12, 0, 1 / 80, 1 / 2304)}


@pytest.mark.parametrize("seed", [0, 1, SEED])
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_moments(distribution: str, seed: int) -> None:
    x = xi(COUNT, seed, distribution, dtype=torch.float64)
    mean, variance, third, fourth, eighth = MOMENTS[distribution]
    sixth = {"rademacher": 1, "normal": 15, "uniform": 1 / 448}[distribution]
    for power, moment, second in ((1, mean, variance), (2, variance, fourth), (3, third, sixth), (4, fourth, eighth)):
        error = abs(x.pow(power).mean().item() - moment)
        assert error <= 4 * math.sqrt(max(second - moment**2, 0) / COUNT) + 1e-12, power
    assert set(x.unique().tolist()) == {-1.0, 1.0} or distribution != "rademacher"


@pytest.mark.parametrize("seed", [0, 1, SEED])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_kolmogorov_smirnov(distribution: str, seed: int) -> None:
    law = stats.norm.cdf if distribution == "normal" else stats.uniform(-0.5, 1).cdf
    assert stats.kstest(xi(COUNT, seed, distribution).double().numpy(), law).pvalue > 1e-3


def test_runs_of_signs() -> None:
    # The lengths of runs of equal signs are geometric.
    x = xi(COUNT, 2, "rademacher")
    lengths = (x[1:] != x[:-1]).nonzero().flatten().diff().clamp_max(15).bincount(minlength=16)[1:]
    expected = torch.tensor([0.5**k for k in range(1, 15)] + [0.5**14], dtype=torch.float64) * lengths.sum()
    assert stats.chisquare(lengths.double().numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_nothing_is_correlated(distribution: str) -> None:
    """Neighbours at all short distances, seeds, parameters, and distributions."""
    x = xi(COUNT, 5, distribution, dtype=torch.float64)
    others = [xi(COUNT, seed, distribution, dtype=torch.float64) for seed in (4, 6, 5 + (1 << 32))]
    others += [xi(COUNT, 5, distribution, Block(number, 0, COUNT, COUNT), torch.float64) for number in (1, 2, 1 << 16)]
    others += [xi(COUNT, 5, other, dtype=torch.float64) for other in noise.DISTRIBUTIONS if other != distribution]
    pairs = [(x, other) for other in others] + [(x[lag:], x[:-lag]) for lag in (*range(1, 9), 16, 32, 64, 127, 128, 129, 512)]
    pairs += [(a.square(), b.square()) for a, b in pairs if distribution != "rademacher"]
    for a, b in pairs:
        a, b = a - a.mean(), b - b.mean()
        if a.std() > 0 and b.std() > 0:
            assert abs((a * b).mean() / (a.std() * b.std())) < 4.5 / math.sqrt(len(a))


def test_probes_are_unbiased_and_have_the_variance_of_the_formulas() -> None:
    """``xi^T H xi`` by ``probe_dot``: mean tr H; variance 2 (|H|^2 - sum H_jj^2) for Rademacher, 2 |H|^2 for normal noise."""
    d, probes = 24, 20_000
    h = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = h + h.T
    for distribution, variance in (("rademacher", 2 * (h.square().sum() - h.diag().square().sum())), ("normal", 2 * h.square().sum())):
        dots = torch.cat(
            [noise.probe_dot([h @ xi(d, seed, distribution, dtype=torch.float64)], seed=seed, distribution=distribution) for seed in range(probes)]
        )
        assert abs(dots.mean() - h.trace()) < 4 * math.sqrt(variance / probes)
        assert abs(dots.var() / variance - 1) < 0.1
    diagonal = torch.arange(1.0, 25, dtype=torch.float64)
    for seed in range(20):
        assert noise.probe_dot([diagonal * xi(d, seed, "rademacher", dtype=torch.float64)], seed=seed).item() == diagonal.sum()


# --- as ops of PyTorch ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blocks", [None, [3, 10, 5, 5, 4, 0, 2, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, blocks: list[int] | None, device: str) -> None:
    ops = torch.ops.ghostgrad
    sizes = [(5,), (3, 4)]
    for distribution in noise.DISTRIBUTIONS:
        torch.library.opcheck(ops.perturb_.default, (draw(1, dtype, device, sizes), 1, 0.1, distribution, blocks))
        for minus in (None, draw(2, dtype, device, sizes)):
            torch.library.opcheck(ops.probe_dot.default, (draw(1, dtype, device, sizes), minus, 1, 0.1, distribution, blocks))
    tensors = [draw(seed, dtype, device, sizes) for seed in range(4)]
    torch.library.opcheck(ops.nso_step_.default, (*tensors, 0.1, 0.5, 2, 0.9, 0.0, 0.1, True, False))
    torch.library.opcheck(ops.nso_step_.default, (*tensors[:2], [], [], 0.1, 0.0, 2))
    for requires_grad in (False, True):
        losses = [x.requires_grad_(requires_grad) for x in draw(1, dtype, device, [(7,)] * 3)]
        torch.library.opcheck(ops.second_difference.default, (*losses, 0.1))
        plus = [x.requires_grad_(requires_grad) for x in draw(1, dtype, device, sizes)]
        torch.library.opcheck(ops.probe_dot.default, (plus, None, 1, 0.1))


def test_gradients() -> None:
    losses = [x.requires_grad_() for x in draw(1, torch.float64, sizes=[(4,)] * 3)]
    assert torch.autograd.gradcheck(lambda *x: noise.second_difference(*x, 0.3), losses)
    assert torch.autograd.gradgradcheck(lambda *x: noise.second_difference(*x, 0.3), losses)
    grads = [x.requires_grad_() for x in draw(1, torch.float64, sizes=[(4,), (2, 3)] * 2)]
    for distribution in noise.DISTRIBUTIONS:
        assert torch.autograd.gradcheck(lambda *x: noise.probe_dot(x[:2], x[2:], seed=1, sigma=0.3, distribution=distribution), grads)  # noqa: B023
    assert torch.autograd.gradcheck(lambda *x: noise.probe_dot(x, seed=1, blocks=[Block(3, 1, 4, 4), Block(3, 5, 3, 9)]), grads[:2])


def test_compiles_without_graph_breaks() -> None:
    def step(w: Tensor, g: Tensor) -> Tensor:
        noise.perturb_([w], 3, 0.1, "normal")
        dot = noise.probe_dot([g], [w], seed=3)
        noise.nso_step_([w], [g], lr=0.1, passes=2)
        return dot + noise.second_difference(w[:2], w[1:3], w[2:4], 0.1).sum()

    torch._dynamo.reset()
    (w, g), (v, _) = draw(1, sizes=[(5,), (5,)]), draw(1, sizes=[(5,), (5,)])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w, g), step(v, g))
    assert torch.equal(w, v)


def test_it_is_in_place_as_pytorchs_own_operations_are() -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="perturb_: a tensor that requires grad is changed in place"):
        noise.perturb_([w], 1, 0.1)
    with pytest.raises(RuntimeError, match="nso_step_: a tensor that requires grad is changed in place"):
        noise.nso_step_([w], [torch.ones(3)], lr=0.1, passes=1)
    assert w.tolist() == [1, 1, 1]
    loss = w.square().sum()
    with torch.no_grad():
        noise.perturb_([w], 1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- errors ---


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda w: noise.perturb_([w], -1, 0.1), ValueError, r"perturb_: seed must be in \[0, 2\^63\), got -1"),
        (lambda w: noise.perturb_([w], 1 << 63, 0.1), ValueError, "seed must be in"),
        (lambda w: noise.perturb_([w], 1, math.nan), ValueError, "perturb_: sigma must be finite, got nan"),
        (lambda w: noise.perturb_([w], 1, 0.1, "cauchy"), ValueError, "distribution must be 'rademacher', 'normal' or 'uniform', got 'cauchy'"),
        (lambda w: noise.perturb_([w.int()], 1, 0.1), TypeError, r"perturb_: params\[0\] must be float32"),
        (lambda w: noise.perturb_([w], 1, 0.1, blocks=[]), ValueError, "one entry for each tensor, got 0 for 1"),
        (lambda w: noise.perturb_([w], 1, 0.1, blocks=[Block(-1, 0, 4, 4)]), RuntimeError, r"number of a parameter must be in \[0, 2\^32\), got -1"),
        (lambda w: noise.perturb_([w], 1, 0.1, blocks=[Block(0, -2, 4, 4)]), RuntimeError, "offset must not be negative, got -2"),
        (lambda w: noise.perturb_([w], 1, 0.1, blocks=[Block(0, 0, 3, 4)]), RuntimeError, "run must divide the elements"),
        (lambda w: noise.perturb_([w], 1, 0.1, blocks=[Block(0, 0, 2, 1)]), RuntimeError, "pitch must not be less"),
        (lambda w: noise.perturb_([w, w[1:]], 1, 0.1), RuntimeError, "params number 0 and number 1 share memory"),
        (lambda w: noise.perturb_([w[:1].expand(4)], 1, 0.1), RuntimeError, "params number 0 is expanded"),
        (lambda w: noise.probe_dot([], seed=1), ValueError, "at least one, got 0"),
        (lambda w: noise.probe_dot([w], [], seed=1), ValueError, "equally many tensors, at least one, got 1 and 0"),
        (lambda w: noise.probe_dot([w], [w[1:]], seed=1), RuntimeError, "same shapes"),
        (lambda w: noise.probe_dot([w], [w.double()], seed=1), RuntimeError, "same dtypes"),
        (lambda w: noise.probe_dot([w], seed=1, sigma=0.0), ValueError, "sigma must be finite and not zero, got 0"),
        (lambda w: noise.second_difference(w, w, w[1:], 0.1), ValueError, "second_difference: minus must be"),
        (lambda w: noise.second_difference(w, w.double(), w, 0.1), TypeError, "second_difference: zero must have the dtype of plus"),
        (lambda w: noise.second_difference(w, w, w, 0.0), ValueError, "sigma must be finite and not zero"),
        (lambda w: noise.nso_step_([w], [], lr=0.1, passes=1), ValueError, "grads must be as many tensors as params"),
        (lambda w: noise.nso_step_([w], [w], lr=0.1, passes=0), ValueError, "passes must be positive, got 0"),
        (lambda w: noise.nso_step_([w], [w], lr=math.inf, passes=1), ValueError, "lr must be finite, got inf"),
        (lambda w: noise.nso_step_([w], [w], lr=0.1, passes=1, mix=0.5), ValueError, "mix is 0.5, so the gradients of the centre are needed"),
        (lambda w: noise.nso_step_([w], [w], lr=0.1, passes=1, momentum=0.9), ValueError, "momenta must be given with a momentum"),
        (lambda w: noise.nso_step_([w], [w], lr=0.1, passes=1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda w: noise.nso_step_([w], [w], (), [w], lr=0.1, passes=1, momentum=0.9), RuntimeError, "share memory"),
    ],
)
def test_errors_say_what_is_wrong(call: Any, error: type[Exception], match: str) -> None:
    w = torch.arange(4.0)
    with pytest.raises(error, match=match):
        call(w)
    assert torch.equal(w, torch.arange(4.0))


def test_nothing_to_do() -> None:
    noise.perturb_([], 1, 0.1)
    noise.nso_step_([], [], lr=0.1, passes=1)
    noise.perturb_([torch.empty(0)], 1, 0.1)
    w = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    noise.perturb_([w], 1, 0.5)
    assert w[0].isnan() and w[1] == math.inf and w[2] == -math.inf
