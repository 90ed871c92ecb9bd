"""Logprobs of verified tokens, as plain decoding computes them.

Runs in the scheduler process. Shapes: B requests, W rows per request, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tlt_sglang import upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Batch, Upstream


def compute(original: Upstream, batch: Batch, output: Any, *args: object, **kwargs: object) -> None:
    """Have SGLang's `original` compute the logprobs of a verified step, of the probabilities that
    plain decoding rounds; where it takes exact ones, nothing differs."""
    from sglang.srt.environ import envs

    info, logits = batch.sampling_info, output.next_token_logits
    original_logprobs = envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get()
    if info.is_all_greedy or original_logprobs or upstream.current().is_deterministic():
        original(batch, output, *args, **kwargs)
        return
    try:
        output.next_token_logits = of_probabilities(logits, info.temperatures)
        original(batch, output, *args, **kwargs)
    finally:
        output.next_token_logits = logits


def of_probabilities(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Return logits [B * W, V] whose log-softmax at `temperatures` [B, 1] is the logarithm of the
    rounded probabilities of `logits`: a token whose probability rounds to 0 has -inf."""
    scale = temperatures.repeat_interleave(len(logits) // len(temperatures), dim=0)
    return torch.softmax(logits / scale, dim=-1).log_().mul_(scale)
