"""The training loop of `tlt train`: packed batches, warm-up and cosine, one process or several.

Deterministic for a seed: the order of batches is a function of seed and epoch, and `state` returns
all state there is, so that an interrupted and resumed run ends with the same weights, bit by bit,
as an uninterrupted one.

With several processes (torchrun), FSDP2 shards parameters, gradients and optimizer state, and every
process takes the batches of its rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.batches import PackedBatch, pack
from tlt_sglang.training.losses import LossName
from tlt_sglang.training.models import Drafter
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.step import StepSettings, TrainingStep

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainerSettings:
    """The settings of offline training."""

    steps: int = 3
    """Simulated draft steps (training-time test); 1 for EAGLE as published."""
    epochs: int = 4
    minutes: float | None = None
    """Training time after which to end, instead of `epochs`."""
    batch_tokens: int = 2048
    """Token budget of a packed batch."""
    accumulate: int = 1
    """Batches of one optimizer step, per process."""
    learning_rate: float = 1e-3
    warmup: float = 0.03
    """Share of the run in which the learning rate rises."""
    floor: float = 0.02
    """Final learning rate, as a share of the highest."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.5
    """Norm that gradients are clipped to."""
    seed: int = 0
    precision: Precision = "auto"
    """Precision of matrix products: auto is bfloat16 on CUDA and float32 elsewhere. CPUs with
    AVX512-BF16 or AMX are twice as fast with bfloat16."""
    loss: LossName = "soft"
    """Loss of predicted tokens: `soft` cross-entropy, or `lk`, which aims at acceptance."""

    def step_settings(self, device: torch.device) -> StepSettings:
        """Return the settings of the training step on `device`."""
        automatic = self.precision == "auto" and device.type == "cuda"
        return StepSettings(
            accumulate=self.accumulate,
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip=self.clip,
            bfloat16=automatic or self.precision == "bfloat16",
            loss=self.loss,
        )


@dataclass
class Progress:
    """The position of a run in its data; part of its checkpoints."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Index of the next batch in the epoch, counted over all processes."""
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The figures of one optimizer step."""

    progress: Progress
    loss: float
    accuracy: list[float]
    """Share of likeliest drafts that are right, of each simulated step."""
    tokens_per_s: float
    done: float
    """Share of the run that is complete."""


class Trainer:
    """Trains `drafter` on `sequences`, whose `lengths` are available without loading them."""

    def __init__(
        self,
        drafter: Drafter,
        frozen: Frozen,
        sequences: Sequence[TokenSequence[Tensor]],
        lengths: Sequence[int],
        settings: TrainerSettings,
        device: torch.device,
    ) -> None:
        self.drafter, self.frozen, self.settings, self.device = drafter, frozen, settings, device
        self.sequences, self.lengths = sequences, lengths
        self.progress = Progress()
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self._step = TrainingStep(drafter, settings.step_settings(device), device)

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return weights, optimizer state and position, for torch.distributed.checkpoint."""
        return self._step.state() | {"progress": vars(self.progress).copy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state, as `checkpoints.load` fills it in."""
        self._step.restore(state)
        self.progress = Progress(**state["progress"])

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> Iterator[Report]:
        """Train to the end, yielding after each optimizer step; may be left and entered again."""
        while not self._is_over():
            start = time.monotonic()
            before = self.progress.tokens
            loss, accuracy = self._take_step()
            seconds = time.monotonic() - start
            self.progress.seconds += seconds
            speed = (self.progress.tokens - before) / seconds
            yield Report(self.progress, loss, accuracy, speed, self.done)

    @property
    def done(self) -> float:
        """Return the share of the run that is complete, 0 to 1; the learning rate depends on it."""
        settings, progress = self.settings, self.progress
        if settings.minutes is not None:
            return min(1.0, self._longest(progress.seconds) / (60 * settings.minutes))
        batches = len(self._batches(progress.epoch))
        return min(1.0, (progress.epoch + progress.batch / max(1, batches)) / settings.epochs)

    def learning_rate(self) -> float:
        """Return the learning rate of the next optimizer step."""
        settings, done = self.settings, self.done
        if done < settings.warmup:
            # Above zero, or the first step would change nothing.
            return settings.learning_rate * max(done / settings.warmup, 0.02)
        cosine = (1 + math.cos(math.pi * (done - settings.warmup) / (1 - settings.warmup))) / 2
        return settings.learning_rate * (settings.floor + (1 - settings.floor) * cosine)

    def _is_over(self) -> bool:
        if self.settings.minutes is not None:
            return self.done >= 1.0
        return self.progress.epoch >= self.settings.epochs

    def _take_step(self) -> tuple[float, list[float]]:
        """Take one optimizer step; return mean loss and accuracy of each simulated step."""
        settings, rate = self.settings, self.learning_rate()
        losses, hits, predictions = 0.0, [0.0] * settings.steps, 0
        for _ in range(settings.accumulate):
            loss = self._step.add(self.frozen, self._next(), settings.steps)
            losses += float(loss.total.detach()) / settings.accumulate
            hits = [total + float(hit) for total, hit in zip(hits, loss.hits, strict=True)]
            predictions += loss.tokens
        self._step.update(rate)
        self.progress.step += 1
        return losses, [hit / max(1, predictions) for hit in hits]

    def _next(self) -> PackedBatch:
        """Return this process's next batch; all processes advance by their number."""
        progress = self.progress
        batches = self._batches(progress.epoch)
        indices = batches[(progress.batch + self.rank) % len(batches)]
        progress.batch += self.world
        progress.tokens += sum(self.lengths[i] for i in indices) * self.world
        if progress.batch >= len(batches):
            progress.epoch, progress.batch = progress.epoch + 1, 0
        return PackedBatch.of([self.sequences[i] for i in indices])

    def _batches(self, epoch: int) -> list[list[int]]:
        if getattr(self, "_packed_epoch", None) != epoch:
            seed, budget = self.settings.seed, self.settings.batch_tokens
            self._packed, self._packed_epoch = pack(self.lengths, budget, seed, epoch), epoch
        return self._packed

    def _longest(self, seconds: float) -> float:
        """Return the longest time that any process has counted, so that all end together."""
        if self.world == 1:
            return seconds
        longest = torch.tensor(seconds, device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return float(longest)
