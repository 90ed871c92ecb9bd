"""The decoder loop of Llama-like targets and EAGLE-3 drafters on CPU, without the framework.

A decode step of a small model on CPU is half memory traffic and half Python: some 1,200 module
calls. This runs the same layers, on the same parameters and KV pool, as one loop of four kernels
and four matrix products per layer: for Llama, Qwen2 and Qwen3 targets, and for the single layer of
an EAGLE-3 drafter. A model that differs (quantised, parallel, with adapters, another rotary
embedding) keeps SGLang's own forward.

Runs in the scheduler process. The loop holds no copy of a weight: an update of the model takes
effect here as well (see `linear.generation`).

Shapes: T tokens, N hidden size, L layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tlt_sglang import upstream
from tlt_sglang.cpu import linear
from tlt_sglang.cpu.attention import CpuAttnBackend
from tlt_sglang.cpu.decoder_stack import Stack, drafter_stack, target_stack

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import DecoderModel, DraftForwardBatch, ForwardBatch
    from tlt_sglang.upstream.protocols import Upstream

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

    stack = _stack_of(model, target_stack)
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
    return upstream.current().model_output(hidden, captured) if layers else hidden


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

    stack = _stack_of(model, drafter_stack)
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
    return _stack_of(model, drafter_stack)


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


def _stack_of(model: DecoderModel, build: Callable[[DecoderModel], Stack | None]) -> Stack | None:
    """Return the stack of a model, rebuilt after repacks of weights; None if it is unsupported."""
    stack = _stacks.get(model)
    if stack is None and model in _stacks:
        return None
    if stack is None or stack.generation != linear.generation():
        if stack is not None:
            stack.passes.clear()  # which refer to it: it would wait for the garbage collector
        stack = _stacks[model] = build(model)
    return stack
