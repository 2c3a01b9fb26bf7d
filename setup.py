"""The torch half of the build: asks CMake for the kernel archives, then compiles the bindings against the torch that is installed.

One switch, ``GHOSTGRAD_CUDA``: unset, CUDA kernels are compiled if nvcc is on PATH; ``0``, never; ``1``, nvcc is required.
Whether they are *linked* is decided by torch: a CPU-only torch has nothing to run them with, so there they are
compiled, checked by ptxas and left out (tests/kernels compiles their bindings, too).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "ghostgrad is compiled against the torch you run, and this build sees none (pip hides it unless told not to). Type:\n"
        "    pip install torch\n"
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11, the floor: the result runs on any later one


def cuda_wanted() -> bool:
    """Whether to compile the CUDA kernels."""
    switch = os.environ.get("GHOSTGRAD_CUDA", "")
    if switch not in ("", "0", "1"):
        sys.exit(f"GHOSTGRAD_CUDA must be unset, 0 or 1, got {switch!r}")
    found = shutil.which("nvcc") is not None
    if switch == "1" and not found:
        sys.exit("GHOSTGRAD_CUDA=1 asks for the CUDA kernels, but nvcc is not on PATH. Put it there, or unset GHOSTGRAD_CUDA.")
    return switch != "0" and found


def build_kernels(with_cuda: bool) -> dict[str, str]:
    """Runs CMake and returns what it says about the archives it made."""
    if shutil.which("cmake") is None:
        sys.exit("ghostgrad's kernels are built by CMake, which is not on PATH: pip install cmake ninja")
    build = ROOT / "build" / "kernels"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, f"-DGHOSTGRAD_CUDA={'ON' if with_cuda else 'OFF'}"], check=True)
    with open(build / "kernels.log", "w") as log:  # mostly ptxas, which reports what each kernel needs
        made = subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count())], stdout=log, stderr=subprocess.STDOUT)
    if made.returncode != 0:
        sys.exit((build / "kernels.log").read_text() + "\nghostgrad: the kernels did not compile, see above")
    lines = (build / "ghostgrad_kernels.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


class BuildWithKernels(BuildExtension):
    """BuildExtension that compiles the kernels first, and only when extensions are really built."""

    def build_extensions(self) -> None:
        compiled = cuda_wanted()
        linked = compiled and torch.version.cuda is not None
        kernels = build_kernels(compiled)
        (extension,) = self.extensions
        extension.define_macros += [("GHOSTGRAD_CUDA_ARCHS", f'"{kernels["cuda_archs"] if linked else ""}"')]
        cuda_bindings = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/torch/*_cuda.cpp"))
        if compiled:
            extension.include_dirs += kernels["cuda_include"].split(";")
        if linked:
            extension.sources += cuda_bindings
            extension.define_macros += [("GHOSTGRAD_WITH_CUDA", None), ("USE_CUDA", None)]
            extension.extra_objects += [kernels["cuda_archive"], kernels["cuda_runtime"]]
            extension.libraries += ["torch_cuda", "dl", "rt", "pthread"]
        extension.extra_objects += [kernels["cpu_archive"]]
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "ghostgrad._C",
            ["csrc/module.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/torch/*.cpp") if not path.stem.endswith("_cuda"))],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": ["-O2", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", TORCH_TARGET]},
        )
    ],
    cmdclass={"build_ext": BuildWithKernels},
)
