"""`tlt top --fleet`: a line for each engine, also for one that does not answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.panel import Panel

from tlt_sglang.fleet.plan import Plan
from tlt_sglang.observe import fleet, top
from tlt_sglang.observe.fleet import FleetSnapshot
from tlt_sglang.observe.snapshot import Snapshot


def engine(time: float, tokens: int, version: int = 1) -> Snapshot:
    tally = {"verify_steps": tokens, "proposed": 0, "accepted": 0}
    scheduler = {
        "strategy": "ngram:8",
        "accept_length": 1.5,
        "drafter_version": version,
        "strategies": {"ngram:8": tally},
    }
    return Snapshot(time, {"schedulers": [scheduler]}, {"num_running_reqs": 3}, {}, {})


SILENT = Snapshot(2.0, None, {}, {}, {})


def text(panel: Panel) -> str:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(panel)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_line_for_each_engine() -> None:
    before = FleetSnapshot({"engine-2": engine(0.0, 0), "engine-10": engine(0.0, 100)}, {})
    now = FleetSnapshot(
        {"engine-10": engine(2.0, 160, 2), "engine-2": engine(2.0, 40), "engine-11": SILENT},
        {"tlt/engine-2": "BUSY"},
    )
    lines = text(fleet.view(now, before)).splitlines()
    assert "engines 3   tokens/s 50.0" in lines[1]
    names = [line.split()[1] for line in lines[3:6]]
    assert names == ["engine-2", "engine-10", "engine-11"]
    assert lines[3].split()[2:8] == ["3", "?", "20.0", "ngram:8", "1.5", "1"]
    assert lines[4].split()[4] == "30.0" and "no answer" in lines[5]
    assert "tlt/engine-2: BUSY" in lines[6]
    assert "tokens/s" not in text(fleet.view(now, None)).splitlines()[1]


def test_no_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (top.top, top.status):
        assert command(["--fleet", str(tmp_path)]) == 1
        assert "No fleet runs with the store" in capsys.readouterr().err


def test_engines_are_found_in_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("tlt", tmp_path, "model")
    plan.targets.mkdir(parents=True)
    (plan.folder / "plan.json").write_bytes(plan.to_json())
    group = {"targets": ["127.0.0.1:1"], "labels": {"engine": "engine-0"}}
    (plan.targets / "engine-0.json").write_text(json.dumps([group]))
    (plan.targets / "engine-1.json").write_text("half of a f")
    assert plan.urls() == {"engine-0": "http://127.0.0.1:1"}
    assert top.status(["--fleet", str(tmp_path)]) == 1
    assert "is not a key file" in capsys.readouterr().err
