"""The object that joins TLT's parts inside one engine process, and what it tells of itself.

One per process that has TLT on, made by the plugin. In the scheduler process it is attached to
SGLang's scheduler once that has been built. Imports nothing of SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from tlt_sglang import __version__
from tlt_sglang.config import Config, Device
from tlt_sglang.patcher import Patcher


@dataclass
class Engine:
    """TLT in this process: its configuration, its patches, and SGLang's scheduler if here."""

    config: Config
    device: Device
    patcher: Patcher
    scheduler: Any = field(default=None, repr=False)
    rollout: Any = field(default=None, repr=False)
    """`tlt_sglang.rollout.Rollout`, where there are several strategies."""
    rounds: int = 0
    """Verify steps so far, one for each request of a batch."""
    committed: int = 0
    """Tokens those steps committed."""

    def attach(self, scheduler: Any) -> None:
        """Called when SGLang's scheduler stands; every patch must be in force by now.

        Raises PatchError if another plugin has undone one.
        """
        self.patcher.verify()
        self.scheduler = scheduler

    def begin_rollout(self, worker: Any) -> None:
        """SGLang's EAGLE worker stands; several strategies get their states now."""
        pool = self.config.pool
        if len(pool) < 2:
            return
        from tlt_sglang.rollout import Rollout, agreed
        from tlt_sglang.strategy import policies
        from tlt_sglang.strategy.driver import Driver

        driver = Driver(agreed(policies.make(self.config, pool), pool))
        self.rollout = Rollout(worker, driver, pool, self.config.ngram_memory_mb)

    def observe(self, num_correct_drafts: Sequence[int]) -> None:
        """A verify step is complete: drafts accepted per request, the bonus token not counted."""
        self.rounds += len(num_correct_drafts)
        self.committed += len(num_correct_drafts) + sum(num_correct_drafts)
        if self.rollout is not None:
            self.rollout.verified(num_correct_drafts)

    def status(self) -> dict[str, Any]:
        """What `GET /tlt/status` reports for this process; JSON-able."""
        status: dict[str, Any] = {"pid": os.getpid(), "patches": self.patcher.report()}
        if self.scheduler is not None:
            status |= _speculation(self.scheduler)
            if self.rollout is not None:
                status |= {"policy": self.config.policy} | self.rollout.report()
            status["rounds"] = self.rounds
            if self.rounds:
                status["accept_length"] = round(self.committed / self.rounds, 4)
        return status


current: Engine | None = None
"""The engine of this process; None while TLT is off."""


def start(engine: Engine) -> None:
    """Make `engine` the one of this process."""
    global current
    current = engine


def versions() -> dict[str, str]:
    """Versions a bug report needs."""
    return {"tlt_sglang": __version__} | {
        name: version(name) for name in ("sglang", "torch", "transformers")
    }


def _speculation(scheduler: Any) -> dict[str, Any]:
    """Strategy and drafter, read off SGLang's scheduler."""
    args = scheduler.server_args
    worker = scheduler.draft_worker
    status: dict[str, Any] = {"strategy": "off", "drafter": None, "accept_length": None}
    if worker is None:
        return status
    algorithm = str(args.speculative_algorithm or "").lower()
    tokens = worker.speculative_num_draft_tokens
    if algorithm == "ngram":
        status |= {"strategy": f"ngram:{tokens}", "drafter": "ngram"}
    else:
        shape = f"{worker.speculative_num_steps}x{worker.topk}x{tokens}"
        status |= {
            "strategy": f"{algorithm}:{shape}",
            "drafter": args.speculative_draft_model_path,
        }
    return status
