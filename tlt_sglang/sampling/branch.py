"""SGLang's constant `_is_hip` of its drafting, where a chain's drafts are an argmax of logits.

Where the constant is true, SGLang takes the largest probability instead, in a function that a patch
wraps. Runs in the scheduler process.
"""

from __future__ import annotations


class ChoosesByProbs:
    """True while drafts are chosen with the target's noise."""

    def __init__(self) -> None:
        self.noisy = False

    def __bool__(self) -> bool:
        return self.noisy


CHOOSES_BY_PROBS = ChoosesByProbs()
