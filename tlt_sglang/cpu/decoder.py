"""Targets of Llama's kind, and EAGLE-3 drafters, on CPU without the framework in between.

A decode step of a small model on CPU is half memory traffic and half Python: some twelve hundred
module calls. This runs the same layers, on the same parameters and KV pool, as one loop over four
kernels and four matrix products a layer: of a Llama, Qwen2 or Qwen3 target, and of the one layer of
an EAGLE-3 drafter. A model that is not exactly of this kind (quantised, parallel, with adapters,
another rotary embedding ...) keeps SGLang's own forward.

Runs in the scheduler process. The loop holds no copy of a weight: what changes in the model
changes here (see `linear.generation`).

Shapes: T tokens, N hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tlt_sglang.cpu import linear
from tlt_sglang.cpu.attention import CpuAttnBackend
from tlt_sglang.cpu.kernels import vector

Array = np.ndarray[Any, Any]
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer, taken apart."""

    attention: Any  # SGLang's RadixAttention: layer id and scale
    input_norm: Array  # of the hidden states
    embed_norm: Array  # of the embeddings that a drafter reads beside them; [0] for a target
    post_norm: Array
    eps: np.float32
    query_norm: Array  # [D], or [0] where the model has none
    key_norm: Array
    inner: int  # of the MLP
    qkv: Product
    out: Product
    gate_up: Callable[[torch.Tensor, torch.Tensor], None]  # up to what `down` takes
    down: Product


@dataclass(slots=True)
class Stack:
    """A model taken apart, as of one generation of its packed weights."""

    generation: int
    layers: list[_Layer]
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Array  # [P, R]: cosines, then sines
    norm: Array
    eps: np.float32
    steps: dict[int, _Step] = field(default_factory=dict)

    def step(self, tokens: int) -> _Step:
        """Working memory for `tokens` tokens, kept for the sizes that come again and again."""
        step = self.steps.get(tokens)
        if step is None:
            step = _Step(self, tokens)
            if tokens <= KEPT:
                self.steps[tokens] = step
        return step


KEPT = 64
"""Steps of at most this many tokens keep their working memory."""

_stacks: weakref.WeakKeyDictionary[Any, Stack | None] = weakref.WeakKeyDictionary()


