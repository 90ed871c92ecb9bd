"""Two sidecars of one store: the one whose engine is idle trains, from where the other one stopped;
where both are idle, one of them helps the other."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import SHAPE, make_drafter, make_target
from tlt_sglang.coordinator.client import Client
from tlt_sglang.coordinator.server import Server
from tlt_sglang.coordinator.world import Rules
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.harvest.record import END, PROMPT, Record, request_key
from tlt_sglang.harvest.writer import Writer
from tlt_sglang.launcher.child_process import wait_for

VOCAB = 24
WIDTH = 4 * int(SHAPE["hidden_size"])
SECONDS = 60.0


class Engines:
    """Two engines, as far as a coordinator can tell, of which `busy` has work."""

    def __init__(self, endpoint: str) -> None:
        self.busy = 1
        self._over = threading.Event()
        self._endpoint = endpoint
        self._thread = threading.Thread(target=self._report)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _report(self) -> None:
        members = [Client(self._endpoint, f"engine-{n}", "engine", f"device-{n}") for n in (0, 1)]
        while not self._over.wait(0.02):
            for number, member in enumerate(members):
                member.report(2 if number == self.busy else 0, 0, 1.0)
                member.poll()
        for member in members:
            member.close()


class Sidecar:
    """A `tlt sidecar` on the device of one engine."""

    def __init__(self, store: Path, endpoint: str, number: int, folder: Path) -> None:
        self._log = folder / f"sidecar-{number}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tlt_sglang.cli", "sidecar"),
                    *("--tlt-store", str(store), "--tlt-coordinator", endpoint),
                    *("--tlt-device-name", f"device-{number}"),
                ],
                stderr=log,
            )

    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="tlt-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def store(folder: Path) -> Iterator[Path]:
    """A store with an engine's announcement, and a log that always has something new."""
    target = make_target(folder / "target", "llama", VOCAB)
    drafter = make_drafter(folder / "drafter", target, "eagle3")
    writer = Writer.create(1 << 24, WIDTH, "bfloat16")
    over = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(0)
        for number in itertools.count():
            features = torch.randn((32, WIDTH)).bfloat16().view(torch.int16).numpy()
            tokens = rng.integers(3, VOCAB, 32, np.int32)
            key = request_key(f"r{number}")
            writer.write(Record(key, 0, tokens[:8], features[:8].view(np.uint16), 0, PROMPT))
            writer.write(Record(key, 8, tokens[8:], features[8:].view(np.uint16), 0, END))
            if over.wait(0.02):
                return

    thread = threading.Thread(target=write)
    thread.start()
    announced = Announcement(str(writer.path), "device-0", str(target), str(drafter), False)
    try:
        (folder / "store").mkdir(mode=0o700)
        announced.write(folder / "store")
        yield folder / "store"
    finally:
        over.set()
        thread.join()
        writer.close()


@contextlib.contextmanager
def coordinating(endpoint: str) -> Iterator[Engines]:
    stop = threading.Event()
    server = Server(endpoint, Rules(dwell=0.1))
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    engines = Engines(endpoint)
    try:
        yield engines
    finally:
        engines.close()
        stop.set()
        thread.join()


def status(store: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        written: dict[str, Any] = json.loads((store / "sidecar.json").read_text())
        return written
    return {"pid": 0, "step": 0, "training": False}


def test_training_moves_to_the_device_that_is_idle(folder: Path, store: Path) -> None:
    endpoint = f"ipc://{folder}/coordinator"
    with coordinating(endpoint) as engines:
        sidecars = [Sidecar(store, endpoint, number, folder) for number in (0, 1)]
        try:
            step = 0
            for turn in range(4):
                idle = turn % 2
                engines.busy = 1 - idle
                pid = sidecars[idle].process.pid

                def goes_on(pid: int = pid, step: int = step) -> bool:
                    now = status(store)
                    return bool(now["pid"] == pid and now["training"] and now["step"] > step + 5)

                assert wait_for(goes_on, SECONDS), [one.log() for one in sidecars]
                step = status(store)["step"]
            assert sum(one.log().count("continuing from step") for one in sidecars) >= 3

            # The other one is killed while it trains, and this one goes on from its checkpoint.
            sidecars[1].process.kill()
            sidecars[1].process.wait()
            engines.busy = 1
            pid = sidecars[0].process.pid
            assert wait_for(
                lambda: status(store)["pid"] == pid and status(store)["training"], SECONDS
            ), sidecars[0].log()
            time.sleep(0.5)
        finally:
            for one in sidecars:
                one.end()
    assert "Traceback" not in "".join(one.log() for one in sidecars)


def test_both_train_where_both_devices_are_idle(folder: Path, store: Path) -> None:
    """Killed are first the helper and then the holder: the one that is left goes on alone."""
    endpoint = f"ipc://{folder}/coordinator"
    running: dict[int, Sidecar] = {}

    def start(number: int) -> None:
        one = Sidecar(store, endpoint, number, folder)
        running[one.process.pid] = one

    def kill(pid: int) -> None:
        sidecar = running.pop(pid)
        sidecar.process.kill()
        sidecar.process.wait()

    def until(helpers: int, holder: int | None = None) -> dict[str, Any]:
        """Wait for a holder with so many helpers, and return its status."""

        def is_so() -> bool:
            now = status(store)
            right = now["pid"] in running if holder is None else now["pid"] == holder
            return bool(right and now["training"] and now["helpers"] == helpers)

        assert wait_for(is_so, SECONDS), [one.log() for one in running.values()]
        return status(store)

    with coordinating(endpoint) as engines:
        engines.busy = -1
        try:
            start(0)
            until(helpers=0)
            start(1)
            before = until(helpers=1)
            (helper,) = running.keys() - {before["pid"]}
            kill(helper)
            after = until(helpers=0, holder=before["pid"])
            assert after["step"] > before["step"]
            start(1)
            holder = until(helpers=1)["pid"]
            kill(holder)
            (left,) = running
            until(helpers=0, holder=left)
        finally:
            for one in running.values():
                one.end()
        assert "Traceback" not in "".join(one.log() for one in running.values())
    assert [path.name for path in (store / "work" / "group").iterdir()] == ["round"]
