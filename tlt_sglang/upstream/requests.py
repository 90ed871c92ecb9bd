"""SGLang's requests and what tokenizes them, as admission reads them; for type checks only.

Like `protocols`, this is also the list of attributes that an upgrade of SGLang has to check.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol


class ModelConfig(Protocol):
    """`sglang.srt.configs.model_config.ModelConfig`, in the main process."""

    vocab_size: int
    hidden_size: int


class Call(Protocol):
    """`sglang.srt.managers.io_struct.GenerateReqInput`: one request, or several in lists."""

    stream: bool
    batch_size: int
    parallel_sample_num: int

    def __getitem__(self, index: int) -> Request:
        """Return one request of several; the same object every time."""


class Request(Protocol):
    """`sglang.srt.managers.io_struct.GenerateReqInput` with one request."""

    text: str | None
    input_ids: list[int] | None
    sampling_params: Mapping[str, object]
    custom_logit_processor: str | None

    def contains_mm_input(self) -> bool:
        """Return whether it has images, videos or audio."""


class Manager(Protocol):
    """`sglang.srt.managers.tokenizer_manager.TokenizerManager`, as admission uses it."""

    model_config: ModelConfig
    context_len: int
    num_reserved_tokens: int
    max_req_input_len: int | None
    allow_auto_truncate: bool
    preferred_sampling_params: Mapping[str, object] | None
    tokenizer: object | None
    mm_processor: object | None

    async def _tokenize_texts(
        self, texts: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Return the token ids of each text."""

    def _should_use_batch_tokenization(self, batch_size: int, call: Call) -> bool:
        """Return whether SGLang tokenizes and checks all requests before it sends any."""

    def _validate_one_request(self, request: Request, input_ids: Collection[int]) -> None:
        """Raise ValueError for a request that SGLang refuses."""

    def _create_tokenized_object(
        self, request: Request, text: str | None, input_ids: Collection[int]
    ) -> object:
        """Return the request as it is sent to the scheduler; raise ValueError if it cannot be."""
