"""Sampling under speculation: the target's distribution, whatever is drafted, however filtered.

Tiny random targets and small vocabularies, so that thousands of samples test every cell of the
joint distribution of the first three tokens. The drafters are fitted to the target, so that many
drafts are accepted. Seeds are given with each request, so that the p-values are always the same;
what n-grams draft depends on earlier output and its timing, so theirs are not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.distribution import Joint, Sampling, joint, p_value
from tests.support.fitting import Tiny
from tests.support.servers import Server, Servers, model_folder
from tests.support.tiny import greedily

LENGTH = 3
SAMPLES = 4000
AT_ONCE = 500
PROMPT = (5, 9, 14, 3, 20, 7)
REPEATING = (5, 9, 14, 3) * 8
FLAGS = ("--skip-tokenizer-init", "--max-running-requests", "64")
SEEDED = (*FLAGS, "--enable-deterministic-inference")
STRATEGIES = ("eagle:3x1x4", "eagle:3x4x8", "eagle3:3x1x4", "eagle3:3x4x8", "ngram:8")
SWITCHING = "eagle:3x4x8,eagle:3x1x4,off,eagle:1x1x2,ngram:4"
"""One of these at random, for a few steps each; EAGLE's are pinned on the same server."""
REDUCED = "eagle3:3x4x8,eagle3:3x1x4,off"
"""On another, whose drafter knows five of six tokens, and has to catch up; pinned, too."""
UNLIKELY = {"ngram:8": 1e-4, SWITCHING: 1e-4, REDUCED: 1e-4}
"""The least p-value that passes, 0.01 elsewhere: these are not the same in every run."""

PLAIN = Sampling()
FILTERED = Sampling(temperature=1.2, top_k=9, top_p=0.8, min_p=0.05)
WAYS = {
    "plain": PLAIN,
    "cold": Sampling(temperature=0.6),
    "top-p": Sampling(top_p=0.7),
    "top-k": Sampling(top_k=4),
    "min-p": Sampling(min_p=0.2),
    "all": FILTERED,
}


def start(servers: Servers, tiny: Tiny, strategy: str) -> Server:
    drafter = tiny.drafters.get(strategy.partition(":")[0])
    if strategy.startswith("ngram"):
        return servers.get(strategy, *SEEDED, model=tiny.path)
    policy = ("--tlt-policy", "random")
    server = servers.get(_pool(strategy), *SEEDED, *policy, model=tiny.path, drafter=drafter)
    server.post("/tlt/strategy", {"strategy": None if "," in strategy else strategy})
    return server


def _pool(strategy: str) -> str:
    """The strategies of the server that `strategy` is used on."""
    kind = strategy.partition(":")[0]
    return {"eagle": SWITCHING, "eagle3": REDUCED}.get(kind, strategy)


def draw(
    server: Server,
    prompt: Sequence[int],
    parameters: Sequence[dict[str, Any]],
    **options: Any,
) -> list[dict[str, Any]]:
    """One answer for each of `parameters`, in order; `AT_ONCE` of them in a batch."""
    answers = []
    for first in range(0, len(parameters), AT_ONCE):
        part = parameters[first : first + AT_ONCE]
        body = {"input_ids": [list(prompt)] * len(part), "sampling_params": part}
        answers += server.post("/generate", body | options)
    return answers


@functools.cache
def sampled_ids(
    server: Server, strategy: str, prompt: tuple[int, ...], sampling: Sampling
) -> list[dict[str, Any]]:
    """`SAMPLES` answers by `strategy`, drawn once: their seeds are always the same."""
    return draw(server, prompt, seeded(sampling, range(SAMPLES)))


def seeded(sampling: Sampling, seeds: range, length: int = LENGTH) -> list[dict[str, Any]]:
    common = {"max_new_tokens": length, "ignore_eos": True} | sampling.parameters()
    return [common | {"sampling_seed": seed} for seed in seeds]


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def on(name: str, *values: object, quick: bool = True) -> Any:
    """A case of a test that uses the server called `name`."""
    marks = [pytest.mark.server(f"tiny {_pool(name)}"), *([] if quick else [pytest.mark.long])]
    return pytest.param(name, *values, marks=marks)


# ---- the distribution ----------------------------------------------------------------------------

CASES = [("plain", SWITCHING), ("all", SWITCHING), ("plain", REDUCED), ("plain", "ngram:8")]
QUICK = len(CASES)
"""Cases that are not `long`."""
CASES += [("plain", strategy) for strategy in STRATEGIES if strategy != "ngram:8"]
CASES += [("all", strategy) for strategy in STRATEGIES]
CASES += [(way, "eagle:3x4x8") for way in ("cold", "top-p", "top-k", "min-p")]
CASES += [(way, "eagle:3x1x4") for way in ("cold", "top-p", "min-p")]


@pytest.mark.parametrize(
    ("strategy", "way"),
    [on(strategy, way, quick=at < QUICK) for at, (way, strategy) in enumerate(CASES)],
)
def test_the_targets_distribution(servers: Servers, tiny: Tiny, strategy: str, way: str) -> None:
    server, sampling = start(servers, tiny, strategy), WAYS[way]
    prompt = REPEATING if strategy.startswith("ngram") else PROMPT
    answers = sampled_ids(server, strategy, prompt, sampling)
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    p = p_value(joint(tiny.model, prompt, LENGTH, sampling), tokens(answers))
    print(f"{strategy} {way}: p = {p:.3g}, {accepted / SAMPLES:.2f} drafts accepted a sample")
    assert accepted > SAMPLES / 10, "next to nothing was accepted, so next to nothing was tested"
    assert p > UNLIKELY.get(strategy, 0.01)


