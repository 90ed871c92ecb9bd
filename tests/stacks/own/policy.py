"""The policy in transformers, as a trainer has it beside the server; for the stacks' programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

NORM = "model.norm.weight"
"""The tensor that updates change."""


class Policy:
    """A model on CPU in float32."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def step(self, factor: float) -> torch.Tensor:
        """Multiply one tensor of the model by `factor`, as a training step; return the tensor."""
        weight: torch.Tensor = self.model.get_parameter(NORM)
        weight.mul_(factor)
        return weight.detach().clone()

    @torch.no_grad()
    def gap(self, prompt: Sequence[int], answer: Sequence[int], logprobs: Sequence[float]) -> float:
        """Return the largest difference between a rollout's logprobs at temperature 1 and ours."""
        assert len(answer) == len(logprobs) > 0
        logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        rows = logits.log_softmax(-1)
        own = rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        return float((own - torch.tensor(logprobs)).abs().max())
