"""The systems that are compared: the flags of their servers, and the run with the trainer beside.

With a sidecar there is a coordinator, too. The server that has finished its share of a rollout
lends its core to the sidecar while another one decodes its tail; then the trainer claims them all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.processes import MeasuredProcess, Process, log_file, stop
from benchmarks.harness.program import BenchmarkError, UsageError, say
from benchmarks.harness.provenance import REPOSITORY
from benchmarks.harness.server import Server
from benchmarks.rl_run.faults import COORDINATOR, Fault
from benchmarks.rl_run.settings import CHECKPOINTS, RESULT, SETTINGS, Settings, Step, read_steps
from tlt_sglang.launcher.server_process import HOST, free_port

PLAIN, ADAPTIVE, SIDECAR = "plain", "adaptive", "adaptive, sidecar"
SYSTEMS = (PLAIN, ADAPTIVE, SIDECAR)
TRAINER = REPOSITORY / ".venv-stacks" / "bin" / "python"
STUBS = REPOSITORY / "tests" / "stacks" / "own" / "stubs"
"""Loggers that AReaL imports and does not use."""
STRATEGIES = "off,eagle3:1x1x2,eagle3:3x1x4,eagle3:5x1x6,eagle3:7x1x8,eagle3:3x4x8,ngram:8"
"""The default ones, and longer chains: a policy that is nearly certain accepts long drafts."""
KV_TOKENS = 20_000
CONSERVATIVENESS = "0.3"
"""Part of their longest length that responses are expected to reach, over SGLang's 0.7: few do."""
POLL_SECONDS = 1.0
COMPLAINTS = "complaints.txt"
COMPLAINT = re.compile(
    r".*(?:[Rr]etry|[Ee]rror [45]\d\d|HTTP [45]\d\d|status[= ][45]\d\d"
    r"|RemoteInfEngine.*(?:WARNING|ERROR)).*"
)
"""A line of the trainer's log about an answer of the server."""


