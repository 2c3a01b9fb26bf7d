"""Imports go one way: each module may use only what stands before it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import ghostgrad

PACKAGE = Path(ghostgrad.__file__).parent
ORDER = (
    "errors _C reference samplewise layout ops noise perturb optim contributions rules layers recurrent distributed tap compiled norms gram weighted"
    " inputs costs trace gauss_newton eigenvalues statistics scores bench training private papers report cli"
).split()


def imported(path: Path) -> set[str]:
    """The ghostgrad modules that a file imports, top level of the package."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (node.module or "").split(".")[0]
            if node.level == depth:  # from the package's top
                found |= {base} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ghostgrad":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name.split(".") + ["ghostgrad"])[1] for alias in node.names if alias.name.split(".")[0] == "ghostgrad"}
    return found & set(ORDER)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if parts == ("__init__.py",):
        return  # the face of everything
    name = parts[0].removesuffix(".py")
    assert name in ORDER, f"{name} has no place in the order of imports"
    for other in imported(path) - {name}:
        assert ORDER.index(other) < ORDER.index(name), f"{'/'.join(parts)} imports {other}, which stands after it"


def test_the_reference_imports_torch_alone() -> None:
    assert not imported(PACKAGE / "reference.py")


def test_the_core_needs_no_extras() -> None:
    """import ghostgrad works with torch and numpy alone."""
    core = [path for name in ORDER[: ORDER.index("training")] for path in [*PACKAGE.glob(f"{name}.py"), *(PACKAGE / name).glob("*.py")]]
    assert len(core) > ORDER.index("training") - 1
    allowed = {*sys.stdlib_module_names, "torch", "numpy"}
    for path in core:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
            assert {str(name).split(".")[0] for name in names} <= allowed, path.name
