"""The target's head on CPU, and each row's most likely token, which is found along with its logits.

SGLang hands logits from the model to verification through several layers of its own, and the tokens
go past them. They are those of the logits that were computed last, while nobody has changed these.

Runs in the scheduler process, which is single-threaded. Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

import torch

from tlt_sglang.cpu import linear
from tlt_sglang.cpu.kernels.argmax import argmax

MOST_ROWS = 512
"""Of logits whose tokens are wanted: prompts with logprobs have more, and are not verified."""

_logits: torch.Tensor | None = None
"""Kept until they are verified, so that no other tensor can have their address."""
_tokens: torch.Tensor | None = None


def logits(hidden: torch.Tensor, weight: torch.Tensor, *, greedy: bool) -> torch.Tensor:
    """[T, V] of hidden [T, N] and weight [V, N]; `greedy`: `most_likely` may be asked of them as
    they are."""
    global _logits, _tokens
    changed()
    if not greedy or len(hidden) > MOST_ROWS:
        return linear.linear(hidden, weight, None)
    _logits, _tokens = linear.linear_largest(hidden, weight)
    return _logits


def changed() -> None:
    """The logits that were computed last are no longer what they were, or no longer of interest."""
    global _logits, _tokens
    _logits = _tokens = None


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row of logits [T, V], the first of several: [T] int64."""
    last, tokens = _logits, _tokens
    changed()
    if last is None or tokens is None or logits.shape != last.shape:
        return argmax(logits)
    return tokens if logits.data_ptr() == last.data_ptr() else argmax(logits)
