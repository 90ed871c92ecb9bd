"""Two minutes of random requests: see tools/fuzzing, and `make fuzz` for an hour of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.servers import Server
from tools.fuzzing.run import Fuzzing, is_right
from tools.fuzzing.values import LEFT_OUT, calls, routes

SECONDS = 40.0
"""For each of the three kinds of servers."""


@pytest.mark.timeout(600)
def test_random_requests_are_answered_and_leave_nothing(
    speculative: Server, kind: str, record_property: Callable[[str, object], None]
) -> None:
    fuzzing = Fuzzing(speculative)
    fuzzing.run(number=1, seconds=SECONDS)
    record_property("requests", fuzzing.answers.total())
    assert fuzzing.findings == [], fuzzing.table()
    statuses = {status for _, status in fuzzing.answers}
    assert {200, 400} <= statuses, fuzzing.table()


def test_the_requests_are_those_of_their_seed(speculative: Server, kind: str) -> None:
    schema = speculative.get("/openapi.json")
    first = calls(schema, 7, 40)
    assert first == calls(schema, 7, 40)
    assert first != calls(schema, 8, 40)
    tried = {path for _, path in routes(schema)}
    assert {"/generate", "/v1/completions", "/v1/chat/completions"} <= tried
    for beginning in LEFT_OUT:  # none is named in vain
        assert any(path.startswith(beginning) for path in schema["paths"]), beginning


@pytest.mark.parametrize(
    ("status", "text", "right"),
    [
        (200, "", True),
        (400, '{"error": {"message": "temperature must be at least 0"}}', True),
        (400, '{"error": {"message": "bad"}}', False),
        (404, '{"detail": "Not Found"}', False),
        (500, '{"error": {"message": "something went wrong inside"}}', False),
        (0, "no answer (timed out)", False),
    ],
)
def test_right_answers(status: int, text: str, right: bool) -> None:
    assert is_right(status, text) is right
