"""Requests that cannot be served are answered with one sentence, and nothing else notices them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.identity import Reference
from tests.support.servers import Server
from tlt_sglang.launcher.child_process import wait_for

VOCABULARY = 49152
CASES: list[tuple[dict[str, Any], str]] = [
    # Token ids.
    ({"input_ids": [49152]}, "input_ids contains 49152; it must be a list of token ids from 0 to"),
    ({"input_ids": [1, 2, -1]}, "input_ids contains -1;"),
    ({"input_ids": [1, 2**31]}, "input_ids contains 2147483648;"),
    ({"input_ids": [1, 2**62]}, "input_ids contains 4611686018427387904;"),
    ({"input_ids": [[1, 2], [49152]]}, "input_ids contains 49152;"),
    ({"input_ids": [[1, 2], []]}, "input_ids is empty; it must hold at least one token."),
    ({"input_ids": []}, "input_ids cannot be empty."),
    ({"text": "a", "input_ids": [], "audio_data": {"url": "x"}}, "input_ids"),
    # Texts.
    ({"text": ""}, "text is ''; it must hold at least one token."),
    ({"text": ["one", ""]}, "text is ''; it must hold at least one token."),
    ({"text": []}, "text is empty; it must be a string, or a list of strings."),
    ({"text": "", "sampling_params": {"n": 3}}, "text is ''; it must hold at least one token."),
    # Logprobs.
    (
        {"top_logprobs_num": 49153},
        "top_logprobs_num is 49153; it must be an integer from 0 to 49152.",
    ),
    ({"top_logprobs_num": 10**6}, "top_logprobs_num is 1000000;"),
    ({"top_logprobs_num": -1}, "top_logprobs_num is -1;"),
    ({"token_ids_logprob": [49152]}, "token_ids_logprob contains 49152;"),
    ({"token_ids_logprob": [-1]}, "token_ids_logprob contains -1;"),
    ({"logprob_start_len": -2}, "logprob_start_len is -2; it must be -1, or an integer from 0 to"),
    ({"logprob_start_len": -5}, "logprob_start_len is -5;"),
    ({"logprob_start_len": 5}, "logprob_start_len is 5; it must be -1, or an integer from 0 to"),
    ({"token_indices_to_pool": [10**9]}, "token_indices_to_pool contains 1000000000;"),
    # Others.
    ({"rid": ""}, "rid is ''; it must be a string of 1 to 1024 characters"),
    ({"rid": ["a"]}, "rid is ['a'];"),
    (
        {"bootstrap_port": [], "sampling_params": {"n": 2}},
        "bootstrap_port is empty; it must be a value where a call has one prompt.",
    ),
    ({"priority": 2**63}, "priority is 9223372036854775808;"),
    ({"session_params": {"colour": 1}}, "session_params has the unknown field 'colour'"),
    ({"session_params": {"id": "no such"}}, "Invalid request: session id no such does not exist"),
    ({"session_params": {"id": "a", "offset": -1}}, "session_params: offset is -1;"),
    ({"lora_path": "no such"}, "LoRA adapter 'no such' was requested"),
    ({"custom_logit_processor": "x"}, "custom_logit_processor cannot be loaded"),
    ({"positional_embed_overrides": 0}, "positional_embed_overrides is 0; it must be a Positional"),
    ({"positional_embed_overrides": [[0.1], [1]]}, "positional_embed_overrides is [[0.1], [1]];"),
    ({"bootstrap_port": 65536}, "bootstrap_port is 65536;"),
    ({"routed_dp_rank": -1}, "routed_dp_rank is -1;"),
    ({"return_sampling_mask": True}, "return_sampling_mask is not supported with speculative"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params has 1 entries, but the call"),
]
"""Bodies of POST /generate, and how their answer begins."""

PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": [49152]}, "stop_token_ids contains 49152; it must be a list of token ids"),
    ({"stop_token_ids": [151645], "min_new_tokens": 2}, "stop_token_ids contains 151645;"),
    ({"stop_token_ids": [-1], "min_new_tokens": 2}, "stop_token_ids contains -1;"),
    ({"stop_token_ids": [2**40], "min_new_tokens": 2}, "stop_token_ids contains 1099511627776;"),
    ({"temperature": -1}, "temperature is -1; it must be a number from 0 to"),
    ({"temperature": 1e39}, "temperature is 1e+39; it must be a number from 0 to"),
    ({"top_p": 0}, "top_p is"),
    ({"top_k": 0}, "top_k is 0; it must be an integer from 1 to"),
    ({"top_k": 2**31}, ""),
    ({"min_p": 1.5}, "min_p is 1.5;"),
    ({"frequency_penalty": 3}, "frequency_penalty is 3"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; it must be a number from 1e-10"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1;"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9; it must be at most max_new"),
    ({"n": 0}, "n is 0; it must be an integer from 1 to 65536."),
    ({"n": 10**9}, "n is 1000000000;"),
    ({"beam_width": 0}, "beam_width is 0;"),
    ({"beam_width": 2}, "Beam search is not supported with speculative decoding."),
    ({"stream_interval": 0}, "stream_interval is 0;"),
    ({"logit_bias": {"49152": 1.0}}, "logit_bias contains '49152';"),
    ({"logit_bias": {"-1": 1.0}}, "logit_bias contains '-1';"),
    ({"logit_bias": {"5": 1e39}}, "logit_bias contains {'5': 1e+39};"),
    ({"sampling_seed": 2**63}, ""),
    ({"stop": ""}, "stop is ''; it must be a string, or a list"),
    ({"stop": ["a", ""]}, "stop contains '';"),
    ({"stop": ["a"] * 33}, "stop is ["),
    ({"stop_regex": "("}, "stop_regex is '(', which cannot be used, because it does not compile"),
    ({"stop_regex": "(a+)+b"}, "stop_regex is '(a+)+b', which cannot be used, because"),
    ({"regex": "("}, "Failed to compile regex grammar"),
    ({"ebnf": "root ::= "}, "Failed to compile ebnf grammar"),
    ({"json_schema": "{"}, "json_schema is '{', which is not valid JSON"),
    ({"json_schema": '{"type": "colour"}'}, "Failed to compile json grammar"),
    ({"json_schema": "[" * 99 + "]" * 99}, "json_schema is 99 levels deep;"),
    ({"structural_tag": "{}"}, "Failed to compile structural_tag grammar"),
    ({"regex": "a", "ebnf": 'root ::= "a"'}, "regex and ebnf are set together"),
    ({"custom_params": {"a": {"b": {"c": 1}}}}, "custom_params contains"),
    ({"ebnf": "root ::= root"}, "The grammar of the request allows no token after 0 tokens"),
    (
        {"regex": "[0-9]{3}", "min_new_tokens": 8, "ignore_eos": False},
        "min_new_tokens is 8, but the grammar of the request ends after 3 tokens;",
    ),
]
"""Sampling parameters, likewise."""

OPENAI: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": [49152]}, "input_ids contains 49152;"),
    ("completions", {"prompt": ""}, "Prompt cannot be empty"),
    ("completions", {"prompt": ["a", ""]}, "text is ''; it must hold at least one token."),
    ("completions", {"logprobs": 10**6}, "top_logprobs_num is 1000000;"),
    ("completions", {"stop_token_ids": [49152], "min_tokens": 2}, "stop_token_ids contains 49152;"),
    ("completions", {"stop_regex": "("}, "stop_regex is '('"),
    ("completions", {"logit_bias": {"49152": 1}}, "logit_bias contains '49152';"),
    ("completions", {"stop_token_ids": [-1], "stream": True}, "stop_token_ids contains -1;"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs_num is 1000000;"),
    ("chat/completions", {"stop_token_ids": [2**40]}, "stop_token_ids contains 1099511627776;"),
    ("detokenize", {"tokens": [1, -1]}, "tokens contains -1; it must be a list of token ids from"),
    ("detokenize", {"tokens": [[1], [2**40]]}, "tokens contains 1099511627776;"),
    ("chat/completions", {"n": 0}, "n is 0;"),
    ("chat/completions", {"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
    ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens is 0;"),
    ("chat/completions", {"stop_token_ids": [-1], "stream": True}, "stop_token_ids contains -1;"),
]
"""Bodies of POST /v1/..., likewise."""


def body(changes: dict[str, Any], parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a body of POST /generate, valid but for `changes` and `parameters`."""
    sampling = {"max_new_tokens": 16, "temperature": 0.0} | (parameters or {})
    valid = {"return_logprob": True, "sampling_params": sampling}
    prompt = {} if {"text", "input_ids"} & changes.keys() else {"text": "One two"}
    return valid | prompt | changes


