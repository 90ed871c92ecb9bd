"""The keeper of a member: its process runs, runs again when it dies, and never outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from tlt_sglang.coordinator.status import query_status
from tlt_sglang.fleet import keeper, plan
from tlt_sglang.fleet.keeper import FleetStatus, Keeper, describe
from tlt_sglang.fleet.plan import Member, Plan
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.launcher.server_process import free_port

EXPORTER = Member("exporter", "here")
SECONDS = 30.0


@pytest.fixture
def fleet(tmp_path: Path) -> Plan:
    from tlt_sglang.coordinator.endpoints import make_keys

    made = Plan("tlt", tmp_path / "store", None, engines=0)
    made.folder.mkdir(mode=0o700, parents=True)
    make_keys(made.secret_key.parent)
    return made


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "node" / "members"
    monkeypatch.setattr(keeper, "TEMPORARY", folder)
    return folder


@pytest.fixture
def kept(fleet: Plan, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    monkeypatch.setattr(keeper, "RESTART_SECONDS", (0.05,))
    one = Keeper(fleet, EXPORTER, "127.0.0.1", "node")
    yield one
    one.stop()


def log(fleet: Plan, member: Member = EXPORTER) -> str:
    path = fleet.folder / f"{member.name}.log"
    return path.read_text() if path.exists() else ""


def test_a_process_that_dies_is_started_again(kept: Keeper, fleet: Plan) -> None:
    assert wait_for(lambda: log(fleet).count("tlt export: at") == 1, SECONDS)
    status = kept.status()
    first = status.pid
    assert wait_for(lambda: status.state == "up", SECONDS)
    assert (status.starts, status.url) == (1, None) and first is not None
    os.kill(first, signal.SIGKILL)
    assert wait_for(lambda: log(fleet).count("tlt export: at") == 2, SECONDS), log(fleet)
    assert kept.status().pid not in (first, None) and kept.status().starts == 2


def test_it_ends_when_it_is_stopped(kept: Keeper, fleet: Plan) -> None:
    assert wait_for(lambda: "tlt export: at" in log(fleet), SECONDS)
    pid = kept.status().pid
    kept.stop()
    assert kept.status().state == "stopped" and pid is not None and not psutil.pid_exists(pid)
    assert list((fleet.store / "engines").glob("export@*")) == []


def test_a_member_that_cannot_start_is_tried_again(
    fleet: Plan, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the folder of its log is not there, as on a node where the store is not mounted."""
    monkeypatch.setattr(keeper, "RESTART_SECONDS", (0.05,))
    away = fleet.folder.with_name("away")
    fleet.folder.rename(away)
    one = Keeper(fleet, EXPORTER, "127.0.0.1", "node")
    try:
        assert wait_for(lambda: "No such file" in one.status().problem, SECONDS)
        status = FleetStatus(fleet, [one.status()], [])
        assert "No such file" in describe(status) and not status.is_up
        away.rename(fleet.folder)
        assert wait_for(lambda: "tlt export: at" in log(fleet), SECONDS)
        assert one.status().problem == ""
    finally:
        one.stop()


