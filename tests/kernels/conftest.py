"""The kernels are built once more, with tests, in ``build/tests``; a second run reuses what is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests"


@pytest.fixture(scope="session")
def build() -> Path:
    """The build folder, with everything built. ``build.log`` keeps what compilers said, of earlier runs too: what is up to date is not compiled again."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on PATH")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    cuda = "ON" if shutil.which("nvcc") else "OFF"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "build.log", "a") as log:
        configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, "-DGHOSTGRAD_TESTS=ON", f"-DGHOSTGRAD_CUDA={cuda}"]
        for command in (configure, ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count())]):
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
            assert done.returncode == 0, (BUILD / "build.log").read_text()[-6000:]
    return BUILD
