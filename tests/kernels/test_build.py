"""The compiled half, looked at from outside: its C++ tests, what ptxas says, who includes whom, and which symbols it leaves open."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from ghostgrad import _C

sys.path.insert(0, str(Path(__file__).parent))
import resources

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "affine_sqnorm conv_sqnorm conv_wgrad_sqnorm embedding_sqnorm gram_sqnorm norm_affine nso_step_ outer_sqnorm perturb_ probe_dot row_sqnorm"
    " second_difference wgrad_moments wgrad_sqnorm"
).split()  # their files and kernels do without an underscore at the end
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def ctest_names() -> list[str]:
    """The tests that CMakeLists.txt adds."""
    core = ["dtype", "kernels", "noise", "philox", "plan", "reduce", "tiles"]
    emulated = [f"emulated{what}{how}" for what in ("", "_noise", "_primitives") for how in ("", "_sanitized")]
    return [*core, *emulated, *[pytest.param(name, marks=needs_nvcc) for name in ("launch", "primitives")]]


@pytest.mark.parametrize("name", ctest_names())
def test_cpp(build: Path, name: str) -> None:
    done = subprocess.run([str(build / f"test_{name}")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:4000] + done.stderr[:4000]


def test_every_cpp_test_is_listed(build: Path) -> None:
    listed = subprocess.run(["ctest", "--test-dir", str(build), "-N"], check=True, capture_output=True, text=True).stdout
    known = {name if isinstance(name, str) else name.values[0] for name in ctest_names()}
    assert set(re.findall(r"Test +#\d+: (\w+)", listed)) == (known if shutil.which("nvcc") else known - {"launch", "primitives"})


# --- ptxas and occupancy ---


@needs_nvcc
def test_no_kernel_spills(build: Path) -> None:
    rows = resources.read(build)
    archs = {row.arch for row in rows}
    assert archs == {"sm_80", "sm_90", "sm_90a"} or "CUDAARCHS" in os.environ
    for arch in archs:
        kernels = {row.kernel for row in rows if row.arch == arch}
        for op in (op.rstrip("_") for op in OPS):
            for dtype in ("float32", "float64", "bfloat16", "float16"):
                assert any(re.match(rf"{op}_kernel<(\w+<)?{dtype}\b", kernel) for kernel in kernels), f"{op} in {dtype} is not compiled for {arch}: {kernels}"
    assert not [row for row in rows if row.spills != "0"]
    assert not [row for row in rows if row.stack != "0"], "a kernel keeps an array in local memory"


@needs_nvcc
def test_resources_are_those_of_the_table(build: Path) -> None:
    kept, made = resources.TABLE.read_text(), resources.document(build)
    if kept.splitlines()[0] != made.splitlines()[0]:
        pytest.skip(
            f"the table is of {kept.splitlines()[0]}, this is {made.splitlines()[0]}: registers may differ; spills and occupancy are tested above and below"
        )
    if "CUDAARCHS" in os.environ:
        pytest.skip("CUDAARCHS asks for other architectures than the table's")
    difference = "\n".join(difflib.unified_diff(kept.splitlines(), made.splitlines(), "tests/kernels/resources.txt", "this build", lineterm="", n=0))
    assert not difference, f"{difference}\n\nIf this is meant: python tests/kernels/resources.py {build} --write"


# Warps that a multiprocessor must hold at least: kernels that wait for memory need many, unless rings of copies in shared memory wait for them; those that
# multiply tiles in registers need one block.
FLOORS = {
    r"\w*row_sqnorm_kernel|sort_tokens|add_\w+": 16,
    r"affine_sqnorm_kernel": 16,
    r"(perturb|probe_dot|nso_step|second_difference)_kernel": 16,
    r"(embedding_sqnorm|norm_affine\w*)_kernel|(row|pixel)_\w+_kernel|finish_kernel": 8,
    r"\w+_kernel<Warpgroups.*": 12,
    r"(outer|gram|wgrad|conv)\w*_kernel": 8,
}


@needs_nvcc
def test_occupancy(build: Path) -> None:
    rows = resources.read(build)
    for row in rows:
        floor = next((floor for pattern, floor in FLOORS.items() if re.match(pattern, row.kernel)), None)
        assert floor is not None, f"{row.kernel} has no floor: say in FLOORS how many warps it needs"
        assert row.warps == "-" or int(row.warps) >= floor, f"{row.kernel} on {row.arch}: {row.warps} warps at a time, of which it needs {floor}"
    for kernel in {row.kernel for row in rows}:
        assert any(row.warps != "-" for row in rows if row.kernel == kernel), f"no size in occupancy.cpp makes a launcher start {kernel}"


@needs_nvcc
def test_occupancy_is_the_hardwares(build: Path) -> None:
    def warps(*line: int) -> int:
        return int(resources.occupancy(build, "warps", " ".join(map(str, line)))[0])

    # capability, threads, registers, static and dynamic shared memory: bound by threads, by registers, by shared memory of either kind, and not at all possible
    assert [warps(80, 256, 32, 0, 0), warps(80, 256, 33, 0, 0), warps(90, 256, 128, 0, 0), warps(90, 384, 168, 0, 0)] == [64, 48, 16, 12]
    assert [warps(80, 256, 32, 0, 80 * 1024), warps(80, 256, 32, 40 * 1024, 0), warps(90, 256, 32, 0, 112 * 1024)] == [16, 32, 16]
    assert [warps(80, 256, 32, 0, 164 * 1024), warps(90, 256, 32, 0, 227 * 1024)] == [0, 8]


def test_the_reader_of_ptxas_sees_spills() -> None:
    log = """
