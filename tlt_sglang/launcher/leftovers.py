"""Shared memory that SGLang's killed processes leave behind, removed when the launcher ends.

SGLang ends its processes by SIGKILL, after which nobody unlinks their segments. Those that belong
to a server bear its random id or the id of the process that made them; our own logs, that nobody
holds their lock any more. Runs in the main process.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

from tlt_sglang.config.sources import from_environment
from tlt_sglang.harvest import announce, segments

_FOLDER = Path("/dev/shm")
_servers: set[str] = set()
_processes: set[int] = set()
DYING_SECONDS = 3.0


def belongs_to(instance_id: str) -> None:
    """The random id of the server that this process runs, whose other processes have started."""
    if instance_id:
        _servers.add(instance_id)
    _started()


def _started() -> None:
    _processes.update(child.pid for child in psutil.Process().children(recursive=True))


def remove() -> None:
    """Unlink what this server has left; call when its processes have been killed."""
    _started()
    for path in _FOLDER.glob("sglang_loads_*.shm"):
        if any(f"_{one}_" in path.name for one in _servers):
            path.unlink(missing_ok=True)
    for path in _FOLDER.glob("sgl_shm_*_*_*"):
        maker = path.name.split("_")[-2]
        with contextlib.suppress(OSError):
            if maker.isdigit() and not Path(f"/proc/{maker}").exists() and _ours(path):
                path.unlink()
    deadline = time.monotonic() + DYING_SECONDS
    while any(_logs(pid) for pid in _processes) and time.monotonic() < deadline:
        segments.remove_stale(_FOLDER)  # a process holds its lock until it is wholly dead
        time.sleep(0.02)
    config = from_environment()
    if config is not None and config.store_path is not None:
        announce.read(config.store_path)  # which removes those of dead engines


def _logs(pid: int) -> list[Path]:
    return list(_FOLDER.glob(f"{segments.PREFIX}{pid}-*"))


def _ours(path: Path) -> bool:
    return path.stat().st_uid == os.getuid()