def forward(
    original: Callable[..., Any],
    model: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    input_embeds: torch.Tensor | None = None,
    pp_proxy_tensors: Any = None,
) -> Any:
    """Hidden states after the last norm [T, N]; with L captured layers a pair of it and their
    inputs [T, L * N].

    Takes the place of `LlamaModel.forward` and `Qwen2Model.forward`, and calls it where it must.
    """
    from sglang.srt.model_executor.forward_context import get_attn_backend

    stack = _stack_of(model, _take_target_apart)
    backend = get_attn_backend()
    if stack is None or type(backend) is not CpuAttnBackend or input_ids.numel() == 0:
        return original(model, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
    if input_embeds is None:
        hidden = torch.nn.functional.embedding(input_ids, model.embed_tokens.weight)
    else:
        hidden = input_embeds.contiguous()
    wanted = sorted(index for index in set(model.layers_to_capture) if index < len(stack.layers))
    captured = torch.empty(len(hidden), len(wanted), hidden.shape[-1])
    places = dict(zip(wanted, captured.numpy().swapaxes(0, 1), strict=True))
    step = stack.step(len(input_ids))
    step.begin(hidden, positions, forward_batch.out_cache_loc)
    for index, layer in enumerate(stack.layers):
        hidden = step.run(layer, hidden, backend, places.get(index))
    hidden = step.end(hidden)
    return (hidden, captured.flatten(1)) if wanted else hidden


def draft_forward(
    original: Callable[..., Any],
    model: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    input_embeds: torch.Tensor | None = None,
    pp_proxy_tensors: Any = None,
) -> Any:
    """An EAGLE-3 drafter's hidden states for the head, and [those for its next step], [T, N].

    Takes the place of `LlamaModel.forward` of SGLang's llama_eagle3, and calls it where it must.
    """
    from sglang.srt.model_executor.forward_context import get_attn_backend

    stack = _stack_of(model, _take_drafter_apart)
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


def drafter(model: Any) -> Stack | None:
    """The `LlamaModel` of SGLang's llama_eagle3 taken apart; None if it is not of our kind."""
    return _stack_of(model, _take_drafter_apart)


def draft(
    model: Any,
    stack: Stack,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    backend: CpuAttnBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A drafter's pass over ids [T] beside the target's features [T, 3N], or hidden states of its
    own [T, N]: (what the head takes, what the next step takes), each [T, N]."""
    if hidden.shape[-1] != model.config.hidden_size:
        hidden = linear.linear(hidden, model.fc.weight, model.fc.bias)
    embeds = torch.nn.functional.embedding(ids, model.embed_tokens.weight)
    step = stack.step(len(ids))
    step.begin(hidden, positions, slots)
    out = step.end(step.run_draft(stack.layers[0], embeds, backend))
    return out, out if model.norm_output else step.residual.clone()


class _Step:
    """A pass of T tokens through the layers, in memory that is kept from step to step."""

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
        self.positions, self.slots = positions.numpy(), slots.numpy()
        self.residual.copy_(hidden)
        self.entered = False

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last norm, into memory of its own: SGLang keeps what comes out."""
        out = torch.empty_like(hidden)
        stack = self.stack
        vector.add_rms_norm(hidden.numpy(), self.residual_rows, stack.norm, stack.eps, out.numpy())
        return out

    def run(
        self, layer: _Layer, hidden: torch.Tensor, backend: CpuAttnBackend, captured: Array | None
    ) -> torch.Tensor:
        """One layer; the output of its MLP [T, N], not yet added to the residual stream. What it
        was given goes into `captured` [T, N], if any."""
        normed, residual = self.normed_rows, self.residual_rows
        if self.entered:
            vector.add_rms_norm(hidden.numpy(), residual, layer.input_norm, layer.eps, normed)
        else:
            vector.rms_norm(residual, layer.input_norm, layer.eps, normed)
            self.entered = True
        if captured is not None:
            captured[:] = residual
        return self._through(layer, self.normed, backend)

    def run_draft(
        self, layer: _Layer, embeds: torch.Tensor, backend: CpuAttnBackend
    ) -> torch.Tensor:
        """A drafter's layer, on embeddings beside the hidden states; as `run`."""
        embedded = torch.empty_like(embeds)
        vector.rms_norm(embeds.numpy(), layer.embed_norm, layer.eps, embedded.numpy())
        vector.rms_norm(self.residual_rows, layer.input_norm, layer.eps, self.normed_rows)
        return self._through(layer, torch.cat([embedded, self.normed], dim=-1), backend)

    def _through(self, layer: _Layer, read: torch.Tensor, backend: CpuAttnBackend) -> torch.Tensor:
        """Attention and MLP, on what the attention reads [T, N or 2N]."""
        stack, normed, residual = self.stack, self.normed_rows, self.residual_rows
        keys, values = backend.buffers(layer.attention.layer_id)
        vector.rope_and_store(
            layer.qkv(read).numpy(),
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


def _stack_of(model: Any, take_apart: Callable[[Any], Stack | None]) -> Stack | None:
    """The taken-apart model, rebuilt when a weight was packed anew; None if it is not our kind."""
    stack = _stacks.get(model)
    if stack is None and model in _stacks:
        return None
    if stack is None or stack.generation != linear.generation():
        stack = _stacks[model] = take_apart(model)
    return stack


def _take_target_apart(model: Any) -> Stack | None:
    if model.pp_group.world_size != 1:
        return None
    return _take_apart(model, [_layer(layer) for layer in model.layers])


def _take_drafter_apart(model: Any) -> Stack | None:
    served = (
        len(model.layers) == 1
        and not model.is_mrope_enabled
        and model.input_norm is None
        and model.fc_norm is None
    )
    return _take_apart(model, [_layer(model.layers[0])]) if served else None


def _take_apart(model: Any, layers: list[_Layer | None]) -> Stack | None:
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    taken = [layer for layer in layers if layer is not None]
    if (
        get_parallel().tp_size != 1
        or type(model.embed_tokens) is not VocabParallelEmbedding
        or len(taken) != len(layers)
        or not _plain_norm(model.norm)
    ):
        return None
    first = model.layers[0].self_attn
    return Stack(
        linear.generation(),
        taken,
        first.attn.tp_q_head_num,
        first.attn.tp_k_head_num,
        first.attn.head_dim,
        first.rotary_emb.cos_sin_cache.numpy(),
        _weights(model.norm),
        np.float32(model.norm.variance_epsilon),
    )


def _layer(layer: Any) -> _Layer | None:
    """A layer of a target, or of an EAGLE-3 drafter (which has a `hidden_norm`), taken apart."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.models.llama import LlamaMLP
    from sglang.srt.models.qwen2 import Qwen2MLP

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
    ours = (
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
    if not ours:
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


def _weights(norm: Any) -> Array:
    """Of a norm [N], or [0] where there is none."""
    if norm is None:
        return np.empty(0, np.float32)
    weight: Array = norm.weight.detach().numpy()
    return weight


def _plain_norm(norm: Any) -> bool:
    from sglang.srt.layers.layernorm import RMSNorm

    return (
        type(norm) is RMSNorm
        and norm.weight.dtype == torch.float32
        and norm.variance_size_override is None
    )


def _product(layer: Any, make: Callable[..., Any] = linear.product) -> Any:
    """The matrix product of one of SGLang's linear layers, as `make` makes it of weight and bias;
    None if the layer does more than that."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    if (
        type(layer.quant_method) is not UnquantizedLinearMethod
        or hasattr(layer, "set_lora")
        or getattr(layer, "skip_bias_add", False)
    ):
        return None
    return make(layer.weight, layer.bias)
