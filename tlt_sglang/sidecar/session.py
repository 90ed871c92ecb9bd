"""Training of one drafter in the sidecar: reads logs, trains, gates, saves, until it is stopped."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tlt_sglang.config.sources import engine_device
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.feed import Feed
from tlt_sglang.sidecar.group import Group
from tlt_sglang.sidecar.learner import Learner
from tlt_sglang.sidecar.learner_settings import LearnerSettings
from tlt_sglang.sidecar.process import log
from tlt_sglang.sidecar.publisher import Publisher
from tlt_sglang.sidecar.target import TargetFollower
from tlt_sglang.training.checkpoints import Checkpoints
from tlt_sglang.training.models import Algorithm, DraftConfig, Drafter
from tlt_sglang.weights import describe, files
from tlt_sglang.weights.lease import Lease

if TYPE_CHECKING:
    from tlt_sglang.harvest.announce import Announcement
    from tlt_sglang.sidecar.process import Sidecar
    from tlt_sglang.sidecar.service import SidecarOptions

BUFFER_SHARE, ASSEMBLED_SHARE = 0.6, 0.2
"""Shares of the sidecar's memory; the rest is for weights, optimizer and a micro-batch."""
DEEPEST = 5
"""Most draft steps that are simulated: each takes the time of the first one once more."""
MICRO_SHARE = 0.2
"""Share of the preemption time that a micro-batch may take."""
IDLE_SECONDS = 0.05
SAVE_SECONDS = 60.0


class TrainingSession:
    """Trains the drafter of `engine`, and of others with the same drafter, in this process."""

    def __init__(self, sidecar: Sidecar, engine: Announcement) -> None:
        self.sidecar = sidecar
        options, store = sidecar.options, sidecar.store
        self.device = _set_up_device(options)

        # The drafter, as the engine describes it.
        folder = Path(engine.drafter)
        target_config = describe.target_config(engine.model)
        expected = describe.expected(folder, target_config, "F32")
        draft_ids = describe.draft_ids(folder, target_config["vocab_size"])
        algorithm = _algorithm(expected.architecture)
        config = DraftConfig.for_target(target_config, algorithm, len(draft_ids))
        drafter = Drafter(config)
        _load(drafter, describe.load(folder), folder)

        # The data, within its share of the memory.
        memory = int(options.memory_gb * 1e9)
        self.buffer = Buffer(int(BUFFER_SHARE * memory), options.seed)
        self.feed = Feed(
            store.root,
            self.buffer,
            target_config["hidden_size"],
            config.features,
            assembled=int(ASSEMBLED_SHARE * memory),
            key=options.coordinator_key,
        )

        # The training, from where an earlier process stopped.
        torch.manual_seed(options.seed)
        own_head = describe.own_head(folder) if algorithm == "eagle3" else None
        self.target = TargetFollower(draft_ids, own_head, config.vocab_size, self.device)
        self.learner = Learner(
            drafter.to(self.device),
            self.target.load(engine),
            self.buffer,
            _settings(options, self.device, algorithm, engine.depth),
            self.device,
        )
        self.checkpoints = Checkpoints(store.root / "work" / "checkpoints")
        self._saved = time.monotonic()
        self.lease = Lease(store.root)
        self._epoch: int | None = None
        self._allowed = False
        self.buffer.stream = files.owned("")
        self.group = Group(store.root, self.learner)
        self.publisher = Publisher(
            self.learner, store, self.lease, expected, folder, sidecar.scalars
        )
        if self._holds():
            log(f"training an {algorithm} drafter of {engine.model} on {self.device}")
        else:
            log(f"another sidecar trains for {store.root}; this one waits")

    def run(self) -> None:
        """Train until the process is stopped; what was learned is saved then."""
        sidecar, learner = self.sidecar, self.learner
        try:
            while not sidecar.is_over:
                self.feed.pump()
                self._follow_target()
                training = self._has_work() and learner.micro_step()
                if training and self._epoch is not None:
                    self._lead(self._epoch)
                elif training:
                    self.group.contribute()
                else:
                    time.sleep(IDLE_SECONDS)
                if self._epoch is not None:
                    sidecar.report(partial(self._status, training))
        finally:
            self.feed.close()
            self.group.close()
            if self._epoch is not None and self.lease.hold(now=True):
                self._hand_over()
                sidecar.report(partial(self._status, False), now=True)
            self.lease.release()

    def _has_work(self) -> bool:
        """Return whether to train now: as the holder of the lease, or as a helper."""
        may_train = self._may_train() or (
            self._allowed and self._epoch is None and self.group.follow()
        )
        return may_train and self.learner.can_train() and self._is_ready

    def _lead(self, epoch: int) -> None:
        """Do what the holder of the lease does after a micro-batch."""
        if self.lease.is_wanted:
            self.group.lead(epoch)
        else:
            self.group.pause()
        if self.learner.gate_is_due():
            self.publisher.run_gate(self._may_train)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def _may_train(self) -> bool:
        """Return whether this process may use its device, and has the lease.

        A device that has to be left is left first; then another sidecar that waits may go on.
        """
        self._allowed = allowed = self.sidecar.may_train(self.learner.leave)
        if allowed or self._epoch is not None:
            holds = self._holds()
            if holds and not allowed and self.lease.is_wanted:
                self._hand_over()
            return holds and allowed
        self.lease.release()  # no longer in the way of those that may train
        return False

    def _holds(self) -> bool:
        """Return whether this process has the lease; go on where its last holder stopped."""
        try:
            self.lease.hold()
        except EnvironmentProblem as error:
            log(str(error))
        epoch = self.lease.epoch
        if epoch != self._epoch:
            if epoch is None:
                log("another sidecar has taken over")
            else:
                self._take_over()
            # Helpers draw otherwise than the holder, and it as in a run without them.
            self.buffer.stream = files.owned("") if epoch is None else ""
            self._epoch = epoch
        return epoch is not None

    def _take_over(self) -> None:
        self.publisher.follow()
        if self.checkpoints.load(self.learner.state, self.learner.restore):
            log(f"continuing from step {self.learner.step}")

    def _hand_over(self) -> None:
        """Save what was learned, and leave the rest to whoever takes the lease next."""
        if self.learner.step:
            self._save()
            with contextlib.suppress(EnvironmentProblem):  # the one before is complete
                self.checkpoints.finish()
        self.lease.release()
        self._epoch = None

    @property
    def _is_ready(self) -> bool:
        """Return whether embedding and head are those of the version that the buffer holds."""
        return self.target.version == self.buffer.target_version

    def _follow_target(self) -> None:
        frozen = self.target.update(self.feed.engines)
        if frozen is not None:
            self.learner.frozen = frozen
            if self.target.version < self.buffer.target_version:
                self.buffer.clear()  # all engines have started again, and count from 0
            self.buffer.move_on(self.target.version, self.feed.rl_step)
            log(f"the target is at version {self.target.version}")
            if self._epoch is not None:
                self.publisher.follow()  # perhaps engines have rejected what training goes on from

    def _save(self) -> None:
        self._saved = time.monotonic()
        try:
            self.checkpoints.save(self.learner.step, self.learner.state())
        except EnvironmentProblem as error:
            log(str(error))

    def _status(self, training: bool) -> Mapping[str, object]:
        learner, publisher = self.learner, self.publisher
        return {
            "training": training,
            "step": learner.step,
            "tokens": learner.tokens,
            "seconds": round(learner.seconds, 1),
            "skipped": learner.skipped,
            "loss": round(learner.loss, 4),
            "version": publisher.version,
            "published": publisher.published,
            "helpers": self.group.helpers,
            "gate": None if publisher.last_gate is None else asdict(publisher.last_gate),
            "buffer": self.buffer.status(),
            "feed": self.feed.status(),
        }


