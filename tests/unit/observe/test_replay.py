"""`tlt replay`: the log that it reads, what it sends, and what it says of the answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang import cli
from tlt_sglang.engine.telemetry import EventLog
from tlt_sglang.errors import ConfigError
from tlt_sglang.observe import events, logged_answers
from tlt_sglang.observe.replay import Comparison, summary

LINE: dict[str, Any] = {
    "id": "a",
    "input_ids": [5, 6],
    "sampling_params": {"temperature": 1.0, "sampling_seed": 7, "max_new_tokens": 4},
    "lora_path": "style",
    "weight_versions": ["v1"],
    "drafter_versions": [],
    "output_ids": [1, 2, 3, 4],
    "finish_reason": {"type": "length", "length": 4},
}
GREEDY = {"temperature": 0.0}
UNSEEDED = {"temperature": 1.0}


def write(path: Path, *changes: dict[str, Any]) -> Path:
    """Write a log as an engine does: a line for each of `changes` to LINE."""
    log = EventLog(str(path))
    for change in changes:
        log.add("request", **(LINE | change))
    log.write()
    return path


def test_a_log_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path / "events", {}, {"id": "b", "sampling_params": GREEDY})
    with path.open("a") as file:
        file.write('{"event": "summary"}\n{"event": "request", "id"')  # cut by a crash
    log = logged_answers.read(path)
    first, second = log.answers
    assert first.body == {
        name: LINE[name] for name in ("input_ids", "sampling_params", "lora_path")
    }
    assert (first.name, first.output_ids, first.weight_versions) == ("a", [1, 2, 3, 4], ["v1"])
    assert (first.seed, first.greedy, second.seed, second.greedy) == (7, False, None, True)
    assert first.repeatable and second.repeatable and log.skipped == 1
    assert events.parse(path.read_text().splitlines()).skipped == 2  # for `tlt report`, too


def test_of_an_aborted_answer_only_the_logged_tokens_are_repeated(tmp_path: Path) -> None:
    aborted = {"finish_reason": {"type": "abort"}, "output_ids": [1, 2]}
    parameters = {"sampling_params": {"max_new_tokens": 9, "min_new_tokens": 5}}
    (answer,) = logged_answers.read(write(tmp_path / "events", aborted | parameters)).answers
    assert answer.body["sampling_params"] == {"max_new_tokens": 2, "min_new_tokens": 2}
    assert not answer.repeatable


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"output_ids": None}, "is a request of another form"),
        ({"output_ids": ["x"]}, "'x' is not a token id"),
        ({"sampling_params": 3}, "is a request of another form"),
        ({"finish_reason": None}, "use the version of tlt-sglang that wrote it"),
    ],
)
def test_a_request_of_another_form_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    path = write(tmp_path / "events", {}, change)
    with pytest.raises(ConfigError, match=f"Line 2 of .*{problem}"):
        logged_answers.read(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read \\(No such file or directory\\)"),
        (b"\xff\xfe\x00", "it is not text"),
        (b"a\nb\n", "is not an event log"),
        (b"", "holds no requests; start the server with --tlt-log-requests"),
        (b'{"event": "summary"}\n', "holds no requests"),
    ],
)
def test_a_log_without_requests_is_refused(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "events"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        logged_answers.read(path)


@pytest.mark.parametrize(
    ("now", "position", "words"),
    [
        ([1, 2, 3, 4], None, "4 tokens, the same"),
        ([1, 2, 9, 4], 2, "differs at position 2 of 4: token 3 in the log, token 9 now"),
        ([1, 2], 2, "differs at position 2 of 4: token 3 in the log, the end now"),
        ([1, 2, 3, 4, 5], 4, "differs at position 4 of 4: the end in the log, token 5 now"),
        ([], 0, "differs at position 0 of 4: token 1 in the log, the end now"),
    ],
)
def test_the_first_position_that_differs(
    tmp_path: Path, now: list[int], position: int | None, words: str
) -> None:
    (logged,) = logged_answers.read(write(tmp_path / "events", {})).answers
    comparison = Comparison(logged, now, "v2")
    assert (comparison.position, str(comparison)) == (position, words)
    assert comparison.agrees == (position is None) and comparison.other_weights


def test_the_summary(tmp_path: Path) -> None:
    (logged,) = logged_answers.read(write(tmp_path / "events", {})).answers
    compared = [
        Comparison(logged, [1, 2, 3, 4], "v1"),
        Comparison(logged, [1], "v2"),
        Comparison(logged, [], refusal="too long"),
    ]
    assert list(summary(compared, unseeded=2, skipped=1)) == [
        "3 answers: 1 the same, 1 different, 1 refused.",
        "With other weights than in the log: 1 (v1 in the log, v2 now).",
        "Left out, as they were sampled without a seed: 2.",
        "Lines of the log that cannot be read: 1.",
    ]


@contextmanager
def served(status: int, reply: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answer every request in one way; yield the address and the bodies that arrive."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()


def reply(tokens: list[int], seed: int | None) -> dict[str, Any]:
    return {"output_ids": tokens, "meta_info": {"weight_version": "v1", "sampling_seed": seed}}


@pytest.mark.parametrize(
    ("tokens", "status", "last"),
    [
        ([1, 2, 3, 4], 0, "2 answers: 2 the same, 0 different."),
        ([1, 2, 8, 4], 1, "2 answers: 0 the same, 2 different."),
    ],
)
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: list[int], status: int, last: str
) -> None:
    path = write(tmp_path / "events", {}, {"sampling_params": UNSEEDED}, {"id": "c"})
    with served(200, reply(tokens, 7)) as (url, bodies):
        assert cli.main(["replay", str(path), "--url", url + "/"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Sending 2 requests of {path} to {url}/."
    assert [line.split(":")[0] for line in lines[1:3]] == ["[1/2] a", "[2/2] c"]
    assert lines[3:] == [last, "Left out, as they were sampled without a seed: 1."]
    assert [body["input_ids"] for body in bodies] == [[5, 6], [5, 6]]


def test_a_refused_request_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "events", {})
    with served(400, {"error": {"message": "too long"}}) as (url, _):
        assert cli.main(["replay", str(path), "--url", url]) == 1
    assert "[1/1] a: refused: too long" in capsys.readouterr().out


def test_a_server_that_samples_otherwise_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "events", {})
    with served(200, reply([1, 2, 3, 4], None)) as (url, _):
        assert cli.main(["replay", str(path), "--url", url]) == 1
    assert "does not sample by the seeds of requests" in capsys.readouterr().err


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "events", {})
    with served(200, {}) as (url, _):
        pass
    assert cli.main(["replay", str(path), "--url", url]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_a_log_without_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "events", {"sampling_params": UNSEEDED})
    assert cli.main(["replay", str(path)]) == 1
    assert "were sampled without a seed, which cannot be repeated" in capsys.readouterr().err
