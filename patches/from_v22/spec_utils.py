"""sglang.srt.speculative.spec_utils, in the scheduler process: sampling of drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import replaces_upstream

if TYPE_CHECKING:
    import torch


def _row_argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the index [B] of the largest score in each row of [B, V]."""
    return scores.argmax(dim=-1)


PATCHES = (
    replaces_upstream(
        "sglang.srt.speculative.spec_utils:row_argmax",
        _row_argmax,
        why="drafts are sampled with it, and it is written in Triton, which does not support CPUs",
        remove_when="SGLang samples drafts on CPUs",
        process="scheduler",
        only_on="cpu",
    ),
)
