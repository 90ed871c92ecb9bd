"""Throughput of hidden states from a harvest log to a process that could be on another machine.

    python benchmarks/bench_export.py [--quick] [--json PATH] [--prompts FILE]

One process writes a log as fast as a reader takes it, for a target with a hidden size of 4,096 and
EAGLE-3 (32 kB a token): records of a prefill (512 tokens) or of a decode step (4 tokens). Another
one reads it: the log itself, as a sidecar on the same machine does; through `tlt export`, over TCP
on the loopback interface, or over a Unix socket; or over Arrow Flight, or through Ray's object
store between two nodes of a cluster (benchmarks/harness/transports.py). In turn, and the median of
all.

local_gb_s           A reader on the same machine, records of 512 tokens.
tcp_gb_s             Through an exporter over TCP.
curve_gb_s           Over TCP, encrypted with CURVE keys.
ipc_gb_s             Through an exporter over a Unix socket.
flight_gb_s          Over Arrow Flight, in the place of an exporter.
ray_gb_s             Through Ray's object store, in the place of an exporter.
tcp_small_gb_s       Over TCP, records of 4 tokens.
local_small_gb_s     A reader on the same machine, records of 4 tokens.
engine_exported      Tokens a second of an engine of one thread with the small model, eight
                     requests at a time, while an exporter serves its log to a reader, over those
                     without; a ratio.
zstd_share           Size of the engine's features once compressed by Zstandard (level 1, the high
                     bytes of all numbers before the low ones), over their size.
zstd_gb_s            GB of features that one core compresses and decompresses a second.

`--prompts` are those of the engine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

import numpy as np
import zstandard

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.program import BenchmarkError, say
from benchmarks.harness.prompts import PROMPTS, Prompt, load_prompts
from benchmarks.harness.server import Server
from benchmarks.harness.transports import (
    ADDRESS,
    FlightReader,
    count_over_ray,
    geometry_of,
    serve_flight,
)
from tlt_sglang.coordinator.endpoints import make_keys
from tlt_sglang.exporter.messages import exports
from tlt_sglang.exporter.remote import RemoteReader
from tlt_sglang.exporter.service import Exporter
from tlt_sglang.harvest import announce
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import Record, request_key
from tlt_sglang.harvest.writer import Writer

FEATURES = 4 * 4096
"""Numbers of a token: three hidden states for the drafter, and one for the head."""
LOG_BYTES = 1 << 30
LARGE, SMALL = 512, 4
START_SECONDS = 30.0
FOLLOW_SECONDS = 0.02
"""Time between two reads of a reader that follows an engine."""
REQUESTS = 8
COMPRESSED_BYTES = 32 << 20
"""Features of the engine that are compressed, at most."""
Something = TypeVar("Something")

spawn = multiprocessing.get_context("spawn")


class Readable(Protocol):
    """A reader of a log, here or on another machine."""

    overwritten: int
    torn: int

    @property
    def last(self) -> int:
        """The number of the last record that was read or skipped."""

    def read(self) -> list[Record]:
        """Return new records."""

    def close(self) -> None:
        """Close it."""


def opened(taken: Path) -> np.memmap[tuple[int], np.dtype[np.int64]]:
    """Return the number of the last record that has arrived, shared by all processes."""
    return np.memmap(taken, np.int64, "r+" if taken.exists() else "w+", shape=(1,))


def write(store: Path, tokens: int, path: Path, stop: Event) -> None:
    """Write records of so many tokens, a quarter of the log ahead of the reader at most."""
    taken = opened(path)
    writer = Writer.create(LOG_BYTES, FEATURES, "bfloat16")
    features = np.random.default_rng(0).integers(0, 1 << 16, (tokens, FEATURES), np.uint16)
    record = Record(request_key("r"), 0, np.arange(tokens, dtype=np.int32), features, 1)
    ahead = LOG_BYTES // 4 // features.nbytes
    Announcement(str(writer.path), "cpu:0", "model", "drafter", False).write(store)
    try:
        while not stop.is_set():
            if writer.written < taken[0] + ahead:
                writer.write(record)
            else:
                time.sleep(0.0001)
    finally:
        writer.close()


def export(store: Path, address: str, stop: Event, key: Path | None = None) -> None:
    """Run an exporter."""
    exporter, end = Exporter(store, address, key), threading.Event()
    thread = threading.Thread(target=exporter.run, args=(end,))
    thread.start()
    stop.wait()
    end.set()
    thread.join()


def measure(way: str, tokens: int, seconds: float) -> float:
    """Return the GB of features that arrive a second."""
    with TemporaryDirectory(prefix="tlt-", dir="/tmp") as folder:
        store, stop, taken = Path(folder) / "store", spawn.Event(), Path(folder) / "taken"
        opened(taken)
        address = f"ipc://{folder}/export" if way == "ipc" else "tcp://127.0.0.1:*"
        key, secret = make_keys(Path(folder) / "keys") if way == "curve" else (None, None)
        processes = [spawn.Process(target=write, args=(store, tokens, taken, stop))]
        if way in ("tcp", "curve", "ipc"):
            processes.append(spawn.Process(target=export, args=(store, address, stop, secret)))
        for process in processes:
            process.start()
        try:
            log = wait_for(lambda: next((Path(e.harvest) for e in announce.read(store)), None))
            if way == "flight":
                processes.append(spawn.Process(target=serve_flight, args=(log, store, stop)))
                processes[-1].start()
            if way == "ray":
                records = count_over_ray(count, log, taken, seconds)
            else:
                reader = wait_for(partial(open_reader, store, log, way, key))
                records = count(reader, taken, seconds)
        finally:
            stop.set()
            for process in processes:
                process.join()
    return records * tokens * FEATURES * 2 / seconds / 1e9


def open_reader(store: Path, log: Path, way: str, key: Path | None = None) -> Readable | None:
    """Return a reader of the log; None while what serves it is not there yet."""
    if way == "local":
        return Reader.open(log)
    if way == "flight":
        if not (store / ADDRESS).exists():
            return None
        return FlightReader((store / ADDRESS).read_text(), geometry_of(log))
    for one in exports(store):
        for path, geometry in one.logs.items():
            return RemoteReader(one.address, path, geometry, key)
    return None


def wait_for(opened: Callable[[], Something | None]) -> Something:
    """Return what `opened` returns as soon as there is something."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        something = opened()
        if something is not None:
            return something
        time.sleep(0.05)
    raise BenchmarkError("The log was not exported in time.")


