"""Penalties of a retracted request: they count the tokens that it already has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.sampling import penalties

pytestmark = pytest.mark.sglang
VOCAB, STOP = 8, 2


class Batch:
    """A batch of requests; SGLang refers to it weakly."""

    device = "cpu"

    def __init__(self, *requests: Any) -> None:
        self.reqs = list(requests)


def request(*output: int) -> Any:
    parameters = SimpleNamespace(
        frequency_penalty=0.5,
        presence_penalty=0.25,
        repetition_penalty=1.5,
        min_new_tokens=3,
        stop_token_ids={STOP},
    )
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=STOP)
    fields = {"sampling_params": parameters, "tokenizer": tokenizer, "eos_token_ids": None}
    return SimpleNamespace(output_ids=list(output), **fields)


def orchestrator(batch: Batch) -> Any:
    from sglang.srt.sampling import penaltylib

    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
    }
    made = penaltylib.BatchedPenalizerOrchestrator(VOCAB, batch, kinds)
    made.penalizers = penalties.in_order(made.penalizers)
    return made


def test_a_new_batch_counts_what_its_requests_have() -> None:
    """As if the tokens had been generated in it, one after the other."""
    grown = Batch(request(), request())
    expected = orchestrator(grown)
    for tokens in ([5, 1], [5, 4], [7, 4], [3, 4]):
        expected.cumulate_output_tokens(torch.tensor(tokens))
    resumed = Batch(request(5, 5, 7, 3), request(1, 4, 4, 4))
    made = orchestrator(resumed)
    penalties.count_outputs(made)
    logits = torch.arange(2 * VOCAB).view(2, VOCAB) - 8.5
    other = logits.clone()
    expected.apply(logits)
    made.apply(other)
    assert torch.equal(logits, other)


def test_a_request_without_tokens_has_no_penalties_yet() -> None:
    mixed = Batch(request(), request(4, 4))
    made = orchestrator(mixed)
    penalties.count_outputs(made)
    logits = torch.ones(2, VOCAB)
    made.apply(logits)
    others = [token for token in range(VOCAB) if token != STOP]
    assert logits[0, others].tolist() == [1.0] * len(others)
    assert logits[1, 4] < 0 and logits[0, STOP] == logits[1, STOP] == -torch.inf
