"""The files of harvest logs: creation, liveness and removal.

The writer of a log holds an exclusive `flock` on it, which ends with its process however that ends.
Unlike a process id, a lock works between containers that share /dev/shm but not their processes,
and is never reused by another process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path

from tlt_sglang.errors import EnvironmentProblem

PREFIX = "tlt-harvest-"
FOLDER = Path("/dev/shm")

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def create(folder: Path, size: int) -> tuple[Path, int]:
    """Create a file of `size` bytes, all allocated and locked; return path and descriptor.

    Raises EnvironmentProblem without leaving a file.
    """
    while True:
        path = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _problem(folder, size, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:  # else another process removed it before the lock
                os.posix_fallocate(file, 0, size)
                return path, file
        except BaseException as error:
            path.unlink(missing_ok=True)
            os.close(file)
            if isinstance(error, OSError):
                raise _problem(folder, size, error) from error
            raise
        os.close(file)


def require_room(size: int, folder: Path = FOLDER) -> int:
    """Return the bytes that are free in `folder` now; raise EnvironmentProblem if a log of `size`
    bytes does not fit."""
    try:
        space = os.statvfs(folder)
    except OSError as error:
        raise _problem(folder, size, error) from error
    free = space.f_bavail * space.f_frsize
    if free < size:
        raise _problem(folder, size, OSError(errno.ENOSPC, ""))
    return free


def open_to_read(path: Path) -> int:
    """Open a file of this user; return its descriptor. Raises EnvironmentProblem."""
    try:
        file = os.open(path, _READ)
    except OSError as error:
        raise EnvironmentProblem(
            f"The harvest log {path} cannot be opened ({error.strerror}); is its engine running?"
        ) from error
    info = os.fstat(file)
    if stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid():
        return file
    os.close(file)
    raise EnvironmentProblem(
        f"{path} is not a regular file of this user; give the harvest log of your engine."
    )


def is_orphan(file: int) -> bool:
    """Return whether no process writes this file any more."""
    if not _share(file):
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def remove_stale(folder: Path = FOLDER) -> list[Path]:
    """Remove and return this user's logs that no process writes any more."""
    removed = []
    for path in folder.glob(PREFIX + "*"):
        with contextlib.suppress(EnvironmentProblem):  # removed meanwhile, or another user's
            file = open_to_read(path)
            if _share(file):  # held until the file is removed: see `create`
                path.unlink(missing_ok=True)
                removed.append(path)
            os.close(file)
    return removed


def _share(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _problem(folder: Path, size: int, error: OSError) -> EnvironmentProblem:
    if error.errno == errno.ENOSPC:
        return EnvironmentProblem(
            f"{folder} has no room for a harvest log of {size / 1e9:.2f} GB; make room, enlarge it "
            "(docker: --shm-size), or set a smaller --tlt-harvest-gb."
        )
    return EnvironmentProblem(
        f"A harvest log cannot be created in {folder} ({error.strerror}); make it writable."
    )
