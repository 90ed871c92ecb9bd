"""The fields of SGLang's `ServerArgs` that TLT reads and sets before SGLang resolves them.

The launcher's `sglang_flags.Flags` has the same fields, so that the same checks run on both.
"""

from __future__ import annotations

from typing import Protocol

Fields = dict[str, str | int | float | bool | None]
"""Fields of `ServerArgs`, by their names."""


class Arguments(Protocol):
    """The fields of SGLang's `ServerArgs` that are read here."""

    model_path: str
    device: str | None
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    tp_size: int
    dp_size: int
    pp_size: int
    page_size: int | None
    context_length: int | None
    chunked_prefill_size: int | None
    max_total_tokens: int | None
    max_running_requests: int | None
    mem_fraction_static: float | None
    attention_backend: str | None
    enable_memory_saver: bool
    speculative_algorithm: str | None
    speculative_draft_model_path: str | None
    speculative_num_steps: int | None
    speculative_eagle_topk: int | None
    speculative_num_draft_tokens: int | None
    speculative_ngram_capacity: int
    speculative_adaptive: bool
    warmups: str | None