def count(reader: Readable, path: Path, seconds: float) -> int:
    """Return how many records arrive in so many seconds, once the first one has."""
    taken = opened(path)
    try:
        while not reader.read():
            time.sleep(0.001)
        began, records = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            new = len(reader.read())
            records += new
            taken[0] = reader.last
            if not new:
                time.sleep(0.0001)
        if reader.overwritten or reader.torn:
            raise BenchmarkError(f"{reader.overwritten + reader.torn} records were missed.")
        return records
    finally:
        reader.close()


def compress(features: bytes) -> tuple[float, float]:
    """Return the share of bfloat16 `features` that is left by compression, and GB a second."""
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    began = time.perf_counter()
    apart = np.frombuffer(features, np.uint8).reshape(-1, 2).T.tobytes()
    packed = packer.compress(apart)
    again = np.frombuffer(unpacker.decompress(packed), np.uint8).reshape(2, -1).T.tobytes()
    seconds = time.perf_counter() - began
    if again != features:
        raise BenchmarkError("The features were not what they had been before.")
    return len(packed) / len(features), len(features) / seconds / 1e9


@contextlib.contextmanager
def followed(store: Path) -> Iterator[list[bytes]]:
    """Run an exporter, and a reader that takes what it serves; yields features that it has read."""
    stop, features = spawn.Event(), list[bytes]()
    exporter = spawn.Process(target=export, args=(store, "tcp://127.0.0.1:*", stop))
    exporter.start()

    def follow() -> None:
        size = 0
        while not stop.is_set():
            for record in reader.read():
                if size < COMPRESSED_BYTES:
                    features.append(record.features.tobytes())
                    size += record.features.nbytes
            time.sleep(FOLLOW_SECONDS)

    try:
        reader = wait_for(partial(open_reader, store, Path(), "tcp"))
        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield features
        finally:
            stop.set()
            thread.join()
            reader.close()
    finally:
        stop.set()
        exporter.join()


