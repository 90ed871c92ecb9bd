"""The sidecar as a process: waits for an engine, obeys the coordinator, reports its status.

What it does meanwhile is `session`. Without a coordinator it may use its device at any time.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.client import Client
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.harvest import announce, segments
from tlt_sglang.observe.scalars import Scalars
from tlt_sglang.training.progress import say
from tlt_sglang.weights import files
from tlt_sglang.weights.store import Store

if TYPE_CHECKING:
    from tlt_sglang.harvest.announce import Announcement
    from tlt_sglang.sidecar.service import SidecarOptions

STATUS_SECONDS = 1.0
"""Time between two updates of STORE/sidecar.json."""
WAIT_SECONDS = 0.2
"""Time between two looks for the first engine."""


class Sidecar:
    """The process; `run` returns once it is stopped."""

    def __init__(self, options: SidecarOptions) -> None:
        self.options = options
        self.store = Store(options.store)
        self.scalars: Scalars | None = None
        self._stopped = False
        self._may_train = options.coordinator is None
        self._client: Client | None = None
        self._start = time.monotonic()
        self._last_report = float("-inf")

    def run(self) -> None:
        """Wait for an engine, then train its drafter until the process is stopped."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        segments.remove_stale()
        if self.options.tensorboard:
            self.scalars = Scalars(self.store.root / "tensorboard")
        try:
            engine = self._wait_for_engine()
            if engine is None:
                return
            if self.options.coordinator is not None:
                device = self.options.device_name or engine.device
                member, key = files.owned("sidecar"), self.options.coordinator_key
                self._client = Client(self.options.coordinator, member, "trainer", device, key=key)

            # Imports torch, which takes seconds: not before there is an engine to train for.
            from tlt_sglang.sidecar.session import TrainingSession

            TrainingSession(self, engine).run()
        finally:
            if self._client is not None:
                self._client.close()
            if self.scalars is not None:
                self.scalars.close()

    def _stop(self, *_: object) -> None:
        self._stopped = True

    @property
    def is_over(self) -> bool:
        """Return whether the process has been stopped or has reached its time limit."""
        limit = self.options.seconds
        return self._stopped or (limit is not None and time.monotonic() - self._start > limit)

    def _wait_for_engine(self) -> Announcement | None:
        announced = False
        while not self.is_over:
            engines = announce.read(self.store.root)
            if engines:
                return engines[0]
            if not announced:
                log(f"waiting for an engine with --tlt-store {self.store.root}")
                announced = True
            time.sleep(WAIT_SECONDS)
        return None

    def may_train(self, leave: Callable[[], None]) -> bool:
        """Return whether the device may be used now; call `leave` first where it has to be left.

        Raises EnvironmentProblem where the coordinator has given up waiting for that.
        """
        if self._client is None:
            return True
        for instruction in self._client.poll():
            if isinstance(instruction, messages.Start):
                self._may_train = True
            elif isinstance(instruction, messages.Stop):
                self._may_train = False
                leave()
                self._client.confirm_stop()
            elif isinstance(instruction, messages.Kill):
                raise EnvironmentProblem(
                    "The coordinator ended this sidecar, which was late to stop; raise "
                    "--tlt-preempt-ms, or lower --tlt-sidecar-batch-tokens."
                )
        return self._may_train

    def report(self, describe: Callable[[], Mapping[str, object]], *, now: bool = False) -> None:
        """Write STORE/sidecar.json and the scalars, at most once a second unless `now`."""
        if not now and time.monotonic() - self._last_report <= STATUS_SECONDS:
            return
        self._last_report = time.monotonic()
        status = describe()
        step = status["step"]
        if self.scalars is not None and isinstance(step, int) and step:
            values = {name: status[name] for name in ("loss", "tokens", "published")}
            numbers = {n: float(v) for n, v in values.items() if isinstance(v, (int, float))}
            self.scalars.add(step, numbers)

        # Readers see the old file or the new one; a full disk costs only the report.
        path = self.store.root / "sidecar.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"pid": os.getpid()} | dict(status), indent=1))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)


def log(text: str) -> None:
    """Write one line to standard error."""
    say(f"sidecar: {text}")
