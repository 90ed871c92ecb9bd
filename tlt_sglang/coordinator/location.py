"""Where a coordinator is, also one that may move: `file:///PATH` names a file with its address.

A fleet keeps that file in its store, so that the coordinator can be started again on another node.
"""

from __future__ import annotations

import threading
from pathlib import Path

from tlt_sglang.coordinator import endpoints
from tlt_sglang.errors import ConfigError

SCHEME = "file://"


class Location:
    """The address of a coordinator. Raises ConfigError for a file's that is not valid."""

    def __init__(self, endpoint: str) -> None:
        self.address: str | None = None
        """The address, None as long as its file has none."""
        self._path: Path | None = None
        self._reader: threading.Thread | None = None
        if not endpoint.startswith(SCHEME):
            self.address = endpoint
            return
        self._path = Path(endpoint.removeprefix(SCHEME))
        if not self._path.is_absolute():
            raise ConfigError(f"The address {endpoint!r} is not valid; write file:///PATH.")
        self._read(self._path)

    def look(self) -> None:
        """Have the file read again. A thread does it: the file may be on a network that hangs."""
        if self._path is None or (self._reader is not None and self._reader.is_alive()):
            return
        self._reader = threading.Thread(target=self._read, args=(self._path,), daemon=True)
        self._reader.start()

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text().strip()
            endpoints.check_endpoint(text)
        except (OSError, ValueError, ConfigError):
            return  # nobody has written it yet
        self.address = text
