"""Other transports of harvest records than that of `tlt export`, with the interface of its readers.

Arrow Flight streams each record from the memory that it was copied into, without another copy in
Python. Through Ray's object store an actor on one node returns batches, and an actor on another
node, with an object store of its own, asks for the next one before it reads one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import ray
from pyarrow import flight
from ray.cluster_utils import Cluster

from benchmarks.harness.provenance import REPOSITORY
from tlt_sglang.exporter.service import BATCH_BYTES
from tlt_sglang.harvest import layout
from tlt_sglang.harvest.layout import HEAD, Geometry
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import Record

SCHEMA = pyarrow.schema([("records", pyarrow.large_binary())])
ADDRESS = "flight"
"""The file of a store with the address of its Flight server."""
IDLE_SECONDS = 0.0001
STORE_BYTES = 512 << 20
"""Ray's object store of a node."""
AHEAD = 2
"""Batches that are asked for before they are read."""


def geometry_of(log: Path) -> Geometry:
    """Return the dimensions of a log."""
    reader = Reader.open(log)
    reader.close()
    return reader.geometry


class Received:
    """A receiver of the records of one log; subclasses fetch them."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.overwritten = self.torn = self.last = 0

    def fetch(self) -> list[npt.NDArray[np.uint8]]:
        """Return the next records as they lie in the log; may wait for them."""
        raise NotImplementedError

    def read(self) -> list[Record]:
        """Return the next records, verified."""
        records = []
        for data in self.fetch():
            number: int = HEAD.unpack_from(data.data)[0]
            self.overwritten += number - self.last - 1
            self.last = number
            record = layout.unpack(self.geometry, data, number)
            if record is None:
                self.torn += 1
            else:
                records.append(record)
        return records

    def close(self) -> None:
        """Close the connection."""


class FlightService(flight.FlightServerBase):
    """Streams a log to each client."""

    def __init__(self, log: Path, is_over: Callable[[], bool]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._log, self._is_over = log, is_over

    def do_get(self, context: object, ticket: object) -> flight.GeneratorStream:
        """Return the records of the log, from its oldest one on, until the benchmark is over."""
        return flight.GeneratorStream(SCHEMA, self._batches())

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        reader = Reader.open(self._log)
        while not self._is_over():
            records = reader.read_bytes(1)
            for data in records:
                ends = pyarrow.py_buffer(np.array([0, len(data)], np.int64))
                buffers = [None, ends, pyarrow.py_buffer(data)]
                array = pyarrow.LargeBinaryArray.from_buffers(pyarrow.large_binary(), 1, buffers)
                yield pyarrow.RecordBatch.from_arrays([array], schema=SCHEMA)
            if not records:
                time.sleep(IDLE_SECONDS)


def serve_flight(log: Path, store: Path, stop: Event) -> None:
    """Serve a log until `stop` is set, at the address in the store's file ADDRESS."""
    with FlightService(log, stop.is_set) as service:
        temporary = store / f".{ADDRESS}"
        temporary.write_text(f"grpc://127.0.0.1:{service.port}")
        temporary.replace(store / ADDRESS)
        stop.wait()


class FlightReader(Received):
    """A client of FlightService."""

    def __init__(self, address: str, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._client = flight.connect(address)
        self._stream = self._client.do_get(flight.Ticket(b""))

    def fetch(self) -> list[npt.NDArray[np.uint8]]:
        """Return the next record."""
        column = self._stream.read_chunk().data.column(0)
        return [np.frombuffer(column.buffers()[2], np.uint8)]

    def close(self) -> None:
        """End the stream."""
        self._stream.cancel()
        self._client.close()


class RayExporter:
    """The actor that reads the log."""

    def __init__(self, log: Path) -> None:
        self._reader = Reader.open(log)

    def read(self) -> list[npt.NDArray[np.uint8]]:
        """Return the next records, as many as an answer of `tlt export` has."""
        while not (records := self._reader.read_bytes(BATCH_BYTES)):
            time.sleep(IDLE_SECONDS)
        return records


class RayReader(Received):
    """Reads what an actor RayExporter returns."""

    def __init__(self, exporter: Any, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._exporter = exporter
        self._asked = [exporter.read.remote() for _ in range(AHEAD)]

    def fetch(self) -> list[npt.NDArray[np.uint8]]:
        """Return the records of the next batch."""
        batch: list[npt.NDArray[np.uint8]] = ray.get(self._asked.pop(0))
        self._asked.append(self._exporter.read.remote())
        return batch


Count = Callable[[Received, Path, float], int]
"""Counts the records that a reader receives in so many seconds; the path is that of `taken`."""


class _Counter:
    """The actor that receives the records."""

    def run(
        self, count: Count, exporter: Any, geometry: Geometry, taken: Path, seconds: float
    ) -> int:
        return count(RayReader(exporter, geometry), taken, seconds)


def count_over_ray(count: Count, log: Path, taken: Path, seconds: float) -> int:
    """Return what `count` returns on another node of a Ray cluster than that of the log."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # the cluster's workers have it from here
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        cluster = Cluster(shutdown_at_exit=False)
        try:
            sizes = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
            cluster.add_node(num_cpus=0, temp_dir=folder, **sizes)
            for name in ("here", "there"):
                cluster.add_node(num_cpus=1, resources={name: 1}, **sizes)
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            actor = ray.remote(num_cpus=1)
            exporter = actor(RayExporter).options(resources={"here": 1}).remote(log)
            counter = actor(_Counter).options(resources={"there": 1}).remote()
            run = counter.run.remote(count, exporter, geometry_of(log), taken, seconds)
            records: int = ray.get(run)
            return records
        finally:
            ray.shutdown()
            cluster.shutdown()
