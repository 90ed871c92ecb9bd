"""Packed batches: whole sequences end to end, up to a budget of tokens, without padding.

A batch carries the lengths of its sequences, and attention stays within them (see `attention`), so
that the loss and gradient of a sequence are the same packed or alone. Which sequences share a batch
depends only on the seed and the epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlt_sglang.harvest.sequence import TokenSequence

WINDOW = 256
"""Number of sequences that are packed together; more fill batches better."""


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of packed sequences.

    Not a `TokenSequence`: it is many of them end to end, with the position and the boundaries of
    each token, in one floating dtype and on the training device.
    """

    ids: Tensor  # [T] int64
    features: Tensor  # [T, A * N]
    last: Tensor  # [T, N]
    positions: Tensor  # [T] int64, from 0 in each sequence
    ends: Tensor  # [T] int64: where the token's sequence ends, exclusive
    prompt_ends: Tensor  # [T] int64: where its response begins
    lengths: list[int]

    @staticmethod
    def of(
        sequences: Sequence[TokenSequence[Tensor]], dtype: torch.dtype = torch.float32
    ) -> PackedBatch:
        """Pack `sequences`, with their hidden states as `dtype`."""
        lengths = [len(sequence) for sequence in sequences]
        counts = torch.tensor(lengths)
        starts = counts.cumsum(0) - counts
        prompts = starts + torch.tensor([sequence.response_start for sequence in sequences])
        return PackedBatch(
            torch.cat([sequence.ids for sequence in sequences]),
            torch.cat([sequence.features for sequence in sequences]).to(dtype),
            torch.cat([sequence.head_input for sequence in sequences]).to(dtype),
            torch.arange(sum(lengths)) - starts.repeat_interleave(counts),
            (starts + counts).repeat_interleave(counts),
            prompts.repeat_interleave(counts),
            lengths,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on `device`."""
        return PackedBatch(
            self.ids.to(device, non_blocking=True),
            self.features.to(device, non_blocking=True),
            self.last.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.ends.to(device, non_blocking=True),
            self.prompt_ends.to(device, non_blocking=True),
            self.lengths,
        )

    def shifted(self, distance: int) -> tuple[Tensor, Tensor]:
        """Return the index [T] of the token `distance` later, and whether that is inside [T].

        Inside means within the same sequence; elsewhere the index is that of its last token.
        """
        index = torch.arange(len(self.ids), device=self.ids.device) + distance
        return torch.minimum(index, self.ends - 1), index < self.ends

    def counts(self, step: int) -> Tensor:
        """Return where simulated step `step` predicts a token of a response, [T] bool.

        At index i the drafter has token i + 1, and step s predicts token i + 2 + s.
        """
        index, inside = self.shifted(2 + step)
        return inside & (index >= self.prompt_ends)


def pack(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the indices of the sequences in each batch of an epoch; each sequence occurs once.

    First fit, longest first, within a window of the shuffled sequences; then the batches are
    shuffled. A sequence longer than `budget` gets a batch of its own.
    """
    order = list(range(len(lengths)))
    rng = random.Random(f"{seed}/{epoch}")
    rng.shuffle(order)
    batches: list[list[int]] = []
    for first in range(0, len(order), WINDOW):
        batches += _first_fit(order[first : first + WINDOW], lengths, budget)
    rng.shuffle(batches)
    return batches


def _first_fit(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(order, key=lambda i: -lengths[i]):
        fit = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if fit is None:
            batches.append([index])
            room.append(budget - lengths[index])
        else:
            batches[fit].append(index)
            room[fit] -= lengths[index]
    return batches
