"""What is spent between the kernels: the steps that miss their goals, beside the same arithmetic without a tap.

    python benchmarks/bookkeeping.py [--pairs 15]

``cnn`` over its plain step: the ops of a tap called from bare autograd functions, layer by layer, and the tap itself; and the tap where the images are so
small that arithmetic takes no time. ``tiny`` over its plain step: interception alone, and the least that a tap could do (one collector and one hook for each
layer, nothing checked or followed); then the parts of the tap's own step. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from grid import keep_memory
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ghostgrad as gg
from ghostgrad import ops
from ghostgrad.bench.measure import interleave
from ghostgrad.bench.problems import PROBLEMS, Problem

Step = Callable[[], object]


def steps(problem: Problem, call: Callable[..., Tensor] | None = None) -> tuple[Step, Step]:
    """The plain step, of the model or of what stands for it, and the step in a tap."""
    model = problem.model

    def plain() -> None:
        model.zero_grad()
        problem.loss_fn((call or model)(*problem.inputs), problem.target).backward()

    def tapped() -> None:
        model.zero_grad()
        with gg.tap(model) as tap:
            problem.loss_fn(model(*problem.inputs), problem.target).backward()
        tap.sqnorms()

    return plain, tapped


# ---------------------------------------------------------------------------------------------------------------------------------------
# The convolutional network by bare autograd functions. The norms are formed and dropped.


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor]:
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        sizes, grad = (layer.stride, layer.padding, (1, 1), False, (0, 0), 1), None
        if ctx.needs_input_grad[0]:
            grad = torch.ops.aten.convolution_backward(g, x, weight, None, *sizes, (True, False, False))[0]
        wgrad, _ = ops.conv_wgrad_and_sqnorm(x[:, None], g[:, None], layer.kernel_size, layer.stride, layer.padding, (1, 1), 1)
        return grad, None, wgrad, ops.affine_sqnorm(g[:, None].flatten(3)).shift


class Normalisation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.GroupNorm, weight: Tensor, bias: Tensor) -> Tensor:
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *x.shape[:2], x.shape[2:].numel(), layer.num_groups, layer.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad, grads = ops.norm_affine(g[:, None].flatten(3), x[:, None].flatten(3), mean[:, None], rstd[:, None], weight)
        return grad.view(x.shape), None, grads.scale, grads.shift


def bare(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
    functions = {nn.Conv2d: Convolution, nn.GroupNorm: Normalisation}

    def call(x: Tensor) -> Tensor:
        for layer in model:
            x = functions[type(layer)].apply(x, layer, layer.weight, layer.bias) if type(layer) in functions else layer(x)
        return x

    return call


# ---------------------------------------------------------------------------------------------------------------------------------------
# The small network by the mechanism alone


class Interception(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {}))


class Collector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: dict[str, Tensor], leaf: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.held = held
        return weight.detach(), bias.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        rows = ops.row_sqnorm(ctx.held["b"])
        return None, torch.addcmul(rows, rows, ops.row_sqnorm(ctx.held["x"])), *grads


class Mechanism(Interception):
    def __init__(self, samples: int):
        super().__init__()
        self.leaf = torch.zeros(samples, requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        held = {"x": args[0]}
        out = func(args[0], *Collector.apply(held, self.leaf, *args[1:]))
        out.register_hook(lambda b: held.update(b=b))
        return out


def parts(problem: Problem, repetitions: int) -> dict[str, float]:
    """Microseconds of the parts of a step in a tap, and of the plain one's."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    model = problem.model

    def timed(name: str, step: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = step(*args)
        found[name].append(1e6 * (time.perf_counter() - start))
        return result

    for _ in range(repetitions):
        model.zero_grad()
        tap = timed("make", gg.tap, model)
        timed("open", tap.__enter__)
        out = timed("model", model, *problem.inputs)
        loss = timed("loss", problem.loss_fn, out, problem.target)
        timed("backward", loss.backward)
        timed("close", tap.__exit__, None, None, None)
        timed("read", tap.sqnorms)
        model.zero_grad()
        out = timed("plain model", model, *problem.inputs)
        loss = timed("plain loss", problem.loss_fn, out, problem.target)
        timed("plain backward", loss.backward)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def report(name: str, plain: Step, others: dict[str, Step]) -> None:
        for method, times in interleave(plain, {"null": plain, **others}, pairs).items():
            ratio, excess = statistics.median(s / p for p, s in times), statistics.median(s - p for p, s in times)
            print(
                f"{name:12} {method:14} {ratio:6.2f}   plain {1e3 * statistics.median(p for p, _ in times):8.3f} ms, excess {1e3 * excess:8.3f} ms", flush=True
            )

    cnn = PROBLEMS["cnn"]()
    plain, tapped = steps(cnn)
    assert isinstance(cnn.model, nn.Sequential)
    report("cnn", plain, {"bare functions": steps(cnn, bare(cnn.model))[0], "tap": tapped})
    images = cnn.inputs[0][:2, :, :8, :8].contiguous()
    plain, tapped = steps(Problem(cnn.model, (images,), cnn.target[:2], cnn.loss_fn, cnn.losses))
    report("cnn, 2x3x8x8", plain, {"tap": tapped})

    tiny = PROBLEMS["tiny"]()
    plain, tapped = steps(tiny)

    def within(mode: Callable[[], TorchFunctionMode]) -> Step:
        def step() -> None:
            with mode():
                plain()

        return step

    report("tiny", plain, {"interception": within(Interception), "mechanism": within(lambda: Mechanism(len(tiny.target))), "tap": tapped})
    print("tiny, us    ", "  ".join(f"{name} {value:.0f}" for name, value in parts(tiny, 400).items()))


if __name__ == "__main__":
    main()
