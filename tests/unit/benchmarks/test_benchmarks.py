"""The pure parts of the benchmarks: statistics, prompts, options, and the document they write."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_engine
from benchmarks.harness import fleet, processes, program, prompts, provenance, statistics
from benchmarks.harness.program import BenchmarkError, UsageError
from benchmarks.harness.statistics import Run


def run(
    side: str, seconds: float, *, part: str = "b1", repetition: int = 0, case: int = 0, **other: Any
) -> Run:
    fields: dict[str, Any] = {"tokens": 10, "steps": 10, **other}
    return Run(part, side, repetition, case, seconds, **fields)


EVERYTHING = [
    run("off", 1.0),
    run("transformers", 2.0),
    run("off", 1.0, part="b8", tokens=80),
    run("torch_native", 4.0, part="b8", tokens=80),
    run("off", 1.0, part="verify"),
    run("ngram:4", 0.6, part="verify", steps=5),
    run("ngram:8", 0.7, part="verify", steps=5),
    run("default", 9.0, part="startup", tokens=1, steps=1),
]


# -- figures ---------------------------------------------------------------------------------------


def test_spread() -> None:
    assert statistics.spread([3.0, 1.0, 2.0, 10.0]) == statistics.Spread(2.5, 1.0, 10.0, 4)
    assert statistics.spread([1.23456789]).as_json() == {
        "median": 1.2346,
        "min": 1.2346,
        "max": 1.2346,
        "count": 1,
    }
    with pytest.raises(ValueError, match="no values"):
        statistics.spread([])


def test_sides_are_next_to_each_other() -> None:
    order = statistics.interleave(2, ["x", "y"], ["A", "B"])
    assert [(number, case, side) for number, _, case, side in order] == [
        (0, "x", "A"),
        (0, "x", "B"),
        (0, "y", "A"),
        (0, "y", "B"),
        (1, "x", "A"),
        (1, "x", "B"),
        (1, "y", "A"),
        (1, "y", "B"),
    ]


def test_a_pair_is_of_one_repetition_and_case() -> None:
    runs = [
        run("A", 1.0, case=0),
        run("A", 2.0, case=1),
        run("A", 4.0, repetition=1),
        run("B", 8.0, case=1),
        run("B", 2.0, case=0),
        run("C", 1.0, case=0),
    ]
    assert statistics.paired(runs, "B", "A", lambda r: r.seconds) == [2.0, 4.0]


def test_agreement() -> None:
    runs = [
        run("A", 1.0, case=0, output="x"),
        run("B", 1.0, case=0, output="x"),
        run("A", 1.0, case=1, output="x"),
        run("B", 1.0, case=1, output="y"),
        run("A", 1.0, case=2, output="z"),
    ]
    assert statistics.agreement(runs, "A", "B") == 0.5
    assert statistics.agreement([], "A", "B") == 0.0
    assert (
        statistics.digest([[1, 2]]) == statistics.digest([[1, 2]]) != statistics.digest([[1], [2]])
    )


def test_ratios_are_those_that_their_names_say() -> None:
    summary = bench_engine.summary_of(bench_engine.ratios_of(EVERYTHING))
    assert summary == {
        "plain_b1_vs_transformers": 2.0,
        "plain_b8_vs_torch_native": 4.0,
        "verify4_vs_plain": 1.2,
        "verify8_vs_plain": 1.4,
        "startup_s": 9.0,
    }


# -- input -----------------------------------------------------------------------------------------


def test_prompts_as_text_and_as_json(tmp_path: Path) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("first\n\n  second  \n")
    lines.write_text('{"prompt": "first", "id": 1}\n\n{"prompt": "two\\nlines"}\n')
    assert prompts.load_prompts(text) == ["first", "second"]
    assert prompts.load_prompts(lines) == ["first", "two\nlines"]
    text.write_text(lines.read_text())
    assert prompts.load_prompts(text) == ["first", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\nb\n', "Line 2 of .* is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'Line 1 of .* has no text as "prompt"'),
        ("p.jsonl", b'{"prompt": " "}\n', 'has no text as "prompt"'),
        ("p.jsonl", b'"a"\n', 'has no text as "prompt"'),
    ],
)
def test_prompts_that_cannot_be_right(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        prompts.load_prompts(tmp_path / name)


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        prompts.load_prompts(tmp_path / "none")
    with pytest.raises(UsageError, match="Is a directory"):
        prompts.load_prompts(tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ["--repetitions", "0"],
        ["--repetitions", "many"],
        ["--tokens", "1"],
        ["--only", "speed"],
        ["--only", ","],
        ["--prompts", "/nowhere/at/all"],
        ["--json", "/dev/null/results.json"],
        ["--model", "/nowhere/at/all"],
        ["--unknown"],
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    argv: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert bench_engine.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench_engine: ")
    assert len(captured.err.splitlines()) == 1
    assert captured.err.endswith(".\n")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that looks like a model's; results go to a temporary folder."""
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def test_options(model: str, tmp_path: Path) -> None:
    options = bench_engine.parse(["--model", model])
    assert (options.repetitions, options.starts, options.quick) == (3, 3, False)
    assert options.only == bench_engine.NAMES
    assert options.json == tmp_path / "results" / "bench_engine.json"
    assert len(options.prompts) >= bench_engine.BATCH
    quick = bench_engine.parse(["--model", model, "--quick", "--repetitions", "4"])
    assert (quick.repetitions, quick.starts) == (4, 1)
    assert quick.tokens < options.tokens


