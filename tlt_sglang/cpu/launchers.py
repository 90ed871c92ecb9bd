"""CPU kernels in the place of Triton's, for an SGLang that launches these on every device.

`kernel[grid](*arguments)` becomes a call of the CPU kernel with the same arguments; numbers that
only a GPU's blocks need are dropped. Runs in the scheduler process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.cpu.later import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class Launcher:
    """A kernel as Triton's are launched: `launcher[grid](*arguments)`."""

    def __init__(self, name: str, arguments: int) -> None:
        """Launch `name` of `tlt_sglang.cpu.kernels` with the first `arguments`."""
        self._run: Callable[..., object] = kernel(name)
        self._arguments = arguments

    def __getitem__(self, grid: object) -> Launcher:
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        self._run(*arguments[: self._arguments])


class CopyLauncher(Launcher):
    """The kernel that moves rows of the KV cache."""

    def __init__(self) -> None:
        super().__init__("copy_all_layer_kv_cache_cpu", 4)

    def __call__(self, *arguments: object, **options: object) -> None:
        pointers, strides, target, source, count, *_ = arguments
        rows = slice(0, count)
        super().__call__(pointers, strides, _part(target, rows), _part(source, rows))


def _part(locations: object, rows: slice) -> torch.Tensor:
    part: torch.Tensor = locations[rows]  # type: ignore[index]
    return part
