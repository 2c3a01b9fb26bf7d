"""Contributions against their own materialised gradients: sums, norms, inner products, and what they may not form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ghostgrad import contributions
from ghostgrad.contributions import Gathered, Outer, inner

F64 = torch.float64


def gathered(B: int, T: int, V: int, d: int, dtype: torch.dtype = F64, seed: int = 0) -> Gathered:
    generator = torch.Generator().manual_seed(seed)
    index, b = torch.randint(-1, V, (B, T), generator=generator), torch.randn(B, T, d, dtype=F64, generator=generator)
    return Gathered(index, b.to(dtype), V)


def per_sample(index: Tensor, b: Tensor, rows: int) -> Tensor:
    """``g_i`` (B, V, d) by one-hot vectors."""
    return torch.nn.functional.one_hot(index + 1, rows + 1)[..., 1:].to(b.dtype).mT @ b


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.itemsize)
        return out


# ---------------------------------------------------------------------------------------------------------------------------------------
# Gathered


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("B", "T", "V", "d"), [(3, 7, 5, 4), (2, 4, 1, 3), (0, 4, 5, 3), (3, 0, 5, 4), (3, 4, 5, 0), (1, 1, 9, 2)])
def test_gathered(B: int, T: int, V: int, d: int, index_dtype: torch.dtype) -> None:
    x = gathered(B, T, V, d)
    g = per_sample(x.index, x.b, V)
    x.index = x.index.to(index_dtype)
    torch.testing.assert_close(x.materialise(), g, rtol=1e-14, atol=0)
    torch.testing.assert_close(x.total(), g.sum(0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(x.sqnorm(), g.square().sum((1, 2)), rtol=1e-13, atol=0)
    x.sparse = True
    torch.testing.assert_close(x.total().to_dense(), g.sum(0), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("method", ["total", "materialise", "sqnorm"])
@pytest.mark.parametrize("T", [0, 6])
def test_gathered_is_differentiable(method: str, T: int) -> None:
    x = gathered(3, T, 4, 2)

    def function(b: Tensor) -> Tensor:
        out: Tensor = getattr(Gathered(x.index, b, 4), method)()
        return out

    assert torch.autograd.gradcheck(function, (x.b.requires_grad_(),))
    assert torch.autograd.gradgradcheck(function, (x.b,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_total_is_the_gradient_of_torch(dtype: torch.dtype) -> None:
    x = gathered(4, 50, 11, 6, dtype)
    table = torch.zeros(12, 6, dtype=dtype, requires_grad=True)
    torch.nn.functional.embedding(torch.where(x.index < 0, 11, x.index), table, padding_idx=11).backward(x.b)
    assert table.grad is not None
    assert torch.equal(x.total(), table.grad[:11])


@pytest.mark.parametrize("method", ["total", "materialise", "sqnorm"])
def test_no_shape_depends_on_the_indices(method: str) -> None:
    # A fake tensor has no values: whoever asks for one raises.
    with FakeTensorMode() as mode:
        x = gathered(4, 6, 5, 3)
        x = Gathered(mode.from_tensor(x.index), mode.from_tensor(x.b).requires_grad_(), 5)
        result = getattr(x, method)()
        (grad,) = torch.autograd.grad(result.sum(), x.b, create_graph=True)
        assert grad.shape == x.b.shape


def test_norms_of_a_table_form_no_table() -> None:
    x = gathered(3, 400, 1_000_000, 8)
    x.b.requires_grad_()
    with Largest() as largest:
        norms = x.sqnorm()
        torch.autograd.grad(norms.sum(), x.b)
    assert largest.numel <= x.b.numel()  # neither (B, V, d) nor (B, T, T)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Inner products: a tied embedding and head


@pytest.mark.parametrize("chunk", [1, 10, 50, 1 << 19])
@pytest.mark.parametrize(("B", "S", "T"), [(3, 5, 7), (4, 1, 6), (2, 6, 1), (2, 0, 3), (2, 3, 0), (0, 3, 4)])
def test_inner_of_embedding_and_head(B: int, S: int, T: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "_CHUNK", chunk)
    x = gathered(B, T, 6, 4)
    y = Outer(torch.randn(B, S, 4, dtype=F64), torch.randn(B, S, 6, dtype=F64))
    exact = (x.materialise() * y.materialise()).sum((1, 2))
    for product in (inner(x, y), inner(y, x), inner(Gathered(x.index.int(), x.b, 6), y)):
        assert product is not None
        torch.testing.assert_close(product, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 20, 1 << 19])
def test_inner_is_differentiable(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "_CHUNK", chunk)
    x = gathered(3, 4, 5, 2)
    inputs = tuple(t.requires_grad_() for t in (x.b, torch.randn(3, 6, 2, dtype=F64), torch.randn(3, 6, 5, dtype=F64)))

    def function(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        product = inner(Gathered(x.index, g, 5), Outer(a, b))
        assert product is not None
        return product

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_inner_keeps_its_buffers_small() -> None:
    B, T, V, d = 3, 1500, 20, 4
    x = gathered(B, T, V, d)
    y = Outer(torch.randn(B, T, d, dtype=F64), torch.randn(B, T, V, dtype=F64))
    with Largest() as largest:
        inner(x, y)
    assert largest.numel <= contributions._CHUNK  # T * T is four times as many
