"""Hot swap: versions of the store into the running drafter, between two decode steps.

A thread watches the store, loads and verifies the version to use, and stages it in host memory. The
main thread copies it into the weights' own storage through SGLang's loader, so that graphs, tensor
parallel shards and fused matrices stay as they are. Nothing else of the drafter is written: its
embedding and head are the target's.

The version to use is the pinned one, else the newest that nobody has rejected; so a rollback is a
rejection. After each swap a guard watches the accept length (`weights.guard`). Where it fell, the
previous weights, which are kept in memory, are copied back at once.

Runs in the scheduler process, on every tensor-parallel rank; they swap at the same step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlt_sglang.errors import TltError
from tlt_sglang.weights import files
from tlt_sglang.weights.baseline import Baseline
from tlt_sglang.weights.guard import Guard
from tlt_sglang.weights.manifest import (
    BadManifest,
    BadVersion,
    Damaged,
    Expected,
    NotFinite,
    NoVersion,
    Truncated,
    Unreadable,
)
from tlt_sglang.weights.store import Store

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Time between two looks at the store."""
MARK_SECONDS = files.OLD_SECONDS / 6
"""Time between two renewals of the marks of versions in use."""
AGREE_STEPS = 16
"""Decode steps after which ranks swap in the version that all of them have staged."""

Weights = Mapping[str, "Tensor"]

_BROKEN = (BadManifest, Damaged, NotFinite, Truncated)
"""Reasons that hold for every engine, so that the version is rejected in the store."""


@dataclass(frozen=True)
class Staged:
    """A version that is ready to be copied in."""

    version: int
    weights: Weights


