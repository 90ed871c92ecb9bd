"""Operations that torch dispatches under the simulated device: what waits, what a graph records."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda.device import (
    DEVICE,
    Arguments,
    Function,
    Keywords,
    is_pinned,
    on_device,
    put,
    tensors,
)

ATEN = torch.ops.aten
WAITING = {
    ATEN._local_scalar_dense.default: "item",
    ATEN.nonzero.default: "nonzero",
    ATEN.equal.default: "equal",
    ATEN.masked_select.default: "masked_select",
    ATEN._unique2.default: "unique",
    ATEN.unique_consecutive.default: "unique",
    ATEN.bincount.default: "bincount",
}
"""Operations that need a value of the device on the host."""
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}
ANYWHERE = INDEXING | {ATEN.copy_.default, ATEN._foreach_copy_.default, ATEN.set_.source_Storage}
"""Operations whose tensors may lie on both sides of the bus."""


def _notes(func: Function, args: Arguments, kwargs: Keywords) -> None:
    """Note what makes the host wait in an operation on device tensors."""
    if func in WAITING:
        DEVICE.wait(WAITING[func])
    elif func is ATEN.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        DEVICE.wait("repeat_interleave without output_size")
    elif func in INDEXING:
        for index in tensors(args[1]):
            if not on_device(index):
                DEVICE.wait("pageable copy of indices")
            elif index.dtype is torch.bool and (len(args) < 3 or args[2].numel() > 1):
                DEVICE.wait("index by a mask")
    elif func is ATEN.copy_.default and not DEVICE.moving:
        _note_copy(args[0], args[1], (*args, False)[2] or kwargs.get("non_blocking", False))
    elif func is ATEN._foreach_copy_.default:
        for target, source in zip(args[0], args[1], strict=True):
            _note_copy(target, source, bool(kwargs.get("non_blocking", False)))


def _note_copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    if on_device(target) == on_device(source):
        return
    host, direction = (source, "to the device") if on_device(target) else (target, "to the host")
    if not is_pinned(host):
        DEVICE.wait(f"pageable copy {direction}")
    elif not non_blocking:
        DEVICE.wait(f"copy {direction}")


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if DEVICE.busy:
            return func(*args, **kwargs)
        operands = [*tensors(args), *tensors(list(kwargs.values()))]
        sides = [on_device(tensor) for tensor in operands]
        here = any(sides)
        if not func.is_view and (here or DEVICE.making):  # type: ignore[attr-defined]
            DEVICE.launch()
        if here:
            _notes(func, args, kwargs)
            if not all(sides) and func not in ANYWHERE and not DEVICE.moving:
                self._check(func, operands, sides)
        result = func(*args, **kwargs)
        if here and not DEVICE.moving and func not in ANYWHERE - INDEXING:
            for tensor in tensors(result):
                put(tensor)
        if DEVICE.capturing is not None and (here or DEVICE.making):
            DEVICE.capturing.record(func, args, kwargs, result)
        return result

    def _check(self, func: Function, operands: list[torch.Tensor], sides: list[bool]) -> None:
        """Raise as CUDA does where a host tensor of more than a number meets a device tensor."""
        for tensor, side in zip(operands, sides, strict=True):
            if not side and tensor.dim():
                raise RuntimeError(
                    f"{func}: Expected all tensors to be on the same device, but found at least "
                    "two devices, cuda:0 and cpu!"
                )
