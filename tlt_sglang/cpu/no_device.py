"""The module torch for code of SGLang that waits for a CUDA device, or empties its cache, on CPU.

Runs in the scheduler process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class TorchOfCpu:
    """The module torch, without a device to wait for."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.cuda = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)

    def __getattr__(self, name: str) -> object:
        return getattr(self._torch, name)
