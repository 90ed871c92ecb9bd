"""The CPU attention backend: every mode SGLang's EAGLE and NGRAM workers ask for.

Runs in the scheduler process, built by SGLang's attention registry in place of its own CPU
backends (see patches/attention_registry.py). Serves decode, extend, target-verify (chain and tree),
draft-extend and the multi-step draft. What it cannot serve it refuses when it is built.

It holds no state between forwards but the views of the KV pool; the arithmetic is in
`tlt_sglang.cpu.kernels.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

from tlt_sglang.cpu.kernels import attention as kernels
from tlt_sglang.errors import ConfigError

Array = np.ndarray[Any, Any]

# Above this many new tokens of one request the fused kernel of torch is faster than ours, by
# more than the difference in rounding is worth.
LONG_EXTEND = 64


class CpuAttnBackend(AttentionBackend):
    """Attention over SGLang's paged KV pool on CPU, in float32.

    Raises ConfigError at construction for models, pools and page sizes it does not serve.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        _refuse_unserved(model_runner)
        self.max_context_len = model_runner.model_config.context_len
        self._table: Array = model_runner.req_to_token_pool.req_to_token.numpy()
        self._buffers: dict[int, tuple[Array, Array]] = {}
        self._attend: Callable[..., None] | None = None
        self._rows: Array
        self._plan: tuple[Any, ...] = ()
        self._out_loc: Array | None = None

    # -- per forward ---------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Fix what the layers share: rows of the request table, lengths, masks."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        self._rows = forward_batch.req_pool_indices.numpy()
        seq_lens = forward_batch.seq_lens.numpy()
        if mode.is_decode():
            self._attend, self._plan = kernels.attend_decode, (seq_lens,)
        elif mode.is_target_verify():
            spec = forward_batch.spec_info
            width = spec.draft_token_num
            if spec.tree_topk == 1:
                self._attend = kernels.attend_extend
                self._plan = (seq_lens, np.full(len(seq_lens), width))
            else:
                mask = spec.custom_mask.numpy()[: len(seq_lens) * width * width]
                self._attend = kernels.attend_tree
                self._plan = (seq_lens, mask.reshape(len(seq_lens), width, width))
        else:
            self._attend = self._attend_extend
            self._plan = (
                forward_batch.extend_prefix_lens.numpy(),
                forward_batch.extend_seq_lens.numpy(),
            )

    def use_branches(self, forward_batch: Any, topk: int, steps: int, step: int) -> None:
        """Plan for draft step `step` of `steps`, `topk` branches a request."""
        self._rows = forward_batch.req_pool_indices.numpy()
        prefix = forward_batch.seq_lens.numpy()
        self._attend, self._plan = kernels.attend_branch, (prefix, topk, steps, step)

    # -- per layer -----------------------------------------------------------------------------

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q [T, H * D] float32, k and v [T, K, D] -> [T, H * D]; writes k, v to the pool."""
        heads, dim = layer.tp_q_head_num, layer.qk_head_dim
        out = torch.empty((q.shape[0], heads * layer.v_head_dim), dtype=q.dtype)
        if forward_batch.forward_mode.is_idle() or q.shape[0] == 0:
            return out
        if kwargs or layer.logit_cap or layer.sliding_window_size > -1 or layer.is_cross_attention:
            _refuse_layer(layer, kwargs)
        kbuf, vbuf = self.buffers(layer.layer_id)
        if save_kv_cache and k is not None and v is not None:
            kernels.store_kv(
                k.numpy(), v.numpy(), forward_batch.out_cache_loc.numpy(), kbuf, vbuf
            )
        self.attend(
            q.view(-1, heads, dim).numpy(),
            kbuf,
            vbuf,
            np.float32(layer.scaling),
            out.view(-1, heads, layer.v_head_dim).numpy(),
        )
        return out

    def buffers(self, layer_id: int) -> tuple[Array, Array]:
        """The keys and values of a layer's pool, each [S, K, D]."""
        buffers = self._buffers.get(layer_id)
        if buffers is None:
            pool = self.token_to_kv_pool
            buffers = self._buffers[layer_id] = (
                pool.get_key_buffer(layer_id).numpy(),
                pool.get_value_buffer(layer_id).numpy(),
            )
        return buffers

    def attend(self, q: Array, kbuf: Array, vbuf: Array, scale: np.float32, out: Array) -> None:
        """Attention of q [T, H, D] over what this forward's plan lets it see, into out [T, H, D]."""
        assert self._attend is not None
        table, rows = self._table, self._rows
        self._attend(q, kbuf, vbuf, table, rows, *self._plan, scale, out, 0, len(q))

    def _attend_extend(
        self,
        q: Array,
        kbuf: Array,
        vbuf: Array,
        table: Array,
        rows: Array,
        prefix: Array,
        extend: Array,
        scale: np.float32,
        out: Array,
        lo: int,
        hi: int,
    ) -> None:
        """Extend, request by request: short ones by our kernel, long ones by torch's."""
        start = 0
        for i, count in enumerate(extend.tolist()):
            part = slice(start, start + count)
            one = slice(i, i + 1)
            if count <= LONG_EXTEND:
                kernels.attend_extend(
                    q[part], kbuf, vbuf, table, rows[one], prefix[one], extend[one], scale,
                    out[part], 0, count,
                )  # fmt: skip
            else:
                slots = table[rows[i], : prefix[i] + count]
                out[part] = _sdpa(q[part], kbuf[slots], vbuf[slots], int(prefix[i]), scale)
            start += count

    def support_triton(self) -> bool:
        return False

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        return 1


