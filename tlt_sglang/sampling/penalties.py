"""The order of a batch's penalties, which SGLang leaves to the addresses of classes.

SGLang keeps its penalizers in a set. Subtracting a penalty and then dividing by another gives other
logits than the other way round, so with several penalties two processes report other logprobs, and
now and then other tokens, for the same request.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import Penalizer


def in_order(penalizers: Mapping[type[Penalizer], Penalizer]) -> dict[type[Penalizer], Penalizer]:
    """Return the penalizers of a batch in the order of speculation and of overlap scheduling: those
    that add to logits, then those that scale them."""

    def place(kind: type[Penalizer]) -> tuple[bool, str]:
        return kind.is_multiplicative, kind.__name__

    return {kind: penalizers[kind] for kind in sorted(penalizers, key=place)}
