"""A wall clock that a test can set, for every Python process of a server.

`sitecustomize` is what Python imports first; the folder that it lies in goes into PYTHONPATH.
"""

from __future__ import annotations

import os
from pathlib import Path

_SITE = """
import time

_true, _true_ns = time.time, time.time_ns

def _offset():
    try:
        with open({file!r}) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0

time.time = lambda: _true() + _offset()
time.time_ns = lambda: _true_ns() + _offset() * 10**9
"""


class Clock:
    """Its `environment` is to be given to the processes that shall follow it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "seconds"
        (folder / "sitecustomize.py").write_text(_SITE.format(file=str(self._file)))
        before = os.environ.get("PYTHONPATH")
        self.environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), before)))}

    def set(self, seconds: int) -> None:
        """So many seconds off the true time, from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self._file)
