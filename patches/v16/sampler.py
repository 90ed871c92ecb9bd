"""sglang.srt.layers.sampler, in the scheduler process: the noise of plain decoding."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


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
    sampling_info: Any,
    positions: torch.Tensor,
    *args: object,
) -> object:
    from tlt_sglang.engine import engine

    one = engine.require()
    if one.coupled is None:
        return original(sampler, probs, sampling_info, positions, *args)
    if any(sampling_info.return_sampling_masks or ()):
        if one.device != "cpu":  # where SGLang's kernels exclude seeds by assertion
            sampling_info = copy.copy(sampling_info)
            sampling_info.sampling_seed = None
        return original(sampler, probs, sampling_info, positions, *args)
    from tlt_sglang.sampling import coupled

    return coupled.sample_probs(probs, sampling_info, positions)


PATCHES = (sample_from_probs,)
