"""perturbed: bit for bit restoration whatever the block does, and the full tensor's noise in every shard."""

from __future__ import annotations

import copy
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ghostgrad as gg
from ghostgrad import noise
from ghostgrad.noise import Block
from ghostgrad.perturb import Addressed, _runs

SIGMA, SEED = 0.05, 7


def build(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(dtype)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8)) for x, y in zip(a, b))


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameters_come_back_bit_for_bit(dtype: torch.dtype, distribution: str) -> None:
    model = build(dtype)
    with torch.no_grad():
        model[0].weight.view(-1)[:4] = torch.tensor([math.nan, math.inf, -0.0, 6e-8])
    before = values(model)
    with gg.perturbed(model, SIGMA, SEED, distribution=distribution):
        inside = values(model)
    assert same_bits(values(model), before)
    expected = [p.clone() for p in before]
    noise.perturb_(expected, SEED, SIGMA, distribution)
    assert same_bits(inside, expected)


def test_also_when_the_block_raises_or_changes_parameters() -> None:
    model = build()
    before = values(model)
    with pytest.raises(ZeroDivisionError), gg.perturbed(model, SIGMA, SEED):
        assert not same_bits(values(model), before)
        raise ZeroDivisionError
    assert same_bits(values(model), before)
    with gg.perturbed(model, SIGMA, SEED), torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert same_bits(values(model), before)
    with gg.perturbed(model, SIGMA, SEED), gg.perturbed(model, SIGMA, SEED + 1):  # nested
        pass
    assert same_bits(values(model), before)


def test_the_two_signs_are_antithetic() -> None:
    model = build(torch.float64)
    before = values(model)
    inside = []
    for sign in (1, -1):
        with gg.perturbed(model, SIGMA, SEED, sign, "normal"):
            inside.append(values(model))
    for plus, minus, w in zip(*inside, before):
        torch.testing.assert_close((plus + minus) / 2, w, rtol=0, atol=1e-15)
        torch.testing.assert_close((plus - w).std() / SIGMA, torch.ones((), dtype=torch.float64), rtol=0, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_copy_it_is_off_by_rounding_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = (torch.randn(1_000_000) * 0.02).to(dtype)
    for distribution in noise.DISTRIBUTIONS:
        p = nn.Parameter(w.clone())
        with gg.perturbed([p], 0.01, SEED, distribution=distribution, copy=False):
            inside = p.detach().clone()
        # in float32: the sums are rounded, the second time to within w's own spacing
        bound = torch.finfo(dtype).eps / 2 * (inside.double().abs() + p.detach().double().abs()) + 2.0**-24 * 2 * 0.07
        assert ((p.detach().double() - w.double()).abs() <= bound).all()
        assert not torch.equal(p, w)


def test_optimiser_gradients_and_buffers_are_untouched() -> None:
    model, x, y = build(), torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state, buffers = copy.deepcopy(optimizer.state_dict()), [b.clone() for b in model.buffers()]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with gg.perturbed(model, SIGMA, SEED):
        pass
    assert str(state) == str(optimizer.state_dict())
    assert same_bits([b for b in model.buffers()], buffers)
    assert same_bits([p.grad for p in model.parameters() if p.grad is not None], grads)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_can_be_frozen(momentum: float | None) -> None:
    model, x = build(), torch.randn(6, 3, 8, 8)
    assert isinstance(model[1], nn.BatchNorm2d)
    model[1].momentum = momentum
    model(x)
    buffers = [b.clone() for b in model.buffers()]
    with gg.perturbed(model, SIGMA, SEED, freeze_statistics=True):
        frozen = model(x)
    assert same_bits(list(model.buffers()), buffers)
    with gg.perturbed(model, SIGMA, SEED):
        assert torch.equal(model(x), frozen)  # batch statistics are used all the same
    assert not same_bits(list(model.buffers()), buffers)


def test_the_gradient_is_that_of_the_perturbed_parameters() -> None:
    model, other = build(torch.float64), build(torch.float64)
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    noise.perturb_([p.detach() for p in other.parameters()], SEED, SIGMA)
    F.cross_entropy(other(x), y).backward()
    with gg.perturbed(model, SIGMA, SEED):
        F.cross_entropy(model(x), y).backward()
    assert same_bits([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])  # type: ignore[misc]
    with gg.perturbed(model, SIGMA, SEED):
        loss = F.cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_point_traces_of_a_quadratic() -> None:
    """``x^T A x / 2``: both forms give ``xi^T A xi``, whose mean is the trace."""
    torch.manual_seed(0)
    a = torch.randn(12, 12, dtype=torch.float64)
    a = a + a.T
    w = nn.Parameter(torch.randn(12, dtype=torch.float64))
    by_loss, by_gradient = [], []
    for seed in range(2000):
        losses, grads = [], []
        for sign in (1, -1):
            with gg.perturbed([w], 0.1, seed, sign):
                loss = w @ a @ w / 2
                grads += torch.autograd.grad(loss, w)
                losses.append(loss.detach()[None])
        by_loss.append(noise.second_difference(losses[0], (w @ a @ w / 2).detach()[None], losses[1], 0.1))
        by_gradient.append(noise.probe_dot(grads[:1], grads[1:], seed=seed, sigma=0.1))
    torch.testing.assert_close(torch.cat(by_loss), torch.cat(by_gradient), rtol=0, atol=1e-9)
    probes = torch.cat(by_gradient)
    assert abs(probes.mean() - a.trace()) < 4 * probes.std() / math.sqrt(len(probes))


# --- which parameters, and which noise ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.frozen, self.head = nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.frozen.weight.requires_grad_(False)


def test_tied_parameters_get_noise_once_and_frozen_ones_none() -> None:
    model = Tied()
    before = values(model)
    with gg.perturbed(model, SIGMA, SEED):
        inside = values(model)
        assert model.head.weight is model.embedding.weight
    assert torch.equal(inside[1], before[1])
    expected = [before[0].clone(), before[2].clone()]
    noise.perturb_(expected, SEED, SIGMA, blocks=[Block(0, 0, 28, 28), Block(2, 0, 7, 7)])  # the frozen one has a number, too
    assert same_bits([inside[0], inside[2]], expected)


def test_channels_last_models_get_the_same_noise() -> None:
    plain, last = build(), build().to(memory_format=torch.channels_last)
    with gg.perturbed(plain, SIGMA, SEED), gg.perturbed(last, SIGMA, SEED):
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), last.parameters()))
    assert not last[0].weight.is_contiguous()
    assert all(torch.equal(p, q) for p, q in zip(build().parameters(), last.parameters()))


