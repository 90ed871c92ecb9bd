"""Weights of versions on a machine's own disk, by their SHA-256: read from a shared store once.

Where a thousand engines share a store, each would read every version over the network. With a
cache, the first engine of a machine does so, verifies the weights and keeps them; its neighbours
wait for it and read them from its disk. Independent of SGLang and torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from pathlib import Path

from tlt_sglang.weights import files

KEEP = 3
"""Weights that are kept, those that were used last."""
_SUFFIX = ".safetensors"

logger = logging.getLogger(__name__)


class NodeCache:
    """The weights in `folder`, for all processes of this user on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, sha256: str, origin: Path) -> bytes:
        """Return the weights with this SHA-256, those of the file `origin` where it has others.

        Another process that reads the same weights from `origin` is waited for. Where the folder
        cannot be used they are read from `origin`, with a warning. Raises OSError if that fails.
        """
        try:
            # The coordinator's socket lies in the parent, too, and that has to be private.
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.make_private(self.folder)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            return self._from_origin(origin, error)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel opens it when its holder is killed
            except OSError as error:
                return self._from_origin(origin, error)
            path = self.folder / f"{sha256}{_SUFFIX}"
            if (cached := self._cached(path, sha256)) is not None:
                return cached
            data = origin.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                self._keep(path, data)
            return data
        finally:
            os.close(lock)

    def _cached(self, path: Path, sha256: str) -> bytes | None:
        """Return the weights of a file, None if it is missing or damaged."""
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == sha256 else None

    def _keep(self, path: Path, data: bytes) -> None:
        """Store weights, and remove those that have not been used for longest."""
        unfinished = path.with_suffix(".unfinished")
        try:
            files.write(unfinished, data)
            unfinished.replace(path)
            kept = sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda one: one.stat().st_mtime)
            for old in kept[:-KEEP]:
                old.unlink(missing_ok=True)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            logger.warning("Weights are not kept in %s (%s)", self.folder, error.strerror)

    def _from_origin(self, origin: Path, error: OSError) -> bytes:
        logger.warning(
            "%s cannot be used (%s); weights are read from the store", self.folder, error
        )
        return origin.read_bytes()
