"""Features of SGLang work under speculation as they do without: the answers are the same.

The `off` server answers the same requests. After each test the speculative server must be idle,
with every KV slot free or in the radix cache; SGLang's own check of that runs whenever it is idle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from tests.support.identity import LENGTH, Reference, difference, each
from tests.support.prompts import instruction
from tests.support.servers import Server, Servers
from tlt_sglang.launcher.child_process import wait_for

STRATEGIES = ("eagle:3x4x8", "ngram:8")
LONG, MIDDLING, SHORT, CODE, ENDING = 18, 19, 0, 6, 4  # places among the prompts
EOS = 2
TIGHT = (
    *("--chunked-prefill-size", "64", "--max-total-tokens", "560"),
    *("--schedule-conservativeness", "0.05"),  # let requests in without thought of their growth
)
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "population": {"type": "integer"},
        "capital": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
    },
    "required": ["name", "population", "capital", "rivers"],
    "additionalProperties": False,
}

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing is running and nothing is held when the test is over."""
    names = {"server", "tight"} & set(request.fixturenames)
    used = [request.getfixturevalue(name) for name in names]
    yield
    for server in used:
        server.wait_until_idle()


def same(
    server: Server, off: Server, prompt: list[int], length: int, **sampling: Any
) -> dict[str, Any]:
    """The speculative answer, after seeing that it is the plain one (or left it at a tie)."""
    expected = off.generate(prompt, length, **sampling)
    got = server.generate(prompt, length, **sampling)
    if difference(off, prompt, expected["output_ids"], got["output_ids"]) is None:
        assert got["text"] == expected["text"]
        assert got["meta_info"]["finish_reason"] == expected["meta_info"]["finish_reason"]
        assert got["meta_info"]["completion_tokens"] == expected["meta_info"]["completion_tokens"]
    return got


# -- cache and prefill -----------------------------------------------------------------------------


@each(STRATEGIES, quick=1)
def test_radix_cache(server: Server, reference: Reference) -> None:
    prompt, expected = reference.texts()[LONG]
    server.post("/flush_cache")
    first = server.generate(prompt, 64)
    again = server.generate(prompt, 64)
    assert first["meta_info"]["cached_tokens"] == 0
    assert again["meta_info"]["cached_tokens"] >= len(prompt) - 2
    reference.compare(LONG, first["output_ids"], 64)
    reference.compare(LONG, again["output_ids"], 64)
    # A conversation that goes on: its own output is in the cache, too.
    turn = server.generate([*prompt, *expected[:60]], 60)
    assert turn["meta_info"]["cached_tokens"] > len(prompt)
    difference(reference.off(), [*prompt, *expected[:60]], expected[60:120], turn["output_ids"])
    # Another text with the same beginning.
    other = [*prompt[:400], *reference.prompts[CODE]]
    answer = same(server, reference.off(), other, 48)
    assert 390 <= answer["meta_info"]["cached_tokens"] <= 400


@each(STRATEGIES, quick=1)
def test_shared_prefixes_at_once(server: Server, reference: Reference) -> None:
    """Requests that share a prefix while they run, each going its own way."""
    start = reference.prompts[LONG][:200]
    prompts = [[*start, *reference.prompts[i]] for i in range(6)]
    expected = [reference.off().generate(prompt, 32)["output_ids"] for prompt in prompts]
    server.post("/flush_cache")
    answers = server.generate_all(prompts, at_once=6, max_new_tokens=32)
    for prompt, ids, answer in zip(prompts, expected, answers, strict=True):
        difference(reference.off(), prompt, ids, answer["output_ids"])
    again = server.generate_all(prompts, at_once=6, max_new_tokens=32)
    assert all(answer["meta_info"]["cached_tokens"] >= len(start) for answer in again)
    for prompt, ids, answer in zip(prompts, expected, again, strict=True):
        difference(reference.off(), prompt, ids, answer["output_ids"])


# -- where an output ends --------------------------------------------------------------------------


