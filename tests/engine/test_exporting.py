"""A drafter for two engines, trained on a machine that does not have their memory.

The sidecar runs in a mount namespace with a /dev/shm of its own: it sees the store, as over a
shared folder, and none of the harvest logs.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from tests.support.fitting import Tiny
from tests.support.servers import Server, Servers
from tests.support.tiny import greedily
from tlt_sglang.exporter.messages import exports
from tlt_sglang.weights.store import Store

TLT = (sys.executable, "-m", "tlt_sglang.cli")
SECONDS = 240
POOL = "off,ngram:4,eagle3:3x1x4"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def engines(servers: Servers, tiny: Tiny, store: Store) -> Iterator[list[Server]]:
    """Two engines that grow a drafter in the same store."""
    flags = ("--skip-tokenizer-init", "--max-running-requests", "8", "--tlt-store", str(store.root))
    started = [
        servers.get(POOL, *flags, *more, model=tiny.path) for more in ((), ("--log-level", "info"))
    ]
    yield started
    for server in started:
        servers.drop(server)


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, and interrupt it at the end."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def elsewhere(*command: str) -> tuple[str, ...]:
    """Return a command that runs `command` without this machine's shared memory."""
    script = f"mount -t tmpfs none /dev/shm && exec {shlex.join(command)}"
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", script)


def sidecar_feed(store: Store) -> dict[str, int]:
    """Return what the sidecar reads."""
    try:
        feed: dict[str, int] = json.loads((store.root / "sidecar.json").read_text())["feed"]
    except (OSError, KeyError, ValueError):
        return {}
    return feed


def test_a_drafter_for_two_engines_grows_on_another_machine(
    engines: list[Server], tiny: Tiny, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both swap it in, although the exporter is killed meanwhile; output stays throughout."""
    folder = tmp_path_factory.mktemp("sockets")
    folder.chmod(0o700)
    address = f"ipc://{folder}/export"
    exporter = (*TLT, "export", "--tlt-store", str(store.root), "--address", address)
    sidecar = elsewhere(*TLT, "sidecar", "--tlt-store", str(store.root))
    prompts = torch.randint(3, tiny.vocab, (32, 6), generator=torch.Generator().manual_seed(3))
    expected = greedily(tiny.model, prompts, 48)
    deadline = time.monotonic() + SECONDS

    def serve_until(condition: str, holds: object) -> None:
        while True:
            for server in engines:
                answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=48)
                assert [answer["output_ids"] for answer in answers] == expected
            if holds():  # type: ignore[operator]
                return
            assert time.monotonic() < deadline, (condition, sidecar_feed(store))

    with running(*sidecar):
        with running(*exporter) as first:
            serve_until("both are read", lambda: sidecar_feed(store).get("remote") == 2)
            first.kill()
            first.wait()
        with running(*exporter):
            serve_until(
                "both use the drafter",
                lambda: all(server.scheduler()["drafter_version"] for server in engines),
            )
    for server in engines:
        server.post("/tlt/strategy", {"strategy": "eagle3:3x1x4"})
        answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=48)
        assert [answer["output_ids"] for answer in answers] == expected
        assert all(answer["meta_info"]["drafter_version"][-1] >= 1 for answer in answers)
    assert sidecar_feed(store)["torn"] == 0
    assert exports(store.root) == []
