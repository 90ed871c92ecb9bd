"""SGLang's objects as far as the product relies on them, attribute by attribute.

SGLang is untyped to us, so these Protocols are both: the types of the hot path, and the list of
attributes, private ones among them, that an upgrade of SGLang has to check. They describe and do
not enforce: nothing here is imported at run time by the engine.

Shapes: B requests, W verified tokens per request, V vocabulary, N hidden size, F features a token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from tlt_sglang.upstream.weight_updates import UpdateManager

Upstream = Callable[..., Any]
"""A function of SGLang's, as a patch is handed it."""


class SamplingParams(Protocol):
    """`sglang.srt.sampling.sampling_params.SamplingParams`, after its `normalize`."""

    top_k: int
    """1 for greedy requests."""
    custom_params: Mapping[str, object] | None


class Request(Protocol):
    """`sglang.srt.managers.schedule_batch.Req`."""

    rid: str
    origin_input_ids: Sequence[int]
    output_ids: Sequence[int]
    finished_len: int | None
    """Output tokens up to the end of the text, where a stop has cut them."""
    is_retracted: bool
    customized_info: dict[str, list[int]] | None
    """Merged into the request's `meta_info`."""

    @property
    def sampling_params(self) -> SamplingParams:
        """The request's sampling parameters."""

    def finished(self) -> bool:
        """Return whether the request has its last token."""


class ForwardMode(Protocol):
    """`sglang.srt.model_executor.forward_batch_info.ForwardMode`."""

    def is_idle(self) -> bool:
        """Return whether this rank only takes part in collectives."""

    def is_extend(self) -> bool:
        """Return whether prompts are prefilled."""

    def is_decode(self) -> bool:
        """Return whether every request computes one token."""

    def is_target_verify(self) -> bool:
        """Return whether drafts are verified."""


class SamplingInfo(Protocol):
    """`sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo`."""

    is_all_greedy: bool
    temperatures: torch.Tensor  # [B, 1]
    top_ks: torch.Tensor  # [B]
    top_ps: torch.Tensor  # [B]
    min_ps: torch.Tensor  # [B]
    need_top_k_sampling: bool
    need_top_p_sampling: bool
    need_min_p_sampling: bool
    sampling_seed: torch.Tensor | None  # [B]
    sampling_mask_batch_indices: torch.Tensor | None  # requests that return their filtered tokens


class DraftInput(Protocol):
    """`sglang.srt.speculative.eagle_info.EagleDraftInput`: what the next draft starts from."""

    topk_p: torch.Tensor  # [B, topk]
    topk_index: torch.Tensor  # [B, topk]
    hidden_states: torch.Tensor  # [B, N]
    bonus_tokens: torch.Tensor  # [B]
    cuda_graph_compatible: bool


class VerifyInput(Protocol):
    """`sglang.srt.speculative.eagle_info.EagleVerifyInput`."""

    draft_token: torch.Tensor  # [B * W]
    draft_token_num: int  # W
    positions: torch.Tensor  # [B * W]
    max_tree_depth: int
    tree_topk: int
    """Branches of a node; -1 for SGLang's own n-grams, where it varies."""
    retrieve_index: torch.Tensor  # [B, W]
    retrieve_next_token: torch.Tensor  # [B, W]
    retrieve_next_sibling: torch.Tensor  # [B, W]
    topk: int


class LogitsOutput(Protocol):
    """`sglang.srt.layers.logits_processor.LogitsProcessorOutput`."""

    next_token_logits: torch.Tensor  # [B * W, V]
    hidden_states: torch.Tensor  # [B * W, F]
    last_hidden_states: torch.Tensor | None  # [B * W, N]


class StepResult(Protocol):
    """`sglang.srt.managers.utils.GenerationBatchResult` of a verify step."""

    accept_lens: torch.Tensor  # [B], the bonus token counted
    cap_lens: torch.Tensor  # [B], from which SGLang counts what was proposed
    accept_index: torch.Tensor | None  # [B, W]; None after a prefill
    next_token_ids: torch.Tensor  # [B * W]
    new_seq_lens: torch.Tensor  # [B]
    logits_output: LogitsOutput
    next_draft_input: DraftInput
    speculative_num_draft_tokens: int


class Batch(Protocol):
    """`sglang.srt.managers.schedule_batch.ScheduleBatch`."""

    reqs: list[Request]
    forward_mode: ForwardMode
    is_extend_in_batch: bool
    return_hidden_states: bool
    """True if any request of the batch wants them."""
    sampling_info: SamplingInfo
    spec_info: Any
    """A DraftInput before a draft, a VerifyInput after it."""
    seq_lens: torch.Tensor  # [B], committed tokens
    seq_lens_cpu: torch.Tensor | None  # [B], where the attention backend needs them on the host
    req_pool_indices: torch.Tensor  # [B]
    out_cache_loc: torch.Tensor  # KV slots of the tokens that a forward writes
    input_ids: torch.Tensor
    prefix_lens: Sequence[int]
    extend_lens: Sequence[int]


class ModelConfig(Protocol):
    """`sglang.srt.configs.model_config.ModelConfig`."""

    vocab_size: int
    hidden_size: int
    context_len: int
    hf_config: Any
    """transformers' PretrainedConfig."""
    hf_text_config: Any
    """The language model's part of it."""

    def __hash__(self) -> int:
        """Return a hash by identity."""


