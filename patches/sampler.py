"""sglang.srt.layers.sampler, in the scheduler process: seeds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import SamplingInfo, Upstream


@wraps_upstream(
    "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
    why="a request with min-p and a seed ends the server, as upstream excludes it by assertion",
    remove_when="SGLang supports min-p together with a seed",
    process="scheduler",
    only_on="cpu",
)
def sample(
    original: Upstream,
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
    **options: object,
) -> object:
    if need_min_p_sampling and sampling_seed is not None:
        # The most probable token survives top-k and top-p, so this is upstream's bound.
        bound = probs.amax(-1, keepdim=True) * min_ps.view(-1, 1)
        probs = probs.masked_fill(probs < bound, 0.0)
        need_min_p_sampling = False
    rest = (top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions)
    return original(probs, *rest, **options)


@wraps_upstream(
    "sglang.srt.layers.sampler:Sampler._sample_from_probs",
    why="the noise of a seed is keyed by the rank of a token where top-k or top-p are given, and "
    "costs more than the model",
    remove_when="SGLang keys the noise by the token, and verifies drafts by it",
    process="scheduler",
)
def sample_from_probs(
    original: Upstream,
    sampler: object,
    probs: torch.Tensor,
    sampling_info: SamplingInfo,
    positions: torch.Tensor,
    *args: object,
) -> object:
    from tlt_sglang import upstream
    from tlt_sglang.engine import engine

    one, sglang = engine.require(), upstream.current()
    if one.coupled is None:
        return original(sampler, probs, sampling_info, positions, *args)
    if sglang.asks_for_masks(sampling_info):
        if one.device != "cpu":  # where SGLang's kernels exclude seeds by assertion
            sampling_info = copy.copy(sampling_info)
            sampling_info.sampling_seed = None
        return original(sampler, probs, sampling_info, positions, *args)
    from tlt_sglang.sampling import coupled

    return sglang.sampled(coupled.sample_probs(probs, sampling_info, positions))


PATCHES = (sample, sample_from_probs)
