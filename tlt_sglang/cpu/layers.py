"""SGLang's element-wise layers on CPU: one fused kernel where its native path runs eight.

Each function takes the layer, its inputs and SGLang's own implementation, and calls the latter
for whatever the kernel was not made for (another dtype, a variant of the layer). Results are
row-invariant, see `tlt_sglang.cpu.kernels.vector`. Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tlt_sglang.cpu.kernels import vector

Original = Callable[..., Any]


def _plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def rms_norm(
    original: Original,
    layer: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    """RMSNorm of x [..., N] (+ residual, which is then returned, too)."""
    served = (
        _plain(x)
        and layer.weight.dtype == torch.float32
        and x.shape[-1] == layer.hidden_size
        and post_residual_addition is None
        and layer.variance_size_override is None
        and (residual is None or _plain(residual))
    )
    if not served:
        return original(layer, x, residual, post_residual_addition, quant_linear)
    weight, eps = layer.weight.detach().numpy(), np.float32(layer.variance_epsilon)
    rows = x.view(-1, x.shape[-1]).numpy()
    out = torch.empty_like(x)
    out_rows = out.view(rows.shape).numpy()
    if residual is None:
        vector.rms_norm(rows, weight, eps, out_rows)
        return out
    total = residual.clone()
    vector.add_rms_norm(rows, total.view(rows.shape).numpy(), weight, eps, out_rows)
    return out, total


def silu_and_mul(original: Original, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :N]) * x[..., N:] for x [..., 2N]."""
    if not _plain(x):
        result: torch.Tensor = original(layer, x)
        return result
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
    vector.silu_and_mul(
        x.view(-1, 2 * size).numpy(), out.view(-1, size).numpy(), np.empty(size, np.int32)
    )
    return out


def rotary(
    original: Original,
    layer: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of query [T, H * D] and key [T, K * D]."""
    served = (
        layer.is_neox_style
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and positions.dim() == 1
        and query.dtype == key.dtype == layer.cos_sin_cache.dtype == torch.float32
        and positions.dtype == torch.int64
        and not hasattr(layer, "sin_cos_cache")
    )
    if not served:
        result: tuple[torch.Tensor, torch.Tensor] = original(
            layer, positions, query, key, offsets, fused_set_kv_buffer_arg
        )
        return result
    turned = []
    for x in (query, key):
        x = x.contiguous()
        out = torch.empty_like(x)
        vector.rope(
            x.view(len(positions), -1).numpy(),
            layer.head_size,
            positions.numpy(),
            layer.cos_sin_cache.numpy(),
            out.view(len(positions), -1).numpy(),
        )
        turned.append(out)
    return turned[0], turned[1]
