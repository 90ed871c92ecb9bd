"""Files of a store: written to last, named after the process that made them, errors in words."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from tlt_sglang.errors import EnvironmentProblem

OLD_SECONDS = 3600.0
"""Nobody needs so long to write a version."""
_OWNER = re.compile(r"@(?P<pid>\d+)@(?P<host>[^@]*)$")


def owned(name: str) -> str:
    """`name` with this process in it."""
    return f"{name}@{os.getpid()}@{os.uname().nodename}"


def gone(path: Path) -> bool:
    """Whether the process that made `path` has ended; one on another machine counts as alive."""
    owner = _OWNER.search(path.name)
    if owner is None or owner["host"] != os.uname().nodename:
        return False
    try:
        state = Path("/proc", owner["pid"], "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"  # killed, and not waited for yet


def old(path: Path) -> bool:
    """Whether `path` has not changed for OLD_SECONDS."""
    try:
        return time.time() - path.stat().st_mtime > OLD_SECONDS
    except FileNotFoundError:
        return False


def write(path: Path, data: bytes) -> None:
    """Write and sync."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check(root: Path) -> None:
    """Make `root`; raises EnvironmentProblem if it cannot be written to."""
    with usable(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = root / owned(".probe")
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def usable(root: Path) -> Iterator[None]:
    """Raise EnvironmentProblem in the place of OSError."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"The drafter store {root} cannot be used ({error.strerror}); make room there or "
            "choose another folder: the versions in it are whole."
        ) from error
