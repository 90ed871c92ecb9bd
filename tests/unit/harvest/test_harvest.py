"""The harvest log: what is read is what was written, whole, or it is counted as missed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.harvest import reader as reader_module
from tlt_sglang.harvest import writer as writer_module
from tlt_sglang.harvest.assemble import OVERHEAD, Assembler, LoggedSequence
from tlt_sglang.harvest.layout import FEATURE_TYPES, FeatureType, Geometry
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import END, PROMPT, Record, request_key
from tlt_sglang.harvest.segments import remove_stale
from tlt_sglang.harvest.writer import Writer

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 16
A, B = request_key("a"), request_key("b")

OTHER = """
import json, sys
from pathlib import Path
import numpy as np
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import Record, request_key
from tlt_sglang.harvest.writer import Writer

def features(start, count):
    rows = np.arange(start, start + count, dtype=np.uint16)[:, None]
    return rows * np.arange(1, 17, dtype=np.uint16)

"""
"""The start of other processes: like `record` below, in which a feature tells its position."""


def record(
    start: int, count: int, request: bytes = A, version: int = 1, flags: int = 0, width: int = WIDTH
) -> Record:
    tokens = np.arange(start, start + count, dtype=np.int32)
    features = tokens.astype(np.uint16)[:, None] * np.arange(1, width + 1, dtype=np.uint16)
    return Record(request, start, tokens, features, version, flags)


def content(one: Record | LoggedSequence) -> tuple[object, ...]:
    features = one.features.tolist()
    if isinstance(one, Record):
        return one.request.hex(), one.start, one.tokens.tolist(), features, one.version
    return one.request, one.start, one.ids.tolist(), features, one.target_version


def other(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process; reads commands and answers in lines."""
    return subprocess.Popen(
        [sys.executable, "-c", OTHER + textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer.create(40_000, WIDTH, "bfloat16", tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("kind", FEATURE_TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_is_what_was_written(kind: FeatureType, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{kind}{seed}")
    width = chance.randint(1, 40)
    writer = Writer.create(chance.randint(30_000, 60_000), width, kind, tmp_path)
    reader = Reader.open(writer.path)
    values_of = np.random.default_rng(seed)
    written: list[Record] = []
    read: list[Record] = []
    for _ in range(900):
        if chance.random() < 0.9:
            count = chance.randint(0, 30)
            dtype = np.float16 if kind == "float16" else np.uint16
            values = values_of.integers(0, 2**15, (count, 2 * width))
            one = Record(
                request_key(str(chance.randint(0, 5))),
                chance.randint(0, 2**40),
                values[:, 0].astype(np.int32),
                values.astype(dtype)[:, ::2],  # not contiguous
                chance.randint(0, 9),
                chance.choice([0, PROMPT, END]),
            )
            assert writer.write(one)
            written.append(one)
        else:
            before = reader.overwritten
            items = reader.read(chance.randint(1, 60))
            first = reader.last - len(items)
            assert first >= len(read) + before
            assert [content(one) for one in items] == [
                content(one) for one in written[first : first + len(items)]
            ]
            assert [one.flags for one in items] == [
                one.flags for one in written[first : first + len(items)]
            ]
            read += items
    assert len(read) > 50
    assert reader.torn == 0 and reader.overwritten + len(read) == reader.last
    late = Reader.open(writer.path).read(len(written))
    assert 15 < len(late) < len(written)
    assert [content(one) for one in late] == [content(one) for one in written[-len(late) :]]
    writer.close()
    reader.close()


def test_a_reader_that_was_overtaken_counts_what_it_missed(writer: Writer) -> None:
    reader = Reader.open(writer.path)
    for start in range(5000):
        writer.write(record(start, 1))
    items = reader.read(5000)
    assert items[-1].start == 4999
    assert [one.start for one in items] == list(range(items[0].start, 5000))
    assert (reader.overwritten, reader.torn, reader.last) == (items[0].start, 0, 5000)


def test_it_goes_on_after_a_sequence_number(writer: Writer) -> None:
    for start in range(20):
        writer.write(record(start, 1))
    first = Reader.open(writer.path)
    first.read(7)
    second = Reader.open(writer.path, after=first.last)
    assert [one.start for one in second.read()] == list(range(7, 20))


def test_a_record_that_is_overwritten_while_it_is_copied_is_not_given_out(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write(record(0, 4))
    reader = Reader.open(writer.path)
    fences = 0

    def between() -> None:
        nonlocal fences
        fences += 1
        if fences == 2:  # after the copy, before it is verified
            for start in range(1000, 2000):
                writer.write(record(start, 4))

    monkeypatch.setattr(reader_module, "fence", between)
    items = reader.read(5000)
    assert reader.torn == 1
    assert items[0].start > 1000 and items[-1].start == 1999
    assert reader.torn + reader.overwritten + len(items) == 1001


def test_a_reader_beside_a_writer_in_a_hurry_gets_whole_records(writer: Writer) -> None:
    process = other(
        """
        reader = Reader.open(Path(sys.argv[1]))
        print("ready", flush=True)
        read = wrong = 0
        while not reader.ended:
            for one in reader.read(7):
                read += 1
                tokens = np.arange(one.start, one.end)
                wrong += not (one.tokens == tokens).all()
                wrong += not (one.features == features(one.start, len(one))).all()
                wrong += one.request != request_key(str(one.start)) or one.version != one.start
        print(json.dumps([read, wrong, reader.overwritten, reader.torn]), flush=True)
        """,
        writer.path,
    )
    with process:
        assert line(process) == "ready"
        for start in range(12_000):
            writer.write(record(start, 1 + start % 60, request_key(str(start)), start))
        writer.close()
        read, wrong, overwritten, torn = json.loads(line(process))
    assert wrong == 0
    assert read > 0 and read + overwritten + torn == 12_000
    assert not writer.path.exists()


def test_damaged_bytes_never_make_a_wrong_record(writer: Writer) -> None:
    for start in range(0, 400, 4):
        writer.write(record(start, 4))
    chance = random.Random(0)
    whole, copy = writer.path.read_bytes(), writer.path.with_name("damaged")
    fields = {(one.start, *one.tokens) for one in Reader.open(writer.path).read(100)}
    assert len(fields) == 100
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 30)):
            damaged[chance.randrange(64, len(damaged))] ^= 1 << chance.randrange(8)
        copy.write_bytes(damaged)
        reader = Reader.open(copy)
        items = {(one.start, *one.tokens) for one in reader.read(1000)}
        assert items <= fields
        reader.close()


def test_between_any_two_parts_of_a_write_the_log_is_whole(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        reader = Reader.open(writer.path)
        starts = [one.start for one in reader.read(1000)]
        assert (reader.torn, reader.overwritten) == (0, 0)
        assert starts == list(range(writer.written))[-len(starts) :] or not writer.written
        reader.close()

    monkeypatch.setattr(writer_module, "fence", look)
    for start in range(150):
        writer.write(record(start, 20))
    assert looks == 300


def test_a_record_that_is_not_the_one_looked_for_is_not_given_out(writer: Writer) -> None:
    for start in range(0, 400, 100):
        writer.write(record(start, 4))
    damaged = bytearray(writer.path.read_bytes())
    geometry = Geometry.unpack(bytes(damaged), len(damaged))
    slots = memoryview(damaged)[4096 : 4096 + 8 * geometry.slots].cast("Q")
    slots[2] = slots[4]  # the second record's place
    damaged[geometry.ring_start + slots[3] + geometry.record_size(4) - 8] ^= 1  # the third's end
    copy = writer.path.with_name("damaged")
    copy.write_bytes(damaged)
    reader = Reader.open(copy)
    assert [one.start for one in reader.read()] == [0, 300]
    assert (reader.torn, reader.overwritten) == (2, 0)


def test_readers_killed_at_any_moment_leave_nothing_and_stop_nobody(writer: Writer) -> None:
    before = sorted(writer.path.parent.iterdir())
    process = other(
        """
        reader = Reader.open(Path(sys.argv[1]))
        print("ready", flush=True)
        while True:
            reader.read(3)
            reader.ended
        """,
        writer.path,
    )
    assert line(process) == "ready"
    for start in range(2000):
        assert writer.write(record(start, 4))
        if start == 1000:
            kill(process)
    assert sorted(writer.path.parent.iterdir()) == before
    assert Reader.open(writer.path).read(1000)[-1].start == 1999


def test_a_writer_that_is_killed_has_ended_and_its_log_is_removed(
    writer: Writer, tmp_path: Path
) -> None:
    process = other(
        """
        writer = Writer.create(40_000, 16, "bfloat16", Path(sys.argv[1]))
        writer.write(Record(request_key("a"), 5, np.ones(3, np.int32), features(5, 3), 2))
        print(writer.path, flush=True)
        sys.stdin.read()
        """,
        tmp_path,
    )
    path = Path(line(process))
    reader = Reader.open(path)
    assert remove_stale(tmp_path) == [] and path.exists()
    kill(process)
    assert not reader.ended  # there is something to read
    assert [one.start for one in reader.read()] == [5]
    assert reader.ended
    assert remove_stale(tmp_path) == [path]
    assert list(tmp_path.iterdir()) == [writer.path]
    assert reader.ended and not Reader.open(writer.path).ended


def test_a_log_that_is_being_made_is_not_taken_for_a_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    removed: list[Path] = []

    def flock(file: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not removed:
            removed.extend(remove_stale(tmp_path))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    writer = Writer.create(40_000, WIDTH, "float16", tmp_path)
    assert len(removed) == 1
    assert list(tmp_path.iterdir()) == [writer.path] != removed
    writer.close()


def test_only_its_owner_may_open_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        writer = Writer.create(40_000, WIDTH, "float16", tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(writer.path.stat().st_mode) == 0o600
    assert writer.path.stat().st_blocks * 512 >= writer.path.stat().st_size > 39_000
    writer.close()


def test_a_closed_log_is_gone_but_can_be_read_to_its_end(writer: Writer) -> None:
    writer.write(record(0, 4))
    reader = Reader.open(writer.path)
    writer.close()
    writer.close()
    assert not writer.path.exists()
    assert not reader.ended
    items = reader.read()
    assert reader.ended and reader.read() == []
    reader.close()
    reader.close()
    assert content(items[0]) == content(record(0, 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"x" + data[1:], "is not a harvest log, or not ready yet"),
        (lambda data: b"", "is not a harvest log, or not ready yet"),
        (lambda data: data[:8] + b"\7" + data[9:], "is a harvest log of format 7"),
        (lambda data: data[:12] + b"\7" + data[13:], "is a damaged harvest log"),
        (lambda data: data[:-64], "is a truncated harvest log"),
    ],
)
def test_another_file_is_refused_with_a_sentence(change: Any, says: str, writer: Writer) -> None:
    path = writer.path.with_name("other")
    path.write_bytes(change(writer.path.read_bytes()))
    with pytest.raises(EnvironmentProblem, match=says) as error:
        Reader.open(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_what_is_no_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EnvironmentProblem, match="is its engine running"):
        Reader.open(tmp_path / "missing")
    for name in ("", "pipe"):
        with pytest.raises(EnvironmentProblem, match="is not a regular file of this user"):
            Reader.open(tmp_path / name)


def test_a_full_memory_is_said_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EnvironmentProblem, match=r"no room for a harvest log of 2\.00 GB"):
        Writer.create(2_000_000_000, WIDTH, "float16", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_folder_that_is_missing_or_a_log_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="A harvest log cannot be created"):
        Writer.create(40_000, WIDTH, "float16", tmp_path / "missing")
    with pytest.raises(ConfigError, match="too small for features of 4096 numbers"):
        Writer.create(30_000, 4096, "float16", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [9_000, 40_000, 1_000_003, 8 * 10**9])
def test_a_log_is_never_larger_than_allowed(size: int) -> None:
    fitted = Geometry.fit(size, 64, "float16")
    assert size - 2 * 64 < fitted.file_size <= size
    assert Geometry.unpack(fitted.pack(1).ljust(4096, b"\0"), fitted.file_size) == fitted


def test_a_record_that_is_too_large_is_dropped_and_counted(writer: Writer) -> None:
    assert not writer.write(record(0, 500))
    assert writer.write(record(0, 50))
    assert (writer.written, writer.too_large, writer.dropped) == (1, 1, 1)
    assert [len(one) for one in Reader.open(writer.path).read()] == [50]


def test_a_request_is_sampled_wholly_or_not_at_all(writer: Writer) -> None:
    keys = [request_key(str(number)) for number in range(400)]

    def taken(fraction: float) -> set[bytes]:
        writer.sampling = fraction
        rounds = [{key for key in keys if writer.write(record(at, 1, key))} for at in range(3)]
        assert rounds[0] == rounds[1] == rounds[2]
        return rounds[0]

    few, many = taken(0.2), taken(0.6)
    assert 50 < len(few) < 110 and 200 < len(many) < 280
    assert few < many
    assert taken(0.0) == set() and taken(1.0) == set(keys)
    assert writer.dropped == writer.sampled_out == 3 * (1600 - len(few) - len(many) - 400)


def test_features_of_another_size_or_type_are_refused(writer: Writer) -> None:
    with pytest.raises(ValueError, match="features of 3 uint16 a token in a log of 16 bfloat16"):
        writer.write(record(0, 2, width=3))
    one = record(0, 2)
    with pytest.raises(ValueError, match="float16 a token"):
        writer.write(Record(A, 0, one.tokens, one.features.astype(np.float16), 1))
    assert Reader.open(writer.path).read() == []


@pytest.mark.parametrize(
    "change",
    [
        {"request": b"short"},
        {"start": -1},
        {"version": -1},
        {"flags": 8},
        {"tokens": np.zeros(3, np.int32)},
        {"tokens": np.zeros(4, np.int64)},
        {"features": np.zeros((5, WIDTH), np.uint16)},
        {"features": np.zeros(4, np.uint16)},
    ],
)
def test_parts_that_do_not_belong_together_make_no_record(change: dict[str, Any]) -> None:
    one = record(0, 4)
    names = ("request", "start", "tokens", "features", "version", "flags")
    with pytest.raises(ValueError):
        Record(**{name: getattr(one, name) for name in names} | change)


def test_records_that_follow_each_other_make_a_span() -> None:
    assembler = Assembler(1 << 20)
    parts = [record(0, 6, flags=PROMPT), record(6, 2, flags=PROMPT), record(8, 1), record(9, 4)]
    for part in parts:
        assert assembler.add(part) == []
        assert assembler.add(record(part.start, len(part), B)) == []
    (sequence,) = assembler.add(record(13, 0, flags=END))
    assert content(sequence) == content(record(0, 13))
    assert (sequence.end, sequence.prompt_length, sequence.ended) == (13, 8, True)
    (left,) = assembler.flush()
    assert content(left) == content(record(0, 13, B)) and not left.ended
    assert assembler.size == 0 and assembler.flush() == []


def test_a_response_is_returned_while_it_grows() -> None:
    """But for its newest record, and seldom enough that little is copied twice."""
    assembler, returned = Assembler(1 << 24), list[LoggedSequence]()
    assembler.add(record(0, 50, flags=PROMPT))
    for start in range(50, 1050, 5):
        assert assembler.add(record(start, 5)) == []
        returned += assembler.grown(20)
    assert assembler.grown(20) == []
    for one in returned:
        assert content(one) == content(record(0, len(one)))
        assert (one.prompt_length, one.ended) == (50, False)
    lengths = [one.response_length for one in returned]
    assert lengths[:3] == [20, 40, 60] and lengths[-1] > 1000 / 1.5
    assert sum(lengths) < 3 * 1000
    (whole,) = assembler.add(record(1050, 0, flags=END))
    assert content(whole) == content(record(0, 1050)) and assembler.size == 0


def test_a_gap_another_version_or_a_step_back_begins_another_span() -> None:
    assembler = Assembler(1 << 20)
    sequences = [
        sequence
        for one in [
            record(0, 4),
            record(6, 2),  # a gap
            record(8, 1, version=2),  # another version
            record(9, 1, version=2),
            record(3, 9, version=2),  # retracted, and prefilled anew
            record(12, 1, version=2, flags=END),
        ]
        for sequence in assembler.add(one)
    ]
    assert [(sequence.start, sequence.end, sequence.target_version) for sequence in sequences] == [
        (0, 4, 1),
        (6, 8, 1),
        (8, 10, 2),
        (3, 13, 2),
    ]
    assert [sequence.ended for sequence in sequences] == [False, False, False, True]
    assert assembler.size == 0


def test_what_waits_is_bounded_and_nothing_is_lost() -> None:
    chance = random.Random(0)
    most = 20 * (OVERHEAD + 3 * (4 + 2 * WIDTH))
    assembler = Assembler(most)
    lengths = {request_key(str(number)): 0 for number in range(12)}
    sequences: list[LoggedSequence] = []
    for _ in range(2000):
        request = chance.choice(list(lengths))
        count = chance.randint(1, 3)
        sequences += assembler.add(record(lengths[request], count, request))
        lengths[request] += count
        assert assembler.size <= most
    sequences += assembler.flush()
    for request, length in lengths.items():
        parts = [sequence for sequence in sequences if sequence.request == request.hex()]
        assert len(parts) > 1
        joined = np.concatenate([part.ids for part in parts])
        assert joined.tolist() == list(range(length))
        assert all(
            content(part) == content(record(part.start, len(part), request)) for part in parts
        )


def test_neither_end_needs_torch_or_sglang() -> None:
    process = other(
        """
        import tlt_sglang.harvest.assemble
        print([name for name in ("torch", "sglang", "zmq") if name in sys.modules])
        """
    )
    with process:
        assert line(process) == "[]"
