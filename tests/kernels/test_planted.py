"""Faults planted in the CUDA kernels: each must turn the kernels' test on the CPU red, or that test is worth nothing.

A fault is a text of a kernel's source and what stands there instead. A copy of the sources gets it, the op's kernel is compiled from the copy and linked before
the others, and the test of that op must fail.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """``old`` stands in ``csrc/cuda/<file>`` exactly once; with ``new`` instead the test of ``op`` fails. ``sanitized``: by the sanitizers alone."""

    what: str
    op: str
    file: str
    old: str
    new: str
    sanitized: bool = False


FAULTS = [
    Fault("no barrier after copies", "outer_sqnorm", "product.cuh", "__syncthreads();  // everyone's copies of this step have arrived", "//"),
    Fault("no barrier after a sum", "row_sqnorm", "device.cuh", "__syncthreads();  // nobody overwrites warp_sums", "//"),
    Fault("no wait for copies", "outer_sqnorm", "product.cuh", "wait_for_copies<Math::kStages - 2>();", ""),
    Fault("a wait for one group too few", "gram_sqnorm", "product.cuh", "wait_for_copies<Math::kStages - 2>();", "wait_for_copies<Math::kStages - 1>();"),
    Fault("a tail of whole vectors", "gram_sqnorm", "product.cuh", "(left >= kPiece ? kPiece : left > 0 ? left : 0)", "(left > 0 ? kPiece : 0)"),
    Fault("a row too many", "wgrad_sqnorm", "product.cuh", "const bool inside = i * kRowsApart < rows &&", "const bool inside = i * kRowsApart <= rows &&"),
    Fault("padding in a sum", "outer_sqnorm", "product.cuh", "if (row + Math::row(i) < rows && column + Math::column(i) < columns)", "if (true)"),
    Fault("an element too many", "wgrad_sqnorm", "reduce.cuh", "e < elements; e += threads", "e <= elements; e += threads", sanitized=True),
    Fault(
        "fragments swapped",
        "outer_sqnorm",
        "product.cuh",
        "first[0] = both[0], first[1] = both[1], second[0] = both[2]",
        "first[0] = both[0], second[0] = both[1], first[1] = both[2]",
    ),
    Fault(
        "a tf32 fragment's quarters swapped",
        "gram_sqnorm",
        "product.cuh",
        "lane() % 4 + i / 2 * 4, outer + lane() / 4 + i % 2 * 8",
        "lane() % 4 + i % 2 * 4, outer + lane() / 4 + i / 2 * 8",
    ),
    Fault("sums read from another row", "wgrad_sqnorm", "product.cuh", "* 16 + i % 4 / 2 * 8 + lane() / 4;", "* 16 + i % 2 * 8 + lane() / 4;"),
    Fault(
        "half a warp in a shuffle",
        "wgrad_moments",
        "device.cuh",
        "const double total = warp_sum(value);",
        "const double total = threadIdx.x % 32 < 16 ? warp_sum(value) : 0.0;",
    ),
    Fault("no wait for a bulk copy", "wgrad_sqnorm", "wgrad.cuh", "wait_for_phase(shared.full[place.slot], place.odd);", ""),
    Fault("a bulk copy over what is multiplied", "wgrad_sqnorm", "wgrad.cuh", "wait_for_phase(shared.empty[place.slot], !place.odd);", ""),
    Fault("a product not waited for", "outer_sqnorm", "wgrad.cuh", "wait_for_products<0>(sums);", ""),
]


def outcome(build: Path, folder: Path, op: str, sanitized: bool, kernels: Path) -> subprocess.CompletedProcess[str]:
    """The emulated test of ``op``, with its kernel compiled from the sources in ``kernels``."""
    suffix = "_sanitized" if sanitized else ""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitized else []
    includes = [f"-I{path}" for path in (ROOT / "tests" / "kernels" / "emulation", kernels.parent, ROOT / "csrc")]
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Wno-unknown-pragmas",
        *flags,
        *includes,
        "-x",
        "c++",
        "-c",
        str(kernels / f"{op}.cu"),
        "-o",
        str(folder / "kernel.o"),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[:4000]
    test = build / f"CMakeFiles/test_emulated{suffix}.dir/tests/kernels/test_emulated.cpp.o"
    archives = [str(build / f"lib{name}.a") for name in (f"emulated_kernels{suffix}", "ghostgrad_cpu")]
    linked = subprocess.run(["g++", *flags, str(test), str(folder / "kernel.o"), *archives, "-o", str(folder / "test")], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr[:4000]
    return subprocess.run([str(folder / "test"), op], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.what}")
def test_a_planted_fault_is_seen(fault: Fault, build: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "csrc" / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", kernels)
    source = (kernels / fault.file).read_text()
    assert source.count(fault.old) == 1, f"{fault.file} has changed: say anew where to plant this"
    (kernels / fault.file).write_text(source.replace(fault.old, fault.new))
    done = outcome(build, tmp_path, fault.op, fault.sanitized, kernels)
    print(done.stdout[-400:], done.stderr[:400])
    assert done.returncode != 0


def test_without_a_fault_nothing_is_seen(build: Path, tmp_path: Path) -> None:
    done = outcome(build, tmp_path, "outer_sqnorm", False, ROOT / "csrc" / "cuda")
    assert done.returncode == 0, done.stdout[-4000:]
