"""Prefill requests of embeddings together with requests of tokens.

SGLang hands the model the embeddings that requests bring as those of the whole batch, so that a
batch with tokens beside them has fewer rows than tokens. Here they replace the rows of their own
tokens, as SGLang's embedding overrides do.

Runs in the scheduler process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import PrefillBatch


def place(batch: PrefillBatch) -> None:
    """Give embeddings the places of their tokens in a prefill that has other tokens as well."""
    embeds = batch.input_embeds
    if embeds is None or all(request.input_embeds is not None for request in batch.reqs):
        return
    rows: list[int] = []
    start = 0
    for request, length in zip(batch.reqs, batch.extend_lens, strict=True):
        if request.input_embeds is not None:
            rows += range(start, start + length)
        start += length
    positions = torch.tensor(rows).to(embeds.device, non_blocking=True)
    embeds = embeds.bfloat16()  # as in a batch of embeddings alone
    if batch.replace_embeds is not None and batch.replace_positions is not None:
        embeds = torch.cat((batch.replace_embeds.to(embeds.dtype), embeds))
        positions = torch.cat((batch.replace_positions, positions))
    batch.input_embeds, batch.replace_embeds, batch.replace_positions = None, embeds, positions