def measure_engine(
    prompts: Sequence[Prompt], rounds: int, tokens: int, logs: Path
) -> tuple[dict[str, list[float]], bytes]:
    """Return the tokens a second of an engine, `alone` and `exported`, in each round, and features
    that it has exported."""
    features = b""
    rates: dict[str, list[float]] = {"alone": [], "exported": []}
    with TemporaryDirectory(prefix="tlt-", dir="/tmp") as folder:
        store = Path(folder) / "store"
        flags = ["--model", "smollm2-135m", "--device", "cpu", "--adaptive-spec"]
        flags += ["--tlt-strategies", "eagle3:3x1x4", "--tlt-store", str(store)]
        with Server("engine", [*flags, "--max-total-tokens", "20000"], 1, logs) as server:
            server.wait_started()
            server.generate(prompts, tokens)
            for number in range(rounds):
                for name in sorted(rates, reverse=bool(number % 2)):
                    exported = followed(store) if name == "exported" else contextlib.nullcontext()
                    with exported as read:
                        sample = server.generate(prompts, tokens)
                    if read is not None:
                        features = b"".join(read)
                        if not features:
                            raise BenchmarkError("The reader has had no record of the engine.")
                    rates[name].append(sample.tokens / sample.seconds)
                    say(f"{number + 1}/{rounds} {name}: {rates[name][-1]:.1f} tokens/s")
    return rates, features


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_export", lambda logs: _benchmark(arguments, logs))


def _benchmark(argv: Sequence[str], logs: Path) -> None:
    parser = program.Parser("bench_export", __doc__, "Fewer and shorter repetitions")
    args = parser.parse_args(argv)
    prompts = (load_prompts(args.prompts) if args.prompts else list(PROMPTS))[:REQUESTS]
    path = args.json or provenance.result_path("bench_export")
    program.check_writable(path)
    repetitions, seconds = (1, 1.0) if args.quick else (5, 3.0)
    cases = {
        "local_gb_s": ("local", LARGE),
        "tcp_gb_s": ("tcp", LARGE),
        "curve_gb_s": ("curve", LARGE),
        "ipc_gb_s": ("ipc", LARGE),
        "flight_gb_s": ("flight", LARGE),
        "ray_gb_s": ("ray", LARGE),
        "local_small_gb_s": ("local", SMALL),
        "tcp_small_gb_s": ("tcp", SMALL),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repetitions):
        for name, (way, tokens) in cases.items():
            rates[name].append(measure(way, tokens, seconds))
            say(f"{number + 1}/{repetitions} {name}: {rates[name][-1]:.2f}")
    engine, features = measure_engine(prompts, *((2, 64) if args.quick else (8, 256)), logs)
    summary = {name: round(statistics.median(each), 3) for name, each in rates.items()}
    speeds = zip(engine["exported"], engine["alone"], strict=True)
    summary["engine_exported"] = round(statistics.median(one / other for one, other in speeds), 4)
    compressed = [compress(features) for _ in range(repetitions)]
    summary["zstd_share"] = round(compressed[0][0], 4)
    summary["zstd_gb_s"] = round(statistics.median(rate for _, rate in compressed), 3)
    print(program.table(("figure", "value"), [(k, f"{v:.2f}") for k, v in summary.items()]))
    settings = {"features": FEATURES, "seconds": seconds, "quick": args.quick}
    document = provenance.document("export", summary, settings=settings, rates=rates | engine)
    provenance.write_json(path, document)
    say(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
