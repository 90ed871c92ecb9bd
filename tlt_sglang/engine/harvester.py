"""An engine's output for training: its harvest log, and the announcement by which sidecars find it.

After an update of the target, its embedding and head are written beside the announcement, because
the sidecar trains against them. Runs in the scheduler process of tensor-parallel rank 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tlt_sglang import upstream
from tlt_sglang.engine import hidden_states
from tlt_sglang.engine.embed_and_head import EmbedAndHead
from tlt_sglang.errors import TltError
from tlt_sglang.harvest import announce, segments
from tlt_sglang.harvest.log_size import log_bytes
from tlt_sglang.harvest.tap import Tap
from tlt_sglang.harvest.writer import Writer
from tlt_sglang.weights import files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tlt_sglang.config.settings import Config
    from tlt_sglang.harvest.announce import Announcement
    from tlt_sglang.upstream.protocols import Batch, LogitsOutput, StepResult

logger = logging.getLogger(__name__)


class Harvester:
    """Logs the hidden states of one engine and announces the log in `store`.

    `width` is the number of values per token; `announcement` is complete but for the log's path.
    Raises ConfigError or EnvironmentProblem if there can be no log.
    """

    def __init__(
        self, config: Config, store: Path, width: int, device: str, announcement: Announcement
    ) -> None:
        segments.remove_stale()
        announce.read(store)  # removes the announcements of killed engines
        self._store = store
        self._cleanup = contextlib.ExitStack()

        # The log, and the tap that fills it.
        free = segments.require_room(log_bytes(config.harvest_gb))
        writer = Writer.create(log_bytes(config.harvest_gb, width, free), width, "bfloat16")
        self._cleanup.callback(writer.close)
        writer.sampling = config.harvest_rate
        self.tap = Tap(writer, torch.device(device))
        self._cleanup.callback(self.tap.close)

        self.embed_and_head = EmbedAndHead(self._publish)

        # Only now may sidecars open it.
        self.announcement = dataclasses.replace(announcement, harvest=str(writer.path))
        path = self.announcement.write(store)
        self._cleanup.callback(announce.remove, store, path)

    def close(self) -> None:
        """Remove the announcement and the log."""
        self._cleanup.close()

    # -- around the steps ------------------------------------------------------------------------

    def log_prefill(
        self,
        batch: Batch,
        tokens: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        output: LogitsOutput,
    ) -> None:
        """Log the prompt tokens [T] that the target has read, `counts` of each request."""
        if output.hidden_states is None or (chosen := self.tap.choose(batch.reqs)) is None:
            return
        last = upstream.current().last_hidden_states(output)
        self.tap.prefill(chosen, tokens, starts, counts, output.hidden_states, last)

    def log_verify_step(self, batch: Batch, result: StepResult) -> None:
        """Log the committed tokens of a verify step; `batch` is as it was verified."""
        chosen = self.tap.choose(batch.reqs)
        if chosen is None:
            return

        # Inputs of the target: the last committed token of each request, then accepted drafts.
        size, width = len(batch.reqs), result.speculative_num_draft_tokens
        output = result.logits_output
        last = upstream.current().last_hidden_states(output)
        first = batch.spec_info.draft_token.view(size, width)[:, :1].to(torch.int64)
        sampled = result.next_token_ids.view(size, width).to(torch.int64)

        self.tap.decode(
            chosen,
            torch.cat([first, sampled[:, :-1]], dim=1),
            batch.seq_lens,
            result.accept_lens,
            output.hidden_states,
            last,
            None if last is None else _nodes(batch, result),
        )

    # -- updates of the target -------------------------------------------------------------------

    def target_changed(self, parts: Sequence[torch.Tensor], live: bool) -> None:
        """Log a new version of the target from now on, and publish its embedding and head.

        `parts` are both [V, N], or one if they are tied: `live` weights on their device, or copies.
        """
        self.tap.start_version()
        self.embed_and_head.begin(self.tap.version, parts, live)

    def _publish(self, version: int, parts: list[torch.Tensor]) -> None:
        from safetensors.torch import save

        path = announce.embed_and_head_path(self._store, version)
        data = save(dict(zip(("embedding", "head"), parts, strict=False)))
        try:
            with files.usable(self._store):
                files.write(path, data)
            before = self.announcement.embed_and_head
            self.announcement = dataclasses.replace(
                self.announcement, target_version=version, embed_and_head=str(path)
            )
            self.announcement.write(self._store)
            if before:
                Path(before).unlink(missing_ok=True)
        except TltError as error:
            logger.warning("%s Training resumes when the target is updated again.", error)

    def status(self) -> dict[str, Any]:
        """Return the counters for `GET /tlt/status`."""
        return self.tap.status()


def _nodes(batch: Batch, result: StepResult) -> torch.Tensor | None:
    """Return the node [B * W] of a verified tree that each row of a step belongs to; None for
    chains. SGLang has moved accepted rows to the front, but not the last hidden states."""
    accept_index = upstream.current().accept_index(result)
    if batch.spec_info.topk <= 1 or accept_index is None:
        return None
    width = result.speculative_num_draft_tokens
    nodes = torch.arange(len(batch.reqs) * width, device=result.accept_lens.device)
    return hidden_states.accepted_first(nodes, accept_index, width)
