"""The CPU attention backend: every mode that SGLang's EAGLE and NGRAM workers need.

Runs in the scheduler process, built by SGLang's attention registry in place of its own CPU
backends (see patches/attention_registry.py). It supports decode, extend, target-verify (chain and
tree), draft-extend and the multi-step draft, and refuses other models at construction.

It holds no state between forwards except views of the KV pool; the arithmetic is in
`tlt_sglang.cpu.kernels.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

from tlt_sglang.cpu.kernels import attention as kernels
from tlt_sglang.errors import ConfigError

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import ForwardBatch, RadixAttention

LONG_EXTEND = 64
"""Extends of more tokens use torch's fused kernel, whose speed outweighs its other rounding."""


class CpuAttnBackend(AttentionBackend):
    """Attention over SGLang's paged KV pool on CPU, in float32.

    Raises ConfigError at construction for models, pools and page sizes that it does not support.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        _require_supported(model_runner)
        self.max_context_len = model_runner.model_config.context_len
        self._table: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self._parts: list[_Part] = []

    # -- per forward ---------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan which slots each query sees, which is the same in all layers."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self._parts = []
            return
        table, rows, lens = self._table, forward_batch.req_pool_indices, forward_batch.seq_lens
        if mode.is_decode():
            self._parts = [_Part(kernels.plan_decode(table, rows, lens))]
        elif mode.is_target_verify():
            spec = forward_batch.spec_info
            width = spec.draft_token_num
            if spec.tree_topk == 1:
                plan = kernels.plan_chain(table, rows, lens, width)
            else:
                mask = spec.custom_mask[: len(lens) * width * width]
                plan = kernels.plan_tree(table, rows, lens, mask.view(len(lens), width, width))
            self._parts = [_Part(plan)]
        else:
            self._parts = _extend_parts(
                table, rows, forward_batch.extend_prefix_lens, forward_batch.extend_seq_lens
            )

    def plan_branches(self, forward_batch: ForwardBatch, topk: int, steps: int, step: int) -> None:
        """Plan draft step `step` of `steps` with `topk` branches per request."""
        plan = kernels.plan_branches(
            self._table,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            topk,
            steps,
            step,
        )
        self._parts = [_Part(plan)]

    def plan_queries(self, rows: torch.Tensor, visible: torch.Tensor) -> None:
        """Plan queries of which each sees the first visible[i] tokens of row rows[i]."""
        self._parts = [_Part(kernels.plan_decode(self._table, rows, visible))]

    # -- per layer -----------------------------------------------------------------------------

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write k and v [T, K, D] to the pool and attend with q [T, H * D] -> [T, H * D]."""
        heads, dim = layer.tp_q_head_num, layer.qk_head_dim
        out = torch.empty((q.shape[0], heads * layer.v_head_dim), dtype=q.dtype)
        if forward_batch.forward_mode.is_idle() or q.shape[0] == 0:
            return out
        if kwargs or layer.logit_cap or layer.sliding_window_size > -1 or layer.is_cross_attention:
            _refuse_layer(layer, kwargs)
        keys, values = self.buffers(layer.layer_id)
        if save_kv_cache and k is not None and v is not None:
            slots = forward_batch.out_cache_loc
            keys[slots] = k
            values[slots] = v
        shape = (-1, heads, layer.v_head_dim)
        self.attend(q.reshape(-1, heads, dim), keys, values, layer.scaling, out.view(shape))
        return out

    def buffers(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a layer's pool, each [S, K, D]."""
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attend with q [T, H, D] over the slots of this forward's plan, into out [T, H, D]."""
        for part in self._parts:
            rows = part.rows
            if part.plan is not None:
                kernels.attend(part.plan, q[rows], keys, values, scale, out[rows])
            else:
                out[rows] = _sdpa(q[rows], keys[part.slots], values[part.slots], scale)

    def support_triton(self) -> bool:
        """Return False: there is no Triton on CPU."""
        return False

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """Return the sequence length of padding in SGLang's CPU graphs."""
        return 1


class CpuMultiStepDraftBackend:
    """A backend for each draft step, as SGLang's draft worker indexes them."""

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        self.topk = topk
        self.speculative_num_steps = speculative_num_steps
        self.attn_backends = [
            CpuAttnBackend(model_runner) for _ in range(speculative_num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan every draft step."""
        for step, backend in enumerate(self.attn_backends):
            backend.plan_branches(forward_batch, self.topk, self.speculative_num_steps, step)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a forward's queries: short extends with a plan, or a long one with its slots."""

    plan: kernels.AttentionPlan | None
    rows: slice = field(default_factory=lambda: slice(None))
    slots: torch.Tensor | None = None


def _extend_parts(
    table: torch.Tensor, rows: torch.Tensor, prefix: torch.Tensor, extend: torch.Tensor
) -> list[_Part]:
    """Return the parts of an extend: the kernel for short requests, torch's for long ones."""
    lens = extend.tolist()
    if max(lens) <= LONG_EXTEND:
        return [_Part(kernels.plan_extend(table, rows, prefix, extend))]
    parts, start = [], 0
    for i, count in enumerate(lens):
        queries = slice(start, start + count)
        if count <= LONG_EXTEND:
            request = slice(i, i + 1)
            plan = kernels.plan_extend(table, rows[request], prefix[request], extend[request])
            parts.append(_Part(plan, queries))
        else:
            slots = table[rows[i], : int(prefix[i]) + count].to(torch.int64)
            parts.append(_Part(None, queries, slots))
        start += count
    return parts


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend causally with the last T of the L tokens: q [T, H, D], k and v [L, K, D]."""
    count, length = len(q), len(k)
    mask = None
    if length > count:
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _require_supported(runner: Any) -> None:
    """Raise ConfigError for models that the kernels would compute wrongly."""
    problem = None
    pool = runner.token_to_kv_pool
    if runner.use_mla_backend:
        problem = "multi-head latent attention (MLA) models are not supported on CPU"
    elif runner.model_config.is_encoder_decoder:
        problem = "encoder-decoder models are not supported on CPU"
    elif runner.sliding_window_size is not None or hasattr(pool, "swa_kv_pool"):
        problem = "models with sliding-window attention are not supported on CPU"
    elif runner.page_size != 1:
        problem = f"page size {runner.page_size} is not supported on CPU; use --page-size 1"
    elif pool.dtype != torch.float32:
        problem = f"{pool.dtype} KV cache is not supported on CPU; use --dtype float32"
    if problem:
        raise ConfigError(f"The CPU attention backend refuses to start: {problem}.")


def _refuse_layer(layer: RadixAttention, kwargs: dict[str, Any]) -> None:
    """Raise ConfigError for a layer that the kernels do not support."""
    features = sorted(kwargs)
    if layer.logit_cap:
        features.append("logit soft-capping")
    if layer.sliding_window_size > -1:
        features.append("sliding window")
    if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
        features.append("non-causal attention")
    raise ConfigError(
        f"The CPU attention backend does not support {', '.join(features)} (layer "
        f"{layer.layer_id}); run this model on a GPU."
    )
