"""The exporter: what arrives on another machine is what an engine wrote, whole, or is counted.

An engine's log has a path relative to the exporter's folder here, so that it exists for the
exporter and for no other process, as if that ran on another machine.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from tlt_sglang.coordinator.endpoints import make_keys
from tlt_sglang.exporter import service
from tlt_sglang.exporter.commands import main
from tlt_sglang.exporter.messages import Export, Request, encode, exports
from tlt_sglang.exporter.remote import RemoteReader
from tlt_sglang.exporter.service import Exporter
from tlt_sglang.harvest import announce
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.harvest.layout import Geometry
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import END, PROMPT, Record, request_key
from tlt_sglang.harvest.writer import Writer
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.feed import Feed
from tlt_sglang.weights import files

WIDTH = 64
SECONDS = 20.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="tlt-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def writer(folder: Path) -> Iterator[Writer]:
    """The log of an engine, in a folder of its own."""
    (folder / "engine").mkdir()
    log = Writer.create(1 << 21, WIDTH, "bfloat16", folder / "engine")
    yield log
    log.close()


def record(number: int, count: int = 4, flags: int = 0) -> Record:
    """Return a record whose features tell its number."""
    tokens = np.arange(number, number + count, dtype=np.int32)
    features = np.random.default_rng(number).integers(0, 1 << 16, (count, WIDTH), np.uint16)
    return Record(request_key(f"r{number}"), number, tokens, features, 1, flags)


def digest(records: list[Record]) -> str:
    """Return a hash of all that the records hold."""
    whole = hashlib.sha256()
    for one in records:
        whole.update(one.request + one.tokens.tobytes() + one.features.tobytes())
        whole.update(f"{one.start} {one.version} {one.flags}".encode())
    return whole.hexdigest()


def announced(folder: Path, writer: Writer, version: int = 1) -> Path:
    """Announce the engine's log under its name alone, and return the store."""
    store = folder / "store"
    Announcement(writer.path.name, "cpu:0", "model", "drafter", False, version).write(store)
    return store


@contextmanager
def exporting(folder: Path, store: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Run `tlt export` in the engine's folder."""
    address = more[0] if more else f"ipc://{folder}/export"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tlt_sglang.cli", "export"),
            *("--tlt-store", str(store), "--address", address, *more[1:]),
        ],
        cwd=folder / "engine",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "tlt export: at" in process.stdout.readline()
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) in (0, -signal.SIGKILL)
        process.communicate()


@contextmanager
def reading(store: Path, key: Path | None = None) -> Iterator[RemoteReader]:
    """Read the only log that is exported."""
    (export,) = exports(store)
    ((log, geometry),) = export.logs.items()
    reader = RemoteReader(export.address, log, geometry, key)
    try:
        yield reader
    finally:
        reader.close()


def collect(reader: RemoteReader, done: Callable[[list[Record]], bool]) -> list[Record]:
    """Read until `done` says so of everything that has arrived."""
    records: list[Record] = []
    end = time.monotonic() + SECONDS
    while not done(records):
        assert time.monotonic() < end, f"{len(records)} records arrived"
        records += reader.read()
        time.sleep(0.001)
    return records


