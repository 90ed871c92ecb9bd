"""Parts (e) and (f): the harvest log, a sidecar and hot swaps under load, and released memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import requests

from benchmarks.harness.program import BenchmarkError
from benchmarks.harness.prompts import Prompt
from benchmarks.harness.server import Server
from tests.gpu.measure import decode, equal_share
from tests.gpu.session import Line, Session, gpu_memory_mib
from tests.gpu.settings import CHAIN
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.weights import describe
from tlt_sglang.weights.store import Store

SWAP_SECONDS = 15.0
"""Time within which an engine has to use a version."""
NOISE = 0.001
"""Relative change of the weights of a published version."""
PAUSE_SECONDS = 2.0
"""Time that the memory stays released after a version was published."""


class Load:
    """Requests that are sent in a thread, one batch after the other, until `end`."""

    def __init__(self, server: Server, prompts: Sequence[Prompt], tokens: int) -> None:
        self.tokens = 0
        self.problem: str | None = None
        self._server, self._prompts, self._tokens = server, prompts, tokens
        self._over = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> Line:
        """Wait for the batch in flight, and return what was sent."""
        self._over.set()
        self._thread.join()
        rate = self.tokens / (time.monotonic() - self._began)
        return {"tokens": self.tokens, "tokens_per_s": round(rate, 1), "problem": self.problem}

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._server.generate(self._prompts, self._tokens)
                self.tokens += self._tokens * len(self._prompts)
        except (OSError, BenchmarkError, requests.RequestException) as error:
            self.problem = str(error)


class Publisher:
    """Publishes versions of a server's drafter that differ a little from its own."""

    def __init__(self, session: Session, store: Path, server: Server) -> None:
        self.server, self.store = server, Store(store)
        folder = Path(server.get("/tlt/status")["drafter"])
        target = describe.target_config(session.model)
        self._weights = describe.load(folder)
        self._base = describe.expected(folder, target, "BF16").base
        self._number = 0

    def publish(self) -> int:
        """Publish a version and return its number."""
        self._number += 1
        factor = 1 + NOISE * self._number
        weights = {name: tensor * factor for name, tensor in self._weights.items()}
        return self.store.publish(weights, "eagle3", self._base, made_by="tests.gpu.run")

    def swapped(self, version: int) -> bool:
        """Return True if the server swaps this version in in time."""
        return wait_for(lambda: version in dict(self._swaps()), SWAP_SECONDS)

    def _swaps(self) -> list[tuple[int, float]]:
        return (self.server.scheduler() or {}).get("swap", {"swaps": []})["swaps"]


def harvest_and_swap(session: Session, line: Line) -> None:
    """Train beside a loaded engine on the same GPU, and swap versions in between its steps."""
    settings, store = session.settings, session.folder / "store-sidecar"
    flags = ("--tlt-store", str(store), "--tlt-sidecar", "always")
    server = session.pool(*flags, name="pool, sidecar")
    line |= {"memory_mib": gpu_memory_mib()}
    publisher = Publisher(session, store, server)
    prompts = session.prompts(max(settings.sizes))
    load = Load(server, prompts, settings.tokens)
    try:
        time.sleep(settings.load_seconds)  # the sidecar learns from the harvest log
        line["learned"] = _sidecar(store)
        used: dict[int, bool] = {}
        for _ in range(settings.versions):
            version = publisher.publish()
            used[version] = publisher.swapped(version)
    finally:
        line["load"] = load.end()
    status = server.get("/tlt/status")["schedulers"][0]
    line |= {"used": used, "sidecar": _sidecar(store), "memory_with_sidecar_mib": gpu_memory_mib()}
    line |= {name: status.get(name) for name in ("swap", "drafter_version")}
    line["harvest"] = {name: one for name, one in status["harvest"].items() if name != "path"}
    line["ok"] = all(used.values()) and load.problem is None
    session.stop({"pool, sidecar"})


def release(session: Session, line: Line) -> None:
    """Release the memory of an idle engine, publish a version meanwhile, and resume."""
    store = session.folder / "store-release"
    flags = ("--tlt-store", str(store), *session.settings.saver_flags)
    server = session.pool(*flags, name="pool, released")
    publisher = Publisher(session, store, server)
    prompts = session.prompts(2)
    server.pin(CHAIN)
    before = _answers(session, server, prompts, line, "before")
    server.send("/flush_cache?timeout=30", {})
    used = gpu_memory_mib()
    release_route, resume_route = session.settings.release_routes
    server.send(release_route, {})
    version = publisher.publish()
    time.sleep(PAUSE_SECONDS)
    line["memory_mib"] = [used, gpu_memory_mib()]
    server.check_alive()
    server.send(resume_route, {})
    after = _answers(session, server, prompts, line, "after")
    line |= equal_share(before, after) | {"swapped": publisher.swapped(version)}
    _answers(session, server, prompts, line, "after_the_swap")
    line["ok"] = bool(line["swapped"]) and before == after
    session.stop({"pool, released"})


def _answers(
    session: Session, server: Server, prompts: Sequence[Prompt], line: Line, name: str
) -> list[list[int]]:
    """Return the answers one by one, and note their timing."""
    tokens = session.settings.tokens
    line[name] = decode(server, prompts[:1], tokens, 1).as_json()
    return [server.generate([prompt], tokens).output_ids[0] for prompt in prompts]


def _sidecar(store: Path) -> object:
    """Return the status that the sidecar has written, None if it has not."""
    path = store / "sidecar.json"
    return json.loads(path.read_text()) if path.exists() else None
