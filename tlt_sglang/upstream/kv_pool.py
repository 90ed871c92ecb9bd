"""SGLang's batch as it reserves KV slots, as far as the product relies on it.

These Protocols describe and do not enforce. Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class RequestKv(Protocol):
    """`sglang.srt.managers.schedule_batch.ReqKvInfo`: the KV slots of a request."""

    req_pool_idx: int
    """The row of `ReqToTokenPool.req_to_token`."""
    kv_committed_len: int
    """Positions whose keys and values are final."""
    kv_allocated_len: int
    """Positions that have a slot."""


class KvRequest(Protocol):
    """`sglang.srt.managers.schedule_batch.Req`."""

    kv: RequestKv


class Turn(Protocol):
    """`sglang.srt.managers.schedule_batch.Req` of a session."""

    kv: RequestKv
    origin_input_ids: Sequence[int]
    """The earlier turns and the prompt of this one."""
    output_ids: Sequence[int]


class EmbeddedRequest(Protocol):
    """`sglang.srt.managers.schedule_batch.Req` in a prefill."""

    input_embeds: Sequence[Sequence[float]] | None


class PrefillBatch(Protocol):
    """`sglang.srt.managers.schedule_batch.ScheduleBatch` in a prefill."""

    reqs: Sequence[EmbeddedRequest]
    extend_lens: Sequence[int]
    """Tokens of each request that are computed."""
    input_embeds: torch.Tensor | None  # [tokens of requests with embeddings, N]
    replace_embeds: torch.Tensor | None  # [R, N]
    replace_positions: torch.Tensor | None  # [R], rows of the batch


class SpecAlgorithm(Protocol):
    """`sglang.srt.speculative.spec_info.SpeculativeAlgorithm`."""

    def is_eagle(self) -> bool:
        """Return whether it is EAGLE or EAGLE-3."""

    def is_standalone(self) -> bool:
        """Return whether the drafter is a language model of its own."""

    def is_ngram(self) -> bool:
        """Return whether it is SGLang's own n-grams."""


class Allocator(Protocol):
    """`sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator`."""

    page_size: int

    def available_size(self) -> int:
        """Return the free KV slots."""


class PrefixCache(Protocol):
    """`sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache`."""

    def free_kv_row(self, kv: RequestKv, ranges: list[tuple[int, int]]) -> None:
        """Free the slots of ranges of positions."""


class SlotTable(Protocol):
    """`sglang.srt.mem_cache.memory_pool.ReqToTokenPool`."""

    req_to_token: torch.Tensor  # [requests, context], KV slots


class Penalizers(Protocol):
    """`sglang.srt.sampling.penaltylib.BatchedPenalizerOrchestrator`."""

    is_required: bool
    """True if a request of the batch has a penalty."""


class BatchSampling(Protocol):
    """`sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo`."""

    penalizer_orchestrator: Penalizers
    has_custom_logit_processor: bool


class DecodeBatch(Protocol):
    """`sglang.srt.managers.schedule_batch.ScheduleBatch` before a decode step."""

    reqs: Sequence[KvRequest]
    spec_algorithm: SpecAlgorithm
    token_to_kv_pool_allocator: Allocator
    req_to_token_pool: SlotTable
    tree_cache: PrefixCache
    hisparse_coordinator: object
    sampling_info: BatchSampling

    def is_empty(self) -> bool:
        """Return whether it has no requests."""

    def check_decode_mem(self) -> bool:
        """Return whether the next step fits the KV pool."""
