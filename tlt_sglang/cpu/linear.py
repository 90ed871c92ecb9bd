"""Linear layers on weights that were packed once, ahead of time (`kernels.matrix`).

Why: a decode or verify step reads every weight once, so its time is the time to stream them; packed
weights stream at the memory's speed for one row and for eight. And the packed product is
row-invariant: a row's result does not depend on the rows beside it, which makes a token's logits in
a verify step bitwise those of a plain decode step.

A drafter's weights may be packed in eight bits (`narrow`), which are read in a quarter of the time:
what it computes decides how many drafts are accepted, and nothing else.

Packs are kept by the address of the weight, so that tied weights share one. `repack` is called
wherever SGLang says that a weight has changed (its `process_weights_after_loading` hook), `forget`
when it is about to (`restore_weights_before_loading`). Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tlt_sglang.cpu.kernels import matrix, vector


@dataclass(frozen=True, slots=True)
class _Pack:
    weight: torch.Tensor  # [N, K], kept alive: its address is the key
    packed: matrix.Packed


_packs: dict[int, _Pack] = {}
_narrowed: dict[int, torch.Tensor] = {}  # weights to pack in eight bits, by address; kept alive
_generation = 0


def generation() -> int:
    """Counts up whenever a pack is made or dropped, so that users of `product` can renew theirs."""
    return _generation


def packable(weight: torch.Tensor) -> bool:
    """Whether `weight` is a plain float32 matrix in main memory."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.is_contiguous()
    )


def repack(weight: torch.Tensor) -> None:
    """Pack `weight` [N, K] as it is now, replacing an older pack of it."""
    global _generation
    if not packable(weight):
        return
    now = weight.detach()
    narrow = weight.data_ptr() in _narrowed
    _generation += 1
    _packs[weight.data_ptr()] = _Pack(now, matrix.pack(now, narrow))


def narrow(weights: Iterable[torch.Tensor]) -> None:
    """From now on pack these, where they are packed at all, in eight bits."""
    for weight in weights:
        if packed(weight):
            _narrowed[weight.data_ptr()] = weight
            repack(weight)


def renew() -> None:
    """Pack those of `narrow` that have no pack: SGLang does not say of some when they are whole."""
    for weight in _narrowed.values():
        if not packed(weight):
            repack(weight)


def forget(weight: torch.Tensor) -> None:
    """Drop the pack of `weight`, if any: it is read plainly until `repack`."""
    global _generation
    if _packs.pop(weight.data_ptr(), None) is not None:
        _generation += 1


def packed(weight: torch.Tensor) -> bool:
    """Whether `weight` has a pack that `linear` will use."""
    return _pack_of(weight) is not None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] -> [..., N]."""
    pack = _pack_of(weight)
    if pack is None or x.dtype != torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _product(rows, pack.packed, bias).view(*x.shape[:-1], len(weight))


def linear_largest(
    x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `linear` of x [T, K], without a bias, and the place of the largest of each row [T], or
    None where that is not found on the way."""
    pack = _pack_of(weight)
    if pack is None or x.dtype != torch.float32 or x.dim() != 2:
        return linear(x, weight, None), None
    return matrix.multiply_largest(x.contiguous(), pack.packed)


def product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`linear` with its lookups done: valid until `generation` changes.

    x [T, K] float32, contiguous -> [T, N].
    """
    pack = _pack_of(weight)
    if pack is None:
        return partial(linear, weight=weight, bias=bias)
    if bias is None:
        return partial(matrix.multiply, packed=pack.packed)
    return partial(_product, packed=pack.packed, bias=bias)


def gated(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """As `product`, of an MLP's gate and up in one weight [2N, K], up to what its down takes:
    x [T, K] -> out [T, N] = silu(gate) * up, both float32 and contiguous."""
    pack = _pack_of(weight)
    if pack is not None and bias is None and pack.packed.halves:
        return partial(matrix.multiply_gated, packed=pack.packed)
    whole = product(weight, bias)

    def separately(x: torch.Tensor, out: torch.Tensor) -> None:
        scratch = np.empty(out.shape[1], np.int32)
        vector.silu_and_mul(whole(x).numpy(), out.numpy(), scratch)

    return separately


def _product(x: torch.Tensor, packed: matrix.Packed, bias: torch.Tensor | None) -> torch.Tensor:
    result = matrix.multiply(x, packed)
    return result if bias is None else result.add_(bias)


def _pack_of(weight: torch.Tensor) -> _Pack | None:
    pack = _packs.get(weight.data_ptr())
    return pack if pack is not None and pack.weight.shape == weight.shape else None