@each(STRATEGIES, quick=1)
def test_exact_lengths(server: Server, reference: Reference) -> None:
    """An accepted draft does not carry an output beyond its limit."""
    for length in (1, 2, 3, 5, 7):
        answer = server.generate(reference.prompts[SHORT], length)
        assert answer["meta_info"]["completion_tokens"] == length
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": length}
        reference.compare(SHORT, answer["output_ids"], length)


@each(STRATEGIES, quick=1)
def test_end_of_sequence(server: Server, reference: Reference) -> None:
    answer = same(server, reference.off(), reference.prompts[ENDING], LENGTH, ignore_eos=False)
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert answer["meta_info"]["completion_tokens"] < LENGTH


@each(STRATEGIES, quick=1)
def test_stop_strings(server: Server, reference: Reference) -> None:
    prompt, output = reference.texts()[SHORT]
    text = reference.off().generate(prompt, 64)["text"]
    for stop in (text[30:34], text[101:120], text[50:51]):
        for trim in (False, True):
            answer = same(
                server, reference.off(), prompt, 64, stop=[stop, "never said"], no_stop_trim=trim
            )
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
            assert len(answer["output_ids"]) < len(output)


@each(STRATEGIES[:1])
def test_stop_tokens(server: Server, reference: Reference) -> None:
    prompt, output = reference.texts()[SHORT]
    for token in dict.fromkeys(output[5:30:6]):
        answer = same(server, reference.off(), prompt, 64, stop_token_ids=[token], ignore_eos=False)
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
        assert answer["meta_info"]["completion_tokens"] == output.index(token) + 1


# -- what is sampled from --------------------------------------------------------------------------


@each(STRATEGIES, quick=1)
def test_json_schema(server: Server, reference: Reference) -> None:
    prompt = instruction("Describe the city of Paris as JSON.")
    answer = same(
        server, reference.off(), prompt, 160, json_schema=json.dumps(SCHEMA), ignore_eos=False
    )
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert set(json.loads(answer["text"])) == set(SCHEMA["properties"])


