"""The processes beside the launcher's server: the sidecar, and a coordinator for this one engine.

The sidecar is a process of its own, which is started again if it dies, a little later each time;
the engine never waits for it. The coordinator is a thread. Both end with the launcher, however that
ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tlt_sglang.config import flags
from tlt_sglang.config.settings import SETTINGS, VARIABLE, Config, settings_for
from tlt_sglang.errors import ConfigError
from tlt_sglang.weights import files

logger = logging.getLogger(__name__)

RESTART_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Pauses before the sidecar is started again; the last one repeats."""
STEADY_SECONDS = 300.0
"""A process that has run for so long starts the pauses anew."""
END_SECONDS = 10.0


@dataclass(frozen=True)
class SidecarPlan:
    """A sidecar that the launcher runs, with a coordinator if it needs one."""

    endpoint: str | None
    """Address of the coordinator to run; None where another one is used, or none is needed."""

    def joined(self, config: Config) -> Config:
        """Return `config` with the address of the coordinator that is run here."""
        if self.endpoint is None:
            return config
        return dataclasses.replace(config, coordinator=self.endpoint)

    def command(self, config: Config) -> list[str]:
        """Return the command of the sidecar's process."""
        assert config.store is not None
        if config.sidecar == "always":
            config = dataclasses.replace(
                config, coordinator=None, coordinator_key=None, device_name=None
            )
        words = [sys.executable, "-m", "tlt_sglang.cli", "sidecar", "--parent", str(os.getpid())]
        return words + flags.to_flags(config, settings_for("sidecar"))


def options(config: Config | None, flag_names: Collection[str] = ()) -> SidecarPlan | None:
    """Return the sidecar that `config` asks for, or None.

    `flag_names` are the settings that come from flags. Raises ConfigError for those that only a
    sidecar reads where there is none, and for a sidecar that has nothing to train.
    """
    if config is None or config.sidecar is None:
        for name in flag_names:
            if not {"engine", "launcher"} & set(SETTINGS[name].used_by):
                raise ConfigError(
                    f"{SETTINGS[name].flag} has no effect without --tlt-sidecar; add it."
                )
        return None
    if config.store_path is None:
        raise ConfigError("--tlt-sidecar needs a store to publish to; give --tlt-store DIR.")
    if not config.harvests:
        raise ConfigError(
            "--tlt-sidecar has nothing to learn from with --tlt-harvest-gb 0; give more than 0."
        )
    files.check(config.store_path)
    own = config.sidecar == "idle" and config.coordinator is None
    return SidecarPlan(f"ipc:///tmp/tlt-{os.getuid()}/coordinator-{os.getpid()}" if own else None)


_stop: threading.Event | None = None
_threads: list[threading.Thread] = []


@contextlib.contextmanager
def running(sidecar: SidecarPlan | None, config: Config) -> Iterator[None]:
    """Run the sidecar and its coordinator within."""
    global _stop
    if sidecar is None:
        yield
        return
    _stop = threading.Event()
    bodies = [lambda stop: _keep(sidecar.command(config), stop)]
    if sidecar.endpoint is not None:
        from tlt_sglang.coordinator.commands import rules
        from tlt_sglang.coordinator.server import Server

        server = Server(sidecar.endpoint, rules(config))
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
    """End the sidecar and the coordinator, if they run."""
    if _stop is not None:
        _stop.set()
    while _threads:
        _threads.pop().join(END_SECONDS)


def _keep(command: list[str], stop: threading.Event) -> None:
    """Keep a process running until `stop` is set."""
    # Its flags are the whole of its configuration.
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    starts = 0
    while not stop.is_set():
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
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
        if time.monotonic() - began > STEADY_SECONDS:
            starts = 0
        pause = RESTART_SECONDS[min(starts, len(RESTART_SECONDS) - 1)]
        starts += 1
        logger.warning(
            "The sidecar exited with status %s; it is started again in %g s",
            process.returncode,
            pause,
        )
        stop.wait(pause)