@pytest.mark.parametrize(
    ("strategy", "other"),
    [
        on("eagle:3x4x8", Sampling(temperature=1.25)),
        on("eagle:3x4x8", Sampling(temperature=0.8)),
        on("eagle:3x4x8", Sampling(top_p=0.95)),
        on("eagle:3x4x8", Sampling(top_k=12)),
        on("eagle:3x4x8", Sampling(min_p=0.02)),
    ],
)
def test_the_check_can_fail(servers: Servers, tiny: Tiny, strategy: str, other: Sampling) -> None:
    """Plain samples differ from those of a similar distribution."""
    answers = sampled_ids(start(servers, tiny, strategy), strategy, PROMPT, PLAIN)
    assert p_value(joint(tiny.model, PROMPT, LENGTH, other), tokens(answers)) < 1e-6


def test_the_check_is_exact() -> None:
    """Its p-value on counts that agree, and on a sequence that cannot be."""
    expected: Joint = {(a, b): 0.25 for a in (0, 1) for b in (0, 1)}
    samples = [[a, b] for a in (0, 1) for b in (0, 1)] * 100
    assert p_value(expected, samples) == 1.0
    assert p_value(expected, [*samples, [0, 2]]) == 0.0
    # 60 to 40 has the statistic 4 with one degree of freedom.
    assert p_value({(0,): 0.5, (1,): 0.5}, [[0]] * 60 + [[1]] * 40) == pytest.approx(
        0.0455, abs=1e-4
    )


# ---- seeds and mixed batches ---------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [on(name) for name in STRATEGIES if name != "ngram:8"])
def test_a_seed_brings_back_its_output(servers: Servers, tiny: Tiny, strategy: str) -> None:
    """Whatever else is in the batch. (What n-grams draft depends on what was served before.)"""
    server = start(servers, tiny, strategy)
    parameters = seeded(PLAIN, range(64), length=24)
    together = tokens(draw(server, PROMPT, parameters))
    assert len(set(map(tuple, together))) > 60
    assert tokens(draw(server, PROMPT, parameters[::-1]))[::-1] == together
    alone = [draw(server, PROMPT, [one])[0]["output_ids"] for one in parameters[:4]]
    assert alone == together[:4]


@pytest.mark.parametrize("strategy", [on(name) for name in STRATEGIES])
def test_greedy_and_sampled_requests_in_one_batch(
    servers: Servers, tiny: Tiny, strategy: str
) -> None:
    server = start(servers, tiny, strategy)
    sampled = seeded(PLAIN, range(SAMPLES // 2))
    greedy = {"temperature": 0.0, "max_new_tokens": LENGTH, "ignore_eos": True}
    mixed = [parameters for one in sampled for parameters in (one, greedy)]
    answers = tokens(draw(server, PROMPT, mixed))
    expected = greedily(tiny.model, torch.tensor([PROMPT]), LENGTH)[0]
    assert answers[1::2] == [expected] * len(sampled)
    p = p_value(joint(tiny.model, PROMPT, LENGTH, PLAIN), answers[::2])
    print(f"{strategy} beside greedy requests: p = {p:.3g}")
    assert p > UNLIKELY.get(strategy, 0.01)


# ---- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [on(name) for name in STRATEGIES])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_targets(
    servers: Servers, tiny: Tiny, strategy: str, temperature: float
) -> None:
    """Under speculation, by rescoring on the same server, and by transformers: all the same."""
    server = start(servers, tiny, strategy)
    prompt = REPEATING
    parameters = seeded(Sampling(temperature=temperature), range(8), length=32)
    for answer in draw(server, prompt, parameters, return_logprob=True):
        output, meta = answer["output_ids"], answer["meta_info"]
        report = torch.tensor([value for value, _, _ in meta["output_token_logprobs"]])
        assert [token for _, token, _ in meta["output_token_logprobs"]] == output
        assert len(output) == 32
        rescored = rescore(server, prompt, output)
        with torch.inference_mode():
            logits = tiny.model(torch.tensor([[*prompt, *output]])).logits[0]
        truth = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(output)[:, None]
        )
        torch.testing.assert_close(report, rescored, atol=1e-3, rtol=0)
        torch.testing.assert_close(report, truth[:, 0], atol=1e-3, rtol=0)


def rescore(server: Server, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [T] of `output` after `prompt`, from a prefill of both."""
    answer = server.post(
        "/generate",
        {
            "input_ids": [*prompt, *output],
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
        },
    )
    rows = answer["meta_info"]["input_token_logprobs"][-len(output) :]
    # SGLang reports the last token of the vocabulary as 0 here, its value is right all the same.
    assert [token for _, token, _ in rows] == [t if t < Tiny.vocab - 1 else 0 for t in output]
    return torch.tensor([value for value, _, _ in rows])


# ---- the default model ---------------------------------------------------------------------------


@pytest.mark.server("ngram:8")
def test_the_default_models_distribution(servers: Servers) -> None:
    """With its whole vocabulary, without seeds, and text that n-grams draft well."""
    server = servers.get("ngram:8")
    folder = model_folder(server.spec.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("one two three four, one two three four, one two")["input_ids"]
    sampling = Sampling(temperature=1.5, top_k=5)
    number = 400
    parameters = {"max_new_tokens": LENGTH, "ignore_eos": True} | sampling.parameters()
    answers = draw(server, prompt, [parameters] * number)
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    p = p_value(joint(model, prompt, LENGTH, sampling), tokens(answers))
    print(f"default model: p = {p:.3g}, {accepted / number:.2f} drafts accepted a sample")
    assert accepted > number / 10
    assert p > 1e-4
