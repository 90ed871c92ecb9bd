"""Verification on CPU: temperature, top-k, top-p and min-p, exactly as the target has it.

Greedy batches are verified without SGLang's `eagle_sample`, whose argmax takes several times as
long. For the others that draws its coins from the batch's sampling parameters and then calls a
kernel that gets the coins but not the parameters; `remember` carries them from the one call to the
other (the scheduler is single-threaded). Runs in the scheduler process.
"""

from __future__ import annotations

from typing import Any

import torch

from tlt_sglang.cpu import head
from tlt_sglang.cpu.kernels import tree_speculative_sampling_target_only, verify_tree_greedy_cpu

_parameters: Any = None


def remember(sampling_info: Any) -> None:
    """The sampling parameters of the batch that is verified next."""
    global _parameters
    _parameters = sampling_info


def verify_greedy(
    verify_input: Any, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What SGLang's `eagle_sample` returns where the most likely token of each row of logits [T, V]
    is the target's: (tokens [T], committed tokens of each request [B], their rows [B, depth])."""
    width = verify_input.draft_token_num
    wanted = head.most_likely(logits).view(-1, width)
    if width == 1:  # nothing was drafted
        size = len(wanted)
        one, rows = torch.ones(size, dtype=torch.int32), torch.arange(size, dtype=torch.int32)
        return wanted.view(-1).to(torch.int32), one, rows.view(-1, 1)
    predicts = torch.zeros(wanted.numel(), dtype=torch.int32)
    rows = torch.full((len(wanted), verify_input.max_tree_depth), -1, dtype=torch.int32)
    correct = torch.empty(len(wanted), dtype=torch.int32)
    verify_tree_greedy_cpu(
        predicts,
        rows,
        correct,
        verify_input.draft_token.view(-1, width),
        verify_input.retrieve_index,
        verify_input.retrieve_next_token,
        verify_input.retrieve_next_sibling,
        wanted,
    )
    return predicts, correct + 1, rows


def verify(*, draft_probs: Any, **arguments: Any) -> None:
    """Accept drafts and sample the bonus token; the kernel's own docstring has the arguments.

    These drafts are single tokens without a distribution: `draft_probs` is all zeros.
    """
    _verify(draft_probs=None, **arguments)


def verify_drawn(**arguments: Any) -> None:
    """The same for chains that were drawn from `draft_probs`."""
    _verify(drawn=True, **arguments)


def _verify(**arguments: Any) -> None:
    global _parameters
    info, _parameters = _parameters, None
    assert info is not None, "verification without sampling parameters"
    tree_speculative_sampling_target_only(
        top_ks=info.top_ks if info.need_top_k_sampling else None,
        top_ps=info.top_ps if info.need_top_p_sampling else None,
        min_ps=info.min_ps if info.need_min_p_sampling else None,
        **arguments,
    )
