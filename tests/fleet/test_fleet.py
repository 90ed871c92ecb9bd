"""A fleet on a Ray cluster: two engines and a trainer on nodes that do not share memory.

The drafter that the trainer makes of the engines' hidden states reaches both, whatever is killed
meanwhile, and no answer differs from the target's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import requests
import torch
from ray.util import list_named_actors

from benchmarks.harness import provenance
from tests.support.fitting import Tiny, make_tiny
from tests.support.ray_nodes import Nodes, end_those_left
from tests.support.servers import LIMITS
from tests.support.tiny import greedily
from tlt_sglang.exporter.messages import exports
from tlt_sglang.exporter.remote import RemoteReader
from tlt_sglang.fleet.keeper import TEMPORARY
from tlt_sglang.fleet.plan import NAMESPACE, Plan
from tlt_sglang.harvest import announce
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import Record
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.weights.manifest import BadVersion
from tlt_sglang.weights.store import Store

MODEL, MODEL_VOCAB = "smollm2-135m", 49_152
UP_SECONDS = 240.0
TRAIN_SECONDS = 240.0
FLAGS = ("--adaptive-spec", "--tlt-strategies", "off,ngram:4,eagle3:3x1x4")
MORE = (*LIMITS, "--skip-tokenizer-init", "--max-running-requests", "8")
LENGTH = 48


class Fleet:
    """A fleet that a user has started with `tlt fleet`, and requests to its engines.

    `tiny` is its target; without, that is the small model with its drafter.
    """

    def __init__(self, nodes: Nodes, tiny: Tiny | None, folder: Path) -> None:
        self.nodes, self.store = nodes, Store(folder / "store")
        self._log = folder / "fleet.log"
        model, vocab = (tiny.path, tiny.vocab) if tiny else (MODEL, MODEL_VOCAB)
        self._arguments = ("--engines", "2", "--trainers", "1", "--model", model)
        self.prompts = torch.randint(3, vocab, (32, 6), generator=torch.Generator().manual_seed(3))
        self.expected = greedily(tiny.model, self.prompts, LENGTH) if tiny else []
        self.answered = 0
        self.published: dict[int, tuple[int, str]] = {}
        """Epoch of the lease, and SHA-256, of each version that was there at a look."""
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Run `tlt fleet`, which starts the fleet or finds it."""
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self.command(*self._arguments, "--", *FLAGS, *MORE), stdout=log, stderr=log
            )

    def command(self, *more: str) -> list[str]:
        store = ("--tlt-store", str(self.store.root))
        return [
            *(sys.executable, "-m", "tlt_sglang.cli", "fleet", *store),
            *("--ray", self.nodes.address, *more),
        ]

    def status(self) -> Any:
        manager = ray.get_actor("tlt/manager", namespace=NAMESPACE)
        return ray.get(manager.status.remote(), timeout=30)

    def is_up(self) -> bool:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            return bool(self.status().is_up)
        return False

    def wait_until_up(self) -> None:
        assert wait_for(self.is_up, UP_SECONDS), self.describe()

    def describe(self) -> str:
        logs = [self._log, *(self.store.root / "fleet").glob("*.log")]
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)

    def targets(self) -> list[str]:
        """Return the addresses of the engines, as Prometheus finds them."""
        return list(self.plan.urls().values())

    @property
    def plan(self) -> Plan:
        plan = Plan.read(self.store.root)
        assert plan is not None
        return plan

    def expect_plain(self) -> None:
        """Expect what the first engine says without drafts, where nothing else is known."""
        if not self.expected:
            url = self.targets()[0]
            self.force(url, "off")
            self.expected = [self.answer(url, prompt) for prompt in range(len(self.prompts))]
            self.force(url, None)

    def force(self, url: str, strategy: str | None) -> None:
        """Have an engine use one strategy, or choose again."""
        body = {"strategy": strategy}
        assert requests.post(f"{url}/tlt/strategy", json=body, timeout=60).status_code == 401
        key = self.plan.admin_key
        assert key.stat().st_mode & 0o077 == self.plan.engine_config.stat().st_mode & 0o077 == 0
        headers = {"Authorization": f"Bearer {key.read_text().strip()}"}
        answer = requests.post(f"{url}/tlt/strategy", json=body, headers=headers, timeout=60)
        answer.raise_for_status()

    def ask(self, url: str, prompt: int) -> None:
        """Have an engine answer a prompt; its answer is the target's."""
        assert self.answer(url, prompt) == self.expected[prompt]
        self.answered += 1

    def answer(self, url: str, prompt: int) -> list[int]:
        body = {
            "input_ids": self.prompts[prompt].tolist(),
            "sampling_params": {"temperature": 0, "max_new_tokens": LENGTH, "ignore_eos": True},
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=120)
        answer.raise_for_status()
        output: list[int] = answer.json()["output_ids"]
        return output

    def look_at_versions(self) -> None:
        """Note what is published; a version that is there never changes."""
        for version in self.store.versions():
            with contextlib.suppress(BadVersion):  # it has just been removed
                manifest = self.store.manifest(version)
                facts = (manifest.epoch, manifest.sha256)
                assert self.published.setdefault(version, facts) == facts

    def sidecar(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            status: dict[str, Any] = json.loads((self.store.root / "sidecar.json").read_text())
            return status
        return {}


@pytest.fixture(scope="module", params=["tiny", pytest.param(MODEL, marks=pytest.mark.long)])
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """The fleet, once it is up; at its end nothing of it is left."""
    folder = tmp_path_factory.mktemp("fleet")
    tiny = make_tiny(folder) if request.param == "tiny" else None
    shared = set(os.listdir("/dev/shm"))
    with Nodes(folder) as nodes:
        for _ in range(3):
            nodes.add()
        running = Fleet(nodes, tiny, folder)
        try:
            running.wait_until_up()
            running.expect_plain()
            yield running
        finally:
            running.driver.send_signal(signal.SIGINT)
            running.driver.wait(300)
            left = end_those_left(str(running.store.root))
        actors = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
        assert left == [], (left, running.describe())
        folders = [running.store.root / "fleet" / name for name in ("targets", "keepers")]
        assert actors == [] and [file for folder in folders for file in folder.iterdir()] == []
        assert exports(running.store.root) == []
        assert announce.read(running.store.root) == []
        assert Plan.read(running.store.root) is None
    ours = {name for name in set(os.listdir("/dev/shm")) - shared if "tlt" in name}
    assert ours == set() and [*TEMPORARY.iterdir()] == []


@contextlib.contextmanager
def asking(fleet: Fleet) -> Iterator[dict[str, list[str]]]:
    """Send requests to the engines all the time; yields what those that failed say, by address."""
    over = threading.Event()
    failed: dict[str, list[str]] = {}
    wrong: list[AssertionError] = []

    def send(number: int) -> None:
        for prompt in itertools.cycle(range(number, 32, 4)):
            if over.is_set():
                return
            for url in fleet.targets()[number % 2 :: 2] or fleet.targets()[:1]:
                try:
                    fleet.ask(url, prompt)
                except AssertionError as error:
                    wrong.append(error)
                    return
                except requests.RequestException as error:
                    failed.setdefault(url, []).append(str(error))
                    time.sleep(0.5)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_hidden_states_arrive_byte_for_byte(fleet: Fleet) -> None:
    """Records that are read over the network are those in the engines' shared memory."""
    key = fleet.store.root / "fleet" / "keys" / "coordinator.key"
    served = {path: export for export in exports(fleet.store.root) for path in export.logs}
    assert len(served) == 2, fleet.describe()
    for path, export in served.items():
        assert not Path(path).exists()
        there = Reader.open(_as_seen_on_its_node(path))
        here = RemoteReader(export.address, path, export.logs[path], key)
        try:
            sent = _collect(there, lambda: _serve_once(fleet))
            arrived = _collect(here, lambda: None, least=len(sent))
            assert len(sent) > 32 and arrived[: len(sent)] == sent
            assert here.torn == 0 and here.overwritten == there.overwritten == 0
        finally:
            there.close()
            here.close()


def test_a_drafter_is_trained_on_a_third_node_and_swapped_into_both(fleet: Fleet) -> None:
    trainer = next(one for one in fleet.status().members if one.name == "trainer-0")
    engines = [one for one in fleet.status().members if one.name.startswith("engine")]
    assert len({one.node for one in [trainer, *engines]}) == 3
    with asking(fleet) as failed:
        assert wait_for(lambda: all(_version(e.url) for e in engines), TRAIN_SECONDS), (
            fleet.describe()
        )
    assert failed == {} and fleet.sidecar()["feed"]["remote"] == 2
    assert fleet.sidecar()["feed"]["torn"] == 0
    for engine in engines:
        fleet.force(engine.url, "eagle3:3x1x4")
        for prompt in range(8):
            fleet.ask(engine.url, prompt)


def test_another_store_needs_another_name(fleet: Fleet, tmp_path: Path) -> None:
    words = ["--engines", "0", "--ray", fleet.nodes.address, "--tlt-store", str(tmp_path / "other")]
    tlt = [sys.executable, "-m", "tlt_sglang.cli", "fleet"]
    done = subprocess.run([*tlt, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "give this one another --name" in done.stderr, done.stderr
    assert Plan.read(tmp_path / "other") is None and fleet.is_up()


@pytest.mark.timeout(4 * 3600)
def test_whatever_is_killed_engines_serve_and_training_goes_on(
    fleet: Fleet, request: pytest.FixtureRequest
) -> None:
    """Raylets of an engine, the trainer and the coordinator, actors, an exporter, the program."""
    rounds = request.config.getoption("--rounds")
    path = request.config.getoption("--rounds-json")
    rng = random.Random(rounds)
    kills: list[Kill] = []
    for number in range(1, rounds + 1):
        victims = ["engine", "trainer", "coordinator", "exporter", "manager", "driver", "node"]
        rng.shuffle(victims)
        for victim in victims:
            kills.append(_kill(fleet, victim, rng.uniform(0, 2)))
            print(f"round {number} of {rounds}: {kills[-1]}", flush=True)
        if path:
            _write_kills(Path(path), number, kills, len(fleet.published))
    published = [fleet.published[version] for version in sorted(fleet.published)]
    epochs = [epoch for epoch, _ in published]
    assert epochs == sorted(epochs) and len({sha256 for _, sha256 in published}) == len(published)


@dataclass
class Kill:
    """One kill, and what followed."""

    victim: str
    up_s: float
    """Seconds until all members were up."""
    trains_s: float
    """Seconds until the trainer had taken a step more than before."""
    answers: int
    """Right answers meanwhile, of which there are no others."""
    unanswered: int
    """Requests to the engines that died."""


def _kill(fleet: Fleet, victim: str, after: float) -> Kill:
    """Kill `victim` while requests are sent, and wait until all goes on as before."""
    nodes = fleet.nodes
    step = fleet.sidecar()["step"]
    members = {one.name: one for one in fleet.status().members}
    untouched = {one.url for one in members.values() if one.url}
    with asking(fleet) as failed:
        time.sleep(after)
        answered, began = fleet.answered, time.monotonic()
        if victim in ("engine", "trainer"):
            one = members[f"{victim}-0"]
            untouched.discard(one.url)
            nodes.kill(one.node)
            nodes.add()
        elif victim == "node":
            node = members["coordinator"].node
            if node == nodes.head:
                node = members["engine-1"].node
            untouched -= {one.url for one in members.values() if one.node == node}
            nodes.kill(node)
            nodes.add()
        elif victim == "driver":
            fleet.driver.kill()
            fleet.driver.wait()
            fleet.driver = fleet.start()
        elif victim == "manager":
            _kill_actor("tlt/manager")
        elif victim == "exporter":
            name = next(n for n in members if n.startswith("exporter"))
            os.kill(members[name].pid, signal.SIGKILL)
        else:
            _kill_actor(f"tlt/{victim}")
        fleet.wait_until_up()
        up = time.monotonic() - began
        assert wait_for(lambda: fleet.answered > answered + 16, 60), fleet.describe()
        assert wait_for(lambda: _trains(fleet, step), TRAIN_SECONDS), fleet.describe()
        trains = time.monotonic() - began
    assert not untouched & failed.keys(), (victim, failed)
    lost = sum(map(len, failed.values()))
    return Kill(victim, round(up, 1), round(trains, 1), fleet.answered - answered, lost)


def _trains(fleet: Fleet, step: int) -> bool:
    """Return whether a trainer that lives has taken more optimizer steps than these."""
    fleet.look_at_versions()
    status = fleet.sidecar()
    return int(status.get("step", 0)) > step and psutil.pid_exists(status["pid"])


def _write_kills(path: Path, rounds: int, kills: list[Kill], versions: int) -> None:
    """Write what followed in all rounds so far."""
    answers = sum(kill.answers for kill in kills)
    summary: dict[str, float | None] = {
        "rounds": rounds,
        "kills": len(kills),
        "answers": answers,
        "versions": versions,
    }
    for victim in sorted({kill.victim for kill in kills}):
        these = [kill for kill in kills if kill.victim == victim]
        summary[f"up_s_{victim}"] = statistics.median(kill.up_s for kill in these)
        summary[f"trains_s_{victim}"] = statistics.median(kill.trains_s for kill in these)
    content = {"kills": [asdict(kill) for kill in kills]}
    provenance.write_json(path, provenance.document("fleet", summary, **content))


def _kill_actor(name: str) -> None:
    """Kill the process of an actor, which Ray then starts again."""
    actor = ray.get_actor(name, namespace=NAMESPACE)
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    os.kill(pid, signal.SIGKILL)


def _version(url: str) -> int:
    status = requests.get(f"{url}/tlt/status", timeout=60).json()
    return int(status["schedulers"][0]["drafter_version"])


def _as_seen_on_its_node(path: str) -> Path:
    """Return a path to a file in the mount namespace of the engine that has it."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            there = Path(f"/proc/{process.pid}/root{path}")
            if there.exists():
                return there
    raise AssertionError(f"no process sees {path}")


def _serve_once(fleet: Fleet) -> None:
    for url in fleet.targets():
        for prompt in range(8):
            fleet.ask(url, prompt)


def _collect(reader: Reader | RemoteReader, serve: Any, least: int = 1) -> list[str]:
    """Return a hash of each record that can be read, `least` in a minute."""
    serve()
    digests: list[str] = []
    deadline, quiet = time.monotonic() + 60, time.monotonic()
    while len(digests) < least or time.monotonic() - quiet < 1:
        assert time.monotonic() < deadline, (len(digests), least)
        if records := reader.read():
            digests += map(_digest, records)
            quiet = time.monotonic()
        else:
            time.sleep(0.01)
    return digests


def _digest(record: Record) -> str:
    whole = hashlib.sha256(record.request)
    whole.update(record.tokens.tobytes() + record.features.tobytes())
    whole.update(f"{record.start} {record.version} {record.flags}".encode())
    return whole.hexdigest()
