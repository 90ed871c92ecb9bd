"""Exact penalties in a verify step: a token is penalised for all tokens before it.

Upstream calls its own verification relaxed. It counts only the last token of each step (with
n-grams none) and evaluates each draft as if there were no others before it; so its output is not
that of plain decoding, and `min_new_tokens` counts steps. Here the penalties of each row are
computed from the committed tokens and the drafts on the path to it.

They are exact if the scheduler has all committed tokens, as it has without overlap. Runs in the
scheduler process. Shapes: B requests, W rows per request (its tree, root first), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import SampledRequest, SamplingParams


def apply(
    logits: torch.Tensor,
    requests: Sequence[SampledRequest],
    drafts: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
) -> None:
    """Penalise logits [B * W, V] in place.

    `drafts` [B, W] are the tokens of the trees, whose root is the last committed token.
    `next_token` and `next_sibling` [B, W] are each node's first child and next sibling, or -1.
    """
    width = drafts.shape[1]
    trees = zip(drafts.tolist(), next_token.tolist(), next_sibling.tolist(), strict=True)
    for i, (request, (tokens, children, siblings)) in enumerate(zip(requests, trees, strict=True)):
        parameters = request.sampling_params
        if not _penalised(parameters):
            continue
        stops = _stop_tokens(request)
        output = list(request.output_ids)
        for row, path in enumerate(paths(children, siblings)):
            drafted = [tokens[node] for node in path]
            _penalise(logits[i * width + row], output + drafted, parameters, stops)


def paths(children: Sequence[int], siblings: Sequence[int]) -> list[list[int]]:
    """Return the path of each node of a tree, without the root; [] for a node outside the tree."""
    paths: list[list[int]] = [[] for _ in children]
    waiting = [0]
    while waiting:
        node = waiting.pop()
        child = children[node]
        while child >= 0:
            paths[child] = [*paths[node], child]
            waiting.append(child)
            child = siblings[child]
    return paths


def _penalise(
    logits_V: torch.Tensor, tokens: list[int], parameters: SamplingParams, stops: list[int]
) -> None:
    """Penalise one row in upstream's order: additive penalties first, then the scaling one."""
    if len(tokens) < parameters.min_new_tokens:
        logits_V[stops] = -torch.inf
    counts = torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=len(logits_V))
    ids = counts.nonzero().flatten()
    scores = logits_V[ids]
    scores -= parameters.frequency_penalty * counts[ids] + parameters.presence_penalty
    factor = parameters.repetition_penalty
    logits_V[ids] = torch.where(scores < 0, scores * factor, scores / factor)


def _penalised(parameters: SamplingParams) -> bool:
    return bool(
        parameters.frequency_penalty
        or parameters.presence_penalty
        or parameters.repetition_penalty != 1.0
        or parameters.min_new_tokens
    )


def _stop_tokens(request: SampledRequest) -> list[int]:
    """Return the tokens that are excluded before `min_new_tokens`; the same set as upstream's."""
    ids = set(request.sampling_params.stop_token_ids or ()) | set(request.eos_token_ids or ())
    tokenizer = request.tokenizer
    if tokenizer is not None:
        ids |= set(tokenizer.additional_stop_token_ids or ())
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
    return sorted(ids)