def bodies() -> list[tuple[dict[str, Any], str]]:
    """Return every broken body, and how its answer begins."""
    return [(body(changes), says) for changes, says in CASES] + [
        (body({}, parameters), says) for parameters, says in PARAMETERS
    ]


def refusal(server: Server, path: str, payload: dict[str, Any]) -> tuple[int, str]:
    """Return the status and the sentence of an answer."""
    answer = server.request("POST", path, json=payload)
    decoded = answer.json() if answer.status_code != 200 else {}
    error = decoded.get("error", decoded)
    return answer.status_code, str(error.get("message") if isinstance(error, dict) else error)


@pytest.fixture
def watched(speculative: Server, reference: Reference) -> Any:
    """The server, with a request in flight that must not notice anything."""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(speculative.generate, reference.prompts[6], 96)
        yield speculative
        reference.compare(6, running.result()["output_ids"], 96)
    # As many requests as before, and every KV slot.
    speculative.wait_until_idle()
    assert speculative.alive


def test_bad_requests(watched: Server) -> None:
    wrong = []
    for payload, says in bodies():
        status, message = refusal(watched, "/generate", payload)
        if status != 400 or not message.startswith(says) or "\n" in message.strip():
            wrong.append((payload, status, message))
    assert wrong == []


def test_bad_streams(watched: Server) -> None:
    """They are refused before the stream begins."""
    for payload in (body({"text": ""}), body({"input_ids": [49152]}), body({}, {"regex": "("})):
        status, message = refusal(watched, "/generate", payload | {"stream": True})
        assert status == 400 and message, payload


