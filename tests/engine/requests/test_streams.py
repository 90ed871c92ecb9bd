"""A stream has the tokens, texts and logprobs of the answer that is not streamed, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.requests.conftest import KINDS
from tests.support.servers import Server

LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
CLOSE = 1e-3
"""Logprobs of one token, summed in two orders."""
PROMPTS = ("Once upon a time, one two three four f", "Emoji: 😀🎉🚀 and 中文, more:")
CHATS = ("Say hi", "Reply with emoji only 😀🎉🚀", "What is 2+2? One word.", "Count: one two three")


@pytest.fixture
def streaming(speculative: Server, plain: Server, kind: str) -> list[Server]:
    """Each kind of server, and beside the first the one without speculation."""
    return [speculative, plain] if kind == KINDS[0] else [speculative]


def chunks(server: Server, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the server sends, until it ends the stream."""
    with server.request("POST", path, json=body | {"stream": True}, stream=True) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line == b"data: [DONE]":
                return
            if line:
                yield json.loads(line.removeprefix(b"data: "))
    raise AssertionError("the stream has no end")


def numbers(values: Any) -> Any:
    """Round the logprobs in nested lists, as batches of other sizes sum in another order."""
    if isinstance(values, float):
        return pytest.approx(values, abs=CLOSE)
    if isinstance(values, dict):
        return {key: numbers(value) for key, value in values.items()}
    return [numbers(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stops", [{}, {"stop": ["ve, a", "six se", "."]}, {"ignore_eos": True}])
def test_generate(
    streaming: list[Server], plain: Server, kind: str, prompt: str, stops: dict[str, Any]
) -> None:
    body: dict[str, Any] = {
        "text": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 12} | stops,
        "return_logprob": True,
        "top_logprobs_num": 2,
        "token_ids_logprob": [28, 29],
        "return_text_in_logprobs": True,
    }
    expected = plain.post("/generate", body)
    for server in streaming:
        length = 0
        for chunk in chunks(server, "/generate", body):
            meta = chunk["meta_info"]
            assert len(chunk["output_ids"]) == meta["completion_tokens"] > length
            length = len(chunk["output_ids"])
            for name in LISTS:
                assert len(meta[name]) == length
                assert meta[name] == numbers(expected["meta_info"][name][:length])
            assert [entry[1] for entry in meta[LISTS[0]]] == chunk["output_ids"]
        assert chunk["output_ids"] == expected["output_ids"]
        assert chunk["text"] == expected["text"]
        assert chunk["meta_info"]["finish_reason"] == expected["meta_info"]["finish_reason"]


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stop": [" three"]}])
@pytest.mark.parametrize("message", CHATS)
def test_chat(
    streaming: list[Server], plain: Server, kind: str, message: str, options: dict[str, Any]
) -> None:
    body = {
        "model": "default",
        "temperature": 0.0,
        "max_tokens": 20,
        "messages": [{"role": "user", "content": message}],
        "logprobs": True,
        "top_logprobs": 2,
    } | options
    expected = plain.post("/v1/chat/completions", body)["choices"]
    for server in streaming:
        parts = [
            part
            for chunk in chunks(server, "/v1/chat/completions", body)
            for part in chunk["choices"]
        ]
        for choice in expected:
            mine = [part for part in parts if part["index"] == choice["index"]]
            content = [
                e for part in mine if part.get("logprobs") for e in part["logprobs"]["content"]
            ]
            assert content == numbers(choice["logprobs"]["content"])
            text = "".join(part["delta"].get("content") or "" for part in mine)
            assert text == choice["message"]["content"]
            assert mine[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stop": [" ten", " seven"]}])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions(
    streaming: list[Server], plain: Server, kind: str, prompt: str, options: dict[str, Any]
) -> None:
    body = {
        "model": "default",
        "temperature": 0.0,
        "max_tokens": 16,
        "prompt": prompt,
        "logprobs": 2,
    } | options
    expected = plain.post("/v1/completions", body)["choices"]
    for server in streaming:
        parts = [
            part for chunk in chunks(server, "/v1/completions", body) for part in chunk["choices"]
        ]
        for choice in expected:
            mine = [part for part in parts if part["index"] == choice["index"]]
            for name, values in choice["logprobs"].items():
                sent = [v for part in mine if part["logprobs"] for v in part["logprobs"][name]]
                assert sent == numbers(values), name
            assert "".join(part["text"] for part in mine) == choice["text"]
            assert mine[-1]["finish_reason"] == choice["finish_reason"]
