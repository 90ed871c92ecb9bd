"""The target's head on CPU, which computes each row's argmax along with its logits.

SGLang passes logits from the model to verification through several of its own layers, which know
nothing of the argmax. So it is kept here, for the logits that were computed last, until those are
verified or changed.

Runs in the scheduler process, which is single-threaded. Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

import torch

from tlt_sglang.cpu import linear
from tlt_sglang.cpu.kernels.argmax import argmax

MAX_ROWS = 512
"""Logits with more rows belong to prompts with logprobs, which are not verified."""

_logits: torch.Tensor | None = None
"""The last logits, kept until they are verified so that no other tensor gets their address."""
_argmax: torch.Tensor | None = None


def logits(hidden: torch.Tensor, weight: torch.Tensor, *, greedy: bool) -> torch.Tensor:
    """Return logits [T, V] of hidden [T, N] and weight [V, N].

    With `greedy` the argmax is computed as well, for a later call of `most_likely`.
    """
    global _logits, _argmax
    invalidate()
    if not greedy or len(hidden) > MAX_ROWS:
        return linear.linear(hidden, weight, None)
    _logits, _argmax = linear.linear_largest(hidden, weight)
    return _logits


def invalidate() -> None:
    """Forget the argmax, because the last logits were changed or are no longer needed."""
    global _logits, _argmax
    _logits = _argmax = None


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Return the first most likely token of each row of logits [T, V] as int64 [T]."""
    last, tokens = _logits, _argmax
    invalidate()
    if last is None or tokens is None or logits.shape != last.shape:
        return argmax(logits)
    return tokens if logits.data_ptr() == last.data_ptr() else argmax(logits)
