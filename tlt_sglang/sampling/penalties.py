"""The penalties of a batch: their order, and what they count of a retracted request.

SGLang leaves the order to the addresses of classes.
It keeps its penalizers in a set. Subtracting a penalty and then dividing by another gives other
logits than the other way round, so with several penalties two processes report other logprobs, and
now and then other tokens, for the same request.

Runs in the scheduler process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import Penalizer, PenalizerOrchestrator


def in_order(penalizers: Mapping[type[Penalizer], Penalizer]) -> dict[type[Penalizer], Penalizer]:
    """Return the penalizers of a batch in the order of speculation and of overlap scheduling: those
    that add to logits, then those that scale them."""

    def place(kind: type[Penalizer]) -> tuple[bool, str]:
        return kind.is_multiplicative, kind.__name__

    return {kind: penalizers[kind] for kind in sorted(penalizers, key=place)}


def count_outputs(orchestrator: PenalizerOrchestrator) -> None:
    """Count the tokens that requests already have when a batch is made of them.

    SGLang starts from none, so after a retraction a request went on without its penalties.
    """
    for row, request in enumerate(orchestrator.reqs()):
        output = list(request.output_ids)
        for penalizer in orchestrator.penalizers.values() if output else ():
            if penalizer.is_prepared():
                one = copy.copy(penalizer)  # its tensors of one row, which share their memory
                tensors = {k: v for k, v in vars(one).items() if isinstance(v, torch.Tensor)}
                vars(one).update({name: value[row : row + 1] for name, value in tensors.items()})
                for token in output:
                    one.cumulate_output_tokens(torch.tensor([token], device=orchestrator.device))