def test_it_ends_once_another_keeper_has_its_member(
    fleet: Plan, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ray takes a node for dead that lives."""
    monkeypatch.setattr(keeper, "OWNER_SECONDS", 0.05)
    first = Keeper(fleet, EXPORTER, "127.0.0.1", "node")
    assert wait_for(lambda: first.status().state == "up", SECONDS)
    pid = first.status().pid
    second = Keeper(fleet, EXPORTER, "127.0.0.1", "other")
    try:
        assert wait_for(lambda: first.status().state == "stopped", SECONDS)
        assert pid is not None and not psutil.pid_exists(pid)
        assert wait_for(lambda: second.status().state == "up", SECONDS)
    finally:
        second.stop()


def test_it_ends_with_a_fleet_that_does_not_reach_it(
    fleet: Plan, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "OWNER_SECONDS", 0.05)
    fleet.file.write_bytes(fleet.to_json())
    one = Keeper(fleet, EXPORTER, "127.0.0.1", "node")
    assert wait_for(lambda: one.status().state == "up", SECONDS)
    owner = fleet.owners / EXPORTER.name
    owner.unlink()  # somebody has tidied up
    assert wait_for(owner.exists, SECONDS) and one.status().state == "up"
    fleet.file.unlink()
    owner.unlink()
    assert wait_for(lambda: one.status().state == "stopped", SECONDS)
    assert [*temporary.iterdir()] == []


def test_a_place_that_others_may_enter_is_not_used(temporary: Path) -> None:
    temporary.parent.mkdir()
    temporary.parent.chmod(0o777)
    with keeper._temporary_files() as variables:
        folder = Path(variables["TMPDIR"])
        assert [*variables] == ["TMPDIR"] and temporary not in folder.parents
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_what_a_member_leaves_behind_is_removed(kept: Keeper, fleet: Plan, temporary: Path) -> None:
    """Its temporary files are in a folder of its keeper; one that a dead keeper left goes, too."""
    assert wait_for(lambda: "tlt export: at" in log(fleet), SECONDS)
    (folder,) = temporary.iterdir()
    environment = psutil.Process(kept.status().pid).environ()
    assert environment["TMPDIR"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]) != folder
    (folder / "socket").touch()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (temporary / f"@{ended.pid}@{os.uname().nodename}").mkdir()
    kept.stop()
    assert [*temporary.iterdir()] == []


def test_it_ends_with_its_keeper(fleet: Plan) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tlt_sglang.fleet import keeper\nfrom tlt_sglang.fleet.plan import *\n"
        "keeper.TEMPORARY = Path(sys.argv[1]) / 'fleet' / 'members'\n"
        "plan, member = Plan.read(Path(sys.argv[1])), Member('exporter', 'here')\n"
        "keeper = keeper.Keeper(plan, member, '127.0.0.1', '')\n"
        "while keeper.status().pid is None: time.sleep(0.01)\n"
        "print(keeper.status().pid, flush=True)\ntime.sleep(60)"
    )
    (fleet.folder / "plan.json").write_bytes(fleet.to_json())
    with subprocess.Popen(
        [sys.executable, "-c", code, str(fleet.store)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert wait_for(lambda: "tlt export: at" in log(fleet), SECONDS)
        process.kill()
    assert wait_for(lambda: not psutil.pid_exists(pid), SECONDS)
    assert list((fleet.store / "engines").glob("export@*")) == []


def test_members_read_where_the_coordinator_is(fleet: Plan) -> None:
    one = Keeper(fleet, Member("coordinator"), "127.0.0.1", "node")
    try:
        assert wait_for(
            lambda: bool(query_status(fleet.coordinator, fleet.public_key, wait=0.2)), SECONDS
        ), log(fleet, Member("coordinator"))
    finally:
        one.stop()


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_engine_is_found_once_it_answers(fleet: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prometheus finds its address in a file, from its first answer to its end."""
    port = free_port()
    monkeypatch.setattr(keeper, "free_port", lambda host: port)
    sleeper = (sys.executable, "-c", "import time; time.sleep(60)")
    monkeypatch.setattr(plan.Plan, "command", lambda *_: list(sleeper))
    one = Keeper(fleet, Member("engine", "0"), "127.0.0.1", "node")
    target = fleet.targets / "engine-0.json"
    try:
        assert wait_for(lambda: one.status().pid is not None, SECONDS)
        assert one.status().state == "starting" and not target.exists()
        with HTTPServer(("127.0.0.1", port), _Healthy) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert wait_for(target.exists, SECONDS)
            server.shutdown()
        assert one.status().url == f"http://127.0.0.1:{port}" and one.status().state == "up"
        labels = {"fleet": "tlt", "engine": "engine-0"}
        expected = [{"targets": [f"127.0.0.1:{port}"], "labels": labels}]
        assert json.loads(target.read_text()) == expected
    finally:
        one.stop()
    assert not target.exists() and one.status().url is None
