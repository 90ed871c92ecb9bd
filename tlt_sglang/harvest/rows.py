"""The rows of a step that the log gets: taken once, on the device that has them, without a wait.

Shapes: R logged requests of B, W verified tokens of each, F features a token, N hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

Rows = slice | torch.Tensor
"""Indices of rows: consecutive ones, or a tensor of them."""


class Span(NamedTuple):
    """Consecutive tokens of a request in a step."""

    row: int
    """Row of the first one."""
    start: int
    """Its position."""
    size: int


def last_tokens(spans: Sequence[Span], most: int) -> list[Span]:
    """Return the spans of the last `most` tokens; those before them have a size of 0."""
    surplus, kept = sum(span.size for span in spans) - most, []
    for row, start, size in spans:
        cut = min(size, max(0, surplus))
        kept.append(Span(row + cut, start + cut, size - cut))
        surplus -= cut
    return kept


def rows_of(spans: Sequence[Span], device: torch.device) -> tuple[Rows, list[Span]]:
    """Return the rows of `spans`, whose sizes the host knows, and where each span is among them.

    On CPU rows between spans are returned, too: to take them all is less work than to choose.
    """
    parts = [(span.row, span.row + span.size) for span in spans if span.size]
    if device.type == "cpu" and parts:
        first = parts[0][0]
        moved = [Span(row - first, start, size) for row, start, size in spans]
        return slice(first, parts[-1][1]), moved
    packed = list(in_line([span.start for span in spans], [span.size for span in spans]))
    if all(end == first for (_, end), (first, _) in pairwise(parts)):
        return (slice(parts[0][0], parts[-1][1]) if parts else slice(0, 0)), packed
    indices = torch.cat([torch.arange(first, end) for first, end in parts])
    return to_device(indices, device), packed


def in_line(starts: Sequence[int], sizes: Sequence[int]) -> Iterator[Span]:
    """Yield spans whose rows follow one another."""
    row = 0
    for start, size in zip(starts, sizes, strict=True):
        yield Span(row, start, size)
        row += size


def committed_rows(counts: torch.Tensor, width: int, requests: torch.Tensor | None) -> torch.Tensor:
    """Return the rows [R * W] of a verify step with the committed ones in front, in their order.

    `counts` [R] are the committed tokens of each request, and `requests` [R] their indices in the
    batch, where not all of it is logged. How many rows are committed only the device knows.
    """
    place = torch.arange(width, device=counts.device)
    late = (place >= counts.unsqueeze(1)).flatten()
    order = late.to(torch.uint8).argsort(stable=True)
    if requests is None:
        return order
    return (requests.unsqueeze(1) * width + place).flatten()[order]


def gather(
    features: torch.Tensor, last: torch.Tensor | None, rows: Rows, nodes: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `rows` of features [T, F] and, beside them, of last hidden states [T, N], as bfloat16.

    Row i of the features belongs to row `nodes[i]` of `last`, where they differ. Every number is
    copied once, and not at all where consecutive ones may be taken as they are: on CPU.
    """
    if last is None and isinstance(rows, slice) and features.device.type == "cpu":
        return features[rows].to(torch.bfloat16)
    parts = [(features, rows)]
    if last is not None:
        parts.append((last, rows if nodes is None else nodes[rows]))
    if all(isinstance(own, slice) and part.dtype == torch.bfloat16 for part, own in parts):
        return torch.cat([part[own] for part, own in parts], -1)
    first = features[rows] if isinstance(rows, slice) else rows
    width = sum(part.shape[1] for part, _ in parts)
    joined = features.new_empty((len(first), width), dtype=torch.bfloat16)
    column = 0
    for part, own in parts:
        target = joined[:, column : column + part.shape[1]]
        if isinstance(own, slice) or part.dtype != torch.bfloat16:
            target.copy_(part[own])
        else:
            torch.index_select(part, 0, own, out=target)
        column += part.shape[1]
    return joined


def to_device(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `indices` on `device`, without a wait."""
    if device.type != "cuda":
        return indices.to(device)
    return indices.pin_memory().to(device, non_blocking=True)
