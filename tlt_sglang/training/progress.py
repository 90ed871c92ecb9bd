"""Progress on standard error: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 30.0


def say(text: str) -> None:
    """Print one line to standard error, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)


class Bar:
    """Shows the progress of one stage of a command."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self._done = 0
        self._last_line = time.monotonic()
        self._note = ""
        console = Console(stderr=True)
        shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f} %"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            if shown
            else None
        )

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._note:
            say(f"{self.label}: {100 * self._done / max(1, self.total):.0f} %, {self._note}")

    def advance(self, count: int, note: str = "") -> None:
        """Add `count` to what is done."""
        self.at(self._done + count, note)

    def at(self, done: int, note: str = "") -> None:
        """Set what is done in all."""
        self._done, self._note = done, note or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last_line > QUIET_SECONDS:
            self._last_line = time.monotonic()
            say(f"{self.label}: {100 * done / max(1, self.total):.0f} %, {note}")
