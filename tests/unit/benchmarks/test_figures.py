"""The figures of the pages come from the result files, and stale ones are listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.figures import FigureError

RESULT = {
    "summary": {"ratio": 1.4679, "share": 0.00465, "count": 3, "name": "ngram:4"},
    "runs": [
        {"system": "off", "seconds": 6.0},
        {"system": "off", "seconds": 8.0},
        {"system": "upstream adaptive", "seconds": 3.5},
    ],
}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README.md of a repository with one result file."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "bench_a.json").write_text(json.dumps(RESULT))
    monkeypatch.setattr(figures, "REPOSITORY", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", results)
    figures.result.cache_clear()
    return tmp_path / "README.md"


def test_no_figure_of_the_pages_is_stale(capsys: pytest.CaptureFixture[str]) -> None:
    figures.result.cache_clear()
    status = figures.main(["--check"])
    captured = capsys.readouterr()
    assert status == 0, f"Run `python -m benchmarks.figures --write`.\n{captured.out}{captured.err}"


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("bench_a.summary.ratio", "1.47"),
        ("bench_a.summary.ratio | .1f", "1.5"),
        ("bench_a.summary.ratio - 1 | .0%", "47 %"),
        ("bench_a.summary.share | .1%", "0.5 %"),
        ("bench_a.summary.count", "3"),
        ("bench_a.summary.name", "ngram:4"),
        ("bench_a.runs[0].seconds | .1f", "6.0"),
        ("bench_a.runs[system=off].seconds | .1f", "7.0"),
        (
            "bench_a.runs[system=off].seconds / bench_a.runs[system=upstream adaptive].seconds",
            "2.00",
        ),
    ],
)
def test_a_marker_stands_for_a_value(marker: str, text: str) -> None:
    assert figures.figure(marker) == text


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("bench_b.summary.ratio", "no result file bench_b.json"),
        ("bench_a.summary.speed", "no 'speed'"),
        ("bench_a.runs[system=stock].seconds", r"nothing in the list is \[system=stock\]"),
        ("bench_a.summary[0].ratio", "no list"),
        ("bench_a.runs", "neither a number nor a text"),
        ("bench_a", "not a path"),
        ("bench_a.summary.name / 2", "a text, not a number"),
    ],
)
def test_a_wrong_marker_is_an_error(marker: str, message: str) -> None:
    with pytest.raises(FigureError, match=message):
        figures.figure(marker)


def test_writing_replaces_what_is_stale(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = "<!-- figure bench_a.summary.ratio -->{}<!-- /figure --> times, "
    page.write_text("# Title\n\nIs " + marker.format("1.3") + marker.format("1.47"))
    assert figures.main(["--check"]) == 1
    assert capsys.readouterr().out == (
        "README.md:3: bench_a.summary.ratio shows '1.3', the result is '1.47'\n"
    )
    assert figures.main(["--write"]) == 0
    assert page.read_text() == "# Title\n\nIs " + 2 * marker.format("1.47")
    assert figures.main(["--check"]) == 0


def test_a_table_is_replaced(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures.TABLES, "a", lambda: figures.markdown(("x", "y"), [("1", "2")]))
    page.write_text("<!-- table a -->\n<!-- /table -->\n")
    assert figures.main(["--check"]) == 1
    assert figures.main(["--write"]) == 0
    assert page.read_text() == (
        "<!-- table a -->\n| x | y |\n| --- | ---: |\n| 1 | 2 |\n<!-- /table -->\n"
    )
    assert figures.main(["--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "is <!-- figure bench_a.summary.ratio -->1.47\n",
        "it is\n<!-- figure bench_a.summary.ratio -->1.47<!-- /figure --> times\n",
        "<!-- table policy -->\n",
        "<!-- table none -->\n<!-- /table -->\n",
    ],
)
def test_a_marker_that_is_wrong_ends_the_check(page: Path, text: str) -> None:
    page.write_text(text)
    assert figures.main(["--check"]) == 2


@pytest.mark.parametrize("name", list(figures.TABLES))
def test_every_table_can_be_written(name: str) -> None:
    figures.result.cache_clear()
    assert figures.table(name).count("\n") > 3
