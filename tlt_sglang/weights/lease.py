"""The lease of a store: of several processes that could train its drafter, one does.

    STORE/lease/000007/holder@PID@HOST    rewritten by its holder, which shows that it lives
    STORE/lease/000007/released           the holder has given it up
    STORE/lease/waiting@PID@HOST          somebody would like to have it

Each taking has a number of its own, its epoch. A holder that was held up so long that somebody else
has taken over finds a higher epoch, and what it publishes all the same is not used: versions carry
their epoch, see `Store.latest`. Nobody compares clocks: who waits counts, by its own one, how long
the holder's file has not changed. Works on shared folders, as it needs no locks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tlt_sglang.weights import files

FOLDER = "lease"
LEASE_SECONDS = 15.0
"""Silence after which a holder is taken for dead."""
RENEW_SECONDS = 1.0
"""Time between two signs of life, and between two looks at another's."""
_EPOCH = re.compile(r"\d{6,}")
_HOLDER, _RELEASED, _WAITING = "holder", "released", "waiting"


class Lease:
    """One process's view of the lease of the store `root`; `hold` asks for it and keeps it."""

    def __init__(
        self,
        root: Path,
        *,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epoch: int | None = None
        """The epoch that this process holds, None without one."""
        self._root, self._folder = root, root / FOLDER
        self._seconds, self._clock = seconds, clock
        self.is_wanted = False
        """True if somebody else waits for it, as seen by the last look of its holder."""
        self._waits = False
        """True while this process's file says that it waits."""
        self._last, self._beats = float("-inf"), 0
        self._seen: tuple[int, bytes] = (0, b"")
        self._since = clock()
        self._renewed: dict[str, tuple[int, float]] = {}
        """When each mark of a process that waits had changed, and when that was seen."""

    def hold(self, *, now: bool = False) -> bool:
        """Return whether this process has the lease; takes it where it is free.

        Looks at most once in RENEW_SECONDS, or `now`. Raises EnvironmentProblem.
        """
        if not now and self._clock() - self._last < RENEW_SECONDS:
            return self.epoch is not None
        self._last = self._clock()
        with files.usable(self._root):
            newest = self._newest()
            if self.epoch is not None and newest != self.epoch:
                self.epoch = None  # somebody else has taken over
            if self.epoch is not None:
                self._show_life()
                self.is_wanted = self._is_waited_for()
            elif self._is_free(newest):
                self._take(newest + 1)
            else:
                self._waits = True
                (self._folder / files.owned(_WAITING)).touch()
        return self.epoch is not None

    def release(self) -> None:
        """Give the lease up, or stop waiting for it; does nothing where the store is gone."""
        if self.epoch is None and not self._waits:
            return
        epoch, self.epoch, self.is_wanted = self.epoch, None, False
        self._last, self._waits = float("-inf"), False
        with contextlib.suppress(OSError):
            (self._folder / files.owned(_WAITING)).unlink(missing_ok=True)
            if epoch is not None:
                (self._path(epoch) / _RELEASED).touch()
                (self._path(epoch) / files.owned(_HOLDER)).unlink(missing_ok=True)

    def _is_waited_for(self) -> bool:
        """Return whether another process waits; one that waits renews its mark all the time."""
        for path in self._folder.glob(f"{_WAITING}@*"):
            if files.is_orphan(path) or files.is_old(path):
                path.unlink(missing_ok=True)
            elif path.name != files.owned(_WAITING) and self._is_renewed(path):
                return True
        return False

    def _is_renewed(self, mark: Path) -> bool:
        """Return whether a mark has changed within the time of a lease, by this process's clock."""
        try:
            changed = mark.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        before, since = self._renewed.get(mark.name, (None, 0.0))
        if changed != before:
            since = self._clock()
            self._renewed[mark.name] = changed, since
        return self._clock() - since <= self._seconds

    def _take(self, epoch: int) -> None:
        try:
            self._path(epoch).mkdir(mode=0o700)
        except FileExistsError:
            return  # somebody was faster
        self.epoch, self._waits = epoch, False
        self._show_life()
        (self._folder / files.owned(_WAITING)).unlink(missing_ok=True)
        for old in self._epochs():
            if old < epoch:
                shutil.rmtree(self._path(old), ignore_errors=True)

    def _show_life(self) -> None:
        assert self.epoch is not None
        self._beats += 1
        folder = self._path(self.epoch)
        temporary = folder / ".holder"
        try:
            temporary.write_text(f"{self._beats}\n")
            os.replace(temporary, folder / files.owned(_HOLDER))
        except FileNotFoundError:
            self.epoch = None  # somebody else has just taken over

    def _is_free(self, epoch: int) -> bool:
        """Return whether nobody holds `epoch`: released, its holder killed, or silent too long."""
        folder = self._path(epoch)
        if epoch == 0 or (folder / _RELEASED).exists():
            return True
        holder = next(folder.glob(f"{_HOLDER}@*"), None)
        if holder is not None and files.is_orphan(holder):
            return True
        sign = b""
        with contextlib.suppress(OSError):
            sign = b"" if holder is None else holder.read_bytes()
        if (epoch, sign) != self._seen:
            self._seen, self._since = (epoch, sign), self._clock()
        return self._clock() - self._since > self._seconds

    def _newest(self) -> int:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return max(self._epochs(), default=0)

    def _epochs(self) -> list[int]:
        return [int(name) for name in os.listdir(self._folder) if _EPOCH.fullmatch(name)]

    def _path(self, epoch: int) -> Path:
        return self._folder / f"{epoch:06d}"
