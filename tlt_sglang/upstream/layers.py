"""SGLang's layers and models as the CPU path reads them, attribute by attribute.

Like `protocols`, this is both the types of the hot path and the list of attributes that an upgrade
of SGLang has to check. It describes and does not enforce; it is imported for type checks only.

Shapes: T tokens, N hidden size, D head size, R rotary size, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from tlt_sglang.upstream.protocols import DraftInput, ForwardMode, ModelRunner, SamplingInfo


class Norm(Protocol):
    """`sglang.srt.layers.layernorm.RMSNorm`."""

    weight: torch.Tensor  # [N]
    variance_epsilon: float
    variance_size_override: int | None
    hidden_size: int


class Rotary(Protocol):
    """`sglang.srt.layers.rotary_embedding.base.RotaryEmbedding`."""

    is_neox_style: bool
    head_size: int
    cos_sin_cache: torch.Tensor  # [P, R]

    def forward_native(self, *args: object, **kwargs: object) -> object:
        """Rotate queries and keys; compared by identity to detect overrides."""


class Linear(Protocol):
    """A linear layer of `sglang.srt.layers.linear`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    quant_method: object


class RadixAttention(Protocol):
    """`sglang.srt.layers.radix_attention.RadixAttention`."""

    layer_id: int
    scaling: float
    logit_cap: float
    sliding_window_size: int
    is_cross_attention: bool
    attn_type: object
    tp_q_head_num: int
    tp_k_head_num: int
    head_dim: int
    qk_head_dim: int
    v_head_dim: int


class SelfAttention(Protocol):
    """The attention of a Llama, Qwen2 or Qwen3 layer; `q_norm` and `k_norm` are optional."""

    attn: RadixAttention
    rotary_emb: Rotary
    qkv_proj: Linear
    o_proj: Linear


class GatedMLP(Protocol):
    """`sglang.srt.models.llama.LlamaMLP` or `sglang.srt.models.qwen2.Qwen2MLP`."""

    gate_up_proj: Linear
    down_proj: Linear


class DecoderLayer(Protocol):
    """A layer of a target, or of an EAGLE-3 drafter; only the latter has a `hidden_norm`."""

    self_attn: SelfAttention
    mlp: GatedMLP
    input_layernorm: Norm
    post_attention_layernorm: Norm
    hidden_norm: Norm


class ParallelGroup(Protocol):
    """`sglang.srt.distributed.parallel_state.GroupCoordinator`."""

    world_size: int


class DrafterConfig(Protocol):
    """The transformers configuration of a drafter."""

    hidden_size: int
    vocab_size: int


class DecoderModel(Protocol):
    """The `LlamaModel` or `Qwen2Model` of a target, or the `LlamaModel` of an EAGLE-3 drafter.

    From `fc` on, only a drafter has the attributes.
    """

    embed_tokens: Linear
    layers: Sequence[DecoderLayer]
    layers_to_capture: Sequence[int]
    norm: Norm
    pp_group: ParallelGroup
    fc: Linear
    config: DrafterConfig
    is_mrope_enabled: bool
    input_norm: object | None
    fc_norm: object
    norm_output: bool


class LogitsProcessor(Protocol):
    """`sglang.srt.layers.logits_processor.LogitsProcessor`."""

    config: DrafterConfig
    logit_scale: float | None
    final_logit_softcapping: float | None
    keep_last_hidden_states: bool


class DrafterModel(Protocol):
    """`sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3`."""

    model: DecoderModel
    lm_head: Linear
    logits_processor: LogitsProcessor


class TreeInput(Protocol):
    """The `spec_info` of a forward: a draft input, or a verify input with its tree."""

    draft_token_num: int
    tree_topk: int
    custom_mask: torch.Tensor


class ForwardBatch(Protocol):
    """`sglang.srt.model_executor.forward_batch_info.ForwardBatch` of a verify step or prefill."""

    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    extend_prefix_lens: torch.Tensor
    extend_seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor
    spec_info: TreeInput
    mm_input_embeds: torch.Tensor | None


class DraftForwardBatch(Protocol):
    """`ForwardBatch` of a draft step, whose `spec_info` is a draft input."""

    forward_mode: ForwardMode
    batch_size: int
    positions: torch.Tensor
    out_cache_loc: torch.Tensor
    sampling_info: SamplingInfo
    spec_info: DraftInput
    mm_input_embeds: torch.Tensor | None


class SamplingParams(Protocol):
    """`sglang.srt.sampling.sampling_params.SamplingParams`."""

    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    min_new_tokens: int
    stop_token_ids: Sequence[int] | None


class Tokenizer(Protocol):
    """A tokenizer as SGLang extends it."""

    additional_stop_token_ids: Sequence[int] | None
    eos_token_id: int | None


class SeedParameters(Protocol):
    """`SamplingParams` with the seed of a request."""

    sampling_seed: int | None


class SeededSampling(Protocol):
    """`SamplingBatchInfo` with the seeds of its requests."""

    sampling_seed: torch.Tensor | None  # [B]


class SeededRequest(Protocol):
    """`sglang.srt.managers.schedule_batch.Req` with its seed."""

    @property
    def sampling_params(self) -> SeedParameters:
        """The request's sampling parameters."""


class SampledRequest(Protocol):
    """`sglang.srt.managers.schedule_batch.Req` with what its penalties need."""

    output_ids: Sequence[int]
    sampling_params: SamplingParams
    eos_token_ids: Sequence[int] | None
    tokenizer: Tokenizer | None


class GrammarMask(Protocol):
    """`sglang.srt.constrained.base_grammar_backend.GrammarMask`."""

    def apply(self, logits: torch.Tensor) -> None:
        """Exclude the tokens that the grammars of a batch exclude, from logits [T, V] in place."""


class Penalizer(Protocol):
    """`sglang.srt.sampling.penaltylib.orchestrator._BatchedPenalizer`."""

    is_multiplicative: bool
    """True if it scales logits, False if it adds to them."""

    def is_prepared(self) -> bool:
        """Return whether a request of the batch has this penalty."""

    def cumulate_output_tokens(self, output_ids: torch.Tensor) -> None:
        """Count one more token of each request, [B]."""


class PenalizerOrchestrator(Protocol):
    """`sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator`."""

    penalizers: dict[type[Penalizer], Penalizer]
    """In the order in which they are applied."""
    device: str

    def reqs(self) -> Sequence[SampledRequest]:
        """Return the requests of the batch."""


class ProcessorEntry(Protocol):
    """`sglang.srt.sampling.sampling_batch_info.ProcessorEntry`."""

    rows: Sequence[int]
    """The requests of the batch that have this processor."""


class PenalisedSampling(SamplingInfo, Protocol):
    """`SamplingBatchInfo` with its penalties, biases and processors."""

    acc_additive_penalties: torch.Tensor | None  # [B, V]
    acc_scaling_penalties: torch.Tensor | None  # [B, V]
    logit_bias: torch.Tensor | None  # [B, V]
    has_watermark_candidates: bool
    has_custom_logit_processor: bool
    custom_logit_processor: Mapping[int, ProcessorEntry] | None


class PenalisedBatch(Protocol):
    """`ScheduleBatch` with what exact penalties need."""

    reqs: Sequence[SampledRequest]
    forward_mode: ForwardMode
    return_hidden_states: bool
    sampling_info: PenalisedSampling
    seq_lens: torch.Tensor  # [B], committed tokens


class DraftBackendFactory(Protocol):
    """`sglang.srt.speculative.draft_utils.DraftBackendFactory`."""

    draft_model_runner: ModelRunner
    topk: int
    speculative_num_steps: int
