"""Imported by the fork server alone and first of all, for its effects.

SIGQUIT goes on to the main process: SGLang's engine processes report a crash by SIGQUIT to their
parent. Forked, their parent is the fork server, whose own parent is the process that has to know.
And no garbage is looked for while the rest is imported, see `prefork_ready`.
"""

from __future__ import annotations

import gc
import os
import signal
from types import FrameType

_main = os.getppid()


def _forward(number: int, frame: FrameType | None) -> None:
    if os.getppid() == _main:
        os.kill(_main, number)


signal.signal(signal.SIGQUIT, _forward)
gc.disable()
