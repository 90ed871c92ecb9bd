"""Answered requests in the event log, from which `tlt replay` can send them again.

A line is `{"event": "request", "time": ..., "pid": ..., "id": ..., "input_ids": [...],
"sampling_params": {...}, "weight_versions": [...], "drafter_versions": [...], "output_ids": [...],
"finish_reason": {...}}`, and further fields of the request that change its answer. The parameters
include the seed where the engine samples by seeds; versions are in the order of their use.

Runs in the main process and in each tokenizer worker. Lines are written by a thread of their own;
what a crash or a full disk loses is lost for the log only.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping, Sequence
from queue import Full, Queue
from typing import TYPE_CHECKING

from tlt_sglang.engine.telemetry import EventLog

if TYPE_CHECKING:
    from tlt_sglang.upstream.requests import Request

EVENT = "request"
QUEUED = 4096
"""Most lines that wait to be written; a disk that is slower than this loses lines."""
OPTIONS = ("custom_logit_processor", "lora_path", "max_thinking_tokens", "require_reasoning")
"""Fields of a request, besides prompt and parameters, that change its answer."""
CLOSE_SECONDS = 2.0

logger = logging.getLogger(__name__)


class RequestLog:
    """Appends answered requests to the event log at `path`.

    Raises EnvironmentProblem if the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._log = EventLog(path)
        self._queue: Queue[Mapping[str, object] | None] = Queue(QUEUED)
        self._thread: threading.Thread | None = None
        self._warned = False

    def add(
        self,
        request: Request,
        parameters: Mapping[str, object],
        output_ids: Sequence[int],
        meta_info: Mapping[str, object],
    ) -> None:
        """Add a request with its answer; one whose prompt is not token ids alone is left out."""
        from tlt_sglang.engine.online_drafter import VERSION_KEY

        if not output_ids or not _is_text(request):
            return
        line = {
            "id": meta_info["id"],
            "input_ids": request.input_ids,
            "sampling_params": {k: v for k, v in parameters.items() if k != "n"},
            **{name: value for name in OPTIONS if (value := getattr(request, name, None))},
            "weight_versions": _weight_versions(meta_info),
            "drafter_versions": meta_info.get(VERSION_KEY, []),
            "output_ids": list(output_ids),
            "finish_reason": meta_info["finish_reason"],
        }
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tlt-request-log", daemon=True)
            self._thread.start()
            atexit.register(self.close)
        try:
            self._queue.put_nowait(line)
        except Full:
            self._warn("the disk is too slow")

    def close(self) -> None:
        """Write what waits, and end the thread."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._log.add(EVENT, **line)
            except (TypeError, ValueError) as error:
                self._warn(str(error))
                continue
            self._log.write()
            if self._log.lost:
                self._warn("the file cannot be written")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Requests are missing in the event log: %s.", reason)


def _weight_versions(meta_info: Mapping[str, object]) -> list[object]:
    """Return the versions of the target that computed an answer."""
    spans = meta_info.get("weight_versions")
    if not isinstance(spans, list):
        return [meta_info.get("weight_version")]
    return [span["version"] for span in spans]


def _is_text(request: Request) -> bool:
    """Return whether token ids are the whole prompt: no media, embeddings or earlier turns."""
    return (
        request.input_ids is not None
        and request.input_embeds is None
        and request.session_params is None
        and not request.contains_mm_input()
    )
