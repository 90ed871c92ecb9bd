"""The shape of SGLang whose model runner updates the weights, and which speculates on GPUs alone.

On CPU patches lead it through its own code for other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import v16

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Batch, ModelRunner, VerifyInput


class Adapter(v16.Adapter):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def limits(self) -> Sequence[str]:
        return (
            *super().limits(),
            "With several strategies, spec_accept_rate counts the drafts of the largest one for "
            "every step with this SGLang; /tlt/status counts those of each strategy.",
        )

    # -- drafting ----------------------------------------------------------------------------------

    def slots_per_step(self) -> int:
        from sglang.srt.mem_cache.common import get_alloc_len_per_decode

        slots: int = get_alloc_len_per_decode()
        return slots

    def chain_to_verify(self, draft: Any, batch: Batch, drafts: torch.Tensor) -> VerifyInput:
        from sglang.srt.speculative.eagle_info import EagleVerifyInput
        from sglang.srt.speculative.eagle_utils import build_tree_kernel_efficient

        size, depth = len(batch.reqs), draft.speculative_num_steps
        backend = draft.target_worker.model_runner.attn_backend
        mask, positions = backend.get_verify_buffers_to_fill_after_draft()
        mask, positions, index, next_token, next_sibling, tokens = build_tree_kernel_efficient(
            batch.spec_info.bonus_tokens,
            draft._topk1_parents_prealloc[:size],
            draft._topk1_score_indices_prealloc[:size],
            drafts,
            batch.seq_lens,
            _mask_tokens(batch, backend, mask),
            1,
            depth,
            depth + 1,
            draft.tree_mask_mode,
            mask,
            positions,
        )
        verify_input: VerifyInput = EagleVerifyInput(
            draft_token=tokens,
            custom_mask=mask,
            positions=positions,
            retrieve_index=index,
            retrieve_next_token=next_token,
            retrieve_next_sibling=next_sibling,
            retrieve_cum_len=None,
            spec_steps=depth,
            topk=1,
            draft_token_num=depth + 1,
            capture_hidden_mode=None,
            seq_lens_sum=None,
            seq_lens_cpu=None,
        )
        return verify_input

    def asks_for_masks(self, info: Any) -> bool:
        return False  # requests cannot ask for them

    def extend_batch(self, batch: Any, runner: ModelRunner) -> Any:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

        batch.capture_hidden_mode = CaptureHiddenMode.LAST
        return ForwardBatch.init_new(batch, runner)

    # -- requests, models and weights --------------------------------------------------------------

    def truncates(self, manager: Any) -> bool:
        return bool(manager.server_args.allow_auto_truncate)

    def acted(self, updated: bool) -> object:
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        return SetInternalStateReqOutput(updated=updated, server_args={})

    def update_groups(self, runner: Any) -> Sequence[str]:
        return list(runner._model_update_group)


def _mask_tokens(batch: Any, backend: Any, mask: torch.Tensor | None) -> int:
    """Return for how many tokens of a batch a new mask has room; with a `mask`, it is not asked."""
    if mask is not None:
        return 0
    if batch.seq_lens_sum is not None:
        return int(batch.seq_lens_sum)
    return len(batch.seq_lens) * int(backend.max_context_len)
