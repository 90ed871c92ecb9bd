"""Training while the engine runs: micro-batches from the buffer, and a gate before publishing.

The learner trains without end. It keeps a device no longer than a micro-batch takes, so longer
sequences are cut, to another window each time. A candidate is published if it beats the version in
use on recent held-out sequences by `LearnerSettings.margin`. The candidate is the average of the
weights of recent optimizer steps (Polyak and Juditsky 1992), as the rate is never lowered, and
single steps on a few hundred tokens move a good drafter about. After a rejection (an engine
measured that the version does worse) training starts over from the version before.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.learner_settings import LearnerSettings
from tlt_sglang.sidecar.temperature import temperature_of
from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.evaluate import AcceptLength, accept_length
from tlt_sglang.training.models import Drafter
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.step import TrainingStep

LEAST_CUT = 32
"""Smallest window of a cut sequence, in tokens."""
LEAST_BATCH = 64
MOST_JUDGED = 512
"""Largest window of a held-out sequence, in tokens."""
RECENT = 9
"""At first the weight of n averaged steps is n over (n + RECENT)."""
UNDECIDED = 4
"""Part of the usual steps after which the next gate comes, where one had too little to judge by."""


@dataclass(frozen=True)
class Gate:
    """The result of a gate."""

    running: float
    """Accept length of the version in use."""
    candidate: float
    passed: bool
    verify_steps: int


class Learner:
    """Trains `drafter` on the sequences in `buffer`."""

    def __init__(
        self,
        drafter: Drafter,
        frozen: Frozen,
        buffer: Buffer,
        settings: LearnerSettings,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafter, self.frozen, self.buffer = drafter, frozen, buffer
        self.settings, self.device, self._clock = settings, device, clock
        self.step = 0
        """Optimizer steps, restarts included."""
        self.batch_tokens = settings.batch_tokens
        """Largest size of the next micro-batch, in tokens."""
        self.tokens = 0
        self.seconds = 0.0
        """Time of this process in micro-batches."""
        self.loss = 0.0
        """Moving average of the loss."""
        self.right = 0.0
        """Moving average of the share of right first drafts in training."""
        self.restarts = 0
        """How often training began again from other weights."""
        self.skipped = 0
        """Optimizer steps whose gradients were not finite."""
        self._running, self._average = _copied(drafter), _copied(drafter)
        self._averaged = 0
        """Optimizer steps in the average."""
        self._gate_at = settings.gate_steps
        """Optimizer step from which on a gate is due."""
        self._fresh_at = 0
        """Optimizer step at which the optimizer began without moments."""
        self._rng = random.Random(settings.seed)
        self.training = TrainingStep(drafter, settings.step_settings(), device)

    @property
    def depth(self) -> int:
        """Return the number of draft steps that are simulated now."""
        return self.settings.steps if self.right >= self.settings.deeper_from else 1

    def can_train(self) -> bool:
        """Return whether the buffer holds enough tokens to train on."""
        return self.buffer.tokens >= self.settings.least_tokens

    def micro_step(self) -> bool:
        """Train on one micro-batch; every `accumulate` full ones are an optimizer step.

        Returns False if there is no data.
        """
        sequences = self.draw()
        if not sequences:
            return False
        started = self._clock()
        batch = PackedBatch.of(sequences)
        size = self.batch_tokens / self.settings.batch_tokens
        loss = self.training.add(self.frozen, batch, self.depth, size)
        value = float(loss.total.detach())
        self.loss = value if not self.loss else 0.98 * self.loss + 0.02 * value
        right = float(loss.hits[0]) / max(1, loss.tokens)
        self.right = right if not self.right else 0.9 * self.right + 0.1 * right
        self.tokens += len(batch.ids)
        if self.training.is_complete:
            self._update()
        took = self._clock() - started
        self.seconds += took
        self._fit_in(took)
        return True

    def _fit_in(self, seconds: float) -> None:
        """Adapt the size of micro-batches to the time that the last one took."""
        most = self.settings.micro_seconds
        if most is not None and seconds > most:
            self.batch_tokens = max(LEAST_BATCH, self.batch_tokens * 3 // 4)
        elif most is not None and seconds < most / 2:
            self.batch_tokens = min(self.settings.batch_tokens, self.batch_tokens * 9 // 8)

    def _update(self) -> None:
        settings = self.settings
        warm = min(1.0, (self.step - self._fresh_at + 1) / settings.warmup)
        if not self.training.update(settings.learning_rate * warm):
            self.skipped += 1
        self.step += 1
        self._averaged += 1
        # At first the average is over few steps: a drafter that is far off moves fast.
        decay = min(settings.averaging, self._averaged / (self._averaged + RECENT))
        weights = [parameter.detach() for parameter in self.drafter.parameters()]
        torch._foreach_lerp_([*self._average.parameters()], weights, 1 - decay)

    def _restart_average(self) -> None:
        self._average, self._averaged = _copied(self.drafter), 0

    def draw(self) -> list[TokenSequence[Tensor]]:
        """Return sequences of at most `batch_tokens` in all, cut where they are longer."""
        left = self.batch_tokens
        sequences = []
        for recorded in self.buffer.sample(4 * left):
            if left < LEAST_CUT:
                break
            sequence = cut(recorded, left, self._rng)
            sequences.append(sequence)
            left -= len(sequence)
        return sequences

    # -- the gate --------------------------------------------------------------------------------

    def gate_is_due(self) -> bool:
        """Return whether the candidate has been trained enough for the next gate."""
        return self.step >= self._gate_at

    def gate(self, may_continue: Callable[[], bool] = lambda: True) -> Gate | None:
        """Compare the candidate with the version in use; return None without held-out sequences.

        Drafts for sampled responses are those of coupled sampling. Between two sequences it calls
        `may_continue`, and returns None once that returns False.
        """
        sequences = self._held_out()
        steps = max(3, self.settings.steps)
        running, candidate = AcceptLength(), AcceptLength()
        for sequence in sequences:
            temperature = temperature_of(sequence, self.frozen)
            for length, drafter in ((running, self._running), (candidate, self._average)):
                if not may_continue():
                    return None
                measured = accept_length(
                    drafter, self.frozen, [sequence], steps=steps, temperature=temperature
                )
                length.join(measured)
        # Without enough to judge by, the next gate is soon.
        decides, steps = _enough(running), self.settings.gate_steps
        self._gate_at = self.step + (steps if decides else max(1, steps // UNDECIDED))
        if not sequences:
            return None
        passed = candidate.mean > running.mean * (1 + self.settings.margin)
        return Gate(running.mean, candidate.mean, passed and decides, running.verify_steps)

    def published(self) -> None:
        """Make the candidate the version in use."""
        self._running = _copied(self._average)

    def begin_again(self, weights: dict[str, Tensor]) -> None:
        """Start over from `weights`, the version in use, with a fresh optimizer."""
        self.drafter.take(weights)
        self.training.reset_optimizer()
        self._running = _copied(self.drafter)
        self._restart_average()
        self._gate_at, self._fresh_at = self.step + self.settings.gate_steps, self.step
        self.restarts += 1

    def _held_out(self) -> list[TokenSequence[Tensor]]:
        chosen: list[TokenSequence[Tensor]] = []
        room = self.settings.gate_tokens
        for recorded in reversed(self.buffer.held_out()):
            sequence = judged(recorded, self._judged_tokens)
            if not chosen or len(sequence) <= room:
                chosen.append(sequence)
                room -= len(sequence)
        return chosen

    @property
    def _judged_tokens(self) -> int:
        """Return the largest window that a gate evaluates; it takes about a micro-batch's time."""
        if self.settings.micro_seconds is None:
            return MOST_JUDGED
        return min(MOST_JUDGED, 2 * self.batch_tokens)

    # -- state -----------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that are being trained, detached."""
        return {name: tensor.detach() for name, tensor in self.drafter.state_dict().items()}

    def candidate(self) -> dict[str, Tensor]:
        """Return the weights that a gate judges: the average over recent optimizer steps."""
        return {name: tensor.detach() for name, tensor in self._average.state_dict().items()}

    def average(self, others: Sequence[tuple[Mapping[str, Tensor], int]], steps: int) -> None:
        """Average the weights with `others`, each by its optimizer steps; they have had `steps`.

        Others with weights of another shape, or that are not finite, are left out.
        """
        usable = [(w, n) for w, n in others if not self.drafter.unfit(w) and _is_finite(w)]
        total = steps + sum(count for _, count in usable)
        if not usable or not total:
            return
        averaged = {
            name: tensor.float() * (steps / total) for name, tensor in self.weights().items()
        }
        for weights, count in usable:
            for name, tensor in averaged.items():
                tensor.add_(weights[name].to(tensor), alpha=count / total)
        self.drafter.take(averaged)

    def state(self) -> dict[str, Any]:
        """Return weights, optimizer state and counters, for torch.distributed.checkpoint."""
        return self.training.state() | {"progress": {"step": self.step, "tokens": self.tokens}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state; the version in use stays the same."""
        self.training.restore(state)
        self.step, self.tokens = state["progress"]["step"], state["progress"]["tokens"]
        self._restart_average()
        self._gate_at, self._fresh_at = self.step + self.settings.gate_steps, 0
        self.restarts += 1

    def leave(self) -> None:
        """Free device memory: the gradients, and on CUDA the allocator's cache."""
        self.training.drop_gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def judged(sequence: TokenSequence[Tensor], most: int) -> TokenSequence[Tensor]:
    """Return the window that is evaluated, the same one each time: somewhere in the response."""
    return cut(sequence, most, random.Random(sequence.request))


def cut(sequence: TokenSequence[Tensor], most: int, rng: random.Random) -> TokenSequence[Tensor]:
    """Return a random window of at most `most` tokens, some of which belong to the response."""
    if len(sequence) <= most:
        return sequence
    latest = len(sequence) - most
    start = rng.randint(min(latest, max(0, sequence.response_start - most // 2)), latest)
    return sequence.window(start, most)


def _copied(drafter: Drafter) -> Drafter:
    frozen = copy.deepcopy(drafter)
    return frozen.requires_grad_(False).eval()


def _is_finite(weights: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in weights.values())


def _enough(length: AcceptLength) -> bool:
    return length.verify_steps >= 32
