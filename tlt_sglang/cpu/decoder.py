"""The decoder loop of Llama-like targets and EAGLE-3 drafters on CPU, without the framework.

A decode step of a small model on CPU is half memory traffic and half Python: some 1,200 module
calls. This runs the same layers, on the same parameters and KV pool, as one loop of four kernels
and four matrix products per layer: for Llama, Qwen2 and Qwen3 targets, and for the single layer of
an EAGLE-3 drafter. A model that differs (quantised, parallel, with adapters, another rotary
embedding) keeps SGLang's own forward.

Runs in the scheduler process. The loop holds no copy of a weight: an update of the model takes
effect here as well (see `linear.generation`).

Shapes: T tokens, N hidden size, H query heads, K key/value heads, D head size, P positions,
R rotary size, L layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tlt_sglang.cpu import linear
from tlt_sglang.cpu.attention import CpuAttnBackend
from tlt_sglang.cpu.kernels import vector

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import (
        DecoderLayer,
        DecoderModel,
        DraftForwardBatch,
        ForwardBatch,
        Linear,
        Norm,
        RadixAttention,
    )
    from tlt_sglang.upstream.protocols import Upstream

Array = np.ndarray[Any, Any]
Product = Callable[[torch.Tensor], torch.Tensor]
GatedProduct = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights and products of one decoder layer."""

    attention: RadixAttention
    input_norm: Array  # [N], for the hidden states
    embed_norm: Array  # [N], for the embeddings that a drafter reads as well; [0] for a target
    post_norm: Array  # [N]
    eps: np.float32
    query_norm: Array  # [D], or [0] for a model without it
    key_norm: Array  # [D], or [0]
    inner: int  # intermediate size of the MLP
    qkv: Product
    out: Product
    gate_up: GatedProduct  # writes the input of `down`
    down: Product


@dataclass(slots=True)
class Stack:
    """The layers of a model, for one generation of its packed weights."""

    generation: int
    layers: list[_Layer]
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Array  # [P, R]: cosines, then sines
    norm: Array  # [N], the last norm
    eps: np.float32
    passes: dict[int, _Pass] = field(default_factory=dict)

    def new_pass(self, tokens: int) -> _Pass:
        """Return the buffers for `tokens` tokens, which are reused for small numbers."""
        buffers = self.passes.get(tokens)
        if buffers is None:
            buffers = _Pass(self, tokens)
            if tokens <= MAX_CACHED_TOKENS:
                self.passes[tokens] = buffers
        return buffers


MAX_CACHED_TOKENS = 64
"""Passes of at most this many tokens keep their buffers."""

_stacks: weakref.WeakKeyDictionary[Any, Stack | None] = weakref.WeakKeyDictionary()


