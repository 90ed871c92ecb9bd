"""The object that joins TLT's parts inside one engine process, and reports on them.

One per process that has TLT on, made by the plugin. In the scheduler process it is attached to
SGLang's scheduler once that has been built. Importing it imports nothing of SGLang.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tlt_sglang import __version__
from tlt_sglang.config.settings import VARIABLE, Config, Device
from tlt_sglang.config.sglang_arguments import settle
from tlt_sglang.engine import build, first_rank, served
from tlt_sglang.engine.answers import Answers
from tlt_sglang.engine.clients import Clients
from tlt_sglang.engine.step import SpeculationStep
from tlt_sglang.engine.weight_sync import WeightSync
from tlt_sglang.models import seed
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.strategy.strategies import parse

if TYPE_CHECKING:
    import torch

    from tlt_sglang.cpu.drafting import Propose
    from tlt_sglang.sampling.coupled import CoupledSampling
    from tlt_sglang.upstream.protocols import DraftWorker, EagleWorker, SamplingInfo, Scheduler


@dataclass
class Engine:
    """TLT in this process: its configuration, its patches, and SGLang's scheduler if here."""

    config: Config
    device: Device
    patcher: Patcher
    unsettled: Config | None = None
    """The configuration before its open choices were made."""
    scheduler: Scheduler | None = field(default=None, repr=False)
    coupled: CoupledSampling | None = field(default=None, repr=False)
    """Present in the scheduler process where drafter and target share their noise."""
    step: SpeculationStep = field(default_factory=SpeculationStep, repr=False)
    """TLT's part in every decode step; its parts are built with SGLang's worker."""
    clients: Clients = field(default_factory=Clients, repr=False)
    """The clients of this engine, in the main process."""
    weight_sync: WeightSync = field(default_factory=WeightSync, repr=False)
    """The updates of the weights in the scheduler process."""
    _answers: Answers | None = field(default=None, repr=False)

    def settle(self, args: Any) -> None:
        """Choose what the configuration leaves open, for this process and those it starts.

        Called in the process that starts SGLang, with its ServerArgs. Another engine in the same
        process chooses anew.
        """
        self.unsettled = self.unsettled or self.config
        if args.speculative_draft_model_path is None:
            args.speculative_draft_model_path = self.unsettled.drafter
        if seed.grows(self.unsettled, args):
            args.speculative_draft_model_path = str(seed.make(args.model_path, self.unsettled))
        settled = settle(self.unsettled, args, self.device)
        if settled != self.config:
            self.config = settled
            os.environ[VARIABLE] = settled.to_json()
        self._answers = None
        if settled.log_requests:
            _ = self.answers  # the log must open

    @property
    def is_coupled(self) -> bool:
        """True if a seed decides the answer: target and drafts are chosen by the same noise."""
        return self.config.sampling == "coupled"

    @property
    def answers(self) -> Answers:
        """The seeds and the log of requests, in the main process; built at its first use."""
        if self._answers is None:
            log = self.config.events if self.config.log_requests else None
            self._answers = Answers(self.is_coupled, log)
        return self._answers

    # -- what SGLang's start calls, in this order ------------------------------------------------

    def begin_scheduler(self, random_seed: int) -> None:
        """Prepare for SGLang's scheduler, which is about to be built."""
        if self.is_coupled:
            from tlt_sglang.sampling.coupled import CoupledSampling

            self.coupled = CoupledSampling(random_seed)

    def begin_capture(self, worker: EagleWorker) -> None:
        """Prepare for the graphs of SGLang's EAGLE worker, which are about to be captured.

        Raises ConfigError if the worker or its drafter excludes what is configured.
        """
        served.check(self.config, self.device, worker)
        self.step.noise = build.draft_noise(self.config, self.device, worker)

    def build_step(self, worker: EagleWorker) -> None:
        """Build the parts of the speculation step; SGLang's EAGLE worker stands."""
        config, step = self.config, self.step
        if self.device == "cpu" and config.draft_dtype == "auto":
            build.narrow_drafter(worker)
        if config.store is not None:
            from tlt_sglang.engine.online_drafter import OnlineDrafter

            step.online_drafter = OnlineDrafter(config, self.device, worker)
        if len(config.pool) > 1:
            step.telemetry = build.telemetry(config, config.pool)
            step.pool = build.pool(config, self.device, worker, step.telemetry, step.online_drafter)

    def attach(self, scheduler: Scheduler) -> None:
        """Attach to SGLang's scheduler, which has been built; every patch must be in force by now.

        Raises PatchError if another plugin has undone one, and ConfigError if a part that is
        configured did not come up.
        """
        self.patcher.verify()
        served.require_parts(self.config, self.step, scheduler.draft_worker)
        self.scheduler = scheduler
        if self.step.telemetry is None and scheduler.draft_worker is not None:
            strategy = parse(str(_speculation(scheduler)["strategy"]))
            self.step.telemetry = build.telemetry(self.config, [strategy])
        if self.step.online_drafter is not None:
            self.step.online_drafter.begin(scheduler.weight_updater)
            if first_rank.is_first():
                self.step.online_drafter.report_load(self.config, scheduler)

    # -- what a decode step asks -----------------------------------------------------------------

    def proposals(
        self, worker: DraftWorker, info: SamplingInfo, rows: torch.Tensor | None = None
    ) -> Propose | None:
        """Return how drafts are chosen with the target's noise, for the requests `rows` [R] of a
        batch or all of them; None where they are chosen without it."""
        if self.coupled is None:
            return None
        from tlt_sglang.sampling import coupled

        return coupled.proposals(info, worker.hot_token_id, rows)

    # -- admin -----------------------------------------------------------------------------------

    def act(self, command: dict[str, Any]) -> bool:
        """Carry out a command of `POST /tlt/...` (see `admin`); return whether that is possible."""
        pool, online = self.step.pool, self.step.online_drafter
        if "strategy" in command and pool is not None:
            pool.pin(int(command["strategy"]))
        elif "calibrate" in command and pool is not None:
            pool.calibrate(command["calibrate"])
            if online is not None and online.tap is not None:
                online.tap.paused = command["calibrate"]
        elif "drafter" in command and online is not None:
            online.act(command["drafter"])
        elif "harvest" in command and online is not None and online.tap is not None:
            online.tap.writer.sampling = command["harvest"]
        else:
            return False
        return True

    def status(self) -> dict[str, Any]:
        """Return this process's part of `GET /tlt/status`; JSON-able."""
        status: dict[str, Any] = {"pid": os.getpid(), "patches": self.patcher.report()}
        if self.scheduler is None:
            return status
        status |= _speculation(self.scheduler)
        updates = self.weight_sync.status(self.scheduler.weight_updater)
        status["weight_updates"] = updates | self.step.accept_watch.status()
        if self.step.pool is not None:
            status |= {"policy": self.config.policy} | self.step.pool.report()
        status |= self._counts()
        if self.step.online_drafter is not None:
            status |= self.step.online_drafter.status()
        return status

    def _counts(self) -> dict[str, Any]:
        telemetry = self.step.telemetry
        if telemetry is None:
            return {"verify_steps": 0}
        tallies = telemetry.tallies.values()
        verify_steps = sum(tally.verify_steps for tally in tallies)
        counts: dict[str, Any] = {"strategies": telemetry.report(), "verify_steps": verify_steps}
        if verify_steps:
            accepted = sum(tally.accepted for tally in tallies)
            counts["accept_length"] = round(1 + accepted / verify_steps, 4)
        return counts


current: Engine | None = None
"""The engine of this process; None while TLT is off."""


def start(engine: Engine) -> None:
    """Make `engine` the one of this process."""
    global current
    current = engine


def require() -> Engine:
    """Return the engine of this process; patches are only in force where there is one."""
    assert current is not None
    return current


def versions() -> dict[str, str]:
    """Return the versions that a bug report needs."""
    return {"tlt_sglang": __version__} | {
        name: version(name) for name in ("sglang", "torch", "transformers")
    }


def _speculation(scheduler: Scheduler) -> dict[str, Any]:
    """Return strategy and drafter as SGLang's scheduler has them."""
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
