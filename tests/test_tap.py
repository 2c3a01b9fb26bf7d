"""The tap against single-sample float64 autograd: every way of using a parameter, exactly."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import ghostgrad as gg
from helpers import build, loop_sqnorms, loss_fn, relative_error
from models import CASES, PEERS, B, Block, Case, D, Lambda, T, Transformer, drawn_sizes


def check_against_the_loop(case: Case, dtype: torch.dtype) -> None:
    """Norms of every parameter equal those of single-sample float64 autograd, to 1e-10, or in float32 to twice the error of a float32 loop (over samples, or
    over the losses of one batch) or 1e-6; ``.grad`` is what it is without the tap."""
    model, inputs, target = build(case, dtype)
    exact = loop_sqnorms(model, inputs, target)
    loops = [loop_sqnorms(model, inputs, target, dtype, one_forward) for one_forward in (False, True)]
    loss_fn(model(*inputs), target).backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with gg.tap(model, by_param=True) as tap:
        loss_fn(model(*inputs), target).backward()
    norms = tap.sqnorms(by_param=True)
    assert norms.keys() == exact.keys()
    rounding = total(exact) * torch.finfo(dtype).eps  # of the sample's whole norm: below it there is nothing to compare
    scale = {name: torch.maximum(norm, rounding) for name, norm in exact.items()}
    plain_error = max(((loop[name] - exact[name]).abs() / scale[name]).max().item() for loop in loops for name in exact)
    for name, norm in norms.items():
        error = ((norm - exact[name]).abs() / scale[name]).max().item()
        assert norm.dtype == dtype and error <= (1e-10 if dtype == torch.float64 else max(1e-6, 2 * plain_error)), (name, error, plain_error)
    for name, p in model.named_parameters():
        zero = torch.zeros_like(p)
        torch.testing.assert_close(zero if p.grad is None else p.grad, zero if plain[name] is None else plain[name])
    torch.testing.assert_close(tap.sqnorms(), total(norms))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_and_gradients_equal_the_loop(case: Case, dtype: torch.dtype) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_against_the_loop(case, dtype)
    assert any("no fused rule" in str(w.message) for w in caught) == case.warns


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_sizes_drawn_at_random(case: Case) -> None:
    for draw in range(3):
        with drawn_sizes(f"{case.name} {draw}"):
            for dtype in (torch.float64, torch.float32):
                check_against_the_loop(case, dtype)


def test_the_table_of_other_libraries_is_covered() -> None:
    """All of its 51 cases, and at least 60 more."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and len(PEERS) == 51 == len(set(PEERS.values()))
    assert all(where in names or callable(globals().get(where)) for where in PEERS.values())
    assert len(set(names) - set(PEERS.values())) >= 60


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("case", [case for case in CASES if case.twice], ids=lambda case: case.name)
def test_penalty_gradient_equals_autograd(case: Case) -> None:
    """The gradient of the mean squared norm, by double backward, against double backward through a loop of samples."""
    model, inputs, target = build(case, torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def single(i: int) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_fn(model(*(t[i : i + 1] for t in inputs)), target[i : i + 1])
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        return torch.stack([g.square().sum() for g in grads if g is not None]).sum()

    expected = torch.autograd.grad(torch.stack([single(i) for i in range(len(target))]).mean(), parameters, allow_unused=True)
    penalty = gg.sqnorms(model, loss_fn, *inputs, target, create_graph=True).mean()
    got = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for g, e in zip(got, expected):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if g is None else g, zero.expand_as(g) if e is None and g is not None else zero if e is None else e, rtol=1e-9, atol=1e-11
        )


