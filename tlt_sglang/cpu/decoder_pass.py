"""One pass of tokens through the layers of a decoder: four kernels and four products a layer.

Shapes: T tokens, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tlt_sglang.cpu.attention import CpuAttnBackend
from tlt_sglang.cpu.kernels import vector

if TYPE_CHECKING:
    from tlt_sglang.cpu.decoder_stack import Stack, StackLayer

Array = np.ndarray[Any, Any]


class Pass:
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
        self,
        layer: StackLayer,
        hidden: torch.Tensor,
        backend: CpuAttnBackend,
        captured: Array | None,
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
        self, layer: StackLayer, embeds: torch.Tensor, backend: CpuAttnBackend
    ) -> torch.Tensor:
        """Run a drafter's layer, which reads embeddings as well; returns the same as `layer`."""
        embedded = torch.empty_like(embeds)
        vector.rms_norm(embeds.numpy(), layer.embed_norm, layer.eps, embedded.numpy())
        vector.rms_norm(self.residual_rows, layer.input_norm, layer.eps, self.normed_rows)
        return self._attend_and_mlp(layer, torch.cat([embedded, self.normed], dim=-1), backend)

    def _attend_and_mlp(
        self, layer: StackLayer, inputs: torch.Tensor, backend: CpuAttnBackend
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
