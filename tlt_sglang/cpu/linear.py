"""Linear layers on weights that oneDNN has packed once, ahead of time.

Why: a decode or verify step reads every weight once, so its time is the time to stream them; the
packed layout streams well for one to sixteen rows, where the plain one loses up to half. And the
packed product is row-invariant: a row's result does not depend on the rows beside it, which
makes a token's logits in a verify step bitwise those of a plain decode step.

A drafter's weights may be packed in bfloat16 (`halve`), which halves the time of its steps: what it
computes decides how many drafts are accepted, and nothing else.

Packs are kept by the address of the weight, so that tied weights share one. `repack` is called
wherever SGLang says that a weight has changed (its `process_weights_after_loading` hook), `forget`
when it is about to (`restore_weights_before_loading`). Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

_reorder: Callable[[torch.Tensor], torch.Tensor] = torch.ops.mkldnn._reorder_linear_weight
_pointwise = torch.ops.mkldnn._linear_pointwise


def _linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = _pointwise(x, packed, bias, "none", [], "")
    return result


def _half_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = _linear(x.bfloat16(), packed, None).float()
    return result if bias is None else result + bias


@dataclass(frozen=True, slots=True)
class _Pack:
    weight: torch.Tensor  # [N, K], kept alive: its address is the key
    packed: torch.Tensor  # opaque oneDNN layout
    lone_row_differs: bool  # a single row is computed otherwise than one of many
    half: bool  # in bfloat16


_packs: dict[int, _Pack] = {}
_halved: dict[int, torch.Tensor] = {}  # weights to pack in bfloat16, by address; kept alive
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
        and torch._C._has_mkldnn
    )


def repack(weight: torch.Tensor) -> None:
    """Pack `weight` [N, K] as it is now, replacing an older pack of it."""
    if not packable(weight):
        return
    half = weight.data_ptr() in _halved
    packed = _reorder(weight.detach().bfloat16() if half else weight.detach())
    if half:
        _keep(_Pack(weight.detach(), packed, lone_row_differs=False, half=True))
        return
    rows = torch.linspace(-1.0, 1.0, 2 * weight.shape[1]).view(2, -1)
    alone, among = (_linear(x, packed, None)[0] for x in (rows[:1], rows))
    _keep(_Pack(weight.detach(), packed, not torch.equal(alone, among), half=False))


def _keep(pack: _Pack) -> None:
    global _generation
    _generation += 1
    _packs[pack.weight.data_ptr()] = pack


def halve(weights: Iterable[torch.Tensor]) -> None:
    """From now on pack these in bfloat16, where the processor multiplies it in hardware."""
    if not torch.cpu._is_avx512_bf16_supported():
        return
    for weight in weights:
        if packed(weight):
            _halved[weight.data_ptr()] = weight
            repack(weight)


def forget(weight: torch.Tensor) -> None:
    """Drop the pack of `weight`, if any: it is read plainly until `repack`."""
    global _generation
    if _packs.pop(weight.data_ptr(), None) is not None:
        _generation += 1


def packed(weight: torch.Tensor) -> bool:
    """Whether `weight` has a pack that `linear` will use."""
    pack = _packs.get(weight.data_ptr())
    return pack is not None and pack.weight.shape == weight.shape


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] -> [..., N]."""
    pack = _packs.get(weight.data_ptr())
    if pack is None or pack.weight.shape != weight.shape:
        return torch.nn.functional.linear(x, weight, bias)
    if pack.half:
        return _half_linear(x, pack.packed, bias)
    if pack.lone_row_differs and x.shape[0] == 1 and x.dim() == 2:
        return _linear(x.expand(2, -1).contiguous(), pack.packed, bias)[:1]
    return _linear(x, pack.packed, bias)


def product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`linear` with its lookups done: valid until `generation` changes. x [T, K] -> [T, N]."""
    pack = _packs.get(weight.data_ptr())
    if pack is None or pack.weight.shape != weight.shape:
        return partial(linear, weight=weight, bias=bias)
    packed = pack.packed
    if pack.half:
        return lambda x: _half_linear(x, packed, bias)
    if pack.lone_row_differs:

        def padded(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 1:
                return _linear(x.expand(2, -1).contiguous(), packed, bias)[:1]
            return _linear(x, packed, bias)

        return padded
    return lambda x: _linear(x, packed, bias)
