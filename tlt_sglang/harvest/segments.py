"""The files of harvest logs: made, recognised as alive, and removed.

Whoever writes a log holds an exclusive `flock` on it, which ends with its process however that
ends. Unlike a process id that tells the truth also between containers that share /dev/shm but not
their processes, and it is never used again for another process.
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
    """A new file of `size` bytes that this process owns, with all its memory: path, descriptor.

    Raises EnvironmentProblem, leaving nothing.
    """
    while True:
        path = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _problem(folder, size, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:  # else another's `remove_stale` came before the lock
                os.posix_fallocate(file, 0, size)
                return path, file
        except BaseException as error:
            path.unlink(missing_ok=True)
            os.close(file)
            if isinstance(error, OSError):
                raise _problem(folder, size, error) from error
            raise
        os.close(file)


def require_room(size: int, folder: Path = FOLDER) -> None:
    """Raise EnvironmentProblem if `folder` has no room for a log of `size` bytes now."""
    try:
        there = os.statvfs(folder)
    except OSError as error:
        raise _problem(folder, size, error) from error
    if there.f_bavail * there.f_frsize < size:
        raise _problem(folder, size, OSError(errno.ENOSPC, ""))


def open_to_read(path: Path) -> int:
    """A descriptor of one of this user's files; raises EnvironmentProblem."""
    try:
        file = os.open(path, _READ)
    except OSError as error:
        raise EnvironmentProblem(
            f"The harvest log {path} cannot be opened ({error.strerror}); is its engine running?"
        ) from error
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
        return file
    os.close(file)
    raise EnvironmentProblem(f"{path} is no file of yours; name the harvest log of your engine.")


def is_orphan(file: int) -> bool:
    """Whether nobody writes this file any more."""
    if not _share(file):
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def remove_stale(folder: Path = FOLDER) -> list[Path]:
    """Remove this user's logs that nobody writes any more; call where an engine starts."""
    removed = []
    for path in folder.glob(PREFIX + "*"):
        with contextlib.suppress(EnvironmentProblem):  # gone meanwhile, or another user's
            file = open_to_read(path)
            if _share(file):  # kept until the file is gone: see `create`
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
        f"No harvest log can be made in {folder} ({error.strerror}); make it writable."
    )