class ServerArgs(Protocol):
    """`sglang.srt.server_args.ServerArgs`, as far as it is read after its resolution."""

    model_path: str
    tp_size: int
    speculative_algorithm: str | None
    speculative_draft_model_path: str | None
    max_running_requests: int | None
    max_queued_requests: int | None


class ModelRunner(Protocol):
    """`sglang.srt.model_executor.model_runner.ModelRunner`."""

    model: torch.nn.Module
    model_config: ModelConfig
    server_args: ServerArgs
    device: str
    dtype: torch.dtype
    attn_backend: object
    draft_attn_backend: object
    decode_cuda_graph_runner: object
    init_new_workspace: object
    max_running_requests: int
    shared_read_done_event: object
    """An event that tells the scheduler that a step has read its shared inputs; None if none."""
    forward: Upstream

    def _get_attention_backend(self, *, init_new_workspace: bool) -> object:
        """Return a new attention backend, as the configuration asks for it."""

    def _decode_cuda_graph_runner_cls(self) -> Callable[..., object]:
        """Return the class that captures the graphs of decode steps, target verification too."""


class TargetWorker(Protocol):
    """`sglang.srt.managers.tp_worker.TpModelWorker`."""

    model_runner: ModelRunner
    model_config: ModelConfig


class RequestPool(Protocol):
    """`sglang.srt.mem_cache.memory_pool.ReqToTokenPool`."""

    req_to_token: torch.Tensor  # [requests, context], KV slots


class SpecSettings(Protocol):
    """`sglang.srt.runtime_context.get_spec()`: the engine's settings of speculation."""

    speculative_algorithm: str | None


class DraftWorker(Protocol):
    """`sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker`."""

    topk: int
    speculative_num_steps: int
    speculative_num_draft_tokens: int
    device: str
    parallel_layout: object
    tree_mask_mode: object
    hot_token_id: torch.Tensor | None  # [D], the drafter's vocabulary in the target's
    target_worker: TargetWorker
    draft_runner: ModelRunner
    req_to_token_pool: RequestPool
    draft_attn_backend: object
    draft_extend_attn_backend: object
    cuda_graph_runner: object
    cuda_graph_runner_for_draft_extend: object
    _topk1_parents_prealloc: torch.Tensor
    _topk1_score_indices_prealloc: torch.Tensor

    def _rebuild_topk1_chain_buffers(self) -> None:
        """Fill the constant tables of a chain for the current number of steps."""


class RuntimeState(Protocol):
    """`sglang.srt.speculative.adaptive_runtime_state.SpecRuntimeState`."""

    speculative_num_steps: int
    speculative_num_draft_tokens: int
    draft_attn_backend: object
    cuda_graph_runner: object
    target_attn_backend: object
    target_graph_runner: object
    draft_extend_attn_backend: object
    cuda_graph_runner_for_draft_extend: object


class EagleWorker(Protocol):
    """`sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2`."""

    topk: int
    speculative_num_steps: int
    speculative_num_draft_tokens: int
    target_worker: TargetWorker
    _target_worker: TargetWorker
    _draft_worker: DraftWorker

    def build_adaptive_runtime_state(
        self,
        speculative_num_steps: int,
        speculative_num_draft_tokens: int,
        cuda_graph_bs: list[int] | None = None,
    ) -> RuntimeState:
        """Return a `SpecRuntimeState` with backends and graph runners of its own."""

    def _override_worker_state(
        self,
        speculative_num_steps: int,
        speculative_num_draft_tokens: int,
        cuda_graph_bs: list[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Return a context in which backends and runners are built for this shape."""


class Scheduler(Protocol):
    """`sglang.srt.managers.scheduler.Scheduler`."""

    server_args: ServerArgs
    draft_worker: EagleWorker | None
    running_batch: Batch | None
    waiting_queue: Sequence[Request]
    weight_updater: UpdateManager


class TokenizerManager(Protocol):
    """`sglang.srt.managers.tokenizer_manager.TokenizerManager`, in the HTTP process."""

    server_args: ServerArgs
    model_config: ModelConfig
    context_len: int

    async def get_internal_state(self) -> list[dict[str, Any]]:
        """Return the internal state of every scheduler."""

    async def set_internal_state(self, obj: object) -> list[bool]:
        """Send a `SetInternalStateReq` to every scheduler; return whether each took it."""

    def generate_request(self, obj: object, request: None) -> AsyncIterator[object]:
        """Generate for a `GenerateReqInput`."""

    def config_value(self, name: str) -> object:
        """Return the value in effect of a field of ServerArgs."""

    def abort_request(self, *, abort_all: bool) -> None:
        """Abort requests."""

    async def flush_cache(self, timeout_s: float) -> object:
        """Flush the caches of every scheduler."""


class GlobalState(Protocol):
    """The return value of `sglang.srt.entrypoints.http_server.get_global_state`."""

    tokenizer_manager: TokenizerManager


class InternalStateRequest(Protocol):
    """`sglang.srt.managers.io_struct.SetInternalStateReq`."""

    server_args: dict[str, Any]


class InternalState(Protocol):
    """`sglang.srt.managers.io_struct.GetInternalStateReqOutput`."""

    internal_state: dict[str, Any]
