"""The transports that bench_export compares: what arrives is what was logged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.bench_export import compress
from benchmarks.harness.transports import FlightReader, FlightService, Received, geometry_of
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import Record, request_key
from tlt_sglang.harvest.writer import Writer

FEATURES = 64


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer.create(1 << 20, FEATURES, "bfloat16")
    yield made
    made.close()


@pytest.fixture
def records(writer: Writer) -> list[Record]:
    """Records of different lengths, in the log."""
    rng = np.random.default_rng(0)
    made = []
    for count in (4, 100, 1):
        features = rng.integers(0, 1 << 16, (count, FEATURES), np.uint16)
        tokens = rng.integers(0, 99, count, np.int32)
        made.append(Record(request_key("r"), count, tokens, features, 1))
        writer.write(made[-1])
    return made


def collect(read: Callable[[], list[Record]], count: int) -> list[Record]:
    arrived: list[Record] = []
    while len(arrived) < count:
        arrived += read()
    return arrived


def assert_equal(arrived: list[Record], expected: list[Record]) -> None:
    for one, other in zip(arrived, expected, strict=True):
        assert (one.request, one.start, one.version) == (other.request, other.start, other.version)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.features, other.features)


def test_records_arrive_over_arrow_flight(writer: Writer, records: list[Record]) -> None:
    stop = threading.Event()
    with FlightService(writer.path, stop.is_set) as service:
        reader = FlightReader(f"grpc://127.0.0.1:{service.port}", geometry_of(writer.path))
        arrived = collect(reader.read, len(records))
        stop.set()
        reader.close()
    assert_equal(arrived, records)
    assert (reader.last, reader.overwritten, reader.torn) == (3, 0, 0)


def test_a_damaged_record_is_counted(writer: Writer, records: list[Record]) -> None:
    reader = Reader.open(writer.path)
    data = reader.read_bytes(1 << 20)
    reader.close()
    data[1][70] ^= 1

    class Damaged(Received):
        def fetch(self) -> list[npt.NDArray[np.uint8]]:
            return data

    damaged = Damaged(geometry_of(writer.path))
    assert_equal(damaged.read(), [records[0], records[2]])
    assert damaged.torn == 1


def test_what_was_compressed_comes_back() -> None:
    features = np.repeat(np.arange(1 << 10, dtype=np.uint16), 16).tobytes()
    share, rate = compress(features)
    assert 0 < share < 0.2 and rate > 0
