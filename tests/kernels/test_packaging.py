"""What a user meets first: the source distribution is complete, and a build that cannot work says so at once and in words."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_sdist_holds_everything_a_build_needs(tmp_path: Path) -> None:
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, capture_output=True)
    (archive,) = tmp_path.glob("ghostgrad-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "python" / "ghostgrad").rglob("*.py*") if path.suffix in (".py", ".pyi")}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "python/ghostgrad/py.typed"}
    assert needed <= held, sorted(needed - held)
    assert not [name for name in held if name.endswith((".so", ".o", ".a"))]


def run_setup(before: str, **environment: str) -> str:
    code = f"import runpy, sys; {before}; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_a_build_without_torch_gives_the_two_commands() -> None:
    said = run_setup("sys.modules['torch'] = None")
    assert "    pip install torch\n    pip install --no-build-isolation .\n" in said
    assert "Traceback" not in said


def test_the_switch_is_checked() -> None:
    assert "GHOSTGRAD_CUDA must be unset, 0 or 1, got 'yes'" in run_setup("pass", GHOSTGRAD_CUDA="yes")


def test_a_missing_nvcc_is_an_error_if_it_was_asked_for(tmp_path: Path) -> None:
    assert "GHOSTGRAD_CUDA=1 asks for the CUDA kernels, but nvcc is not on PATH" in run_setup("pass", GHOSTGRAD_CUDA="1", PATH=str(tmp_path))
