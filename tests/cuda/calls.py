"""Calls of torch's Python functions under the simulated device: where tensors are, and move to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device as default_device

from tests.cuda.device import (
    CUDA,
    DEVICE,
    Arguments,
    Function,
    Keywords,
    is_pinned,
    on_device,
    pin,
    put,
    tensors,
)


def _is_cuda(device: object) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return str(device).startswith("cuda")


def _to(func: Function, args: Arguments, kwargs: Keywords) -> Any:
    """Move a tensor, change its type, or both."""
    tensor, *rest = args
    first = rest[0] if rest else kwargs.get("device", kwargs.get("other"))
    target: bool | None = None
    if isinstance(first, torch.Tensor):
        target = on_device(first)
    elif isinstance(first, (str, int, torch.device)):
        target = _is_cuda(first)
        if rest:
            rest[0] = "cpu"
        else:
            kwargs = kwargs | {"device": "cpu"}
    if target is None or target == on_device(tensor):
        return func(tensor, *rest, **kwargs)
    non_blocking = kwargs.pop("non_blocking", False) or True in rest
    return _moved(func(tensor, *rest, **kwargs), tensor, target, non_blocking)


def _moved(
    result: torch.Tensor, source: torch.Tensor, target: bool, non_blocking: bool
) -> torch.Tensor:
    """Return a copy on the other side of the bus; note whether that waits."""
    if target and not is_pinned(source):
        DEVICE.wait("pageable copy to the device")
    elif not non_blocking:
        DEVICE.wait("copy to the device" if target else "copy to the host")
    DEVICE.moving = True
    try:
        if result.untyped_storage() is source.untyped_storage():
            result = result.clone()
    finally:
        DEVICE.moving = False
    result.untyped_storage().on_device = target  # type: ignore[attr-defined]
    # As torch does: a copy to the host that need not wait goes into page-locked memory.
    return result if target or not non_blocking else pin(result)


def _cpu(func: Function, args: Arguments, kwargs: Keywords) -> object:
    return _to(torch.Tensor.to, (args[0], "cpu"), {})


def _cuda(func: Function, args: Arguments, kwargs: Keywords) -> object:
    kwargs.pop("device", None)
    return _to(torch.Tensor.to, (args[0], "cuda"), kwargs)


def _tolist(func: Function, args: Arguments, kwargs: Keywords) -> object:
    if on_device(args[0]):
        DEVICE.wait("tolist")
    return func(*args, **kwargs)


def _numpy(func: Function, args: Arguments, kwargs: Keywords) -> object:
    if on_device(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(*args, **kwargs)


def _device(func: Function, args: Arguments, kwargs: Keywords) -> object:
    return CUDA if on_device(args[0]) else func(*args, **kwargs)


HANDLERS: dict[object, Callable[[Function, Arguments, Keywords], object]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.device.__get__: _device,
    torch.Tensor.is_cuda.__get__: lambda func, args, kwargs: on_device(args[0]),  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda func, args, kwargs: not on_device(args[0]),  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda func, args, kwargs: 0 if on_device(args[0]) else -1,
    torch.Tensor.pin_memory: lambda func, args, kwargs: pin(args[0].clone()),
    torch.Tensor.is_pinned: lambda func, args, kwargs: is_pinned(args[0]),
}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
"""Functions that copy a list or an array."""
MAKERS = default_device._device_constructors()


class Calls(TorchFunctionMode):
    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        if DEVICE.busy:
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(func, args, kwargs)
        device = kwargs.get("device")
        if device is None and func in MAKERS:
            device = default_device.CURRENT_DEVICE
        pinned = kwargs.pop("pin_memory", False)
        if device is not None and _is_cuda(device):
            return self._make(func, args, kwargs)
        result = func(*args, **kwargs)
        return pin(result) if pinned else result

    def _make(self, func: Function, args: Arguments, kwargs: Keywords) -> object:
        """Make a tensor on the device."""
        kwargs["device"] = "cpu"
        if func in FROM_HOST:
            data = args[0] if args else kwargs["data"]
            if isinstance(data, torch.Tensor):
                return _to(torch.Tensor.to, (data, "cuda"), {"dtype": kwargs.get("dtype")})
            DEVICE.wait("pageable copy to the device")
        DEVICE.making = True
        try:
            result = func(*args, **kwargs)
        finally:
            DEVICE.making = False
        for tensor in tensors(result):
            put(tensor)
        return result
