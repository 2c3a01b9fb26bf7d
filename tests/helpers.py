"""The truth of the tests: per-sample gradients by autograd in float64, one sample at a time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from models import Case


def sample_losses(out: Tensor, target: Tensor) -> Tensor:
    """(B,) smooth losses that hide nothing (no zero rows, no signs)."""
    return out.flatten(1).square().mean(1) + (out.flatten(1) * target[:, None]).sin().mean(1)


def loss_fn(out: Tensor, target: Tensor) -> Tensor:
    """Their mean."""
    return sample_losses(out, target).mean()


def loop_sqnorms(
    model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, dtype: torch.dtype = torch.float64, one_forward: bool = False
) -> dict[str, Tensor]:
    """``{name: (B,)}``: squared norms of every parameter's gradient of every sample's loss. ``one_forward``: the loop is over the samples' parts of
    the loss of one batch, whose rounding is another one than that of single samples."""
    model = copy.deepcopy(model).to(dtype)
    cast = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    rows, outputs = [], model(*cast) if one_forward else None
    for i in range(len(target)):
        if outputs is None:
            loss = loss_fn(model(*(t[i : i + 1] for t in cast)), target[i : i + 1].to(dtype))
        else:
            loss = loss_fn(torch.cat([outputs[:i].detach(), outputs[i : i + 1], outputs[i + 1 :].detach()]), target.to(dtype))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=one_forward)
        scale = len(target) ** 2 if one_forward else 1  # of the mean, as the tap does it
        rows.append([0.0 if g is None else g.double().square().sum().item() * scale for g in grads])
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in zip(names, zip(*rows))}


def loop_grads(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> dict[str, Tensor]:
    """``{name: (B, ...)}``: every sample's gradient in float64."""
    model = copy.deepcopy(model).double()
    cast = [t.double() if t.is_floating_point() else t for t in inputs]
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    rows = []
    for i in range(len(target)):
        (loss,) = sample_losses(model(*(t[i : i + 1] for t in cast)), target[i : i + 1].double())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, parameters)])
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows))}


def sqnorm(g: Tensor) -> Tensor:
    return g.reshape(len(g), -1).square().sum(1)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs() / exact.clamp_min(1e-300)).max().item() if exact.numel() else 0.0


def build(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A case's model, inputs and target, the same at every call."""
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        model(*inputs)  # lazy modules
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)  # norm layers start at one and zero
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    return model.to(dtype), inputs, torch.randn(len(inputs[0])).to(dtype)


def net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    return model, torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


needs_peak_memory = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure peak memory")

_PEAK = """
import ctypes

import torch

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

def peak(step):
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but still resident would hide what the step takes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the system's high-water mark of resident memory
    before = status("VmRSS")
    kept = step()
    return status("VmHWM") - before
"""


def in_own_process(code: str, **environment: str) -> float:
    """The number that the code prints last, run in a process of its own; ``peak(step)`` there is what a call takes at most, in MiB."""
    done = subprocess.run([sys.executable, "-c", _PEAK + code], check=True, capture_output=True, text=True, env=os.environ | environment)
    return float(done.stdout.splitlines()[-1])
