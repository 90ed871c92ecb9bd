"""The report page and the live view: they show what was logged and reported."""

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
from tlt_sglang.observe import events, report, snapshot, top
from tlt_sglang.observe.snapshot import Snapshot
from tlt_sglang.strategy.strategies import parse

CHAIN, OFF = "eagle3:3x1x4", "off"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return a log by the engine's own telemetry: twenty seconds, half of them with a chain."""
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


def test_a_log_reads_back(log: Path) -> None:
    log_events = events.read(log)
    chain, plain = sorted(log_events.totals(), key=lambda total: total.strategy)
    assert (chain.strategy, plain.strategy, chain.switches) == (CHAIN, OFF, 1)
    assert chain.tokens == 3 * chain.verify_steps
    assert plain.tokens == plain.verify_steps
    (intervals,) = log_events.engines.values()
    assert intervals[3].tokens_per_s == pytest.approx(100, rel=0.05)
    assert intervals[-2].accept_length == pytest.approx(3.0)
    assert intervals[-2].tokens_per_s_of(OFF) == 0


def test_unreadable_lines_are_counted(log: Path) -> None:
    lines = [*log.read_text().splitlines(), "{", "[]", '{"event": "summary"}', "", "null"]
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
    message = capsys.readouterr().err
    assert ("cannot be read" if content is None else "holds no steps") in message
    assert not (tmp_path / "x.html").exists()


def look(at: float, steps: int, **more: Any) -> Snapshot:
    tally = {"verify_steps": steps, "proposed": 3 * steps, "accepted": steps, "switches": 1}
    scheduler = {"strategy": CHAIN, "accept_length": 2.0, "strategies": {CHAIN: tally}} | more
    loads = {"num_running_reqs": 3, "num_waiting_reqs": 1}
    sidecar = {
        "training": True,
        "step": 7,
        "loss": 4.2,
        "gate": {"running": 1.25, "candidate": 1.5},
    }
    devices = {"gpu0": "TRAINING"}
    return Snapshot(at, {"schedulers": [scheduler]}, loads, sidecar, devices)


def render(now: Snapshot, before: Snapshot | None = None) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(top.view(now, before))
    return console.export_text()


def test_the_view() -> None:
    text = render(look(12.0, 300, store="/s", drafter_version=5), look(10.0, 200))
    for text_part in (
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
        assert text_part in text
    assert "drafter" not in render(look(1.0, 1))


def test_the_picture_of_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([look(10.0, 200), look(12.0, 300)])
    monkeypatch.setattr(snapshot, "take", lambda *_: next(looks))
    monkeypatch.setattr(top, "INTERVAL", 0.0)
    assert cli.main(["status", "--svg", str(tmp_path / "view.svg")]) == 0
    text = (tmp_path / "view.svg").read_text()
    assert text.startswith("<svg") and "eagle3:3x1x4" in text and "100.0" in text


def test_a_server_that_is_gone() -> None:
    assert "does not answer" in render(Snapshot(0.0, None, {}, {}, {}))


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "top"):
        assert cli.main([command, "--url", "http://127.0.0.1:9"]) == 1
        assert "No server with TLT answers at http://127.0.0.1:9" in capsys.readouterr().err


# ---- the dashboard -------------------------------------------------------------------------------


def test_the_dashboard_queries_existing_metrics() -> None:
    """Every metric that a panel queries is one that the engine counts."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    Metrics(registry)
    counted = {f"{family.name}_total" for family in registry.collect()}
    dashboard = json.loads((ROOT / "launch" / "grafana-dashboard.json").read_text())
    metrics = set(re.findall(r"tlt_\w+", json.dumps(dashboard["panels"])))
    assert metrics and metrics <= counted
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
    data, at, log_events = file.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        log_events += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
        at += size + 16
    assert [(step, value) for step, _, value in log_events] == [(3, 2.5), (3, 1.5), (4, 2.0)]
    assert log_events[0][1] == "loss" and log_events[1][1].startswith("accept")
