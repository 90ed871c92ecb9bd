"""Reports of an engine's load to the coordinator. Runs in the scheduler process, on a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tlt_sglang.coordinator.client import Client
from tlt_sglang.weights import files

if TYPE_CHECKING:
    from tlt_sglang.config.settings import Config, Device
    from tlt_sglang.upstream.protocols import Scheduler

REPORT_SECONDS = 0.05
"""Time between two reports."""


class LoadReport:
    """Reports running and queued requests and tokens/s until `close`.

    `committed` returns the tokens that this engine has committed so far.
    """

    def __init__(
        self,
        config: Config,
        device: Device,
        scheduler: Scheduler,
        committed: Callable[[], int],
    ) -> None:
        assert config.coordinator is not None
        self._scheduler, self._committed = scheduler, committed
        key = None if config.coordinator_key is None else Path(config.coordinator_key)
        device_id = device_name(config, device)
        member = files.owned("engine")
        self._client = Client(config.coordinator, member, "engine", device_id, key=key)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tlt-report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reporting and leave the coordinator."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        rate, before = 0.0, 0
        while not self._stop.wait(REPORT_SECONDS):
            now = self._committed()
            rate, before = 0.9 * rate + 0.1 * (now - before) / REPORT_SECONDS, now
            batch = self._scheduler.running_batch
            running = len(batch.reqs) if batch is not None and batch.reqs else 0
            self._client.report(running, len(self._scheduler.waiting_queue), round(rate, 1))
        self._client.close()


def device_name(config: Config, device: Device) -> str:
    """Return the coordinator's name of this engine's device."""
    if config.device_name is not None:
        return config.device_name
    host = os.uname().nodename
    if device == "cpu":
        return f"{host}:cpu{'-'.join(map(str, sorted(os.sched_getaffinity(0))))}"
    from sglang.srt.runtime_context import get_parallel

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{host}:gpu{visible or get_parallel().tp_group.local_rank}"
