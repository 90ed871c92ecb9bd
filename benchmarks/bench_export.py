"""Throughput of hidden states from a harvest log to a process that could be on another machine.

    python benchmarks/bench_export.py [--quick] [--json PATH] [--prompts FILE]

One process writes a log as fast as a reader takes it, for a target with a hidden size of 4,096 and
EAGLE-3 (32 kB a token): records of a prefill (512 tokens) or of a decode step (4 tokens). Another
one reads it: the log itself, as a sidecar on the same machine does, or through `tlt export`, over
TCP on the loopback interface, or over a Unix socket. In turn, and the median of all.

local_gb_s           A reader on the same machine, records of 512 tokens.
tcp_gb_s             Through an exporter over TCP.
ipc_gb_s             Through an exporter over a Unix socket.
tcp_small_gb_s       Over TCP, records of 4 tokens.
local_small_gb_s     A reader on the same machine, records of 4 tokens.
engine_exported      Tokens a second of an engine of one thread with the small model, eight
                     requests at a time, while an exporter serves its log to a reader, over those
                     without; a ratio.

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
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.program import BenchmarkError, say
from benchmarks.harness.prompts import PROMPTS, Prompt, load_prompts
from benchmarks.harness.server import Server
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

spawn = multiprocessing.get_context("spawn")


def write(store: Path, tokens: int, taken: object, stop: Event) -> None:
    """Write records of so many tokens, a quarter of the log ahead of the reader at most."""
    writer = Writer.create(LOG_BYTES, FEATURES, "bfloat16")
    features = np.random.default_rng(0).integers(0, 1 << 16, (tokens, FEATURES), np.uint16)
    record = Record(request_key("r"), 0, np.arange(tokens, dtype=np.int32), features, 1)
    ahead = LOG_BYTES // 4 // features.nbytes
    Announcement(str(writer.path), "cpu:0", "model", "drafter", False).write(store)
    try:
        while not stop.is_set():
            if writer.written < taken.value + ahead:  # type: ignore[attr-defined]
                writer.write(record)
            else:
                time.sleep(0.0001)
    finally:
        writer.close()


def export(store: Path, address: str, stop: Event) -> None:
    """Run an exporter."""
    exporter, end = Exporter(store, address), threading.Event()
    thread = threading.Thread(target=exporter.run, args=(end,))
    thread.start()
    stop.wait()
    end.set()
    thread.join()


def measure(way: str, tokens: int, seconds: float) -> float:
    """Return the GB of features that arrive a second."""
    with TemporaryDirectory(prefix="tlt-", dir="/tmp") as folder:
        store, stop, taken = Path(folder) / "store", spawn.Event(), spawn.Value("q", 0, lock=False)
        address = "tcp://127.0.0.1:*" if way == "tcp" else f"ipc://{folder}/export"
        processes = [spawn.Process(target=write, args=(store, tokens, taken, stop))]
        if way != "local":
            processes.append(spawn.Process(target=export, args=(store, address, stop)))
        for process in processes:
            process.start()
        try:
            reader = wait_for(lambda: open_reader(store, way))
            records = count(reader, taken, seconds)
        finally:
            stop.set()
            for process in processes:
                process.join()
    return records * tokens * FEATURES * 2 / seconds / 1e9


def open_reader(store: Path, way: str) -> Reader | RemoteReader | None:
    """Return a reader of the log; None while it is not there yet."""
    if way == "local":
        engines = announce.read(store)
        return Reader.open(Path(engines[0].harvest)) if engines else None
    for one in exports(store):
        for log, geometry in one.logs.items():
            return RemoteReader(one.address, log, geometry)
    return None


def wait_for(opened: Callable[[], Reader | RemoteReader | None]) -> Reader | RemoteReader:
    """Return the reader as soon as there is one."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        reader = opened()
        if reader is not None:
            return reader
        time.sleep(0.05)
    raise BenchmarkError("The log was not exported in time.")


def count(reader: Reader | RemoteReader, taken: object, seconds: float) -> int:
    """Return how many records arrive in so many seconds, once the first one has."""
    try:
        while not reader.read():
            time.sleep(0.001)
        began, records = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            new = len(reader.read())
            records += new
            taken.value = reader.last  # type: ignore[attr-defined]
            if not new:
                time.sleep(0.0001)
        if reader.overwritten or reader.torn:
            raise BenchmarkError(f"{reader.overwritten + reader.torn} records were missed.")
        return records
    finally:
        reader.close()


@contextlib.contextmanager
def followed(store: Path) -> Iterator[list[int]]:
    """Run an exporter, and a reader that takes what it serves; yields the sizes of its reads."""
    stop, sizes = spawn.Event(), list[int]()
    exporter = spawn.Process(target=export, args=(store, "tcp://127.0.0.1:*", stop))
    exporter.start()

    def follow() -> None:
        while not stop.is_set():
            sizes.append(len(reader.read()))
            time.sleep(FOLLOW_SECONDS)

    try:
        reader = wait_for(lambda: open_reader(store, "tcp"))
        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield sizes
        finally:
            stop.set()
            thread.join()
            reader.close()
    finally:
        stop.set()
        exporter.join()


def measure_engine(
    prompts: Sequence[Prompt], rounds: int, tokens: int, logs: Path
) -> dict[str, list[float]]:
    """Return the tokens a second of an engine, `alone` and `exported`, in each round."""
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
                    with exported as sizes:
                        sample = server.generate(prompts, tokens)
                    if sizes is not None and not any(sizes):
                        raise BenchmarkError("The reader has had no record of the engine.")
                    rates[name].append(sample.tokens / sample.seconds)
                    say(f"{number + 1}/{rounds} {name}: {rates[name][-1]:.1f} tokens/s")
    return rates


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
        "ipc_gb_s": ("ipc", LARGE),
        "local_small_gb_s": ("local", SMALL),
        "tcp_small_gb_s": ("tcp", SMALL),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repetitions):
        for name, (way, tokens) in cases.items():
            rates[name].append(measure(way, tokens, seconds))
            say(f"{number + 1}/{repetitions} {name}: {rates[name][-1]:.2f}")
    engine = measure_engine(prompts, *((2, 64) if args.quick else (8, 256)), logs)
    summary = {name: round(statistics.median(each), 3) for name, each in rates.items()}
    speeds = zip(engine["exported"], engine["alone"], strict=True)
    summary["engine_exported"] = round(statistics.median(one / other for one, other in speeds), 4)
    print(program.table(("figure", "value"), [(k, f"{v:.2f}") for k, v in summary.items()]))
    settings = {"features": FEATURES, "seconds": seconds, "quick": args.quick}
    document = provenance.document("export", summary, settings=settings, rates=rates | engine)
    provenance.write_json(path, document)
    say(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
