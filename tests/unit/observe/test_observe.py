"""The page and the live view: what they say is what was logged and told."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tlt_sglang import cli
from tlt_sglang.engine.telemetry import EventLog, Metrics, Telemetry
from tlt_sglang.observe import events, report, top
from tlt_sglang.observe.top import Look
from tlt_sglang.strategy.strategies import parse

CHAIN, OFF = "eagle3:3x1x4", "off"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Written by the engine's own telemetry: twenty seconds, half of them with a chain."""
    now = [0.0]
    path = tmp_path / "events"
    telemetry = Telemetry(
        [parse(OFF), parse(CHAIN)], [EventLog(str(path), lambda: 1.8e9 + now[0])], lambda: now[0]
    )
    for second in range(20):
        strategy = parse(CHAIN if second >= 10 else OFF)
        if second in (0, 10):
            telemetry.switched(strategy, 4)
        for _ in range(25):
            now[0] += 0.04
            telemetry.step(strategy, [2, 1, 3, 2] if strategy.num_steps else [0, 0, 0, 0])
    return path


def test_what_is_read_is_what_was_logged(log: Path) -> None:
    found = events.read(log)
    ((name, rounds, tokens, switches), (other, plain, said, _)) = sorted(
        found.totals(), key=lambda row: row[0]
    )
    assert (name, other, switches) == (CHAIN, OFF, 1)
    assert tokens == 3 * rounds
    assert said == plain
    (seconds,) = found.engines.values()
    assert seconds[3].tokens_per_s == pytest.approx(100, rel=0.05)
    assert seconds[-2].accept_length == pytest.approx(3.0)
    assert seconds[-2].tokens(OFF) == 0


def test_lines_that_are_none_are_counted(log: Path) -> None:
    lines = [*log.read_text().splitlines(), "{", "[]", '{"event": "steps"}', "", "null"]
    assert events.parse(lines).skipped == 4


def test_the_page(log: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    gate = {"running": 1.2, "candidate": 1.4, "passed": True, "step": 40, "loss": 5.0}
    (store / "training.jsonl").write_text(json.dumps(gate) + "\n" + "torn {\n")
    out = tmp_path / "page.html"
    assert report.main([str(log), "-o", str(out), "--tlt-store", str(store)]) == 0
    text = out.read_text()
    assert text.count("<svg") == 2
    assert "eagle3:3x1x4" in text and "3.00" in text
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")


@pytest.mark.parametrize("content", [None, "", "no json\n"])
def test_no_log(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "events"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path), "-o", str(tmp_path / "x.html")]) == 1
    said = capsys.readouterr().err
    assert ("cannot be read" if content is None else "holds no steps") in said
    assert not (tmp_path / "x.html").exists()


def look(at: float, rounds: int, **more: Any) -> Look:
    tally = {"rounds": rounds, "proposed": 3 * rounds, "accepted": rounds, "switches": 1}
    scheduler = {"strategy": CHAIN, "accept_length": 2.0, "strategies": {CHAIN: tally}} | more
    loads = {"num_running_reqs": 3, "num_waiting_reqs": 1}
    sidecar = {
        "training": True,
        "step": 7,
        "loss": 4.2,
        "gate": {"running": 1.25, "candidate": 1.5},
    }
    devices = {"gpu0": "TRAINING"}
    return Look(at, {"schedulers": [scheduler]}, loads, sidecar, devices)


def shown(now: Look, before: Look | None = None) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(top.view(now, before))
    return console.export_text()


def test_the_view() -> None:
    text = shown(look(12.0, 300, store="/s", drafter_version=5), look(10.0, 200))
    for wanted in (
        "running 3",
        "queued 1",
        "tokens/s 100.0",
        "strategy eagle3:3x1x4",
        "version 5",
        "training",
        "1.25 -> 1.50",
        "gpu0: TRAINING",
        "300",
    ):
        assert wanted in text
    assert "drafter" not in shown(look(1.0, 1))


def test_the_picture_of_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([look(10.0, 200), look(12.0, 300)])
    monkeypatch.setattr(top, "seen", lambda *_: next(looks))
    monkeypatch.setattr(top, "EVERY", 0.0)
    assert cli.main(["status", "--svg", str(tmp_path / "view.svg")]) == 0
    text = (tmp_path / "view.svg").read_text()
    assert text.startswith("<svg") and "eagle3:3x1x4" in text and "100.0" in text


def test_a_server_that_is_gone() -> None:
    assert "does not answer" in shown(Look(0.0, None, {}, {}, {}))


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "top"):
        assert cli.main([command, "--url", "http://127.0.0.1:9"]) == 1
        assert "No server with TLT answers at http://127.0.0.1:9" in capsys.readouterr().err


# ---- the dashboard -------------------------------------------------------------------------------


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Every metric that a panel asks for is one that the engine counts."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    Metrics(registry)
    known = {f"{family.name}_total" for family in registry.collect()}
    dashboard = json.loads((ROOT / "launch" / "grafana-dashboard.json").read_text())
    asked = set(re.findall(r"tlt_\w+", json.dumps(dashboard["panels"])))
    assert asked and asked <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_scalars_are_read_back(tmp_path: Path) -> None:
    """From the records of the file, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    from tlt_sglang.observe.scalars import Scalars

    written = Scalars(tmp_path)
    written.add(3, {"loss": 2.5, "accept length/in use": 1.5})
    written.add(4, {"loss": 2.0})
    written.close()
    (file,) = tmp_path.glob("events.*")
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
        at += size + 16
    assert [(step, value) for step, _, value in found] == [(3, 2.5), (3, 1.5), (4, 2.0)]
    assert found[0][1] == "loss" and found[1][1].startswith("accept")
