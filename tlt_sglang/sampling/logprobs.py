"""Logprobs of verified tokens, as plain decoding computes them.

Runs in the scheduler process. Shapes: B requests, W rows per request, V vocabulary.
"""

from __future__ import annotations

import torch


def of_probabilities(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Return logits [B * W, V] whose log-softmax at `temperatures` [B, 1] is the logarithm of the
    rounded probabilities of `logits`: a token whose probability rounds to 0 has -inf."""
    scale = temperatures.repeat_interleave(len(logits) // len(temperatures), dim=0)
    return torch.softmax(logits / scale, dim=-1).log_().mul_(scale)
