"""Hidden states of a verify step: the last ones, in the order of the accepted tokens.

The tests import SGLang themselves, so that collecting them does not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang import upstream
from tlt_sglang.engine import hidden_states
from tlt_sglang.upstream import v22, v23

WIDTH = 4
ACCEPTED = torch.tensor([[0, 2, 3], [4, -1, -1]], dtype=torch.int32)
"""The rows that two requests have accepted: a branch of three nodes, and the root alone."""
ROWS = torch.arange(8.0).view(8, 1).expand(8, 5)


@pytest.fixture(autouse=True)
def newest_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results have the fields of the newest shape, whichever version is installed."""
    monkeypatch.setattr(upstream, "current", v23.Adapter)


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
    # Without an index, SGLang has moved these rows, too.
    in_order = upstream.current().accept_index(step) is None
    assert states[:3, 0].tolist() == ([0, 1, 2] if in_order else [0, 2, 3])
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


def test_last_hidden_states_travel_behind_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some shapes of SGLang have no field for them in their outputs."""
    monkeypatch.setattr(hidden_states, "last_are_kept", lambda: True)
    features, last = torch.randn(4, 9), torch.randn(4, 3)
    keeps: Any = SimpleNamespace(keep_last_hidden_states=True)
    stored = hidden_states.append_last(features, last, keeps)
    assert stored.shape == (4, 12)
    output: Any = SimpleNamespace(hidden_states=stored)
    hidden_states.take_off_last(output, hidden_size=3)
    assert torch.equal(output.hidden_states, features)
    assert torch.equal(output.last_hidden_states, last)
    assert output.hidden_states.is_contiguous() and output.last_hidden_states.is_contiguous()


def test_other_hidden_states_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter has none to keep, and a target without features returns them anyway."""
    features, last = torch.randn(4, 9), torch.randn(4, 3)
    other: Any = SimpleNamespace()
    assert hidden_states.append_last(features, last, other) is features
    for stored, kept in ((None, True), (last, True), (features, False)):
        monkeypatch.setattr(hidden_states, "last_are_kept", lambda kept=kept: kept)
        output: Any = SimpleNamespace(hidden_states=stored)
        hidden_states.take_off_last(output, hidden_size=3)
        assert output.hidden_states is stored and not hasattr(output, "last_hidden_states")


@pytest.mark.parametrize(
    ("architecture", "kept"), [("LlamaForCausalLM", True), ("LlamaForCausalLMEagle3", False)]
)
def test_a_target_keeps_last_hidden_states(architecture: str, kept: bool) -> None:
    processor: Any = SimpleNamespace(config=SimpleNamespace(architectures=[architecture]))
    v22.Adapter().keep_last_hidden_states(processor)
    assert processor.keep_last_hidden_states == kept