class System:
    """One system in its folder; what it has done is kept there."""

    def __init__(
        self, name: str, folder: Path, settings: Settings, drafter: Path, logs: Path
    ) -> None:
        self.name, self.folder, self.settings, self.logs = name, folder, settings, logs
        self.drafter = drafter
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SETTINGS).exists() and Settings.read(folder) != settings:
            raise UsageError(
                f"{folder} has a run with other settings; delete it, or give --folder another one."
            )
        settings.write(folder)

    @property
    def weights(self) -> str | None:
        """The SHA-256 of the policy's weights at the end; None before it."""
        path = self.folder / RESULT
        return json.loads(path.read_text())["weights"] if path.exists() else None

    @property
    def policy(self) -> Path:
        """The folder of the policy at the end."""
        return self.folder / CHECKPOINTS / str(self.settings.steps)

    @property
    def store(self) -> Path:
        """The folder of the versions of its drafter."""
        return self.folder / "store"

    @property
    def steps(self) -> list[Step]:
        """The steps that it has taken."""
        return read_steps(self.folder)

    @property
    def complaints(self) -> int:
        """The number of lines in the trainer's logs that blame the server."""
        path = self.folder / COMPLAINTS
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def coordinator(self) -> str | None:
        """The address of its coordinator, None without one."""
        if self.name != SIDECAR:
            return None
        return f"ipc:///tmp/tlt-{os.getuid()}/rl-run-{os.getpid()}"

    def flags(self, replica: int) -> list[str]:
        """Return the flags of one of its servers; the sidecar belongs to the first one."""
        running = str(self.settings.problems * self.settings.group)
        flags = ["--model", self.settings.policy, "--device", "cpu", "--adaptive-spec"]
        flags += ["--max-total-tokens", str(KV_TOKENS), "--max-running-requests", running]
        flags += ["--schedule-conservativeness", CONSERVATIVENESS]
        if self.name == PLAIN:
            return [*flags, "--tlt-strategies", "off"]
        flags += ["--speculative-draft-model-path", str(self.drafter)]
        flags += ["--tlt-strategies", STRATEGIES]
        if self.coordinator is not None:
            flags += ["--tlt-store", str(self.store)]
            flags += ["--tlt-coordinator", self.coordinator]
            flags += ["--tlt-device-name", f"replica-{replica}"]
            flags += ["--tlt-sidecar", "idle"] if replica == 0 else []
        return flags

    def run(self, faults: Sequence[Fault] = ()) -> None:
        """Take the steps that are left, and say how each went.

        After a fault that ends a server, all of them and the trainer are started again, and the
        run goes on after its last checkpoint.
        """
        left = [fault for fault in faults if fault.step >= len(self.steps)]
        while self.weights is None:
            before = len(left)
            try:
                self._run(left)
            except BenchmarkError as error:
                if len(left) == before:
                    raise
                say(f"{self.name}: starts again, because {error}")
        shutil.rmtree(self.folder / "names", ignore_errors=True)

    def _run(self, faults: list[Fault]) -> None:
        """Start coordinator, servers and trainer, and take steps until the end or a failure."""
        count = self.settings.replicas
        threads = max(1, self.settings.threads // count)
        beside = {} if self.coordinator is None else {COORDINATOR: self._coordinator()}
        servers: list[Server] = []
        trainer = None
        try:
            servers += [
                Server(f"{self.name}, {number + 1}", self.flags(number), threads, self.logs)
                for number in range(count)
            ]
            for server in servers:
                server.wait_started()
            trainer = self._trainer([f"{HOST}:{server.port}" for server in servers])
            self._watch(servers, beside, trainer, faults)
        finally:
            stop([*servers, *beside.values(), *([] if trainer is None else [trainer])])
            if trainer is not None:
                with (self.folder / COMPLAINTS).open("a") as file:
                    file.writelines(f"{line}\n" for line in COMPLAINT.findall(trainer.log()))

    def _coordinator(self) -> MeasuredProcess:
        assert self.coordinator is not None
        words = ["-m", "tlt_sglang.cli", "coordinator", "--tlt-coordinator", self.coordinator]
        return Process(f"{self.name}, coordinator", words, 1, self.logs)

    def _trainer(self, addresses: list[str]) -> MeasuredProcess:
        if not TRAINER.exists():
            raise BenchmarkError("The trainer's environment is missing; run make stacks first.")
        coordinator = [] if self.coordinator is None else ["--coordinator", self.coordinator]
        words = ["-m", "benchmarks.rl_run.trainer", str(self.folder), *addresses, *coordinator]
        return MeasuredProcess(
            f"{self.name}, trainer",
            [str(TRAINER), *words],
            log_file(self.logs, f"{self.name}-trainer"),
            environment={
                "OMP_NUM_THREADS": str(self.settings.threads),
                "MASTER_PORT": str(free_port()),
                # What is compiled for the shapes of a process's first step sums in another order
                # than what is compiled for all shapes, so a run that was resumed would differ.
                "TORCHDYNAMO_DISABLE": "1",
                "PYTHONPATH": os.pathsep.join((str(STUBS), str(REPOSITORY))),
            },
            cwd=REPOSITORY,
        )

    def _watch(
        self,
        servers: list[Server],
        beside: dict[str, MeasuredProcess],
        trainer: MeasuredProcess,
        faults: list[Fault],
    ) -> None:
        """Say every step, until the trainer has written its result; cause the faults."""
        shown = len(self.steps)
        while trainer.alive:
            time.sleep(POLL_SECONDS)
            for server in servers:
                server.check_alive()
            steps = self.steps
            for step in steps[shown:]:
                say(f"{self.name}, step {step.step + 1} of {self.settings.steps}: {_line(step)}")
            shown = len(steps)
            if faults and shown == faults[0].step:
                fault = faults.pop(0)
                fault.cause(servers, beside)
                if fault.process == COORDINATOR:
                    beside[COORDINATOR].stop()
                    beside[COORDINATOR] = self._coordinator()
        if self.weights is None:
            trainer.check_alive()


def _line(step: Step) -> str:
    return (
        f"rollout {step.rollout_seconds:.1f} s, training {step.train_seconds:.1f} s, update "
        f"{step.update_seconds:.1f} s, reward {step.reward:.3f}, accept length "
        f"{step.accept_length:.2f}, longest {step.longest}"
    )
