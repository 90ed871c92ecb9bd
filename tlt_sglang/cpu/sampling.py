"""Verification on CPU with temperature, top-k, top-p and min-p, exact for the target.

Greedy batches are verified without SGLang's `eagle_sample`, whose argmax takes several times as
long. For other batches that function draws coins from the batch's sampling parameters and then
calls a kernel with the coins but without the parameters; `remember` carries them from one call to
the other (the scheduler is single-threaded). Runs in the scheduler process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tlt_sglang.cpu import head
from tlt_sglang.cpu.kernels import tree_speculative_sampling_target_only, verify_tree_greedy_cpu

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import SamplingInfo, VerifyInput

_sampling_info: SamplingInfo | None = None


def remember(sampling_info: SamplingInfo) -> None:
    """Keep the sampling parameters of the batch that is verified next."""
    global _sampling_info
    _sampling_info = sampling_info


def verify_greedy(
    verify_input: VerifyInput, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what SGLang's `eagle_sample` returns for a greedy batch with logits [T, V].

    These are the target's tokens [T], the number of tokens that each request commits [B], and the
    rows of those tokens [B, depth].
    """
    return walk(verify_input, head.most_likely(logits))


def walk(
    verify_input: VerifyInput, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `eagle_sample` returns where the target chooses `tokens` [T] after its rows."""
    width = verify_input.draft_token_num
    target = tokens.view(-1, width)
    if width == 1:  # nothing was drafted
        size = len(target)
        ones, rows = torch.ones(size, dtype=torch.int32), torch.arange(size, dtype=torch.int32)
        return target.view(-1).to(torch.int32), ones, rows.view(-1, 1)
    predicts = torch.zeros(target.numel(), dtype=torch.int32)
    rows = torch.full((len(target), verify_input.max_tree_depth), -1, dtype=torch.int32)
    correct = torch.empty(len(target), dtype=torch.int32)
    verify_tree_greedy_cpu(
        predicts,
        rows,
        correct,
        verify_input.draft_token.view(-1, width),
        verify_input.retrieve_index,
        verify_input.retrieve_next_token,
        verify_input.retrieve_next_sibling,
        target,
    )
    return predicts, correct + 1, rows


def verify(*, draft_probs: torch.Tensor, **arguments: Any) -> None:
    """Accept drafts and sample the bonus token; for the arguments see the kernel.

    The drafts have no distribution: `draft_probs` is all zeros.
    """
    global _sampling_info
    info, _sampling_info = _sampling_info, None
    assert info is not None, "verification without sampling parameters"
    tree_speculative_sampling_target_only(
        draft_probs=None,
        top_ks=info.top_ks if info.need_top_k_sampling else None,
        top_ps=info.top_ps if info.need_top_p_sampling else None,
        min_ps=info.min_ps if info.need_min_p_sampling else None,
        **arguments,
    )
