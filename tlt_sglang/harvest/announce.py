"""How a sidecar finds the engines of a store: each writes a small file into STORE/engines/.

What is there is JSON, written whole or not at all, and removed when the engine ends; that of an
engine that was killed is removed by whoever reads it next. After an update of the target its
embedding and head lie beside it, which the sidecar trains against.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tlt_sglang.weights import files

FOLDER = "engines"


@dataclass(frozen=True)
class Announcement:
    """Of one engine."""

    harvest: str
    """Path of its log."""
    device: str
    """As the coordinator knows it."""
    model: str
    """Folder of the target that it began with."""
    drafter: str
    """Folder of the drafter that it began with, version 0."""
    seed: bool
    """Whether that is only a seed, which does not draft before a version is published."""
    target_version: int = 0
    """Counts the updates of the target's weights."""
    heads: str | None = None
    """File with `embedding` and `head` of that version; None: those of `model`."""

    def write(self, store: Path) -> Path:
        """Put it in place of an older one; raises EnvironmentProblem."""
        folder = store / FOLDER
        path = folder / files.owned("engine")
        with files.usable(store):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name("." + path.name)
            files.write(temporary, json.dumps(asdict(self), indent=1).encode())
            os.replace(temporary, path)
        return path


def read(store: Path) -> list[Announcement]:
    """Those of engines that are alive, in the order of their names; the others are removed."""
    found = []
    for path in sorted((store / FOLDER).glob("engine@*")):
        if files.gone(path):
            remove(store, path)
            continue
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Announcement(**json.loads(path.read_text())))
    return found


def heads_path(store: Path, version: int) -> Path:
    """Where this engine puts the heads of a version of its target."""
    return store / FOLDER / files.owned(f"heads-{version}")


def remove(store: Path, announced: Path) -> None:
    """Remove an engine's file, and its heads."""
    owner = announced.name.removeprefix("engine")
    for path in [announced, *(store / FOLDER).glob(f"heads-*{owner}")]:
        path.unlink(missing_ok=True)
