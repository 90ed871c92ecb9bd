"""The gate measures drafts for greedy responses greedily, and for sampled ones with their noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.learning import SIZE, VOCAB, drafter, frozen
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.sidecar import learner as learning
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.learner import Learner
from tlt_sglang.sidecar.learner_settings import LearnerSettings
from tlt_sglang.sidecar.temperature import temperature_of
from tlt_sglang.training.evaluate import AcceptLength, accept_length

LENGTH, PROMPT = 60, 20
EMBEDDING_AND_HEAD = torch.Generator().manual_seed(7)
torch.randn(VOCAB, SIZE, generator=EMBEDDING_AND_HEAD)
HEAD = torch.randn(VOCAB, SIZE, generator=EMBEDDING_AND_HEAD)
"""The whole head of which `frozen()` has the rows of the draft vocabulary."""


def response(greedy: bool, seed: int = 0) -> TokenSequence[torch.Tensor]:
    """Return a response that the target chose after random hidden states, with its prompt."""
    generator = torch.Generator().manual_seed(seed)
    last = torch.randn(LENGTH, SIZE, generator=generator) / 3
    logits = last @ HEAD.T
    sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator).view(-1)
    ids = (logits.argmax(-1) if greedy else sampled).roll(1)
    ids[:PROMPT] = torch.randint(0, VOCAB, (PROMPT,), generator=generator)
    return TokenSequence(ids, torch.cat([last] * 3, dim=-1), PROMPT, last, f"request {seed}")


@pytest.mark.parametrize(("greedy", "temperature"), [(True, 0.0), (False, 1.0)])
def test_a_response_shows_whether_it_was_sampled(greedy: bool, temperature: float) -> None:
    for seed in range(8):
        assert temperature_of(response(greedy, seed), frozen()) == temperature


def test_a_response_of_a_nearly_certain_target_shows_it_too() -> None:
    """One token of many that is not the likeliest is enough; rounding moves none so far."""
    greedy = response(greedy=True)
    for place in range(PROMPT + 1, LENGTH):
        ids = greedy.ids.clone()
        logits = HEAD @ greedy.last[place - 1]  # type: ignore[index]
        inside = frozen().draft_ids
        ids[place] = inside[logits[inside].argmin()]
        assert temperature_of(replace(greedy, ids=ids), frozen()) == 1.0
    rounded = replace(greedy, last=greedy.last.bfloat16().float())  # type: ignore[union-attr]
    assert temperature_of(rounded, frozen()) == 0.0


def test_the_gate_follows_the_rule_of_each_response(monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures: list[float] = []

    def recording(*arguments: Any, **options: Any) -> AcceptLength:
        temperatures.append(options["temperature"])
        return accept_length(*arguments, **options)

    monkeypatch.setattr(learning, "accept_length", recording)
    buffer = Buffer(1 << 24)
    for seed in range(60):
        buffer.add(response(seed % 2 == 0, seed))
    learner = Learner(drafter(), frozen(), buffer, LearnerSettings(), torch.device("cpu"))
    gate = learner.gate()
    assert gate is not None and gate.running == gate.candidate  # both have the same noise
    assert set(temperatures) == {0.0, 1.0}
    assert temperatures[::2] == temperatures[1::2]
