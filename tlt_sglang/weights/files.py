"""Files of a store: durable, named after the process that made them, with errors as sentences."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Container, Iterator
from pathlib import Path

from tlt_sglang.errors import EnvironmentProblem

OLD_SECONDS = 3600.0
"""Age from which an unfinished version is taken for abandoned."""
_OWNER = re.compile(r"@(?P<pid>\d+)@(?P<host>[^@]*)$")


def owned(name: str) -> str:
    """Return `name` with this process's id and host appended."""
    return f"{name}@{os.getpid()}@{os.uname().nodename}"


def is_orphan(path: Path) -> bool:
    """Return whether the process that made `path` has ended; on another host it counts as alive."""
    owner = _OWNER.search(path.name)
    if owner is None or owner["host"] != os.uname().nodename:
        return False
    try:
        state = Path("/proc", owner["pid"], "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"  # killed, and not waited for yet


def remove_owned_by(hosts: Container[str], folder: Path) -> None:
    """Remove the files of `folder` whose processes ran on one of `hosts`. Raises OSError."""
    for path in folder.glob("*@*"):
        owner = _OWNER.search(path.name)
        if owner is not None and owner["host"] in hosts:
            path.unlink(missing_ok=True)


def is_old(path: Path) -> bool:
    """Return whether `path` has not changed for OLD_SECONDS."""
    try:
        return time.time() - path.stat().st_mtime > OLD_SECONDS
    except FileNotFoundError:
        return False


def write(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(file, "wb") as opened:
        os.fchmod(file, 0o600)
        opened.write(data)


def replace_owned(root: Path, folder: Path, name: str, data: bytes) -> Path:
    """Replace this process's file `name` in a folder of the store `root`, whole or not at all.

    Returns its path; see `owned`. Raises EnvironmentProblem.
    """
    path = folder / owned(name)
    replace(root, path, data)
    return path


def replace(root: Path, path: Path, data: bytes) -> None:
    """Replace a file in a folder of the store `root`, whole or not at all.

    Raises EnvironmentProblem.
    """
    with usable(root):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(owned(f".{path.name}"))
        write(temporary, data)
        os.replace(temporary, path)


def sync(folder: Path) -> None:
    """Sync the names in `folder` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter; one that is there has to be. Raises OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(errno.EACCES, "open to others", str(folder))


def check(root: Path) -> None:
    """Create `root`. Raises EnvironmentProblem if it cannot be written to."""
    with usable(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = root / owned(".probe")
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def usable(root: Path) -> Iterator[None]:
    """Raise EnvironmentProblem instead of OSError within the context."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"The drafter store {root} cannot be used ({error.strerror}); make room there or "
            "choose another folder. The versions in it are intact."
        ) from error
