"""A drafter that grows while the engine runs, and what goes wrong beside the engine."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import torch

from tests.support.fitting import Tiny
from tests.support.jumping import Clock
from tests.support.servers import Server, ServerFailed, Servers
from tests.support.tiny import greedily
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.weights import describe
from tlt_sglang.weights.store import Store


@pytest.fixture(scope="module")
def rendezvous(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the engine looks for a coordinator, and at first finds none."""
    return f"ipc://{tmp_path_factory.mktemp('rendezvous')}/coordinator"


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """The wall clock of the server that grows a drafter, and of its sidecar."""
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def growing(
    servers: Servers,
    tiny: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
    rendezvous: str,
    clock: Clock,
) -> Iterator[tuple[Server, Store]]:
    store = Store(tmp_path_factory.mktemp("growing"))
    flags = (
        *("--skip-tokenizer-init", "--max-running-requests", "8", "--tlt-store", str(store.root)),
        *("--tlt-sidecar", "always", "--tlt-policy", "cost-model"),
        *("--tlt-coordinator", rendezvous, "--tlt-sidecar-tensorboard"),
        *("--tlt-trace", str(store.root.parent / "trace")),
    )
    server = servers.get(
        "off,ngram:4,eagle3:3x1x4", *flags, model=tiny.path, environment=clock.environment
    )
    yield server, store
    servers.drop(server)


def test_costs_are_known_before_the_first_request(growing: tuple[Server, Store]) -> None:
    """Calibration ran every allowed strategy, and its statistics are neither reported nor kept."""
    server, store = growing
    lines = (store.root.parent / "trace").read_text().splitlines()
    report = [call for call in map(json.loads, lines) if call[0] == "observe" and not call[3]]
    assert {(strategy, size) for _, strategy, size, *_ in report} >= {
        (strategy, size) for strategy in ("off", "ngram:4") for size in (1, 3, 8)
    }
    status = server.scheduler()
    assert status["verify_steps"] < len(report)
    assert status["harvest"]["written"] <= 2  # of SGLang's own warm-up


def test_a_drafter_grows_from_nothing(growing: tuple[Server, Store], tiny: Tiny) -> None:
    """No drafter at the start; then one that the sidecar grew is swapped in, and it is used."""
    server, store = growing
    first = server.scheduler()
    assert first["drafter_ready"] is False
    longest = 48
    prompts = torch.randint(3, tiny.vocab, (64, 6), generator=torch.Generator().manual_seed(3))
    expected = greedily(tiny.model, prompts, longest)
    deadline = time.monotonic() + 240
    rounds = 0
    while time.monotonic() < deadline:
        answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=longest)
        assert [answer["output_ids"] for answer in answers] == expected
        rounds += 1
        if server.scheduler()["drafter_version"]:
            break
    status = server.scheduler()
    assert status["drafter_version"], (rounds, status, server.tail())
    assert status["drafter_ready"] is True
    server.post("/tlt/strategy", {"strategy": "eagle3:3x1x4"})
    answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=longest)
    assert [answer["output_ids"] for answer in answers] == expected
    assert all(answer["meta_info"]["drafter_version"][-1] >= 1 for answer in answers)
    # The one in use may be gone already: the sidecar goes on publishing.
    assert store.manifest(max(store.versions())).gate["candidate"] > 1
    assert list((store.root / "tensorboard").glob("events.*"))


# ---- what goes wrong beside the engine -----------------------------------------------------------


@pytest.mark.failures
def test_clocks_that_jump(growing: tuple[Server, Store], tiny: Tiny, clock: Clock) -> None:
    """A day on, a day back: output stays, and new versions of the drafter come and are used."""
    server, _ = growing
    prompts = torch.randint(3, tiny.vocab, (16, 6), generator=torch.Generator().manual_seed(7))
    expected = greedily(tiny.model, prompts, 24)
    for seconds in (86_400, -86_400, 0):
        clock.set(seconds)
        before, deadline = server.scheduler()["drafter_version"], time.monotonic() + 120
        while server.scheduler()["drafter_version"] == before:
            assert time.monotonic() < deadline, server.tail()
            answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=24)
            assert [answer["output_ids"] for answer in answers] == expected


@pytest.mark.failures
@pytest.mark.long
def test_killed_sidecars_and_coordinators_change_nothing(
    growing: tuple[Server, Store], tiny: Tiny, rendezvous: str
) -> None:
    """Twenty of each, killed at random moments: output stays, every version is whole, and the
    coordinator that comes next hears of the engine."""
    server, store = growing
    words = ["--tlt-store", str(store.root), "--tlt-sidecar-gate-steps", "1"]
    sidecar = [sys.executable, "-m", "tlt_sglang.cli", "sidecar", *words]
    coordinator = [
        sys.executable,
        "-m",
        "tlt_sglang.cli",
        "coordinator",
        "--tlt-coordinator",
        rendezvous,
    ]
    prompts = torch.randint(3, tiny.vocab, (16, 6), generator=torch.Generator().manual_seed(5))
    expected = greedily(tiny.model, prompts, 24)
    chance = random.Random(0)

    def served() -> None:
        answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=24)
        assert [answer["output_ids"] for answer in answers] == expected

    for _ in range(20):
        beside = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for command in chance.sample((sidecar, coordinator), 2)
        ]
        until = time.monotonic() + chance.choice((0.2, 1.0, 2.5)) * chance.random()
        while time.monotonic() < until:
            served()
        for process in chance.sample(beside, 2):
            process.kill()
            process.wait()
        served()
    folder = store.root / "seed"
    expected_weights = describe.expected(folder, describe.target_config(tiny.path), "F32")
    for version in store.versions():
        assert store.load(version, expected_weights)
    assert server.scheduler()["swap"]["refused"] == {}
    with subprocess.Popen(coordinator, stdout=subprocess.DEVNULL) as last:
        status_text = functools.partial(_coordinator_status, [*coordinator, "--status"])
        heard = wait_for(lambda: "engine" in status_text(), 30)
        report = status_text()
        last.terminate()
    assert heard, report
    server.wait_until_idle()


