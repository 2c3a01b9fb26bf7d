"""Compiled models under the tap: the same numbers as in eager mode, in one graph; and the uses that a compiled graph cannot see are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import ghostgrad as gg
from helpers import build, loop_sqnorms, loss_fn
from models import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True, capture_dynamic_output_shape_ops=True):
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4, dtype=torch.float64), torch.randn(size, dtype=torch.float64)


def is_picked(case: Case) -> bool:
    return (
        case.name.startswith(("permuted samples", "selected tokens", "mixture of experts", "siamese, un", "samples one by")) and "one sample" not in case.name
    )


@pytest.mark.parametrize("case", [case for case in CASES if is_picked(case)], ids=lambda case: case.name)
def test_rows_that_an_index_picks_are_refused(case: Case) -> None:
    """Which rows they are is not known while a graph is traced."""
    model, inputs, _ = build(case, torch.float64)
    refused = pytest.raises(gg.UnsupportedUseError, match="parameter '.*run this model uncompiled")
    with refused, gg.tap(model):
        torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)


# Packed sequences torch itself cannot compile; of tokens that an index picks it does not know how many there are.
NOT_COMPILED = [case.name for case in CASES if case.name.startswith("packed")] + ["mixture of experts, one sample"]


@pytest.mark.parametrize("case", [case for case in CASES if not is_picked(case) and case.name not in NOT_COMPILED], ids=lambda case: case.name)
def test_every_case_in_one_graph(case: Case) -> None:
    model, inputs, target = build(case, torch.float64)
    exact = loop_sqnorms(model, inputs, target)
    plain = copy.deepcopy(model)
    loss_fn(plain(*inputs), target).backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with gg.tap(model, by_param=True) as tap:
        loss_fn(compiled(*inputs), target).backward()
    assert not any(tap.uses().values()), "the tap saw uses outside of the graph"
    total = sum(exact.values())
    for name, norm in tap.sqnorms(by_param=True).items():
        # Rounding leaves some eps of the sample's whole gradient in every parameter's.
        assert ((norm - exact[name]).abs() <= 1e-10 * exact[name] + 1e-13 * (exact[name] * total).sqrt() + 1e-26 * total).all(), name
    for p, q in zip(model.parameters(), plain.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def both(model: nn.Module, compiled: nn.Module, x: Tensor, y: Tensor, **options: bool) -> None:
    """Norms and gradients of the compiled model equal those of the model."""
    expected = gg.sqnorms(model, loss_fn, x, y)
    model.zero_grad()
    loss_fn(model(x), y).backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    with gg.tap(model, **options) as tap:
        loss_fn(compiled(x), y).backward()
    torch.testing.assert_close(tap.sqnorms(), expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_batches_of_all_sizes_share_a_graph(backend: str) -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.compiler.set_stance("default"):
        both(model, compiled, *batch(6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (7, 9, 33):
            both(model, compiled, *batch(size))
        both(model, compiled, *batch(6))


@pytest.mark.parametrize("name", ["transformer, tied", "flattened tokens", "conv", "lora", "encoder layer", "time-major", "orthogonal"])
def test_a_batch_whose_size_changes(name: str) -> None:
    """As users meet it: the second size makes the dimension dynamic. Where samples are pulled back one by one (parametrisations), each size has its graph."""
    model, inputs, target = build(next(case for case in CASES if case.name == name), torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in (len(target), len(target) - 1, len(target) + 2):
        again = [i % len(target) for i in range(size)]
        both_inputs = tuple(t[again] for t in inputs)
        expected = gg.sqnorms(model, loss_fn, *both_inputs, target[again])
        with gg.tap(model) as tap:
            loss_fn(compiled(*both_inputs), target[again]).backward()
        torch.testing.assert_close(tap.sqnorms(), expected)


def test_in_one_call_and_by_parameter() -> None:
    model, (x, y) = network(), batch(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gg.sqnorms(model, loss_fn, x, y, by_param=True)
    got = gg.sqnorms(compiled, loss_fn, x, y, by_param=True)
    assert list(got) == [name for name, _ in compiled.named_parameters()]
    torch.testing.assert_close(list(got.values()), list(expected.values()))
    torch.testing.assert_close(gg.output_sqnorms(compiled, x), gg.output_sqnorms(model, x))
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(gg.sqnorms(model, loss_fn, x, y, params=["0.weight"]), expected["0.weight"])
    torch.testing.assert_close(gg.sqnorms(compiled, loss_fn, x, y, params=[model[0].weight]), expected["0.weight"])


def test_the_loss_in_the_graph_and_a_tap_on_either_module() -> None:
    model, (x, y) = network(), batch(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(model(x), y)

    expected = gg.sqnorms(model, loss_fn, x, y)
    for tapped in (model, compiled):
        with gg.tap(tapped) as tap:
            loss_of(x, y).backward()
        torch.testing.assert_close(tap.sqnorms(), expected)


def test_compiled_in_place_and_under_autocast() -> None:
    model, (x, y) = network().float(), [t.float() for t in batch(6)]
    expected = gg.sqnorms(model, loss_fn, x, y)
    model.compile(fullgraph=True, backend="aot_eager")
    with gg.tap(model) as tap:
        loss_fn(model(x), y).backward()
    torch.testing.assert_close(tap.sqnorms(), expected)
    with torch.autocast("cpu", torch.bfloat16), gg.tap(model) as tap:
        loss_fn(model(x).float(), y).backward()
    torch.testing.assert_close(tap.sqnorms(), expected, rtol=0.1, atol=0)


def test_many_steps_without_recompiling() -> None:
    """New blocks, norms read between two calls in one block, and plain calls in between."""
    model, (x, y) = network(), batch(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        expected = gg.sqnorms(model, loss_fn, x, y)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            with gg.tap(model) as tap:
                loss_fn(compiled(x), y).backward()
                torch.testing.assert_close(tap.sqnorms(), expected)
                optimizer.step()
                optimizer.zero_grad()
                loss_fn(compiled(x), y).backward()
                second = tap.sqnorms()
            compiled(x)
        torch.testing.assert_close(second, gg.sqnorms(model, loss_fn, x, y))


def test_the_model_is_as_it_was() -> None:
    model, (x, _) = network(), batch(2)
    with gg.tap(model):
        inside = copy.deepcopy(model)
    assert "forward" not in vars(model)
    torch.testing.assert_close(inside(x), model(x))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_parameter_used_inside_and_outside() -> None:
    model, (x, y) = network(), batch(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(gg.UnsupportedUseError, match="0.weight.*outside of"), gg.tap(model):
        (loss_fn(compiled(x), y) + model[0].weight.square().sum()).backward()
    with pytest.raises(gg.UnsupportedUseError, match="second call"), gg.tap(model):
        (loss_fn(compiled(x), y) + loss_fn(compiled(x + 1), y)).backward()


def test_a_term_of_the_whole_batch_in_the_graph() -> None:
    model, (x, y) = network(), batch(6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(model(x), y) + model[0].weight.square().sum()

    with pytest.raises(gg.UnsupportedUseError, match="0.weight"), gg.tap(model):
        loss_of(x, y).backward()
    with gg.tap(model) as tap:  # and nothing is left behind
        loss_fn(model(x), y).backward()
    torch.testing.assert_close(tap.sqnorms(), gg.sqnorms(model, loss_fn, x, y))


def test_a_loss_that_mixes_samples() -> None:
    model, x = network(), batch(6)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(gg.BatchCouplingError, match="no sum over the samples"), gg.tap(model):
        out = compiled(x)
        (out @ out.T).softmax(-1).diagonal().log().mean().backward()


def test_a_use_after_the_call() -> None:
    model, x = network(), batch(6)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(gg.UnsupportedUseError, match="'3.weight' is used in '.*' outside of the compiled call"), gg.tap(model):
        compiled(x) @ model[3].weight


def test_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(gg.BatchCouplingError, match="statistics of the batch"), gg.tap(model):
        compiled(batch(6)[0])
    x, y = batch(6)
    model.eval()
    both(model, compiled, x, y)


class Mapped(nn.Module):
    """A parameter in an operation without a fused rule."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def test_an_operation_without_a_rule() -> None:
    """The reference path is checked on random numbers while the graph is traced."""
    model, (x, y) = Mapped(lambda x, w: torch.cdist(x[:, None], w).flatten(1)), batch(6)
    both(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, y)
    mixing = Mapped(lambda x, w: torch.addbmm(w, x[:, :3, None], x[:, None]))  # a sum over the batch
    with pytest.raises(gg.UnsupportedUseError, match="'w' in 'addbmm'"), gg.tap(mixing):
        torch.compile(mixing, fullgraph=True, backend="aot_eager")(x)