def test_a_float64_copy_gets_the_same_noise() -> None:
    for distribution in noise.DISTRIBUTIONS:
        zeros, wide = [nn.Parameter(torch.zeros(300, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
        with gg.perturbed([zeros], 1.0, SEED, distribution=distribution), gg.perturbed([wide], 1.0, SEED, distribution=distribution):
            assert torch.equal(zeros.double(), wide)


def shared_memory() -> list[Tensor]:
    x = torch.zeros(10)
    return [x[:6], x[4:]]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda: (build(), math.nan, 1), ValueError, "sigma must be finite and not negative, got nan"),
        (lambda: (build(), -0.1, 1), ValueError, "got -0.1; for the opposite noise give sign=-1"),
        (lambda: (build(), 0.1, -1), ValueError, "seed must be in"),
        (lambda: (build(), 0.1, 1, 2), ValueError, "sign must be 1 or -1, got 2"),
        (lambda: (build(), 0.1, 1, 1, "gauss"), ValueError, "distribution must be 'rademacher', 'normal' or 'uniform', got 'gauss'"),
        (lambda: (torch.zeros(3), 0.1, 1), TypeError, "got a tensor: put it in a list"),
        (lambda: ([], 0.1, 1), ValueError, "params is empty"),
        (lambda: (build().requires_grad_(False), 0.1, 1), ValueError, "no parameter of the model requires grad"),
        (lambda: ([torch.zeros(3), "w"], 0.1, 1), TypeError, r"params\[1\] is a str"),
        (lambda: ([torch.zeros(3)] * 2, 0.1, 1), ValueError, r"params\[0\] and params\[1\] are the same tensor: give each parameter once"),
        (lambda: (shared_memory(), 0.1, 1), ValueError, r"params\[0\] and params\[1\] share memory"),
        (lambda: ([torch.zeros(3, requires_grad=True) * 2], 0.1, 1), ValueError, r"params\[0\] is no leaf"),
        (lambda: ([torch.eye(3).to_sparse()], 0.1, 1), ValueError, r"params\[0\] is sparse"),
        (lambda: ([torch.zeros(3, dtype=torch.int64)], 0.1, 1), TypeError, r"params\[0\] must be float32, .* got torch.int64"),
        (lambda: ([torch.zeros(3, dtype=torch.complex64)], 0.1, 1), TypeError, "got torch.complex64"),
        (lambda: (nn.Linear(2, 2, device="meta"), 0.1, 1), ValueError, "weight is on the meta device"),
    ],
)
def test_errors_say_what_is_wrong(arguments: Callable[[], tuple[Any, ...]], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match), gg.perturbed(*arguments()):
        raise AssertionError("the block must not run")


