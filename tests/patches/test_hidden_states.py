"""Hidden states of a verify step: the last ones, in the order of the accepted tokens.

The tests import SGLang themselves, so that collecting them does not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.engine import hidden_states

WIDTH = 4
ACCEPTED = torch.tensor([[0, 2, 3], [4, -1, -1]], dtype=torch.int32)
"""The rows that two requests have accepted: a branch of three nodes, and the root alone."""
ROWS = torch.arange(8.0).view(8, 1).expand(8, 5)


def result(accept_index: torch.Tensor | None, last: torch.Tensor | None) -> Any:
    output = SimpleNamespace(hidden_states=torch.zeros(8, 15), last_hidden_states=last)
    return SimpleNamespace(
        logits_output=output, accept_index=accept_index, speculative_num_draft_tokens=WIDTH
    )


def test_of_a_verify_step() -> None:
    step = result(ACCEPTED, ROWS)
    hidden_states.put_last(step)
    states = step.logits_output.hidden_states
    assert states.shape == (8, 5)
    assert states[:3, 0].tolist() == [0, 2, 3]
    assert states[4, 0] == 4


def test_of_a_prefill() -> None:
    step = result(None, ROWS)
    hidden_states.put_last(step)
    assert torch.equal(step.logits_output.hidden_states, ROWS)


def test_where_the_drafter_reads_the_last_ones() -> None:
    step = result(ACCEPTED, None)
    features = step.logits_output.hidden_states
    hidden_states.put_last(step)
    assert step.logits_output.hidden_states is features


@pytest.mark.parametrize(("topk", "first"), [(-1, [0, 2, 3]), (2, [0, 1, 2])])
def test_of_n_grams(topk: int, first: list[int]) -> None:
    """SGLang itself orders the trees of drafters."""
    step: Any = SimpleNamespace(tree_topk=topk, draft_token_num=WIDTH)
    output: Any = SimpleNamespace(hidden_states=ROWS)
    hidden_states.order_ngrams(step, output, ACCEPTED)
    assert output.hidden_states[:3, 0].tolist() == first
