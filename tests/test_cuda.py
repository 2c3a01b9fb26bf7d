"""What only a GPU can get wrong: streams, graphs, races, devices, addresses beyond 32 bits and off their alignment; and once more that its numbers are right.

Tests whose logic does not need a GPU run on the CPU, too, by the ``device`` fixture: their code is known to work before it meets one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghostgrad as gg
from ghostgrad import _C, ops, reference
from ghostgrad.reference import accumulation_dtype
from helpers import build, loop_sqnorms, loss_fn, relative_error, sample_losses
from models import CASES

GPU = torch.cuda.is_available() and _C.with_cuda
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not GPU, reason="needs a CUDA device and a build with CUDA")]
pytest_cuda = pytest.param("cuda", marks=needs_cuda)


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_cuda:
        test = mark(test)
    return test


@pytest.fixture(params=["cpu", pytest_cuda])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """Products of float32 without TF32, by cuDNN too, unless a test says otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---------------------------------------------------------------------------------------------------------------------------------------
# Every op, over shapes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Arguments = tuple[Any, ...]

# (B, T, p, d): around tiles of 64 and 128, steps of 16 and 32, runs of 256, whole and odd numbers of 16 bytes.
PRODUCTS = [
    (1, 1, 1, 1),
    (3, 1, 17, 5),
    (2, 3, 65, 1),
    (2, 15, 63, 64),
    (2, 16, 64, 64),
    (2, 17, 65, 66),
    (3, 31, 128, 32),
    (2, 33, 129, 127),
    (1, 64, 256, 8),
    (2, 255, 40, 24),
    (2, 256, 72, 136),
    (1, 257, 130, 200),
    (1, 1030, 33, 20),
    (9, 20, 300, 270),
    (150, 2, 8, 16),  # so many samples that their sum moves on to float64
    (600, 5, 24, 40),  # several runs of samples
    (2, 128, 512, 384),
]
ROWS = [(5,), (3, 1), (2, 63), (3, 7, 11), (2, 1025), (1, 32769), (700, 3), (2, 3, 5, 2731), (1, 2_000_000)]
PICKS = [(3, 1, 5, 2), (2, 7, 33, 3), (4, 256, 64, 8192), (2, 600, 7, 1), (2, 2100, 3, 40), (1, 130, 1030, 50), (70, 5, 16, 4)]  # (B, T, d, vocabulary)
AFFINES = [  # (B, T, d, S, G)
    (1, 1, 1, 1, 1),
    (3, 1, 17, 1, 1),
    (3, 5, 64, 1, 1),
    (2, 257, 10, 1, 1),
    (5, 3, 1040, 1, 2),
    (40, 2, 33, 1, 1),
    (3, 1, 12, 35, 4),
    (2, 1, 70, 5, 70),
    (2, 1, 3, 4100, 1),
    (4, 33, 768, 1, 1),
    (1, 2, 5000, 1, 1),
]
# x (B, R, c, *size), d, kernel, stride, padding, dilation, groups
CONVOLUTIONS = [
    ((2, 1, 3, 9), 4, [3], [1], [1], [1], 1),
    ((2, 2, 4, 17), 6, [4], [2], [3], [2], 2),
    ((3, 1, 3, 8, 7), 5, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    ((2, 1, 16, 14, 14), 32, [3, 3], [2, 2], [1, 1], [1, 1], 1),
    ((2, 1, 6, 9, 10), 6, [2, 3], [1, 2], [0, 2], [2, 1], 6),
    ((2, 1, 8, 12, 12), 70, [1, 1], [1, 1], [0, 0], [1, 1], 1),
    ((1, 1, 65, 6, 6), 130, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    ((2, 1, 2, 4, 5, 3), 3, [2, 3, 1], [1, 2, 1], [1, 1, 1], [1, 1, 1], 1),
]


def drawing(dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def product_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    B, T, p, d = shape
    draw = drawing(dtype)
    return draw(B, T, p), draw(B, T, d)


def weighted_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return *product_arguments(shape, dtype), drawing(accumulation_dtype(dtype), 1)(shape[0])


def row_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return (drawing(dtype)(*shape),)


def pick_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    B, T, d, vocabulary = shape
    return torch.randint(-1, vocabulary, (B, T), generator=torch.Generator().manual_seed(0)), drawing(dtype)(B, T, d)


def affine_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    B, T, d, S, G = shape
    draw, wide = drawing(dtype), drawing(accumulation_dtype(dtype), 1)
    return draw(B, T, d, S), draw(B, T, d, S) + 1, wide(B, T, G), wide(B, T, G).abs() + 0.5


def norm_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return *affine_arguments(shape, dtype), drawing(accumulation_dtype(dtype), 2)(shape[2])


def conv_arguments(shape: tuple[Any, ...], dtype: torch.dtype) -> Arguments:
    size, d, kernel, stride, padding, dilation, groups = shape
    out = [(n + 2 * p - e * (k - 1) - 1) // s + 1 for n, k, s, p, e in zip(size[3:], kernel, stride, padding, dilation, strict=True)]
    draw = drawing(dtype)
    return draw(*size), draw(*size[:2], d, *out), kernel, stride, padding, dilation, groups


MAKE: dict[str, tuple[Callable[..., Arguments], list[Any]]] = {
    "outer_sqnorm": (product_arguments, PRODUCTS),
    "gram_sqnorm": (product_arguments, PRODUCTS),
    "wgrad_sqnorm": (weighted_arguments, PRODUCTS),
    "wgrad_moments": (product_arguments, PRODUCTS),
    "row_sqnorm": (row_arguments, ROWS),
    "embedding_sqnorm": (pick_arguments, PICKS),
    "affine_sqnorm": (affine_arguments, AFFINES),
    "norm_affine": (norm_arguments, AFFINES),
    "conv_sqnorm": (conv_arguments, CONVOLUTIONS),
    "conv_wgrad_sqnorm": (conv_arguments, CONVOLUTIONS),
}
EACH = [pytest.param(op, shape, id=f"{op}-{shape}") for op, (_, shapes) in MAKE.items() for shape in shapes]
ONE = {op: shapes[-1] if op not in ("row_sqnorm", "norm_affine") else shapes[5] for op, (_, shapes) in MAKE.items()}


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for part in result for t in flat(part))


def to(device: str | torch.device, arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    def moved(t: Tensor) -> Tensor:
        return t.to(device, dtype if dtype and t.is_floating_point() else t.dtype)

    return tuple(moved(t) if isinstance(t, Tensor) else t for t in arguments)


def run(op: str, arguments: Arguments) -> tuple[Tensor, ...]:
    return flat(getattr(ops, op)(*arguments))


def error(value: Tensor, truth: Tensor, norms: bool, scale: float = 1e-300) -> float:
    """The largest relative one over samples for squared norms, that of the whole in the Frobenius norm for everything else."""
    difference = value.cpu().double() - truth
    if not truth.numel():
        return 0.0
    return ((difference.abs() / truth.abs().clamp_min(scale)).max() if norms else difference.norm() / truth.norm().clamp_min(scale)).item()


def assert_right(op: str, arguments: Arguments, values: tuple[Tensor, ...]) -> None:
    """At most twice the error that the reference makes in the same dtype, plus four units of rounding; in float64, whose reference is the truth, 1e-12."""
    plain = flat(getattr(reference, op)(*arguments))
    truths = flat(getattr(reference, op)(*to("cpu", arguments, torch.float64)))
    batch = arguments[0].shape[0]
    assert len(values) == len(plain)
    for i, (value, alike, truth) in enumerate(zip(values, plain, truths, strict=True)):
        assert value.dtype == alike.dtype and value.shape == alike.shape
        norms = value.shape == (batch,) and not (op in ("affine_sqnorm", "norm_affine") and i in {"affine_sqnorm": (0, 2), "norm_affine": (1, 3)}[op])
        scale = 1e-300
        if op == "norm_affine" and i == 0:  # the gradient is a difference, of terms as large as this
            b, _, _, rstd, weight = to("cpu", arguments, torch.float64)
            scale = float((b * weight[:, None]).norm() * rstd.max())
        allowed = 1e-12 if value.dtype == torch.float64 else 2 * error(alike, truth, norms, scale) + 4 * torch.finfo(value.dtype).eps
        found = error(value, truth, norms, scale)
        assert found <= allowed, f"result {i} of {op}: relative error {found:.3g}, allowed are {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shape"), EACH)
def test_an_op_is_right(op: str, shape: Any, dtype: torch.dtype, device: str) -> None:
    arguments = MAKE[op][0](shape, dtype)
    values = run(op, to(device, arguments))
    assert all(value.device.type == device for value in values)
    assert_right(op, arguments, values)


def relaid(t: Tensor, way: str) -> Tensor:
    """The same values elsewhere in memory."""
    if way == "off by one":  # aligned to an element and to nothing more
        storage = torch.full((t.numel() + 1,), 3, dtype=t.dtype, device=t.device)
        moved = storage[1:].view(t.shape)
    elif way == "wide rows":
        storage = torch.full((*t.shape[:-1], t.shape[-1] + 3), 3, dtype=t.dtype, device=t.device)
        moved = storage[..., 1 : t.shape[-1] + 1]
    elif way == "positions first":
        moved = torch.empty_like(t.transpose(0, 1).contiguous()).transpose(0, 1)
    else:
        assert way == "reversed dimensions"
        moved = torch.empty(t.shape[::-1], dtype=t.dtype, device=t.device).permute(*reversed(range(t.dim())))
    return moved.copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["off by one", "wide rows", "positions first", "reversed dimensions"])
@pytest.mark.parametrize("op", MAKE)
def test_any_place_in_memory(op: str, way: str, dtype: torch.dtype, device: str) -> None:
    make, shapes = MAKE[op]
    for shape in shapes[1:4]:
        arguments = make(shape, dtype)
        there = tuple(relaid(t, way) if isinstance(t, Tensor) and t.dim() > 1 else t for t in to(device, arguments))
        assert_right(op, arguments, run(op, there))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", MAKE)
def test_same_inputs_same_bits(op: str, dtype: torch.dtype, device: str) -> None:
    make, shapes = MAKE[op]
    for shape in shapes[-3:]:
        arguments = to(device, make(shape, dtype))
        first = run(op, arguments)
        for _ in range(20):
            values = run(op, arguments)
            assert all(torch.equal(x, y) for x, y in zip(values, first, strict=True)), f"{op} of {shape}: a race shows in the bits"


@pytest.mark.parametrize("op", MAKE)
def test_beside_other_work(op: str, device: str) -> None:
    # While another stream keeps the multiprocessors busy, blocks come and go in other orders.
    arguments = to(device, MAKE[op][0](ONE[op], torch.float32))
    first = run(op, arguments)
    busy = torch.randn(1024, 1024, device=device)
    other = torch.cuda.Stream() if device == "cuda" else None
    if other is not None:
        other.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(other):
            busy = (busy @ busy).tanh()
        assert all(torch.equal(x, y) for x, y in zip(run(op, arguments), first, strict=True))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Streams, graphs, devices


@on_cuda
@pytest.mark.parametrize("op", MAKE)
def test_a_stream_of_ones_own(op: str) -> None:
    arguments = MAKE[op][0](ONE[op], torch.float32)
    source = to("cuda", arguments)
    truth = run(op, source)
    there = tuple(torch.full_like(t, 1) if isinstance(t, Tensor) else t for t in source)  # until the producer is done
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds in which a kernel on another stream would be too early
        for t, late in zip(there, source, strict=True):
            if isinstance(t, Tensor):
                t.copy_(late)
        values = run(op, there)
        for t in there:
            if isinstance(t, Tensor):
                t.fill_(1)  # what comes after must wait for the op, too
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(values, truth, strict=True))


