"""The training step: forward, loss, backward, and an optimizer step for every few micro-batches.

`tlt train` and the sidecar take the same step; what differs is where batches come from, which
learning rate applies, and how many draft steps are simulated. Those are arguments here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tlt_sglang.training.losses import LossName
from tlt_sglang.training.simulate import Frozen, Loss, loss_of

if TYPE_CHECKING:
    from tlt_sglang.training.batches import PackedBatch
    from tlt_sglang.training.models import Drafter


@dataclass(frozen=True)
class StepSettings:
    """The part of the settings that `tlt train` and the sidecar have in common."""

    accumulate: int
    """Micro-batches of full size in one optimizer step."""
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    """Norm that gradients are clipped to."""
    bfloat16: bool
    """Compute matrix products in bfloat16; weights, optimizer and losses stay in float32."""
    loss: LossName = "soft"


class TrainingStep:
    """Updates `drafter` by AdamW, from the summed gradients of some micro-batches."""

    def __init__(self, drafter: Drafter, settings: StepSettings, device: torch.device) -> None:
        self.drafter, self.settings, self.device = drafter, settings, device
        self.optimizer = torch.optim.AdamW(
            drafter.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._added = 0.0
        """Share of an optimizer step that has been added since the last one."""

    @property
    def is_complete(self) -> bool:
        """Return whether enough micro-batches have been added for an optimizer step."""
        return self._added > 1 - 1e-6

    def add(self, frozen: Frozen, batch: PackedBatch, depth: int, size: float = 1.0) -> Loss:
        """Add the gradients of one micro-batch, with `depth` simulated draft steps.

        `size` is how large it is, where 1 is the size of which an optimizer step takes
        `accumulate`: of smaller ones it takes more.
        """
        share = size / self.settings.accumulate
        self.drafter.train()
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            loss = loss_of(self.drafter, frozen, batch, depth, self.settings.loss)
        torch.autograd.backward(loss.total * share)
        self._added += share
        return loss

    def update(self, learning_rate: float) -> bool:
        """Clip the gradients, take the optimizer step and start over with no gradients.

        Gradients that are not finite are dropped, and False is returned.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.settings.clip)
        is_finite = bool(norm.isfinite())
        if is_finite:
            self.optimizer.step()
        self.drop_gradients()
        return is_finite

    def drop_gradients(self) -> None:
        """Free the gradients of the micro-batches added since the last optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._added = 0.0

    def reset_optimizer(self) -> None:
        """Forget moments and gradients; for weights that come from elsewhere."""
        self.optimizer.state.clear()
        self.drop_gradients()

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return trainable weights and optimizer state, for torch.distributed.checkpoint."""
        if not self.optimizer.state:
            self.drop_gradients()  # while there are some, torch makes no state for it to fill in
        model, optimizer = get_state_dict(self.drafter, self.optimizer)
        return {"drafter": model, "optimizer": optimizer}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state, as `checkpoints.load` fills it in."""
        self.drop_gradients()
        set_state_dict(
            self.drafter,
            self.optimizer,
            model_state_dict=state["drafter"],
            optim_state_dict=state["optimizer"],
        )
