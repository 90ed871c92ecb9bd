"""SGLang's element-wise layers on CPU: one fused kernel where its native path runs eight.

Each function takes the layer, its inputs and SGLang's own implementation, and calls the latter for
inputs that the kernel does not support (another dtype, a variant of the layer). Results are
row-invariant, see `tlt_sglang.cpu.kernels.vector`. Runs in the scheduler process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tlt_sglang.cpu.kernels import vector

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import Norm, Rotary
    from tlt_sglang.upstream.protocols import Upstream


def _plain(x: torch.Tensor) -> bool:
    """Return whether the kernels can read `x`."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def rms_norm(
    original: Upstream,
    layer: Norm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return RMSNorm of x [..., N]; with a residual, that of the sum, and the sum."""
    supported = (
        _plain(x)
        and layer.weight.dtype == torch.float32
        and x.shape[-1] == layer.hidden_size
        and post_residual_addition is None
        and layer.variance_size_override is None
        and (residual is None or _plain(residual))
    )
    if not supported:
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = original(
            layer, x, residual, post_residual_addition, quant_linear
        )
        return result
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


def silu_and_mul(original: Upstream, layer: object, x: torch.Tensor) -> torch.Tensor:
    """Return silu(x[..., :N]) * x[..., N:] for x [..., 2N]."""
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
    original: Upstream,
    layer: Rotary,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query [T, H * D] and key [T, K * D] with the rotary embedding of the positions."""
    supported = (
        layer.is_neox_style
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and positions.dim() == 1
        and query.dtype == key.dtype == layer.cos_sin_cache.dtype == torch.float32
        and positions.dtype == torch.int64
        and not hasattr(layer, "sin_cos_cache")
    )
    if not supported:
        result: tuple[torch.Tensor, torch.Tensor] = original(
            layer, positions, query, key, offsets, fused_set_kv_buffer_arg
        )
        return result
    rotated = []
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
        rotated.append(out)
    return rotated[0], rotated[1]