# ---------------------------------------------------------------------------------------------------------------------------------------
# Properties


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_permuting_the_batch_permutes_the_norms_and_scaling_the_loss_squares(case: Case) -> None:
    model, inputs, target = build(case, torch.float64)
    norms = gg.sqnorms(model, loss_fn, *inputs, target)
    order = torch.randperm(len(target))
    close = {"rtol": 1e-10, "atol": 0.0}
    torch.testing.assert_close(gg.sqnorms(model, loss_fn, *(t[order] for t in inputs), target[order]), norms[order], **close)
    torch.testing.assert_close(gg.sqnorms(model, lambda out, y: -3 * loss_fn(out, y), *inputs, target), 9 * norms, **close)


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("name", ["transformer, tied", "packed projections"])
def test_norms_and_gradient_of_several_uses_come_from_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table that is also a head, and of parts of a matrix."""
    alone: list[Tensor] = []
    norms_alone = gg.ops.sqnorm
    monkeypatch.setattr(gg.ops, "sqnorm", lambda a, b: alone.append(a) or norms_alone(a, b))  # type: ignore[func-returns-value]
    model, inputs, target = build(named(name))
    with gg.tap(model):
        loss_fn(model(*inputs), target).backward()
    assert not alone
    gg.sqnorms(model, loss_fn, *inputs, target)
    assert alone


POSITIONWISE = (
    "linear on sequences; x @ W.T; einsum; einsum over heads; scale and shift; layer norm; rms norm; embedding; embedding with padding; lora; "
    "module used twice; weight norm; bias used twice; autoencoder, tied; nearest centre; mixture of Gaussians; packed projections; complex einsum"
).split("; ")


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("name", POSITIONWISE)
def test_splitting_positions_changes_nothing(name: str) -> None:
    """A model that works on each position alone, run on parts of the sequences."""
    model, _, target = build(named(name), torch.float64)
    x = torch.randint(11, (B, 6)) if name.startswith("embedding") else torch.randn(B, 6, D, dtype=torch.float64)
    parts = Lambda(lambda m, x: torch.cat([m.inner(part) for part in x.split([1, 3, 2], 1)], 1))
    parts.inner = model
    torch.testing.assert_close(gg.sqnorms(parts, loss_fn, x, target), gg.sqnorms(model, loss_fn, x, target), rtol=1e-10, atol=0)


EXPANDED = (
    "mlp; mlp on sequences; W @ x; bilinear; positions and channels; class token; layer norm; group norm; batch norm eval; conv; conv 2-d, two groups; "
    "conv 2-d, reflect; transposed conv 2-d, groups; embedding; embedding used twice; encoder layer; attention; "
    "transformer, tied; recurrent; weight and its transpose; overlapping slices; product of parameters; lora; time-major, flattened; windows; "
    "complex weight and its conjugate; fast weights; linear attention; conditional random field"
).split("; ")


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("name", EXPANDED)
def test_a_fully_expanded_model_has_the_flattened_gradients_norm(name: str) -> None:
    """Every sample with its own copy of every parameter, by the definition: the sum that the copies leave in one tap, and what the rules give."""
    model, inputs, target = build(named(name), torch.float64)
    tap = torch.zeros(len(target), dtype=torch.float64, requires_grad=True)
    copies = {name: gg.rules.expand_tap(p, tap) for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(params: dict[str, Tensor], x: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(model, (params, buffers), tuple(t[None] for t in x)), y[None])

    losses = torch.vmap(single)(copies, inputs, target)
    losses.sum().backward()
    flat = []
    for i in range(len(target)):
        grads = torch.autograd.grad(loss_fn(model(*(t[i : i + 1] for t in inputs)), target[i : i + 1]), list(model.parameters()))
        flat.append(torch.cat([g.flatten() for g in grads]).square().sum())
    torch.testing.assert_close(tap.grad, torch.stack(flat), rtol=1e-10, atol=0)
    torch.testing.assert_close(gg.sqnorms(model, loss_fn, *inputs, target), tap.grad, rtol=1e-10, atol=0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The block


@pytest.fixture
def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return model, torch.randn(B, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)


def total(norms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(norms.values())).sum(0)


def test_expand_tap_is_the_definition() -> None:
    p, x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.randn(B, 2, dtype=torch.float64)
    tap = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    torch.einsum("bdp,bp->bd", gg.rules.expand_tap(p, tap), x).sin().sum().backward()
    per_sample = torch.stack([torch.autograd.grad(F.linear(x[i], p).sin().sum(), p)[0] for i in range(B)])
    torch.testing.assert_close(tap.grad, per_sample.square().sum((1, 2)))
    torch.testing.assert_close(p.grad, per_sample.sum(0))


def test_reductions(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    exact = total(loop_sqnorms(model, (x,), target))
    with gg.tap(model) as tap:
        loss_fn(model(x), target).backward()
    torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)
    with gg.tap(model, reduction="sum") as tap:
        (loss_fn(model(x), target) * B).backward()
    torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)
    vector = gg.sqnorms(model, lambda out, y: torch.stack([loss_fn(o[None], t[None]) for o, t in zip(out, y)]), x, target)
    torch.testing.assert_close(vector, exact, rtol=1e-11, atol=0)


def test_grad_accumulates_as_always(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    for _ in range(2):
        loss_fn(model(x), target).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        with gg.tap(model) as tap:
            loss_fn(model(x), target).backward()
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, e)
    torch.testing.assert_close(tap.sqnorms(), gg.sqnorms(model, loss_fn, x, target))


def test_sqnorms_leaves_grad_alone(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    gg.sqnorms(model, loss_fn, x, target)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():  # works there too: it enables gradients for itself
        assert gg.sqnorms(model, loss_fn, x, target).shape == (B,)


def test_many_steps_in_one_block(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.tap(model) as tap:
        for size in (4, 3, 4):
            exact = total(loop_sqnorms(model, (x[:size],), target[:size]))
            optimizer.zero_grad()
            loss_fn(model(x[:size]), target[:size]).backward()
            torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)
            optimizer.step()


class _Partial(nn.Module):
    """Has a frozen parameter, an unused one, and one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused, self.lost = nn.Linear(D, D), nn.Linear(D, 2), nn.Linear(3, 3), nn.Linear(D, 2)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(x))
        self.lost(h)
        out: Tensor = self.used(h)
        return out


