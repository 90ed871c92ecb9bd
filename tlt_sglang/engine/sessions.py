"""The KV slots that a streaming session keeps from one turn to the next.

The keys and values of the last token of an answer are computed by the step after it, which never
runs. In plain decoding that token has no slot yet, so that SGLang prefills it with the next turn.
Where slots are reserved for drafts it has one, which SGLang takes for computed.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import Turn


def keep(original: Callable[[], bool], turn: Turn, speculates: bool) -> bool:
    """Keep the slots of a turn that has ended in its session, as `original` does; return whether it
    was one. With speculation the last token is left to the next prefill."""
    kv = turn.kv
    kept = original()
    if kept and speculates:
        computed = len(turn.origin_input_ids) + len(turn.output_ids) - 1
        kv.kv_committed_len = min(kv.kv_committed_len, computed)
    return kept