def _algorithm(architecture: str) -> Algorithm:
    if architecture == "eagle":
        return "eagle"
    if architecture == "eagle3":
        return "eagle3"
    raise ConfigError(
        f"The sidecar cannot train a drafter of the kind {architecture}; use an EAGLE or EAGLE-3 "
        "drafter, or start the engine without --tlt-store."
    )


def _settings(
    options: SidecarOptions, device: torch.device, algorithm: Algorithm, depth: int
) -> LearnerSettings:
    """Return the settings of the learner on `device`, for drafts of up to `depth` steps."""
    micro_seconds = None
    if options.coordinator is not None:
        # A micro-batch that is under way runs on beside an engine that wants the device.
        micro_seconds = options.preempt_ms / 1000 * MICRO_SHARE
    return LearnerSettings(
        steps=1 if algorithm == "eagle" else min(DEEPEST, max(LearnerSettings.steps, depth)),
        learning_rate=options.learning_rate,
        batch_tokens=options.batch_tokens,
        gate_steps=options.gate_steps,
        micro_seconds=micro_seconds,
        seed=options.seed,
        bfloat16=_bfloat16_is_faster(device),
    )


def _load(drafter: Drafter, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Load a checkpoint's weights; raise ConfigError where they are not the drafter's."""
    wrong = drafter.unfit(weights) + sorted(weights.keys() - drafter.state_dict().keys())
    if wrong:
        raise ConfigError(
            f"The sidecar cannot train the drafter {folder}: {wrong[0]} does not fit. Start the "
            "sidecar's engine with a drafter made by tlt train, or without one."
        )
    drafter.take(weights)


def _set_up_device(options: SidecarOptions) -> torch.device:
    """Return the device to train on, with this process's cores, priority and threads set."""
    if engine_device() == "cuda" and torch.cuda.is_available():
        return torch.device("cuda")
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    if options.coordinator is None:
        os.nice(10)  # with a coordinator the engine is idle, and a micro-batch should end soon
    torch.set_num_threads(options.threads)
    return torch.device("cpu")


def _bfloat16_is_faster(device: torch.device) -> bool:
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())
