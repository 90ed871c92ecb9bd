"""Processes that publish and are killed, for the test of the store; no torch, so they start fast.

Each line on stdin starts one, kills it and is answered with its wait status: `step N` kills it at
its N-th step (0 where it gets to the end), `after S` lets it publish once, and go on for S seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

from tlt_sglang.weights import tensors
from tlt_sglang.weights.manifest import Base, Spec
from tlt_sglang.weights.store import Store

BASE = Base(8, 100, 50, 3)
SPECS = {"fc.weight": Spec("F32", (128, 128))}


def _safetensors() -> bytes:
    size = 4 * 128 * 128
    fields = {"fc.weight": {"dtype": "F32", "shape": [128, 128], "data_offsets": [0, size]}}
    header = json.dumps(fields).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def _die_at(step: int) -> None:
    """Steps are what Python audits: files and folders opened, made, renamed, removed."""
    count = itertools.count()

    def hook(event: str, _: object) -> None:
        if event.startswith(("open", "os.", "shutil.", "tempfile.")) and next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _publisher(store: Store, step: int | None) -> int:
    if pid := os.fork():
        return pid
    if step is not None:
        _die_at(step)
    while True:
        store.publish({}, "eagle3", BASE)
        if step is not None:
            os._exit(0)


def main() -> None:
    store = Store(Path(sys.argv[1]), keep=2)
    data = _safetensors()
    setattr(tensors, "to_bytes", lambda _: data)  # noqa: B010
    setattr(tensors, "specs", lambda _: SPECS)  # noqa: B010
    for line in sys.stdin:
        how, number = line.split()
        before = store.latest()
        pid = _publisher(store, int(number) if how == "step" else None)
        if how == "after":
            while store.latest() == before:
                time.sleep(0.001)
            time.sleep(float(number))
            os.kill(pid, signal.SIGKILL)
        print(os.waitpid(pid, 0)[1], flush=True)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
