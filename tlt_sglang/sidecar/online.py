"""Training while the engine runs: micro-batches from the buffer, and a gate before publishing.

The learner goes on for ever. One micro-batch is the longest that it keeps a device, so sequences
longer than that are cut: another window of them at each draw. What is published is a candidate that
beats the version in use on held-out sequences of late, by MARGIN; the version in use is kept beside
it to compare with. A rejected version (an engine saw it do worse) makes it begin again from the
version before.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.training.batches import Batch
from tlt_sglang.training.evaluate import AcceptLength, accept_length
from tlt_sglang.training.models import Drafter
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.step import StepSettings, TrainingStep

LEAST_CUT = 32
"""Tokens of a cut sequence, at least."""
LEAST_BATCH = 64
MOST_EVALUATED = 512
"""Tokens of a held-out sequence that are looked at."""


@dataclass(frozen=True)
class Settings:
    """How to train online."""

    steps: int = 3
    """Simulated draft steps, once the first one is right often."""
    deeper_from: float = 0.3
    """Share of first drafts that are right, from which on they are: before that, later steps would
    cost three times the time to learn what is hardly ever asked for."""
    batch_tokens: int = 256
    """Of a micro-batch, at most."""
    micro_seconds: float | None = None
    """That it may take: it gets smaller until it does, down to LEAST_BATCH tokens."""
    accumulate: int = 2
    """Micro-batches of one optimizer step."""
    learning_rate: float = 1e-3
    warmup: int = 20
    """Optimizer steps in which the learning rate rises."""
    clip: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    bfloat16: bool = False
    """Matrix products in bfloat16."""
    least_tokens: int = 512
    """Tokens in the buffer before training starts."""
    gate_steps: int = 40
    """Optimizer steps between two looks at held-out sequences."""
    gate_tokens: int = 3000
    """Of held-out sequences that are looked at, the latest ones."""
    margin: float = 0.01
    """A candidate is published if its accept length is better by this share."""
    seed: int = 0

    def step_settings(self) -> StepSettings:
        """Return what the training step needs of these."""
        return StepSettings(
            accumulate=self.accumulate,
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=0.0,
            clip=self.clip,
            bfloat16=self.bfloat16,
        )


@dataclass(frozen=True)
class Gate:
    """What was found at the gate."""

    running: float
    """Accept length of the version in use."""
    candidate: float
    passed: bool
    verify_steps: int


class Learner:
    """Trains `drafter` on what `buffer` holds."""

    def __init__(
        self,
        drafter: Drafter,
        frozen: Frozen,
        buffer: Buffer,
        settings: Settings,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafter, self.frozen, self.buffer = drafter, frozen, buffer
        self.settings, self.device, self._clock = settings, device, clock
        self.step = 0
        """Optimizer steps, over all starts."""
        self.batch_tokens = settings.batch_tokens
        """Of the next micro-batch, at most."""
        self.tokens = 0
        self.loss = 0.0
        """Of late."""
        self.right = 0.0
        """Share of first drafts that are right in training, of late."""
        self._running = _copied(drafter)
        self._gated = 0
        self._rng = random.Random(settings.seed)
        self.training = TrainingStep(drafter, settings.step_settings(), device)

    @property
    def depth(self) -> int:
        """Draft steps that are simulated now."""
        return self.settings.steps if self.right >= self.settings.deeper_from else 1

    def can_train(self) -> bool:
        """Whether there is enough to train on."""
        return self.buffer.tokens >= self.settings.least_tokens

    def micro_step(self) -> bool:
        """One micro-batch, and an optimizer step with every `accumulate`-th; False: no data."""
        sequences = self.draw()
        if not sequences:
            return False
        started = self._clock()
        batch = Batch.of(sequences)
        loss = self.training.add(self.frozen, batch, self.depth)
        value = float(loss.total.detach())
        self.loss = value if not self.loss else 0.98 * self.loss + 0.02 * value
        right = float(loss.hits[0]) / max(1, loss.tokens)
        self.right = right if not self.right else 0.9 * self.right + 0.1 * right
        self.tokens += len(batch.ids)
        if self.training.is_complete:
            self._update()
        self._fit_in(self._clock() - started)
        return True

    def _fit_in(self, seconds: float) -> None:
        """Adapt the size of micro-batches to what the last one took."""
        most = self.settings.micro_seconds
        if most is not None and seconds > most:
            self.batch_tokens = max(LEAST_BATCH, self.batch_tokens * 3 // 4)
        elif most is not None and seconds < most / 2:
            self.batch_tokens = min(self.settings.batch_tokens, self.batch_tokens * 9 // 8)

    def _update(self) -> None:
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.step + 1) / settings.warmup)
        self.training.update(rate)
        self.step += 1

    def draw(self) -> list[TokenSequence[Tensor]]:
        """Sequences of at most `batch_tokens` together, cut where they are longer."""
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
        """Whether the candidate has been trained enough to be looked at."""
        return self.step - self._gated >= self.settings.gate_steps

    def gate(self, may_go_on: Callable[[], bool] = lambda: True) -> Gate | None:
        """Candidate against the version in use; None where nothing is held out yet.

        Between two sequences it asks whether it `may_go_on`; None, too, if it may not.
        """
        sequences = self._held_out()
        steps = max(3, self.settings.steps)
        running, candidate = AcceptLength(), AcceptLength()
        for sequence in sequences:
            for found, drafter in ((running, self._running), (candidate, self.drafter)):
                if not may_go_on():
                    return None
                found.join(accept_length(drafter, self.frozen, [sequence], steps=steps))
        self._gated = self.step
        if not sequences:
            return None
        passed = candidate.mean > running.mean * (1 + self.settings.margin)
        return Gate(running.mean, candidate.mean, passed and _enough(running), running.verify_steps)

    def published(self) -> None:
        """The candidate is the version in use now."""
        self._running = _copied(self.drafter)

    def begin_again(self, weights: dict[str, Tensor]) -> None:
        """Go back to `weights`, which are the version in use: the optimizer starts anew, too."""
        self.drafter.take(weights)
        self.training.reset_optimizer()
        self._running = _copied(self.drafter)
        self._gated = self.step

    def _held_out(self) -> list[TokenSequence[Tensor]]:
        found: list[TokenSequence[Tensor]] = []
        left = self.settings.gate_tokens
        for recorded in reversed(self.buffer.held_out()):
            sequence = beginning(recorded)
            if found and len(sequence) > left:
                break
            found.append(sequence)
            left -= len(sequence)
        return found

    # -- state -----------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The candidate's, detached."""
        return {name: tensor.detach() for name, tensor in self.drafter.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint: trainable weights, optimizer, counters."""
        return self.training.state() | {"progress": {"step": self.step, "tokens": self.tokens}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the version in use stays what it is."""
        self.training.restore(state)
        self.step, self.tokens = state["progress"]["step"], state["progress"]["tokens"]
        self._gated = self.step

    def leave(self) -> None:
        """Give the device's memory back: gradients, and on CUDA what the allocator holds."""
        self.training.drop_gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def beginning(sequence: TokenSequence[Tensor]) -> TokenSequence[Tensor]:
    """Return the window that is evaluated: the start of the response and the prompt before it."""
    start = max(0, sequence.response_start - MOST_EVALUATED // 2)
    return sequence.window(start, MOST_EVALUATED)


def cut(sequence: TokenSequence[Tensor], most: int, rng: random.Random) -> TokenSequence[Tensor]:
    """Return a random window of at most `most` tokens, some of which belong to the response."""
    if len(sequence) <= most:
        return sequence
    latest = len(sequence) - most
    start = rng.randint(min(latest, max(0, sequence.response_start - most // 2)), latest)
    return sequence.window(start, most)


def _copied(drafter: Drafter) -> Drafter:
    found = copy.deepcopy(drafter)
    return found.requires_grad_(False).eval()


def _enough(found: AcceptLength) -> bool:
    return found.verify_steps >= 32
