"""The source of the harvest log: tokens of prefills and verify steps, with their hidden states.

Requests are sampled first, and only their committed rows are taken. On CPU they are written at
once. On CUDA they are gathered on the device, as graphs write over the originals in the next
step; a thread copies them to the host and writes them, and nothing waits for it. The features of
an EAGLE-3 target are followed by its last hidden state, which the drafter never reads but training
needs: [three layers | last].

Runs in the scheduler process of tensor-parallel rank 0, on its main thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tlt_sglang.harvest.host_copies import PinnedCopies, Present
from tlt_sglang.harvest.logged import Logged, LoggedRequest, LoggedRequests
from tlt_sglang.harvest.record import PROMPT
from tlt_sglang.harvest.rows import (
    Rows,
    Span,
    committed_rows,
    gather,
    last_tokens,
    rows_of,
    to_device,
)
from tlt_sglang.harvest.step_writer import Step, StepThread, StepWriter
from tlt_sglang.harvest.writer import Writer


class Chosen(NamedTuple):
    """The requests of a step that are logged."""

    rows: list[int]
    """Their indices in the batch."""
    logged: list[Logged]
    size: int
    """Requests of the batch."""


class Tap:
    """Feeds the log of one engine; `version` counts the versions of the target's weights."""

    def __init__(
        self, writer: Writer, device: torch.device, steps: StepWriter | StepThread | None = None
    ) -> None:
        """`steps` writes what is taken; by default as `device` needs it."""
        self.writer = writer
        self.version = 0
        self.overrun = 0
        """Number of steps dropped because too many were not written yet."""
        self.paused = False
        """True while requests are ignored, as those of calibration are not a user's."""
        self._steps = steps or _steps(writer, device)
        self._requests = LoggedRequests()
        self._sampled_out = self._too_large = 0

    def choose(self, requests: Sequence[LoggedRequest]) -> Chosen | None:
        """Begin a step: return which of its requests are logged; None if none is."""
        self.drain()
        if self.paused or self._steps.error is not None:
            return None
        entries = self._requests.begin_step(requests)
        running = [(row, one) for row, one in enumerate(entries) if one is not None]
        sampled = [(row, one) for row, one in running if self.writer.wants(one.key)]
        self._sampled_out += len(running) - len(sampled)
        if not sampled:
            return None
        if not self._steps.has_room:
            self.overrun += 1
            return None
        rows, logged = zip(*sampled, strict=True)
        return Chosen(list(rows), list(logged), len(entries))

    def prefill(
        self,
        chosen: Chosen,
        tokens: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        features: torch.Tensor,
        last: torch.Tensor | None,
    ) -> None:
        """Log tokens [T] of prompts, `counts` of each request from position `starts` on, with
        features [T, F] and, for EAGLE-3, last hidden states [T, N].

        Of more tokens than half the log holds only the last ones are logged: the first ones would
        be written over before anyone has read them.
        """
        ends = torch.tensor(counts).cumsum(0).tolist()
        spans = [Span(ends[row] - counts[row], starts[row], counts[row]) for row in chosen.rows]
        most = 2 * self.writer.most_tokens
        if sum(span.size for span in spans) > most:
            self._too_large += 1
            spans = last_tokens(spans, most)
        self._take(chosen, spans, tokens, features, last, None, PROMPT)

    def decode(
        self,
        chosen: Chosen,
        tokens: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        features: torch.Tensor,
        last: torch.Tensor | None,
        nodes: torch.Tensor | None = None,
    ) -> None:
        """Log the inputs [B, W] of a verify step from positions `starts` [B] on, of which the first
        `counts` [B] are committed, with features [B * W, F].

        Row i of the features belongs to row `nodes[i]` of `last`, where a tree was verified.
        """
        width, tokens = tokens.shape[1], tokens.reshape(-1)
        if self._steps.needs_counts:
            firsts, numbers = starts.tolist(), counts.tolist()
            spans = [Span(row * width, firsts[row], numbers[row]) for row in chosen.rows]
            self._take(chosen, spans, tokens, features, last, nodes, 0)
            return
        requests = None
        if len(chosen.rows) < chosen.size:
            requests = to_device(torch.tensor(chosen.rows), counts.device)
            starts, counts = starts[requests], counts[requests]
        table = torch.stack([starts.to(torch.int64), counts.to(torch.int64)])
        rows: Rows = slice(None)
        if width > 1:
            rows = committed_rows(counts, width, requests)
        elif requests is not None:
            rows = requests
        self._put(chosen, table, tokens[rows], gather(features, last, rows, nodes), 0)

    def drain(self) -> None:
        """Log the ends of finished requests."""
        for logged in self._requests.take_ended():
            if self.writer.wants(logged.key):
                self._steps.put_end(logged, self.version)

    def start_version(self) -> None:
        """Start a version of the target's weights; running requests continue in new sequences."""
        self.version += 1

    def close(self) -> None:
        """Write what was taken, and close the log."""
        self._steps.close()
        self.writer.close()

    def status(self) -> dict[str, Any]:
        """Return the counters for `GET /tlt/status`."""
        writer = self.writer
        return {
            "path": str(writer.path),
            "written": writer.written,
            "too_large": writer.too_large + self._too_large,
            "sampled_out": writer.sampled_out + self._sampled_out,
            "overrun": self.overrun,
            "sampling": writer.sampling,
            "target_version": self.version,
            "error": self._steps.error,
        }

    def _take(
        self,
        chosen: Chosen,
        spans: Sequence[Span],
        tokens: torch.Tensor,
        features: torch.Tensor,
        last: torch.Tensor | None,
        nodes: torch.Tensor | None,
        flags: int,
    ) -> None:
        """Take spans that the host knows."""
        rows, spans = rows_of(spans, features.device)
        self._put(chosen, spans, tokens[rows], gather(features, last, rows, nodes), flags)

    def _put(
        self,
        chosen: Chosen,
        spans: list[Span] | torch.Tensor,
        tokens: torch.Tensor,
        features: torch.Tensor,
        flags: int,
    ) -> None:
        # A slice of the tokens would be SGLang's own tensor, which the next step may write into.
        kept = tokens.to(torch.int64, copy=not self._steps.needs_counts)
        ready = self._steps.copies.ready()
        self._steps.put(Step(chosen.logged, spans, kept, features, flags, self.version, ready))


def _steps(writer: Writer, device: torch.device) -> StepWriter | StepThread:
    """Return what writes the steps of an engine on `device`."""
    if device.type != "cuda":
        return StepWriter(writer, Present())
    return StepThread(StepWriter(writer, PinnedCopies(device, 2 * writer.feature_size)))
