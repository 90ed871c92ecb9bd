"""Packed batches: whole documents one after the other, up to a budget of tokens, no padding.

A batch carries the lengths of its documents, and attention keeps to them (see `attention`), so a
document's loss and gradient are the same packed or alone. Which documents share a batch depends on
the seed and the epoch only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 256
"""Documents looked at together to fill batches well."""


@dataclass(frozen=True)
class Document:
    """A prompt and its response with the target's features; L tokens."""

    ids: Tensor
    """[L] int64."""
    features: Tensor
    """[L, A * N]: what the drafter reads of the target."""
    last: Tensor
    """[L, N]: what the target's head reads; the same tensor as `features` for EAGLE."""
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """T tokens of packed documents."""

    ids: Tensor  # [T] int64
    features: Tensor  # [T, A * N]
    last: Tensor  # [T, N]
    positions: Tensor  # [T] int64, from 0 in each document
    ends: Tensor  # [T] int64: where the token's document ends, exclusive
    prompt_ends: Tensor  # [T] int64: where its response begins
    lengths: list[int]

    @staticmethod
    def of(documents: Sequence[Document], dtype: torch.dtype = torch.float32) -> Batch:
        """Pack `documents`; features become `dtype`."""
        lengths = [len(document) for document in documents]
        counts = torch.tensor(lengths)
        starts = counts.cumsum(0) - counts
        prompts = starts + torch.tensor([document.prompt_length for document in documents])
        return Batch(
            torch.cat([document.ids for document in documents]),
            torch.cat([document.features for document in documents]).to(dtype),
            torch.cat([document.last for document in documents]).to(dtype),
            torch.arange(sum(lengths)) - starts.repeat_interleave(counts),
            (starts + counts).repeat_interleave(counts),
            prompts.repeat_interleave(counts),
            lengths,
        )

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(
            self.ids.to(device, non_blocking=True),
            self.features.to(device, non_blocking=True),
            self.last.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.ends.to(device, non_blocking=True),
            self.prompt_ends.to(device, non_blocking=True),
            self.lengths,
        )

    def ahead(self, distance: int) -> tuple[Tensor, Tensor]:
        """(index [T] of the token `distance` later, whether that is in the same document [T])."""
        index = torch.arange(len(self.ids), device=self.ids.device) + distance
        return torch.minimum(index, self.ends - 1), index < self.ends

    def counts(self, step: int) -> Tensor:
        """[T] bool: does simulated step `step` at this index predict a token of a response?

        At index i the drafter knows token i + 1, and step s predicts token i + 2 + s.
        """
        index, inside = self.ahead(2 + step)
        return inside & (index >= self.prompt_ends)


def pack(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of documents for each batch of one epoch; each document once.

    First fit, longest first within a window of the shuffled documents; then the batches are
    shuffled. A document longer than `budget` has a batch of its own.
    """
    order = list(range(len(lengths)))
    chance = random.Random(f"{seed}/{epoch}")
    chance.shuffle(order)
    batches: list[list[int]] = []
    for first in range(0, len(order), WINDOW):
        batches += _first_fit(order[first : first + WINDOW], lengths, budget)
    chance.shuffle(batches)
    return batches


def _first_fit(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(order, key=lambda i: -lengths[i]):
        place = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            batches.append([index])
            room.append(budget - lengths[index])
        else:
            batches[place].append(index)
            room[place] -= lengths[index]
    return batches
