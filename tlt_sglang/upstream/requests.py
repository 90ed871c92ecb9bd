"""SGLang's requests and what tokenizes them, as admission reads them; for type checks only.

Like `protocols`, this is also the list of attributes that an upgrade of SGLang has to check.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypedDict


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
    input_embeds: object | None
    session_params: object | None
    log_metrics: bool
    """False for requests of SGLang's own."""
    sampling_params: Mapping[str, object]
    custom_logit_processor: str | None

    def contains_mm_input(self) -> bool:
        """Return whether it has images, videos or audio."""


class Answer(TypedDict):
    """An answer as SGLang's tokenizer manager yields it, or a part of one in a stream."""

    meta_info: dict[str, object]


class RequestState(Protocol):
    """`sglang.srt.managers.tokenizer_manager.ReqState`: what is known of a request in flight."""

    obj: Request
    output_ids: list[int]
    """All tokens so far, of a stream as well."""


class SamplingParameters(Protocol):
    """`sglang.srt.sampling.sampling_params.SamplingParams`, as they are sent to the scheduler."""

    n: int
    max_new_tokens: int | None
    sampling_seed: int | None


class TokenizedRequest(Protocol):
    """`sglang.srt.managers.io_struct.TokenizedGenerateReqInput`."""

    rid: str
    sampling_params: SamplingParameters


class MainArgs(Protocol):
    """`sglang.srt.server_args.ServerArgs`, resolved, in the main process."""

    random_seed: int
    tokenizer_worker_num: int


class Manager(Protocol):
    """`sglang.srt.managers.tokenizer_manager.TokenizerManager`, as admission uses it."""

    server_args: MainArgs
    rid_to_state: Mapping[str, RequestState]
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
