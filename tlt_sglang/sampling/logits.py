"""Changes of logits in a verify step, which plain decoding makes to one row of each request.

SGLang's verification applies penalties, biases, grammar masks and watermarks, but no custom logit
processors. Plain decoding calls a processor once a token, after the other changes, with the request
as it stands; a processor may read the request's tokens and may keep a state of its own (thinking
budgets do the one, others the other). The row of a draft cannot be offered to it: a call for a
draft that is then rejected would leave its mark. So a request with a processor commits one token a
step. Its drafts are cut off the tree, and the processor sees the row of the root: the same calls,
with the same arguments, as in plain decoding, whatever the strategy and the device. Other requests
of the batch keep their drafts.

On GPUs the same holds for penalties, which SGLang counts up once a step: they are exact where a
step commits one token. The CPU engine penalises each row by itself (`cpu.penalties`).

Runs in the scheduler process. Shapes: B requests, W rows per request (its tree, root first), V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import GrammarMask, PenalisedSampling, SampledRequest
    from tlt_sglang.upstream.protocols import VerifyInput


def processed_rows(info: PenalisedSampling) -> set[int]:
    """Return the requests of a batch that have a custom logit processor."""
    if not info.has_custom_logit_processor:
        return set()
    return {row for _, _, rows in upstream.current().processors(info) for row in rows}


def penalised_rows(requests: Sequence[SampledRequest]) -> set[int]:
    """Return the requests whose logits depend on the tokens that they have put out so far."""
    return {row for row, request in enumerate(requests) if _penalised(request)}


def _penalised(request: SampledRequest) -> bool:
    parameters, minimum = request.sampling_params, request.sampling_params.min_new_tokens
    return bool(
        parameters.frequency_penalty
        or parameters.presence_penalty
        or parameters.repetition_penalty != 1.0
        # With overlap scheduling, the tokens on the host are a step behind those of the device.
        or (minimum and len(request.output_ids) <= minimum + 1)
    )


def cut_drafts(verify_input: VerifyInput, rows: Collection[int]) -> None:
    """Take the drafts of these requests out of a verify step, which commits one token for them.

    The tensors of `verify_input` are replaced, since their memory may be shared between steps.
    """
    if not rows or verify_input.draft_token_num == 1:
        return
    links = verify_input.retrieve_next_token.clone()
    # From pinned memory the copy waits for nothing.
    index = torch.tensor(sorted(rows), pin_memory=links.is_cuda).to(links.device, non_blocking=True)
    links[:, 0].index_fill_(0, index, -1)
    verify_input.retrieve_next_token = links


def apply_all(
    logits: torch.Tensor, width: int, info: PenalisedSampling, mask: GrammarMask | None
) -> None:
    """Change logits [B * W, V] in place as plain decoding does, in its order, and note that in
    `info`, which is a copy for one forward: nothing of it may be applied again.

    Custom processors see the first of each request's `width` rows.
    """
    from sglang.srt.layers.sampler import apply_custom_logit_processor

    apply_penalties(logits, width, info)
    apply_mask_and_bias(logits, width, info, mask)
    apply_custom_logit_processor(logits.view(-1, width, logits.shape[-1])[:, 0], info)
    info.acc_additive_penalties = info.acc_scaling_penalties = info.logit_bias = None


def apply_penalties(logits: torch.Tensor, width: int, info: PenalisedSampling) -> None:
    """Change logits [B * W, V] in place by the penalties that SGLang has counted up."""
    from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

    rows = logits.view(-1, width, logits.shape[-1])
    if info.acc_additive_penalties is not None:
        rows += info.acc_additive_penalties.unsqueeze(1)
    if info.acc_scaling_penalties is not None:
        apply_scaling_penalties(rows, info.acc_scaling_penalties.unsqueeze(1))


def apply_mask_and_bias(
    logits: torch.Tensor, width: int, info: PenalisedSampling, mask: GrammarMask | None
) -> None:
    """Change logits [B * W, V] in place by the batch's grammar mask and its biases."""
    if mask is not None:
        mask.apply(logits)
    if info.logit_bias is not None:
        rows = logits.view(-1, width, logits.shape[-1])
        rows += info.logit_bias.unsqueeze(1)
