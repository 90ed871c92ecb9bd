"""Notice a drafter whose drafts are not accepted any more after an update of the weights.

A target that has moved on by one training step costs a drafter little; a sync that has overwritten
the drafter, or released and not restored it, costs it everything, and the only sign is the speed.

Runs in the scheduler process. Pure: it counts, and says what to log.
"""

from __future__ import annotations

from collections.abc import Sequence

STEPS = 256
"""Verify steps of the drafter after which an accept length is a finding."""
LOST = 1.02
"""Accept length up to which a drafter is useless: one in fifty drafts of chance."""
USEFUL = 1.1
"""Accept length from which on a drafter was of use."""


class AcceptWatch:
    """The accept length of the learned drafter, before and since the last update."""

    def __init__(self) -> None:
        self.losses = 0
        """Updates after which no drafts were accepted."""
        self.warning: str | None = None
        self._updates = 0
        self._before: float | None = None
        self._steps = self._accepted = 0

    @property
    def accept_length(self) -> float | None:
        """Return the accept length since the last update; None before enough steps."""
        return 1 + self._accepted / self._steps if self._steps >= STEPS else None

    def updated(self) -> None:
        """Note that weights have changed; an update may come in many parts."""
        self._updates += 1
        self._before = self.accept_length or self._before
        self._steps = self._accepted = 0

    def step(self, accepted: Sequence[int]) -> str | None:
        """Count verify steps of the drafter, by the drafts `accepted` in each.

        Returns a sentence to log once if an update has cost the drafter its drafts.
        """
        is_counting = self.accept_length is None
        self._steps += len(accepted)
        self._accepted += sum(accepted)
        length = self.accept_length
        if not is_counting or length is None or not self._updates:
            return None
        was_useful = self._before is None or self._before >= USEFUL
        if length > LOST or not was_useful:
            self.warning = None
            return None
        before = "" if self._before is None else f"; before it was {self._before:.2f}"
        self.losses += 1
        self.warning = (
            f"The accept length is {length:.2f} over {self._steps} verify steps since the weights "
            f"were updated{before}. Check that the update did not reach the drafter (selector), "
            "and that its weights were restored after a release."
        )
        return self.warning

    def status(self) -> dict[str, object]:
        """Return this part of `GET /tlt/status`."""
        before, length = self._before, self.accept_length
        return {
            "accept_length_before": None if before is None else round(before, 4),
            "accept_length_since": None if length is None else round(length, 4),
            "warning": self.warning,
        }
