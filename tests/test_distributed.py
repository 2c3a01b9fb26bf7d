"""Two gloo processes: norms equal those of one process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import ghostgrad as gg

WORLD, B = 2, 8


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4)).double()


def _data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fully_sharded(model: nn.Sequential) -> nn.Module:
    for layer in (model[0], model[2], model[3]):
        fully_shard(layer)
    fully_shard(model)
    return model


def _tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)  # type: ignore[arg-type]


KINDS = {"DistributedDataParallel": _data_parallel, "fully_shard": _fully_sharded, "tensor parallel": _tensor_parallel}


def _samples(rank: int, kind: str) -> slice:
    return slice(None) if kind == "tensor parallel" else slice(rank * B // WORLD, (rank + 1) * B // WORLD)


def _join(rank: int, kind: str, port: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Makes this process one of the group; the model, and its samples and targets."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(1)
    x, y = torch.randn(B, 6, dtype=torch.float64), torch.randn(B, 4, dtype=torch.float64)
    return KINDS[kind](_model()), x[_samples(rank, kind)], y[_samples(rank, kind)]


def _worker(rank: int, kind: str, port: int, folder: str) -> None:
    model, x, y = _join(rank, kind, port)
    for _ in range(2):  # the second step sees parameters that were gathered and dropped again
        with gg.tap(model, by_param=True, grad_sqnorm=True) as tap:
            F.mse_loss(model(x), y).backward()
    torch.save((dict(tap.sqnorms(by_param=True)), tap.grad_sqnorm(by_param=True)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # the results are on disk; taking gloo's threads down sometimes aborts the process ("terminate called without an active exception")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.mark.parametrize("kind", KINDS)
def test_norms_equal_one_process(kind: str, tmp_path: Path) -> None:
    mp.spawn(_worker, (kind, _free_port(), str(tmp_path)), nprocs=WORLD)
    torch.manual_seed(1)
    x, y = torch.randn(B, 6, dtype=torch.float64), torch.randn(B, 4, dtype=torch.float64)
    expected: dict[str, Tensor] = gg.sqnorms(_model(), F.mse_loss, x, y, by_param=True)
    for rank in range(WORLD):
        mine = _samples(rank, kind)
        got, of_mean = torch.load(tmp_path / f"{rank}.pt")
        model = _model()
        F.mse_loss(model(x[mine]), y[mine]).backward()
        for square, p in zip(of_mean.values(), model.parameters()):
            assert p.grad is not None
            torch.testing.assert_close(square, p.grad.square().sum(), rtol=1e-11, atol=0)
        assert [name.removeprefix("module.") for name in got] == list(expected)
        for norm, e in zip(got.values(), expected.values()):
            torch.testing.assert_close(norm, e[mine], rtol=1e-11, atol=0)


def _embedding() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(40, 4)).double(), torch.randint(10, (B, 5)), torch.randn(B, 4, dtype=torch.float64)


def _embedding_worker(rank: int, style: ParallelStyle, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model, x, y = _embedding()
    model = parallelize_module(model, init_device_mesh("cpu", (WORLD,)), {"0": style})  # type: ignore[assignment]
    with gg.tap(model) as tap:
        F.mse_loss(model(x), y).backward()
    torch.save((tap.sqnorms(), model[0].weight.grad.full_tensor()), Path(folder) / f"{rank}.pt")  # type: ignore[operator,union-attr]
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("style", [ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())], ids=["columns", "rows"])
def test_tables_in_parts(style: ParallelStyle, tmp_path: Path) -> None:
    mp.spawn(_embedding_worker, (style, _free_port(), str(tmp_path)), nprocs=WORLD)
    model, x, y = _embedding()
    F.mse_loss(model(x), y).backward()
    expected = gg.sqnorms(model, F.mse_loss, x, y), model[0].weight.grad
    for rank in range(WORLD):
        for value, e in zip(torch.load(tmp_path / f"{rank}.pt"), expected):
            torch.testing.assert_close(value, e, rtol=1e-11, atol=1e-15)


def _clipping_worker(rank: int, kind: str, memory: int, port: int, folder: str) -> None:
    model, x, y = _join(rank, kind, port)
    for _ in range(2):
        model.zero_grad()
        with gg.tap(model) as tap:
            gg.clipped_backward(F.mse_loss(model(x), y, reduction="none").mean(1), tap, 0.4, memory=memory)
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    torch.save((tap.sqnorms(), grads), Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("memory", [1 << 40, 0], ids=["book-keeping", "two passes"])
@pytest.mark.parametrize("kind", KINDS)
def test_clipped_gradients_equal_one_process(kind: str, memory: int, tmp_path: Path) -> None:
    """Each process clips its own samples; their gradients are averaged, as those of any backward pass."""
    mp.spawn(_clipping_worker, (kind, memory, _free_port(), str(tmp_path)), nprocs=WORLD)
    torch.manual_seed(1)
    x, y = torch.randn(B, 6, dtype=torch.float64), torch.randn(B, 4, dtype=torch.float64)
    model = _model()
    with gg.tap(model) as tap:
        factors = gg.clipped_backward(F.mse_loss(model(x), y, reduction="none").mean(1), tap, 0.4)
    assert 0 < factors.min() < 1
    for rank in range(WORLD):
        norms, grads = torch.load(tmp_path / f"{rank}.pt")
        mine = _samples(rank, kind)
        torch.testing.assert_close(norms, tap.sqnorms()[mine], rtol=1e-11, atol=0)
        for grad, p in zip(grads, model.parameters()):
            assert p.grad is not None
            torch.testing.assert_close(grad * (1 if kind == "tensor parallel" else WORLD), p.grad, rtol=1e-11, atol=1e-14)
