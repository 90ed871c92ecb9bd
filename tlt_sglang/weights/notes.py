"""Notes of engines on a version: `notes.json` beside its manifest, newest last."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlt_sglang.weights import files
from tlt_sglang.weights.manifest import BadManifest, BadVersion, NoVersion

NOTES = "notes.json"


def add(folder: Path, version: int, text: str, figures: Mapping[str, Any], rejected: bool) -> None:
    """Add a note; several engines may do so at once.

    Raises OSError, NoVersion, or BadManifest.
    """
    new = {"text": text, "figures": dict(figures), "rejected": rejected}
    try:
        lock = (folder / ".lock").open("w")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoVersion(version, f"{folder} does not exist") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or the process ends
        temporary = folder / f".{NOTES}"
        try:
            files.write(temporary, json.dumps([*read(folder, version), new], indent=1).encode())
            temporary.replace(folder / NOTES)
        finally:
            temporary.unlink(missing_ok=True)
        files.sync(folder)


def read(folder: Path, version: int) -> list[dict[str, Any]]:
    """Return the notes in the order in which they were added. Raises BadManifest."""
    try:
        notes = json.loads((folder / NOTES).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise BadManifest(version, "its notes cannot be read") from error
    if not isinstance(notes, list) or not all(isinstance(note, dict) for note in notes):
        raise BadManifest(version, "its notes are not a list of notes")
    return notes


def rejected(folder: Path, version: int) -> bool:
    """Return whether a note rejects the version, or the notes cannot be read."""
    try:
        return any(note.get("rejected") for note in read(folder, version))
    except BadVersion:
        return True
