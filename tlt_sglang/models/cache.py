"""The cache of models that are prepared here: folders that are complete or absent.

Runs in the launcher or the ``tlt`` tool; several processes may prepare the same folder at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tlt_sglang.errors import EnvironmentProblem

STALE_SECONDS = 3600.0
"""A temporary folder that is unchanged for so long belongs to a killed conversion."""


def cache_root() -> Path:
    """Return ``$TLT_CACHE``, or ``~/.cache/tlt_sglang`` by default."""
    return Path(os.environ.get("TLT_CACHE") or "~/.cache/tlt_sglang").expanduser().absolute()


def is_complete(folder: Path, files: Iterable[str]) -> bool:
    """Return whether `folder` has all of `files`."""
    return all((folder / name).is_file() for name in files)


def build(folder: Path, fill: Callable[[Path], None], files: Iterable[str]) -> None:
    """Make ``fill`` write a temporary sibling, then rename it to ``folder``; or leave no trace.

    Two processes may do this at once: the first rename wins, the other's folder is deleted. A
    folder that lacks one of ``files`` is replaced.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        try:
            fill(temporary)
            _publish(temporary, folder, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot write the model folder {folder}: {error}. "
            "Free space there, or set TLT_CACHE to another directory."
        ) from error


def _publish(temporary: Path, folder: Path, files: Iterable[str]) -> None:
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    if folder.exists() and not is_complete(folder, files):
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_complete(folder, files):
            raise


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(".*.tmp-*"):
        files = (folder, *folder.glob("*"))
        newest = max((file.stat().st_mtime for file in files), default=time.time())
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