@contextlib.contextmanager
def _stopped_sidecar(server: Server) -> Iterator[None]:
    """The launcher's own sidecar stands still: another one would start over from each version it
    publishes, and might never publish one itself."""
    (own,) = (
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "sidecar" in child.cmdline()
    )
    own.suspend()
    try:
        yield
    finally:
        own.resume()


def _coordinator_status(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.failures
def test_a_sidecar_whose_disk_is_full_says_so_and_disturbs_nobody(
    growing: tuple[Server, Store], tiny: Tiny
) -> None:
    """No file of it can get as large as a drafter: neither a version nor a checkpoint."""
    server, store = growing
    words = ["--tlt-store", str(store.root), "--tlt-sidecar-gate-steps", "1"]
    log = store.root.parent / "full.log"
    with _stopped_sidecar(server), log.open("wb") as output:
        sidecar = subprocess.Popen(
            [sys.executable, "-m", "tlt_sglang.cli", "sidecar", *words],
            stderr=output,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
        )
        prompts = torch.randint(3, tiny.vocab, (16, 6), generator=torch.Generator().manual_seed(6))
        expected = greedily(tiny.model, prompts, 24)
        deadline = time.monotonic() + 120
        while "The drafter store" not in log.read_text() and time.monotonic() < deadline:
            answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=24)
            assert [answer["output_ids"] for answer in answers] == expected
            assert sidecar.poll() is None, log.read_text()
        sidecar.send_signal(signal.SIGINT)
        sidecar.wait(timeout=30)
    report = log.read_text()
    assert "cannot be used (File too large)" in report and "Traceback" not in report, report
    # The launcher's own sidecar goes on publishing; of this one nothing is left.
    assert [file for file in store.root.rglob("*") if str(sidecar.pid) in file.name] == []
    expected_weights = describe.expected(
        store.root / "seed", describe.target_config(tiny.path), "F32"
    )
    for version in store.versions():
        assert store.load(version, expected_weights)


@pytest.mark.failures
def test_killed_engines_leave_nothing_that_the_next_one_keeps(
    growing: tuple[Server, Store], servers: Servers, tiny: Tiny
) -> None:
    """Killed at random moments of a batch, as often as TLT_KILLED_ENGINES says: the log of each and
    its announcement go when the next engine of the store starts, which answers as ever."""
    server, store = growing
    prompts = torch.randint(3, tiny.vocab, (16, 6), generator=torch.Generator().manual_seed(7))
    expected = greedily(tiny.model, prompts, 24)
    flags = ("--skip-tokenizer-init", "--tlt-store", str(store.root))
    chance = random.Random(1)
    for _ in range(int(os.environ.get("TLT_KILLED_ENGINES", "2"))):
        log = Path(server.scheduler()["harvest"]["path"])
        load = threading.Thread(target=_until_it_dies, args=(server, prompts.tolist()))
        load.start()
        time.sleep(0.5 * chance.random())
        own = _sglangs_memory(server)
        for pid in server.pids():
            os.kill(pid, signal.SIGKILL)
        load.join()
        for segment in own:
            segment.unlink(missing_ok=True)
        servers.running.pop(server.spec)
        server.kill()
        assert log.exists()
        server = servers.get("off,eagle3:3x1x4", *flags, model=tiny.path)
        assert not log.exists()
        assert len(list((store.root / "engines").iterdir())) == 1
        assert server.scheduler()["drafter_version"] == max(store.versions(), default=0)
        answers = server.generate_all(prompts.tolist(), at_once=8, max_new_tokens=24)
        assert [answer["output_ids"] for answer in answers] == expected
    servers.drop(server)
    assert list((store.root / "engines").iterdir()) == []


def _sglangs_memory(server: Server) -> set[Path]:
    """Segments of SGLang's own, which nobody removes after a kill."""
    result: set[Path] = set()
    for pid in server.pids():
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            result |= {Path(path) for path in re.findall(r"/dev/shm/sglang_loads_\S+", maps)}
    return result


def _until_it_dies(server: Server, prompts: list[list[int]]) -> None:
    with contextlib.suppress(requests.RequestException, ServerFailed):
        while True:
            server.generate_all(prompts, at_once=8, max_new_tokens=24)