def forward(
    original: Upstream,
    model: DecoderModel,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: ForwardBatch,
    input_embeds: torch.Tensor | None = None,
    pp_proxy_tensors: object = None,
) -> Any:
    """Return hidden states after the last norm [T, N], and inputs [T, L * N] of captured layers.

    Without captured layers only the hidden states are returned. Replaces `LlamaModel.forward` and
    `Qwen2Model.forward`, and calls `original` for models and inputs that it does not support.
    """
    from sglang.srt.model_executor.forward_context import get_attn_backend

    stack = _stack_of(model, _target_stack)
    backend = get_attn_backend()
    if stack is None or type(backend) is not CpuAttnBackend or input_ids.numel() == 0:
        return original(model, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
    if input_embeds is None:
        hidden = torch.nn.functional.embedding(input_ids, model.embed_tokens.weight)
    else:
        hidden = input_embeds.contiguous()

    # Memory for the inputs of the captured layers.
    layers = sorted(index for index in set(model.layers_to_capture) if index < len(stack.layers))
    captured = torch.empty(len(hidden), len(layers), hidden.shape[-1])
    by_layer = dict(zip(layers, captured.numpy().swapaxes(0, 1), strict=True))

    # The layers, one after the other.
    run = stack.new_pass(len(input_ids))
    run.begin(hidden, positions, forward_batch.out_cache_loc)
    for index, layer in enumerate(stack.layers):
        hidden = run.layer(layer, hidden, backend, by_layer.get(index))
    hidden = run.end(hidden)
    return (hidden, captured.flatten(1)) if layers else hidden


def draft_forward(
    original: Upstream,
    model: DecoderModel,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: DraftForwardBatch,
    input_embeds: torch.Tensor | None = None,
    pp_proxy_tensors: object = None,
) -> Any:
    """Return an EAGLE-3 drafter's hidden states for the head, and those for its next step.

    Both are [T, N], the latter in a list. Replaces `LlamaModel.forward` of SGLang's llama_eagle3,
    and calls `original` for models and inputs that it does not support.
    """
    from sglang.srt.model_executor.forward_context import get_attn_backend

    stack = _stack_of(model, _drafter_stack)
    backend = get_attn_backend()
    if (
        stack is None
        or type(backend) is not CpuAttnBackend
        or input_ids.numel() == 0
        or input_embeds is not None
        or forward_batch.mm_input_embeds is not None
    ):
        return original(model, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
    hidden, slots = forward_batch.spec_info.hidden_states, forward_batch.out_cache_loc
    out, hidden = draft(model, stack, input_ids, hidden, positions, slots, backend)
    return out, [hidden]


def drafter(model: DecoderModel) -> Stack | None:
    """Return the stack of the `LlamaModel` of SGLang's llama_eagle3; None if it is unsupported."""
    return _stack_of(model, _drafter_stack)


def draft(
    model: DecoderModel,
    stack: Stack,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    backend: CpuAttnBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a drafter on ids [T] with features of the target [T, 3N] or its own hidden states [T, N].

    Returns the input of the head and the hidden states for the next step, each [T, N].
    """
    if hidden.shape[-1] != model.config.hidden_size:
        hidden = linear.linear(hidden, model.fc.weight, model.fc.bias)
    embeds = torch.nn.functional.embedding(ids, model.embed_tokens.weight)
    run = stack.new_pass(len(ids))
    run.begin(hidden, positions, slots)
    out = run.end(run.draft_layer(stack.layers[0], embeds, backend))
    return out, out if model.norm_output else run.residual.clone()


class _Pass:
    """A pass of T tokens through the layers, with buffers that are reused."""

    def __init__(self, stack: Stack, tokens: int) -> None:
        self.stack = stack
        size, inner = len(stack.norm), stack.layers[0].inner
        self.residual, self.normed = torch.empty(tokens, size), torch.empty(tokens, size)
        self.query = torch.empty(tokens, stack.heads, stack.head_dim)
        self.attended = torch.empty(tokens, stack.heads * stack.head_dim)
        self.active = torch.empty(tokens, inner)
        self.attended_heads = self.attended.view(tokens, stack.heads, stack.head_dim)
        self.residual_rows, self.normed_rows = self.residual.numpy(), self.normed.numpy()
        self.query_rows = self.query.numpy()
        self.positions: Array
        self.slots: Array

    def begin(self, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Start a pass with hidden states [T, N] as the residual stream."""
        self.positions, self.slots = positions.numpy(), slots.numpy()
        self.residual.copy_(hidden)
        self.entered = False

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the last norm [T, N] in new memory, because SGLang keeps it."""
        out = torch.empty_like(hidden)
        stack = self.stack
        vector.add_rms_norm(hidden.numpy(), self.residual_rows, stack.norm, stack.eps, out.numpy())
        return out

    def layer(
        self, layer: _Layer, hidden: torch.Tensor, backend: CpuAttnBackend, captured: Array | None
    ) -> torch.Tensor:
        """Run a layer; return the output of its MLP [T, N], which the next layer adds.

        The input of the layer is copied into `captured` [T, N], if any.
        """
        normed, residual = self.normed_rows, self.residual_rows
        if self.entered:
            vector.add_rms_norm(hidden.numpy(), residual, layer.input_norm, layer.eps, normed)
        else:
            vector.rms_norm(residual, layer.input_norm, layer.eps, normed)
            self.entered = True
        if captured is not None:
            captured[:] = residual
        return self._attend_and_mlp(layer, self.normed, backend)

    def draft_layer(
        self, layer: _Layer, embeds: torch.Tensor, backend: CpuAttnBackend
    ) -> torch.Tensor:
        """Run a drafter's layer, which reads embeddings as well; returns the same as `layer`."""
        embedded = torch.empty_like(embeds)
        vector.rms_norm(embeds.numpy(), layer.embed_norm, layer.eps, embedded.numpy())
        vector.rms_norm(self.residual_rows, layer.input_norm, layer.eps, self.normed_rows)
        return self._attend_and_mlp(layer, torch.cat([embedded, self.normed], dim=-1), backend)

    def _attend_and_mlp(
        self, layer: _Layer, inputs: torch.Tensor, backend: CpuAttnBackend
    ) -> torch.Tensor:
        """Run attention and MLP on the input of the attention [T, N or 2N]."""
        stack, normed, residual = self.stack, self.normed_rows, self.residual_rows
        keys, values = backend.buffers(layer.attention.layer_id)
        vector.rope_and_store(
            layer.qkv(inputs).numpy(),
            self.positions,
            stack.rotary,
            layer.query_norm,
            layer.key_norm,
            layer.eps,
            self.slots,
            self.query_rows,
            keys.numpy(),
            values.numpy(),
        )
        scale = layer.attention.scaling
        backend.attend(self.query, keys, values, scale, self.attended_heads)
        projected = layer.out(self.attended).numpy()
        vector.add_rms_norm(projected, residual, layer.post_norm, layer.eps, normed)
        layer.gate_up(self.normed, self.active)
        return layer.down(self.active)


def _stack_of(model: DecoderModel, build: Callable[[DecoderModel], Stack | None]) -> Stack | None:
    """Return the stack of a model, rebuilt after repacks of weights; None if it is unsupported."""
    stack = _stacks.get(model)
    if stack is None and model in _stacks:
        return None
    if stack is None or stack.generation != linear.generation():
        stack = _stacks[model] = build(model)
    return stack


def _target_stack(model: DecoderModel) -> Stack | None:
    if model.pp_group.world_size != 1:
        return None
    return _build_stack(model, [_layer(layer) for layer in model.layers])


def _drafter_stack(model: DecoderModel) -> Stack | None:
    supported = (
        len(model.layers) == 1
        and not model.is_mrope_enabled
        and model.input_norm is None
        and model.fc_norm is None
    )
    return _build_stack(model, [_layer(model.layers[0])]) if supported else None


def _build_stack(model: DecoderModel, layers: list[_Layer | None]) -> Stack | None:
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    supported = [layer for layer in layers if layer is not None]
    if (
        get_parallel().tp_size != 1
        or type(model.embed_tokens) is not VocabParallelEmbedding
        or len(supported) != len(layers)
        or not _plain_norm(model.norm)
    ):
        return None
    first = model.layers[0].self_attn
    return Stack(
        linear.generation(),
        supported,
        first.attn.tp_q_head_num,
        first.attn.tp_k_head_num,
        first.attn.head_dim,
        first.rotary_emb.cos_sin_cache.numpy(),
        _weights(model.norm),
        np.float32(model.norm.variance_epsilon),
    )


def _layer(layer: DecoderLayer) -> _Layer | None:
    """Return the weights and products of a layer; None if it is unsupported.

    A layer with a `hidden_norm` is an EAGLE-3 drafter's.
    """
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.models.llama import LlamaMLP
    from sglang.srt.models.qwen2 import Qwen2MLP

    # The parts, which differ between targets and drafters.
    attention, mlp, rotary = layer.self_attn, layer.mlp, layer.self_attn.rotary_emb
    reads_embeds = hasattr(layer, "hidden_norm")
    input_norm = layer.hidden_norm if reads_embeds else layer.input_layernorm
    embed_norm = layer.input_layernorm if reads_embeds else None
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    norms = [input_norm, layer.post_attention_layernorm, embed_norm, query_norm, key_norm]
    products = [
        _product(attention.qkv_proj),
        _product(attention.o_proj),
        _product(mlp.gate_up_proj, linear.gated),
        _product(mlp.down_proj),
    ]

    # Anything else that SGLang's layer would do makes it unsupported.
    supported = (
        all(_plain_norm(norm) for norm in norms if norm is not None)
        and None not in products
        and isinstance(mlp, (LlamaMLP, Qwen2MLP))
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and not hasattr(rotary, "sin_cos_cache")
        and rotary.cos_sin_cache.dtype == torch.float32
        and not attention.attn.logit_cap
        and attention.attn.sliding_window_size == -1
    )
    if not supported:
        return None
    return _Layer(
        attention.attn,
        _weights(input_norm),
        _weights(embed_norm),
        _weights(layer.post_attention_layernorm),
        np.float32(input_norm.variance_epsilon),
        _weights(query_norm),
        _weights(key_norm),
        mlp.down_proj.weight.shape[1],
        *products,
    )


def _weights(norm: Norm | None) -> Array:
    """Return the weights of a norm [N], or [0] if there is none."""
    if norm is None:
        return np.empty(0, np.float32)
    weight: Array = norm.weight.detach().numpy()
    return weight


def _plain_norm(norm: Norm) -> bool:
    """Return whether a norm is a plain float32 RMSNorm."""
    from sglang.srt.layers.layernorm import RMSNorm

    return (
        type(norm) is RMSNorm
        and norm.weight.dtype == torch.float32
        and norm.variance_size_override is None
    )


def _product(layer: Linear, make: Callable[..., Any] = linear.product) -> Any:
    """Return `make(weight, bias)` of a linear layer; None if the layer does more than a product."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    if (
        type(layer.quant_method) is not UnquantizedLinearMethod
        or hasattr(layer, "set_lora")
        or getattr(layer, "skip_bias_add", False)
    ):
        return None
    return make(layer.weight, layer.bias)