class CpuMultiStepDraftBackend:
    """One backend per draft step, as SGLang's draft worker indexes them."""

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        self.topk = topk
        self.speculative_num_steps = speculative_num_steps
        self.attn_backends = [
            CpuAttnBackend(model_runner) for _ in range(speculative_num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for step, backend in enumerate(self.attn_backends):
            backend.use_branches(forward_batch, self.topk, self.speculative_num_steps, step)


def _sdpa(q: Array, k: Array, v: Array, prefix: int, scale: np.float32) -> Array:
    """Causal attention of q [T, H, D] after `prefix` tokens, over k, v [prefix + T, K, D]."""
    heads = [torch.from_numpy(x).transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    count = q.shape[0]
    mask = None
    if prefix:
        mask = torch.ones(count, prefix + count, dtype=torch.bool).tril(prefix)
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=mask is None, scale=float(scale), enable_gqa=True
    )
    return out[0].transpose(0, 1).numpy()


def _refuse_unserved(runner: Any) -> None:
    """Raise ConfigError for what the kernels would get wrong."""
    problem = None
    pool = runner.token_to_kv_pool
    if runner.use_mla_backend:
        problem = "multi-head latent attention (MLA) models are not served on CPU"
    elif runner.model_config.is_encoder_decoder:
        problem = "encoder-decoder models are not served on CPU"
    elif runner.sliding_window_size is not None or hasattr(pool, "swa_kv_pool"):
        problem = "models with sliding-window attention are not served on CPU"
    elif runner.page_size != 1:
        problem = f"page size {runner.page_size} is not served on CPU; use --page-size 1"
    elif pool.dtype != torch.float32:
        problem = f"{pool.dtype} KV cache is not served on CPU; use --dtype float32"
    if problem:
        raise ConfigError(f"The CPU attention backend refuses to start: {problem}.")


def _refuse_layer(layer: Any, kwargs: dict[str, Any]) -> None:
    wanted = sorted(kwargs)
    if layer.logit_cap:
        wanted.append("logit soft-capping")
    if layer.sliding_window_size > -1:
        wanted.append("sliding window")
    if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
        wanted.append("non-causal attention")
    raise ConfigError(
        f"The CPU attention backend does not serve {', '.join(wanted)} (layer {layer.layer_id}); "
        "run this model on a GPU."
    )
