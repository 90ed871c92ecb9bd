"""Part (h): where the time of a step goes, from a trace of SGLang's profiler."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from benchmarks.harness.prompts import Prompt
from benchmarks.harness.server import Server
from tests.gpu.measure import PLAIN, pinned
from tests.gpu.session import Line, Session
from tests.gpu.settings import CHAIN
from tlt_sglang.launcher.child_process import wait_for

STEPS = 8
TOP = 15
MOST_PYTHON = 60
NAME_CHARACTERS = 90
REQUESTS = 64
TOKENS = 400
BEFORE_SECONDS = 0.6
"""From the first token, which no prefill follows, to the profile."""
WRITE_SECONDS = 60.0
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
PYTHON = "python_function"
PACKAGES = ("sglang/", "tlt_sglang/")


class Event(TypedDict, total=False):
    """The keys of a trace event that are read; times are in microseconds."""

    name: str
    cat: str
    ts: float
    dur: float


def profile(session: Session, line: Line) -> None:
    """Profile decode steps of SGLang without TLT, and of strategies in the default pool."""
    prompts = session.prompts(min(REQUESTS, max(session.settings.sizes)))
    for name, strategies in (("plain", (PLAIN,)), ("pool", ("off", CHAIN))):
        server = session.server("plain") if name == "plain" else session.pool()
        for strategy in strategies:
            if strategy != PLAIN:
                pinned(server, strategy)
            server.generate(prompts, session.settings.tokens)
            folder = session.folder / "profiles" / strategy.replace(":", "-")
            folder.mkdir(parents=True, exist_ok=True)
            trace = _profiled(session, server, prompts, folder)
            line[strategy] = {"requests": len(prompts), "steps": STEPS} | summary(trace)
        if name == "pool":
            server.pin(None)


def summary(events: Sequence[Event]) -> Line:
    """Return the time on the device and on the host in milliseconds, and their largest parts.

    Those of Python are functions of SGLang and of TLT, each with what it calls.
    """
    timed = [event for event in events if "dur" in event]
    device = [event for event in timed if event.get("cat") in DEVICE]
    host = [event for event in timed if event.get("cat") in HOST]
    python = [event for event in timed if event.get("cat") == PYTHON]
    ours = [event for event in python if event["name"].startswith(PACKAGES)]
    busy, window = _busy(device), _window([*device, *host])
    return {
        "window_ms": round(window / 1000, 3),
        "device_busy_ms": round(busy / 1000, 3),
        "device_share": round(busy / window, 3) if window else None,
        "device": _largest(device),
        "host": _largest(host),
        "python": _largest(ours, MOST_PYTHON),
    }


def _profiled(
    session: Session, server: Server, prompts: Sequence[Prompt], folder: Path
) -> list[Event]:
    """Return the events of some steps in the midst of a generation."""
    body = {
        "output_dir": str(folder),
        "num_steps": STEPS,
        "activities": _activities(session),
        "with_stack": True,
        "record_shapes": False,
    }
    started = threading.Timer(BEFORE_SECONDS, server.send, ("/start_profile", body))
    started.start()
    try:
        server.generate(prompts, TOKENS)
    finally:
        started.join()
    return _trace(server, folder)


def _busy(events: Sequence[Event]) -> float:
    """Return the microseconds in which at least one of the events ran."""
    busy, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        over = event["ts"] + event["dur"]
        busy += max(0.0, over - max(event["ts"], end))
        end = max(end, over)
    return busy


def _window(events: Sequence[Event]) -> float:
    if not events:
        return 0.0
    return max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)


def _largest(events: Sequence[Event], most: int = TOP) -> list[list[object]]:
    """Return name, milliseconds and calls of the events that take most, nested ones included."""
    sums: dict[str, tuple[float, int]] = {}
    for event in events:
        total, calls = sums.get(event["name"], (0.0, 0))
        sums[event["name"]] = total + event["dur"], calls + 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])[:most]
    return [[name[:NAME_CHARACTERS], round(us / 1000, 3), calls] for name, (us, calls) in ordered]


def _activities(session: Session) -> list[str]:
    return ["CPU", "GPU"] if "cuda" in session.settings.server_flags else ["CPU"]


def _trace(server: Server, folder: Path) -> list[Event]:
    """Return the events of the trace that the server writes, once it is whole."""

    def size() -> int:
        return sum(path.stat().st_size for path in folder.glob("*.gz"))

    def whole() -> bool:
        before = size()
        time.sleep(0.5)
        return 0 < before == size()

    if not wait_for(whole, WRITE_SECONDS):
        raise server.error(f"has not written a trace within {WRITE_SECONDS:.0f} s")
    events: list[Event] = []
    for path in folder.glob("*.gz"):
        events += json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events