@on_cuda
@pytest.mark.parametrize("op", MAKE)
def test_capture_and_replay(op: str) -> None:
    make = MAKE[op][0]
    arguments = to("cuda", make(ONE[op], torch.float32))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = run(op, arguments)
    for factor in (1.0, 0.5, -3.0):
        for t in arguments:
            if isinstance(t, Tensor) and t.is_floating_point():
                t.mul_(factor)
        graph.replay()
        truth = run(op, arguments)
        assert all(torch.equal(x, y) for x, y in zip(values, truth, strict=True))


@on_cuda
@pytest.mark.parametrize("op", MAKE)
def test_the_host_does_not_wait(op: str) -> None:
    arguments = to("cuda", MAKE[op][0](ONE[op], torch.float32))
    run(op, arguments)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    # That mode knows torch's own calls alone. Behind a kernel that takes long, an op that waited would return late.
    done = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    run(op, arguments)
    done.record()
    assert not done.query(), f"{op} returned after the device had finished"
    torch.cuda.synchronize()


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("op", MAKE)
def test_another_device_than_the_current_one(op: str) -> None:
    arguments = MAKE[op][0](ONE[op], torch.float32)
    with torch.cuda.device(0):
        values = run(op, to("cuda:1", arguments))
        assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda:1") for value in values)
    assert_right(op, arguments, values)


