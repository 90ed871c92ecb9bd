"""Removal of shared memory that SGLang's killed processes leave behind, when the launcher ends.

SGLang ends its processes by SIGKILL, after which their segments stay. The segments of a server have
its random id or the id of their process in their names; logs of hidden states are recognised by a
lock that no process holds. Runs in the main process; touches nothing of other servers.
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
"""How long killed processes may take to release the locks of their logs."""


def belongs_to(instance_id: str) -> None:
    """Note the random id of the server of this process; call it when its processes have started."""
    if instance_id:
        _servers.add(instance_id)
    _note_children()


def _note_children() -> None:
    _processes.update(child.pid for child in psutil.Process().children(recursive=True))


def remove() -> None:
    """Unlink the segments of this server; call it after its processes have been killed."""
    _note_children()
    # SGLang's load reports bear the id of the server.
    for path in _FOLDER.glob("sglang_loads_*.shm"):
        if any(f"_{one}_" in path.name for one in _servers):
            path.unlink(missing_ok=True)
    # Its other segments bear the id of their process.
    for path in _FOLDER.glob("sgl_shm_*_*_*"):
        process_id = path.name.split("_")[-2]
        with contextlib.suppress(OSError):
            if process_id.isdigit() and not Path(f"/proc/{process_id}").exists() and _ours(path):
                path.unlink()
    # Logs of hidden states; a process holds its lock until it is entirely dead.
    deadline = time.monotonic() + DYING_SECONDS
    while any(_logs(pid) for pid in _processes) and time.monotonic() < deadline:
        segments.remove_stale(_FOLDER)
        time.sleep(0.02)
    config = from_environment()
    if config is not None and config.store_path is not None:
        announce.read(config.store_path)  # reading removes those of dead engines


def _logs(pid: int) -> list[Path]:
    return list(_FOLDER.glob(f"{segments.PREFIX}{pid}-*"))


def _ours(path: Path) -> bool:
    return path.stat().st_uid == os.getuid()
