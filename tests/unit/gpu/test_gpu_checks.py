"""The checks on a GPU read logs, traces and timings; here without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import dummy, run
from tests.gpu.graph_memory import LEARNED, captured, planned
from tests.gpu.measure import ADAPTIVE, PLAIN, Timing, equal_share
from tests.gpu.profile import Event, summary
from tests.gpu.session import Line, OutOfTime, Part, Session
from tests.gpu.settings import POOL, REHEARSAL
from tests.gpu.steps import ratios

LOG = """\
Capture prefill CUDA graph end. elapsed=9.10 s, mem usage=0.30 GB, avail mem=60.00 GB.
Capture target verify CUDA graph end. bs=[1, 2], elapsed=2.50 s, mem usage=0.20 GB, avail mem=59 GB.
Graphs, captured as planned:
chosen: 31 graphs                         0.50 GB
Capture draft decode CUDA graph end. elapsed=0.50 s, mem usage=0.10 GB, avail mem=59.00 GB.
Built adaptive runtime state steps=3: elapsed=4.25s, mem=0.35GB
"""


def test_graph_memory_is_read_from_the_log() -> None:
    line = captured(LOG)
    assert (line["planned_gb"], line["taken_by_states_gb"]) == (0.5, 0.35)
    assert line["states"] == [{"steps": "3", "seconds": 4.25, "gb": 0.35}]
    captures, own = line["captures"], line["before_the_states"]
    assert isinstance(captures, list) and isinstance(own, list)
    assert captures == own
    assert [one["gb"] for one in captures] == [0.3, 0.2, 0.1]
    assert captures[1]["graphs"] == "target verify CUDA graph"


def test_states_are_named_where_each_strategy_has_one() -> None:
    states = captured(LOG.splitlines()[-1] * len(LEARNED))["states"]
    assert isinstance(states, list)
    assert [state["strategy"] for state in states] == [
        "eagle3:1x1x2",
        "eagle3:3x1x4",
        "eagle3:3x4x8",
    ]


def test_a_log_without_graphs() -> None:
    line = captured("Load weight end.")
    assert (line["planned_gb"], line["states"], line["taken_by_states_gb"]) == (None, [], 0)


def test_the_plan_of_each_strategy() -> None:
    gigabytes = planned(REHEARSAL.dummy, 512, [1, 64])
    assert set(gigabytes) == set(POOL)
    assert 0 < gigabytes["off"] < gigabytes["eagle3:1x1x2"] < gigabytes["eagle3:3x4x8"]


def test_busy_time_counts_kernels_at_once_only_once() -> None:
    events = [
        Event(name="gemm", cat="kernel", ts=0, dur=1000),
        Event(name="gemm", cat="kernel", ts=500, dur=1000),
        Event(name="launch", cat="cuda_runtime", ts=2000, dur=500),
        Event(name="mark", cat="other", ts=9000),
    ]
    line = summary(events)
    assert (line["window_ms"], line["device_busy_ms"], line["device_share"]) == (2.5, 1.5, 0.6)
    assert line["device"] == [["gemm", 2.0, 2]]
    assert summary([])["device_share"] is None


def test_ratios_compare_what_is_measured() -> None:
    def timing(rate: float) -> dict[int, Timing]:
        return {4: Timing(rate, 4, 1.0)}

    rows = {"off": timing(90), "ngram:8": timing(110), ADAPTIVE: timing(99)}
    assert ratios(rows) == {4: {"adaptive_over_best_fixed": 0.9}}
    assert ratios(rows | {PLAIN: timing(100)})[4] == {
        "off_over_plain": 0.9,
        "adaptive_over_plain": 0.99,
        "adaptive_over_best_fixed": 0.9,
    }


def test_answers_that_differ() -> None:
    line = equal_share([[1, 2, 3], [1, 2], [4]], [[1, 5, 3], [1, 2, 3], [4]])
    assert line == {"equal": 1, "of": 3, "first_differences": [1, 2]}


def test_the_dummy_model_is_a_model_and_a_drafter(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, drafter = dummy.write(tmp_path, REHEARSAL.dummy)
    assert "draft_vocab_size" not in json.loads((Path(model) / "config.json").read_text())
    config = json.loads((Path(drafter) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["draft_vocab_size"]) == (1, 512)
    weights = load_file(Path(drafter) / "model.safetensors")
    assert weights["lm_head.weight"].shape == (512, 64)
    assert len(dummy.prompts(3, 1024)) == 3


def _fails(session: Session, line: Line) -> None:
    line["measured"] = 7
    raise OutOfTime(f"in {session.folder}")


def test_a_part_that_fails_keeps_its_figures_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.gpu.session.resolve_model", str)
    with Session(tmp_path, REHEARSAL, 60) as session:
        session.run(Part("x", "one that fails", 30, _fails))
        session.run(Part("y", "one that works", 30, lambda session, line: None))
        session.run(Part("z", "one without time", 0, _fails))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["part"], line["ok"]) for line in lines] == [
        ("x", False),
        ("y", True),
        ("z", False),
    ]
    assert (lines[0]["measured"], lines[0]["reason"]) == (7, "OutOfTime: in OUT")
    assert lines[2]["reason"] == "no time is left"
    assert session.failures == ["x", "z"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["out", "--parts", "a,q"]) == 2
    assert "Unknown part 'q'; the parts are k, a, b, c" in capsys.readouterr().err
