"""The end of a process together with its parent, however that ends. Linux."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when the thread that started it has ended."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
