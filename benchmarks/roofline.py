"""What each op must move and do at a few named sizes, and how long that takes at least: the floors of benchmarks/gpu.py and of docs/performance.md.

Bytes: each operand read once, each result written once. Operations: multiplications and additions of the formula, symmetric halves once; squaring and adding
what was multiplied (2 / T of it) is left out, as are the few operations per element of the ops that only read. The floor is the larger of bytes over the copy
bandwidth and operations over the peak of the unit that a dtype is multiplied by: tensor cores for bfloat16, plain fused multiply-adds for float32 as long as
torch is not allowed to use TF32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float64: 8}


class Machine(NamedTuple):
    """Bytes per second of a large copy, read and written; operations per second of a large matrix product by dtype."""

    name: str
    bandwidth: float
    peak: dict[str, float]


# The copy and the bfloat16 product were measured on one, the float32 rate (no tensor cores) is its datasheet's.
H100 = Machine("H100", 3.0e12, {"bfloat16": 800e12, "float32": 60e12})


class Work(NamedTuple):
    bytes: int
    operations: int


@dataclass(frozen=True)
class Item:
    """An op at one size. ``work`` and ``operands`` take the sizes by name; ``small`` are sizes that any machine can do in a moment."""

    op: str
    dtype: torch.dtype
    sizes: dict[str, int]
    small: dict[str, int]
    work: Callable[..., Work]
    operands: Callable[..., tuple[Any, ...]]

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{size} = {value}" for size, value in self.sizes.items())
        return f"{self.op}, {dtype_name(self.dtype)}, {sizes}"

    def total(self, small: bool = False) -> Work:
        return self.work(BYTES[self.dtype], **(self.small if small else self.sizes))

    def draw(self, device: torch.device | str, small: bool = False) -> tuple[Any, ...]:
        """The op's arguments, drawn at random."""
        return self.operands(partial(torch.randn, device=device, dtype=self.dtype), **(self.small if small else self.sizes))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(work: Work, dtype: torch.dtype, machine: Machine) -> tuple[float, float]:
    """Of moving the bytes, and of doing the operations; the larger is the floor."""
    return work.bytes / machine.bandwidth, work.operations / machine.peak[dtype_name(dtype)]


# --- products ---


def product_operands(draw: Callable[..., Tensor], B: int, T: int, p: int, d: int) -> tuple[Tensor, Tensor]:
    return draw(B, T, p), draw(B, T, d)


def outer_work(size: int, B: int, T: int, p: int, d: int) -> Work:
    return Work(size * B * T * (p + d) + 4 * B, 2 * B * T * p * d)


def gram_work(size: int, B: int, T: int, p: int, d: int) -> Work:
    return Work(size * B * T * (p + d) + 4 * B, B * T * T * (p + d))


def wgrad_work(size: int, B: int, T: int, p: int, d: int) -> Work:
    return Work(size * (B * T * (p + d) + p * d) + 4 * B, 2 * B * T * p * d)


def moments_work(size: int, B: int, T: int, p: int, d: int) -> Work:
    return Work(size * (B * T * (p + d) + p * d) + 4 * p * d + 4 * B, 2 * B * T * p * d)


# --- rows, picks, normalisation ---


def row_operands(draw: Callable[..., Tensor], B: int, N: int) -> tuple[Tensor]:
    return (draw(B, N),)


def row_work(size: int, B: int, N: int) -> Work:
    return Work(size * B * N + 4 * B, 2 * B * N)


def embedding_operands(draw: Callable[..., Tensor], B: int, T: int, d: int) -> tuple[Tensor, Tensor]:
    b = draw(B, T, d)
    return torch.randint(50257, (B, T), device=b.device), b


def embedding_work(size: int, B: int, T: int, d: int) -> Work:
    return Work(size * B * T * d + 8 * B * T + 4 * B, 2 * B * T * d)


def affine_operands(draw: Callable[..., Tensor], B: int, T: int, d: int) -> tuple[Tensor, ...]:
    b, x, mean = draw(B, T, d, 1), draw(B, T, d, 1), draw(B, T, 1).float()
    return b, x, mean, mean.abs() + 0.5


def affine_work(size: int, B: int, T: int, d: int) -> Work:
    return Work(size * 2 * B * T * d + 4 * (2 * B * T + 2 * d + 2 * B), 7 * B * T * d)


def norm_operands(draw: Callable[..., Tensor], B: int, T: int, d: int) -> tuple[Tensor, ...]:
    operands = affine_operands(draw, B, T, d)
    return *operands, operands[0][0, 0, :, 0].float()


def norm_work(size: int, B: int, T: int, d: int) -> Work:
    return Work(size * 3 * B * T * d + 4 * (2 * B * T + 3 * d + 2 * B), 15 * B * T * d)


# --- convolutions: 3 x 3, padding 1, on n x n pixels ---


def conv_operands(draw: Callable[..., Tensor], B: int, c: int, d: int, n: int) -> tuple[Any, ...]:
    return draw(B, 1, c, n, n), draw(B, 1, d, n, n), [3, 3], [1, 1], [1, 1], [1, 1], 1


def conv_work(size: int, B: int, c: int, d: int, n: int) -> Work:
    return Work(size * B * n * n * (c + d) + 4 * B, 2 * 9 * B * n * n * c * d)


def conv_wgrad_work(size: int, B: int, c: int, d: int, n: int) -> Work:
    return Work(size * (B * n * n * (c + d) + 9 * c * d) + 4 * B, 2 * 9 * B * n * n * c * d)


