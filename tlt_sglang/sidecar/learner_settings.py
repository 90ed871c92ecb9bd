"""The settings of online training, which `tlt sidecar` derives from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from tlt_sglang.training.step import StepSettings


@dataclass(frozen=True)
class LearnerSettings:
    """The settings of online training."""

    steps: int = 3
    """Simulated draft steps, once first drafts are right often; engines may draft deeper."""
    deeper_from: float = 0.3
    """Share of right first drafts from which on `steps` are simulated; before that, later steps
    would cost three times the time and are hardly ever reached."""
    batch_tokens: int = 256
    """Largest micro-batch, in tokens."""
    micro_seconds: float | None = None
    """Time that a micro-batch may take; it shrinks to fit, down to `learner.LEAST_BATCH` tokens."""
    accumulate: int = 2
    """Micro-batches of one optimizer step, at their largest; of smaller ones it takes more, as
    few tokens make it noisy."""
    learning_rate: float = 1e-3
    warmup: int = 20
    """Optimizer steps in which the learning rate rises."""
    averaging: float = 0.97
    """Largest weight of what was averaged before, when the weights of a step are added to it."""
    clip: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    bfloat16: bool = False
    """Compute matrix products in bfloat16."""
    least_tokens: int = 512
    """Tokens in the buffer from which on training starts."""
    gate_steps: int = 40
    """Optimizer steps between two gates."""
    gate_tokens: int = 3000
    """Tokens of the most recent held-out sequences that a gate evaluates."""
    margin: float = 0.01
    """Relative gain in accept length from which on a candidate is published."""
    seed: int = 0

    def step_settings(self) -> StepSettings:
        """Return the settings of the training step."""
        return StepSettings(
            accumulate=self.accumulate,
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=0.0,
            clip=self.clip,
            bfloat16=self.bfloat16,
        )
