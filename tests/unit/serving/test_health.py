"""A failed health check says what the engine waits for; all other answers are left alone."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from tlt_sglang.serving.health import HealthReason


def client(status: int, reason: str | None) -> TestClient:
    async def answer(_: Request) -> Response:
        return Response("body", status)

    paths = ("/health", "/health_generate", "/ready", "/generate")
    app = Starlette(routes=[Route(path, answer) for path in paths])
    return TestClient(HealthReason(app, lambda: reason))


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/ready"])
@pytest.mark.parametrize("reason", ["It waits.", None])
def test_a_failed_check_has_the_reason(path: str, reason: str | None) -> None:
    answer = client(503, reason).get(path)
    assert (answer.status_code, answer.text) == (503, reason or "")


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/generate", 503)])
def test_other_answers_stay(path: str, status: int) -> None:
    answer = client(status, "It waits.").get(path)
    assert (answer.status_code, answer.text) == (status, "body")
