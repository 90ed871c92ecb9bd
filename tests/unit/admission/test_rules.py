"""Each rule of admission: what it accepts, what it refuses, and with which sentence."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tlt_sglang.admission.limits import Limits
from tlt_sglang.admission.requests import (
    CALL_RULES,
    PER_REQUEST,
    RULES,
    SESSION_RULES,
    batch_size,
    call_problems,
    request_problems,
    tokens_problem,
)
from tlt_sglang.admission.rules import show
from tlt_sglang.admission.sampling import RULES as SAMPLING_RULES
from tlt_sglang.admission.sampling import nesting, sampling_problems

LIMITS = Limits(vocabulary=49152, context=8192, longest_prompt=100, hidden_size=4)
PROMPT = [1, 2, 3]
INFINITY, NAN = float("inf"), float("nan")
HUGE = 10**400


def of_sampling(**parameters: Any) -> list[str]:
    return list(sampling_problems(parameters, LIMITS))


def of_request(prompt: Any = PROMPT, **request: Any) -> list[str]:
    return list(request_problems(request, {}, prompt, LIMITS))


SAMPLING: dict[str, tuple[list[Any], list[Any]]] = {
    "max_new_tokens": ([0, 128, 2**31 - 1], [-1, 2**31, 1.0, True, "8", HUGE, NAN]),
    "min_new_tokens": ([0, 128], [-1, 2**31, 0.5, True]),
    "n": ([1, 8, 65536], [0, -1, 65537, 10**9, True, "x", 1.5]),
    "beam_width": ([1, 4], [0, -1, 10**6, 2.0]),
    "temperature": ([0, 0.0, 1e-6, 1, 1e30], [-0.1, 1e31, INFINITY, NAN, HUGE, "hot", True]),
    "top_p": ([0.1, 1, 1.0], [0, 1.1, -1, INFINITY, NAN, "1"]),
    "top_k": ([-1, 1, 50, 2**30, 2**31 - 1], [0, -2, 2**31, 2**62, 1.5, True]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1, NAN]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.1, 2.1, NAN, INFINITY]),
    "presence_penalty": ([-2, 0, 2.0], [-2.1, 2.1, NAN, -INFINITY]),
    "repetition_penalty": ([0.1, 1, 2], [0, 1e-40, -1, 2.1, NAN, INFINITY]),
    "stop": (
        ["a", ["a", "b"], [], "\u00e9"],
        ["", ["a", ""], 5, [5], ["a"] * 33, "x" * 5000, "\ud800"],
    ),
    "stop_token_ids": ([[], [0, 49151], {2}], [[49152], [-1], [2**40], [151645], ["2"], [1.0], 5]),
    "stop_regex": (["a+b", ["a", "[0-9]+$"]], ["(", "a" * 257, "(a+)+b", 5, ["a", "*"], ""]),
    "json_schema": (
        ["{}", "true", '{"type": "object"}'],
        ["{", {}, "x" * 300000, "[" * 65 + "]" * 65],
    ),
    "regex": (["[0-9]{3}", ""], [5, "a" * 9000, "\ud800"]),
    "ebnf": (['root ::= "a"'], [5, ["a"]]),
    "structural_tag": (["{}"], ["{", 5]),
    "ignore_eos": ([True, False], [1, "true"]),
    "skip_special_tokens": ([True, False], [0]),
    "spaces_between_special_tokens": ([True, False], [0]),
    "no_stop_trim": ([True, False], ["no"]),
    "ebnf_full_assistant": ([True, False], [1]),
    "stream_interval": ([1, 8], [0, -1, 1.5, 2**31]),
    "logit_bias": (
        [{}, {"0": 1, "49151": -100.0}, {"1296": -1e20}],
        [
            {"49152": 1},
            {"-1": 1},
            {5: 1.0},
            {"x": 1},
            {"1": "x"},
            {"1": INFINITY},
            {"1": NAN},
            [1],
            {"1": 1e21},
        ],
    ),
    "sampling_seed": ([0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 1.5, True]),
    "custom_params": (
        [{}, {"a": 1, "b": [1, "x"], "c": {"d": None}}],
        [5, {"a": {"b": {"c": 1}}}, {"a": [[1]]}, {"a": object()}, {"a": 2**70}, {1: 2}],
    ),
}


@pytest.mark.parametrize("tokens", [[], [0, 49151], None])
def test_a_predicted_output(tokens: object) -> None:
    assert not sentences({"predicted_output": tokens})


@pytest.mark.parametrize("tokens", ["text", [49152], [-1], [1.5], {"a": 1}])
def test_a_predicted_output_that_is_none(tokens: object) -> None:
    (sentence,) = sentences({"predicted_output": tokens})
    assert sentence.startswith("predicted_output ")


def sentences(custom_params: dict[str, object]) -> list[str]:
    return list(sampling_problems({"custom_params": custom_params}, LIMITS))


def test_every_sampling_rule_is_tried() -> None:
    assert set(SAMPLING) == {rule.field for rule in SAMPLING_RULES}


@pytest.mark.parametrize("field", SAMPLING)
def test_sampling(field: str) -> None:
    accepted, refused = SAMPLING[field]
    for value in [None, *accepted]:
        assert of_sampling(**{field: value}, **LONG.get(field, {})) == [], value
    for value in refused:
        sentences = of_sampling(**{field: value})
        assert len(sentences) == 1 and sentences[0].startswith(field) and len(sentences[0]) < 400, (
            value
        )
        assert sentences[0].endswith(".") and "\n" not in sentences[0], value


LONG: dict[str, dict[str, Any]] = {"min_new_tokens": {"max_new_tokens": 1000}}
"""A value may need others beside it to be accepted."""


def test_the_sentences_name_field_value_and_range() -> None:
    assert of_sampling(temperature=-1) == ["temperature is -1; it must be a number from 0 to 1e30."]
    assert of_sampling(stop_token_ids=[2, 49152]) == [
        "stop_token_ids contains 49152; it must be a list of token ids from 0 to 49151."
    ]
    assert of_request(top_logprobs_num=49153) == [
        "top_logprobs_num is 49153; it must be an integer from 0 to 49152."
    ]
    assert of_request([]) == ["input_ids is null; it must hold at least one token."]
    assert of_request([], text="") == ["text is ''; it must hold at least one token."]
    assert of_request([1, -1]) == [
        "input_ids contains -1; it must be a list of token ids from 0 to 49151."
    ]
    assert of_request([5] * 101) == ["The prompt has 101 tokens, but must have at most 100."]


def test_parameters_that_contradict_each_other() -> None:
    assert of_sampling(min_new_tokens=9, max_new_tokens=8) == [
        "min_new_tokens is 9; it must be at most max_new_tokens, which is 8."
    ]
    assert of_sampling(min_new_tokens=129) == [
        "min_new_tokens is 129; it must be at most max_new_tokens, which is 128."
    ]
    assert of_sampling(min_new_tokens=129, max_new_tokens=None) == []
    assert of_sampling(regex="a", ebnf="b") == [
        "regex and ebnf are set together, but a request may have one of them."
    ]
    assert of_sampling(regex="a", ebnf="") == []
    assert of_sampling(is_normalized=True) == [
        "is_normalized cannot be set by a request; leave it out."
    ]


def test_nesting_skips_strings() -> None:
    assert nesting('{"a": [1, "[[[\\\\"]}') == 2
    assert nesting("5") == 0


REQUESTS: dict[str, tuple[list[Any], list[Any]]] = {
    "rid": (["a"], ["", 5, "x" * 1025, "\ud800"]),
    "session_id": (["a"], ["", 5]),
    "text": (["", "a"], [5, "\ud800"]),
    "return_logprob": ([True, False], [1, "yes"]),
    "top_logprobs_num": ([0, 49152], [-1, 49153, 10**6, True, 1.0]),
    "token_ids_logprob": ([[], [0, 49151]], [[49152], [-1], 5, ["x"], [[1]]]),
    "return_sampling_mask": ([True], [1]),
    "stream": ([True], [1]),
    "return_text_in_logprobs": ([True], [1]),
    "return_flat_raw_top_logprobs": ([True], [1]),
    "return_routed_experts": ([True], [1]),
    "routed_experts_start_len": ([0, 5], [-1, 2**31, "x"]),
    "return_indexer_topk": ([False], [0]),
    "lora_path": (["a"], ["", 5]),
    "custom_logit_processor": (["{}"], [5]),
    "bootstrap_host": (["h"], [5]),
    "bootstrap_port": ([0, 65535], [-1, 65536, "x"]),
    "bootstrap_room": ([0, 2**63 - 1], [-1, 2**63]),
    "bootstrap_pair_key": (["k"], [5]),
    "decode_tp_size": ([1], [0, "x"]),
    "routed_dp_rank": ([0], [-1, "x"]),
    "disagg_prefill_dp_rank": ([0], [-1]),
    "routing_key": (["k"], [5]),
    "conversation_id": (["k"], [5]),
    "require_reasoning": ([True], [1]),
    "max_thinking_tokens": ([0, 5], [-1, 1.5]),
    "priority": ([0, -5, 2**63 - 1], [2**63, 0.5, "x"]),
    "extra_key": (["k"], [5]),
    "cache_salt": (["k"], [5]),
    "return_prompt_token_ids": ([True], [1]),
    "session_params": ([{}, {"id": "a", "offset": 0, "replace": True}], [5, [1]]),
    "positional_embed_overrides": ([object()], [0, True, [[0.1], [1]], {}, "x"]),
    "multi_item_delimiter_indices": ([[], [0, 2]], [[3], [-1], 5, ["x"]]),
    "token_indices_to_pool": ([[0]], [[3], [10**9]]),
    "input_embeds": (
        [[[0.0, 1, -2.5, 3.0]]],
        [[], [[0.0] * 3], [[0.0] * 5], [[NAN] * 4], [[INFINITY] * 4], [["x"] * 4], [0.0], "x"],
    ),
    "logprob_start_len": ([-1, 0, 3], [-2, -5, 2**31, 1.5, "x"]),
}


def test_tokens_to_decode() -> None:
    for tokens in ([], [0, 49151], [[], [5]], [[1, 2], [3]]):
        assert tokens_problem(tokens, LIMITS) is None
    says = "it must be a list of token ids from 0 to 49151, or several."
    assert tokens_problem([1, -1], LIMITS) == f"tokens contains -1; {says}"
    assert tokens_problem([[1], [49152]], LIMITS) == f"tokens contains 49152; {says}"


def test_every_rule_of_a_request_is_tried() -> None:
    assert {rule.field for rule in RULES} <= set(REQUESTS)


@pytest.mark.parametrize("field", REQUESTS)
def test_requests(field: str) -> None:
    accepted, refused = REQUESTS[field]
    for value in [None, *accepted]:
        assert of_request(**{field: value}) == [], value
    for value in refused:
        sentences = of_request(**{field: value})
        assert len(sentences) == 1 and sentences[0].startswith(field) and len(sentences[0]) < 400, (
            value
        )


@pytest.mark.parametrize(
    "prompt", [[49152], [1, -1], [2**31], [1, 2**62], [2**70], [1.0], ["a"], [None]]
)
def test_prompts_that_are_refused(prompt: list[Any]) -> None:
    assert len(of_request(prompt)) == 1
    assert len(of_request(prompt, session_params={"id": "a"})) == 1


def test_prompts_that_are_accepted() -> None:
    assert of_request(array("q", PROMPT)) == []
    assert of_request(None) == []
    assert of_request([], session_params={"id": "a"}) == []  # the session holds the prompt


def test_the_start_of_logprobs() -> None:
    """Where logprobs are not returned, SGLang does not read it."""
    sentence = (
        "logprob_start_len is 4; it must be -1, or an integer from 0 to the length of the prompt, "
        "which is 3."
    )
    assert of_request(return_logprob=True, logprob_start_len=4) == [sentence]
    assert of_request(return_logprob=False, logprob_start_len=4) == []
    session = {"id": "a"}
    assert of_request(return_logprob=True, logprob_start_len=4, session_params=session) == []


def test_ids_of_health_checks() -> None:
    assert of_request(rid="HEALTH_CHECK_1") == [
        "rid is 'HEALTH_CHECK_1'; it must not begin as SGLang's own requests do, HEALTH_CHECK."
    ]
    assert of_request(rid="HEALTH_CHECK_1", log_metrics=False) == []


def test_more_logprobs_than_memory() -> None:
    asks = {"return_logprob": True, "top_logprobs_num": 49152, "logprob_start_len": 0}
    assert list(request_problems(asks, {"max_new_tokens": 8}, PROMPT, LIMITS)) == []
    assert list(request_problems(asks, {}, PROMPT, LIMITS)) == []
    for most, tokens in ((1000, 1003), (None, 8195)):
        assert list(request_problems(asks, {"max_new_tokens": most}, PROMPT, LIMITS)) == [
            f"top_logprobs_num and token_ids_logprob ask for {49152 * tokens} logprobs of {tokens} "
            "tokens; a request may have at most 16777216."
        ]
    flat = asks | {"return_flat_raw_top_logprobs": True}
    assert list(request_problems(flat, {"max_new_tokens": 1000}, PROMPT, LIMITS)) == []


def test_sessions() -> None:
    assert of_request(session_params={"name": "a"}) == [
        "session_params has the unknown field 'name'; it may have drop_previous_output, id, "
        "offset, replace and rid."
    ]
    for field, value in {
        "id": 5,
        "rid": 5,
        "offset": -1,
        "replace": 1,
        "drop_previous_output": 0,
    }.items():
        (sentence,) = of_request(session_params={field: value})
        assert sentence.startswith(f"session_params: {field} is ")
    assert {rule.field for rule in SESSION_RULES} == {
        "id",
        "rid",
        "offset",
        "replace",
        "drop_previous_output",
    }


@pytest.mark.parametrize(
    ("call", "size"),
    [
        ({"text": "a"}, None),
        ({"text": ["a"]}, 1),
        ({"input_ids": [1]}, None),
        ({"input_ids": [[1], [2]]}, 2),
        ({"input_ids": []}, None),
        ({"input_embeds": [[0.0]]}, None),
        ({"input_embeds": [[[0.0]], [[0.0]]]}, 2),
        ({}, None),
    ],
)
def test_batch_sizes(call: dict[str, Any], size: int | None) -> None:
    assert batch_size(call) == size
    assert list(call_problems(call)) == []


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"text": 5}, "text is 5"),
    ({"text": []}, "text is empty"),
    ({"text": ["a", 5]}, "text contains 5"),
    ({"text": "a", "sampling_params": 5}, "sampling_params is 5"),
    ({"text": "a", "sampling_params": []}, "sampling_params is empty"),
    ({"text": ["a"], "sampling_params": [5]}, "sampling_params is [5]"),
    ({"text": ["a"], "sampling_params": {"n": 0}}, "n is 0"),
    ({"text": ["a"], "sampling_params": {"n": "x"}}, "n is 'x'"),
    ({"text": ["a"] * 3, "sampling_params": {"n": 65536}}, "The call asks for 196608 answers"),
    ({"text": "a", "rid": ""}, "rid is ''"),
    ({"text": "a", "rid": ["b"]}, "rid is ['b']; it must be a value where a call has one"),
    ({"text": ["a"], "token_ids_logprob": [[1], [2]]}, "token_ids_logprob has 2 entries"),
    ({"text": "a", "received_time": NAN}, "received_time is nan"),
    ({"text": "a", "priority": "high"}, "priority is 'high'"),
    ({"text": "a", "data_parallel_rank": -1}, "data_parallel_rank is -1"),
]


@pytest.mark.parametrize(("call", "says"), CALLS)
def test_calls_that_cannot_be_split(call: dict[str, Any], says: str) -> None:
    (sentence,) = call_problems(call)
    assert sentence.startswith(says)


def test_n_is_checked_without_a_batch() -> None:
    """One prompt with n answers becomes a batch only later."""
    for n in (0, -1, 10**9, "x", True):
        (sentence,) = call_problems({"text": "a", "sampling_params": {"n": n}})
        assert sentence.startswith("n is ")


@pytest.mark.parametrize("field", PER_REQUEST)
def test_lists_of_another_length(field: str) -> None:
    entry: object = {} if field == "sampling_params" else None
    (sentence,) = call_problems({"text": ["a", "b"], field: [entry] * 3})
    assert sentence == f"{field} has 3 entries, but the call has 2 prompts."


def test_lists_for_one_prompt() -> None:
    for field in PER_REQUEST:
        if field != "sampling_params":
            (sentence,) = call_problems({"text": "a", field: []})
            assert sentence == f"{field} is empty; it must be a value where a call has one prompt."


def test_rules_of_calls_are_few() -> None:
    """All other rules are those of each request."""
    fields = {"rid", "text", "received_time", "data_parallel_rank", "priority", "routed_dp_rank"}
    assert {rule.field for rule in CALL_RULES} == fields


def test_values_are_shortened() -> None:
    assert len(show("x" * 10**6)) < 70
    assert len(show(list(range(10**6)))) < 70
    assert show(HUGE) == "an integer of 1329 bits"
    assert (show(None), show(True), show(0), show([])) == ("null", "true", "0", "empty")
