"""Linear layers on weights that are packed when they are loaded (`kernels.matrix`).

A decode or verify step reads every weight once, so it takes as long as reading them; packed weights
are read at the memory's speed for one row and for eight. The packed product is also row-invariant:
a row's result does not depend on the rows beside it, which makes a token's logits in a verify step
bitwise those of a plain decode step.

A drafter's weights may be packed in eight bits (`narrow`), which are read in a quarter of the time:
its results decide how many drafts are accepted, and nothing else.

Packs are kept by the address of the weight, so that tied weights share one. `repack` is called
wherever SGLang reports that a weight has changed (its `process_weights_after_loading` hook),
`forget` before a weight changes (`restore_weights_before_loading`). Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tlt_sglang.cpu.kernels import matrix, vector


@dataclass(frozen=True, slots=True)
class _Pack:
    """A weight and its packed copy."""

    weight: torch.Tensor  # [N, K], kept alive, because its address is the key
    packed: matrix.Packed


_packs: dict[int, _Pack] = {}
_unused: dict[int, _Pack] = {}
"""Packs of values that have changed since, whose memory the next one of their weight takes."""
_narrowed: dict[int, torch.Tensor] = {}  # eight-bit weights by address; kept alive
_generation = 0


def generation() -> int:
    """Return a count of the changes of packs, by which users of `product` know when to renew it."""
    return _generation


def packable(weight: torch.Tensor) -> bool:
    """Return whether `weight` is a plain float32 matrix in main memory."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.is_contiguous()
    )


def repack(weight: torch.Tensor) -> None:
    """Pack the present values of `weight` [N, K], replacing an older pack."""
    global _generation
    if not packable(weight):
        return
    values, key = weight.detach(), weight.data_ptr()
    old = _unused.pop(key, None) or _packs.get(key)
    _generation += 1
    packed = matrix.pack(values, key in _narrowed, None if old is None else old.packed)
    _packs[key] = _Pack(values, packed)


def narrow(weights: Iterable[torch.Tensor]) -> None:
    """Pack these weights in eight bits from now on, as far as they are packed."""
    for weight in weights:
        if packed(weight):
            _narrowed[weight.data_ptr()] = weight
            repack(weight)


def renew() -> None:
    """Pack the eight-bit weights that have no pack; SGLang has no hook for some of them."""
    for weight in _narrowed.values():
        if not packed(weight):
            repack(weight)


def forget(weight: torch.Tensor) -> None:
    """Drop the pack of `weight`, if any; `linear` uses the weight itself until `repack`."""
    global _generation
    if (pack := _packs.pop(weight.data_ptr(), None)) is not None:
        _unused[weight.data_ptr()] = pack
        _generation += 1


@contextmanager
def changing(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """Return the context in which the values of `weights` change; those with a pack have a new one
    after it."""
    weights = list(weights)
    before = [weight for weight in weights if packed(weight)]
    for weight in weights:
        forget(weight)
    try:
        yield
    finally:
        for weight in before:
            repack(weight)
        renew()


def packed(weight: torch.Tensor) -> bool:
    """Return whether `weight` has a pack, which `linear` then uses."""
    return _pack_of(weight) is not None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N]."""
    pack = _pack_of(weight)
    if pack is None or x.dtype != torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _product(rows, pack.packed, bias).view(*x.shape[:-1], len(weight))


def linear_largest(
    x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `linear` of x [T, K] without a bias, and the argmax of each row [T].

    The argmax is None for a weight whose product does not compute it.
    """
    pack = _pack_of(weight)
    if pack is None or x.dtype != torch.float32 or x.dim() != 2:
        return linear(x, weight, None), None
    return matrix.multiply_largest(x.contiguous(), pack.packed)


def product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `linear` for a fixed weight, valid until `generation` changes.

    It takes x [T, K] float32, contiguous, and returns [T, N].
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
    """Return the first half of an MLP for a fixed weight [2N, K] of gate and up, as `product` does.

    It takes x [T, K] and writes out [T, N] = silu(gate) * up, both float32 and contiguous.
    """
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
