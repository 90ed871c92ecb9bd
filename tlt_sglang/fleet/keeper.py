"""The keeper of one member: runs its process on this node, and again when that has died.

When the keeper dies, however that happens, the kernel tells the process to stop; an engine answers
its requests first. Independent of Ray, which calls it as an actor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tlt_sglang.config.settings import VARIABLE
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.fleet.plan import CACHE, Member, Plan
from tlt_sglang.launcher.parent_death import end_with_parent
from tlt_sglang.launcher.server_process import free_port, is_healthy
from tlt_sglang.weights import files

TEMPORARY = Path(CACHE).with_name("members")
"""Folders for temporary files of this node's members; SGLang leaves its sockets when it ends."""
COMPILED = TEMPORARY.parent / "torchinductor"
"""Folder for what torch has compiled, which outlives a member."""
RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0)
"""Pauses before a process that has died is started again; the last one repeats."""
LOOK_SECONDS = 0.2
HEALTH_SECONDS = 2.0
STOP_SECONDS = 60.0
"""Time that a process has to end before it is killed; an engine answers its requests first."""
OWNER_SECONDS = 5.0
"""Time between two looks at who keeps the member."""
GROUP_SECONDS = 5.0
"""Time that processes of a process that has ended have to end, before and after they are killed."""
STEADY_SECONDS = 60.0
"""A process that has run for so long starts the pauses anew."""


@dataclass
class MemberStatus:
    """The state of a member."""

    name: str
    state: str
    """starting, up, restarting or stopped."""
    host: str
    node: str
    """The id of its Ray node."""
    pid: int | None
    url: str | None
    """Address of an engine."""
    starts: int
    """How often its process was started by this keeper."""
    problem: str = ""
    """Why it cannot be started now."""


@dataclass
class FleetStatus:
    """The state of a fleet."""

    plan: Plan
    members: list[MemberStatus]
    waiting: list[str]
    """Members that Ray has not placed: there is no room for them yet."""

    @property
    def is_up(self) -> bool:
        """Return whether all members run."""
        return not self.waiting and all(member.state == "up" for member in self.members)


def describe(status: FleetStatus) -> str:
    """Return a status as the text of `tlt fleet --status`."""
    names = [*(member.name for member in status.members), *status.waiting]
    width = max(map(len, names), default=0)
    rows = [f"{'member':{width}} {'state':10} {'starts':>6} {'pid':>8}  where"]
    for member in sorted(status.members, key=lambda one: one.name):
        where = member.problem or member.url or member.host
        rows.append(
            f"{member.name:{width}} {member.state:10} {member.starts:6} {member.pid or '-':>8}  "
            f"{where}"
        )
    rows += [f"{name:{width}} waits for room on a node" for name in sorted(status.waiting)]
    return "\n".join(rows)