def test_a_part_that_is_compiled_on_its_own() -> None:
    model, (x, y) = network(), batch(6)
    model[0].compile(backend="aot_eager")
    with gg.tap(model) as tap:
        loss_fn(model(x), y).backward()
    with pytest.raises(gg.UnsupportedUseError, match="'0.weight'.*compile the module that is tapped"):
        tap.sqnorms()


def test_a_graph_that_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x.tanh())

    model, (x, y) = Broken(), batch(6)
    with gg.tap(model) as tap:
        loss_fn(torch.compile(model, backend="aot_eager")(x), y).backward()
    with pytest.raises(gg.UnsupportedUseError, match="'a.weight'.*fullgraph=True"):
        tap.sqnorms()
    both(model, model, x, y)  # nothing is left behind


def test_more_samples_than_there_is_room_for() -> None:
    model, (x, y) = network(), batch(5000)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with gg.tap(model) as tap:
        loss_fn(compiled(x), y).backward()
    with pytest.raises(gg.TapStateError, match="batch_size=B"):
        tap.sqnorms()
    with gg.tap(model, batch_size=5000) as tap:
        loss_fn(compiled(x), y).backward()
    torch.testing.assert_close(tap.sqnorms(), gg.sqnorms(model, loss_fn, x, y))


def test_two_backward_passes() -> None:
    model, (x, y) = network(), batch(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=False), gg.tap(model) as tap:
        loss = loss_fn(compiled(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
    with pytest.raises(gg.TapStateError, match="more than one backward"):
        tap.sqnorms()
