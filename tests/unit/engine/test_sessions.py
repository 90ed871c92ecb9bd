"""The keys and values of the last token of a turn are left to the next prefill."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tlt_sglang.engine.sessions import keep

PROMPT, ANSWER = list(range(10)), list(range(5))


@pytest.mark.parametrize(
    ("speculates", "kept", "committed"), [(True, True, 14), (False, True, 15), (True, False, 15)]
)
def test_the_last_token_is_prefilled_again(speculates: bool, kept: bool, committed: int) -> None:
    record = SimpleNamespace(req_pool_idx=1, kv_committed_len=17, kv_allocated_len=30)
    turn = SimpleNamespace(kv=record, origin_input_ids=PROMPT, output_ids=[*ANSWER, 9, 9])

    def upstream() -> bool:
        """Cut what a step has committed past the end, and take the slots from the request."""
        record.kv_committed_len = record.kv_allocated_len = 15
        turn.output_ids = ANSWER
        turn.kv = SimpleNamespace(req_pool_idx=0, kv_committed_len=0, kv_allocated_len=0)
        return kept

    assert keep(upstream, turn, speculates) is kept
    assert record.kv_committed_len == committed
