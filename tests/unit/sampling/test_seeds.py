"""Seeds of the samples of one request."""

from __future__ import annotations

from itertools import accumulate, repeat

from tlt_sglang.sampling.seeds import SEED_BITS, next_seed


def test_each_sample_has_its_own() -> None:
    requests = [list(accumulate(repeat(seed, 64), lambda s, _: next_seed(s))) for seed in range(64)]
    every = [seed for request in requests for seed in request]
    assert len(set(every)) == len(every)
    assert all(0 <= seed < 2**SEED_BITS for seed in every)
