"""Tensors go between host and device by way of pinned memory. The device is a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlt_sglang.engine import to_device as copies


class OnCuda:
    """A tensor of a device that this machine lacks."""

    device, dtype, shape = torch.device("cuda"), torch.bfloat16, (2, 3)


def test_on_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    assert copies.to_device(tensor, torch.device("cpu")) is tensor
    assert copies.to_host(tensor) is tensor
    numbers = copies.to_device([], torch.device("cpu"))
    assert numbers.dtype == torch.int64 and numbers.tolist() == []


def test_tables_take_their_turn_on_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def to(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        calls.append((tensor.tolist(), args, options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    monkeypatch.setattr(torch.Tensor, "to", to)
    copies.to_device([1, 2], torch.device("cuda"))
    assert calls == [([2, 3], (torch.device("cuda"),), {"non_blocking": True})]


def test_large_tensors_are_copied_into_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def copy(host: torch.Tensor, source: object) -> torch.Tensor:
        made.append(source)
        return host

    def empty(shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        made.append((shape, dtype, pin_memory))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "empty", empty)
    source: Any = OnCuda()
    copies.to_host(source)
    assert made == [((2, 3), torch.bfloat16, True), source]
