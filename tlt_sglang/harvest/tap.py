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
from typing import Any, Protocol

import numpy as np
import torch

from tlt_sglang.harvest.record import END, PROMPT, Record, request_key
from tlt_sglang.harvest.writer import Writer

MOST_PENDING = 64
"""Most steps with a copy under way; further ones are dropped and counted."""


class LoggedRequest(Protocol):
    """SGLang's request, as far as the log needs it."""

    @property
    def rid(self) -> str: ...

    @property
    def origin_input_ids(self) -> Sequence[int]: ...

    @property
    def output_ids(self) -> Sequence[int]: ...

    @property
    def finished_len(self) -> int | None:
        """Output tokens up to the end of the text, where a stop has cut them."""

    def finished(self) -> bool: ...


class _Event(Protocol):
    """A CUDA event."""

    def query(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Copied:
    """One step on its way to the log; T tokens of B requests, row after row."""

    requests: list[str]
    starts: torch.Tensor  # [B] positions of the first token of each
    counts: torch.Tensor  # [B] tokens of each that count
    width: list[int]  # B: rows of each, the first `counts` of which count
    tokens: torch.Tensor  # [T]
    features: torch.Tensor  # [T, F] bfloat16
    flags: int
    version: int
    done: _Event | None
    """The CUDA event of the copy; None where it is complete already."""


class Tap:
    """Feeds the log of one engine; `version` counts the versions of the target's weights."""

    def __init__(self, writer: Writer, device: torch.device) -> None:
        self.writer = writer
        self.version = 0
        self.overrun = 0
        """Number of steps dropped because too many copies were under way."""
        self.paused = False
        """True while requests are ignored, as those of calibration are not a user's."""
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[_Copied] = deque()
        self._running: dict[str, LoggedRequest] = {}  # by id
        self._keys: dict[str, bytes] = {}

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
        features [T, F] and, for EAGLE-3, last hidden states [T, N]."""
        self._take(
            requests,
            torch.tensor(starts),
            torch.tensor(counts),
            list(counts),
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
        if not self._pending:
            self._end([name for name, request in self._running.items() if request.finished()])

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
        for request in requests:
            self._running.setdefault(request.rid, request)
        if not any(self.writer.wants(self._key(request.rid)) for request in requests):
            self.writer.sampled_out += len(requests)
            return
        if len(self._pending) >= MOST_PENDING:
            self.overrun += 1
            return
        if last is not None:
            features = torch.cat([features, last.to(features.dtype)], dim=-1)
        step = (starts, counts, tokens, features.to(torch.bfloat16))
        (starts, counts, tokens, features), done = self._to_host(step)
        names = [request.rid for request in requests]
        self._pending.append(
            _Copied(names, starts, counts, widths, tokens, features, flags, self.version, done)
        )
        if done is None:
            self.drain()

    def _to_host(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[Sequence[torch.Tensor], _Event | None]:
        if self._stream is None:
            return tensors, None
        # What a graph or the scheduler writes over in the next step is taken on its own stream.
        kept = [tensor.clone() if tensor.is_cuda else tensor for tensor in tensors]
        self._stream.wait_stream(torch.cuda.current_stream())
        copies = []
        with torch.cuda.stream(self._stream):
            for tensor in kept:
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(pinned.copy_(tensor, non_blocking=True))
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            cuda: Any = torch.cuda
            done = cuda.Event()
            done.record(self._stream)
        return copies, done

    def _write(self, step: _Copied) -> None:
        bits = step.features.view(torch.uint16).numpy()
        tokens = step.tokens.to(torch.int32).numpy()
        row = 0
        for name, start, count, width in zip(
            step.requests, step.starts.tolist(), step.counts.tolist(), step.width, strict=True
        ):
            part = slice(row, row + count)
            row += width
            key = self._key(name)
            if count:
                record = Record(key, start, tokens[part], bits[part], step.version, step.flags)
                self.writer.write(record)

    def _end(self, names: Sequence[str]) -> None:
        for name in names:
            request, key = self._running.pop(name), self._keys.pop(name, None) or request_key(name)
            if self.writer.wants(key):
                length = request.finished_len
                if length is None:
                    length = len(request.output_ids)
                # The last token was sampled, but never read by the target.
                end = len(request.origin_input_ids) + length - 1
                nothing = np.empty((0, self.writer.feature_size), np.uint16)
                empty = np.empty(0, np.int32)
                self.writer.write(Record(key, end, empty, nothing, self.version, END))

    def _key(self, name: str) -> bytes:
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = request_key(name)
        return key
