"""Announcements of engines: each writes a small file into STORE/engines/, where sidecars find it.

The file is JSON, written whole or not at all, and removed when the engine ends; the next reader
removes the file of a killed engine. After an update of the target, its embedding and head lie
beside it for the sidecar to train against.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path

from tlt_sglang.weights import files

FOLDER = "engines"


@dataclass(frozen=True)
class Announcement:
    """The announcement of one engine."""

    harvest: str
    """Path of its harvest log."""
    device: str
    """Name of its device at the coordinator."""
    model: str
    """Folder of the target that it started with."""
    drafter: str
    """Folder of the drafter that it started with, version 0."""
    seed: bool
    """True if that is an untrained seed, which does not draft until a version is published."""
    target_version: int = 0
    """Number of updates of the target's weights."""
    depth: int = 3
    """Draft steps of its deepest strategy with that drafter."""
    embed_and_head: str | None = None
    """File with `embedding` and `head` of that version; None where `model` has them."""

    def write(self, store: Path) -> Path:
        """Replace this engine's announcement; return its path. Raises EnvironmentProblem."""
        data = json.dumps(asdict(self), indent=1).encode()
        return files.replace_owned(store, store / FOLDER, "engine", data)


def read(store: Path) -> list[Announcement]:
    """Return the announcements of running engines, by file name; remove those of killed ones."""
    return list(read_files(store).values())


def read_files(store: Path, but: Container[Path] = ()) -> dict[Path, Announcement]:
    """Return the same by file, without the files in `but`."""
    announcements = {}
    for path in sorted((store / FOLDER).glob("engine@*")):
        if path in but:
            continue
        if files.is_orphan(path):
            remove(store, path)
            continue
        with contextlib.suppress(OSError, ValueError, TypeError):
            announcements[path] = Announcement(**json.loads(path.read_text()))
    return announcements


def embed_and_head_path(store: Path, version: int) -> Path:
    """Return the path for the embedding and head of a version of this engine's target."""
    return store / FOLDER / files.owned(f"embed-and-head-{version}")


def remove(store: Path, announcement: Path) -> None:
    """Remove an engine's announcement, and the embedding and head beside it."""
    owner = announcement.name.removeprefix("engine")
    for path in [announcement, *(store / FOLDER).glob(f"embed-and-head-*{owner}")]:
        path.unlink(missing_ok=True)
