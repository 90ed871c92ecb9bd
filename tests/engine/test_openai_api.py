"""The OpenAI API, through the official client, while n-grams speculate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.support.servers import Server, Servers

pytestmark = pytest.mark.server("ngram:8")

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "one two three four five, one two three four five, one two three"
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": ["red", "green", "blue"]},
        "warm": {"type": "boolean"},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "warm", "number"],
    "additionalProperties": False,
}


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.get("ngram:8")


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: Any, **options: Any) -> Any:
    options = {"messages": QUESTION, "temperature": 0, "max_tokens": 48} | options
    return client.chat.completions.create(model=MODEL, **options)


def complete(client: Any, **options: Any) -> Any:
    """Past the end of sequence, so that the number of tokens is known."""
    options = {"prompt": STORY, "temperature": 0, "max_tokens": 24} | options
    options["extra_body"] = {"ignore_eos": True}
    return client.completions.create(model=MODEL, **options)


# ---- answers -------------------------------------------------------------------------------------


def test_the_model_is_listed(client: Any) -> None:
    assert len(client.models.list().data) == 1


def test_chat(client: Any, server: Server) -> None:
    answer = chat(client)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 48
    assert server.status()["accept_length"] > 1


def test_completion_is_what_generate_gives(client: Any, server: Server) -> None:
    answer = complete(client)
    assert answer.choices[0].text == server.generate(STORY, 24)["text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24


def test_several_prompts_in_one_request(client: Any) -> None:
    prompts = [STORY, "The capital of France is"]
    answer = complete(client, prompt=prompts)
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone


def test_a_prompt_of_token_ids(client: Any, server: Server) -> None:
    ids = [28, 339, 506, 10]
    assert complete(client, prompt=ids).choices[0].text == server.generate(ids, 24)["text"]


def test_a_streamed_chat_is_the_same(client: Any) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_streamed_completion_is_the_same(client: Any) -> None:
    text = "".join(chunk.choices[0].text for chunk in complete(client, stream=True))
    assert text == complete(client).choices[0].text


def test_a_stream_that_is_left_early_ends_the_request(client: Any, server: Server) -> None:
    stream = chat(client, stream=True, max_tokens=2000)
    next(iter(stream))
    stream.close()
    assert "Paris" in chat(client).choices[0].message.content


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 1), *((1.0, seed) for seed in range(9))])
def test_logprobs_of_a_chat(client: Any, temperature: float, seed: int) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, temperature=temperature, seed=seed)
    rows = answer.choices[0].logprobs.content
    assert len(rows) == answer.usage.completion_tokens
    visible = rows[:-1] if answer.choices[0].finish_reason == "stop" else rows
    # Tokens are shown one by one: where a character is spread over several, each shows as U+FFFD.
    parts = re.split("\ufffd+", "".join(row.token for row in visible))
    pattern = ".*".join(map(re.escape, parts))
    assert re.fullmatch(pattern, answer.choices[0].message.content, re.DOTALL), parts
    for row in rows:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 3
        best = max(top.logprob for top in row.top_logprobs)
        assert row.logprob <= best + 1e-5
        if temperature == 0:
            assert row.logprob == pytest.approx(best, abs=1e-5)


def test_logprobs_of_a_completion(client: Any) -> None:
    answer = complete(client, logprobs=2, max_tokens=12)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == pytest.approx(max(top.values()), abs=1e-5)


def test_several_choices(client: Any) -> None:
    sampled = complete(client, prompt="Once upon a time", n=4, temperature=1.0)
    assert [choice.index for choice in sampled.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in sampled.choices}) > 1
    greedy = chat(client, n=2)
    assert greedy.choices[0].message.content == greedy.choices[1].message.content


def test_a_json_schema(client: Any) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    for temperature in (0.0, 1.0):
        answer = chat(
            client,
            messages=[{"role": "user", "content": "Describe a rose as JSON."}],
            response_format=response_format,
            temperature=temperature,
            max_tokens=200,
        )
        thing = json.loads(answer.choices[0].message.content)
        assert set(thing) == {"colour", "warm", "number"}
        assert thing["colour"] in ("red", "green", "blue")
        assert isinstance(thing["warm"], bool)
        assert isinstance(thing["number"], int) and 0 <= thing["number"] <= 99


def test_a_json_object(client: Any) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=60)
    assert answer.choices[0].message.content.lstrip()[0] in "{["


@pytest.mark.parametrize("stop", [" four", ["four", "nonsense"]])
def test_stop(client: Any, stop: str | list[str]) -> None:
    without = complete(client).choices[0].text
    choice = complete(client, stop=stop).choices[0]
    word = stop if isinstance(stop, str) else stop[0]
    assert choice.text == without[: without.index(word)]
    assert choice.finish_reason == "stop"


def test_a_stop_string_within_accepted_drafts_in_a_stream(client: Any) -> None:
    whole = complete(client, stop=" four").choices[0].text
    text = "".join(chunk.choices[0].text for chunk in complete(client, stop=" four", stream=True))
    assert text == whole


def test_a_logit_bias(client: Any, server: Server) -> None:
    word = AutoTokenizer.from_pretrained(server.get("/get_model_info")["model_path"]).encode(" dog")
    answer = complete(client, logit_bias={str(word[0]): 100}, max_tokens=5)
    assert answer.choices[0].text == " dog" * 5


# ---- errors --------------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": -1},
    "temperature text": {"extra_body": {"temperature": "hot"}},
    "top_p": {"top_p": 2},
    "top_p zero": {"top_p": 0},
    "top_k": {"extra_body": {"top_k": "many"}},
    "min_p": {"extra_body": {"min_p": 3}},
    "max_tokens": {"max_tokens": -1},
    "n": {"n": 0},
    "role": {"messages": [{"role": "nobody", "content": "Hello."}]},
    "no messages": {"messages": []},
    "messages text": {"extra_body": {"messages": "Hello."}},
    "response_format": {"extra_body": {"response_format": {"type": "nonsense"}}},
    "no schema": {"extra_body": {"response_format": {"type": "json_schema"}}},
    "bad schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": {"type": "nonsense"}},
        }
    },
    "bad regex": {"extra_body": {"regex": "(("}},
    "long prompt": {"messages": [{"role": "user", "content": "word " * 9000}]},
    "logit_bias": {"logit_bias": {"999999": 1}},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_the_server_lives_on(
    client: Any, server: Server, name: str
) -> None:
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as error:
        chat(client, **BAD[name])
    assert error.value.status_code in (400, 422)
    assert str(error.value)
    assert server.alive
    assert complete(client, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": 1}', b"\xff\xfe"])
def test_a_body_that_is_no_request(server: Server, body: bytes, client: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/generate"):
        headers = {"content-type": "application/json"}
        status = server.request("POST", path, data=body, headers=headers).status_code
        # SGLang answers 500 to JSON that is no object.
        assert status in ((400, 422, 500) if body in (b"[]", b"null") else (400, 422)), path
    assert complete(client, max_tokens=3).usage.completion_tokens == 3


def test_what_is_not_there(server: Server, client: Any) -> None:
    assert server.request("GET", "/v1/nonsense").status_code == 404
    assert server.request("GET", "/v1/chat/completions").status_code == 405
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such-model")