def test_frozen_and_unused_parameters(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    _, x, target = mlp
    model = _Partial().double()
    exact = loop_sqnorms(model, (x,), target)
    with gg.tap(model, by_param=True) as tap:
        loss_fn(model(x), target).backward()
    norms = tap.sqnorms(by_param=True)
    assert "frozen.weight" not in norms and set(norms) == set(exact)
    for name, e in exact.items():
        torch.testing.assert_close(norms[name], e, rtol=1e-11, atol=0)
    assert model.frozen.weight.grad is None and model.unused.weight.grad is None


def test_selected_parameters(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    exact = loop_sqnorms(model, (x,), target)
    chosen = gg.sqnorms(model, loss_fn, x, target, params=["2.weight", model[0].bias])
    torch.testing.assert_close(chosen, exact["2.weight"] + exact["0.bias"], rtol=1e-11, atol=0)
    with pytest.raises(ValueError, match="'3.weight', which is not a parameter"):
        gg.tap(model, params=["3.weight"])


def test_functional_code(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    exact = total(loop_sqnorms(model, (x,), target))
    w, c, v, e = (p.detach().clone().requires_grad_() for p in model.parameters())

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x @ w.T + c) @ v.T + e

    torch.testing.assert_close(gg.sqnorms(f, loss_fn, x, target, params=[w, c, v, e]), exact, rtol=1e-11, atol=0)
    with gg.tap({"w": w, "c": c, "v": v, "e": e}, batch_size=B, by_param=True) as tap:
        loss_fn(f(x), target).backward()
    torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)
    assert list(tap.sqnorms(by_param=True)) == ["w", "c", "v", "e"]
    with pytest.raises(TypeError, match="params"):
        gg.sqnorms(f, loss_fn, x, target)
    with gg.tap([w, c, v, e]), pytest.raises(gg.TapStateError, match="batch_size=B"):
        f(x)


def test_functional_call(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    got = gg.sqnorms(lambda x: torch.func.functional_call(model, params, (x,)), loss_fn, x, target, params=params)
    torch.testing.assert_close(got, gg.sqnorms(model, loss_fn, x, target))


def test_one_row_per_sample() -> None:
    """A parameter with a row for every sample of the batch: sample i's gradient is its own row's."""
    torch.manual_seed(0)
    model = Lambda(lambda m, x: torch.tanh(x * m.s + m.p) * m.q.exp(), s=(D,), p=(B, T, D), q=(B, 1, D)).double()
    x, target = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    out = model(x)
    expected = {}
    for i in range(B):
        grads = torch.autograd.grad(loss_fn(out[i : i + 1], target[i : i + 1]), list(model.parameters()), retain_graph=True)
        for (name, _), g in zip(model.named_parameters(), grads):
            expected.setdefault(name, []).append(g.square().sum())
    with pytest.warns(UserWarning, match="no fused rule"):
        norms = gg.sqnorms(model, loss_fn, x, target, by_param=True)
    for name, rows in expected.items():
        torch.testing.assert_close(norms[name], torch.stack(rows), rtol=1e-11, atol=0)


def test_dict_inputs_and_keywords(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *, features: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(features)}

    wrapped = Keyword()
    got = gg.sqnorms(wrapped, lambda out, y: loss_fn(out["logits"], y), {"features": x}, target)
    torch.testing.assert_close(got, gg.sqnorms(model, loss_fn, x, target))


def test_batch_dim(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    x, target = torch.randn(T, B, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    exact = total(loop_sqnorms(model, (x.transpose(0, 1),), target))
    with gg.tap(model, batch_dim=1) as tap:
        loss_fn(model(x).transpose(0, 1), target).backward()
    torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)


def test_bags_by_offsets_and_their_second_derivative() -> None:
    torch.manual_seed(0)
    bags = nn.Sequential(nn.EmbeddingBag(11, D, mode="mean"), nn.Linear(D, 2)).double()
    index, offsets, target = torch.randint(11, (9,)), torch.tensor([0, 4, 4, 7]), torch.randn(4, dtype=torch.float64)

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = bags

        def forward(self, index: Tensor, offsets: Tensor) -> Tensor:
            out: Tensor = self.head(self.bag(index, offsets))
            return out

    model = Bags()
    norms = gg.sqnorms(model, loss_fn, index, offsets, target, batch_size=4, by_param=True, create_graph=True)
    ends = [4, 4, 7, 9]
    for i, (start, end) in enumerate(zip(offsets.tolist(), ends)):
        loss = loss_fn(model(index[start:end], torch.tensor([0])), target[i : i + 1])
        for (name, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            torch.testing.assert_close(norms[name][i], g.square().sum(), rtol=1e-11, atol=1e-300)
    # The same network in operations that torch can differentiate twice.
    means = torch.stack(
        [(index[s:e, None] == torch.arange(11)).double().mean(0) if e > s else torch.zeros(11, dtype=torch.float64) for s, e in zip(offsets, ends)]
    )
    plain = gg.sqnorms(lambda m: model.head(m @ model.bag.weight), loss_fn, means, target, params=dict(model.named_parameters()), create_graph=True)
    parameters = list(model.parameters())
    for g, e in zip(torch.autograd.grad(total(norms).sum(), parameters), torch.autograd.grad(plain.sum(), parameters)):
        torch.testing.assert_close(g, e)


def test_nested_taps(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    exact = loop_sqnorms(model, (x,), target)
    with gg.tap(model, by_param=True) as outer:
        with gg.tap(model, params=["2.weight", "2.bias"]) as inner:
            loss_fn(model(x), target).backward()
        torch.testing.assert_close(inner.sqnorms(), exact["2.weight"] + exact["2.bias"], rtol=1e-11, atol=0)
    for name, e in exact.items():
        torch.testing.assert_close(outer.sqnorms(by_param=True)[name], e, rtol=1e-11, atol=0)
    plain = copy.deepcopy(model)
    plain.zero_grad()
    loss_fn(plain(x), target).backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_norms_of_another_call_inside_a_block(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    expected, outputs = gg.sqnorms(model, loss_fn, x, target), gg.output_sqnorms(model, x[:2])
    with gg.tap(model) as tap:
        loss = loss_fn(model(x), target)
        torch.testing.assert_close(gg.output_sqnorms(model, x), gg.output_sqnorms(model, x))
        loss.backward()
    torch.testing.assert_close(tap.sqnorms(), expected)
    torch.testing.assert_close(outputs, gg.output_sqnorms(model, x)[:2])


def test_user_double_backward_through_the_tap(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    expected = torch.autograd.grad(gg.sqnorms(model, loss_fn, x, target, create_graph=True).mean(), list(model.parameters()))
    with gg.tap(model) as tap, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of reference cycles for backward(create_graph=True)
        loss_fn(model(x), target).backward(create_graph=True)
        got = torch.autograd.grad(tap.sqnorms().mean(), list(model.parameters()))
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)


def test_looking_at_parameters_disturbs_nothing(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    with gg.tap(model) as tap:
        before = model[0].weight.norm()
        loss = loss_fn(model(x), target)
        torch.testing.assert_close(model[0].weight.norm(), before)
        loss.backward()
        assert model[0].weight.data.shape == model[0].weight.detach().shape == (7, D)
    torch.testing.assert_close(tap.sqnorms(), gg.sqnorms(model, loss_fn, x, target))


def test_derived_before_the_block_is_refused(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    _, x, target = mlp
    model = Lambda(lambda m, x: x @ (m.early if m.early is not None else m.w), w=(D, 2)).double()
    model.early = None
    early = model.w * 2
    model.early = early
    with gg.tap(model) as tap:
        loss_fn(model(x), target).backward()
        with pytest.raises(gg.UnsupportedUseError, match="'w'.*before the block"):
            tap.sqnorms()


def test_input_gradient_inside_the_block(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    """autograd.grad with respect to inputs does not disturb the norms of the backward that follows."""
    model, x, target = mlp
    with gg.tap(model) as tap:
        x = x.clone().requires_grad_()
        loss = loss_fn(model(x), target)
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    torch.testing.assert_close(tap.sqnorms(), gg.sqnorms(model, loss_fn, x.detach(), target))


def test_leaves_no_trace(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    before = (dict(vars(model)), [dict(vars(p)) for p in model.parameters()], list(model.state_dict()), dict(model._forward_pre_hooks))
    with pytest.raises(KeyError), gg.tap(model):
        loss_fn(model(x), target).backward()
        raise KeyError
    with gg.tap(model) as tap:
        loss_fn(model(x), target).backward()
    tap.sqnorms()
    assert (dict(vars(model)), [dict(vars(p)) for p in model.parameters()], list(model.state_dict()), dict(model._forward_pre_hooks)) == before
    assert all(not p._backward_hooks for p in model.parameters())
    assert torch.overrides._get_current_function_mode() is None
    copy.deepcopy(model)


def test_memory_is_freed() -> None:
    model, x = Transformer(), torch.randint(11, (B, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gg.tap(model) as tap:
            out = model(x)
            out.sum().backward()
        tap.sqnorms()
    graph, p, held = weakref.ref(out), weakref.ref(model.head.weight), weakref.ref(tap)
    del out, tap, model
    gc.collect()
    assert graph() is None and held() is None and p() is None


def test_no_grad_passes_through(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    with gg.tap(model) as tap:
        with torch.no_grad():
            teacher = model(x)
        loss_fn(model(x) - teacher, target).backward()
    exact = total(loop_sqnorms(_Minus(model, teacher), (x, teacher), target))
    torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)


class _Minus(nn.Module):
    def __init__(self, model: nn.Module, teacher: Tensor):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        out: Tensor = self.model(x) - teacher
        return out


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(mlp: tuple[nn.Module, Tensor, Tensor], size: int) -> None:
    model, x, target = mlp
    with gg.tap(model) as tap:
        loss_fn(model(x[:size]), target[:size]).backward()
    assert tap.sqnorms().shape == (size,)


def test_nan_stays_with_its_sample(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    clean = gg.sqnorms(model, loss_fn, x, target)
    x = x.clone()
    x[1, 0] = float("nan")
    norms = gg.sqnorms(model, loss_fn, x, target)
    assert norms.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(norms[[0, 2, 3]], clean[[0, 2, 3]])


def test_grad_scaler_and_fp16_autocast() -> None:
    """The scaled loss of mixed-precision training: norms carry the scale squared, as any gradient of it does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x, target = torch.randn(8, 16), torch.randn(8)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(model.parameters(), lr=0.1)
    exact = total(loop_sqnorms(model, (x,), target))
    with gg.tap(model) as tap:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_fn(model(x).float(), target)
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert relative_error(tap.sqnorms() / scaler.get_scale() ** 2, exact) < 0.02


def test_gradient_accumulation(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    loss_fn(model(x), target).backward()
    expected, norms = [p.grad.clone() for p in model.parameters()], gg.sqnorms(model, loss_fn, x, target)
    model.zero_grad()
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        with gg.tap(model) as tap:
            (loss_fn(model(x[half]), target[half]) / 2).backward()
        parts.append(tap.sqnorms() * 4)  # of the loss before it was halved
    torch.testing.assert_close(torch.cat(parts), norms)
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, e)


def test_bf16_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    x, target = torch.randn(16, 5, 32), torch.randn(16)
    with gg.tap(model) as tap:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(model(x), target)
        loss.backward()
    exact = total(loop_sqnorms(model, (x,), target))
    assert relative_error(tap.sqnorms(), exact) < 0.05  # bfloat16 has 8 bits
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(model(x), target)
    loss.backward()
    for g, p in zip(grads, model.parameters()):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, p.grad, rtol=0.05, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Refusals: an error, never a wrong number


def test_batch_statistics_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 2))
    with pytest.raises(gg.BatchCouplingError, match=r"module '1' \(BatchNorm1d\)"):
        gg.sqnorms(model, loss_fn, torch.randn(B, D), torch.randn(B))
    with pytest.raises(gg.BatchCouplingError, match="eval"):
        gg.sqnorms(nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, 2)), loss_fn, torch.randn(B, D), torch.randn(B))


MIXING = {
    "product over samples": lambda x: x.T @ x,
    "product of batches": lambda x: x @ x,
    "einsum over samples": lambda x: torch.einsum("bi,bj->ij", x, x),
    "linear with data as weight": lambda x: F.linear(x, x),
    "roll": lambda x: x.roll(1, dims=0),
    "flip": lambda x: x.flip(0),
    "reshaped in place": lambda x: x.clone().transpose_(0, 1),
    "centring": lambda x: x - x.mean(0),
    "softmax over samples": lambda x: x.softmax(0),
    "sorting samples": lambda x: x.sort(0).values,
    "transposed product": lambda x: x @ (x.T @ x),
    "whole standard deviation": lambda x: x / x.std(),
    "cumulative sum": lambda x: x.cumsum(dim=0),
    "broadcast against itself": lambda x: x * x[:, 0],
}


@pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING.keys())
def test_mixed_samples_are_refused(mix: Callable[[Tensor], Tensor]) -> None:
    model = Lambda(lambda m, x: mix(x @ m.w) @ m.v, w=(B, B), v=(B, B))
    with pytest.raises(gg.GhostgradError, match="'v'"):
        gg.sqnorms(model, loss_fn, torch.randn(B, B), torch.randn(B))


ENTANGLED = {
    "root of a mean": lambda out, y: (out - y).square().mean().sqrt(),
    "exponential of a mean": lambda out, y: out.square().mean().exp(),
    "standard deviation": lambda out, y: out.std(),
    "variance over the batch": lambda out, y: (out - out.mean(0)).square().mean(),
    "contrastive": lambda out, y: F.cross_entropy(out @ out.T, torch.arange(B)),
    "distances between samples": lambda out, y: (out - out[[1, 0, 3, 2]]).square().mean(),
    "entropy of the mean prediction": lambda out, y: -(p := out.softmax(1).mean(0)) @ p.log(),
    "load of the experts": lambda out, y: out.square().mean() + (F.one_hot(out.argmax(1), 3).double().mean(0) * out.softmax(1).mean(0)).sum(),
    "relative to a mean": lambda out, y: out.square().sum() / out.square().mean(),
    "softmax over the batch": lambda out, y: (out.square().sum(1).softmax(0) * out.square().sum(1)).sum(),
    "reshaped and stacked": lambda out, y: torch.stack([out.mean(), out.mean() ** 2]).sum(),
}


@pytest.mark.parametrize("loss", ENTANGLED.values(), ids=ENTANGLED.keys())
def test_losses_that_are_no_sum_over_the_samples_are_refused(loss: Callable[..., Tensor], mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    with pytest.raises(gg.BatchCouplingError, match="no sum over the samples"):
        gg.sqnorms(model, loss, x, target[:, None])
    with pytest.raises(gg.BatchCouplingError, match="no sum over the samples"), gg.tap(model):
        loss(model(x), target[:, None]).backward()
    assert gg.sqnorms(model, lambda out, y: loss(out.expand(B, 3), y), x[:1], target[:1, None]).shape == (1,)  # a single sample's, whatever it is


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
SUMS = {  # with the weights that they give to each sample's mean square
    "sum divided by the batch": (lambda out, y: out.square().mean(1).sum() / len(out), torch.ones(B)),
    "weighted": (lambda out, y: (out.square().mean(1) * WEIGHTS).mean(), WEIGHTS),
    "weighted by a product": (lambda out, y: WEIGHTS @ out.square().mean(1) / B, WEIGHTS),
    "terms added": (lambda out, y: out.square().mean() + 0.5 * out.square().mean(0).sum() / 3, 1.5 * torch.ones(B)),
    "divided by a count of the data": (lambda out, y: out.square().mean(1).sum() / (out > -1e9).any(1).sum(), torch.ones(B)),
    "the largest": (lambda out, y: out.square().mean(1).max() / B, None),
    "roots of each, listed": (lambda out, y: torch.stack([o.square().mean().sqrt() ** 2 for o in out]).mean(), torch.ones(B)),
    "listed": (lambda out, y: torch.stack([o.square().mean() for o in out]).mean(), torch.ones(B)),
    "logits of all samples in one column": (lambda out, y: F.mse_loss(out.flatten(), torch.zeros(3 * B, dtype=out.dtype)), torch.ones(B)),
}


@pytest.mark.parametrize(("loss", "weights"), SUMS.values(), ids=SUMS.keys())
def test_losses_that_are_sums_over_the_samples(loss: Callable[..., Tensor], weights: Tensor | None, mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    plain = gg.sqnorms(model, lambda out, y: out.square().mean(1), x, target)
    if weights is None:
        values = model(x).square().mean(1)
        weights = (values == values.max()).double()
    torch.testing.assert_close(gg.sqnorms(model, loss, x, target), plain * weights**2)


OVERWRITES = {
    "a copy's row": lambda m, x: x @ _overwrite(m.w.clone(), lambda w: w.__setitem__(0, 0.0)),
    "a copy scaled": lambda m, x: x @ _overwrite(m.w * 1, lambda w: w.mul_(2)),
    "data by copy_": lambda m, x: _overwrite(x.clone(), lambda y: y.copy_(m.w[:1])),
    "data by index_add_": lambda m, x: _overwrite(x.clone(), lambda y: y.index_add_(1, torch.arange(D), m.w[:1].expand(B, D))),
}


def _overwrite(t: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    write(t)
    return t


@pytest.mark.parametrize("forward", OVERWRITES.values(), ids=OVERWRITES.keys())
@pytest.mark.filterwarnings("ignore:ghostgrad")
def test_overwriting_is_refused(forward: Callable[..., Tensor]) -> None:
    with pytest.raises(gg.UnsupportedUseError, match=r"\bw\b"):
        gg.sqnorms(Lambda(forward, w=(D, D)), loss_fn, torch.randn(B, D), torch.randn(B))


UNSUPPORTED = {
    "rows of unknown grouping": (lambda m, x: (x.roll(1, 0)[torch.randperm(B)].repeat(2, 1) @ m.w)[:B], "v|w"),
    "joined with the samples": (lambda m, x: torch.cat([m.v[None], x])[:B] @ m.w, "'v'.*along which the samples lie"),
    "contracted over the samples": (lambda m, x: F.linear(x.T, m.w[:, :B]).T, "'w'.*sums over"),
    "written into data": (lambda m, x: x.clone().index_put((torch.tensor([0]),), m.v[None]) @ m.w, "'v'"),
}


@pytest.mark.parametrize(("forward", "match"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
@pytest.mark.filterwarnings("ignore:ghostgrad")
def test_unsupported_uses_name_the_parameter(forward: object, match: str) -> None:
    model = Lambda(forward, w=(D, D), v=(D,))  # type: ignore[arg-type]
    with pytest.raises(gg.GhostgradError, match=match):
        gg.sqnorms(model, loss_fn, torch.randn(B, D), torch.randn(B))


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)  # type: ignore[attr-defined]
        return x @ w

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors  # type: ignore[attr-defined]
        return g @ w.T, x.T @ g


@pytest.mark.parametrize("also_seen", [False, True])
def test_a_gradient_behind_the_taps_back_is_an_error(also_seen: bool) -> None:
    model = Lambda(lambda m, x: _Custom.apply(x + (m.w.diagonal() if also_seen else 0), m.w) + m.c, w=(D, D), c=(D,))
    x, target = torch.randn(B, D), torch.randn(B)
    with pytest.raises(gg.UnsupportedUseError, match="'w'.*custom autograd.Function"):
        gg.sqnorms(model, loss_fn, x, target)
    with gg.tap(model) as tap:
        loss_fn(model(x), target).backward()
    with pytest.raises(gg.UnsupportedUseError, match="'w'"):
        tap.sqnorms()


def test_weight_decay_in_the_loss_is_refused(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    with pytest.raises(gg.GhostgradError, match="0.weight|0.bias|2.weight|2.bias"), gg.tap(model):
        (loss_fn(model(x), target) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()


def test_a_gradient_penalty_of_the_users_own_is_refused(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    x.requires_grad_()
    with pytest.raises(gg.UnsupportedUseError, match="no per-sample form"), gg.tap(model):
        out = model(x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (loss_fn(out, target) + grad.square().sum()).backward()


def test_order_of_calls(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    with gg.tap(model) as tap:
        loss = loss_fn(model(x), target)
        with pytest.raises(gg.TapStateError, match="backward\\(\\) has to run"):
            tap.sqnorms()
        loss.backward(retain_graph=True)
        with pytest.raises(gg.TapStateError, match="by_param=True"):
            tap.sqnorms(by_param=True)
        with pytest.raises(gg.TapStateError, match="open already"):
            tap.__enter__()
        loss.backward()
        with pytest.raises(gg.TapStateError, match="more than one backward pass reached"):
            tap.sqnorms()
    with gg.tap(model) as tap:
        loss = loss_fn(model(x), target)
    loss.backward()  # outside: gradients as always, but no norms
    assert model[0].weight.grad is not None
    with pytest.raises(gg.TapStateError, match="inside the tap's block"):
        tap.sqnorms()
    with pytest.raises(gg.TapStateError, match="batch size 4 and the model is called with 3"), gg.tap(model):
        model(x)
        model(x[:3])


def test_arguments_are_checked(mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = mlp
    with pytest.raises(ValueError, match="reduction"):
        gg.tap(model, reduction="average")
    with pytest.raises(ValueError, match="nothing to tap"):
        gg.tap(nn.ReLU())
    with pytest.raises(TypeError, match="'0' is str"):
        gg.tap(["weight"])
    with pytest.raises(gg.UnsupportedUseError, match="complex"):
        gg.tap([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match="reduction='sum'"):
        gg.sqnorms(model, nn.MSELoss(reduction="sum"), x, target)
    with pytest.raises(TypeError, match="target"):
        gg.sqnorms(model, loss_fn, x)
    with pytest.raises(ValueError, match="one loss per sample"):
        gg.sqnorms(model, lambda out, y: out, x, target)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_modules_that_cannot_be_tapped_say_so() -> None:
    for scripted in (torch.jit.script(nn.Linear(D, 2)), torch.jit.trace(nn.Linear(D, 2), torch.randn(B, D))):
        with pytest.raises(gg.UnsupportedUseError, match="module '1' is TorchScript"):
            gg.tap(nn.Sequential(nn.ReLU(), scripted))
    with pytest.raises(ValueError, match="'weight' of a lazy module"):
        gg.tap(nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore")  # deprecated, and one copy per sample
def test_weight_norm_by_hooks() -> None:
    """The module itself computes its weight in a forward pre-hook, before the tap's own would run."""
    torch.manual_seed(0)
    by_hook, parametrised = nn.Linear(D, 3).double(), nn.Linear(D, 3).double()
    parametrised.load_state_dict(by_hook.state_dict())
    x, target = torch.randn(B, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    nn.utils.weight_norm(by_hook), nn.utils.parametrizations.weight_norm(parametrised)
    torch.testing.assert_close(gg.sqnorms(by_hook, loss_fn, x, target), gg.sqnorms(parametrised, loss_fn, x, target))


def test_expand_limit() -> None:
    model = Lambda(lambda m, x: torch.cdist(x, m.w.expand(len(x), -1, -1)), w=(4, D))
    with pytest.raises(gg.UnsupportedUseError, match=r"'expand\(w\)'.*'cdist'.*expand_limit"):
        gg.sqnorms(model, loss_fn, torch.randn(B, 5, D), torch.randn(B), expand_limit=100)


def test_ambiguous_functional_constant() -> None:
    w, mask, x = torch.randn(B, B, requires_grad=True), torch.ones(B, B).tril(), torch.randn(B, B)
    with gg.tap([w], batch_size=B), pytest.raises(gg.UnsupportedUseError, match="constants="):
        x @ (w * mask)
    with pytest.warns(UserWarning, match="no fused rule"), gg.tap([w], batch_size=B, constants=[mask]) as tap:
        (x @ (w * mask)).square().sum(1).mean().backward()
    g = torch.func.vmap(torch.func.grad(lambda w, x: (x @ (w * mask)).square().sum()), (None, 0))(w, x)
    torch.testing.assert_close(tap.sqnorms(), g.square().sum((1, 2)))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Rules of the user's own, declared layouts


def test_registering_a_rule() -> None:
    from ghostgrad import rules

    def scaled_linear(x: Tensor, weight: Tensor, scale: float) -> Tensor:
        if torch.overrides.has_torch_function((x, weight)):
            out: Tensor = torch.overrides.handle_torch_function(scaled_linear, (x, weight), x, weight, scale)
            return out
        return F.linear(x, weight) * scale

    model = Lambda(lambda m, x: torch.tanh(scaled_linear(x, m.w, 3.0)), w=(5, D)).double()
    x, target = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    with pytest.warns(UserWarning, match="'w' in 'scaled_linear'"):
        reference = gg.sqnorms(model, loss_fn, x, target)

    calls = []

    @gg.register_rule(scaled_linear)
    def rule(call: rules.Call, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        calls.append(call.operation)
        return rules.linear(call, x, weight) * scale

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, target), reference)
        assert calls == ["scaled_linear"]

        @gg.register_rule(scaled_linear)
        def fused(call: rules.Call, x: Tensor, weight: Tensor, scale: float) -> Tensor:
            def forward(x: Tensor, weight: Tensor) -> Tensor:
                return F.linear(x, weight) * scale

            def backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[object, object]:
                return lambda: g @ weight * scale, lambda: gg.Outer(x, g * scale)

            return call.fuse(forward, backward, (x,), (weight,), call.layout(x))  # type: ignore[arg-type]

        torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, target), reference)
    finally:
        rules._RULES.pop(scaled_linear)


def test_a_rule_need_not_say_where_the_samples_lie() -> None:
    from ghostgrad import rules

    def halved(x: Tensor, weight: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x, weight)):
            out: Tensor = torch.overrides.handle_torch_function(halved, (x, weight), x, weight)
            return out
        return F.linear(x, weight) / 2

    gg.register_rule(halved)(lambda call, x, weight: rules.linear(call, x, weight) / 2)
    try:
        torch.manual_seed(0)
        model = Lambda(lambda m, x: torch.tanh(halved(halved(x.transpose(0, 1), m.w), m.v)).mean(0), w=(4, 4), v=(4, 4))
        assert_exact(model, torch.randn(4, 4, 4, dtype=torch.float64))  # time-major, and all sizes equal
    finally:
        rules._RULES.pop(halved)


def test_declared_samples() -> None:
    w = torch.randn(D, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(B * T, D, dtype=torch.float64)  # flattened before the block
    with gg.tap([w], batch_size=B, reduction="sum") as tap:
        (gg.declare_samples(tokens, inner=T) @ w).sin().sum().backward()
    exact = torch.stack([torch.autograd.grad((tokens[i * T : (i + 1) * T] @ w).sin().sum(), w)[0].square().sum() for i in range(B)])
    torch.testing.assert_close(tap.sqnorms(), exact, rtol=1e-11, atol=0)
    with gg.tap([w], batch_size=B), pytest.raises(ValueError, match="outer \\* B \\* inner"):
        gg.declare_samples(tokens, inner=2)
    assert gg.declare_samples(tokens, inner=2) is tokens


# ---------------------------------------------------------------------------------------------------------------------------------------
# Checkpointing


class _Checkpointed(nn.Module):
    """Every block is recomputed in backward."""

    def __init__(self, blocks: list[nn.Module], use_reentrant: bool):
        super().__init__()
        self.blocks, self.use_reentrant = nn.ModuleList(blocks), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block(x) * 2, x, use_reentrant=self.use_reentrant)
        return x.mean(1)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_checkpointing(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    blocks = [nn.Linear(D, D), Block(D), nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 5))]
    model = _Checkpointed(blocks, use_reentrant).double()
    x, target = torch.randn(B, T, D, dtype=torch.float64, requires_grad=use_reentrant), torch.randn(B, dtype=torch.float64)
    exact = loop_sqnorms(_Checkpointed(blocks, False), (x.detach(),), target)
    with gg.tap(model, by_param=True) as tap:
        loss_fn(model(x), target).backward()
    for name, norm in tap.sqnorms(by_param=True).items():
        torch.testing.assert_close(norm, exact[name], rtol=1e-10, atol=0)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_fn(model(x), target).backward()
    for g, p in zip(grads, model.parameters()):
        torch.testing.assert_close(g, p.grad)


def test_a_parameter_shared_by_reentrant_checkpoints_is_refused() -> None:
    layer = nn.Linear(D, D).double()
    model = _Checkpointed([layer, layer], True)
    with gg.tap(model) as tap:
        loss_fn(model(torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)), torch.randn(B, dtype=torch.float64)).backward()
        with pytest.raises(gg.TapStateError, match="more than one backward"):
            tap.sqnorms()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Under torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(mlp: tuple[nn.Module, Tensor, Tensor], backend: str) -> None:
    model, x, target = mlp
    expected = gg.sqnorms(model, loss_fn, x, target)
    with gg.tap(model) as tap:
        loss_fn(torch.compile(model, backend=backend)(x), target).backward()
    torch.testing.assert_close(tap.sqnorms(), expected)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sizes drawn at random


def assert_exact(model: nn.Module, *inputs: Tensor) -> None:
    model, target = model.double(), torch.randn(len(inputs[0]), dtype=torch.float64)
    exact = loop_sqnorms(model, inputs, target)
    # Rounding leaves some eps of the sample's whole gradient in the gradient of every parameter, also in one that cancels.
    rounding = 64 * torch.finfo(torch.float64).eps * total(exact).sqrt()
    for name, norm in gg.sqnorms(model, loss_fn, *inputs, target, by_param=True).items():
        allowed = 1e-10 * exact[name] + 2 * exact[name].sqrt() * rounding + rounding**2
        assert ((norm - exact[name]).abs() <= allowed).all(), name


sizes = st.integers(1, 7)


@settings(max_examples=30, deadline=None)
@given(b=sizes, t=sizes, p=sizes, d=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_of_any_size(b: int, t: int, p: int, d: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    assert_exact(nn.Sequential(nn.Linear(p, d, bias), nn.Tanh(), nn.LayerNorm(d), nn.Linear(d, p, bias)), torch.randn(b, t, p, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 4),
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
    size=st.integers(5, 7),
    seed=st.integers(0, 99),
)
def test_convolution_of_any_shape(
    b: int, dims: int, groups: int, channels: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, transposed: bool, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    layer = kind(channels[0] * groups, channels[1] * groups, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    assert_exact(layer, torch.randn(b, channels[0] * groups, *(size + i for i in range(dims)), dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(b=sizes, t=sizes, heads=st.integers(1, 3), width=st.integers(1, 3), time_major=st.booleans(), seed=st.integers(0, 99))
def test_attention_of_any_size(b: int, t: int, heads: int, width: int, time_major: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(heads * width, heads, 5, 0.0, batch_first=not time_major)
    wrapped = Lambda(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1) if time_major else m.layer(x))
    wrapped.layer = layer
    assert_exact(wrapped, torch.randn(b, t, heads * width, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(b=sizes, t=sizes, kind=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]), layers=st.integers(1, 2), both=st.booleans(), seed=st.integers(0, 99))
def test_recurrent_of_any_size(b: int, t: int, kind: type[nn.RNNBase], layers: int, both: bool, seed: int) -> None:
    torch.manual_seed(seed)
    wrapped = Lambda(lambda m, x: m.layer(x)[0])
    wrapped.layer = kind(3, 4, layers, batch_first=True, bidirectional=both)
    assert_exact(wrapped, torch.randn(b, t, 3, dtype=torch.float64))
