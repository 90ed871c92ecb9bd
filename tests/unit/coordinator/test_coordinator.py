"""The coordinator with real sockets, processes and faults."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.support.coordination import FAST, MALFORMED
from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.client import Client
from tlt_sglang.coordinator.commands import main
from tlt_sglang.coordinator.endpoints import make_keys
from tlt_sglang.coordinator.messages import (
    Freed,
    Start,
    Stop,
)
from tlt_sglang.coordinator.server import Server
from tlt_sglang.coordinator.status import query_status
from tlt_sglang.coordinator.world import Rules
from tlt_sglang.errors import ConfigError


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder with a short path (107 bytes at most) that has to be empty at the end."""
    monkeypatch.setattr("tlt_sglang.coordinator.client.RETRY_SECONDS", 0.05)
    monkeypatch.setattr("tlt_sglang.coordinator.server.MAX_WAIT_SECONDS", 0.02)
    with tempfile.TemporaryDirectory(prefix="tlt", dir="/tmp") as made:
        before = {thread.ident for thread in threading.enumerate()}
        yield Path(made)
        leftovers = [path for path in Path(made).rglob("*") if ".key" not in path.name]
        assert not leftovers
        assert {thread.ident for thread in threading.enumerate()} == before


@contextmanager
def serving(endpoint: str, rules: Rules = FAST, key: Path | None = None) -> Iterator[Server]:
    made, stop = Server(endpoint, rules, key), threading.Event()
    thread = threading.Thread(target=made.run, args=(stop,))
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()


Join = Callable[..., Client]


@pytest.fixture
def join(folder: Path) -> Iterator[Join]:
    """Yield a function that joins the coordinator in `folder`; all members leave at the end."""
    with ExitStack() as stack:

        def joined(
            name: str, role: messages.Role, device: str | None = None, **more: Any
        ) -> Client:
            client = Client(f"ipc://{folder}/c", name, role, device, **more)
            stack.callback(client.close)
            return client

        yield joined


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def next_instruction(client: Client, *others: Client) -> messages.Instruction:
    """Return the next instruction of `client`; `others` poll meanwhile."""
    instructions: list[messages.Instruction] = []

    def fetched() -> bool:
        assert not any(other.poll() for other in others)
        instructions.extend(client.poll())
        return bool(instructions)

    until(fetched)
    (one,) = instructions
    return one


def settle(*clients: Client) -> None:
    until(
        lambda: not any(client.poll() for client in clients) and all(c.connected for c in clients)
    )


