"""Coupled sampling: token for token what plain decoding says, at any temperature and filter.

With the same seeds, engines that speculate in any way say what the engine without speculation says,
and without filters that is what SGLang's own seeded sampling says.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.test_sampling import FLAGS, LENGTH, PROMPT, REDUCED, SAMPLES, WAYS, draw
from tests.support.distribution import Sampling, joint, p_value
from tests.support.fitting import Tiny
from tests.support.identity import PINNED, POOL
from tests.support.long import first_and_long
from tests.support.prompts import prompts
from tests.support.servers import Server, Servers
from tlt_sglang.sampling.seeds import next_seed

COUPLED = ("--tlt-sampling", "coupled")
ANSWERS = 160
TOKENS = 48
ALL_FIRST = first_and_long(sorted(WAYS, key="all".__ne__))
NATURAL: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 1.0, "logit_bias": {"28": 2.0}, "min_new_tokens": 8},
    {"temperature": 1.0, "regex": "[a-z ]{20,60}"},
    {"temperature": 0.0},
)


def tiny_server(servers: Servers, tiny: Tiny, strategies: str) -> Server:
    drafter = tiny.drafters["eagle3"] if "eagle3" in strategies else None
    policy = ("--tlt-policy", "random") if "," in strategies else ()
    return servers.get(strategies, *FLAGS, *COUPLED, *policy, model=tiny.path, drafter=drafter)


def seeded(sampling: Sampling, count: int) -> list[dict[str, Any]]:
    shape = sampling.parameters() | {"max_new_tokens": TOKENS, "ignore_eos": True}
    return [shape | {"sampling_seed": 7919 * number} for number in range(count)]


def texts(server: Server, sampling: Sampling) -> list[list[int]]:
    return [answer["output_ids"] for answer in draw(server, PROMPT, seeded(sampling, ANSWERS))]


@pytest.mark.parametrize("way", ALL_FIRST)
def test_every_strategy_says_the_same(servers: Servers, tiny: Tiny, way: str) -> None:
    expected = texts(tiny_server(servers, tiny, "off"), WAYS[way])
    assert len({tuple(text) for text in expected}) > ANSWERS // 2
    server = tiny_server(servers, tiny, REDUCED)
    for strategy in (None, *REDUCED.split(",")):
        server.post("/tlt/strategy", {"strategy": strategy})
        assert texts(server, WAYS[way]) == expected, strategy


@pytest.mark.parametrize("way", ["plain", "cold"])
def test_sglang_says_the_same_with_its_own_seeds(servers: Servers, tiny: Tiny, way: str) -> None:
    seeding = "--enable-deterministic-inference"
    stock = servers.get("off", *FLAGS, seeding, model=tiny.path)  # SGLang's own sampler
    ours = texts(tiny_server(servers, tiny, "off"), WAYS[way])
    same = [a == b for a, b in zip(texts(stock, WAYS[way]), ours, strict=True)]
    assert sum(same) >= ANSWERS - 1  # its float32 logprobs round a tie the other way


@pytest.mark.parametrize("way", ALL_FIRST)
def test_over_seeds_it_is_the_targets_distribution(servers: Servers, tiny: Tiny, way: str) -> None:
    server = tiny_server(servers, tiny, REDUCED)
    server.post("/tlt/strategy", {"strategy": None})
    shape = WAYS[way].parameters() | {"max_new_tokens": LENGTH, "ignore_eos": True}
    parameters = [shape | {"sampling_seed": seed} for seed in range(SAMPLES)]
    samples = [tuple(answer["output_ids"]) for answer in draw(server, PROMPT, parameters)]
    assert p_value(joint(tiny.model, PROMPT, LENGTH, WAYS[way]), samples) > 0.01


@pytest.mark.parametrize("samples", first_and_long([1, 2]))
def test_the_samples_of_a_group_are_independent(servers: Servers, tiny: Tiny, samples: int) -> None:
    """Without a seed, pairs of first tokens: of two requests with one prompt, or of one request."""
    server = tiny_server(servers, tiny, REDUCED)
    server.post("/tlt/strategy", {"strategy": None})
    shape = {"temperature": 1.0, "max_new_tokens": LENGTH, "ignore_eos": True, "n": samples}
    answers = draw(server, PROMPT, [shape] * (2 * SAMPLES // samples))
    seeds = [answer["meta_info"]["sampling_seed"] for answer in answers]
    assert len(set(seeds)) == len(answers) == 2 * SAMPLES
    if samples == 2:  # those of one request follow each other
        assert [next_seed(seed) for seed in seeds[::2]] == seeds[1::2]
    firsts = [answer["output_ids"][0] for answer in answers]
    pairs = list(zip(firsts[::2], firsts[1::2], strict=True))
    one = joint(tiny.model, PROMPT, 1, WAYS["plain"])
    both = {(*a, *b): one[a] * one[b] for a in one for b in one}
    assert p_value(both, pairs) > 1e-4
    clones = [(first, first) for first in firsts[:SAMPLES]]
    assert p_value(both, clones) < 1e-6  # shared seeds would show


def test_requests_without_a_seed_differ_and_so_do_the_samples_of_one(
    servers: Servers, tiny: Tiny
) -> None:
    server = tiny_server(servers, tiny, REDUCED)
    shape = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}
    for parameters in ([shape] * 32, [shape | {"n": 32, "sampling_seed": 5}]):
        answers = draw(server, PROMPT, parameters)
        assert len({tuple(answer["output_ids"]) for answer in answers}) > 28
    again = draw(server, PROMPT, [shape | {"n": 32, "sampling_seed": 5}])
    assert [answer["output_ids"] for answer in again] == [one["output_ids"] for one in answers]


def test_nothing_is_left_of_samples_when_a_server_ends(servers: Servers, tiny: Tiny) -> None:
    server = tiny_server(servers, tiny, REDUCED)
    shape = {"temperature": 1.0, "max_new_tokens": 4, "n": 3}
    assert len(draw(server, PROMPT, [shape] * 2)) == 6
    servers.drop(server)
    assert "Remaining number of requests 0." in server.log()


def pool_of_a_real_model(servers: Servers, drafters: dict[str, str]) -> Server:
    pool = POOL.replace("eagle:", "eagle3:")
    flags = (*COUPLED, "--tlt-policy", "random")
    return servers.get(pool, *flags, drafter=drafters["eagle3"])


def test_a_real_model_under_every_change_of_logits(
    servers: Servers, drafters: dict[str, str]
) -> None:
    requests = [
        (prompt, parameters | {"sampling_seed": number})
        for parameters in NATURAL
        for number, prompt in enumerate(prompts()[:6])
    ]

    def answers(server: Server) -> list[list[int]]:
        def ask(request: tuple[list[int], dict[str, Any]]) -> list[int]:
            prompt, parameters = request
            ends = {"ignore_eos": "regex" not in parameters}
            answer = server.generate(prompt, 64, **(ends | parameters))
            return list(answer["output_ids"])

        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(ask, requests))

    expected = answers(servers.get("off", *COUPLED))
    server = pool_of_a_real_model(servers, drafters)
    assert answers(server) == expected
    server.post("/tlt/strategy", {"strategy": PINNED.replace("eagle:", "eagle3:")})
    assert answers(server) == expected


def test_an_answer_that_was_predicted_takes_few_steps(
    servers: Servers, drafters: dict[str, str]
) -> None:
    """The answer of the epoch before, asked again with its seed; and with another seed."""
    server = pool_of_a_real_model(servers, drafters)
    server.post("/tlt/strategy", {"strategy": "ngram:4"})
    for number, prompt in enumerate(prompts()[:4]):
        shape: dict[str, Any] = {"temperature": 1.0}
        server.post("/flush_cache?timeout=30", {})  # n-grams of the tests before
        first = server.generate(prompt, 64, sampling_seed=number, **shape)
        server.post("/flush_cache?timeout=30", {})
        predicted = {"predicted_output": first["output_ids"]}
        again, other = (
            server.generate(prompt, 64, sampling_seed=seed, custom_params=predicted, **shape)
            for seed in (number, number + 100)
        )
        assert again["output_ids"] == first["output_ids"] != other["output_ids"]
        # One token of the prefill, then mostly five a step.
        assert again["meta_info"]["spec_verify_ct"] <= 20
        assert first["meta_info"]["spec_verify_ct"] > 40
