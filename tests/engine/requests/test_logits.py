"""Changes of logits reach every token, and logprobs are those of plain decoding.

They are penalties, biases, grammars and custom logit processors, alone and together.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.requests.conftest import ALLOWED, NGRAMS
from tests.support import processors
from tests.support.identity import Reference
from tests.support.servers import Server, Servers

CLOSE = 1e-3
"""Logprobs of one token, summed in two orders."""
LENGTH = 40
PROMPTS = (0, 6, 13)
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 4, "token_ids_logprob": [28, 198, 2531]}
FIELDS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")

ALONE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "frequency": {"frequency_penalty": 0.6},
    "presence": {"presence_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": {"28": -4.0, "284": 2.5}},
    "least length": {"min_new_tokens": 25, "ignore_eos": False, "stop_token_ids": [198, 28]},
    "grammar": {"regex": "[a-z ]{25}"},
}
TOGETHER: dict[str, Any] = {
    "frequency_penalty": 0.4,
    "presence_penalty": 0.3,
    "repetition_penalty": 1.2,
    "logit_bias": {"28": -4.0, "284": 2.5},
    "min_new_tokens": 20,
    "ignore_eos": False,
}
SAMPLED = {"temperature": 0.7, "top_p": 1e-6}
"""Sampling that leaves one token of the distribution, whose logprobs it does not change."""
COLD = SAMPLED | {"temperature": 0.01}
"""A temperature at which most probabilities round to 0."""

CASES = ALONE | {
    "together": TOGETHER,
    "negative": {"frequency_penalty": -0.2, "presence_penalty": -0.3, "repetition_penalty": 0.9},
    "together with a grammar": TOGETHER | {"regex": "[a-z ]{25}", "min_new_tokens": 0},
    "sampled": SAMPLED,
    "sampled together": TOGETHER | SAMPLED,
    "sampled with min-p": {"temperature": 0.7, "min_p": 1.0},
    "sampled, cold": COLD,
    "sampled, cold, together": TOGETHER | COLD,
}


def same_logprobs(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two answers: their tokens, and every logprob that was asked for."""
    assert got["output_ids"] == expected["output_ids"]
    for field in FIELDS:
        rows, others = got["meta_info"][field], expected["meta_info"][field]
        assert len(rows) == len(others) == len(got["output_ids"]), field
        if field == FIELDS[0]:
            rows, others = [[row] for row in rows], [[row] for row in others]
        for row, other in zip(rows, others, strict=True):
            logprobs = [logprob for logprob, *_ in other]
            assert [logprob for logprob, *_ in row] == pytest.approx(logprobs, abs=CLOSE), field
            if field != FIELDS[1]:  # of which two may be equal
                assert [token for _, token, *_ in row] == [token for _, token, *_ in other]


def ask(server: Server, prompts: list[list[int]], requests: list[dict[str, Any]]) -> list[Any]:
    """Send every request for every prompt, at once; `options` of a request go into its body."""

    def generate(prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        options = LOGPROBS | request.get("options", {})
        sampling = {name: value for name, value in request.items() if name != "options"}
        return server.generate(prompt, LENGTH, options=options, **sampling)

    pairs = [(prompt, request) for prompt in prompts for request in requests]
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(generate, *zip(*pairs, strict=True)))


@pytest.fixture
def prompts(reference: Reference) -> list[list[int]]:
    return [reference.prompts[i] for i in PROMPTS]


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_logprobs(
    speculative: Server, plain: Server, prompts: list[list[int]], at_once: bool
) -> None:
    requests = list(CASES.values())
    groups = [requests] if at_once else [[request] for request in requests]
    some = prompts[:1] if at_once else prompts[:2]
    for group in groups:
        for got, expected in zip(
            ask(speculative, some, group), ask(plain, some, group), strict=True
        ):
            same_logprobs(got, expected)


MORE: tuple[dict[str, Any], ...] = ({}, COLD, TOGETHER)
"""Other parameters of a request with a processor."""


@pytest.mark.parametrize("name", processors.PARAMETERS)
def test_custom_logit_processors(
    speculative: Server, plain: Server, prompts: list[list[int]], name: str
) -> None:
    requests = [processors.body(name) | more for more in MORE]
    if name == "Forbids":  # the others put tokens that a grammar refuses
        requests.append(processors.body(name) | {"regex": "[a-z ,]{25}"})
    answers = ask(speculative, prompts[:2], requests)
    for got, expected in zip(answers, ask(plain, prompts[:2], requests), strict=True):
        same_logprobs(got, expected)
    if name == "Forbids":
        forbidden = set(processors.PARAMETERS[name]["token_ids"])
        assert not forbidden & {token for one in answers for token in one["output_ids"]}


def test_a_processor_of_sglang(
    speculative: Server, plain: Server, prompts: list[list[int]]
) -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    processor = DisallowedTokensLogitsProcessor.to_str()
    tokens = ask(plain, prompts[:1], [{}])[0]["output_ids"]
    requests = [
        {
            "custom_params": {"token_ids": tokens[:count]},
            "options": {"custom_logit_processor": processor},
        }
        for count in (1, 3)
    ]
    answers = ask(speculative, prompts[:1], requests)
    for got, expected in zip(answers, ask(plain, prompts[:1], requests), strict=True):
        same_logprobs(got, expected)
    assert tokens[0] not in answers[0]["output_ids"]


def test_processors_beside_other_requests(
    speculative: Server, plain: Server, prompts: list[list[int]]
) -> None:
    """The others keep their drafts."""
    requests = [processors.body(name) for name in processors.PARAMETERS]
    requests = [*requests, {}, TOGETHER, processors.body("Counts", of="its own"), {}]
    answers = ask(speculative, prompts[:1], requests)
    for got, expected in zip(answers, ask(plain, prompts[:1], requests), strict=True):
        same_logprobs(got, expected)
    assert answers[4]["meta_info"]["spec_verify_ct"] < LENGTH - 1
    assert answers[0]["meta_info"]["spec_verify_ct"] == LENGTH - 1


def test_processors_while_off_is_pinned(
    speculative: Server, plain: Server, prompts: list[list[int]], kind: str
) -> None:
    if kind == "one strategy":
        return  # which has no other
    requests = [processors.body(name) for name in processors.PARAMETERS]
    speculative.post("/tlt/strategy", {"strategy": "off"})
    try:
        answers = ask(speculative, prompts[:1], requests)
    finally:
        speculative.post("/tlt/strategy", {"strategy": None})
    for got, expected in zip(answers, ask(plain, prompts[:1], requests), strict=True):
        same_logprobs(got, expected)


@pytest.mark.server(NGRAMS)
def test_n_grams_of_sglang(servers: Servers, plain: Server, prompts: list[list[int]]) -> None:
    """These run in a worker of their own, whose trees branch."""
    server = servers.get(NGRAMS, *ALLOWED)
    requests = [processors.body(name) for name in processors.PARAMETERS]
    requests += [{}, TOGETHER, TOGETHER | SAMPLED]
    answers = ask(server, prompts, requests)
    for got, expected in zip(answers, ask(plain, prompts, requests), strict=True):
        same_logprobs(got, expected)