def test_bad_openai_requests(watched: Server) -> None:
    """In OpenAI's form of an error."""
    wrong = []
    for path, changes, says in OPENAI:
        valid: dict[str, Any] = {"model": "x", "max_tokens": 8}
        if path == "completions":
            valid["prompt"] = "One two"
        elif path.startswith("chat"):
            valid["messages"] = [{"role": "user", "content": "One two"}]
        answer = watched.request("POST", f"/v1/{path}", json=valid | changes)
        error = answer.json()
        form = {"object": "error", "param": None, "code": 400}.items() <= error.items()
        if answer.status_code != 400 or not form or not error["message"].startswith(says):
            wrong.append((path, changes, answer.status_code, error))
    assert wrong == []


@pytest.mark.parametrize("name", ["release_memory_occupation", "resume_memory_occupation"])
def test_commands_that_need_a_gpu(watched: Server, name: str) -> None:
    status, message = refusal(watched, f"/{name}", {})
    assert (status, message) == (
        400,
        f"{name} needs a GPU, and this engine runs on CPU; leave the call out.",
    )


def test_a_call_with_one_bad_request_schedules_none(speculative: Server) -> None:
    """Neither texts nor ids before it are decoded: the prompts are not in the cache."""
    for field, prompts in (
        ("text", ["A sentence that only this test sends, and only once.", ""]),
        ("input_ids", [[100, 200, 300, 400, 500, 600, 700, 800], [49152]]),
    ):
        status, _ = refusal(speculative, "/generate", body({field: prompts}))
        assert status == 400
        answer = speculative.post("/generate", body({field: prompts[0]}))
        assert answer["meta_info"]["cached_tokens"] == 0