ptxas info    : Compiling entry function '_ZN9ghostgrad4cuda4_GLO11some_kernelIfEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN9ghostgrad4cuda4_GLO11some_kernelIfEEvv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8768 bytes smem, 456 bytes cmem[0]
"""
    assert resources.parse(log) == [resources.Report("_ZN9ghostgrad4cuda4_GLO11some_kernelIfEEvv", "sm_80", 255, 8768, 16, 12)]


def test_kernels_have_readable_names() -> None:
    symbols = {
        "_ZN9ghostgrad4cuda4_GLO11some_kernelIfEEvv": "some_kernel<float32>",
        "_ZN9ghostgrad4cuda12_GLOBAL__N_110row_kernelINS_4core8BFloat16EEEvNS3_4RowsElPd": "row_kernel<bfloat16>",
        "_ZN9ghostgrad4cuda12_GLOBAL__N_16kernelINS1_6MatrixINS0_4TF32ELi128ELi64EEEfEEvPT0_": "kernel<Matrix<tf32, 128, 64>, float32>",
        "_ZN9ghostgrad4cuda12_GLOBAL__N_111sort_tokensILb0EEEvPi": "sort_tokens<false>",
    }
    assert resources.readable(list(symbols)) == list(symbols.values())


# --- 32-bit numbers ---

# Sizes that kernels count in 32 bits: core/limits.h bounds them, checked_picks the positions of tokens.
COUNTED = "batch positions in_features out_features out kernel stride padding dilation group_channels group_outputs offsets channels before".split()


def test_what_kernels_count_in_32_bits_is_bounded() -> None:
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        for size in re.findall(r"static_cast<u?int(?:32_t)?>\((?:o|c|rows|picks|affine|operands)\.(\w+)", path.read_text()):
            assert size in COUNTED, f"{path.name} keeps {size} in 32 bits: bound it in core/limits.h or use 64"
    for op in OPS:
        binding = (ROOT / "csrc" / "torch" / f"{op.rstrip('_')}_cuda.cpp").read_text()
        if re.search(r"checked_(operands|convolution|affine|normalisation)\(", binding):
            assert f'check_countable("{op}", ' in binding, f"{op}_cuda.cpp launches kernels that count in 32 bits and does not ask whether they can"


@needs_nvcc
def test_a_spilling_kernel_does_not_build(tmp_path: Path) -> None:
    # The gate itself: the flags that CMakeLists.txt gives to nvcc turn a spill into an error.
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spill(float* x) {\n"
        "  float y[200];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 200; ++i) y[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = y[199 - i] * y[i];\n"
        "}\n"
    )
    assert "--warn-on-spills,--warning-as-error" in (ROOT / "CMakeLists.txt").read_text()
    flags = ["-arch=sm_80", "-Xptxas", "--warn-on-spills,--warning-as-error", "-c", "-o", str(tmp_path / "spill.o")]
    assert subprocess.run(["nvcc", *flags, str(source)], capture_output=True).returncode != 0


# --- who includes whom ---


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("core", r"torch/|ATen/|c10/|pybind11/|cuda|cpu/"),
        ("cpu", r"torch/|ATen/|c10/|pybind11/|cuda"),
        ("cuda", r"torch/|ATen/|c10/|pybind11/|cpu/"),
        ("torch", r"torch/extension\.h|torch/all\.h|torch/library\.h|ATen/|c10/|pybind11/"),
    ],
)
def test_include_rules(folder: str, forbidden: str) -> None:
    files = sorted((ROOT / "csrc" / folder).iterdir())
    assert files
    for path in files:
        wrong = [name for name in includes(path) if re.match(forbidden, name)]
        assert not wrong, f"{path.relative_to(ROOT)} must not include {wrong}"


def test_include_rules_of_single_files() -> None:
    assert not [name for name in includes(ROOT / "csrc" / "module.cpp") if re.match("torch/|ATen/|c10/", name)]
    for path in sorted((ROOT / "csrc" / "torch").iterdir()):
        other = {"_cpu": "cuda", "_cuda": "cpu/"}
        for suffix, prefix in other.items():
            if path.stem.endswith(suffix):
                assert not [name for name in includes(path) if name.startswith(prefix)], path.name
    # One name, all its files.
    for op in OPS:
        name = op.rstrip("_")
        for file in (f"cpu/{name}.cpp", f"cuda/{name}.h", f"cuda/{name}.cu", f"torch/{name}_cpu.cpp", f"torch/{name}_cuda.cpp"):
            assert (ROOT / "csrc" / file).exists(), file
        assert re.search(rf'm\.def\(\s*"{op}\(', (ROOT / "csrc" / "torch" / "library.cpp").read_text())


# --- symbols ---


def symbols(path: Path, *options: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    return subprocess.run(["nm", "-C", *options, str(path)], check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_module_keeps_to_the_stable_abi() -> None:
    undefined = symbols(Path(_C.__file__), "-D", "--undefined-only")
    assert undefined
    assert not [line for line in undefined if re.search(r"\b(c10|at|torch)::", line)]


def test_instruction_sets_share_no_code(build: Path) -> None:
    # Note [One translation unit per instruction set] in csrc/cpu/simd.h.
    objects = sorted(path for isa in ("portable", "avx2", "avx512", "avx512bf16") for path in build.glob(f"CMakeFiles/ghostgrad_cpu_{isa}.dir/**/*.o"))
    assert objects
    for path in objects:
        weak = [line for line in symbols(path, "--defined-only") if re.match(r"\w+ [VvWwu] ", line) and "DW.ref." not in line]
        assert not weak, f"{path.name} could lend these to others: {weak}"


# --- CUDA bindings ---


@needs_nvcc
@pytest.mark.parametrize("op", OPS)
def test_the_cuda_binding_compiles(op: str, tmp_path: Path, build: Path) -> None:
    # Also where torch is a CPU build and the binding is not part of the module.
    facts = dict(line.split("=", 1) for line in (build / "ghostgrad_kernels.txt").read_text().splitlines())
    paths = [str(ROOT / "csrc"), *include_paths(), *facts["cuda_include"].split(";")]
    flags = [
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wall",
        "-Werror",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *[f"-I{path}" for path in paths],
    ]
    source = str(ROOT / "csrc" / "torch" / f"{op.rstrip('_')}_cuda.cpp")
    done = subprocess.run(["g++", *flags, "-c", source, "-o", str(tmp_path / "binding.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def test_both_backends_are_registered() -> None:
    for op in OPS:
        table = torch._C._dispatch_dump(f"ghostgrad::{op}")
        assert re.search(r"^CPU: registered", table, re.MULTILINE)
        assert bool(re.search(r"^CUDA: registered", table, re.MULTILINE)) == _C.with_cuda