def _items() -> list[Item]:
    def sizes(names: str, *values: int) -> dict[str, int]:
        return dict(zip(names.split(), values, strict=True))

    def product(op: str, work: Callable[..., Work], dtype: torch.dtype, *values: int) -> Item:
        return Item(op, dtype, sizes("B T p d", *values), sizes("B T p d", 2, 5, 24, 17), work, product_operands)

    bf16, f32, tokens, conv = torch.bfloat16, torch.float32, sizes("B T d", 2, 5, 24), sizes("B c d n", 2, 3, 4, 6)
    return [
        *[product("wgrad_sqnorm", wgrad_work, bf16, 8, T, 4096, 4096) for T in (512, 1024, 2048)],
        product("wgrad_sqnorm", wgrad_work, f32, 16, 512, 1024, 1024),
        product("wgrad_moments", moments_work, bf16, 8, 512, 4096, 4096),
        product("outer_sqnorm", outer_work, bf16, 8, 1024, 4096, 4096),
        product("outer_sqnorm", outer_work, f32, 16, 512, 1024, 1024),
        product("gram_sqnorm", gram_work, bf16, 256, 64, 1024, 1024),
        product("gram_sqnorm", gram_work, bf16, 64, 256, 4096, 4096),
        product("gram_sqnorm", gram_work, f32, 256, 64, 1024, 1024),
        Item("row_sqnorm", bf16, sizes("B N", 64, 1 << 23), sizes("B N", 3, 1000), row_work, row_operands),
        Item("row_sqnorm", f32, sizes("B N", 4096, 1 << 16), sizes("B N", 3, 1000), row_work, row_operands),
        Item("embedding_sqnorm", bf16, sizes("B T d", 64, 1024, 1024), tokens, embedding_work, embedding_operands),
        Item("affine_sqnorm", bf16, sizes("B T d", 64, 1024, 1024), tokens, affine_work, affine_operands),
        Item("norm_affine", bf16, sizes("B T d", 64, 1024, 1024), tokens, norm_work, norm_operands),
        Item("norm_affine", f32, sizes("B T d", 64, 1024, 1024), tokens, norm_work, norm_operands),
        Item("conv_sqnorm", bf16, sizes("B c d n", 64, 256, 256, 32), conv, conv_work, conv_operands),
        Item("conv_wgrad_sqnorm", bf16, sizes("B c d n", 64, 256, 256, 32), conv, conv_wgrad_work, conv_operands),
        Item("conv_wgrad_sqnorm", f32, sizes("B c d n", 64, 64, 64, 32), conv, conv_wgrad_work, conv_operands),
    ]


ITEMS = {item.name: item for item in _items()}


# --- the page ---


def measured() -> list[dict[str, Any]]:
    """The files that benchmarks/gpu.py has left."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [results for results in found if "stages" in results]


UNMEASURED = "not yet measured"


def decimal(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def predictions(machine: Machine = H100, files: list[dict[str, Any]] | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the page's table: a measured time stands beside the floor that the measured machine's own copy and products give."""
    files = measured() if files is None else files
    rows = []
    measurements = [{row["item"]: row for row in results["stages"].get("roofline", {}).get("rows", []) if row["verdict"] == "ok"} for results in files]
    for item in ITEMS.values():
        work = item.total()
        memory, arithmetic = seconds(work, item.dtype, machine)
        bound = "memory" if memory >= arithmetic else "arithmetic"
        row = [
            f"`{item.op}`",
            item.name.split(", ", 1)[1],
            decimal(work.bytes / 1e6),
            decimal(work.operations / 1e9),
            bound,
            decimal(1e6 * max(memory, arithmetic)),
        ]
        for times in measurements:
            found = times.get(item.name)
            over = f" ({found['over_floor']:.2f})" if found and found["over_floor"] else ""
            row.append(f"{decimal(found['us'])}{over}" if found else UNMEASURED)
        rows.append(row if files else [*row, UNMEASURED])
    columns = [f"measured, µs, on {results['environment']['device']} (over the floor there)" for results in files] or ["measured"]
    return ["op", "size", "MB", "10⁹ operations", "bound by", f"floor on one {machine.name}, µs", *columns], rows


def ceilings(files: list[dict[str, Any]] | None = None) -> list[list[str]]:
    """Device, copy bandwidth in TB/s, and products in TFLOP/s (bfloat16, TF32, float32), as measured."""
    rows = []
    for results in measured() if files is None else files:
        rates = {row["item"]: row["rate"] / 1e12 for row in results["stages"].get("roofline", {}).get("rows", []) if "rate" in row}
        columns = ("copy", "product bfloat16", "product tf32", "product float32")
        rows.append([results["environment"]["device"], *(decimal(rates[name]) if name in rates else UNMEASURED for name in columns)])
    return rows


def training_steps(files: list[dict[str, Any]] | None = None) -> list[list[str]]:
    """Device, problem, plain step in ms, and the ratios of the null, a step in a tap and norms alone."""
    rows = []
    for results in measured() if files is None else files:
        for row in results["stages"].get("steps", {}).get("rows", []):
            methods = row.get("methods", {})
            cells = [f"{methods[name]['ratio']:.3f}" if "ratio" in methods.get(name, {}) else "error" for name in ("null", "tap", "alone")]
            rows.append([results["environment"]["device"], row["item"], decimal(row["plain_ms"]) if "plain_ms" in row else "error", *cells])
    return rows
