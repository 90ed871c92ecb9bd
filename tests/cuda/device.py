"""A simulated CUDA device: its tensors lie in host memory and say that they are on `cuda:0`.

This module holds its state, and marks the storages that are the device's.
`calls` sees every call of torch's Python functions: it makes tensors on the device, moves them, and
answers where they are. `operations` sees what these calls dispatch: results of device tensors are
device tensors, graphs record them (`graphs`), and whatever makes the host wait for a GPU is noted
with its place.

Everything runs at once and in order: races between streams stay unseen. Knows nothing of SGLang.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

CUDA = torch.device("cuda", 0)
HERE = str(Path(__file__).parent)
ROOTS = sysconfig.get_path("purelib"), str(Path(__file__).parents[2])
OURS = [f"{HERE}/{name}.py" for name in ("device", "calls", "operations", "graphs")]
HIDDEN = (*OURS, "/torch/", "/contextlib.py")
"""Code that is not the place of a wait, but below or above it."""

Function = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Wait(NamedTuple):
    """Something that makes the host wait for a GPU, or copies through pageable memory."""

    what: str
    file: str
    line: int


class Recorder(Protocol):
    """A graph that records operations while it is captured."""

    def record(self, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None: ...


class Device(threading.local):
    """The state of the simulated device, `DEVICE`; of what is under way each thread has its own."""

    waits: ClassVar[list[Wait]] = []
    launches: ClassVar[Counter[str] | None] = None
    """Operations that were launched outside graphs, by file, while they are counted."""

    def __init__(self) -> None:
        self.capturing: Recorder | None = None
        self.busy = False
        """A kernel or a replay is running: what it calls is not looked at."""
        self.making = False
        """A tensor is being made on the device."""
        self.moving = False
        """A tensor is being moved on or off the device."""

    def wait(self, what: str) -> None:
        """Note a wait, with the innermost place outside torch and this simulation."""
        if self.capturing is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.waits.append(Wait(what, *_place()))

    def launch(self) -> None:
        """Count an operation, if operations are counted and this one goes into no graph."""
        if self.launches is not None and self.capturing is None:
            self.launches[_place()[0]] += 1


def _place() -> tuple[str, int]:
    """Return file and line of the innermost frame outside torch and this simulation."""
    frame = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in HIDDEN):
        frame = frame.f_back
    file = frame.f_code.co_filename
    for root in ROOTS:
        file = file.removeprefix(root + "/")
    return file, frame.f_lineno


DEVICE = Device()


def on_device(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is on the simulated device."""
    return getattr(tensor.untyped_storage(), "on_device", False)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is in what stands for page-locked memory."""
    return getattr(tensor.untyped_storage(), "pinned", False)


def put(tensor: torch.Tensor) -> torch.Tensor:
    """Make `tensor` one of the device."""
    tensor.untyped_storage().on_device = True  # type: ignore[attr-defined]
    return tensor


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Make `tensor` one in page-locked memory."""
    tensor.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return tensor


def tensors(values: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)
