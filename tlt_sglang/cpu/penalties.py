"""Penalties in a verify step: every token is penalised for all tokens before it, as in plain steps.

Upstream calls its verification relaxed. It counts the last token of each step only (with n-grams
none), and treats the drafts of one step as if none of the others had been said; so its output is
not that of plain decoding, and `min_new_tokens` counts steps. Here the penalties of each row are
computed from the tokens that were said and the drafts on the way to it.

Exact where the scheduler has all committed tokens at hand, as without overlap. Runs in the
scheduler process. Shapes: B requests, W rows of each (its tree, root first), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def apply(
    logits: torch.Tensor,
    requests: Sequence[Any],
    drafts: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
) -> None:
    """Penalise logits [B * W, V] in place.

    `drafts` [B, W] are the tokens of the trees, the root being the last one that was said.
    `next_token` and `next_sibling` [B, W] give each node's first child and next sibling, or -1.
    """
    width = drafts.shape[1]
    trees = zip(drafts.tolist(), next_token.tolist(), next_sibling.tolist(), strict=True)
    for i, (request, (tokens, children, siblings)) in enumerate(zip(requests, trees, strict=True)):
        parameters = request.sampling_params
        if not _penalised(parameters):
            continue
        stops = _stop_tokens(request)
        said = list(request.output_ids)
        for row, path in enumerate(paths(children, siblings)):
            _penalise(
                logits[i * width + row], said + [tokens[node] for node in path], parameters, stops
            )


def paths(children: Sequence[int], siblings: Sequence[int]) -> list[list[int]]:
    """For each node of a tree the nodes from the root to it, without the root; [] if not in it."""
    found: list[list[int]] = [[] for _ in children]
    waiting = [0]
    while waiting:
        node = waiting.pop()
        child = children[node]
        while child >= 0:
            found[child] = [*found[node], child]
            waiting.append(child)
            child = siblings[child]
    return found


def _penalise(logits_V: torch.Tensor, said: list[int], parameters: Any, stops: list[int]) -> None:
    """One row, in upstream's order: what is added first, then what is multiplied."""
    if len(said) < parameters.min_new_tokens:
        logits_V[stops] = -torch.inf
    counts = torch.bincount(torch.tensor(said, dtype=torch.int64), minlength=len(logits_V))
    found = counts.nonzero().flatten()
    scores = logits_V[found]
    scores -= parameters.frequency_penalty * counts[found] + parameters.presence_penalty
    factor = parameters.repetition_penalty
    logits_V[found] = torch.where(scores < 0, scores * factor, scores / factor)


def _penalised(parameters: Any) -> bool:
    return bool(
        parameters.frequency_penalty
        or parameters.presence_penalty
        or parameters.repetition_penalty != 1.0
        or parameters.min_new_tokens
    )


def _stop_tokens(request: Any) -> list[int]:
    """The tokens that may not come before `min_new_tokens`; the same set as upstream's."""
    found = set(request.sampling_params.stop_token_ids or ()) | set(request.eos_token_ids or ())
    tokenizer = request.tokenizer
    if tokenizer is not None:
        found |= set(tokenizer.additional_stop_token_ids or ())
        if tokenizer.eos_token_id is not None:
            found.add(tokenizer.eos_token_id)
    return sorted(found)
