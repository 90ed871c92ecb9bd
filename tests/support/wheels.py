"""The wheel of this package, and uv to install it, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")


def uv(*arguments: str) -> str:
    """Run uv without a network; return what it prints."""
    environment = os.environ | {"PYTHONPATH": ""}
    command = [str(UV), "--offline", "--no-config", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path) -> Path:
    """Build the wheel from a copy of the tree in `folder` that has no link; return its path."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "TABLE.md")
    for name in ("tlt_sglang", "patches"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    (source / "tlt_sglang/patches").unlink()
    uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, str(source))
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def environment(folder: Path) -> tuple[Path, str]:
    """Make an empty environment; return its folder and its Python."""
    uv("venv", "--python", sys.executable, str(folder))
    return folder, str(folder / "bin/python")