def test_an_engine_and_a_trainer_take_turns_over_ipc(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer, rl = (
        join("e", "engine", "cpu:0"),
        join("t", "trainer", "cpu:0"),
        join("rl", "stack"),
    )
    with serving(at):
        settle(engine, trainer, rl)
        latencies = []
        for _ in range(40):
            engine.report(0, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Start)
            began = time.perf_counter()
            engine.report(1, 0, 5.0)
            assert isinstance(next_instruction(trainer), Stop)
            latencies.append(1000 * (time.perf_counter() - began))
            trainer.confirm_stop()
        cuts = statistics.quantiles(latencies, n=100)
        print(f"preemption over ipc: p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms")
        assert cuts[98] < 1000 * FAST.preempt
        rl.tell("claim_device", "cpu:0")
        stop = next_instruction(trainer)
        assert isinstance(stop, Stop) and stop.release
        trainer.confirm_stop()
        assert next_instruction(rl) == Freed("cpu:0")
        status = query_status(at)
        assert status and status.states == {"cpu:0": "AWAY"} and len(status.stop_ms) == 40
        assert status.members == {"e": "engine", "t": "trainer", "rl": "stack"}
        assert (status.late, status.dropped, status.tokens_per_s) == (0, 0, 5.0)


def test_malformed_and_oversized_messages_are_dropped_and_counted(folder: Path) -> None:
    at = f"ipc://{folder}/c"
    with serving(at) as served, zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.set(zmq.LINGER, 0)
        raw.connect(at)
        for data in MALFORMED:
            raw.send(data)
        raw.send_multipart([b"two", b"frames"])
        until(lambda: served.dropped == len(MALFORMED) + 1)
        raw.send(b"x" * (messages.MAX_BYTES + 1))
        status = query_status(at)
        assert status and status.dropped == served.dropped


def test_a_name_that_is_taken_is_refused_until_its_owner_leaves(
    folder: Path, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    at = f"ipc://{folder}/c"
    with serving(at):
        first, second = join("e", "engine", "a"), join("e", "engine", "b")
        settle(first)
        until(lambda: second.poll() or first.poll() or second.refusal)
        assert second.refusal and "taken" in second.refusal and not second.connected
        assert caplog.text.count("The coordinator refuses e. The name e is taken") == 1
        first.close()
        settle(second)
        assert second.refusal is None


def test_without_a_coordinator_no_call_waits_or_raises(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    slowest = 0.0
    for number in range(500):
        began = time.thread_time()
        engine.report(number, 0, float("nan"))
        engine.tell("rollout_begins")
        assert engine.poll() == [] and trainer.poll() == []
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 0.05 and not engine.connected
    with serving(at) as served:
        settle(engine, trainer)
        until(lambda: engine.poll() or served.world.devices["a"].reported)
        assert served.world.devices["a"].running == 499, "it tells the newest, not what was"


def test_a_trainer_without_a_coordinator_stops_and_resumes_later(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    with serving(at, Rules(dwell=0.002, timeout=0.4)):
        engine.report(0, 0, 0.0)
        settle(engine)
        assert isinstance(next_instruction(trainer), Start)
    assert next_instruction(trainer) == Stop(0, 0, True)
    trainer.confirm_stop()
    assert trainer.poll() == [] and not trainer.connected
    with serving(at):
        assert isinstance(next_instruction(trainer, engine), Start)


def test_clocks_that_jump_change_nothing(
    folder: Path, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = f"ipc://{folder}/c"
    offset = [0.0]
    monkeypatch.setattr(time, "time", lambda: random.uniform(0, 2e9))
    with serving(at) as served:
        engine = join("e", "engine", "a", clock=lambda: time.monotonic() + offset[0])
        trainer = join("t", "trainer", "a")
        for jump in (0.0, 3600.0, -7200.0, 3600.0):
            offset[0] += jump
            engine.report(0, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Start)
            engine.report(1, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Stop)
            trainer.confirm_stop()
        assert served.world.late == 0


def test_members_rejoin_a_coordinator_that_was_killed_and_restarted(
    folder: Path, join: Join
) -> None:
    at = f"ipc://{folder}/c"
    command = [
        sys.executable,
        "-m",
        "tlt_sglang.cli",
        "coordinator",
        "--tlt-coordinator",
        at,
        "--tlt-coordinator-dwell-ms",
        "10",
        "--tlt-coordinator-timeout-ms",
        "1000",
    ]

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout and at in process.stdout.readline()
        return process

    process = start()
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    rl = join("rl", "stack")
    try:
        engine.report(0, 0, 0.0)
        settle(engine, rl)
        rl.tell("claim_device")
        assert isinstance(next_instruction(trainer, engine), Stop)
        trainer.confirm_stop()
        for _ in range(2):
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
            assert (folder / "c").is_socket(), "that is what a killed one leaves"
            process = start()
            # Members repeat their signals.
            until(lambda: (engine.poll(), rl.poll(), states(at) == {"a": "AWAY"})[-1])
            stop = next_instruction(trainer, engine)
            assert isinstance(stop, Stop) and stop.release
            trainer.confirm_stop()
        rl.tell("release_device")
        assert isinstance(next_instruction(trainer, engine), Start)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for number in range(1000):
            engine.report(number, 0, 0.0)
        assert time.monotonic() - began < 1, "a coordinator that hangs holds up nobody"
        process.send_signal(signal.SIGCONT)
        assert isinstance(next_instruction(trainer, engine), Stop)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        process.stdout.close()  # type: ignore[union-attr]


def test_members_follow_a_coordinator_that_moves(folder: Path) -> None:
    """They read in a file where it is, before there is one, and once it is silent."""
    file, first, second = folder / "address", f"ipc://{folder}/first", f"ipc://{folder}/second"
    engine = Client(f"file://{file}", "e", "engine", "a")
    trainer = Client(f"file://{file}", "t", "trainer", "a")
    try:
        assert query_status(f"file://{file}", wait=0.05) is None
        engine.report(0, 0, 0.0)
        assert trainer.poll() == [] and not engine.connected
        file.write_text("nothing that is an address")
        with serving(first):
            file.write_text(f"{first}\n")
            assert isinstance(next_instruction(trainer, engine), Start)
        with serving(second):
            file.write_text(f"{second}\n")

            def arrived() -> bool:
                # It has moved before the trainer had to stop by itself.
                assert engine.poll() == [] and trainer.poll() == []
                return states(second) == {"a": "TRAINING"}

            until(arrived)
            engine.report(1, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Stop)
            trainer.confirm_stop()
            until(lambda: states(f"file://{file}") == {"a": "BUSY"})
    finally:
        engine.close()
        trainer.close()
        file.unlink()


class Scripted:
    """A socket whose answers are written beforehand; it keeps what is sent."""

    closed = False

    def __init__(self) -> None:
        self.answers: list[messages.CoordinatorMessage] = []
        self.sent: list[messages.MemberMessage | None] = []

    def recv(self, _flags: int) -> bytes:
        if not self.answers:
            raise zmq.Again
        return messages.encode(self.answers.pop(0))

    def send(self, data: bytes, _flags: int) -> None:
        self.sent.append(messages.decode_member_message(data))


def test_a_stack_that_was_forgotten_sends_its_signals() -> None:
    """After a long rollout it reads an old welcome, and that it is unknown, before it says more."""
    socket, welcome = Scripted(), messages.Welcome("session", 5.0)
    rl = Client("ipc:///tmp/c", "rl", "stack", connect=lambda *_: (None, socket))
    socket.answers = [welcome]
    rl.tell("rollout_begins")
    socket.answers = [welcome, messages.Pong(), messages.Unknown()]
    rl.tell("rollout_ends")
    socket.sent.clear()
    rl.tell("claim_device")
    socket.answers = [welcome, messages.Pong()]
    assert rl.poll() == [] and rl.connected
    hello, *signals = [one for one in socket.sent if not isinstance(one, messages.Ping)]
    assert isinstance(hello, messages.Hello) and messages.Signal("claim_device") in signals


def test_one_that_was_forgotten_repeats_its_signals() -> None:
    """Nothing is lost that was said to a coordinator which no longer knew it."""
    socket, welcome = Scripted(), messages.Welcome("session", 5.0)
    rl = Client("ipc:///tmp/c", "rl", "stack", connect=lambda *_: (None, socket))
    socket.answers = [welcome]
    rl.tell("claim_device")
    socket.sent.clear()
    socket.answers = [messages.Unknown()]
    rl.poll()
    assert socket.sent[:2] == [
        messages.Hello("rl", "stack", None, False),
        messages.Signal("claim_device", None),
    ]


def states(at: str) -> dict[str, str]:
    status = query_status(at)
    return status.states if status else {}


def test_a_running_coordinator_keeps_its_address(folder: Path) -> None:
    at = f"ipc://{folder}/c"
    with serving(at), pytest.raises(ConfigError, match="already"):
        Server(at, FAST)
    (folder / "c").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        Server(at, FAST)
    assert (folder / "c").read_text() == "precious"
    (folder / "c").unlink()


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://x", "is not valid"),
        ("ipc://relative", "is not valid"),
        ("ipc://@abstract", "is not valid"),
        ("ipc:///tmp/c", "open to others"),
        ("ipc:///tmp/" + "x" * 107, "too long"),
        ("tcp://nowhere", "(is not valid|cannot listen)"),
    ],
)
def test_an_invalid_address_is_refused_with_a_reason(endpoint: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Server(endpoint, FAST)
    with pytest.raises(ConfigError, match=words):
        Client(endpoint, "e", "engine", "a")


def test_a_file_with_an_address_is_for_members() -> None:
    with pytest.raises(ConfigError, match="is not valid"):
        Server("file:///tmp/address", FAST)
    with pytest.raises(ConfigError, match="write file:///PATH"):
        Client("file://relative", "e", "engine", "a")


def test_the_folder_of_the_socket_is_made_for_its_owner_alone(folder: Path) -> None:
    with serving(f"ipc://{folder}/sub/c"):
        assert (folder / "sub").stat().st_mode & 0o777 == 0o700
    (folder / "sub").rmdir()


def test_over_tcp_only_holders_of_the_key_take_part(folder: Path) -> None:
    public, secret = make_keys(folder / "keys")
    other, _ = make_keys(folder / "other.keys")
    assert {path.stat().st_mode & 0o777 for path in (public, secret)} == {0o600}
    with pytest.raises(ConfigError, match="needs the secret one"):
        Server("tcp://127.0.0.1:*", FAST, public)
    with pytest.raises(ConfigError, match="is not a key file"):
        Client("tcp://127.0.0.1:9", "e", "engine", "a", key=folder / "nothing")
    with serving("tcp://127.0.0.1:*", FAST, secret) as served:
        assert query_status(served.endpoint, public) is not None
        assert query_status(served.endpoint, wait=0.1) is None
        assert query_status(served.endpoint, other, wait=0.1) is None
    for path in (public.parent, other.parent):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_the_command_line_reports_errors_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0 and "--tlt-preempt-ms" in capsys.readouterr().out
    assert main(["--tlt-preempt-ms", "soon"]) == 2
    assert "is not a whole number" in capsys.readouterr().err
    at = f"ipc://{folder}/c"
    with serving(at):
        assert main(["--status", "--tlt-coordinator", at]) == 0
        assert "late stops 0" in capsys.readouterr().out
        assert main(["--tlt-coordinator", at]) == 1
        assert "listens at" in capsys.readouterr().err


def test_the_coordinator_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, tlt_sglang.coordinator.commands; "
        "sys.exit(bool({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
