"""A directory of published drafter versions, `v000042/` each, that appear whole or not at all.

    weights.safetensors     the trained weights
    manifest.json           their description, checksum and gate (see `manifest`)
    notes.json              notes of engines (see `notes`)
    pinned, used@PID@HOST   marks that keep the version, however old

Of several sidecars of a store one holds its `lease` and publishes.

The sidecar publishes; engines load and note. A version is written into a temporary folder, synced
and renamed; it takes the number after the newest, and the next one where another publisher was
faster. A killed process leaves at most a temporary folder, which the next publisher removes. Only
the owner can read the files. Independent of SGLang; imports torch only to publish and load.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang.weights import files, notes, tensors
from tlt_sglang.weights.manifest import (
    BadVersion,
    Base,
    Expected,
    Manifest,
    NoManifest,
    NoVersion,
    Truncated,
    Unreadable,
)
from tlt_sglang.weights.node_cache import NodeCache

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 5
WEIGHTS, MANIFEST, PINNED, USED = "weights.safetensors", "manifest.json", "pinned", "used"
_VERSION = re.compile(r"v(\d{6,})")
_TEMPORARY = ".tmp-"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class Store:
    """The versions in `root`; publishing removes all but the newest `keep` of them.

    With a `cache`, a folder of this machine, its engines read the weights of a version once.
    """

    def __init__(self, root: Path, keep: int = KEEP, cache: Path | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.root, self.keep = root, keep
        self._cache = None if cache is None else NodeCache(cache)
        self._epochs: dict[int, int] = {}
        """The epoch of each version that was looked at."""

    # -- the sidecar ---------------------------------------------------------------------------

    def publish(
        self,
        weights: Mapping[str, Tensor],
        architecture: str,
        base: Base,
        *,
        parent: int | None = None,
        gate: Mapping[str, Any] | None = None,
        made_by: str = "",
        epoch: int = 0,
    ) -> int:
        """Publish a version and return its number. Raises EnvironmentProblem without publishing.

        `epoch` is that of the publisher's lease, 0 without one.
        """
        data = tensors.to_bytes(weights)
        manifest = Manifest(
            0,
            hashlib.sha256(data).hexdigest(),
            len(data),
            architecture,
            base,
            tensors.specs(weights),
            parent,
            gate or {},
            made_by,
            epoch,
        )
        with files.usable(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clean()
            temporary = Path(tempfile.mkdtemp(files.owned(""), _TEMPORARY, self.root))
            try:
                files.write(temporary / WEIGHTS, data)
                version = self._put(temporary, manifest)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        self._prune()
        return version

    def _put(self, temporary: Path, manifest: Manifest) -> int:
        version = max(self.versions(), default=0) + 1
        while True:
            numbered = replace(manifest, version=version)
            files.write(temporary / MANIFEST, numbered.to_json().encode())
            files.sync(temporary)
            try:
                temporary.rename(self.path(version))
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                version += 1
        files.sync(self.root)
        return version

    def _prune(self) -> None:
        """Remove old versions; one that cannot be removed now is left to the next publisher."""
        for version in self.versions()[: -self.keep]:
            path = self.path(version)
            if (path / PINNED).exists() or any(map(_is_used, path.glob(f"{USED}@*"))):
                continue
            # Renamed first, so that a reader sees all of a version or none of it.
            grave = self.root / files.owned(f"{_TEMPORARY}{path.name}")
            with contextlib.suppress(OSError):
                path.rename(grave)
                shutil.rmtree(grave)

    def _clean(self) -> None:
        """Remove the temporary folders of killed publishers."""
        for path in self.root.glob(f"{_TEMPORARY}*"):
            if files.is_orphan(path) or files.is_old(path):
                shutil.rmtree(path, ignore_errors=True)

    # -- the engine ----------------------------------------------------------------------------

    def versions(self) -> list[int]:
        """Return all versions, the newest last."""
        with files.usable(self.root):
            try:
                names = os.listdir(self.root)
            except FileNotFoundError:
                return []
        return sorted(int(match[1]) for name in names if (match := _VERSION.fullmatch(name)))

    def latest(self, but: Container[int] = ()) -> int | None:
        """Return the newest version that nobody has rejected and that is not in `but`.

        What a publisher whose lease had passed to another one has published is left out.
        """
        versions = self.versions()
        self._epochs = {
            v: self._epochs[v] if v in self._epochs else self._epoch(v) for v in versions
        }
        highest = list(itertools.accumulate((self._epochs[v] for v in versions), max))
        newest = (
            v
            for v, epoch in zip(reversed(versions), reversed(highest), strict=True)
            if v not in but and self._epochs[v] in (0, epoch) and not self.rejected(v)
        )
        return next(newest, None)

    def _epoch(self, version: int) -> int:
        try:
            return self.manifest(version).epoch
        except BadVersion:
            return 0

    def manifest(self, version: int) -> Manifest:
        """Return the manifest of a version. Raises a BadVersion."""
        try:
            text = (self.path(version) / MANIFEST).read_bytes()
        except OSError as error:
            if not self.path(version).is_dir():
                raise NoVersion(version, f"{self.path(version)} does not exist") from error
            raise NoManifest(version, "it has no manifest that can be read") from error
        return Manifest.from_json(version, text)

    def load(self, version: int, expected: Expected) -> dict[str, Tensor]:
        """Return the weights in the dtypes of `expected`, on the CPU. Raises a BadVersion.

        They are verified: the very bytes that were published, consistent with the manifest, for
        this target, with the expected names and shapes; and all values are finite.
        """
        manifest = self.manifest(version)
        try:
            data = self._read(self.path(version) / WEIGHTS, manifest.sha256)
        except FileNotFoundError as error:
            raise Truncated(version, f"its weights cannot be read ({error.strerror})") from error
        except OSError as error:
            why, remedy = f"its weights cannot be read ({error.strerror})", "it is tried again"
            raise Unreadable(version, why, remedy) from error
        return tensors.from_bytes(data, manifest, expected)

    def _read(self, path: Path, sha256: str) -> bytes:
        return path.read_bytes() if self._cache is None else self._cache.read(sha256, path)

    def note(
        self,
        version: int,
        text: str,
        figures: Mapping[str, Any] | None = None,
        *,
        rejected: bool = False,
    ) -> None:
        """Add a note to a version; with `rejected` it is not used again.

        Raises EnvironmentProblem, or a BadVersion where it is missing or its notes are damaged.
        """
        with files.usable(self.root):
            notes.add(self.path(version), version, text, figures or {}, rejected)

    def notes(self, version: int) -> list[dict[str, Any]]:
        """Return `text`, `figures` and `rejected` of each note, in order. Raises BadManifest."""
        return notes.read(self.path(version), version)

    def rejected(self, version: int) -> bool:
        """Return whether a note rejects the version, or its notes cannot be read."""
        return notes.rejected(self.path(version), version)

    # -- what is kept --------------------------------------------------------------------------

    def pin(self, version: int, pinned: bool = True) -> None:
        """Keep `version` until it is unpinned. Raises NoVersion."""
        self._mark(version, PINNED, pinned)

    def use(self, version: int, used: bool = True) -> None:
        """Keep `version` until `used` is False, or this process has ended. Raises NoVersion.

        The mark has to be renewed before it is `files.OLD_SECONDS` old: other machines cannot see
        whether the process lives.
        """
        self._mark(version, files.owned(USED), used)

    def _mark(self, version: int, name: str, present: bool) -> None:
        mark = self.path(version) / name
        with files.usable(self.root):
            if not present:
                mark.unlink(missing_ok=True)
                return
            try:
                mark.touch()
            except FileNotFoundError as error:
                raise NoVersion(version, f"{mark.parent} does not exist") from error

    def path(self, version: int) -> Path:
        """Return the folder of a version."""
        return self.root / f"v{version:06d}"


def _is_used(mark: Path) -> bool:
    """Return whether a process that has marked a version lives; on other machines it renews it."""
    return not (files.is_orphan(mark) or files.is_old(mark))
