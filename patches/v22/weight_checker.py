"""sglang.srt.utils.weight_checker, in the scheduler process: checksums of weights on CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tlt_sglang.patching.patch import Patch


class _TorchOfCpu:
    """The module torch, without a device to wait for."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.cuda = SimpleNamespace(synchronize=lambda: None)

    def __getattr__(self, name: str) -> object:
        return getattr(self._torch, name)


PATCHES = (
    Patch(
        "sglang.srt.utils.weight_checker:torch",
        make=_TorchOfCpu,
        why="upstream waits for a CUDA device before it computes checksums, also on CPU",
        remove_when="this version of SGLang is not supported any more",
        process="scheduler",
        only_on="cpu",
        kind="replace",
    ),
)
