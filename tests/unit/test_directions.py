"""Who may import whom: training and serving are apart, and patches know nothing of training."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tlt_sglang"


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, in any scope."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(
    "path",
    sorted([*(PACKAGE / "sidecar").rglob("*.py"), *(PACKAGE / "training").rglob("*.py")]),
    ids=lambda p: p.name,
)
def test_training_never_imports_sglang(path: Path) -> None:
    engine = ("sglang", "tlt_sglang.engine", "tlt_sglang.patches", "tlt_sglang.cpu")
    found = [name for name in imports(path) if any(within(name, part) for part in engine)]
    assert found == []


def test_serving_never_imports_training() -> None:
    files = {*PACKAGE.rglob("*.py"), *(ROOT / "patches").glob("*.py")}
    serving = [
        path
        for path in files
        if not {"sidecar", "training"} & set(path.relative_to(ROOT).parts) and path.name != "cli.py"
    ]
    assert len(serving) > 40
    found = [
        f"{path.name}: {name}"
        for path in serving
        for name in imports(path)
        if within(name, "tlt_sglang.sidecar") or within(name, "tlt_sglang.training")
    ]
    assert found == []
