"""Requests that SGLang's routes cannot read are answered with status 400 and a sentence."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from tlt_sglang.serving import http_errors


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    http_errors.install(app)

    @app.post("/raise")
    async def fail(kind: str) -> None:
        kinds = {"value": ValueError("no  such\nparser"), "engine": RuntimeError("CUDA is gone")}
        raise kinds.get(kind, AttributeError())

    @app.post("/stream")
    async def stream(after: int) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(after):
                yield b"token "
            raise ValueError("too long")

        return StreamingResponse(chunks())

    @app.post("/right")
    async def right() -> dict[str, int]:
        return {"answer": 42}

    return TestClient(app, raise_server_exceptions=False)


def test_an_error_of_the_request_is_one_sentence(client: TestClient) -> None:
    answer = client.post("/raise?kind=value")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "The request to /raise cannot be read, check the type and value of its fields: "
        "no such parser"
    )
    assert client.post("/raise?kind=x").json()["error"]["message"].endswith(": AttributeError")


def test_an_error_of_the_engine_stays_one(client: TestClient) -> None:
    assert client.post("/raise?kind=engine").status_code == 500


def test_a_stream_that_fails_before_its_first_chunk(client: TestClient) -> None:
    answer = client.post("/stream?after=0")
    assert answer.status_code == 400
    assert "too long" in answer.json()["error"]["message"]


def test_a_stream_that_has_begun_ends_as_before(client: TestClient) -> None:
    answer = client.post("/stream?after=2")
    assert (answer.status_code, answer.text) == (200, "token token ")


def test_right_answers_pass(client: TestClient) -> None:
    answer = client.post("/right")
    assert (answer.status_code, answer.json()) == (200, {"answer": 42})


def test_causes_within_a_task_group() -> None:
    cause = ValueError("x")
    assert http_errors.cause_in_request(ExceptionGroup("tasks", [cause])) is cause
    several = ExceptionGroup("tasks", [cause, RuntimeError("y")])
    assert http_errors.cause_in_request(several) is None
