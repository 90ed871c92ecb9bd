"""Which requests of a batch are sampled at a temperature, and which are greedy.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Request


def sampled_rows(requests: Sequence[Request]) -> Sequence[bool]:
    """Return whether each request is sampled, or () if all are greedy.

    Greedy are those whose temperature is 0 or whose top-k is 1: SGLang gives both a top-k of 1.
    """
    sampled = [request.sampling_params.top_k > 1 for request in requests]
    return sampled if any(sampled) else ()