def test_one_part_does_not_overwrite_the_results_of_all(model: str, tmp_path: Path) -> None:
    argv = ["--model", model, "--only", "verify8_vs_plain,startup_s"]
    options = bench_engine.parse(argv)
    assert options.json is None
    assert options.wants("verify")
    assert not options.wants("b1")
    chosen = tmp_path / "new" / "one.json"
    assert bench_engine.parse([*argv, "--json", str(chosen)]).json == chosen


def test_batches_are_full() -> None:
    assert bench_engine.batches(["a", "b", "c"], 2) == [["a", "b"], ["c", "a"]]
    assert bench_engine.batches(["a"], 3) == [["a", "a", "a"]]


def test_flags_of_the_servers() -> None:
    ours, stock = fleet.flags_of("ngram:4"), fleet.flags_of(fleet.STOCK)
    assert ours[-3:] == ("--adaptive-spec", "--tlt-strategies", "ngram:4")
    assert "--adaptive-spec" not in stock
    assert "--sleep-on-idle" in stock
    assert "--tlt-strategies" not in fleet.flags_of(fleet.DEFAULT)


# -- output ----------------------------------------------------------------------------------------


def test_document(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    provenance.write_json(path, bench_engine.results(EVERYTHING, {"threads": 2}))
    written = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert set(written) == {
        *("benchmark", "command", "date", "git", "machine", "versions", "summary"),
        *("settings", "ratios", "sides", "same_output", "runs"),
    }
    assert set(written["summary"]) == set(written["ratios"]) == set(bench_engine.NAMES)
    assert all(isinstance(value, float) for value in written["summary"].values())
    assert set(written["ratios"]["startup_s"]) == {"median", "min", "max", "count"}
    assert set(written["git"]) == {"commit", "dirty"}
    assert {"cpu", "cores", "memory_gib"} <= set(written["machine"])
    assert set(written["versions"]) == {"python", "torch", "sglang", "transformers", "tlt_sglang"}
    assert len(written["runs"]) == len(EVERYTHING)


def test_what_was_not_measured_is_null() -> None:
    summary = bench_engine.results(EVERYTHING[:2], {})["summary"]
    assert isinstance(summary, dict)
    assert summary["plain_b1_vs_transformers"] == 2.0
    assert [summary[name] for name in bench_engine.NAMES[1:]] == [None] * 4


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="could not be written"):
        provenance.write_json(tmp_path / "missing" / "results.json", {})


def test_the_command_is_written_relative_to_the_repository() -> None:
    script = str(provenance.REPOSITORY / "benchmarks" / "bench_engine.py")
    command = provenance.command([script, "--prompts", "two words.txt"])
    assert command == "python benchmarks/bench_engine.py --prompts 'two words.txt'"


def test_tables() -> None:
    text = bench_engine.tables(EVERYTHING)
    assert "verify ngram:4" in text
    assert "plain_b8_vs_torch_native   4.000  4.000  4.000      1" in text
    assert bench_engine.tables(EVERYTHING[-1:]).startswith("figure")
    assert program.table(("name", "n"), [("a", "10")]) == "name   n\n----  --\na     10"


# -- processes -------------------------------------------------------------------------------------


def test_a_process_that_ends_says_so_with_its_last_line(tmp_path: Path) -> None:
    program = "import sys; sys.exit('tlt-sglang: no memory left')"
    process = processes.Process("off", ["-c", program], 1, tmp_path)
    process.process.wait(30)
    with pytest.raises(BenchmarkError, match=r"off ended with status .*no memory left"):
        process.check_alive()
    process.kill()


def test_a_paused_process_does_nothing_and_can_be_stopped(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "count = 'n = 0\\nwhile True: n += 1'\n"
        "subprocess.Popen([sys.executable, '-c', count])\n"
        "print('ready', flush=True); exec(count)"
    )
    process = processes.Process("counts", ["-c", program], 1, tmp_path)
    try:
        while "ready" not in process.log():
            process.check_alive()
        process.pause()
        assert process.idle_share(0.3) < 0.05
        process.resume()
        assert process.idle_share(0.3) > 0.05
        (child,) = process.root.children()
        child.kill()
        process.pause()
    finally:
        started = time.monotonic()
        processes.stop([process])
    assert time.monotonic() - started < processes.STOP_SECONDS / 2
    assert not process.root.is_running()


def test_stopping_takes_the_children_along(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = processes.Process("parent", ["-c", program], 1, tmp_path)
    while "ready" not in process.log():
        process.check_alive()
    children = process.root.children()
    process.root.kill()  # The children stay behind, and are ended all the same.
    process.process.wait(30)
    assert children
    processes.stop([process])
    assert not any(child.is_running() for child in children)