def test_the_same_id_twice(watched: Server) -> None:
    """The second request is refused; the first goes on, and the id is free afterwards."""
    first = body({"rid": "twice"}, {"max_new_tokens": 64, "ignore_eos": True})
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(watched.post, "/generate", first)
        assert wait_for(lambda: watched.load()["num_running_reqs"] > 1, 30.0) or running.done()
        if not running.done():
            status, message = refusal(watched, "/generate", body({"rid": "twice"}))
            assert running.done() or (status, "Duplicate request ID" in message) == (400, True)
        assert len(running.result()["output_ids"]) == 64
    for prompts in (["a", "b"], [[1], [2]]):
        field = "text" if isinstance(prompts[0], str) else "input_ids"
        status, message = refusal(watched, "/generate", body({field: prompts, "rid": ["c", "c"]}))
        assert status == 400 and "Duplicate request ID" in message
    assert watched.post("/generate", body({"rid": "twice"}))["meta_info"]["id"] == "twice"


def test_logit_processors_that_raise(watched: Server) -> None:
    """Each ends its own request; those that forbid different tokens share a batch."""
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    processor = {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()}

    def ask(custom_params: dict[str, Any] | None) -> tuple[int, str]:
        return refusal(watched, "/generate", body(processor, {"custom_params": custom_params}))

    for custom_params, says in (
        (None, "TypeError"),
        ({}, "KeyError: 'token_ids'"),
        ({"token_ids": [VOCABULARY]}, "IndexError"),
        ({"token_ids": list(range(VOCABULARY))}, "from which no token can be drawn"),
    ):
        status, message = ask(custom_params)
        assert status == 400 and says in message
        assert message.startswith("The request was ended because its parameters cannot be")
    with ThreadPoolExecutor(4) as threads:
        parameters = [{"token_ids": [token]} for token in (1, 2, 3, 4)]
        assert [status for status, _ in threads.map(ask, parameters)] == [200] * 4


def test_plain_decoding_refuses_the_same(plain: Server, reference: Reference) -> None:
    wrong = []
    for payload, says in bodies():
        if "speculative" in says:
            continue
        status, message = refusal(plain, "/generate", payload)
        if status != 400 or not message.startswith(says):
            wrong.append((payload, status, message))
    assert wrong == []
    reference.compare(0, plain.generate(reference.prompts[0], 24)["output_ids"], 24)
    plain.wait_until_idle()


def test_what_needs_plain_decoding(plain: Server) -> None:
    """An engine that speculates refuses these two, as the cases above say."""
    beams = body({"return_logprob": False}, {"beam_width": 2, "max_new_tokens": 4})
    assert plain.post("/generate", beams)
    answer = plain.post("/generate", body({"return_sampling_mask": True}, {"max_new_tokens": 4}))
    assert len(answer["meta_info"]["output_token_sampling_mask"]) == 4
    plain.wait_until_idle()


def test_the_highest_temperature(speculative: Server) -> None:
    """It draws from all tokens alike, or from those that a grammar allows."""
    temperature = 1e30
    options = {"return_logprob": True}
    answer = speculative.generate("One two", 16, temperature=temperature, options=options)
    ids = answer["output_ids"]
    assert len(ids) == 16 and all(0 <= token < VOCABULARY for token in ids)
    values = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert all(value == value and value <= 0 for value in values)
    answer = speculative.generate("One two", 4, temperature=temperature, regex="[0-9]{4}")
    assert answer["text"].isdigit()


def test_good_requests_among_bad_ones(speculative: Server, reference: Reference) -> None:
    """200 random requests in flight while 50 broken ones arrive: all as if they were alone."""
    rng = random.Random(18)
    chosen = [(rng.randrange(len(reference.prompts)), rng.randint(1, 16)) for _ in range(200)]
    broken = rng.sample(bodies(), 50)
    with ThreadPoolExecutor(48) as good, ThreadPoolExecutor(4) as bad:
        answers = [
            good.submit(speculative.generate, reference.prompts[prompt], length)
            for prompt, length in chosen
        ]
        refusals = [bad.submit(refusal, speculative, "/generate", each) for each, _ in broken]
        for (prompt, length), answer in zip(chosen, answers, strict=True):
            reference.compare(prompt, answer.result()["output_ids"], length)
        assert {each.result()[0] for each in refusals} == {400}
    speculative.wait_until_idle()