@on_cuda
def test_operands_on_two_devices_are_refused() -> None:
    a, b = product_arguments((2, 3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match="same device"):
        ops.wgrad_moments(a.cuda(), b)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Precision


@on_cuda
@pytest.mark.parametrize("op", ["outer_sqnorm", "gram_sqnorm", "wgrad_sqnorm", "wgrad_moments", "conv_sqnorm", "conv_wgrad_sqnorm"])
def test_tf32_keeps_ten_bits(op: str) -> None:
    # TF32 keeps 10 bits of a factor: an error of 2**-11 in each, random in sign, so that sums come out better than that and never worse than 2**-9.
    make, shapes = MAKE[op]
    for shape in shapes[3:]:
        arguments = make(shape, torch.float32)
        truths = flat(getattr(reference, op)(*to("cpu", arguments, torch.float64)))
        torch.backends.cuda.matmul.allow_tf32 = True
        values = run(op, to("cuda", arguments))
        torch.backends.cuda.matmul.allow_tf32 = False
        assert_right(op, arguments, run(op, to("cuda", arguments)))
        for value, truth in zip(values, truths, strict=True):
            found = error(value, truth, value.dim() == 1)
            assert found <= 2**-9 * (4 if op == "gram_sqnorm" else 1), f"{op} of {shape}: {found:.3g}"


# ---------------------------------------------------------------------------------------------------------------------------------------
# More than 2**31 elements


@pytest.fixture
def span(device: str) -> int:
    """A number of bfloat16 elements that 32 bits cannot index, where there is memory for it; on the CPU a toy."""
    if device == "cpu":
        return 1 << 14
    wanted = (1 << 31) + (1 << 20)
    free, _ = torch.cuda.mem_get_info()
    if free < 2.5 * 2 * wanted:
        pytest.skip(f"needs {5 * wanted / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    torch.cuda.empty_cache()
    return wanted


def scattered(t: Tensor, span: int, dim: int) -> Tensor:
    """The same values, the last one of a dimension ``span`` elements behind the first; what lies between must not count."""
    steps = t.shape[dim] - 1
    storage = torch.full((span + t.numel(),), 7, dtype=t.dtype, device=t.device)
    strides = list(t.contiguous().stride())
    strides[dim] = span // steps
    return storage.as_strided(t.shape, strides).copy_(t)


def test_long_rows(device: str, span: int) -> None:
    x = torch.ones(1, span + 5, dtype=torch.bfloat16, device=device)
    x[0, -1] = 3
    assert ops.row_sqnorm(x).item() == pytest.approx(span + 4 + 9, rel=2e-7)


def test_many_rows(device: str, span: int) -> None:
    x = torch.ones(span // 1024, 1024, dtype=torch.bfloat16, device=device)
    x[-1] = 2
    norms = ops.row_sqnorm(x)
    assert norms[-1].item() == 4096 and (norms[:-1] == 1024).all().item()


@pytest.mark.parametrize("dim", [0, 1], ids=["samples", "positions"])
@pytest.mark.parametrize("op", ["outer_sqnorm", "gram_sqnorm", "wgrad_sqnorm", "wgrad_moments"])
def test_products_far_apart(op: str, dim: int, device: str, span: int) -> None:
    arguments = product_arguments((3, 5, 24, 40), torch.bfloat16)
    a, b = to(device, arguments)
    assert_right(op, arguments, run(op, (scattered(a, span, dim), b)))
    assert_right(op, arguments, run(op, (a, scattered(b, span, dim))))


@pytest.mark.parametrize("op", ["embedding_sqnorm", "affine_sqnorm", "norm_affine", "conv_sqnorm", "conv_wgrad_sqnorm"])
def test_others_far_apart(op: str, device: str, span: int) -> None:
    shape = {"embedding_sqnorm": (3, 5, 16, 4), "affine_sqnorm": (3, 5, 16, 1, 1), "norm_affine": (3, 5, 16, 1, 1)}.get(op, CONVOLUTIONS[2])
    arguments = MAKE[op][0](shape, torch.bfloat16)
    there = list(to(device, arguments))
    place = 1 if op == "embedding_sqnorm" else 0
    there[place] = scattered(there[place], span, 0)
    assert_right(op, arguments, run(op, tuple(there)))


def test_a_large_weight_gradient(device: str, span: int) -> None:
    # More than 2**31 elements in the result. Its corners are computed by hand, its norm follows from one position.
    side = int((span + 1) ** 0.5) + 1
    a, b = torch.full((1, 1, side), 2.0, dtype=torch.bfloat16, device=device), torch.full((1, 1, side), 0.5, dtype=torch.bfloat16, device=device)
    a[..., -1], b[..., -1] = 4, 8
    wgrad, sqnorm = ops.wgrad_sqnorm(a, b)
    assert wgrad.numel() > span
    assert [wgrad[i, j].item() for i in (0, -1) for j in (0, -1)] == [1, 2, 16, 32]
    assert (wgrad[:-1, :-1] == 1).all().item()
    assert sqnorm.item() == pytest.approx((4.0 * (side - 1) + 16) * (0.25 * (side - 1) + 64), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Models

# Those that make no tensors on the CPU as they run.
NAMES = [
    "mlp",
    "mlp on sequences",
    "linear 4-d",
    "x @ W",
    "W @ x",
    "addmm",
    "einsum",
    "einsum over heads",
    "einsum, used twice",
    "bilinear",
    "scale and shift",
    "positions and channels",
    "class token by repeat",
    "embedding with padding",
    "embedding bag, sum",
    "layer norm",
    "rms norm",
    "group norm",
    "instance norm",
    "batch norm eval",
    "conv",
    "conv groups",
    "conv 2-d, depthwise",
    "conv 2-d, channels last",
    "conv 3-d",
    "transposed conv 2-d, groups",
    "conv used twice",
    "conv on frames",
    "attention",
    "encoder layer, norm first",
    "decoder layer",
    "multi-head attention module",
    "rnn",
    "lstm",
    "gru",
    "prelu",
]


def on_device(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    (case,) = (case for case in CASES if case.name == name)
    model, inputs, target = build(case, dtype)
    return model.to(device), tuple(t.to(device) for t in inputs), target.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_norms_of_a_model(name: str, dtype: torch.dtype, device: str) -> None:
    model, inputs, target = on_device(name, device, dtype)
    plain = copy.deepcopy(model)
    loss_fn(plain(*inputs), target).backward()
    with gg.tap(model, by_param=True) as tap:
        loss_fn(model(*inputs), target).backward()
    exact = loop_sqnorms(model, inputs, target)
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-9}[dtype]
    total = torch.stack(list(exact.values())).sum(0)
    for name_, norms in tap.sqnorms(by_param=True).items():
        assert norms.device.type == device
        assert ((norms.cpu().double() - exact[name_]).abs() <= tolerance * exact[name_] + 1e-3 * tolerance * total).all(), name_
    assert relative_error(tap.sqnorms().cpu(), total) <= tolerance
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            continue  # a frozen parameter
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance * float(q.grad.abs().max()))


@pytest.mark.parametrize("name", ["mlp on sequences", "conv", "group norm", "encoder layer, norm first"])
def test_a_step_does_not_make_the_host_wait(name: str, device: str) -> None:
    model, inputs, target = on_device(name, device, torch.float32)

    def step() -> Tensor:
        with gg.tap(model) as tap:
            loss_fn(model(*inputs), target).backward()
        return tap.sqnorms()

    first = step()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("name", ["mlp on sequences", "conv", "encoder layer, norm first"])
def test_autocast(name: str, device: str) -> None:
    # What narrow layers round away is the model's affair: the truth is autograd under the same autocast, one sample at a time.
    model, inputs, target = on_device(name, device, torch.float32)
    with gg.tap(model) as tap:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_fn(model(*inputs).float(), target)
        loss.backward()
    norms = []
    for i in range(len(target)):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_fn(model(*(t[i : i + 1] for t in inputs)).float(), target[i : i + 1])
        norms.append(sum(g.double().square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))))
    assert relative_error(tap.sqnorms().cpu(), torch.stack(norms).cpu()) < 3e-2


USES = ["mlp", "mlp on sequences", "conv", "group norm", "encoder layer, norm first"]


@pytest.mark.parametrize("name", USES)
def test_clipping_moments_and_kernels(name: str, device: str) -> None:
    """As in float64 on the CPU, where the other tests compare them with loops."""
    (model, inputs, target), (exact, exact_inputs, exact_target) = on_device(name, device, torch.float32), on_device(name, "cpu", torch.float64)
    exact.load_state_dict(model.state_dict())  # rounded alike
    exact_inputs, exact_target = tuple(t.cpu().double() if t.is_floating_point() else t.cpu() for t in inputs), target.cpu().double()
    for memory in (1 << 40, 0):
        for net, x, y in ((model, inputs, target), (exact, exact_inputs, exact_target)):
            net.zero_grad()
            with gg.tap(net) as tap:
                gg.clipped_backward(sample_losses(net(*x), y), tap, 0.5, memory=memory)
        for p, q in zip(model.parameters(), exact.parameters()):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad.double().cpu(), q.grad, rtol=1e-4, atol=1e-5 * float(q.grad.abs().max()) + 1e-12)
    squares, exact_squares = gg.second_moments(model, loss_fn, *inputs, target), gg.second_moments(exact, loss_fn, *exact_inputs, exact_target)
    largest = max(float(square.max()) for square in exact_squares.values())
    for key, square in squares.items():
        torch.testing.assert_close(square.double().cpu(), exact_squares[key], rtol=1e-4, atol=1e-6 * largest)
    kernel, exact_kernel = (
        gg.gram(lambda *t, net=net: net(*t).flatten(1)[:, :2], x, params=list(net.parameters())) for net, x in ((model, inputs), (exact, exact_inputs))
    )
    torch.testing.assert_close(kernel.cpu(), exact_kernel, rtol=1e-4, atol=1e-5 * float(exact_kernel.abs().max()))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_noise_stability_optimisation(base: type[torch.optim.Optimizer], device: str) -> None:
    """Noise has an address, so that a device takes the steps of another one, to rounding."""
    weights = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        model, x, y = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 2)).to(where), torch.randn(16, 5).to(where), torch.randn(16, 2).to(where)
        opt = gg.optim.NSO(model, base, lr=1e-2, sigma=0.05, num_perturbs=2, mix=0.25, seed=3)

        def closure(model: nn.Module = model, x: Tensor = x, y: Tensor = y, opt: gg.optim.NSO = opt) -> Tensor:
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            opt.step(closure)
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What kernels count in 32 bits


@on_cuda
@pytest.mark.parametrize("op", ["outer_sqnorm", "gram_sqnorm", "wgrad_sqnorm", "wgrad_moments"])
def test_sizes_beyond_32_bits_are_refused(op: str) -> None:
    one = torch.ones(1, 1, 1, device="cuda")  # expanded, so that nothing of that size exists
    for a, b in ((one.expand(1, 2**30 + 1, 1),) * 2, (one.expand(2**30 + 1, 1, 1),) * 2):
        with pytest.raises(RuntimeError, match=r"on CUDA at most 2\^30 samples, positions"):
            getattr(ops, op)(a, b)


@on_cuda
def test_images_beyond_32_bits_are_refused() -> None:
    one = torch.ones(1, 1, 1, 1, device="cuda")
    for op in ("conv_sqnorm", "conv_wgrad_sqnorm"):
        with pytest.raises(RuntimeError, match=r"on CUDA at most 2\^30 samples, positions of a sample"):
            getattr(ops, op)(one.expand(1, 1, 1, 2**31), one.expand(1, 1, 1, 2**31), [1], [1], [0], [1], 1)
