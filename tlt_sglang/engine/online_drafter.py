"""The online drafter's part of one engine: harvesting, hot swap, and reports to the coordinator.

Present where `--tlt-store` names a store of drafter versions. The speculation step calls it around
decode steps, and the scheduler when it is idle. Whatever fails outside the engine (no sidecar, no
coordinator, a bad version, a full disk) affects only how fresh the drafter is.

Runs in the scheduler process, on every tensor-parallel rank; rank 0 harvests and reports.
"""

from __future__ import annotations

import contextlib
import time
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang import upstream
from tlt_sglang.engine import drafter_weights, first_rank
from tlt_sglang.engine.harvester import Harvester
from tlt_sglang.engine.load_report import LoadReport, device_name
from tlt_sglang.engine.served import features_width
from tlt_sglang.engine.to_device import to_host
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.models.seed import SEED
from tlt_sglang.weights import describe
from tlt_sglang.weights.store import Store
from tlt_sglang.weights.swap import Swap

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tlt_sglang.config.settings import Config, Device
    from tlt_sglang.harvest.tap import Tap
    from tlt_sglang.upstream.protocols import (
        Batch,
        EagleWorker,
        LogitsOutput,
        Request,
        Scheduler,
        StepResult,
    )
    from tlt_sglang.upstream.weight_updates import UpdateManager

VERSION_KEY = "drafter_version"
"""Key in a request's `meta_info`: the versions that drafted for it, in order."""
UPDATE_SECONDS = 1.0
"""Time after an update of the target in which an idle engine expects another part of it: a version
would begin with each part, and the next part would wait until embedding and head are copied."""


