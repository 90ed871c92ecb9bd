"""The messages between an exporter and its readers, and the file by which readers find it.

A request is one frame of JSON. A reply is a frame of JSON, the `Batch`, and frames of records as in
the harvest log (`harvest.layout`): large ones by themselves, small ones one after the other, each
of which tells its own length.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from tlt_sglang.harvest.announce import FOLDER
from tlt_sglang.harvest.layout import Geometry
from tlt_sglang.weights import files

MAX_REQUEST_BYTES = 1 << 16
"""ZMQ hangs up on a peer that sends a longer request."""
LARGE = 1 << 16
"""Bytes from which on a record is a frame by itself, and not copied once more at either end."""
SOCKET_BYTES = 4 << 20
"""Buffer of the operating system at either end of a connection."""


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """A reader asks for the records after one."""

    log: str
    """Path of the harvest log on the exporter's machine, as its engine has announced it."""
    after: int
    """Sequence number of the last record that the reader has, 0 at first."""


class Batch(Struct, frozen=True):
    """The head of a reply."""

    log: str
    after: int
    """That of the request."""
    last: int
    """Sequence number of the last record that was read or skipped."""
    overwritten: int
    """Records among them that were overwritten before they were read."""
    torn: int
    """Records among them that were damaged."""
    ended: bool
    """True if no record follows: the log is read to its end, or is not there any more."""


class Export(Struct, frozen=True):
    """The logs that an exporter serves, as a file of the store, which is replaced at a change."""

    address: str
    """Where it listens, as readers reach it."""
    logs: dict[str, Geometry]
    """The harvest logs on its machine, by path."""

    def write(self, store: Path) -> Path:
        """Replace this exporter's file; return its path. Raises EnvironmentProblem."""
        return files.replace_owned(store, store / FOLDER, "export", encode(self))


def export_files(store: Path) -> list[Path]:
    """Return the files of a store's exports; remove those of exporters that were killed here."""
    paths = []
    for path in (store / FOLDER).glob("export@*"):
        if files.is_orphan(path):
            path.unlink(missing_ok=True)
        else:
            paths.append(path)
    return paths


def exports(store: Path) -> list[Export]:
    """Return the exports of a store, the newest last; remove the files of killed exporters.

    Those that were killed on another machine cannot be told from the others, but for their age.
    """
    served: list[tuple[float, str, Export]] = []
    for path in export_files(store):
        with contextlib.suppress(OSError):
            export = decode(path.read_bytes(), Export)
            if export is not None:
                served.append((path.stat().st_mtime, path.name, export))
    return [export for _, _, export in sorted(served, key=lambda one: one[:2])]


T = TypeVar("T", Request, Batch, Export)


def encode(message: Request | Batch | Export) -> bytes:
    """Return a message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T | None:
    """Return the message, or None if it is malformed."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