def test_records_arrive_byte_for_byte(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    sent = [record(number, 1 + number % 40, PROMPT * (number % 2)) for number in range(200)]
    with exporting(folder, store), reading(store) as reader:
        for one in sent[:100]:
            writer.write(one)
        first = collect(reader, lambda records: len(records) == 100)
        for one in sent[100:]:
            writer.write(one)
        rest = collect(reader, lambda records: len(records) == 100)
        assert digest(first + rest) == digest(sent)
        assert (reader.overwritten, reader.torn, reader.last) == (0, 0, 200)
        assert not reader.ended
        writer.close()
        collect(reader, lambda _: reader.ended)


def test_several_readers_each_get_everything(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    sent = [record(number) for number in range(50)]
    for each in sent:
        writer.write(each)
    with exporting(folder, store), reading(store) as one, reading(store) as other:
        assert digest(collect(one, lambda records: len(records) == 50)) == digest(sent)
        assert digest(collect(other, lambda records: len(records) == 50)) == digest(sent)


def test_a_killed_exporter_loses_and_repeats_nothing(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    sent = [record(number, 8) for number in range(300)]
    arrived: list[Record] = []
    with exporting(folder, store) as process, reading(store) as reader:
        for one in sent[:100]:
            writer.write(one)
        arrived += collect(reader, lambda records: len(records) >= 50)
        process.kill()
        process.wait()
        for one in sent[100:200]:
            writer.write(one)
        with exporting(folder, store) as another:
            arrived += collect(reader, lambda records: len(arrived) + len(records) >= 150)
            another.kill()
            another.wait()
        for one in sent[200:]:
            writer.write(one)
        with exporting(folder, store):
            arrived += collect(reader, lambda records: len(arrived) + len(records) == len(sent))
    assert digest(arrived) == digest(sent)
    assert exports(store) == []


def test_a_slow_reader_misses_records_and_counts_them(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    with exporting(folder, store), reading(store) as reader:
        writer.write(record(0))
        arrived = collect(reader, lambda records: len(records) == 1)
        for number in range(1, 2000):
            writer.write(record(number, 32))
        arrived += collect(reader, lambda _: reader.last == 2000)
        arrived += reader.read(5000)
        assert reader.overwritten > 1000
        assert len(arrived) + reader.overwritten + reader.torn == 2000
        starts = [one.start for one in arrived]
        assert starts == sorted(set(starts)) and starts[-1] == 1999


def test_a_reader_that_nobody_answers_waits_for_nothing(folder: Path, writer: Writer) -> None:
    geometry = Reader.open(writer.path).geometry
    reader = RemoteReader(f"ipc://{folder}/nobody", "log", geometry)
    began = time.monotonic()
    assert reader.read() == [] and not reader.ended
    assert time.monotonic() - began < 0.5
    reader.close()


def test_the_next_answer_is_asked_for_at_once_while_there_are_records(
    folder: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one answer per QUIET_SECONDS arrives; the clock stands still here."""
    monkeypatch.setattr(service, "BATCH_BYTES", 1)
    monkeypatch.chdir(folder / "engine")
    store = announced(folder, writer)
    for number in range(50):
        writer.write(record(number))
    stop = threading.Event()
    exporter = Exporter(store, f"ipc://{folder}/export")
    thread = threading.Thread(target=exporter.run, args=(stop,))
    thread.start()
    geometry = exports(store)[0].logs[writer.path.name]
    reader = RemoteReader(exporter.address, writer.path.name, geometry, clock=lambda: 0.0)
    try:
        collect(reader, lambda records: len(records) == 50)
    finally:
        reader.close()
        stop.set()
        thread.join()


def test_keys_keep_others_out(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    public, secret = make_keys(folder / "keys")
    writer.write(record(1))
    flags = ("tcp://127.0.0.1:*", "--tlt-coordinator-key", str(secret))
    with exporting(folder, store, *flags):
        with reading(store, public) as reader:
            collect(reader, lambda records: len(records) == 1)
        with reading(store) as stranger:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                assert stranger.read() == []
                time.sleep(0.01)


def test_only_announced_logs_are_served(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    secret = Writer.create(1 << 20, WIDTH, "bfloat16", folder / "engine")
    secret.write(record(1))
    stop = threading.Event()
    exporter = Exporter(store, f"ipc://{folder}/export")
    thread = threading.Thread(target=exporter.run, args=(stop,))
    thread.start()
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.set(zmq.LINGER, 0)
            peer.set(zmq.RCVTIMEO, int(1000 * SECONDS))
            peer.connect(exporter.address)
            for data in (b"", b"{}", b'{"log":"x","after":-1}', b"\xff", b'{"log":1,"after":0}'):
                peer.send(data)
            peer.send_multipart([b"two", b"frames"])
            for log in (str(secret.path), "/etc/passwd"):
                peer.send(encode(Request(log, 0)))
                (head,) = peer.recv_multipart()
                assert b'"ended":true' in head
        assert exporter.dropped == 6
    finally:
        stop.set()
        thread.join()
        secret.close()
    assert exports(store) == []


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("tcp://*:7400", "names no machine"),
        ("tcp://0.0.0.0:7400", "names no machine"),
        ("http://host", "not valid"),
        ("ipc://relative", "not valid"),
        ("tcp://127.0.0.1:none", "cannot listen"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_sentence(
    folder: Path, address: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tlt-store", str(folder / "store"), "--address", address]) == 1
    error = capsys.readouterr().err
    assert problem in error and "Traceback" not in error
    assert not list((folder / "store").glob("**/export@*"))


def test_an_exporter_needs_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "tcp://127.0.0.1:*"]) == 2
    assert "--tlt-store" in capsys.readouterr().err


def test_a_feed_reads_an_engine_on_another_machine(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    size = WIDTH // 4
    with exporting(folder, store):
        buffer = Buffer(1 << 20)
        feed = Feed(store, buffer, size, 3, assembled=1 << 20)
        sent = []
        for number in range(12):
            prompt = record(100 * number, 5, PROMPT)
            answer = record(100 * number, 7, END)
            answer = Record(
                prompt.request, prompt.end, answer.tokens, answer.features, 1, answer.flags
            )
            sent += [prompt, answer]
            writer.write(prompt)
            writer.write(answer)
        count, end = 0, time.monotonic() + SECONDS
        while count < len(sent) and time.monotonic() < end:
            count += feed.pump()
            time.sleep(0.001)
        assert feed.status() == {"engines": 1, "remote": 1, "overwritten": 0, "torn": 0}
        assert count == len(sent) and buffer.status()["sequences"] == 12
        # The engine ends, and its announcement with it.
        writer.close()
        for path in (store / announce.FOLDER).glob("engine@*"):
            announce.remove(store, path)
        end = time.monotonic() + SECONDS
        while feed.status()["engines"] and time.monotonic() < end:
            feed.pump()
            time.sleep(0.01)
        assert feed.status()["engines"] == 0
        feed.close()


def test_logs_come_and_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LOOK_SECONDS", 0.01)
    (folder / "engine").mkdir()
    monkeypatch.chdir(folder / "engine")
    store = folder / "store"
    stop = threading.Event()
    exporter = Exporter(store, f"ipc://{folder}/export")
    assert exports(store) == [Export(exporter.address, {})]
    thread = threading.Thread(target=exporter.run, args=(stop,))
    thread.start()
    try:
        log = Writer.create(1 << 20, WIDTH, "bfloat16", folder / "engine")
        announced(folder, log)
        assert wait_for(lambda: list(exports(store)[0].logs) == [log.path.name], SECONDS)
        log.close()
        assert wait_for(lambda: not exports(store)[0].logs, SECONDS)
    finally:
        stop.set()
        thread.join()


def test_the_file_of_a_killed_exporter_is_removed(folder: Path, writer: Writer) -> None:
    store = announced(folder, writer)
    with exporting(folder, store) as process:
        assert len(exports(store)) == 1
        process.kill()
        process.wait()
    assert exports(store) == [] and os.listdir(store / announce.FOLDER) != []


def test_an_exporter_removes_the_file_of_one_that_was_killed(folder: Path, writer: Writer) -> None:
    """Readers are on other machines, and cannot tell that it was."""
    store = announced(folder, writer)
    with exporting(folder, store) as process:
        process.kill()
        process.wait()
    (left,) = (store / announce.FOLDER).glob("export@*")
    Exporter(store, f"ipc://{folder}/export").close()
    assert not left.exists()


def test_of_two_exports_of_a_log_the_newest_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = Geometry.fit(1 << 20, WIDTH, "bfloat16")
    store = folder / "store"
    for age, (name, address) in enumerate((("9", "tcp://b"), ("10", "tcp://a"), ("1", "tcp://c"))):
        monkeypatch.setattr(files, "owned", lambda what, name=name: f"{what}@{name}@elsewhere")
        path = Export(address, {"log": geometry}).write(store)
        os.utime(path, (age, age))
    assert [export.address for export in exports(store)] == ["tcp://b", "tcp://a", "tcp://c"]


def test_announcements_of_other_machines_are_read_once(
    folder: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many engines all exporters would read all their files from the shared store."""
    store = folder / "store"
    monkeypatch.setattr(files, "owned", lambda name: f"{name}@1@elsewhere")
    there = Announcement("/dev/shm/tlt-harvest-elsewhere", "gpu:0", "m", "d", False)
    there.write(store)
    exporter = Exporter(store, f"ipc://{folder}/export")
    try:
        replace(there, harvest=str(writer.path)).write(store)
        exporter._look()
        assert exports(store) == [Export(exporter.address, {})]
    finally:
        exporter.close()
