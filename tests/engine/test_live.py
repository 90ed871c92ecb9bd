"""The adaptive drafter in a real engine: what it logs, and versions that come and go under load."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch

from tests.engine.test_weights import checksums
from tests.support.fitting import Tiny
from tests.support.identity import LENGTH, Reference
from tests.support.jumping import Clock
from tests.support.servers import Server, ServerFailed, Servers, model_folder
from tests.support.tiny import greedily
from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import request_key
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.training.corpus import Prompt, Response
from tlt_sglang.training.models import DraftConfig
from tlt_sglang.training.target import Target
from tlt_sglang.weights import describe
from tlt_sglang.weights.manifest import Base
from tlt_sglang.weights.store import WEIGHTS, Store

Fitted = tuple[dict[str, torch.Tensor], Base]
POOL = "off,eagle3:3x1x4,eagle3:3x4x8,ngram:4"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def fitted(drafters: dict[str, str]) -> Fitted:
    """Weights of the drafter that knows the reference by heart, and what it is made for."""
    folder = Path(drafters["eagle3"])
    shape = describe.target_config(str(model_folder("smollm2-135m")))
    return describe.load(folder), describe.expected(folder, shape, "F32").base


@pytest.fixture
def server(servers: Servers, drafters: dict[str, str], store: Store) -> Server:
    return servers.get(
        POOL, "--tlt-policy", "random", "--tlt-store", str(store.root), drafter=drafters["eagle3"]
    )


def uses(server: Server, version: int, seconds: float) -> bool:
    """Return True if the server uses this version of its drafter in time."""
    return wait_for(lambda: bool(server.scheduler()["drafter_version"] == version), seconds)


def logged(server: Server) -> dict[str, LoggedSequence]:
    """The longest sequence of each request in the server's log."""
    reader = Reader.open(Path(server.scheduler()["harvest"]["path"]))
    assembler = Assembler(1 << 30)
    sequences = [one for record in reader.read(1 << 20) for one in assembler.add(record)]
    sequences += assembler.flush()
    assert (reader.overwritten, reader.torn) == (0, 0)
    reader.close()
    return {sequence.request: sequence for sequence in sorted(sequences, key=len)}


def test_the_log_is_what_the_target_computes(server: Server, reference: Reference) -> None:
    """Tokens, positions and features of every strategy, against transformers' own."""
    server.post("/flush_cache")
    prompts = [*reference.prompts[:6], reference.prompts[0][:40] + reference.prompts[1][:9]]
    names = [f"logged-{number}" for number in range(len(prompts))]
    answers = [
        server.generate(prompt, 40, options={"rid": name})
        for prompt, name in zip(prompts, names, strict=True)
    ]
    assert wait_for(lambda: all(sequence.ended for sequence in logged(server).values()), 10)
    target = Target(str(model_folder("smollm2-135m")), torch.device("cpu"))
    config = DraftConfig.for_target(target.config, "eagle3", 1024)
    sequences = logged(server)
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        sequence = sequences[request_key(name).hex()]
        whole = [*prompt, *answer["output_ids"]]
        # What the radix cache had is left out; the last token was sampled and never read.
        cached = answer["meta_info"]["cached_tokens"]
        assert sequence.start == cached
        assert sequence.ids.tolist() == whole[sequence.start : -1]
        assert sequence.prompt_length == len(prompt) - cached
        response = Response(Prompt(tuple(prompt)), tuple(answer["output_ids"]))
        ((computed,),) = target.sequences([response], config)
        bits = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16).float()
        reference_output = torch.cat([computed.features, computed.head_input], dim=-1).float()
        rows = reference_output[sequence.start : sequence.end]
        assert bits.shape == rows.shape
        error = (bits - rows).norm(dim=-1) / rows.norm(dim=-1)
        assert float(error.max()) < 0.02, name
    assert sequences[request_key(names[-1]).hex()].start > 0


