"""The stack of a decoder: the weights and products of SGLang's layers, where they are supported.

A model with anything that the loop in `decoder` does not do has no stack.

Shapes: T tokens, N hidden size, D head size, P positions, R rotary size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tlt_sglang import upstream
from tlt_sglang.cpu import linear
from tlt_sglang.cpu.decoder_pass import Pass

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import (
        DecoderLayer,
        DecoderModel,
        Linear,
        Norm,
        RadixAttention,
    )

Array = np.ndarray[Any, Any]
Product = Callable[[torch.Tensor], torch.Tensor]
GatedProduct = Callable[[torch.Tensor, torch.Tensor], None]

MAX_CACHED_TOKENS = 64
"""Passes of at most this many tokens keep their buffers."""


@dataclass(frozen=True, slots=True)
class StackLayer:
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
    layers: list[StackLayer]
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Array  # [P, R]: cosines, then sines
    norm: Array  # [N], the last norm
    eps: np.float32
    passes: dict[int, Pass] = field(default_factory=dict)

    def new_pass(self, tokens: int) -> Pass:
        """Return the buffers for `tokens` tokens, which are reused for small numbers."""
        buffers = self.passes.get(tokens)
        if buffers is None:
            buffers = Pass(self, tokens)
            if tokens <= MAX_CACHED_TOKENS:
                self.passes[tokens] = buffers
        return buffers


def target_stack(model: DecoderModel) -> Stack | None:
    """Return the stack of a target; None if the model is unsupported."""
    if model.pp_group.world_size != 1:
        return None
    return _build_stack(model, [_layer(layer) for layer in model.layers])


def drafter_stack(model: DecoderModel) -> Stack | None:
    """Return the stack of an EAGLE-3 drafter; None if the model is unsupported."""
    supported = (
        len(model.layers) == 1
        and not model.is_mrope_enabled
        and not upstream.current().has_input_norm(model)
        and model.fc_norm is None
    )
    return _build_stack(model, [_layer(model.layers[0])]) if supported else None


def _build_stack(model: DecoderModel, layers: list[StackLayer | None]) -> Stack | None:
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


def _layer(layer: DecoderLayer) -> StackLayer | None:
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
    return StackLayer(
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