def test_freezing_needs_a_model() -> None:
    with pytest.raises(ValueError, match="freeze_statistics needs a model"), gg.perturbed([torch.zeros(2)], 0.1, 1, freeze_statistics=True):
        pass


# --- shards ---


@pytest.mark.parametrize("cut", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (1, 3), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_blocks_in_any_dimensions(cut: tuple[int, ...]) -> None:
    """Blocks of a tensor, whichever dimensions they are cut in, have the indices of the full one."""
    full = (4, 5, 6, 3)
    index = torch.arange(math.prod(full)).reshape(full)
    starts = [1 if dim in cut else 0 for dim in range(4)]
    local = index[tuple(slice(start, start + 2 if dim in cut else None) for dim, start in enumerate(starts))].contiguous()
    seen = 0
    for tensor, offset, run, pitch in _runs(local, full, starts):
        e = torch.arange(tensor.numel())
        assert torch.equal(tensor.flatten(), offset + e // run * pitch + e % run)
        seen += tensor.numel()
    assert seen == local.numel()


WORLD = 2


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4, bias=False)).double()


def _fully_sharded(model: nn.Sequential) -> nn.Module:
    for layer in (model[0], model[3]):
        fully_shard(layer)
    return fully_shard(model)


def _tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[nn.Sequential], nn.Module]] = {"fully_shard": _fully_sharded, "tensor parallel": _tensor_parallel}


def _full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(1)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    results: dict[str, Any] = {}
    for kind, prepare in KINDS.items():
        model = prepare(_model())
        for distribution in noise.DISTRIBUTIONS:
            for step in range(2):  # the second sees a model that has run forward, and backward, in a block
                with gg.perturbed(model, SIGMA, SEED, distribution=distribution):
                    loss = F.mse_loss(model(x), y)
                    if step == 0:
                        loss.backward()
            with gg.perturbed(model, SIGMA, SEED, distribution=distribution):
                inside = [_full(p) for p in model.parameters()]
            results[kind, distribution] = loss.item(), inside, [_full(p) for p in model.parameters()], F.mse_loss(model(x), y).item()
    mesh = init_device_mesh("cpu", (WORLD,))
    full = torch.zeros(5, 7, 3)
    for dim in range(3):  # uneven shards, too
        t = distribute_tensor(full, mesh, [Shard(dim)])
        with gg.perturbed([torch.zeros(3), t], SIGMA, SEED):
            results["shard", dim] = _full(t)
    addressed = Addressed([distribute_tensor(full, mesh, [Shard(1)])])
    grads = [distribute_tensor(torch.arange(105.0).reshape(5, 7, 3), mesh, [Shard(1)])]
    parts = addressed.parts(grads)
    results["dot"] = noise.probe_dot([part.tensor for part in parts], seed=SEED, blocks=[part.block for part in parts]).sum()
    try:
        Addressed([DTensor.from_local(torch.zeros(3), mesh, [Partial()])])
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # as in test_distributed.py


def test_shards_draw_what_the_full_tensor_would(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=WORLD)
    torch.manual_seed(1)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for got in ranks:
        for kind in KINDS:
            for distribution in noise.DISTRIBUTIONS:
                model = _model()
                before = values(model)
                with gg.perturbed(model, SIGMA, SEED, distribution=distribution):
                    inside, loss = values(model), F.mse_loss(model(x), y).item()
                of_block, got_inside, got_after, after = got[kind, distribution]
                assert same_bits(got_inside, inside)
                assert same_bits(got_after, before)
                assert of_block == pytest.approx(loss, rel=1e-12) and after == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-12)
        full = [torch.zeros(3), torch.zeros(5, 7, 3)]
        noise.perturb_(full, SEED, SIGMA)
        for dim in range(3):
            assert torch.equal(got["shard", dim], full[1])
        assert "params[0] has the placement" in got["error"] and "Redistribute" in got["error"]
    whole = noise.probe_dot([torch.arange(105.0).reshape(5, 7, 3)], seed=SEED)
    assert sum(got["dot"] for got in ranks) == pytest.approx(whole.item())
