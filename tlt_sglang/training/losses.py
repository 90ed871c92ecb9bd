"""The losses that a drafter minimises, as published.

T packed tokens, V draft vocabulary, N hidden size. `weight` [T] is 1 where a prediction counts, 0
elsewhere; every loss is a mean over the predictions that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

STEP_DECAY = 0.8
"""Weight of a simulated step over the previous one (EAGLE-3, arXiv 2503.01840, official code)."""
CLASSIFICATION_WEIGHT = 0.1
"""w_cls of EAGLE (arXiv 2401.15077, section 4.2): regression counts ten times as much."""
LK_DECAY = 3.0
"""eta of the LK loss (arXiv 2602.23881): how fast the cross-entropy leaves it as drafts improve."""

LossName = Literal["soft", "lk"]


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the cross-entropy of logits [T, V] with the target's distribution [T, V].

    EAGLE, arXiv 2401.15077, equation L_cls; it is EAGLE-3's only loss.
    """
    each = -(target * logits.float().log_softmax(-1)).sum(-1)
    return _mean(each, weight)


def lk_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the LK loss of logits [T, V] against the target's distribution [T, V].

    The hybrid LK loss, arXiv 2602.23881: lambda * KL(p || q) + (1 - lambda) * TV(p, q), where TV is
    1 - sum(min(p, q)), the probability that rejection sampling refuses a draft, and lambda is
    exp(-eta * sum(min(p, q))), of its mean over the predictions, without a gradient. Bad drafters
    learn by KL, whose gradient does not vanish, and good ones by what is accepted. Instead of KL it
    has the cross-entropy, which is larger by the target's entropy: the gradient is the same.
    """
    scores = logits.float().log_softmax(-1)
    accepted = _mean(torch.minimum(scores.exp(), target).sum(-1), weight)
    share = torch.exp(-LK_DECAY * accepted.detach())
    entropy = _mean(-(target * scores).sum(-1), weight)
    return share * entropy + (1 - share) * (1 - accepted)


LOSSES: Mapping[LossName, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "soft": soft_cross_entropy,
    "lk": lk_loss,
}
"""The losses of predicted tokens, by name."""


def feature_regression(predicted: Tensor, feature: Tensor, weight: Tensor) -> Tensor:
    """Return the smooth L1 loss of hidden states [T, N], in units of their typical magnitude.

    EAGLE, arXiv 2401.15077, equation L_reg. It was published for targets whose features are of
    order one; those of others may be forty times as large and would dominate the cross-entropy, so
    both sides are divided by the root mean square of the features.
    """
    unit = feature.float().square().mean().sqrt().clamp_min(1e-6)
    each = functional.smooth_l1_loss(
        predicted.float() / unit, feature.float() / unit, reduction="none"
    ).mean(-1)
    return _mean(each, weight)


def step_weights(steps: int) -> list[float]:
    """Return the weights of simulated steps 0 to `steps` - 1."""
    return [STEP_DECAY**step for step in range(steps)]


def _mean(each: Tensor, weight: Tensor) -> Tensor:
    return (each * weight).sum() / weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
