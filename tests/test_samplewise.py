"""Operations that combine samples are refused where their result meets a parameter, whatever their name; those that keep them apart are followed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostgrad as gg
from ghostgrad import samplewise
from helpers import loop_sqnorms, loss_fn
from models import B, Lambda

ROTATION = torch.eye(B).roll(1, 0)
NEXT = torch.arange(B).roll(1)

# Every one takes (B, B), samples first, to (B, B), and combines samples or leaves them elsewhere.
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "flip, dimensions one by one": lambda x: x.flip(1, 0),
    "flipud": torch.flipud,
    "rot90": lambda x: torch.rot90(x, 1, (0, 1)),
    "two-dimensional Fourier transform": lambda x: torch.fft.fft2(x).real,
    "Fourier transform over samples": lambda x: torch.fft.fftn(x).real,
    "real Fourier transform": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape),
    "fftshift": torch.fft.fftshift,
    "attention over samples": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention, time-major": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "multi-head attention": lambda x: F.multi_head_attention_forward(
        *(x[:, None],) * 3, B, 1, torch.eye(B).repeat(3, 1), None, None, None, False, 0.0, torch.eye(B), None, need_weights=False
    )[0][:, 0],
    "recurrence over samples": lambda x: torch.rnn_tanh(x[None], torch.zeros(1, 1, B), [torch.eye(B)] * 2, False, 1, 0.0, False, False, True)[0][0],
    "distances": lambda x: torch.cdist(x, x),
    "cosine similarities": lambda x: F.cosine_similarity(x[:, None], x[None], dim=-1),
    "QR": lambda x: torch.linalg.qr(x).Q,
    "SVD": lambda x: torch.linalg.svd(x)[0],
    "inverse": torch.linalg.inv,
    "pseudo-inverse": torch.linalg.pinv,
    "solve": lambda x: torch.linalg.solve(ROTATION, x),
    "triangular solve": lambda x: torch.linalg.solve_triangular(torch.ones(B, B).triu(), x, upper=True),
    "least squares": lambda x: torch.linalg.lstsq(ROTATION, x).solution,
    "matrix exponential": torch.linalg.matrix_exp,
    "matrix power": lambda x: torch.linalg.matrix_power(x, 2),
    "LU": lambda x: torch.linalg.lu_factor(x)[0],
    "multi_dot": lambda x: torch.linalg.multi_dot([x, x, x]),
    "vecdot over samples": lambda x: torch.linalg.vecdot(x, x, dim=0)[:, None].expand(B, B),
    "covariance": torch.cov,
    "correlation": torch.corrcoef,
    "tensordot": lambda x: torch.tensordot(x, x, dims=1),
    "inner": lambda x: torch.inner(x, x),
    "outer": lambda x: torch.outer(x[:, 0], x[:, 1]),
    "addr": lambda x: torch.addr(x, x[:, 0], x[:, 1]),
    "einsum with an ellipsis": lambda x: torch.einsum("i...,...k->ik", ROTATION, x),
    "einsum, implicit": lambda x: torch.einsum("ij,jk", ROTATION, x),
    "einsum by lists": lambda x: torch.einsum(ROTATION, [0, 1], x, [1, 2], [0, 2]),
    "sparse product": lambda x: torch.sparse.mm(ROTATION.to_sparse(), x),
    "sparse product and sum": lambda x: torch.sparse.addmm(x, ROTATION.to_sparse(), x),
    "graph product": lambda x: ROTATION @ x,
    "take": lambda x: torch.take(x, torch.arange(B * B).view(B, B).roll(1, 0)),
    "put": lambda x: x.put(torch.arange(B * B).view(B, B).roll(1, 0), x),
    "index_put": lambda x: x.index_put((NEXT,), x),
    "index_reduce": lambda x: torch.index_reduce(x, 0, NEXT, x, "mean"),
    "scatter_reduce": lambda x: torch.scatter_reduce(torch.zeros(B, B), 0, NEXT[:, None].expand(B, B), x, "sum"),
    "embedding of data": lambda x: F.embedding(NEXT, x),
    "bag of data": lambda x: F.embedding_bag(NEXT[:, None], x, mode="sum"),
    "select_scatter": lambda x: torch.select_scatter(x, x[1], 0, 0),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[2:], 0, 0, 2),
    "convolution over samples": lambda x: F.conv1d(x.T[:, None], torch.ones(1, 1, 3), padding=1)[:, 0].T,
    "convolution without a batch": lambda x: F.conv1d(x, torch.ones(B, B, 1)),
    "transposed convolution without a batch": lambda x: F.conv_transpose1d(x, torch.ones(B, B, 1)),
    "pooling over samples": lambda x: F.avg_pool1d(x.T, 3, 1, 1).T,
    "pooling without a batch": lambda x: F.max_pool2d(x[None], 3, 1, 1)[0],
    "interpolation": lambda x: F.interpolate(F.interpolate(x[None, None], size=(2, 2), mode="bilinear"), size=(B, B))[0, 0],
    "sampling a grid": lambda x: F.grid_sample(x[None, None], F.affine_grid(-torch.eye(2, 3)[None], (1, 1, B, B), False), align_corners=False)[0, 0],
    "patches": lambda x: F.fold(F.unfold(x[None, None], 3, padding=1), (B, B), 3, padding=1)[0, 0],
    "response normalisation": lambda x: F.local_response_norm(x[None], 3)[0],
    "channel shuffle": lambda x: F.channel_shuffle(x[None, :, :, None], 2)[0, :, :, 0],
    "renorm": lambda x: torch.renorm(x, 2, 1, 1.0),
    "cumulative trapezoid": lambda x: F.pad(torch.cumulative_trapezoid(x, dim=0), (0, 0, 1, 0)),
    "gradient": lambda x: torch.gradient(x, dim=0)[0],
    "msort": torch.msort,
    "a column as a row": lambda x: x[:, 0].expand(B, B),
    "a column broadcast": lambda x: torch.broadcast_to(x[:, 0], (B, B)),
    "a column repeated": lambda x: x[:, 0].repeat(B, 1),
    "a column tiled": lambda x: torch.tile(x[:, 0], (B, 1)),
    "a column times a constant": lambda x: x[:, 0] * torch.ones(B, B),
    "a column and its matrix": lambda x: torch.broadcast_tensors(x[:, 0], x)[0],
    "mesh": lambda x: torch.meshgrid(x[:, 0], x[:, 1], indexing="ij")[1],
    "diagonal": lambda x: torch.diag(x[:, 0]),
    "diagonal matrix": lambda x: torch.diag_embed(x[:, 0]),
    "as_strided": lambda x: x.as_strided((B, B), (1, B)),
    "rows of columns": lambda x: torch.vstack([x[:, i] for i in range(B)]),
    "in the same shape, reshuffled": lambda x: x.T.reshape(B, B),
    "vmap over features": lambda x: torch.vmap(lambda column: column.flip(0), 1, 1)(x),
    "vmap around a sum": lambda x: torch.vmap(lambda row: row * x.sum())(x),
}


@pytest.mark.parametrize("steps", [False, True], ids=["", "step by step"])
@pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING.keys())
def test_mixed_samples_are_refused(mix: Callable[[Tensor], Tensor], steps: bool) -> None:
    torch.manual_seed(0)
    if steps:
        model = Lambda(lambda m, x: torch.stack([mix(h) for h in (x @ m.w).unbind(1)], 1) @ m.v, w=(B, B), v=(B, B))
    else:
        model = Lambda(lambda m, x: mix(x @ m.w) @ m.v, w=(B, B), v=(B, B))
    x = torch.randn(B, 2, B) if steps else torch.randn(B, B)
    assert model(x).shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(gg.GhostgradError):
            gg.sqnorms(model, loss_fn, x, torch.randn(B))


def test_a_trial_does_not_depend_on_the_data() -> None:
    """On zeros nothing shows which samples an operation combines; the first outcome is kept for data that are not."""
    model = Lambda(lambda m, x: torch.fft.fft2(x @ m.w).real @ m.v, w=(B, B), v=(B, B))
    for x in (torch.zeros(B, B), torch.randn(B, B)):
        with pytest.raises(gg.GhostgradError, match="'v'.*'fft_fft2'"):
            gg.sqnorms(model, loss_fn, x, torch.randn(B))


def test_a_trial_leaves_no_trace() -> None:
    """It draws no random numbers of the user's, and is made once for each kind of call."""
    calls = []

    def shifted(x: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x,)):
            out: Tensor = torch.overrides.handle_torch_function(shifted, (x,), x)
            return out
        calls.append(x.shape)
        return x + x.mean(-1, keepdim=True)

    model = Lambda(lambda m, x: shifted(x @ m.w) @ m.v, w=(3, 3), v=(3, 3))
    x, target = torch.randn(B, 3), torch.randn(B)
    torch.manual_seed(0)
    first = gg.sqnorms(model, loss_fn, x, target)
    tried = len(calls)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == drawn and tried > 1
    torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, target), first)
    assert len(calls) == tried + 1
    truth = torch.func.vmap(torch.func.grad(lambda p, x, y: loss_fn(torch.func.functional_call(model, p, (x[None],)), y[None])), (None, 0, 0))(
        dict(model.named_parameters()), x, target
    )
    torch.testing.assert_close(first, sum(g.flatten(1).square().sum(1) for g in truth.values()))


