"""What the launcher runs beside its server: the sidecar, and the coordinator of this one engine.

The sidecar is a process of its own, started again if it dies, a little later each time; the engine
never waits for it. The coordinator is a thread. Both end with the launcher, however that ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tlt_sglang.config import command_line as commands
from tlt_sglang.config.config import Config
from tlt_sglang.errors import ConfigError
from tlt_sglang.weights import files

logger = logging.getLogger(__name__)

When = Literal["idle", "always"]
AGAIN_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Before the sidecar is started again; the last one for ever."""
END_SECONDS = 10.0


@dataclass(frozen=True)
class Sidecar:
    """What the launcher was asked for."""

    when: When
    endpoint: str | None
    """Of the coordinator to run; None: another one is used, or none is needed."""
    preempt_ms: int
    memory_gb: float
    threads: int
    cores: str
    tensorboard: bool

    def joined(self, config: Config) -> Config:
        """`config` that reports to the coordinator that is run here."""
        if self.endpoint is None:
            return config
        return dataclasses.replace(config, coordinator=self.endpoint)

    def command(self, config: Config) -> list[str]:
        """Of the sidecar's process."""
        assert config.store is not None
        words = [
            sys.executable,
            "-m",
            "tlt_sglang.cli",
            "sidecar",
            "--store",
            config.store,
            "--tlt-sidecar-memory-gb",
            f"{self.memory_gb:g}",
            "--threads",
            str(self.threads),
            "--cores",
            self.cores,
            "--parent",
            str(os.getpid()),
            "--tlt-preempt-ms",
            str(self.preempt_ms),
        ]
        if self.tensorboard:
            words.append("--tensorboard")
        if self.when == "idle" and config.coordinator is not None:
            words += ["--tlt-coordinator", config.coordinator]
            if config.coordinator_key is not None:
                words += ["--tlt-coordinator-key", config.coordinator_key]
            if config.device_name is not None:
                words += ["--tlt-device-name", config.device_name]
        return words


def add_flags(group: Any) -> None:
    """Those of the launcher alone."""
    add = group.add_argument
    add(
        "--tlt-sidecar",
        choices=get_args(When),
        help="train the drafter beside the server: while it is idle, or always",
    )
    add(
        "--tlt-preempt-ms",
        type=commands.count,
        metavar="MS",
        help="within which an idle sidecar leaves the device when work comes (default: 500)",
    )
    add(
        "--tlt-sidecar-memory-gb",
        type=float,
        metavar="GB",
        help="of what it trains on (default: 2)",
    )
    add(
        "--tlt-sidecar-threads",
        type=commands.count,
        metavar="N",
        help="of a sidecar on CPU (default: 1)",
    )
    add(
        "--tlt-sidecar-tensorboard",
        action="store_const",
        const=True,
        help="it writes TensorBoard scalars to STORE/tensorboard",
    )
    add("--tlt-sidecar-cores", metavar="N[,N]", help="of a sidecar on CPU (default: any)")


def options(given: argparse.Namespace, config: Config | None) -> Sidecar | None:
    """What the flags ask for. Raises ConfigError where they cannot be together."""
    names = (
        "preempt_ms",
        "sidecar_memory_gb",
        "sidecar_threads",
        "sidecar_cores",
        "sidecar_tensorboard",
    )
    said = {name: getattr(given, f"tlt_{name}") for name in names}
    if given.tlt_sidecar is None:
        for name, value in said.items():
            if value is not None:
                flag = "--tlt-" + name.replace("_", "-")
                raise ConfigError(f"{flag} has no effect without --tlt-sidecar; add it.")
        return None
    if config is None or config.store_path is None:
        raise ConfigError("--tlt-sidecar trains into a store of versions; give --tlt-store DIR.")
    if not config.harvests:
        raise ConfigError("--tlt-sidecar has nothing to learn from with --tlt-harvest-gb 0.")
    files.check(config.store_path)
    own = given.tlt_sidecar == "idle" and config.coordinator is None
    return Sidecar(
        given.tlt_sidecar,
        f"ipc:///tmp/tlt-{os.getuid()}/coordinator-{os.getpid()}" if own else None,
        said["preempt_ms"] or 500,
        said["sidecar_memory_gb"] or 2.0,
        said["sidecar_threads"] or 1,
        said["sidecar_cores"] or "",
        bool(said["sidecar_tensorboard"]),
    )


_stop: threading.Event | None = None
_threads: list[threading.Thread] = []


@contextlib.contextmanager
def running(sidecar: Sidecar | None, config: Config) -> Iterator[None]:
    """The sidecar and its coordinator run within."""
    global _stop
    if sidecar is None:
        yield
        return
    _stop = threading.Event()
    bodies = [lambda stop: _keep(sidecar.command(config), stop)]
    if sidecar.endpoint is not None:
        from tlt_sglang.coordinator.server import Server
        from tlt_sglang.coordinator.world import Rules

        server = Server(sidecar.endpoint, Rules(preempt=sidecar.preempt_ms / 1000))
        bodies.append(server.run)
    for body in bodies:
        thread = threading.Thread(target=body, args=(_stop,), daemon=True)
        thread.start()
        _threads.append(thread)
    try:
        yield
    finally:
        stop()


def stop() -> None:
    """End what runs; nothing where nothing does."""
    if _stop is not None:
        _stop.set()
    while _threads:
        _threads.pop().join(END_SECONDS)


def _keep(command: list[str], stop: threading.Event) -> None:
    """Keep a process running until `stop`."""
    starts = 0
    while not stop.is_set():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while process.poll() is None and not stop.wait(0.2):
            pass
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return
        if stop.is_set():
            return
        pause = AGAIN_SECONDS[min(starts, len(AGAIN_SECONDS) - 1)]
        starts += 1
        logger.warning(
            "The sidecar ended with status %s; it is started again in %g s",
            process.returncode,
            pause,
        )
        stop.wait(pause)
