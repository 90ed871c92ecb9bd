"""The source of the harvest log: tokens of prefills and verify steps, with their hidden states.

On CUDA the tensors of a step are copied to pinned memory on a stream of their own, and written once
the copy is done, some steps later; nothing waits for it. On CPU they are written at once. The
features of an EAGLE-3 target are followed by its last hidden state, which the drafter never reads
but training needs: [three layers | last].

Runs in the scheduler process of tensor-parallel rank 0, on its main thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tlt_sglang.harvest.host_copies import Event, ToHost, to_host
from tlt_sglang.harvest.logged import Logged, LoggedRequest, LoggedRequests
from tlt_sglang.harvest.record import END, PROMPT, Record
from tlt_sglang.harvest.writer import Writer

MOST_PENDING = 64
"""Most steps with a copy under way; further ones are dropped and counted."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """One step on its way to the log; T tokens of B requests, row after row."""

    requests: list[Logged]
    starts: torch.Tensor  # [B] positions of the first token of each
    counts: torch.Tensor  # [B] tokens of each that count
    width: list[int]  # B: rows of each, the first `counts` of which count
    tokens: torch.Tensor  # [T]
    features: torch.Tensor  # [T, F] bfloat16
    flags: int
    version: int
    done: Event | None
    """The CUDA event of the copy; None where it is complete already."""


class Tap:
    """Feeds the log of one engine; `version` counts the versions of the target's weights."""

    def __init__(self, writer: Writer, device: torch.device, copy: ToHost | None = None) -> None:
        """`copy` brings a step's tensors to the host; by default as `device` needs it."""
        self.writer = writer
        self.version = 0
        self.overrun = 0
        """Number of steps dropped because too many copies were under way."""
        self.paused = False
        """True while requests are ignored, as those of calibration are not a user's."""
        self._to_host = copy or to_host(device)
        self._pending: deque[_Copied] = deque()
        self._requests = LoggedRequests()

    def prefill(
        self,
        requests: Sequence[LoggedRequest],
        tokens: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        features: torch.Tensor,
        last: torch.Tensor | None,
    ) -> None:
        """Log tokens [T] of prompts, `counts` of each request from position `starts` on, with
        features [T, F] and, for EAGLE-3, last hidden states [T, N].

        Of more tokens than half the log holds only the last ones are logged.
        """
        # The first ones would be written over before anyone has read them.
        starts, counts = list(starts), list(counts)
        surplus = len(tokens) - 2 * self.writer.most_tokens
        if surplus > 0:
            self.writer.too_large += 1
            tokens, features = tokens[surplus:], features[surplus:]
            last = None if last is None else last[surplus:]
            for row, count in enumerate(counts):
                cut = min(count, surplus)
                starts[row], counts[row], surplus = starts[row] + cut, count - cut, surplus - cut
        self._take(
            requests,
            torch.tensor(starts),
            torch.tensor(counts),
            counts,
            tokens,
            features,
            last,
            PROMPT,
        )

    def decode(
        self,
        requests: Sequence[LoggedRequest],
        tokens: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        features: torch.Tensor,
        last: torch.Tensor | None,
    ) -> None:
        """Log the inputs [B, W] of a verify step from positions `starts` [B] on, of which the first
        `counts` [B] are committed, with features [B * W, F]."""
        widths = [tokens.shape[1]] * len(requests)
        self._take(requests, starts, counts, widths, tokens.reshape(-1), features, last, 0)

    def drain(self) -> None:
        """Write the steps that are copied by now, and the ends of finished requests."""
        while self._pending and (self._pending[0].done is None or self._pending[0].done.query()):
            self._write(self._pending.popleft())
        for logged in self._requests.take_ended():
            self._end(logged)

    def start_version(self) -> None:
        """Start a version of the target's weights; running requests continue in new sequences."""
        self.version += 1

    def status(self) -> dict[str, Any]:
        """Return the counters for `GET /tlt/status`."""
        writer = self.writer
        return {
            "path": str(writer.path),
            "written": writer.written,
            "too_large": writer.too_large,
            "sampled_out": writer.sampled_out,
            "overrun": self.overrun,
            "sampling": writer.sampling,
            "target_version": self.version,
        }

    def _take(
        self,
        requests: Sequence[LoggedRequest],
        starts: torch.Tensor,
        counts: torch.Tensor,
        widths: list[int],
        tokens: torch.Tensor,
        features: torch.Tensor,
        last: torch.Tensor | None,
        flags: int,
    ) -> None:
        self.drain()
        if self.paused:
            return
        logged = self._requests.begin_step(requests)
        if not any(self.writer.wants(one.key) for one in logged):
            self.writer.sampled_out += len(requests)
            return
        if len(self._pending) >= MOST_PENDING:
            self.overrun += 1
            return
        joined = features if last is None else torch.cat([features, last.to(features.dtype)], -1)
        bits = joined.to(torch.bfloat16)
        (starts, counts, tokens, copied), done = self._to_host(
            (starts, counts, tokens, bits), (False, False, False, bits is not features)
        )
        for one in logged:
            one.copies += 1
        self._pending.append(
            _Copied(logged, starts, counts, widths, tokens, copied, flags, self.version, done)
        )
        if done is None:
            self.drain()

    def _write(self, step: _Copied) -> None:
        bits = step.features.view(torch.uint16).numpy()
        tokens = step.tokens.to(torch.int32).numpy()
        most, row = self.writer.most_tokens, 0
        for logged, start, count, width in zip(
            step.requests, step.starts.tolist(), step.counts.tolist(), step.width, strict=True
        ):
            logged.copies -= 1
            count = logged.committed(start, count)
            for first in range(0, count, most):
                part = slice(row + first, row + min(count, first + most))
                self.writer.write(
                    Record(
                        logged.key,
                        start + first,
                        tokens[part],
                        bits[part],
                        step.version,
                        step.flags,
                    )
                )
            row += width

    def _end(self, logged: Logged) -> None:
        if self.writer.wants(logged.key):
            nothing = np.empty((0, self.writer.feature_size), np.uint16)
            empty = np.empty(0, np.int32)
            self.writer.write(Record(logged.key, logged.end, empty, nothing, self.version, END))