@pytest.mark.parametrize(
    "apart",
    [
        lambda x: torch.fft.fft2(x.unsqueeze(1)).real.squeeze(1),
        lambda x: torch.linalg.qr(x.unflatten(1, (2, 2))).Q.flatten(1),
        lambda x: F.interpolate(x[:, None], size=B, mode="linear")[:, 0],
        lambda x: torch.cdist(x[:, :, None], x[:, :, None]).sum(1),
        lambda x: F.pixel_shuffle(x[:, :, None, None], 2).flatten(1),
        lambda x: torch.gradient(x, dim=1)[0],
        lambda x: torch.einsum("i...->i...", x),
    ],
)
def test_samples_that_stay_apart_are_followed(apart: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Lambda(lambda m, x: apart(x @ m.w) @ m.v, w=(B, B), v=(B, B)).double()
    x, target = torch.randn(B, B, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    samplewise._TRIED.clear()
    rows = [torch.autograd.grad(loss_fn(model(x[i : i + 1]), target[i : i + 1]), list(model.parameters())) for i in range(B)]
    torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, target), torch.stack([sum(g.square().sum() for g in grads) for grads in rows]))


def test_zeros_do_not_hide_mixing() -> None:
    """A parameter that begins at zero makes a mixing operation look like one that keeps samples apart."""

    def shifted(x: Tensor, p: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x, p)):
            out: Tensor = torch.overrides.handle_torch_function(shifted, (x, p), x, p)
            return out
        return x + x.mean(0) @ p

    model = Lambda(lambda m, x: shifted(x, m.w), w=(3, 3))
    x, target = torch.randn(B, 3), torch.randn(B)
    for begin in (0.0, 1.0):
        torch.nn.init.constant_(model.w, begin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(gg.UnsupportedUseError, match="'w' in 'shifted'.*mixes samples"):
                gg.sqnorms(model, loss_fn, x, target)


def written(write: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        buffer = torch.zeros(B, B)
        write(buffer, x)
        return buffer

    return run


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of others, one by one": written(lambda y, x: [y.__setitem__(i, x[(i + 1) % B]) for i in range(B)]),
    "rows of others, copied one by one": written(lambda y, x: [y[i].copy_(x[(i + 1) % B]) for i in range(B)]),
    "rows as columns": written(lambda y, x: [y.__setitem__((slice(None), i), x[i]) for i in range(B)]),
    "transposed": written(lambda y, x: y.__setitem__(slice(None), x.T)),
    "into a transposed view": written(lambda y, x: y.T.copy_(x)),
    "by an index": written(lambda y, x: y.__setitem__(NEXT, x)),
    "half by half": written(lambda y, x: (y.__setitem__(slice(0, 2), x[2:]), y.__setitem__(slice(2, 4), x[:2]))),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
def test_rows_written_elsewhere_are_refused(write: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Lambda(lambda m, x: write(x @ m.w) @ m.v, w=(B, B), v=(B, B))
    x, target = torch.randn(B, B), torch.randn(B)
    with pytest.raises(gg.GhostgradError):
        gg.sqnorms(model, loss_fn, x, target)


@pytest.mark.parametrize("steps", [3, B], ids=["", "as many steps as samples"])
def test_steps_written_into_a_time_major_buffer(steps: int) -> None:
    """Exact or refused, also where the number of steps is the batch size."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        buffer = torch.zeros(x.shape[1], x.shape[0], 3, dtype=x.dtype)
        for t in range(x.shape[1]):
            buffer[t] = torch.tanh(x[:, t] @ m.w)
        return torch.tanh(buffer @ m.v).transpose(0, 1)

    torch.manual_seed(0)
    model, x, target = Lambda(run, w=(3, 3), v=(3, 3)).double(), torch.randn(B, steps, 3, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    try:
        norms = gg.sqnorms(model, loss_fn, x, target, by_param=True)
    except gg.GhostgradError:
        return
    for name, exact in loop_sqnorms(model, (x,), target).items():
        torch.testing.assert_close(norms[name], exact)