class Swap:
    """The hot swap of one engine. `start` are the weights it started with, which are version 0."""

    def __init__(
        self,
        store: Store,
        expected: Expected,
        start: Weights,
        copy_in: Callable[[Weights], None],
        *,
        stage: Callable[[Weights], Weights] = lambda weights: weights,
        agree: Callable[[int], bool] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`copy_in` writes weights into the drafter; `stage` prepares them for it; `agree` takes
        this rank's number and returns whether it is that of all, where there are several ranks."""
        self.version = 0
        self.pinned: int | None = None
        self.swaps: list[tuple[int, float]] = []
        """Version and seconds of the most recent swaps."""
        self.rolled_back = 0
        self.refused: dict[int, str] = {}
        """Reasons why versions were not used."""
        self._store, self._expected = store, expected
        self._held: dict[int, Weights] = {0: start}  # the start, this version and the previous
        self._copy_in, self._stage, self._agree, self._clock = copy_in, stage, agree, clock
        self._before = 0
        self._staged: Staged | None = None
        self._unreadable = 0
        """The version that could not be read at the last look."""
        self._used, self._marked = set[int](), float("-inf")
        """Versions that are marked as used, and when they were last."""
        self._guard: Guard | None = None
        self._baseline = Baseline()
        self._steps = 0
        self._stop = threading.Event()
        self._look_now = threading.Event()
        self._thread: threading.Thread | None = None

    # -- the thread ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start watching the store."""
        self._thread = threading.Thread(target=self._watch, name="tlt-swap", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching the store."""
        self._stop.set()
        self._look_now.set()
        if self._thread is not None:
            self._thread.join()
        with _warn():
            for version in self._used:
                self._store.use(version, used=False)

    def _mark(self) -> None:
        """Mark the versions in use, and renew the marks at times; remove those of others.

        Marks that are not renewed, those of killed engines on other machines, lose their force.
        """
        staged, now = self._staged, self._clock()
        used = {self.version, self.version if staged is None else staged.version} - {0}
        for version in self._used - used:
            self._store.use(version, used=False)
        is_due = now - self._marked > MARK_SECONDS
        for version in used if is_due else used - self._used:
            with contextlib.suppress(NoVersion):  # its weights are in memory all the same
                self._store.use(version)
        self._used, self._marked = used, now if is_due else self._marked

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
                self._mark()
            except Exception:  # the engine continues with the drafter that it has
                logger.exception("The drafter store %s cannot be read", self._store.root)
            self._look_now.wait(LOOK_SECONDS)
            self._look_now.clear()

    def look(self) -> None:
        """Stage the version to use, if it is not in use already."""
        version = self.version_to_use()
        if version == self.version or version in self.refused:
            return
        if self._staged is None or self._staged.version != version:
            weights = self._load(version)
            if weights is not None:
                self._staged = Staged(version, weights)

    def version_to_use(self) -> int:
        """Return the version to use; 0 stands for the weights that the engine started with."""
        if self.pinned is not None:
            return self.pinned
        return self._store.latest(but=self.refused) or 0

    def _load(self, version: int) -> Weights | None:
        if version in self._held:
            return self._stage(self._held[version])
        try:
            self._store.use(version)
            self._used.add(version)
            return self._stage(self._store.load(version, self._expected))
        except Unreadable as error:
            if self._unreadable != version:
                logger.warning("%s", error)
            self._unreadable = version
            return None
        except BadVersion as error:
            self.refused[version] = str(error)
            logger.warning("%s", error)
            if isinstance(error, _BROKEN):
                with _warn():
                    self._store.note(version, str(error), rejected=True)
            return None

    # -- the main thread -------------------------------------------------------------------------

    @property
    def is_single_rank(self) -> bool:
        """Return whether there is only one rank, which may swap at any time."""
        return self._agree is None

    def swap_in(self) -> bool:
        """Swap in the staged version; return whether there was one.

        Every rank has to call it once a step, as they compare versions every AGREE_STEPS.
        """
        if self._agree is None:
            staged = self._staged
        else:
            self._steps += 1
            if self._steps % AGREE_STEPS:
                return False
            staged = self._staged
            # Whoever is late, or cannot read the store now, has all wait for the next time.
            if not self._agree(-1 if staged is None else staged.version):
                return False
        if staged is None or staged.version == self.version:
            return False
        self._staged = None
        self._put(staged)
        return True

    def _put(self, staged: Staged) -> None:
        started = self._clock()
        self._copy_in(staged.weights)
        seconds = self._clock() - started
        before, self.version = self.version, staged.version
        self._before = before
        first, last = self._held[0], self._held[before]
        self._held = {0: first, before: last, staged.version: staged.weights}
        self.swaps = [*self.swaps[-63:], (staged.version, seconds)]
        self._guard = Guard(self._baseline)
        logger.info("Drafter version %d is in use (%.1f ms)", staged.version, 1000 * seconds)

    def observe(self, requests: Sequence[str], accepted: Sequence[int], strategy: str) -> None:
        """Add the accepted drafts of each request in a verify step with the drafter's strategy."""
        guard = self._guard
        if guard is None:
            for request, count in zip(requests, accepted, strict=True):
                self._baseline.observe(request, 1, count, strategy)
            return
        for request, count in zip(requests, accepted, strict=True):
            guard.observe(request, 1, count, strategy)
        if guard.verdict == "keep":
            self._baseline, self._guard = guard.after, None
        elif guard.verdict == "roll back":
            self._roll_back(guard)

    def _roll_back(self, guard: Guard) -> None:
        bad, self._guard = self.version, None
        self.rolled_back += 1
        figures = guard.figures()
        logger.warning(
            "Drafter version %d accepts %.2f times as many drafts: rolled back to version %d",
            bad,
            figures["ratio"],
            self._before,
        )
        self.refused[bad] = "rolled back: it accepts fewer drafts than the version before"
        with _warn():
            self._store.note(bad, "rolled back by an engine", figures, rejected=True)
        if self.pinned == bad:
            self.pinned = None
        held = self._held.get(self._before)
        if held is not None and self._agree is None:
            baseline = self._baseline
            self._put(Staged(self._before, held))
            self._baseline, self._guard = baseline, None
        self._look_now.set()

    def target_changed(self) -> None:
        """Drop the baseline, as no drafter does as well under another target."""
        self._baseline, self._guard = Baseline(), None

    # -- by hand ---------------------------------------------------------------------------------

    def pin(self, version: int | None) -> None:
        """Use this version until another is pinned; with None, follow the newest again."""
        self.pinned = version
        if version is not None:
            self.refused.pop(version, None)
        self._look_now.set()

    def reject(self) -> None:
        """Reject the version in use for good; does nothing for version 0."""
        if self.version:
            self.refused[self.version] = "rejected by hand"
            with _warn():
                self._store.note(self.version, "rejected by hand", rejected=True)
            self.pinned = None
        self._look_now.set()

    def status(self) -> dict[str, Any]:
        """Return the part of `GET /tlt/status` on swaps."""
        return {
            "version": self.version,
            "pinned_version": self.pinned,
            "guarded": self._guard is not None,
            "rolled_back": self.rolled_back,
            "refused": {str(version): reason for version, reason in self.refused.items()},
            "swaps": [[version, round(1000 * seconds, 3)] for version, seconds in self.swaps],
        }


@contextlib.contextmanager
def _warn() -> Iterator[None]:
    """Warn of a store that cannot be written to, and continue."""
    try:
        yield
    except TltError as error:
        logger.warning("%s", error)
