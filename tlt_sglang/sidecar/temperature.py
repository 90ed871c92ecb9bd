"""The temperature of a logged response, which decides how a gate measures drafts for it.

The log holds hidden states and tokens, not sampling parameters. Runs in the sidecar.
"""

from __future__ import annotations

from torch import Tensor, nn

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.simulate import Frozen

GREEDY_SHARE = 0.95
"""Share of a response's tokens that are the target's likeliest, from which on it counts as greedy.
Rounding makes it less than 1; at temperature 1 it is about a half."""


def temperature_of(sequence: TokenSequence[Tensor], frozen: Frozen) -> float:
    """Return 0.0 for a response that was greedy, and 1.0, the temperature of RL, for others.

    Only tokens of the drafter's vocabulary count; without any the response counts as greedy.
    """
    batch = PackedBatch.of([sequence]).to(frozen.target_head.device)
    first = max(1, sequence.response_start)
    labels = frozen.draft_index[batch.ids[first:]]
    inside = labels >= 0
    if not inside.any():
        return 0.0
    logits = nn.functional.linear(batch.last[first - 1 : -1][inside], frozen.target_head)
    share = float((logits.argmax(-1) == labels[inside]).float().mean())
    return 0.0 if share >= GREEDY_SHARE else 1.0