@each(STRATEGIES[:1])
def test_openai_response_format(server: Server, reference: Reference) -> None:
    """Through the OpenAI API, together with requests that have no grammar."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "Describe the city of Rome as JSON."}],
        "temperature": 0,
        "max_tokens": 160,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": SCHEMA},
        },
    }
    expected = reference.off().post("/v1/chat/completions", body)["choices"][0]
    with ThreadPoolExecutor(3) as threads:
        chats = [threads.submit(server.post, "/v1/chat/completions", body) for _ in range(2)]
        free = threads.submit(server.generate, reference.prompts[SHORT], 64)
        for chat in chats:
            choice = chat.result()["choices"][0]
            assert choice["message"]["content"] == expected["message"]["content"]
            assert choice["finish_reason"] == expected["finish_reason"] == "stop"
            assert set(json.loads(choice["message"]["content"])) == set(SCHEMA["properties"])
        reference.compare(SHORT, free.result()["output_ids"], 64)


@each(STRATEGIES, quick=1)
def test_logit_bias(server: Server, reference: Reference) -> None:
    prompt, output = reference.texts()[SHORT]
    bias = {str(output[3]): -100.0, str(output[20]): 3.0}
    answer = same(server, reference.off(), prompt, 64, logit_bias=bias)
    assert output[3] not in answer["output_ids"]


PENALTIES: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.2},
    "repetition": {"repetition_penalty": 1.3},
    "all": {"frequency_penalty": -0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1},
}
Penalised = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="session")
def penalised(servers: Servers, reference: Reference) -> Penalised:
    """Return the output of plain decoding under each penalty for two prompts."""
    off = servers.get("off")
    cases = [(name, i) for name in PENALTIES for i in (SHORT, CODE)]
    with ThreadPoolExecutor(len(cases)) as threads:
        answers = [
            threads.submit(off.generate, reference.prompts[i], 64, **PENALTIES[name])
            for name, i in cases
        ]
        outputs = [answer.result()["output_ids"] for answer in answers]
    result = dict(zip(cases, outputs, strict=True))
    for (_, i), output in result.items():
        assert output != reference.outputs[i][:64]
    return result


@each(STRATEGIES, quick=1)
def test_penalties(penalised: Penalised, server: Server, reference: Reference) -> None:
    """Each token is penalised for all that came before it, within a verify step, too."""
    for (name, i), expected in penalised.items():
        answer = server.generate(reference.prompts[i], 64, **PENALTIES[name])
        assert answer["output_ids"] == expected, name


@each(STRATEGIES, quick=1)
def test_penalties_in_a_batch(penalised: Penalised, server: Server, reference: Reference) -> None:
    """Requests with different penalties, and one with none, at the same time."""
    with ThreadPoolExecutor(5) as threads:
        plain = threads.submit(server.generate, reference.prompts[1], 64)
        others = {
            name: threads.submit(server.generate, reference.prompts[SHORT], 64, **penalty)
            for name, penalty in PENALTIES.items()
        }
        reference.compare(1, plain.result()["output_ids"], 64)
        for name, answer in others.items():
            assert answer.result()["output_ids"] == penalised[name, SHORT], name


@each(STRATEGIES, quick=1)
def test_least_length(server: Server, reference: Reference) -> None:
    """`min_new_tokens` counts tokens and not verify steps."""
    free = reference.off().generate(reference.prompts[ENDING], LENGTH, ignore_eos=False)
    ends = free["meta_info"]["completion_tokens"]
    for least in (ends - 2, ends + 1, ends + 12):
        answer = same(
            server,
            reference.off(),
            reference.prompts[ENDING],
            LENGTH,
            ignore_eos=False,
            min_new_tokens=least,
        )
        assert answer["meta_info"]["completion_tokens"] >= least


@each(STRATEGIES, quick=1)
def test_logprobs_are_the_targets(server: Server, reference: Reference) -> None:
    prompt = reference.prompts[SHORT]
    options = {"return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 0}
    expected = reference.off().generate(prompt, 48, options=options)
    got = server.generate(prompt, 48, options=options)
    assert got["output_ids"] == expected["output_ids"]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        one, other = got["meta_info"][name], expected["meta_info"][name]
        assert [token for _, token, _ in one] == [token for _, token, _ in other]
        assert [score for score, _, _ in one if score is not None] == pytest.approx(
            [score for score, _, _ in other if score is not None], abs=1e-3
        )
    for one, other in zip(
        got["meta_info"]["output_top_logprobs"],
        expected["meta_info"]["output_top_logprobs"],
        strict=True,
    ):
        assert [score for score, _, _ in one] == pytest.approx(
            [score for score, _, _ in other], abs=1e-3
        )


# -- streaming and leaving early -------------------------------------------------------------------


def events(response: Any) -> Iterator[dict[str, Any]]:
    """The JSON of a stream of server-sent events."""
    for line in response.iter_lines():
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            yield json.loads(line[6:])


def stream(server: Server, prompt: list[int], length: int, **options: Any) -> Any:
    """The response of a streaming `/generate`."""
    body = {
        "input_ids": prompt,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": length, "ignore_eos": True},
    }
    return server.request("POST", "/generate", json=body | options, stream=True)


@each(STRATEGIES, quick=1)
def test_streaming(server: Server, reference: Reference) -> None:
    prompt, output = reference.texts()[SHORT]
    whole = server.generate(prompt, 64)
    with stream(server, prompt, 64) as response:
        parts = list(events(response))
    texts = [part["text"] for part in parts]
    assert texts[-1] == whole["text"]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert parts[-1]["meta_info"]["completion_tokens"] == 64
    assert len(parts) > 5
    reference.compare(SHORT, whole["output_ids"], 64)
    assert whole["output_ids"] == output[:64]


@each(STRATEGIES[:1])
def test_openai_chat(server: Server, reference: Reference) -> None:
    """The same through the OpenAI API, streamed and not."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "Name three birds."}],
        "temperature": 0,
        "max_tokens": 48,
    }
    expected = reference.off().post("/v1/chat/completions", body)
    got = server.post("/v1/chat/completions", body)
    assert got["choices"][0]["message"] == expected["choices"][0]["message"]
    assert got["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
    path = "/v1/chat/completions"
    with server.request("POST", path, json=body | {"stream": True}, stream=True) as response:
        deltas = [event["choices"][0]["delta"].get("content") or "" for event in events(response)]
    assert "".join(deltas) == expected["choices"][0]["message"]["content"]


@each(STRATEGIES, quick=1)
def test_client_leaves(server: Server, reference: Reference) -> None:
    """The server notices, frees what the request held, and others do not notice."""
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(server.generate, reference.prompts[CODE], LENGTH)
        with stream(server, reference.prompts[SHORT], 4000) as response:
            part = next(events(response))
        assert part["meta_info"]["completion_tokens"] < 4000
        reference.compare(CODE, other.result()["output_ids"])
    server.wait_until_idle(20)
    reference.compare(SHORT, server.generate(reference.prompts[SHORT], 32)["output_ids"], 32)


@each(STRATEGIES, quick=1)
def test_abort_request(server: Server, reference: Reference) -> None:
    """One of two requests is aborted, then all of four, some of them just started."""

    def long(name: str) -> Any:
        with stream(server, reference.prompts[SHORT], 4000, rid=name) as response:
            return list(events(response))[-1]["meta_info"]

    with ThreadPoolExecutor(4) as threads:
        aborted = threads.submit(long, "to-abort")
        other = threads.submit(server.generate, reference.prompts[CODE], LENGTH)
        assert wait_for(lambda: server.load()["num_running_reqs"] == 2, 30)
        server.post("/abort_request", {"rid": "to-abort"})
        assert aborted.result(timeout=30)["finish_reason"]["type"] == "abort"
        reference.compare(CODE, other.result()["output_ids"])
        many = [threads.submit(long, f"to-abort-{i}") for i in range(4)]
        assert wait_for(lambda: server.load()["num_running_reqs"] > 0, 30)
        time.sleep(0.3)
        server.post("/abort_request", {"abort_all": True})
        for each_one in many:
            assert each_one.result(timeout=30)["finish_reason"]["type"] == "abort"
    server.wait_until_idle(20)
    reference.compare(SHORT, server.generate(reference.prompts[SHORT], 32)["output_ids"], 32)


# -- a small pool and short prefills ---------------------------------------------------------------


@pytest.fixture
def tight(
    servers: Servers, reference: Reference, drafters: dict[str, str], strategy: str
) -> Server:
    """A server with 560 KV slots, prefills of 64 tokens, and SGLang's checks in every step."""
    drafter = drafters.get(strategy.partition(":")[0])
    server = servers.get(strategy, *TIGHT, drafter=drafter, environment=STRICT)
    server.post("/flush_cache")
    return server


def on_tight(strategies: tuple[str, ...]) -> pytest.MarkDecorator:
    """A test for each strategy on its `tight` server."""
    parameters = [
        pytest.param(name, marks=pytest.mark.server(name, "tight")) for name in strategies
    ]
    return pytest.mark.parametrize("strategy", parameters)


@on_tight(STRATEGIES)
def test_chunked_prefill(tight: Server, reference: Reference) -> None:
    prompt = reference.prompts[MIDDLING]
    before = tight.log().count("Prefill batch")
    answer = tight.generate(prompt, LENGTH)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert tight.log().count("Prefill batch") - before >= len(prompt) // 64
    reference.compare(MIDDLING, answer["output_ids"])


@on_tight(STRATEGIES)
def test_retraction(tight: Server, reference: Reference, record_property: Record) -> None:
    """Requests that are thrown out of a full pool and start again give the same output."""
    # With ignore_eos SGLang reckons with the whole output beforehand, and retracts nothing.
    endless = [
        i
        for i, (prompt, output) in enumerate(reference.texts())
        if EOS not in output and len(prompt) < 100
    ]
    endless *= 6  # more than the pool holds at their full length, even without drafts
    before = tight.log().count("Retract requests")
    body = {
        "input_ids": [reference.prompts[i] for i in endless],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": LENGTH},
    }
    answers = tight.post("/generate", body)  # in one request, so that they begin together
    assert tight.log().count("Retract requests") > before
    retractions = [answer["meta_info"]["num_retractions"] for answer in answers]
    record_property("retractions", sum(retractions))
    assert sum(retractions) > 0
    for i, answer in zip(endless, answers, strict=True):
        reference.compare(i, answer["output_ids"])
