"""Attention of a drafter over packed sequences, with the extra keys of a simulated draft.

T packed tokens, H query heads, K key/value heads, D head size. Sequences lie one after the other;
a token attends only to its own sequence. Training-time test (EAGLE-3, arXiv 2503.01840, section
3.2) runs the drafter on its own output several times: in simulated step s a token at index i
attends to the keys of step 0 up to i, and to those of steps 1 to s at i alone, its own draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: list[int]
) -> Tensor:
    """q [T, H, D], keys and values of each simulated step [T, K, D] -> [T, H, D]."""
    scale = q.shape[-1] ** -0.5
    groups = q.shape[1] // keys[0].shape[1]
    k, v = (_per_query_head(x[0], groups) for x in (keys, values))
    causal = _causal_flex if q.is_cuda else _causal
    with torch.autocast(q.device.type, enabled=False):
        out, total = causal(q, k, v, lengths, scale)
    if len(keys) == 1:
        return out
    # Merge by the logarithms of the two softmax denominators.
    own_k = torch.stack([_per_query_head(x, groups) for x in keys[1:]], dim=2)
    own_v = torch.stack([_per_query_head(x, groups) for x in values[1:]], dim=2)
    scores = (q.unsqueeze(2) * own_k).sum(-1) * scale  # [T, H, S]
    weights = torch.cat([total.unsqueeze(-1), scores], dim=-1).softmax(-1)
    own = (weights[..., 1:].unsqueeze(-1) * own_v).sum(2)
    return out * weights[..., :1] + own


def _per_query_head(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=1)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(output [T, H, D], log of the softmax denominator [T, H]), a sequence at a time."""
    q, k, v = q.float(), k.float(), v.float()
    outs, totals = [], []
    sequences = zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True)
    for one_q, one_k, one_v in sequences:
        length = len(one_q)
        scores = torch.matmul(one_q.transpose(0, 1), one_k.permute(1, 2, 0)) * scale
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        outs.append(torch.matmul((scores - total).exp(), one_v.transpose(0, 1)).transpose(0, 1))
        totals.append(total.squeeze(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(totals)


def _causal_flex(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The same by FlexAttention with a mask of sequences, for CUDA; run there, not compared."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    tokens = len(q)
    counts = torch.tensor(lengths, device=q.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), counts)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (sequence[query] == sequence[key]) & (query >= key)

    mask = create_block_mask(visible, None, None, tokens, tokens, device=q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, aux = flex_attention(
        q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)
