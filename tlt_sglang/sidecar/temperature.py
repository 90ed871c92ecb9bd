"""The temperature of a logged response, which decides how a gate measures drafts for it.

The log holds hidden states and tokens, not sampling parameters. Runs in the sidecar.
"""

from __future__ import annotations

from torch import Tensor, nn

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.simulate import Frozen

SAMPLED_NATS = 0.5
"""Distance of a token from the target's likeliest from which on it was sampled. Rounding in the log
makes it a few hundredths for the tokens of a greedy response."""


def temperature_of(sequence: TokenSequence[Tensor], frozen: Frozen) -> float:
    """Return 0.0 for a response that was greedy, and 1.0, the temperature of RL, for others.

    Also where the target is nearly certain of most tokens, a sampled response has some that are not
    the likeliest; one without any says as much as a greedy one. Only tokens of the drafter's
    vocabulary count.
    """
    batch = PackedBatch.of([sequence]).to(frozen.target_head.device)
    first = max(1, sequence.response_start)
    labels = frozen.draft_index[batch.ids[first:]]
    inside = labels >= 0
    if not inside.any():
        return 0.0
    logits = nn.functional.linear(batch.last[first - 1 : -1][inside], frozen.target_head).float()
    chosen = logits.gather(-1, labels[inside].unsqueeze(-1)).squeeze(-1)
    return 1.0 if bool((logits.amax(-1) - chosen > SAMPLED_NATS).any()) else 0.0
