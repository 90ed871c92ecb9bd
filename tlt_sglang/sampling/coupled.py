"""Coupled sampling: drafter and target choose by the same noise, so every strategy says the same.

A token is the argmax over v of log p(v) + g(seed, position, v), the Gumbel-max rule of SGLang's
seeded sampling (`multinomial_with_seed`), with p filtered by temperature, top-k, top-p and min-p
as in plain decoding, and the noise g keyed by the request's seed, the position and the token id.
The target applies the rule to every verified row, so the answer is a function of weights, prompt
and seed: drafts, batch, strategy and swaps cannot change it. The drafter proposes the tokens with
the largest log q(v) + g of the same noise, which are the target's the more often the nearer q is to
p (arXiv 2408.07978; lists of drafts: arXiv 2506.05632).

A request without a seed gets one of the engine's generator, and keeps it until it ends.

Runs in the scheduler process. Shapes: B requests, W verified rows of each, T = B * W, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tlt_sglang.cpu.kernels import noise
from tlt_sglang.sampling.ranking import DRAFT_TEMPERATURE, chances
from tlt_sglang.sampling.seeds import SEED_BITS

if TYPE_CHECKING:
    from tlt_sglang.cpu.drafting import Propose
    from tlt_sglang.upstream.layers import SeededRequest, SeededSampling
    from tlt_sglang.upstream.protocols import SamplingInfo, VerifyInput


class CoupledSampling:
    """Coupled sampling in one scheduler process; equal `seed`s make equal choices on all ranks."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)

    def set_seeds(
        self, info: SeededSampling, requests: Sequence[SeededRequest], device: torch.device | str
    ) -> None:
        """Give every request its seed, and the batch's sampling parameters the seeds [B] int64."""
        for request in requests:
            if request.sampling_params.sampling_seed is None:
                request.sampling_params.sampling_seed = self._generator.getrandbits(SEED_BITS)
        seeds = torch.tensor([request.sampling_params.sampling_seed for request in requests])
        if torch.device(device).type == "cuda":
            seeds = seeds.pin_memory()  # from which a copy waits for nothing
        info.sampling_seed = seeds.to(device, non_blocking=True)


def sample(logits: torch.Tensor, info: SamplingInfo, positions: torch.Tensor) -> torch.Tensor:
    """Return the tokens [T] int64 that the target chooses after logits [T, V] of a batch.

    `positions` [T] are those of the tokens that the logits follow. T may be a multiple of B: then
    each request has as many rows, one after the other.
    """
    rows = len(logits) // len(info.temperatures)
    return _sample(logits, _repeated(info.temperatures.view(-1), rows), info, positions)


def sample_probs(probs: torch.Tensor, info: SamplingInfo, positions: torch.Tensor) -> torch.Tensor:
    """Return the tokens [B] int32 that `sample` returns, for probabilities [B, V] that have their
    temperature, but are not filtered."""
    ones = torch.ones(len(probs), device=probs.device)
    return _sample(probs.log(), ones, info, positions).to(torch.int32)


def walk(
    verify_input: VerifyInput, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what SGLang's `eagle_sample` returns on CUDA where the target chooses `tokens` [T].

    These are the target's tokens [T] int32, the number of tokens that each request commits [B], and
    the rows of those tokens [B, depth].
    """
    from sglang.srt.speculative.eagle_utils import verify_tree_greedy_func

    width, device = verify_input.draft_token_num, tokens.device
    target = tokens.view(-1, width)
    rows = (len(target), verify_input.max_tree_depth)
    predicts, accepted, counts = verify_tree_greedy_func(
        predicts=torch.zeros(len(tokens), dtype=torch.int32, device=device),
        accept_index=torch.full(rows, -1, dtype=torch.int32, device=device),
        accept_token_num=torch.empty(len(target), dtype=torch.int32, device=device),
        candidates=verify_input.draft_token.view(-1, width),
        retrieve_index=verify_input.retrieve_index,
        retrieve_next_token=verify_input.retrieve_next_token,
        retrieve_next_sibling=verify_input.retrieve_next_sibling,
        target_predict=target,
        topk=verify_input.tree_topk,
    )
    return predicts, counts + 1, accepted


def _sample(
    logits: torch.Tensor, temperatures: torch.Tensor, info: SamplingInfo, positions: torch.Tensor
) -> torch.Tensor:
    seeds = seeds_of(info)
    times = len(logits) // len(seeds)
    arguments = logits, temperatures, _repeated(seeds, times), positions
    limits = (
        info.top_ks if info.need_top_k_sampling else None,
        info.top_ps if info.need_top_p_sampling else None,
        info.min_ps if info.need_min_p_sampling else None,
    )
    if not logits.is_cuda:
        return noise.sample(*arguments, *limits)
    from tlt_sglang.sampling import triton_noise

    return triton_noise.sample(
        *arguments, *(limit if limit is None else _repeated(limit, times) for limit in limits)
    )


def proposals(
    info: SamplingInfo, token_ids: torch.Tensor | None, rows: torch.Tensor | None = None
) -> Propose | None:
    """Return how drafts are chosen for a batch; None where all requests are greedy.

    `token_ids` [D] are the target's ids of the drafter's vocabulary, None if they are the same;
    `rows` [R] the requests that are drafted for, None for all.
    """
    if info.is_all_greedy:
        return None
    temperatures = DRAFT_TEMPERATURE * info.temperatures.view(-1)
    seeds, greedy = seeds_of(info), info.top_ks <= 1
    if rows is not None:
        temperatures, seeds, greedy = temperatures[rows], seeds[rows], greedy[rows]

    def propose(
        logits: torch.Tensor, positions: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.is_cuda:
            noisy = noisy_scores(logits, temperatures, seeds, greedy, positions, token_ids)
            best = noisy.softmax(-1).topk(k)
            return best.values, best.indices
        times = len(logits) // len(seeds)
        scores, columns = noise.top(
            logits,
            _repeated(temperatures, times),
            _repeated(seeds, times),
            positions,
            k,
            token_ids=token_ids,
            greedy=_repeated(greedy, times),
        )
        return chances(scores), columns

    return propose


def noisy_scores(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    greedy: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return the noisy scores of a drafter's logits [T, D] on CUDA, [T, D] float32.

    `temperatures`, `seeds` and `greedy` are [B], T being a multiple of B; `positions` are [T].
    """
    from tlt_sglang.sampling import triton_noise

    times = len(logits) // len(seeds)
    of_rows = (_repeated(one, times) for one in (temperatures, seeds, greedy))
    temperatures, seeds, greedy = of_rows
    return triton_noise.scores(logits, temperatures, seeds, positions, greedy, token_ids)


def seeds_of(info: SamplingInfo) -> torch.Tensor:
    """Return the seeds [B] of a batch, which `set_seeds` has given it."""
    assert info.sampling_seed is not None, "a batch without seeds"
    return info.sampling_seed


def _repeated(values: torch.Tensor, times: int) -> torch.Tensor:
    return values if times == 1 else values.repeat_interleave(times)