class Keeper:
    """Runs `member` on the node `host` until `stop`."""

    def __init__(self, plan: Plan, member: Member, host: str, node: str) -> None:
        self._plan, self._member = plan, member
        self._status = MemberStatus(member.name, "starting", host, node, None, None, 0)
        self._stop = threading.Event()
        self._token, self._has_claimed, self._looked = uuid.uuid4().hex, False, float("-inf")
        # The kernel watches the thread that has started the process, so this one stays.
        self._thread = threading.Thread(target=self._keep, name=f"keep-{member.name}", daemon=True)
        self._thread.start()

    def status(self) -> MemberStatus:
        """Return the member's state."""
        return self._status

    def stop(self) -> None:
        """End the process and wait for it."""
        self._stop.set()
        self._thread.join(STOP_SECONDS + LOOK_SECONDS)
        self._status.state = "stopped"

    def _keep(self) -> None:
        starts = 0
        while self._goes_on(0):
            began = time.monotonic()
            try:
                with _temporary_files() as variables:
                    self._run(variables)
            except OSError as error:  # no store here, no room for a process: later perhaps
                self._status.problem = str(error)
            self._forget()
            if time.monotonic() - began > STEADY_SECONDS:
                starts = 0
            self._status.state, self._status.pid = "restarting", None
            self._stop.wait(RESTART_SECONDS[min(starts, len(RESTART_SECONDS) - 1)])
            starts += 1
        self._status.state = "stopped"

    def _goes_on(self, seconds: float) -> bool:
        """Wait for so long, and return whether the member is still this keeper's.

        Ray may take a node for dead that lives, and have another one keep the member; and nobody
        reaches this keeper then to end it with the fleet.
        """
        if self._stop.wait(seconds):
            return False
        now = time.monotonic()
        if now - self._looked > OWNER_SECONDS:
            self._looked = now
            if self._is_superseded():
                self._stop.set()
        return not self._stop.is_set()

    def _is_superseded(self) -> bool:
        """Return whether another keeper has taken the member, or the fleet has ended."""
        if self._has_claimed:
            try:
                return self._owner().read_text().strip() != self._token
            except FileNotFoundError:
                if not self._plan.file.exists():
                    return True
            except OSError:
                return False  # the store is away
        self._has_claimed = self._write(self._owner(), self._token)
        return False

    def _run(self, variables: Mapping[str, str]) -> None:
        """Run the process once, until it ends or has to. Raises OSError where it cannot start."""
        status, member = self._status, self._member
        port = 0 if member.kind == "trainer" else free_port(status.host)
        command = self._plan.command(member, status.host, port)
        with (self._plan.folder / f"{member.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(variables),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        status.pid, status.starts, status.problem = process.pid, status.starts + 1, ""
        if member.kind == "coordinator":
            self._write(self._plan.address_file, f"tcp://{status.host}:{port}")
        url = f"http://{status.host}:{port}" if member.kind == "engine" else None
        try:
            while process.poll() is None and self._goes_on(LOOK_SECONDS):
                if status.state != "up" and (url is None or is_healthy(url, HEALTH_SECONDS)):
                    status.state, status.url = "up", url
                    self._announce()
        finally:
            _end(process)

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the process; what torch has compiled is where the user says."""
        passed_on = {name: value for name, value in os.environ.items() if name != VARIABLE}
        return {**variables, **passed_on, "TMPDIR": variables["TMPDIR"]}

    def _announce(self) -> None:
        """Write the address of an engine to where Prometheus and `tlt top` look."""
        if self._status.url is None:
            return
        target = {
            "targets": [self._status.url.removeprefix("http://")],
            "labels": {"fleet": self._plan.name, "engine": self._member.name},
        }
        self._write(self._target(), json.dumps([target], indent=1))

    def _write(self, path: Path, text: str) -> bool:
        """Write a file of the store, whole or not at all; return whether it is there."""
        if not self._plan.folder.is_dir():
            return False  # the store is not here; the member serves without it, too
        try:
            files.replace(self._plan.store, path, f"{text}\n".encode())
        except EnvironmentProblem:
            return False
        return True

    def _forget(self) -> None:
        self._status.url = None
        if self._member.kind == "engine":
            with contextlib.suppress(OSError):
                self._target().unlink(missing_ok=True)

    def _owner(self) -> Path:
        return self._plan.owners / self._member.name

    def _target(self) -> Path:
        return self._plan.targets / f"{self._member.name}.json"


@contextlib.contextmanager
def _temporary_files() -> Iterator[dict[str, str]]:
    """Make a folder for the temporary files of a member, and remove it at the end.

    Yields the variables that name it. Those of keepers that died are removed as well.
    """
    folder = TEMPORARY / files.owned("")  # a short path: the sockets in it may have 107 characters
    try:
        for one in (TEMPORARY.parent, TEMPORARY, folder):
            files.make_private(one)
        variables = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(COMPILED)}
    except OSError:  # in a place of another user's nothing is safe
        folder = Path(tempfile.mkdtemp(prefix="tlt-"))
        variables = {"TMPDIR": str(folder)}
    try:
        yield variables
    finally:
        for one in (folder, *filter(files.is_orphan, TEMPORARY.glob("@*"))):
            shutil.rmtree(one, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have ended, and wait for it and for what it has started."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGKILL)
        process.wait()
    for number in (0, signal.SIGKILL):
        deadline = time.monotonic() + GROUP_SECONDS
        while time.monotonic() < deadline:
            if not _signal(process.pid, number):
                return
            time.sleep(LOOK_SECONDS / 4)


def _signal(group: int, number: int) -> bool:
    """Send a signal, 0 for none, to a process group; return whether there is such a group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