def test_twenty_swaps_under_load(
    server: Server, store: Store, fitted: Fitted, reference: Reference
) -> None:
    """Output stays, the target's weights stay, and a swap costs no more than a step."""
    weights, base = fitted
    before = checksums(server, "target")
    last = max(store.versions(), default=0)
    answers: list[dict[str, Any]] = []
    prompts = [*reference.prompts, *reference.prompts[:4]]

    def load() -> None:
        answers.extend(server.generate_all(prompts, at_once=8, max_new_tokens=LENGTH))

    thread = threading.Thread(target=load)
    thread.start()
    for number in range(20):
        noise = 1 + 0.001 * (number % 3)
        changed = {name: tensor * noise for name, tensor in weights.items()}
        version = store.publish(changed, "eagle3", base)
        assert uses(server, version, 20), server.scheduler()
    thread.join()
    swaps = server.scheduler()["swap"]["swaps"]
    assert [version for version, _ in swaps][-20:] == list(range(last + 1, last + 21))
    ties = [
        reference.compare(number % len(reference.prompts), answer["output_ids"])
        for number, answer in enumerate(answers)
    ]
    assert len(ties) == len(prompts)
    assert checksums(server, "target") == before
    versions = [answer["meta_info"]["drafter_version"] for answer in answers]
    assert all(one == sorted(one) for one in versions)
    assert len({version for one in versions for version in one}) > 10
    milliseconds = statistics.median(ms for _, ms in swaps)
    started = time.monotonic()
    server.post("/tlt/strategy", {"strategy": "off"})
    server.generate(reference.prompts[0], 32)
    server.post("/tlt/strategy", {"strategy": None})
    step = 1000 * (time.monotonic() - started) / 32
    assert milliseconds < step
    assert server.scheduler()["swap"]["rolled_back"] == 0
    server.wait_until_idle()


def test_by_hand(server: Server, store: Store) -> None:
    """Versions are loaded, pinned and rejected by request; a bad order is one sentence."""
    newest = max(store.versions())
    for version in (newest - 1, 0, newest):
        server.post("/tlt/drafter", {"version": version})
        assert uses(server, version, 10)
    server.post("/tlt/drafter", {"rollback": True})
    assert uses(server, newest - 1, 10)
    assert store.rejected(newest)
    server.post("/tlt/drafter", {"version": None})
    for body, says in (
        ({"version": 999999}, "does not exist"),
        ({"version": "new"}, 'Write {\\"version\\": N}'),
        ({}, 'Write {\\"version\\": N}'),
    ):
        refused = server.request("POST", "/tlt/drafter", json=body)
        assert refused.status_code == 400
        assert says in refused.text


def test_damaged_versions_are_refused(
    server: Server, store: Store, fitted: Fitted, reference: Reference
) -> None:
    """Truncated, bit-flipped, not finite, of another shape or target: the engine goes on."""
    weights, base = fitted
    used = server.scheduler()["drafter_version"]
    bad = {}
    for what in ("truncated", "flipped"):
        bad[what] = store.publish(weights, "eagle3", base)
        path = store.path(bad[what]) / WEIGHTS
        data = bytearray(path.read_bytes())
        if what == "truncated":
            del data[-1000:]
        else:
            data[len(data) // 2] ^= 1
        path.write_bytes(data)
    worse = {name: tensor * float("nan") for name, tensor in weights.items()}
    bad["not finite"] = store.publish(worse, "eagle3", base)
    cut = {name: tensor[:-1] for name, tensor in weights.items()}
    bad["of another shape"] = store.publish(cut, "eagle3", base)
    bad["for another target"] = store.publish(weights, "eagle3", Base(1, 2, 3, 4))
    assert wait_for(
        lambda: all(str(v) in server.scheduler()["swap"]["refused"] for v in bad.values()),
        20,
    ), server.scheduler()
    assert server.scheduler()["drafter_version"] == used
    reference.compare(2, server.generate(reference.prompts[2], 40)["output_ids"], 40)


def test_a_worse_drafter_is_rolled_back(
    server: Server, store: Store, fitted: Fitted, reference: Reference
) -> None:
    """The guard sees what the gate did not; what the engine says stays the same."""
    server.post("/tlt/strategy", {"strategy": "eagle3:3x1x4"})
    server.generate_all(reference.prompts, at_once=8, max_new_tokens=48)
    used = server.scheduler()["drafter_version"]
    weights, base = fitted
    noise = torch.Generator().manual_seed(0)
    worse = {
        name: torch.randn(tensor.shape, generator=noise) * 0.02 for name, tensor in weights.items()
    }
    version = store.publish(worse, "eagle3", base)
    assert uses(server, version, 20)
    answers = server.generate_all(reference.prompts, at_once=8, max_new_tokens=48)
    for number, answer in enumerate(answers):
        reference.compare(number, answer["output_ids"], 48)
    server.post("/tlt/strategy", {"strategy": None})
    assert server.scheduler()["drafter_version"] == used
    assert server.scheduler()["swap"]["rolled_back"] == 1
    assert store.rejected(version)


# ---- growing -------------------------------------------------------------------------------------


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
