"""SGLang's objects between a step and its answer, as far as the product relies on them.

They go on from `tlt_sglang.upstream.protocols` and serve the same two purposes: types, and the list
of attributes that an upgrade of SGLang has to check.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from tlt_sglang.upstream.protocols import ForwardMode, Request, SamplingParams


class Grammar(Protocol):
    """`sglang.srt.constrained.base_grammar_backend.BaseGrammarObject`."""

    finished: bool
    """SGLang sets it once the request has its last token."""

    def is_terminated(self) -> bool:
        """Return whether the grammar has accepted its last token."""


class StopParameters(SamplingParams, Protocol):
    """`sglang.srt.sampling.sampling_params.SamplingParams`."""

    stop_strs: Sequence[str]
    stop_regex_strs: Sequence[str]
    min_new_tokens: int
    max_new_tokens: int
    """The limit that the scheduler has set where the request has none."""


class KvInfo(Protocol):
    """`ReqKvInfo`, the KV slots of a request."""

    kv_committed_len: int
    """Tokens whose keys and values are in the pool."""


class Tokenizer(Protocol):
    """A tokenizer of transformers; a fast one also has a `backend_tokenizer` with a decoder."""

    clean_up_tokenization_spaces: bool


class AnsweredRequest(Request, Hashable, Protocol):
    """`sglang.srt.managers.schedule_batch.Req`, whose answer is about to grow."""

    output_ids: list[int]
    """An array of the standard library."""
    sampling_params: StopParameters
    tokenizer: Tokenizer
    grammar: Grammar | None
    finished_reason: object | None
    """A `BaseFinishReason` once the request has its last token."""
    to_finish: object | None
    """A `BaseFinishReason` that ends the request at its next token."""
    vocab_size: int | None
    is_retracted: bool
    kv: KvInfo
    spec_num_correct_drafts: int
    spec_correct_drafts_histogram: list[int]
    """Verify steps by the number of accepted drafts."""

    def update_finish_state(self, new_accepted_len: int = 1) -> None:
        """Set `finished_reason` if the last tokens of the output end it."""

    def update_spec_correct_drafts_histogram(self, num_correct_drafts: int) -> None:
        """Count one verify step."""


class AnsweredBatch(Protocol):
    """`sglang.srt.managers.schedule_batch.ScheduleBatch`, of which a step has the result."""

    reqs: Sequence[AnsweredRequest]
    forward_mode: ForwardMode


class DecodeResult(Protocol):
    """`sglang.srt.managers.utils.GenerationBatchResult` of a verify step, on the host."""

    num_correct_drafts_per_req_cpu: list[int]
    num_non_draft_tokens_per_req: int
    grammar_advanced: bool
    grammar_retained_tokens: list[list[int] | None] | None
    """The part of each accepted run that is committed, where that is not the whole run."""


class CacheParameters(Protocol):
    """`sglang.srt.mem_cache.cache_init_params.CacheInitParams`."""

    is_eagle: bool
    """The prefix cache is keyed with pairs of tokens."""


class CacheContext(Protocol):
    """`sglang.srt.mem_cache.registry.TreeCacheBuildContext`."""

    params: CacheParameters