class OnlineDrafter:
    """Harvests for training, and swaps published versions into the drafter of SGLang's `worker`.

    Raises ConfigError or EnvironmentProblem if the drafter, the target or the store does not allow
    it.
    """

    def __init__(self, config: Config, device: Device, worker: EagleWorker) -> None:
        assert config.store_path is not None
        self._worker, self._device = worker, device
        self.store = Store(config.store_path, cache=config.store_cache_path)
        self.harvester: Harvester | None = None
        """Present on rank 0, unless harvesting is off."""
        self._harvests = config.harvests
        self._committed = 0
        self._updater: UpdateManager | None = None
        self._target_updated, self._updated = False, float("-inf")
        self._cleanup = contextlib.ExitStack()

        # Describe what runs: the sidecar comes to the same description from the same folder.
        draft_runner = worker._draft_worker.draft_runner
        args = draft_runner.server_args
        assert args.speculative_draft_model_path is not None
        folder = Path(args.speculative_draft_model_path)
        self.is_seed = (folder / SEED).exists()
        """True if version 0 is an untrained seed, which must not draft."""
        target_config = describe.target_config(args.model_path)
        expected = describe.expected(
            folder, target_config, drafter_weights.dtype_name(draft_runner)
        )

        # Swap: a version that is already published drafts from the first step on.
        self.swap = Swap(
            self.store,
            expected,
            describe.load(folder),
            drafter_weights.copier(worker, device),
            stage=drafter_weights.stager(device),
            agree=first_rank.agreement(),
        )
        self.swap.look()
        self.swap_in()

        # Harvest: [three layers | last] for EAGLE-3, the last hidden state for EAGLE.
        if config.harvests and first_rank.is_first():
            announcement = Announcement(
                harvest="",
                device=device_name(config, device),
                model=str(Path(args.model_path).resolve()),
                drafter=str(folder.resolve()),
                seed=self.is_seed,
                depth=max(
                    (strategy.num_steps for strategy in config.pool),
                    default=worker._draft_worker.speculative_num_steps,
                ),
            )
            hidden_size = target_config["hidden_size"]
            width = features_width(draft_runner, expected.architecture, hidden_size)
            target_device = worker.target_worker.model_runner.device
            self.harvester = Harvester(config, self.store.root, width, target_device, announcement)
            self._cleanup.callback(self.harvester.close)
        # Not atexit: processes of multiprocessing end without it.
        Finalize(None, self.close, exitpriority=0)

    @property
    def tap(self) -> Tap | None:
        """Return what fills the harvest log; None where this rank does not harvest."""
        return None if self.harvester is None else self.harvester.tap

    def begin(self, updater: UpdateManager) -> None:
        """Start watching the store; SGLang has captured its graphs, and updates with `updater`.

        While CUDA captures, no other thread may allocate memory.
        """
        self._updater = updater
        self.swap.begin()
        self._cleanup.callback(self.swap.end)

    def report_load(self, config: Config, scheduler: Scheduler) -> None:
        """Report this engine's load to the coordinator, if there is one, until it is closed."""
        if config.coordinator is not None:
            report = LoadReport(config, self._device, scheduler, lambda: self._committed)
            self._cleanup.callback(report.close)

    def close(self) -> None:
        """Stop the threads, and remove the log and the announcement."""
        self._cleanup.close()

    # -- around the steps ------------------------------------------------------------------------

    @property
    def can_draft(self) -> bool:
        """Return whether the drafter has been trained; an untrained seed must not draft."""
        return not self.is_seed or self.swap.version > 0

    def swap_in(self) -> None:
        """Take a new version of the target or of the drafter, before a decode step or a prefill.

        Not while weights are released or being updated: that may be between two buckets, and the
        drafter would be of two versions. Every rank has to call it as often as the others, as they
        agree on a version by counting; they have the same updates.
        """
        if not self._writable:
            return
        if self._target_updated:
            self._begin_target_version()
        self.swap.swap_in()

    @property
    def _writable(self) -> bool:
        return self._updater is None or drafter_weights.writable(self._updater)

    def idle(self) -> None:
        """Use the time in which nothing runs: log the ends of requests, take a new version."""
        if self.tap is not None:
            self.tap.drain()
        more_may_come = self._target_updated and time.monotonic() - self._updated < UPDATE_SECONDS
        if self.swap.is_single_rank and not more_may_come:
            self.swap_in()

    def log_prefill(
        self,
        batch: Batch,
        tokens: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        output: LogitsOutput,
    ) -> None:
        """Log the prompt tokens [T] that the target has read: `counts` per request, from position
        `starts` on."""
        if self.harvester is not None:
            self.harvester.log_prefill(batch, tokens, starts, counts, output)

    def log_verify_step(self, batch: Batch, result: StepResult) -> None:
        """Log a verified step, before the drafter's own pass changes `batch`."""
        for request in batch.reqs:
            _add_version(request, self.swap.version)
        if self.harvester is not None and batch.reqs:
            self.harvester.log_verify_step(batch, result)

    def count_accepted(
        self,
        accepted: Sequence[int],
        request_ids: Sequence[str],
        strategy: str | None,
        matched: Sequence[int] = (),
        sampled: Sequence[bool] = (),
    ) -> None:
        """Count the drafts accepted in a step, for each of its requests.

        `strategy` names what drafted, and is None where that was not the drafter; rows in `matched`
        were drafted for by n-gram matches instead. Greedy requests are not compared with `sampled`
        ones, of which fewer drafts are accepted; if empty, all are greedy.
        """
        self._committed += len(accepted) + sum(accepted)
        if strategy is None or len(request_ids) != len(accepted):
            return
        rows_by_name: dict[str, list[int]] = {}
        for row in range(len(accepted)):
            if row not in matched:
                name = f"{strategy} sampled" if sampled and sampled[row] else strategy
                rows_by_name.setdefault(name, []).append(row)
        for name, rows in rows_by_name.items():
            self.swap.observe(
                [request_ids[row] for row in rows], [accepted[row] for row in rows], name
            )

    # -- updates of the target -------------------------------------------------------------------

    def mark_target_updated(self) -> None:
        """Note that target weights have changed; more may follow before the next step."""
        self._target_updated, self._updated = True, time.monotonic()

    def _begin_target_version(self) -> None:
        self._target_updated = False
        self.swap.target_changed()
        if not self._harvests:
            return

        # A single rank has both whole; else all ranks gather them, and the first one publishes.
        model: Any = self._worker.target_worker.model_runner.model
        parts: list[torch.Tensor] = [part.detach() for part in model.get_embed_and_head()]
        if parts[0].data_ptr() == parts[1].data_ptr():
            parts = parts[:1]
        if not self.swap.is_single_rank:
            rows = [first_rank.gather(to_host(part.bfloat16())) for part in parts]
            parts = [part for part in rows if part is not None]
        if self.harvester is not None:
            self.harvester.target_changed(parts, live=self.swap.is_single_rank)

    def finish_copies(self) -> None:
        """Wait until nothing reads the target's weights any more, which are about to change or to
        be released."""
        if self.harvester is not None:
            self.harvester.embed_and_head.wait()

    # -- admin -----------------------------------------------------------------------------------

    def act(self, command: dict[str, Any]) -> None:
        """Carry out a command of `POST /tlt/drafter`; `admin.drafter_command` has its forms."""
        if command.get("rollback"):
            self.swap.reject()
        else:
            self.swap.pin(command["version"])

    def status(self) -> dict[str, Any]:
        """Return this part of `GET /tlt/status`."""
        return {
            "store": str(self.store.root),
            "drafter_version": self.swap.version,
            "drafter_ready": self.can_draft,
            "swap": self.swap.status(),
            "harvest": None if self.harvester is None else self.harvester.status(),
        }


def _add_version(request: Request, version: int) -> None:
    """Add the version that drafts to what SGLang reports of a request."""
    if request.customized_info is None:
        request.customized_info = {}
    if VERSION_KEY not in request.customized_info:
        request.customized_info[VERSION_KEY] = upstream.current().request_values()
    versions = request.customized_info[VERSION_KEY]
    if not versions or versions[-1] != version:
        versions.append(version)
