"""Sampling by noise agrees with SGLang's rule, which computes the noise of every token."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.support.distribution import Joint, Sampling, p_value
from tests.support.reference_kernels import gumbel
from tlt_sglang.cpu.kernels import noise
from tlt_sglang.sampling.seeds import SEED_BITS, next_seed

SIZES = [(1, 7), (3, 1024), (5, 1025), (9, 5000)]


@pytest.fixture(params=SIZES, ids=str)
def rows(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    count, width = request.param
    generator = torch.Generator().manual_seed(width)
    return {
        "logits": torch.randn(count, width, generator=generator) * 4,
        "temperatures": torch.rand(count, generator=generator) + 0.2,
        "seeds": torch.randint(0, 2**62, (count,), generator=generator),
        "positions": torch.randint(0, 2**20, (count,), generator=generator),
    }


def scores(rows: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    scaled = (rows["logits"] / rows["temperatures"].view(-1, 1)).double()
    return scaled + gumbel(rows["seeds"], rows["positions"], tokens)


def test_the_largest_score(rows: dict[str, torch.Tensor]) -> None:
    expected = scores(rows, torch.arange(rows["logits"].shape[1])).argmax(-1)
    assert torch.equal(noise.sample(**rows), expected)


def test_the_largest_scores_of_other_tokens(rows: dict[str, torch.Tensor]) -> None:
    width = rows["logits"].shape[1]
    tokens = torch.randperm(50_000, generator=torch.Generator().manual_seed(1))[:width]
    best = scores(rows, tokens).topk(5, dim=-1)
    got, columns = noise.top(**rows, k=5, token_ids=tokens)
    assert torch.equal(columns, best.indices)
    torch.testing.assert_close(got, best.values.float())


def test_greedy_rows_have_none(rows: dict[str, torch.Tensor]) -> None:
    ones = torch.ones(len(rows["logits"]), dtype=torch.int32)
    assert torch.equal(noise.sample(**rows, top_ks=ones), rows["logits"].argmax(-1))
    greedy = torch.arange(len(ones)) % 2 == 0
    _, columns = noise.top(**rows, k=1, greedy=greedy)
    mixed = torch.where(greedy, rows["logits"].argmax(-1), noise.sample(**rows))
    assert torch.equal(columns.view(-1), mixed)


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=3), Sampling(top_p=0.6), Sampling(min_p=0.2), Sampling(0.8, 9, 0.8)]
)
def test_filters_leave_the_noise_of_a_token(
    rows: dict[str, torch.Tensor], sampling: Sampling
) -> None:
    count, width = rows["logits"].shape
    rows["temperatures"] = torch.full((count,), sampling.temperature)
    filters = {
        "top_ks": torch.full((count,), sampling.top_k if sampling.top_k > 0 else width),
        "top_ps": torch.full((count,), sampling.top_p),
        "min_ps": torch.full((count,), sampling.min_p),
    }
    kept = sampling.probabilities(rows["logits"]).log()
    noisy = kept + gumbel(rows["seeds"], rows["positions"], torch.arange(width))
    assert torch.equal(noise.sample(**rows, **filters), noisy.argmax(-1))


def test_equal_scores_go_to_the_first_token() -> None:
    logits = torch.full((1, 3000), -math.inf)
    logits[0, [700, 2500]] = 0.0
    _, columns = noise.top(
        logits, torch.ones(1), torch.zeros(1), torch.zeros(1), 1, greedy=torch.tensor([True])
    )
    assert columns.tolist() == [[700]]


def test_samples_over_seeds_have_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    many = 20_000
    seeds = torch.arange(many)
    tokens = noise.sample(
        logits.expand(many, -1), torch.ones(many), seeds, torch.full((many,), 17)
    ).tolist()
    probs = logits.double().softmax(-1).tolist()
    expected: Joint = {(token,): prob for token, prob in enumerate(probs)}
    assert p_value(expected, [(token,) for token in tokens]) > 0.01


def test_samples_at_two_positions_are_independent() -> None:
    logits = torch.tensor([1.0, 0.0, 0.5])
    many = 20_000
    pairs = zip(
        *(
            noise.sample(
                logits.expand(many, -1),
                torch.ones(many),
                torch.arange(many),
                torch.full((many,), position),
            ).tolist()
            for position in (5, 6)
        ),
        strict=True,
    )
    probs = logits.double().softmax(-1).tolist()
    expected: Joint = {(a, b): probs[a] * probs[b] for a in range(3) for b in range(3)}
    assert p_value(expected, pairs) > 0.01


@pytest.mark.parametrize("kind", ["drawn", "next sample", "next number"])
def test_samples_of_two_seeds_are_independent(kind: str) -> None:
    """Two requests of a group have seeds of a generator, samples of one request `next_seed`, and a
    client may count."""
    logits, rng = torch.tensor([1.0, 0.0, 0.5]), random.Random(0)
    many = 20_000
    firsts = [rng.getrandbits(SEED_BITS) for _ in range(many)]
    following = {
        "drawn": [rng.getrandbits(SEED_BITS) for _ in firsts],
        "next sample": [next_seed(seed) for seed in firsts],
        "next number": [seed + 1 for seed in firsts],
    }
    pairs = zip(
        *(
            noise.sample(
                logits.expand(many, -1),
                torch.ones(many),
                torch.tensor(seeds),
                torch.full((many,), 5),
            ).tolist()
            for seeds in (firsts, following[kind])
        ),
        strict=True,
    )
    probs = logits.double().softmax(-1).tolist()
    expected: Joint = {(a, b): probs[a] * probs[b] for a in range(3) for b in range(3)}
    assert p_value(expected, pairs) > 0.01
